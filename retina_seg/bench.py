"""How fast, and against what: the original's way and this package's, taking turns in one run.

The ways take turns, round by round, so that a machine which slows down slows all of them; the first round warms up and is
not counted. What is asserted of a machine elsewhere is its median and quartiles, and ratios of medians of one run.

The original's way is its notebooks': float32, contiguous tensors, batch 1 in evaluation, batch 2 in training, eager, a
`.item()` at every step, scores by five passes of scikit-learn, memory as the system's allocator gives and takes it: so it
runs in a process of its own, while the others wait. Its code is re-enacted here, not copied. Because the allocator makes
much of the difference, it is also measured with memory kept (`utils.memory_kept`) and nothing else changed.

What remains is shown beside it: the time that a network's multiply-adds alone would take at the speed of a large matrix
product on the same machine (the floor), and which operations the time of a pass goes to (the profile).
"""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from retina_seg import synthetic
from retina_seg.data import TrainingPhotos, list_pairs
from retina_seg.folder import segment_files
from retina_seg.fused import inference_network
from retina_seg.images import read_photo, write_picture
from retina_seg.loss import DiceBCELoss, dice_bce_loss
from retina_seg.model import build_model, count_arithmetic, count_parameters, load_model
from retina_seg.predict import Segmenter, find_checkpoint, photo_batch
from retina_seg.test import score_pairs
from retina_seg.train import TrainConfig, make_optimizer, train
from retina_seg.utils import (
    UserError,
    choose_device,
    choose_precision,
    create_dir,
    environment,
    memory_kept,
    training_layout,
    write_json,
)
from retina_seg.visualize import strip

ORIGINAL = "the original's way"
KEPT = "the same, memory kept"
SAME = "its weights, our way"


class Apart:
    """A way in a process of its own, whose memory is as the system's allocator has it; `make(*arguments)` gives it there."""

    def __init__(self, make: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, context, initializer=_set_up, initargs=(make, arguments))

    def timed(self) -> tuple[float, Any]:
        """Seconds and result of the way, run there now."""
        return self._process.submit(_timed).result()

    def close(self) -> None:
        self._process.shutdown()


_APART: list[Callable[[], Any]] = []  # the way of this process; filled in the processes of `Apart` only


def _set_up(make: Callable[..., Callable[[], Any]], arguments: tuple) -> None:
    _APART.append(make(*arguments))


def _timed(way: Callable[[], Any] | None = None) -> tuple[float, Any]:
    """Seconds and result of `way`. It runs twice, and the second time counts: the first one finds the caches of another."""
    way = way or _APART[0]
    way()
    start = time.perf_counter()
    result = way()
    return time.perf_counter() - start, result


