"""Retinal vessel segmentation: the notebooks' light U-Net with two attention gates, and what was grown from it.

from retina_seg import Segmenter
segmenter = Segmenter.load("results/notebook/checkpoint.pth")
probability = segmenter(photo)          # (H, W, 3) uint8 RGB -> (H, W) float32 in [0, 1]
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name -> its room; imported when first asked for, so that `import retina_seg` costs nothing
_ROOMS = {
    "Segmenter": "predict",
    "TrainConfig": "train",
    "fit": "train",
    "attention_unet": "model",
    "DriveDataset": "data",
    "DiceLoss": "loss",
    "DiceBCELoss": "loss",
}
__all__ = [*_ROOMS, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
