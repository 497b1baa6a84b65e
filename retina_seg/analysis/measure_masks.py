"""Folders of vessel masks -> a table of measures (`measure`), and how well two folders agree on each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from retina_seg.analysis.measure import measure
from retina_seg.images import IMAGE_SUFFIXES, load_mask, read_mask
from retina_seg.inference.batch import DONE, MEASURES, check_pixel_size, find_images
from retina_seg.sets.names import match_names
from retina_seg.utils import UserError, create_dir, read_csv, user_path, write_csv

T = TypeVar("T")
FIRST = ("name", "input", "status", "remark", "width", "height")  # columns before the measures
DISC = ("name", "x", "y", "diameter")
AGREEMENT = ("measure", "n", "mean", "bias", "lower", "upper", "icc")
OURS = "_vessels"  # the end of the names that predict writes
WHOLE = "no field of view given: the whole frame"


def measure_masks(
    masks: Sequence[str | Path],
    output: str | Path,
    pixel_size: float | None = None,
    discs: str | Path | None = None,
    fov: str | Path | None = None,
    against: str | Path | None = None,
    progress: bool = True,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure masks into the table `output`, a row a mask: `FIRST`, then the measures. Returns its rows, and the agreement's.

    Args:
        masks: files, or folders with all below them; of a folder with predict's `*_vessels.png` only these.
        pixel_size: micrometres a pixel, of all masks.
        discs: table of optic discs, with the columns `DISC` in pixels.
        fov: folder of fields of view; else `<name>_fov.png` beside a mask, else the whole frame.
        against: folder of other masks of the same images, measured in the same fields of view. Their rows follow in the table,
            and `<output>_agreement.csv` has a row for each measure (`agreement`).

    Files belong together by their names (`names.match_names`). "status" is `DONE`, or what is wrong with the mask.

    Raises `UserError`: no masks; a bad option, table or folder; nothing in `fov`, `discs` or `against` fits the masks.
    """
    output = user_path(output)
    if output.suffix.lower() != ".csv":
        raise UserError(f"--output {output}: the table's name must end in .csv")
    check_pixel_size(pixel_size)
    paths = _find_masks(masks)
    places = {} if discs is None else _of_images(paths, _read_discs(discs), discs)
    beside = {name: path.with_name(path.stem.removesuffix(OURS) + "_fov.png") for name, path in paths.items()}
    fields = {name: path for name, path in beside.items() if path.is_file()}
    if fov is not None:
        fields = _of_images(paths, _find_masks([fov]), fov)
    others = {} if against is None else _of_images(paths, _find_masks([against]), against)

    jobs = [*paths.items(), *others.items()]
    rows = []
    for name, path in tqdm(jobs, "measuring", unit="mask", disable=not progress):
        row = {"name": name, "input": str(path), "status": DONE}
        try:
            if fov is not None and name not in fields:
                raise UserError(f"no field of view in {fov} has its name")
            row |= _measure_file(path, fields.get(name), pixel_size, places.get(name))
            if discs is not None and name not in places:
                row["remark"] = "; ".join(filter(None, (row["remark"], "no optic disc given")))
        except UserError as error:
            row["status"] = str(error).removeprefix(f"{path}: ")
        rows.append(row)
    columns = dict.fromkeys([*FIRST, *(column for row in sorted(rows, key=len, reverse=True) for column in row)])
    table = agreement_table(rows[: len(paths)], rows[len(paths) :], list(columns)[len(FIRST) :]) if others else []
    create_dir(output.parent)
    write_csv(output, list(columns), rows)
    if others:
        write_csv(output.with_name(f"{output.stem}_agreement.csv"), AGREEMENT, table)
    return rows, table


def _find_masks(inputs: Sequence[str | Path]) -> dict[str, Path]:
    """The masks among `inputs`, by their place there without its ending."""
    found: dict[str, Path] = {}
    for path, place in find_images(inputs, Path(), {})[0].values():
        name = place.with_suffix("").as_posix()
        if found.setdefault(name, path) != path:
            raise UserError(f"{path} and {found[name]}: two masks of one name; rename or remove one")
    ours = {name.removesuffix(OURS): path for name, path in found.items() if name.endswith(OURS)}
    return ours or found


def _of_images(images: dict[str, Any], items: dict[str, T], source: str | Path) -> dict[str, T]:
    """`items` by the names of `images` that they belong to."""
    both = match_names([*images], [*items]) or {image: item for item, image in match_names([*items], [*images]).items()}
    if not both:
        raise UserError(f"{source}: no name in it fits a mask's, such as {next(iter(images))}; rename the files")
    return {image: items[item] for image, item in both.items()}


