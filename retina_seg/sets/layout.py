"""A dataset on disk: which image and mask belong together, which files are variants of one photo.

A dataset is a folder, a CSV file of pairs (columns image, mask; optional part, fov, mask_2nd, photo, subject, name; paths
relative to the file), or {"images": PATTERN, "masks": PATTERN}. The folder's own layout, Data1:

{train,test}/{image,mask}/<name>.<ending>      images, and masks of the same name
{train,test}/{fov,mask_2nd}/<name>.<ending>    optional: field of view, second observer's mask
photos.csv                                     optional: part,name,photo[,subject] of each file

`part_folders` knows other names of the folders, `match_names` other names of the masks.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from retina_seg.fov import find_fov
from retina_seg.images import list_images, read_grey, read_image, read_mask, visible
from retina_seg.sets.names import match_names
from retina_seg.utils import UserError, file_kind, natural_sort, read_csv, read_json, user_path

PARTS = ("train", "test")
ALL = "all"  # the one part of a dataset without parts: it stands for whichever is asked for
KINDS = ("image", "mask", "fov", "mask_2nd")
TREE = """expected:
    DATA/train/image/1.png    DATA/train/mask/1.png    images and vessel masks of the same names, for training
    DATA/test/image/2.png     DATA/test/mask/2.png     the same for testing
    from a public set: retina-seg prepare SET SOURCE DESTINATION
    from other files: --images "PATTERN" --masks "PATTERN", or --pairs LIST.csv with columns image, mask"""
# what folders are called, in lower case without - _ and space
_PARTS = {"train": ("train", "training"), "test": ("test", "testing")}
_MANUAL = ("1stmanual", "manual", "manual1", "vesselsegmentation", "vesselsegmentations")
_MASKS = ("mask", "masks")  # beside one of _MANUAL the field of view
_VESSELS = (*_MANUAL, "groundtruth", "gt", "label", "labels", "annotation", "annotations", "vessel", "vessels")
_NAMES = {
    "image": ("image", "images", "img", "imgs", "original", "originals"),
    "mask": (*_MASKS, *_VESSELS),
    "fov": ("fov", "fovs"),
    "mask_2nd": ("mask2nd", "2ndmanual", "manual2"),
}
Data = str | Path | dict[str, str]


@dataclass(frozen=True)
class Pair:
    """The files of an image and its mask."""

    name: str  # the image's file name without its ending
    image: Path
    mask: Path
    photo: str  # the same for all variants of one photo
    subject: str  # whose eye it is, else the photo: splits keep a person's two eyes on one side
    fov: Path | None = None  # the field of view, where the dataset has one
    mask_2nd: Path | None = None  # the second observer's mask, where the dataset has one
    dataset: str = ""  # the name of its dataset's folder, in lower case


@dataclass
class PartFiles:
    """What one part of a dataset holds: kind (`KINDS`) -> name -> file, and a line for every problem with its remedy."""

    files: dict[str, dict[str, Path]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    problems: list[str] = field(default_factory=list)
    folders: dict[str, Path] = field(
        default_factory=dict
    )  # kind -> the one folder its files are in, where there is one


def find_set(data: Data) -> Path | dict[str, str]:
    """The dataset at `data`: a folder in a known layout, or up to three folders below it, as archives unpack; else `data`.

    Raises `UserError`: no such folder or table, none in a known layout, or several.
    """
    if isinstance(data, dict):
        if set(data) != {"images", "masks"} or not all(isinstance(value, (str, Path)) for value in data.values()):
            raise UserError(f"{data}: two patterns are needed, images and masks")
        return data
    data = user_path(data)
    if data.is_file():
        if data.suffix.lower() not in (".csv", ".tsv", ".txt"):
            raise UserError(f"{data}: is {file_kind(data) or 'a file'}; give a folder, or a CSV file of pairs")
        return data
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; {TREE}")
    for known in (_is_data1, part_folders):
        for level in _levels(data):
            found = [folder for folder in level if known(folder)]
            if len(found) > 1:
                names = ", ".join(str(folder) for folder in found[:3])
                raise UserError(f"{data}: holds several datasets ({names}); name one of them")
            if found:
                return found[0]
    for folder in (folder for level in _levels(data) for folder in level if (folder / "Image_01L.jpg").is_file()):
        patterns = f'--images "{folder}/Image_*.jpg" --masks "{folder}/Image_*_1stHO.png"'
        raise UserError(
            f"{data}: is CHASE_DB1 as published; retina-seg prepare chase_db1 {data} NEW_FOLDER, or {patterns}"
        )
    raise UserError(f"{data}: has no train/image or test/image folder, nor another layout that is known; {TREE}")


def _levels(data: Path) -> Iterator[list[Path]]:
    level = [data]
    for _ in range(4):
        yield level
        level = [below for folder in level for below in sorted(folder.iterdir()) if below.is_dir()]


def _is_data1(folder: Path) -> bool:
    return any((folder / part / "image").is_dir() for part in PARTS)


def _plain(name: str) -> str:
    return re.sub("[-_ ]", "", name.lower())


def _called(folder: Path, names: Sequence[str]) -> list[Path]:
    return [path for path in visible(folder) if _plain(path.name) in names and path.is_dir()]


def part_folders(root: Path) -> dict[str, tuple[Path, dict[str, list[Path]]]]:
    """Part -> its folder, and kind -> the folders of that kind in it (one, in a sound dataset); {} where none has images.

    Names as `_PARTS` and `_NAMES`; case, -, _ and space do not matter. The one part is `ALL` where images and masks lie
    in `root` itself. Raises `UserError`: two folders of one part.
    """
    tops = {part: _called(root, _PARTS[part]) for part in PARTS}
    for part, paths in tops.items():
        if len(paths) > 1 and not _is_data1(root) and any(_called(path, _NAMES["image"]) for path in paths):
            raise UserError(f"{root}: {paths[0].name} and {paths[1].name} may both be its {part} part; rename one")
    own = {part: root / part if root / part in paths else paths[0] for part, paths in tops.items() if paths}
    for parts in (own, {ALL: root}):
        manual = any(_called(top, _MANUAL) for top in parts.values())
        names = _NAMES | ({"mask": _VESSELS, "fov": (*_NAMES["fov"], *_MASKS)} if manual else {})
        found = {part: (top, {kind: _called(top, names[kind]) for kind in KINDS}) for part, top in parts.items()}
        for top, kinds in found.values():
            if (top / "image").is_dir():  # the Data1 layout: nothing else counts beside its own names
                kinds.update({kind: [top / kind] for kind, paths in kinds.items() if top / kind in paths})
        if any(kinds["image"] and (kinds["mask"] or parts is own) for _, kinds in found.values()):
            return found
    return {}


def list_parts(root: Path | dict[str, str]) -> list[str]:
    """The parts of the dataset `root` (as `find_set` gives it): "train" and "test", or `ALL` alone."""
    if isinstance(root, dict):
        return [ALL]
    return list(dict.fromkeys(row["part"] for row in _pair_rows(root)) if root.is_file() else part_folders(root))


def collect_files(root: Path | dict[str, str], part: str) -> PartFiles:
    """The files of one part of the dataset `root`, by kind and image's name in natural order, with all problems found."""
    found = PartFiles()
    if isinstance(root, Path) and root.is_file():
        _collect_rows(root, part, found)
        return found
    where = _collect_patterns(root, found) if isinstance(root, dict) else _collect_folders(root, part, found)
    for kind in KINDS[1:]:
        images = {mask: image for image, mask in match_names([*found.files["image"]], [*found.files[kind]]).items()}
        found.files[kind] = {images.get(name, name): path for name, path in found.files[kind].items()}
    for kind, other in (("image", "mask"), ("mask", "image")):
        if partners := found.files[other]:
            alone = [path for name, path in found.files[kind].items() if name not in partners]
            place = str(where[other]) if isinstance(root, dict) else str(where[other]) + "/{}.*"
            found.problems += [f"{p}: has no partner {place.format(p.stem)}; add it or remove this" for p in alone]
    return found


