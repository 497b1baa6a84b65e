"""The bench measures what it says: in turns, every task and name in the rows, the baseline's scores those of our scorer."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import save_varied

from retina_seg.analysis import bench
from retina_seg.data import list_pairs
from retina_seg.inference.segmenter import Segmenter
from retina_seg.test import score_pairs
from retina_seg.transforms import ResizeFrame
from retina_seg.utils import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of the original's network with weights that tell pixels apart, statistics included."""
    return save_varied(tmp_path_factory.mktemp("bench") / "original.pth", "attention_unet", ResizeFrame())


def test_calls_take_turns_the_second_time_counts_and_the_first_round_does_not(trained, monkeypatch):
    called, seconds = [], iter([0, 9.0, 0, 9.0, 0, 4.0, 0, 1.0, 0, 8.0, 0, 2.0, 0, 6.0, 0, 3.0])
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(seconds))
    base, a, b = bench.measure(("task", 2, calls, partial(partial, int)), CPU, rounds=3, progress=False)
    assert called == ["a", "a", "b", "b"] * 4
    assert (a["name"], a["median"], a["quartiles"]) == ("a", 3.0, [2.5, 3.5])
    assert (b["median"], b["rounds"], b["device"]) == (1.0, 3, "cpu")
    assert base["name"] == bench.BASELINE and (base["ratio"], a["ratio"]) == (1, base["median"] / 3)


def test_the_baselines_test_gives_the_five_scores_of_our_scorer(trained, tiny_set, tmp_path):
    pairs = list_pairs(tiny_set, "test")[:1]
    segmenter = Segmenter.load(trained, device="cpu", precision="float32")
    theirs = bench.baseline_test(segmenter.model, pairs, tmp_path, segmenter.device)()
    ours = score_pairs(segmenter, pairs, progress=False)["images"]
    names = ("jaccard", "f1", "recall", "precision", "accuracy")
    np.testing.assert_allclose(theirs, [[row["frame"][name] for name in names] for row in ours], atol=2e-4)
    assert 0.05 < theirs[0][1] < 1 and len(list(tmp_path.glob("*.png"))) == 1


def test_everything_is_measured_and_nothing_else_is_printed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench, "WEIGHTS", ("tiny",))
    value = bench.bench(tmp_path / "bench", 1, 1, 64, device="cpu", progress=False)
    assert capfd.readouterr() == ("", "")
    assert json.loads((tmp_path / "bench/bench.json").read_text()) == json.loads(json.dumps(value))
    found: dict = {}
    for row in value["rows"]:
        found.setdefault(row["task"], []).append(row["name"])
        baseline = next(other for other in value["rows"] if other["task"] == row["task"])
        assert row["median"] > 0 and row["ratio"] == pytest.approx(baseline["median"] / row["median"])
    ours = [f"{name}, torch, float32" for name in (bench.SAME, *bench.WEIGHTS)]
    assert [*found] == ["forward", "call", "test, an image", "folder, an image"]
    for task, names in found.items():
        assert names[0] == bench.BASELINE and {*ours} <= {*names} and (bench.KEPT in names) == (task == "forward")
    assert value["environment"]["processor"] in "\n".join(bench.table(value))


@pytest.mark.parametrize("change", [{"rounds": 0}, {"images": 0}, {"size": 60}, {"device": "x"}])
def test_what_cannot_be_is_refused_before_anything_is_measured(change, tmp_path):
    with pytest.raises(UserError, match="--{} {}".format(*next(iter(change.items())))):
        bench.bench(tmp_path / "bench", **change, progress=False)
    assert not (tmp_path / "bench").exists()
