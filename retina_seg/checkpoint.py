"""Checkpoints: the weights of a network with all that is needed to use them, and `last.pth`, from which training resumes.

A checkpoint is a dictionary of plain values and tensors, read with `weights_only=True`: "format", "model" and "arguments"
(what `model.build_model` takes), "state_dict", and notes: working frame, threshold and where it is from, data, selection.
A state dict of a network of `model.MODELS`, in the usual wrappings, loads too.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retina_seg.config import PRESETS, TrainConfig
from retina_seg.model import MODELS, build_model
from retina_seg.styles import AUTO, AUTO_STYLES
from retina_seg.utils import UserError, atomic_write, file_kind, user_path

WEIGHTS = Path(__file__).parent / "weights"
CHECKPOINT_FORMAT = "retina_seg checkpoint 1"
LAST = "last.pth"
SAVE = "save the weights alone, where they were made: torch.save(model.state_dict(), path)"
_PLAIN = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_PLAIN += ["numpy.dtype", "numpy.ndarray", "argparse.Namespace", "types.SimpleNamespace", "datetime.datetime"]
_PLAIN += ["pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"]
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts of keys
# keys beside a network's: of averaging, of a loss, of a profiler
_NO_NETWORKS = re.compile(r"n_averaged$|(\w*_)?(loss|criterion|metric)\w*(\.|$)|(.*\.)?total_(ops|params)$")


def pretrained_weights() -> list[str]:
    """The names of the pretrained weights in the package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.pth"))


def find_weights(name: str | Path) -> Path:
    """The checkpoint file of a file, a run's folder, or the name of pretrained weights. Raises `UserError`: none of these."""
    path, pretrained = user_path(name), pretrained_weights()
    if (path / "checkpoint.pth").is_file() or path.is_file():
        return path / "checkpoint.pth" if path.is_dir() else path
    if str(name) in pretrained and not path.is_dir():
        return WEIGHTS / f"{name}.pth"
    remedy, own = f"give a run's folder, a file, or pretrained weights: {', '.join(pretrained)}", path.resolve().name
    if path.is_dir() and own in pretrained:
        remedy = f"its weights are in the package: --checkpoint {own}, --weights {own}"
    raise UserError(f"{path}: {'holds no checkpoint.pth' if path.is_dir() else 'no such checkpoint'}; {remedy}")


def weights_id(checkpoint: str | Path) -> str:
    """The first twelve digits of the SHA-256 of a checkpoint file."""
    return hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()[:12]


