"""One page to look at: the images of a summary with their vessels, measures and remarks, sortable and filterable."""

import base64
import json
import os
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from retina_seg.inference.batch import SAVES
from retina_seg.utils import read_text, user_path, write_text

EMBEDDED = 200  # images; the previews of more are not in the page but beside it
HIDDEN = ("input", "size", "mtime_ns", "made_with", "seconds")
FIRST = ("name", "gradable", "remark", "status")  # columns
NO_MEASURES = ("width", "height")


def write_report(output: str | Path, settings: Mapping[str, Any]) -> Path:
    """Write `output`/report.html on all images in the summary of `predict`; with `--save report` each has a preview.

    The page needs no network and, up to `EMBEDDED` images, no other file. At its end stand `settings`, name -> value.

    Raises `UserError`: no summary in `output`, or it may not be written to.
    """
    output = user_path(output)
    rows = json.loads(read_text(output / "summary.json"))

    def source(name: str) -> str | None:
        path = output / f"{name}_{SAVES['report']}"
        if not path.is_file():
            return None
        if len(rows) > EMBEDDED:
            return quote(os.fsencode(path.relative_to(output)))  # a name may be no valid text
        return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()

    names = [name for name in dict.fromkeys((*FIRST, *(name for row in rows for name in row))) if name not in HIDDEN]
    shown = [{name: row.get(name) for name in names} | {"preview": source(row["name"])} for row in rows]
    columns = []
    for name in names:
        numbers = [isinstance(row[name], (int, float)) for row in shown if row[name] is not None]
        column = {"name": name, "title": name.replace("_", " "), "number": bool(numbers) and all(numbers)}
        columns.append(column | {"chart": name not in NO_MEASURES})
    grades = Counter(row["gradable"] for row in shown if row.get("gradable"))
    counts = f"{len(rows)} images" + "".join(f", {grades[grade]} gradable: {grade}" for grade in grades)
    settings = {"made with": "; ".join(sorted({str(row["made_with"]) for row in rows})), **settings}
    data = {"rows": shown, "columns": columns, "counts": counts, "settings": settings}
    template = files("retina_seg.analysis").joinpath("report.html").read_text(encoding="utf-8")
    # in a page, "</script>" would end the data
    page = template.replace("DATA", json.dumps(data, ensure_ascii=True).replace("<", "\\u003c"))
    write_text(path := output / "report.html", page)
    return path
