"""Scores of a segmentation: counts first, then every score a function of the counts; inside a region or over the frame.

An undefined score (no vessel in the mask, no background in the region) is NaN here and null in `metrics.json`, never 0.

The ranking scores (AUC, average precision) of one image are exact. Pooled over images they come from a histogram, so
that memory does not grow with the dataset: on 1.3 million synthetic pixels AUC was off by 4e-7, average precision by 2e-6.

clDice (arXiv 2003.07311) compares centre lines, by scikit-image's `skeletonize` (8-connected, Zhang and Suen): the
harmonic mean of the share of the predicted centre line inside the mask and of the mask's inside the prediction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class _Additive:
    """Of a dataclass of numbers: they add up one by one."""

    def __add__(self, other: Any) -> Any:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return type(self)(*(mine + theirs for mine, theirs in pairs))


@dataclass(frozen=True)
class Counts(_Additive):
    """Pixels: true positives (vessel found), false positives, false negatives, true negatives. Counts add up."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0


def count(mask: np.ndarray, predicted: np.ndarray, region: np.ndarray | None = None) -> Counts:
    """Count the pixels of `mask` (ground truth) against `predicted`, both bool of one shape, where `region` is True.

    Raises `ValueError`: shapes differ. Raises `TypeError`: an array is not bool, as a probability is not.
    """
    for array in (mask, predicted) if region is None else (mask, predicted, region):
        if array.shape != mask.shape:
            raise ValueError(f"a mask {mask.shape} and an array {array.shape} differ in shape")
        if array.dtype != bool:
            raise TypeError(f"expected bool arrays, got {array.dtype}")
    if region is not None:
        mask, predicted = mask[region], predicted[region]
    vessel, called, tp = (int(np.count_nonzero(array)) for array in (mask, predicted, mask & predicted))
    return Counts(tp, called - tp, vessel - tp, mask.size - vessel - called + tp)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def scores_from_counts(c: Counts) -> dict[str, float]:
    """The scores of the counts by name: in [0, 1], Matthews' correlation ("mcc") in [-1, 1]; NaN where undefined."""
    product = (c.tp + c.fp) * (c.tp + c.fn) * (c.tn + c.fp) * (c.tn + c.fn)  # Python's integers do not overflow
    return {
        "jaccard": _ratio(c.tp, c.tp + c.fp + c.fn),
        "f1": _ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn),  # also called Dice
        "recall": _ratio(c.tp, c.tp + c.fn),  # also called sensitivity
        "precision": _ratio(c.tp, c.tp + c.fp),
        "accuracy": _ratio(c.tp + c.tn, c.tp + c.fp + c.fn + c.tn),
        "specificity": _ratio(c.tn, c.tn + c.fp),
        "mcc": _ratio(c.tp * c.tn - c.fp * c.fn, math.sqrt(product)),
    }


SCORES = (*scores_from_counts(Counts()), "auc", "average_precision", "cldice")


