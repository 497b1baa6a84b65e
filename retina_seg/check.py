"""What a set in the Data1 layout holds and what is wrong with it, all at once: `retina-seg check DATA`.

Where `data.list_pairs` stops at the first mistake, this reads every file and collects what it finds: problems, which
make a score or a training run wrong, and warnings, which a reader of the scores should know.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from retina_seg.data import PARTS, find_set, photo_ids, read_index
from retina_seg.images import list_pictures, natural_key, read_label, read_photo
from retina_seg.utils import UserError

KINDS = ("image", "mask", "fov", "mask_2nd")
PRINT_SIDE = 64  # pixels: the optic disc and the larger vessels are seen, a camera's noise and JPEG's blocks are not
# Two files show one photo when their fingerprints correlate by more than this. Measured on the 90 photos of DRIVE, CHASE_DB1
# and LES-AV: the most alike different photos reach 0.57. Copies mirrored or turned have 1.00, at half the size or squeezed
# 0.97 at least, as JPEG of quality 75 and 30 0.96 and 0.85, shrunk, turned, mirrored and JPEG of quality 50 at once 0.90.
SAME_PHOTO = 0.75
GREY_SHARE = (
    0.3  # of a mask's pixels in 32 … 223: the Kaggle set's resized labels have 0.03 to 0.06, photos 0.42 and more
)

# the 8 ways a square falls onto itself: quarter turns of the picture, then of its mirror image
_MIRRORED = ("mirrored left-right", "mirrored and turned", "mirrored top-bottom", "mirrored and turned")
_WAYS = ("", "turned by 90 degrees", "turned by 180 degrees", "turned by 90 degrees", *_MIRRORED)


@dataclass
class PartReport:
    """The figures of one part.

    Attributes:
        files: number of pictures by folder: image, mask, fov, mask_2nd.
        distinct: how many photos they show, variants of one photo counted once.
        sizes: (height, width) of the readable photos, with how many have it.
        vessel: share of vessel (label above 127) of the frame, by photo.
    """

    files: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    distinct: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    vessel: list[float] = field(default_factory=list)


@dataclass
class SetReport:
    """What `check_set` found.

    Attributes:
        root: the folder in the Data1 layout.
        parts: the parts that are there, "train" and "test".
        problems: one line each; a set without any can be trained and scored on.
        warnings: one line each; worth knowing, not wrong.
    """

    root: Path
    parts: dict[str, PartReport] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for people, a line an item."""
        lines = [f"{self.root}"]
        for name, part in self.parts.items():
            photos, masks, fovs, seconds = (part.files[kind] for kind in KINDS)
            variants = f" (variants of {part.distinct})" if part.distinct < photos else ""
            lines.append(
                f"{name}: {photos} photos{variants}, {masks} masks, {fovs} fields of view, {seconds} second observer's"
            )
            if part.sizes:
                sizes = (f"{width}x{height} ({count})" for (height, width), count in part.sizes.most_common())
                lines.append(f"  sizes: {', '.join(sizes)}")
            if part.vessel:
                low, mean, high = (f"{100 * how(part.vessel):.1f}" for how in (min, np.mean, max))
                lines.append(f"  vessel: {mean} % of the frame on average, {low} to {high} %")
        lines += [f"note: {warning}" for warning in self.warnings]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines.append(f"{len(self.problems) or 'no'} problem{'' if len(self.problems) == 1 else 's'}")
        return lines


@dataclass
class _Photo:
    """A readable photo on its way to the search for copies: where it stands, whose photo it is, its fingerprint."""

    part: str
    file: Path
    photo: str
    fingerprint: np.ndarray


def check_set(data: str | Path, progress: bool = True) -> SetReport:
    """Read every file of the set at `data` and report what is there and what is wrong.

    Args:
        data: a folder in the Data1 layout, or one that holds it.
        progress: whether to show a bar.

    Raises:
        UserError: there is no such set. Whatever is wrong inside one goes into the report.
    """
    report = SetReport(find_set(data))
    photos: list[_Photo] = []
    for part in PARTS:
        if (report.root / part).is_dir():
            report.parts[part] = PartReport()
            photos += _check_part(report, part, progress)
        else:
            report.warnings.append(f"{report.root / part}: no such folder; the set has no {part} part")
    _check_index(report)
    _check_copies(report, photos)
    report.problems = list(dict.fromkeys(report.problems))  # both parts may stumble over one photos.csv
    return report


# ------------------------------------------------------------------------------------------------------------- one part


