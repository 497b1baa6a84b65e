"""Many images on disk -> vessel maps on disk; one bad file never stops the rest.

The output folder mirrors the input's: `in/a/b.png` becomes, at its own size and upright, `out/a/b_probability.png`
(16 bits, 65,535 is probability 1), `out/a/b_vessels.png` and, where asked for, `out/a/b_fov.png` (0/255),
`out/a/b_overlay.png`, and a row of `out/summary.csv` and `out/summary.json`: whether the image is gradable (`quality`) and,
where asked for, `MEASURES` of its vessels (`analysis.measure`).

Each process appends its rows to `.summary.<rank>.csv`, image by image. Rank 0 merges them at the end; after a kill, the
next call does. Several processes need an output folder that all of them see.
"""

import contextlib
import csv
import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm.auto import tqdm

from retina_seg import utils
from retina_seg.device import map_threads, out_of_memory
from retina_seg.distributed import World
from retina_seg.fov import find_fov, fov_diameter
from retina_seg.images import IMAGE_SUFFIXES, image_size, is_image, load_image, write_image
from retina_seg.inference.segmenter import Segmenter
from retina_seg.quality import quality
from retina_seg.utils import UserError, natural_sort, user_path
from retina_seg.visualize import preview, vessel_overlay

# what can be saved -> the end of its file's name
SAVES = {"masks": "vessels.png", "probability": "probability.png", "overlay": "overlay.png", "fov": "fov.png"}
SAVES["report"] = "preview.jpg"  # for `analysis.report`
SAVED = "masks,probability,overlay"  # by default
OUTPUTS = tuple(SAVES[name].removesuffix(".png") for name in SAVED.split(","))
SUMMARIES = ("summary.csv", "summary.json")
NUMBERS = ("width", "height", "fov_diameter", "vessel_percent", "seconds", "size", "mtime_ns")
# the status last, so that a row cut short is not taken for whole
COLUMNS = ("input", "name", *NUMBERS, "made_with", "gradable", "remark", "status")
MEASURES = (  # columns before the status; empty where undefined, those in micrometres without a pixel size
    *("length_density_per_fov", "length_density_per_mm"),  # the area density is vessel_percent
    *(f"calibre_{what}_{unit}" for unit in ("px", "um") for what in ("mean", "median", "p10", "p90")),
    *("branch_density_per_fov2", "end_density_per_fov2"),
    *("tortuosity_median", "curvature2_median_per_fov2", "fractal_d0"),
)
TEXTS, TABLES = (".txt", ".lst"), (".csv", ".tsv")  # endings of lists of paths
NAMED = ("image", "path", "input")  # columns of paths
DONE, INTERRUPTED = "ok", "interrupted"
LARGE = 40_000_000  # pixels; images with more are done one at a time, for memory
Rows = dict[str, dict[str, Any]]  # of a summary, by input
Inputs = str | Path | Sequence[str | Path]
Images = dict[str, tuple[Path, Path]]  # real path -> (path, place below the output with its ending)


class Plan(NamedTuple):
    """What is to be done with some inputs (`plan_images`)."""

    output: Path
    saves: list[str]  # names of `SAVES`
    images: Images
    begun: Rows  # of the images to segment, `INTERRUPTED`
    passed: str  # what is passed over in folders, in words


def predict_images(
    segmenter: Segmenter,
    inputs: Inputs,
    output: str | Path,
    overwrite: bool = False,
    made_with: str | None = None,
    save: str = SAVED,
    measure: bool = False,
    pixel_size: float | None = None,
    **how: Any,
) -> list[dict[str, Any]]:
    """Segment every image among `inputs`: `plan_images`, then `segment_images`, whose arguments and errors these are.

    `made_with`: by default a checksum of the weights, and the options.
    """
    if made_with is None:
        weights = b"".join(value.cpu().float().numpy().tobytes() for value in segmenter.model.state_dict().values())
        options = f"{segmenter.frame} threshold={segmenter.threshold} tta={segmenter.tta}"
        options += f" measure pixel_size={pixel_size}" if measure else ""
        made_with = f"{hashlib.sha256(weights).hexdigest()[:12]} {options}"
    plan = plan_images(inputs, output, made_with, overwrite, save)
    return segment_images(segmenter, plan, measure=measure, pixel_size=pixel_size, **how)