def ranking_scores(mask: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """Exact (AUC, average precision) of the pixels of `mask`, bool, ranked by `score`, float of the same shape.

    AUC, the area under the ROC curve: how often a vessel pixel scores above a background pixel, ties half. Average
    precision: the mean, over vessel pixels, of the precision at the threshold that just finds the pixel. Both are in
    [0, 1]; NaN where there is no vessel, AUC also where there is no background.
    """
    vessel, background = np.sort(score[mask]), np.sort(score[~mask])
    below, not_above = (np.searchsorted(background, vessel, side) for side in ("left", "right"))
    tp = vessel.size - np.searchsorted(vessel, vessel, "left")
    area = _ratio(float((below + not_above).sum(dtype=np.int64)), 2 * vessel.size * background.size)
    return area, float(np.mean(tp / (tp + background.size - below))) if vessel.size else math.nan


@dataclass(eq=False)
class RankingHistogram(_Additive):
    """The pixels of any number of images in 4,096 bins of the predicted log-odds, from -16 to 16, evenly mixed in a bin.

    `counts`: (2, 4096) int64: background, vessel.
    """

    BINS, LIMIT = 4096, 16.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros((2, RankingHistogram.BINS), np.int64))

    def add(self, mask: np.ndarray, probability: np.ndarray) -> None:
        """Add the pixels of an image: ground truth bool, and probability float in [0, 1], of one shape."""
        p = probability.astype(np.float32)
        with np.errstate(divide="ignore"):
            odds = np.clip(np.log(p) - np.log(1 - p), -self.LIMIT, self.LIMIT)
        bins = np.rint((odds + self.LIMIT) * ((self.BINS - 1) / (2 * self.LIMIT))).astype(np.intp)
        self.counts += np.bincount((bins + self.BINS * mask).ravel(), minlength=2 * self.BINS).reshape(2, -1)

    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """True and false positives at falling thresholds, from none to all pixels: two (4097,) float64 arrays."""
        background, vessel = (np.concatenate([[0.0], np.cumsum(row[::-1])]) for row in self.counts)
        return vessel, background

    def scores(self) -> tuple[float, float]:
        """The pooled (AUC, average precision), as `ranking_scores`."""
        tp, fp = self.rates()
        area = _ratio((np.diff(fp) * (tp[1:] + tp[:-1])).sum(), 2 * tp[-1] * fp[-1])
        rank = (tp[1:] + tp[:-1] + 1) / 2  # mean rank of a bin's vessel pixels among all of them
        precision = rank / (rank + (fp[1:] + fp[:-1]) / 2)
        return float(area), float(_ratio((np.diff(tp) * precision).sum(), tp[-1]))


@dataclass(frozen=True)
class LineCounts(_Additive):
    """Centre-line pixels: of the prediction, those of them inside the mask; of the mask, those inside the prediction."""

    predicted: int = 0
    predicted_inside: int = 0
    mask: int = 0
    mask_inside: int = 0


def centre_line(vessels: np.ndarray) -> np.ndarray:
    """The centre line of `vessels` (H, W) bool, one pixel wide, 8-connected: the same shape, bool."""
    from skimage.morphology import skeletonize  # heavy to import, and only needed here

    return skeletonize(vessels)


def cldice(lines: LineCounts) -> float:
    """The harmonic mean of the two shares; NaN where neither has a centre line, 0 where only one has."""
    if not lines.predicted or not lines.mask:
        return 0.0 if lines.predicted or lines.mask else math.nan
    precise, sensitive = lines.predicted_inside / lines.predicted, lines.mask_inside / lines.mask
    return 2 * precise * sensitive / (precise + sensitive) if precise + sensitive else 0.0


def _scores(counts: Counts, ranked: tuple[float, float], lines: LineCounts) -> dict[str, float]:
    return {**scores_from_counts(counts), "auc": ranked[0], "average_precision": ranked[1], "cldice": cldice(lines)}


class ImageScores(NamedTuple):
    """The counts of one image in one region, and its scores by name (`SCORES`), NaN where undefined."""

    counts: Counts
    lines: LineCounts
    ranking: RankingHistogram  # empty where there were no probabilities
    scores: dict[str, float]


def score_image(
    mask: np.ndarray, predicted: np.ndarray, probability: np.ndarray | None, regions: dict[str, np.ndarray | None]
) -> dict[str, ImageScores]:
    """Score one image, all arrays (H, W), in each of `regions`: name -> bool, or None for the whole frame.

    `mask` and `predicted` are bool, `probability` float in [0, 1]; None (a human's mask) leaves the ranking scores NaN.
    Centre lines are those of the whole frame, counted where the region is.
    """
    line_predicted, line_mask, results = centre_line(predicted), centre_line(mask), {}
    for name, region in regions.items():
        inside = np.ones_like(mask) if region is None else region
        counts = count(mask, predicted, region)
        pieces = (line_predicted, line_predicted & mask, line_mask, line_mask & predicted)
        lines = LineCounts(*(int(np.count_nonzero(piece & inside)) for piece in pieces))
        ranking, ranked = RankingHistogram(), (math.nan, math.nan)
        if probability is not None:
            ranking.add(mask[inside], probability[inside])
            ranked = ranking_scores(mask[inside], probability[inside])
        results[name] = ImageScores(counts, lines, ranking, _scores(counts, ranked, lines))
    return results


