"""What a dataset in the Data1 layout holds, and all that is wrong with it: `retina-seg check DATA`."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from retina_seg.images import is_image, load_image, load_mask, visible
from retina_seg.sets.files import ALL, KINDS, PARTS, Data, PartFiles, collect_files, find_set, list_parts
from retina_seg.sets.layout import check_size
from retina_seg.utils import UserError, natural_sort

PRINT_SIDE = 64  # pixels: the optic disc and the larger vessels are seen, a camera's noise and JPEG's blocks are not
# Two files show one photo when their fingerprints correlate by more than this. On the 90 images of DRIVE, CHASE_DB1 and
# LES-AV, different ones reach 0.59. Copies have 0.97 or more if mirrored, rotated or resized, 0.91 or more as JPEG 30.
SAME_PHOTO = 0.75
GREY_SHARE = 0.3  # of a mask's pixels in 32 … 223: the Kaggle set's masks have 0.03 to 0.06, images 0.42 and more

_NAMES = {"mask": "masks", "fov": "fields of view", "mask_2nd": "second observer's masks"}


@dataclass
class PartReport:
    """The figures of one part."""

    files: dict[str, int]  # how many, by kind: image, mask, fov, mask_2nd
    distinct: int  # how many photos they show, variants of one photo counted once
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width) of how many readable images
    vessel: list[float] = field(default_factory=list)  # share of vessel (mask above 127) of the frame, by image


@dataclass
class SetReport:
    """What `check_set` found, a line an item: problems make a score or a training wrong, warnings are worth knowing."""

    root: Path | dict[str, str]  # as `find_set` gives it
    parts: dict[str, PartReport] = field(default_factory=dict)  # those that are there, "train" and "test"
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for people, a line an item."""
        lines = [str(self.root)]
        for name, part in self.parts.items():
            variants = f" (variants of {part.distinct})" if part.distinct < part.files["image"] else ""
            others = "".join(f", {part.files[kind]} {_NAMES[kind]}" for kind in KINDS[1:])
            lines.append(f"{name}: {part.files['image']} images{variants}{others}")
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


def check_set(data: Data, progress: bool = True) -> SetReport:
    """Read every file of the dataset at `data` (as `find_set`). Raises `UserError`: there is no such dataset."""
    report = SetReport(find_set(data))
    prints: list[tuple[str, Path, str, np.ndarray]] = []  # of each readable image: part, file, photo, fingerprint
    parts = list_parts(report.root)
    report.warnings += [f"{report.root}: the dataset has no {p} part" for p in PARTS if not {p, ALL} & set(parts)]
    for part in parts:
        found = collect_files(report.root, part)
        report.problems += found.problems
        _check_names(report, part, found)
        prints += _check_files(report, part, found, progress)
    if prints:
        _check_copies(report, prints)
    report.problems = list(dict.fromkeys(report.problems))  # both parts may stumble over one photos.csv
    return report


def _check_names(report: SetReport, part: str, found: PartFiles) -> None:
    """Report files that count for nothing: of other kinds, without an image, or without a row of `photos.csv`."""
    images = found.files["image"]
    for kind, folder in found.folders.items():
        files = found.files[kind]
        others = [path.name for path in visible(folder) if not is_image(path)]
        lines = [(others, "files are no images and are ignored")]
        if kind in ("fov", "mask_2nd"):  # of masks these are problems
            alone = [path.name for name, path in files.items() if name not in images]
            without = [path.name for name, path in images.items() if files and name not in files]
            lines += [(alone, "files have no image"), (without, "images have no file here")]
        report.warnings += [f"{folder}: {len(which)} {what} ({_some(which)})" for which, what in lines if which]
    table = report.root / "photos.csv" if isinstance(report.root, Path) else None
    if found.photos and part != ALL and table and table.is_file():
        for names, what in ((images.keys() - found.photos, "not named"), (found.photos.keys() - images, "not there")):
            if names:
                which = _some([f"{part}/{name}" for name in natural_sort(names)])
                report.warnings.append(f"{table}: {len(names)} files are {what} ({which})")


