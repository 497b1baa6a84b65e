"""Weights as others save them: read without running code, found in the usual wrappings, known by their keys and shapes."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina_seg.config import PRESETS, TrainConfig
from retina_seg.model import MODELS, build_model
from retina_seg.utils import UserError, file_kind

SAVE = "save the weights alone, where they were made: torch.save(model.state_dict(), path)"


class _Unread:
    """Takes the place of a plain value beside weights, such as a NumPy scalar, so that none of its code is needed."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_PLAIN = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_PLAIN += ["numpy.dtype", "numpy.ndarray", "argparse.Namespace", "types.SimpleNamespace", "datetime.datetime"]
_PLAIN += ["pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"]
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts of keys
# keys beside a network's: of averaging, of a loss, of a profiler
_NO_NETWORKS = re.compile(r"n_averaged$|(\w*_)?(loss|criterion|metric)\w*(\.|$)|(.*\.)?total_(ops|params)$")


def load_safely(path: Path) -> Any:
    """What `torch.save` wrote to `path`, without running any code in it. Raises `UserError`: what it is instead."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Unread, name) for name in _PLAIN]):
            warnings.simplefilter("ignore")  # torch remarks on odd files before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler of damaged bytes raises anything
        what = _what_it_is(path, error)
        raise UserError(f"{path}: is not a checkpoint that can be read safely: it is {what}") from None


def _what_it_is(path: Path, error: Exception) -> str:
    """What the file is that torch refused with `error`, and the remedy."""
    with open(path, "rb") as file:
        start = file.read(64)
    code = re.search(r"GLOBAL (\S+)", str(error))
    kinds = {
        "a safetensors file": start[8:10] == b'{"',
        "an ONNX file": path.suffix == ".onnx",
        "a TorchScript program": "TorchScript" in str(error),
        f"a whole pickled network, or holds other Python objects ({code and code[1]})": code,
    }
    kind = next((kind for kind, here in kinds.items() if here), None if start[:2] == b"PK" else file_kind(path))
    if kind is None:
        return f"damaged, cut short, or not written by torch.save ({type(error).__name__}); copy it again, or {SAVE}"
    return kind if ";" in kind else f"{kind}; {SAVE}"


def recognised(path: Path, value: Any) -> dict[str, Any]:
    """The checkpoint dictionary of what others saved, by keys and shapes. Raises `UserError`: what was found instead."""
    if isinstance(value, dict) and {"state", "model", "optimizer", "random"} <= value.keys():
        raise UserError(f"{path}: is what train --resume needs; give {path.parent / 'checkpoint.pth'}")
    found = _state_dicts(value)
    if not found:
        keys = f"keys {', '.join(map(str, value))}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise UserError(f"{path}: is not a checkpoint; it holds {keys[:120]} and no weights; {SAVE}")
    if len(found) > 1:
        names = ", ".join(place or "the dictionary itself" for place in found)[:120]
        raise UserError(
            f"{path}: holds several networks ({names}); save one of them, by torch.save(model.state_dict(), path)"
        )
    (weights,) = map(unwrapped, found.values())
    known: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in MODELS]
    known += [(config.model, config.model_arguments) for config in map(TrainConfig.from_preset, PRESETS)]

    def differences(kind: tuple[str, dict[str, Any]]) -> int:
        with torch.device("meta"):
            needed = build_model(kind[0], **kind[1]).state_dict()
        return len({(key, value.shape) for key, value in weights.items()} ^ {(k, v.shape) for k, v in needed.items()})

    name, arguments = nearest = min(known, key=differences)  # `load_model` says in what it differs
    if differences(nearest) > len(weights):
        keys = ", ".join(weights)[:80]
        raise UserError(f"{path}: the weights ({keys}, …) are of another architecture than {', '.join(MODELS)}")
    return {"format": None, "model": name, "arguments": arguments, "state_dict": weights}


def _state_dicts(value: Any) -> dict[str, dict[str, Tensor]]:
    """Place in `value`, such as "ema.model" -> tensors of a dictionary there that holds a network's weights."""
    found, waiting, seen = {}, [("", value)], set()
    for place, item in waiting:
        items = item if isinstance(item, dict) else dict(enumerate(item)) if isinstance(item, (list, tuple)) else {}
        if id(item) not in seen and not place.startswith("optim"):
            seen.add(id(item))  # two names of one dictionary; a dictionary in itself
            tensors = {str(key): entry for key, entry in items.items() if isinstance(entry, Tensor)}
            waiting += [(f"{place}.{key}".strip("."), entry) for key, entry in items.items() if key not in tensors]
            if any(key.endswith("weight") and entry.ndim > 1 for key, entry in tensors.items()):
                found[place] = tensors
    return found


def unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without the prefixes that all keys share, as "module.", and without what is no part of a network."""
    weights = {key: value for key, value in weights.items() if not _NO_NETWORKS.match(key)}
    shorter = {".".join(part for part in key.split(".") if part not in _WRAPPERS): key for key in weights}
    if len(shorter) == len(weights):
        weights = {key: weights[long] for key, long in shorter.items()}
    while len({key.partition(".")[0] for key in weights}) == 1 and all("." in key for key in weights):
        weights = {key.partition(".")[2]: value for key, value in weights.items()}
    return weights
