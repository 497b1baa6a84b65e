"""Every score against sklearn or a count by hand, inside a region and over the frame, and what cannot be scored."""

import math

import numpy as np
import pytest
from sklearn import metrics as oracle

from retina_seg.metrics import (
    SCORES,
    Counts,
    LineCounts,
    RankingHistogram,
    SetScores,
    bootstrap,
    centre_line,
    cldice,
    count,
    ranking_scores,
    score_image,
    scores_from_counts,
    threshold_scores,
)

SKLEARN = {
    "jaccard": oracle.jaccard_score,
    "f1": oracle.f1_score,
    "recall": oracle.recall_score,
    "precision": oracle.precision_score,
    "accuracy": oracle.accuracy_score,
    "specificity": lambda mask, predicted: oracle.recall_score(~mask, ~predicted),
    "mcc": oracle.matthews_corrcoef,
}


def random_image(seed, shape=(23, 31), levels=None):
    """(mask, predicted, probability, region): rare vessels, a fair but biased prediction, a lop-sided region."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.15
    probability = np.clip(0.45 * mask + 0.7 * rng.random(shape), 0.001, 0.999)
    if levels:  # few values, so many ties
        probability = np.round(probability * levels) / levels
    region = np.zeros(shape, bool)
    region[3:, : shape[1] // 2] = True
    return mask, probability > 0.5, probability, region


def sklearn_ranking(mask, score):
    mask, score = mask.ravel(), score.ravel()
    return oracle.roc_auc_score(mask, score), oracle.average_precision_score(mask, score)


def test_eight_pixels_counted_by_hand():
    mask = np.array([[True, True, True, False, False, False, False, False]])
    predicted = np.array([[True, True, False, True, False, False, False, False]])
    assert count(mask, predicted) == Counts(tp=2, fp=1, fn=1, tn=4)
    scores = scores_from_counts(count(mask, predicted))
    by_hand = [2 / 4, 4 / 6, 2 / 3, 2 / 3, 6 / 8, 4 / 5, (2 * 4 - 1) / math.sqrt(3 * 3 * 5 * 5)]
    assert scores == pytest.approx(dict(zip(SKLEARN, by_hand, strict=True)))
    inside, outside = count(mask, predicted, mask), count(mask, predicted, ~mask)
    assert (inside, outside) == (Counts(2, 0, 1, 0), Counts(0, 1, 0, 4)) and inside + outside == count(mask, predicted)
    assert type(inside.tp) is int


@pytest.mark.parametrize(
    ("counts", "undefined"),
    [
        ((0, 0, 0, 0), set(SKLEARN)),
        ((0, 0, 0, 9), {"jaccard", "f1", "recall", "precision", "mcc"}),  # no vessel, none predicted
        ((0, 3, 0, 9), {"recall", "mcc"}),  # no vessel
        ((0, 0, 3, 9), {"precision", "mcc"}),  # none predicted
        ((5, 0, 0, 0), {"specificity", "mcc"}),  # vessel only
    ],
)
def test_an_undefined_score_is_nan_and_no_other(counts, undefined):
    assert {name for name, value in scores_from_counts(Counts(*counts)).items() if math.isnan(value)} == undefined


def test_a_billion_pixels_do_not_overflow():
    small, large = (scores_from_counts(Counts(*(n * k for n in (12, 3, 5, 80)))) for k in (1, 10**7))
    assert large == pytest.approx(small, rel=1e-12)
    histogram = RankingHistogram()
    histogram.add(np.array([True, False, True]), np.array([0.9, 0.5, 0.1]))
    histogram.counts *= 10**10
    assert histogram.scores()[0] == 0.5


def test_other_types_and_shapes_are_refused():
    mask = np.zeros((2, 3), bool)
    wrong = [(mask.astype(np.uint8), TypeError, "bool"), (mask.astype(float), TypeError, "bool")]
    wrong += [(np.zeros(shape, bool), ValueError, "differ in shape") for shape in ((3, 2), (1, 3), (6,), (2, 3, 1))]
    for array, error, match in wrong:
        for arguments in ((mask, array), (mask, mask, array)):
            with pytest.raises(error, match=match):
                count(*arguments)


@pytest.mark.parametrize("levels", [None, 255, 8, 1])
def test_auc_and_average_precision_equal_sklearns_with_any_ties(levels):
    for seed in range(4):
        mask, _, probability, _ = random_image(seed, levels=levels)
        assert ranking_scores(mask, probability) == pytest.approx(sklearn_ranking(mask, probability), abs=1e-12)


def test_a_ranking_by_hand():
    mask = np.array([True, False, True, False])
    score = np.array([0.9, 0.6, 0.4, 0.1])
    assert ranking_scores(mask, score) == (3 / 4, (1 / 1 + 2 / 3) / 2)  # of four pairs one is in the wrong order
    assert ranking_scores(mask, np.full(4, 0.3)) == (0.5, 0.5)
    assert ranking_scores(mask, -score)[0] == 1 / 4


def test_one_class_alone_cannot_be_ranked():
    score = np.array([0.1, 0.9])
    vessel, background, none = np.ones(2, bool), np.zeros(2, bool), np.zeros(0, bool)
    assert np.isnan([ranking_scores(m, score[: m.size])[0] for m in (vessel, background, none)]).all()
    assert math.isnan(ranking_scores(background, score)[1])
    assert ranking_scores(vessel, score)[1] == 1
    histogram = RankingHistogram()
    assert np.isnan(histogram.scores()).all()
    histogram.add(background, score)
    assert np.isnan(histogram.scores()).all()


def test_the_pooled_ranking_equals_sklearns_on_all_pixels():
    histogram, images = RankingHistogram(), [random_image(seed, (90, 110)) for seed in range(4)]
    for mask, _, probability, _ in images:
        histogram.add(mask, probability)
    masks, scores = (np.concatenate([image[i].ravel() for image in images]) for i in (0, 2))
    assert histogram.scores() == pytest.approx(sklearn_ranking(masks, scores), abs=1e-4)
    tp, fp = histogram.rates()
    assert (tp[0], fp[0], tp[-1], fp[-1]) == (0, 0, masks.sum(), (~masks).sum())
    assert (np.diff(tp) >= 0).all() and tp.shape == fp.shape == (4097,)


def test_probabilities_of_exactly_zero_and_one_are_ranked():
    mask = np.array([True, True, False, False, True, False]).repeat(10_000)
    probability = np.array([1.0, 0.0, 0.0, 1.0, 0.5, 0.5]).repeat(10_000)
    histogram = RankingHistogram()
    histogram.add(mask, probability)
    assert histogram.scores() == pytest.approx(sklearn_ranking(mask, probability), abs=1e-4)


@pytest.mark.parametrize(("mean", "deviation"), [(9, 4), (3, 2), (5, 4)])  # the first: most beyond 0.001 and 0.999
def test_the_pooled_ranking_is_as_near_to_the_exact_one_as_stated(mean, deviation):
    rng = np.random.default_rng(0)
    mask = rng.random(20 * 256 * 256) < 0.12
    probability = 1 / (1 + np.exp(-rng.normal(np.where(mask, mean, -mean), deviation)))
    histogram = RankingHistogram()
    histogram.add(mask, probability.astype(np.float32))
    area, precision = np.abs(np.subtract(histogram.scores(), ranking_scores(mask, probability.astype(np.float32))))
    assert area < 1e-6 and precision < 5e-6


def line(first=5, last=35, row=4, thickness=1, shape=(12, 40)):
    """A horizontal line (12, 40) bool: columns `first` to `last` - 1."""
    vessels = np.zeros(shape, bool)
    vessels[row - thickness // 2 : row + thickness // 2 + 1, first:last] = True
    return vessels


NOTHING = np.zeros((12, 40), bool)


def line_score(mask, predicted, region=None):
    return score_image(mask, predicted, None, {"here": region})["here"].scores["cldice"]


def test_cldice_of_lines_by_hand():
    for thickness in (1, 3, 5):
        assert line_score(line(thickness=thickness), line(thickness=thickness)) == 1
    # all of the prediction is inside the mask, half of the mask's line inside the prediction: 2 * 1 * 0.5 / 1.5
    assert line_score(line(5, 35), line(5, 20)) == pytest.approx(2 / 3)
    assert line_score(line(5, 20), line(5, 35)) == pytest.approx(2 / 3)  # and half false positive
    broken = line(5, 35) & ~line(14, 20)
    assert line_score(line(5, 35), broken) == pytest.approx(2 * 1 * 0.8 / 1.8)  # a gap of 6 in 30
    assert line_score(line(row=4), line(row=5)) == 0  # beside a thin vessel, inside a thick one
    assert line_score(line(row=5, thickness=5), line(row=6, thickness=5)) == 1


def test_cldice_weighs_a_thin_vessel_as_a_thick_one():
    thick, thin = line(row=3, thickness=5), line(row=9)
    score = line_score(thick | thin, thick)
    share = centre_line(thick).sum() / (centre_line(thick).sum() + 30)
    assert score == pytest.approx(2 * share / (1 + share))
    assert score < 0.7 < scores_from_counts(count(thick | thin, thick))["f1"]


def test_cldice_of_nothing_is_zero_and_of_two_nothings_undefined():
    assert line_score(line(), NOTHING) == line_score(NOTHING, line()) == 0
    assert math.isnan(line_score(NOTHING, NOTHING))
    # 6 of 8 predicted pixels inside the mask, 5 of 10 mask pixels inside the prediction
    assert cldice(LineCounts(8, 6, 10, 5)) == pytest.approx(2 * 0.75 * 0.5 / 1.25)


def test_a_region_cuts_the_centre_lines_that_were_found_on_the_frame():
    mask, predicted = line(5, 35), line(5, 20)
    left, right, upper = (np.zeros_like(mask) for _ in range(3))
    left[:, :20], right[:, 25:], upper[:5] = True, True, True
    assert line_score(mask, predicted, left) == 1
    assert line_score(mask, predicted, right) == 0
    # a region's own edge makes no new centre: a bar cut lengthwise keeps the middle it has in the frame
    bar = line(row=5, thickness=5)
    lines = score_image(bar, bar, None, {"upper": upper})["upper"].lines
    assert lines.mask == (centre_line(bar) & upper).sum()


def test_an_image_is_scored_in_every_region_by_its_own_pixels_as_sklearn_does():
    for seed in range(5):
        mask, predicted, probability, region = random_image(seed)
        results = score_image(mask, predicted, probability, {"frame": None, "fov": region})
        for name, chosen in (("frame", np.ones_like(region)), ("fov", region)):
            scores = results[name].scores
            assert tuple(scores) == SCORES and 0 < scores["cldice"] < 1
            for key, formula in SKLEARN.items():
                assert scores[key] == pytest.approx(formula(mask[chosen], predicted[chosen]), abs=1e-12), key
            ranking = sklearn_ranking(mask[chosen], probability[chosen])
            assert (scores["auc"], scores["average_precision"]) == pytest.approx(ranking)
            assert results[name].ranking.counts.sum(axis=1).tolist() == [(~mask & chosen).sum(), (mask & chosen).sum()]
        assert all(results["frame"].scores[key] != results["fov"].scores[key] for key in SCORES)
    empty = score_image(mask, predicted, probability, {"fov": np.zeros_like(region)})["fov"].scores
    assert np.isnan(list(empty.values())).all()


def gathered(images, inside=False):
    return SetScores([score_image(*image, {"here": region if inside else None})["here"] for *image, region in images])


@pytest.mark.parametrize("inside", [False, True])
def test_the_summary_of_two_images_by_hand(inside):
    images = [random_image(1), random_image(2, (40, 17))]
    scores = gathered(images, inside)
    summary = scores.summary()
    assert set(summary) == {"mean", "std", "pooled", "ci95"}
    assert set(summary["ci95"]) == {"f1", "auc"}
    for name in SCORES:
        first, second = (image.scores[name] for image in scores.images)
        assert summary["mean"][name] == pytest.approx((first + second) / 2)
        assert summary["std"][name] == pytest.approx(abs(first - second) / math.sqrt(2))  # n - 1 in the denominator
    mask, predicted, probability = (
        np.concatenate([image[i][image[3]] if inside else image[i].ravel() for image in images]) for i in range(3)
    )
    for name, formula in SKLEARN.items():
        assert summary["pooled"][name] == pytest.approx(formula(mask, predicted)), name
    pooled = summary["pooled"]["auc"], summary["pooled"]["average_precision"]
    # of a few hundred pixels, two in one bin weigh more than in an image
    assert pooled == pytest.approx(sklearn_ranking(mask, probability), abs=1e-3)
    assert summary["pooled"]["cldice"] == cldice(scores.images[0].lines + scores.images[1].lines)
    assert summary["pooled"]["f1"] != pytest.approx(summary["mean"]["f1"], abs=1e-6)
    assert summary["ci95"]["f1"] == list(bootstrap([image.scores["f1"] for image in scores.images]))


def test_images_without_a_score_are_left_out_of_its_mean():
    (mask, predicted, probability, region), empty = random_image(1), np.zeros((23, 31), bool)
    alone = gathered([(mask, predicted, probability, region)]).summary()["mean"]
    summary = gathered([(mask, predicted, probability, region), (empty, empty, probability, region)]).summary()
    for name in ("f1", "recall", "auc", "cldice"):
        assert summary["mean"][name] == alone[name] and math.isnan(summary["std"][name])
    assert summary["mean"]["specificity"] == pytest.approx((alone["specificity"] + 1) / 2)
    nothing = SetScores([]).summary()
    for kind in ("mean", "std", "pooled"):
        assert tuple(nothing[kind]) == SCORES and np.isnan(list(nothing[kind].values())).all()
    without_probabilities = gathered([(mask, predicted, None, region)]).summary()
    for kind in ("mean", "pooled"):  # as a second observer's mask
        undefined = {name for name, value in without_probabilities[kind].items() if math.isnan(value)}
        assert undefined == {"auc", "average_precision"}


def test_the_bootstrap_has_the_width_theory_gives_it():
    values = np.random.default_rng(1).normal(0.8, 0.05, 200)
    low, high = bootstrap(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(values.size)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap(values, seed=1) != (low, high)
    assert bootstrap([0.25, 0.25, 0.25]) == (0.25, 0.25)
    assert np.isnan([bootstrap([]), bootstrap([0.5])]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_by_threshold_are_sklearns(dtype):
    rng = np.random.default_rng(5)
    mask, probability = rng.random(300) < 0.2, np.round(rng.random(300), 2).astype(dtype)  # many lie on a threshold
    scores = threshold_scores(mask, probability)
    for number in (0, 24, 49, 74):
        for name in ("f1", "recall", "precision", "accuracy"):
            expected = SKLEARN[name](mask, probability > np.float64((number + 1) / 100))
            assert scores[name][number] == pytest.approx(expected), (name, number)
    empty = threshold_scores(np.zeros(4, bool), np.zeros(4))
    assert np.isnan(empty["f1"]).all() and np.isnan(empty["recall"]).all() and (empty["accuracy"] == 1).all()
