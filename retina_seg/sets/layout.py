"""A dataset on disk: which image and mask belong together, which files are variants of one photo.

A dataset is a folder, a CSV file of pairs (columns image, mask; optional part, fov, mask_2nd, photo, subject, name; paths
relative to the file), or {"images": PATTERN, "masks": PATTERN}. The folder's own layout, Data1:

{train,test}/{image,mask}/<name>.<ending>      images, and masks of the same name
{train,test}/{fov,mask_2nd}/<name>.<ending>    optional: field of view, second observer's mask
photos.csv                                     optional: part,name,photo[,subject] of each file

`files.part_folders` knows other names of the folders, `files.match_names` other names of the masks.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from retina_seg.fov import find_fov
from retina_seg.images import load_mask, read_image, read_mask
from retina_seg.sets.files import KINDS, TREE, Data, Root, collect_files, find_set, list_parts
from retina_seg.utils import UserError


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


def list_pairs(
    data: Data | Sequence[Data] | None = None,
    part: str | None = None,
    *,
    images: str | None = None,
    masks: str | None = None,
    csv: str | Path | None = None,
) -> list[Pair]:
    """The pairs of one part ("train" or "test"; None: all) of a dataset, in natural order, a table's in its own order.

    Of several datasets, names, photos and subjects begin with the dataset's folder name.

    Args:
        data: a folder, a CSV file or patterns (see the module's docstring), or several; or instead:
        images, masks: patterns of files, such as "training/images/*.tif"; csv: a CSV file of pairs.

    Raises `UserError`: no such folder, no images, a file without its partner, two files or datasets of one name.
    """
    patterns = None if images is None and masks is None else {"images": images, "masks": masks}
    given: list[Any] = [one for one in (data, csv, patterns) if one is not None]
    if len(given) != 1:
        raise UserError("list_pairs: give one of data, csv, and images with masks")
    roots = [find_set(one) for one in (given[0] if isinstance(given[0], (list, tuple)) else given)]
    if len({_name(root) for root in roots}) < max(1, len(roots)):
        raise UserError(f"--data: several datasets need different folder names, got {', '.join(map(str, roots))}")
    pairs = []
    for root in roots:
        here = [pair for one in ([part] if part else list_parts(root)) for pair in _pairs(root, one)]
        prefix = f"{_name(root)}/" if len(roots) > 1 else ""
        pairs += [replace(p, name=prefix + p.name, photo=prefix + p.photo, subject=prefix + p.subject) for p in here]
    return pairs


def _name(root: Root) -> str:
    return "images" if isinstance(root, dict) else root.stem if root.is_file() else root.name


def _pairs(root: Root, part: str) -> list[Pair]:
    found = collect_files(root, part)
    if found.problems:
        more = len(found.problems) - 1
        known = isinstance(root, dict) or root.is_file() or set(found.files["image"]) & set(found.files["mask"])
        tail = (f" (and {more} more problems: retina-seg check)" if more else "") + ("" if known else f"; {TREE}")
        raise UserError(found.problems[0] + tail)
    images, masks, fov, mask_2nd = (found.files[kind] for kind in KINDS)
    dataset = _name(root).lower()
    return [
        Pair(name, path, masks[name], *found.photos.get(name, (name, name)), fov.get(name), mask_2nd.get(name), dataset)
        for name, path in images.items()
    ]


def check_apart(training: Sequence[Pair], tested: Sequence[Pair]) -> None:
    """Raises `UserError`: an image is among both, so a score on it would be worth nothing."""
    trained = {os.path.realpath(pair.image) for pair in training}
    if both := [pair.image for pair in tested if os.path.realpath(pair.image) in trained]:
        what = f"{len(both)} of {len(tested)} test images are training images"
        raise UserError(f"{both[0]}: {what}; give others, or train --validation photos and test --part validation")


def load_vessels(path: str | Path) -> tuple[np.ndarray, str]:
    """As `load_mask`, of a mask of vessels. Raises `UserError` also where most of the frame would be vessel."""
    mask, remark = load_mask(path)
    if (share := np.count_nonzero(mask > 127) / mask.size) > 0.5:
        how = f" (read as {remark})" if remark else ""
        raise UserError(f"{path}: calls {100 * share:.0f} % of the frame vessel{how}; is it inverted? If so, invert it")
    return mask, remark


def load_pair(image: str | Path, mask: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) uint8 RGB and its mask (H, W) uint8, 0 to 255, as `load_image` and `load_vessels` read them.

    Raises `UserError`: a file cannot be read, the two differ in size, or the mask looks inverted.
    """
    pixels, (truth, _) = read_image(image), load_vessels(mask)
    check_size(mask, truth, image, pixels)
    return pixels, truth


def check_size(path: str | Path, mask: np.ndarray, image_path: str | Path, image: np.ndarray) -> None:
    """Raises `UserError` where a mask (H, W) has another size than its image."""
    if mask.shape != image.shape[:2]:
        own, other = (f"{array.shape[1]}x{array.shape[0]}" for array in (mask, image))
        raise UserError(f"{path}: is {own} but its image {other} ({image_path}); a mask must have its image's size")


def load_with_fov(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `load_pair`, and the field of view (H, W) bool: the dataset's own, else found in the image."""
    image, mask = load_pair(pair.image, pair.mask)
    if pair.fov is None:
        return image, mask, find_fov(image)
    fov = read_mask(pair.fov) > 127
    check_size(pair.fov, fov, pair.image, image)
    return image, mask, fov


def check_masks(pairs: Sequence[Pair]) -> list[str]:
    """A line for every kind of odd mask among `pairs`. Raises `UserError`: all are empty; as `load_vessels`."""
    odd: dict[str, list[Path]] = {}
    empty = 0
    for pair in pairs:
        mask, remark = load_vessels(pair.mask)
        empty += mask.max() <= 127
        if remark:
            odd.setdefault(remark, []).append(pair.mask)
    if pairs and empty == len(pairs):
        raise UserError(f"{pairs[0].mask}: is empty, as all {empty} masks are; give masks in which vessels are white")
    names = (f"{file} and {len(more)} more" if more else file for file, *more in odd.values())
    return [f"warning: {name}: the mask as read: {remark}" for name, remark in zip(names, odd, strict=True)]
