"""Scores of a segmentation: counts first, then every score a function of the counts; inside a region or over the frame.

Symbols: tp right vessel pixels, fp invented, fn missed, tn right background. A score that cannot be had (no vessel in
the label, no background in the region) is NaN here and null in `metrics.json`, never 0.

The ranking scores (AUC, average precision) are exact for a photo. Pooled over photos they come from a histogram of the
log-odds with bins 0.0005 wide, so that memory does not grow with the set; over whole photos the error is below 1e-5.

clDice (arXiv 2003.07311) compares centre lines, by scikit-image's `skeletonize` (8-connected, Zhang and Suen): the
harmonic mean of the share of the predicted centre line inside the label and of the label's inside the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

# ----------------------------------------------------------------------------------------------------------- from counts


@dataclass(frozen=True)
class Counts:
    """Pixels that are right vessel (tp), invented (fp), missed (fn), right background (tn). Counts add up."""

    tp: int
    fp: int
    fn: int
    tn: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)


def count(label: np.ndarray, predicted: np.ndarray, region: np.ndarray | None = None) -> Counts:
    """Count the pixels of `label` against `predicted`, both bool of one shape, where `region` (bool) is True.

    Raises:
        ValueError: shapes differ.
        TypeError: an array is not bool: a probability must be thresholded first.
    """
    arrays = [label, predicted] + ([] if region is None else [region])
    for array in arrays:
        if array.shape != label.shape:
            raise ValueError(f"label {label.shape} and the arrays beside it {array.shape} differ in shape")
        if array.dtype != bool:
            raise TypeError(f"expected bool arrays, got {array.dtype}")
    if region is not None:
        label, predicted = label[region], predicted[region]
    positive, called = int(np.count_nonzero(label)), int(np.count_nonzero(predicted))
    tp = int(np.count_nonzero(label & predicted))
    return Counts(tp, called - tp, positive - tp, label.size - positive - called + tp)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def jaccard(c: Counts) -> float:
    """tp / (tp + fp + fn)"""
    return _ratio(c.tp, c.tp + c.fp + c.fn)


def f1(c: Counts) -> float:
    """2 tp / (2 tp + fp + fn), also called Dice"""
    return _ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def recall(c: Counts) -> float:
    """tp / (tp + fn), also called sensitivity"""
    return _ratio(c.tp, c.tp + c.fn)


def precision(c: Counts) -> float:
    """tp / (tp + fp)"""
    return _ratio(c.tp, c.tp + c.fp)


def accuracy(c: Counts) -> float:
    """(tp + tn) / all"""
    return _ratio(c.tp + c.tn, c.tp + c.fp + c.fn + c.tn)


def specificity(c: Counts) -> float:
    """tn / (tn + fp)"""
    return _ratio(c.tn, c.tn + c.fp)


def mcc(c: Counts) -> float:
    """Matthews' correlation: (tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn))"""
    product = (c.tp + c.fp) * (c.tp + c.fn) * (c.tn + c.fp) * (c.tn + c.fn)  # Python's integers do not overflow
    return _ratio(c.tp * c.tn - c.fp * c.fn, math.sqrt(product))


FROM_COUNTS: dict[str, Callable[[Counts], float]] = {
    function.__name__: function for function in (jaccard, f1, recall, precision, accuracy, specificity, mcc)
}
SCORES = (*FROM_COUNTS, "auc", "average_precision", "cldice")


# --------------------------------------------------------------------------------------------------- from a ranking


