"""Seeding, folders and time (the original's `utils` notebook), and files that are written whole or not at all.

Imports no torch, so that what needs no network starts at once.
"""

import contextlib
import csv
import io
import json
import math
import os
import random
import re
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")
Named = TypeVar("Named", bound=str | Path)


class UserError(Exception):
    """A mistake that its user can mend: the message names the file or the option, and the remedy. Exit status 2."""


def seeding(seed: int) -> None:
    """Seed `random`, NumPy and torch on all devices; `seed` is from 0 to 2^63 - 1."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def user_path(path: str | Path) -> Path:
    """`path` with `~` as the home folder, also where no shell expanded it."""
    return Path(os.path.expanduser(path))


_KINDS: dict[bytes | tuple[bytes, ...], str] = {  # what a file's first bytes tell, in small letters
    b"version https://git-lfs": "a Git LFS pointer, the file itself was not downloaded; run git lfs pull",
    (b"<!doctype", b"<html"): "an HTML page, as a download that needs a login gives; download it again",
    b"%pdf": "a PDF; save the images in it one by one",
    b"pk\x03\x04": "a ZIP archive, or a checkpoint; unpack the one, give the other to --weights",
    b"\x1f\x8b": "a gzip archive; unpack it",
}


def file_kind(path: str | Path) -> str | None:
    """What a file is that is neither image nor checkpoint, with the remedy, by its first bytes; None: not known."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file; copy or download it again"
    begins = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    known = next((kind for mark, kind in _KINDS.items() if begins.startswith(mark)), None)
    return known or (None if set(start) - {9, 10, 13, *range(32, 127)} else "a text file")


def create_dir(path: str | Path) -> Path:
    """Make the folder `path` with its parents; returns it. Raises `UserError`: it is a file, or may not be written to."""
    path = user_path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{path}: is a file, a folder is needed; move it or choose another folder") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot make this folder ({why}); choose one you may write to") from None
    return path


@contextlib.contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """Gives the folder `path`, made with its parents; where the block fails, those that were made and are empty go again."""
    path = user_path(path)
    new = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        yield create_dir(path)
    except BaseException:
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def epoch_time(start_time: float, end_time: float) -> tuple[int, int]:
    """The time between two `time.time()` readings (seconds) as whole (minutes, seconds)."""
    return divmod(int(end_time - start_time), 60)


def natural_key(text: str | Path) -> tuple:
    """A sort key that counts: "2.png" before "10.png"."""
    parts = re.split("([0-9]+)", str(text))  # text and digits in turn
    return tuple((int(part[:18]), part) if index % 2 else part for index, part in enumerate(parts))


def natural_sort(items: Iterable[Named]) -> list[Named]:
    """`items` (names or paths) in natural order, numbers by value."""
    return sorted(items, key=natural_key)


def format_number(value: float | None, digits: int = 4) -> str:
    """`value` with `digits` decimals; "-" for None, NaN and infinity."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def prefetch(
    function: Callable[[T], R],
    items: Iterable[T],
    depth: int = 1,
    workers: int = 1,
    initializer: Callable[[], object] | None = None,
) -> Iterator[R]:
    """`function(item)` for every item, in order, worked out in threads up to `depth` items before it is asked for.

    Every thread calls `initializer` first. Whoever stops asking waits for what is under way.
    """
    with ThreadPoolExecutor(workers, initializer=initializer) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path of the same ending; renamed to `path` when the block ends well, removed when it does not.

    Raises `UserError`: no such folder, no permission, a full disk.
    """
    path = user_path(path)
    # short and random: a name of the greatest allowed length still has a temporary twin
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.partial{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def without_nan(value: Any) -> Any:
    """`value` with every float that is not finite turned to None, NumPy scalars to Python's: what JSON can hold."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all; file names in it that are no UTF-8 keep their bytes."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON; a score that cannot be had (NaN) becomes null."""
    text = json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text.encode("utf-8", "backslashreplace").decode() + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in the JSON file `path`. Raises `UserError`: no such file, or no JSON object in it."""
    path = user_path(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is not a regular file")  # but a pipe, say, which would be waited for
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object")
    return value


def csv_text(columns: Sequence[str], rows: Iterable[dict[str, Any]], digits: int = 6, header: bool = True) -> str:
    """The rows as CSV: floats with `digits` significant digits, None and NaN left empty, other keys left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore", restval="")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in without_nan(row).items()})
    return text.getvalue()


class Rows(list[dict[str, Any]]):
    """Rows of a table, a dictionary each; a list, with the table for pandas users."""

    @property
    def table(self) -> Any:
        """A pandas DataFrame where pandas is installed, else the rows themselves."""
        try:
            import pandas
        except ImportError:
            return self
        return pandas.DataFrame(list(self))


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows to `path` as CSV (`csv_text`), whole or not at all."""
    write_text(path, csv_text(columns, rows))


def read_text(path: str | Path) -> str:
    """A text in UTF-8 or, as spreadsheets and Windows write, UTF-16. Raises `OSError`: it cannot be read."""
    data = Path(path).read_bytes()
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16", "replace") if utf16 else data.decode("utf-8-sig", "surrogateescape")


def read_csv(path: str | Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of the table at `path`, also as a spreadsheet saves it (UTF-16, `;`, tab, `sep=`); what a row lacks is None.

    Spaces around column names, and capitals in `columns`, do not matter. Raises `UserError`: it cannot be read, or lacks
    one of `columns`.
    """
    path = Path(path)
    try:
        text = re.sub("^sep=.\r?\n", "", read_text(path))
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = found = [name.lower() if name.lower() in columns else name for name in names]
        rows = list(reader)
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if missing := [name for name in columns if name not in found]:
        raise UserError(f"{path}: is not a table with columns {', '.join(columns)}; it lacks {missing[0]}")
    return rows
