"""Photos on disk -> vessel maps on disk, one bad file never stopping the rest.

For every photo: `<name>_probability.png` (16 bit: 65,535 is certain vessel), `<name>_vessels.png` (0/255) and
`<name>_overlay.png`, at the photo's own size, upright; and a row in `summary.csv`. The summary is also the memory of the
folder: a photo that it calls done is skipped, and a name once given to a photo is never given to another one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm.auto import tqdm

from retina_seg.fov import find_fov, fov_diameter
from retina_seg.images import PHOTO_ENDINGS, natural_key, read_photo, write_picture
from retina_seg.predict import Segmenter
from retina_seg.utils import UserError, create_dir, write_text
from retina_seg.visualize import vessel_overlay

OUTPUTS = ("probability", "vessels", "overlay")
COLUMNS = ("input", "name", "width", "height", "fov_diameter", "vessel_share", "seconds", "weights", "status")
DONE = "ok"
SAVE_EVERY = 10.0  # seconds between two writings of the summary


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
) -> list[dict[str, Any]]:
    """Segment every photo among `inputs` into the folder `output`.

    Args:
        overwrite: segment again what the summary calls done; else only what is new, changed, failed before, or was
            done with other `weights`.
        weights: what stands in the summary for the weights and options.

    Returns:
        The rows of the photos of this call, in their order, as in summary.csv, with "skipped" added: whether the photo
        had been done before. The status of a photo that could not be segmented says why; it is `DONE` for the others.

    Raises:
        UserError: no photos, an input that does not exist, a folder that may not be written to, a full disk.
    """
    output = create_dir(output)
    summary = output / "summary.csv"
    memory = read_summary(summary)
    made = {f"{row['name']}_{kind}.png" for row in memory.values() for kind in OUTPUTS}
    photos = [
        path
        for path in find_photos(inputs, output)
        # when photos and pictures share a folder, yesterday's overlay is no photo
        if not (path.name in made and _identity(path).parent == output.resolve())
    ]
    sources = {_identity(path) for path in photos}
    names = {row["name"].casefold() for row in memory.values()}
    rows = []
    saved = time.monotonic()
    try:
        for path in tqdm(photos, desc="segmenting", unit="photo", disable=not progress):
            key = str(_identity(path))
            before = memory.get(key)
            if before and not overwrite and before["weights"] == weights and _is_done(before, path, output):
                rows.append({**before, "skipped": True})
                continue
            name = before["name"] if before else _free_name(path.stem, names, output, sources)
            names.add(name.casefold())
            row = {"input": key, "name": name, "weights": weights, **_segment(segmenter, path, output / name)}
            memory[key] = row
            rows.append({**row, "skipped": False})
            if time.monotonic() - saved > SAVE_EVERY:
                write_summary(summary, memory.values())
                saved = time.monotonic()
    finally:
        write_summary(summary, memory.values())
    return rows


def _segment(segmenter: Segmenter, path: Path, target: Path) -> dict[str, Any]:
    """Segment one photo and write its three pictures; the rest of its row. A photo that cannot be read is only said."""
    start = time.perf_counter()
    row: dict[str, Any] = dict.fromkeys(("width", "height", "fov_diameter", "vessel_share", "seconds"), "")
    try:
        photo = read_photo(path)
        fov = find_fov(photo)
        probability = segmenter(photo, fov)
    except UserError as error:
        return {**row, "status": str(error).removeprefix(f"{path}: ")}
    except (MemoryError, RuntimeError, cv2.error) as error:  # a photo too large for this machine is no reason to stop
        return {**row, "status": f"could not be segmented here ({type(error).__name__}: {str(error)[:80]})"}
    vessels = probability > segmenter.threshold
    # a picture of the folder is whole or not there; a disk that is full or locked ends the work: it would fail for all
    write_picture(target.with_name(f"{target.name}_probability.png"), to_16_bit(probability))
    write_picture(target.with_name(f"{target.name}_vessels.png"), vessels.astype(np.uint8) * np.uint8(255))
    write_picture(target.with_name(f"{target.name}_overlay.png"), vessel_overlay(photo, vessels))
    inside = int(np.count_nonzero(fov))
    row["height"], row["width"] = photo.shape[:2]
    row["fov_diameter"] = round(fov_diameter(fov)) if inside else 0
    row["vessel_share"] = f"{np.count_nonzero(vessels) / inside:.4f}" if inside else ""
    return {**row, "seconds": f"{time.perf_counter() - start:.3f}", "status": DONE}


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
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: natural_key(row["name"])))
    write_text(path, text.getvalue())
