"""Training: one pass over a loader (`train`, `evaluate`), as the original's notebook; and the loop around them, `fit`."""

import contextlib
import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from retina_seg import data
from retina_seg.checkpoint import LAST, load_checkpoint, load_last, load_model, save_model, save_whole
from retina_seg.config import TrainConfig
from retina_seg.device import autocast, choose_precision, environment, memory_kept, out_of_memory, training_layout
from retina_seg.distributed import World, set_epoch
from retina_seg.fov import LARGEST_SIDE
from retina_seg.loss import LOSSES, distillation_loss
from retina_seg.model import DEFAULT_STRIDE, build_model, count_parameters
from retina_seg.optim import EMA, learning_rate_factor, make_optimizer
from retina_seg.runs import check_run_folder, load_teacher, start_from
from retina_seg.sets.layout import Pair, check_apart, check_masks, list_pairs
from retina_seg.styles import AUTO, GROUPS, measure_styles, of_style
from retina_seg.transforms import Augmentation, FovFrame, Frame, ResizeFrame
from retina_seg.utils import Rows, UserError, epoch_time, natural_sort, output_folder, seeding, write_csv, write_json

Loss = Callable[[Tensor, Tensor], Tensor]
Loader = Iterable[Sequence[Tensor]]
Callback = Callable[[dict[str, float], nn.Module], object]


class NotFinite(FloatingPointError):
    """The loss or a gradient is not a finite number."""


def train(
    model: nn.Module,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    loss_fn: Loss,
    device: torch.device | str,
    precision: torch.dtype = torch.float32,
    clip: float = 0.0,
    after_step: Callable[[], None] | None = None,
    teacher: nn.Module | None = None,
) -> float:
    """One pass of training over `loader`, as in the original.

    Args:
        loader: batches of images (N, 3, H, W), masks (N, 1, H, W), float32, and
            for a network with styles each image's style (N,) int64, whose logits count.
        loss_fn: of (logits, masks), both (N, 1, H, W).
        precision: bfloat16 runs the network under autocast; the loss is always float32.
        clip: largest norm of the gradient, 0 for none.
        after_step: called after every step (schedule, EMA).
        teacher: a network whose predictions are learned too: `distillation_loss` is added.

    Returns the mean loss over batches. Raises `ValueError`: the loader is empty.
    `NotFinite`: loss or gradient is not finite; the weights are those before the step.
    """
    device = torch.device(device)
    model.train()
    losses: list[Tensor] = []
    for images, masks, *style in loader:
        images, masks = (batch.to(device, non_blocking=True) for batch in (images, masks))
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            logits = model(images)
        loss = loss_fn(of_style(logits, *style), masks)
        if teacher is not None:
            with torch.no_grad(), autocast(device, precision):
                taught = teacher(images)
            loss = loss + distillation_loss(logits, taught)
        loss.backward()
        losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        if not torch.isfinite(norm):
            what = "gradient" if torch.isfinite(loss) else "loss"
            raise NotFinite(f"the {what} is not finite at step {len(losses)} of this pass")
        optimizer.step()
        if after_step:
            after_step()
    return _mean(losses)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    loss_fn: Loss,
    device: torch.device | str,
    precision: torch.dtype = torch.float32,
    f1: list[Tensor] | None = None,
) -> float:
    """The mean loss over the batches of `loader`, without learning, as in the original; arguments as `train`.

    `f1` gets the F1 at 0.5 over the frame of every image: a tensor (N,) a batch.
    """
    device = torch.device(device)
    model.eval()
    losses = []
    for images, masks, *style in loader:
        images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        with autocast(device, precision):
            logits = of_style(model(images), *style)
        losses.append(loss_fn(logits, masks))
        if f1 is not None:
            predicted, true = (logits > 0).flatten(1), (masks > 0.5).flatten(1)
            f1.append(2 * (predicted & true).sum(1) / (predicted.sum(1) + true.sum(1)).clamp(min=1))
    return _mean(losses)


def _mean(values: list[Tensor]) -> float:
    if not values:
        raise ValueError("the loader is empty: there is nothing to take a mean over")
    return torch.stack(values).mean().item()


class _Data(NamedTuple):
    """What a config trains and validates on."""

    training: Any
    validation: Dataset | None
    training_pairs: list[Pair]
    validation_pairs: list[Pair]
    frame: Frame
    datasets: Sequence[str] = ()  # the names of its styles of labelling


def split_set(config: TrainConfig) -> tuple[list[Pair], list[Pair]]:
    """The (training, validation) pairs of `config`: by its split seed and fold, or the original's test part."""
    pairs = list_pairs(config.data, "train")
    if config.validation == "photos":
        return data.split_by_photo(pairs, config.held_out, config.split_seed, config.fold)
    tested = list_pairs(config.data, "test") if config.validation == "test" else []
    check_apart(pairs, tested)
    return pairs, tested


