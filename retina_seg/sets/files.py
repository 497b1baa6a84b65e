"""The files of a dataset, by part and kind, and which show one photo: of a folder, of two patterns, or of a list of pairs."""

import glob
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from retina_seg.images import is_image, list_images, read_image, visible
from retina_seg.utils import UserError, file_kind, natural_sort, read_csv, user_path

PARTS = ("train", "test")
ALL = "all"  # the one part of a dataset without parts: it stands for whichever is asked for
KINDS = ("image", "mask", "fov", "mask_2nd")
TREE = """expected:
    DATA/train/image/1.png    DATA/train/mask/1.png    images and vessel masks of the same names, for training
    DATA/test/image/2.png     DATA/test/mask/2.png     the same for testing
    from a public set, as CHASE_DB1: retina-seg prepare SET SOURCE DESTINATION
    from other files: --images "PATTERN" --masks "PATTERN", or --data LIST.csv with columns image, mask"""
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
# an observer's mark with its number, a number, or a word; of a name in lower case
_WORD = r"(?<=[\W_])(?:manual|observer|expert|annotator|ho|gt)[1-9](?!\d)|(?:1st|2nd|3rd)[a-z]*|\d+|[^\W\d_]+"
_OF_MASKS = re.compile(r"mask|gt|truth|label|annot|manual|vessel|seg|observer|expert|binary|target|ah$|[123](st|nd|rd)")
_KEPT = re.compile(r"\d+|l|r|od|os|ou|left|right")  # a number, or which eye it is: never ignored
_MOST = 4  # words that are ignored at one end
Data = str | Path | dict[str, str]
Root = Path | dict[str, str]  # what `find_set` gives


