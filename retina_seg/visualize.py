"""Strips, overlays, contact sheets and figures, from arrays and tables; nothing is scored here."""

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from retina_seg.fov import fov_box
from retina_seg.utils import atomic_write

REGION_NAMES = {"frame": "whole frame", "fov": "field of view"}
SCREEN_DPI = 72  # of figures that show images: a committed notebook has to stay small
# white, and sky blue and orange of Okabe and Ito: told apart with every kind of colour blindness
TRUE_POSITIVE, FALSE_NEGATIVE, FALSE_POSITIVE = (255, 255, 255), (86, 180, 233), (230, 159, 0)
OUTLINE = (86, 180, 233)  # sky blue: far from the colours of a fundus
OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # of figures: the same palette


def mask_parse(mask: np.ndarray) -> np.ndarray:
    """The original's: (H, W) grey -> (H, W, 3), that value in every channel."""
    return np.repeat(mask[:, :, None], 3, axis=2)


def strip(image: np.ndarray, mask: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The original's: image (H, W, 3) RGB | mask (H, W) | prediction (H, W), 10 px of grey between: (H, 3 W + 20, 3); uint8."""
    line = np.full((image.shape[0], 10, 3), 128, np.uint8)
    return np.concatenate([image, line, mask_parse(mask), line, mask_parse(prediction)], axis=1)


def error_overlay(
    image: np.ndarray, mask: np.ndarray, predicted: np.ndarray, fov: np.ndarray | None = None
) -> np.ndarray:
    """True positives, false negatives and false positives coloured on the image in dark grey; outside `fov` nothing is.

    `image`, and what is returned: (H, W, 3) uint8 RGB; `mask`, `predicted`, `fov`: (H, W) bool.
    """
    inside = np.ones_like(mask) if fov is None else fov
    overlay = mask_parse(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) // 2)
    overlay[mask & predicted & inside] = TRUE_POSITIVE
    overlay[mask & ~predicted & inside] = FALSE_NEGATIVE
    overlay[~mask & predicted & inside] = FALSE_POSITIVE
    return overlay


def vessel_overlay(image: np.ndarray, vessels: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8 RGB with a line around `vessels` (H, W) bool, outside of them; the same shape.

    It is 1 pixel wide up to 1,500 pixels of the longer side, then 1 more for each 1,500.
    """
    width = max(1, math.ceil(max(vessels.shape) / 1500))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1, 2 * width + 1))
    overlay = image.copy()
    overlay[(cv2.dilate(vessels.astype(np.uint8), disc) > 0) & ~vessels] = OUTLINE
    return overlay


def shrink(image: np.ndarray, width: int) -> np.ndarray:
    """The image (H, W[, 3]) uint8 scaled down to `width` pixels, aspect ratio kept; as it is where it is narrower."""
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    return image if image.shape[1] <= width else cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def preview(image: np.ndarray, fov: np.ndarray, vessels: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8 RGB, and beside it with outlines of `vessels`, both cut to `fov`; (H, W) bool both.

    Returns (h, 2 w, 3) uint8, h and w at most 560 pixels.
    """
    top, left, bottom, right = fov_box(fov)
    image, mask = image[top:bottom, left:right], vessels[top:bottom, left:right] * np.uint8(255)
    width = max(1, 560 * image.shape[1] // max(image.shape[:2]))
    image, mask = shrink(image, width), shrink(mask, width)
    return np.hstack([image, vessel_overlay(image, mask > 127)])


def contact_sheet(
    images: Iterable[np.ndarray], captions: Sequence[str], columns: int = 4, width: int = 320
) -> np.ndarray:
    """Images (H, W, 3) uint8 in a grid, each scaled to `width` pixels, its caption above: (H', W', 3) uint8."""
    images = [shrink(image, width) for image in images]
    columns = max(1, min(columns, len(images)))
    rows, height, gap = math.ceil(len(images) / columns), max(map(len, images)) + 24, 6
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        top, left = gap + number // columns * (height + gap), gap + number % columns * (width + gap)
        tile = sheet[top : top + height, left : left + width]
        tile[24 : 24 + len(image), : image.shape[1]] = image
        cv2.putText(tile, short(caption), (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.48, (0, 0, 0), 1, cv2.LINE_AA)
    return sheet


def save_figure(path: str | Path, figure: Any) -> None:
    """Write a matplotlib figure to `path` (PNG), whole or not at all."""
    with atomic_write(path) as temporary, warnings.catch_warnings():
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
    """Losses, and F1 where it was measured, by epoch, the kept epoch `best` marked: a matplotlib figure."""
    epochs = [row["epoch"] for row in history]
    validated = any(math.isfinite(row["validation_loss"]) for row in history)
    figure, axes = new_figure(2 if validated else 1)
    style = {"marker": "o" if len(epochs) < 30 else None, "ms": 3}
    axes[0].plot(epochs, [row["train_loss"] for row in history], label="training", **style)
    if validated:
        axes[0].plot(epochs, [row["validation_loss"] for row in history], label="validation", **style)
        axes[1].plot(epochs, [row["validation_f1"] for row in history], color="C1", **style)
        axes[1].set(xlabel="epoch", ylabel="F1 on the validation images", ylim=(0, 1))
    axes[0].set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    for axis in axes if best else ():
        axis.axvline(best, color="0.5", lw=1, ls="--", label="kept")
    axes[0].legend(frameon=False)
    return figure


def line_chart(
    lines: dict[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    marks: dict[str, float] | None = None,
    ylim: tuple[float | None, float | None] = (None, None),
    title: str = "",
) -> Any:
    """`lines`, name -> (x values, y values), and upright ones at `marks`, name -> x: a matplotlib figure."""
    figure, (axis,) = new_figure(width=6.4)
    for name, (x, y) in lines.items():
        axis.plot(x, y, marker="o" if len(x) < 30 else None, ms=3, label=name)
    for number, (name, mark) in enumerate((marks or {}).items()):
        axis.axvline(mark, color="0.4", lw=1, ls=("--", ":")[number % 2], label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=ylim, title=title)
    axis.legend(frameon=False)
    return figure


def ranking_curves(rankings: dict[str, Any]) -> Any:
    """Pooled ROC and precision-recall curves of `rankings`, region -> `RankingHistogram`: a matplotlib figure."""
    figure, axes = new_figure(2, height=4.2)
    for region, ranking in rankings.items():
        tp, fp = ranking.rates()
        if not tp[-1] or not fp[-1]:
            continue
        area, average = ranking.scores()
        axes[0].plot(fp / fp[-1], tp / tp[-1], label=f"{REGION_NAMES[region]}, AUC {area:.4f}")
        tp, fp = tp[tp > 0], fp[tp > 0]
        axes[1].plot(tp / tp[-1], tp / (tp + fp), label=f"{REGION_NAMES[region]}, average precision {average:.4f}")
    axes[0].set(xlabel="false positive rate", ylabel="recall", title="ROC, pixels pooled")
    axes[1].set(xlabel="recall", ylabel="precision", title="precision and recall, pixels pooled")
    for axis, place in zip(axes, ("lower right", "lower left"), strict=True):
        axis.set(xlim=(0, 1), ylim=(0, 1.01))
        if axis.lines:
            axis.legend(frameon=False, loc=place)
    return figure


def comparison(titles: Sequence[str], values: Sequence[dict[str, Any]]) -> Any:
    """F1 by image, and its mean with 95 % interval, of runs (what metrics.json holds) in both regions: a matplotlib figure."""
    figure, axes = new_figure(2, width=1.5 + 1.1 * len(titles), height=4.2)
    for axis, (region, heading) in zip(axes, REGION_NAMES.items(), strict=True):
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


def short(title: str) -> str:
    """A file's or folder's name as an image can show it: printable, at most 40 characters, else its middle left out."""
    title = "".join(letter if letter.isprintable() else "?" for letter in title)
    return title if len(title) <= 40 else f"{title[:17]}...{title[-20:]}"


def from_tensor(tensor: Any) -> np.ndarray:
    """An item of a dataset as an image: (3, H, W) float BGR in [0, 1] -> (H, W, 3) uint8 RGB; (1, H, W) -> (H, W)."""
    values = np.rint(np.asarray(tensor) * 255).astype(np.uint8)
    return values[0] if len(values) == 1 else np.ascontiguousarray(values[::-1].transpose(1, 2, 0))


def gallery(
    images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 4, width: int = 200, colours: bool = False
) -> Any:
    """Images in rows, `width` pixels each on the screen, with a title above: a matplotlib figure.

    `images` are (H, W, 3) uint8 RGB, or (H, W): uint8, bool, or float in [0, 1]; of about the same shape.
    `colours`: whether a legend names the colours of `error_overlay`.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height = width * max(image.shape[0] / image.shape[1] for image in images) + 24
    size = (columns * (width + 8) / SCREEN_DPI, (rows * (height + 8) + 30 * colours) / SCREEN_DPI)
    figure: Any = Figure(figsize=size, dpi=SCREEN_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=4 / SCREEN_DPI, h_pad=4 / SCREEN_DPI, wspace=0, hspace=0)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (image, title) in zip(axes, zip(images, titles, strict=True), strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1)
        axis.set_title(title, fontsize=11)
    if colours:
        named = {"true positive": TRUE_POSITIVE, "false negative": FALSE_NEGATIVE, "false positive": FALSE_POSITIVE}
        patches = [Patch(fc=np.array(colour) / 255, ec="0.5", label=name) for name, colour in named.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=12)
    return figure


def heat_maps(image: np.ndarray, title: str, maps: dict[str, np.ndarray]) -> Any:
    """A `gallery` row: an image (H, W, 3) uint8 RGB, then `maps` of it, title -> (h, w) float, in colours."""
    images, titles = [image], [title]
    for name, values in maps.items():
        low, high = np.percentile(values, [1, 99])  # what the colours run over
        level = np.clip((values - low) / max(high - low, 1e-12) * 255, 0, 255).astype(np.uint8)
        images.append(cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_MAGMA), cv2.COLOR_BGR2RGB))
        titles.append(f"{name}\n{low:.2g} to {high:.2g}")
    return gallery(images, titles, columns=len(images), width=310)


def architecture(model: Any, height: int = 512, width: int = 512) -> Any:
    """The parts of a network in the order in which an image (3, height, width) passes them: a matplotlib figure.

    A part is a module with none but torch's inside. A bar is its output: name, channels, and size where it changes.
    Arrows are its inputs; skip connections are blue.
    """
    import torch
    from matplotlib.figure import Figure

    network, image = copy.deepcopy(model).cpu().eval(), torch.zeros(1, 3, height, width)
    calls: list[tuple[Any, ...]] = [("image", None, (), image)]
    inner = {name: list(part.modules())[1:] for name, part in network.named_modules() if name}
    parts = [name for name, below in inner.items() if all(type(m).__module__.startswith("torch.") for m in below)]
    for name in (name for name in parts if name.rpartition(".")[0] not in parts):
        network.get_submodule(name).register_forward_hook(lambda *call, name=name: calls.append((name, *call)))
    with torch.inference_mode():
        network(image)
    figure = Figure(figsize=(10, 4))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    colours, right = {"NoneType": "0.7"}, 0.0
    ends: dict[int, tuple[float, float, float]] = {}  # of a tensor by its id: right end, middle and top of its bar
    for name, part, inputs, output in calls:
        channels, rows, columns = output.shape[1:]
        wide, high, middle = math.sqrt(channels) / 10, math.sqrt(rows / height), 2 * math.log2(rows / height)
        before, left, kind = right, right + 0.5 + 0.06 * len(name), type(part).__name__
        right, top, label = left + wide, middle + high / 2, None if kind in colours else kind
        colour = colours.setdefault(kind, OKABE_ITO[(len(colours) - 1) % len(OKABE_ITO)])
        axis.bar(left, high, wide, middle - high / 2, align="edge", color=colour, label=label)
        text = f"{name}\n{channels}" + f"\n{columns}x{rows}" * (not inputs or rows != inputs[0].shape[2])
        axis.text(left + wide / 2, middle - high / 2, text, ha="center", va="top", fontsize=8)
        for x, y, above in (ends[id(tensor)] for tensor in inputs if id(tensor) in ends):
            skip = {"color": OKABE_ITO[0], "connectionstyle": "bar,armA=-9,armB=-9,fraction=0"} if x != before else {}
            style = {"arrowstyle": "->", "color": "0.3"} | skip
            axis.annotate("", (left, above if skip else middle), (x, above if skip else y), arrowprops=style)
        ends[id(output)] = right, middle, top  # no id comes twice: `calls` keeps the tensors
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5, frameon=False)
    return figure
