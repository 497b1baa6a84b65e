"""Speed of the original (the baseline) and of this package, in turns, so that a machine that slows down slows all.

The baseline is the original's notebooks: float32, contiguous tensors, batch size 1 in evaluation and 2 in training, eager,
a `.item()` at every step, scores by five passes of scikit-learn. It runs in a process of its own, with memory as the
system's allocator has it; "baseline, memory kept" adds `device.memory_kept` alone. Its code is written anew, not copied.
"""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from retina_seg.checkpoint import load_model
from retina_seg.config import TrainConfig
from retina_seg.data import Pair, list_pairs
from retina_seg.device import environment, has_bfloat16_units, memory_kept, training_layout
from retina_seg.inference.engine import image_batch
from retina_seg.inference.segmenter import Segmenter
from retina_seg.loss import DiceBCELoss, dice_bce_loss
from retina_seg.model import AttentionUNet, build_model
from retina_seg.optim import make_optimizer
from retina_seg.sets.synthetic import synthetic_image, write_set
from retina_seg.test import score_pairs
from retina_seg.train import train
from retina_seg.transforms import mask_to_tensor, to_tensor
from retina_seg.utils import UserError, output_folder, write_json
from retina_seg.visualize import strip

BASELINE, KEPT, SAME = "baseline", "baseline, memory kept", "same weights, optimised"
Call = Callable[[], Any]
Segmenters = dict[str, Segmenter]  # on one device, by the names in the rows
# its name, the images of a call, the calls by the names in the rows, and what makes the baseline's
Task = tuple[str, int, dict[str, Call], Callable[[], Call]]


