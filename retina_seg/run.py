"""The main job in one call: photos (synthetic ones where there are none yet), training, test, the run's folder."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

from retina_seg import synthetic
from retina_seg.data import find_set, is_empty, list_pairs
from retina_seg.train import PRESETS, fit
from retina_seg.utils import UserError, create_dir

SYNTHETIC_SET = Path("results/synthetic-data")


def choose_data(
    data: str | Path, fallback: str | Path = SYNTHETIC_SET, progress: bool = True, **size: Any
) -> tuple[Path, bool]:
    """The set to work on: `data`, or synthetic photos in `fallback` where `data` holds no picture yet.

    Args:
        size: of the synthetic set, as `synthetic.write_set` takes it (train, test, size, seed); for a set that
            `fallback` does not hold already.

    Returns:
        The folder in the Data1 layout, and whether it is the synthetic one.

    Raises:
        UserError: `data` holds pictures, but not in the layout; or `fallback` cannot be written.
    """
    if not is_empty(data):
        return find_set(data), False
    fallback = Path(fallback)
    if not (fallback / "photos.csv").is_file():
        if fallback.exists() and any(fallback.iterdir()):
            raise UserError(f"{fallback}: is no whole synthetic set; remove it or choose another folder")
        # drawn beside and renamed, so that a broken-off drawing is never taken for a set
        folder = create_dir(fallback.parent) / f".{fallback.name}.{uuid.uuid4().hex[:8]}.partial"
        try:
            synthetic.write_set(folder, progress=progress, **size)
            if fallback.exists():
                fallback.rmdir()
            folder.rename(fallback)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return find_set(fallback), True


def free_folder(path: str | Path) -> Path:
    """`path`, or the first of path-2, path-3, … that holds no run yet."""
    path = Path(path)
    taken, number = path, 1
    while (taken / "config.json").exists() or (taken / "checkpoint.pth").exists():
        number += 1
        taken = path.with_name(f"{path.name}-{number}")
    return taken


def run(
    data: str | Path = "Data1",
    output: str | Path = "results/run",
    preset: str | None = None,
    progress: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Train and test on the set at `data`, or on synthetic photos where it is empty, and say so.

    Args:
        output: the run's folder; where it holds a run already, the next free name beside it is taken.
        preset: a recipe of `train.PRESETS`; None: "fast" on real photos, "quick" on synthetic ones.
        changes: to the recipe, as `TrainConfig` takes them.

    Returns:
        What metrics.json holds, with "folder" the run's folder and "synthetic" whether the photos were.

    Raises:
        UserError: as `choose_data`, `train.fit` and `test.test`.
    """
    from retina_seg.test import test

    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    folder, drawn = choose_data(data, progress=progress)
    if drawn:
        print(
            f"{data} holds no photos yet: using synthetic ones in {folder} (Data1/README.md says how to get real ones)"
        )
    counts = {part: len(list_pairs(folder, part)) for part in ("train", "test")}
    print(f"{folder}: {counts['train']} training and {counts['test']} test photos")
    config = PRESETS[preset or ("quick" if drawn else "fast")](
        data=str(folder), output=str(free_folder(output)), **changes
    )
    done = fit(config, progress=progress)
    value = test(done.folder, folder, done.folder, progress=progress)
    return {**value, "folder": str(done.folder), "synthetic": drawn}
