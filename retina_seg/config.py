"""All that is needed to repeat a training, and the presets. Imports no torch: the command's options are made from it."""

import contextlib
import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from retina_seg.fov import LARGEST_SIDE
from retina_seg.utils import UserError, read_json

PRECISIONS = ("auto", "float32", "bfloat16")
ENGINES, ENGINE_PRECISIONS = ("auto", "torch", "openvino"), (*PRECISIONS, "int8")  # of inference
FRAMES, VALIDATION = ("resize", "fov"), ("photos", "test", "none")
GROUPS = {  # the first field of each group of options -> the group's title in the command's help
    "model": "data and network",
    "frame": "working frame and patches (frame fov only)",
    "epochs": "optimisation",
    "validation": "validation and selection",
    "precision": "computation",
}


def _option(default: Any, help: str, choices: tuple[str, ...] = (), low: float | None = None) -> Any:
    """A field of `TrainConfig` with its help. `default`: a value, or the type alone, `dict` for {}, else for "not set"."""
    kind = default if isinstance(default, type) else type(default)
    meta = {"kind": kind, "help": help, "choices": choices, "minimum": low}
    if default is dict:
        return field(default_factory=dict, metadata=meta)
    return field(default=None if default is kind else default, metadata=meta)


@dataclass
class TrainConfig:
    """All that is needed to repeat a training; what each field means stands beside it."""

    preset: str = "custom"
    data: str | dict[str, str] | list[str | dict[str, str]] = "Data1"
    output: str = "results/run"
    model: str = _option("attention_unet", "architecture, a name in model.MODELS")
    model_arguments: dict[str, Any] = _option(dict, "its arguments, as JSON")
    weights: str | None = _option(str, "start from these weights, in their network and frame: a name, file or run")
    teacher: str | None = _option(str, "learn the predictions of these weights too, in the style of each dataset")

    frame: str = _option("resize", "whole images at --size, aspect ratio not kept, or patches at one scale", FRAMES)
    size: int = _option(512, "side of what the network is fed, pixels; rounded to its stride", low=8)
    fov_diameter: float | None = _option(float, "of the field of view, pixels; not set: the images' median", low=32)
    largest_diameter: float | None = _option(float, "of larger images; not set: as all others", low=32)
    normalise: str = _option("none", "light and colour normalised inside the field of view", ("none", "fov"))
    styles: str = _option("one", "of labelling: one, or an output channel for each dataset", ("one", "datasets"))
    style: str = _option("balanced", "the style that is used where none is asked for")
    augmentation: dict[str, Any] = _option(dict, "changes to transforms.Augmentation, as JSON")
    patches: int = _option(800, "patches in an epoch", low=1)

    epochs: int = _option(10, "passes over the images or patches", low=1)
    batch_size: int = _option(2, "images or patches in a step of each process", low=1)
    optimizer: str = _option("adam", "Adam (AdamW with weight decay), or Muon", ("adam", "muon"))
    learning_rate: float = _option(1e-4, "at its peak", low=1e-12)
    weight_decay: float = _option(0.0, "decoupled weight decay", low=0)
    warmup: float | None = _option(float, "share of steps of rising rate, then a cosine; not set: constant", low=0)
    ema: float = _option(0.0, "decay of the EMA weights that are kept; 0: none", low=0)
    clip: float = _option(0.0, "largest norm of the gradient; 0: no clipping", low=0)
    loss: str = _option("dice_bce", "a name in loss.LOSSES")
    seed: int = _option(42, "of weights, order and augmentation", low=0)

    validation: str = _option("photos", "on held-out photos; the test part, as the original (a leak); none", VALIDATION)
    held_out: int = _option(4, "how many photos, or people, are held out", low=1)
    split_seed: int = _option(42, "of the draw that holds them out", low=0)
    fold: int = _option(0, "which fold of that draw, for cross-validation", low=0)
    keep: str = _option("best", "weights of lowest validation loss, or of the last epoch", ("best", "last"))
    threshold: str = _option("fixed", "fixed: 0.5; validation: that of highest F1 on the held-out photos; or a number")

    precision: str = _option("auto", "auto: bfloat16 where there are units for it", PRECISIONS)
    device: str = _option("auto", "cpu, cuda, …; auto: a GPU where there is one")
    workers: int | None = _option(int, "processes that load images; not set: 0, on a GPU 4", low=0)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "TrainConfig":
        """The preset `name` with `changes`. Raises `UserError` for an unknown name."""
        if name not in PRESETS:
            raise UserError(f"--preset {name}: choose one of {', '.join(PRESETS)}")
        return cls(**{"preset": name, **copy.deepcopy(PRESETS[name].values), **changes})

    @classmethod
    def notebook(cls, **changes: Any) -> "TrainConfig":
        """The original's training."""
        return cls.from_preset("notebook", **changes)

    @classmethod
    def fast(cls, **changes: Any) -> "TrainConfig":
        """The optimised network for one camera."""
        return cls.from_preset("fast", **changes)

    @classmethod
    def from_json(cls, path: str | Path) -> "TrainConfig":
        """The config in a run's `config.json`. Raises `UserError` for a file that is none."""
        values = read_json(path).get("config")
        if not isinstance(values, dict):
            raise UserError(f"{path}: holds no config of this version; give the config.json of a run")
        if unknown := sorted(set(values) - {item.name for item in dataclasses.fields(cls)}):
            raise UserError(f"{path}: the config has unknown entries: {', '.join(unknown)}")
        try:
            (config := cls(**values)).check()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return config

    def check(self) -> None:
        """Raises `UserError` for the first value that cannot be; the message names the option."""
        data = self.data if isinstance(self.data, list) else [self.data]
        paths = [self.output, *(p for one in data for p in (one.values() if isinstance(one, dict) else [one]))]
        if not self.data or not all(isinstance(path, str) for path in paths):
            raise UserError(f"data {self.data!r}, output {self.output!r}: must be paths")
        for item in dataclasses.fields(self):
            if item.metadata:
                _check_value(f"--{item.name.replace('_', '-')}", getattr(self, item.name), item.default, item.metadata)
        if self.size > LARGEST_SIDE:
            raise UserError(f"--size {self.size}: must be {LARGEST_SIDE} pixels at most")
        if self.ema >= 1 or (self.warmup or 0) >= 1:
            raise UserError(f"--ema {self.ema}, --warmup {self.warmup}: must be below 1")
        if self.keep == "best" and self.validation == "none":
            raise UserError("--keep best needs images to validate on; add --validation photos, or --keep last")
        if self.threshold not in ("fixed", "validation"):
            check_threshold(self.threshold)
        if "styles" in self.model_arguments:
            raise UserError("--model-arguments styles: is set by --styles datasets")
        if self.styles == "datasets" and (self.frame != "fov" or self.model == "attention_unet" or self.weights):
            raise UserError("--styles datasets: needs --frame fov, a network with styles, and no --weights")
        if self.threshold == "validation" and self.validation != "photos":
            raise UserError("--threshold validation needs held-out training photos; add --validation photos")


