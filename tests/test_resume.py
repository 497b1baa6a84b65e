"""A training that is stopped, killed or runs out of room goes on as if nothing had been; the long form is test_kills."""

import contextlib
import errno
import functools
import itertools
import os
import pickle
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import Shift, same_weights, tiny, weights_of
from torch.optim.optimizer import register_optimizer_step_post_hook

from retina_seg import train as training
from retina_seg.data import label_remarks, list_training_pairs, read_label
from retina_seg.images import write_picture
from retina_seg.model import build_model, save_model
from retina_seg.resume import LAST, PREVIOUS, TrainingStopped, load_last, save_last
from retina_seg.train import NotFinite, TrainConfig, fit, train, training_memory
from retina_seg.utils import UserError, without_nan

FRAMES = ("fov", "squeeze")


class Killed(BaseException):
    """Stands for the end of a process that is asked nothing."""


def die():
    raise Killed


@contextlib.contextmanager
def at_step(number, call):
    """`call` is made within the `number`-th step from now, before anything of it can be saved."""
    count = itertools.count(1)
    handle = register_optimizer_step_post_hook(lambda *_: call() if next(count) == number else None)
    try:
        yield
    finally:
        handle.remove()


def recipe(frame, data, folder, **changes) -> TrainConfig:
    """Two epochs: of eight steps with dropout and averaged weights ("fov"), or of four steps of the notebook's recipe."""
    changes = {
        "data": str(data),
        "output": str(folder),
        "epochs": 2,
        "save_every": 3,
        "precision": "float32",
        **changes,
    }
    if frame == "squeeze":
        return TrainConfig.notebook(**{"size": 48, "batch_size": 1, **changes})
    arguments = {"width": 4, "deepest": 8, "fine": 4, "dropout": 0.3}
    small = {"size": 64, "fov_diameter": None, "repeats": 4, "batch_size": 2, "model_arguments": arguments}
    return TrainConfig.quick(**{**small, **changes})


def rows(folder) -> list[dict]:
    """The history as it was saved, to the bit, without the seconds."""
    history = load_last(folder)[0]["state"]["history"]
    return without_nan([{key: value for key, value in row.items() if key != "seconds"} for row in history])


def end_equal(a, b) -> bool:
    return same_weights(weights_of(a), weights_of(b)) and rows(a) == rows(b)


def go_on(config):
    torch.rand(5)  # the random state of a new process is another
    return fit(config, resume=True, progress=False)


@pytest.fixture(scope="module")
def whole(tiny_set, tmp_path_factory):
    """frame -> the folder of a run that was never stopped. Read only."""

    @functools.cache
    def run(frame):
        return fit(recipe(frame, tiny_set, tmp_path_factory.mktemp("whole") / frame), progress=False).folder

    return run


@pytest.fixture(scope="module")
def killed(tiny_set, tmp_path_factory):
    """The folder of a "fov" run killed in its 11th step: the 9th was saved, and the 8th, the first epoch's end, before."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with at_step(11, die), pytest.raises(Killed):
        fit(recipe("fov", tiny_set, folder), progress=False)
    return folder


@pytest.fixture
def broken(killed, tmp_path):
    """A copy of `killed` to do harm to."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("frame", FRAMES)
