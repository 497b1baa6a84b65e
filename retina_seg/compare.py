"""Several runs side by side: one table, one picture, and the differences photo by photo."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retina_seg import visualize
from retina_seg.metrics import SCORES, bootstrap
from retina_seg.utils import UserError, create_dir, read_json, write_text


def read_metrics(run: str | Path) -> dict[str, Any]:
    """What `metrics.json` of the folder `run` (or the file itself) holds.

    Raises:
        UserError: there is none, or it is another thing.
    """
    path = Path(run) / "metrics.json" if Path(run).is_dir() else Path(run)
    value = read_json(path)
    if not _holds_scores(value):
        raise UserError(f"{path}: holds no scores; write them with retina-seg test")
    return value


def _holds_scores(value: dict[str, Any]) -> bool:
    """Whether what is read from `value` here and in the picture is there, and numbers (None: undefined)."""
    try:
        value["protocol"].get("size")
        numbers = [image[region]["f1"] for image in value["images"] for region in visualize.REGION_NAMES]
        for region in visualize.REGION_NAMES:
            numbers += [value[region][what].get(name) for what in ("mean", "std", "pooled") for name in SCORES]
            numbers += [*value[region]["ci95"]["f1"], value[region]["mean"]["f1"]]
        named = {image["name"] for image in value["images"]}
    except (KeyError, TypeError, AttributeError):
        return False
    return bool(named) and all(number is None or isinstance(number, (int, float)) for number in numbers)


def paired_differences(first: dict[str, Any], other: dict[str, Any], region: str, score: str) -> dict[str, Any] | None:
    """Mean difference (other - first) of `score` over the photos that both runs scored, with its 95 % interval.

    Returns:
        {"photos", "mean", "ci95", "better"} (how many photos gained); None where protocols, sets or photos differ, since
        a difference would then say nothing.
    """
    if any(first["protocol"].get(key) != other["protocol"].get(key) for key in ("size", "part")):
        return None
    a, b = ({image["name"]: image[region][score] for image in run["images"]} for run in (first, other))
    if a.keys() != b.keys():
        return None
    differences = [b[name] - a[name] for name in a if a[name] is not None and b[name] is not None]
    if not differences:
        return None
    return {
        "photos": len(differences),
        "mean": sum(differences) / len(differences),
        "ci95": bootstrap(differences),
        "better": sum(difference > 0 for difference in differences),
    }


def compare(runs: Sequence[str | Path], output: str | Path) -> list[str]:
    """Compare the tested runs in the folders `runs`; the first is what the others are held against.

    Writes `comparison.csv` (a row a run, region and statistic) and `comparison.png` to `output`.

    Returns:
        The table as lines, for people.

    Raises:
        UserError: fewer than two runs, or one without scores.
    """
    if len(runs) < 2:
        raise UserError("compare needs two runs at least: retina-seg compare RUN RUN")
    values = [read_metrics(run) for run in runs]
    titles = _titles(runs)
    output = create_dir(output)
    shown = ("f1", "auc", "mcc", "accuracy", "recall", "precision", "cldice")
    width = max(len(title) for title in titles)
    lines = []
    for region, heading in visualize.REGION_NAMES.items():
        lines.append(
            f"{heading + ', mean over photos':<{max(width, 30) + 10}}" + "".join(f"{name:>11}" for name in shown)
        )
        for title, value in zip(titles, values, strict=True):
            size = f"({value['protocol'].get('size')})"
            numbers = "".join(f"{_number(value[region]['mean'].get(name)):>11}" for name in shown)
            lines.append(f"{title + ' ' + size:<{max(width, 30) + 10}}" + numbers)
        for title, value in zip(titles[1:], values[1:], strict=True):
            pair = paired_differences(values[0], value, region, "f1")
            if pair is None:
                lines.append(f"  {title} - {titles[0]}: scored on other photos or sizes, no difference taken")
                continue
            low, high = pair["ci95"]
            lines.append(
                f"  {title} - {titles[0]}: F1 {pair['mean']:+.4f} (95 % interval {low:+.4f} to {high:+.4f}), "
                f"better on {pair['better']} of {pair['photos']} photos"
            )
        lines.append("")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "protocol", "region", "statistic", *SCORES])
    for title, value in zip(titles, values, strict=True):
        for region in visualize.REGION_NAMES:
            for statistic in ("mean", "std", "pooled"):
                scores = [value[region][statistic].get(name) for name in SCORES]
                row = ["" if score is None else f"{score:.6f}" for score in scores]
                writer.writerow([title, value["protocol"].get("size"), region, statistic, *row])
    write_text(output / "comparison.csv", text.getvalue())
    visualize.save_figure(output / "comparison.png", visualize.comparison(titles, values))
    return lines[:-1]


def _titles(runs: Sequence[str | Path]) -> list[str]:
    """The runs' folder names; the whole paths where two are called the same."""
    names = [Path(run).name if Path(run).name != "native" else "/".join(Path(run).parts[-2:]) for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
