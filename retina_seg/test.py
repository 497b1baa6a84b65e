"""Score a network on a set, and write the numbers and the pictures (the original's `test`).

Protocols:

- "notebook", the original's: photo and label squeezed to 512x512, the whole frame scored, threshold 0.5. The label is
  cut at 0.5 of its interpolated edges.
- "native": the probability at the photo's own size against the label as drawn.

Both write the scores over the frame and inside the field of view.
"""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm.auto import tqdm

from retina_seg import metrics, visualize
from retina_seg.data import Augmentation, Pair, augment_colour, list_pairs, load_fov, load_pair, read_mask
from retina_seg.images import write_picture
from retina_seg.model import count_parameters, load_checkpoint
from retina_seg.predict import Segmenter, find_checkpoint
from retina_seg.utils import (
    UserError,
    create_dir,
    environment,
    memory_kept,
    photos_at_once,
    read_json,
    side_by_side,
    write_json,
    write_text,
)
from retina_seg.visualize import mask_parse  # the original's name, importable from here

__all__ = ["calculate_metrics", "mask_parse", "score_pairs", "test"]

PROTOCOLS = ("notebook", "native")
NOTEBOOK_SIZE = (512, 512)
ORIGINAL_FIVE = {"Jaccard": "jaccard", "F1": "f1", "Recall": "recall", "Precision": "precision", "Acc": "accuracy"}


def calculate_metrics(y_true: Any, y_pred: Any) -> list[float]:
    """The original's: [jaccard, f1, recall, precision, accuracy] of both arrays cut at 0.5.

    Args:
        y_true, y_pred: tensors or arrays of one size, values in [0, 1].

    Returns:
        Five floats in [0, 1]; 0 where a score is undefined, as scikit-learn gives it.
    """
    true, predicted = (
        np.asarray(y.detach().cpu() if hasattr(y, "detach") else y).reshape(-1) > 0.5 for y in (y_true, y_pred)
    )
    counts = metrics.count(true, predicted)
    values = [metrics.FROM_COUNTS[name](counts) for name in ORIGINAL_FIVE.values()]
    return [0.0 if math.isnan(value) else value for value in values]


class Prepared(NamedTuple):
    """A pair as a protocol scores it.

    Attributes:
        photo: (H, W, 3) uint8. label: (H, W) uint8, a vessel where above 127. fov: field of view, (H, W) bool.
        second: the second observer's mask, (H, W) bool, or None.
        found: whether `fov` was found in this very photo, as the network's own look for it would.
    """

    photo: np.ndarray
    label: np.ndarray
    fov: np.ndarray
    second: np.ndarray | None
    found: bool


def prepare_pair(pair: Pair, protocol: str) -> Prepared:
    """`pair` at its own size ("native"), or squeezed to 512x512 ("notebook").

    Raises:
        UserError: a file that cannot be read, or sizes that differ.
    """
    photo, label = load_pair(pair.image, pair.mask)
    fov = load_fov(pair, photo)
    second = None if pair.mask_2nd is None else read_mask(pair.mask_2nd)
    if second is not None and second.shape != label.shape:
        raise UserError(f"{pair.mask_2nd}: differs in size from its photo {pair.image}")
    squeezed = protocol == "notebook" and label.shape != NOTEBOOK_SIZE
    if squeezed:
        size = NOTEBOOK_SIZE[::-1]
        photo, label = cv2.resize(photo, size), cv2.resize(label, size)
        fov = cv2.resize(fov.astype(np.uint8) * 255, size) > 127
        second = None if second is None else cv2.resize(second, size)
    return Prepared(photo, label, fov, None if second is None else second > 127, pair.fov is None and not squeezed)


def _recoloured(photo: np.ndarray, draw: tuple[int, int]) -> np.ndarray:
    """`photo` (H, W, 3) uint8 in the colours of the `draw` (number of the photo, number of the draw)."""
    rng = np.random.default_rng([7, *draw])
    return np.rint(augment_colour(photo.astype(np.float32) / 255, Augmentation(), rng) * 255).astype(np.uint8)


