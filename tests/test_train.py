"""Training: recipes, one pass, the loop and its folder, splits that never leak, resuming."""

import csv
import json
import math

import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from retina_seg import train as training
from retina_seg.data import WholePhotos
from retina_seg.loss import DiceBCELoss
from retina_seg.model import load_checkpoint
from retina_seg.train import TrainConfig, WeightAverage, evaluate, fit, learning_rate_share, split_set, train
from retina_seg.utils import UserError


def tiny(tiny_set, folder, **changes) -> TrainConfig:
    """A recipe of seconds on the fast network."""
    recipe = {"size": 32, "repeats": 2, "epochs": 2, "batch_size": 2, "precision": "float32"}
    recipe |= {"fov_diameter": None, "working_diameter": None}  # as small as they are
    arguments = {"width": 4, "deepest": 8, "fine": 4}
    return TrainConfig.fast(
        **{**recipe, "data": str(tiny_set), "output": str(folder), "model_arguments": arguments, **changes}
    )


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint.pth")["state_dict"]


def same_weights(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Shift(nn.Module):
    """One number added to the first channel: a network whose training can be followed by hand."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(start))

    def forward(self, x):
        return x[:, :1] + self.shift


def test_notebook_recipe_is_the_originals():
    recipe = TrainConfig.notebook()
    assert (recipe.seed, recipe.batch_size, recipe.learning_rate, recipe.epochs) == (42, 2, 1e-4, 10)
    assert (recipe.model, recipe.frame, recipe.size, recipe.loss) == ("attention_unet", "squeeze", 512, "dice_bce")
    assert (recipe.validation, recipe.keep) == ("test", "best")
    assert recipe.warmup is None and recipe.weight_decay == recipe.ema == recipe.clip == 0


def test_general_sees_large_photos_larger_and_its_weights_say_so(tiny_set, tmp_path):
    recipe = TrainConfig.general()
    assert (recipe.fov_diameter, recipe.largest_diameter) == (720, 1080)
    fit(tiny(tiny_set, tmp_path, largest_diameter=200.0), progress=False)
    frame = load_checkpoint(tmp_path / "checkpoint.pth")["frame"]
    assert frame["largest_diameter"] == 200 and set(frame) == {"kind", "fov_diameter", "largest_diameter"}


def test_train_returns_the_mean_loss_and_takes_a_plain_gradient_step():
    model = Shift()
    batches = [(torch.zeros(1, 3, 2, 2), torch.full((1, 1, 2, 2), target)) for target in (1.0, 3.0)]
    loss = train(model, batches, torch.optim.SGD(model.parameters(), lr=0.25), nn.functional.mse_loss, "cpu")
    # step 1: loss (0-1)^2 = 1, gradient -2, shift 0.5; step 2: loss (0.5-3)^2 = 6.25, gradient -5, shift 1.75
    assert loss == pytest.approx((1 + 6.25) / 2)
    assert model.shift.item() == pytest.approx(1.75)


def test_evaluate_returns_the_mean_loss_and_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [(torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4).round()) for _ in range(3)]
    loss = evaluate(model, batches, DiceBCELoss(), torch.device("cpu"))
    with torch.no_grad():
        expected = sum(DiceBCELoss()(model(x), y).item() for x, y in batches) / 3
    assert loss == pytest.approx(expected, rel=1e-5)
    assert same_weights(before, model.state_dict())


def test_an_empty_loader_is_an_error_not_a_division_by_zero():
    with pytest.raises(ValueError, match="empty"):
        evaluate(Shift(), [], DiceBCELoss(), "cpu")


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = Shift()
    batches = [(torch.full((1, 3, 2, 2), math.inf), torch.zeros(1, 1, 2, 2))]
    with pytest.raises(FloatingPointError, match="step 1"):
        train(model, batches, torch.optim.SGD(model.parameters(), lr=1.0), nn.functional.mse_loss, "cpu")
    assert model.shift.item() == 0


def test_weight_average_follows_the_formula_and_copies_counters():
    model = nn.BatchNorm1d(1)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
    model.num_batches_tracked += 7
    average.update(model, step=1)  # decay min(0.5, 2/11): share 9/11 of the new
    assert average.model.weight.item() == pytest.approx(1 * 2 / 11 + 3 * 9 / 11)
    average.update(model, step=1000)  # decay 0.5
    expected = (1 * 2 / 11 + 3 * 9 / 11 + 3) / 2
    assert average.model.weight.item() == pytest.approx(expected)
    assert average.model.num_batches_tracked.item() == 7


def test_the_learning_rate_rises_then_falls_to_zero():
    shares = [learning_rate_share(step, 100, 0.1) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == pytest.approx(1) and shares[10] == pytest.approx(1)
    assert shares[55] == pytest.approx(0.5) and shares[100] == pytest.approx(0, abs=1e-9)
    assert all(a >= b for a, b in zip(shares[10:], shares[11:], strict=False))
    assert learning_rate_share(7, 10, None) == 1


def test_fit_writes_the_run_folder(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert names == {"config.json", "history.csv", "curves.png", "checkpoint.pth", "last.pth"}
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["recipe"]["preset"] == "notebook" and config["parameters"] == 664_071
    assert len(config["training"]) == 4 and len(config["validation"]) == 2
    assert {"torch", "numpy"} <= set(config["environment"]["packages"])
    rows = list(csv.DictReader((tiny_run / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1"]
    assert 0 < float(rows[0]["train_loss"]) < 3 and 0 < float(rows[0]["validation_loss"]) < 3
    notes = load_checkpoint(tiny_run / "checkpoint.pth")
    assert notes["frame"] == {"kind": "squeeze", "size": [96, 96]}
    assert notes["selected_on"] == "test"


def test_fit_learns(tiny_set, tmp_path):
    run = fit(tiny(tiny_set, tmp_path, epochs=6, repeats=8, learning_rate=1e-2), progress=False)
    losses = [row["train_loss"] for row in run.history]
    assert losses[-1] < losses[0] - 0.05


def test_the_best_epoch_is_the_one_with_the_lowest_validation_loss(tiny_set, tmp_path, monkeypatch):
    by_epoch = iter([(0.9, 0.1), (0.5, 0.2), (0.7, 0.3)])
    monkeypatch.setattr(training, "evaluate_with_f1", lambda *_: next(by_epoch))
    run = fit(tiny(tiny_set, tmp_path, epochs=3, validation="photos", held_out=1, keep="best"), progress=False)
    assert run.best == 2
    assert load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 2


def test_the_averaged_weights_are_the_ones_kept(tiny_set, tmp_path):
    fit(tiny(tiny_set, tmp_path, ema=0.9), progress=False)
    last = torch.load(tmp_path / "last.pth", weights_only=True)
    assert same_weights(weights_of(tmp_path), last["average"])
    assert not same_weights(weights_of(tmp_path), last["model"])


def test_the_threshold_is_chosen_on_held_out_photos_and_stored(tiny_set, tmp_path):
    config = tiny(tiny_set, tmp_path, validation="photos", held_out=1, threshold="validation", epochs=1)
    run = fit(config, progress=False)
    notes = load_checkpoint(tmp_path / "checkpoint.pth")
    assert notes["threshold_from"] == "validation"
    pair = split_set(config)[1][0]
    photo, label = (x[None] for x in WholePhotos([pair], notes["frame"]["fov_diameter"], 8)[0])
    with torch.no_grad():
        probability = torch.sigmoid(run.model(photo)).numpy().ravel()
    truth = label.numpy().ravel() > 0.5
    f1 = [f1_score(truth, probability > t / 100, zero_division=0) for t in range(1, 100)]
    assert notes["threshold"] == pytest.approx((1 + f1.index(max(f1))) / 100)


def test_one_seed_one_result_and_another_seed_another(tiny_set, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(tiny(tiny_set, tmp_path / name, seed=seed), progress=False)
    assert same_weights(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert not same_weights(weights_of(tmp_path / "a"), weights_of(tmp_path / "c"))


def test_batches_made_beside_the_network_or_between_steps_are_the_same(tiny_set, tmp_path, monkeypatch):
    for beside in (True, False):
        monkeypatch.setattr(training, "core_to_spare", lambda *_, beside=beside: beside)
        fit(tiny(tiny_set, tmp_path / str(beside)), progress=False)
    assert same_weights(weights_of(tmp_path / "True"), weights_of(tmp_path / "False"))


@pytest.mark.parametrize(
    ("cores", "threads", "processes", "spare"), [(2, 2, 1, False), (2, 1, 1, True), (8, 2, 4, False), (8, 2, 3, True)]
)
def test_batches_are_made_beside_the_network_where_it_leaves_a_core(cores, threads, processes, spare, monkeypatch):
    monkeypatch.setattr(training.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert training.core_to_spare(torch.device("cpu"), processes) == spare
    assert training.core_to_spare(torch.device("cuda"), processes)


def test_a_resumed_run_ends_with_the_same_weights(tiny_set, tmp_path, monkeypatch):
    fit(tiny(tiny_set, tmp_path / "whole", epochs=3), progress=False)
    real, calls = training.save_last, []

    def stop_after_the_second_epoch(*arguments):
        real(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_last", stop_after_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(tiny_set, tmp_path / "broken", epochs=3), progress=False)
    monkeypatch.undo()
    torch.rand(5)  # the random state of the new process is another
    run = fit(tiny(tiny_set, tmp_path / "broken", epochs=3), resume=True, progress=False)
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    assert same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken"))


def test_a_recipe_repeats_from_its_config(tiny_set, tmp_path):
    config = tiny(tiny_set, tmp_path, seed=5, augmentation={"bend": 0.0})
    fit(config, progress=False)
    assert TrainConfig.from_json(tmp_path / "config.json") == config


def test_held_out_photos_are_not_trained_on(tiny_set, tmp_path):
    config = tiny(tiny_set, tmp_path, validation="photos", held_out=1, epochs=1)
    fit(config, progress=False)
    written = json.loads((tmp_path / "config.json").read_text())
    assert len(written["validation"]) == 1 and len(written["training"]) == 3
    assert not set(written["validation"]) & set(written["training"])
    assert [pair.name for pair in split_set(config)[1]] == written["validation"]


@pytest.mark.real
def test_variants_of_one_photo_stay_on_one_side_of_the_kaggle_set(real_data):
    train_pairs, validation = split_set(TrainConfig(data=str(real_data / "Data1"), held_out=4))
    assert (len(train_pairs), len(validation)) == (64, 16)
    sides = [{int(pair.name) // 4 for pair in side} for side in (train_pairs, validation)]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "--epochs 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"loss": "hinge"}, "--loss hinge"),
        ({"weight_decay": -1.0}, "weight decay -1"),
        ({"clip": -1.0}, "clip -1"),
        ({"warmup": 1.0}, "warm-up 1.0"),
        ({"frame": "oval"}, "--frame oval"),
        ({"frame": "fov", "fov_diameter": 60.0, "largest_diameter": 50.0}, "largest_diameter 50"),
        ({"frame": "fov", "fov_diameter": 60.0, "largest_diameter": 1e9}, "largest_diameter 1000000000"),
        ({"keep": "best", "validation": "none"}, "--keep best"),
        ({"threshold": "validation", "validation": "none"}, "--threshold validation"),
        ({"threshold": "validation", "validation": "test"}, "--threshold validation"),
        ({"augmentation": {"twirl": 1}}, "twirl"),
        ({"model": "resnet"}, "resnet"),
        ({"model_arguments": {"colour": 1}}, "colour"),
        ({"device": "tpu9"}, "--device tpu9"),
        ({"precision": "int4"}, "--precision int4"),
        ({"validation": "photos", "held_out": 4}, "hold out 4 of 4"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_anything_is_written(tiny_set, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        fit(tiny(tiny_set, tmp_path / "run", **changes), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_overwritten(tiny_set, tiny_run):
    before = (tiny_run / "checkpoint.pth").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        fit(TrainConfig.notebook(data=str(tiny_set), output=str(tiny_run), epochs=1, size=96), progress=False)
    assert (tiny_run / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"torn"])
def test_resuming_without_a_good_checkpoint_says_so(tiny_set, tmp_path, content):
    if content is not None:
        (tmp_path / "last.pth").write_bytes(content)
    with pytest.raises(UserError, match="last.pth"):
        fit(tiny(tiny_set, tmp_path), resume=True, progress=False)


def test_sizes_that_are_no_multiple_of_the_stride_are_rounded(tiny_set, tmp_path):
    fit(TrainConfig.notebook(data=str(tiny_set), output=str(tmp_path), epochs=1, size=50), progress=False)
    assert load_checkpoint(tmp_path / "checkpoint.pth")["frame"]["size"] == [48, 48]
