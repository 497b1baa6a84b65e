"""Runs side by side: the table, the paired differences, what cannot be compared."""

import numpy as np
import pytest

from retina_seg.analysis.compare import compare, paired_differences
from retina_seg.metrics import SCORES
from retina_seg.utils import read_csv, write_json


def scores(f1: list[float | None], size: str = "512x512", names=None) -> dict:
    """A metrics.json in which every score of image i is f1[i]."""
    known = [value for value in f1 if value is not None]
    summary = dict.fromkeys(SCORES, float(np.mean(known)))
    region = {"mean": summary, "std": summary, "pooled": summary, "ci95": {"f1": [min(known), max(known)]}}
    names = names or [str(i) for i in range(len(f1))]
    by_image = [dict.fromkeys(("frame", "fov"), dict.fromkeys(SCORES, value)) for value in f1]
    images = [{"name": name, **regions} for name, regions in zip(names, by_image, strict=True)]
    return {"protocol": {"size": size, "part": "test"}, "frame": region, "fov": region, "images": images}


def test_paired_differences_are_taken_image_by_image():
    first, other = scores([0.5, 0.6, 0.7]), scores([0.75, 0.55, 0.8], names=["2", "0", "1"])
    pair = paired_differences(first, other, "fov", "f1")
    assert pair["mean"] == pytest.approx((0.05 + 0.05 + 0.2) / 3) and pair["better"] == 3 and pair["images"] == 3
    assert pair["ci95"] == pytest.approx((0.05, 0.2))
    assert paired_differences(scores([0.5, None]), scores([0.6, 0.7]), "frame", "f1")["images"] == 1


@pytest.mark.parametrize(
    "other", [scores([0.1, 0.2], size="native"), scores([0.1, 0.2], names=["a", "b"]), scores([0.1])]
)
def test_what_was_scored_otherwise_is_not_compared(other):
    assert paired_differences(scores([0.1, 0.2]), other, "fov", "f1") is None
    assert paired_differences(scores([0.1, 0.2]), scores([0.1, 0.2]), "fov", "f1")["mean"] == 0


def test_compare_writes_table_and_figure(tmp_path):
    for name, values in (("old", [0.5, 0.6]), ("new", [0.6, 0.65])):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "metrics.json", scores(values))
    lines = compare([tmp_path / "old", tmp_path / "new"], tmp_path / "out")
    assert any("new - old: F1 +0.0750" in line and "better on 2 of 2 images" in line for line in lines)
    assert (tmp_path / "out/comparison.png").read_bytes()[:4] == b"\x89PNG"
    rows = read_csv(tmp_path / "out/comparison.csv", ["run", "protocol", "region", "statistic", *SCORES])
    assert len(rows) == 2 * 2 * 3 and rows[0]["run"] == "old" and float(rows[0]["f1"]) == pytest.approx(0.55)
    assert {row["statistic"] for row in rows} == {"mean", "std", "pooled"}