def _add(found: PartFiles, kind: str, paths: Sequence[Path]) -> None:
    for path in paths:
        if found.files[kind].setdefault(path.stem, path) != path:
            found.problems.append(f"{path.parent}: two files are called {path.stem}; remove or rename one")


def _collect_folders(root: Path, part: str, found: PartFiles) -> dict[str, Path]:
    parts = part_folders(root)
    top, kinds = parts.get(part) or parts.get(ALL) or (root / part, {})
    where = {kind: (kinds.get(kind) or [top / kind])[0] for kind in KINDS}
    for kind, folder in where.items():
        needed = kind in ("image", "mask")
        if not folder.is_dir():
            if needed:
                found.problems.append(f"{folder}: no such folder; put the {kind}s there, or use --images and --masks")
            continue
        found.folders[kind] = folder
        if len(several := kinds.get(kind) or []) > 1:
            names = ", ".join(path.name for path in several)
            found.problems.append(f"{top}: its {kind}s may be in {names}; keep one, or use --images and --masks")
            continue
        try:
            files = list_images(folder)
        except UserError as error:
            found.problems.append(str(error))
            continue
        if needed and not files:
            found.problems.append(f"{folder}: holds no images; put the {kind}s there, or use --images and --masks")
        _add(found, kind, files)
    return where


