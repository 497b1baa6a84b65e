"""Photo and mask pairs on disk, the original's dataset, splits that never leak, augmentation on the fly.

A set is a folder in the Data1 layout: `{train,test}/{image,mask}/<name>.<ending>`, and where they are known
`fov/` (the field of view), `mask_2nd/` (a second observer) and `photos.csv` (which files show the same photo).
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from retina_seg.fov import LARGEST_SIDE, find_fov, fov_box, fov_diameter
from retina_seg.images import list_pictures, read_label, read_photo
from retina_seg.utils import UserError

PARTS = ("train", "test")


# --------------------------------------------------------------------------------------------------------- sets on disk


@dataclass(frozen=True)
class Pair:
    """A photo with its label.

    Attributes:
        name: the photo's file name without its ending.
        image, mask: the two files.
        photo: what stands for the photo itself: files that are variants of one photo have the same.
        subject: whose eye it is, where the set says; splits keep a person's two eyes on one side.
        fov, mask_2nd: the field of view and the second observer's label, where the set has them.
    """

    name: str
    image: Path
    mask: Path
    photo: str
    subject: str
    fov: Path | None = None
    mask_2nd: Path | None = None


def find_set(data: str | Path) -> Path:
    """The folder in the Data1 layout at `data`, or up to three folders below it, as archives unpack.

    Raises:
        UserError: no such folder, none in this layout, or several.
    """
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; Data1/README.md says how to get the photos")
    level = [data]
    for _ in range(4):
        found = [folder for folder in level if any((folder / part / "image").is_dir() for part in PARTS)]
        if len(found) > 1:
            names = ", ".join(str(folder) for folder in found[:3])
            raise UserError(f"{data}: holds several sets ({names}); name one of them")
        if found:
            return found[0]
        level = [below for folder in level for below in sorted(folder.iterdir()) if below.is_dir()]
    if (data / "training" / "images").is_dir() or (data / "Image_01L.jpg").is_file():
        raise UserError(f"{data}: is a set as published; bring it into the layout first: retina-seg prepare --help")
    raise UserError(f"{data}: has no train/image or test/image folder; Data1/README.md shows the layout")


def is_empty(data: str | Path) -> bool:
    """Whether `data` is no folder yet, or one without any picture in it or below it."""
    data = Path(data)
    if data.exists() and not data.is_dir():
        raise UserError(f"{data}: is a file, not a folder of photos")
    return not any(list_pictures(folder) for folder in [data, *data.rglob("*/")] if folder.is_dir())


def list_pairs(data: str | Path, part: str) -> list[Pair]:
    """The pairs of one part ("train" or "test") of the set at `data`, in natural order, matched by name.

    Raises:
        UserError: no such folder, no photos, a photo without a mask or a mask without a photo, two files of one name.
    """
    root = find_set(data)
    folder = root / part
    for needed in ("image", "mask"):
        if not (folder / needed).is_dir():
            raise UserError(f"{folder / needed}: no such folder; Data1/README.md shows the layout")
    images, masks = _by_name(folder / "image"), _by_name(folder / "mask")
    if not images:
        raise UserError(f"{folder / 'image'}: holds no pictures; Data1/README.md says how to get them")
    for here, there, kind in ((images, masks, "mask"), (masks, images, "image")):
        lonely = [path for name, path in here.items() if name not in there]
        if lonely:
            more = f" (and {len(lonely) - 1} more)" if len(lonely) > 1 else ""
            raise UserError(
                f"{lonely[0]}: has no partner {folder / kind / lonely[0].stem}.*{more}; add it or remove this"
            )
    extras = {kind: _by_name(folder / kind) if (folder / kind).is_dir() else {} for kind in ("fov", "mask_2nd")}
    photos = photo_ids(root, part, list(images), folder / "image")
    return [
        Pair(name, path, masks[name], *photos[name], extras["fov"].get(name), extras["mask_2nd"].get(name))
        for name, path in images.items()
    ]


def list_training_pairs(data: str | Path | Sequence[str | Path], part: str) -> list[Pair]:
    """`list_pairs` of one set, or of several together: then names, photos and subjects carry their set's folder name.

    Raises:
        UserError: as `list_pairs`; two of the sets' folders have one name.
    """
    if isinstance(data, (str, Path)):
        return list_pairs(data, part)
    if len(data) == 1:
        return list_pairs(data[0], part)
    roots = [find_set(one) for one in data]
    twice = [name for name, count in Counter(root.name for root in roots).items() if count > 1]
    if not roots or twice:
        raise UserError(f"--data: several sets need folders of different names, got {', '.join(map(str, roots))}")
    return [
        replace(
            pair,
            name=f"{root.name}/{pair.name}",
            photo=f"{root.name}/{pair.photo}",
            subject=f"{root.name}/{pair.subject}",
        )
        for root in roots
        for pair in list_pairs(root, part)
    ]


def _by_name(folder: Path) -> dict[str, Path]:
    files = list_pictures(folder)
    twice = [name for name, count in Counter(path.stem for path in files).items() if count > 1]
    if twice:
        raise UserError(f"{folder}: two files are called {twice[0]}; remove or rename one")
    return {path.stem: path for path in files}


def photo_ids(root: Path, part: str, names: list[str], folder: Path) -> dict[str, tuple[str, str]]:
    """Which (photo, subject) each file shows: by `photos.csv` where the set has one, else by the Kaggle set's own order.

    Raises:
        UserError: photos.csv is no such table.
    """
    rows = read_index(root)
    if rows is not None:
        return {name: rows.get((part, name), (name, name)) for name in names}
    if part == "train" and _in_fours(names, folder):
        return {name: (str(int(name) // 4),) * 2 for name in names}
    return {name: (name, name) for name in names}


def read_index(root: Path) -> dict[tuple[str, str], tuple[str, str]] | None:
    """What `photos.csv` of the set says: (part, name) -> (photo, subject); None where the set has none.

    Raises:
        UserError: it is no such table.
    """
    index = root / "photos.csv"
    if not index.is_file():
        return None
    try:
        with open(index, newline="", encoding="utf-8-sig") as file:  # a spreadsheet begins its files with a mark
            rows = {
                (row["part"], row["name"]): (row["photo"], row.get("subject") or row["photo"])
                for row in csv.DictReader(file)
            }
    except (OSError, KeyError, UnicodeDecodeError, csv.Error):
        rows = {("", ""): (None, None)}
    if any(None in (*key, *value) for key, value in rows.items()):  # a row cut short has None for what it lacks
        raise UserError(f"{index}: is not a table with columns part, name, photo; mend or remove it")
    return rows


def _in_fours(names: list[str], folder: Path) -> bool:
    """Whether the files are 0 … 4n-1 with file 4k+1 the mirror image of file 4k, as in the Kaggle set's train part."""
    if not names or len(names) % 4 or [name for name in names if not name.isdecimal()]:
        return False
    if sorted(int(name) for name in names) != list(range(len(names))):
        return False
    pair = [list_pictures(folder)[position] for position in (0, 1)]
    try:
        first, second = (read_photo(path) for path in pair)
    except UserError:
        return True  # whoever reads it next says what is wrong with it; until then the cautious answer
    return first.shape == second.shape and np.array_equal(first[:, ::-1], second)