@dataclass
class PartFiles:
    """What one part of a dataset holds: kind (`KINDS`) -> name -> file, and a line for every problem with its remedy."""

    files: dict[str, dict[str, Path]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    problems: list[str] = field(default_factory=list)
    folders: dict[str, Path] = field(default_factory=dict)  # kind -> the folder of all its files, where there is one
    photos: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> photo, subject, where these are known

    def add(self, kind: str, paths: Sequence[Path]) -> None:
        """Take the files `paths` by their names."""
        for path in paths:
            if self.files[kind].setdefault(path.stem, path) != path:
                self.problems.append(f"{path.parent}: two files are called {path.stem}; remove or rename one")


def find_set(data: Data) -> Root:
    """The dataset at `data`: a folder in a known layout, or up to three folders below it, as archives unpack; else `data`.

    Raises `UserError`: no such folder or table, no dataset in a known layout, or several.
    """
    if isinstance(data, dict):
        if set(data) != {"images", "masks"} or not all(isinstance(value, (str, Path)) for value in data.values()):
            raise UserError(f"{data}: two patterns are needed, images and masks")
        return data
    data = user_path(data)
    if data.is_file():
        if data.suffix.lower() not in (".csv", ".tsv"):
            raise UserError(f"{data}: is {file_kind(data) or 'a file'}; give a folder, or a CSV file of pairs")
        return data
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; {TREE}")
    if found := find_folder(data, part_folders, "several datasets"):
        return found
    raise UserError(f"{data}: has no train/image or test/image folder, nor another layout that is known; {TREE}")


def folder_levels(top: Path, count: int) -> Iterator[list[Path]]:
    """The folders `top`, then those in it, then those in these: `count` levels, hidden ones left out."""
    level = [top]
    for _ in range(count):
        yield level
        level = [below for folder in level for below in visible(folder) if below.is_dir()]


def find_folder(top: Path, known: Callable[[Path], object], several: str) -> Path | None:
    """The folder that is `known`: `top`, else one up to three levels below it. Raises `UserError`: a level has `several`."""
    levels = ([folder for folder in level if known(folder)] for level in folder_levels(top, 4))
    found = next(filter(None, levels), [])
    if len(found) > 1:
        raise UserError(f"{top}: holds {several} ({', '.join(map(str, found[:3]))}); name one of them")
    return found[0] if found else None


def _plain(name: str) -> str:
    return re.sub("[-_ ]", "", name.lower())


def _called(folder: Path, names: Sequence[str]) -> list[Path]:
    return [path for path in visible(folder) if _plain(path.name) in names and path.is_dir()]


def part_folders(root: Path) -> dict[str, tuple[Path, dict[str, list[Path]]]]:
    """Part -> its folder, and kind -> the folders of that kind in it (one, in a sound dataset); {} where none has images.

    Names as `_PARTS` and `_NAMES`; case, -, _ and space do not matter. The one part is `ALL` where images and masks lie
    in `root` itself.
    """
    own = {part: paths[0] for part in PARTS if (paths := _called(root, _PARTS[part]))}
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


def list_parts(root: Root) -> list[str]:
    """The parts of the dataset `root`: "train" and "test", or `ALL` alone."""
    if isinstance(root, dict):
        return [ALL]
    return list(_collect_rows(root) if root.is_file() else part_folders(root))


def collect_files(root: Root, part: str) -> PartFiles:
    """The files of one part of the dataset `root`, by kind and image's name in natural order, with all problems found."""
    found = PartFiles()
    if isinstance(root, Path) and root.is_file():
        parts = _collect_rows(root)
        missing = f"{root}: has no row of the part {part}; add some, or leave the column part out"
        found = parts.get(part) or parts.get(ALL) or PartFiles(problems=[missing])
    elif isinstance(root, dict):
        _collect_patterns(root, found)
        _match(found)
    else:
        _collect_folders(root, part, found)
        _match(found)
        if (table := root / "photos.csv").is_file():
            _read_photos(table, part, found)
    images = found.files["image"]
    if not found.photos and part != "test" and _in_fours(images):
        found.photos = {name: (str(int(name) // 4),) * 2 for name in images}
    return found


def _match(found: PartFiles) -> None:
    """Call the other files by the names of their images, and report images and masks without a partner."""
    for kind in KINDS[1:]:
        images = {mask: image for image, mask in match_names([*found.files["image"]], [*found.files[kind]]).items()}
        found.files[kind] = {images.get(name, name): path for name, path in found.files[kind].items()}
    for kind, other in (("image", "mask"), ("mask", "image")):
        for name, path in found.files[kind].items() if found.files[other] else ():
            if name not in found.files[other]:
                place = f"{found.folders[other] / path.stem}.*" if other in found.folders else f"by --{other}s"
                found.problems.append(f"{path}: has no partner {place}; add it or remove this")


def _read_photos(table: Path, part: str, found: PartFiles) -> None:
    """Take photos and subjects from `photos.csv`; rows of a dataset without parts need none."""
    try:
        rows = read_csv(table, ("part", "name", "photo"))
        if any(row["photo"] is None for row in rows):
            raise UserError(f"{table}: has a row that is cut short; mend or remove it")
    except UserError as error:
        found.problems.append(str(error))
        return
    rows = [row for row in rows if row["part"] in (part, ALL, "")]
    found.photos = {row["name"]: (row["photo"], row.get("subject") or row["photo"]) for row in rows}


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


def _collect_folders(root: Path, part: str, found: PartFiles) -> None:
    parts = part_folders(root)
    top, kinds = parts.get(part) or parts.get(ALL) or (root / part, {})
    no_test = "; without test images, score those that a run held out: test --part validation" if part == "test" else ""
    for kind in KINDS:
        folders = kinds.get(kind, [])
        if len(folders) > 1:
            names = ", ".join(path.name for path in folders)
            found.problems.append(f"{top}: its {kind}s may be in {names}; keep one, or use --images and --masks")
        elif folders:
            found.folders[kind] = folders[0]
            found.add(kind, list_images(folders[0]))
        if kind in ("image", "mask") and len(folders) < 2 and not found.files[kind]:
            folder = found.folders.get(kind, top / kind)
            state = "holds no images" if folders else "is the field of view beside 1st_manual, no mask"
            state = state if folder.is_dir() else "no such folder"
            found.problems.append(f"{folder}: {state}; add the {kind}s, or use --images and --masks{no_test}")


def _collect_patterns(patterns: dict[str, str], found: PartFiles) -> None:
    matches: dict[str, list[Path]] = {}
    for kind in ("image", "mask"):
        paths = [Path(path) for path in glob.glob(str(user_path(patterns[f"{kind}s"])), recursive=True)]
        files = [p for p in paths if is_image(p)] or [file for p in paths if p.is_dir() for file in list_images(p)]
        matches[kind] = natural_sort(files)
        if not files:
            found.problems.append(f'--{kind}s "{patterns[f"{kind}s"]}": matches no image file; correct the pattern')
    both = set(matches["image"]) & set(matches["mask"])
    if both == set(matches["mask"]) != set(matches["image"]):  # "*.png" with "*_mask.png"
        matches["image"] = [path for path in matches["image"] if path not in both]
    elif both:
        found.problems.append(f"{min(both)}: is both an image and a mask by --images and --masks; correct them")
    for kind, paths in matches.items():
        found.add(kind, paths)


def _collect_rows(table: Path) -> dict[str, PartFiles]:
    """The parts of a list of pairs. Raises `UserError`: no such table, or a row that cannot be."""
    columns = ("part", *KINDS, "photo", "subject", "name")
    # Windows writes paths with \
    rows = [{k: (row.get(k) or "").strip().replace("\\", "/") for k in columns} for row in read_csv(table, KINDS[:2])]
    rows = [row for row in rows if any(row.values())]
    if not rows:
        raise UserError(f"{table}: holds no pairs; add rows of image and mask")
    parted = any(row["part"] for row in rows)
    parts: dict[str, PartFiles] = defaultdict(PartFiles)
    uses: dict[tuple[str, Path], str] = {}  # by part and file
    for row in rows:
        if not (row["image"] and row["mask"]):
            raise UserError(f"{table}: {row['image'] or row['mask'] or 'a row'} has no partner; complete or remove it")
        part = next((part for part, names in _PARTS.items() if _plain(row["part"]) in names), None) if parted else ALL
        if part is None:
            raise UserError(f"{table}: {row['image']} is in the part {row['part']!r}; give each row train or test")
        name = row["name"] or Path(row["image"]).stem
        photo = row["photo"] or name
        subject = row["subject"] or photo
        if "/" in name or name.startswith("."):
            raise UserError(f"{table}: the name {name} must be no path; results are written under it")
        found = parts[part]
        if name in found.files["image"]:
            found.problems.append(f"{table}: two images are called {name}; tell them apart in a column name")
        if (photo, subject) != (name, name):
            found.photos[name] = (photo, subject)
        for kind in filter(row.get, KINDS):
            path = table.parent / user_path(row[kind])
            if not path.is_file():
                found.problems.append(f"{path}: no such file, but {table} names it; correct the row")
            use = f"{kind} of {photo if kind == 'mask' else name}"
            if kind in ("image", "mask") and (first := uses.setdefault((part, path), use)) != use:
                found.problems.append(f"{path}: is the {first} and the {use} in {table}; correct the row")
            found.files[kind][name] = path
    return parts


def match_names(images: Sequence[str], masks: Sequence[str]) -> dict[str, str]:
    """Name of an image -> name of its mask; names without endings. What is left over, or would match twice, is not in it.

    Where any two are equal, only equal ones match. Else words at the start or end that all names of one list share are
    ignored, as few as give the most matches: 21_training and 21_manual1, Image_01L and Image_01L_1stHO, img1 and mask1.
    Numbers and sides (L, OD, left) never are; words of both lists only where those of the masks alone mean a mask.
    """
    if equal := set(images) & set(masks):
        return {name: name for name in images if name in equal}
    best: dict[str, str] = {}
    words = [{name: tuple(re.findall(_WORD, name.lower())) for name in names} for names in (images, masks)]
    for cuts in sorted(product(*map(_cuts, words)), key=lambda cuts: sum(map(sum, cuts))):
        lost, keys = [], []
        for names, (start, end) in zip(words, cuts, strict=True):
            key: dict[tuple[str, ...], list[str]] = {}
            for name, all_words in names.items():
                key.setdefault(all_words[start : len(all_words) - end], []).append(name)
            keys.append(key)
            lost.append({*all_words[:start], *all_words[len(all_words) - end :]} if names else set())
        if all(lost) and not all(map(_OF_MASKS.match, lost[1] - lost[0])):
            continue
        ours, theirs = keys
        found = {ours[k][0]: theirs[k][0] for k in ours if k and len(ours[k]) == len(theirs.get(k, "")) == 1}
        best = max(best, found, key=len)
    return best


def _cuts(names: dict[str, tuple[str, ...]]) -> list[tuple[int, int]]:
    """How many words may be ignored at the start and at the end of all `names`: every choice."""
    ends = []
    for words in (names.values(), [words[::-1] for words in names.values()]):
        shared = [len({*column}) == 1 and not _KEPT.fullmatch(column[0]) for column in zip(*words, strict=False)]
        ends.append(range([*shared[:_MOST], False].index(False) + 1))
    return list(product(ends[0], ends[1]))
