"""Device, precision, memory and threads: how a network is computed here, and what a figure depends on besides its config."""

import contextlib
import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from retina_seg import __version__
from retina_seg.config import PRECISIONS
from retina_seg.utils import R, T, UserError, prefetch

IMAGES_AT_ONCE = 4  # more would mostly take more memory


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto": a GPU where there is one. Raises `UserError`: no such device on this machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise UserError(f"--device {name}: this machine has no such device; try --device cpu") from None
    return device


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether bfloat16 is computed by matrix units here: elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and has_flag("amx_bf16", "avx512_bf16")


def processor_info() -> dict[str, str]:
    """What Linux says of the processor, text by name: "model name", "flags", …; nothing on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def has_flag(*names: str) -> bool:
    """Whether the processor has one of these extensions, as Linux names them; False on other systems.

    Those of AVX-512 and AMX only where torch may use AVX-512 (`ATEN_CPU_CAPABILITY`).
    """
    # torch has no public question for this before 2.11; the kernel's own list is the same on every version
    flags = processor_info().get("flags", "").split()
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        flags = [flag for flag in flags if not flag.startswith(("avx512", "amx"))]
    return not {*names}.isdisjoint(flags)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic called `name`; "auto": bfloat16 where `device` has units for it. Raises `UserError`: none of these."""
    if name not in PRECISIONS:
        raise UserError(f"--precision {name}: choose one of {', '.join(PRECISIONS)}")
    bfloat16 = has_bfloat16_units(device) if name == "auto" else name == "bfloat16"
    return torch.bfloat16 if bfloat16 else torch.float32


def training_layout(device: torch.device, precision: torch.dtype) -> torch.memory_format:
    """How tensors lie in memory where training is fastest: channels last, but for float32 on a processor without AVX-512.

    There the original's network trains a quarter slower with channels last, and the fast one alike either way.
    """
    narrow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return torch.contiguous_format if narrow and precision is torch.float32 else torch.channels_last


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The autocast context of `precision` on `device`; a no-op for float32."""
    # an enabled context with float32 would warn, so it is entered switched off
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is torch.bfloat16)


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Within the block, memory that tensors free stays with the process; afterwards it is given back.

    glibc returns every block above 32 MB to the system as soon as it is freed, and asks for it anew, zeroed page by page,
    at the next layer: half of the time of the original's network in float32 (results/README.md). Costs up to a third more
    memory. Does nothing where the allocator is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    trim, mapped_from, most_mapped, most_arenas = -1, -3, -4, -8  # as malloc.h numbers them
    mallopt(most_arenas, 1)  # the arenas of threads give back whatever they can; glibc cannot undo this one
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


@contextlib.contextmanager
def out_of_memory(remedy: str) -> Iterator[None]:
    """Turns running out of memory, on a processor or GPU, into a `UserError` that names the remedy."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise UserError(f"the memory of this device is too small; {remedy}") from None
    except RuntimeError as error:  # torch's allocator for processors has no class of its own
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise UserError(f"the memory of this machine is too small; {remedy}") from None


def images_at_once(device: torch.device) -> int:
    """How many images `map_threads` has under way at a time."""
    return min(torch.get_num_threads(), IMAGES_AT_ONCE) if device.type == "cpu" else IMAGES_AT_ONCE


def map_threads(
    function: Callable[[T], R], items: Iterable[T], device: torch.device, workers: int | None = None
) -> Iterator[R]:
    """`function(item)` for every item, in order; for work with a network on `device`.

    `workers`: how many items are under way at a time; None: `images_at_once`.

    On a processor the items share out torch's threads: an image with a thread of its own from file to files. A network
    that takes all threads for one image is stopped at every layer by whoever reads, scores or writes meanwhile (predict
    and test take a tenth to a quarter less time an image this way). On a GPU one image is read or written while another
    is segmented.
    """
    threads, workers = torch.get_num_threads(), workers or images_at_once(device)
    initializer = partial(torch.set_num_threads, max(1, threads // workers))
    try:
        yield from prefetch(function, items, 2 * workers, workers, initializer)
    finally:
        torch.set_num_threads(threads)  # the number that new threads start with is common to all


def git_commit() -> str | None:
    """The commit of the checkout this package is imported from, with "+changes" where files differ; None elsewhere."""
    # --git-dir: an installed package may lie inside somebody else's checkout; --exclude: no tags
    command = ["git", "--git-dir=.git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    options: dict[str, Any] = {"cwd": Path(__file__).resolve().parents[1], "capture_output": True, "text": True}
    try:
        return subprocess.run(command, check=True, timeout=10, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """What a figure depends on besides its config: versions, device, precision, threads, commit."""
    packages = ("torch", "torchvision", "numpy", "opencv-python-headless", "scikit-learn", "scikit-image", "openvino")
    versions = {"retina_seg": __version__}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": f"{processor_info().get('model name')}, {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git_commit": git_commit(),
    }