def _check_part(report: SetReport, part: str, progress: bool) -> list[_Photo]:
    folder, figures = report.root / part, report.parts[part]
    files = {kind: _by_name(report, folder / kind, needed=kind in ("image", "mask")) for kind in KINDS}
    figures.files = {kind: len(found) for kind, found in files.items()}
    _check_partners(report, folder, files)
    ids = _photo_ids(report, part, list(files["image"]))
    figures.distinct = len(set(ids.values()))
    # by file name, so that what all of a part's masks have in common becomes one line
    odd: dict[str, list[str]] = defaultdict(list)
    photos = []
    for name in tqdm(
        sorted({n for found in files.values() for n in found}, key=natural_key), part, disable=not progress
    ):
        here = {kind: found[name] for kind, found in files.items() if name in found}
        size = None
        if "image" in here and (photo := _read(report, here["image"], read_photo)) is not None:
            size = photo.shape[:2]
            figures.sizes[size] += 1
            if photo.min() == photo.max():
                report.problems.append(f"{here['image']}: shows nothing, all its pixels are {photo.max()}")
            photos.append(_Photo(part, here["image"], ids[name], fingerprint(photo)))
        for kind in KINDS[1:]:
            if kind not in here or (label := _read(report, here[kind], read_label)) is None:
                continue
            if size and label.shape != size:
                sizes = " but its photo ".join(f"{width}x{height}" for height, width in (label.shape, size))
                report.problems.append(f"{here[kind]}: is {sizes}; a label must have its photo's size")
            share = _check_label(report, here[kind], label, kind, odd)
            if kind == "mask":
                figures.vessel.append(share)
    for what, names in odd.items():
        report.warnings.append(f"{part}: {len(names)} {what} ({_some(names)})")
    return photos


def _by_name(report: SetReport, folder: Path, needed: bool) -> dict[str, Path]:
    """The pictures in `folder` by name without ending; what cannot be told apart or read as a picture is reported."""
    if not folder.is_dir():
        if needed:
            report.problems.append(f"{folder}: no such folder; Data1/README.md shows the layout")
        return {}
    try:
        files = list_pictures(folder)
    except UserError as error:
        report.problems.append(str(error))
        return {}
    if needed and not files:
        report.problems.append(f"{folder}: holds no pictures")
    found: dict[str, Path] = {}
    for path in files:
        if path.stem in found:
            report.problems.append(f"{path}: has the name of {found[path.stem].name}; remove or rename one")
        found.setdefault(path.stem, path)
    known = set(files)
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".") and path not in known]
    if others:
        report.warnings.append(f"{folder}: {len(others)} files are no pictures and are passed over ({_some(others)})")
    return found


def _check_partners(report: SetReport, folder: Path, files: dict[str, dict[str, Path]]) -> None:
    for name, path in files["image"].items():
        if name not in files["mask"]:
            report.problems.append(f"{path}: has no mask {folder / 'mask' / name}.*")
    for name, path in files["mask"].items():
        if name not in files["image"]:
            report.problems.append(f"{path}: has no photo {folder / 'image' / name}.*")
    for kind in ("fov", "mask_2nd"):
        lonely = [path.name for name, path in files[kind].items() if name not in files["image"]]
        without = [path.name for name, path in files["image"].items() if name not in files[kind]]
        if lonely:
            report.warnings.append(f"{folder / kind}: {len(lonely)} files have no photo ({_some(lonely)})")
        if files[kind] and without:
            report.warnings.append(f"{folder / kind}: {len(without)} photos have no file here ({_some(without)})")


def _read(report: SetReport, path: Path, how) -> np.ndarray | None:
    try:
        return how(path)
    except UserError as error:
        report.problems.append(str(error))
        return None


def _check_label(report: SetReport, path: Path, label: np.ndarray, kind: str, odd: dict[str, list[str]]) -> float:
    """Report what is wrong with the label (H, W) uint8; returns its share of vessel."""
    counts = np.bincount(label.ravel(), minlength=256)
    values = np.flatnonzero(counts)
    folder = {"mask": "masks", "fov": "fields of view", "mask_2nd": "second observer's masks"}[kind]
    brightest, share = int(values[-1]), float(counts[128:].sum() / label.size)
    if brightest == 0:
        report.problems.append(f"{path}: is empty, all black")
    elif brightest == 1 and kind != "fov":
        share = float(counts[1] / label.size)
        odd[f"{folder} are of 0 and 1 rather than 0 and 255; they are read as that"].append(path.name)
    elif brightest <= 127:
        report.problems.append(
            f"{path}: is black where it is read: its brightest value is {brightest}, the cut is at 127"
        )
    elif counts[32:224].sum() > GREY_SHARE * label.size:
        report.problems.append(f"{path}: is no label: it has {len(values)} values, most of them grey")
    elif kind == "fov" and len(values) > 2:
        odd[f"{folder} have more than two values; they are cut at 127"].append(path.name)
    elif len(values) > 2:
        odd[f"{folder} have grey edges, as labels resized bilinearly have (the Kaggle set's too)"].append(
            f"{path.name}: {len(values)} values"
        )
    if kind != "fov" and share > 0.5:
        report.problems.append(f"{path}: calls {100 * share:.0f} % of the frame vessel; is it inverted?")
    return share


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


