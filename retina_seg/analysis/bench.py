"""Speed of the original (the baseline) and of this package, in turns, so that a machine that slows down slows all.

The baseline is the original's notebooks: float32, contiguous tensors, batch size 1, eager, scores by five passes of
scikit-learn. It runs in a process of its own, with memory as the system's allocator has it; "baseline, memory kept" adds
`device.memory_kept` alone. Its code is written anew, not copied.
"""

import contextlib
import copy
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from retina_seg.config import ENGINE_PRECISIONS, ENGINES
from retina_seg.data import Pair, list_pairs
from retina_seg.device import choose_device, environment, has_bfloat16_units, memory_kept
from retina_seg.inference.batch import predict_images
from retina_seg.inference.engine import image_batch
from retina_seg.inference.segmenter import Segmenter
from retina_seg.model import build_model
from retina_seg.sets.synthetic import synthetic_image, write_set
from retina_seg.test import score_pairs
from retina_seg.utils import UserError, output_folder, write_json
from retina_seg.visualize import strip

BASELINE, KEPT, SAME = "baseline", "baseline, memory kept", "same weights"
WEIGHTS = ("drive", "tiny", "general")
Call = Callable[[], Any]
# name, images of a call, calls by name, what makes the baseline's
Task = tuple[str, int, dict[str, Call], Callable[[], Call]]


def bench(
    output: str | Path, rounds: int = 5, images: int = 20, size: int = 512, device: str = "cpu", progress: bool = True
) -> dict[str, Any]:
    """Measure a forward pass, a call, a whole test and a folder of images; write `output`/bench.json.

    Args:
        rounds: how often each is measured.
        images, size: the number of synthetic images, and their side in pixels.
        device: as `device.choose_device` takes it.

    Returns what the file holds, "rows" as `measure` gives them. Raises `UserError`: a number that cannot be, no such device.
    """
    if min(rounds, images) < 1 or size < 64 or size % 8:
        raise UserError(f"--rounds {rounds}, --images {images}: from 1 on; --size {size}: a multiple of 8 from 64 on")
    where, rows = choose_device(device), list[dict[str, Any]]()
    with output_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        pairs = list_pairs(write_set(Path(scratch, "set"), 1, images, (size, size), progress=False), "test")
        for task in tasks(size, pairs, Path(scratch), where):
            rows += measure(task, where, rounds, progress)
    value = {"rows": rows, "size": size, "environment": environment(where, torch.float32)}
    write_json(folder / "bench.json", value)
    return value


def variants(network: nn.Module, device: torch.device) -> dict[str, Segmenter]:
    """The original's network and the pretrained ones, in every engine and precision that can be had on `device`."""
    segmenters = {}
    for name, engine, precision in product((SAME, *WEIGHTS), ENGINES[1:], ENGINE_PRECISIONS[1:]):
        how = {"device": str(device), "engine": engine, "precision": precision}
        with contextlib.suppress(UserError):
            segmenter = Segmenter(network, **how) if name == SAME else Segmenter.load(name, **how)  # type: ignore[arg-type]
            if precision != "bfloat16" or has_bfloat16_units(device):
                segmenters[f"{name}, {engine}, {precision}"] = segmenter
    return segmenters


def tasks(size: int, pairs: list[Pair], scratch: Path, device: torch.device) -> list[Task]:
    """A forward pass on an image (size, size), a call of the segmenter, a whole test, and what `predict` does with a folder.

    The test gives more scores and images than the baseline's. Call and folder have the baselines of forward pass and test.
    """
    network, image = build_model("attention_unet"), synthetic_image(0, size, size).image
    forward = partial(baseline_forward, network, size, device)
    test = partial(baseline_test, network, pairs, scratch, device)
    forwards, calls, tests, folders = {KEPT: forward()}, dict[str, Call](), dict[str, Call](), dict[str, Call]()
    for name, segmenter in variants(network, device).items():
        forwards[name], calls[name] = partial(segmenter.network, image), partial(segmenter, image)
        tests[name] = partial(score_pairs, segmenter, pairs, "notebook", 0.5, scratch / name, progress=False)
        inputs, output = [pair.image for pair in pairs], scratch / f"{name}, folder"
        folders[name] = partial(predict_images, segmenter, inputs, output, True, progress=False)
    return [
        ("forward", 1, forwards, forward),
        ("call", 1, calls, forward),
        ("test, an image", len(pairs), tests, test),
        ("folder, an image", len(pairs), folders, test),
    ]


def measure(task: Task, device: torch.device, rounds: int, progress: bool) -> list[dict[str, Any]]:
    """A row a call: median and quartiles over the rounds, the first left out, of its seconds an image.

    "ratio" is the baseline's median by the row's own; the baseline runs in a process of its own.
    """
    title, images, calls, baseline = task
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process, memory_kept():
        timers: dict[str, Callable[[], float]] = {BASELINE: lambda: process.submit(timed, baseline).result()}
        timers |= {name: partial(timed, partial(calls.__getitem__, name)) for name in calls}
        turns = tqdm(list(timers.values()) * (rounds + 1), f"{title}, {device}", disable=not progress)
        seconds = np.reshape([timer() / images for timer in turns], (rounds + 1, len(timers)))
    lows, medians, highs = np.quantile(seconds[1:], (0.25, 0.5, 0.75), axis=0).tolist()
    rows = []
    for name, low, median, high in zip(timers, lows, medians, highs, strict=True):
        row = {"task": title, "name": name, "median": median, "quartiles": [low, high], "ratio": medians[0] / median}
        rows.append(row | {"rounds": rounds, "device": str(device)})
    return rows


def timed(make: Callable[[], Call]) -> float:
    """Seconds of the call that `make` gives, the second time: the first one finds another's data in the caches."""
    call = make()
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def baseline_forward(network: nn.Module, size: int, device: torch.device) -> Call:
    """The original's forward pass."""
    eager = copy.deepcopy(network).to(device).eval()
    image = image_batch(synthetic_image(0, size, size).image, device).contiguous()  # as the original's loader gives it
    return torch.no_grad()(lambda: torch.sigmoid(eager(image)).cpu())


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
        title = f"{row['task']} ({row['device']}, {row['rounds']} rounds)"
        low, middle, high = (f"{1000 * t:.1f}" for t in (row["quartiles"][0], row["median"], row["quartiles"][1]))
        lines += [title] * (title not in lines)
        lines.append(f"  {row['name']:<34}{middle:>8} ms  ({low} to {high}){row['ratio']:>9.1f}x")
    return [*lines, f"{value['environment']['processor']}; {value['environment']['threads']} threads"]