def save_whole(path: Path, value: dict[str, Any]) -> None:
    """`torch.save`, whole or not at all. In memory first: torch's writer hides a full disk inside a RuntimeError."""
    content = io.BytesIO()
    torch.save(value, content)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def save_model(path: str | Path, model: nn.Module, name: str, arguments: dict[str, Any], **notes: Any) -> None:
    """Write weights to `path`, whole or not at all, with `name` and `arguments`, which `build_model` took.

    `notes`: plain values that go with them: frame, threshold, threshold_from, trained_on, selected_on.
    """
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    about = {"format": CHECKPOINT_FORMAT, "model": name, "arguments": arguments, **notes}
    save_whole(Path(path), {**about, "state_dict": weights})


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint dictionary at `path`: one of ours, or made of a state dict, maybe wrapped, of a network of `MODELS`.

    Raises `UserError`: as `find_weights`; no checkpoint, one that would run code, or of a format this version does not know.
    """
    path = find_weights(path)
    checkpoint = load_safely(path)
    kind = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if not isinstance(kind, str) or not kind.startswith(CHECKPOINT_FORMAT[:-1]):
        return recognised(path, checkpoint)
    if kind != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: is of another version ({kind[:40]}); pip install --upgrade retina_seg")
    needed = {"model": str, "arguments": dict, "state_dict": dict}
    if not all(isinstance(checkpoint.get(key), kind) for key, kind in needed.items()):
        raise UserError(f"{path}: the checkpoint is incomplete; it needs {', '.join(needed)}")
    return checkpoint


def load_model(
    name: str | Path, style: str | Sequence[str] | None = None, model: nn.Module | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of the checkpoint `name`, in evaluation mode on the processor, and the checkpoint's other entries.

    Args:
        style: of labelling, a name in the checkpoint's "styles", whose logits the network gives; None: its own "style",
            and "balanced" where that is "auto". "auto" gives logits (N, 2, H, W), of `styles.AUTO_STYLES`; several names
            give logits of each.
        model: the network to load the weights into; None: built by the checkpoint's "model" and "arguments".

    Raises `UserError`: as `load_checkpoint`; weights of another architecture, or not finite; no such style.
    """
    path = find_weights(name)
    checkpoint = load_checkpoint(path)
    weights = checkpoint.pop("state_dict")
    try:
        if model is None:
            if checkpoint["model"] not in MODELS:
                how = "load it with model=YourNetwork(), or call retina_seg.model.register_model first"
                raise UserError(f"network {str(checkpoint['model'])[:80]!r} is not one of this package; {how}")
            model = build_model(checkpoint["model"], **checkpoint["arguments"])
        same = weights.keys() == model.state_dict().keys()
        model.load_state_dict(weights if same else unwrapped(weights), strict=True)
    except (UserError, TypeError) as error:  # arguments whose names no function can have
        raise UserError(f"{path}: {error}") from None
    except (RuntimeError, AttributeError) as error:
        first = "".join(str(error).strip().splitlines()[1:2]).strip()[:120] or "keys or shapes differ"
        raise UserError(f"{path}: weights of another architecture than {checkpoint['model']} ({first})") from None
    if not all(torch.isfinite(value).all() for value in model.state_dict().values() if value.is_floating_point()):
        raise UserError(f"{path}: holds weights that are not finite numbers; take an earlier checkpoint")
    styles = checkpoint.get("styles", {})
    for one in [style] if isinstance(style, str) else style or ():
        if one not in (*styles, *([AUTO] if styles else [])):
            raise UserError(f"--style {one}: {path} has {', '.join(styles) or 'no styles to choose from'}")
    if styles:
        own = checkpoint.get("style")
        chosen = checkpoint["style"] = style or ("balanced" if own == AUTO else own)
        names: Any = AUTO_STYLES if chosen == AUTO else [chosen] if isinstance(chosen, str) else chosen
        try:
            mix: Any = model.mix_styles
            mix([styles[name] for name in names])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            raise UserError(f"{path}: its style {str(chosen)[:80]} does not fit its network") from None
    return model.eval(), checkpoint


def load_last(folder: Path) -> dict[str, Any] | None:
    """What the folder's last.pth holds; None where nothing was saved yet. Raises `UserError`: the file is damaged."""
    return load_safely(folder / LAST) if (folder / LAST).exists() else None


class _Unread:
    """Takes the place of a plain value beside weights, such as a NumPy scalar, so that none of its code is needed."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def load_safely(path: Path) -> Any:
    """What `torch.save` wrote to `path`, without running any code in it. Raises `UserError`: what it is instead."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Unread, name) for name in _PLAIN]):
            warnings.simplefilter("ignore")  # torch remarks on odd files before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler of damaged bytes raises anything
        raise UserError(f"{path}: is not a checkpoint that can be read safely: {_what_it_is(path, error)}") from None


def _what_it_is(path: Path, error: Exception) -> str:
    """What the file is that torch refused with `error`, and the remedy."""
    with open(path, "rb") as file:
        start = file.read(64)
    code = re.search(r"GLOBAL (\S+)", str(error))
    kinds = {
        "a safetensors file": start[8:10] == b'{"',
        "a NumPy file": start.startswith(b"\x93NUMPY"),
        "an ONNX file": path.suffix == ".onnx" or (start[:1] == b"\x08" and b"pytorch" in start),
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
        raise UserError(f"{path}: holds several networks ({names}); save one: torch.save(model.state_dict(), path)")
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