def scores(
    mask: np.ndarray, probability: np.ndarray, fov: np.ndarray | None = None, threshold: float = 0.5
) -> dict[str, float]:
    """Every score (`SCORES`) of one image by name; NaN where it is undefined.

    Args:
        mask: ground truth (H, W), bool, or uint8 with vessel above 127.
        probability: (H, W) float in [0, 1]; vessel is above `threshold`.
        fov: the field of view (H, W) bool; None: the whole frame.

    Raises `ValueError`: shapes differ. Raises `TypeError`: another dtype.
    """
    mask, probability = np.asarray(mask), np.asarray(probability)
    if mask.dtype == np.uint8:
        mask = mask > 127
    if probability.dtype.kind != "f":
        raise TypeError(f"expected float probabilities in [0, 1], got {probability.dtype}")
    predicted = probability > threshold
    count(mask, predicted, fov)  # shapes and dtypes, before the centre lines
    return score_image(mask, predicted, probability, {"": fov})[""].scores


class SetScores(NamedTuple):
    """The scores of a set of images in one region."""

    images: Sequence[ImageScores]

    @property
    def ranking(self) -> RankingHistogram:
        """The pixels of all images, pooled."""
        return sum((image.ranking for image in self.images), RankingHistogram())

    def summary(self) -> dict[str, dict]:
        """ "mean" and "std" over images, "pooled" over pixels, "ci95" of the means of F1 and AUC: as in metrics.json."""
        table = {name: np.array([image.scores[name] for image in self.images]) for name in SCORES}
        defined = {name: values[np.isfinite(values)] for name, values in table.items()}
        counts = sum((image.counts for image in self.images), Counts())
        lines = sum((image.lines for image in self.images), LineCounts())
        return {
            "mean": {name: float(v.mean()) if v.size else math.nan for name, v in defined.items()},
            "std": {name: float(v.std(ddof=1)) if v.size > 1 else math.nan for name, v in defined.items()},
            "pooled": _scores(counts, self.ranking.scores(), lines),
            "ci95": {name: list(bootstrap(defined[name])) for name in ("f1", "auc")},
        }


def bootstrap(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` by 10,000 draws with replacement; (NaN, NaN) for fewer than two."""
    values = np.asarray(values, float)
    if values.size < 2:
        return math.nan, math.nan
    chosen = np.random.default_rng(seed).integers(values.size, size=(10_000, values.size))
    return tuple(np.percentile(values[chosen].mean(axis=1), [2.5, 97.5]).tolist())


THRESHOLDS = np.arange(1, 100) / 100


def threshold_scores(mask: np.ndarray, probability: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of the pixels of `mask` (n,) bool, called vessel where `probability` (n,) float is above a threshold.

    Returns "f1", "recall", "precision", "accuracy": (99,) float64 in [0, 1] for `THRESHOLDS`; NaN where undefined.
    """
    vessel, background = np.sort(probability[mask]), np.sort(probability[~mask])
    # at or below each threshold: false negatives, true negatives
    fn, tn = (np.searchsorted(pixels, THRESHOLDS, "right").tolist() for pixels in (vessel, background))
    rows = [scores_from_counts(Counts(vessel.size - n, background.size - t, n, t)) for n, t in zip(fn, tn, strict=True)]
    return {name: np.array([row[name] for row in rows]) for name in ("f1", "recall", "precision", "accuracy")}
