"""Training: one pass worked by hand, the loop and its folder, selection, splits that never leak."""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from test_config import check_options_exist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from retina_seg import train as training
from retina_seg.checkpoint import LAST, load_checkpoint, load_last
from retina_seg.config import TrainConfig
from retina_seg.data import DriveDataset, PatchDataset, list_pairs
from retina_seg.device import training_layout
from retina_seg.images import read_image, read_mask, write_image
from retina_seg.inference.segmenter import Segmenter
from retina_seg.loss import DiceBCELoss, dice_bce_loss
from retina_seg.model import attention_unet
from retina_seg.runs import load_teacher
from retina_seg.sets.layout import check_masks, load_with_fov
from retina_seg.train import NotFinite, evaluate, fit, split_set, train
from retina_seg.transforms import frame_from_dict, to_tensor
from retina_seg.utils import UserError, read_csv, seeding


def tiny(data, folder, **changes) -> TrainConfig:
    """A config of a second: two epochs of two steps of the fast network, at the images' own scale."""
    small = {"size": 32, "patches": 4, "epochs": 2, "precision": "float32", "fov_diameter": None}
    small["model_arguments"] = {"width": 4, "deepest": 8, "fine": 4}
    return TrainConfig.fast(**{**small, "data": str(data), "output": str(folder), **changes})


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint.pth")["state_dict"]


def same_weights(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):  # drawing takes longer than these trainings
    monkeypatch.setattr("retina_seg.visualize.save_figure", lambda *_, **__: None)


@contextlib.contextmanager
def at_step(number, call):
    """`call` is made within the `number`-th step from now."""
    count = itertools.count(1)
    handle = register_optimizer_step_post_hook(lambda *_: call() if next(count) == number else None)
    try:
        yield
    finally:
        handle.remove()