def _collect_patterns(patterns: dict[str, str], found: PartFiles) -> dict[str, str]:
    matches: dict[str, list[Path]] = {}
    for kind, pattern in (("image", patterns["images"]), ("mask", patterns["masks"])):
        paths = [Path(path) for path in glob.glob(str(user_path(pattern)), recursive=True)]
        listed = {file for folder in {path.parent for path in paths} for file in list_images(folder)}
        files = [p for p in paths if p in listed] or [file for p in paths if p.is_dir() for file in list_images(p)]
        matches[kind] = natural_sort(files)
        if not files:
            found.problems.append(f'--{kind}s "{pattern}": matches no image file in {Path.cwd()}; correct the pattern')
    images, masks = (set(matches[kind]) for kind in ("image", "mask"))
    for kind, fewer in (("image", masks < images), ("mask", images < masks)):
        if fewer:  # "*.png" with "*_mask.png": what both patterns name belongs to the narrower one
            matches[kind] = [path for path in matches[kind] if path not in images & masks]
        _add(found, kind, matches[kind])
    if images & masks and not (images < masks or masks < images):
        found.problems.append(
            f"{min(images & masks)}: is both an image and a mask by --images and --masks; correct them"
        )
    return {"image": f'in --images "{patterns["images"]}"', "mask": f'in --masks "{patterns["masks"]}"'}


def _pair_rows(table: Path) -> list[dict[str, str]]:
    """The rows of a list of pairs, all columns filled in. Raises `UserError`: no such table, or a row that cannot be."""
    columns = ("part", *KINDS, "photo", "subject", "name")
    rows = [{key: (row.get(key) or "").strip() for key in columns} for row in read_csv(table, KINDS[:2])]
    rows = [row for row in rows if any(row.values())]
    parted = any(row["part"] for row in rows)
    for row in rows:
        if not (row["image"] and row["mask"]):
            raise UserError(f"{table}: {row['image'] or row['mask'] or 'a row'} has no partner; complete or remove it")
        part = next((part for part, names in _PARTS.items() if _plain(row["part"]) in names), None) if parted else ALL
        if part is None:
            raise UserError(f"{table}: {row['image']} is in the part {row['part']!r}; give each row train or test")
        row |= {"part": part, "name": row["name"] or Path(row["image"].replace("\\", "/")).stem}
        row["photo"] = row["photo"] or row["name"]
        row["subject"] = row["subject"] or row["photo"]
        if re.search(r"[/\\]|^\.", row["name"]):
            raise UserError(f"{table}: the name {row['name']} must be no path; results are written under it")
    if not rows:
        raise UserError(f"{table}: holds no pairs; add rows of image and mask")
    return rows


def _collect_rows(table: Path, part: str, found: PartFiles) -> None:
    uses: dict[Path, str] = {}
    try:
        rows = [row for row in _pair_rows(table) if row["part"] in (part, ALL)]
    except UserError as error:
        found.problems.append(str(error))
        return
    if not rows:
        found.problems.append(f"{table}: has no row of the part {part}; add some, or leave the column part out")
    for row in rows:
        name = row["name"]
        if name in found.files["image"]:
            found.problems.append(f"{table}: two images are called {name}; tell them apart in a column name")
        for kind in filter(row.get, KINDS):
            path = table.parent / user_path(row[kind])
            if not path.is_file():  # written on Windows
                path = table.parent / user_path(row[kind].replace("\\", "/"))
            if not path.is_file():
                found.problems.append(f"{path}: no such file, but {table} names it; correct the row")
            use = f"{kind} of {row['photo' if kind == 'mask' else 'name']}"
            if kind in ("image", "mask") and uses.setdefault(path, use) != use:
                found.problems.append(f"{path}: is the {uses[path]} and the {use} in {table}; correct the row")
            found.files[kind][name] = path


