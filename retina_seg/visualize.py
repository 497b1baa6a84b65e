"""The drawing room: strips, error overlays, curves, sheets, tables of lines. Arrays in, pictures out; nothing is scored.

Colours of an error overlay: right (true positive) green, missed (false negative) blue, invented (false positive) red.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from retina_seg.utils import whole_file

REGION_NAMES = {"frame": "whole frame", "fov": "field of view"}
RIGHT, MISSED, INVENTED = (0, 170, 80), (40, 110, 255), (235, 50, 50)


def mask_parse(mask: np.ndarray) -> np.ndarray:
    """The original's: (H, W) -> (H, W, 3), the grey value in every channel."""
    return np.repeat(mask[:, :, None], 3, axis=2)


def strip(photo: np.ndarray, mask: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The original's strip: photo | 10 px of grey 128 | mask | 10 px of grey 128 | prediction.

    Args:
        photo: (H, W, 3) uint8 RGB. mask, prediction: (H, W) uint8, 0 to 255.

    Returns:
        (H, 3 W + 20, 3) uint8 RGB.
    """
    line = np.full((photo.shape[0], 10, 3), 128, np.uint8)
    return np.concatenate([photo, line, mask_parse(mask), line, mask_parse(prediction)], axis=1)


def error_overlay(
    photo: np.ndarray, mask: np.ndarray, prediction: np.ndarray, fov: np.ndarray | None = None
) -> np.ndarray:
    """Right, missed and invented vessels in colours over the photo, greyed.

    Args:
        photo: (H, W, 3) uint8 RGB. mask, prediction, fov: (H, W) bool; outside `fov` nothing is coloured.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    inside = np.ones(mask.shape, bool) if fov is None else fov
    picture = mask_parse(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY) // 2)
    for chosen, colour in (
        (mask & prediction, RIGHT),
        (mask & ~prediction, MISSED),
        (~mask & prediction, INVENTED),
    ):
        picture[chosen & inside] = colour
    return picture


def vessel_overlay(photo: np.ndarray, vessels: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """The photo (H, W, 3) uint8 RGB with `vessels` (H, W) bool tinted green; the same shape."""
    picture = photo.copy()
    tint = np.array((0, 255, 120), np.float32)
    picture[vessels] = (photo[vessels] * (1 - opacity) + tint * opacity).astype(np.uint8)
    return picture


def shrink(picture: np.ndarray, width: int) -> np.ndarray:
    """The picture (H, W[, 3]) uint8 scaled down to `width` pixels, its shape kept; as it is where it is narrower."""
    if picture.shape[1] <= width:
        return picture
    return cv2.resize(
        picture, (width, max(1, round(picture.shape[0] * width / picture.shape[1]))), interpolation=cv2.INTER_AREA
    )


def contact_sheet(
    pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int = 4, width: int = 320
) -> np.ndarray:
    """Pictures (H, W, 3) uint8 in a grid, each scaled to `width` pixels with its caption above: (H', W', 3) uint8."""
    import torch
    from torchvision.utils import make_grid

    tiles = []
    height = max(shrink(picture, width).shape[0] for picture in pictures)
    for picture, caption in zip(pictures, captions, strict=True):
        small = shrink(picture, width)
        tile = np.full((height + 24, width, 3), 255, np.uint8)
        tile[24 : 24 + small.shape[0], : small.shape[1]] = small
        cv2.putText(tile, short(caption), (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.48, (0, 0, 0), 1, cv2.LINE_AA)
        tiles.append(torch.from_numpy(tile).permute(2, 0, 1))
    grid = make_grid(tiles, nrow=min(columns, len(tiles)), padding=6, pad_value=255)
    return np.ascontiguousarray(grid.permute(1, 2, 0).numpy())


# -------------------------------------------------------------------------------------------------------------- figures


def save_figure(path: str | Path, figure: Any) -> None:
    """Write a matplotlib figure to `path` (PNG), whole or not at all."""
    with whole_file(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a run may be called in any alphabet
        figure.savefig(temporary, dpi=110, bbox_inches="tight")


def new_figure(columns: int = 1, width: float = 5.0, height: float = 3.6) -> tuple[Any, np.ndarray]:
    """A figure with `columns` axes in a row, without matplotlib's global state: (figure, array of axes)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, columns))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curves(history: Sequence[dict[str, float]], best: int | None = None) -> Any:
    """Losses, and F1 where it was measured, by epoch, the kept epoch marked: a matplotlib figure."""
    epochs = [row["epoch"] for row in history]
    validated = any(math.isfinite(row["validation_loss"]) for row in history)
    figure, axes = new_figure(2 if validated else 1)
    marker = "o" if len(epochs) < 30 else None
    axes[0].plot(epochs, [row["train_loss"] for row in history], marker=marker, ms=3, label="training")
    if validated:
        axes[0].plot(epochs, [row["validation_loss"] for row in history], marker=marker, ms=3, label="validation")
        axes[1].plot(epochs, [row["validation_f1"] for row in history], marker=marker, ms=3, color="C1")
        axes[1].set(xlabel="epoch", ylabel="F1 on the validation photos", ylim=(0, 1))
    axes[0].set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    for axis in axes if best else ():
        axis.axvline(best, color="0.5", lw=1, ls="--", label="kept")
    axes[0].legend(frameon=False)
    return figure


def progress_chart(
    histories: dict[str, Sequence[dict[str, float]]], goal: float | None = None, lowest: float = 0.0
) -> Any:
    """F1 on the validation photos by minutes of training, a line a run: a matplotlib figure.

    Args:
        histories: a run's name -> its rows, as in history.csv.
        goal: an F1 to mark by a dashed line.
        lowest: where the axis of F1 begins; above 0 it ends at the highest F1.
    """
    figure, (axis,) = new_figure(width=6.4)
    for name, history in histories.items():
        minutes = np.cumsum([row["seconds"] for row in history]) / 60
        axis.plot(minutes, [row["validation_f1"] for row in history], marker="o", ms=3, label=name)
    if goal is not None:
        axis.axhline(goal, color="0.5", lw=1, ls="--", label=f"F1 {goal}")
    axis.set(
        xlabel="minutes", ylabel="F1 on the validation photos", xlim=(0, None), ylim=(lowest, None if lowest else 1)
    )
    axis.legend(frameon=False, loc="lower right")
    return figure


def threshold_chart(
    thresholds: np.ndarray, scores: dict[str, np.ndarray], marks: dict[str, float], title: str = ""
) -> Any:
    """Scores by threshold, a line a score, with the thresholds in `marks` (label -> threshold) upright: a matplotlib figure."""
    figure, (axis,) = new_figure(width=8.4)
    for name, values in scores.items():
        axis.plot(thresholds, values, label=name)
    for number, (label, place) in enumerate(marks.items()):
        axis.axvline(place, color="0.4", lw=1, ls=("--", ":")[number % 2], label=label)
    lowest = min(float(np.nanmin(values[20:80])) for values in scores.values())
    axis.set(
        xlabel="threshold", ylabel="mean over photos", xlim=(0, 1), ylim=(np.floor(lowest * 20) / 20, 1), title=title
    )
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def ranking_curves(rankings: dict[str, Any]) -> Any:
    """Pooled ROC and precision-recall curves, one line a region: a matplotlib figure.

    Args:
        rankings: region -> `metrics.RankingHistogram`.
    """
    figure, axes = new_figure(2, height=4.2)
    for region, ranking in rankings.items():
        found, invented = ranking.rates()
        if not found[-1] or not invented[-1]:
            continue
        # a few hundred points draw the same line as 65,537
        keep = np.unique(np.linspace(0, len(found) - 1, 2000).astype(int))
        tp, fp = found[keep], invented[keep]
        axes[0].plot(fp / fp[-1], tp / tp[-1], label=f"{REGION_NAMES[region]}, AUC {ranking.auc():.4f}")
        called = np.maximum(tp + fp, 1)
        shown = tp > 0
        score = ranking.average_precision()
        axes[1].plot(
            (tp / tp[-1])[shown], (tp / called)[shown], label=f"{REGION_NAMES[region]}, average precision {score:.4f}"
        )
    axes[0].set(xlabel="false positive rate", ylabel="recall", xlim=(0, 1), ylim=(0, 1.01), title="ROC, pixels pooled")
    axes[1].set(
        xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01), title="precision and recall, pixels pooled"
    )
    for axis, place in zip(axes, ("lower right", "lower left"), strict=True):
        if axis.lines:
            axis.legend(frameon=False, loc=place)
    return figure


def comparison(titles: Sequence[str], values: Sequence[dict[str, Any]]) -> Any:
    """F1 of each run, photo by photo and as mean with its 95 % interval, in both regions: a matplotlib figure.

    Args:
        titles: the runs' names. values: what their metrics.json hold.
    """
    figure, axes = new_figure(2, width=1.5 + 1.1 * len(titles), height=4.2)
    for axis, region, heading in zip(axes, *zip(*REGION_NAMES.items(), strict=True), strict=True):
        for place, value in enumerate(values):
            scores = np.array([image[region]["f1"] for image in value["images"]], float)
            # spread sideways by rank, so that no dot hides another
            offsets = np.linspace(-0.2, 0.2, len(scores))[np.argsort(np.argsort(scores))]
            axis.plot(place + offsets, scores, "o", ms=3.5, alpha=0.55, color=f"C{place}")
            mean, interval = value[region]["mean"]["f1"], value[region]["ci95"]["f1"]
            if mean is not None and None not in interval:
                error = [[mean - interval[0]], [interval[1] - mean]]
                axis.errorbar(place, mean, error, fmt="s", color="black", ms=5, capsize=5)
        axis.set_xticks(range(len(titles)), map(short, titles), rotation=20, ha="right", parse_math=False)
        axis.set(ylabel="F1", title=heading, xlim=(-0.6, len(titles) - 0.4))
    return figure


def short(title: str, length: int = 40) -> str:
    """A file's or folder's name as a picture can show it: printable, its middle left out where it is too long."""
    title = "".join(letter if letter.isprintable() else "?" for letter in title)
    return title if len(title) <= length else f"{title[: length // 2 - 3]}...{title[-(length // 2) :]}"


def save_curves(path: str | Path, history: Sequence[dict[str, float]], best: int | None = None) -> None:
    """Write `curves` to `path`."""
    save_figure(path, curves(history, best))


# -------------------------------------------------------------------------------------------------- figures for notebooks

SCREEN_DPI = 72  # of the figures that show pictures: a committed notebook has to stay small


def from_tensor(tensor: Any) -> np.ndarray:
    """What a data set gives, as a picture: (3, H, W) float BGR in [0, 1] -> (H, W, 3) uint8 RGB; (1, H, W) -> (H, W)."""
    values = np.rint(np.asarray(tensor) * 255).astype(np.uint8)
    return values[0] if len(values) == 1 else np.ascontiguousarray(values[::-1].transpose(1, 2, 0))


def gallery(
    pictures: Sequence[np.ndarray],
    titles: Sequence[str],
    columns: int = 4,
    width: int = 200,
    colours: bool = False,
) -> Any:
    """Pictures in rows with a title above each: a matplotlib figure.

    Args:
        pictures: (H, W, 3) uint8 RGB, or (H, W): uint8, bool, or float in [0, 1]; of about the same shape.
        titles: one a picture.
        width: of a picture on the screen, pixels.
        colours: whether a legend names the colours of `error_overlay`.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height = width * max(picture.shape[0] / picture.shape[1] for picture in pictures) + 24
    size = (columns * (width + 8), rows * (height + 8) + 30 * colours)
    figure = Figure(figsize=[side / SCREEN_DPI for side in size], dpi=SCREEN_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=4 / SCREEN_DPI, h_pad=4 / SCREEN_DPI, wspace=0, hspace=0)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (picture, title) in zip(axes, zip(pictures, titles, strict=True), strict=False):
        bright = 255 if picture.dtype == np.uint8 else 1
        axis.imshow(picture, cmap="gray", vmin=0, vmax=bright)
        axis.set_title(title, fontsize=11)
    if colours:
        named = {"right": RIGHT, "missed": MISSED, "invented": INVENTED}
        patches = [Patch(color=np.array(colour) / 255, label=name) for name, colour in named.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=12)
    return figure


def heat_maps(picture: np.ndarray, title: str, maps: dict[str, np.ndarray], width: int = 190) -> Any:
    """A picture, then maps of it in colours, each with its own scale beside it: a matplotlib figure.

    Args:
        picture: (H, W, 3) uint8 RGB, and its title.
        maps: title -> (h, w) float; the scale runs over the middle 98 % of its values.
        width: of a picture on the screen, pixels.
    """
    from matplotlib.figure import Figure

    size = ((len(maps) + 1) * (width + 40), width * picture.shape[0] / picture.shape[1] + 30)
    figure = Figure(figsize=[side / SCREEN_DPI for side in size], dpi=SCREEN_DPI, layout="constrained")
    first, *axes = figure.subplots(1, len(maps) + 1)
    first.imshow(picture)
    first.set_title(title, fontsize=11)
    first.set_axis_off()
    for axis, (name, values) in zip(axes, maps.items(), strict=True):
        low, high = np.percentile(values, [1, 99])
        shown = axis.imshow(values, cmap="magma", vmin=low, vmax=high)
        axis.set_title(name, fontsize=11)
        axis.set_axis_off()
        figure.colorbar(shown, ax=axis, shrink=0.8)
    return figure


def line_chart(x: Sequence[float], named: dict[str, Sequence[float]], xlabel: str, ylabel: str) -> Any:
    """One line a name over the same `x`: a matplotlib figure."""
    figure, (axis,) = new_figure(width=6.4)
    for name, values in named.items():
        axis.plot(x, values, label=name)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(frameon=False)
    return figure