# ----------------------------------------------------------------------------------------------- which files show one photo


def _photo_ids(report: SetReport, part: str, names: list[str]) -> dict[str, str]:
    try:
        found = photo_ids(report.root, part, names, report.root / part / "image")
        return {name: photo for name, (photo, _) in found.items()}
    except UserError as error:
        report.problems.append(str(error))
        return {name: name for name in names}


def _check_index(report: SetReport) -> None:
    """Hold `photos.csv`, where there is one, against the files."""
    index = report.root / "photos.csv"
    try:
        table = read_index(report.root)
        files = {
            (part, path.stem)
            for part in report.parts
            if (report.root / part / "image").is_dir()
            for path in list_pictures(report.root / part / "image")
        }
    except UserError:
        return  # reported when the parts were read
    if table is None:
        return
    rows = set(table)
    for lonely, what in (
        (files - rows, "does not name {}, so each counts as a photo of its own"),
        (rows - files, "names {} that are not there"),
    ):
        if lonely:
            names = _some(sorted((f"{part}/{name}" for part, name in lonely), key=natural_key))
            report.warnings.append(f"{index}: {what.format(f'{len(lonely)} files ({names})')}")


def fingerprint(photo: np.ndarray) -> np.ndarray:
    """What a photo (H, W, 3) uint8 shows, small: (64, 64) float32, of length 1, or all 0 for a photo that shows nothing.

    The green channel at 64x64 less its blur, by its local contrast, the rim left out. Plain thumbnails would not do: a
    bright disc on black is common to all fundus photos.
    """
    small = cv2.resize(np.ascontiguousarray(photo[:, :, 1]), (PRINT_SIDE, PRINT_SIDE), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float32)
    lit = (small > 0.2 * np.percentile(small, 90)).astype(np.uint8)
    margin = PRINT_SIDE // 8 + 3
    lit = cv2.erode(lit, np.ones((margin, margin), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    lit = lit.astype(np.float32)
    detail = (small - _blurred(small, lit, PRINT_SIDE / 16)) * lit
    contrast = np.sqrt(_blurred(detail**2, lit, PRINT_SIDE / 8))
    detail = np.where(contrast > 0.1, detail / np.maximum(contrast, 0.1), 0).clip(-3, 3).astype(np.float32)
    return detail / max(float(np.linalg.norm(detail)), 1e-6)


def _blurred(picture: np.ndarray, weight: np.ndarray, sigma: float) -> np.ndarray:
    """The Gaussian mean of `picture` where `weight` is 1; both (H, W) float32."""
    return cv2.GaussianBlur(picture * weight, (0, 0), sigma) / np.maximum(cv2.GaussianBlur(weight, (0, 0), sigma), 1e-3)


def same_photo(fingerprints: np.ndarray) -> Iterator[tuple[int, int, str]]:
    """Pairs of `fingerprints` (N, 64, 64) that show one photo: (i, j, how j lies to i) with i < j.

    All 8 ways a square falls onto itself are tried; a photo turned by another angle is not found.
    """
    count = len(fingerprints)
    flat = fingerprints.reshape(count, -1)
    for start in range(0, count, 512):  # so that a large set's table of all pairs is never whole in memory
        block = fingerprints[start : start + 512]
        best = np.full((len(block), count), -1, np.float32)
        way = np.zeros((len(block), count), np.uint8)
        for number in range(8):
            turned = np.rot90(block[:, :, ::-1] if number >= 4 else block, number % 4, axes=(1, 2))
            likeness = turned.reshape(len(block), -1) @ flat.T
            better = likeness > best
            best[better], way[better] = likeness[better], number
        for i, j in np.argwhere(best > SAME_PHOTO):
            if start + i < j:
                yield start + int(i), int(j), _WAYS[way[i, j]]


def _check_copies(report: SetReport, photos: list[_Photo]) -> None:
    """Report photos of test that stand in train too, and copies inside a part that are not known as such."""
    if not photos:
        return
    leaks: dict[Path, list[str]] = defaultdict(list)
    unknown: dict[str, list[str]] = defaultdict(list)
    for i, j, how in same_photo(np.stack([photo.fingerprint for photo in photos])):
        first, second = photos[i], photos[j]
        if first.part != second.part:
            leaks[second.file].append(f"{first.file}" + (f" {how}" if how else ""))
        elif first.photo != second.photo:
            unknown[first.part].append(f"{first.file.name} and {second.file.name}")
    for file, copies in leaks.items():
        more = f" (and {len(copies) - 1} more)" if len(copies) > 1 else ""
        report.problems.append(f"{file}: stands in train too, as {copies[0]}{more}; a score on it is worth nothing")
    for part, pairs in unknown.items():
        report.warnings.append(
            f"{part}: {len(pairs)} pairs of files show one photo each but count as different photos ({_some(pairs)}); "
            "give them one photo in photos.csv, or they may stand on both sides of a split"
        )
