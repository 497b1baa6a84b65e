"""The threshold that held-out photos choose: the curves against scikit-learn's, the choice, what is refused."""

import csv

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from retina_seg import cli
from retina_seg.metrics import threshold_scores
from retina_seg.predict import Segmenter
from retina_seg.test import held_out_pairs, prepare_pair
from retina_seg.threshold import choose, threshold, threshold_curves
from retina_seg.train import TrainConfig, fit
from retina_seg.utils import UserError


@pytest.fixture(scope="module")
def lots(tiny_set, tmp_path_factory):
    """Two trainings of seconds that hold out one lot of two photos each."""
    folders = []
    for fold in (0, 1):
        folder = tmp_path_factory.mktemp("lots") / str(fold)
        config = TrainConfig.fast(
            **{"data": str(tiny_set), "output": str(folder), "model_arguments": {"width": 4, "deepest": 8, "fine": 4}},
            **{"size": 32, "repeats": 4, "epochs": 2, "fov_diameter": None, "precision": "float32"},
            **{"validation": "photos", "held_out": 2, "fold": fold},
        )
        fit(config, progress=False)
        folders.append(folder)
    return folders


def test_scores_by_threshold_are_scikit_learns():
    rng = np.random.default_rng(5)
    label, probability = rng.random(300) < 0.2, np.round(rng.random(300), 2)  # many lie on a threshold
    found = threshold_scores(label, probability)
    others = {"f1": f1_score, "recall": recall_score, "precision": precision_score, "accuracy": accuracy_score}
    for number in (0, 24, 49, 74):
        for name, other in others.items():
            expected = other(label, probability > (number + 1) / 100)
            assert found[name][number] == pytest.approx(expected), (name, number)


def test_what_no_photo_defines_is_nan_and_no_warning():
    empty = threshold_scores(np.zeros(4, bool), np.zeros(4))
    assert np.isnan(empty["f1"]).all() and np.isnan(empty["recall"]).all() and (empty["accuracy"] == 1).all()


def test_accuracy_chooses_among_thresholds_of_nearly_the_best_f1():
    curves = {
        "threshold": np.array([0.3, 0.4, 0.5, 0.6, 0.7]),
        "f1": np.array([0.80, 0.81, 0.8099, 0.8096, 0.80]),
        "accuracy": np.array([0.90, 0.91, 0.92, 0.93, 0.99]),
    }
    assert choose(curves) == {"f1": 0.4, "accuracy": 0.6}
    curves["f1"][1] = np.nan
    assert choose(curves)["f1"] == 0.5


@pytest.mark.parametrize("protocol", ["native", "notebook"])
def test_every_photo_is_scored_by_the_run_that_had_not_seen_it(lots, tiny_set, protocol):
    curves = threshold_curves(lots, tiny_set, protocol, progress=False)
    pairs = [(run, pair) for run in lots for pair in held_out_pairs(run, tiny_set)]
    assert curves["photos"] == [pair.name for _, pair in pairs] and len(set(curves["photos"])) == 4
    by_hand = []
    for run, pair in pairs:
        photo, label, fov, *_ = prepare_pair(pair, protocol)
        probability = Segmenter.load(run, precision="float32")(photo, everywhere=protocol == "notebook")
        inside = np.ones_like(fov) if protocol == "notebook" else fov
        by_hand.append(f1_score((label > 127)[inside], (probability > 0.2)[inside]))
    assert curves["f1"][19] == pytest.approx(np.mean(by_hand), abs=1e-6)


def test_table_and_picture_are_written(lots, tiny_set, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["threshold", *map(str, lots), "--data", str(tiny_set), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "4 held-out photos, native, field of view" in said and "highest F1" in said
    rows = list(csv.DictReader((output / "thresholds.csv").read_text().splitlines()))
    assert len(rows) == 99 and rows[49]["threshold"] == "0.50"
    curves = threshold_curves(lots, tiny_set, progress=False)
    assert float(rows[49]["accuracy"]) == pytest.approx(curves["accuracy"][49], abs=1e-6)
    assert (output / "thresholds.png").read_bytes()[:4] == b"\x89PNG"


def test_a_photo_held_out_twice_is_refused(lots, tiny_set, tmp_path):
    with pytest.raises(UserError, match="holds out photo .* as .* does"):
        threshold([lots[0], lots[0]], tiny_set, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_run_that_held_out_nothing_is_refused(tiny_run, tiny_set, tmp_path, capsys):
    arguments = ["threshold", str(tiny_run), "--data", str(tiny_set), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert "held out no training photos" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
