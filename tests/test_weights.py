"""The pretrained weights: whole, small, described, and giving the scores that their card and the results state."""

import doctest
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import call, write

import retina_seg
from retina_seg.checkpoint import WEIGHTS, load_checkpoint, pretrained_weights
from retina_seg.config import TrainConfig
from retina_seg.data import list_pairs
from retina_seg.images import list_images, read_image
from retina_seg.inference.segmenter import Segmenter
from retina_seg.metrics import count, scores_from_counts
from retina_seg.model import count_parameters
from retina_seg.sets.check import fingerprint, same_photo
from retina_seg.sets.synthetic import synthetic_image
from retina_seg.test import score_pairs

RESULTS = Path(__file__).parents[1] / "results"
NAMES = ("drive", "general", "tiny")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_their_card_and_their_preset(name):
    content, card = (WEIGHTS / f"{name}.pth").read_bytes(), (WEIGHTS / f"{name}.md").read_text()
    assert len(content) <= 3_000_000
    assert re.search(r"SHA-256: `(\w+)`", card)[1] == hashlib.sha256(content).hexdigest()
    assert "not a medical device" in card and f"{count_parameters(Segmenter.load(name).model):,} parameters" in card
    config, notes = TrainConfig.from_json(RESULTS / name / "config.json"), load_checkpoint(WEIGHTS / f"{name}.pth")
    given = {"data": config.data, "output": config.output, "teacher": "general" if name == "tiny" else None}
    preset = TrainConfig.from_preset({"drive": "fast"}.get(name, name), **given)
    assert replace(config, workers=None) == preset
    styles = {"styles": len(config.data)} if preset.styles == "datasets" else {}
    assert (notes["model"], notes["arguments"]) == (preset.model, preset.model_arguments | styles)
    assert notes["frame"].get("largest_diameter") == preset.largest_diameter
    assert notes["frame"].get("normalise", False) == (preset.normalise == "fov")
    assert tuple(pretrained_weights()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_weights_segment_an_image_they_have_never_seen_and_nothing_in_a_black_one(name):
    synthetic = synthetic_image(77, 584, 565)
    segmenter = Segmenter.load(name, precision="float32")
    counts = count(synthetic.mask > 0, segmenter.vessels(synthetic.image), synthetic.fov > 0)
    assert scores_from_counts(counts)["f1"] > 0.6 and not segmenter.vessels(np.zeros((300, 300, 3), np.uint8)).any()


def test_predict_needs_no_weights_named_and_the_package_shows_its_use(tmp_path):
    image = write(tmp_path / "eye.png", synthetic_image(3, 200, 210).image)
    assert call("predict", image, "--output", tmp_path / "out") == 0
    assert (tmp_path / "out/eye_vessels.png").is_file()
    assert doctest.testmod(retina_seg) == (0, 6)


@pytest.mark.real
@pytest.mark.parametrize("name", NAMES)
def test_no_test_image_mirrored_or_rotated_is_among_those_trained_on(name, real_data):
    trained_on = load_checkpoint(WEIGHTS / f"{name}.pth")["trained_on"]
    folders = {"drive": "DRIVE/training/images", "chase_db1": "CHASE_DB1", "les-av": "LES-AV/*/images"}
    folders |= {other.lower(): f"{other}/train/image" for other in ("ARIA", "ORVS", "DR_HAGIS")}
    there = {
        (dataset, path.stem): path
        for dataset, where in folders.items()
        for folder in real_data.glob(where)
        for path in list_images(folder)
    }
    names = (entry.rpartition("/")[::2] for entry in trained_on)
    training = [there[dataset or "drive", image] for dataset, image in names]
    tested = [pair.image for pair in list_pairs(real_data / "Data1", "test")]
    # the last one is planted: were a test image trained on, it would be found
    planted = np.rot90(read_image(tested[3])[:, ::-1])
    prints = np.stack([*(fingerprint(read_image(path)) for path in training + tested), fingerprint(planted)])
    assert len(set(training)) == len(trained_on) >= 20
    tests_among = [pair for pair in same_photo(prints) if pair[1] >= len(training)]
    assert tests_among == [(len(training) + 3, len(prints) - 1)]


@pytest.mark.real
@pytest.mark.parametrize(("name", "run"), [*((name, name) for name in NAMES), ("drive", "drive/tta-cv-threshold")])
def test_weights_give_the_committed_scores(name, run, real_data):
    stated = json.loads((RESULTS / run / "metrics.json").read_text())
    how = stated["protocol"]
    segmenter = Segmenter.load(name, precision="float32", tta=how["tta"])
    pairs = list_pairs(real_data / "Data1", "test")
    scores = score_pairs(segmenter, pairs, how["name"], how["threshold"], progress=False)
    for region in ("frame", "fov"):
        for score in ("f1", "auc", "accuracy", "mcc", "cldice"):
            assert scores[region]["mean"][score] == pytest.approx(stated[region]["mean"][score], abs=5e-5)
