"""Fixtures and helpers all test files share."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """uint8 of this shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


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
    import torch

    generator = torch.Generator().manual_seed(seed)
    for module in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        tensors = (module.weight, module.bias, module.running_mean, module.running_var)
        for tensor, low, high in zip(tensors, (0.5, -0.5, -0.3, 0.5), (1.5, 0.5, 0.3, 2.0), strict=True):
            tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def call(*arguments: object) -> int:
    """The command in this process: its exit status, the parser's own too."""
    from retina_seg import cli

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
    from retina_seg.sets.synthetic import write_set

    return write_set(tmp_path_factory.mktemp("sets") / "tiny", 4, 2, (96, 96), seed=7, progress=False)


@pytest.fixture(scope="session")
def tiny_run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a one-epoch training of the original network on `tiny_set`. Read only."""
    from retina_seg.config import TrainConfig
    from retina_seg.train import fit

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fit(TrainConfig.notebook(data=str(tiny_set), output=str(folder), epochs=1, size=96), progress=False)
    return folder


@pytest.fixture(scope="session")
def styled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and two styles of labelling, "a" and "b"; its default is their mean. Read only."""
    import torch

    from retina_seg.checkpoint import save_model
    from retina_seg.model import FastAttentionUNet

    arguments = {"width": 4, "deepest": 4, "fine": 4, "styles": 2}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = FastAttentionUNet(**arguments)
    styles = {"a": [1.0, 0.0], "b": [0.0, 1.0], "balanced": [0.5, 0.5]}
    frame = {"kind": "fov", "fov_diameter": 64, "normalise": True}
    path = tmp_path_factory.mktemp("weights") / "styled.pth"
    save_model(path, model, "fast_attention_unet", arguments, frame=frame, styles=styles, style="balanced")
    return path
