"""Robustness: every degradation by hand-checked values, whose field of view counts, the files written."""

import numpy as np
import pytest
from conftest import call
from test_test import Redness, set_of_one

from retina_seg.analysis.degrade import COLUMNS, DEGRADATIONS, degraded_scores
from retina_seg.data import list_pairs
from retina_seg.fov import find_fov
from retina_seg.images import read_image, write_image
from retina_seg.inference.protocol import get_protocol, predict_pairs
from retina_seg.inference.segmenter import Segmenter
from retina_seg.test import score_pairs
from retina_seg.transforms import FovFrame
from retina_seg.utils import read_csv

PLAIN = (200, 100, 40)
COLOURS = {  # of `PLAIN`
    "dimmed to 25 %": (50, 25, 10),
    "dimmed to 10 %": (20, 10, 4),
    "dimmed to 5 %": (10, 5, 2),
    "brightened 1.6x": (255, 160, 64),
    "gamma 0.5": (226, 160, 101),
    "gamma 2": (157, 39, 6),
    "warm tint": (200, 80, 20),
    "green channel only": (0, 100, 0),
    "blue missing": (200, 100, 0),
    "red saturated": (255, 100, 40),
    "red and blue swapped": (40, 100, 200),
    "inverted": (55, 155, 215),
    **dict.fromkeys(("untouched", "hazy 70 %", "JPEG quality 20", "half size", "double size"), PLAIN),
}


@pytest.mark.parametrize("name", COLOURS)
def test_a_plain_disc_becomes_the_colour_worked_out_by_hand(name):
    fov = np.tile(np.arange(64) >= 32, (32, 1))
    result = DEGRADATIONS[name](image := fov[:, :, None] * np.array(PLAIN, np.uint8), fov)
    factor = {"half size": 0.5, "double size": 2}.get(name, 1)
    assert result.shape == (32 * factor, 64 * factor, 3) and result.dtype == np.uint8
    columns, slack = result.shape[1] // 4, 3 if name == "JPEG quality 20" else 0
    assert np.abs(result[:, 3 * columns :].astype(int) - COLOURS[name]).max() <= slack
    assert result[:, :columns].max() <= slack  # the surround stays black
    assert np.array_equal(np.unique(image[fov], axis=0), [PLAIN])  # not written to


def test_haze_blur_noise_and_jpeg_do_what_they_are_called():
    plain, everywhere = np.full((40, 540, 3), 100, np.uint8), np.ones((40, 540), bool)
    (two := plain.copy())[:, 270:] = 200
    assert [DEGRADATIONS["hazy 70 %"](two, everywhere)[0, x, 0] for x in (0, 539)] == [135, 165]  # 0.3 of 50 off 150
    (point := np.zeros_like(plain))[20, 270] = 255
    for width, sigma in ((540, 2), (270, 1)):
        blurred = DEGRADATIONS["blurred"](point, np.arange(540) < width + 0 * everywhere)
        assert blurred[20, 270, 0] == pytest.approx(255 / (2 * np.pi * sigma**2), abs=1)
    noisy = DEGRADATIONS["noise of 15 levels"](plain, everywhere)
    assert noisy.std() == pytest.approx(15, abs=0.2) and noisy.mean() == pytest.approx(100, abs=0.3)
    assert np.array_equal(noisy, DEGRADATIONS["noise of 15 levels"](plain, everywhere))
    assert 3 < np.abs(DEGRADATIONS["JPEG quality 20"](noisy, everywhere).astype(int) - noisy).mean() < 15
    assert DEGRADATIONS.keys() == {*COLOURS, "blurred", "noise of 15 levels"}


def test_scores_are_the_hand_counted_ones(tmp_path):
    pair = set_of_one(tmp_path)  # a dark bar of 6 rows among 48, and a mask without every tenth of its 40 columns
    rows = degraded_scores(Segmenter(Redness(), FovFrame(48), device="cpu"), [pair], progress=False)
    bar, everything = (2 * 216 / (216 + 240), 2 * 216 / (216 + 48 * 40))
    expected = {"untouched": bar, "green channel only": everything, "dimmed to 25 %": everything, "half size": bar}
    assert expected == pytest.approx({row["degradation"]: row["f1"] for row in rows if row["degradation"] in expected})
    assert rows[1]["difference"] == pytest.approx(everything - bar) and rows[1]["worst_image"] == "1"


def test_the_segmenter_finds_the_field_of_view_in_the_degraded_image(tmp_path):
    pair, disc = set_of_one(tmp_path, (128, 128)), np.hypot(*(np.mgrid[:128, :128] - 63.5)) < 50
    write_image(pair.image, image := read_image(pair.image) * disc[:, :, None])
    segmenter, left = Segmenter(Redness(), FovFrame(64), device="cpu"), (np.arange(128) < 64)[:, None]
    (sample,) = predict_pairs(segmenter, [pair], get_protocol("native"), degrade=lambda image, fov: image * left)
    assert np.array_equal(sample.fov, find_fov(image))  # what is scored
    assert (sample.probability[:, 70:] == 0).all()  # black, which `Redness` calls vessel wherever it is asked


def test_the_command_writes_table_and_figure(styled, tiny_set, tmp_path, capsys):
    options = ("--weights", styled, "--data", tiny_set, "--output", tmp_path, "--style", "a", "--threshold", 0.4)
    assert call("degrade", *options) == 0
    shown, rows = capsys.readouterr().out, read_csv(tmp_path / "degrade.csv", COLUMNS)
    assert "2 test images, native, field of view, threshold 0.40, style a\n" in shown
    segmenter = Segmenter.load(styled, 0.4, "a", device="cpu", precision="float32")
    scores = score_pairs(segmenter, list_pairs(tiny_set, "test"), "native", progress=False)["fov"]["mean"]
    assert [float(rows[0][key]) for key in ("f1", "auc")] == pytest.approx([scores["f1"], scores["auc"]], abs=1e-5)
    assert all(row["degradation"] in shown for row in rows) and len(rows) == len(DEGRADATIONS)
    assert (tmp_path / "degrade.png").read_bytes()[:4] == b"\x89PNG"