def plan_images(inputs: Inputs, output: str | Path, made_with: str, overwrite: bool = False, save: str = SAVED) -> Plan:
    """Choose what to do with `inputs`: files, folders with all below them, lists of paths (`_read_list`). Writes nothing.

    A file becomes `output/<stem>_*`; what is in one folder `output/<place in it>_*`; in one of several inputs
    `output/<folder>/<place in it>_*`. Two that would share a name keep their ending in it (`b.png_vessels.png`).

    Args:
        made_with: a text that stands for weights and options in the summary.
        overwrite: segment again what is done; else only what is new, changed, failed, or lacks a file.
        save: names of `SAVES` with commas between.

    Raises `UserError`: no image, two of one name, a file that is not ours in the way, an output of other weights or options,
    no such name of `SAVES`.
    """
    output, inputs = user_path(output), [inputs] if isinstance(inputs, (str, Path)) else inputs
    saves = [name.strip() for name in save.split(",")]
    if unknown := [name for name in saves if name not in SAVES]:
        raise UserError(f"--save {unknown[0]!r}: choose from {','.join(SAVES)}")
    summary = _read_rows(output)
    images, passed = find_images(inputs, output, summary)
    begun = {}
    for key, name in _choose_names(images, output, summary).items():
        row, old = {"input": key, "name": name, "made_with": made_with}, summary.get(key, {})
        with contextlib.suppress(OSError):  # a link to nothing fails later, by name
            stat = images[key][0].stat()
            new = row | {"size": str(stat.st_size), "mtime_ns": str(stat.st_mtime_ns)}
            row = old if new.items() <= old.items() else row
        if overwrite or row.get("status") != DONE or not all(map(os.path.isfile, _files(output, name, saves))):
            begun[key] = row | {"status": INTERRUPTED}
    made = {row["made_with"] for row in summary.values() if row["status"] in (DONE, INTERRUPTED)} - {made_with}
    if made and not overwrite:
        remedy = "add --overwrite or choose another --output"
        raise UserError(f"{output}: made with {made.pop()}, not {made_with}; {remedy}")
    return Plan(output, saves, images, begun, passed)


def segment_images(
    segmenter: Segmenter,
    plan: Plan,
    jobs: int | None = None,
    progress: bool = True,
    world: World = World(),  # noqa: B008
    measure: bool = False,
    pixel_size: float | None = None,
) -> list[dict[str, Any]]:
    """Do what is planned, image by image.

    Args:
        measure: add `MEASURES` to the rows; `pixel_size`: micrometres a pixel, for those in micrometres.
        jobs: how many images at once; None: `device.images_at_once`.
        world: the processes that share the images; each calls this, with the same plan.

    Returns, on rank 0, the images' rows as in summary.csv, with "skipped": whether it had been done before. "status" is
    `DONE`, or why the image could not be segmented.

    Raises `UserError`: `jobs` is below 1, a pixel size that is none, a folder not to be written to, a full disk.
    """
    check_pixel_size(pixel_size)
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    output, saves, images, begun, _ = plan
    world.barrier()  # all processes have planned, the same, before any of them writes
    if world.is_main:
        utils.create_dir(output)
        _merge(output)
    world.barrier()
    large_turn = Lock()

    def segment(row: dict[str, Any]) -> dict[str, Any]:
        old = () if "size" in row else _files(output, row["name"])  # of another image or other settings
        for file in filter(os.path.lexists, old):
            os.unlink(file)
        files = dict(zip(saves, _files(output, row["name"], saves), strict=True))
        return row | _segment(segmenter, images[row["input"]][0], files, large_turn, measure, pixel_size)

    columns = (*COLUMNS[:-1], *(MEASURES * measure), COLUMNS[-1])
    part, share = output / f".summary.{world.rank}.csv", list(begun.values())[world.rank :: world.size]
    utils.write_csv(part, columns, share)  # so that a killed call leaves no file that no row names
    try:
        with open(part, "a", encoding="utf-8", errors="surrogateescape") as file:
            rows = map_threads(segment, share, segmenter.device, jobs)
            for row in tqdm(rows, "segmenting", len(share), unit="image", disable=not (progress and world.is_main)):
                file.write(utils.csv_text(columns, [row], digits=4, header=False))
                file.flush()
    except OSError as error:
        raise UserError(f"{error.filename or part}: cannot be written ({error.strerror})") from None
    finally:
        if world.size == 1:
            _merge(output)
    world.barrier()
    summary = _merge(output) if world.is_main else {}
    return [{**summary[key], "skipped": key not in begun} for key in images if summary]


