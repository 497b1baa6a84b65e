"""Runs side by side: the table, the paired differences, what cannot be compared."""

import csv

import numpy as np
import pytest

from retina_seg import cli
from retina_seg.compare import compare, paired_differences
from retina_seg.metrics import SCORES
from retina_seg.utils import UserError, write_json


def scores(f1: list[float | None], size: str = "512x512", names=None) -> dict:
    """A metrics.json in which every score of photo i is f1[i]."""
    names = names or [str(i) for i in range(len(f1))]
    known = [value for value in f1 if value is not None]
    summary = {name: float(np.mean(known)) for name in SCORES}
    region = {
        "mean": summary,
        "std": summary,
        "pooled": summary,
        "ci95": {"f1": [min(known), max(known)], "auc": [0, 1]},
    }
    images = [
        {"name": n, "frame": dict.fromkeys(SCORES, v), "fov": dict.fromkeys(SCORES, v)}
        for n, v in zip(names, f1, strict=True)
    ]
    return {"protocol": {"size": size, "part": "test"}, "frame": region, "fov": region, "images": images}


def test_paired_differences_are_taken_photo_by_photo():
    first, other = scores([0.5, 0.6, 0.7]), scores([0.75, 0.55, 0.8], names=["2", "0", "1"])
    pair = paired_differences(first, other, "fov", "f1")
    assert pair["mean"] == pytest.approx((0.05 + 0.05 + 0.2) / 3) and pair["better"] == 3 and pair["photos"] == 3
    assert pair["ci95"] == pytest.approx((0.05, 0.2))


def test_photos_without_a_score_are_left_out():
    assert paired_differences(scores([0.5, None]), scores([0.6, 0.7]), "frame", "f1")["photos"] == 1


@pytest.mark.parametrize(
    "other", [scores([0.1, 0.2], size="native"), scores([0.1, 0.2], names=["a", "b"]), scores([0.1])]
)
def test_what_was_scored_otherwise_is_not_compared(other):
    assert paired_differences(scores([0.1, 0.2]), other, "fov", "f1") is None


def test_compare_writes_table_and_picture(tmp_path):
    for name, values in (("old", [0.5, 0.6]), ("new", [0.6, 0.65])):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "metrics.json", scores(values))
    lines = compare([tmp_path / "old", tmp_path / "new"], tmp_path / "out")
    assert any("new - old: F1 +0.0750" in line and "better on 2 of 2 photos" in line for line in lines)
    assert (tmp_path / "out/comparison.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((tmp_path / "out/comparison.csv").read_text().splitlines()))
    assert len(rows) == 2 * 2 * 3 and rows[0]["run"] == "old" and float(rows[0]["f1"]) == pytest.approx(0.55)


@pytest.mark.parametrize("content", [None, "[]", "{}", "not json", '{"frame": 1}'])
def test_a_run_without_scores_is_named(tmp_path, content, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "metrics.json", scores([0.5]))
    if content is None:
        (tmp_path / "b/metrics.json").unlink()
    else:
        (tmp_path / "b/metrics.json").write_text(content)
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out")]) == 2
    assert "metrics.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_run_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match="two runs"):
        compare([tmp_path], tmp_path / "out")
