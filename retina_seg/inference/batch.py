"""Many images on disk -> vessel maps on disk; one bad file never stops the rest.

The output folder mirrors the input's: `in/a/b.png` becomes, at its own size and upright, `out/a/b_probability.png`
(16 bits, 65,535 is probability 1), `out/a/b_vessels.png` (0/255), `out/a/b_overlay.png` and a row of `out/summary.csv`.

Each process appends its rows to `.summary.<rank>.csv`, image by image. Rank 0 merges them at the end; after a kill, the
next call does. Several processes need an output folder that all of them see.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm.auto import tqdm

from retina_seg.device import map_threads, out_of_memory
from retina_seg.distributed import World
from retina_seg.fov import find_fov, fov_diameter
from retina_seg.images import IMAGE_SUFFIXES, image_size, read_image, write_image
from retina_seg.inference.segmenter import Segmenter
from retina_seg.utils import UserError, create_dir, csv_text, natural_key, natural_sort, read_csv, write_csv
from retina_seg.visualize import vessel_overlay

OUTPUTS = ("probability", "vessels", "overlay")
COLUMNS = ("input", "name", "width", "height", "fov_diameter", "vessel_share", "seconds", "weights", "status")
DONE, INTERRUPTED = "ok", "interrupted"
LARGE = 40_000_000  # pixels; images with more are done one at a time, for memory
Rows = dict[str, dict[str, Any]]  # of a summary, by input


def predict_images(
    segmenter: Segmenter,
    inputs: Sequence[str | Path],
    output: str | Path,
    overwrite: bool = False,
    weights: str = "",
    progress: bool = True,
    world: World = World(),  # noqa: B008
) -> list[dict[str, Any]]:
    """Segment every image among `inputs`, files and folders with all below them, into the folder `output`.

    A file becomes `output/<stem>_*`; what is in one folder `output/<place in it>_*`; in one of several inputs
    `output/<folder>/<place in it>_*`. Two that would share a name keep their ending in it (`b.png_vessels.png`).

    Args:
        overwrite: segment again what is done; else only what is new, changed, failed, or done with other `weights`.
        weights: a text that stands for weights and options in the summary.
        world: the processes that share the images; each calls this.

    Returns:
        On rank 0 the images' rows as in summary.csv, with "skipped": whether it had been done before; else nothing.
        "status" is `DONE`, or why the image could not be segmented.

    Raises:
        UserError: no image, two of one name, a file that is not ours in the way, a folder not to be written to, a full disk.
    """
    output = Path(output)
    if world.is_main:
        create_dir(output)
        _merge(output)
    world.barrier()
    summary = read_summary(output / "summary.csv")
    images = find_images(inputs, output, summary)
    names = _choose_names(images, output, summary)
    todo = [key for key in images if overwrite or not _is_done(summary.get(key), weights, images[key][0], output)]
    world.barrier()  # all processes have decided, the same, before any of them writes
    part, large_turn = output / f".summary.{world.rank}.csv", threading.Lock()

    def segment(row: dict[str, Any]) -> dict[str, Any]:
        return row | _segment(segmenter, images[row["input"]][0], _files(output, row["name"]), large_turn)

    begun = {"weights": weights, "status": INTERRUPTED}
    share = [{"input": key, "name": names[key], **begun} for key in todo[world.rank :: world.size]]
    write_csv(part, COLUMNS, share)  # so that a killed call leaves no file that no row names
    try:
        with open(part, "a", encoding="utf-8", errors="surrogateescape") as file:
            rows = map_threads(segment, share, segmenter.device)
            for row in tqdm(rows, "segmenting", len(share), unit="image", disable=not (progress and world.is_main)):
                file.write(csv_text(COLUMNS, [row], digits=4, header=False))
                file.flush()
    except OSError as error:
        raise UserError(f"{part}: cannot be written ({error.strerror})") from None
    finally:
        if world.size == 1:
            _merge(output)
    world.barrier()
    if not world.is_main:
        return []
    summary, new = _merge(output), set(todo)
    return [{**summary[key], "skipped": key not in new} for key in images]


def find_images(inputs: Iterable[str | Path], output: Path, summary: Rows) -> dict[str, tuple[Path, Path]]:
    """The images among `inputs`, each once: its real path -> (path, place below `output` with its ending).

    Left out are hidden files, links to folders, an `output` below an input, and the files of images in `summary`.
    Raises `UserError`: an input that is not there, a folder that cannot be listed, no image at all.
    """
    inputs, root = [Path(item) for item in inputs], output.resolve()
    found: list[tuple[Path, Path]] = []
    errors: list[OSError] = []
    for item in inputs:
        if not os.path.lexists(item):
            raise UserError(f"{item}: no such file or folder")
        if not item.is_dir():
            found.append((item, Path(item.name)))
            continue
        prefix = os.path.basename(os.path.abspath(item)) if len(inputs) > 1 else ""
        for folder, below, names in os.walk(item, onerror=errors.append):
            here = Path(folder)
            below[:] = [n for n in natural_sort(below) if not n.startswith(".") and (here / n).resolve() != root]
            names = [n for n in natural_sort(names) if Path(n).suffix.lower() in IMAGE_SUFFIXES and n[0] != "."]
            found += [(here / name, prefix / here.relative_to(item) / name) for name in names]
    if errors:
        raise UserError(f"{errors[0].filename}: cannot be listed ({errors[0].strerror}); check its permissions")
    ours = {str(file) for row in summary.values() for file in _files(root, row["name"])}
    images: dict[str, tuple[Path, Path]] = {}
    for path, place in found:
        if (key := os.path.realpath(path)) not in ours:
            images.setdefault(key, (path, place))
    if not images:
        raise UserError(f"no images found in {', '.join(map(str, inputs))}; endings: {' '.join(IMAGE_SUFFIXES)}")
    return images


def _choose_names(images: dict[str, tuple[Path, Path]], output: Path, summary: Rows) -> dict[str, str]:
    """The name of every image: that in the summary, else its place without its ending, or with it where two share one."""
    plain = {key: os.path.splitext(place.as_posix())[0] for key, (_, place) in images.items()}
    uses = Counter(name.casefold() for name in plain.values())  # some file systems do not tell a from A
    owners = {row["name"].casefold(): key for key, row in summary.items()}
    names = {}
    for key, (path, place) in images.items():
        new = plain[key] if uses[plain[key].casefold()] == 1 else place.as_posix()
        names[key] = name = summary[key]["name"] if key in summary else new
        if (other := owners.setdefault(name.casefold(), key)) != key:
            raise UserError(
                f"{path} and {other}: both would be {output / name}_*; give the folder of both, or two --output"
            )
        if key not in summary and (others := [file for file in _files(output, name) if os.path.lexists(file)]):
            raise UserError(f"{others[0]}: is there already, and not of this command; choose another --output")
    return names


def _files(output: Path, name: str) -> list[Path]:
    """The files of an image's `OUTPUTS`."""
    return [output / f"{name}_{kind}.png" for kind in OUTPUTS]


