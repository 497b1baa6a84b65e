"""Scoring a checkpoint: the original's five scores, both protocols, the files a test writes."""

import csv
import math
import subprocess
import sys
from dataclasses import replace
from itertools import product
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from conftest import write, write_pair
from sklearn import metrics as sk
from torch import nn

from retina_seg.analysis.degrade import degrade
from retina_seg.data import Pair, list_pairs
from retina_seg.fov import find_fov
from retina_seg.images import read_image, read_mask, write_image
from retina_seg.inference.protocol import get_protocol, predict_pairs
from retina_seg.inference.segmenter import Segmenter
from retina_seg.runs import default_output, remarks
from retina_seg.test import ORIGINAL_FIVE, calculate_metrics, original_lines, score_pairs, table, test
from retina_seg.transforms import ResizeFrame
from retina_seg.utils import UserError, read_json, write_json

test.__test__ = False  # the module's own function, not a test of this file
CASES = {
    "random": np.random.default_rng(3).random((2, 1, 40, 30)),
    "vessels are rare": np.random.default_rng(4).random((2, 64, 64)) > 0.9,
    "all false": (np.eye(5), 1 - np.eye(5)),
    "both empty": (np.zeros((4, 4)),) * 2,
    "exactly one half is background": (np.array([0.5, 1.0]), np.array([1.0, 0.5])),
}


@pytest.mark.parametrize("case", CASES)
def test_calculate_metrics_is_sklearns(case):
    mask, predicted = ((np.asarray(y).reshape(-1) > 0.5) for y in CASES[case])
    four = (sk.jaccard_score, sk.f1_score, sk.recall_score, sk.precision_score)
    expected = [score(mask, predicted, zero_division=0) for score in four] + [sk.accuracy_score(mask, predicted)]
    assert calculate_metrics(*CASES[case]) == pytest.approx(expected, abs=1e-12)
    tensors = [torch.as_tensor(np.asarray(y, dtype=np.float32)) for y in CASES[case]]
    assert calculate_metrics(*tensors) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("module_first", [True, False])
