"""Scoring a checkpoint: the original's five scores, both protocols, the files a test writes."""

import csv
import json
import math
import warnings

import cv2
import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import nn

from retina_seg.data import Augmentation, Pair, augment_colour, list_pairs
from retina_seg.images import read_photo, write_picture
from retina_seg.predict import Segmenter
from retina_seg.test import calculate_metrics, mask_parse, original_lines, score_pairs, table, test
from retina_seg.utils import UserError

test.__test__ = False  # the module's own function, not a test of this file


def sklearn_five(true, predicted) -> list[float]:
    t, p = (np.asarray(y).reshape(-1) > 0.5 for y in (true, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functions = (sk.jaccard_score, sk.f1_score, sk.recall_score, sk.precision_score, sk.accuracy_score)
        return [float(function(t, p)) for function in functions]


RNG = np.random.default_rng(3)
CASES = {
    "random": (RNG.random((1, 1, 40, 30)), RNG.random((1, 1, 40, 30))),
    "vessels are rare": (RNG.random((64, 64)) > 0.9, RNG.random((64, 64)) > 0.95),
    "all right": (np.eye(5), np.eye(5)),
    "all wrong": (np.eye(5), 1 - np.eye(5)),
    "empty label": (np.zeros((4, 4)), np.eye(4)),
    "empty prediction": (np.eye(4), np.zeros((4, 4))),
    "both empty": (np.zeros((4, 4)), np.zeros((4, 4))),
    "both full": (np.ones((4, 4)), np.ones((4, 4))),
    "exactly one half is background": (np.array([0.5, 1.0]), np.array([1.0, 0.5])),
}


@pytest.mark.parametrize("case", CASES)
def test_calculate_metrics_is_sklearns(case):
    true, predicted = CASES[case]
    assert calculate_metrics(true, predicted) == pytest.approx(sklearn_five(true, predicted), abs=1e-12)
    tensors = [torch.as_tensor(np.asarray(y, dtype=np.float32)) for y in (true, predicted)]
    assert calculate_metrics(*tensors) == pytest.approx(sklearn_five(true, predicted), abs=1e-12)


def test_mask_parse_repeats_the_grey_value():
    mask = np.array([[0, 7], [255, 1]], np.uint8)
    assert mask_parse(mask).tolist() == [[[0, 0, 0], [7, 7, 7]], [[255, 255, 255], [1, 1, 1]]]


class Redness(nn.Module):
    """Calls a pixel a vessel where its red is below one half: labels and photos can be made to fit it."""

    stride = 4

    def forward(self, x):
        return 20 * (0.5 - x[:, 2:])


def set_of_one(folder, size=(48, 40), fov=None, second=None) -> Pair:
    """A photo whose vessels are dark red bars, with its label; every tenth column of the label is wrong."""
    truth = np.zeros(size, np.uint8)
    truth[10:16] = 255
    photo = np.where(truth[..., None] > 0, (60, 20, 20), (200, 90, 40)).astype(np.uint8)
    label = truth.copy()
    label[10:16, ::10] = 0
    files = {"image": photo, "mask": label, "fov": fov, "mask_2nd": second}
    for name, picture in files.items():
        if picture is not None:
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_picture(folder / name / "1.png", picture)
    paths = {name: folder / name / "1.png" for name, picture in files.items() if picture is not None}
    return Pair("1", paths["image"], paths["mask"], "1", "1", paths.get("fov"), paths.get("mask_2nd"))


def segmenter(size=(48, 40)) -> Segmenter:
    return Segmenter(Redness(), {"kind": "squeeze", "size": list(size)}, device="cpu", precision="float32")


def test_native_scores_are_the_hand_counted_ones(tmp_path):
    fov = np.zeros((48, 40), np.uint8)
    fov[:, 20:] = 255
    result = score_pairs(segmenter(), [set_of_one(tmp_path, fov=fov)], "native", progress=False)
    # predicted: 6 rows x 40, label: 6 x 36; inside the field of view 6 x 20 and 6 x 18. Outside it nothing is predicted,
    # but only where the segmenter finds the border itself: here the whole frame is lit
    assert result["frame"]["pooled"]["precision"] == pytest.approx(36 / 40)
    assert result["frame"]["pooled"]["recall"] == 1
    assert result["fov"]["pooled"]["precision"] == pytest.approx(18 / 20)
    assert result["fov"]["pooled"]["accuracy"] == pytest.approx(1 - 12 / (48 * 20))
    assert result["images"][0]["fov"]["f1"] == pytest.approx(2 * 108 / (120 + 108))


def test_the_notebook_protocol_scores_the_squeezed_frame(tmp_path):
    pair = set_of_one(tmp_path)
    result = score_pairs(segmenter((512, 512)), [pair], "notebook", progress=False)
    photo, label = read_photo(pair.image), cv2.imread(str(pair.mask), 0)
    photo, label = cv2.resize(photo, (512, 512)), cv2.resize(label, (512, 512))
    five = calculate_metrics(label / 255, (photo[..., 0] / 255 < 0.5).astype(float))
    assert [result["frame"]["mean"][k] for k in ("jaccard", "f1", "recall", "precision", "accuracy")] == pytest.approx(
        five
    )


def test_the_second_observer_is_scored_where_the_set_has_one(tmp_path):
    second = np.zeros((48, 40), np.uint8)
    second[10:13] = 255
    result = score_pairs(segmenter(), [set_of_one(tmp_path, second=second)], "native", progress=False)
    observer = result["second_observer"]["frame"]
    assert observer["mean"]["recall"] == pytest.approx(0.5) and observer["mean"]["precision"] == pytest.approx(0.9)
    assert math.isnan(observer["mean"]["auc"])  # a mask has no ranking


@pytest.mark.parametrize(
    ("protocol", "size", "own", "recolour", "given"),
    [
        ("native", (48, 40), False, 0, True),
        ("notebook", (512, 512), False, 0, True),
        ("notebook", (48, 40), False, 0, False),  # squeezed
        ("native", (48, 40), True, 0, False),  # the set's own, by which the network is not to measure its scale
        ("native", (48, 40), False, 1, False),  # found in other colours
    ],
)
def test_a_field_of_view_is_looked_for_once_and_only_taken_over_where_it_is_the_photos_own(
    tmp_path, protocol, size, own, recolour, given
):
    from retina_seg.fov import find_fov

    seen = []

    class Watched(Segmenter):
        def __call__(self, photo, fov=None, everywhere=False):
            seen.append((photo, fov))
            return super().__call__(photo, fov, everywhere)

    watched = Watched(Redness(), {"kind": "fov", "fov_diameter": 64}, device="cpu", precision="float32")
    pair = set_of_one(tmp_path, size, fov=np.full(size, 255, np.uint8) if own else None)
    score_pairs(watched, [pair], protocol, progress=False, recolour=recolour)
    (photo, fov), *others = seen
    assert not others and (fov is not None) == given
    assert fov is None or np.array_equal(fov, find_fov(photo))


def test_the_threshold_decides(tmp_path):
    pair = set_of_one(tmp_path)
    none = score_pairs(segmenter(), [pair], "native", threshold=0.9999, progress=False)
    assert none["frame"]["pooled"]["recall"] == 0


def test_other_colours_are_drawn_the_same_every_time(tmp_path):
    pair = set_of_one(tmp_path)
    own = score_pairs(segmenter(), [pair], "native", progress=False)["images"]
    first, again = (
        score_pairs(segmenter(), [pair, pair], "native", progress=False, recolour=3)["images"] for _ in "ab"
    )
    assert [row["name"] for row in first] == [f"1-colours-{draw}" for draw in (1, 2, 3)] * 2
    assert [row["frame"] for row in first] == [row["frame"] for row in again]
    photo = read_photo(pair.image)
    red = [
        augment_colour(photo / np.float32(255), Augmentation(), np.random.default_rng([7, 1, draw]))[..., 0]
        for draw in range(3)
    ]
    label = read_photo(pair.mask)[..., 0] > 127
    expected = [((np.rint(r * 255) < 127.5) == label).mean() for r in red]  # what `Redness` calls vessel
    assert [row["frame"]["accuracy"] for row in first[3:]] == pytest.approx(expected)
    assert len({own[0]["frame"]["accuracy"], *expected}) > 2
    with pytest.raises(UserError, match="--recolour -1"):
        score_pairs(segmenter(), [pair], "native", recolour=-1)


def test_a_test_writes_its_files(tiny_run, tiny_set, tmp_path):
    value = test(tiny_run, tiny_set, tmp_path, progress=False)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert {p.name for p in tmp_path.iterdir()} == {
        "metrics.json",
        "metrics.csv",
        "images",
        "contact_sheet.png",
        "curves_test.png",
    }
    assert {p.name for p in (tmp_path / "images").iterdir()} == {"0.png", "0_errors.png", "1.png", "1_errors.png"}
    assert read_photo(tmp_path / "images" / "0.png").shape == (512, 3 * 512 + 20, 3)
    assert written["protocol"]["selected_on"] == "test" and written["protocol"]["size"] == "512x512"
    assert written["model"]["parameters"] == 664_071
    for region in ("frame", "fov"):
        per_photo = [image[region]["f1"] for image in written["images"]]
        assert written[region]["mean"]["f1"] == pytest.approx(np.mean(per_photo))
        assert set(written[region]) == {"mean", "std", "pooled", "ci95"}
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["0", "1"]
    assert float(rows[1]["fov_auc"]) == pytest.approx(written["images"][1]["fov"]["auc"], abs=1e-6)
    five = written["frame"]["mean"]
    assert original_lines(value)[0].startswith(f"Jaccard: {five['jaccard']:.4f} - F1: {five['f1']:.4f} - Recall: ")
    assert "chosen on the test photos" in table(value)


def test_undefined_scores_are_null_not_zero(tiny_run, tmp_path):
    for part in ("image", "mask"):
        (tmp_path / "set" / "test" / part).mkdir(parents=True)
    write_picture(tmp_path / "set/test/image/a.png", np.full((32, 32, 3), 90, np.uint8))
    write_picture(tmp_path / "set/test/mask/a.png", np.zeros((32, 32), np.uint8))
    test(tiny_run, tmp_path / "set", tmp_path / "out", "native", progress=False)
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["frame"]["mean"]["recall"] is None and written["frame"]["mean"]["auc"] is None
    assert written["frame"]["mean"]["accuracy"] is not None


def test_an_unknown_protocol_is_refused(tiny_set):
    with pytest.raises(UserError, match="--protocol best"):
        score_pairs(segmenter(), list_pairs(tiny_set, "test"), "best")


@pytest.mark.real
def test_the_second_observer_of_drive_scores_as_measured_elsewhere(real_data):
    root = real_data / "DRIVE/test"
    pairs = [
        Pair(
            f"{i:02d}",
            root / f"images/{i:02d}_test.tif",
            root / f"1st_manual/{i:02d}_manual1.gif",
            f"{i:02d}",
            f"{i:02d}",
            root / f"mask/{i:02d}_test_mask.gif",
            root / f"2nd_manual/{i:02d}_manual2.gif",
        )
        for i in range(1, 21)
    ]
    scores = score_pairs(segmenter((64, 64)), pairs, "native", progress=False)["second_observer"]["fov"]
    # the published measurement: means over photos, Matthews' correlation over pooled pixels
    assert scores["mean"]["f1"] == pytest.approx(0.7881, abs=5e-5)
    assert scores["mean"]["accuracy"] == pytest.approx(0.9473, abs=5e-5)
    assert scores["pooled"]["mcc"] == pytest.approx(0.7591, abs=5e-5)