@dataclass(frozen=True)
class _Scored:
    """One photo, scored: label (H, W) bool, bins of its probabilities (H, W), region -> mask and scores, error overlay."""

    name: str
    true: np.ndarray
    places: np.ndarray
    masks: dict[str, np.ndarray | None]
    scores: dict[str, metrics.PhotoScores]
    second_observer: dict[str, metrics.PhotoScores]
    seconds: float
    thumbnail: np.ndarray | None


def score_pairs(
    segmenter: Segmenter,
    pairs: Sequence[Pair],
    protocol: str = "notebook",
    threshold: float | None = None,
    pictures: str | Path | None = None,
    progress: bool = True,
    recolour: int = 0,
) -> dict[str, Any]:
    """Segment and score every pair.

    Args:
        recolour: how many times each photo is scored in the drawn light and colours of other cameras
            (`data.augment_colour`, its defaults, the same draws every time) instead of once in its own; 0: as it is.
        threshold: None: 0.5 under "notebook", the segmenter's own under "native".
        pictures: a folder for the strips (`<name>.png`) and the error overlays (`<name>_errors.png`); None: none.

    Returns:
        What metrics.json holds (see `metrics`), plus "curves": region -> RankingHistogram, and "sheet": a list of
        (F1, name, error overlay at most 320 pixels wide) for the contact sheet.

    Raises:
        UserError: no such protocol, a file that cannot be read, a folder that may not be written to.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)}")
    if threshold is None:
        threshold = 0.5 if protocol == "notebook" else segmenter.threshold
    if not 0 < threshold < 1:
        raise UserError(f"--threshold {threshold}: must lie between 0 and 1")
    if not 0 <= recolour <= 100:
        raise UserError(f"--recolour {recolour}: must lie between 0 and 100")
    regions = ("frame", "fov")
    totals = {region: metrics.SetScores() for region in regions}
    seconds_totals = {region: metrics.SetScores() for region in regions}
    if pictures is not None:
        pictures = create_dir(pictures)
    shown = [(pair, draw) for pair in pairs for draw in (range(recolour) if recolour else (None,))]

    def prepared() -> Iterator[tuple]:  # in order, so that a file that cannot be read stops all that come behind it
        for number, (pair, draw) in enumerate(shown):
            yield number, pair, draw, prepare_pair(pair, protocol)

    def one(item: tuple) -> _Scored:
        number, pair, draw, (photo, label, fov, second, found) = item
        name = pair.name
        if draw is not None:
            found = False  # in the photo's own colours
            name, photo = f"{name}-colours-{draw + 1}", _recoloured(photo, (number // recolour, draw))
        start = time.perf_counter()
        try:  # the original's protocol keeps what the network says of the black surround
            probability = segmenter(photo, fov if found else None, everywhere=protocol == "notebook")
        except UserError as error:
            raise UserError(f"{pair.image}: {error}") from None
        seconds = time.perf_counter() - start
        true, predicted, masks = label > 127, probability > threshold, {"frame": None, "fov": fov}
        scores = metrics.score_photo(true, predicted, probability, masks)
        others = {} if second is None else metrics.score_photo(true, second, None, masks)
        thumbnail = None
        if pictures is not None:
            line = visualize.strip(photo, label, (predicted * 255).astype(np.uint8))
            stem = os.fsencode(name)  # file systems take 255 bytes: leave room for what comes behind
            stem = name if len(stem) <= 200 else f"{os.fsdecode(stem[:190])}-{number + 1}"
            write_picture(pictures / f"{stem}.png", line)
            errors = visualize.error_overlay(photo, true, predicted, None if protocol == "notebook" else fov)
            write_picture(pictures / f"{stem}_errors.png", errors)
            thumbnail = visualize.shrink(errors, 320)
        places = metrics.RankingHistogram.places(probability)
        return _Scored(name, true, places, masks, scores, others, seconds, thumbnail)

    rows, sheet = [], []
    done = side_by_side(one, prepared(), segmenter.device)
    with memory_kept():
        for photo in tqdm(done, desc="testing", unit="photo", total=len(shown), disable=not progress):
            for region, mask in photo.masks.items():
                totals[region].add(photo.scores[region], photo.true, photo.places, mask)
                if photo.second_observer:
                    seconds_totals[region].add(photo.second_observer[region], photo.true, None, mask)
            values = {region: photo.scores[region].scores for region in regions}
            rows.append({"name": photo.name, **values, "seconds": photo.seconds})
            if photo.thumbnail is not None:
                sheet.append((values["frame"]["f1"], photo.name, photo.thumbnail))
    result: dict[str, Any] = {region: totals[region].summary() for region in regions}
    if seconds_totals["frame"].photos:
        result["second_observer"] = {region: seconds_totals[region].summary() for region in regions}
        result["second_observer"]["photos"] = len(seconds_totals["frame"].photos)
    result |= {
        "images": rows,
        "threshold": threshold,
        "seconds": float(np.mean([row["seconds"] for row in rows])),
        "curves": {region: totals[region].ranking for region in regions},
        "sheet": sheet,
    }
    return result


def test(
    checkpoint: str | Path,
    data: str | Path,
    output: str | Path,
    protocol: str = "notebook",
    threshold: float | None = None,
    part: str = "test",
    progress: bool = True,
    pictures: bool = True,
    recolour: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Score `checkpoint` on one part of the set at `data` and write to `output`: metrics.json, metrics.csv, and pictures.

    Pictures: `images/` (a strip and an error overlay a photo), `contact_sheet.png` (worst photo first), `curves_test.png`
    (ROC and precision-recall).

    Args:
        checkpoint: as `Segmenter.load` takes it. options: as `Segmenter` takes them; precision float32 unless given,
            so that scores are the same on every machine.
        part: "test", or "validation": the training photos that the run `checkpoint` held out.
        recolour: as `score_pairs` takes it.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: as `Segmenter.load`, `list_pairs` and `score_pairs`; `output` holds the scores of other photos or
            another protocol; the run held out no photos.
    """
    path = find_checkpoint(checkpoint)
    segmenter = Segmenter.load(path, **{"precision": "float32", **options})
    notes = {key: value for key, value in load_checkpoint(path).items() if key != "state_dict"}
    pairs = list_pairs(data, part) if part != "validation" else held_out_pairs(checkpoint, data)
    working_size = options.get("working_size")
    what = {
        "name": protocol,
        "data": str(data),
        "part": part,
        "flips": segmenter.flips,
        **({"working_size": working_size} if working_size else {}),
        **({"recolour": recolour} if recolour else {}),
    }
    _refuse_other_scores(Path(output) / "metrics.json", what)
    output = create_dir(output)
    result = score_pairs(
        segmenter, pairs, protocol, threshold, output / "images" if pictures else None, progress, recolour
    )
    given = threshold is not None
    default_from = "fixed" if protocol == "notebook" else notes.get("threshold_from", "fixed")
    value = {
        "protocol": {
            **what,
            "size": "512x512" if protocol == "notebook" else "native",
            "threshold": result["threshold"],
            "threshold_from": "given" if given else default_from,
            "selected_on": notes.get("selected_on", "unknown"),
            "photos": len(result["images"]),
        },
        "model": {
            "name": notes["model"],
            "parameters": count_parameters(segmenter.model),
            "checkpoint": str(checkpoint),
            "frame": segmenter.frame,
        },
        **{key: result[key] for key in ("frame", "fov", "second_observer") if key in result},
        "images": result["images"],
        "speed": {
            "images_per_second": photos_at_once(segmenter.device) / result["seconds"],
            **{k: v for k, v in environment(segmenter.device, segmenter.precision).items() if k != "packages"},
        },
    }
    write_json(output / "metrics.json", value)
    write_csv(output / "metrics.csv", result["images"])
    if pictures:
        worst_first = sorted(result["sheet"], key=lambda item: -1 if math.isnan(item[0]) else item[0])
        captions = [f"{name}  F1 {score:.4f}" for score, name, _ in worst_first]
        write_picture(output / "contact_sheet.png", visualize.contact_sheet([p for _, _, p in worst_first], captions))
        visualize.save_figure(output / "curves_test.png", visualize.ranking_curves(result["curves"]))
    return value


