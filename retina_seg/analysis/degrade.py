"""Robustness: F1 of a network on images degraded on purpose, by degradation.

Scores are taken at the untouched image's size, in its field of view: the dataset's own, else found in it. The segmenter
finds the field of view in the degraded image, as in use. Where an image is resized, its probability is resized back.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm.auto import tqdm

from retina_seg import visualize
from retina_seg.data import Pair
from retina_seg.fov import fov_diameter
from retina_seg.images import jpeg
from retina_seg.inference.protocol import Sample, get_protocol, predict_pairs
from retina_seg.inference.segmenter import Segmenter
from retina_seg.metrics import count, ranking_scores, scores_from_counts
from retina_seg.runs import remarks, scored_pairs
from retina_seg.sets.layout import check_masks
from retina_seg.utils import format_number, output_folder, write_csv

COLUMNS = ("degradation", "images", "f1", "difference", "auc", "worst_f1", "worst_image")
Degradation = Callable[[np.ndarray, np.ndarray], np.ndarray]
# of an image (H, W, 3) uint8 RGB and its field of view (H, W) bool; gives 0 to 255, maybe of another size
_CHANGES: dict[str, Degradation] = {
    "untouched": lambda image, fov: image,
    "dimmed to 25 %": lambda image, fov: image * 0.25,
    "dimmed to 10 %": lambda image, fov: image * 0.1,
    "dimmed to 5 %": lambda image, fov: image * 0.05,
    "brightened 1.6x": lambda image, fov: image * 1.6,
    "hazy 70 %": lambda image, fov: (0.3 * image + 0.7 * image[fov].sum(0) / max(fov.sum(), 1)) * fov[:, :, None],
    "gamma 0.5": lambda image, fov: 255 * (image / 255) ** 0.5,
    "gamma 2": lambda image, fov: 255 * (image / 255) ** 2,
    "warm tint": lambda image, fov: image * (1, 0.8, 0.5),
    "green channel only": lambda image, fov: image * (0, 1, 0),
    "blue missing": lambda image, fov: image * (1, 1, 0),
    "red saturated": lambda image, fov: image * (3.0, 1.0, 1.0),
    "red and blue swapped": lambda image, fov: image[:, :, ::-1],
    "inverted": lambda image, fov: (255 - image) * fov[:, :, None],  # vessels bright, as in angiography
    "blurred": lambda image, fov: cv2.GaussianBlur(image, (0, 0), 2 * fov_diameter(fov) / 540),
    "JPEG quality 20": lambda image, fov: jpeg(image[:, :, ::-1], 20)[:, :, ::-1],
    "noise of 15 levels": lambda image, fov: image + np.random.default_rng(0).normal(0, 15, image.shape),
    "half size": lambda image, fov: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "double size": lambda image, fov: cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC),
}


def _to_uint8(change: Degradation) -> Degradation:
    """`change`, with its result rounded and clipped to 0 to 255."""
    return lambda image, fov: np.clip(np.rint(change(image, fov)), 0, 255).astype(np.uint8)


DEGRADATIONS = {name: _to_uint8(change) for name, change in _CHANGES.items()}


def degraded_scores(segmenter: Segmenter, pairs: Sequence[Pair], progress: bool = True) -> list[dict[str, Any]]:
    """A row of `COLUMNS` for every degradation: F1 and AUC are means over images, in [0, 1]; NaN where undefined.

    "difference" is of F1 to the untouched images. Raises `UserError` as `predict_pairs`.
    """

    def score(sample: Sample) -> tuple[float, float, str]:
        mask, probability = sample.pixels("fov")
        counts = count(mask, probability > segmenter.threshold)
        return scores_from_counts(counts)["f1"], ranking_scores(mask, probability)[0], sample.name

    rows: list[dict[str, Any]] = []
    for name, degradation in tqdm(DEGRADATIONS.items(), "degrading", unit="degradation", disable=not progress):
        scores = list(predict_pairs(segmenter, pairs, get_protocol("native"), score, degradation))
        f1, auc = (np.mean([one[i] for one in scores if math.isfinite(one[i])] or math.nan) for i in (0, 1))
        worst = min((one for one in scores if math.isfinite(one[0])), default=(math.nan, math.nan, ""))
        cells = (name, len(scores), f1, f1 - (rows[0]["f1"] if rows else f1), auc, worst[0], worst[2])
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def degrade(
    weights: str | Path, data: str | Path, output: str | Path, part: str = "test", progress: bool = True, **options: Any
) -> list[str]:
    """Score `weights` on one part of the dataset at `data`, degraded; writes `degrade.csv` and `degrade.png` to `output`.

    `weights`, `options`: as `Segmenter.load` takes them; precision float32 unless given. `part`: "test", "train", or
    "validation": what the run `weights` held out. Returns lines for people. Raises `UserError` as what it calls.
    """
    segmenter = Segmenter.load(weights, **{"precision": "float32", **options})
    pairs = scored_pairs(weights, data, part)
    notes = [*check_masks(pairs), *remarks(weights)]
    with output_folder(output) as folder:
        rows = degraded_scores(segmenter, pairs, progress)
        write_csv(folder / "degrade.csv", COLUMNS, rows)
    title = f"{len(pairs)} {part} images, native, {visualize.REGION_NAMES['fov']}, threshold {segmenter.threshold:.2f}"
    title += f", style {options['style']}" if options.get("style") else ""
    figure, (axis,) = visualize.new_figure(width=7.2, height=1.2 + 0.27 * len(rows))
    for column, mark, label in (("f1", "o", "mean over images"), ("worst_f1", "x", "worst image")):
        axis.plot([row[column] for row in rows], [row["degradation"] for row in rows], mark, label=label)
    axis.invert_yaxis()
    axis.set(xlabel="F1 in the field of view", xlim=(-0.02, 1), title=title)
    axis.legend(frameon=False, loc="lower left")
    visualize.save_figure(folder / "degrade.png", figure)
    lines = [title, f"{'degradation':<22}{'F1':>8}{'difference':>12}{'AUC':>8}{'worst F1':>10}  worst image"]
    for row in rows:
        f1, difference, auc, worst = (format_number(row[name]) for name in COLUMNS[2:6])
        lines.append(f"{row['degradation']:<22}{f1:>8}{difference:>12}{auc:>8}{worst:>10}  {row['worst_image']}")
    return lines + notes
