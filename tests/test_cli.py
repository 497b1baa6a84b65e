"""The command as its user meets it: help, the main job, and one line for every mistake."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from retina_seg.synthetic import write_set
from torch import nn

from retina_seg import cli
from retina_seg.images import read_label, read_photo, write_picture

COMMANDS = ("run", "train", "test", "predict", "compare", "threshold", "prepare", "check", "synth", "bench", "export")


def call(*arguments) -> int:
    """The command in this process: its exit status."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's own
        return int(stop.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_defaults_and_an_example(command, capsys):
    assert call(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "example: retina-seg" in shown
    assert command == "check" or "default" in shown


def test_the_defaults_in_the_help_are_the_recipes():
    from retina_seg.train import PRESETS

    assert set(cli.PRESET_NAMES) == set(PRESETS)
    made = {name: preset() for name, preset in PRESETS.items()}
    text = " ".join(cli.build_parser()._subparsers._group_actions[0].choices["train"].format_help().split())
    for shown in (
        ", ".join(f"{name} {made[name].epochs}" for name in ("notebook", "quick", "fast"))
        + f", else {made['tiny'].epochs}",
        f"photos a step and process (default: {made['fast'].batch_size})",
        f"notebook {made['notebook'].size}, else {made['fast'].size}",
    ):
        assert shown in text
    assert {recipe.batch_size for recipe in made.values()} == {made["fast"].batch_size}
    assert made["tiny"].epochs == made["general"].epochs
    assert made["general"].size == made["quick"].size == made["fast"].size
    assert made["notebook"].learning_rate == 1e-4
    assert made["fast"].learning_rate == made["quick"].learning_rate == 2e-3


def test_python_dash_m_is_the_command_and_help_is_quick():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "retina_seg", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and all(command in done.stdout for command in COMMANDS)
    assert time.perf_counter() - start < 5  # torch alone takes longer to import on a slow disk: help does without it
    code = "import sys, retina_seg.cli as c; c.build_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "what", ["import retina_seg", "from retina_seg import Segmenter", "from retina_seg import fit"]
)
def test_importing_costs_little_beside_torch(what):
    code = f"""
import sys, time, torch
start = time.perf_counter()
{what}
seconds = time.perf_counter() - start
heavy = {{"matplotlib", "skimage", "sklearn", "scipy", "albumentations", "torchvision"}} & set(sys.modules)
assert not heavy, heavy
print(seconds)
"""
    shown = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    assert min(float(done.stdout) for done in shown) < 0.3


def test_the_main_job_on_an_empty_folder_uses_synthetic_photos(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_set("results/synthetic-data", 3, 2, (64, 64), progress=False)
    (tmp_path / "Data1").mkdir()
    (tmp_path / "Data1/README.md").write_text("how to fill it")
    assert call("run", "--epochs", 1, "--size", 32, "--precision", "float32") == 0
    shown = capsys.readouterr().out
    assert "Data1 holds no photos yet: using synthetic ones" in shown
    assert "Jaccard: 0." in shown and "results/run" in shown
    value = json.loads((tmp_path / "results/run/metrics.json").read_text())
    assert value["protocol"]["photos"] == 2
    assert sorted(path.name for path in (tmp_path / "Data1").iterdir()) == ["README.md"]
    # once more: nothing is overwritten
    before = (tmp_path / "results/run/checkpoint.pth").read_bytes()
    assert call("run", "--epochs", 1, "--size", 32, "--precision", "float32", "--preset", "quick") == 0
    assert (tmp_path / "results/run-2/metrics.json").is_file()
    assert (tmp_path / "results/run/checkpoint.pth").read_bytes() == before


def test_the_main_job_on_a_filled_folder_uses_its_photos(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_set("photos/inner/Data", 2, 1, (64, 64), progress=False)
    assert call("run", "--data", "photos", "--output", "out", "--preset", "notebook", "--epochs", 1, "--size", 32) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["recipe"]["data"].endswith("photos/inner/Data") and config["recipe"]["preset"] == "notebook"
    assert not (tmp_path / "results").exists()


def test_train_then_test_then_resume_as_in_the_readme(tiny_set, tmp_path, capsys):
    run = tmp_path / "run"
    sizes = ("--epochs", 1, "--size", 48, "--precision", "float32")
    assert call("train", "--preset", "notebook", "--data", tiny_set, "--output", run, *sizes) == 0
    assert call("test", "--run", run, "--data", tiny_set) == 0
    assert "F1: " in capsys.readouterr().out
    assert call("test", "--run", run, "--data", tiny_set, "--protocol", "native") == 0
    native = json.loads((run / "native/metrics.json").read_text())
    assert native["protocol"]["size"] == "native"
    assert json.loads((run / "metrics.json").read_text())["protocol"]["size"] == "512x512"
    # other photos' scores do not take their place
    other = write_set(tmp_path / "other", 1, 1, (64, 64), seed=9, progress=False)
    assert call("test", "--run", run, "--data", other) == 2
    assert "holds other scores" in capsys.readouterr().err
    assert call("test", "--run", run, "--data", tiny_set, "--part", "validation") == 2
    assert "held out no training photos" in capsys.readouterr().err
    assert call("train", "--resume", run) == 0  # nothing is left to do, and that is no mistake
    assert call("train", "--config", run / "config.json", "--output", tmp_path / "again", *sizes) == 0
    assert (tmp_path / "again/history.csv").is_file()


def test_held_out_photos_are_scored_by_name(tiny_set, tmp_path):
    sizes = ("--epochs", 1, "--size", 32, "--precision", "float32", "--validation", "photos", "--held-out", 2)
    assert call("train", "--preset", "quick", "--data", tiny_set, "--output", tmp_path / "run", *sizes) == 0
    arguments = ("test", "--run", tmp_path / "run", "--data", tiny_set, "--part", "validation", "--protocol", "native")
    assert call(*arguments) == 0
    value = json.loads((tmp_path / "run/validation-native/metrics.json").read_text())
    held_out = json.loads((tmp_path / "run/config.json").read_text())["validation"]
    assert [image["name"] for image in value["images"]] == held_out and len(held_out) == 2
    assert call(*arguments[:5], "--part", "validation", "--threshold", "1.5") == 2


def test_synth_then_check(tmp_path, capsys):
    assert call("synth", tmp_path / "set", "--train", 2, "--test", 1, "--size", 64) == 0
    assert call("check", tmp_path / "set") == 0
    assert read_photo(tmp_path / "set/train/image/1.png").shape == (64, 64, 3)
    write_picture(tmp_path / "set/test/image/0.png", read_photo(tmp_path / "set/train/image/0.png")[:, ::-1])
    assert call("check", tmp_path / "set") == 1


# ------------------------------------------------------------------------------------------------------------- mistakes


def spoil(name: str, folder, tiny_set):
    """The arguments of a command over an input that is wrong in the way `name` says, made in `folder`."""
    data = folder / "set"
    write_set(data, 3, 1, (64, 64), seed=1, progress=False)
    image, mask = data / "train/image/1.png", data / "train/mask/1.png"
    train = ["train", "--data", data, "--output", folder / "out", "--preset", "notebook", "--size", 32, "--epochs", 1]
    check = folder / "weights.pth"
    test = ["test", "--checkpoint", check, "--data", data, "--output", folder / "out"]
    if name == "missing folder":
        return ["train", "--data", folder / "nowhere", "--output", folder / "out"]
    if name == "empty folder":
        (folder / "empty").mkdir()
        return ["train", "--data", folder / "empty", "--output", folder / "out"]
    if name == "empty image folder":
        (folder / "bare/train/image").mkdir(parents=True)
        (folder / "bare/train/mask").mkdir()
        return ["train", "--data", folder / "bare", "--output", folder / "out"]
    if name == "unpaired photo":
        mask.unlink()
    elif name == "unpaired mask":
        image.unlink()
    elif name == "truncated photo":
        image.write_bytes(image.read_bytes()[:900])
    elif name == "text for a photo":
        image.write_text("not a picture")
    elif name == "two sizes":
        write_picture(mask, np.zeros((60, 64), np.uint8))
    elif name == "epochs 0":
        return [*train, "--epochs", 0]
    elif name == "no such device":
        return [*train, "--device", "warp"]
    elif name == "output is a file":
        (folder / "out").write_text("mine")
    elif name == "no checkpoint":
        return test
    elif name == "no checkpoint file":
        check.write_bytes(b"weights?")
        return test
    elif name == "another architecture":
        torch.save(nn.Linear(2, 2).state_dict(), check)
        return test
    elif name == "no output for a checkpoint":
        return ["test", "--checkpoint", check, "--data", data]
    elif name == "no run":
        return ["test", "--run", folder / "nowhere", "--data", data]
    elif name == "resume nothing":
        return ["train", "--resume", folder / "nowhere"]
    elif name == "prepare nothing":
        return ["prepare", "drive", folder / "nowhere", folder / "out"]
    elif name == "prepare another set":
        return ["prepare", "hrf", data, folder / "out"]
    elif name == "synth into a used folder":
        return ["synth", data]
    elif name == "synth too small":
        return ["synth", folder / "out", "--size", 8]
    elif name == "check nothing":
        return ["check", folder / "nowhere"]
    else:
        raise AssertionError(name)
    return train


MISTAKES = {
    "missing folder": "nowhere: no such folder",
    "empty folder": "no train/image or test/image folder",
    "empty image folder": "holds no pictures",
    "unpaired photo": "1.png: has no partner",
    "unpaired mask": "1.png: has no partner",
    "truncated photo": "1.png: is damaged or cut short",
    "text for a photo": "1.png: is not a picture",
    "two sizes": "differ in size (64x64 and 64x60)",
    "epochs 0": "--epochs 0",
    "no such device": "--device warp",
    "output is a file": "out: a file stands where a folder",
    "no checkpoint": "weights.pth: no such checkpoint",
    "no checkpoint file": "weights.pth: is not a checkpoint",
    "another architecture": "weights.pth: the weights are of another architecture",
    "no output for a checkpoint": "--output is needed",
    "no run": "nowhere: no such checkpoint",
    "resume nothing": "config.json: cannot be read",
    "prepare nothing": "nowhere",
    "prepare another set": "set",
    "synth into a used folder": "already in use",
    "synth too small": "64",
    "check nothing": "nowhere: no such folder",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(name, tmp_path, tiny_set, capsys):
    arguments = spoil(name, tmp_path, tiny_set)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert call(*arguments) == 2
    lines = [
        line
        for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
        if line.startswith("retina-seg: error:")
    ]
    assert len(lines) == 1 and MISTAKES[name] in lines[0]
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert not left or {path.name for path in left} == {"config.json"}  # a photo that proves broken while training


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_named(tiny_set, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert call("train", "--data", tiny_set, "--output", tmp_path / "locked", "--epochs", 1) == 2
    assert "locked" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_named(tiny_set, tmp_path, monkeypatch, capsys):
    from pathlib import Path

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    assert call("train", "--data", tiny_set, "--output", tmp_path / "locked", "--epochs", 1) == 2
    assert "locked: may not be written to (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["16-bit", "grey", "rgba"])
def test_other_kinds_of_photos_are_converted(kind, tmp_path, capsys):
    from PIL import Image

    data = tmp_path / "set"
    write_set(data, 3, 1, (64, 64), seed=2, progress=False)
    image = data / "train/image/1.png"
    grey = read_label(image)
    if kind == "16-bit":
        Image.fromarray(grey.astype(np.uint16) * 257).save(image)
    else:
        Image.open(image).convert({"grey": "L", "rgba": "RGBA"}[kind]).save(image)
    assert (
        call("train", "--data", data, "--output", tmp_path / "out", "--preset", "notebook", "--size", 32, "--epochs", 1)
        == 0
    )


def test_an_unknown_command_or_option_exits_with_2(capsys):
    assert call("paint") == 2
    assert call("prepare", "drive", "a", "b", "--size", "tiny") == 2
    assert "neither native nor a number" in capsys.readouterr().err


def test_a_bug_is_not_dressed_as_a_mistake(monkeypatch):
    monkeypatch.setattr(cli, "_check", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("check", "x")


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_check", stop)
    assert call("check", "x") == 130
    assert capsys.readouterr().err == "retina-seg: stopped\n"