def _read_discs(table: str | Path) -> dict[str, tuple[float, ...]]:
    discs = {}
    for row in read_csv(user_path(table), DISC):
        name = str(row["name"])
        name = name[: name.rindex(".")] if name.lower().endswith(IMAGE_SUFFIXES) else name
        try:
            discs[name] = tuple(float(row[column]) for column in DISC[1:])
        except (TypeError, ValueError):
            raise UserError(
                f"{table}: the optic disc of {name} has no numbers; give x, y and diameter in pixels"
            ) from None
    return discs


def _measure_file(path: Path, field: Path | None, pixel_size: float | None, disc: Any) -> dict[str, Any]:
    """The cells of the mask at `path` after its name and status. Raises `UserError`: it cannot be measured."""
    grey, remark = load_mask(path)
    lit, between = np.count_nonzero(grey > 32), np.count_nonzero((grey > 32) & (grey < 224))
    if between > 0.7 * lit > 0:
        raise UserError("is no mask of black and white; save vessels as 255, all else as 0")
    fov = np.ones(grey.shape, bool) if field is None else read_mask(field) > 127
    if fov.shape != grey.shape:
        raise UserError(f"differs in size from its field of view {field}")
    if disc is not None and not (
        0 <= disc[0] < grey.shape[1] and 0 <= disc[1] < grey.shape[0] and 0 < disc[2] < min(grey.shape)
    ):
        raise UserError("its optic disc does not lie in the image: {:g}, {:g}, diameter {:g}".format(*disc))
    vessels = grey > 127
    share = vessels[fov].mean() if fov.any() else 0
    if share > 0.5:
        raise UserError(f"calls {100 * share:.0f} % vessel; is it inverted? If so, invert it")
    remarks = [remark, "has grey levels: vessel is above 127" * bool(between > 0.2 * lit), WHOLE * (field is None)]
    remarks += ["the field of view is empty" * (not fov.any()), "no vessel" * bool(fov.any() and share == 0)]
    row = {"remark": "; ".join(filter(None, remarks)), "width": grey.shape[1], "height": grey.shape[0]}
    return row | measure(vessels, fov, pixel_size, disc)


def agreement_table(rows: list[dict], others: list[dict], measures: Sequence[str]) -> list[dict[str, Any]]:
    """`agreement` of `rows` with `others`, joined by name, for each of `measures` that is defined in both of two images."""
    by_name = {row["name"]: row for row in others}
    pairs = [(row, by_name[row["name"]]) for row in rows if row["name"] in by_name]
    table = []
    for measure_name in measures:
        values = [(a.get(measure_name), b.get(measure_name)) for a, b in pairs]
        known = [pair for pair in values if None not in pair]
        table.append({"measure": measure_name, **agreement(np.array(known, float).reshape(-1, 2))})
    return table


def agreement_lines(table: list[dict[str, Any]]) -> list[str]:
    """The agreement on `MEASURES` in the whole field, for people."""
    lines = [f"{'measure':<28}" + "".join(f"{name:>11}" for name in AGREEMENT[1:])]
    for row in table:
        if row["measure"] in MEASURES:
            numbers = "".join(f"{row[name]:>11.4g}" if name in row else f"{'-':>11}" for name in AGREEMENT[1:])
            lines.append(f"{row['measure']:<28}{numbers}")
    return lines if table else []


def agreement(values: np.ndarray) -> dict[str, float]:
    """How well two methods agree that measured the same n images: `values` (n, 2) float, the second is the reference.

    "mean": of the reference. "bias": mean of first minus second; "lower", "upper": limits of agreement, bias -/+ 1.96
    standard deviations of the differences (Bland and Altman 1986). "icc": `icc`. NaN for fewer than two images.
    """
    n = len(values)
    if n < 2:
        return {"n": n}
    differences = values[:, 0] - values[:, 1]
    bias, spread = differences.mean(), 1.96 * differences.std(ddof=1)
    numbers = {
        "mean": values[:, 1].mean(),
        "bias": bias,
        "lower": bias - spread,
        "upper": bias + spread,
        "icc": icc(values),
    }
    return {"n": n, **{name: float(number) for name, number in numbers.items()}}


def icc(values: np.ndarray) -> float:
    """ICC(2,1) of `values` (n subjects, k raters): two-way random effects, absolute agreement, one rater.

    Shrout and Fleiss (1979); ICC(A,1) of McGraw and Wong (1996). At most 1; NaN where nothing differs.
    """
    n, k = values.shape
    mean = values.mean()
    of_subjects = k * np.sum((values.mean(axis=1) - mean) ** 2)
    of_raters = n * np.sum((values.mean(axis=0) - mean) ** 2)
    rest = np.sum((values - mean) ** 2) - of_subjects - of_raters
    subjects, raters, error = of_subjects / (n - 1), of_raters / (k - 1), rest / ((n - 1) * (k - 1))
    whole = subjects + (k - 1) * error + k * (raters - error) / n
    return float((subjects - error) / whole) if whole > 0 else math.nan
