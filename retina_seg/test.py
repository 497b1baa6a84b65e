"""Score a network on a dataset (the original's `test`): over the frame and in the field of view, by a `Protocol`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from retina_seg import visualize
from retina_seg.checkpoint import find_weights, load_checkpoint, unfinished, weights_id
from retina_seg.config import TrainConfig, check_threshold
from retina_seg.data import Pair, list_pairs
from retina_seg.device import environment, images_at_once
from retina_seg.images import read_image, write_image
from retina_seg.inference.protocol import Sample, get_protocol, predict_pairs
from retina_seg.inference.segmenter import Segmenter
from retina_seg.metrics import SCORES, SetScores, count, score_image, scores_from_counts
from retina_seg.model import count_parameters
from retina_seg.sets.layout import check_masks
from retina_seg.utils import (
    UserError,
    create_dir,
    format_number,
    output_folder,
    read_json,
    user_path,
    write_csv,
    write_json,
)
from retina_seg.visualize import REGION_NAMES, mask_parse

__all__ = ["calculate_metrics", "mask_parse", "score_pairs", "test"]
ORIGINAL_FIVE = {"Jaccard": "jaccard", "F1": "f1", "Recall": "recall", "Precision": "precision", "Acc": "accuracy"}


def calculate_metrics(y_true: Any, y_pred: Any) -> list[float]:
    """The original's: [jaccard, f1, recall, precision, accuracy] of two tensors or arrays of one size, both cut at 0.5.

    Each is in [0, 1]; 0 where it is undefined, as scikit-learn gives it.
    """
    arrays = (np.asarray(y.detach().cpu() if hasattr(y, "detach") else y).reshape(-1) > 0.5 for y in (y_true, y_pred))
    scores = scores_from_counts(count(*arrays))
    return [0.0 if math.isnan(scores[name]) else scores[name] for name in ORIGINAL_FIVE.values()]


def score_pairs(
    segmenter: Segmenter,
    pairs: Sequence[Pair],
    protocol: str = "notebook",
    threshold: float | None = None,
    pictures: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Segment and score every pair.

    Args:
        threshold: None: the protocol's own, else the segmenter's.
        pictures: a folder for strips (`<name>.png`) and error overlays (`<name>_errors.png`); None: none.

    Returns:
        "frame", "fov", "second_observer" (empty where there is none) and "images" as in metrics.json; "threshold";
        "seconds", the mean over images; "rankings": region -> `RankingHistogram`. Raises `UserError` as `predict_pairs`.
    """
    how = get_protocol(protocol)
    threshold = threshold if threshold is not None else how.threshold or segmenter.threshold
    check_threshold(threshold)
    folder = None if pictures is None else create_dir(pictures)

    def score(sample: Sample) -> tuple:
        predicted, second = sample.probability > threshold, sample.second_observer
        regions = {"frame": None, "fov": sample.fov}
        network = score_image(sample.mask, predicted, sample.probability, regions)
        observer = None if second is None else score_image(sample.mask, second, None, regions)
        if folder is not None:
            strip = visualize.strip(sample.image, np.uint8(sample.mask) * 255, np.uint8(predicted) * 255)
            write_image(folder / f"{sample.name}.png", strip)
            errors = visualize.error_overlay(sample.image, sample.mask, predicted, regions[how.region])
            write_image(folder / f"{sample.name}_errors.png", errors)
        row = {"name": sample.name, **{region: network[region].scores for region in regions}, "seconds": sample.seconds}
        return row, network, observer

    scored = predict_pairs(segmenter, pairs, how, score)
    rows, network, observer = zip(*tqdm(scored, "testing", len(pairs), unit="image", disable=not progress), strict=True)
    result: dict[str, Any] = {"images": list(rows), "threshold": threshold, "rankings": {}, "second_observer": {}}
    result["seconds"] = float(np.mean([row["seconds"] for row in rows]))
    observer = [scores for scores in observer if scores is not None]
    for region in REGION_NAMES:
        scores = SetScores([scores[region] for scores in network])
        result[region], result["rankings"][region] = scores.summary(), scores.ranking
        if observer:
            result["second_observer"][region] = SetScores([scores[region] for scores in observer]).summary()
            result["second_observer"]["images"] = len(observer)
    return result


