"""Any fundus image at any size -> the probability of vessel at that size: the one inference path of the package.

The image enters the frame its network was trained in (`transforms`), and the result is brought back to the image.
"""

import math
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import nn

from retina_seg.checkpoint import find_weights, load_checkpoint, load_model
from retina_seg.config import check_threshold
from retina_seg.device import choose_device
from retina_seg.fov import LARGEST_SIDE, find_discs, fov_diameter
from retina_seg.images import as_image
from retina_seg.inference.engine import OpenvinoNetwork, Ranges, TorchNetwork, choose_engine, load_ranges
from retina_seg.model import DEFAULT_STRIDE, count_parameters
from retina_seg.styles import AUTO, AUTO_STYLES, auto_style
from retina_seg.transforms import FovFrame, Frame, ResizeFrame, frame_from_dict, pad_to_stride
from retina_seg.utils import UserError

MAX_LOGIT = 30.0  # logits are clamped to it: float32 knows no probability beyond, and infinity cannot be interpolated


class Segmenter:
    """A network, the frame it was trained in, and the way of any image into that frame and back.

    It follows `model`: after `model` was trained or changed, what it gives is the changed network's.

    Args:
        model: gives logits (N, 1, H, W) for (N, 3, H, W) BGR in [0, 1]. May have `stride`, else images are padded to
            multiples of 32, and `receptive_field`: pixels to either side, else it is never tiled.
        frame: `ResizeFrame` or `FovFrame`; 512x512, as the original, where not given.
        threshold: probability above which `vessels` is True, in (0, 1).
        device: as in `device.choose_device`. engine, precision: as in `engine.choose_engine`.
        working_size: overrides the frame's size or diameter, pixels.
        tta: test-time augmentation, the mean over the image's 8 orientations; eight times the work.
        tile: longest side the network is given at once, pixels; larger images are done in overlapping tiles.
        ranges: of the activations of `model` as it is now, for 8 bits (`export.calibrate`).

    Raises `UserError`: an option is out of its range, or there is no such device or engine.
    """

    def __init__(
        self,
        model: nn.Module,
        frame: Frame | None = None,
        threshold: float = 0.5,
        device: str = "auto",
        precision: str = "auto",
        working_size: int | None = None,
        tta: bool = False,
        tile: int = 1536,
        engine: str = "auto",
        ranges: Ranges | None = None,
    ) -> None:
        if working_size is not None and not 32 <= working_size <= LARGEST_SIDE:
            raise UserError(f"--working-size {working_size}: must lie between 32 and {LARGEST_SIDE} pixels")
        frame = frame or ResizeFrame()
        self.frame = frame if working_size is None else frame.with_size(working_size)
        self.threshold, self.tta, self.tile, self.model = check_threshold(threshold), tta, tile, model
        self.style: str | None = None  # of labelling; with "auto" the network has an output for each of its two
        self._asked, self._lock = (engine, precision), threading.Lock()
        self._ranges, self._measured = ranges, _state(model) if ranges else None
        self.to(device)

    def to(self, device: str) -> "Segmenter":
        """Use `device` from now on, as `device.choose_device` takes it; returns itself."""
        self.device, self._threads = choose_device(device), torch.get_num_threads()
        self._network: tuple[Any, TorchNetwork | OpenvinoNetwork] | None = None
        self._choose()
        return self

    def _choose(self) -> None:
        self.engine, self.precision = choose_engine(*self._asked, self.device, self.model, self._ranges)

    def __repr__(self) -> str:
        network = f"{type(self.model).__name__}, {count_parameters(self.model):,} parameters"
        precision = str(self.precision).removeprefix("torch.")
        return f"Segmenter({network}, {self.frame}, threshold {self.threshold}, {self.device}, {precision})"

    @property
    def network(self) -> TorchNetwork | OpenvinoNetwork:
        """The inference copy of `model` as it is now."""
        with self._lock:  # images are segmented in threads
            state = _state(self.model)
            if self._network is None or self._network[0] != state:
                if self._ranges and state != self._measured:
                    self._ranges = None
                    self._choose()
                self._network = state, self._inference_copy()
            return self._network[1]

    def _inference_copy(self) -> TorchNetwork | OpenvinoNetwork:
        try:
            if self.engine == "openvino":
                stride, image = getattr(self.model, "stride", DEFAULT_STRIDE), np.zeros(self.frame.usual_size, np.uint8)
                usual = pad_to_stride(image, stride, self.frame.margin)[0].shape
                return OpenvinoNetwork(self.model, self.precision, self._threads, self._ranges, usual)
        except UserError:
            if self._asked[0] == "openvino":
                raise
            self._asked = "torch", self._asked[1]
            self._choose()
        return TorchNetwork(self.model, self.device, self.precision)

    @classmethod
    def load(
        cls, name: str | Path = "general", threshold: float | None = None, style: str | None = None, **options: Any
    ) -> "Segmenter":
        """The segmenter of a checkpoint file (also the original's plain state dict), a run's folder, or pretrained weights.

        Args:
            threshold, style: override the checkpoint's; "auto": by the image's size (`styles.auto_style`).
            options: the class's other arguments.

        Raises `UserError`: no such checkpoint, or one that does not load (`checkpoint.load_model`).
        """
        path = find_weights(name)
        model, notes = load_model(path, style or load_checkpoint(path).get("style"))
        frame, own = notes.get("frame"), notes.get("threshold", 0.5)
        try:
            frame = frame_from_dict(frame) if frame else None
        except ValueError as error:
            raise UserError(f"{path}: its {error}") from None
        if not isinstance(own, (int, float)) or not 0 < own < 1:
            raise UserError(f"{path}: its threshold {str(own)[:80]} does not lie between 0 and 1")
        options = {"ranges": load_ranges(path), **options}
        segmenter = cls(model, frame, own if threshold is None else threshold, **options)
        segmenter.style = notes.get("style")
        return segmenter

    @overload
    def __call__(self, image: list, fov: None = None, everywhere: bool = False) -> list[np.ndarray]: ...
    @overload
    def __call__(self, image: Any, fov: np.ndarray | None = None, everywhere: bool = False) -> np.ndarray: ...
    def __call__(self, image: Any, fov: np.ndarray | None = None, everywhere: bool = False) -> Any:
        """The probability of vessel at every pixel, (H, W) float32 in [0, 1].

        Args:
            image: (H, W, 3) uint8 RGB, or what else `images.as_image` takes: a path, a PIL image, grey, deep or float
                arrays, a tensor; or a list of these, of any sizes, for a list of results.
            fov: (H, W) bool, the field of view; found in the image where not given. Of several discs on a sheet each is
                segmented on its own.
            everywhere: keep the prediction outside the field of view, as the original's protocol does, where it is else 0.

        Raises `ValueError`: `image` or `fov` has another shape or dtype. Raises `UserError`: an image that cannot be read;
        the network's output is NaN.
        """
        if isinstance(image, (list, tuple)):
            return [self(one, fov, everywhere) for one in image]
        return self._on_image(image, fov, everywhere)

    def logits(self, image: Any, fov: np.ndarray | None = None) -> np.ndarray:
        """The logits, (H, W) float32 in [-30, 30], -30 outside the field of view. Arguments as the call, but no list."""
        return self._on_image(image, fov, False, outside=-MAX_LOGIT)

    def vessels(self, image: Any, fov: np.ndarray | None = None) -> Any:
        """The vessels, (H, W) bool: where the probability is above the threshold. Arguments as the call."""
        if isinstance(image, (list, tuple)):
            return [self.vessels(one, fov) for one in image]
        return self(image, fov) > self.threshold

    def _on_image(self, image: Any, fov: Any, everywhere: bool, outside: float | None = None) -> np.ndarray:
        """The probability (H, W) float32 on the image, 0 outside the field of view; with `outside` the logits, and this."""
        image = as_image(image)
        shape = image.shape[:2]
        if fov is None:
            fov_matters = isinstance(self.frame, FovFrame) or not everywhere
            discs = find_discs(image) if fov_matters else [np.ones(shape, bool)]
            if len(discs) > 1:
                return np.max([self._on_image(image, disc, everywhere, outside) for disc in discs], axis=0)
            fov = discs[0] if discs else np.zeros(shape, bool)
        if fov.shape != shape or fov.dtype != bool:
            raise ValueError(f"fov must be bool of shape {shape}, got {fov.dtype} {fov.shape}")
        placement = self.frame.place(fov)
        output = auto_style(fov_diameter(fov)) if self.style == AUTO else 0
        result = placement.leave(self._logits(placement.enter(image), output), shape, outside)
        if not everywhere:
            result[~fov] = outside or 0
        return result

    def _logits(self, image: np.ndarray, output: int) -> np.ndarray:
        """An output's logits (h, w) float32 of an image (h, w, 3) in the frame; with TTA their mean over 8 orientations."""
        forward = partial(self._forward, self.network, output)
        if not self.tta:
            return self._padded(image, forward)
        total = np.zeros(image.shape[:2], np.float32)
        for quarters in range(4):
            for step in (1, -1):  # -1: mirrored
                logits = self._padded(np.ascontiguousarray(np.rot90(image, quarters)[:, ::step]), forward)
                total += np.rot90(logits[:, ::step], -quarters)
        return total / 8

    def _padded(self, image: np.ndarray, forward: Callable[..., np.ndarray]) -> np.ndarray:
        """The logits of an image of any size: padded to the network's stride, and in tiles where it is large."""
        stride, halo = getattr(self.model, "stride", DEFAULT_STRIDE), getattr(self.model, "receptive_field", None)
        padded, inside = pad_to_stride(image, stride, self.frame.margin)
        if halo is None or max(padded.shape[:2]) <= self.tile:
            return forward(padded)[inside]
        return tiled(forward, padded, self.tile, math.ceil(halo / stride) * stride, stride)[inside]

    def _forward(self, network: TorchNetwork | OpenvinoNetwork, output: int, image: np.ndarray) -> np.ndarray:
        """An output's logits (h, w) float32, clamped, for (h, w, 3) uint8 RGB with sides that are multiples of the stride."""
        logits = network(image)
        outputs = len(AUTO_STYLES) if self.style == AUTO else 1
        if logits.shape != (1, outputs, *image.shape[:2]):
            shapes = f"{logits.shape} instead of (1, {outputs}, {image.shape[0]}, {image.shape[1]})"
            raise UserError(f"the network gives {shapes}; it has to give logits (N, 1, H, W) for images (N, 3, H, W)")
        logits = np.clip(logits[0, output], -MAX_LOGIT, MAX_LOGIT)
        if np.isnan(logits.sum()):
            raise UserError("the network's output is NaN; choose other weights")
        return logits


