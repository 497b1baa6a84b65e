"""Checkpoints in and out; a training that is stopped, killed or runs out of room goes on as if nothing had been."""

import argparse
import dataclasses
import errno
import hashlib
import os
import pickle
import shutil
import signal
import sys
from inspect import isfunction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import failing, files, shaken_network
from test_train import at_step, same_weights, tiny, weights_of, without_curves  # noqa: F401

from retina_seg import checkpoint, cli
from retina_seg.checkpoint import CHECKPOINT_FORMAT, LAST, find_weights, load_last, load_model, save_model, save_whole
from retina_seg.config import TrainConfig
from retina_seg.model import MODELS, AttentionUNet, build_model
from retina_seg.runs import remarks
from retina_seg.train import fit
from retina_seg.utils import UserError, without_nan

SMALL = {"width": 8, "deepest": 8, "fine": 2}


def network(seed=0):
    return shaken_network("fast_attention_unet", seed, **SMALL)


@pytest.fixture
def saved(tmp_path):
    """The path of a good checkpoint."""
    path = tmp_path / "checkpoint.pth"
    save_model(path, network(), "fast_attention_unet", SMALL, threshold=0.5)
    return path


def test_save_and_load_is_bit_equal_and_the_notes_are_kept(tmp_path):
    path, model, about = tmp_path / "a b.pth", network(), {"model": "fast_attention_unet", "arguments": SMALL}
    notes = {"threshold": 0.42, "frame": {"kind": "resize", "size": [512, 512]}, "note": None}
    save_model(path, model, *about.values(), **notes)
    loaded, told = load_model(path)
    assert not loaded.training and same_weights(loaded.state_dict(), model.state_dict())
    assert told == {"format": CHECKPOINT_FORMAT, **about, **notes}
    assert checkpoint.weights_id(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def test_a_checkpoint_with_styles_loads_as_its_default_or_the_one_asked_for(styled, tmp_path):
    content, x, path = torch.load(styled, weights_only=True), torch.rand(1, 3, 16, 16), tmp_path / "checkpoint.pth"
    with torch.no_grad():
        every = build_model(content["model"], **content["arguments"]).eval()
        every.load_state_dict(content["state_dict"])
        a, b = every(x).split(1, 1)
        for style, expected in ((None, (a + b) / 2), ("a", a), ("balanced", (a + b) / 2), ("b", b)):
            loaded, notes = load_model(styled, style)
            assert torch.allclose(loaded(x), expected, atol=1e-5) and notes["style"] == (style or "balanced")
    with pytest.raises(UserError, match="--style thin: .*styled.pth has a, b, balanced"):
        load_model(styled, "thin")
    for style, shares in (("a", [1.0]), ("b", [1.0]), ("b", [1.0, 0.0, 0.0]), ("b", "x")):
        torch.save({**content, "styles": {"b": shares}, "style": style}, path)
        with pytest.raises(UserError, match=f"checkpoint.pth: its style {style} does not fit its network"):
            load_model(path)
    with pytest.raises(UserError, match="--style fine: .*drive.pth has no styles"):
        load_model("drive", "fine")


def prefixed(*prefixes):
    return lambda weights: {prefix + key: value for prefix in prefixes for key, value in weights.items()}


BESIDE = {
    "args": argparse.Namespace(lr=0.1, folder=Path("x")),
    "optimizer": {"state": {0: {"weight": torch.ones(2, 2)}}},
}
BESIDE |= {"epoch": 3, "loss": np.float64(0.3), "curve": np.arange(3.0), "step": torch.tensor(3), "note": None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "wrap",
    [
        dict,  # as the original's notebook saves it
        *map(prefixed, ("module.", "_orig_mod.", "model.", "net.", "module._orig_mod.")),
        *(lambda w, k=k: {k: w, "epoch": 3} for k in ("model_state_dict", "state_dict", "model", "net", "weights")),
        lambda w: {"best": {"ema": prefixed("module.")(w), "decay": 0.9}, **BESIDE},
        lambda w: {"first": w, "again": w, **BESIDE},
        lambda w: {"state_dict": {**prefixed("model.")(w), "loss_fn.pos_weight": torch.ones(1)}},
        lambda w: {"n_averaged": torch.tensor(3), **prefixed("module.")(w)},
        lambda w: {key: value.double() for key, value in w.items()},
    ],
)
def test_weights_in_the_usual_wrappings_give_the_same_logits(tmp_path, name, wrap):
    original, path, x = shaken_network(name), tmp_path / "checkpoint.pth", torch.rand(1, 3, 16, 16)
    torch.save(wrap(original.state_dict()), path)
    loaded, told = load_model(path)
    assert told["model"] == name and told["arguments"] == {}
    assert torch.equal(loaded(x), original(x))
    torch.save({key: value.half() for key, value in original.state_dict().items()}, path)
    assert torch.equal(load_model(path)[0](x), original.half().float()(x))


def test_weights_are_found_by_file_run_folder_or_name(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert checkpoint.find_weights(saved) == checkpoint.find_weights(saved.parent) == saved
    assert load_model("drive")[1]["model"] == "fast_attention_unet" and "drive" in checkpoint.pretrained_weights()
    monkeypatch.setenv("HOME", str(saved.parent))
    assert checkpoint.find_weights("~") == checkpoint.find_weights(Path("~/checkpoint.pth")) == saved
    (saved.parent / "tiny").mkdir()  # a folder comes before a name
    for name, said in (("tiny", "tiny: holds no checkpoint.pth; .*--checkpoint tiny"), ("nowhere", "weights: drive")):
        with pytest.raises(UserError, match=said):
            checkpoint.find_weights(name)


class Bomb:
    """Unpickled, it makes a folder: the harmless stand-in for any code."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


OTHERS = {"generator": network().state_dict(), "discriminator": {"weight": torch.ones(2, 2)}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"PK\x03\x04" * 99, "damaged, cut short"),
        (pickle.dumps([1, 2]), "not written by torch.save"),
        (b"<!DOCTYPE html>\n<html>", "an HTML page"),
        (b"\x93NUMPY\x01\x00", "a NumPy file"),
        (b"\x08\x0a\x12\x07pytorch", "an ONNX file"),
        (b'\x40\0\0\0\0\0\0\0{"w": 1}', "a safetensors file"),
        (torch.nn.Linear(2, 2), "a whole pickled network.*torch.nn.modules.linear.Linear"),
        ({"epoch": 3, "weights": None}, "holds keys epoch, weights and no weights"),
        (OTHERS, r"several networks \(generator, discriminator\)"),
        ({"state": 1, "model": 1, "optimizer": 1, "random": 1}, "train --resume needs; give .*checkpoint.pth"),
        (prefixed("student.", "teacher.")(AttentionUNet().state_dict()), "student.e1.* of another architecture"),
        (lambda c: c.update(arguments=None), "incomplete"),
        (lambda c: c.update(format="retina_seg checkpoint 99"), "another version .*pip install"),
        (lambda c: c.update(model="unet"), "not one of this package.*register_model"),
        (lambda c: c.update(arguments={"depth": 3}), "depth"),
        (lambda c: c.update(arguments={**SMALL, "deepest": 16}), "another architecture than fast_attention_unet"),
        (lambda c: c["state_dict"].pop("fine.0.1.running_var"), "another architecture.*fine.0.1.running_var"),
        (lambda c: c["state_dict"].update({"e1.conv1.weight": "x"}), "another architecture"),
        (lambda c: c["state_dict"]["head.weight"].flatten()[:1].fill_(float("nan")), "not finite"),
    ],
)
def test_a_file_that_is_no_sound_checkpoint_is_called_what_it_is(saved, content, said):
    if isfunction(content):  # a change to a sound one
        content(value := torch.load(saved, weights_only=True))
        content = value
    saved.write_bytes(content) if isinstance(content, bytes) else torch.save(content, saved)
    with pytest.raises(UserError, match=f"checkpoint.pth: .*{said}"):
        load_model(saved)


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_disk_that_is_full_at_any_byte_leaves_the_last_good_file(saved, share):
    resource = pytest.importorskip("resource")
    before, limit = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    # a file that may not grow further stands for a full disk: it fails at any byte, and in the same way
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(before) * share), limit[1]))
    try:
        with pytest.raises(UserError, match="checkpoint.pth: cannot be written"):
            save_model(saved, network(2), "fast_attention_unet", SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def config_of(frame, data, folder, **changes) -> TrainConfig:
    """Three epochs of four steps: with dropout and EMA weights ("fov"), or of the notebook's preset, the best one kept."""
    if frame == "resize":
        small = {"size": 32, "batch_size": 1, "epochs": 3, "precision": "float32", "data": str(data)}
        return TrainConfig.notebook(**small, output=str(folder), **changes)
    arguments = {"width": 4, "deepest": 8, "fine": 4, "dropout": 0.3}
    return tiny(data, folder, **{"patches": 8, "epochs": 3, "model_arguments": arguments, **changes})


def ends_equal(a, b) -> bool:
    histories = [[{**row, "seconds": 0} for row in load_last(folder)["state"]["history"]] for folder in (a, b)]
    return same_weights(weights_of(a), weights_of(b)) and without_nan(histories[0]) == without_nan(histories[1])


def go_on(config):
    torch.rand(5)  # the random state of a new process is another
    return fit(config, resume=True, progress=False)


@pytest.fixture(scope="module")
def whole(tiny_set, tmp_path_factory):
    """frame -> the folder of a run that was never stopped; "killed": of one killed in its second epoch. Read only."""
    folders = {name: tmp_path_factory.mktemp("runs") / name for name in ("fov", "resize", "killed")}
    for frame in ("fov", "resize"):
        fit(config_of(frame, tiny_set, folders[frame]), progress=False)
    # an exception that nothing catches stands for the end of a process that is asked nothing
    with at_step(7, sys.exit), pytest.raises(SystemExit):
        fit(config_of("fov", tiny_set, folders["killed"]), progress=False)
    return folders


@pytest.fixture
def broken(whole, tmp_path):
    """A copy of the killed run to do harm to."""
    return Path(shutil.copytree(whole["killed"], tmp_path / "run"))


@pytest.mark.parametrize(
    ("frame", "workers"), [("fov", (0, 0)), ("resize", (0, 0)), ("fov", (1, 0)), ("resize", (0, 1))]
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # from Python 3.12 on
def test_a_run_stopped_twice_ends_with_the_same_weights(tiny_set, tmp_path, whole, frame, workers):
    first, second = (config_of(frame, tiny_set, tmp_path / "a run", workers=number) for number in workers)
    with at_step(6, sys.exit), pytest.raises(SystemExit):
        fit(first, progress=False)
    assert load_last(tmp_path / "a run")["state"]["step"] == 4  # the first epoch
    with at_step(6, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(KeyboardInterrupt) as stop:
        go_on(second)
    assert f"retina-seg train --resume '{tmp_path / 'a run'}'" in str(stop.value)
    assert load_last(tmp_path / "a run")["state"]["step"] == 8
    assert [row["epoch"] for row in go_on(second).history] == [1, 2, 3]
    assert ends_equal(tmp_path / "a run", whole[frame])
    go_on(second)  # nothing is left to do
    assert ends_equal(tmp_path / "a run", whole[frame])


def test_a_run_killed_before_anything_was_saved_starts_at_step_one(tiny_set, tmp_path, whole, capsys):
    config = config_of("fov", tiny_set, tmp_path)
    with at_step(2, sys.exit), pytest.raises(SystemExit):
        fit(config, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / ".0123456789ab.partial.pth").write_bytes(b"half")  # what it was writing
    go_on(config)
    assert "no epoch was finished yet" in capsys.readouterr().out and not list(tmp_path.glob(".*"))
    assert ends_equal(tmp_path, whole["fov"])


@pytest.mark.parametrize("harm", [0, 0.6, 0.999, {"ema": None}, {"model": {}}, {"optimizer": {}}, {"random": {}}])
def test_a_damaged_last_pth_or_one_of_another_config_is_named_and_nothing_is_changed(tiny_set, broken, harm):
    if isinstance(harm, dict):
        save_whole(broken / LAST, {**load_last(broken), **harm})
    else:
        os.truncate(broken / LAST, int((broken / LAST).stat().st_size * harm))
    before = files(broken)
    with pytest.raises(UserError, match=f"{LAST}: is (not a checkpoint|of another config)"):
        go_on(config_of("fov", tiny_set, broken))
    assert files(broken) == before


def test_a_run_is_gone_on_with_by_its_own_config_where_there_is_one_and_never_overwritten(tiny_set, broken):
    before = (broken / LAST).read_bytes()
    for changes in ({"batch_size": 16}, {"model_arguments": {"width": 8}}):
        with pytest.raises(UserError, match=f"config has another {next(iter(changes))}"):
            go_on(config_of("fov", tiny_set, broken, **changes))
    with pytest.raises(UserError, match="holds no run to go on with"):
        go_on(config_of("fov", tiny_set, broken / "none"))
    with pytest.raises(UserError, match="already holds a run"):
        fit(config_of("fov", tiny_set, broken), progress=False)
    assert (broken / LAST).read_bytes() == before


FULL = OSError(errno.ENOSPC, "No space left")


@pytest.mark.parametrize(
    ("call", "number", "error", "said", "epochs"),
    [
        ("fsync", 1, FULL, r"checkpoint.pth: cannot be written \(No space left", 1),
        ("replace", 2, FULL, "last.pth: cannot be written", 1),
        ("fsync", 3, FULL, "history.csv: cannot be written", 2),
        ("replace", 5, KeyboardInterrupt(), "stopped in epoch 3 of 3, the epochs before it are saved", 2),
    ],
)
def test_a_run_that_cannot_save_stops_and_then_goes_on(
    tiny_set, broken, whole, monkeypatch, call, number, error, said, epochs
):
    with monkeypatch.context() as patch, pytest.raises((UserError, KeyboardInterrupt), match=said):
        patch.setattr(os, call, failing(getattr(os, call), number - 1, error))
        go_on(config_of("fov", tiny_set, broken))
    assert load_last(broken)["state"]["epoch"] == epochs
    go_on(config_of("fov", tiny_set, broken))
    assert ends_equal(broken, whole["fov"])


def test_weights_alone_are_said_to_lack_their_frame(tmp_path):
    whole = torch.load(find_weights("tiny"), weights_only=True)
    torch.save(prefixed("module.")(whole["state_dict"]), tmp_path / "alone.pth")
    (note,) = remarks(tmp_path / "alone.pth")
    assert "weights alone" in note and "512x512 is assumed" in note and remarks("tiny") == []


def test_more_epochs_go_on_after_the_end_and_fewer_are_refused(tiny_set, tmp_path):
    config = config_of("fov", tiny_set, tmp_path / "run", preset="fast")
    first = fit(dataclasses.replace(config, epochs=1), progress=False)
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--epochs", "3"]) == 0
    history = load_last(tmp_path / "run")["state"]["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert history[0]["train_loss"] == first.history[0]["train_loss"]
    assert TrainConfig.from_json(tmp_path / "run/config.json").epochs == 3
    with pytest.raises(UserError, match="--epochs 2: .*run has trained for 3; give more"):
        go_on(dataclasses.replace(config, epochs=2))
    assert TrainConfig.from_json(tmp_path / "run/config.json").epochs == 3