# --------------------------------------------------------------------------------------------------------------- splits


def split_by_photo(
    pairs: Sequence[Pair], validation: float | int, seed: int, fold: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """Share out `pairs` to (training, validation) so that all variants of a photo, and both eyes of a person, stay on one side.

    Args:
        validation: how many photos, or people where the set tells them apart (int), or which share of them (float in
            (0, 1)) to hold out.
        seed: of the order they are drawn in; the same photos for the same seed.
        fold: holds out the `fold`-th lot of that order, from 0 on, for cross-validation: lots do not overlap.

    Raises:
        UserError: fewer than one photo would be left on either side, or there are not so many whole lots.
    """
    photos = sorted({pair.subject for pair in pairs}, key=lambda name: (len(name), name))
    count = validation if isinstance(validation, int) else max(1, round(len(photos) * validation))
    if not 1 <= count < len(photos):
        raise UserError(
            f"--held-out {count}: cannot hold out {count} of {len(photos)} photos for validation: both sides need one at least"
        )
    if not 0 <= fold < len(photos) // count:
        raise UserError(f"--fold {fold}: {len(photos)} photos make folds 0 to {len(photos) // count - 1} of {count}")
    order = random.Random(seed).sample(photos, len(photos))
    held_out = set(order[fold * count : (fold + 1) * count])
    training = [pair for pair in pairs if pair.subject not in held_out]
    return training, [pair for pair in pairs if pair.subject in held_out]


def split_by_file(pairs: Sequence[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Share out `pairs` to (training, validation) with `count` files drawn at random, whatever they show.

    Where files are variants of one photo this leaks: it is here to show how much, not for use.

    Raises:
        UserError: fewer than one file would be left on either side.
    """
    if not 1 <= count < len(pairs):
        raise UserError(
            f"--held-out {count}: cannot hold out {count} of {len(pairs)} files for validation: both sides need one at least"
        )
    held_out = {pair.name for pair in random.Random(seed).sample(list(pairs), count)}
    return [pair for pair in pairs if pair.name not in held_out], [pair for pair in pairs if pair.name in held_out]


# -------------------------------------------------------------------------------------------------------- original's dataset


def load_pair(image: str | Path, mask: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """A photo (H, W, 3) uint8 RGB and its label (H, W) uint8, 0 to 255; a label of 0/1 is taken as 0/255.

    Raises:
        UserError: a file cannot be read, or the two differ in size.
    """
    photo, label = read_photo(image), read_mask(mask)
    if photo.shape[:2] != label.shape:
        sizes = " and ".join(f"{a.shape[1]}x{a.shape[0]}" for a in (photo, label))
        raise UserError(f"{image} and {mask}: differ in size ({sizes}); a label must have its photo's size")
    return photo, label


def read_mask(path: str | Path) -> np.ndarray:
    """A mask (H, W) uint8 in 0 … 255; one stored as 0/1 is stretched to 0/255."""
    label = read_label(path)
    return label * 255 if label.max() == 1 else label


def label_remarks(pairs: Sequence[Pair]) -> list[str]:
    """A line for every kind of odd label among `pairs`: stored as 0/1, too dark to be read, or without any vessel.

    Raises:
        UserError: a label cannot be read.
    """
    odd: dict[str, list[Path]] = {"0/1": [], "dark": [], "black": []}
    for pair in pairs:
        highest = int(read_label(pair.mask).max())
        if highest <= 127:
            odd[{0: "black", 1: "0/1"}.get(highest, "dark")].append(pair.mask)
    said = {
        "0/1": "holds 0 and 1 instead of 0 and 255: 1 is taken as vessel",
        "dark": "warning: the label is dark where it is read: nothing in it is above 127, so nothing counts as vessel",
        "black": "warning: the label is all black, so nothing in its photo counts as vessel; look at it",
    }
    return [
        f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}: {said[kind]}"
        for kind, files in odd.items()
        if files
    ]


def to_tensor(photo: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 RGB -> (3, H, W) float32 BGR in [0, 1]: what the networks are fed (the original's channel order)."""
    return torch.from_numpy(np.ascontiguousarray(photo[:, :, ::-1].transpose(2, 0, 1))).float() / 255


class DriveDataset(Dataset):
    """The original's dataset: item i is a photo (3, H, W) float32 BGR in [0, 1] and its mask (1, H, W) float32 in [0, 1].

    The mask is not thresholded: the Kaggle set's labels were resized bilinearly, so vessel edges are fractions.

    Args:
        images_path, masks_path: two parallel lists of files.
        size: (height, width) that photo and mask are squeezed to, bilinearly, as the original's preparation did; None
            (the original) takes them as they are.

    Raises:
        UserError: the lists differ in length or are empty; on access, a file that cannot be read or a pair of two sizes.
    """

    def __init__(
        self,
        images_path: Sequence[str | Path],
        masks_path: Sequence[str | Path],
        size: tuple[int, int] | None = None,
    ) -> None:
        if len(images_path) != len(masks_path):
            raise UserError(f"{len(images_path)} photos but {len(masks_path)} masks: every photo needs one mask")
        if not len(images_path):
            raise UserError("the list of photos is empty; check the folder it was read from")
        self.images_path = list(images_path)
        self.masks_path = list(masks_path)
        self.size = size

    def __len__(self) -> int:
        return len(self.images_path)

    def photo_name(self, index: int) -> str:
        """The name of the photo that item `index` shows."""
        return Path(self.images_path[index]).stem

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        photo, label = load_pair(self.images_path[index], self.masks_path[index])
        if self.size and photo.shape[:2] != tuple(self.size):
            photo, label = (cv2.resize(a, self.size[::-1]) for a in (photo, label))
        return to_tensor(photo), torch.from_numpy(label).unsqueeze(0).float() / 255


# ------------------------------------------------------------------------------------- photos for training from the camera


@dataclass(frozen=True)
class Augmentation:
    """How far training photos are turned, bent and recoloured; every draw is fresh. Zero switches a step off.

    Attributes:
        rotate: largest turn to either side, degrees.
        flip: whether to mirror half of the draws.
        scale, stretch: spread (standard deviation of the logarithm) of the size and of the ratio of the two sides.
        bend: elastic displacement, standard deviation in pixels.
        gamma, contrast, light, cast: spread of the logarithm of gamma, of contrast, of brightness, and of each channel's
            gain on its own.
        grey: largest share of colour taken away.
        shade: spread of the logarithm of a smooth uneven illumination.
        blur, noise: largest Gaussian blur (pixels) and noise (share of full scale); both in half of the draws.
        recolour: share of draws whose light and colours are changed at all; the others keep the camera's own.
        exact: share of draws that are only turned by quarters and mirrored: pixels no interpolation has touched.
    """

    rotate: float = 180.0
    flip: bool = True
    scale: float = 0.12
    stretch: float = 0.06
    bend: float = 2.0
    gamma: float = 0.25
    contrast: float = 0.2
    light: float = 0.15
    cast: float = 0.12
    grey: float = 0.5
    shade: float = 0.15
    blur: float = 0.8
    noise: float = 0.03
    recolour: float = 1.0
    exact: float = 0.25

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) or not 0 <= value < np.inf:
                raise UserError(f"augmentation {name} {str(value)[:80]}: must be a number from 0 on")


def augment_geometry(
    photo: np.ndarray, label: np.ndarray, fov: np.ndarray, crop: int, how: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A turned, scaled, bent window of photo and label together.

    Args:
        photo: (H, W, 3) uint8 RGB; label: (H, W) uint8; fov: (H, W) bool, where the window's middle may lie.
        crop: side of the window, pixels.

    Returns:
        (crop, crop, 3) uint8 and (crop, crop) uint8; black beyond the frame.
    """
    top, left, bottom, right = fov_box(fov)

    def middle(low: int, high: int) -> float:
        # windows stay inside the box where it is larger than they are, so that black surround is not learnt at length
        slack = max(0.0, (high - low - crop) / 2 + crop / 8)
        return (low + high) / 2 + rng.uniform(-slack, slack)

    row, column = middle(top, bottom), middle(left, right)
    exact = rng.random() < how.exact
    angle = rng.integers(4) * np.pi / 2 if exact else np.deg2rad(rng.uniform(-how.rotate, how.rotate))
    scale, stretch = (1.0, 1.0) if exact else np.exp(rng.normal(0, [how.scale, how.stretch]))
    mirror = -1.0 if how.flip and rng.random() < 0.5 else 1.0
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ np.diag([mirror / (scale * stretch), stretch / scale])  # window to photo, (x, y)
    centre = np.array([column, row])
    if exact:  # whole pixels onto whole pixels
        linear = np.round(linear)
        centre = np.floor(centre) + (crop % 2 == 0) * 0.5
    shift = centre - linear @ np.full(2, (crop - 1) / 2)
    matrix = np.hstack([linear, shift[:, None]])
    if how.bend and not exact:
        ys, xs = np.mgrid[0:crop, 0:crop].astype(np.float32)
        knots = max(3, crop // 64)
        bent = [
            cv2.resize(
                rng.normal(0, how.bend, (knots, knots)).astype(np.float32), (crop, crop), interpolation=cv2.INTER_CUBIC
            )
            for _ in "xy"
        ]
        map_x, map_y = (m[0] * xs + m[1] * ys + m[2] + b for m, b in zip(matrix.astype(np.float32), bent, strict=True))
        return (
            cv2.remap(photo, map_x, map_y, cv2.INTER_CUBIC),
            cv2.remap(label, map_x, map_y, cv2.INTER_LINEAR),
        )
    flags = cv2.WARP_INVERSE_MAP | (cv2.INTER_NEAREST if exact else cv2.INTER_CUBIC)
    flags_label = cv2.WARP_INVERSE_MAP | (cv2.INTER_NEAREST if exact else cv2.INTER_LINEAR)
    window = (crop, crop)
    return cv2.warpAffine(photo, matrix, window, flags=flags), cv2.warpAffine(label, matrix, window, flags=flags_label)


def augment_colour(photo: np.ndarray, how: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Another camera's light and colours on (H, W, 3) float32 in [0, 1]; black stays black. The same shape and range."""
    side = photo.shape[:2][::-1]
    grey = photo.mean(axis=2, keepdims=True)
    photo = photo + rng.uniform(0, how.grey) * (grey - photo)
    photo = photo ** np.float32(np.exp(rng.normal(0, how.gamma)))
    lit = photo[grey[..., 0] > 0.04]
    centre = lit.mean(axis=0) if len(lit) else np.zeros(3, np.float32)
    gain = np.exp(rng.normal(0, how.light) + rng.normal(0, how.cast, 3)).astype(np.float32)
    contrast = np.float32(np.exp(rng.normal(0, how.contrast)))
    # contrast about the mean of what is lit; the surround would turn grey, so it keeps its place by the fade near black
    fade = np.clip(grey / 0.1, 0, 1)
    photo = (photo + fade * (contrast - 1) * (photo - centre)) * gain
    if how.shade:
        field = cv2.resize(rng.normal(0, how.shade, (4, 4)).astype(np.float32), side, interpolation=cv2.INTER_CUBIC)
        photo = photo * np.exp(field)[..., None]
    if how.blur and rng.random() < 0.5:
        photo = cv2.GaussianBlur(photo, (0, 0), rng.uniform(0.2, max(0.21, how.blur)))
    if how.noise and rng.random() < 0.5:
        photo = photo + rng.standard_normal(photo.shape, np.float32) * np.float32(rng.uniform(0, how.noise))
    return np.clip(photo, 0, 1, dtype=np.float32)


class TrainingPhotos(Dataset):
    """Freshly augmented windows of photos held in memory, brought to one scale by their field of view.

    Item i is a window of photo i modulo the number of photos: (3, crop, crop) float32 BGR in [0, 1] and its label
    (1, crop, crop) float32 in [0, 1]. What is drawn depends on (seed, epoch, i) alone, so any number of loader workers
    gives the same items.

    Args:
        pairs: the photos.
        diameter: the field of view's diameter that photos are brought to, pixels; None: the median of these photos.
        crop: side of the windows, pixels.
        repeats: windows a photo and epoch.
        how: the augmentation.
        seed: of the draws.

    Raises:
        UserError: a file cannot be read, a pair of two sizes, a diameter that cannot be.

    Attributes:
        diameter: as given or found. epoch: set it before each pass.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        diameter: float | None,
        crop: int,
        repeats: int = 1,
        how: Augmentation | None = None,
        seed: int = 42,
    ) -> None:
        if diameter is not None and not 0 < diameter <= LARGEST_SIDE:
            raise UserError(f"fov_diameter {diameter}: must lie between 0 and {LARGEST_SIDE} pixels")
        loaded = [load_with_fov(pair) for pair in pairs]
        self.diameter = diameter or float(np.median([fov_diameter(fov) for _, _, fov in loaded]))
        self.photos = [to_scale(*item, self.diameter) for item in loaded]
        self.names = [pair.name for pair in pairs]
        self.crop, self.repeats, self.how, self.seed = crop, repeats, how or Augmentation(), seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.photos) * self.repeats

    def photo_name(self, index: int) -> str:
        """The name of the photo that item `index` shows a window of."""
        return self.names[index % len(self.photos)]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        photo, label = augment_geometry(*self.photos[index % len(self.photos)], self.crop, self.how, rng)
        photo = photo.astype(np.float32) / 255
        if self.how.recolour >= 1 or rng.random() < self.how.recolour:
            photo = augment_colour(photo, self.how, rng)
        channels = np.ascontiguousarray(photo[:, :, ::-1].transpose(2, 0, 1))
        return torch.from_numpy(channels), torch.from_numpy(label).unsqueeze(0).float() / 255


class WholePhotos(Dataset):
    """Whole photos at the training scale, for validation: (3, H, W) float32 BGR in [0, 1], label (1, H, W) float32.

    Cropped to the field of view and padded with black: `stride` pixels all around, then to multiples of `stride`.
    """

    def __init__(self, pairs: Sequence[Pair], diameter: float, stride: int) -> None:
        self.photos = [to_scale(*load_with_fov(pair), diameter) for pair in pairs]
        self.stride = stride

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        photo, label, fov = self.photos[index]
        top, left, bottom, right = fov_box(fov)
        photo, label = photo[top:bottom, left:right], label[top:bottom, left:right]
        pad = [(self.stride, self.stride + -side % self.stride) for side in label.shape]
        photo, label = np.pad(photo, [*pad, (0, 0)]), np.pad(label, pad)
        return to_tensor(photo), torch.from_numpy(label).unsqueeze(0).float() / 255


def load_with_fov(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photo (H, W, 3) uint8 RGB, label (H, W) uint8, field of view (H, W) bool: the set's own, else found in the photo."""
    photo, label = load_pair(pair.image, pair.mask)
    return photo, label, load_fov(pair, photo)


def load_fov(pair: Pair, photo: np.ndarray) -> np.ndarray:
    """The field of view (H, W) bool of a pair's photo: the set's own mask where it has one, else found in the photo."""
    if pair.fov is None:
        return find_fov(photo)
    fov = read_label(pair.fov) > 127
    if fov.shape != photo.shape[:2]:
        raise UserError(f"{pair.fov}: differs in size from its photo {pair.image}")
    return fov


def to_scale(
    photo: np.ndarray, label: np.ndarray, fov: np.ndarray, diameter: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photo, label and field of view resized so that the field of view's diameter is `diameter` pixels.

    Shapes and dtypes as in `load_with_fov`; within 3 % nothing is resized: interpolation would cost more than it mends.
    """
    scale = diameter / max(fov_diameter(fov), 1.0)
    if abs(scale - 1) < 0.03:
        return photo, label, fov
    size = tuple(max(1, round(side * scale)) for side in label.shape[::-1])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small_fov = cv2.resize(fov.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)
    label_how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(photo, size, interpolation=how), cv2.resize(label, size, interpolation=label_how), small_fov
