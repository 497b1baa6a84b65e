"""What the network is fed: splits that never leak, the original's dataset, patches (the `data` notebook).

`sets.layout` finds the images and masks on disk.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from retina_seg import transforms
from retina_seg.fov import LARGEST_SIDE, fov_diameter
from retina_seg.sets.layout import Pair, list_pairs, load_pair, load_with_fov
from retina_seg.transforms import Augmentation, FovFrame, Frame, mask_to_tensor, to_tensor
from retina_seg.utils import UserError

__all__ = ["DriveDataset", "FrameDataset", "Pair", "PatchDataset", "list_pairs", "load_with_fov", "split_by_photo"]
Transform = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def split_by_photo(pairs: Sequence[Pair], validation: float, seed: int, fold: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Split `pairs` into (training, validation) so that all variants of a photo, and both eyes of a person, stay on one side.

    Args:
        validation: how many photos, or people where they are known (int), or which share (float in (0, 1)) is held out.
        seed: of the order they are drawn in.
        fold: which fold of that order is held out, from 0 on; folds do not overlap.

    Raises `UserError`: fewer than one photo would be left on either side, or there are not so many whole folds.
    """
    photos = sorted({pair.subject for pair in pairs}, key=lambda name: (len(name), name))
    count = validation if isinstance(validation, int) else max(1, round(len(photos) * validation))
    if not 1 <= count < len(photos):
        raise UserError(f"--held-out {count}: there are {len(photos)} photos, and both sides need one at least")
    if not 0 <= fold < len(photos) // count:
        raise UserError(f"--fold {fold}: {len(photos)} photos make folds 0 to {len(photos) // count - 1} of {count}")
    order = random.Random(seed).sample(photos, len(photos))
    held_out = set(order[fold * count : (fold + 1) * count])
    training = [pair for pair in pairs if pair.subject not in held_out]
    return training, [pair for pair in pairs if pair.subject in held_out]


class DriveDataset(Dataset[tuple[Tensor, Tensor]]):
    """The original's dataset: item i is an image (3, H, W) float32 BGR in [0, 1] and its mask (1, H, W) float32 in [0, 1].

    The mask is not thresholded: the Kaggle set's masks were resized bilinearly, so vessel edges are fractions.

    Args:
        images_path, masks_path: two parallel lists of files, as the original's; or one dataset as `list_pairs` takes
            it, of which this holds `part`.
        size: (height, width) that both are resized to bilinearly, aspect ratio not kept; None: as they are.
        transform: of an image (H, W, 3) uint8 RGB and its mask (H, W) uint8, gives the two changed.

    Raises `UserError`: the lists differ in length or are empty; on access as `load_pair`.
    """

    def __init__(
        self,
        images_path: Any,
        masks_path: Sequence[str | Path] | None = None,
        size: tuple[int, int] | None = None,
        transform: Transform | None = None,
        part: str = "train",
    ) -> None:
        if masks_path is None:
            pairs = list_pairs(images_path, part)
            images_path, masks_path = [pair.image for pair in pairs], [pair.mask for pair in pairs]
        if len(images_path) != len(masks_path):
            raise UserError(f"{len(images_path)} images but {len(masks_path)} masks: every image needs one mask")
        if not images_path:
            raise UserError("the list of images is empty; check the folder it was read from")
        self.images_path, self.masks_path = list(images_path), list(masks_path)
        self.size, self.transform = size, transform

    def __len__(self) -> int:
        return len(self.images_path)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = load_pair(self.images_path[index], self.masks_path[index])
        if self.size and image.shape[:2] != tuple(self.size):
            image, mask = (cv2.resize(a, self.size[::-1]) for a in (image, mask))
        if self.transform is not None:
            image, mask = self.transform(image, mask)
        return to_tensor(image), mask_to_tensor(mask)


class PatchDataset(Dataset):
    """Freshly augmented patches of images held in memory, scaled by their field of view (`FovFrame`).

    Item i of an epoch is a patch (3, size, size) float32 BGR in [0, 1], its mask (1, size, size) float32 in [0, 1] and,
    with `styles`, the number of its dataset; the datasets take turns, and so do the images of each. What is drawn depends
    on (seed, epoch, i) alone, however many workers load.

    Args:
        diameter: the field of view's diameter that images are scaled to, pixels; None: the median of these images.
        size: side of the patches, pixels; patches: how many make an epoch.
        normalise: whether the frame normalises light and colour (`transforms.normalise`).

    Attributes: `frame`, the working frame; `epoch`, to be set before each pass; `datasets`, their names, sorted;
    `images`, (image, mask) pairs in the frame by these names. Raises `UserError` as `load_with_fov`, or for `diameter`.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        diameter: float | None,
        size: int,
        patches: int,
        how: Augmentation | None = None,
        seed: int = 42,
        normalise: bool = False,
        styles: bool = False,
    ) -> None:
        if diameter is not None and not 0 < diameter <= LARGEST_SIDE:
            raise UserError(f"--fov-diameter {diameter}: must lie between 0 and {LARGEST_SIDE} pixels")
        loaded = [load_with_fov(pair) for pair in pairs]
        diameter = diameter or float(np.median([fov_diameter(fov) for _, _, fov in loaded]))
        self.frame = FovFrame(diameter, normalise=normalise)
        self.images: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for pair, (image, mask, fov) in zip(pairs, loaded, strict=True):
            place = self.frame.place(fov)
            self.images.setdefault(pair.dataset, []).append((place.enter(image), place.enter_mask(mask)))
        self.datasets, self.styles = sorted(self.images), styles
        self.size, self.patches, self.how, self.seed = size, patches, how or Augmentation(), seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.patches

    def __getitem__(self, index: int) -> tuple:
        if not 0 <= index < self.patches:
            raise IndexError(f"patch {index} of {self.patches}")
        rng = np.random.default_rng([self.seed, self.epoch, index])
        turn, dataset = divmod(self.epoch * self.patches + index, len(self.datasets))
        images = self.images[self.datasets[dataset]]
        image, mask = transforms.augment_geometry(*images[turn % len(images)], self.size, self.how, rng)
        image = image.astype(np.float32) / 255
        if self.how.recolour >= 1 or rng.random() < self.how.recolour:
            image = transforms.augment_colour(image, self.how, rng)
        channels = np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))
        return torch.from_numpy(channels), mask_to_tensor(mask), *([dataset] if self.styles else [])


class FrameDataset(Dataset):
    """Whole images in a working frame, as inference sees them, for validation: items as `PatchDataset`'s, of any size.

    Height and width are padded with black to multiples of `stride`. With `datasets` items tell the number of their own.
    """

    def __init__(self, pairs: Sequence[Pair], frame: Frame, stride: int, datasets: Sequence[str] = ()) -> None:
        self.items: list[tuple[Any, ...]] = []
        for pair in pairs:
            image, mask, fov = load_with_fov(pair)
            place = frame.place(fov)
            placed = place.enter(image), place.enter_mask(mask)
            arrays = [transforms.pad_to_stride(array, stride, frame.margin)[0] for array in placed]
            self.items.append((*arrays, *([datasets.index(pair.dataset)] if datasets else [])))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple:
        image, mask, *style = self.items[index]
        return to_tensor(image), mask_to_tensor(mask), *style