def _open_data(config: TrainConfig, stride: int, given: Any = None) -> _Data:
    side = max(stride, round(config.size / stride) * stride)
    if given is not None:
        training, validation = given if isinstance(given, tuple) else (given, None)
        frame = FovFrame(config.fov_diameter or side, config.largest_diameter, config.normalise == "fov")
        return _Data(training, validation, [], [], frame if config.frame == "fov" else ResizeFrame(side, side))
    training, validation = split_set(config)
    if config.frame == "resize":
        # the original's order, a sorted glob (10 before 2): with its seed and torch's shuffle, its batches too
        parts = [sorted(part, key=lambda pair: pair.image.name) for part in (training, validation)]
        files = [([pair.image for pair in part], [pair.mask for pair in part]) for part in parts]
        first, second = (data.DriveDataset(*some, (side, side)) if some[0] else None for some in files)
        return _Data(first, second, parts[0], parts[1], ResizeFrame(side, side))
    # stored variants of a photo would only make it count several times: augmentation draws its own
    training, validation = ([*{p.photo: p for p in reversed(part)}.values()] for part in (training, validation))
    how, styles = Augmentation.changed(config.augmentation), config.styles == "datasets"
    drawn = (side, config.patches, how, config.seed, normalise := config.normalise == "fov", styles)
    patches = data.PatchDataset(training, config.fov_diameter, *drawn)
    diameter = patches.frame.fov_diameter
    if (largest := config.largest_diameter) and not diameter <= largest <= LARGEST_SIDE:
        raise UserError(f"--largest-diameter {largest}: must lie between {diameter:g} and {LARGEST_SIDE}")
    frame = FovFrame(diameter, largest, normalise)
    datasets = patches.datasets if styles else []
    whole = data.FrameDataset(validation, frame, stride, datasets) if validation else None
    return _Data(patches, whole, training, validation, frame, datasets)


@dataclass
class Run:
    """What `fit` gives back."""

    folder: Path
    history: Rows  # a row an epoch, as in history.csv
    best: int  # the epoch whose weights were kept, from 1 on
    model: nn.Module  # with the kept weights, in evaluation mode


