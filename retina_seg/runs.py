"""A run's folder: where a training writes, whether it is finished, what it held out; and weights a training starts from."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from retina_seg.checkpoint import LAST, find_weights, load_checkpoint, load_model
from retina_seg.config import TrainConfig
from retina_seg.sets.files import Data
from retina_seg.sets.layout import Pair, check_apart, list_pairs
from retina_seg.transforms import Frame, ResizeFrame
from retina_seg.utils import UserError, read_csv, read_json, user_path, without_nan


def free_folder(path: str | Path) -> Path:
    """`path`, or the first of path-2, path-3, … that holds no run yet."""
    path = user_path(path)
    taken, number = path, 1
    while (taken / "config.json").exists() or (taken / "checkpoint.pth").exists():
        number += 1
        taken = path.with_name(f"{path.name}-{number}")
    return taken


def check_run_folder(config: TrainConfig, resume: bool, processes: int) -> None:
    """Clear what a kill left half-written in `config.output`.

    Raises `UserError`: it holds a run, and not to `resume`; or none, or one of another config or number of processes.
    """
    folder = user_path(config.output)
    if not resume:
        if any((folder / name).exists() for name in (LAST, "checkpoint.pth")):
            remedy = "choose another --output, go on with --resume, or remove it"
            raise UserError(f"{folder}: already holds a run; {remedy}")
        return
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: holds no run to go on with; train without --resume")
    for path in folder.glob(".*.partial*"):
        path.unlink(missing_ok=True)
    free = {"preset", "data", "output", "device", "workers", "epochs"}
    written = TrainConfig.from_json(folder / "config.json")
    mine, theirs = (without_nan(dataclasses.asdict(value)) for value in (config, written))
    if other := [name for name in mine if name not in free and mine[name] != theirs[name]]:
        raise UserError(f"{folder}: this run's config has another {', '.join(other)}; go on by its own config.json")
    began = read_json(folder / "config.json").get("processes", 1)
    if began != processes:  # other batches
        raise UserError(f"{folder}: {began} processes began this run, these are {processes}; go on with as many")


def unfinished(path: Path, epoch: Any) -> str | None:
    """What the training that wrote `path` lacks: "epoch 6 of 10, training not finished"; `epoch`: the checkpoint's, or None."""
    history, done = path.with_name("history.csv"), epoch if isinstance(epoch, int) else 0
    with contextlib.suppress(UserError):  # weights alone, or a run of another version
        planned = TrainConfig.from_json(path.with_name("config.json")).epochs
        # the history is written after the checkpoint; without one, only the first epoch is known not to be the last
        done = max(done, len(read_csv(history, ["epoch"]))) if history.exists() or done != 1 else done
        return f"epoch {done} of {planned}, training not finished" if done < planned else None
    return None


def remarks(name: str | Path) -> list[str]:
    """Lines to print about the weights `name` (as `find_weights` takes it): what is not finished or not known."""
    checkpoint = load_checkpoint(path := find_weights(name))
    what = unfinished(path, checkpoint.get("epoch"))
    if checkpoint["format"] is None and checkpoint["model"] != "attention_unet":
        what = "weights alone, whose frame is not known: 512x512 is assumed; give the whole checkpoint"
    return [f"note: {path}: {what}"] if what else []


def start_from(config: TrainConfig) -> tuple[TrainConfig, nn.Module]:
    """`config` with the network, frame and threshold of its `weights`, and that network. Raises as `load_model`."""
    model, notes = load_model(config.weights or "")
    arguments = {key: value for key, value in notes["arguments"].items() if key != "styles"}
    changes: dict[str, Any] = {"model": notes["model"], "model_arguments": arguments}
    if (frame := notes.get("frame") or ResizeFrame().to_dict())["kind"] == "fov":
        changes |= {"frame": "fov", "fov_diameter": frame["fov_diameter"]}
        changes["largest_diameter"] = frame.get("largest_diameter")
        changes["normalise"] = "fov" if frame.get("normalise") else "none"
    else:
        changes |= {"frame": "resize", "size": frame["size"][0]}
    if config.threshold == "fixed":
        changes["threshold"] = str(notes.get("threshold", 0.5))
    return dataclasses.replace(config, **changes), model


def load_teacher(name: str, frame: Frame, datasets: Sequence[str]) -> nn.Module:
    """The network of the weights `name`, which gives logits in the style of each of `datasets`, in evaluation mode.

    Raises `UserError`: as `load_model`; weights of another working frame than `frame`, as training patches see it.
    """
    try:
        model, notes = load_model(name, datasets or None)
    except UserError as error:
        raise UserError(f"--teacher {name}: {error}") from None
    frames = notes.get("frame") or ResizeFrame().to_dict(), frame.to_dict()
    theirs, ours = ({key: value for key, value in one.items() if key != "largest_diameter"} for one in frames)
    if theirs != ours:
        raise UserError(f"--teacher {name}: is used in the working frame {theirs}, this training in {ours}")
    return model


def held_out_pairs(run: str | Path, data: Data | Sequence[Data]) -> list[Pair]:
    """The images at `data` that the training in the folder `run` held out. Raises `UserError`: there are none, or not all."""
    path = user_path(run) / "config.json"
    names = read_json(path).get("validation") if path.exists() else None
    if not isinstance(names, list) or not names or TrainConfig.from_json(path).validation != "photos":
        raise UserError(f"{run}: held out no training photos; give the folder of a run with --validation photos")
    pairs = [pair for pair in list_pairs(data, "train") if pair.name in names]
    if len(pairs) < len(names):
        raise UserError(f"{data}: lacks training images that {run} held out; give the dataset it was trained on")
    return pairs


def default_output(
    run: str | Path, protocol: str, part: str, tta: bool, working_size: int | None, style: str | None = None
) -> Path:
    """The folder for the scores of `run`: its own for the original's protocol on test images, else one inside it."""
    unusual: dict[str, Any] = {part: part != "test", protocol: protocol != "notebook", "tta": tta}
    unusual |= {str(working_size): working_size, str(style): style}
    return Path(run, "-".join(name for name, here in unusual.items() if here))


def scored_pairs(weights: Any, data: Data, part: str) -> list[Pair]:
    """The images of a `part` of the dataset at `data`: "train", "test", or "validation", what the run `weights` held out.

    Raises `UserError`: it held out none; a test image is one that the run of `weights` was trained on.
    """
    if part == "validation":
        return held_out_pairs(weights, data)
    pairs, trained = list_pairs(data, part), []
    with contextlib.suppress(UserError, OSError, KeyError, TypeError):  # weights alone, or their data are gone
        value = read_json(find_weights(weights).parent / "config.json")
        trained = [pair for pair in list_pairs(value["config"]["data"], "train") if pair.name in value["training"]]
    check_apart(trained if part == "test" else [], pairs)
    return pairs
