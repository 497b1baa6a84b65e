"""Score a network on a dataset (the original's `test`): over the frame and in the field of view, by a `Protocol`."""

import contextlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from retina_seg import visualize
from retina_seg.checkpoint import find_weights, load_checkpoint, weights_id
from retina_seg.config import check_threshold
from retina_seg.data import Pair
from retina_seg.device import environment, images_at_once
from retina_seg.images import read_image, write_image
from retina_seg.inference.protocol import Sample, get_protocol, predict_pairs
from retina_seg.inference.segmenter import Segmenter
from retina_seg.metrics import SCORES, SetScores, count, score_image, scores_from_counts
from retina_seg.model import count_parameters
from retina_seg.runs import scored_pairs, unfinished
from retina_seg.sets.files import Data
from retina_seg.sets.layout import check_masks
from retina_seg.utils import Rows, UserError, format_number, output_folder, read_json, user_path, write_csv, write_json
from retina_seg.visualize import REGION_NAMES, mask_parse

__all__ = ["calculate_metrics", "mask_parse", "score_pairs", "test"]
ORIGINAL_FIVE = {"Jaccard": "jaccard", "F1": "f1", "Recall": "recall", "Precision": "precision", "Acc": "accuracy"}


def calculate_metrics(y_true: Any, y_pred: Any) -> list[float]:
    """The original's [jaccard, f1, recall, precision, accuracy] of two arrays or tensors, cut at 0.5; 0 where undefined."""
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
        pictures: a folder for strips (`<name>.png`) and error overlays (`<name>_errors.png`).

    Returns "frame", "fov", "second_observer" (maybe empty) and "images" as in metrics.json; "threshold"; "seconds", the
    mean over images; "rankings": region -> `RankingHistogram`. Raises `UserError` as `predict_pairs`.
    """
    how = get_protocol(protocol)
    threshold = check_threshold(threshold if threshold is not None else how.threshold or segmenter.threshold)

    def score(sample: Sample) -> tuple:
        predicted, second = sample.probability > threshold, sample.second_observer
        regions = {"frame": None, "fov": sample.fov}
        network = score_image(sample.mask, predicted, sample.probability, regions)
        observer = None if second is None else score_image(sample.mask, second, None, regions)
        if folder:
            strip = visualize.strip(sample.image, sample.mask.astype(np.uint8) * 255, predicted.astype(np.uint8) * 255)
            write_image(folder / f"{sample.name}.png", strip)
            errors = visualize.error_overlay(sample.image, sample.mask, predicted, regions[how.region])
            write_image(folder / f"{sample.name}_errors.png", errors)
        row = {"name": sample.name, **{region: network[region].scores for region in regions}, "seconds": sample.seconds}
        return row, network, observer

    with output_folder(pictures) if pictures else contextlib.nullcontext() as folder:
        scored = predict_pairs(segmenter, pairs, how, score)
        bar = tqdm(scored, "testing", len(pairs), unit="image", disable=not progress)
        rows, network, observer = zip(*bar, strict=True)
    observed = [scores for scores in observer if scores is not None]
    sets = {region: SetScores([scores[region] for scores in network]) for region in REGION_NAMES}
    second = {region: SetScores([scores[region] for scores in observed]).summary() for region in REGION_NAMES}
    return {
        **{region: scores.summary() for region, scores in sets.items()},
        "second_observer": second | {"images": len(observed)} if observed else {},
        "images": list(rows),
        "threshold": threshold,
        "seconds": float(np.mean([row["seconds"] for row in rows])),
        "rankings": {region: scores.ranking for region, scores in sets.items()},
    }


class Scores(dict[str, Any]):
    """What metrics.json holds; and `rankings`, region -> `RankingHistogram` for ROC curves (`visualize.ranking_curves`)."""

    rankings: dict[str, Any]

    @property
    def rows(self) -> Rows:
        """A row an image, as in metrics.csv: "name", "<region>_<score>" and "seconds"."""
        columns = [(region, score) for region in REGION_NAMES for score in SCORES]
        return Rows(
            {"name": row["name"], **{f"{r}_{s}": row[r][s] for r, s in columns}, "seconds": row["seconds"]}
            for row in self["images"]
        )

    @property
    def table(self) -> Any:
        """`rows` as a pandas DataFrame where pandas is installed, else as they are."""
        return self.rows.table


def test(
    checkpoint: Any,
    data: Data,
    output: str | Path | None = None,
    protocol: str = "notebook",
    threshold: float | None = None,
    part: str = "test",
    progress: bool = True,
    pictures: bool = True,
    **options: Any,
) -> Scores:
    """Score `checkpoint` on one part of the dataset at `data`; writes metrics.json (returned), metrics.csv, pictures.

    Args:
        checkpoint, options: as `Segmenter.load` takes them; precision float32 unless given. Or what `fit` gave back, a
            network, or a `Segmenter`.
        output: the folder to write to; None: write nothing.
        part: "test", or "validation": the training images that the run `checkpoint` held out.
        pictures: whether to write `images/`, `contact_sheet.png` (worst image first) and `curves_test.png`.

    Raises `UserError` as what it calls, or where `output` holds scores of other weights, options or images.
    """
    checkpoint, how = getattr(checkpoint, "folder", checkpoint), get_protocol(protocol)
    folder, options = None if output is None else user_path(output), {"precision": "float32", **options}
    what: dict[str, Any] = {"name": protocol, "data": str(data), "part": part}
    if isinstance(checkpoint, (str, Path)):
        path = find_weights(checkpoint)
        segmenter, notes, identity = Segmenter.load(path, **options), load_checkpoint(path), weights_id(path)
        model = {"epoch": notes.get("epoch"), "unfinished": unfinished(path, notes.get("epoch")), "weights": identity}
        own = folder and path.name == "checkpoint.pth" and folder.resolve().is_relative_to(path.parent.resolve())
        what["weights"] = "of this run" if own else identity
    else:
        segmenter = checkpoint if isinstance(checkpoint, Segmenter) else Segmenter(checkpoint, **options)
        notes, model, path = {"model": type(segmenter.model).__name__}, {}, None
    pairs = scored_pairs(checkpoint, data, part)
    what |= {"tta": segmenter.tta, "working_size": options.get("working_size"), "given_threshold": threshold}
    what["style"] = options.get("style") or notes.get("style")
    if folder and (there := folder / "metrics.json").exists():
        before = read_json(there).get("protocol", {})
        if other := [key for key, value in what.items() if before.get(key, "none") != value]:
            raise UserError(f"{there}: holds other scores ({', '.join(other)}); choose another --output")
    for line in check_masks(pairs):
        tqdm.write(line)
    images = folder / "images" if folder and pictures else None
    with output_folder(folder) if folder else contextlib.nullcontext():
        result = score_pairs(segmenter, pairs, protocol, threshold, images, progress)
    chosen = "given" if threshold is not None else "fixed" if how.threshold else notes.get("threshold_from", "fixed")
    what |= {"size": f"{how.size[1]}x{how.size[0]}" if how.size else "native", "threshold": result["threshold"]}
    what |= {"threshold_from": chosen, "selected_on": notes.get("selected_on", "unknown"), "images": len(pairs)}
    model |= {"name": notes["model"], "parameters": count_parameters(segmenter.model), "style": what["style"]}
    model |= {"checkpoint": str(checkpoint if path else segmenter), "frame": segmenter.frame.to_dict()}
    speed = {"images_per_second": images_at_once(segmenter.device) / result["seconds"]}
    speed |= environment(segmenter.device, segmenter.precision) | {"engine": segmenter.engine}
    scores = {key: result[key] for key in ("frame", "fov", "second_observer", "images") if result[key]}
    value = Scores({"protocol": what, "model": model, **scores, "speed": speed})
    value.rankings = result["rankings"]
    if folder is None:
        return value
    write_json(folder / "metrics.json", value)
    rows = value.rows
    write_csv(folder / "metrics.csv", list(rows[0]), rows)
    if images:
        rows.sort(key=lambda row: np.nan_to_num(row["frame_f1"], nan=-1))
        errors = (read_image(images / f"{row['name']}_errors.png") for row in rows)
        captions = [f"{row['name']}  F1 {row['frame_f1']:.4f}" for row in rows]
        write_image(folder / "contact_sheet.png", visualize.contact_sheet(errors, captions))
        visualize.save_figure(folder / "curves_test.png", visualize.ranking_curves(result["rankings"]))
    return value


def original_lines(value: dict[str, Any]) -> list[str]:
    """The original's two lines: its five scores over the frame, and images a second."""
    mean = value["frame"]["mean"]
    five = " - ".join(f"{shown}: {format_number(mean[name])}" for shown, name in ORIGINAL_FIVE.items())
    return [five, f"FPS: {value['speed']['images_per_second']:.3f}"]


def table(value: dict[str, Any]) -> str:
    """The scores of metrics.json as a table for people: a row a region (and observer), a column a score."""
    short = {"average_precision": "avg prec", "specificity": "specif", "precision": "precis", "accuracy": "accur"}
    lines = [" " * 28 + "".join(f"{short.get(name, name):>9}" for name in SCORES)]
    for who, scores in (("network", value), ("2nd observer", value.get("second_observer", {}))):
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


class _CallableModule(ModuleType):
    __call__ = staticmethod(test)


# once anything has imported this module, `from retina_seg import test` gives the module, not its function
sys.modules[__name__].__class__ = _CallableModule