def test_a_run_stopped_twice_within_epochs_ends_with_the_same_weights(tiny_set, tmp_path, whole, frame):
    config = recipe(frame, tiny_set, tmp_path)
    with at_step(4, die), pytest.raises(Killed):
        fit(config, progress=False)
    assert load_last(tmp_path)[0]["state"]["step"] == 3
    with at_step(2, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(TrainingStopped):
        go_on(config)
    assert load_last(tmp_path)[0]["state"]["step"] == 5
    run = go_on(config)
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert end_equal(tmp_path, whole(frame))


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(("before", "after"), [(1, 0), (2, 2)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker:UserWarning")  # on a single core
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # from Python 3.12 on
def test_the_number_of_workers_changes_nothing_before_or_after_a_stop(tiny_set, tmp_path, whole, frame, before, after):
    with at_step(7, die), pytest.raises(Killed):
        fit(recipe(frame, tiny_set, tmp_path, workers=before), progress=False)
    go_on(recipe(frame, tiny_set, tmp_path, workers=after))
    assert end_equal(tmp_path, whole(frame))


def test_a_run_killed_before_anything_was_saved_starts_at_step_one(tiny_set, tmp_path, whole, capsys):
    config = recipe("fov", tiny_set, tmp_path)
    with at_step(2, die), pytest.raises(Killed):
        fit(config, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    go_on(config)
    assert "nothing was saved yet" in capsys.readouterr().out
    assert end_equal(tmp_path, whole("fov"))


def test_what_a_killed_process_left_half_written_is_removed(tiny_set, broken, whole):
    left = [broken / name for name in (".0123456789ab.partial.pth", f".{PREVIOUS}.partial", ".ab.partial")]
    for path in left:
        path.write_bytes(b"half")
    go_on(recipe("fov", tiny_set, broken))
    assert not any(path.exists() for path in left)
    assert end_equal(broken, whole("fov"))


# -------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training_behind_its_step_saved(tiny_set, tmp_path, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with at_step(4, lambda: signal.raise_signal(number)), pytest.raises(TrainingStopped) as stop:
        fit(recipe("fov", tiny_set, tmp_path / "a run"), progress=False)
    assert f"retina-seg train --resume '{tmp_path / 'a run'}'" in str(stop.value)
    assert stop.value.signal == number
    value, damaged = load_last(tmp_path / "a run")
    assert value["state"]["step"] == 4 and not damaged
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_is_obeyed_at_once(tiny_set, tmp_path, number):
    def twice():
        signal.raise_signal(number)
        signal.raise_signal(number)

    before = signal.signal(number, lambda *_: die())
    try:
        with at_step(4, twice), pytest.raises(Killed):
            fit(recipe("fov", tiny_set, tmp_path), progress=False)
    finally:
        signal.signal(number, before)
    assert load_last(tmp_path)[0]["state"]["step"] == 3


# ----------------------------------------------------------------------------------------------- damaged, and not ours


def cut(share):
    def damage(path):
        os.truncate(path, int(path.stat().st_size * share))

    return damage


def flip_a_byte_of_a_tensor(path):
    largest = max(torch.load(path, weights_only=True)["model"].values(), key=torch.Tensor.numel)
    stored, content = bytes(largest.untyped_storage()), bytearray(path.read_bytes())
    content[content.index(stored) + len(stored) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch alone does not notice


@pytest.mark.parametrize("damage", [cut(0), cut(0.01), cut(0.6), cut(0.999), flip_a_byte_of_a_tensor])
def test_a_damaged_last_pth_is_named_and_the_one_before_is_taken(tiny_set, broken, whole, capsys, damage):
    damage(broken / LAST)
    with at_step(2, die), pytest.raises(Killed):  # 8 steps were saved before; nothing new is until step 12
        go_on(recipe("fov", tiny_set, broken, save_every=12))
    assert f"{broken / LAST}: is damaged" in capsys.readouterr().out
    value, damaged = load_last(broken)
    assert value["state"]["step"] == 8 and not damaged
    go_on(recipe("fov", tiny_set, broken))
    assert end_equal(broken, whole("fov"))


def test_two_damaged_ones_are_both_named(tiny_set, broken):
    cut(0.5)(broken / LAST)
    flip_a_byte_of_a_tensor(broken / PREVIOUS)
    with pytest.raises(UserError) as error:
        go_on(recipe("fov", tiny_set, broken))
    assert f"{broken / LAST}: is damaged" in str(error.value) and f"{broken / PREVIOUS}: is damaged" in str(error.value)


@pytest.mark.parametrize("changes", [{"batch_size": 16}, {"seed": 1}, {"model_arguments": {"width": 8}}])
def test_a_run_does_not_go_on_by_another_recipe(tiny_set, broken, changes):
    before = (broken / LAST).read_bytes()
    with pytest.raises(UserError, match=f"recipe has another {next(iter(changes))}"):
        go_on(recipe("fov", tiny_set, broken, **changes))
    assert (broken / LAST).read_bytes() == before


@pytest.mark.parametrize("part", [{"average": None}, {"model": build_model("attention_unet").state_dict()}])
def test_a_last_pth_of_another_recipe_is_refused(tiny_set, broken, part):
    save_last(broken, {**load_last(broken)[0], **part})
    with pytest.raises(UserError, match=r"last\.pth: is not of this recipe"):
        go_on(recipe("fov", tiny_set, broken))


class Intruder:
    """Pickled; when read by a plain unpickler, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_last_pth_that_would_run_code_is_refused(tiny_set, broken, tmp_path, write):
    made = tmp_path / "made"
    (broken / PREVIOUS).unlink()
    write({"model": Intruder(made)}, broken / LAST)
    with pytest.raises(UserError, match="is damaged"):
        go_on(recipe("fov", tiny_set, broken))
    assert not made.exists()


# ------------------------------------------------------------------------------------------------------ no room


@pytest.mark.parametrize("share", [0, 0.001, 0.02, 0.5, 0.99])
def test_a_disk_that_fills_up_while_last_pth_is_written_leaves_the_last_good_one(tmp_path, share):
    resource = pytest.importorskip("resource")
    save_last(tmp_path, {"step": 1, "weights": torch.rand(100_000)})
    save_last(tmp_path, {"step": 2, "weights": torch.rand(100_000)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = int((tmp_path / LAST).stat().st_size * share)
    # a file that may not grow further stands for a full disk: it fails at any byte, and in the same way
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(UserError, match=r"last\.pth: cannot be written"):
            save_last(tmp_path, {"step": 3, "weights": torch.rand(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_last(tmp_path)[0]["step"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}


def test_a_disk_that_fills_up_under_the_kept_weights_is_said_too(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint\.pth: cannot be written"):
            save_model(
                tmp_path / "checkpoint.pth", build_model("fast_attention_unet", width=4), "fast_attention_unet", {}
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", [(Path, "write_bytes"), (os, "fsync"), (os, "replace")])
def test_a_full_disk_at_any_point_of_a_save_stops_the_training_with_its_file_named(
    tiny_set, broken, whole, monkeypatch, where
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        with pytest.raises(UserError, match=r"last\.pth: cannot be written \(No space left"):
            go_on(recipe("fov", tiny_set, broken))
    value, damaged = load_last(broken)
    assert value["state"]["step"] == 9 and not damaged
    go_on(recipe("fov", tiny_set, broken))
    assert end_equal(broken, whole("fov"))


def test_on_a_disk_without_links_the_one_before_is_kept_too(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", none)
    for step in (1, 2, 3):
        save_last(tmp_path, {"step": step})
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}
    cut(0.5)(tmp_path / LAST)
    assert load_last(tmp_path)[0]["step"] == 2


def test_too_little_memory_is_said_before_anything_is_written(tiny_set, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "available_memory", lambda _: 2**20)
    with pytest.raises(UserError, match=r"--batch-size 2, --size 64: .* GB are free"):
        fit(recipe("fov", tiny_set, tmp_path), progress=False)
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_said_before_anything_is_written(tiny_set, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(UserError, match="the disk has 1 MB left"):
        fit(recipe("fov", tiny_set, tmp_path), progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["attention_unet", "fast_attention_unet"])
def test_the_memory_of_a_step_grows_with_its_pixels(name):
    model = build_model(name)
    one = training_memory(model, 1, 128)
    assert one > 128 * 128 * 4 * 32  # a map of 32 channels at full size is the least that is kept
    assert training_memory(model, 1, 256) == pytest.approx(4 * one, rel=1e-6)
    assert training_memory(model, 3, 128) == pytest.approx(3 * one, rel=1e-6)
    assert one / 2 <= training_memory(model, 1, 128, torch.bfloat16) < one


# ------------------------------------------------------------------------------------------------ not finite, odd labels


@pytest.mark.parametrize("resumed", [False, True])
def test_a_loss_that_is_not_finite_names_its_photo_and_keeps_what_was_saved(tiny_set, tmp_path, monkeypatch, resumed):
    config = recipe("squeeze", tiny_set, tmp_path, size=96, save_every=2)  # the photos' own size, one photo a step
    if resumed:
        with at_step(3, die), pytest.raises(Killed):
            fit(config, progress=False)
    seen, real = [], training.LOSSES["dice_bce"]

    def bad_at_the_fourth_step(logits, masks):
        seen.append(masks)
        return real(logits, masks) * (float("nan") if len(seen) == (2 if resumed else 4) else 1)

    monkeypatch.setitem(training.LOSSES, "dice_bce", bad_at_the_fourth_step)
    with pytest.raises(NotFinite) as error:
        fit(config, resume=resumed, progress=False)
    pairs = list_training_pairs(tiny_set, "train")
    label = (seen[-1][0, 0] * 255).round().byte().numpy()
    (name,) = [pair.name for pair in pairs if np.array_equal(read_label(pair.mask), label)]
    assert f"the loss is not a finite number at step 4 of epoch 1, with photos {name}; " in str(error.value)
    assert f"{tmp_path / LAST} is from before it" in str(error.value)
    assert load_last(tmp_path)[0]["state"]["step"] == 2


def test_a_gradient_that_is_not_finite_stops_before_the_step_though_the_loss_is():
    model = Shift()
    batches = [(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2))]
    with pytest.raises(NotFinite) as error:  # the slope of a square root at nought
        train(model, batches, torch.optim.SGD(model.parameters(), lr=1.0), lambda x, _: x.sqrt().sum(), "cpu")
    assert (error.value.what, error.value.batch) == ("gradient", 0)
    assert model.shift.item() == 0


def test_a_learning_rate_that_blows_up_ends_with_finite_weights_saved(tiny_set, tmp_path):
    with pytest.raises(NotFinite, match="--learning-rate"):
        fit(tiny(tiny_set, tmp_path, learning_rate=1e30, warmup=None, save_every=1), progress=False)
    value, _ = load_last(tmp_path)
    assert value is None or all(torch.isfinite(weight).all() for weight in value["model"].values())


def test_odd_labels_are_said_as_the_training_starts(tiny_set, tmp_path, capsys):
    data = Path(shutil.copytree(tiny_set, tmp_path / "set"))
    first, second, third, _ = (pair.mask for pair in list_training_pairs(data, "train"))
    write_picture(first, read_label(first) // 255)
    write_picture(second, read_label(second) // 255)
    write_picture(third, np.zeros_like(read_label(third)))
    lines = label_remarks(list_training_pairs(data, "train"))
    assert lines[0].startswith(f"{first} and 1 more: holds 0 and 1")
    assert lines[1].startswith(f"{third}: warning: the label is all black")
    assert label_remarks(list_training_pairs(data, "test")) == []
    fit(tiny(data, tmp_path / "run", epochs=1), progress=False)
    said = capsys.readouterr().out
    assert all(line in said for line in lines)
