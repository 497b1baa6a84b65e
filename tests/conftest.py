"""Fixtures and helpers all test files share."""

import io
import os
import struct
import zlib
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from PIL import Image

from retina_seg import cli
from retina_seg.checkpoint import save_model
from retina_seg.config import TrainConfig
from retina_seg.images import write_image
from retina_seg.inference.engine import image_batch
from retina_seg.model import build_model
from retina_seg.sets.layout import Pair
from retina_seg.sets.synthetic import synthetic_image, write_set
from retina_seg.train import fit

drawn = cache(synthetic_image)  # read only


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """uint8 of this shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(path: Path, pixels: np.ndarray) -> Path:
    """Writes an image or mask, bool as 0 and 255, and its folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, np.ascontiguousarray(pixels * np.uint8(255) if pixels.dtype == bool else pixels))
    return path


def write_pair(folder: Path, name: str, image, mask, fov=None, mask_2nd=None) -> Pair:
    """A pair of files, with the field of view and the second observer's mask that are given."""
    pixels = {"image": image, "mask": mask, "fov": fov, "mask_2nd": mask_2nd}
    paths = {kind: write(folder / f"{name}_{kind}.png", a) for kind, a in pixels.items() if a is not None}
    return Pair(name, photo=name, subject=name, **paths)


def files(folder: Path) -> dict[str, bytes]:
    """What every file below `folder` holds, by its path from there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def encoded(pixels: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    """A file of the format `kind` as Pillow writes it, in another mode where one is named."""
    file, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes = bytes(99), bits: int = 8, colour: int = 2) -> bytes:
    """A PNG file that claims a size, whatever its rows hold."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def shaken(model, seed: int = 0):
    """The model in evaluation mode, its batch normalisation far from the identity, so that no term can be left out."""
    generator = torch.Generator().manual_seed(seed)
    for module in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        tensors = (module.weight, module.bias, module.running_mean, module.running_var)
        for tensor, low, high in zip(tensors, (0.5, -0.5, -0.3, 0.5), (1.5, 0.5, 0.3, 2.0), strict=True):
            tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def shaken_network(name: str, seed: int = 0, **arguments: object):
    """A network with random weights and statistics, in evaluation mode; the same for a seed."""
    torch.manual_seed(seed)
    return shaken(build_model(name, **arguments), seed)


def save_varied(path: Path, name: str, frame) -> Path:
    """A checkpoint with random weights whose probabilities differ from pixel to pixel, and a threshold of 0.3."""
    model = shaken_network(name, seed=1)
    last = model.finaloutput if name == "attention_unet" else model.fine[-1]
    with torch.no_grad():
        logits = model(image_batch(synthetic_image(9, 96, 96).image, "cpu"))
        last.bias.sub_(logits.mean()).mul_(2 / logits.std())
        last.weight.mul_(2 / logits.std())
    save_model(path, model, name, {}, threshold=0.3, frame=frame.to_dict())
    return path


def failing(function, good: int, error: BaseException) -> Mock:
    """`function`, which raises `error` at every call after its first `good` ones."""
    return Mock(wraps=function, side_effect=chain(repeat(DEFAULT, good), repeat(error)))


def call(*arguments: object) -> int:
    """The command in this process: its exit status, the parser's own too."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the public datasets (Data1, DRIVE, CHASE_DB1, LES-AV), named by RETINA_SEG_DATA."""
    folder = os.environ.get("RETINA_SEG_DATA")
    if not folder:
        pytest.skip("RETINA_SEG_DATA names no folder with the public datasets")
    if not Path(folder).is_dir():
        pytest.fail(f"RETINA_SEG_DATA={folder} is no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic dataset in the Data1 layout: four training and two test images of 96x96. Read only."""
    return write_set(tmp_path_factory.mktemp("sets") / "tiny", 4, 2, (96, 96), seed=7, progress=False)


@pytest.fixture(scope="session")
def tiny_run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a one-epoch training of the original network on `tiny_set`. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fit(TrainConfig.notebook(data=str(tiny_set), output=str(folder), epochs=1, size=96), progress=False)
    return folder


@pytest.fixture(scope="session")
def styled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and two styles of labelling, "a" and "b"; its default is their mean. Read only."""
    arguments = {"width": 4, "deepest": 4, "fine": 4, "styles": 2}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = build_model("fast_attention_unet", **arguments)
    styles = {"a": [1.0, 0.0], "b": [0.0, 1.0], "balanced": [0.5, 0.5]}
    frame = {"kind": "fov", "fov_diameter": 64, "normalise": True}
    path = tmp_path_factory.mktemp("weights") / "styled.pth"
    save_model(path, model, "fast_attention_unet", arguments, frame=frame, styles=styles, style="balanced")
    return path