def _is_done(row: dict[str, Any] | None, weights: str, path: Path, output: Path) -> bool:
    """Whether the image at `path` needs no work: its row says so, and its files are not older than it."""
    if row is None or row["status"] != DONE or row["weights"] != weights:
        return False
    with contextlib.suppress(OSError):
        return min(file.stat().st_mtime_ns for file in _files(output, row["name"])) >= path.stat().st_mtime_ns
    return False


def _segment(segmenter: Segmenter, path: Path, files: list[Path], large_turn: threading.Lock) -> dict[str, Any]:
    """Segment the image at `path` into `files`; its row's other cells. What is wrong with the image is its status."""
    with contextlib.ExitStack() as stack:
        try:
            if max(len(os.fsencode(file.name)) for file in files) > 255:
                raise UserError("its name is too long: the outputs' would have more than 255 bytes; rename it")
            if np.prod(image_size(path)) > LARGE:
                stack.enter_context(large_turn)
            start = time.perf_counter()
            with out_of_memory("scale the image down, or choose a smaller --working-size"):
                image = read_image(path)
                fov = find_fov(image)
                probability = segmenter(image, fov)
                vessels = probability > segmenter.threshold
                probability *= 65535
                deep = np.rint(probability, out=probability).astype(np.uint16)
                arrays = deep, vessels.astype(np.uint8) * np.uint8(255), vessel_overlay(image, vessels)
        except (UserError, RuntimeError, cv2.error) as error:
            return {"status": " ".join(str(error).removeprefix(f"{path}: ").split())}
        create_dir(files[0].parent)
        for file, array in zip(files, arrays, strict=True):
            write_image(file, array)  # where this fails it would for all images, so it ends the work
    row = {"width": vessels.shape[1], "height": vessels.shape[0], "fov_diameter": 0, "status": DONE}
    if inside := np.count_nonzero(fov):
        row |= {"fov_diameter": round(fov_diameter(fov)), "vessel_share": np.count_nonzero(vessels) / inside}
    return {**row, "seconds": f"{time.perf_counter() - start:.3f}"}


def read_summary(path: Path) -> Rows:
    """The rows of the summary at `path`; none where there is no such file. Raises `UserError`: it is another table."""
    try:
        rows = read_csv(path, COLUMNS) if os.path.lexists(path) else []
    except UserError as error:
        raise UserError(f"{error}; remove it or choose another --output") from None
    return {row["input"]: row for row in rows if None not in row.values()}  # a killed process may leave half a row


def _merge(output: Path) -> Rows:
    """Take the rows that processes have written, also those of a killed call, into summary.csv; all its rows."""
    path, parts = output / "summary.csv", natural_sort(output.glob(".summary.*.csv"))
    summary = read_summary(path)
    for part in parts:
        summary |= read_summary(part)
    if parts:
        write_csv(path, COLUMNS, sorted(summary.values(), key=lambda row: natural_key(row["name"])))
    for part in parts:
        part.unlink()
    return summary