def test_the_module_test_can_be_called_in_every_import_order(module_first):
    lines = ["from retina_seg import test", "import retina_seg.test as module"][:: -1 if module_first else 1]
    lines += ["for function in (test, module, module.test, __import__('retina_seg').test):"]
    lines += ["    try: function('none', data='', output='')", "    except module.UserError as error: print(error)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout.count("none: no such checkpoint") == 4, done.stderr


class Redness(nn.Module):
    """Calls a pixel vessel where its red is below one half: masks and images can be made to fit it."""

    stride = 4

    def forward(self, x):
        return 20 * (0.5 - x[:, 2:])


def set_of_one(folder, size=(48, 40), fov=None, second=None) -> Pair:
    """An image with a bar of dark red, and its mask: the bar without every tenth column."""
    image, mask = np.full((*size, 3), (200, 90, 40), np.uint8), np.zeros(size, np.uint8)
    image[10:16] = (60, 20, 20)
    mask[10:16] = np.where(np.arange(size[1]) % 10, 255, 0)
    return write_pair(folder, "1", image, mask, fov, second)


def segmenter(size=(48, 40)) -> Segmenter:
    return Segmenter(Redness(), ResizeFrame(*size), device="cpu", precision="float32")


FOV = np.tile(np.uint8(255) * (np.arange(40) >= 15), (48, 1))  # a dataset's own field of view: columns from 15 on


def test_native_scores_are_the_hand_counted_ones(tmp_path):
    second = np.zeros((48, 40), np.uint8)
    second[10:13] = 255
    pair = set_of_one(tmp_path, fov=FOV, second=second)
    result = score_pairs(segmenter(), [pair], "native", progress=False)
    # predicted: 6 rows x 40, mask: 6 x 36; inside the dataset's field of view 6 x 25 and 6 x 23. The prediction is 0
    # outside the field of view that the segmenter finds itself, here the whole frame
    assert result["frame"]["pooled"]["precision"] == pytest.approx(36 / 40)
    assert result["frame"]["pooled"]["recall"] == 1
    assert result["fov"]["pooled"]["precision"] == pytest.approx(23 / 25)
    assert result["fov"]["pooled"]["accuracy"] == pytest.approx(1 - 12 / (48 * 25))
    assert result["images"][0]["fov"]["f1"] == pytest.approx(2 * 138 / (150 + 138))
    observer = result["second_observer"]["frame"]["mean"]  # 3 rows x 40
    assert (observer["recall"], observer["precision"]) == pytest.approx((0.5, 0.9))
    assert math.isnan(observer["auc"])  # a mask has no ranking
    with pytest.raises(UserError, match="1_mask_2nd.png: differs in size"):
        score_pairs(segmenter(), [set_of_one(tmp_path, second=second[1:])], progress=False)


def test_the_threshold_is_the_given_one_else_the_protocols_else_the_checkpoints(tmp_path):
    pair, careful = set_of_one(tmp_path), Segmenter(Redness(), threshold=0.9999, device="cpu")
    for protocol, given, used in (("native", None, 0.9999), ("native", 0.6, 0.6), ("notebook", None, 0.5)):
        result = score_pairs(careful, [pair], protocol, given, progress=False)
        assert result["threshold"] == used and (result["frame"]["pooled"]["recall"] > 0.9) == (used < 0.99)
    with pytest.raises(UserError, match="--threshold 1: must lie"):
        score_pairs(careful, [pair], threshold=1)
    with pytest.raises(UserError, match="--protocol best: choose one of notebook, native"):
        score_pairs(careful, [pair], "best")


def test_the_notebook_protocol_scores_the_resized_frame(tmp_path):
    pair = set_of_one(tmp_path, fov=FOV, second=255 - FOV)
    (sample,) = predict_pairs(segmenter((512, 512)), [pair], get_protocol("notebook"))
    image, mask = (cv2.resize(array, (512, 512)) for array in (read_image(pair.image), read_mask(pair.mask)))
    assert np.array_equal(sample.image, image) and np.array_equal(sample.mask, mask > 127)
    assert np.array_equal(sample.fov, cv2.resize(FOV, (512, 512)) > 127)
    assert np.array_equal(sample.second_observer, cv2.resize(255 - FOV, (512, 512)) > 127)
    assert np.array_equal(sample.probability > 0.5, image[..., 0] < 127.5)
    result = score_pairs(segmenter((512, 512)), [pair], "notebook", progress=False)
    five = calculate_metrics(mask / 255, (image[..., 0] / 255 < 0.5).astype(float))
    assert [result["frame"]["mean"][name] for name in ORIGINAL_FIVE.values()] == pytest.approx(five)


def test_only_the_native_protocol_clears_what_lies_outside_the_field_of_view(tmp_path):
    pair = set_of_one(tmp_path, (128, 128))
    rows, columns = np.mgrid[:128, :128] - 64
    outside = rows**2 + columns**2 > 50**2  # dark: what `Redness` calls vessel
    write_image(pair.image, np.where(outside[..., None], np.uint8(0), read_image(pair.image)))
    (native,), (notebook,) = (predict_pairs(segmenter(), [pair], get_protocol(name)) for name in ("native", "notebook"))
    assert (native.probability[:10] == 0).all() and (notebook.probability[:40] > 0.5).all()


@pytest.mark.parametrize(
    ("protocol", "size", "own", "given"),
    [
        ("native", (48, 40), None, True),
        ("notebook", (512, 512), None, True),
        ("notebook", (48, 40), None, False),  # resized
        ("native", (48, 40), FOV, False),  # the dataset's own, by which the network is not to measure its scale
    ],
)
def test_a_field_of_view_is_given_only_where_the_network_would_find_the_same(tmp_path, protocol, size, own, given):
    watched = Mock(wraps=segmenter(size), device=torch.device("cpu"))
    (_,) = predict_pairs(watched, [set_of_one(tmp_path, size, fov=own)], get_protocol(protocol))
    image, fov = watched.call_args.args
    assert np.array_equal(fov, find_fov(image)) if given else fov is None


def test_samples_come_in_order_and_an_unreadable_file_is_named(tiny_set, tmp_path):
    first, *others = list_pairs(tiny_set, "train")
    pairs = [first, *others, replace(first, image=tmp_path / "odd.png"), *others]
    samples = predict_pairs(segmenter(), pairs, get_protocol("native"), lambda sample: sample.name)
    assert [next(samples) for _ in range(4)] == [pair.name for pair in pairs[:4]]
    with pytest.raises(UserError, match="odd.png"):
        next(samples)


def test_an_image_that_was_trained_on_is_no_test_image(tiny_run, tiny_set, tmp_path):
    pair, table = list_pairs(tiny_set, "train")[0], tmp_path / "pairs.csv"
    table.write_text(f"image,mask,part\n{pair.image},{pair.mask},test")
    for use, weights in product((test, degrade), (tiny_run, tiny_run / "checkpoint.pth")):
        with pytest.raises(UserError, match="1 of 1 test images are training images"):
            use(weights, table, tmp_path / "out", progress=False)


def test_a_test_writes_its_files(tiny_run, tiny_set, tmp_path):
    value = test(tiny_run, tiny_set, tmp_path, progress=False)
    written = read_json(tmp_path / "metrics.json")
    pictures = {f"images/{name}.png" for name in ("0", "0_errors", "1", "1_errors")}
    files = {"metrics.json", "metrics.csv", "contact_sheet.png", "curves_test.png", *pictures}
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")} == files
    assert read_image(tmp_path / "images" / "0.png").shape == (512, 3 * 512 + 20, 3)
    assert [written["protocol"][key] for key in ("selected_on", "size", "images")] == ["test", "512x512", 2]
    assert [written["model"][key] for key in ("parameters", "epoch", "unfinished", "style")] == [664_071, 1, None, None]
    assert written["model"]["frame"] == {"kind": "resize", "size": [96, 96]}
    by_image = [image["fov"]["f1"] for image in written["images"]]
    assert written["fov"]["mean"]["f1"] == pytest.approx(np.mean(by_image))
    assert set(written["frame"]) == {"mean", "std", "pooled", "ci95"}
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["0", "1"] and list(rows[0]) == list(value.rows[0])
    assert float(rows[1]["fov_auc"]) == pytest.approx(written["images"][1]["fov"]["auc"], abs=1e-6)
    five = written["frame"]["mean"]
    assert original_lines(value)[0].startswith(f"Jaccard: {five['jaccard']:.4f} - F1: {five['f1']:.4f} - Recall: ")
    assert "chosen on the test images" in table(value) and "not finished" not in table(value)


def test_scores_of_an_unfinished_training_say_so(tiny_run, tiny_set, tmp_path):
    config = read_json(tiny_run / "config.json")
    config["config"]["epochs"] = 36
    write_json(tmp_path / "config.json", config)
    (tmp_path / "checkpoint.pth").write_bytes((tiny_run / "checkpoint.pth").read_bytes())
    said = "epoch 1 of 36, training not finished"
    assert remarks(tmp_path) == [f"note: {tmp_path}/checkpoint.pth: {said}"]  # killed before the history was written
    (tmp_path / "history.csv").write_bytes((tiny_run / "history.csv").read_bytes())
    for _ in range(2):  # once more, by the file: the same scores
        value = test(tmp_path / "checkpoint.pth", tiny_set, tmp_path, progress=False, pictures=False)
    assert said in table(value) and read_json(tmp_path / "metrics.json")["model"]["unfinished"] == said
    assert remarks(tiny_run) == remarks("tiny") == []


@pytest.mark.parametrize("change", [{"style": "a"}, {"protocol": "native"}, {"threshold": 0.4}, {"checkpoint": "tiny"}])
def test_scores_of_other_weights_or_options_are_never_replaced(styled, tiny_set, tmp_path, change):
    call = {"checkpoint": styled, "data": tiny_set, "output": tmp_path, "progress": False, "pictures": False}
    before = test(**call)
    with pytest.raises(UserError, match=r"metrics.json: holds other scores \(.*\); choose another --output"):
        test(**call | change)
    assert read_json(tmp_path / "metrics.json")["model"]["weights"] == before["model"]["weights"]


def test_a_style_of_labelling_is_noted_with_its_own_scores(styled, tiny_set, tmp_path):
    values = [
        test(styled, tiny_set, tmp_path / str(style), "native", 0.4, style=style, progress=False, pictures=False)
        for style in (None, "a", "b")
    ]
    assert [value["model"]["style"] for value in values] == ["balanced", "a", "b"]
    assert len({value["fov"]["mean"]["auc"] for value in values}) == 3 and ", style b;" in table(values[2])
    with pytest.raises(UserError, match="--style thin: .*styled.pth has a, b, balanced"):
        test(styled, tiny_set, tmp_path / "thin", style="thin")


def test_undefined_scores_are_null_not_zero(tiny_run, tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    for name, first in (("a", 0), ("b", 255)):  # the first mask is empty
        mask[:4] = first
        write(tmp_path / f"set/test/mask/{name}.png", mask)
        write(tmp_path / f"set/test/image/{name}.png", np.full((32, 32, 3), 90, np.uint8))
    value = test(tiny_run, tmp_path / "set", tmp_path / "out", "native", progress=False)
    written = read_json(tmp_path / "out/metrics.json")
    for image, undefined in zip(written["images"], (True, False), strict=True):
        assert [image["frame"][name] is None for name in ("recall", "auc", "accuracy")] == [undefined, undefined, False]
    assert table(value) == table(written) and "nan" not in table(value)


def test_the_folder_of_scores_names_what_is_unusual():
    assert default_output("run", "notebook", "test", False, None).parts == ("run",)
    assert default_output("run", "native", "validation", True, 600).parts == ("run", "validation-native-tta-600")
    assert default_output("run", "native", "test", False, None, "fine").parts == ("run", "native-fine")


@pytest.mark.real
def test_the_second_observer_of_drive_scores_as_measured_elsewhere(real_data):
    paths = ("images/{}_test.tif", "1st_manual/{}_manual1.gif", "mask/{}_test_mask.gif", "2nd_manual/{}_manual2.gif")
    pairs = []
    for i in (f"{i:02d}" for i in range(1, 21)):
        image, mask, *others = (real_data / "DRIVE/test" / path.format(i) for path in paths)
        pairs.append(Pair(i, image, mask, i, i, *others))
    scores = score_pairs(segmenter((64, 64)), pairs, "native", progress=False)["second_observer"]["fov"]
    # the published measurement: means over images, Matthews' correlation over pooled pixels
    assert scores["mean"]["f1"] == pytest.approx(0.7881, abs=5e-5)
    assert scores["mean"]["accuracy"] == pytest.approx(0.9473, abs=5e-5)
    assert scores["pooled"]["mcc"] == pytest.approx(0.7591, abs=5e-5)
