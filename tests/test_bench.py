"""The bench measures what it says: turns taken, the same weights scored the same, every way in the table."""

import json

import numpy as np
import pytest
import torch

from retina_seg import bench, cli
from retina_seg.data import list_pairs
from retina_seg.model import build_model, save_model
from retina_seg.predict import Segmenter, photo_batch
from retina_seg.synthetic import draw_photo, write_set
from retina_seg.test import score_pairs
from retina_seg.utils import UserError


def test_the_ways_take_turns_and_the_first_round_is_not_counted():
    called = []
    ways = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = bench.take_turns(ways, rounds=3)
    assert called == ["a", "a", "b", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def counting(start: int):
    """A way that gives start, start + 1, …, call by call."""
    numbers = iter(range(start, 100))
    return lambda: next(numbers)


def test_a_way_apart_runs_twice_a_turn_in_a_process_of_its_own():
    apart = bench.Apart(counting, 5)
    try:
        (first, one), (_, three) = apart.timed(), apart.timed()
        assert (one, three) == (6, 8) and 0 < first < 1
        assert bench.take_turns({"a": apart}, rounds=2).keys() == {"a"} and apart.timed()[1] == 16
    finally:
        apart.close()


def test_rows_hold_medians_quartiles_and_ratios_to_the_first_way():
    slow, quick = bench.rows("task", {"slow": [4.0, 8.0, 6.0], "quick": [1.0, 3.0, 2.0]}, units=2, photos=2)
    assert (slow["median"], slow["ratio"], slow["quartiles"]) == (3.0, 1.0, [2.5, 3.5])
    assert (quick["median"], quick["ratio"], quick["rounds"], quick["photos"]) == (1.0, 3.0, 3, 2)


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of the original's network with weights that tell pixels apart, statistics included."""
    torch.manual_seed(0)
    model = build_model("attention_unet").train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(2, 3, 32, 32))
        model.eval().finaloutput.weight.mul_(20)
        photo = photo_batch(draw_photo(0, 64, 64).photo, torch.device("cpu"))
        model.finaloutput.bias.sub_(model(photo).quantile(0.8))
    save_model(tmp_path / "original.pth", model, "attention_unet", {})
    return tmp_path / "original.pth"


def test_the_originals_loop_gives_the_five_scores_of_our_scorer(trained, tmp_path):
    write_set(tmp_path / "set", 1, 2, (64, 64), progress=False)
    pairs = list_pairs(tmp_path / "set", "test")
    segmenter = Segmenter.load(trained, device="cpu", precision="float32")
    theirs = bench.originals_test(segmenter.model, pairs, tmp_path / "strips", size=512)
    ours = score_pairs(segmenter, pairs, progress=False)["images"]
    names = ("jaccard", "f1", "recall", "precision", "accuracy")
    np.testing.assert_allclose(theirs, [[row["frame"][name] for name in names] for row in ours], atol=2e-4)
    assert len(list((tmp_path / "strips").glob("*.png"))) == 2


def test_a_bench_measures_every_way_and_writes_what_it_prints(trained, tmp_path, capsys):
    output = tmp_path / "bench"
    arguments = [
        "--output",
        output,
        "--rounds",
        1,
        "--photos",
        2,
        "--size",
        64,
        "--original",
        trained,
        "--device",
        "cpu",
    ]
    assert cli.main(["bench", *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    value = json.loads((output / "bench.json").read_text())
    tasks = {row["task"] for row in value["rows"]}
    assert tasks == {"forward", "training step, a photo", "whole test, a photo", "predict, a photo"}
    for task in tasks - {"predict, a photo"}:
        ways = [row for row in value["rows"] if row["task"] == task]
        names = [row["way"] for row in ways if row["way"] != bench.KEPT]
        assert names[:3] == [bench.ORIGINAL, bench.SAME, "fast"]
        assert (len(names) < len(ways)) == ("test" not in task)
        assert ways[-1]["way"] == "tiny"
        assert ways[0]["ratio"] == 1 and all(row["median"] > 0 for row in ways)
        assert all(row["ratio"] == pytest.approx(ways[0]["median"] / row["median"]) for row in ways)
    scores = value["agreement"]
    assert scores["f1_ours_float32"] == pytest.approx(scores["f1_original"], abs=5e-4)
    assert value["networks"]["attention_unet"]["parameters"] == 664_071
    forward = {row["way"]: row["median"] for row in value["rows"] if row["task"] == "forward"}
    floors = {row["way"]: row["seconds"] for row in value["floors"]}
    assert floors[bench.SAME] > floors["fast"] > floors["tiny"] > 0
    assert all(seconds < forward[way] for way, seconds in floors.items())  # or it would be no floor
    for row in value["profile"]:
        assert "conv" in max(row["shares"], key=row["shares"].get) and 0.5 < sum(row["shares"].values()) <= 1
    assert all(text in shown for text in (bench.ORIGINAL, "thousand million", f"{scores['f1_original']:.5f}"))


def test_one_point_of_the_growth_table_is_measured():
    point = bench.measure_point({"batch": 1, "side": 32, "workers": 0}, steps=2)
    assert point["steps_per_second"] > 0 and 0.1 < point["peak_memory_gb"] < 8


def test_growth_is_measured_with_loader_workers_too(monkeypatch):
    point = {"batch": 1, "side": 32, "workers": 1}
    monkeypatch.setattr(bench, "GROWTH", [point])
    held = np.ones(2**28)  # 2 GB, which are this process's and not the measured one's
    (row,) = bench.bench_growth(steps=2, progress=False)
    assert row.items() > point.items() and row["steps_per_second"] > 0
    assert row["peak_memory_gb"] is None or row["peak_memory_gb"] < held.nbytes / 2**30


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rounds": 0}, "--rounds 0"),
        ({"photos": 0}, "--photos 0"),
        ({"size": 60}, "--size 60"),
        ({"original": "drive"}, "drive"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(change, named, tmp_path):
    with pytest.raises(UserError, match=named):
        bench.bench(tmp_path / "bench", **change, progress=False)
    assert not (tmp_path / "bench").exists()
