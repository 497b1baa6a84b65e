"""Every score against sklearn or a count by hand, inside a region and over the frame, and what cannot be scored."""

import math

import numpy as np
import pytest
from sklearn import metrics as oracle

from retina_seg import metrics
from retina_seg.metrics import (
    FROM_COUNTS,
    SCORES,
    Counts,
    LineCounts,
    RankingHistogram,
    SetScores,
    average_precision,
    best_threshold,
    bootstrap,
    centre_line,
    cldice,
    count,
    score_photo,
)

SKLEARN = {
    "jaccard": oracle.jaccard_score,
    "f1": oracle.f1_score,
    "recall": oracle.recall_score,
    "precision": oracle.precision_score,
    "accuracy": oracle.accuracy_score,
    "mcc": oracle.matthews_corrcoef,
    "specificity": lambda label, predicted: oracle.recall_score(~label, ~predicted),
}


def random_photo(seed, shape=(23, 31), levels=None):
    """(label, predicted, probability, region): rare vessels, a fair but biased prediction, a lop-sided region."""
    rng = np.random.default_rng(seed)
    label = rng.random(shape) < 0.15
    probability = np.clip(0.45 * label + 0.7 * rng.random(shape), 0.001, 0.999)
    if levels:  # few values, so many ties
        probability = np.round(probability * levels) / levels
    region = np.zeros(shape, bool)
    region[3:, : shape[1] // 2] = True
    return label, probability > 0.5, probability, region


def places(c):
    return c.tp, c.fp, c.fn, c.tn


# ----------------------------------------------------------------------------------------------------------- from counts


def test_four_pixels_and_more_counted_by_hand():
    label = np.array([[True, True, True, False, False, False, False, False]])
    predicted = np.array([[True, True, False, True, False, False, False, False]])
    c = count(label, predicted)
    assert places(c) == (2, 1, 1, 4)
    found = {name: function(c) for name, function in FROM_COUNTS.items()}
    assert found == pytest.approx(
        {
            "jaccard": 2 / 4,
            "f1": 4 / 6,
            "recall": 2 / 3,
            "precision": 2 / 3,
            "accuracy": 6 / 8,
            "specificity": 4 / 5,
            "mcc": (2 * 4 - 1) / math.sqrt(3 * 3 * 5 * 5),
        }
    )
    assert count(label, predicted, label) == Counts(2, 0, 1, 0)
    assert count(label, predicted, ~label) == Counts(0, 1, 0, 4)


def test_precision_and_recall_are_not_swapped():
    timid = Counts(tp=1, fp=0, fn=3, tn=6)  # finds a quarter, invents nothing
    assert (metrics.precision(timid), metrics.recall(timid)) == (1.0, 0.25)
    assert count(np.array([True, True]), np.array([True, False])) == Counts(1, 0, 1, 0)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", SKLEARN)
def test_scores_from_counts_equal_sklearns(name, inside):
    for seed in range(5):
        label, predicted, _, region = random_photo(seed)
        chosen = region if inside else np.ones_like(region)
        expected = SKLEARN[name](label[chosen], predicted[chosen])
        assert FROM_COUNTS[name](count(label, predicted, region if inside else None)) == pytest.approx(
            expected, abs=1e-12
        )


def test_counts_equal_a_walk_over_the_pixels():
    label, predicted, _, region = random_photo(9)
    walked = {"tp": 0, "fp": 0, "fn": 0, "tn": 0}
    for truth, said, here in zip(label.flat, predicted.flat, region.flat, strict=True):
        if here:
            walked[("t" if truth == said else "f") + ("p" if said else "n")] += 1
    c = count(label, predicted, region)
    assert c == Counts(**walked)
    assert sum(places(c)) == region.sum()
    assert metrics.specificity(c) == walked["tn"] / (walked["tn"] + walked["fp"])


def test_counts_of_two_halves_add_up_to_the_whole():
    label, predicted, _, region = random_photo(3)
    assert count(label, predicted, region) + count(label, predicted, ~region) == count(label, predicted)


@pytest.mark.parametrize(
    ("counts", "undefined"),
    [
        (Counts(0, 0, 0, 0), set(FROM_COUNTS)),
        (Counts(0, 0, 0, 9), {"jaccard", "f1", "recall", "precision", "mcc"}),  # nothing there, nothing said
        (Counts(0, 3, 0, 9), {"recall", "mcc"}),  # nothing there
        (Counts(0, 0, 3, 9), {"precision", "mcc"}),  # nothing said
        (Counts(5, 0, 0, 0), {"specificity", "mcc"}),  # vessel only
        (Counts(5, 1, 1, 9), set()),
    ],
)
def test_a_score_that_cannot_be_had_is_nan_and_no_other(counts, undefined):
    assert {name for name, function in FROM_COUNTS.items() if math.isnan(function(counts))} == undefined


def test_the_ends_of_the_scale():
    right, wrong = Counts(5, 0, 0, 7), Counts(0, 7, 5, 0)
    assert {function(right) for function in FROM_COUNTS.values()} == {1.0}
    assert metrics.mcc(wrong) == -1
    assert {function(wrong) for name, function in FROM_COUNTS.items() if name != "mcc"} == {0.0}


def test_a_thousand_million_pixels_do_not_overflow():
    small = Counts(12, 3, 5, 80)
    large = Counts(*(value * 10**7 for value in places(small)))
    for name, function in FROM_COUNTS.items():
        assert function(large) == pytest.approx(function(small), rel=1e-12), name


def test_counts_are_pythons_integers():
    assert all(type(value) is int for value in places(count(*random_photo(0)[:2])))


def test_other_types_and_shapes_are_refused():
    label = np.zeros((2, 3), bool)
    for wrong in (label.astype(np.uint8), label.astype(float)):
        for arguments in ((wrong, label), (label, wrong), (label, label, wrong)):
            with pytest.raises(TypeError, match="bool"):
                count(*arguments)
    for other in ((3, 2), (1, 3), (6,), (2, 3, 1)):
        wrong = np.zeros(other, bool)
        for arguments in ((label, wrong), (label, label, wrong)):
            with pytest.raises(ValueError, match="differ in shape"):
                count(*arguments)


# --------------------------------------------------------------------------------------------------------- from a ranking


@pytest.mark.parametrize("levels", [None, 255, 8, 1])
def test_auc_and_average_precision_equal_sklearns_with_any_ties(levels):
    for seed in range(4):
        label, _, probability, _ = random_photo(seed, levels=levels)
        expected = oracle.roc_auc_score(label.ravel(), probability.ravel())
        assert metrics.auc(label, probability) == pytest.approx(expected, abs=1e-12)
        expected = oracle.average_precision_score(label.ravel(), probability.ravel())
        assert average_precision(label, probability) == pytest.approx(expected, abs=1e-12)


def test_a_ranking_by_hand():
    label = np.array([True, False, True, False])
    score = np.array([0.9, 0.6, 0.4, 0.1])
    assert metrics.auc(label, score) == 3 / 4  # of four pairs one is the wrong way round
    assert average_precision(label, score) == (1 / 1 + 2 / 3) / 2
    assert metrics.auc(label, np.full(4, 0.3)) == 0.5
    assert average_precision(label, np.full(4, 0.3)) == 0.5
    assert metrics.auc(label, -score) == 1 / 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_the_ends_of_a_ranking_in_every_precision(dtype):
    label = np.array([True, True, False, False])
    assert metrics.auc(label, np.array([1, 0.75, 0.25, 0], dtype)) == 1
    assert metrics.auc(label, np.array([0, 0.25, 0.75, 1], dtype)) == 0
    assert average_precision(label, np.array([1, 0.75, 0.25, 0], dtype)) == 1


def test_one_class_alone_cannot_be_ranked():
    score = np.array([0.1, 0.9])
    for label in (np.array([True, True]), np.array([False, False]), np.zeros(0, bool)):
        assert math.isnan(metrics.auc(label, score[: label.size]))
    assert math.isnan(average_precision(np.array([False, False]), score))
    assert average_precision(np.array([True, True]), score) == 1


def test_the_pooled_ranking_equals_sklearns_on_all_pixels():
    histogram, photos = RankingHistogram(), [random_photo(seed, (90, 110)) for seed in range(4)]
    for label, _, probability, _ in photos:
        histogram.add(label, probability)
    labels = np.concatenate([photo[0].ravel() for photo in photos])
    scores = np.concatenate([photo[2].ravel() for photo in photos])
    assert histogram.auc() == pytest.approx(oracle.roc_auc_score(labels, scores), abs=1e-4)
    assert histogram.average_precision() == pytest.approx(oracle.average_precision_score(labels, scores), abs=1e-4)
    found, invented = histogram.rates()
    assert (found[0], invented[0]) == (0, 0)
    assert (found[-1], invented[-1]) == (labels.sum(), (~labels).sum())
    assert (np.diff(found) >= 0).all()


def test_the_pooled_ranking_keeps_sure_pixels_apart():
    # a confident network: nearly all below 0.001 or above 0.999, where steps of 1/256 or 1/1000 would see one heap
    rng = np.random.default_rng(0)
    label = rng.random(20_000) < 0.2
    probability = 1 / (1 + np.exp(-rng.normal(np.where(label, 9, -9), 4)))
    histogram = RankingHistogram()
    histogram.add(label, probability.astype(np.float32))
    assert histogram.auc() == pytest.approx(oracle.roc_auc_score(label, probability), abs=1e-4)
    assert histogram.average_precision() == pytest.approx(oracle.average_precision_score(label, probability), abs=1e-4)


def test_the_pooled_ranking_does_not_grow_with_the_set():
    histogram = RankingHistogram()
    shapes = []
    for shape in ((3, 4), (50, 60), (1,)):
        label = np.zeros(shape, bool)
        histogram.add(label, np.full(shape, 0.3))
        shapes.append((histogram.positive.shape, histogram.negative.shape, *(a.shape for a in histogram.rates())))
    assert set(shapes) == {((65_536,), (65_536,), (65_537,), (65_537,))}
    assert histogram.negative.sum() == 12 + 3000 + 1


def test_probabilities_of_exactly_nought_and_one_are_ranked():
    label = np.array([True, True, False, False, True, False])
    probability = np.array([1.0, 0.0, 0.0, 1.0, 0.5, 0.5])
    for dtype in (np.float32, np.float64):
        histogram = RankingHistogram()
        histogram.add(label, probability.astype(dtype))
        assert histogram.auc() == pytest.approx(oracle.roc_auc_score(label, probability), abs=1e-12)
        expected = oracle.average_precision_score(label, probability)
        assert histogram.average_precision() == pytest.approx(expected, abs=1e-12)


def test_an_empty_pool_cannot_be_ranked():
    histogram = RankingHistogram()
    assert math.isnan(histogram.auc())
    assert math.isnan(histogram.average_precision())
    histogram.add(np.zeros(3, bool), np.zeros(3))
    assert math.isnan(histogram.auc())
    assert math.isnan(histogram.average_precision())


# ------------------------------------------------------------------------------------------------------------ centre lines


def drawn(*rows):
    return np.array([[character != "." for character in row] for row in rows])


def line(first=5, last=35, row=4, thickness=1, shape=(12, 40)):
    """A horizontal line: columns first to last - 1."""
    picture = np.zeros(shape, bool)
    picture[row - thickness // 2 : row + thickness // 2 + 1, first:last] = True
    return picture


def line_score(label, predicted, region=None):
    return score_photo(label, predicted, None, {"here": region})["here"].scores["cldice"]


def test_the_centre_line_of_a_drawn_bar_is_its_middle_row():
    bar = drawn(
        "...............",
        ".#############.",
        ".#############.",
        ".#############.",
        "...............",
    )
    middle = centre_line(bar)
    assert middle.dtype == bool
    assert (middle.sum(axis=0) <= 1).all()
    assert middle.sum() >= 10
    assert set(np.argwhere(middle[:, 4:11])[:, 0]) == {2}  # at the ends it may turn to a corner


def test_a_line_one_pixel_wide_is_its_own_centre():
    stairs = drawn(
        "#.....",
        ".#....",
        "..#...",
        "...###",
    )
    assert np.array_equal(centre_line(stairs), stairs)


def test_a_perfect_prediction_has_cldice_one():
    for thickness in (1, 3, 5):
        assert line_score(line(thickness=thickness), line(thickness=thickness)) == 1


def test_a_line_found_by_half_has_cldice_two_thirds():
    # all of the prediction is right, half of the label is found: 2 * 1 * 0.5 / 1.5
    assert line_score(line(5, 35), line(5, 20)) == pytest.approx(2 / 3)
    assert line_score(line(5, 20), line(5, 35)) == pytest.approx(2 / 3)  # and half invented
    broken = line(5, 35) & ~line(14, 20)
    assert line_score(line(5, 35), broken) == pytest.approx(2 * 1 * 0.8 / 1.8)  # a gap of 6 in 30


def test_a_thin_line_beside_the_label_is_missed_a_thick_one_is_not():
    assert line_score(line(row=4), line(row=5)) == 0
    assert line_score(line(row=5, thickness=5), line(row=6, thickness=5)) == 1


def test_cldice_weighs_a_thin_vessel_as_a_thick_one():
    thick, thin = line(row=3, thickness=5), line(row=9)
    score = line_score(thick | thin, thick)
    share = centre_line(thick).sum() / (centre_line(thick).sum() + 30)
    assert score == pytest.approx(2 * share / (1 + share))
    assert score < 0.7 < metrics.f1(count(thick | thin, thick))


def test_cldice_of_nothing_is_nought_and_of_two_nothings_undefined():
    nothing = np.zeros((12, 40), bool)
    assert line_score(line(), nothing) == 0
    assert line_score(nothing, line()) == 0
    assert math.isnan(line_score(nothing, nothing))
    assert cldice(LineCounts(4, 0, 5, 0)) == 0


def test_cldice_by_hand_from_its_counts():
    # 6 of 8 predicted pixels right, 5 of 10 label pixels found
    assert cldice(LineCounts(8, 6, 10, 5)) == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert LineCounts(1, 2, 3, 4) + LineCounts(10, 20, 30, 40) == LineCounts(11, 22, 33, 44)


def test_a_region_cuts_the_centre_lines_that_were_found_on_the_frame():
    label, predicted = line(5, 35), line(5, 20)
    left, right = np.zeros_like(label), np.zeros_like(label)
    left[:, :20], right[:, 25:] = True, True
    assert line_score(label, predicted, left) == 1
    assert line_score(label, predicted, right) == 0
    # a region's own edge makes no new centre: a bar cut lengthwise keeps the middle it has in the frame
    bar = line(row=5, thickness=5)
    upper = np.zeros_like(bar)
    upper[:5] = True
    lines = score_photo(bar, bar, None, {"upper": upper})["upper"].lines
    assert lines.label == (centre_line(bar) & upper).sum()


# ----------------------------------------------------------------------------------------------------- a photo and a set


def test_a_photo_is_scored_in_every_region_by_its_own_pixels():
    label, predicted, probability, region = random_photo(1)
    results = score_photo(label, predicted, probability, {"frame": None, "fov": region})
    assert list(results) == ["frame", "fov"]
    for name, chosen in (("frame", np.ones_like(region)), ("fov", region)):
        scores = results[name].scores
        assert tuple(scores) == SCORES
        assert results[name].counts == count(label[chosen], predicted[chosen])
        for key, formula in SKLEARN.items():
            assert scores[key] == pytest.approx(formula(label[chosen], predicted[chosen])), key
        assert scores["auc"] == pytest.approx(oracle.roc_auc_score(label[chosen], probability[chosen]))
        expected = oracle.average_precision_score(label[chosen], probability[chosen])
        assert scores["average_precision"] == pytest.approx(expected)
        assert 0 < scores["cldice"] < 1
    for key in SCORES:
        assert results["frame"].scores[key] != results["fov"].scores[key], key


def test_the_field_of_view_is_respected():
    label, predicted, probability, region = random_photo(2)
    outside = predicted ^ ~region  # all that lies outside is turned round
    first = score_photo(label, predicted, probability, {"fov": region})["fov"]
    second = score_photo(label, outside, np.where(region, probability, 1 - probability), {"fov": region})["fov"]
    assert first.counts == second.counts
    assert first.scores["auc"] == second.scores["auc"]


def test_without_probabilities_the_ranking_scores_are_nan_and_no_others():
    label, predicted, _, _ = random_photo(1)
    scores = score_photo(label, predicted, None, {"frame": None})["frame"].scores
    assert {name for name, value in scores.items() if math.isnan(value)} == {"auc", "average_precision"}


def test_an_empty_region_scores_nothing():
    label, predicted, probability, region = random_photo(1)
    scores = score_photo(label, predicted, probability, {"fov": np.zeros_like(region)})["fov"].scores
    assert all(math.isnan(value) for value in scores.values())


def gathered(photos, inside=False):
    scores = SetScores()
    for label, predicted, probability, region in photos:
        here = region if inside else None
        places = None if probability is None else RankingHistogram.places(probability)
        scores.add(score_photo(label, predicted, probability, {"here": here})["here"], label, places, here)
    return scores


@pytest.mark.parametrize("inside", [False, True])
def test_the_summary_of_two_photos_by_hand(inside):
    photos = [random_photo(1), random_photo(2, (40, 17))]
    scores = gathered(photos, inside)
    summary = scores.summary()
    assert set(summary) == {"mean", "std", "pooled", "ci95"}
    assert set(summary["ci95"]) == {"f1", "auc"}
    for name in SCORES:
        first, second = (photo.scores[name] for photo in scores.photos)
        assert summary["mean"][name] == pytest.approx((first + second) / 2)
        assert summary["std"][name] == pytest.approx(abs(first - second) / math.sqrt(2))  # n - 1 in the denominator

    def heap(i):
        return np.concatenate([photo[i][photo[3]] if inside else photo[i].ravel() for photo in photos])

    label, predicted, probability = heap(0), heap(1), heap(2)
    for name, formula in SKLEARN.items():
        assert summary["pooled"][name] == pytest.approx(formula(label, predicted)), name
    assert summary["pooled"]["auc"] == pytest.approx(oracle.roc_auc_score(label, probability), abs=1e-3)
    expected = oracle.average_precision_score(label, probability)
    # of a few hundred pixels, two in one bin weigh more than in a photo
    assert summary["pooled"]["average_precision"] == pytest.approx(expected, abs=1e-3)
    lines = scores.photos[0].lines + scores.photos[1].lines
    assert summary["pooled"]["cldice"] == cldice(lines)
    assert summary["pooled"]["f1"] != pytest.approx(summary["mean"]["f1"], abs=1e-6)


def test_photos_without_a_score_are_left_out_of_its_mean():
    label, predicted, probability, region = random_photo(1)
    empty = np.zeros_like(label)
    alone = gathered([(label, predicted, probability, region)]).summary()
    summary = gathered([(label, predicted, probability, region), (empty, empty, probability, region)]).summary()
    for name in ("f1", "recall", "auc", "cldice"):
        assert summary["mean"][name] == alone["mean"][name]
        assert math.isnan(summary["std"][name])
    assert summary["mean"]["specificity"] == pytest.approx((alone["mean"]["specificity"] + 1) / 2)


def test_the_summary_of_no_photo_is_nan_throughout():
    summary = SetScores().summary()
    for kind in ("mean", "std", "pooled"):
        assert set(summary[kind]) == set(SCORES)
        assert all(math.isnan(value) for value in summary[kind].values())
    assert all(math.isnan(value) for interval in summary["ci95"].values() for value in interval)


def test_humans_without_probabilities_have_no_pooled_ranking():
    photos = [(label, predicted, None, region) for label, predicted, _, region in map(random_photo, (1, 2))]
    summary = gathered(photos).summary()
    assert math.isnan(summary["pooled"]["auc"])
    assert math.isnan(summary["mean"]["average_precision"])
    assert summary["pooled"]["f1"] > 0


def test_the_interval_brackets_the_mean_and_is_the_same_every_time():
    summary = gathered([random_photo(seed) for seed in range(8)]).summary()
    for name in ("f1", "auc"):
        low, high = summary["ci95"][name]
        assert low < summary["mean"][name] < high
    assert gathered([random_photo(seed) for seed in range(8)]).summary() == summary


def test_the_bootstrap_has_the_width_theory_gives_it():
    values = np.random.default_rng(1).normal(0.8, 0.05, 200)
    low, high = bootstrap(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap(values, seed=1) != (low, high)


def test_the_bootstrap_of_equal_values_is_that_value_and_of_one_unknown():
    assert bootstrap([0.25, 0.25, 0.25]) == (0.25, 0.25)
    for few in ([], [0.5]):
        assert all(math.isnan(end) for end in bootstrap(few))


# -------------------------------------------------------------------------------------------------------------- threshold


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_best_threshold_is_brute_forces(dtype):
    for seed in range(3):
        photos = [random_photo(10 * seed + k, (20, 20 + k)) for k in range(3)]
        labels = [photo[0].ravel() for photo in photos]
        probabilities = [(photo[2] ** 2).ravel().astype(dtype) for photo in photos]

        def mean_f1(threshold, labels=labels, probabilities=probabilities):
            return np.mean([oracle.f1_score(a, b > threshold) for a, b in zip(labels, probabilities, strict=True)])

        by_force = [mean_f1(step / 100) for step in range(1, 100)]
        assert best_threshold(labels, probabilities) == (1 + int(np.argmax(by_force))) / 100


def test_the_best_threshold_is_the_mean_over_photos_not_the_pool():
    # the large photo alone wants 0.8, the two small ones 0.2
    large = np.r_[np.ones(100, bool), np.zeros(100, bool)], np.r_[np.full(100, 0.9), np.full(100, 0.75)]
    small = np.array([True, False]), np.array([0.3, 0.15])
    photos = [large, small, small]
    assert best_threshold(*zip(large, strict=True)) == 0.75
    assert best_threshold(*zip(*photos, strict=True)) == 0.15


def test_of_equal_thresholds_the_lowest_is_taken():
    assert best_threshold([np.array([True, False])], [np.array([0.9, 0.305])]) == 0.31


def test_a_threshold_needs_photos_and_as_many_probabilities():
    with pytest.raises(ValueError, match="no photos"):
        best_threshold([], [])
    with pytest.raises(ValueError, match="zip"):
        best_threshold([np.array([True])], [])
