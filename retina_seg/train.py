"""Training: the recipe as a value, one pass over a loader, and the loop with its run folder (the original's `train`).

`train` and `evaluate` are the original's: one pass, the mean loss over batches. `fit` is the loop around them, the same
for notebooks, command and tests.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from tqdm.auto import tqdm

from retina_seg import data as sets
from retina_seg import loss as losses
from retina_seg.distributed import ALONE, Group, own_session, share
from retina_seg.fov import LARGEST_SIDE
from retina_seg.metrics import best_threshold
from retina_seg.model import build_model, count_parameters, load_model, save_model
from retina_seg.optim import Muon
from retina_seg.resume import LAST, PREVIOUS, StopSignals, TrainingStopped, load_last, remove_leftovers, save_last
from retina_seg.utils import (
    UserError,
    ahead,
    autocast,
    available_memory,
    check_types,
    choose_precision,
    create_dir,
    environment,
    epoch_time,
    memory_kept,
    read_json,
    seeding,
    training_layout,
    without_nan,
    write_json,
    write_text,
)

LOSSES = {"dice_bce": losses.dice_bce_loss, "dice": losses.dice_loss}


# ------------------------------------------------------------------------------------------------------------ the recipe


@dataclass
class TrainConfig:
    """All that is needed to repeat a training; the class methods below are the recipes that ship.

    Attributes:
        preset: the recipe's name, for tables.
        data, output: the set's folder (or several, trained on together) and the run's folder.
        model, model_arguments: what `model.build_model` takes.
        frame: "squeeze": photos as they are, squeezed to `size` where they are not of that size (the original's);
            "fov": brought to one scale by their field of view, in augmented windows of side `size`.
        size: side of what the network is fed, pixels; a multiple of its stride.
        fov_diameter: with "fov", the scale; None: the median of the training photos.
        working_diameter: what it is brought to where the network is validated and used; None: the training's.
        largest_diameter: what larger photos are brought to at most, where the network is used (`predict.working_diameter`);
            None: all to one diameter.
        augmentation: changes to `data.Augmentation`'s defaults, by name; with "fov" only.
        repeats: windows a photo and epoch; with "fov" only.
        epochs, batch_size, learning_rate, weight_decay, seed: as usual. The batch size is that of each process: several
            processes (`distributed`) see the photos of one with so many times it.
        optimizer: "adam" (AdamW where weights decay) or "muon" (`optim.Muon`).
        loss: "dice_bce" or "dice".
        warmup: share of the steps in which the learning rate rises to its peak; then it falls by a cosine to 0. None:
            it stays as it is (the original's).
        ema: decay of the averaged weights that are kept and validated; 0 for none.
        clip: largest norm of the gradient; 0 for no clipping.
        validation: "test": the test part (the original's, its known leak); "photos": held-out training photos;
            "none"; "files": held-out training files, variants of one photo on both sides, to show what such a leak
            claims ("squeeze" only).
        held_out: how many training photos (people, files) are held out.
        split_seed, fold: of the draw that holds them out, and which lot of that draw: 0, 1, … for cross-validation.
        keep: "best": the weights of the epoch with the lowest validation loss (the original's); "last".
        threshold: "fixed": 0.5; "validation": the one with the best mean F1 on the held-out training photos, stored with
            the checkpoint. There is no choosing on test photos.
        save_every: steps between two writings of last.pth, besides one at every epoch's end: what a sudden end can cost.
        precision, device, workers: how it is computed; "auto" takes what this machine is good at.
    """

    preset: str = "custom"
    data: str | list[str] = "Data1"
    output: str = "results/run"
    model: str = "attention_unet"
    model_arguments: dict[str, Any] = field(default_factory=dict)
    frame: str = "squeeze"
    size: int = 512
    fov_diameter: float | None = None
    working_diameter: float | None = None
    largest_diameter: float | None = None
    augmentation: dict[str, Any] = field(default_factory=dict)
    repeats: int = 1
    epochs: int = 10
    batch_size: int = 2
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    seed: int = 42
    loss: str = "dice_bce"
    warmup: float | None = None
    ema: float = 0.0
    clip: float = 0.0
    validation: str = "photos"
    held_out: int = 4
    split_seed: int = 42
    fold: int = 0
    keep: str = "best"
    threshold: str = "fixed"
    save_every: int = 200
    precision: str = "auto"
    device: str = "auto"
    workers: int = 0

    @classmethod
    def notebook(cls, **changes: Any) -> TrainConfig:
        """The original's recipe to the letter, with its selection of the epoch on the test photos."""
        return cls(**{"preset": "notebook", "validation": "test", **changes})

    @classmethod
    def fast(cls, **changes: Any) -> TrainConfig:
        """The fast network, augmented windows of enlarged photos, a fixed schedule, the last averaged weights.

        results/README.md has the trials behind every value.
        """
        recipe = {
            "preset": "fast",
            "model": "fast_attention_unet",
            "model_arguments": {"fine": 0},
            "frame": "fov",
            "size": 256,
            "fov_diameter": 720.0,
            "augmentation": {"scale": 0.25},
            "repeats": 40,
            "epochs": 20,
            "batch_size": 2,
            "optimizer": "muon",
            "learning_rate": 2e-3,
            "weight_decay": 1e-2,
            "warmup": 0.05,
            "ema": 0.999,
            "clip": 1.0,
            "validation": "none",
            "keep": "last",
        }
        return cls(**{**recipe, **changes})

    @classmethod
    def general(cls, **changes: Any) -> TrainConfig:
        """`fast` for photos of any camera: trained on several sets together, so with fewer windows a photo and epoch.

        Its network has the full-resolution path, and large photos are seen up to half as large again as the others.
        """
        recipe = {
            "preset": "general",
            "model_arguments": {},
            "epochs": 36,
            "repeats": 12,
            "largest_diameter": 1080.0,
        }
        return cls.fast(**{**recipe, **changes})

    @classmethod
    def tiny(cls, **changes: Any) -> TrainConfig:
        """`fast` with a ninth of its parameters (67,041) and a sixth of its arithmetic, on a longer schedule."""
        narrow = {"width": 12, "deepest": 16, "fine": 8}
        return cls.fast(**{"preset": "tiny", "model_arguments": narrow, "epochs": 36, **changes})

    @classmethod
    def quick(cls, **changes: Any) -> TrainConfig:
        """`fast` on a few minutes' schedule: enough for the synthetic photos, and for a first look at one's own."""
        return cls.fast(**{"preset": "quick", "fov_diameter": None, "epochs": 3, "ema": 0.99, "repeats": 20, **changes})

    @classmethod
    def from_json(cls, path: str | Path) -> TrainConfig:
        """The recipe in a run's `config.json`. Raises `UserError` for a file that is none."""
        recipe = read_json(path).get("recipe")
        if not isinstance(recipe, dict):
            raise UserError(f"{path}: holds no recipe; give the config.json of a run")
        unknown = sorted(set(recipe) - {item.name for item in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"{path}: the recipe has unknown entries: {', '.join(unknown)}")
        config = cls(**recipe)
        check_types(config, path)
        return config

    def check(self) -> None:
        """Raises `UserError` for the first value that cannot be."""
        choices = {
            "frame": ("squeeze", "fov"),
            "loss": tuple(LOSSES),
            "optimizer": ("adam", "muon"),
            "validation": ("test", "photos", "files", "none"),
            "keep": ("best", "last"),
            "threshold": ("fixed", "validation"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} {getattr(self, name)}: choose one of {', '.join(allowed)}")
        for name in ("epochs", "batch_size", "repeats", "size", "save_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be a whole number from 1 on")
        for name in ("fov_diameter", "working_diameter", "largest_diameter"):
            if getattr(self, name) is not None and not getattr(self, name) >= 32:
                raise UserError(f"{name} {getattr(self, name)}: must be 32 pixels at least")
        if not self.learning_rate > 0:
            raise UserError(f"--learning-rate {self.learning_rate}: must be above 0")
        if not self.weight_decay >= 0 or not self.clip >= 0 or not 0 <= (self.warmup or 0) < 1:
            raise UserError(
                f"weight decay {self.weight_decay}, clip {self.clip}, warm-up {self.warmup}: "
                "the first two must be 0 or more, warm-up in [0, 1)"
            )
        if self.workers < 0 or not 0 <= self.ema < 1:
            raise UserError(f"--workers {self.workers}, ema {self.ema}: workers from 0 on, ema in [0, 1)")
        if self.validation == "files" and self.frame != "squeeze":
            raise UserError(
                '--validation files needs a recipe that trains on files as they are; choose frame "squeeze"'
            )
        if self.keep == "best" and self.validation == "none":
            raise UserError("--keep best needs validation photos; choose --validation photos, or --keep last")
        if self.threshold == "validation" and self.validation != "photos":
            raise UserError("--threshold validation needs held-out training photos; add --validation photos")
        unknown = sorted(set(self.augmentation) - {item.name for item in dataclasses.fields(sets.Augmentation)})
        if unknown:
            raise UserError(f"augmentation {', '.join(unknown)}: unknown; data.Augmentation lists what there is")


PRESETS = {
    "notebook": TrainConfig.notebook,
    "fast": TrainConfig.fast,
    "general": TrainConfig.general,
    "tiny": TrainConfig.tiny,
    "quick": TrainConfig.quick,
}


# -------------------------------------------------------------------------------------------------- one pass over a loader


class NotFinite(FloatingPointError):
    """The loss or a gradient is not a finite number.

    Attributes:
        batch: which batch of the pass, from 0 on.
        what: "loss" or "gradient".
    """

    def __init__(self, batch: int, what: str) -> None:
        super().__init__(f"the {what} is not a finite number at step {batch + 1} of this pass")
        self.batch, self.what = batch, what


NOT_FINITE = 1_000  # what a process tells the others when it meets this; signals have lower numbers
GPU_CHECK = 25  # steps between two looks at a GPU's losses: each look makes it wait


def train(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    device: torch.device | str,
    precision: torch.dtype = torch.float32,
    clip: float = 0.0,
    after_step: Callable[[list[Tensor]], None] | None = None,
    before: Sequence[Tensor] = (),
) -> float:
    """One pass of training over `loader`, as in the original.

    Args:
        loader: batches of photos (N, 3, H, W) and masks (N, 1, H, W), float32 in [0, 1].
        loss_fn: of (logits, masks), both (N, 1, H, W).
        precision: bfloat16 runs the network under autocast; the loss is always float32.
        clip: largest norm of the gradient, 0 for none.
        after_step: called after every step with the losses of the pass so far (schedule, averaging, saving).
        before: the losses of the batches that this pass has seen already, where it goes on in the middle; the loader
            then starts behind them.

    Returns:
        The mean loss over batches.

    Raises:
        ValueError: the loader is empty.
        NotFinite: the loss or a gradient is not finite. On a processor the weights are those before the step; on a GPU,
            which is asked every 25 steps only, they are spoilt.
    """
    device = torch.device(device)
    model.train()
    losses_seen, norms = list(before), []
    checked = len(losses_seen)
    for photos, masks in loader:
        photos, masks = _to_device(photos, masks, model, device)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            logits = model(photos)
        loss = loss_fn(logits, masks)
        loss.backward()
        # no .item() here: it would make a GPU wait at every step
        losses_seen.append(loss.detach())
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norms.append(norm)
        if device.type == "cpu" or len(norms) == GPU_CHECK:
            _check_finite(losses_seen[checked:], norms, checked)
            checked, norms = len(losses_seen), []
        if clip:
            nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
        optimizer.step()
        if after_step:
            after_step(losses_seen)
    _check_finite(losses_seen[checked:], norms, checked)
    return _mean(losses_seen)


def _check_finite(losses_seen: Sequence[Tensor], norms: Sequence[Tensor], first: int) -> None:
    """Raises NotFinite for the first of these batches, counted from `first` on, with a loss or gradient norm that is none."""
    if not norms:
        return
    for what, values in (("loss", losses_seen), ("gradient", norms)):
        bad = (~torch.isfinite(torch.stack([value.float() for value in values]))).nonzero()
        if len(bad):
            raise NotFinite(first + int(bad[0]), what)


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    device: torch.device | str,
    precision: torch.dtype = torch.float32,
) -> float:
    """The mean loss over the batches of `loader`, without learning, as in the original; arguments as `train`."""
    return evaluate_with_f1(model, loader, loss_fn, device, precision)[0]


@torch.inference_mode()
def evaluate_with_f1(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    device: torch.device | str,
    precision: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """The mean loss over batches, and the mean over photos of F1 at 0.5 over the frame; arguments as `train`."""
    device = torch.device(device)
    model.eval()
    losses_seen, f1 = [], []
    for photos, masks in loader:
        photos, masks = _to_device(photos, masks, model, device)
        with autocast(device, precision):
            logits = model(photos)
        losses_seen.append(loss_fn(logits, masks))
        predicted, true = (logits > 0).flatten(1), (masks > 0.5).flatten(1)
        overlap = (predicted & true).sum(1)
        f1.append(2 * overlap / (predicted.sum(1) + true.sum(1)).clamp(min=1))
    return _mean(losses_seen), torch.cat(f1).mean().item() if f1 else math.nan


def _to_device(photos: Tensor, masks: Tensor, model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last if _is_channels_last(model) else torch.contiguous_format
    return photos.to(device, memory_format=layout, non_blocking=True), masks.to(device, non_blocking=True)


def _is_channels_last(model: nn.Module) -> bool:
    weight = next((value for value in model.parameters() if value.dim() == 4 and value.shape[2] > 1), None)
    return weight is not None and weight.is_contiguous(memory_format=torch.channels_last) and weight.shape[1] > 1


def _mean(values: list[Tensor]) -> float:
    if not values:
        raise ValueError("the loader is empty: there is nothing to take a mean over")
    return torch.stack(values).mean().item()


# ------------------------------------------------------------------------------------------------------ what a loop holds


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Muon; or Adam, AdamW where the recipe decays weights, fused: one pass over each parameter instead of a dozen."""
    if config.optimizer == "muon":
        return Muon(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    optimizer_class = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
    return optimizer_class(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


class WeightAverage:
    """The exponential moving average of a network's weights and buffers: a copy that follows it (arXiv 1703.01780).

    Over the first steps the decay is lower, (1 + step) / (10 + step), so that the start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `model` after its `step`-th step (from 1 on)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for mine, theirs in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, share)
            else:
                mine.copy_(theirs)


def learning_rate_share(step: int, steps: int, warmup: float | None) -> float:
    """The learning rate at `step` of `steps` as a share of its peak: up a line, then down a cosine; 1 for no warm-up."""
    if warmup is None:
        return 1.0
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass(frozen=True)
class _Loaders:
    """What is trained and validated on: the data sets, the names of the photos, the working frame for the checkpoint."""

    training: Any
    validation: Any
    training_names: list[str]
    validation_names: list[str]
    frame: dict[str, Any]
    remarks: list[str]


def split_set(config: TrainConfig) -> tuple[list[sets.Pair], list[sets.Pair]]:
    """The (training, validation) pairs of `config`: by its split seed and fold, or the original's test part."""
    pairs = sets.list_training_pairs(config.data, "train")
    if config.validation == "photos":
        return sets.split_by_photo(pairs, config.held_out, config.split_seed, config.fold)
    if config.validation == "files":
        return sets.split_by_file(pairs, config.held_out, config.split_seed)
    return pairs, sets.list_training_pairs(config.data, "test") if config.validation == "test" else []


def _open_data(config: TrainConfig, stride: int) -> _Loaders:
    training, validation = split_set(config)
    remarks = sets.label_remarks([*training, *validation])
    if config.frame == "squeeze":
        side = max(stride, round(config.size / stride) * stride)
        size = (side, side)

        def squeezed(pairs: list[sets.Pair]) -> sets.DriveDataset | None:
            if not pairs:
                return None
            # the original's order, a sorted glob (10 before 2): with its seed and torch's shuffle, its batches too
            pairs = sorted(pairs, key=lambda pair: pair.image.name)
            return sets.DriveDataset([pair.image for pair in pairs], [pair.mask for pair in pairs], size)

        train_set, validation_set = squeezed(training), squeezed(validation)
        frame = {"kind": "squeeze", "size": list(size)}
    else:
        how = sets.Augmentation(**config.augmentation)
        # stored variants of a photo would only make it count several times: this recipe draws its own
        training, validation = (
            list({pair.photo: pair for pair in reversed(part)}.values()) for part in (training, validation)
        )
        side = max(stride, round(config.size / stride) * stride)
        train_set = sets.TrainingPhotos(training, config.fov_diameter, side, config.repeats, how, config.seed)
        diameter = config.working_diameter or train_set.diameter
        validation_set = sets.WholePhotos(validation, diameter, stride) if validation else None
        frame = {"kind": "fov", "fov_diameter": diameter}
        if config.largest_diameter is not None:
            if not diameter <= config.largest_diameter <= LARGEST_SIDE:
                raise UserError(
                    f"largest_diameter {config.largest_diameter}: must lie between the working diameter, {diameter:g}, "
                    f"and {LARGEST_SIDE} pixels"
                )
            frame["largest_diameter"] = config.largest_diameter
    names = [sorted({pair.name for pair in pairs}, key=lambda n: (len(n), n)) for pairs in (training, validation)]
    return _Loaders(train_set, validation_set, *names, frame, remarks)


# --------------------------------------------------------------------------------------------------------------- the loop


@dataclass
class Run:
    """What `fit` gives back.

    Attributes:
        folder: the run's folder.
        history: a row an epoch, as in history.csv.
        best: the epoch whose weights were kept, from 1 on.
        model: the network with the kept weights, in evaluation mode.
    """

    folder: Path
    history: list[dict[str, float]]
    best: int
    model: nn.Module


def fit(config: TrainConfig, resume: bool = False, progress: bool = True, group: Group = ALONE) -> Run:
    """Train by `config` and write its run folder: config.json, history.csv, curves.png, checkpoint.pth, last.pth.

    SIGINT and SIGTERM end it behind the step at hand, saved.

    Several processes share out each batch of `batch_size` times their number, the photos and steps being those of one
    process with such a batch. Three things are not its: the dice is the mean of the processes' dice, not that of the joined
    batch; BatchNorm and dropout are each process's own. The first process alone averages the weights, validates, writes
    and prints, while the others wait.

    Args:
        resume: go on with the run in `config.output` where it stopped, in the middle of an epoch too; its weights end
            equal to those of a run that never stopped, to the bit on one kind of processor.
        progress: show a progress bar, and a line an epoch as the original does.
        group: the processes that train together (`distributed.join`); each calls this, and each gets the same back.

    Raises:
        UserError: a value of `config` that cannot be, data that cannot be read, a folder that may not be written to,
            or one that already holds a run while `resume` is off; too little memory or disk; a run to go on with that
            another number of processes began.
        NotFinite: the loss or a gradient is not finite; the message names the photos and what is kept.
        resume.TrainingStopped: by a signal.
    """
    config.check()
    device = group.device(config.device)
    precision = choose_precision(config.precision, device)
    seeding(config.seed)
    model = build_model(config.model, **config.model_arguments)
    if group.rank:
        torch.manual_seed(config.seed + group.rank)  # or every process would drop the same feature maps
    opened = _open_data(config, model.stride)
    group.meet(device)
    folder = group.from_first(lambda: _run_folder(config, resume, group.size))
    _check_room(config, model, device, precision, folder, group.local_size)
    progress = progress and group.is_first
    loop = _Loop(config, opened, model, device, precision, folder, group)
    if group.is_first:
        for line in opened.remarks:
            tqdm.write(line)
    if resume:
        loop.take_up()
    elif group.is_first:
        write_json(folder / "config.json", _describe(config, opened, model, device, precision, group.size))
    bar = tqdm(total=loop.steps, initial=loop.state["step"], unit="step", disable=not progress, desc="training")
    with contextlib.closing(bar), memory_kept(), StopSignals() as signals:
        for _ in range(loop.state["epoch"], config.epochs):
            row, better = loop.epoch(signals, bar)
            if progress:
                tqdm.write(epoch_line(row, better))
            asked = group.highest(signals.received)
            if asked and loop.state["epoch"] < config.epochs:
                loop.stopped(asked)
    return group.from_first(loop.finish)


class _Loop:
    """The state of one training, and what an epoch does to it. All of it is in last.pth."""

    def __init__(
        self,
        config: TrainConfig,
        opened: _Loaders,
        model: nn.Module,
        device: torch.device,
        precision: torch.dtype,
        folder: Path,
        group: Group = ALONE,
    ) -> None:
        self.config, self.opened, self.device, self.precision, self.folder = config, opened, device, precision, folder
        self.group = group
        self.model = model.to(device, memory_format=training_layout(device, precision))
        self.parallel = group.parallel(self.model, device)
        self.optimizer = make_optimizer(model, config)
        self.average = WeightAverage(model, config.ema) if config.ema and group.is_first else None
        self.kept = self.average.model if self.average else self.model
        self.loss_fn = LOSSES[config.loss]
        self.steps_an_epoch = math.ceil(len(opened.training) / (config.batch_size * group.size))
        self.steps = config.epochs * self.steps_an_epoch
        # losses and seconds: of the epoch under way; random: of torch, at its start
        self.state = {
            "epoch": 0,
            "step": 0,
            "best": 0,
            "best_loss": math.inf,
            "history": [],
            "losses": [],
            "seconds": 0.0,
        }
        self.random_at_start: Tensor | None = None
        self.notes = {
            "frame": opened.frame,
            "threshold": 0.5,
            "threshold_from": "fixed",
            "trained_on": opened.training_names,
            "selected_on": "nothing"
            if config.keep == "last"
            else {"test": "test", "none": "nothing"}.get(config.validation, "validation"),
        }

    def epoch(self, signals: StopSignals, bar: tqdm) -> tuple[dict[str, float], bool]:
        """Train, validate and save one epoch, or what is left of it. Returns its row, and whether its weights were kept."""
        config, state, group = self.config, self.state, self.group
        start = time.time() - state["seconds"]
        before = [torch.tensor(value, device=self.device) for value in state["losses"]]
        if not before:
            self.random_at_start = group.from_first(torch.get_rng_state)  # one order for all
        self._set_rate()
        batches = _Batches(self.opened.training, config, state["epoch"], len(before), group)
        loader = _started_again(batches, self.random_at_start) if before or group.rank else batches.loader
        if not config.workers and core_to_spare(self.device, group.local_size):
            loader = _prefetched(loader)
        loss_fn = self.loss_fn if group.size == 1 else batches.weighted(self.loss_fn)

        def agree(number: int) -> int:
            """The highest of the processes' numbers; every process asks behind every step, and behind the pass."""
            highest = group.highest(number)
            if highest == NOT_FINITE:
                raise NotFinite(0, "elsewhere")
            return highest

        def after_step(losses_seen: list[Tensor]) -> None:
            state["step"] += 1
            if self.average:
                self.average.update(self.model, state["step"])
            self._set_rate()
            bar.update()
            asked = agree(signals.received)
            if len(losses_seen) == self.steps_an_epoch:
                return  # the epoch's end saves
            if asked or state["step"] % config.save_every == 0:
                state["losses"], state["seconds"] = group.mean(torch.stack(losses_seen)).tolist(), time.time() - start
                self.save()
                if asked:
                    self.stopped(asked)

        try:
            train_loss = train(
                self.parallel,
                loader,
                self.optimizer,
                loss_fn,
                self.device,
                self.precision,
                config.clip,
                after_step,
                before,
            )
            agree(0)
        except NotFinite as error:
            if error.what != "elsewhere":
                group.highest(NOT_FINITE)  # those without it are asking whether to stop
            raise self._named(error, batches) from None
        train_loss = group.mean(torch.tensor(train_loss)).item() if group.size > 1 else train_loss
        row = {"epoch": state["epoch"] + 1, "train_loss": train_loss}
        row |= {"validation_loss": math.nan, "validation_f1": math.nan}
        if self.opened.validation and group.is_first:
            whole = DataLoader(self.opened.validation, batch_size=config.batch_size if config.frame == "squeeze" else 1)
            row["validation_loss"], row["validation_f1"] = evaluate_with_f1(
                self.kept, whole, self.loss_fn, self.device, self.precision
            )
        rate = config.learning_rate * learning_rate_share(
            state["epoch"] * self.steps_an_epoch, self.steps, config.warmup
        )
        row |= {"learning_rate": rate, "seconds": time.time() - start}
        state["history"].append(row)
        state["epoch"] += 1
        state["losses"], state["seconds"] = [], 0.0
        better = config.keep == "last" or row["validation_loss"] < state["best_loss"]
        if better:
            state["best"], state["best_loss"] = state["epoch"], row["validation_loss"]
            self._save_kept(epoch=state["epoch"])
        self.save()
        if group.is_first:
            write_history(self.folder / "history.csv", state["history"])
        return row, better

    def _set_rate(self) -> None:
        share = learning_rate_share(self.state["step"], self.steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * share

    def _named(self, error: NotFinite, batches: _Batches) -> NotFinite:
        mine = () if error.what == "elsewhere" else (error.what, error.batch, batches.names(error.batch))
        seen = [other for other in self.group.gather(mine) if other]
        # gradients are common to all: where one process has a loss that is none, its photos are the ones to look at
        seen = [other for other in seen if other[0] == "loss"] or seen
        error.what, error.batch, _ = seen[0]
        names = ", ".join(name for _, _, photos in seen for name in photos)
        what = self.folder / (LAST if (self.folder / LAST).exists() else "config.json")
        error.args = (
            f"the {error.what} is not a finite number at step {error.batch + 1} of epoch {self.state['epoch'] + 1}, "
            f"with photos {names}; {what} is from before it: look at these photos and their masks "
            "(retina-seg check), or train anew with a lower --learning-rate",
        )
        return error

    def _save_kept(self, **notes: Any) -> None:
        if not self.group.is_first:
            return
        path = self.folder / "checkpoint.pth"
        save_model(path, self.kept, self.config.model, self.config.model_arguments, **notes, **self.notes)

    def save(self) -> None:
        """Write last.pth: the first process, with the random states of all."""
        random_states = {"start": self.random_at_start, "now": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_states["cuda"] = torch.cuda.get_rng_state(self.device)
        others = self.group.gather(random_states)[1:]
        if not self.group.is_first:
            return
        if others:
            random_states["others"] = others
        value = {
            "state": self.state,
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "random": random_states,
        }
        save_last(self.folder, value)

    def take_up(self) -> None:
        """Go back to where the run in the folder stopped."""
        value = self.group.from_first(self._read_last)
        if value is None:
            return
        try:
            self.model.load_state_dict(value["model"])
            if self.average:
                self.average.model.load_state_dict(value["average"])
            self.optimizer.load_state_dict(value["optimizer"])
            self.state.update(value["state"])
            self.random_at_start = value["random"]["start"]
            rank = self.group.rank
            mine = value["random"]["others"][rank - 1] if rank else value["random"]
            torch.set_rng_state(mine["now"])
            if "cuda" in mine and self.device.type == "cuda":
                torch.cuda.set_rng_state(mine["cuda"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self.folder / LAST}: is not of this recipe, or of another version of the package "
                f"({type(error).__name__}: {str(error).splitlines()[0][:80]}); train anew with another --output"
            ) from None

    def _read_last(self) -> dict[str, Any] | None:
        remove_leftovers(self.folder)
        value, damaged = load_last(self.folder)
        for line in damaged:
            tqdm.write(f"{line}; going on from the one before")
        if value is None:
            tqdm.write(f"{self.folder}: nothing was saved yet; starting at the first step")
        return value

    def stopped(self, number: int) -> None:
        """Raises TrainingStopped."""
        command = "retina-seg" if self.group.size == 1 else f"torchrun (of {self.group.size} processes) -m retina_seg"
        message = (
            f"stopped at step {self.state['step']} of {self.steps}, saved; "
            f"go on with: {command} train --resume {shlex.quote(str(self.folder))}"
        )
        raise TrainingStopped(message, number)

    def finish(self) -> Run:
        """Choose the threshold where the recipe says so, draw the curves."""
        checkpoint = self.folder / "checkpoint.pth"
        chosen, _ = load_model(checkpoint)
        if self.config.threshold == "validation":
            chosen = chosen.to(self.device, memory_format=torch.channels_last)
            threshold = choose_threshold(chosen, self.opened.validation, self.device)
            self.notes |= {"threshold": threshold, "threshold_from": "validation"}
            self.kept = chosen
            self._save_kept(epoch=self.state["best"])
        # drawing is the last room's work and heavy to import: a machine without a display or matplotlib still trains
        from retina_seg.visualize import save_curves

        save_curves(self.folder / "curves.png", self.state["history"], best=self.state["best"])
        return Run(self.folder, self.state["history"], self.state["best"], chosen.cpu())


class _Batches:
    """The batches of one epoch: drawn from torch's random state as the original's are, or by (seed, epoch) alone.

    Args:
        skip: how many batches, at the beginning, not to load.
        group: shares each batch, of `batch_size` photos for every process, out among them.

    Attributes:
        loader: gives the batches, or this process's shares of them.
    """

    def __init__(self, dataset: Any, config: TrainConfig, epoch: int, skip: int = 0, group: Group = ALONE) -> None:
        self.dataset, self._group = dataset, group
        if config.frame == "squeeze":
            sampler: Iterable[int] = RandomSampler(dataset)
        else:
            dataset.epoch = epoch
            generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
            sampler = torch.randperm(len(dataset), generator=generator).tolist()
        self.drawn: list[list[int]] = []
        self._sampler = BatchSampler(sampler, config.batch_size * group.size, drop_last=False)
        self._skip = skip
        alone = {} if group.store is None else {"worker_init_fn": own_session}
        self.loader = DataLoader(dataset, batch_sampler=self, num_workers=config.workers, **alone)

    def __iter__(self) -> Iterator[list[int]]:
        for whole in self._sampler:
            batch, _ = share(whole, self._group)
            self.drawn.append(batch)
            if len(self.drawn) > self._skip:
                yield batch

    def __len__(self) -> int:
        return len(self._sampler) - self._skip

    def weighted(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """`loss_fn` for one call a batch, such that the mean over the processes counts every photo alike (`share`)."""
        size, photos = self._sampler.batch_size, len(self.dataset)
        starts = range(self._skip * size, photos, size)
        weights = iter([share(list(range(min(size, photos - start))), self._group)[1] for start in starts])
        return lambda logits, masks: loss_fn(logits, masks) * next(weights)

    def names(self, batch: int) -> list[str]:
        """The names of the photos in a batch, or this process's share of it, counted from the epoch's start."""
        return [self.dataset.photo_name(index) for index in self.drawn[batch]]


def _started_again(batches: _Batches, random_at_start: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches behind those skipped, in the order drawn at the epoch's start; torch's random state ends as it was."""
    now = torch.get_rng_state()
    torch.set_rng_state(random_at_start)
    iterator = iter(batches.loader)
    first = next(iterator)  # the order is drawn with the first batch
    torch.set_rng_state(now)
    return itertools.chain([first], iterator)


def core_to_spare(device: torch.device, processes: int = 1) -> bool:
    """Whether batches may be made in a thread beside the network: a GPU has it, or torch's threads leave a core free.

    Otherwise the layers' threads wait for each other wherever one of them gives way: on two AVX2 cores a step of the recipe
    `fast` took 0.35 s with its windows made between steps, and 0.48 to 0.61 s with them made beside.

    Args:
        processes: that train on this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return device.type != "cpu" or processes * torch.get_num_threads() < cores


def _prefetched(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `loader`, each made in a thread while the network is at the one before it."""
    iterator, end = iter(loader), object()
    first = next(iterator, end)  # here, not in the thread: it draws the order from torch's random state
    if first is end:
        return
    yield first
    for batch in ahead(lambda _: next(iterator, end), itertools.count(), depth=2):
        if batch is end:
            return
        yield batch


@torch.inference_mode()
def choose_threshold(model: nn.Module, photos: Any, device: torch.device) -> float:
    """The threshold with the highest mean F1 over `photos`, a data set of (photo, mask) pairs as `fit` validates on."""
    labels, probabilities = [], []
    model.eval()
    for photo, mask in DataLoader(photos):
        photo, mask = _to_device(photo, mask, model, device)
        probabilities.append(torch.sigmoid(model(photo)).flatten().cpu().numpy())
        labels.append((mask > 0.5).flatten().cpu().numpy())
    return best_threshold(labels, probabilities)


def epoch_line(row: dict[str, float], kept: bool) -> str:
    """The line an epoch, with the original's four: epoch, minutes and seconds, training and validation loss."""
    minutes, seconds = epoch_time(0, row["seconds"])
    line = f"Epoch {row['epoch']:02d} | {minutes}m {seconds}s | train loss {row['train_loss']:.3f}"
    if math.isfinite(row["validation_loss"]):
        line += f" | validation loss {row['validation_loss']:.3f}, F1 {row['validation_f1']:.4f}"
        line += " | kept" if kept else ""
    return line


def _run_folder(config: TrainConfig, resume: bool, processes: int = 1) -> Path:
    folder = create_dir(config.output)
    there = [name for name in (LAST, PREVIOUS, "checkpoint.pth") if (folder / name).exists()]
    if resume and not there and not (folder / "config.json").exists():
        raise UserError(f"{folder}: holds no {LAST} to go on from; train without --resume")
    if there and not resume:
        raise UserError(f"{folder}: already holds a run; choose another --output, go on with --resume, or remove it")
    if resume and (folder / "config.json").exists():
        _check_same_recipe(config, folder / "config.json")
        began = read_json(folder / "config.json").get("processes", 1)
        if began != processes:  # other batches, other random states
            raise UserError(
                f"{folder / 'config.json'}: this run was begun by {began} process{'es' * (began != 1)}, these are "
                f"{processes}; go on with as many (torchrun's --nnodes times --nproc_per_node), or train anew"
            )
    probe = folder / ".write-test"
    try:  # said now, not after the first epoch
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: may not be written to ({error.strerror}); choose another --output") from None
    return folder


def _check_same_recipe(config: TrainConfig, written: Path) -> None:
    """Raises UserError where `config` differs from the recipe in `written` in more than where and how it is computed."""
    free = {"preset", "data", "output", "save_every", "device", "workers"}
    mine, theirs = (without_nan(dataclasses.asdict(recipe)) for recipe in (config, TrainConfig.from_json(written)))
    other = [name for name in mine if name not in free and mine[name] != theirs[name]]
    if other:
        raise UserError(
            f"{written}: this run's recipe has another {', '.join(other)}; go on by the recipe of this file "
            "(TrainConfig.from_json), or train anew with another --output"
        )


def training_memory(model: nn.Module, batch_size: int, size: int, precision: torch.dtype = torch.float32) -> int:
    """Bytes that a training step on (batch_size, 3, size, size) in `precision` needs beyond the weights: an estimate.

    What autograd keeps of a small forward pass, scaled up by the pixels, and two thirds more: for gradients, work space and
    what lies unused between blocks (`utils.memory_kept`).
    """
    side = 8 * model.stride
    small = copy.deepcopy(model).train()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    photos = torch.zeros(1, 3, side, side).to(memory_format=torch.channels_last)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.random.fork_rng(devices=[]), autocast(photos.device, precision), hooks:
        logits = small(photos)
    weights = {value.untyped_storage().data_ptr() for value in small.state_dict().values()}
    of_pixels = sum(size for pointer, size in kept.items() if pointer not in weights)
    del logits
    return round(of_pixels * batch_size * (size / side) ** 2 * 5 / 3)


def _check_room(
    config: TrainConfig, model: nn.Module, device: torch.device, precision: torch.dtype, folder: Path, sharing: int = 1
) -> None:
    """Raises UserError where memory or disk cannot hold this training, before hours are spent on it."""
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    # two states of network, average and optimizer, one being written, the kept weights, and what else is written
    needed, free = 3 * 4 * weights + weights + 2**24, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: the disk has {free / 2**20:.0f} MB left, this training writes up to {needed / 2**20:.0f} MB; "
            "make room or choose another --output"
        )
    needed, free = (
        training_memory(model, config.batch_size, config.size, precision) + 4 * weights,
        available_memory(device),
    )
    if free is not None and device.type == "cpu":
        free //= sharing  # the processes on this machine
    if free is not None and free < needed:
        raise UserError(
            f"--batch-size {config.batch_size}, --size {config.size}: a training step needs about {needed / 2**30:.1f} GB "
            f"of memory, {free / 2**30:.1f} GB are free; lower either"
        )


def _describe(
    config: TrainConfig,
    opened: _Loaders,
    model: nn.Module,
    device: torch.device,
    precision: torch.dtype,
    processes: int,
) -> dict[str, Any]:
    return {
        "recipe": dataclasses.asdict(config),
        "parameters": count_parameters(model),
        "processes": processes,
        "frame": opened.frame,
        "training": opened.training_names,
        "validation": opened.validation_names,
        "environment": environment(device, precision),
    }


def write_history(path: str | Path, history: list[dict[str, float]]) -> None:
    """Write the rows of `history` to `path` as CSV; what was not measured is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    for row in history:
        shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        writer.writerow({key: "" if value == "nan" else value for key, value in shown.items()})
    write_text(path, text.getvalue())
