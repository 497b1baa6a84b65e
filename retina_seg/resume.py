"""What lets a training go on after any stop: `last.pth`, the one before it, and signals that end it behind a step.

`last.pth` is written beside, flushed and renamed; the one it replaces stays as `last.previous.pth`. A file that was torn
or has rotted is found by the checksums in it, and the one before is taken.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import zipfile
from pathlib import Path
from typing import Any

import torch

from retina_seg.utils import UserError, whole_file

LAST, PREVIOUS = "last.pth", "last.previous.pth"


class TrainingStopped(KeyboardInterrupt):
    """A training ended by SIGINT or SIGTERM behind a whole step, saved; the message says how to go on.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number


class StopSignals:
    """While entered, SIGINT and SIGTERM only set `received`: the loop asks it behind every step. A second one is obeyed.

    Outside of the main thread, where Python hands out no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def _note(self, number: int, _: Any) -> None:
        self.received = number
        self._give_back()  # whoever asks twice does not want to wait

    def _give_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def save_last(folder: Path, value: dict[str, Any]) -> None:
    """Write `value` (plain values and tensors) as the folder's last.pth; the one before stays until the next call.

    Raises:
        UserError: it cannot be written; what was there is untouched.
    """
    # in memory first: torch's writer hides a full disk behind a RuntimeError of its own
    content = io.BytesIO()
    torch.save(value, content)
    with whole_file(folder / LAST) as temporary:
        temporary.write_bytes(content.getbuffer())
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before the one before gives up its name
        if (folder / LAST).exists():
            _keep_previous(folder)


def _keep_previous(folder: Path) -> None:
    """The same file under a second name, so that there is a last.pth at every moment; a copy where there are no links."""
    second = folder / f".{PREVIOUS}.partial"
    second.unlink(missing_ok=True)
    try:
        os.link(folder / LAST, second)
    except OSError:  # a file system without links: renamed now, and for a moment there is the previous one only
        os.replace(folder / LAST, folder / PREVIOUS)
        return
    os.replace(second, folder / PREVIOUS)
    # replacing one name of a file by another name of the same file does nothing, not even that
    second.unlink(missing_ok=True)


def load_last(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole state in `folder`, and a line for every newer one that was not whole.

    Returns:
        The value and the lines; None where the training had saved nothing yet.

    Raises:
        UserError: there are saved states, and none of them is whole.
    """
    damaged = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            _verify(path)
            value = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler of torn bytes raises anything
            damaged.append(f"{path}: is damaged ({type(error).__name__}: {str(error)[:80]})")
            continue
        if damaged:
            os.replace(path, folder / LAST)  # or the next save would put the damaged one in the good one's place
        return value, damaged
    if damaged:
        raise UserError("; ".join(damaged) + "; train anew with another --output")
    return None, []


def _verify(path: Path) -> None:
    """Raises unless every part of the archive that `torch.save` wrote agrees with its checksum."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"{broken} does not agree with its checksum")


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of a process that was killed while it wrote into `folder`."""
    for path in folder.glob(".*.partial*"):
        with contextlib.suppress(OSError):
            path.unlink()