def default_output(
    run: str | Path, protocol: str, part: str, flips: bool = False, working_size: int | None = None, recolour: int = 0
) -> Path:
    """The folder for the scores of `run`: its own for the original's protocol on test photos, else one inside it."""
    below = [name for name, usual in ((part, "test"), (protocol, "notebook")) if name != usual]
    below += ["flips"] if flips else []
    below += [str(working_size)] if working_size else []
    below += ["recoloured"] if recolour else []
    return Path(run, "-".join(below))


def held_out_pairs(run: str | Path, data: str | Path) -> list[Pair]:
    """The training photos at `data` that the training in the folder `run` held out.

    Raises:
        UserError: `run` is no such folder, or held out none, or `data` lacks one of them.
    """
    config = read_json(Path(run) / "config.json")
    names, recipe = config.get("validation"), config.get("recipe")
    if not isinstance(recipe, dict) or not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{Path(run) / 'config.json'}: does not say what was held out; give the folder of a run")
    pairs = {pair.name: pair for pair in list_pairs(data, "train")}
    if not names or recipe.get("validation") != "photos":
        raise UserError(f"{run}: held out no training photos; train with --validation photos")
    if missing := [name for name in names if name not in pairs]:
        raise UserError(
            f"{data}: has no training photo {missing[0]}, which {run} held out; give the set it was trained on"
        )
    return [pairs[name] for name in names]


