"""Which threshold to cut at, by training photos that runs held out: one run, or every lot of a cross-validation together."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from retina_seg import visualize
from retina_seg.data import Pair
from retina_seg.metrics import THRESHOLDS, threshold_scores
from retina_seg.predict import Segmenter, find_checkpoint
from retina_seg.test import PROTOCOLS, held_out_pairs, prepare_pair
from retina_seg.utils import UserError, create_dir, side_by_side, write_text

F1_GIVEN_AWAY = 0.0005  # at most, for a higher accuracy


def threshold_curves(
    runs: Sequence[str | Path],
    data: str | Path,
    protocol: str = "native",
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Scores by threshold, means over the photos that the runs held out, each scored by the run that had not seen it.

    Args:
        runs: folders of trainings with `validation` "photos".
        data: the set they were trained on.
        protocol: "notebook": 512x512, over the frame; "native": the photo's own size, in the field of view.
        options: as `Segmenter` takes them; precision float32 unless given.

    Returns:
        "threshold": (99,) from 0.01 to 0.99; "f1", "recall", "precision", "accuracy": (99,) float64 in [0, 1], NaN where
        no photo defines it; "photos": the names.

    Raises:
        UserError: no such protocol; a run that held out nothing, or a photo that another run has held out too; as
            `Segmenter.load`.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)}")
    lots: list[tuple[str | Path, list[Pair]]] = [(run, held_out_pairs(run, data)) for run in runs]
    held_by: dict[str, str | Path] = {}
    for run, pairs in lots:
        for pair in pairs:
            if pair.name in held_by:
                raise UserError(
                    f"{run}: holds out photo {pair.name}, as {held_by[pair.name]} does; give the lots of one draw "
                    "(train --fold 0, 1, …)"
                )
            held_by[pair.name] = run
    rows: list[dict[str, np.ndarray]] = []
    with tqdm(desc="held-out photos", unit="photo", total=len(held_by), disable=not progress) as bar:
        for run, pairs in lots:
            for row in _photo_scores(run, pairs, protocol, options):
                rows.append(row)
                bar.update()
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    means = {name: np.ma.masked_invalid(values).mean(0).filled(np.nan) for name, values in table.items()}
    return {**means, "threshold": THRESHOLDS, "photos": list(held_by)}


def _photo_scores(
    run: str | Path, pairs: Sequence[Pair], protocol: str, options: dict[str, Any]
) -> Iterator[dict[str, np.ndarray]]:
    segmenter = Segmenter.load(find_checkpoint(run), **{"precision": "float32", **options})

    def one(pair: Pair) -> dict[str, np.ndarray]:
        photo, label, fov, _, found = prepare_pair(pair, protocol)
        try:
            probability = segmenter(photo, fov if found else None, everywhere=protocol == "notebook")
        except UserError as error:
            raise UserError(f"{pair.image}: {error}") from None
        region = np.ones_like(fov) if protocol == "notebook" else fov
        return threshold_scores((label > 127)[region], probability[region])

    yield from side_by_side(one, pairs, segmenter.device)


def choose(curves: dict[str, Any]) -> dict[str, float]:
    """Two thresholds out of `threshold_curves`: "f1", where F1 is highest; "accuracy", where accuracy is, among those whose F1
    lies within 0.0005 of that. The lowest of equals.
    """
    f1, accuracy = (np.nan_to_num(curves[name], nan=-1.0) for name in ("f1", "accuracy"))
    careful = np.where(f1 >= f1.max() - F1_GIVEN_AWAY, accuracy, -1.0)
    return {
        "f1": float(curves["threshold"][int(np.argmax(f1))]),
        "accuracy": float(curves["threshold"][int(np.argmax(careful))]),
    }


def threshold(
    runs: Sequence[str | Path],
    data: str | Path,
    output: str | Path,
    protocol: str = "native",
    progress: bool = True,
    **options: Any,
) -> list[str]:
    """`threshold_curves` and `choose`, written to `output`: `thresholds.csv` (a row a threshold) and `thresholds.png`.

    Returns:
        The table as lines, for people. Raises `UserError` as `threshold_curves`.
    """
    curves = threshold_curves(runs, data, protocol, progress, **options)
    chosen = choose(curves)
    output = create_dir(output)
    names = ("f1", "recall", "precision", "accuracy")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["threshold", *names])
    for number, cut in enumerate(curves["threshold"]):
        values = [curves[name][number] for name in names]
        writer.writerow([f"{cut:.2f}", *("" if np.isnan(value) else f"{value:.6f}" for value in values)])
    write_text(output / "thresholds.csv", text.getvalue())
    marks = {f"highest F1: {chosen['f1']:.2f}": chosen["f1"]}
    if chosen["accuracy"] != chosen["f1"]:
        marks[f"highest accuracy at that F1: {chosen['accuracy']:.2f}"] = chosen["accuracy"]
    where = "512x512, frame" if protocol == "notebook" else "native, field of view"
    title = f"{len(curves['photos'])} held-out photos, {where}{', eight orientations' if options.get('flips') else ''}"
    shown = {name: curves[name] for name in names}
    visualize.save_figure(
        output / "thresholds.png", visualize.threshold_chart(curves["threshold"], shown, marks, title)
    )
    lines = [title, "threshold" + "".join(f"{name:>11}" for name in names)]
    remark = {chosen["accuracy"]: f"  highest accuracy within {F1_GIVEN_AWAY} of that F1", chosen["f1"]: "  highest F1"}
    for number, cut in enumerate(curves["threshold"]):
        if round(cut * 100) % 5 == 0 or cut in remark:
            numbers = "".join(f"{curves[name][number]:>11.4f}" for name in names)
            lines.append(f"{cut:>9.2f}{numbers}{remark.get(cut, '')}")
    return lines
