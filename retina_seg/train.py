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
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from retina_seg import data as sets
from retina_seg import loss as losses
from retina_seg.metrics import best_threshold
from retina_seg.model import build_model, count_parameters, load_model, save_model
from retina_seg.utils import (
    UserError,
    autocast,
    choose_device,
    choose_precision,
    create_dir,
    environment,
    epoch_time,
    read_json,
    seeding,
    whole_file,
    write_json,
    write_text,
)

LOSSES = {"dice_bce": losses.dice_bce_loss, "dice": losses.dice_loss}


# ------------------------------------------------------------------------------------------------------------ the recipe


@dataclass
class TrainConfig:
    """All that is needed to repeat a training. `notebook()`, `fast()` and `quick()` are the recipes that ship.

    Attributes:
        preset: the recipe's name, for tables.
        data, output: the set's folder (or several, trained on together) and the run's folder.
        model, model_arguments: what `model.build_model` takes.
        frame: "squeeze": photos as they are, squeezed to `size` where they are not of that size (the original's);
            "fov": brought to one scale by their field of view, in augmented windows of side `size`.
        size: side of what the network is fed, pixels; a multiple of its stride.
        fov_diameter: with "fov", the scale; None: the median of the training photos.
        augmentation: changes to `data.Augmentation`'s defaults, by name; with "fov" only.
        repeats: windows a photo and epoch; with "fov" only.
        epochs, batch_size, learning_rate, weight_decay, seed: as usual. Weight decay above 0 makes Adam AdamW.
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
    augmentation: dict[str, Any] = field(default_factory=dict)
    repeats: int = 1
    epochs: int = 10
    batch_size: int = 2
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
    precision: str = "auto"
    device: str = "auto"
    workers: int = 0

    @classmethod
    def notebook(cls, **changes: Any) -> TrainConfig:
        """The original's recipe to the letter, with its selection of the epoch on the test photos."""
        return cls(**{"preset": "notebook", "validation": "test", **changes})

    @classmethod
    def fast(cls, **changes: Any) -> TrainConfig:
        """The fast network, augmented windows at the photos' own scale, a fixed schedule, the last averaged weights."""
        recipe = {
            "preset": "fast",
            "model": "fast_attention_unet",
            "frame": "fov",
            "size": 384,
            "repeats": 20,
            "epochs": 40,
            "batch_size": 4,
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
    def quick(cls, **changes: Any) -> TrainConfig:
        """`fast` on a few minutes' schedule: enough for the synthetic photos, and for a first look at one's own."""
        return cls.fast(**{"preset": "quick", "epochs": 6, "ema": 0.99, "size": 256, **changes})

    @classmethod
    def from_json(cls, path: str | Path) -> TrainConfig:
        """The recipe in a run's `config.json`. Raises `UserError` for a file that is none."""
        recipe = read_json(path).get("recipe")
        if not isinstance(recipe, dict):
            raise UserError(f"{path}: holds no recipe; give the config.json of a run")
        unknown = sorted(set(recipe) - {item.name for item in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"{path}: the recipe has unknown entries: {', '.join(unknown)}")
        return cls(**recipe)

    def check(self) -> None:
        """Raises `UserError` for the first value that cannot be."""
        choices = {
            "frame": ("squeeze", "fov"),
            "loss": tuple(LOSSES),
            "validation": ("test", "photos", "files", "none"),
            "keep": ("best", "last"),
            "threshold": ("fixed", "validation"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} {getattr(self, name)}: choose one of {', '.join(allowed)}")
        for name in ("epochs", "batch_size", "repeats", "size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be a whole number from 1 on")
        if not self.learning_rate > 0:
            raise UserError(f"--learning-rate {self.learning_rate}: must be above 0")
        if self.workers < 0 or not 0 <= self.ema < 1:
            raise UserError(f"--workers {self.workers}, ema {self.ema}: workers from 0 on, ema in [0, 1)")
        if self.validation == "files" and self.frame != "squeeze":
            raise UserError('--validation files needs a recipe that trains on files as they are; choose frame "squeeze"')
        if self.keep == "best" and self.validation == "none":
            raise UserError("--keep best needs validation photos; choose --validation photos, or --keep last")
        if self.threshold == "validation" and self.validation != "photos":
            raise UserError("--threshold validation needs held-out training photos; add --validation photos")
        unknown = sorted(set(self.augmentation) - {item.name for item in dataclasses.fields(sets.Augmentation)})
        if unknown:
            raise UserError(f"augmentation {', '.join(unknown)}: unknown; data.Augmentation lists what there is")


PRESETS = {"notebook": TrainConfig.notebook, "fast": TrainConfig.fast, "quick": TrainConfig.quick}


# -------------------------------------------------------------------------------------------------- one pass over a loader


def train(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    device: torch.device | str,
    precision: torch.dtype = torch.float32,
    clip: float = 0.0,
    after_step: Callable[[], None] | None = None,
) -> float:
    """One pass of training over `loader`, as in the original.

    Args:
        loader: batches of photos (N, 3, H, W) and masks (N, 1, H, W), float32 in [0, 1].
        loss_fn: of (logits, masks), both (N, 1, H, W).
        precision: bfloat16 runs the network under autocast; the loss is always float32.
        clip: largest norm of the gradient, 0 for none.
        after_step: called after every step (schedule, averaging).

    Returns:
        The mean loss over batches.

    Raises:
        ValueError: the loader is empty.
        FloatingPointError: the loss is not finite; the weights are those before the step.
    """
    device = torch.device(device)
    model.train()
    losses_seen = []
    for photos, masks in loader:
        photos, masks = _to_device(photos, masks, model, device)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            logits = model(photos)
        loss = loss_fn(logits, masks)
        if device.type == "cpu" and not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()} at step {len(losses_seen) + 1} of this pass")
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses_seen.append(loss.detach())  # no .item() here: it would make a GPU wait at every step
        if after_step:
            after_step()
    return _mean(losses_seen)


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
        validation_set = sets.WholePhotos(validation, train_set.diameter, stride) if validation else None
        frame = {"kind": "fov", "fov_diameter": train_set.diameter}
    names = [sorted({pair.name for pair in pairs}, key=lambda n: (len(n), n)) for pairs in (training, validation)]
    return _Loaders(train_set, validation_set, *names, frame)


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


def fit(config: TrainConfig, resume: bool = False, progress: bool = True) -> Run:
    """Train by `config` and write its run folder: config.json, history.csv, curves.png, checkpoint.pth, last.pth.

    Args:
        resume: go on with the run in `config.output` after its last whole epoch.
        progress: show a progress bar, and a line an epoch as the original does.

    Raises:
        UserError: a value of `config` that cannot be, data that cannot be read, a folder that may not be written to,
            or one that already holds a run while `resume` is off.
    """
    config.check()
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    seeding(config.seed)
    model = build_model(config.model, **config.model_arguments)
    opened = _open_data(config, model.stride)
    folder = _run_folder(config, resume)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer_class = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
    optimizer = optimizer_class(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    average = WeightAverage(model, config.ema) if config.ema else None
    state = {"epoch": 0, "step": 0, "best": 0, "best_loss": math.inf, "history": []}
    if resume:
        _restore(folder / "last.pth", state, model, average, optimizer)
    else:
        write_json(folder / "config.json", _describe(config, opened, model, device, precision))
    steps = config.epochs * math.ceil(len(opened.training) / config.batch_size)
    loss_fn = LOSSES[config.loss]
    kept = average.model if average else model
    notes = {"frame": opened.frame, "threshold": 0.5, "threshold_from": "fixed", "trained_on": opened.training_names}
    notes["selected_on"] = {"test": "test", "none": "nothing"}.get(config.validation, "validation")
    if config.keep == "last":
        notes["selected_on"] = "nothing"

    bar = tqdm(total=steps, initial=state["step"], unit="step", disable=not progress, desc="training")
    with contextlib.closing(bar):

        def set_rate() -> None:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * learning_rate_share(state["step"], steps, config.warmup)

        def after_step() -> None:
            state["step"] += 1
            if average:
                average.update(model, state["step"])
            set_rate()
            bar.update()

        for epoch in range(state["epoch"], config.epochs):
            start = time.time()
            set_rate()
            rate = optimizer.param_groups[0]["lr"]
            loader = _training_loader(opened.training, config, epoch)
            train_loss = train(model, loader, optimizer, loss_fn, device, precision, config.clip, after_step)
            row = {"epoch": epoch + 1, "train_loss": train_loss, "validation_loss": math.nan, "validation_f1": math.nan}
            if opened.validation:
                batch = config.batch_size if config.frame == "squeeze" else 1
                whole = DataLoader(opened.validation, batch_size=batch)
                row["validation_loss"], row["validation_f1"] = evaluate_with_f1(kept, whole, loss_fn, device, precision)
            row |= {"learning_rate": rate, "seconds": time.time() - start}
            state["history"].append(row)
            state["epoch"] = epoch + 1
            better = config.keep == "last" or row["validation_loss"] < state["best_loss"]
            if better:
                state["best"], state["best_loss"] = epoch + 1, row["validation_loss"]
                save_model(
                    folder / "checkpoint.pth", kept, config.model, config.model_arguments, epoch=epoch + 1, **notes
                )
            _save_last(folder / "last.pth", state, model, average, optimizer)
            write_history(folder / "history.csv", state["history"])
            if progress:
                tqdm.write(epoch_line(row, better))
    checkpoint = folder / "checkpoint.pth"
    chosen, _ = load_model(checkpoint)
    if config.threshold == "validation":
        chosen = chosen.to(device, memory_format=torch.channels_last)
        notes |= {"threshold": choose_threshold(chosen, opened.validation, device), "threshold_from": "validation"}
        save_model(checkpoint, chosen, config.model, config.model_arguments, epoch=state["best"], **notes)
    # drawing is the last room's work and heavy to import: a machine without a display or matplotlib still trains
    from retina_seg.visualize import save_curves

    save_curves(folder / "curves.png", state["history"], best=state["best"])
    return Run(folder, state["history"], state["best"], chosen.cpu())


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


def _run_folder(config: TrainConfig, resume: bool) -> Path:
    folder = create_dir(config.output)
    there = [name for name in ("last.pth", "checkpoint.pth") if (folder / name).exists()]
    if resume and "last.pth" not in there:
        raise UserError(f"{folder}: holds no last.pth to go on from; train without --resume")
    if there and not resume:
        raise UserError(f"{folder}: already holds a run; choose another --output, go on with --resume, or remove it")
    probe = folder / ".write-test"
    try:  # said now, not after the first epoch
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: may not be written to ({error.strerror}); choose another --output") from None
    return folder


def _training_loader(dataset: Any, config: TrainConfig, epoch: int) -> DataLoader:
    """Batches of one epoch: drawn from torch's random state as the original's are, or by (seed, epoch) alone."""
    if config.frame == "squeeze":
        return DataLoader(dataset, batch_size=config.batch_size, shuffle=True, num_workers=config.workers)
    dataset.epoch = epoch
    generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    return DataLoader(dataset, batch_size=config.batch_size, sampler=order, num_workers=config.workers)


def _describe(
    config: TrainConfig, opened: _Loaders, model: nn.Module, device: torch.device, precision: torch.dtype
) -> dict[str, Any]:
    return {
        "recipe": dataclasses.asdict(config),
        "parameters": count_parameters(model),
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


def _save_last(
    path: Path, state: dict, model: nn.Module, average: WeightAverage | None, optimizer: torch.optim.Optimizer
) -> None:
    value = {
        "state": state,
        "model": model.state_dict(),
        "average": average.model.state_dict() if average else None,
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(value, file)


def _restore(
    path: Path, state: dict, model: nn.Module, average: WeightAverage | None, optimizer: torch.optim.Optimizer
) -> None:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(value["model"])
        if average:
            average.model.load_state_dict(value["average"])
        optimizer.load_state_dict(value["optimizer"])
        torch.set_rng_state(value["random"])
        state.update(value["state"])
    except Exception as error:  # the unpickler of torn bytes raises anything
        raise UserError(f"{path}: cannot be resumed from ({type(error).__name__}: {str(error)[:80]})") from None