def find_images(inputs: Sequence[str | Path], output: Path, summary: Rows) -> tuple[Images, str]:
    """The images among `inputs`, each once; and in words what else is in folders.

    Left out are hidden files, links to folders, an `output` below an input, summaries, and the files of images in
    `summary`. Raises `UserError`: an input that is not there, a folder that cannot be listed, no image at all.
    """
    root, errors, images, others = os.path.realpath(output), list[OSError](), Images(), dict[str, str]()
    ours = {str(file) for row in summary.values() for file in _files(Path(root), row["name"])}
    for item, place in _expand(inputs):
        if not item.is_dir():
            images.setdefault(os.path.realpath(item), (item, place))
            continue
        for folder, below, names in os.walk(item, onerror=errors.append):
            here = Path(folder)
            below[:] = [n for n in natural_sort(below) if n[0] != "." and os.path.realpath(here / n) != root]
            for path in (here / n for n in natural_sort(names) if n[0] != "." and n not in SUMMARIES):
                # only a file is opened, not a pipe, say, which would be waited for
                if is_image(path) if path.is_file() else path.suffix.lower() in IMAGE_SUFFIXES:
                    images.setdefault(os.path.realpath(path), (path, place / path.relative_to(item)))
                else:
                    others[os.path.realpath(path)] = path.suffix.lower() or "without ending"
    if errors:
        raise UserError(f"{errors[0].filename}: cannot be listed ({errors[0].strerror}); check its permissions")
    images = {key: one for key, one in images.items() if key not in ours}
    counts = Counter(sorted(others.values())).most_common()
    passed = "; passed over: " * bool(counts) + ", ".join(f"{count} {kind}" for kind, count in counts)
    if not images:
        raise UserError(f"no images found in {', '.join(map(str, inputs))}{passed}; give png, jpg or tif")
    return images, passed


def _expand(inputs: Sequence[str | Path]) -> list[tuple[Path, Path]]:
    """The files and folders among `inputs`, and in lists among them, each with its place below the output."""
    found = []
    for item in map(user_path, inputs):
        if not os.path.lexists(item):
            raise UserError(f"{item}: no such file or folder")
        if item.is_dir():
            found.append((item, Path(os.path.basename(os.path.abspath(item)) if len(inputs) > 1 else "")))
        elif item.suffix.lower() not in TEXTS + TABLES:
            found.append((item, Path(item.name)))
        elif paths := {path: os.path.abspath(path) for path in _read_list(item)}:
            base = os.path.abspath(item.parent)
            if not all(Path(path).is_relative_to(base) for path in paths.values()):
                base = os.path.commonpath([os.path.dirname(path) for path in paths.values()])
            found += [(path, Path(os.path.relpath(whole, base))) for path, whole in paths.items()]
    return found


def _read_list(path: Path) -> list[Path]:
    """The paths that the file `path` lists; relative ones count from its own folder.

    A text has a path a line, and `#` begins a comment line. A table has them in its column image, path or input, else in
    the first. Raises `UserError`: one is not there.
    """
    kind, is_text = utils.file_kind(path), path.suffix.lower() in TEXTS
    if kind not in (None, "a text file"):
        raise UserError(f"{path}: is {kind}")
    text = utils.read_text(path).replace("\0", "?")
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip(" ,;\t")]
    rows, column = [(number, [line]) for number, line in lines if not is_text or line.lstrip()[0] != "#"], 0
    if rows and not is_text:
        delimiter = max(",;\t", key=lines[0][1].count)
        rows = [(number, next(csv.reader([line[:9999]], delimiter=delimiter))) for number, line in lines]
        head = [cell.strip().lower() for cell in rows[0][1]]
        column = next((head.index(name) for name in NAMED if name in head), 0)
        if head[column] in NAMED or not (Path(head[0]).suffix or os.path.lexists(path.parent / rows[0][1][0])):
            del rows[0]  # a header
    paths = []
    for number, row in rows:
        entry = "".join(row[column : column + 1]).strip().strip('"')
        here, other = (path.parent / user_path(name) for name in (entry, entry.replace("\\", "/")))  # Windows writes \
        paths.append(here if os.path.lexists(here) else other)
        if not entry or not os.path.lexists(paths[-1]):
            raise UserError(f"{path}, line {number}: {paths[-1] if entry else 'no path'}: no such file or folder")
    return paths


def _choose_names(images: Images, output: Path, summary: Rows) -> dict[str, str]:
    """The name of every image: that in the summary, else its place without its ending, or with it where two share one."""
    plain = {key: os.path.splitext(place.as_posix())[0] for key, (_, place) in images.items()}
    uses = Counter(name.casefold() for name in plain.values())  # some file systems do not tell a from A
    owners = {row["name"].casefold(): key for key, row in summary.items()}
    names = {}
    for key, (path, place) in images.items():
        new = plain[key] if uses[plain[key].casefold()] == 1 else place.as_posix()
        names[key] = name = summary[key]["name"] if key in summary else new
        if (other := owners.setdefault(name.casefold(), key)) != key:
            raise UserError(f"{path} and {other}: both are {output / name}_*; give their folder, or two --output")
        files = _files(output, name) + [output / "summary.json"] * (not summary)
        if key not in summary and (others := [file for file in files if os.path.lexists(file)]):
            raise UserError(f"{others[0]}: is there already, and not of this command; choose another --output")
    return names


