"""Mutated images and masks: each is read or named with a reason, by `check` and `predict` alike; `-m full` takes 5,000."""

import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, png_chunk
from PIL import Image

from retina_seg.inference.batch import DONE, OUTPUTS, predict_images
from retina_seg.inference.segmenter import Segmenter
from retina_seg.sets.check import check_set
from retina_seg.sets.synthetic import synthetic_image

BATCH = 250
UNREADABLE = (
    r"is not an image|is a TIFF of a kind|is damaged or cut short|pixels are more than|has more than|is too large"
)
# ending -> how Pillow is to write it; several ways for what has several decoders
FORMATS = (
    *(("png", {"kind": "PNG"}), ("png", {"kind": "PNG", "bits": 4, "mode": "P"}), ("webp", {"kind": "WEBP"})),
    *(("jpg", {"kind": "JPEG", "quality": 90}), ("jpg", {"kind": "JPEG", "progressive": True})),
    *(("tif", {"kind": "TIFF", "compression": how}) for how in (None, "tiff_adobe_deflate", "tiff_lzw", "jpeg")),
    *((kind.lower(), {"kind": kind}) for kind in ("BMP", "GIF", "PPM")),
    ("webp", {"kind": "WEBP", "lossless": True}),
)


@cache
def sound(kind: str) -> list[tuple[str, bytes]]:
    """An image or mask of 48x48 in every format: (ending, content)."""
    image = np.asarray(Image.fromarray(getattr(synthetic_image(1, 96, 96), kind)).resize((48, 48)))
    return [(ending, encoded(image, **options)) for ending, options in FORMATS]


def changed(content, rng, within=None):
    """One to four of the first `within` bytes replaced by others."""
    damaged = bytearray(content)
    for place in rng.integers(0, min(within or len(damaged), len(damaged)), rng.integers(1, 5)):
        damaged[place] = rng.integers(256)
    return bytes(damaged)


def sealed(content, rng):
    """A PNG with bytes of a chunk replaced and its checksum made to agree, so that its decoder looks further."""
    pieces = chunks(content)
    if not pieces:
        return changed(content, rng, 32)
    place = rng.integers(len(pieces))
    kind, data = pieces[place][4:8], pieces[place][8:-4]
    data = changed(data, rng) if data else data
    pieces[place] = png_chunk(kind, data)
    return content[:8] + b"".join(pieces)


def chunks(content):
    """The chunks of a PNG, each with its length and checksum; none of another file."""
    found, place = [], 8
    while content.startswith(b"\x89PNG") and place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if end > len(content):
            return []
        found.append(content[place:end])
        place = end
    return found


DAMAGE = (
    lambda content, rng: changed(content, rng, 64),
    changed,
    lambda content, rng: content[: rng.integers(len(content))],
    lambda content, rng: content[: (place := rng.integers(len(content) + 1))] + rng.bytes(9) + content[place:],
    lambda content, rng: content[: (place := rng.integers(len(content)))] + bytes(len(content[place:])),
    sealed,
)


def mutation(number: int) -> tuple[str, str, bytes]:
    """The `number`-th mutation: (image or mask, ending, content), the same on every call."""
    rng = np.random.default_rng([20, number])
    kind = ("image", "mask")[number % 2]
    ending, content = sound(kind)[number // 2 % len(FORMATS)]
    for which in rng.choice(len(DAMAGE), rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])):
        content = DAMAGE[which](content, rng) if content else content
    return kind, ending, content


def write_batch(folder: Path, numbers: range) -> list[Path]:
    """Writes a dataset in which image n or mask n is the n-th mutation and its partner sound; the mutated files."""
    mutated = []
    for number in numbers:
        kind, ending, content = mutation(number)
        for one in ("image", "mask"):
            path = folder / "train" / one / f"{number}.{ending if one == kind else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if one == kind else sound(one)[0][1])
            mutated += [path] if one == kind else []
    return mutated


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.full)])
def test_mutated_files_are_read_or_named(count, tmp_path):
    segmenter, told = Segmenter.load("drive", device="cpu", precision="float32", working_size=32), 0
    for first in range(0, count, BATCH):
        place = tmp_path / str(first)
        paths = write_batch(place / "set", range(first, min(first + BATCH, count)))
        report = check_set(place / "set", progress=False)
        unreadable = {Path(line.split(": ")[0]) for line in report.problems if re.search(UNREADABLE, line)}
        part = report.parts["train"]
        other_size = sum("must have its image's size" in line for line in report.problems)
        for kind, read in (("image", sum(part.sizes.values())), ("mask", len(part.vessel) + other_size)):
            assert part.files[kind] == read + sum(path.parent.name == kind for path in unreadable)
        rows = predict_images(segmenter, paths, place / "out", progress=False)
        for path, row in zip(paths, rows, strict=True):
            written = [(place / "out" / f"{row['name']}_{kind}.png").is_file() for kind in OUTPUTS]
            assert written == [row["status"] == DONE] * len(OUTPUTS)
            assert (row["status"] == DONE) == (path not in unreadable)
            assert row["status"] == DONE or re.search(UNREADABLE, row["status"]) and row["status"].isprintable()
            told += row["status"] != DONE
        shutil.rmtree(place)
    assert count / 5 < told < count, "mutations that always or never tell prove little"