def take_turns(
    ways: dict[str, Callable[[], Any] | Apart], rounds: int, progress: Any = None, kept: bool = True
) -> dict[str, list[float]]:
    """Seconds of every way in every round but the first, which warms up; on a GPU the ways must wait for it themselves.

    Those of this process keep their memory where `kept` (`utils.memory_kept`), as training and testing do.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with memory_kept() if kept else contextlib.nullcontext():
        for number in range(rounds + 1):
            for name, way in ways.items():
                took, _ = way.timed() if isinstance(way, Apart) else _timed(way)
                if number:
                    seconds[name].append(took)
                if progress is not None:
                    progress.update()
    return seconds


def rows(task: str, seconds: dict[str, list[float]], units: int = 1, **more: Any) -> list[dict[str, Any]]:
    """A row a way: median and quartiles of the seconds a unit, and how many times faster than the first way."""
    medians = {name: float(np.median(values)) / units for name, values in seconds.items()}
    reference = next(iter(medians.values()))
    return [
        {
            "task": task,
            "way": name,
            "median": medians[name],
            "quartiles": [float(q) / units for q in np.quantile(values, (0.25, 0.75))],
            "ratio": reference / medians[name],
            "rounds": len(values),
            **more,
        }
        for name, values in seconds.items()
    ]


def bench(
    output: str | Path = "results/bench",
    rounds: int = 7,
    photos: int = 20,
    size: int = 512,
    original: str | Path | None = None,
    fast: str | Path = "drive",
    data: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    growth: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure, and write `bench.json` to `output`.

    Args:
        rounds: how often each way is measured; a whole test three times at most.
        photos, size: of the synthetic test set; size is the side of what the forward pass and the training step see.
        original: a checkpoint of the original's network; None: freshly initialised weights, whose scores mean nothing
            (their speed is the same).
        fast: as `Segmenter.load` takes it.
        data: test photos of this set instead of synthetic ones.
        device: "auto" measures the processor, and the first GPU too where there is one.
        growth: also steps a second and memory for batches, windows and loader workers.

    Returns:
        What bench.json holds: "rows" (see `rows`), "floors", "profile", "agreement", "networks", "growth", "environment".

    Raises:
        UserError: a number that cannot be, no such checkpoint or set.
    """
    for name, value in (("rounds", rounds), ("photos", photos)):
        if value < 1:
            raise UserError(f"--{name} {value}: must be 1 at least")
    if size < 64 or size % 8:
        raise UserError(f"--size {size}: must be a multiple of 8 from 64 on")
    first = choose_device("cpu" if device == "auto" else device)
    network = build_model("attention_unet").eval() if original is None else load_model(find_checkpoint(original))[0]
    if not hasattr(network, "finaloutput"):
        raise UserError(f"{original}: is not the original's network; give a checkpoint of the recipe notebook")
    light = load_model(find_checkpoint(fast))[0]
    small = load_model(find_checkpoint("tiny"))[0]
    networks = {ORIGINAL: network, KEPT: network, SAME: network, "fast": light, "tiny": small}
    output = create_dir(output)
    devices = [first]
    if device == "auto" and torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    value: dict[str, Any] = {"rows": [], "floors": [], "profile": []}
    for where in devices:
        how = choose_precision(precision, where)
        named = {"device": str(where), "precision": str(how).removeprefix("torch.")}
        value["rows"] += [{**row, **named} for row in bench_forward(networks, size, rounds, where, how, progress)]
        value["rows"] += [{**row, **named} for row in bench_steps(networks, size, rounds, where, how, progress)]
        value["floors"] += [{**row, **named} for row in floors(networks, size, where, how)]
        profiled = {name: network for name, network in networks.items() if name != KEPT}  # the original's operations
        value["profile"] += [{**row, **named} for row in profile_forward(profiled, size, where, how)]
    how = choose_precision(precision, first)
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            synthetic.write_set(Path(scratch, "set"), 1, photos, (size, size), progress=progress)
            data = Path(scratch, "set")
        pairs = list_pairs(data, "test")[:photos]
        if len(pairs) < photos:
            pairs = (pairs * photos)[:photos]
        tested, agreement = bench_test(network, light, fast, pairs, Path(scratch), min(rounds, 3), first, how, progress)
        predicted = bench_predict(fast, pairs, Path(scratch), rounds=2, device=first, precision=how)
        named = {"device": str(first), "precision": str(how).removeprefix("torch.")}
        value["rows"] += [{**row, **named} for row in (*tested, *predicted)]
    value["agreement"] = agreement
    value["networks"] = {
        name: {
            "parameters": count_parameters(model),
            "multiply_adds": count_arithmetic(model, size, size),
            "side": size,
        }
        for name, model in (("attention_unet", network), ("fast_attention_unet", light), ("tiny", small))
    }
    value["environment"] = environment(first, how)
    write_json(output / "bench.json", value)
    if growth:
        value["growth"] = bench_growth(progress=progress)
        write_json(output / "bench.json", value)
    return value


