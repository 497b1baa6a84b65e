"""Photos on disk -> vessel maps on disk, one bad file never stopping the rest.

For every photo: `<name>_probability.png` (16 bit: 65,535 is certain vessel), `<name>_vessels.png` (0/255) and
`<name>_overlay.png`, at the photo's own size, upright; and a row in `summary.csv`. The summary is also the memory of the
folder: a photo that it calls done is skipped, and a name once given to a photo is never given to another one.

Several processes (`distributed`) share the photos out by `.plan.csv`, in which the first one writes what is to be done,
and by which name, before any starts: each takes every n-th line, so no two have one photo, and all names are those that
one process would give. Each writes its rows to a table of its own, `.summary.<rank>.csv`, line by line; the first merges
these at the end, and whoever starts next after a sudden end. The folder must be one that all of them see.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm.auto import tqdm

from retina_seg.distributed import ALONE, Group
from retina_seg.fov import find_fov, fov_diameter
from retina_seg.images import PHOTO_ENDINGS, natural_key, read_photo, write_picture
from retina_seg.predict import Segmenter
from retina_seg.utils import UserError, create_dir, side_by_side, write_text
from retina_seg.visualize import vessel_overlay

OUTPUTS = ("probability", "vessels", "overlay")
COLUMNS = ("input", "name", "width", "height", "fov_diameter", "vessel_share", "seconds", "weights", "status")
DONE = "ok"
LARGE = 3 * 40_000_000  # values of a photo; those with more are worked on one at a time, for memory
SAVE_EVERY = 10.0  # seconds between two writings of the summary
PLAN, PLAN_COLUMNS = ".plan.csv", ("input", "name", "path")


def find_photos(inputs: Iterable[str | Path], output: str | Path | None = None) -> list[Path]:
    """The photo files among `inputs`: files as named, folders with all below them, each file once.

    Links to folders are not followed (they may lead in circles), hidden files and what lies in `output` are left out.

    Raises:
        UserError: an input does not exist, a folder cannot be listed, or there is no photo at all.
    """
    found: dict[Path, Path] = {}
    written = Path(output).resolve() if output is not None else None
    for item in map(Path, inputs):
        if item.is_dir():
            for folder, below, names in os.walk(item, onerror=_refuse):
                below[:] = sorted(name for name in below if not name.startswith("."))
                here = Path(folder)
                if written is not None and here.resolve() == written and here.resolve() != item.resolve():
                    below.clear()
                    continue
                pictures = [n for n in names if Path(n).suffix.lower() in PHOTO_ENDINGS and not n.startswith(".")]
                for name in sorted(pictures, key=natural_key):
                    found.setdefault(_identity(here / name), here / name)
        elif item.exists() or item.is_symlink():
            found.setdefault(_identity(item), item)
        else:
            raise UserError(f"{item}: no such file or folder")
    if not found:
        raise UserError(
            f"no photos found in {', '.join(map(str, inputs))}; endings looked for: {' '.join(PHOTO_ENDINGS)}"
        )
    return list(found.values())


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions") from None


def _identity(path: Path) -> Path:
    """Which file `path` is: links followed; a link that leads nowhere, or in a circle, is itself."""
    return path.resolve() if path.exists() else path.absolute()


def weights_id(checkpoint: str | Path) -> str:
    """The first twelve digits of the SHA-256 of a checkpoint file: which weights made a picture."""
    return hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()[:12]


def segment_files(
    segmenter: Segmenter,
    inputs: Sequence[str | Path],
    output: str | Path,
    overwrite: bool = False,
    weights: str = "",
    progress: bool = True,
    group: Group = ALONE,
) -> list[dict[str, Any]]:
    """Segment every photo among `inputs` into the folder `output`.

    Args:
        overwrite: segment again what the summary calls done; else only what is new, changed, failed before, or was
            done with other `weights`.
        weights: what stands in the summary for the weights and options.
        group: the processes that share the photos out; each calls this.

    Returns:
        The rows of the photos of this call, in their order, as in summary.csv, with "skipped" added: whether the photo
        had been done before. The status of a photo that could not be segmented says why; it is `DONE` for the others.
        Of several processes, the first returns all rows and the others none.

    Raises:
        UserError: no photos, an input that does not exist, a folder that may not be written to, a full disk.
    """
    if not group.is_first:
        _do_share(segmenter, Path(output), weights, group, progress=False)
        return []
    output = create_dir(output)
    summary = output / "summary.csv"
    memory = read_summary(summary)
    _merge(memory, output)
    photos, tasks = _plan(inputs, output, memory, overwrite, weights)
    if tasks or group.size > 1:  # names given are kept by a call that is broken off
        _write_table(output / PLAN, PLAN_COLUMNS, tasks)
    if group.size > 1:
        group.note("plan")
        _do_share(segmenter, output, weights, group, progress)
        group.wait_for(*(f"done {rank}" for rank in range(group.size)))
        _merge(memory, output)
    else:
        done, saved = len(photos) - len(tasks), time.monotonic()
        rows = _do(segmenter, tasks, output, weights)
        try:
            for row in tqdm(rows, "segmenting", len(photos), initial=done, unit="photo", disable=not progress):
                memory[row["input"]] = row
                if time.monotonic() - saved > SAVE_EVERY:
                    write_summary(summary, memory.values())
                    saved = time.monotonic()
        finally:
            write_summary(summary, memory.values())
    (output / PLAN).unlink(missing_ok=True)
    new = {task["input"] for task in tasks}
    return [{**memory[key], "skipped": key not in new} for key in photos]


def _plan(
    inputs: Sequence[str | Path], output: Path, memory: dict[str, dict[str, Any]], overwrite: bool, weights: str
) -> tuple[list[str], list[dict[str, str]]]:
    """The identities of all photos among `inputs`; and for each that is to be done, its (input, name, path)."""
    before = {key: row["name"] for key, row in memory.items()}
    with contextlib.suppress(FileNotFoundError):  # what a broken-off call gave names to, done or not
        before = {row["input"]: row["name"] for row in _read_table(output / PLAN, PLAN_COLUMNS, header=True)} | before
    made = {f"{name}_{kind}.png" for name in before.values() for kind in OUTPUTS}
    photos = {
        str(_identity(path)): path
        for path in find_photos(inputs, output)
        # when photos and pictures share a folder, yesterday's overlay is no photo
        if not (path.name in made and _identity(path).parent == output.resolve())
    }
    sources = {Path(key) for key in photos}
    names = {name.casefold() for name in before.values()}
    tasks = []
    for key, path in photos.items():
        row = memory.get(key)
        if row and not overwrite and row["weights"] == weights and _is_done(row, path, output):
            continue
        name = before.get(key) or _free_name(path.stem, names, output, sources)
        names.add(name.casefold())
        tasks.append({"input": key, "name": name, "path": str(path)})
    return list(photos), tasks


def _do(segmenter: Segmenter, tasks: Iterable[dict[str, str]], output: Path, weights: str) -> Iterator[dict[str, Any]]:
    """Segment the photos of these lines of the plan; their rows, in order."""
    turn_of_large_ones = threading.Lock()

    def one(task: dict[str, str]) -> dict[str, Any]:
        photo = _Photo.read(task)
        large = photo.pixels is not None and photo.pixels.size > LARGE
        with turn_of_large_ones if large else contextlib.nullcontext():
            photo.segment(segmenter)
            found = photo.write(output / task["name"], segmenter.threshold)
        return {"input": task["input"], "name": task["name"], "weights": weights, **found}

    yield from side_by_side(one, tasks, segmenter.device)


def _do_share(segmenter: Segmenter, output: Path, weights: str, group: Group, progress: bool) -> None:
    """Segment every n-th photo of the plan, once there is one, and note that it is done."""
    group.wait_for("plan")
    try:
        tasks = list(
            itertools.islice(_read_table(output / PLAN, PLAN_COLUMNS, header=True), group.rank, None, group.size)
        )
    except FileNotFoundError:
        raise UserError(f"{output}: is not the folder that the first process sees; all need a common one") from None
    with open(
        output / f".summary.{group.rank}.csv", "a", newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        rows = _do(segmenter, tasks, output, weights)
        for row in tqdm(rows, "segmenting (first process)", len(tasks), unit="photo", disable=not progress):
            writer.writerow(row)
            file.flush()  # a process that is killed has lost the photos at hand, no more
    group.note(f"done {group.rank}")


def _merge(memory: dict[str, dict[str, Any]], output: Path) -> None:
    """Take what the processes of a call have written, whether it ended or broke off, into `memory` and the summary."""
    tables = sorted(output.glob(".summary.*.csv"))
    for table in tables:
        memory.update((row["input"], row) for row in _read_table(table, COLUMNS))
    if tables:
        write_summary(output / "summary.csv", memory.values())
    for table in tables:
        table.unlink()


@dataclass
class _Photo:
    """A photo on its way through `_do`. One that cannot be read or segmented is only said, by its status."""

    task: dict[str, str]
    seconds: float = 0.0
    status: str = DONE
    pixels: np.ndarray | None = None
    fov: np.ndarray | None = None
    probability: np.ndarray | None = None

    @classmethod
    def read(cls, task: dict[str, str]) -> _Photo:
        photo = cls(task)
        with photo._step():
            photo.pixels = read_photo(task["path"])
            photo.fov = find_fov(photo.pixels)
        return photo

    def segment(self, segmenter: Segmenter) -> None:
        if self.status == DONE:
            with self._step():
                self.probability = segmenter(self.pixels, self.fov)

    def write(self, target: Path, threshold: float) -> dict[str, Any]:
        """Write the three pictures; what the row says of the photo."""
        row: dict[str, Any] = dict.fromkeys(("width", "height", "fov_diameter", "vessel_share", "seconds"), "")
        if self.status != DONE:
            return {**row, "status": self.status}
        start = time.perf_counter()
        vessels = self.probability > threshold
        # a picture of the folder is whole or not there; a disk that is full or locked ends the work: it would fail for all
        write_picture(target.with_name(f"{target.name}_probability.png"), to_16_bit(self.probability))
        write_picture(target.with_name(f"{target.name}_vessels.png"), vessels.astype(np.uint8) * np.uint8(255))
        write_picture(target.with_name(f"{target.name}_overlay.png"), vessel_overlay(self.pixels, vessels))
        inside = int(np.count_nonzero(self.fov))
        row["height"], row["width"] = vessels.shape
        row["fov_diameter"] = round(fov_diameter(self.fov)) if inside else 0
        row["vessel_share"] = f"{np.count_nonzero(vessels) / inside:.4f}" if inside else ""
        return {**row, "seconds": f"{self.seconds + time.perf_counter() - start:.3f}", "status": DONE}

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except UserError as error:
            self.status = str(error).removeprefix(f"{self.task['path']}: ")
        except (MemoryError, RuntimeError, cv2.error) as error:  # a photo too large for this machine: no reason to stop
            self.status = f"could not be segmented here ({type(error).__name__}: {str(error)[:80]})"
        self.seconds += time.perf_counter() - start


def to_16_bit(probability: np.ndarray) -> np.ndarray:
    """(H, W) float32 in [0, 1] -> uint16, 65,535 for 1; in strips, so that a large photo needs no second float copy."""
    result = np.empty(probability.shape, np.uint16)
    for top in range(0, len(probability), 512):
        np.rint(probability[top : top + 512] * 65535, out=result[top : top + 512], casting="unsafe")
    return result


def _is_done(row: dict[str, Any], path: Path, output: Path) -> bool:
    if row["status"] != DONE:
        return False
    try:
        changed = path.stat().st_mtime_ns
        return all((output / f"{row['name']}_{kind}.png").stat().st_mtime_ns >= changed for kind in OUTPUTS)
    except OSError:
        return False


def _free_name(stem: str, names: set[str], output: Path, sources: set[Path]) -> str:
    """`stem`, or the first of stem-2, stem-3, … that no photo of this folder has and whose files would replace nothing."""
    # file systems take 255 bytes: leave room for what comes behind
    stem = os.fsdecode(os.fsencode(stem)[:200]) if len(os.fsencode(stem)) > 200 else stem
    name, number = stem, 1
    while name.casefold() in names or any(
        (output / f"{name}_{kind}.png").exists() or _identity(output / f"{name}_{kind}.png") in sources
        for kind in OUTPUTS
    ):
        number += 1
        name = f"{stem}-{number}"
    return name


def read_summary(path: str | Path) -> dict[str, dict[str, Any]]:
    """The rows of a summary.csv by input; nothing where there is no such file.

    Raises:
        UserError: the file is no such table: it is somebody else's, and is not replaced.
    """
    path = Path(path)
    if not path.exists():
        return {}
    try:
        if path.is_file():  # no pipe, which would be waited for
            with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
                reader = csv.DictReader(file)
                rows = {row["input"]: row for row in reader} if tuple(reader.fieldnames or ()) == COLUMNS else {"": {}}
            # a row of more or fewer cells than the header is somebody else's too
            if all(set(row) == set(COLUMNS) and None not in row.values() for row in rows.values()):
                return rows
        raise UserError(f"{path}: is not a summary of this command; choose another --output")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it or choose another --output") from None


def write_summary(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows to `path`, by name, whole or not at all."""
    _write_table(path, COLUMNS, sorted(rows, key=lambda row: natural_key(row["name"])))


def _write_table(path: str | Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _read_table(path: Path, columns: Sequence[str], header: bool = False) -> Iterator[dict[str, str]]:
    """The rows of a table of our own; a last one that was cut short as its process was killed is left out."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file, None if header else columns)
        yield from (row for row in reader if set(row) == set(columns) and None not in row.values())