def test(
    checkpoint: str | Path,
    data: str | Path,
    output: str | Path,
    protocol: str = "notebook",
    threshold: float | None = None,
    part: str = "test",
    progress: bool = True,
    pictures: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Score `checkpoint` on one part of the dataset at `data`; writes metrics.json (returned), metrics.csv, pictures.

    Args:
        checkpoint, options: as `Segmenter.load` takes them; precision float32 unless given, for the same scores everywhere.
        part: "test", or "validation": the training images that the run `checkpoint` held out.
        pictures: whether to write `images/`, `contact_sheet.png` (worst image first) and `curves_test.png`.

    Raises `UserError` as what it calls, or where `output` holds scores of other weights, options or images.
    """
    path, how, folder = find_weights(checkpoint), get_protocol(protocol), user_path(output)
    segmenter, notes = Segmenter.load(path, **{"precision": "float32", **options}), load_checkpoint(path)
    pairs = held_out_pairs(checkpoint, data) if part == "validation" else list_pairs(data, part)
    own = path.name == "checkpoint.pth" and folder.resolve().is_relative_to(path.parent.resolve())
    what = {"name": protocol, "data": str(data), "part": part, "weights": "of this run" if own else weights_id(path)}
    what |= {"tta": segmenter.tta, "working_size": options.get("working_size"), "given_threshold": threshold}
    what["style"] = options.get("style") or notes.get("style")
    there = read_json(folder / "metrics.json").get("protocol") if (folder / "metrics.json").exists() else what
    if other := [key for key, value in what.items() if not isinstance(there, dict) or there.get(key, "none") != value]:
        raise UserError(f"{folder / 'metrics.json'}: holds other scores ({', '.join(other)}); choose another --output")
    for line in check_masks(pairs):
        tqdm.write(line)
    images = folder / "images" if pictures else None
    with output_folder(images or folder):
        result = score_pairs(segmenter, pairs, protocol, threshold, images, progress)
    given = "given" if threshold is not None else "fixed" if how.threshold else notes.get("threshold_from", "fixed")
    what |= {"size": f"{how.size[1]}x{how.size[0]}" if how.size else "native", "threshold": result["threshold"]}
    what |= {"threshold_from": given, "selected_on": notes.get("selected_on", "unknown"), "images": len(pairs)}
    model = {"name": notes["model"], "parameters": count_parameters(segmenter.model), "checkpoint": str(checkpoint)}
    model |= {"epoch": notes.get("epoch"), "unfinished": unfinished(path, notes.get("epoch")), "style": what["style"]}
    model |= {"frame": segmenter.frame.to_dict(), "weights_id": weights_id(path)}
    speed = {"images_per_second": images_at_once(segmenter.device) / result["seconds"]}
    speed |= environment(segmenter.device, segmenter.precision)
    scores = {key: result[key] for key in ("frame", "fov", "second_observer", "images") if result[key]}
    value = {"protocol": what, "model": model, **scores, "speed": speed}
    write_json(folder / "metrics.json", value)
    columns = {f"{region}_{score}": (region, score) for region in REGION_NAMES for score in SCORES}
    rows = [row | {key: row[region][score] for key, (region, score) in columns.items()} for row in result["images"]]
    write_csv(folder / "metrics.csv", ["name", *columns, "seconds"], rows)
    if pictures:
        rows.sort(key=lambda row: -1 if math.isnan(row["frame_f1"]) else row["frame_f1"])
        errors = (read_image(folder / "images" / f"{row['name']}_errors.png") for row in rows)
        captions = [f"{row['name']}  F1 {row['frame_f1']:.4f}" for row in rows]
        write_image(folder / "contact_sheet.png", visualize.contact_sheet(errors, captions))
        visualize.save_figure(folder / "curves_test.png", visualize.ranking_curves(result["rankings"]))
    return value


def default_output(
    run: str | Path, protocol: str, part: str, tta: bool, working_size: int | None, style: str | None = None
) -> Path:
    """The folder for the scores of `run`: its own for the original's protocol on test images, else one inside it."""
    unusual = {part: part != "test", protocol: protocol != "notebook", "tta": tta, str(working_size): working_size}
    unusual |= {str(style): style}
    return Path(run, "-".join(name for name, here in unusual.items() if here))


def held_out_pairs(run: str | Path, data: str | Path) -> list[Pair]:
    """The images at `data` that the training in the folder `run` held out. Raises `UserError`: there are none, or not all."""
    path = user_path(run) / "config.json"
    names = read_json(path).get("validation") if path.exists() else None
    if not isinstance(names, list) or not names or TrainConfig.from_json(path).validation != "photos":
        raise UserError(f"{path}: held out no training photos; give the folder of a run with --validation photos")
    pairs = [pair for pair in list_pairs(data, "train") if pair.name in names]
    if len(pairs) < len(names):
        raise UserError(f"{data}: lacks training images that {run} held out; give the dataset it was trained on")
    return pairs


def original_lines(value: dict[str, Any]) -> list[str]:
    """The original's two lines: its five scores over the frame, and images a second."""
    mean = value["frame"]["mean"]
    five = " - ".join(f"{shown}: {format_number(mean[name])}" for shown, name in ORIGINAL_FIVE.items())
    return [five, f"FPS: {value['speed']['images_per_second']:.3f}"]


def table(value: dict[str, Any]) -> str:
    """The scores of metrics.json as a table for people: a row a region (and observer), a column a score."""
    short = {"average_precision": "avg prec", "specificity": "specif", "precision": "precis", "accuracy": "accur"}
    lines = [" " * 28 + "".join(f"{short.get(name, name):>9}" for name in SCORES)]
    for who, scores in (("network", value), ("2nd observer", value.get("second_observer"))):
        for region, shown in REGION_NAMES.items() if scores else ():
            numbers = "".join(f"{format_number(scores[region]['mean'][name]):>9}" for name in SCORES)
            lines.append(f"{who + ', ' + shown:<28}{numbers}")
    protocol, interval = value["protocol"], " to ".join(map(format_number, value["fov"]["ci95"]["f1"]))
    how = f"{protocol['size']}, threshold {protocol['threshold']:.2f} ({protocol['threshold_from']})"
    how += f", style {value['model']['style']}" if value["model"].get("style") else ""
    lines.append(f"means over {protocol['images']} images, {how}; F1 in the field of view: 95 % interval {interval}")
    if protocol["selected_on"] == "test":
        lines.append("note: the epoch was chosen on the test images, as in the original: these scores are optimistic")
    if value["model"].get("unfinished"):
        lines.append(f"note: {value['model']['unfinished']}")
    return "\n".join(lines)


class _CallableModule(type(sys)):
    __call__ = staticmethod(test)


# once anything has imported this module, `from retina_seg import test` gives the module, not its function
sys.modules[__name__].__class__ = _CallableModule
