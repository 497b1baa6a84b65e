"""Seeds, folders, natural order, numbers, CSV and JSON, and files that are written whole or not at all."""

import json
import math
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from retina_seg import utils
from retina_seg.utils import UserError, atomic_write, create_dir, prefetch, read_csv, read_json, seeding, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_needs_no_network_imports_no_torch():
    code = "import retina_seg.utils, retina_seg.config, retina_seg.sets.prepare, sys"
    code += "; sys.exit(bool({'albumentations', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def states_kept(monkeypatch):
    """What `seeding` sets is set back after the test."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])


def test_one_seed_gives_the_same_draws_from_every_source(states_kept):
    def draw(seed=None):
        if seed is not None:
            seeding(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = draw(42)
    assert all(a != b for other in (draw(), draw(43)) for a, b in zip(first, other, strict=True))
    assert draw(42) == first
    assert draw(2**32 + 7)[1] == draw(7)[1]  # beyond NumPy's range


def test_create_dir_makes_parents_and_names_what_is_in_the_way(tmp_path):
    wanted = tmp_path / "a" / "b c"
    assert create_dir(str(wanted)) == wanted
    (wanted / "taken").write_text("x")
    assert create_dir(wanted) == wanted and (wanted / "taken").read_text() == "x"
    for below in (wanted / "taken", wanted / "taken/folder", tmp_path / "taken\0", tmp_path / "taken" / ("x" * 300)):
        with pytest.raises(UserError, match="taken"):
            create_dir(below)


def test_small_things():
    times = [utils.epoch_time(*pair) for pair in ((0, 0), (10.0, 69.9), (5, 65), (0.5, 7325.0))]
    assert times == [(0, 0), (0, 59), (1, 0), (122, 4)]
    mixed = ["10", "9", "b2", "b10a", "b10", "a", "", "x007", "x7", "x" + "9" * 30, "é1", "1.png", "1"]
    assert utils.natural_sort(mixed)[:5] == ["", "1", "1.png", "9", "10"]
    assert [name for name in utils.natural_sort(mixed) if name[:1] == "b"] == ["b2", "b10", "b10a"]
    assert utils.natural_sort(reversed(mixed)) == utils.natural_sort(mixed)
    numbers = [utils.format_number(value, 2) for value in (0.005, -1.5, 2, None, math.nan, -math.inf)]
    assert numbers == ["0.01", "-1.50", "2.00", "-", "-", "-"]


def test_prefetch_keeps_the_order_beside_its_caller_and_goes_no_further_than_asked():
    taken = []

    def items():
        for number in range(6):
            taken.append(number)
            yield number
        raise KeyboardInterrupt

    results, seen = prefetch(lambda number: (number * 10, threading.get_ident()), items(), depth=2), []
    assert taken == []
    assert next(results)[0] == 0 and taken == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        for result in results:
            seen.append(result)
    assert [number for number, _ in seen] == [10, 20, 30]
    assert threading.get_ident() not in {ident for _, ident in seen}


def test_prefetch_raises_where_the_result_is_asked_for():
    results = prefetch(lambda number: 6 // (2 - number), range(5), depth=3)
    assert [next(results), next(results)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)


# --------------------------------------------------------------------------------------------------- files, all or none


@pytest.mark.parametrize("name", ["plain.txt", "no_ending", "ü n\n码.json", "-dash.txt", "a" * 251 + ".png"])
def test_atomic_write_leaves_the_file_and_nothing_else(tmp_path, name):
    with atomic_write(tmp_path / name) as temporary:
        assert temporary.parent == tmp_path and temporary.name.endswith((tmp_path / name).suffix)  # writers go by it
        temporary.write_text("all of it")
        assert not (tmp_path / name).exists()
    assert names(tmp_path) == [name] and (tmp_path / name).read_text() == "all of it"


@pytest.mark.parametrize("before", [None, "old"])
def test_atomic_write_after_an_exception_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "a.txt"
    if before:
        path.write_text(before)
    for error in (RuntimeError("x"), KeyboardInterrupt("x"), OSError(28, "No space left on device")):
        full = isinstance(error, OSError)
        with pytest.raises(UserError if full else type(error)) as caught, atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error
        assert not full or "a.txt: cannot be written (No space left" in str(caught.value)
        assert names(tmp_path) == (["a.txt"] if before else []) and (not before or path.read_text() == before)


def test_a_file_is_replaced_never_overwritten_in_place(tmp_path):
    path, witness = tmp_path / "a.txt", tmp_path / "witness"
    path.write_text("old")
    os.link(path, witness)  # as a reader who has it open: the old file stays whole
    write_text(path, "new \udce9")  # a file name with bytes that are no UTF-8
    assert (path.read_bytes(), witness.read_text()) == (b"new \xe9", "old")
    (tmp_path / "folder").mkdir()
    for impossible in (tmp_path / "missing/a.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match=impossible.name):
            write_text(impossible, "x")
    assert names(tmp_path) == ["a.txt", "folder", "witness"]


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        first.write_text("1")
        second.write_text("2")
        assert len(names(tmp_path)) == 2
    assert (tmp_path / "a").read_text() == "1"  # the outer one ended last


def test_without_nan_changes_only_what_json_cannot_hold(tmp_path):
    value = {"a": [math.nan, math.inf, 0.0], 3: (np.float32("nan"), np.int64(5), None), "ü": {"d": "nan", "e": True}}
    plain = {"a": [None, None, 0.0], "3": [None, 5, None], "ü": {"d": "nan", "e": True}}
    assert utils.without_nan(value) == plain
    utils.write_json(tmp_path / "metrics.json", value)
    assert json.loads((tmp_path / "metrics.json").read_bytes()) == read_json(tmp_path / "metrics.json") == plain


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"[" * 200_000])
def test_read_json_refuses_what_holds_no_object(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    for path in (tmp_path / "a.json", tmp_path / "missing/a.json"):
        with pytest.raises(UserError, match="a.json: (is not JSON|holds no JSON object|cannot be read)"):
            read_json(path)


def test_tables_come_back_as_they_were_written(tmp_path):
    rows = [{"name": 'a "b", c', "f1": 0.123456789, "n": 3, "other": 1}, {"name": "ü", "f1": math.nan, "n": None}]
    text = 'name,f1,n\n"a ""b"", c",0.1235,3\nü,,\n'
    assert utils.csv_text(("name", "f1", "n"), rows, 4) == text
    assert utils.csv_text(("name", "f1", "n"), rows, 4, header=False) == text.split("\n", 1)[1]
    utils.write_csv(tmp_path / "a.csv", ("name", "f1", "n"), rows)
    back = read_csv(tmp_path / "a.csv", ("f1", "name"))
    assert back == [{"name": 'a "b", c', "f1": "0.123457", "n": "3"}, {"name": "ü", "f1": "", "n": ""}]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfname,f1\ncaf\xe9\n")  # a spreadsheet's mark, a row cut short
    assert read_csv(tmp_path / "a.csv", ("name",)) == [{"name": "caf\udce9", "f1": None}]


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"name,f1\n" + b"x" * 200_000])
def test_what_is_no_such_table_is_named(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    for path in (tmp_path / "a.csv", tmp_path / "missing/a.csv"):
        with pytest.raises(UserError, match="a.csv: (is not a|cannot be read)"):
            read_csv(path, ("name", "f1"))


@pytest.mark.parametrize("text", ["a,b\r\n1,2\r\n", "sep=;\na;b\n1;2\n", " A , B\n1,2\n", "a\tb\n1\t2\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_is_read_as_spreadsheets_save_it(tmp_path, text, encoding):
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    assert read_csv(tmp_path / "t.csv", ["a", "b"]) == [{"a": "1", "b": "2"}]
