"""Devices, precisions, memory and threads, and the record of what a figure depends on."""

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from retina_seg import device
from retina_seg.device import choose_device, choose_precision, environment, git_commit, map_threads
from retina_seg.utils import UserError, prefetch

CPU = torch.device("cpu")


def test_a_device_is_one_that_is_there():
    assert choose_device("cpu") == CPU
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "toaster", "", "meta", "mps:77"):
        with pytest.raises(UserError, match=f"--device {name}: .*no such device"):
            choose_device(name)


def test_precision_is_chosen_by_name_and_by_what_the_device_can(monkeypatch):
    assert [choose_precision(name, CPU) for name in ("float32", "bfloat16")] == [torch.float32, torch.bfloat16]
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "has_bfloat16_units", lambda _, able=able: able)
        assert choose_precision("auto", CPU) is dtype
    with pytest.raises(UserError, match="--precision float16: .*auto, float32, bfloat16"):
        choose_precision("float16", CPU)
    a = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with device.autocast(CPU, dtype):
            assert (a @ a).dtype == dtype


def test_float32_training_on_narrow_processors_is_not_channels_last(monkeypatch):
    for capability, expected in (("AVX2", torch.contiguous_format), ("AVX512", torch.channels_last)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda value=capability: value)
        assert device.training_layout(CPU, torch.float32) is expected
        assert device.training_layout(CPU, torch.bfloat16) is torch.channels_last
        assert device.training_layout(torch.device("cuda"), torch.float32) is torch.channels_last


def test_extensions_that_torch_is_kept_from_do_not_count(monkeypatch):
    monkeypatch.setattr(device, "processor_info", lambda: {"flags": "fpu avx2 avx_vnni avx512_vnni avx512_bf16"})
    for capability, wide in (("AVX512", True), ("AVX2", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda value=capability: value)
        assert device.has_bfloat16_units(CPU) is wide and device.has_flag("avx512_vnni") is wide
        assert device.has_flag("avx_vnni") and not device.has_flag("amx_int8")


PAGES = """
import resource, torch
from retina_seg.device import memory_kept

def pages_asked_for():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(12):
        torch.zeros(2**24)  # 64 MB, freed at once; 32 pages where the system's are huge
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with memory_kept():
    for _ in range(3):  # freed blocks fit the next one only after a few
        pages_asked_for()
    kept = pages_asked_for()
print(kept, pages_asked_for())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_memory_kept_is_not_asked_for_again_and_given_back_after():
    # in a process of its own: what a long one has allocated before may lie in the way of its heap
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    kept, after = map(int, done.stdout.split())
    assert kept < 100 and after > 10 * max(kept, 10)


def test_out_of_memory_is_a_user_error_with_its_remedy():
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), None):
        with pytest.raises(UserError, match="too small; buy more"), device.out_of_memory("buy more"):
            if error is not None:
                raise error
            torch.empty(2**58)  # the allocator's own error
    with pytest.raises(RuntimeError, match="shapes"), device.out_of_memory("buy more"):
        raise RuntimeError("shapes differ")


def test_map_threads_shares_the_threads_out_and_gives_them_back(monkeypatch):
    gate = threading.Barrier(3, timeout=60)  # passed only by three at once
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert device.images_at_once(CPU) == 3
        work = Mock(side_effect=lambda number: (gate.wait() < 3, number, torch.get_num_threads()))
        assert list(map_threads(work, range(6), CPU)) == [(True, number, 1) for number in range(6)]
        assert torch.get_num_threads() == 3
        assert list(prefetch(lambda _: torch.get_num_threads(), range(2))) == [3, 3]  # what new threads start with too
        monkeypatch.setattr(device, "IMAGES_AT_ONCE", 2)
        work = Mock(side_effect=lambda number: 1 // (7 - number))
        with pytest.raises(ZeroDivisionError):
            list(map_threads(work, range(100), CPU))
        assert work.call_count <= 7 + 2 * 2 + 1 and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git_commit_is_the_checkouts_or_none(monkeypatch):
    root = Path(device.__file__).resolve().parents[1]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert (git_commit() or "").removesuffix("+changes") == (head.stdout.strip() if (root / ".git").exists() else "")
    for change in ((device, "__file__", f"{root}/tests/retina_seg/device.py"), (os, "environ", {"PATH": ""})):
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            assert git_commit() is None  # in somebody else's checkout; without git


def test_environment_names_versions_device_and_precision():
    found = environment(CPU, torch.bfloat16)
    assert found["packages"]["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert (found["device"], found["precision"]) == ("cpu", "bfloat16")
    assert found["threads"] == torch.get_num_threads() and os.sep not in found["platform"]
    assert json.loads(json.dumps(found)) == found