def check_threshold(value: str | float) -> float:
    """`value` as a number. Raises `UserError` unless it lies in (0, 1)."""
    with contextlib.suppress(ValueError):
        if 0 < float(value) < 1:
            return float(value)
    raise UserError(f"--threshold {value}: must lie between 0 and 1")


def _check_value(option: str, value: Any, default: Any, meta: Any) -> None:
    if value is None and default is None:
        return
    kind = meta["kind"]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise UserError(f"{option} {str(value)[:80]!r}: must be of the type {kind.__name__}")
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{option} {value}: choose one of {', '.join(meta['choices'])}")
    if meta["minimum"] is not None and not meta["minimum"] <= value < 2**63:  # neither NaN nor infinity
        raise UserError(f"{option} {value}: must be a number from {meta['minimum']:g} on")


class Preset(NamedTuple):
    """What a preset is, in a sentence for people, and the values in which it differs from `TrainConfig`'s defaults."""

    summary: str
    values: dict[str, Any]


# fmt: off
_FAST = {
    "model": "fast_attention_unet", "model_arguments": {"fine": 0}, "frame": "fov", "size": 256, "fov_diameter": 720.0,
    "augmentation": {"scale": 0.25}, "epochs": 20, "optimizer": "muon", "learning_rate": 2e-3, "weight_decay": 1e-2,
    "warmup": 0.05, "ema": 0.999, "clip": 1.0, "validation": "none", "keep": "last",
}
_LIGHT = {"light": 0.1, "contrast": 0.15, "cast": 0.06, "grey": 0.3}  # weaker: normalisation takes most of it out
_MEDIA = {"haze": 0.4, "channels": 0.1, "far_blur": 2.0, "jpeg": 0.1, "levels": 0.05}  # of other cameras and eyes
_GENERAL = {
    **_FAST, "model_arguments": {}, "normalise": "fov", "fov_diameter": 540.0, "largest_diameter": 1440.0,
    "styles": "datasets", "style": "auto", "augmentation": {"scale": 0.25, **_LIGHT, **_MEDIA}, "patches": 840, "epochs": 60,
}
_FINETUNE = {
    **_FAST, "weights": "general", "augmentation": {"scale": 0.25, **_LIGHT}, "epochs": 5, "patches": 400,
    "learning_rate": 2e-4, "ema": 0.99,
}
# fmt: on
_TINY = {**_GENERAL, "epochs": 36, "model_arguments": {"width": 12, "deepest": 16, "fine": 8}}
_QUICK = {**_FAST, "fov_diameter": None, "epochs": 3, "ema": 0.99, "patches": 240}
PRESETS = {
    "notebook": Preset(
        "the original: attention_unet (664,071 parameters), Adam, 10 epochs, best epoch chosen on the test images",
        {"validation": "test"},
    ),
    "fast": Preset(
        "one camera: fast_attention_unet (585,988 parameters), augmented patches, Muon, EMA weights, no selection",
        _FAST,
    ),
    "general": Preset(
        "any camera, from several datasets: fast with a full-resolution path and a style of labelling for each dataset",
        _GENERAL,
    ),
    "tiny": Preset("old machines, large archives: general with a ninth of the parameters", _TINY),
    "finetune": Preset(
        "one more camera, from a few of its images: the pretrained weights general, low rate, short schedule", _FINETUNE
    ),
    "quick": Preset("a first look in minutes: fast on a short schedule, at the images' own scale", _QUICK),
}
