"""From an image to what the network is fed and back: the working frame, padding, the tensor, and augmentation.

Training, validation, inference and the ONNX metadata use the same frames.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from retina_seg.fov import LARGEST_SIDE, fov_box, fov_diameter
from retina_seg.images import jpeg
from retina_seg.utils import UserError

NORMAL_MEAN, NORMAL_SPREAD = 128, 32  # grey levels: what `normalise` brings each channel to
LOWEST_SPREAD = 0.5  # grey levels: below it there is only rounding to enlarge
LARGER_POWER = 1 / 3  # exponent of how many times as large as usual a field of view is (`working_diameter`)
SAME_SCALE = 0.03  # within this an image is not resized: interpolation would cost more than it mends


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 RGB -> (3, H, W) float32 BGR in [0, 1]: what the networks are fed (the original's channel order)."""
    return torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))).float() / 255


def mask_to_tensor(mask: np.ndarray) -> Tensor:
    """(H, W) uint8 -> (1, H, W) float32 in [0, 1]; fractions on the edges of a resized mask are kept."""
    return torch.from_numpy(np.ascontiguousarray(mask)).unsqueeze(0).float() / 255


def normalise(image: np.ndarray, fov: np.ndarray) -> np.ndarray:
    """Each channel of `image` (H, W, 3) uint8 at mean 128 and standard deviation 32 over `fov` (H, W) bool; 0 outside."""
    inside = np.ascontiguousarray(fov).view(np.uint8)
    mean, spread = (value.ravel() for value in cv2.meanStdDev(image, mask=inside))
    table = NORMAL_MEAN + (np.arange(256)[:, None] - mean) * NORMAL_SPREAD / np.maximum(spread, LOWEST_SPREAD)
    levels = np.clip(np.rint(table), 0, 255).astype(np.uint8)[None]
    return cv2.copyTo(cv2.LUT(image, levels), inside)