def _refuse_other_scores(path: Path, what: dict[str, Any]) -> None:
    """Scores of the same photos and protocol may be taken anew; others are not lost by it."""
    if not path.exists():
        return
    there = read_json(path).get("protocol")
    if not isinstance(there, dict) or any(
        there.get(key) != what.get(key) for key in (*what, "working_size", "recolour")
    ):
        held = f"{there.get('name')} on {there.get('data')}" if isinstance(there, dict) else "something else"
        raise UserError(f"{path}: holds other scores ({held}); choose another --output")


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a row a photo: name, every score in both regions, seconds; what is undefined is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [(region, name) for region in ("frame", "fov") for name in metrics.SCORES]
    writer.writerow(["name", *(f"{region}_{name}" for region, name in columns), "seconds"])
    for row in rows:
        values = [row[region][name] for region, name in columns]
        shown = ["" if math.isnan(value) else f"{value:.6f}" for value in values]
        writer.writerow([row["name"], *shown, f"{row['seconds']:.4f}"])
    write_text(path, text.getvalue())


def original_lines(value: dict[str, Any]) -> list[str]:
    """The original's two lines: its five scores over the frame, and images a second."""
    mean = value["frame"]["mean"]
    five = " - ".join(f"{shown}: {_number(mean[name])}" for shown, name in ORIGINAL_FIVE.items())
    return [five, f"FPS: {value['speed']['images_per_second']:.3f}"]


def table(value: dict[str, Any]) -> str:
    """The scores of metrics.json as a table for people: a row a region (and observer), a column a score."""
    rows = [("network, frame", value["frame"]), ("network, field of view", value["fov"])]
    if "second_observer" in value:
        for region, shown in (("frame", "frame"), ("fov", "field of view")):
            rows.append((f"2nd observer, {shown}", value["second_observer"][region]))
    short = {"average_precision": "avg prec", "specificity": "specif", "precision": "precis", "accuracy": "accur"}
    lines = [" " * 24 + "".join(f"{short.get(name, name):>9}" for name in metrics.SCORES)]
    for title, scores in rows:
        lines.append(f"{title:<24}" + "".join(f"{_number(scores['mean'][name]):>9}" for name in metrics.SCORES))
    low, high = value["fov"]["ci95"]["f1"]
    protocol = value["protocol"]
    lines.append(
        f"means over {protocol['photos']} photos, {protocol['size']}, threshold {protocol['threshold']:.2f} "
        f"({protocol['threshold_from']}); F1 in the field of view: 95 % interval {_number(low)} to {_number(high)}"
    )
    if protocol["selected_on"] == "test":
        lines.append("note: the epoch was chosen on the test photos, as in the original: these scores are optimistic")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
