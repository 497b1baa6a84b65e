"""The command as its user meets it: help, the main job, one line for every mistake; and the package's public names."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_checkpoint import ends_equal
from test_config import train_parser
from test_train import at_step, without_curves  # noqa: F401
from torch import nn

import retina_seg
from retina_seg import cli
from retina_seg.config import PRESETS, TrainConfig
from retina_seg.images import read_image, write_image
from retina_seg.sets.synthetic import write_set

COMMANDS = (
    "predict",
    "run",
    "train",
    "test",
    "compare",
    "threshold",
    "degrade",
    "prepare",
    "check",
    "synth",
    "export",
    "bench",
)
SMALL = ("--epochs", 1, "--size", 32, "--precision", "float32")


def call(*arguments) -> int:
    """The command in this process: its exit status."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's own
        return int(stop.code or 0)


# ----------------------------------------------------------------------------------------------------------------- help


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
import sys, retina_seg.cli
try:
    retina_seg.cli.main(["--help"])
except SystemExit:
    assert "torch" not in sys.modules
from retina_seg import Segmenter, TrainConfig, fit
heavy = {"matplotlib", "skimage", "sklearn", "scipy", "albumentations", "torchvision"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_python_dash_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "retina_seg", "--version"], capture_output=True, text=True)
    assert done.stdout == f"retina-seg {retina_seg.__version__}\n"


def test_the_public_names_are_listed_and_have_types(tmp_path):
    assert set(retina_seg.__all__) <= set(dir(retina_seg)) and all(hasattr(retina_seg, n) for n in retina_seg.__all__)
    pytest.importorskip("mypy")
    names = ("Segmenter", "TrainConfig", "fit", "load_model", "test")
    code = [f"from retina_seg import {', '.join(names)}", *(f"reveal_type({name})" for name in names), "fit(3)"]
    (tmp_path / "user.py").write_text("\n".join(code))
    other = "[mypy]\n[mypy-torch.*,numpy.*,cv2.*,matplotlib.*,tqdm.*,sklearn.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(other)  # what is not ours takes a minute
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "user.py"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert re.findall(r"user.py:(\d+): error: (.*?) to", said) == [("7", "Argument 1")], said
    types = re.findall(r'Revealed type is "def \(.*\) -> (?:[\w]+\.)*(\w+).*"', said)
    assert types == ["Segmenter", "TrainConfig", "Run", "tuple", "Scores"], said


# ------------------------------------------------------------------------------------------------------------- the jobs


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


def test_the_main_job_on_a_filled_folder_uses_its_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_set("images/inner/Data", 2, 1, (64, 64), progress=False)
    assert call("run", "--data", "images", "--output", "out", "--preset", "notebook", *SMALL) == 0
    config = TrainConfig.from_json(tmp_path / "out/config.json")
    assert config.data.endswith("images/inner/Data") and config.preset == "notebook"


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


def test_synth_then_check(tmp_path):
    assert call("synth", tmp_path / "set", "--train", 2, "--test", 1, "--size", 64) == 0
    assert call("check", tmp_path / "set") == 0
    write_image(tmp_path / "set/test/image/0.png", read_image(tmp_path / "set/train/image/1.png")[:, ::-1])
    assert call("check", tmp_path / "set") == 1