def bench(
    output: str | Path = "results/run-bench",
    rounds: int = 7,
    images: int = 20,
    size: int = 512,
    original: str | Path | None = None,
    fast: str | Path = "drive",
    data: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a forward pass, a training step and a whole test; write `output`/bench.json.

    Args:
        rounds: how often each is measured; the test three times at most.
        images, size: how many images the test has, and the side of synthetic ones, pixels.
        original, fast, data: weights as `load_model` takes them, a dataset; None: random weights, synthetic images.
        device: "auto" measures the processor, and the first GPU too where there is one. precision: not the baseline's.

    Returns what the file holds, "rows" as `measure` gives them.
    Raises `UserError`: a number that cannot be, no such checkpoint, dataset or device.
    """
    if min(rounds, images) < 1 or size < 64 or size % 8:
        raise UserError(f"--rounds {rounds}, --images {images}: from 1 on; --size {size}: a multiple of 8 from 64 on")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() if device == "auto" else [device]
    network = build_model("attention_unet") if original is None else load_model(original)[0]
    if not isinstance(network, AttentionUNet):
        raise UserError(f"--original {original}: is not the original's network; train one with --preset notebook")
    how, load = [dict[str, Any](device=where, precision=precision) for where in devices], Segmenter.load
    machines = [{SAME: Segmenter(network, **h), "fast": load(fast, **h), "tiny": load("tiny", **h)} for h in how]
    pairs = [] if data is None else list_pairs(data, "test")
    rows: list[dict[str, Any]] = []
    with output_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        pairs = pairs or list_pairs(write_set(Path(scratch, "set"), 1, images, (size, size), progress=False), "test")
        for segmenters in machines:
            with memory_kept():
                for task in (forward(segmenters, size), step(segmenters, size)):
                    rows += measure(task, segmenters[SAME], rounds, progress)
            task = whole_test(segmenters, (pairs * images)[:images], Path(scratch))
            rows += measure(task, segmenters[SAME], min(rounds, 3), progress)
    first, units = machines[0][SAME], ", bfloat16" if has_bfloat16_units(torch.device("cpu")) else ""
    processor = {"processor": torch.backends.cpu.get_cpu_capability() + units}
    value = {"rows": rows, "size": size, "environment": environment(first.device, first.precision) | processor}
    write_json(folder / "bench.json", value)
    return value


def measure(task: Task, of: Segmenter, rounds: int, progress: bool) -> list[dict[str, Any]]:
    """A row a call: median and quartiles over the rounds, the first left out, of its seconds an image.

    "ratio" is the baseline's median by the row's own; the baseline runs in a process of its own. `of` names device and
    precision.
    """
    title, images, calls, baseline = task
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        timers: dict[str, Callable[[], float]] = {BASELINE: lambda: process.submit(timed, baseline).result()}
        timers |= {name: partial(timed, partial(calls.__getitem__, name)) for name in calls}
        seconds: dict[str, list[float]] = {name: [] for name in timers}
        for name in tqdm(list(timers) * (rounds + 1), f"{title}, {of.device}", disable=not progress):
            seconds[name].append(timers[name]() / images)
    rows, precision = [], str(of.precision).removeprefix("torch.")
    for name, values in seconds.items():
        low, median, high = np.quantile(values[1:], (0.25, 0.5, 0.75)).tolist()
        ratio = float(np.median(seconds[BASELINE][1:])) / median
        times = {"median": median, "quartiles": [low, high], "ratio": ratio, "rounds": rounds}
        rows.append({"task": title, "name": name, **times, "device": str(of.device), "precision": precision})
    return rows


def timed(make: Callable[[], Call]) -> float:
    """Seconds of the call that `make` gives, the second time: the first one finds another's data in the caches."""
    call = make()
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def forward(segmenters: Segmenters, size: int) -> Task:
    """A forward pass on an image (size, size), its probability map brought to the processor's memory."""
    same, image = segmenters[SAME], synthetic_image(0, size, size).image
    calls: dict[str, Call] = {name: partial(segmenter.network, image) for name, segmenter in segmenters.items()}
    baseline = partial(baseline_forward, same.model, size, same.device)
    return "forward", 1, {KEPT: baseline(), **calls}, baseline


def baseline_forward(network: nn.Module, size: int, device: torch.device) -> Call:
    """The original's forward pass."""
    eager = copy.deepcopy(network).to(device).eval()
    image = image_batch(synthetic_image(0, size, size).image, device).contiguous()  # as the original's loader gives it

    def once() -> None:
        with torch.no_grad():
            torch.sigmoid(eager(image)).cpu()

    return once


def step(segmenters: Segmenters, size: int) -> Task:
    """A training step on two images (size, size) that are in memory: forward, loss, backward, optimizer."""
    items, same, calls = [synthetic_image(seed, size, size) for seed in (0, 1)], segmenters[SAME], {}
    images = torch.stack([to_tensor(item.image) for item in items])
    masks = torch.stack([mask_to_tensor(item.mask) for item in items])

    def once(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
        train(model, [(images, masks)], optimizer, dice_bce_loss, same.device, same.precision, clip)
        if same.device.type == "cuda":
            torch.cuda.synchronize(same.device)

    for name, preset in {SAME: "notebook", "fast": "fast", "tiny": "tiny"}.items():
        model, config = copy.deepcopy(segmenters[name].model), TrainConfig.from_preset(preset)
        model = model.to(same.device, memory_format=training_layout(same.device, same.precision))  # type: ignore[call-overload]
        calls[name] = partial(once, model, make_optimizer(model, config), config.clip)
    baseline = partial(baseline_step, same.model, images, masks, same.device)
    return "training step, an image", 2, {KEPT: baseline(), **calls}, baseline


def baseline_step(network: nn.Module, images: torch.Tensor, masks: torch.Tensor, device: torch.device) -> Call:
    """The original's training step."""
    model = copy.deepcopy(network).to(device).train()
    optimizer, loss_fn = torch.optim.Adam(model.parameters(), lr=1e-4), DiceBCELoss()
    images, masks = images.clone(), masks.clone()  # what another process sends is memory shared with it

    def once() -> None:
        x, y = images.to(device), masks.to(device)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        loss.item()

    return once


def whole_test(segmenters: Segmenters, pairs: list[Pair], scratch: Path) -> Task:
    """A whole test, files to scores and images (more of both where optimised)."""
    calls: dict[str, Call] = {
        name: partial(score_pairs, segmenter, pairs, "notebook", 0.5, scratch / name, progress=False)
        for name, segmenter in segmenters.items()
    }
    same = segmenters[SAME]
    return "whole test, an image", len(pairs), calls, partial(baseline_test, same.model, pairs, scratch, same.device)


def baseline_test(network: nn.Module, pairs: list[Pair], folder: Path, device: torch.device) -> Call:
    """The original's test at 512x512: five passes of scikit-learn an image, a strip written; gives the five scores an image."""
    from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score

    # zero_division: the same 0 as by default, without a warning
    four = [partial(score, zero_division=0) for score in (jaccard_score, f1_score, recall_score, precision_score)]
    network = copy.deepcopy(network).to(device).eval()
    read: Any = cv2.imread

    def scores_of(pair: Pair) -> list[float]:
        image = cv2.resize(read(str(pair.image), cv2.IMREAD_COLOR), (512, 512))
        mask = cv2.resize(read(str(pair.mask), cv2.IMREAD_GRAYSCALE), (512, 512))
        x = torch.from_numpy(np.transpose(image, (2, 0, 1))[None].astype(np.float32) / 255).to(device)
        with torch.no_grad():
            probability = torch.sigmoid(network(x)).cpu().numpy()
        vessels, truth = (probability[0, 0] > 0.5).astype(np.uint8), (mask / 255 > 0.5).astype(np.uint8)
        cv2.imwrite(str(folder / f"{pair.name}.png"), strip(image, mask, vessels * 255))
        return [float(score(truth.ravel(), vessels.ravel())) for score in (*four, accuracy_score)]

    return lambda: [scores_of(pair) for pair in pairs]


def table(value: dict[str, Any]) -> list[str]:
    """What `bench` gives, for people: a line a row, with milliseconds an image, quartiles and ratio."""
    lines: list[str] = []
    for row in value["rows"]:
        title = f"{row['task']} ({row['device']}, optimised in {row['precision']}, {row['rounds']} rounds)"
        low, middle, high = (f"{1000 * t:.1f}" for t in (row["quartiles"][0], row["median"], row["quartiles"][1]))
        lines += [title] * (title not in lines)
        lines.append(f"  {row['name']:<24}{middle:>10} ms  ({low} to {high}){row['ratio']:>9.1f}x")
    return [*lines, f"{value['environment']['processor']}; {value['environment']['threads']} threads"]
