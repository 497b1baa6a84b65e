"""Seeding, folders, time, device and precision (the original's `utils` notebook), and writing files whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import random
import subprocess
import sys
import typing
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

AT_ONCE = 4  # photos under way at a time: more would mostly take more memory


class UserError(Exception):
    """A mistake that its user can mend: the message names the file or the option, and the remedy.

    The command prints it as one line and exits with status 2; it is never a bug of the package.
    """


# ---------------------------------------------------------------------------------------------- the original's three


def seeding(seed: int) -> None:
    """Seed every random source a run draws from: `random`, NumPy, torch (all devices).

    Raises:
        UserError: a seed that one of them does not take.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: must lie between 0 and 2^63 - 1")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def create_dir(path: str | Path) -> Path:
    """Make the folder `path`, its parents too, unless it is there; returns it as a `Path`.

    Raises:
        UserError: the place is a file, or may not be written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(
            f"{path}: a file stands where a folder is to be made; move it or choose another folder"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot make this folder ({why}); choose one you may write to") from None
    return path


def epoch_time(start_time: float, end_time: float) -> tuple[int, int]:
    """The time between two `time.time()` readings (seconds) as whole (minutes, seconds)."""
    minutes, seconds = divmod(int(end_time - start_time), 60)
    return minutes, seconds


# ------------------------------------------------------------------------------------------------ device and precision

PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes the first GPU there is, else the processor.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise NotImplementedError("it computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise UserError(f"--device {name}: this machine has no such device; try --device cpu") from None
    return device


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether bfloat16 is computed by matrix units here: elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    # torch has no public question for this before 2.11; the kernel's own list is the same on every version
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return "amx_bf16" in flags or "avx512_bf16" in flags
    return False


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic called `name`: "float32", "bfloat16" (autocast), or "auto": bfloat16 where `device` has units for it.

    Raises:
        UserError: no such precision.
    """
    if name not in PRECISIONS:
        raise UserError(f"--precision {name}: choose one of {', '.join(PRECISIONS)}")
    if name == "auto":
        return torch.bfloat16 if has_bfloat16_units(device) else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def training_layout(device: torch.device, precision: torch.dtype) -> torch.memory_format:
    """How tensors lie in memory where training is fastest: channels last, but for float32 on a processor without AVX-512.

    There the original's network trains a quarter slower with channels last, and the fast one alike either way.
    """
    narrow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return torch.contiguous_format if narrow and precision is torch.float32 else torch.channels_last


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Within the block, memory that tensors free stays with the process; behind it, it is given back.

    glibc returns every block above 32 MB to the system as soon as it is freed, and asks for it anew, zeroed page by page,
    at the next layer: half of the time of the original's network in float32 (results/README.md). Costs up to a third more
    memory. Does nothing where the allocator is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX in malloc.h
    trim, mapped_from, most_mapped, most_arenas = -1, -3, -4, -8
    mallopt(most_arenas, 1)  # the arenas of threads give back whatever they can; glibc does not undo this one behind
    mallopt(most_mapped, 0)
    mallopt(trim, -1)  # never
    try:
        yield
    finally:
        # where glibc's own sliding thresholds come to rest; they do not slide any more once one is set
        mallopt(most_mapped, 65536)
        mallopt(mapped_from, 32 * 2**20)
        mallopt(trim, 64 * 2**20)
        ctypes.CDLL(None).malloc_trim(0)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The autocast context of `precision` on `device`; a no-op for float32."""
    # an enabled context with float32 would warn, so it is entered switched off
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is torch.bfloat16)


def available_memory(device: torch.device) -> int | None:
    """Bytes of memory that a process here can still have on `device`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where it has none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    return max(0, min(found)) if found else None


def ahead(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    depth: int = 1,
    workers: int = 1,
    set_up: Callable[[], None] | None = None,
) -> Iterator[Any]:
    """`function(item)` for every item, in order, worked out in a thread up to `depth` items before it is asked for.

    For work beside other work: what it calls (OpenCV, NumPy, zlib, torch) lets other threads run. With several `workers`
    `function` is called by as many threads at once, each of which calls `set_up` first. An error of `function`, or of
    `items`, is raised behind the results of all items before; who stops asking waits for what is under way.
    """
    source, failed = iter(items), None
    with ThreadPoolExecutor(workers, initializer=set_up) as pool:
        waiting: deque[Future] = deque()
        try:
            while True:
                try:
                    item = next(source)
                except StopIteration:
                    break
                except BaseException as error:  # Ctrl-C too: what was begun before is still handed out
                    failed = error
                    break
                waiting.append(pool.submit(function, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
    if failed is not None:
        raise failed


def photos_at_once(device: torch.device) -> int:
    """How many photos `side_by_side` has under way at a time."""
    return min(torch.get_num_threads(), AT_ONCE) if device.type == "cpu" else AT_ONCE


def side_by_side(function: Callable[[Any], Any], items: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """`function(item)` for every item, in order, `photos_at_once` at a time; for work with a network on `device`.

    On a processor the items share out torch's threads: a photo with a thread of its own from file to files. A network that
    takes all threads for one photo is stopped at every layer by whoever reads, scores or writes meanwhile (predict and test
    take a tenth to a quarter less time a photo, results/README.md). On a GPU one is read or written while another is
    segmented.
    """
    threads, workers = torch.get_num_threads(), photos_at_once(device)
    set_up = partial(torch.set_num_threads, max(1, threads // workers))
    try:
        yield from ahead(function, items, 2 * workers, workers, set_up)
    finally:
        torch.set_num_threads(threads)  # the number that new threads start with is common to all


# --------------------------------------------------------------------------------------------------- files, all or none


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; renamed to `path` when the block ends well, removed when it does not.

    So nobody ever reads half a file under its final name. The temporary name keeps the ending, for writers that go by it.

    Raises:
        UserError: the folder may not be written to, or the disk is full.
    """
    path = Path(path)
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
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all; file names in it that are no UTF-8 keep their bytes."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON; a score that cannot be had (NaN) becomes null."""
    write_text(path, json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict:
    """The object in the JSON file `path`.

    Raises:
        UserError: there is no such file, or it does not hold a JSON object.
    """
    path = Path(path)
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


def check_types(value: Any, where: str | Path) -> None:
    """Hold the fields of a dataclass, read from the file `where`, against their annotations.

    Raises:
        UserError: a field is of another type; it is named.
    """
    for name, hint in typing.get_type_hints(type(value)).items():
        given = getattr(value, name)
        if not _is_of(given, hint):
            wanted = getattr(hint, "__name__", hint) if isinstance(hint, type) else hint
            raise UserError(f"{where}: {name} is {str(given)[:80]!r}; it must be of the type {wanted}")


def _is_of(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`: a class, a union, or a list or dict of them; an int will do for a float."""
    kinds = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, kinds[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(k, kinds[0]) and _is_of(v, kinds[1]) for k, v in value.items())
    if kinds:
        return any(_is_of(value, kind) for kind in kinds)
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))


# ------------------------------------------------------------------------------------------------------ what ran where


def git_commit() -> str | None:
    """The commit of the checkout this package is imported from, "+changes" behind it where files differ; None elsewhere."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # an installed package may lie inside somebody else's checkout: only our own counts
        if Path(ask("rev-parse", "--show-toplevel")) != Path(__file__).resolve().parents[1]:
            return None
        return ask("rev-parse", "HEAD") + ("+changes" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """What a figure depends on besides its recipe: versions, device, precision, threads, commit."""
    packages = ("torch", "torchvision", "numpy", "opencv-python", "albumentations", "scikit-learn", "scikit-image")
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
    }