# ------------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = [
    ("train --data {set} --output {out} --device warp", "--device warp"),
    ("train --data {folder}/nowhere --output {out}", "nowhere: no such folder"),
    ("train --data {empty} --output {out}", "no train/image or test/image folder"),
    ("train --data {set} --output {file}", "mine.pth: is a file"),
    ("train --preset fast --config {file}", "--preset and --config: give one of them"),
    ("train --resume {folder}/nowhere", "nowhere: holds no run to go on with"),
    ("test --checkpoint {file} --data {set} --output {out}", "mine.pth: is not a checkpoint"),
    (
        "test --checkpoint {other} --data {set} --output {out}",
        "other.pth: the weights (weight, bias, …) are of another arch",
    ),
    ("test --checkpoint drive --data {set}", "--output is needed"),
    ("test --run {folder}/nowhere --data {set}", "nowhere: no such checkpoint"),
    ("predict {empty} --output {out}", "no image"),
    ("predict {set} --output {out} --save masks,maps", "--save 'maps': choose from masks,probability,overlay,fov"),
    ("predict {set} --output {out} --jobs 0", "--jobs 0"),
    ("predict {set} --weights {styled} --style thin --output {out}", "styled.pth has a, b, balanced"),
    ("export --weights {styled} --style thin --output {out}.onnx", "styled.pth has a, b, balanced"),
    ("degrade --weights {styled} --style thin --data {set} --output {out}", "styled.pth has a, b, balanced"),
    ("degrade --weights tiny --data {folder}/nowhere --output {out}", "nowhere: no such folder"),
    ("degrade --weights tiny --data {set} --output {file}", "mine.pth: is a file"),
    (
        "degrade --weights tiny --data {set} --part validation --output {out}",
        "tiny/config.json: held out no training photos",
    ),
    ("degrade --weights tiny --data {set} --threshold 2 --output {out}", "--threshold 2"),
    ("prepare drive {folder}/nowhere {out}", "nowhere"),
    ("prepare drive {set} {out} --size tiny", "--size tiny: give a number"),
    ("synth {set}", "is not empty"),
    ("synth {out} --size 8", "64"),
    ("check {folder}/nowhere", "nowhere: no such folder"),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES)
def test_a_mistake_is_one_line_that_names_it(command, said, tiny_set, styled, tmp_path, capsys):
    names = {"folder": tmp_path, "set": tiny_set, "styled": styled} | {
        name: tmp_path / name for name in ("out", "empty")
    }
    names |= {"file": tmp_path / "mine.pth", "other": tmp_path / "other.pth"}
    names["empty"].mkdir()
    names["file"].write_text("mine")
    torch.save(nn.Linear(2, 2).state_dict(), names["other"])
    before = sorted(tmp_path.rglob("*"))
    assert call(*command.format(**names).split()) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "retina-seg: error:" in line]
    assert len(lines) == 1 and lines[0].startswith("retina-seg: error: ") and said in lines[0]
    assert [path for path in sorted(tmp_path.rglob("*")) if "predict" in command or path.name != "out"] == before


@pytest.mark.parametrize("options", ["paint", "train --frame oval", "train --augmentation bend", "train --epochs many"])
def test_an_unknown_command_or_value_exits_with_2(options):
    assert call(*options.split()) == 2


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "retina-seg: stopped\n"),
        (PermissionError(13, "Permission denied", "locked"), 2, "retina-seg: error: locked: Permission denied\n"),
        (FloatingPointError("not a number"), 1, "retina-seg: error: not a number\n"),
        (ZeroDivisionError(), None, ""),  # a bug is not dressed as a mistake
    ],
)
def test_what_ends_a_command_is_its_status(error, status, said, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("retina_seg.sets.check.check_set", fail)
    if status is None:
        with pytest.raises(ZeroDivisionError):
            call("check", "x")
    else:
        assert call("check", "x") == status
    assert capsys.readouterr().err == said


def test_a_module_of_the_user_registers_its_network_for_the_command(tiny_set, tmp_path, monkeypatch, capsys):
    code = "from retina_seg.model import FastAttentionUNet, register_model\n"
    (tmp_path / "my_networks.py").write_text(code + "register_model('mine', lambda: FastAttentionUNet(4, 4, 0))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    short = (
        f"train --preset quick --data {tiny_set} --epochs 1 --patches 2 --size 32 --model-arguments {{}} --model mine"
    )
    assert cli.main(["--import", "my_networks", *short.split(), "--output", "run"]) == 0
    assert json.loads(Path("run/config.json").read_text())["config"]["model"] == "mine"
    assert cli.main(["--import", "nothing_here", *short.split()]) == 2
    assert "--import nothing_here: cannot be imported (ModuleNotFoundError" in capsys.readouterr().err