# ---------------------------------------------------------------------------------------------------------------- forward


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench_forward(
    networks: dict[str, nn.Module],
    size: int,
    rounds: int,
    device: torch.device,
    precision: torch.dtype,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """A forward pass of each of `networks`, by the name of its way, on one photo (size, size); the answer on the processor."""
    ways = _forward_ways(networks, size, device, precision)
    bar = tqdm(total=len(ways) * (rounds + 1), desc=f"forward, {device}", disable=not progress)
    with contextlib.closing(Apart(_originals_forward, networks[ORIGINAL], size, device)) as apart, bar:
        return rows("forward", take_turns({**ways, ORIGINAL: apart}, rounds, bar))


def _originals_forward(network: nn.Module, size: int, device: torch.device) -> Callable[[], None]:
    eager = copy.deepcopy(network).to(device).eval()
    # contiguous, as the original's loader gives it
    photo = photo_batch(synthetic.draw_photo(0, size, size).photo, device).contiguous()

    def once() -> None:
        with torch.no_grad():
            torch.sigmoid(eager(photo)).cpu()

    return once


def _forward_ways(
    networks: dict[str, nn.Module], size: int, device: torch.device, precision: torch.dtype
) -> dict[str, Callable[[], None]]:
    batch = photo_batch(synthetic.draw_photo(0, size, size).photo, device).to(precision)

    def ours(network: nn.Module) -> Callable[[], None]:
        ready = inference_network(network.eval(), device, precision)

        def once() -> None:
            with torch.inference_mode():
                torch.sigmoid(ready(batch).float()).cpu()

        return once

    return {
        name: _originals_forward(network, size, device) if name in (ORIGINAL, KEPT) else ours(network)
        for name, network in networks.items()
    }


def matrix_speed(device: torch.device, precision: torch.dtype, side: int = 2048) -> float:
    """Multiply-adds a second of a product of two (side, side) matrices: the best of five, what this machine can do."""
    a, b = (torch.rand(side, side, device=device).to(precision) for _ in "ab")
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return side**3 / min(seconds[1:])


def floors(
    networks: dict[str, nn.Module], size: int, device: torch.device, precision: torch.dtype
) -> list[dict[str, Any]]:
    """For our ways, the seconds that the multiply-adds of a forward pass on (size, size) take at `matrix_speed`."""
    speed = matrix_speed(device, precision)
    return [
        {"way": name, "seconds": count_arithmetic(network, size, size) / speed, "multiply_adds_per_second": speed}
        for name, network in networks.items()
        if name not in (ORIGINAL, KEPT)
    ]


def profile_forward(
    networks: dict[str, nn.Module], size: int, device: torch.device, precision: torch.dtype, top: int = 5
) -> list[dict[str, Any]]:
    """For every way, the `top` operations by their share of the time of ten forward passes, as torch's profiler counts it."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    result = []
    for name, way in _forward_ways(networks, size, device, precision).items():
        way()
        with profile(activities=activities) as profiler:
            for _ in range(10):  # a single one may be held up anywhere
                way()
        attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        times = {event.key: getattr(event, attribute) for event in profiler.key_averages()}
        whole = sum(times.values()) or 1
        first = sorted(times, key=times.get, reverse=True)[:top]
        result.append({"way": name, "shares": {key.removeprefix("aten::"): times[key] / whole for key in first}})
    return result


# ------------------------------------------------------------------------------------------------------------------ steps


def bench_steps(
    networks: dict[str, nn.Module],
    size: int,
    rounds: int,
    device: torch.device,
    precision: torch.dtype,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """A training step on two photos (size, size) that are in memory: forward, loss, backward, optimizer."""
    drawn = [synthetic.draw_photo(seed, size, size) for seed in (0, 1)]
    photos = torch.cat([photo_batch(item.photo, torch.device("cpu")) for item in drawn]).contiguous()
    masks = torch.stack([torch.from_numpy(item.mask)[None].float() / 255 for item in drawn])

    def ours(source: nn.Module, config: TrainConfig) -> Callable[[], None]:
        model = copy.deepcopy(source).to(device, memory_format=training_layout(device, precision)).train()
        optimizer = make_optimizer(model, config)

        def once() -> None:
            train(model, [(photos, masks)], optimizer, dice_bce_loss, device, precision, config.clip)
            _wait(device)

        return once

    recipes = {SAME: TrainConfig.notebook(), "fast": TrainConfig.fast(), "tiny": TrainConfig.tiny()}
    original = (networks[ORIGINAL], photos, masks, device)
    bar = tqdm(total=len(networks) * (rounds + 1), desc=f"training step, {device}", disable=not progress)
    with contextlib.closing(Apart(_originals_step, *original)) as apart, bar:
        ways = {ORIGINAL: apart, KEPT: _originals_step(*original)}
        ways |= {name: ours(networks[name], recipe) for name, recipe in recipes.items()}
        return rows("training step, a photo", take_turns(ways, rounds, bar), units=2)


def _originals_step(network: nn.Module, photos: Tensor, masks: Tensor, device: torch.device) -> Callable[[], None]:
    model = copy.deepcopy(network).to(device).train()
    optimizer, loss_fn = torch.optim.Adam(model.parameters(), lr=1e-4), DiceBCELoss()
    photos, masks = photos.clone(), masks.clone()  # what another process sends is memory shared with it

    def once() -> None:
        x, y = photos.to(device), masks.to(device)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        loss.item()

    return once


# ------------------------------------------------------------------------------------------------------------- whole test


def originals_test(network: nn.Module, pairs: list[Any], folder: Path, size: int = 512) -> list[list[float]]:
    """The original's test loop: one photo at a time, five sklearn passes, a strip written. Its five scores a photo."""
    from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score

    # zero_division: the same 0 as by default, without a warning
    four = [partial(score, zero_division=0) for score in (jaccard_score, f1_score, recall_score, precision_score)]
    five = (*four, accuracy_score)
    folder.mkdir(parents=True, exist_ok=True)
    scores = []
    for pair in pairs:
        photo = cv2.imread(str(pair.image), cv2.IMREAD_COLOR)
        label = cv2.imread(str(pair.mask), cv2.IMREAD_GRAYSCALE)
        if label.shape != (size, size):
            photo, label = (cv2.resize(picture, (size, size)) for picture in (photo, label))
        x = torch.from_numpy(np.transpose(photo, (2, 0, 1))[None].astype(np.float32) / 255)
        y = torch.from_numpy(label[None, None].astype(np.float32) / 255)
        with torch.no_grad():
            answer = torch.sigmoid(network(x))
        true, predicted = ((tensor.numpy() > 0.5).astype(np.uint8).reshape(-1) for tensor in (y, answer))
        passes = [how(true, predicted) for how in five]
        scores.append([float(score) for score in passes])
        vessels = (answer[0, 0].numpy() > 0.5).astype(np.uint8) * 255
        line = strip(photo, label, vessels)
        cv2.imwrite(str(folder / f"{pair.name}.png"), line)
    return scores


def bench_test(
    network: nn.Module,
    light: nn.Module,
    fast: str | Path,
    pairs: list[Any],
    scratch: Path,
    rounds: int,
    device: torch.device,
    precision: torch.dtype,
    progress: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A whole test, files to scores and pictures, and how the scores of the same weights agree.

    Ours does more: AUC, MCC and clDice over frame and field of view besides the five, and an error overlay a photo.
    """
    kind = {"device": str(device), "precision": str(precision).removeprefix("torch.")}
    segmenters = {
        SAME: Segmenter(copy.deepcopy(network), **kind),
        "fast": Segmenter.load(find_checkpoint(fast), **kind),
        "fast, at 512x512": Segmenter(copy.deepcopy(light), **kind),
        "tiny": Segmenter.load("tiny", **kind),
    }
    results: dict[str, Any] = {}

    def our(name: str) -> Callable[[], None]:
        def once() -> None:
            pictures = scratch / name.replace(",", "").replace(" ", "-")
            results[name] = score_pairs(segmenters[name], pairs, "notebook", 0.5, pictures, progress=False)

        return once

    bar = tqdm(total=(rounds + 1) * (1 + len(segmenters)), desc="whole test", disable=not progress)
    with contextlib.closing(Apart(partial, originals_test, network, pairs, scratch / "original")) as apart, bar:
        # scoring keeps its memory by itself
        seconds = take_turns({ORIGINAL: apart, **{name: our(name) for name in segmenters}}, rounds, bar, kept=False)
        _, theirs = apart.timed()
    full = score_pairs(Segmenter(copy.deepcopy(network), device="cpu", precision="float32"), pairs, progress=False)
    agreement = {
        "f1_original": float(np.mean([score[1] for score in theirs])),
        "f1_ours_float32": full["frame"]["mean"]["f1"],
        f"f1_ours_{kind['precision']}": results[SAME]["frame"]["mean"]["f1"],
    }
    return rows("whole test, a photo", seconds, units=len(pairs), photos=len(pairs)), agreement


def bench_predict(
    fast: str | Path, pairs: list[Any], scratch: Path, rounds: int, device: torch.device, precision: torch.dtype
) -> list[dict[str, Any]]:
    """A folder of photos to a folder of three pictures each, and its parts one after the other."""
    segmenter = Segmenter.load(
        find_checkpoint(fast), device=str(device), precision=str(precision).removeprefix("torch.")
    )
    files = list(dict.fromkeys(pair.image for pair in pairs))
    photos = [read_photo(path) for path in files]
    answers = [segmenter(photo) for photo in photos]

    def write() -> None:
        for photo, answer in zip(photos, answers, strict=True):
            write_picture(scratch / "one.png", (answer > 0.5).astype(np.uint8) * 255)
            write_picture(scratch / "two.png", (answer * 65535).astype(np.uint16))
            write_picture(scratch / "three.png", photo)

    ways = {
        "predict": lambda: segment_files(segmenter, files, scratch / "vessels", overwrite=True, progress=False),
        "of it: decode": lambda: [read_photo(path) for path in files],
        "of it: network": lambda: [segmenter(photo) for photo in photos],
        "of it: write": write,
    }
    return rows("predict, a photo", take_turns(ways, rounds, kept=False), units=len(files), photos=len(files))


# ----------------------------------------------------------------------------------------------------------------- growth

GROWTH = [
    *({"batch": batch, "side": 256, "workers": 0} for batch in (1, 2, 4, 8, 16)),
    *({"batch": 4, "side": side, "workers": 0} for side in (128, 384, 512)),
    *({"batch": 4, "side": 256, "workers": workers} for workers in (1, 2)),
]


def bench_growth(steps: int = 12, progress: bool = True) -> list[dict[str, Any]]:
    """Steps a second of the fast recipe, loading included, and the process's peak memory, each in a process of its own."""
    # an executor's processes, unlike a pool's, may have children of their own: the loader's workers
    context, result = multiprocessing.get_context("spawn"), []
    for point in tqdm(GROWTH, desc="growth", disable=not progress):
        with ProcessPoolExecutor(1, mp_context=context) as one:
            result.append({**point, **one.submit(measure_point, point, steps).result()})
    return result


def measure_point(point: dict[str, int], steps: int) -> dict[str, float | None]:
    """{"steps_per_second", "peak_memory_gb"} of training `fast` at `point`: batch, side of the windows, loader workers."""
    from torch.utils.data import DataLoader

    with tempfile.TemporaryDirectory() as scratch:
        synthetic.write_set(Path(scratch, "set"), 2, 1, (640, 640), progress=False)
        photos = TrainingPhotos(list_pairs(Path(scratch, "set"), "train"), None, point["side"], repeats=10_000)
    device = torch.device("cpu")
    precision = choose_precision("auto", device)
    config = TrainConfig.fast()
    model = build_model(config.model, **config.model_arguments)
    model = model.to(memory_format=training_layout(device, precision))
    optimizer = make_optimizer(model, config)
    loader = DataLoader(photos, point["batch"], num_workers=point["workers"])
    stamps: list[float] = []

    def some() -> Iterator[Any]:
        for number, batch in enumerate(loader):
            if number == steps + 2:
                return
            yield batch

    train(
        model,
        some(),
        optimizer,
        dice_bce_loss,
        device,
        precision,
        config.clip,
        lambda _: stamps.append(time.perf_counter()),
    )
    gc.collect()
    # the first two steps fill caches
    return {"steps_per_second": (len(stamps) - 2) / (stamps[-1] - stamps[1]), "peak_memory_gb": _peak_memory()}


def _peak_memory() -> float | None:
    """The most memory that this process has held, GB; None where the system does not say (it is not Linux)."""
    try:  # not getrusage: there a process starts with the peak of the one that started it
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**20
    except (OSError, StopIteration):
        return None


# ------------------------------------------------------------------------------------------------------------------ table


def table(value: dict[str, Any]) -> list[str]:
    """bench.json for people: a line a way, with seconds, quartiles, and how many times faster."""
    lines = []
    task = None
    for row in value["rows"]:
        if (row["task"], row["device"]) != task:
            task = (row["task"], row["device"])
            lines.append(f"{row['task']} ({row['device']}, ours in {row['precision']}, {row['rounds']} rounds)")
        low, high = row["quartiles"]
        lines.append(
            f"  {row['way']:<24}{row['median'] * 1000:>10.1f} ms  ({low * 1000:.1f} to {high * 1000:.1f})"
            f"{row['ratio']:>9.1f}x"
        )
    agreement = ", ".join(f"{name.removeprefix('f1_')} {score:.5f}" for name, score in value["agreement"].items())
    lines.append(f"F1 of the same weights: {agreement}")
    lines += [
        f"floor of a forward pass ({row['device']}, {row['precision']}), {row['way']}: {row['seconds'] * 1000:.1f} ms, "
        f"at {row['multiply_adds_per_second'] / 1e9:.0f} thousand million multiply-adds a second"
        for row in value["floors"]
    ]
    lines += [
        f"time of a forward pass ({row['device']}), {row['way']}: "
        + ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
        for row in value["profile"]
    ]
    for name, network in value["networks"].items():
        lines.append(
            f"{name}: {network['parameters']:,} parameters, {network['multiply_adds'] / 1e9:.1f} thousand million "
            f"multiply-adds at {network['side']}x{network['side']}"
        )
    for point in value.get("growth", []):
        lines.append(
            f"  training fast: batch {point['batch']:>2}, windows {point['side']}, {point['workers']} workers: "
            f"{point['steps_per_second']:.2f} steps/s"
            + (f", {point['peak_memory_gb']:.2f} GB" if point["peak_memory_gb"] else "")
        )
    return lines