def _files(output: Path, name: str, saves: Sequence[str] = tuple(SAVES)) -> list[Path]:
    """The files of an image, one for each of `saves`."""
    return [output / f"{name}_{SAVES[save]}" for save in saves]


def check_pixel_size(pixel_size: float | None) -> None:
    """Raises `UserError`: it is no size in micrometres."""
    if pixel_size is not None and not 0 < pixel_size < math.inf:
        raise UserError(f"--pixel-size {pixel_size}: must be above 0 micrometres")


def _segment(
    segmenter: Segmenter, path: Path, files: dict[str, Path], large_turn: Lock, measured: bool, pixel_size: float | None
) -> dict[str, Any]:
    """Segment the image at `path` into `files`; its row's other cells. What is wrong with the image is its status."""
    with contextlib.ExitStack() as stack:
        try:
            if max(len(os.fsencode(file.name)) for file in files.values()) > 255:
                raise UserError("its name is too long: the outputs' would have more than 255 bytes; rename it")
            if np.prod(image_size(path)) > LARGE:
                stack.enter_context(large_turn)
            start, stat = time.perf_counter(), path.stat()
            with out_of_memory("scale the image down, or choose a smaller --working-size"):
                image, remark = load_image(path)
                fov = find_fov(image)
                probability = segmenter(image, fov)
                vessels = probability > segmenter.threshold
                gradable, said = quality(image, fov, probability, vessels)
                found = _measure(vessels, fov, pixel_size) if measured else {}
                overlay = vessel_overlay(image, vessels) if "overlay" in files else image
                probability *= 65535
                deep = np.rint(probability, out=probability).astype(np.uint16)
        except (UserError, RuntimeError, OSError, cv2.error) as error:
            return {"status": " ".join(str(error).removeprefix(f"{path}: ").split())}
        utils.create_dir(next(iter(files.values())).parent)
        arrays = {"masks": vessels * np.uint8(255), "fov": fov * np.uint8(255), "overlay": overlay, "probability": deep}
        if "report" in files:
            arrays["report"] = preview(image, fov, vessels)
        for save, file in files.items():
            write_image(file, arrays[save])  # where this fails it would for all images, so it ends the work
    row = {"width": vessels.shape[1], "height": vessels.shape[0], "fov_diameter": 0, "status": DONE, **found}
    row |= {"gradable": gradable, "remark": "; ".join(filter(None, (remark, said)))}
    row |= {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "seconds": f"{time.perf_counter() - start:.3f}"}
    if inside := np.count_nonzero(fov):
        row |= {"fov_diameter": round(fov_diameter(fov)), "vessel_percent": 100 * np.count_nonzero(vessels) / inside}
    return row


def _measure(vessels: np.ndarray, fov: np.ndarray, pixel_size: float | None) -> dict[str, float | None]:
    from retina_seg.analysis.measure import measure  # slow to import

    found = measure(vessels, fov, pixel_size, quadrants=False)
    return {name: found.get(name) for name in MEASURES}


def _read_rows(output: Path) -> Rows:
    """All rows that processes have written into `output`, also those of a killed call. Raises `UserError`: no summary."""
    summary: Rows = {}
    for path in (output / "summary.csv", *natural_sort(output.glob(".summary.*.csv"))):
        try:
            rows = utils.read_csv(path, COLUMNS) if os.path.lexists(path) else []
        except UserError as error:
            raise UserError(f"{error}; remove it or choose another --output") from None
        summary |= {row["input"]: row for row in rows if None not in row.values()}  # a kill may leave half a row
    return summary


def _merge(output: Path) -> Rows:
    """Take the rows that processes have written, also those of a killed call, into the summaries; all its rows."""

    def number(text: str) -> int | float | str | None:
        with contextlib.suppress(ValueError):  # some spreadsheets write a decimal comma
            return int(text) if text.isdecimal() else float(text.replace(",", "."))
        return text or None

    summary, parts = _read_rows(output), list(output.glob(".summary.*.csv"))
    if parts:
        rows = sorted(summary.values(), key=lambda row: utils.natural_key(row["name"]))
        columns = (*COLUMNS[:-1], *(name for name in MEASURES if any(row.get(name) for row in rows)), COLUMNS[-1])
        utils.write_csv(output / "summary.csv", columns, rows)
        numbers = NUMBERS + MEASURES
        shown = [{n: number(row.get(n, "")) if n in numbers else row[n] for n in columns} for row in rows]
        utils.write_json(output / "summary.json", shown)
    for part in parts:
        part.unlink()
    return summary
