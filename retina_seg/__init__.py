"""Retinal vessel segmentation: a light U-Net with two attention gates, trained, tested and used on any fundus image.

>>> from retina_seg import Segmenter
>>> from retina_seg.sets.synthetic import synthetic_image
>>> segmenter = Segmenter.load("tiny")  # pretrained weights; or "general", "drive", a run's folder, a checkpoint file
>>> image = synthetic_image(seed=1).image  # (512, 512, 3) uint8 RGB; or retina_seg.images.read_image("eye.jpg")
>>> probability = segmenter(image)  # (512, 512) float32 in [0, 1]
>>> vessels = probability > segmenter.threshold  # (512, 512) bool
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retina_seg.checkpoint import load_model as load_model
    from retina_seg.config import TrainConfig as TrainConfig
    from retina_seg.data import DriveDataset as DriveDataset
    from retina_seg.inference.segmenter import Segmenter as Segmenter
    from retina_seg.loss import DiceBCELoss as DiceBCELoss
    from retina_seg.loss import DiceLoss as DiceLoss
    from retina_seg.model import attention_unet as attention_unet
    from retina_seg.test import test as test
    from retina_seg.train import fit as fit

__version__ = "0.2.0"

# name -> its module; imported when first asked for, so that `import retina_seg` costs nothing
_MODULES = {
    "DiceBCELoss": "loss",
    "DiceLoss": "loss",
    "DriveDataset": "data",
    "Segmenter": "inference.segmenter",
    "TrainConfig": "config",
    "attention_unet": "model",
    "fit": "train",
    "load_model": "checkpoint",
    "test": "test",
}
__all__ = [*_MODULES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
