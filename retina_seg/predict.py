"""Any photo at any size -> the probability of vessel at that size: the one inference path of the package.

    segmenter = Segmenter.load("results/notebook/checkpoint.pth")
    probability = segmenter(photo)

The photo is brought to the frame its network was trained in, and all of that is undone behind it:

- "squeeze" (the original): the whole frame to 512x512, whatever its shape;
- "fov": the field of view is cut out and scaled, its shape kept, so that its diameter in pixels is the training's.
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

from retina_seg.fov import LARGEST_SIDE, find_fov, fov_box, fov_diameter
from retina_seg.fused import inference_network
from retina_seg.model import load_model
from retina_seg.utils import UserError, choose_device, choose_precision

WEIGHTS = Path(__file__).parent / "weights"
NOTEBOOK_FRAME = {"kind": "squeeze", "size": [512, 512]}
SURE = 30.0  # logits are cut here: float32 knows no probability beyond, and infinity cannot be interpolated
SAME_SCALE = 0.03  # within this, a photo is not resized: interpolation would cost more than it mends


def shipped_weights() -> list[str]:
    """The names of the weights that ship with the package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.pth"))


def find_checkpoint(name: str | Path) -> Path:
    """The checkpoint file that `name` means: a file, a run's folder, or weights that ship.

    Raises:
        UserError: none of these.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "checkpoint.pth").is_file():
            raise UserError(f"{path}: holds no checkpoint.pth; give the folder of a finished run")
        return path / "checkpoint.pth"
    if path.is_file():
        return path
    if str(name) in shipped_weights():
        return WEIGHTS / f"{name}.pth"
    shipped = ", ".join(shipped_weights())
    known = f"; weights that ship: {shipped}" if shipped else ""
    raise UserError(f"{name}: no such checkpoint file or run folder{known}")


class Segmenter:
    """A network, the frame it was trained in, and the way from any photo into that frame and back.

    Args:
        model: gives logits (N, 1, H, W) for (N, 3, H, W) BGR in [0, 1]; has `stride`, and `receptive_field` (pixels to
            either side, None where a tile would be seen differently than the whole photo).
        frame: {"kind": "squeeze", "size": [height, width]}, or {"kind": "fov", "fov_diameter": pixels}, with a
            "largest_diameter" where larger photos are to be seen larger (`working_diameter`).
        threshold: what `vessels` cuts at.
        device, precision: as in `utils.choose_device` and `choose_precision`.
        working_size: overrides the frame's size or diameter, pixels.
        flips: average over the photo mirrored and turned, all eight ways: test-time augmentation, eight times the work.
        tile: longest side the network is given at once, pixels; larger working photos are done in overlapping tiles.
    """

    def __init__(
        self,
        model: nn.Module,
        frame: dict[str, Any] | None = None,
        threshold: float = 0.5,
        device: str = "auto",
        precision: str = "auto",
        working_size: int | None = None,
        flips: bool = False,
        tile: int = 1536,
    ) -> None:
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.model = model.eval()
        self.network = inference_network(self.model, self.device, self.precision)
        self.frame = dict(frame or NOTEBOOK_FRAME)
        if not 0 < threshold < 1:
            raise UserError(f"--threshold {threshold}: must lie between 0 and 1")
        self.threshold, self.flips, self.tile = threshold, flips, tile
        if working_size is not None:
            if not 32 <= working_size <= LARGEST_SIDE:
                raise UserError(f"--working-size {working_size}: must lie between 32 and {LARGEST_SIDE} pixels")
            key, value = (
                ("size", [working_size] * 2) if self.frame["kind"] == "squeeze" else ("fov_diameter", working_size)
            )
            self.frame[key] = value
            self.frame.pop("largest_diameter", None)

    @classmethod
    def load(cls, name: str | Path, threshold: float | None = None, **options: Any) -> Segmenter:
        """The segmenter of a checkpoint file, a run's folder, or weights that ship.

        A plain state dict of the original loads as the original network with the notebook's 512x512 frame.

        Args:
            threshold: overrides the checkpoint's.
            options: as the class takes them.

        Raises:
            UserError: no such checkpoint, or one that does not load (`model.load_model`).
        """
        path = find_checkpoint(name)
        model, notes = load_model(path)
        frame = notes.get("frame") or NOTEBOOK_FRAME
        if not _is_frame(frame):
            raise UserError(f"{path}: its working frame {str(frame)[:120]} is none this version knows")
        if threshold is None:
            threshold = notes.get("threshold", 0.5)
            if not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
                raise UserError(f"{path}: its threshold {str(threshold)[:80]} does not lie between 0 and 1")
        return cls(model, frame, threshold, **options)

    # ------------------------------------------------------------------------------------------------------------ calls

    def __call__(self, photo: np.ndarray, fov: np.ndarray | None = None, everywhere: bool = False) -> np.ndarray:
        """The probability of vessel at every pixel.

        Args:
            photo: (H, W, 3) uint8 RGB, or (H, W) uint8 grey.
            fov: (H, W) bool, the field of view; found in the photo where not given.
            everywhere: do not set pixels outside the field of view to 0 (the original's protocol does not).

        Returns:
            (H, W) float32 in [0, 1].

        Raises:
            ValueError: not such an array.
            UserError: weights whose answer is not a number.
        """
        photo = as_photo(photo)
        squeezed = self.frame["kind"] == "squeeze"
        if everywhere and squeezed and fov is None:
            return self._squeezed(photo)  # wherever its field of view is
        fov = find_fov(photo) if fov is None else fov
        if fov.shape != photo.shape[:2] or fov.dtype != bool:
            raise ValueError(f"fov must be bool of shape {photo.shape[:2]}, got {fov.dtype} {fov.shape}")
        if not fov.any() and not everywhere:
            return np.zeros(photo.shape[:2], np.float32)
        probability = self._squeezed(photo) if squeezed else self._scaled(photo, fov)
        if not everywhere:
            probability[~fov] = 0
        return probability

    def vessels(self, photo: np.ndarray, fov: np.ndarray | None = None) -> np.ndarray:
        """The vessels, (H, W) bool: where the probability is above the threshold. Arguments as the call."""
        return self(photo, fov) > self.threshold

    # ----------------------------------------------------------------------------------------- into the frame and back

    @property
    def margin(self) -> int:
        """Pixels of black put around a photo in the frame, a multiple of the stride."""
        # the field of view was cut out to its rim: give the rim its dark surround back, as it was trained
        return 0 if self.frame["kind"] == "squeeze" else 2 * self.model.stride

    def _squeezed(self, photo: np.ndarray) -> np.ndarray:
        height, width = self.frame["size"]
        # bilinear, as the original's preparation
        small = photo if photo.shape[:2] == (height, width) else cv2.resize(photo, (width, height))
        return _probability(self._turned(small), photo.shape[:2])

    def _scaled(self, photo: np.ndarray, fov: np.ndarray) -> np.ndarray:
        top, left, bottom, right = fov_box(fov)
        inside = photo[top:bottom, left:right]
        diameter = max(fov_diameter(fov), 1.0)
        scale = working_diameter(self.frame, diameter) / diameter
        if abs(scale - 1) > SAME_SCALE:
            size = [max(1, round(side * scale)) for side in inside.shape[1::-1]]
            inside = cv2.resize(inside, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        probability = np.zeros(photo.shape[:2], np.float32)
        probability[top:bottom, left:right] = _probability(self._turned(inside), (bottom - top, right - left))
        return probability

    def _turned(self, photo: np.ndarray) -> np.ndarray:
        """The logits for a photo already in the frame; with `flips` their mean over its eight orientations."""
        if not self.flips:
            return self._padded(photo)
        total = np.zeros(photo.shape[:2], np.float32)
        for turns in range(4):
            for mirrored in (False, True):
                view = np.rot90(photo, turns)
                view = view[:, ::-1] if mirrored else view
                seen = self._padded(np.ascontiguousarray(view))
                seen = seen[:, ::-1] if mirrored else seen
                total += np.rot90(seen, -turns)
        return total / 8

    def _padded(self, photo: np.ndarray) -> np.ndarray:
        """The logits (H, W) float32 for (H, W, 3) uint8 of any size, padded with black to the network's stride."""
        height, width = photo.shape[:2]
        stride = self.model.stride
        margin = self.margin
        # two strides at least: the deepest level needs more than one pixel
        padded = [max(2 * stride, math.ceil((side + 2 * margin) / stride) * stride) for side in (height, width)]
        canvas = np.zeros((*padded, 3), np.uint8)
        canvas[margin : margin + height, margin : margin + width] = photo
        halo = getattr(self.model, "receptive_field", None)
        if halo is None or max(padded) <= self.tile:
            result = self._forward(canvas)
        else:
            result = tiled(self._forward, canvas, self.tile, math.ceil(halo / stride) * stride, stride)
        return result[margin : margin + height, margin : margin + width]

    @torch.inference_mode()
    def _forward(self, photo: np.ndarray) -> np.ndarray:
        logits = self.network(photo_batch(photo, self.device).to(self.precision))
        logits = logits.float().clamp_(-SURE, SURE)[0, 0].cpu().numpy()
        if np.isnan(logits).any():
            raise UserError("the network answers with what is no number; choose other weights")
        return logits


def photo_batch(photo: np.ndarray, device: torch.device) -> Tensor:
    """(H, W, 3) uint8 RGB -> (1, 3, H, W) float32 BGR in [0, 1], channels last, on `device`."""
    batch = torch.from_numpy(cv2.cvtColor(photo, cv2.COLOR_RGB2BGR)).to(device)
    return batch.permute(2, 0, 1).unsqueeze(0).float() / 255  # a permuted picture is in channels-last order already


def tiled(
    function: Callable[[np.ndarray], np.ndarray], photo: np.ndarray, tile: int, halo: int, stride: int
) -> np.ndarray:
    """`function` (of (h, w, 3), giving (h, w)) over `photo` (H, W, 3) in tiles of at most `tile`, as if in one piece.

    Each tile is seen with `halo` pixels around it, which are thrown away behind; corners lie on multiples of `stride`,
    so that pooling meets the same pixels as in the whole photo.
    """
    height, width = photo.shape[:2]
    core = max(stride, (tile - 2 * halo) // stride * stride)
    result = np.empty((height, width), np.float32)
    for top in range(0, height, core):
        for left in range(0, width, core):
            bottom, right = min(top + core, height), min(left + core, width)
            above, before = max(0, top - halo), max(0, left - halo)
            seen = function(photo[above : min(height, bottom + halo), before : min(width, right + halo)])
            result[top:bottom, left:right] = seen[top - above : bottom - above, left - before : right - before]
    return result


def as_photo(photo: np.ndarray) -> np.ndarray:
    """`photo` as (H, W, 3) uint8: grey (H, W) gets three equal channels.

    Raises:
        ValueError: another shape or type, or no pixel.
    """
    if not isinstance(photo, np.ndarray) or photo.dtype != np.uint8:
        kind = getattr(photo, "dtype", type(photo).__name__)
        raise ValueError(f"a photo is a uint8 array with values from 0 to 255, got {kind}")
    if photo.ndim == 2:
        photo = np.repeat(photo[:, :, None], 3, axis=2)
    if photo.ndim != 3 or photo.shape[2] != 3 or 0 in photo.shape:
        raise ValueError(f"a photo has shape (H, W, 3) or (H, W), got {photo.shape}")
    return photo


def _probability(logits: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The probability (float32, in [0, 1]) at `shape` (height, width) of `logits` at another size.

    Logits are interpolated, not probabilities: these are flat where the network is sure, and a line between a flat
    foot and a flat top has its middle elsewhere than the edge (results/README.md has what it gains).
    """
    if logits.shape != shape:
        logits = cv2.resize(logits, shape[::-1], interpolation=cv2.INTER_LINEAR)
    return torch.sigmoid(torch.from_numpy(logits)).numpy()


def working_diameter(frame: dict[str, Any], diameter: float) -> float:
    """The diameter in pixels to which the frame "fov" brings a field of view of `diameter` pixels.

    Its "fov_diameter"; where it has a "largest_diameter", a field of view larger than the first is brought half way, the
    geometric mean of both, but to no more than the second. What was labelled on a larger photo is finer, and a network
    trained on several cameras finds more of it there (results/README.md, on cameras left out of training).
    """
    least = frame["fov_diameter"]
    return min(max(least, math.sqrt(least * diameter)), frame.get("largest_diameter", least))


def _is_frame(frame: Any) -> bool:
    if not isinstance(frame, dict):
        return False
    if frame.get("kind") == "squeeze":
        size = frame.get("size")
        whole = isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(n, int) for n in size)
        return whole and all(0 < n <= LARGEST_SIDE for n in size)
    least, largest = frame.get("fov_diameter"), frame.get("largest_diameter", frame.get("fov_diameter"))
    numbers = all(isinstance(diameter, (int, float)) for diameter in (least, largest))
    return frame.get("kind") == "fov" and numbers and 0 < least <= largest <= LARGEST_SIDE
