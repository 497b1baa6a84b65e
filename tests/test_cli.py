"""The command as its user meets it: help, the main job, its exit status; and the package's public names."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import call
from test_checkpoint import ends_equal
from test_config import train_parser
from test_train import at_step, without_curves  # noqa: F401

import retina_seg
from retina_seg.config import PRESETS, TrainConfig
from retina_seg.sets.synthetic import write_set

COMMANDS = "predict run train test compare threshold degrade measure prepare check synth export bench".split()  # noqa: SIM905
SMALL = ("--epochs", 1, "--size", 32, "--precision", "float32")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_defaults_and_an_example(command, capsys):
    assert call(command, "--help") == 0
    shown = capsys.readouterr().out
    assert f"example: retina-seg {command}" in shown and (command == "check" or "default" in shown)


def test_the_defaults_in_the_help_are_those_of_the_presets():
    shown = {action.dest: action.help for action in train_parser()._actions}
    for name in TrainConfig.__dataclass_fields__.keys() - {"preset", "data", "output"}:
        usual, *others = re.split(rf", (?=(?:{'|'.join(PRESETS)}) )", re.search(r"\(default: (.*)\)$", shown[name])[1])
        told = dict.fromkeys(PRESETS, usual) | dict(other.split(" ", 1) for other in others)
        for preset, text in told.items():
            value = getattr(TrainConfig.from_preset(preset), name)
            assert text == "not set" if value is None else text == value or json.loads(text) == value, (name, preset)


def test_help_needs_no_torch_and_importing_nothing_heavy():
    code = """
import sys, retina_seg.cli, retina_seg.sets.prepare
for option in ("--version", "--help"):
    try:
        retina_seg.cli.main([option])
    except SystemExit:
        assert "torch" not in sys.modules
from retina_seg import Segmenter, TrainConfig, fit
heavy = {"matplotlib", "skimage", "sklearn", "scipy", "albumentations", "torchvision"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"retina-seg {retina_seg.__version__}\n")
    assert all(command in done.stdout for command in COMMANDS)


def test_the_main_job_on_an_empty_folder_uses_synthetic_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_set("results/synthetic-data", 3, 2, (64, 64), progress=False)
    for path in (tmp_path / "Data1/README.md", tmp_path / "results/run/config.json"):
        path.parent.mkdir()
        path.write_text("mine")
    assert call("run", *SMALL, "--patches", 4) == 0
    shown = capsys.readouterr().out
    assert "Data1 holds no images yet: using synthetic ones" in shown
    assert "Jaccard: 0." in shown and "written to results/run-2: " in shown  # nothing is overwritten
    assert json.loads((tmp_path / "results/run-2/metrics.json").read_text())["protocol"]["images"] == 2
    assert TrainConfig.from_json(tmp_path / "results/run-2/config.json").preset == "quick"
    assert len(list(Path("Data1").iterdir())) == len(list(Path("results/run").iterdir())) == 1


def test_train_then_test_then_resume_as_in_the_readme(tiny_set, tmp_path, capsys):
    run = tmp_path / "run"
    assert call("train", "--preset", "notebook", "--data", tiny_set, "--output", run, *SMALL) == 0
    for protocol, folder, size in (("notebook", run, "512x512"), ("native", run / "native", "native")):
        assert call("test", "--run", run, "--data", tiny_set, "--protocol", protocol) == 0
        assert "F1: " in capsys.readouterr().out
        assert json.loads((folder / "metrics.json").read_text())["protocol"]["size"] == size
    # scores of other images do not take their place
    other = write_set(tmp_path / "other", 1, 1, (64, 64), seed=9, progress=False)
    assert call("test", "--run", run, "--data", other) == 2
    assert "holds other scores" in capsys.readouterr().err
    assert call("test", "--run", run, "--data", tiny_set, "--part", "validation") == 2
    assert "held out no training photos" in capsys.readouterr().err
    assert call("train", "--resume", run) == 0  # nothing is left to do, and that is no mistake
    assert call("train", "--resume", run, "--seed", 3) == 2 and "leave out --seed" in capsys.readouterr().err
    assert call("train", "--config", run / "config.json", "--output", tmp_path / "again") == 0
    assert ends_equal(tmp_path / "again", run)


def test_options_change_the_config_and_held_out_images_are_scored_by_name(tiny_set, tmp_path):
    changes = {"loss": "dice", "optimizer": "adam", "frame": "fov", "keep": "last", "validation": "photos", "held_out": 2,
               "patches": 4, "fov_diameter": 80.0, "augmentation": {"bend": 0, "flip": False}, "epochs": 1, "size": 32,
               "model_arguments": {"width": 4, "deepest": 8, "fine": 0}, "ema": 0.5, "precision": "float32"}  # fmt: skip
    options = [(f"--{name.replace('_', '-')}", json.dumps(value).strip('"')) for name, value in changes.items()]
    run = tmp_path / "run"
    assert call("train", "--preset", "quick", "--data", tiny_set, "--output", run, *sum(options, ())) == 0
    expected = TrainConfig.from_preset("quick", data=str(tiny_set), output=str(run), **changes)
    assert TrainConfig.from_json(run / "config.json") == expected
    arguments = ("test", "--run", run, "--data", tiny_set, "--part", "validation")
    assert call(*arguments, "--protocol", "native") == 0
    value = json.loads((run / "validation-native/metrics.json").read_text())
    held_out = json.loads((run / "config.json").read_text())["validation"]
    assert [image["name"] for image in value["images"]] == held_out and len(held_out) == 2
    assert call(*arguments, "--threshold", "1.5") == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_training_at_once_and_says_how_to_go_on(tiny_set, tmp_path, capsys, number, status):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with at_step(2, lambda: signal.raise_signal(number)):
        assert call("train", "--data", tiny_set, "--output", tmp_path / "a run", "--patches", 8, *SMALL) == status
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("retina-seg: stopped in epoch 1 of 1") and said.endswith(f"--resume '{tmp_path / 'a run'}'")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "retina-seg: stopped\n"),
        (PermissionError(13, "Permission denied", "locked"), 2, "retina-seg: error: locked: Permission denied\n"),
        (FloatingPointError("not a number"), 1, "retina-seg: error: not a number\n"),
    ],
)
def test_what_ends_a_command_is_its_status(error, status, said, monkeypatch, capsys):
    check_set = Mock(side_effect=[error, ZeroDivisionError()])
    monkeypatch.setattr("retina_seg.sets.check.check_set", check_set)
    assert call("check", "x") == status and capsys.readouterr().err == said
    with pytest.raises(ZeroDivisionError):  # a bug is not dressed as a mistake
        call("check", "x")


def test_a_module_of_the_user_registers_its_network_for_the_command(tiny_set, tmp_path, monkeypatch, capsys):
    code = "from retina_seg.model import FastAttentionUNet, register_model\n"
    (tmp_path / "my_networks.py").write_text(code + "register_model('mine', lambda: FastAttentionUNet(4, 4, 0))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ("--data", tiny_set, "--patches", 2, "--model-arguments", "{}", "--model", "mine", *SMALL)
    assert call("--import", "my_networks", "train", "--preset", "quick", *options, "--output", "run") == 0
    assert json.loads(Path("run/config.json").read_text())["config"]["model"] == "mine"
    assert call("--import", "nothing_here", "train", *options) == 2
    assert "--import nothing_here: cannot be imported (ModuleNotFoundError" in capsys.readouterr().err