def _sorted_scores(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.sort(score[label]), np.sort(score[~label])


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve: how often a vessel pixel scores above a background pixel, ties half.

    Args:
        label: bool. score: float, the same shape.

    Returns:
        In [0, 1]; NaN where one of the classes is empty.
    """
    return _ranked(label, score)[0]


def average_precision(label: np.ndarray, score: np.ndarray) -> float:
    """The mean, over vessel pixels, of the precision at the threshold that just finds the pixel; arguments as `auc`.

    Returns:
        In [0, 1]; NaN where there is no vessel.
    """
    return _ranked(label, score)[1]


def _ranked(label: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """`auc` and `average_precision`, for which the pixels are sorted once."""
    positive, negative = _sorted_scores(label, score)
    below = np.searchsorted(negative, positive, "left")
    not_above = np.searchsorted(negative, positive, "right")
    found = positive.size - np.searchsorted(positive, positive, "left")
    area = _ratio(float((below + not_above).sum(dtype=np.int64)), 2 * positive.size * negative.size)
    return area, float(np.mean(found / (found + negative.size - below))) if positive.size else math.nan


class RankingHistogram:
    """Scores of any number of photos, pooled in constant memory: 65,536 bins of the log-odds from -16 to 16."""

    BINS, LIMIT = 1 << 16, 16.0

    def __init__(self) -> None:
        self.positive = np.zeros(self.BINS, np.int64)
        self.negative = np.zeros(self.BINS, np.int64)

    def add(self, label: np.ndarray, probability: np.ndarray) -> None:
        """Take in the pixels of one photo: label bool, probability float in [0, 1], of one shape."""
        self.add_places(label, self.places(probability))

    @classmethod
    def places(cls, probability: np.ndarray) -> np.ndarray:
        """The bin of every pixel, uint16 of the shape of `probability`, float in [0, 1]."""
        p = probability.astype(np.float32)
        with np.errstate(divide="ignore"):
            odds = np.log(p) - np.log(
                1 - p
            )  # exact where it counts: near 1 the difference is, near 0 its logarithm is -p
        np.clip(odds, -cls.LIMIT, cls.LIMIT, out=odds)
        return np.rint((odds + cls.LIMIT) * ((cls.BINS - 1) / (2 * cls.LIMIT))).astype(np.uint16)

    def add_places(self, label: np.ndarray, places: np.ndarray) -> None:
        """As `add`, of pixels whose bins are known."""
        both = np.bincount((2 * places.astype(np.intp) + label).ravel(), minlength=2 * self.BINS).reshape(self.BINS, 2)
        self.negative += both[:, 0]
        self.positive += both[:, 1]

    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels found (tp) and invented (fp) at falling thresholds, from none to all: two (BINS + 1,) int64 arrays."""
        found = np.concatenate([[0], np.cumsum(self.positive[::-1])])
        invented = np.concatenate([[0], np.cumsum(self.negative[::-1])])
        return found, invented

    def auc(self) -> float:
        """Area under the pooled ROC curve, or NaN."""
        found, invented = self.rates()
        if not found[-1] or not invented[-1]:
            return math.nan
        y, x = found / found[-1], invented / invented[-1]
        return float((np.diff(x) * (y[1:] + y[:-1])).sum() / 2)

    def average_precision(self) -> float:
        """The pooled average precision, or NaN."""
        found, invented = self.rates()
        if not found[-1]:
            return math.nan
        steps = np.diff(found)
        here = steps > 0
        precisions = found[1:][here] / (found[1:] + invented[1:])[here]
        return float((steps[here] * precisions).sum() / found[-1])


# ------------------------------------------------------------------------------------------------------- centre lines


@dataclass(frozen=True)
class LineCounts:
    """Centre-line pixels: predicted ones, those of them inside the label; the label's, those inside the prediction."""

    predicted: int
    predicted_right: int
    label: int
    label_found: int

    def __add__(self, other: LineCounts) -> LineCounts:
        return LineCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def centre_line(vessels: np.ndarray) -> np.ndarray:
    """The centre line of `vessels` (H, W) bool, one pixel wide, 8-connected: the same shape, bool."""
    from skimage.morphology import skeletonize  # heavy to import, and only needed here

    return skeletonize(vessels)


def cldice(lines: LineCounts) -> float:
    """The harmonic mean of the two shares; NaN where neither has a centre line, 0 where only one has."""
    if not lines.predicted and not lines.label:
        return math.nan
    if not lines.predicted or not lines.label:
        return 0.0
    right, found = lines.predicted_right / lines.predicted, lines.label_found / lines.label
    return 2 * right * found / (right + found) if right + found else 0.0


# ----------------------------------------------------------------------------------------------------- a photo and a set


@dataclass(frozen=True)
class PhotoScores:
    """The counts of one photo in one region, and its scores by name (`SCORES`), NaN where undefined."""

    counts: Counts
    lines: LineCounts
    scores: dict[str, float]


def score_photo(
    label: np.ndarray,
    predicted: np.ndarray,
    probability: np.ndarray | None,
    regions: dict[str, np.ndarray | None],
) -> dict[str, PhotoScores]:
    """Score one photo in each of `regions`.

    Args:
        label, predicted: (H, W) bool.
        probability: (H, W) float in [0, 1] for the ranking scores; None (a human's mask has none) leaves them NaN.
        regions: name -> (H, W) bool, or None for the whole frame.

    Returns:
        region -> its scores. Centre lines are found once on the whole frame, then counted where the region is.
    """
    line_predicted, line_label = centre_line(predicted), centre_line(label)
    results = {}
    for name, region in regions.items():
        inside = True if region is None else region
        counts = count(label, predicted, region)
        lines = LineCounts(
            int(np.count_nonzero(line_predicted & inside)),
            int(np.count_nonzero(line_predicted & inside & label)),
            int(np.count_nonzero(line_label & inside)),
            int(np.count_nonzero(line_label & inside & predicted)),
        )
        scores = {key: function(counts) for key, function in FROM_COUNTS.items()}
        scores["auc"] = scores["average_precision"] = math.nan
        if probability is not None:
            pixels = (label, probability) if region is None else (label[region], probability[region])
            scores["auc"], scores["average_precision"] = _ranked(*pixels)
        scores["cldice"] = cldice(lines)
        results[name] = PhotoScores(counts, lines, scores)
    return results


@dataclass
class SetScores:
    """The scores of a set in one region: photos one by one, and the pixels of all pooled."""

    photos: list[PhotoScores] = field(default_factory=list)
    ranking: RankingHistogram = field(default_factory=RankingHistogram)

    def add(self, photo: PhotoScores, label: np.ndarray, places: np.ndarray | None, region: np.ndarray | None) -> None:
        """Take in one photo's scores, and its pixels for the pooled ranking.

        Args:
            photo, label, region: as `score_photo` gives and takes them.
            places: of the photo's probabilities (`RankingHistogram.places`); None: there are none.
        """
        self.photos.append(photo)
        if places is not None:
            inside = slice(None) if region is None else region
            self.ranking.add_places(label[inside], places[inside])

    def summary(self) -> dict[str, dict]:
        """ "mean" and "std" over photos, "pooled" over pixels, "ci95" of the means of F1 and AUC: as in metrics.json."""
        table = {name: np.array([photo.scores[name] for photo in self.photos]) for name in SCORES}
        defined = {name: values[np.isfinite(values)] for name, values in table.items()}
        pooled_counts = sum((photo.counts for photo in self.photos), Counts(0, 0, 0, 0))
        pooled = {name: function(pooled_counts) for name, function in FROM_COUNTS.items()}
        pooled["auc"], pooled["average_precision"] = self.ranking.auc(), self.ranking.average_precision()
        pooled["cldice"] = cldice(sum((photo.lines for photo in self.photos), LineCounts(0, 0, 0, 0)))
        return {
            "mean": {name: float(v.mean()) if v.size else math.nan for name, v in defined.items()},
            "std": {name: float(v.std(ddof=1)) if v.size > 1 else math.nan for name, v in defined.items()},
            "pooled": pooled,
            "ci95": {name: list(bootstrap(defined[name])) for name in ("f1", "auc")},
        }


def bootstrap(values: Sequence[float] | np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` under resampling with replacement; (NaN, NaN) for fewer than two."""
    values = np.asarray(values, float)
    if values.size < 2:
        return math.nan, math.nan
    chosen = np.random.default_rng(seed).integers(values.size, size=(draws, values.size))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


THRESHOLDS = np.arange(1, 100) / 100


def threshold_scores(label: np.ndarray, probability: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of one photo by threshold, a vessel being where the probability is above it.

    Args:
        label: (n,) bool. probability: (n,) float in [0, 1].

    Returns:
        "f1", "recall", "precision", "accuracy": (99,) float64 in [0, 1] for `THRESHOLDS`; NaN where undefined.
    """
    positive, negative = _sorted_scores(label, probability)
    tp = positive.size - np.searchsorted(positive, THRESHOLDS, "right")
    fp = negative.size - np.searchsorted(negative, THRESHOLDS, "right")
    fn = positive.size - tp
    with np.errstate(invalid="ignore"):
        return {
            "f1": 2 * tp / (2 * tp + fp + fn),
            "recall": tp / positive.size,
            "precision": tp / (tp + fp),
            "accuracy": (label.size - fp - fn) / label.size,
        }


def best_threshold(labels: Sequence[np.ndarray], probabilities: Sequence[np.ndarray]) -> float:
    """The threshold in (0, 1), in steps of 0.01, with the highest mean F1 over photos; the lowest of equals.

    Args:
        labels: (n,) bool arrays, one a photo. probabilities: (n,) float in [0, 1], as long.

    Raises:
        ValueError: there is no photo.
    """
    if not labels:
        raise ValueError("no photos to choose a threshold on")
    f1 = [threshold_scores(*photo)["f1"] for photo in zip(labels, probabilities, strict=True)]
    return float(THRESHOLDS[np.argmax(np.nan_to_num(f1).sum(0))])