def fit(
    config: TrainConfig,
    resume: bool = False,
    progress: bool = True,
    world: World | None = None,
    *,
    model: nn.Module | None = None,
    loss: Loss | None = None,
    data: Dataset | tuple[Dataset, Dataset | None] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train by `config` and write its run folder: config.json, history.csv, curves.png, checkpoint.pth, last.pth.

    Several processes average their gradients; the first one validates, writes and prints, and the training loss is its own.

    Args:
        resume: go on with the run in `config.output` after its last whole epoch, to the same weights as without a stop.
            With more `config.epochs` than before it goes on after the end.
        progress: show a progress bar, and a line an epoch as the original does.
        world: the processes that train together; None: this one alone.
        model: trained in place of `config.model`: (N, 3, H, W) BGR in [0, 1] -> logits (N, 1, H, W).
        loss: in place of `config.loss`, of (logits, masks), both (N, 1, H, W).
        data: in place of `config.data`: a dataset of (image (3, H, W), mask (1, H, W)), float32 in [0, 1], or a tuple of
            one for training and one for validation. The config's frame is what images are brought to in use.
        callbacks: each is called after every epoch with its row of `history` and the network with the kept weights.

    Raises `UserError`: a value of `config`, data or a folder that cannot be, too little memory. `NotFinite`: as `train`;
    the epochs before are saved. `KeyboardInterrupt`: stopped; the message says how to go on.
    """
    world = world or World()
    config.check()
    if loss is not None:
        config = dataclasses.replace(config, loss=_name(loss))
    elif config.loss not in LOSSES:
        remedy = f"choose one of {', '.join(LOSSES)}, or register yours: retina_seg.loss.register_loss"
        raise UserError(f"--loss {config.loss}: unknown; {remedy}")
    device = world.device(config.device)
    seeding(config.seed)
    own = model
    if own is not None:
        config = dataclasses.replace(config, model=_name(own), model_arguments={})
    elif config.weights and not resume:
        config, model = start_from(config)
    model = model or build_model(config.model, **config.model_arguments)
    opened = _open_data(config, getattr(model, "stride", DEFAULT_STRIDE), data)
    if opened.validation is None and config.keep == "best":
        raise UserError("--keep best needs images to validate on; give data=(training, validation), or --keep last")
    if opened.datasets:
        if config.style not in (names := (AUTO, *GROUPS, *opened.datasets)):
            raise UserError(f"--style {config.style}: choose one of {', '.join(names)}")
        seeding(config.seed)
        model = build_model(config.model, **config.model_arguments, styles=len(opened.datasets))
    with output_folder(config.output) as folder:
        own_config = dataclasses.replace(config, output=str(folder))
        loop = _Loop(own_config, opened, model, device, world, loss or LOSSES[config.loss])
        if world.is_main:
            check_run_folder(config, resume, world.size)
        world.barrier()
        if resume:
            loop.load()
            if config.epochs < (done := loop.state["epoch"]):
                raise UserError(f"--epochs {config.epochs}: {folder} has trained for {done}; give more")
        if world.is_main and not (resume and TrainConfig.from_json(folder / "config.json").epochs == config.epochs):
            loop.describe()
    progress = progress and world.is_main
    bar = tqdm(total=loop.steps, initial=loop.state["step"], unit="step", disable=not progress, desc="training")
    number = loop.state["epoch"] + 1
    try:
        with contextlib.closing(bar), memory_kept(), out_of_memory("lower --batch-size or --size"):
            while number <= config.epochs:
                loop.epoch(bar)
                number += 1
                for callback in callbacks if world.is_main else ():
                    callback(loop.state["history"][-1], loop.kept)
    except KeyboardInterrupt as stop:
        command = "retina-seg" if world.size == 1 else f"torchrun --nproc_per_node={world.size} -m retina_seg"
        where = f"stopped in epoch {number} of {config.epochs}, the epochs before it are saved"
        stop.args = (f"{where}; go on with: {command} train --resume {shlex.quote(config.output)}",)
        raise
    if world.is_main:
        loop.finish()
    world.barrier()
    kept, _ = load_model(loop.folder, model=own)
    return Run(loop.folder, Rows(loop.state["history"]), loop.state["best"], kept)


def _name(own: Any) -> str:
    """What config and checkpoint call a network or loss that is given as an object."""
    return getattr(own, "__name__", type(own).__name__)


class _Loop:
    """The state of one training, and what an epoch does to it. All of it is in last.pth."""

    def __init__(
        self, config: TrainConfig, opened: _Data, model: nn.Module, device: torch.device, world: World, loss: Loss
    ) -> None:
        self.config, self.opened, self.device, self.world = config, opened, device, world
        self.folder = Path(config.output)
        self.checkpoint = self.folder / "checkpoint.pth"
        self.precision = choose_precision(config.precision, device)
        layout: Any = training_layout(device, self.precision)
        self.model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        teacher = load_teacher(config.teacher, opened.frame, opened.datasets) if config.teacher else None
        self.teacher = teacher and teacher.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.parallel = world.parallel(self.model, device)
        self.optimizer = make_optimizer(model, config)
        self.ema = EMA(model, config.ema) if config.ema and world.is_main else None
        self.kept = self.ema.model if self.ema else self.model
        self.loss_fn = loss
        self.sampler = world.sampler(opened.training, config.seed, shared_state=config.frame == "resize")
        workers = config.workers if config.workers is not None else 4 * (device.type != "cpu")
        self.loader = DataLoader(opened.training, config.batch_size, sampler=self.sampler, num_workers=workers)
        self.steps = config.epochs * len(self.loader)
        self.state: dict[str, Any] = {"epoch": 0, "step": 0, "best": 0, "best_loss": math.inf, "history": []}
        given = config.threshold not in ("fixed", "validation")
        selected = "test" if config.validation == "test" else "validation"
        self.notes = {
            "frame": opened.frame.to_dict(),
            "threshold": float(config.threshold) if given else 0.5,
            "threshold_from": "config" if given else "fixed",
            "trained_on": natural_sort({pair.name for pair in opened.training_pairs}),
            "selected_on": "nothing" if config.keep == "last" else selected,
        }

    def describe(self) -> None:
        """Write config.json, and say what is odd about the masks."""
        for line in check_masks(self.opened.training_pairs) + check_masks(self.opened.validation_pairs):
            tqdm.write(line)
        value = {
            "config": dataclasses.asdict(self.config),
            "parameters": count_parameters(self.model),
            "processes": self.world.size,
            "frame": self.notes["frame"],
            "training": self.notes["trained_on"],
            "validation": natural_sort({pair.name for pair in self.opened.validation_pairs}),
            "environment": environment(self.device, self.precision),
        }
        write_json(self.folder / "config.json", value)

    def epoch(self, bar: tqdm) -> None:
        """Train, validate and save one epoch; with a bar that is shown, write its line for people."""
        config, state, world = self.config, self.state, self.world
        start = time.time()
        if world.size > 1:  # every process drops other feature maps, and a resumed epoch draws the same again
            torch.manual_seed((config.seed + 1) * 1_000_003 + state["epoch"] * world.size + world.rank)
        self._set_rate()
        rate = self.optimizer.param_groups[0]["lr"]
        set_epoch(self.sampler, config.seed, state["epoch"])
        with contextlib.suppress(AttributeError):  # patches are drawn by it; an own dataset may not take it
            self.opened.training.epoch = state["epoch"]

        def after_step() -> None:
            state["step"] += 1
            if self.ema:
                self.ema.update(self.model, state["step"])
            self._set_rate()
            bar.update()

        step = (self.parallel, self.loader, self.optimizer, self.loss_fn, self.device, self.precision, config.clip)
        try:
            train_loss = train(*step, after_step, self.teacher)
        except NotFinite as error:
            remedy = "lower --learning-rate, take --precision float32, or look at the masks (retina-seg check)"
            raise NotFinite(f"epoch {state['epoch'] + 1}: {error}; the epochs before it are saved; {remedy}") from None
        row = {"epoch": state["epoch"] + 1, "train_loss": train_loss}
        row |= {"validation_loss": math.nan, "validation_f1": math.nan}
        if self.opened.validation and world.is_main:
            whole = DataLoader(self.opened.validation, batch_size=config.batch_size if config.frame == "resize" else 1)
            f1: list[Tensor] = []
            row["validation_loss"] = evaluate(self.kept, whole, self.loss_fn, self.device, self.precision, f1)
            row["validation_f1"] = torch.cat(f1).mean().item()
        row |= {"learning_rate": rate, "seconds": time.time() - start}
        if self.opened.datasets and world.is_main:
            how = self.kept, self.opened.training, self.opened.datasets, self.device, self.precision
            self.notes |= {"styles": measure_styles(*how), "style": config.style}
        state["history"].append(row)
        state["epoch"] += 1
        better = config.keep == "last" or row["validation_loss"] < state["best_loss"]
        if better:
            state["best"], state["best_loss"] = state["epoch"], row["validation_loss"]
        if world.is_main:
            self._save(better)
        world.barrier()
        if not bar.disable:
            tqdm.write(epoch_line(row, better))

    def _set_rate(self) -> None:
        factor = learning_rate_factor(self.state["step"], self.steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor

    def _save(self, better: bool) -> None:
        """Write the kept weights where they are new, then last.pth, then the history."""
        if better:
            styles = {"styles": len(self.opened.datasets)} if self.opened.datasets else {}
            arguments, epoch = self.config.model_arguments | styles, self.state["best"]
            save_model(self.checkpoint, self.kept, self.config.model, arguments, epoch=epoch, **self.notes)
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        value = {"state": self.state, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        value |= {"ema": self.ema.model.state_dict() if self.ema else None, "random": random_state}
        save_whole(self.folder / LAST, value)
        self._write_history()

    def _write_history(self) -> None:
        write_csv(self.folder / "history.csv", list(self.state["history"][0]), self.state["history"])

    def load(self) -> None:
        """Go back to the end of the last whole epoch of the run in the folder."""
        value = load_last(self.folder)
        if value is None:
            if self.world.is_main:
                tqdm.write(f"{self.folder}: no epoch was finished yet; starting with the first")
            return
        try:
            self.model.load_state_dict(value["model"])
            if self.ema:
                self.ema.model.load_state_dict(value["ema"])
            self.optimizer.load_state_dict(value["optimizer"])
            self.state.update(value["state"])
            torch.set_rng_state(value["random"]["cpu"])
            if "cuda" in value["random"] and self.device.type == "cuda":
                torch.cuda.set_rng_state(value["random"]["cuda"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            raise UserError(f"{self.folder / LAST}: is of another config or version ({why}); train anew") from None

    def finish(self) -> None:
        """Choose the threshold where the config says so, draw the curves."""
        from retina_seg.analysis.threshold import best_on
        from retina_seg.visualize import curves, save_figure

        self._write_history()
        if self.config.threshold == "validation":
            chosen = best_on(self.folder, self.opened.validation_pairs, self.config.device)
            kept = load_checkpoint(self.checkpoint)
            save_whole(self.checkpoint, {**kept, "threshold": chosen, "threshold_from": "validation"})
        save_figure(self.folder / "curves.png", curves(self.state["history"], self.state["best"]))


def epoch_line(row: dict[str, float], kept: bool) -> str:
    """The line an epoch, as the original's: epoch, minutes and seconds, training and validation loss; and F1."""
    minutes, seconds = epoch_time(0, row["seconds"])
    line = f"Epoch {row['epoch']:02d} | {minutes}m {seconds}s | train loss {row['train_loss']:.3f}"
    if math.isfinite(row["validation_loss"]):
        line += f" | validation loss {row['validation_loss']:.3f}, F1 {row['validation_f1']:.4f}"
        line += " | kept" if kept else ""
    return line
