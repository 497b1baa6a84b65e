"""Datasets as a whole: their layout on disk, public ones converted to it, synthetic ones, and what is wrong with one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retina_seg.images import visible
from retina_seg.utils import UserError, create_dir


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `destination` when the block ends well, and is removed when it does not.

    Raises `UserError`: `destination` is a file, holds more than a README.md, or cannot be written.
    """
    _check_free(destination)
    final = Path(os.path.realpath(destination))  # `resolve` raises where a link leads in a circle
    place = next(folder for folder in (final, *final.parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=place) as temporary:
            folder = create_dir(Path(temporary) / "set")
            yield folder
            _check_free(destination)
            if final.is_dir():
                for path in visible(folder):
                    path.rename(final / path.name)
            else:
                folder.rename(create_dir(final.parent) / final.name)
    except OSError as error:
        raise UserError(f"{destination}: cannot be written ({error.strerror or error})") from error


def _check_free(destination: Path) -> None:
    if destination.is_dir():
        if held := [path.name for path in visible(destination) if path.name != "README.md"]:
            raise UserError(f"{destination}: is not empty ({held[0]}); choose a new folder, or clear this one first")
    elif destination.exists() or destination.is_symlink():
        raise UserError(f"{destination}: is a file; choose another folder")
