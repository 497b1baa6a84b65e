"""The threshold that held-out images choose: the curves against scikit-learn's, the choice, what is refused."""

import numpy as np
import pytest
from sklearn.metrics import f1_score
from test_train import tiny

from retina_seg.analysis.threshold import best_on, choose, held_out_folds, threshold, threshold_curves
from retina_seg.inference.protocol import get_protocol, predict_pairs
from retina_seg.inference.segmenter import Segmenter
from retina_seg.metrics import THRESHOLDS
from retina_seg.train import fit
from retina_seg.utils import UserError, read_csv


@pytest.fixture(scope="module")
def runs(tiny_set, tmp_path_factory):
    """Two trainings of seconds that hold out one fold of two images each."""
    folders = [tmp_path_factory.mktemp("folds") / str(fold) for fold in (0, 1)]
    for fold, folder in enumerate(folders):
        fit(tiny(tiny_set, folder, validation="photos", held_out=2, fold=fold), progress=False)
    return folders


def test_accuracy_chooses_among_thresholds_of_nearly_the_best_f1():
    f1, accuracy = np.full(99, 0.7), np.full(99, 0.8)
    f1[29:34] = (0.80, 0.81, 0.8099, 0.8096, 0.80)  # thresholds 0.30 to 0.34
    accuracy[29:34] = (0.90, 0.91, 0.92, 0.93, 0.99)
    assert choose({"f1": f1, "accuracy": accuracy}) == {"f1": 0.31, "accuracy": 0.33}
    f1[30] = np.nan
    assert choose({"f1": f1, "accuracy": accuracy})["f1"] == 0.32
    f1[31:60] = 0.9
    assert choose({"f1": f1, "accuracy": accuracy})["f1"] == 0.32  # the lowest of equals


@pytest.mark.parametrize("protocol", ["native", "notebook"])
def test_every_image_is_scored_by_the_run_that_had_not_seen_it(runs, tiny_set, protocol):
    folds = held_out_folds(runs, tiny_set)
    assert len({pair.name for _, pairs in folds for pair in pairs}) == 4
    curves = threshold_curves(folds, protocol, progress=False)
    by_hand = []
    for run, pairs in folds:
        for sample in predict_pairs(Segmenter.load(run, precision="float32"), pairs, get_protocol(protocol)):
            inside = np.ones_like(sample.fov) if protocol == "notebook" else sample.fov
            pixels = sample.mask[inside], sample.probability[inside]
            by_hand.append([f1_score(pixels[0], pixels[1] > cut, zero_division=np.nan) for cut in THRESHOLDS[9::10]])
    assert curves["f1"][9::10] == pytest.approx(np.nanmean(by_hand, axis=0), abs=1e-6)
    if protocol == "native":
        alone = threshold_curves(folds[:1], progress=False)["f1"]
        assert best_on(*folds[0]) == THRESHOLDS[np.nanargmax(alone)]


def test_table_and_figure_are_written(runs, tiny_set, tmp_path):
    lines = threshold(runs, tiny_set, tmp_path / "out", progress=False)
    assert lines[0] == "4 held-out images, native, field of view" and any("highest F1" in line for line in lines)
    rows = read_csv(tmp_path / "out/thresholds.csv", ["threshold", "f1", "recall", "precision", "accuracy"])
    assert len(rows) == 99 and float(rows[49]["threshold"]) == 0.5
    curves = threshold_curves(held_out_folds(runs, tiny_set), progress=False)
    assert float(rows[49]["accuracy"]) == pytest.approx(curves["accuracy"][49], abs=1e-6)
    assert (tmp_path / "out/thresholds.png").read_bytes()[:4] == b"\x89PNG"


def test_what_was_held_out_twice_or_not_at_all_is_refused(runs, tiny_run, tiny_set, tmp_path):
    with pytest.raises(UserError, match="both hold out .*give the folds of one draw"):
        threshold([runs[0], runs[0]], tiny_set, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="held out no training photos"):
        threshold([tiny_run], tiny_set, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
