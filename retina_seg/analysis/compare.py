"""Several tested runs side by side: a table, a figure, and the differences image by image."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retina_seg import visualize
from retina_seg.metrics import SCORES, bootstrap
from retina_seg.utils import UserError, create_dir, format_number, read_json, user_path, write_csv

SHOWN = ("f1", "auc", "mcc", "accuracy", "recall", "precision", "cldice")


def read_metrics(run: str | Path) -> dict[str, Any]:
    """What `metrics.json` of the folder `run` (or the file itself) holds. Raises `UserError`: no scores."""
    path = user_path(run) / "metrics.json" if user_path(run).is_dir() else user_path(run)
    value = read_json(path) if path.exists() else {}
    statistics = ("mean", "std", "pooled", "ci95")
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # none, or those of another version
        scores = [value[region][what] for region in visualize.REGION_NAMES for what in statistics]
        scores += [image[region] for region in visualize.REGION_NAMES for image in value["images"]]
        if value["images"] and value["protocol"].keys() and all("f1" in one for one in scores):
            return value
    raise UserError(f"{path}: holds no scores; write them with retina-seg test")


def paired_differences(first: dict[str, Any], other: dict[str, Any], region: str, score: str) -> dict[str, Any] | None:
    """Difference (other - first) of `score`: "mean" over "images", its "ci95", and how many of them are "better".

    None where sizes, parts or images differ, since a difference would then say nothing.
    """
    if any(first["protocol"].get(key) != other["protocol"].get(key) for key in ("size", "part")):
        return None
    a, b = ({image["name"]: image[region][score] for image in run["images"]} for run in (first, other))
    differences = [b[name] - a[name] for name in a if name in b and a[name] is not None and b[name] is not None]
    if a.keys() != b.keys() or not differences:
        return None
    mean, better = sum(differences) / len(differences), sum(difference > 0 for difference in differences)
    return {"images": len(differences), "mean": mean, "ci95": bootstrap(differences), "better": better}


def compare(runs: Sequence[str | Path], output: str | Path) -> list[str]:
    """Compare the tested runs in the folders `runs` with the first; returns lines for people.

    Writes `comparison.csv` (a row a run, region and statistic) and `comparison.png` to `output`. Raises `UserError`: fewer
    than two runs, or one without scores.
    """
    if len(runs) < 2:
        raise UserError("compare needs two runs at least: retina-seg compare RUN RUN")
    values = [read_metrics(run) for run in runs]
    titles = [Path(run).name if Path(run).name != "native" else "/".join(Path(run).parts[-2:]) for run in runs]
    titles = titles if len(set(titles)) == len(titles) else list(map(str, runs))
    output, width = create_dir(output), max(30, *map(len, titles)) + 10
    lines, rows = [], []
    for region, heading in visualize.REGION_NAMES.items():
        lines.append(f"{heading + ', mean over images':<{width}}" + "".join(f"{name:>11}" for name in SHOWN))
        for title, value in zip(titles, values, strict=True):
            numbers = "".join(f"{format_number(value[region]['mean'].get(name)):>11}" for name in SHOWN)
            size = value["protocol"].get("size")
            lines.append(f"{f'{title} ({size})':<{width}}{numbers}")
            run = {"run": title, "protocol": size, "region": region}
            rows += [{**run, "statistic": what, **value[region][what]} for what in ("mean", "std", "pooled")]
        for title, value in zip(titles[1:], values[1:], strict=True):
            pair = paired_differences(values[0], value, region, "f1")
            text = "scored on other images or sizes, no difference taken"
            if pair is not None:
                interval, better = "{:+.4f} to {:+.4f}".format(*pair["ci95"]), f"{pair['better']} of {pair['images']}"
                text = f"F1 {pair['mean']:+.4f} (95 % interval {interval}), better on {better} images"
            lines.append(f"  {title} - {titles[0]}: {text}")
        lines.append("")
    write_csv(output / "comparison.csv", ["run", "protocol", "region", "statistic", *SCORES], rows)
    visualize.save_figure(output / "comparison.png", visualize.comparison(titles, values))
    remarks = [(value.get("model") or {}).get("unfinished") for value in values]
    return lines[:-1] + [f"note: {title}: {what}" for title, what in zip(titles, remarks, strict=True) if what]
