"""The weights that ship: whole, small, described, and giving the scores that their card and the tables state."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from retina_seg.check import fingerprint, same_photo
from retina_seg.predict import WEIGHTS, Segmenter, shipped_weights
from retina_seg.synthetic import draw_photo

from retina_seg import cli
from retina_seg.data import list_pairs
from retina_seg.images import list_pictures, read_photo
from retina_seg.metrics import count, f1
from retina_seg.model import count_parameters, load_checkpoint
from retina_seg.test import score_pairs
from retina_seg.train import PRESETS, TrainConfig

RESULTS = Path(__file__).parents[1] / "results"


def test_there_are_weights():
    assert "drive" in shipped_weights()


@pytest.mark.parametrize("name", shipped_weights())
def test_weights_are_the_ones_their_card_describes(name):
    content = (WEIGHTS / f"{name}.pth").read_bytes()
    card = (WEIGHTS / f"{name}.md").read_text()
    assert len(content) <= 3_000_000
    assert re.search(r"SHA-256: `(\w+)`", card)[1] == hashlib.sha256(content).hexdigest()
    assert "not a medical device" in card
    assert f"{count_parameters(Segmenter.load(name).model):,} parameters" in card


@pytest.mark.parametrize("name", shipped_weights())
def test_weights_find_the_vessels_of_a_photo_they_have_never_seen(name):
    drawn = draw_photo(77, 584, 565)
    segmenter = Segmenter.load(name, precision="float32")
    assert f1(count(drawn.mask > 0, segmenter.vessels(drawn.photo), drawn.fov > 0)) > 0.6
    # and none where nothing is seen
    assert not segmenter.vessels(np.zeros((300, 300, 3), np.uint8)).any()


def test_predict_needs_no_weights_named(tmp_path):
    from retina_seg.images import write_picture

    write_picture(tmp_path / "eye.png", draw_photo(3, 200, 210).photo)
    assert cli.main(["predict", str(tmp_path / "eye.png"), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/eye_vessels.png").is_file()


@pytest.mark.real
@pytest.mark.parametrize("name", shipped_weights())
def test_no_test_photo_mirrored_or_turned_is_among_those_trained_on(name, real_data):
    trained_on = {entry.rsplit("/", 1)[-1] for entry in load_checkpoint(WEIGHTS / f"{name}.pth")["trained_on"]}
    folders = [real_data / "DRIVE/training/images", real_data / "CHASE_DB1", *(real_data / "LES-AV").glob("*/images")]
    training = [path for folder in folders for path in list_pictures(folder) if path.stem in trained_on]
    assert len(training) == len(trained_on)
    tested = [pair.image for pair in list_pairs(real_data / "Data1", "test")]
    prints = np.stack([fingerprint(read_photo(path)) for path in training + tested])
    assert [pair for pair in same_photo(prints) if pair[0] < len(training) <= pair[1]] == []
    # and were one of them there, it would be found
    planted = fingerprint(np.rot90(read_photo(tested[3])[:, ::-1]))
    found = [pair[:2] for pair in same_photo(np.concatenate([prints, planted[None]])) if pair[1] == len(prints)]
    assert found == [(len(training) + 3, len(prints))]


STATED = [(name, {"drive": "fast"}.get(name, name)) for name in shipped_weights()]


@pytest.mark.parametrize(("name", "run"), STATED)
def test_weights_are_of_the_recipe_that_is_named_after_them(name, run):
    trained = TrainConfig.from_json(RESULTS / run / "config.json")
    recipe = PRESETS[run](data=trained.data, output=trained.output)
    recipe.largest_diameter = trained.largest_diameter  # of use, not of training: `general` got its own later
    assert recipe == trained


@pytest.mark.real
@pytest.mark.parametrize(("name", "run"), [*STATED, ("drive", "fast/flips-cv-threshold")])
def test_weights_give_the_committed_scores(name, run, real_data):
    stated = json.loads((RESULTS / run / "metrics.json").read_text())
    how = stated["protocol"]
    segmenter = Segmenter.load(name, precision="float32", flips=how["flips"])
    pairs = list_pairs(real_data / "Data1", "test")
    scores = score_pairs(segmenter, pairs, "notebook", how["threshold"], progress=False)
    for region in ("frame", "fov"):
        for score in ("f1", "auc", "accuracy", "mcc"):
            assert scores[region]["mean"][score] == pytest.approx(stated[region]["mean"][score], abs=5e-5)
