"""A researcher's moves with the package, each a few lines, as its users write them. Passes `mypy --strict` (below)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from retina_seg import Segmenter, TrainConfig, fit, load_model
from retina_seg import test as score
from retina_seg.data import DriveDataset, list_pairs
from retina_seg.images import read_image
from retina_seg.loss import LOSSES, dice_bce_loss, register_loss
from retina_seg.metrics import SCORES, RankingHistogram, scores
from retina_seg.model import MODELS, register_model
from retina_seg.sets.synthetic import synthetic_image

if TYPE_CHECKING:  # the public names have types
    from typing_extensions import assert_type

    from retina_seg.test import Scores
    from retina_seg.train import Run

    assert_type(fit(TrainConfig.fast()), Run)
    assert_type(score("drive", "Data1"), Scores)
    assert_type(load_model("drive"), tuple[nn.Module, dict[str, Any]])
    assert_type(Segmenter.load("drive"), Segmenter)
    fit(3)  # type: ignore[arg-type]


class MyNet(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Wrapped(nn.Module):  # a torchvision segmentation network: its logits are in a dictionary
    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        self.network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]  # type: ignore[no-any-return]


def short(data: Path, output: Path, **changes: object) -> TrainConfig:
    values = {"patches": 4, "size": 64, "epochs": 1, "fov_diameter": None, "warmup": None} | changes
    return TrainConfig.fast(data=str(data), output=str(output), **values)


def test_an_own_network_is_trained_saved_and_used(tiny_set: Path, tmp_path: Path) -> None:
    run = fit(short(tiny_set, tmp_path / "run"), model=MyNet(), progress=False)
    probability = Segmenter(run.model)(read_image(list_pairs(tiny_set, "test")[0].image))
    assert probability.shape == (96, 96) and 0 < probability.max() < 1
    again, notes = load_model(run.folder, model=MyNet())
    assert notes["model"] == "MyNet" and torch.equal(again.layers[0].weight, run.model.layers[0].weight)  # type: ignore
    with pytest.raises(Exception, match="MyNet.*model="):
        load_model(run.folder)


def test_a_registered_network_and_loss_are_used_by_name(tiny_set: Path, tmp_path: Path) -> None:
    register_model("my_net", MyNet)
    register_loss("my_loss", lambda logits, masks: dice_bce_loss(logits, masks) * 2)
    config = short(tiny_set, tmp_path / "run", model="my_net", model_arguments={"width": 6}, loss="my_loss")
    assert fit(config, progress=False).model.layers[0].out_channels == 6  # type: ignore[union-attr,index]
    assert isinstance(Segmenter.load(tmp_path / "run").model, MyNet)
    del MODELS["my_net"], LOSSES["my_loss"]  # which other tests go through


def test_a_torchvision_network(tiny_set: Path, tmp_path: Path) -> None:
    run = fit(short(tiny_set, tmp_path / "run", clip=0.0), model=Wrapped(), progress=False)
    assert Segmenter(run.model, tta=True)(np.zeros((50, 70, 3), np.uint8)).shape == (50, 70)


def test_an_own_loss_is_the_one_that_is_minimised(tiny_set: Path, tmp_path: Path) -> None:
    asked: list[torch.Size] = []

    def loss(logits: Tensor, masks: Tensor) -> Tensor:  # fmt: skip
        asked.append(masks.shape)
        return dice_bce_loss(logits, masks) * 0 + logits.mean() ** 2 + 5

    run = fit(short(tiny_set, tmp_path / "run"), loss=loss, progress=False)
    assert run.history[0]["train_loss"] >= 5 and asked == [torch.Size([2, 1, 64, 64])] * 2


def test_a_pretrained_start(tiny_set: Path, tmp_path: Path) -> None:
    changes = {"data": str(tiny_set), "output": str(tmp_path / "run"), "patches": 2, "epochs": 1, "weights": "tiny"}
    config = TrainConfig.from_preset("finetune", **changes)
    run, (tiny, notes) = fit(config, progress=False), load_model("tiny")
    parameters = zip(run.model.parameters(), tiny.parameters(), strict=True)
    moved = [float((a - b).detach().abs().max()) for a, b in parameters]
    assert 0 < max(moved) < 0.1  # it starts from them
    assert load_model(run.folder)[1]["frame"] == notes["frame"]


def test_callbacks_see_every_epoch(tiny_set: Path, tmp_path: Path) -> None:
    seen: list[tuple[float, int]] = []
    run = fit(
        short(tiny_set, tmp_path / "run", epochs=3), progress=False,
        callbacks=[lambda row, model: seen.append((row["train_loss"], sum(p.numel() for p in model.parameters())))],
    )  # fmt: skip
    assert [loss for loss, _ in seen] == [row["train_loss"] for row in run.history] and len(seen) == 3


def test_own_data_by_pattern_and_by_csv(tiny_set: Path, tmp_path: Path) -> None:
    usual = list_pairs(tiny_set, "train")
    by_pattern = list_pairs(images=f"{tiny_set}/train/image/*.png", masks=f"{tiny_set}/train/mask/*.png")
    table = tmp_path / "pairs.csv"
    table.write_text("image,mask\n" + "\n".join(f"{pair.image},{pair.mask}" for pair in usual))
    files = [(pair.image, pair.mask) for pair in usual]
    assert [(p.image, p.mask) for p in by_pattern] == [(p.image, p.mask) for p in list_pairs(csv=table)] == files


def test_own_data_as_a_torch_dataset_with_a_transform(tiny_set: Path, tmp_path: Path) -> None:
    dark = DriveDataset(tiny_set / "train", transform=lambda image, mask: (image // 2, mask))
    assert float(dark[0][0].max()) <= 0.5 and len(dark) == 4
    run = fit(short(tiny_set, tmp_path / "run"), data=dark, progress=False)
    assert len(run.history) == 1


def test_k_fold(tiny_set: Path, tmp_path: Path) -> None:
    held = []
    for fold in range(2):
        config = short(tiny_set, tmp_path / str(fold), validation="photos", held_out=2, fold=fold)
        scores_of_fold = score(fit(config, progress=False), tiny_set, part="validation", progress=False)
        held += [row["name"] for row in scores_of_fold["images"]]
    assert sorted(held) == sorted(pair.name for pair in list_pairs(tiny_set, "train"))


def test_scores_of_arrays() -> None:
    mask = np.array([[True, True, False, False]])
    result = scores(mask, np.array([[0.9, 0.2, 0.6, 0.1]], np.float32))
    assert set(result) == set(SCORES) and result["f1"] == 0.5 and result["auc"] == 0.75
    assert scores(mask, np.array([[0.9, 0.2, 0.6, 0.1]]), fov=np.array([[True, True, False, True]]))["precision"] == 1
    with pytest.raises(TypeError, match="float"):
        scores(mask, mask)


@pytest.mark.parametrize("kind", ["path", "text", "PIL", "16 bits", "float", "RGBA", "tensor", "float tensor"])
def test_the_segmenter_takes_what_people_hold(kind: str, tmp_path: Path) -> None:
    image, segmenter = synthetic_image(3, 96, 96).image, Segmenter.load("tiny")
    Image.fromarray(image).save(path := tmp_path / "eye.png")
    held = {
        "path": path,
        "text": str(path),
        "PIL": Image.fromarray(image),
        "16 bits": image.astype(np.uint16) * 256,
        "float": image / 255,
        "RGBA": np.dstack([image, np.full((96, 96), 255, np.uint8)]),
        "tensor": torch.from_numpy(image).permute(2, 0, 1),
        "float tensor": torch.from_numpy(image).permute(2, 0, 1) / 255,
    }[kind]
    expected = segmenter(image)
    assert np.abs(segmenter(held) - expected).max() < 1e-6
    both = segmenter([held, image])
    assert len(both) == 2 and np.abs(both[1] - expected).max() < 1e-6


def test_logits_and_vessels_agree_with_the_probability() -> None:
    image, segmenter = synthetic_image(3, 96, 96).image, Segmenter.load("tiny").to("cpu")
    logits, probability = segmenter.logits(image), segmenter(image)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), probability, atol=1e-6)
    assert (segmenter.vessels(image) == (probability > segmenter.threshold)).all()
    assert "67,114 parameters" in repr(segmenter)


def test_changed_weights_are_seen_at_once() -> None:
    image, segmenter = synthetic_image(3, 96, 96).image, Segmenter.load("tiny")
    before = segmenter(image)
    with torch.no_grad():
        next(segmenter.model.parameters()).mul_(0.5)
    changed = segmenter(image)
    for value in segmenter.model.parameters():
        value.data.zero_()  # leaves no trace in the tensor's version
    assert not np.array_equal(before, changed) and len(np.unique(segmenter(image))) <= 2


def test_a_table_by_image_and_a_roc_curve(tiny_set: Path) -> None:
    result = score(Segmenter.load("tiny"), tiny_set, protocol="native", progress=False)
    table = result.table  # a pandas DataFrame where pandas is installed, else a list of rows
    assert len(table) == 2 and {"name", "fov_f1"} <= set(table[0] if isinstance(table, list) else table.columns)
    curve: RankingHistogram = result.rankings["fov"]
    found, wrong = curve.rates()
    assert found[0] == wrong[0] == 0 and (np.diff(found) >= 0).all() and found[-1] > 0


def test_this_file_passes_strict_type_checks() -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