def list_pairs(
    data: Data | Sequence[Data] | None = None,
    part: str | None = None,
    *,
    images: str | None = None,
    masks: str | None = None,
    csv: str | Path | None = None,
) -> list[Pair]:
    """The pairs of one part ("train" or "test"; None: all) of a dataset, in natural order, in a table's in its own.

    Of several datasets, names, photos and subjects begin with the dataset's folder name.

    Args:
        data: a folder, a CSV file, patterns (see the module's docstring), or several of them. Or instead:
        images, masks: patterns of files, relative to the working folder, such as "training/images/*.tif".
        csv: a CSV file of pairs.

    Raises `UserError`: no such folder, no images, a file without its partner, two files or datasets of one name.
    """
    patterns = None if images is None and masks is None else {"images": images, "masks": masks}
    given = [one for one in (data, csv, patterns) if one is not None]
    if len(given) != 1:
        raise UserError("list_pairs: give one of data, csv, and images with masks")
    many = [given[0]] if isinstance(given[0], (str, Path, dict)) else list(given[0])
    roots = [find_set(one) for one in many]
    if len({_name(root) for root in roots}) < max(1, len(roots)):
        raise UserError(f"--data: several datasets need different folder names, got {', '.join(map(str, roots))}")
    pairs = []
    for root in roots:
        here = [pair for one in ([part] if part else list_parts(root)) for pair in _pairs(root, one)]
        prefix = f"{_name(root)}/" if len(roots) > 1 else ""
        pairs += [replace(p, name=prefix + p.name, photo=prefix + p.photo, subject=prefix + p.subject) for p in here]
    return pairs


def _name(root: Path | dict[str, str]) -> str:
    """What a dataset is called: its folder or table, or the folder that holds all that its patterns name."""
    if isinstance(root, dict):
        return Path(os.path.commonpath([os.path.abspath(re.split(r"[*?[]", str(p))[0]) for p in root.values()])).name
    return root.stem if root.is_file() else root.name


def _pairs(root: Path | dict[str, str], part: str) -> list[Pair]:
    found = collect_files(root, part)
    if found.problems:
        more = len(found.problems) - 1
        tree = "" if found.files["image"] and found.files["mask"] or isinstance(root, dict) else f"; {TREE}"
        raise UserError(found.problems[0] + (f" (and {more} more problems: retina-seg check)" if more else "") + tree)
    images, masks, fov, mask_2nd = (found.files[kind] for kind in KINDS)
    photos = photo_ids(root, part, images)
    return [
        Pair(name, path, masks[name], *photos[name], fov.get(name), mask_2nd.get(name), _name(root).lower())
        for name, path in images.items()
    ]