def _state(model: nn.Module) -> tuple[list[tuple[int, int]], int]:
    """What tells whether a network was changed: its tensors and a checksum of their values, the same in every thread."""
    values, checksum = [*model.parameters(), *model.buffers()], 0
    floats = [value.detach().flatten() for value in values if value.is_floating_point()]
    # joined on a GPU alone, for one copy: on a processor torch's second thread would then wait, spinning, beside OpenVINO's
    for some in floats if all(value.device.type == "cpu" for value in floats) else [torch.cat(floats)]:
        checksum = zlib.adler32(some.float().cpu().numpy().data, checksum)
    return [(id(value), value._version) for value in values], checksum


def tiled(function: Callable[..., np.ndarray], image: np.ndarray, tile: int, halo: int, stride: int) -> np.ndarray:
    """`function`, (h, w, 3) -> (h, w), over `image` (H, W, 3) in tiles of at most `tile` pixels; (H, W) float32.

    Each tile is computed with `halo` pixels around it, which are dropped. Corners lie on multiples of `stride`, so that
    pooling joins the same pixels as in the whole image.
    """
    height, width = image.shape[:2]
    core = max(stride, (tile - 2 * halo) // stride * stride)
    result = np.empty((height, width), np.float32)
    for top in range(0, height, core):
        for left in range(0, width, core):
            bottom, right = min(top + core, height), min(left + core, width)
            y, x = max(0, top - halo), max(0, left - halo)
            part = function(image[y : min(height, bottom + halo), x : min(width, right + halo)])
            result[top:bottom, left:right] = part[top - y : bottom - y, left - x : right - x]
    return result
