"""The threshold to cut at, by training images that runs held out: of one run, or of every fold of a cross-validation."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from retina_seg import visualize
from retina_seg.data import Pair
from retina_seg.inference.protocol import get_protocol, predict_pairs
from retina_seg.inference.segmenter import Segmenter
from retina_seg.metrics import THRESHOLDS, threshold_scores
from retina_seg.runs import held_out_pairs, remarks
from retina_seg.sets.layout import check_masks
from retina_seg.utils import UserError, output_folder, write_csv

F1_GIVEN_AWAY = 0.0005  # at most, for a higher accuracy
CHOICES = {"f1": "highest F1", "accuracy": f"highest accuracy within {F1_GIVEN_AWAY} of that F1"}
SCORES = ("f1", "recall", "precision", "accuracy")
Fold = tuple[str | Path, Sequence[Pair]]  # a run and the images that it held out
Curves = dict[str, np.ndarray]  # by score


def held_out_folds(runs: Sequence[str | Path], data: str | Path) -> list[Fold]:
    """Every run of `runs` with the images of the dataset `data` that it held out.

    Raises `UserError`: a run held out nothing, or an image that another run has held out too.
    """
    folds: list[Fold] = [(run, held_out_pairs(run, data)) for run in runs]
    for (run, pairs), (other, others) in combinations(folds, 2):
        if both := {pair.name for pair in pairs} & {pair.name for pair in others}:
            remedy = "give the folds of one draw (train --fold 0, 1, …)"
            raise UserError(f"{run} and {other}: both hold out {min(both)}; {remedy}")
    return folds


def threshold_curves(folds: Sequence[Fold], protocol: str = "native", progress: bool = True, **options: Any) -> Curves:
    """Scores by threshold, means over the images of all `folds`, in the protocol's region.

    Returns (99,) float64 in [0, 1] for `metrics.THRESHOLDS` by score (`SCORES`), NaN where no image defines it.
    `options` are those of `Segmenter`; precision float32 unless given. Raises `UserError` as it and `predict_pairs`.
    """
    how = get_protocol(protocol)

    def scored() -> Iterator[dict[str, np.ndarray]]:
        for run, pairs in folds:
            segmenter = Segmenter.load(run, **{"precision": "float32", **options})
            yield from predict_pairs(segmenter, pairs, how, lambda sample: threshold_scores(*sample.pixels(how.region)))

    count = sum(len(pairs) for _, pairs in folds)
    rows = list(tqdm(scored(), "held-out images", count, unit="image", disable=not progress))
    return {name: np.ma.masked_invalid([row[name] for row in rows]).mean(0).filled(np.nan) for name in SCORES}


def choose(curves: Curves) -> dict[str, float]:
    """Two thresholds out of `threshold_curves`, by name as `CHOICES` describes them; the lowest of equals."""
    f1, accuracy = (np.nan_to_num(curves[name], nan=-1.0) for name in ("f1", "accuracy"))
    careful = np.where(f1 >= f1.max() - F1_GIVEN_AWAY, accuracy, -1.0)
    return {"f1": float(THRESHOLDS[np.argmax(f1)]), "accuracy": float(THRESHOLDS[np.argmax(careful)])}


def best_on(run: str | Path, pairs: Sequence[Pair], device: str = "auto") -> float:
    """The threshold of highest mean F1 over `pairs` at their own size, in the field of view, by the weights of `run`."""
    return choose(threshold_curves([(run, pairs)], progress=False, device=device))["f1"]


def threshold(
    runs: Sequence[str | Path], data: str | Path, output: str | Path, protocol: str = "native", **options: Any
) -> list[str]:
    """Choose on the images that `runs` held out; writes `thresholds.csv` (a row a threshold) and `thresholds.png`.

    `options` are those of `threshold_curves`. Returns lines for people. Raises `UserError` as it and `held_out_folds`.
    """
    folds, region = held_out_folds(runs, data), visualize.REGION_NAMES[get_protocol(protocol).region]
    notes = sum(map(remarks, runs), check_masks([pair for _, pairs in folds for pair in pairs]))
    with output_folder(output) as folder:
        curves = threshold_curves(folds, protocol, **options)
    chosen = choose(curves)
    rows = {cut: {"threshold": cut, **{n: curves[n][i] for n in SCORES}} for i, cut in enumerate(THRESHOLDS)}
    write_csv(folder / "thresholds.csv", ["threshold", *SCORES], rows.values())
    title = f"{sum(len(pairs) for _, pairs in folds)} held-out images, {protocol}, {region}"
    title += ", TTA" if options.get("tta") else ""
    lines: dict[str, Any] = {name: (THRESHOLDS, curves[name]) for name in SCORES}
    marks = {f"{CHOICES[name]}: {cut:.2f}": cut for name, cut in chosen.items()}
    chart = visualize.line_chart(lines, "threshold", "mean over images", marks, title=title)
    visualize.save_figure(folder / "thresholds.png", chart)
    table = [title, "threshold" + "".join(f"{name:>11}" for name in SCORES)]
    for name, cut in chosen.items():
        table.append(f"{cut:>9.2f}" + "".join(f"{rows[cut][n]:>11.4f}" for n in SCORES) + f"  {CHOICES[name]}")
    return table + notes
