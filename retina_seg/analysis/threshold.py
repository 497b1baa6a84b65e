"""The threshold to cut at, by training images that runs held out: of one run, or of every fold of a cross-validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from retina_seg import visualize
from retina_seg.data import Pair
from retina_seg.inference.protocol import get_protocol, predict_pairs
from retina_seg.inference.segmenter import Segmenter
from retina_seg.metrics import THRESHOLDS, threshold_scores
from retina_seg.test import held_out_pairs
from retina_seg.utils import UserError, create_dir, write_csv

F1_GIVEN_AWAY = 0.0005  # at most, for a higher accuracy
SCORES = ("f1", "recall", "precision", "accuracy")
Fold = tuple[str | Path, Sequence[Pair]]  # a run and the images that it held out


def held_out_folds(runs: Sequence[str | Path], data: str | Path) -> list[Fold]:
    """Every run of `runs` with the images of the dataset `data` that it held out.

    Raises `UserError`: a run held out nothing, or an image that another run has held out too.
    """
    folds = [(run, held_out_pairs(run, data)) for run in runs]
    counts = Counter(pair.name for _, pairs in folds for pair in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        holders = " and ".join(str(run) for run, pairs in folds if twice[0] in [pair.name for pair in pairs])
        raise UserError(f"{holders}: both hold out {twice[0]}; give the folds of one draw (train --fold 0, 1, …)")
    return folds


def threshold_curves(
    folds: Sequence[Fold], protocol: str = "native", progress: bool = True, **options: Any
) -> dict[str, np.ndarray]:
    """Scores by threshold, means over the images of all folds, in the protocol's region.

    Args:
        folds: a run (as `Segmenter.load` takes it) and the pairs to score with it, each.
        options: as `Segmenter` takes them; precision float32 unless given.

    Returns:
        "f1", "recall", "precision", "accuracy": (99,) float64 in [0, 1] for `metrics.THRESHOLDS`, NaN where no image
        defines it. Raises `UserError` as `Segmenter.load` and `predict_pairs`.
    """
    how = get_protocol(protocol)

    def scored() -> Iterator[dict[str, np.ndarray]]:
        for run, pairs in folds:
            segmenter = Segmenter.load(run, **{"precision": "float32", **options})
            yield from predict_pairs(segmenter, pairs, how, lambda sample: threshold_scores(*sample.pixels(how.region)))

    count = sum(len(pairs) for _, pairs in folds)
    rows = list(tqdm(scored(), "held-out images", count, unit="image", disable=not progress))
    return {name: np.ma.masked_invalid([row[name] for row in rows]).mean(0).filled(np.nan) for name in SCORES}


def choose(curves: dict[str, np.ndarray]) -> dict[str, float]:
    """Two thresholds out of `threshold_curves`, the lowest of equals.

    "f1": where F1 is highest. "accuracy": where accuracy is, among those whose F1 lies within 0.0005 of that.
    """
    f1, accuracy = (np.nan_to_num(curves[name], nan=-1.0) for name in ("f1", "accuracy"))
    careful = np.where(f1 >= f1.max() - F1_GIVEN_AWAY, accuracy, -1.0)
    return {"f1": float(THRESHOLDS[np.argmax(f1)]), "accuracy": float(THRESHOLDS[np.argmax(careful)])}


def best_on(run: str | Path, pairs: Sequence[Pair], device: str = "auto") -> float:
    """The threshold of highest mean F1 over `pairs` at their own size, in the field of view, by the weights of `run`."""
    return choose(threshold_curves([(run, pairs)], progress=False, device=device))["f1"]


def threshold(
    runs: Sequence[str | Path],
    data: str | Path,
    output: str | Path,
    protocol: str = "native",
    progress: bool = True,
    **options: Any,
) -> list[str]:
    """Choose on the images that `runs` held out; writes `thresholds.csv` (a row a threshold) and `thresholds.png`.

    Returns:
        The table as lines, for people. Raises `UserError` as `held_out_folds` and `threshold_curves`.
    """
    folds, region = held_out_folds(runs, data), visualize.REGION_NAMES[get_protocol(protocol).region]
    curves = threshold_curves(folds, protocol, progress, **options)
    chosen, output = choose(curves), create_dir(output)
    rows = [{"threshold": cut, **{n: curves[n][i] for n in SCORES}} for i, cut in enumerate(THRESHOLDS)]
    write_csv(output / "thresholds.csv", ["threshold", *SCORES], rows)
    marks = {f"highest F1: {chosen['f1']:.2f}": chosen["f1"]}
    if chosen["accuracy"] != chosen["f1"]:
        marks[f"highest accuracy at that F1: {chosen['accuracy']:.2f}"] = chosen["accuracy"]
    title = f"{sum(len(pairs) for _, pairs in folds)} held-out images, {protocol}, {region}"
    title += ", TTA" if options.get("tta") else ""
    visualize.save_figure(output / "thresholds.png", visualize.threshold_chart(THRESHOLDS, curves, marks, title))
    lines = [title, "threshold" + "".join(f"{name:>11}" for name in SCORES)]
    remark = {chosen["accuracy"]: f"  highest accuracy within {F1_GIVEN_AWAY} of that F1", chosen["f1"]: "  highest F1"}
    for number, row in enumerate(rows):
        if number % 5 == 4 or row["threshold"] in remark:
            numbers = "".join(f"{row[name]:>11.4f}" for name in SCORES)
            lines.append(f"{row['threshold']:>9.2f}{numbers}{remark.get(row['threshold'], '')}")
    return lines
