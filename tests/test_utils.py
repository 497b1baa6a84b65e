"""Seeds, folders, devices, and files that are written whole or not at all."""

import ctypes
import json
import math
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from retina_seg import utils
from retina_seg.utils import (
    UserError,
    autocast,
    choose_device,
    choose_precision,
    create_dir,
    environment,
    epoch_time,
    git_commit,
    memory_kept,
    read_json,
    seeding,
    training_layout,
    whole_file,
    without_nan,
    write_json,
    write_text,
)

CPU = torch.device("cpu")


@pytest.fixture
def states_kept(monkeypatch):
    """What `seeding` turns is turned back behind the test."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_one_seed_gives_the_same_draws_from_every_source(states_kept):
    seeding(42)
    first = draw()
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    seeding(42)
    assert draw() == first
    seeding(43)
    assert all(a != b for a, b in zip(first, draw(), strict=True))


def test_seeds_beyond_numpys_range_are_taken(states_kept):
    seeding(2**32 + 7)
    wide = np.random.rand()
    seeding(7)
    assert np.random.rand() == wide


def test_create_dir_makes_parents_and_is_content_with_what_is_there(tmp_path):
    wanted = tmp_path / "a" / "b c"
    assert create_dir(str(wanted)) == wanted
    (wanted / "kept.txt").write_text("x")
    create_dir(wanted)
    assert (wanted / "kept.txt").read_text() == "x"


@pytest.mark.parametrize("below", [[], ["folder"]])
def test_create_dir_names_the_place_where_a_file_stands(tmp_path, below):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match="taken"):
        create_dir(tmp_path.joinpath("taken", *below))


def test_create_dir_says_when_the_system_forbids(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(utils.Path, "mkdir", forbidden)
    with pytest.raises(UserError, match="new.*Permission denied"):
        create_dir(tmp_path / "new")


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(0, 0, (0, 0)), (10.0, 69.9, (0, 59)), (5, 65, (1, 0)), (0.5, 7325.0, (122, 4))]
)
def test_epoch_time_is_whole_minutes_and_seconds(start, end, expected):
    assert epoch_time(start, end) == expected


# ------------------------------------------------------------------------------------------------ device and precision


def test_choose_device_takes_what_is_there():
    assert choose_device("cpu") == CPU
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "toaster", "", "mps:77"])
def test_choose_device_refuses_what_is_not_there(name):
    with pytest.raises(UserError, match="--device"):
        choose_device(name)


def test_choose_precision_by_name_and_by_what_the_device_can(monkeypatch):
    assert choose_precision("float32", CPU) is torch.float32
    assert choose_precision("bfloat16", CPU) is torch.bfloat16
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(utils, "has_bfloat16_units", lambda device, able=able: able)
        assert choose_precision("auto", CPU) is dtype


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator only"
)
def test_memory_kept_is_not_asked_for_again_and_given_back_behind():
    resource = pytest.importorskip("resource")  # not on Windows

    def pages_asked_for() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(12):
            torch.zeros(2**24)  # 64 MB, freed at once; 32 pages where the system's are huge
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with memory_kept():
        for _ in range(3):  # freed blocks fit the next one only after a few
            pages_asked_for()
        kept = pages_asked_for()
    assert kept < 100 and pages_asked_for() > 10 * max(kept, 10)


def test_without_such_an_allocator_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(utils.ctypes, "CDLL", lambda name: object())
    with memory_kept():
        assert torch.zeros(3).sum() == 0


def test_float32_training_on_narrow_processors_is_not_channels_last(monkeypatch):
    for capability, expected in (("AVX2", torch.contiguous_format), ("AVX512", torch.channels_last)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda value=capability: value)
        assert training_layout(CPU, torch.float32) is expected
        assert training_layout(CPU, torch.bfloat16) is torch.channels_last
        assert training_layout(torch.device("cuda"), torch.float32) is torch.channels_last


@pytest.mark.parametrize("name", ["float16", "", "Float32"])
def test_choose_precision_names_the_choices(name):
    with pytest.raises(UserError, match="auto, float32, bfloat16"):
        choose_precision(name, CPU)


def test_autocast_changes_the_arithmetic_only_when_asked():
    a = torch.ones(2, 2)
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------- files, all or none


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "name", ["plain.txt", "no_ending", "with space.png", "ünï\n码.json", "-dash.txt", "a" * 251 + ".png"]
)
def test_whole_file_leaves_the_file_and_nothing_else(tmp_path, name):
    with whole_file(tmp_path / name) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith((tmp_path / name).suffix)  # writers go by it
        temporary.write_text("all of it")
        assert not (tmp_path / name).exists()
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "all of it"


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whole_file_after_an_exception_leaves_what_was_there(tmp_path, before, error):
    path = tmp_path / "a.txt"
    if before:
        path.write_text(before)
    with pytest.raises(error), whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == (["a.txt"] if before else [])
    assert not before or path.read_text() == before


def test_whole_file_turns_a_full_disk_into_a_user_error(tmp_path):
    with pytest.raises(UserError, match="a.txt.*No space left"), whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_whole_file_refuses_a_folder_that_is_not_there_or_a_name_that_is_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "a.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match=path.name):
            write_text(path, "x")
    assert names(tmp_path) == ["folder"]


def test_a_file_is_replaced_never_overwritten_in_place(tmp_path):
    path, witness = tmp_path / "a.txt", tmp_path / "witness"
    path.write_text("old")
    os.link(path, witness)  # as a reader who has it open: the old file stays whole
    write_text(path, "new")
    assert (path.read_text(), witness.read_text()) == ("new", "old")


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    with whole_file(tmp_path / "a") as first, whole_file(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"  # the outer one ended last
    assert names(tmp_path) == ["a"]


def test_without_nan_turns_only_what_json_cannot_hold():
    value = {"a": [math.nan, math.inf, 0.0], 3: (np.float32("nan"), np.int64(5), None), "c": {"d": "nan", "e": True}}
    assert without_nan(value) == {"a": [None, None, 0.0], "3": [None, 5, None], "c": {"d": "nan", "e": True}}


def test_write_json_makes_nan_null_and_read_json_gives_the_rest_back(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"auc": math.nan, "f1": np.float64(0.5), "name": "Ü", "low": -math.inf})
    text = path.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text) == read_json(path) == {"auc": None, "f1": 0.5, "name": "Ü", "low": None}


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"3", b"\xff\xfe\x00"])
def test_read_json_refuses_what_holds_no_object(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="a.json"):
        read_json(tmp_path / "a.json")


def test_read_json_names_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError, match=path.name):
            read_json(path)


# ------------------------------------------------------------------------------------------------------ what ran where


def test_git_commit_is_the_checkouts_or_none():
    commit = git_commit()
    root = utils.Path(utils.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        assert commit is None
        return
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git cannot be asked here")
    assert commit.removesuffix("+changes") == head


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)])
def test_git_commit_is_none_where_git_does_not_answer(monkeypatch, error):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(utils.subprocess, "run", run)
    assert git_commit() is None


def test_git_commit_of_somebody_elses_checkout_is_not_ours(monkeypatch, tmp_path):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, stdout=f"{tmp_path}\n")

    monkeypatch.setattr(utils.subprocess, "run", run)
    assert git_commit() is None


def test_environment_names_versions_device_and_precision():
    found = environment(CPU, torch.bfloat16)
    assert (
        found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"] == torch.__version__
    )
    assert found["device"] == "cpu"
    assert found["precision"] == "bfloat16"
    assert found["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(found)) == found
    assert os.sep not in found["platform"]


def test_ahead_keeps_the_order_and_goes_no_further_than_asked():
    taken = []

    def items():
        for number in range(6):
            taken.append(number)
            yield number

    results = utils.ahead(lambda number: number * 10, items(), depth=2)
    assert taken == []
    assert next(results) == 0 and taken == [0, 1, 2]
    assert list(results) == [10, 20, 30, 40, 50]


def test_ahead_raises_where_the_result_is_asked_for():
    def fail_at_two(number):
        if number == 2:
            raise UserError("two")
        return number

    results = utils.ahead(fail_at_two, range(5), depth=3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(UserError, match="two"):
        next(results)


def test_ahead_works_beside_its_caller():
    here = threading.get_ident()
    assert all(ident != here for ident in utils.ahead(lambda _: threading.get_ident(), range(3)))


def test_ahead_hands_out_what_was_begun_before_its_source_fails():
    def items():
        yield from (1, 2)
        raise KeyboardInterrupt

    results, seen = utils.ahead(lambda number: number, items()), []
    with pytest.raises(KeyboardInterrupt):
        for number in results:
            seen.append(number)
    assert seen == [1, 2]


@pytest.fixture
def threads():
    """torch on three threads, whatever this machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_side_by_side_shares_the_threads_out_and_gives_them_back(threads):
    gate = threading.Barrier(3, timeout=60)  # passed only by three at once

    def work(number):
        gate.wait()
        return number, torch.get_num_threads()

    assert utils.photos_at_once(CPU) == 3
    assert list(utils.side_by_side(work, range(6), CPU)) == [(number, 1) for number in range(6)]
    assert torch.get_num_threads() == 3
    assert list(utils.ahead(lambda _: torch.get_num_threads(), range(2))) == [3, 3]  # what new threads start with too


def test_side_by_side_is_bounded_and_gives_the_threads_back_after_an_error(threads, monkeypatch):
    monkeypatch.setattr(utils, "AT_ONCE", 2)
    running, most, lock = set(), [], threading.Lock()

    def work(number):
        with lock:
            running.add(number)
            most.append(len(running))
        time.sleep(0.01)
        with lock:
            running.remove(number)
        if number == 7:
            raise UserError("seven")
        return number

    results = utils.side_by_side(work, range(20), CPU)
    with pytest.raises(UserError, match="seven"):
        for expected in range(20):
            assert next(results) == expected
    assert expected == 7 and max(most) == 2 and torch.get_num_threads() == 3
