"""Any fundus image at any size -> the probability of vessel at that size: the one inference path of the package.

The image enters the frame its network was trained in (`transforms`), and the result is brought back to the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from retina_seg.checkpoint import find_weights, load_model
from retina_seg.device import choose_device, choose_precision
from retina_seg.fov import LARGEST_SIDE, find_discs
from retina_seg.inference.engine import inference_network
from retina_seg.transforms import FovFrame, Frame, ResizeFrame, frame_from_dict, pad_to_stride
from retina_seg.utils import UserError

MAX_LOGIT = 30.0  # logits are clamped to it: float32 knows no probability beyond, and infinity cannot be interpolated


class Segmenter:
    """A network, the frame it was trained in, and the way of any image into that frame and back.

    Args:
        model: gives logits (N, 1, H, W) for (N, 3, H, W) BGR in [0, 1]. Has `stride`, and `receptive_field`: pixels to
            either side, None where the network depends on the whole image and cannot be tiled.
        frame: `ResizeFrame` or `FovFrame`; 512x512, as the original, where not given.
        threshold: probability above which `vessels` is True, in (0, 1).
        device, precision: as in `device.choose_device` and `device.choose_precision`.
        working_size: overrides the frame's size or diameter, pixels.
        tta: test-time augmentation, the mean over the image's 8 orientations; eight times the work.
        tile: longest side the network is given at once, pixels; larger images are done in overlapping tiles.

    Raises `UserError`: an option is out of its range, or there is no such device.
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
    ) -> None:
        if not 0 < threshold < 1:
            raise UserError(f"--threshold {threshold}: must lie between 0 and 1")
        if working_size is not None and not 32 <= working_size <= LARGEST_SIDE:
            raise UserError(f"--working-size {working_size}: must lie between 32 and {LARGEST_SIDE} pixels")
        frame = frame or ResizeFrame()
        self.frame = frame if working_size is None else frame.with_size(working_size)
        self.threshold, self.tta, self.tile = threshold, tta, tile
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.model = model.eval()
        self.network = inference_network(self.model, self.device, self.precision)

    @classmethod
    def load(
        cls, name: str | Path = "general", threshold: float | None = None, style: str | None = None, **options: Any
    ) -> Segmenter:
        """The segmenter of a checkpoint file (also the original's plain state dict), a run's folder, or pretrained weights.

        Args:
            threshold: overrides the checkpoint's.
            style: of labelling, a name in the checkpoint's "styles"; None: its default.
            options: the class's other arguments.

        Raises `UserError`: no such checkpoint, or one that does not load (`checkpoint.load_model`).
        """
        path = find_weights(name)
        model, notes = load_model(path, style)
        frame, own = notes.get("frame"), notes.get("threshold", 0.5)
        try:
            frame = frame_from_dict(frame) if frame else None
        except ValueError as error:
            raise UserError(f"{path}: its {error}") from None
        if not isinstance(own, (int, float)) or not 0 < own < 1:
            raise UserError(f"{path}: its threshold {str(own)[:80]} does not lie between 0 and 1")
        return cls(model, frame, own if threshold is None else threshold, **options)

    def __call__(self, image: np.ndarray, fov: np.ndarray | None = None, everywhere: bool = False) -> np.ndarray:
        """The probability of vessel at every pixel.

        Args:
            image: (H, W, 3) uint8 RGB, or (H, W) uint8 grey.
            fov: (H, W) bool, the field of view; found in the image where not given. Of several discs on a sheet each is
                segmented on its own.
            everywhere: keep the prediction outside the field of view, as the original's protocol does, where it is else 0.

        Returns:
            (H, W) float32 in [0, 1].

        Raises `ValueError`: `image` or `fov` has another shape or dtype. Raises `UserError`: the network's output is
        NaN.
        """
        image = as_image(image)
        shape = image.shape[:2]
        if fov is None:
            fov_matters = isinstance(self.frame, FovFrame) or not everywhere
            discs = find_discs(image) if fov_matters else [np.ones(shape, bool)]
            if len(discs) > 1:
                return np.max([self(image, disc, everywhere) for disc in discs], axis=0)
            fov = discs[0] if discs else np.zeros(shape, bool)
        if fov.shape != shape or fov.dtype != bool:
            raise ValueError(f"fov must be bool of shape {shape}, got {fov.dtype} {fov.shape}")
        placement = self.frame.place(fov)
        probability = placement.leave(self._logits(placement.enter(image)), shape)
        if not everywhere:
            probability[~fov] = 0
        return probability

    def vessels(self, image: np.ndarray, fov: np.ndarray | None = None) -> np.ndarray:
        """The vessels, (H, W) bool: where the probability is above the threshold. Arguments as the call."""
        return self(image, fov) > self.threshold

    def _logits(self, image: np.ndarray) -> np.ndarray:
        """The logits (h, w) float32 of an image (h, w, 3) in the frame; with TTA their mean over 8 orientations."""
        if not self.tta:
            return self._padded(image)
        total = np.zeros(image.shape[:2], np.float32)
        for quarters in range(4):
            for step in (1, -1):  # -1: mirrored
                logits = self._padded(np.ascontiguousarray(np.rot90(image, quarters)[:, ::step]))
                total += np.rot90(logits[:, ::step], -quarters)
        return total / 8

    def _padded(self, image: np.ndarray) -> np.ndarray:
        """The logits of an image of any size: padded to the network's stride, and in tiles where it is large."""
        stride, halo = self.model.stride, getattr(self.model, "receptive_field", None)
        padded, inside = pad_to_stride(image, stride, self.frame.margin)
        if halo is None or max(padded.shape[:2]) <= self.tile:
            return self._forward(padded)[inside]
        return tiled(self._forward, padded, self.tile, math.ceil(halo / stride) * stride, stride)[inside]

    @torch.inference_mode()
    def _forward(self, image: np.ndarray) -> np.ndarray:
        """The network's logits (h, w) float32, clamped, for (h, w, 3) uint8 RGB with sides that are multiples of its stride."""
        logits = self.network(image_batch(image, self.device).to(self.precision))
        logits = logits.float().clamp_(-MAX_LOGIT, MAX_LOGIT)[0, 0].cpu().numpy()
        if np.isnan(logits).any():
            raise UserError("the network's output is NaN; choose other weights")
        return logits


def image_batch(image: np.ndarray, device: torch.device) -> Tensor:
    """(H, W, 3) uint8 RGB -> (1, 3, H, W) float32 BGR in [0, 1], channels last, on `device`."""
    batch = torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_RGB2BGR)).to(device)
    return batch.permute(2, 0, 1).unsqueeze(0).float() / 255  # a permuted image is in channels-last order already


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


def as_image(image: np.ndarray) -> np.ndarray:
    """`image` as (H, W, 3) uint8; grey (H, W) gets equal channels. Raises `ValueError`: another shape or dtype, no pixel."""
    if image is None:
        raise ValueError(
            "an image is a uint8 array (0 to 255), got None: cv2.imread gives None where it cannot read a file; "
            "use retina_seg.images.read_image, which names the cause"
        )
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ValueError(f"an image is a uint8 array (0 to 255), got {getattr(image, 'dtype', type(image).__name__)}")
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an image has shape (H, W, 3) or (H, W), got {image.shape}")
    return image