def photo_ids(root: Path | dict[str, str], part: str, images: dict[str, Path]) -> dict[str, tuple[str, str]]:
    """The (photo, subject) of each image: by a table, else by the Kaggle set's order. Raises as `read_index`."""
    rows = read_index(root)
    if rows is None and part != "test" and _in_fours(images):
        return {name: (str(int(name) // 4),) * 2 for name in images}
    rows = rows or {}
    # a spreadsheet writes 7 for 007
    short = {name: name.lstrip("0") if name.lstrip("0") not in images else name for name in images}
    return {name: rows.get((part, name)) or rows.get((part, short[name])) or (name, name) for name in images}


def read_index(root: Path | dict[str, str]) -> dict[tuple[str, str], tuple[str, str]] | None:
    """`photos.csv` of a folder, or a list of pairs: (part, name) -> (photo, subject); None without one.

    Raises `UserError`: no such table.
    """
    if isinstance(root, dict):
        return None
    if root.is_file():
        rows = _pair_rows(root)
        own = any((row["photo"], row["subject"]) != (row["name"],) * 2 for row in rows)
        return {(row["part"], row["name"]): (row["photo"], row["subject"]) for row in rows} if own else None
    index, columns = root / "photos.csv", ("part", "name", "photo")
    if not index.is_file():
        return None
    rows = read_csv(index, columns)
    if any(row[key] is None for row in rows for key in columns):
        raise UserError(f"{index}: has a row that is cut short; mend or remove it")
    return {(row["part"], row["name"]): (row["photo"], row.get("subject") or row["photo"]) for row in rows}


def check_apart(training: Sequence[Pair], tested: Sequence[Pair]) -> None:
    """Raises `UserError`: an image is among both, so a score on it would be worth nothing."""
    trained = {os.path.realpath(pair.image) for pair in training}
    if both := [pair.image for pair in tested if os.path.realpath(pair.image) in trained]:
        remedy = "give other test images, or use train --validation photos, then test --part validation"
        raise UserError(f"{both[0]}: {len(both)} of {len(tested)} test images are training images; {remedy}")


def check_untrained(run: str | Path, tested: Sequence[Pair]) -> None:
    """Raises `UserError`: the training in the folder `run` was on an image of `tested`. Unknown where its data are gone."""
    try:
        value = read_json(Path(run) / "config.json")
        trained = [pair for pair in list_pairs(value["config"]["data"], "train") if pair.name in value["training"]]
    except (UserError, OSError, KeyError, TypeError):
        return
    check_apart(trained, tested)


def _in_fours(images: dict[str, Path]) -> bool:
    """Whether the files are 0 … 4n-1 with file 4k+1 the mirror image of file 4k, as in the Kaggle set's train part."""
    numbers = sorted(int(name) for name in images if name.isdecimal())
    if not images or len(images) % 4 or numbers != list(range(len(images))):
        return False
    try:
        first, second = (read_image(path) for path in list(images.values())[:2])
    except UserError:
        return True  # whoever reads it next says what is wrong with it; until then the cautious answer
    return first.shape == second.shape and np.array_equal(first[:, ::-1], second)


def load_pair(image: str | Path, mask: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) uint8 RGB and its mask (H, W) uint8, 0 to 255; a mask of 0/1 is taken as 0/255.

    Raises `UserError`: a file cannot be read, or the two differ in size.
    """
    pixels, truth = read_image(image), read_mask(mask)
    if pixels.shape[:2] != truth.shape:
        sizes = " and ".join(f"{a.shape[1]}x{a.shape[0]}" for a in (pixels, truth))
        raise UserError(f"{image} and {mask}: differ in size ({sizes}); a mask must have its image's size")
    return pixels, truth


def load_fov(pair: Pair, image: np.ndarray) -> np.ndarray:
    """The field of view (H, W) bool of a pair's image (H, W, 3) uint8: the dataset's own, else found in the image."""
    if pair.fov is None:
        return find_fov(image)
    fov = read_mask(pair.fov) > 127
    if fov.shape != image.shape[:2]:
        raise UserError(f"{pair.fov}: differs in size from its image {pair.image}")
    return fov


def load_with_fov(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8 RGB, mask (H, W) uint8, field of view (H, W) bool. Raises `UserError` as `load_pair`."""
    image, mask = load_pair(pair.image, pair.mask)
    return image, mask, load_fov(pair, image)


def mask_remark(mask: np.ndarray) -> str | None:
    """What is odd about a mask (H, W) uint8 as stored, in which nothing is above 127; None where nothing is."""
    highest = int(mask.max())
    if highest > 127:
        return None
    return {
        0: "is all black, so its image counts as without vessels; look at it",
        1: "holds 0 and 1 instead of 0 and 255: 1 is taken as vessel",
    }.get(highest, f"is black where it is read: its brightest value is {highest}, vessel is above 127")


def mask_remarks(pairs: Sequence[Pair]) -> list[str]:
    """A line for every kind of odd mask among `pairs` (`mask_remark`). Raises `UserError`: a mask cannot be read."""
    odd: dict[str, list[Path]] = {}
    for pair in pairs:
        if remark := mask_remark(read_grey(pair.mask)):
            odd.setdefault(remark, []).append(pair.mask)
    names = (f"{file} and {len(more)} more" if more else file for file, *more in odd.values())
    return [f"warning: {name}: the mask {remark}" for name, remark in zip(names, odd, strict=True)]