class Shift(nn.Module):
    """One number added to the first channel: a network whose training can be followed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        return x[:, :1] + self.shift


def one_pass(model, targets, loss_fn=nn.functional.mse_loss, **options) -> float:
    batches = [(torch.zeros(1, 3, 2, 2), torch.full((1, 1, 2, 2), target)) for target in targets]
    return train(model, batches, torch.optim.SGD(model.parameters(), lr=0.25), loss_fn, "cpu", **options)


# step 1: loss (0-1)^2 = 1, gradient -2, shift 0.5; step 2: loss (0.5-3)^2 = 6.25, gradient -5, shift 1.75
# gradients of norm 1: shift 0.25, then loss (0.25-3)^2 = 7.5625, shift 0.5
@pytest.mark.parametrize(("clip", "losses", "shift"), [(0.0, (1, 6.25), 1.75), (1.0, (1, 7.5625), 0.5)])
def test_train_returns_the_mean_loss_and_takes_plain_gradient_steps(clip, losses, shift):
    model, seen = Shift(), []
    loss = one_pass(model, (1.0, 3.0), clip=clip, after_step=lambda: seen.append(model.shift.item()))
    assert loss == pytest.approx(np.mean(losses))
    assert model.shift.item() == pytest.approx(shift, abs=1e-5)
    assert len(seen) == 2 and seen[-1] == model.shift.item()


def test_evaluate_returns_the_mean_loss_and_changes_nothing():
    model, loss_fn = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1)), DiceBCELoss()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [(torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4).round()) for _ in range(3)]
    loss = evaluate(model, batches, loss_fn, torch.device("cpu"))
    assert loss == pytest.approx(sum(loss_fn(model(x), y).item() for x, y in batches) / 3, rel=1e-5)
    assert same_weights(before, model.state_dict())


def test_the_f1_of_a_validation_is_that_of_each_image():
    logits = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]]).view(3, 1, 2, 2)
    masks = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.4], [0.0, 0.0, 0.0, 0.0]]).view(3, 1, 2, 2)
    f1 = []
    evaluate(Shift(), zip(logits.repeat(1, 3, 1, 1).split(2), masks.split(2), strict=True), DiceBCELoss(), "cpu", f1=f1)
    assert torch.cat(f1).tolist() == pytest.approx([2 / 4, 6 / 7, 0])  # 2 TP / (predicted + true)


def test_an_empty_loader_is_an_error_not_a_division_by_zero():
    for call in (lambda: evaluate(Shift(), [], DiceBCELoss(), "cpu"), lambda: one_pass(Shift(), [])):
        with pytest.raises(ValueError, match="empty"):
            call()


@pytest.mark.parametrize(("targets", "what"), [((0.0, math.inf), "loss .* step 2"), ((0.0, 0.0), "gradient .* step 1")])
def test_what_is_not_finite_stops_before_the_step(targets, what):
    loss_fn = nn.functional.mse_loss if "loss" in what else lambda x, _: x.sqrt().sum()  # its slope at 0 is infinite
    model = Shift()
    with pytest.raises(NotFinite, match=what):
        one_pass(model, targets, loss_fn)
    assert model.shift.item() == 0


def test_fit_writes_the_run_folder(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert names == {"config.json", "history.csv", "curves.png", "checkpoint.pth", LAST}
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["config"]["preset"] == "notebook" and config["parameters"] == 664_071
    assert {"torch", "numpy"} <= set(config["environment"]["packages"])
    assert [row["epoch"] for row in read_csv(tiny_run / "history.csv", ())] == ["1"]
    notes = load_checkpoint(tiny_run / "checkpoint.pth")
    assert notes["frame"] == {"kind": "resize", "size": [96, 96]} and notes["selected_on"] == "test"


def test_the_notebook_preset_trains_as_the_originals_loop_to_the_bit(tiny_set, tmp_path):
    data = Path(shutil.copytree(tiny_set, tmp_path / "set"))
    (data / "photos.csv").unlink()
    for path in data.glob("train/*/2.png"):
        path.rename(path.with_name("10.png"))  # which a glob has before 3
    files = [sorted((data / part / kind).iterdir()) for part in ("train", "test") for kind in ("image", "mask")]
    config = TrainConfig.notebook(data=str(data), output=str(tmp_path), size=50, epochs=2, precision="float32")
    run = fit(config, progress=False)
    seeding(42)
    datasets = [DriveDataset(images, masks, (48, 48)) for images, masks in (files[:2], files[2:])]  # a stride of 8
    loaders = [DataLoader(datasets[0], 2, shuffle=True), DataLoader(datasets[1], 2)]
    layout = training_layout(torch.device("cpu"), torch.float32)  # as `fused` below: the order of sums, no more
    model, loss_fn = attention_unet().to(memory_format=layout), DiceBCELoss()
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True), []
    for _ in range(2):
        model.train()
        for x, y in loaders[0]:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            losses.append(np.mean([loss_fn(model(x), y).item() for x, y in loaders[1]]))
    assert [row["validation_loss"] for row in run.history] == pytest.approx(losses, rel=1e-6)
    assert same_weights(load_last(tmp_path)["model"], model.state_dict())


def test_fit_learns_from_new_patches_each_epoch_and_keeps_the_ema_weights(tiny_set, tmp_path, monkeypatch):
    drawn, real = [], PatchDataset.__getitem__
    monkeypatch.setattr(PatchDataset, "__getitem__", lambda self, i: drawn.append((self.epoch, i)) or real(self, i))
    config = tiny(tiny_set, tmp_path, epochs=6, patches=16, learning_rate=1e-2, ema=0.9)
    history = fit(config, progress=False).history
    assert drawn != sorted(drawn) == [(epoch, i) for epoch in range(6) for i in range(16)]
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.05
    last = load_last(tmp_path)
    assert same_weights(weights_of(tmp_path), last["ema"]) and not same_weights(last["ema"], last["model"])


def test_the_best_epoch_is_the_one_with_the_lowest_validation_loss(tiny_set, tmp_path, monkeypatch):
    losses, real = iter((0.9, 0.5, 0.7)), training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda *arguments: next(losses) + 0 * real(*arguments))
    run = fit(tiny(tiny_set, tmp_path, epochs=3, validation="photos", held_out=1, keep="best"), progress=False)
    assert run.best == load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 2
    assert not same_weights(weights_of(tmp_path), load_last(tmp_path)["ema"])  # those of the third


def test_the_threshold_is_chosen_on_held_out_images_and_stored(tiny_set, tmp_path):
    config = tiny(tiny_set, tmp_path, validation="photos", held_out=1, threshold="validation", epochs=1)
    run = fit(config, progress=False)
    notes = load_checkpoint(tmp_path / "checkpoint.pth")
    assert notes["threshold_from"] == "validation" and same_weights(weights_of(tmp_path), run.model.state_dict())
    image, mask, fov = load_with_fov(split_set(config)[1][0])
    probability = Segmenter(run.model, frame_from_dict(notes["frame"]), precision="float32")(image)[fov]
    f1 = [f1_score(mask[fov] > 127, probability > t / 100, zero_division=0) for t in range(1, 100)]
    assert notes["threshold"] == pytest.approx((1 + f1.index(max(f1))) / 100)


def test_each_datasets_masks_teach_its_own_output_channel(tiny_set, tmp_path):
    shutil.copytree(tiny_set, tmp_path / "All")
    for path in (tmp_path / "All" / "train" / "mask").iterdir():
        mask = np.full_like(read_mask(path), 255)
        mask[::2] = 0  # half of it: more would be refused
        write_image(path, mask)
    data = [str(tmp_path / "All"), str(tiny_set)]
    how = {"styles": "datasets", "normalise": "fov", "threshold": "0.4", "style": "all", "epochs": 12, "patches": 8}
    config = tiny(tiny_set, tmp_path / "run", **how, ema=0.5, augmentation={"recolour": 0})
    config = dataclasses.replace(config, data=data)
    run = fit(config, progress=False)
    notes = load_checkpoint(run.folder / "checkpoint.pth")
    assert notes["arguments"]["styles"] == 2 and "styles" not in config.model_arguments
    alone = {"all": [1.0, 0.0], "tiny": [0.0, 1.0]}
    assert notes["styles"] == {"balanced": [0.5, 0.5], "fine": [1.0, 0.0], "bold": [0.0, 1.0], **alone}
    assert (notes["threshold"], notes["threshold_from"], notes["frame"]["normalise"]) == (0.4, "config", True)
    image = read_image(list_pairs(tiny_set, "train")[0].image)
    default, own = (Segmenter.load(run.folder, style=style)(image).mean() for style in (None, "tiny"))
    assert default > own + 0.01
    chosen = {"threshold": "validation", "validation": "photos", "held_out": 1, "epochs": 1, "style": "balanced"}
    for resume in (False, True):  # the second time no epoch is left to do
        fit(dataclasses.replace(config, **chosen, output=str(tmp_path / "chosen")), resume, progress=False)
    notes = load_checkpoint(tmp_path / "chosen" / "checkpoint.pth")  # with all its channels
    assert (notes["threshold_from"], len(notes["state_dict"]["fine.1.bias"])) == ("validation", 2) and notes["styles"]
    with pytest.raises(UserError, match="--style thin: choose one of auto, balanced, fine, bold, all, tiny"):
        fit(dataclasses.replace(config, style="thin", output=str(tmp_path / "other")), progress=False)
    # as a teacher it gives each dataset's logits, in the order of the datasets
    teacher = load_teacher(str(run.folder), frame_from_dict(notes["frame"]), ["tiny", "all"])
    with torch.no_grad():
        taught = torch.sigmoid(teacher(to_tensor(image[:64, :64])[None])).mean((0, 2, 3))
    assert taught[1] > taught[0] + 0.01
    how = {"teacher": str(run.folder), "epochs": 1, "largest_diameter": 500.0}  # which patches know nothing of
    student = dataclasses.replace(config, **how, output=str(tmp_path / "student"))
    alone = dataclasses.replace(student, teacher=None, output=str(tmp_path / "alone"))
    losses = [fit(one, progress=False).history[0]["train_loss"] for one in (student, alone)]
    assert losses[0] > losses[1] + 0.1  # the teacher's loss is added
    shutil.copytree(tiny_set, tmp_path / "other")
    frame, unknown = {"fov_diameter": 70.0, "style": "auto"}, {"data": [str(tmp_path / "other")], "style": "auto"}
    for change, said in ((frame, "is used in the working frame"), (unknown, "--style other: ")):
        with pytest.raises(UserError, match=f"--teacher .*{said}"):
            fit(dataclasses.replace(student, **change, output=str(tmp_path / "refused")), progress=False)
    assert not (tmp_path / "refused").exists()


def test_a_teachers_predictions_are_learned_beside_the_masks():
    torch.manual_seed(0)
    model, teacher = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1).requires_grad_(False)
    images, masks, style = torch.rand(2, 3, 4, 4), torch.randint(0, 2, (2, 1, 4, 4)).float(), torch.tensor([1, 0])
    expected = copy.deepcopy(model)
    logits, taught = expected(images), teacher(images)
    loss = dice_bce_loss(torch.stack([logits[0, 1:], logits[1, :1]]), masks)
    loss = loss + sum(dice_bce_loss(logits[:, i], torch.sigmoid(taught[:, i])) for i in (0, 1)) / 2
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    result = train(model, [(images, masks, style)], optimizer, dice_bce_loss, "cpu", teacher=teacher)
    assert result == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(model.weight, expected.weight - 0.1 * expected.weight.grad, atol=1e-6)


def test_the_styles_images_count_by_their_own_logits_alone():
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 2, (2, 1, 4, 4)).float()
    f1 = []
    loss = evaluate(nn.Identity(), [(logits, masks, torch.tensor([2, 0]))], dice_bce_loss, "cpu", f1=f1)
    own = torch.stack([logits[0, 2:], logits[1, :1]])
    assert loss == pytest.approx(dice_bce_loss(own, masks).item()) and len(f1[0]) == 2


@pytest.mark.parametrize(("validation", "held_out"), [("photos", 1), ("test", 2), ("none", 0)])
def test_held_out_images_are_not_trained_on(tiny_set, tmp_path, validation, held_out):
    kept = "best" if held_out else "last"
    config = tiny(tiny_set, tmp_path, validation=validation, held_out=1, epochs=1, keep=kept, largest_diameter=200.0)
    fit(config, progress=False)
    assert TrainConfig.from_json(tmp_path / "config.json") == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert [pair.name for pair in split_set(config)[1]] == written["validation"]
    assert len(written["validation"]) == held_out
    notes = load_checkpoint(tmp_path / "checkpoint.pth")
    expected = {"0", "1", "2", "3"} - (set(written["validation"]) if validation == "photos" else set())
    assert set(written["training"]) == set(notes["trained_on"]) == expected
    assert notes["selected_on"] == {"photos": "validation", "test": "test", "none": "nothing"}[validation]
    assert notes["frame"]["largest_diameter"] == 200


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "hinge"}, "--loss hinge: unknown; choose one of dice_bce, dice"),
        ({"fov_diameter": 60.0, "largest_diameter": 50.0}, "--largest-diameter 50"),
        ({"model_arguments": {"colour": 1}}, "colour"),
        ({"validation": "photos", "held_out": 4}, "--held-out 4: there are 4 photos"),
    ],
)
def test_a_config_that_cannot_be_is_refused_before_anything_is_written(tiny_set, tmp_path, changes, said):
    with pytest.raises(UserError, match=said) as error:
        fit(tiny(tiny_set, tmp_path / "run", **changes), progress=False)
    check_options_exist(str(error.value))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("step", "place"), [(2, "epoch 1: .* at step 2"), (3, "epoch 2: .* at step 1")])
def test_a_loss_that_is_not_finite_says_where_and_keeps_the_epochs_before(tiny_set, tmp_path, monkeypatch, step, place):
    count, real = itertools.count(1), training.LOSSES["dice_bce"]
    monkeypatch.setitem(training.LOSSES, "dice_bce", lambda *a: real(*a) * (math.nan if next(count) == step else 1))
    with pytest.raises(NotFinite, match=place) as error:
        fit(tiny(tiny_set, tmp_path), progress=False)
    check_options_exist(str(error.value))
    assert (load_last(tmp_path) or {"state": {"epoch": 0}})["state"]["epoch"] == (step - 1) // 2


def test_odd_masks_are_said_as_the_training_starts(tiny_set, tmp_path, capsys):
    data = Path(shutil.copytree(tiny_set, tmp_path / "set"))
    write_image((mask := data / "train/mask/1.png"), np.uint8(read_mask(mask) // 255))
    fit(tiny(data, tmp_path / "run", epochs=1), progress=False)
    assert check_masks(list_pairs(data, "train")) == capsys.readouterr().out.splitlines() != []