def _check_files(report: SetReport, part: str, found: PartFiles, progress: bool) -> list[tuple]:
    """Open every file of one part; returns its images' part, file, photo, fingerprint, for the search for copies."""
    files = found.files
    photos = {name: found.photos.get(name, (name,))[0] for name in files["image"]}
    figures = report.parts[part] = PartReport({kind: len(f) for kind, f in files.items()}, len(set(photos.values())))
    odd: dict[str, list[str]] = defaultdict(list)  # what many masks have in common becomes one line
    prints = []
    for name in tqdm(natural_sort({name for here in files.values() for name in here}), part, disable=not progress):
        image = None
        for kind, path in ((kind, here[name]) for kind, here in files.items() if name in here):
            try:
                pixels, remark = (load_image if kind == "image" else load_mask)(path)
                if image is not None:
                    check_size(path, pixels, files["image"][name], image)
            except UserError as error:
                report.problems.append(str(error))
                continue
            if kind == "image":
                image = pixels
                figures.sizes[pixels.shape[:2]] += 1
                prints.append((part, path, photos[name], fingerprint(pixels)))
                if remark:
                    odd[f"images as read: {remark}"].append(path.name)
                if pixels.min() == pixels.max():
                    report.problems.append(f"{path}: shows nothing, all its pixels are {pixels.max()}")
                continue
            share = _check_mask(report, path, pixels, remark, kind, odd)
            if kind == "mask":
                figures.vessel.append(share)
    report.warnings += [f"{part}: {len(names)} {what} ({_some(names)})" for what, names in odd.items()]
    return prints


def _check_mask(report: SetReport, path: Path, mask: np.ndarray, remark: str, kind: str, odd: dict) -> float:
    """Report what is wrong with the mask (H, W) uint8 and its reading; returns its share of vessel."""
    counts = np.bincount(mask.ravel(), minlength=256) / mask.size
    values, share = np.count_nonzero(counts), float(counts[128:].sum())
    if not share:
        report.problems.append(f"{path}: {'is black, so nothing in it would count' if kind == 'fov' else remark}")
    elif counts[32:224].sum() > GREY_SHARE:
        report.problems.append(f"{path}: is no mask: it has {values} values, most of them grey")
    elif kind == "fov" and values > 2:
        odd["fields of view have more than two values; they are cut at 127"].append(path.name)
    elif values > 2:
        key = f"{_NAMES[kind]} have grey edges, as masks resized bilinearly have (the Kaggle set's too)"
        odd[key].append(f"{path.name}: {values} values")
    if share and remark:
        odd[f"{_NAMES[kind]} as read: {remark}"].append(path.name)
    if kind != "fov" and share > 0.5:
        report.problems.append(f"{path}: calls {100 * share:.0f} % of the frame vessel; is it inverted?")
    return share


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def fingerprint(image: np.ndarray) -> np.ndarray:
    """What an image (H, W, 3) uint8 shows: (64, 64) float32, of length 1, or all 0 for an image that shows nothing.

    The green channel less its blur, by its local contrast; not the rim, which all fundus photos have in common.
    """
    small = cv2.resize(np.ascontiguousarray(image[:, :, 1]), (PRINT_SIDE, PRINT_SIDE), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float32)
    lit = (small > 0.2 * np.percentile(small, 90)).astype(np.uint8)
    inner = cv2.erode(lit, np.ones((PRINT_SIDE // 8 + 3,) * 2, np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    detail = (small - cv2.GaussianBlur(small, (0, 0), PRINT_SIDE / 16)) * inner
    detail /= np.sqrt(cv2.GaussianBlur(detail**2, (0, 0), PRINT_SIDE / 8)) + 0.1  # local contrast
    return detail / max(float(np.linalg.norm(detail)), 1e-6)


def same_photo(fingerprints: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs i < j of `fingerprints` (N, 64, 64) that show one photo, maybe mirrored or rotated by quarters."""
    flat = fingerprints.reshape(len(fingerprints), -1)
    for i, one in enumerate(fingerprints):
        ways = np.stack([np.rot90(side, quarters) for side in (one, one[:, ::-1]) for quarters in range(4)])
        likeness = ways.reshape(8, -1) @ flat[i + 1 :].T
        for j in np.flatnonzero((likeness > SAME_PHOTO).any(axis=0)):
            yield i, i + 1 + int(j)


def _check_copies(report: SetReport, prints: list[tuple[str, Path, str, np.ndarray]]) -> None:
    """Report test images that are in train too, and copies inside a part that are not known as such."""
    leaks: dict[Path, list[str]] = defaultdict(list)
    unknown: dict[str, list[str]] = defaultdict(list)
    for i, j in same_photo(np.stack([fingerprint for *_, fingerprint in prints])):
        (part, file, photo, _), (other_part, other_file, other_photo, _) = prints[i], prints[j]
        if part != other_part:
            leaks[other_file].append(str(file))
        elif photo != other_photo:
            unknown[part].append(f"{file.name} and {other_file.name}")
    for file, copies in leaks.items():
        report.problems.append(f"{file}: is in train too, as {_some(copies)}; a score on it is worth nothing")
    for part, pairs in unknown.items():
        what = f"{len(pairs)} pairs of files show one photo each but count as different photos ({_some(pairs)})"
        report.warnings.append(f"{part}: {what}; give them one photo in photos.csv, or a split may part them")
