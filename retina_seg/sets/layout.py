"""A dataset on disk, the Data1 layout: which image and mask belong together, which files are variants of one photo.

{train,test}/{image,mask}/<name>.<ending>      images, and masks of the same name
{train,test}/{fov,mask_2nd}/<name>.<ending>    optional: field of view, second observer's mask
photos.csv                                     optional: part,name,photo[,subject] of each file
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from retina_seg.fov import find_fov
from retina_seg.images import list_images, load_mask, read_image, read_mask
from retina_seg.utils import UserError, read_csv

PARTS = ("train", "test")
KINDS = ("image", "mask", "fov", "mask_2nd")


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


def find_set(data: str | Path) -> Path:
    """The folder in the Data1 layout at `data`, or up to three folders below it, as archives unpack.

    Raises `UserError`: no such folder, none in this layout, or several.
    """
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; Data1/README.md says how to get the images")
    level = [data]
    for _ in range(4):
        found = [folder for folder in level if any((folder / part / "image").is_dir() for part in PARTS)]
        if len(found) > 1:
            names = ", ".join(str(folder) for folder in found[:3])
            raise UserError(f"{data}: holds several datasets ({names}); name one of them")
        if found:
            return found[0]
        level = [below for folder in level for below in sorted(folder.iterdir()) if below.is_dir()]
    if (data / "training" / "images").is_dir() or (data / "Image_01L.jpg").is_file():
        raise UserError(f"{data}: is a dataset as published; convert it first: retina-seg prepare --help")
    raise UserError(f"{data}: has no train/image or test/image folder; Data1/README.md shows the layout")


def collect_files(root: Path, part: str) -> PartFiles:
    """The files of one part of the dataset at `root`, by kind and name in natural order, with all problems found."""
    found, folder = PartFiles(), root / part
    for kind in KINDS:
        needed = kind in ("image", "mask")
        if not (folder / kind).is_dir():
            if needed:
                found.problems.append(f"{folder / kind}: no such folder; Data1/README.md shows the layout")
            continue
        try:
            files = list_images(folder / kind)
        except UserError as error:
            found.problems.append(str(error))
            continue
        if needed and not files:
            found.problems.append(f"{folder / kind}: holds no images; Data1/README.md says how to get them")
        for path in files:
            if found.files[kind].setdefault(path.stem, path) != path:
                found.problems.append(f"{folder / kind}: two files are called {path.stem}; remove or rename one")
    for kind, other in (("image", "mask"), ("mask", "image")):
        if partners := found.files[other]:
            alone = (path for name, path in found.files[kind].items() if name not in partners)
            found.problems += [f"{p}: has no partner {folder / other / p.stem}.*; add it or remove this" for p in alone]
    return found


def list_pairs(data: str | Path | Sequence[str | Path], part: str) -> list[Pair]:
    """The pairs of one part ("train" or "test") of the dataset at `data`, in natural order, matched by name.

    Of several datasets, names, photos and subjects begin with the dataset's folder name.

    Raises `UserError`: no such folder, no images, a file without its partner, two files or datasets of one name.
    """
    if not isinstance(data, (str, Path)) and len(data) != 1:
        roots = [find_set(one) for one in data]
        if len({root.name for root in roots}) < max(1, len(roots)):
            raise UserError(f"--data: several datasets need different folder names, got {', '.join(map(str, roots))}")
        return [
            replace(pair, **{key: f"{root.name}/{getattr(pair, key)}" for key in ("name", "photo", "subject")})
            for root in roots
            for pair in list_pairs(root, part)
        ]
    root = find_set(data if isinstance(data, (str, Path)) else data[0])
    found = collect_files(root, part)
    if found.problems:
        more = len(found.problems) - 1
        raise UserError(found.problems[0] + (f" (and {more} more problems: retina-seg check)" if more else ""))
    images, masks, fov, mask_2nd = (found.files[kind] for kind in KINDS)
    photos = photo_ids(root, part, images)
    return [
        Pair(name, path, masks[name], *photos[name], fov.get(name), mask_2nd.get(name), root.name.lower())
        for name, path in images.items()
    ]


def photo_ids(root: Path, part: str, images: dict[str, Path]) -> dict[str, tuple[str, str]]:
    """The (photo, subject) of each image: by `photos.csv`, else by the Kaggle set's order. Raises as `read_index`."""
    rows = read_index(root)
    if rows is None and part == "train" and _in_fours(images):
        return {name: (str(int(name) // 4),) * 2 for name in images}
    return {name: (rows or {}).get((part, name), (name, name)) for name in images}


def read_index(root: Path) -> dict[tuple[str, str], tuple[str, str]] | None:
    """`photos.csv` of the dataset: (part, name) -> (photo, subject); None without one. Raises `UserError`: no such table."""
    index = root / "photos.csv"
    if not index.is_file():
        return None
    columns = ("part", "name", "photo")
    rows = read_csv(index, columns)
    if any(row[key] is None for row in rows for key in columns):
        raise UserError(f"{index}: has a row that is cut short; mend or remove it")
    return {(row["part"], row["name"]): (row["photo"], row.get("subject") or row["photo"]) for row in rows}


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


def load_vessels(path: str | Path) -> tuple[np.ndarray, str]:
    """As `load_mask`, of a mask of vessels. Raises `UserError` also where most of the frame would be vessel."""
    mask, remark = load_mask(path)
    if (share := np.count_nonzero(mask > 127) / mask.size) > 0.5:
        read = f" (read as {remark})" if remark else ""
        raise UserError(
            f"{path}: calls {100 * share:.0f} % of the frame vessel{read}; is it inverted? If so, invert it"
        )
    return mask, remark


def load_pair(image: str | Path, mask: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) uint8 RGB and its mask (H, W) uint8, 0 to 255, as `load_image` and `load_vessels` read them.

    Raises `UserError`: a file cannot be read, the two differ in size, or the mask looks inverted.
    """
    pixels, (truth, _) = read_image(image), load_vessels(mask)
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


def check_masks(pairs: Sequence[Pair]) -> list[str]:
    """A line for every kind of odd mask among `pairs`. Raises `UserError`: all are empty; as `load_vessels`."""
    odd: dict[str, list[Path]] = {}
    empty = 0
    for pair in pairs:
        mask, remark = load_vessels(pair.mask)
        empty += not np.any(mask > 127)
        if remark:
            odd.setdefault(remark, []).append(pair.mask)
    if pairs and empty == len(pairs):
        raise UserError(
            f"{pairs[0].mask}: is empty, as all {len(pairs)} masks are; give masks in which vessels are white"
        )
    names = (f"{file} and {len(more)} more" if more else file for file, *more in odd.values())
    return [f"warning: {name}: the mask as read: {remark}" for name, remark in zip(names, odd, strict=True)]
