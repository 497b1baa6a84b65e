"""Folders of vessel masks -> a table of measures (`measure`), and of the agreement of two folders (`agreement`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from retina_seg.analysis.agreement import AGREEMENT, agreement_table
from retina_seg.analysis.measure import measure
from retina_seg.images import IMAGE_SUFFIXES, load_mask, read_mask
from retina_seg.inference.batch import DONE, check_pixel_size, find_images
from retina_seg.sets.files import match_names
from retina_seg.utils import UserError, create_dir, read_csv, user_path, write_csv

T = TypeVar("T")
FIRST = ("name", "input", "status", "remark", "width", "height")  # columns before the measures
DISC = ("name", "x", "y", "diameter")
VESSELS, FOV = "_vessels", "_fov"  # ends of the names that predict writes
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
            and `<output>_agreement.csv` has a row for each measure (`agreement.agreement`).

    Files belong together by their names (`sets.files.match_names`). "status" is `DONE`, or what is wrong with the mask.

    Raises `UserError`: no masks; a bad option, table or folder; nothing in `fov`, `discs` or `against` fits the masks.
    """
    output = user_path(output)
    if output.suffix.lower() != ".csv":
        raise UserError(f"--output {output}: the table's name must end in .csv")
    check_pixel_size(pixel_size)
    paths = _find(masks, output, VESSELS)
    places = {} if discs is None else _of_images(paths, _read_discs(discs), discs)
    beside = {name: path.with_name(path.stem.removesuffix(VESSELS) + FOV + ".png") for name, path in paths.items()}
    fields = {name: path for name, path in beside.items() if path.is_file()}
    if fov is not None:
        fields = _of_images(paths, _find([fov], output, FOV), fov)
    found = {} if against is None else _find([against], output, VESSELS)
    others = {} if against is None else _of_images(paths, found, against)

    jobs, rows, sizes = [*paths.items(), *others.items()], [], dict[str, tuple[int, int]]()
    for name, path in tqdm(jobs, "measuring", unit="mask", disable=not progress):
        row: dict[str, Any] = {"name": name, "input": str(path), "status": DONE}
        try:
            if fov is not None and name not in fields:
                raise UserError(f"no field of view in {fov} has its name")
            cells = _measure_file(path, fields.get(name), pixel_size, places.get(name))
            size = cells["width"], cells["height"]
            if size != sizes.setdefault(name, size):
                raise UserError("is {}x{} but {} is {}x{}".format(*size, paths[name], *sizes[name]))
            lacks = ["no optic disc given" * (discs is not None and name not in places)]
            lacks += [f"no mask of its name in {against}" * (against is not None and name not in others)]
            row |= cells | {"remark": "; ".join(filter(None, (cells["remark"], *lacks)))}
        except UserError as error:
            row["status"] = str(error).removeprefix(f"{path}: ")
        rows.append(row)
    columns = list(dict.fromkeys([*FIRST, *(column for row in sorted(rows, key=len, reverse=True) for column in row)]))
    table = agreement_table(rows[: len(paths)], rows[len(paths) :], columns[len(FIRST) :]) if others else []
    alone = [(name, path) for name, path in found.items() if path not in others.values()]
    rows += [{"name": name, "input": str(path), "status": "has no mask to compare with"} for name, path in alone]
    create_dir(output.parent)
    write_csv(output, columns, rows)
    if others:
        write_csv(output.with_name(f"{output.stem}_agreement.csv"), AGREEMENT, table)
    return rows, table


def _find(inputs: Sequence[str | Path], output: Path, end: str) -> dict[str, Path]:
    """The files among `inputs` whose names have this end, by their place there without it; without such, all masks."""
    found: dict[str, Path] = {}
    for path, place in find_images(inputs, output, {})[0].values():
        name = place.with_suffix("").as_posix()
        if found.setdefault(name, path) != path:
            raise UserError(f"{path} and {found[name]}: two masks of one name; rename or remove one")
    ours = {name.removesuffix(end): path for name, path in found.items() if name.endswith(end)}
    return ours or {name: path for name, path in found.items() if not name.endswith(FOV)}


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
            remedy = "give x, y and diameter in pixels"
            raise UserError(f"{table}: the optic disc of {name} has no numbers; {remedy}") from None
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
    height, width = grey.shape
    if disc is not None and not (0 <= disc[0] < width and 0 <= disc[1] < height and 0 < disc[2] < min(grey.shape)):
        raise UserError("its optic disc does not lie in the image: {:g}, {:g}, diameter {:g}".format(*disc))
    vessels = grey > 127
    share = vessels[fov].mean() if fov.any() else 0
    if share > 0.5:
        raise UserError(f"calls {100 * share:.0f} % vessel; is it inverted? If so, invert it")
    remarks = [remark, "has grey levels: vessel is above 127" * bool(between > 0.2 * lit), WHOLE * (field is None)]
    remarks += ["the field of view is empty" * (not fov.any()), "no vessel" * bool(fov.any() and share == 0)]
    row = {"remark": "; ".join(filter(None, remarks)), "width": width, "height": height}
    return row | measure(vessels, fov, pixel_size, disc)
