"""One page to look at: the images of a summary with their vessels, measures and remarks, sortable and filterable."""

from __future__ import annotations

import base64
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from retina_seg import __version__
from retina_seg.fov import fov_box
from retina_seg.utils import atomic_write
from retina_seg.visualize import shrink, vessel_overlay

SIDE = 560  # pixels, of each half of a preview
EMBEDDED = 200  # images; the previews of more are not in the page but beside it
HIDDEN = ("input", "size", "mtime_ns", "made_with", "skipped", "seconds")
FIRST = ("name", "gradable", "remark", "status")  # columns
NO_MEASURES = ("width", "height")
PACKAGES = ("torch", "openvino", "numpy", "opencv-python-headless", "scikit-image")


def preview(image: np.ndarray, fov: np.ndarray, vessels: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8 RGB, and beside it with outlines of `vessels`, both cut to `fov`; (H, W) bool both.

    Returns (h, 2 w, 3) uint8, h and w at most `SIDE`.
    """
    top, left, bottom, right = fov_box(fov)
    image, mask = image[top:bottom, left:right], vessels[top:bottom, left:right] * np.uint8(255)
    width = max(1, SIDE * image.shape[1] // max(image.shape[:2]))
    image, mask = shrink(image, width), shrink(mask, width)
    return np.hstack([image, vessel_overlay(image, mask > 127)])


def write_report(rows: Sequence[Mapping[str, Any]], output: str | Path, previews: Mapping[str, Path]) -> Path:
    """Write `output`/report.html, which needs no network and, up to `EMBEDDED` images, no other file.

    Args:
        rows: of the summary, one an image.
        previews: the file of an image's preview, by the row's "name"; one without has no picture.

    Raises `UserError`: the folder may not be written to, or the disk is full.
    """
    output = Path(output)

    def source(name: str) -> str | None:
        if name not in previews or not previews[name].is_file():
            return None
        if len(rows) > EMBEDDED:
            return quote(os.fsencode(previews[name].relative_to(output)))  # a name may be no valid text
        return "data:image/jpeg;base64," + base64.b64encode(previews[name].read_bytes()).decode()

    names = [name for name in dict.fromkeys((*FIRST, *(name for row in rows for name in row))) if name not in HIDDEN]
    shown = [{name: row.get(name) for name in names} | {"preview": source(row["name"])} for row in rows]
    columns = [
        {
            "name": name,
            "title": name.replace("_", " "),
            "number": _is_number(shown, name),
            "chart": name not in NO_MEASURES,
        }
        for name in names
    ]
    grades = Counter(row["gradable"] for row in shown if row.get("gradable"))
    counts = f"{len(rows)} images" + "".join(f", {grades[grade]} gradable: {grade}" for grade in grades)
    made_with = "; ".join(sorted({str(row["made_with"]) for row in rows}))
    settings = {"made with": made_with, "retina_seg": __version__, "Python": platform.python_version(), **_versions()}
    settings["processor"] = f"{platform.machine()} {platform.processor()}"
    data = {"rows": shown, "columns": columns, "counts": counts, "settings": settings}
    template = files("retina_seg.analysis").joinpath("report.html").read_text(encoding="utf-8")
    # in a page, "</script>" would end the data
    page = template.replace("DATA", json.dumps(data, ensure_ascii=True).replace("<", "\\u003c"))
    with atomic_write(path := output / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _is_number(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether the column `name` has numbers, and only numbers and empty cells."""
    values = [row[name] for row in rows if row[name] is not None]
    return bool(values) and all(isinstance(value, (int, float)) for value in values)


def _versions() -> dict[str, str]:
    """The installed `PACKAGES` and their versions."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra
            continue
    return found