class Placement(NamedTuple):
    """How one image lies in a frame: `box` is cut out of it and resized to `size`."""

    box: tuple[int, int, int, int]  # top, left, bottom, right, pixels
    size: tuple[int, int]  # height, width, pixels
    image_how: int = cv2.INTER_LINEAR  # OpenCV's interpolation for images
    mask_how: int = cv2.INTER_LINEAR  # and for masks
    normalised: np.ndarray | None = None  # the field of view (H, W) bool to normalise images in; None: they are not

    def enter(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (h, w, 3) uint8 in the frame."""
        return self._enter(image if self.normalised is None else normalise(image, self.normalised), self.image_how)

    def enter_mask(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) uint8 -> (h, w) uint8 in the frame."""
        return self._enter(mask, self.mask_how)

    def _enter(self, array: np.ndarray, how: int) -> np.ndarray:
        top, left, bottom, right = self.box
        part = array[top:bottom, left:right]
        return part if part.shape[:2] == self.size else cv2.resize(part, self.size[::-1], interpolation=how)

    def leave(self, logits: np.ndarray, shape: tuple[int, int], outside: float | None = None) -> np.ndarray:
        """Logits (h, w) float32 in the frame -> probability (H, W) float32 in [0, 1] on the image, 0 beside the box.

        With `outside` the logits on the image, and this value beside the box.
        """
        top, left, bottom, right = self.box
        # not probabilities are resized: they are flat where the network is sure, which would shift edges
        if logits.shape != (bottom - top, right - left):
            logits = cv2.resize(logits, (right - left, bottom - top), interpolation=cv2.INTER_LINEAR)
        inside = torch.sigmoid(torch.from_numpy(logits)).numpy() if outside is None else logits
        if inside.shape == shape:
            return inside
        whole = np.full(shape, outside or 0, np.float32)
        whole[top:bottom, left:right] = inside
        return whole


@dataclass(frozen=True)
class ResizeFrame:
    """The whole image resized to (height, width) pixels, aspect ratio not kept: the original's preparation."""

    height: int = 512
    width: int = 512
    margin = 0  # strides of black around the image

    @property
    def usual_size(self) -> tuple[int, int]:
        """(height, width) in the frame of most images."""
        return self.height, self.width

    def place(self, fov: np.ndarray) -> Placement:
        """How an image lies in the frame: of its field of view `fov` (H, W) bool only the shape counts."""
        return Placement((0, 0, *fov.shape), (self.height, self.width))

    def with_size(self, size: int) -> "ResizeFrame":
        """The same at `size` x `size` pixels."""
        return ResizeFrame(size, size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as checkpoints keep them."""
        return {"kind": "resize", "size": [self.height, self.width]}


@dataclass(frozen=True)
class FovFrame:
    """The box of the field of view, scaled by the field's diameter, aspect ratio kept."""

    fov_diameter: float  # what the diameter is brought to, pixels
    largest_diameter: float | None = None  # the most a larger one is brought to (`working_diameter`); None: all to one
    normalise: bool = False  # whether light and colour are normalised inside the field of view (`normalise`)
    margin = 2  # strides of black around the image: the dark surround that the box cut off

    @property
    def usual_size(self) -> tuple[int, int]:
        """(height, width) in the frame of most images, whose field of view is round."""
        return (round(self.fov_diameter),) * 2

    def working_diameter(self, diameter: float) -> float:
        """The diameter in the frame, pixels, of a field of view of `diameter` pixels on the image.

        With `largest_diameter` a larger one keeps the cube root of how many times as large it is: larger images show
        and label finer vessels.
        """
        larger = self.fov_diameter * (diameter / self.fov_diameter) ** LARGER_POWER
        return min(max(self.fov_diameter, larger), self.largest_diameter or self.fov_diameter)

    def place(self, fov: np.ndarray) -> Placement:
        """How an image with the field of view `fov` (H, W) bool lies in the frame."""
        top, left, bottom, right = box = fov_box(fov)
        diameter = max(fov_diameter(fov), 1.0)
        scale = self.working_diameter(diameter) / diameter
        if abs(scale - 1) <= SAME_SCALE:
            scale = 1.0
        size = (max(1, round((bottom - top) * scale)), max(1, round((right - left) * scale)))
        inside = fov if self.normalise and fov.any() else None
        image_how, mask_how = (cv2.INTER_AREA,) * 2 if scale < 1 else (cv2.INTER_CUBIC, cv2.INTER_LINEAR)
        return Placement(box, size, image_how, mask_how, inside)

    def with_size(self, size: int) -> "FovFrame":
        """The same for one diameter of `size` pixels."""
        return FovFrame(size, normalise=self.normalise)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as checkpoints keep them."""
        return {"kind": "fov", **{name: value for name, value in vars(self).items() if value}}


Frame = ResizeFrame | FovFrame


def frame_from_dict(value: Any) -> Frame:
    """The frame that `to_dict` wrote. Raises `ValueError` where it is none."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        if value["kind"] in ("resize", "squeeze"):  # the second in checkpoints of earlier versions
            height, width = value["size"]
            if all(isinstance(side, int) and 0 < side <= LARGEST_SIDE for side in (height, width)):
                return ResizeFrame(height, width)
        elif value["kind"] == "fov":
            frame = FovFrame(value["fov_diameter"], value.get("largest_diameter"), value.get("normalise") is True)
            if 0 < frame.fov_diameter <= (frame.largest_diameter or frame.fov_diameter) <= LARGEST_SIDE:
                return frame
    raise ValueError(f"working frame {str(value)[:120]} is none this version knows")


def pad_to_stride(image: np.ndarray, stride: int, margin: int = 0) -> tuple[np.ndarray, tuple[slice, slice]]:
    """`image` (H, W[, C]) in zeros, height and width multiples of `stride`; and where it lies in the result.

    `margin`: strides of zeros at the top and left, and at least as many at the bottom and right.
    """
    (height, width), space = image.shape[:2], margin * stride
    # two strides at least: the deepest level needs more than one pixel
    sides = [max(2 * stride, math.ceil((side + 2 * space) / stride) * stride) for side in (height, width)]
    padded = np.zeros((*sides, *image.shape[2:]), image.dtype)
    inside = (slice(space, space + height), slice(space, space + width))
    padded[inside] = image
    return padded, inside


@dataclass(frozen=True)
class Augmentation:
    """How strongly training images are augmented; 0 switches a step off. "Spread": standard deviation of the logarithm."""

    rotate: float = 180.0  # largest rotation to either side, degrees
    flip: bool = True  # mirror half of the draws
    scale: float = 0.12  # spread of the size
    stretch: float = 0.06  # spread of the ratio of the two sides
    bend: float = 2.0  # standard deviation of the elastic displacement, pixels
    gamma: float = 0.25  # spread of gamma
    contrast: float = 0.2  # spread of the contrast
    light: float = 0.15  # spread of the brightness
    cast: float = 0.12  # spread of each channel's gain on its own
    grey: float = 0.5  # largest share of colour taken away
    shade: float = 0.15  # spread of a smooth uneven illumination
    haze: float = 0.0  # largest local loss of contrast, 0 to 1; in a third of the draws
    channels: float = 0.0  # share of draws with channels lost, all alike, or in another order
    blur: float = 0.8  # largest Gaussian blur, pixels; in half of the draws
    far_blur: float = 0.0  # largest Gaussian blur of a tenth of the draws, pixels
    noise: float = 0.03  # largest noise, share of full scale; in half of the draws
    jpeg: float = 0.0  # share of draws that went through JPEG of quality 15 to 80
    levels: float = 0.0  # share of draws with 8 to 48 grey levels, as in dark images
    recolour: float = 1.0  # share of draws whose light and colours are changed at all
    exact: float = 0.25  # share of draws that are only rotated by quarters and mirrored, without interpolation

    @classmethod
    def changed(cls, changes: dict[str, Any]) -> "Augmentation":
        """The defaults with `changes`. Raises `UserError` for an unknown name, or a value that is no number from 0 on."""
        for name, value in changes.items():
            if name not in cls.__dataclass_fields__:
                raise UserError(f"--augmentation {name}: unknown; choose from {', '.join(cls.__dataclass_fields__)}")
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise UserError(f"--augmentation {name} {str(value)[:80]}: must be a number from 0 on")
        return replace(cls(), **changes)


def augment_geometry(
    image: np.ndarray, mask: np.ndarray, size: int, how: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A patch of image and mask together, rotated, scaled and elastically deformed in a single interpolation.

    `image` (H, W, 3) uint8 RGB, the box of the field of view, and `mask` (H, W) uint8 -> (size, size, 3) and (size, size)
    uint8; black beyond the image.
    """
    # patches stay inside the image where it is larger than they are, so that black surround is not learnt at length
    sides = np.array(mask.shape)
    slack = np.maximum(0, (sides - size) / 2 + size / 8)
    centre = (sides / 2 + rng.uniform(-slack, slack))[::-1]  # x, y
    exact = rng.random() < how.exact
    angle = rng.integers(4) * np.pi / 2 if exact else np.deg2rad(rng.uniform(-how.rotate, how.rotate))
    scale, stretch = (1.0, 1.0) if exact else np.exp(rng.normal(0, [how.scale, how.stretch]))
    mirror = -1.0 if how.flip and rng.random() < 0.5 else 1.0
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ np.diag([mirror / (scale * stretch), stretch / scale])  # patch to image, (x, y)
    if exact:  # whole pixels onto whole pixels
        linear = np.round(linear)
        centre = np.floor(centre) + (size % 2 == 0) * 0.5
    shift = centre - linear @ np.full(2, (size - 1) / 2)
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32)
    map_x, map_y = (a * xs + b * ys + c for a, b, c in np.column_stack([linear, shift]).astype(np.float32))
    if how.bend and not exact:
        knots = max(3, size // 64)
        coarse = rng.normal(0, how.bend, (2, knots, knots)).astype(np.float32)
        map_x += cv2.resize(coarse[0], (size, size), interpolation=cv2.INTER_CUBIC)
        map_y += cv2.resize(coarse[1], (size, size), interpolation=cv2.INTER_CUBIC)
    image_how, mask_how = (cv2.INTER_NEAREST,) * 2 if exact else (cv2.INTER_CUBIC, cv2.INTER_LINEAR)
    return cv2.remap(image, map_x, map_y, image_how), cv2.remap(mask, map_x, map_y, mask_how)


def augment_colour(image: np.ndarray, how: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Another camera's light and colours on (H, W, 3) float32 in [0, 1]; black stays black. The same shape and range."""
    side = image.shape[:2][::-1]
    if how.channels and rng.random() < how.channels:
        image = _change_channels(image, rng)
    grey = image.mean(axis=2, keepdims=True)
    image = image + rng.uniform(0, how.grey) * (grey - image)
    image = image ** np.float32(np.exp(rng.normal(0, how.gamma)))
    lit = image[grey[..., 0] > 0.04]
    centre = lit.mean(axis=0) if len(lit) else np.zeros(3, np.float32)
    gain = np.exp(rng.normal(0, how.light) + rng.normal(0, how.cast, 3)).astype(np.float32)
    contrast = np.float32(np.exp(rng.normal(0, how.contrast)))
    # contrast about the mean of what is lit; the surround would turn grey, so it keeps its place by the fade near black
    fade = np.clip(grey / 0.1, 0, 1)
    image = (image + fade * (contrast - 1) * (image - centre)) * gain
    if how.shade:
        field = cv2.resize(rng.normal(0, how.shade, (4, 4)).astype(np.float32), side, interpolation=cv2.INTER_CUBIC)
        image = image * np.exp(field)[..., None]
    if how.haze and rng.random() < 1 / 3:
        share = rng.uniform(0, rng.uniform(0, how.haze), (4, 4)).astype(np.float32)
        image = image + cv2.resize(share, side)[..., None] * fade * (centre * gain - image)
    if how.far_blur and rng.random() < 0.1:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, max(0.51, how.far_blur)))
    elif how.blur and rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.2, max(0.21, how.blur)))
    if how.noise and rng.random() < 0.5:
        image = image + rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, how.noise))
    image = np.clip(image, 0, 1, dtype=np.float32)
    if how.jpeg and rng.random() < how.jpeg:
        image = jpeg(np.rint(image * 255).astype(np.uint8), int(rng.integers(15, 81))).astype(np.float32) / 255
    if how.levels and rng.random() < how.levels:
        count = np.float32(rng.uniform(8, 48))
        image = np.clip(np.rint(image * count) / count, 0, 1)
    return image


def _change_channels(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One channel without contrast, only one with it, all as one of them, or another order: (H, W, 3) float32."""
    kind, one = rng.integers(4), rng.integers(3)
    lit = np.float32(NORMAL_MEAN / 255) * (image.max(axis=2, keepdims=True) > 0)
    if kind == 0:
        return np.where(np.arange(3) == (0, 2)[one % 2], lit, image)  # not green: it shows vessels best
    if kind == 1:
        return np.where(np.arange(3) == (1, 1, 0)[one], image, lit)
    if kind == 2:
        return np.repeat(image[:, :, [(1, 1, 0)[one]]], 3, axis=2)
    return image[:, :, rng.permutation(3)]
