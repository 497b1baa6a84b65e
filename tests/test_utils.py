"""Seeds, folders, natural order, numbers, CSV and JSON, and files that are written whole or not at all."""

import json
import math
import random
import threading

import numpy as np
import pytest
import torch

from retina_seg import utils
from retina_seg.utils import UserError, atomic_write, create_dir, prefetch, read_csv, read_json, seeding


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_seed_gives_the_same_draws_from_every_source():
    def draw(seed=None):
        if seed is not None:
            seeding(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = draw(42)
    assert all(a != b for other in (draw(), draw(43)) for a, b in zip(first, other, strict=True))
    assert draw(42) == first
    assert draw(2**32 + 7)[1] == draw(7)[1]  # beyond NumPy's range


def test_create_dir_makes_parents_and_names_what_is_in_the_way(tmp_path):
    (wanted := create_dir(str(tmp_path / "a" / "b c"))).joinpath("taken").write_text("x")
    assert create_dir(wanted) == wanted == tmp_path / "a" / "b c" and (wanted / "taken").read_text() == "x"
    for below in (wanted / "taken", wanted / "taken/folder", tmp_path / "taken\0", tmp_path / "taken" / ("x" * 300)):
        with pytest.raises(UserError, match="taken"):
            create_dir(below)


def test_small_things():
    times = [utils.epoch_time(*pair) for pair in ((10.0, 69.9), (5, 65), (0.5, 7325.0))]
    assert times == [(0, 59), (1, 0), (122, 4)]
    mixed = ["10", "9", "b2", "b10a", "b10", "", "x" + "9" * 30, "é1", "1.png", "1"]
    assert utils.natural_sort(mixed) == ["", "1", "1.png", "9", "10", "b2", "b10", "b10a", "x" + "9" * 30, "é1"]
    numbers = [utils.format_number(value, 2) for value in (0.005, 2, None, math.nan, -math.inf)]
    assert numbers == ["0.01", "2.00", "-", "-", "-"]


def test_prefetch_keeps_the_order_beside_its_caller_and_goes_no_further_than_asked():
    taken = []

    def items():
        for number in range(6):
            taken.append(number)
            yield number

    results = prefetch(lambda number: (12 // (4 - number), threading.get_ident()), items(), depth=2)
    assert taken == []
    seen = [next(results)]
    assert taken == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):  # where the result is asked for
        for result in results:
            seen.append(result)
    assert [number for number, _ in seen] == [3, 4, 6, 12]
    assert threading.get_ident() not in {ident for _, ident in seen}


@pytest.mark.parametrize("name", ["no_ending", "ü n\n码.json", "-dash.txt", "a" * 251 + ".png"])
def test_atomic_write_leaves_the_file_and_nothing_else(tmp_path, name):
    with atomic_write(tmp_path / name) as temporary, atomic_write(tmp_path / name) as other:  # two writers do not meet
        assert temporary.parent == tmp_path and temporary.name.endswith((tmp_path / name).suffix)  # writers go by it
        temporary.write_text("all of it")
        other.write_text("of the inner one, which ends first")
        assert not (tmp_path / name).exists()
    assert names(tmp_path) == [name] and (tmp_path / name).read_text() == "all of it"


@pytest.mark.parametrize("before", [[], ["a.txt"]])
def test_atomic_write_after_an_exception_leaves_what_was_there(tmp_path, before):
    for name in before:
        (tmp_path / name).write_text("old")
    for error, seen in ((KeyboardInterrupt("x"), KeyboardInterrupt), (OSError(28, "No space left"), UserError)):
        with pytest.raises(seen), atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise error
        assert names(tmp_path) == before and all((tmp_path / name).read_text() == "old" for name in before)


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
    (tmp_path / "a.csv").write_bytes(b"name,f1\ncaf\xe9\n")  # no UTF-8, and a row cut short
    assert read_csv(tmp_path / "a.csv", ("name",)) == [{"name": "caf\udce9", "f1": None}]


@pytest.mark.parametrize("text", ["a,b\r\n1,2\r\n", "sep=;\na;b\n1;2\n", " A , B\n1,2\n", "a\tb\n1\t2\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_is_read_as_spreadsheets_save_it(tmp_path, text, encoding):
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    assert read_csv(tmp_path / "t.csv", ["a", "b"]) == [{"a": "1", "b": "2"}]
