"""Mutated photos and masks: each is segmented or named with a reason, in bounded time and memory.

The short form is a sample; `-m full` puts all 5,000 through `check` and `predict`.
"""

import io
import re
import resource
import shutil
import signal
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retina_seg.check import check_set
from retina_seg.folder import DONE, OUTPUTS, segment_files
from retina_seg.predict import Segmenter
from retina_seg.synthetic import draw_photo

BATCH = 250
SECONDS_EACH, MEGABYTES = 0.1, 600  # of the processor for a file on average; what all may add to the process's peak
UNREADABLE = r"is not a picture|is damaged or cut short|has 32 bits|pixels are more than|has more than|is too large"
# ending -> how Pillow is to write it; several ways for what has several decoders
FORMATS = (
    ("png", {"format": "PNG"}),
    ("png", {"format": "PNG", "bits": 4}),
    ("jpg", {"format": "JPEG", "quality": 90}),
    ("jpg", {"format": "JPEG", "progressive": True}),
    ("tif", {"format": "TIFF"}),
    ("tif", {"format": "TIFF", "compression": "tiff_adobe_deflate"}),
    ("tif", {"format": "TIFF", "compression": "tiff_lzw"}),
    ("tif", {"format": "TIFF", "compression": "jpeg"}),
    ("bmp", {"format": "BMP"}),
    ("gif", {"format": "GIF"}),
    ("webp", {"format": "WEBP"}),
    ("webp", {"format": "WEBP", "lossless": True}),
    ("ppm", {"format": "PPM"}),
)


@cache
def sound() -> dict[str, list[tuple[str, bytes]]]:
    """A photo and a mask of 48x48 in every format: kind -> (ending, content)."""
    eye = draw_photo(1, 96, 96)
    pictures = {
        "image": Image.fromarray(eye.photo).resize((48, 48)),
        "mask": Image.fromarray(eye.mask).resize((48, 48)),
    }
    found: dict[str, list[tuple[str, bytes]]] = {}
    for kind, picture in pictures.items():
        for ending, options in FORMATS:
            file = io.BytesIO()
            (picture.convert("P") if "bits" in options else picture).save(file, **options)
            found.setdefault(kind, []).append((ending, file.getvalue()))
    return found


# ------------------------------------------------------------------------------------------------------- kinds of damage


def flipped(content: bytes, rng: np.random.Generator, within: int) -> bytes:
    """One to four of the first `within` bytes replaced by others."""
    damaged = bytearray(content)
    for place in rng.integers(0, min(within, len(damaged)), rng.integers(1, 5)):
        damaged[place] = rng.integers(256)
    return bytes(damaged)


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content))]


def lengthened(content: bytes, rng: np.random.Generator) -> bytes:
    place = rng.integers(len(content) + 1)
    return content[:place] + rng.bytes(rng.integers(1, 65)) + content[place:]


def zeroed(content: bytes, rng: np.random.Generator) -> bytes:
    place, length = rng.integers(len(content)), rng.integers(1, 2 + len(content) // 4)
    return content[:place] + bytes(min(length, len(content) - place)) + content[place + length :]


def swapped(content: bytes, rng: np.random.Generator) -> bytes:
    """Two chunks of a PNG, or two blocks of another file, in each other's place."""
    pieces = chunks(content) or [content[start : start + 64] for start in range(0, len(content), 64)]
    if len(pieces) > 1:
        first, second = rng.choice(len(pieces), 2, replace=False)
        pieces[first], pieces[second] = pieces[second], pieces[first]
    return (content[:8] if chunks(content) else b"") + b"".join(pieces)


def sealed(content: bytes, rng: np.random.Generator) -> bytes:
    """A PNG with bytes of its chunks replaced and their checksums made to agree, so that its decoder looks further."""
    pieces = chunks(content)
    if not pieces:
        return flipped(content, rng, 32)
    place = rng.integers(len(pieces))
    kind, data = pieces[place][4:8], pieces[place][8:-4]
    data = flipped(data, rng, len(data)) if data else data
    pieces[place] = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content[:8] + b"".join(pieces)


def chunks(content: bytes) -> list[bytes]:
    """The chunks of a PNG, each with its length and checksum; none of another file."""
    found, place = [], 8
    while content.startswith(b"\x89PNG") and place + 12 <= len(content):
        end = place + 12 + struct.unpack(">I", content[place : place + 4])[0]
        if end > len(content):
            return []
        found.append(content[place:end])
        place = end
    return found


DAMAGE: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "head flipped": lambda content, rng: flipped(content, rng, 64),
    "body flipped": lambda content, rng: flipped(content, rng, len(content)),
    "cut": cut,
    "lengthened": lengthened,
    "zeroed": zeroed,
    "swapped": swapped,
    "sealed": sealed,
}


def mutation(number: int) -> tuple[str, str, bytes]:
    """The `number`-th mutation: (image or mask, ending, content), the same on every call."""
    rng = np.random.default_rng([20, number])
    kind = ("image", "mask")[number % 2]
    ending, content = sound()[kind][number // 2 % len(FORMATS)]
    for name in rng.choice(list(DAMAGE), rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])):
        content = DAMAGE[name](content, rng) if content else content
    return kind, ending, content


# -------------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.load("drive", device="cpu", precision="float32", working_size=32)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def write_batch(folder: Path, numbers: range) -> dict[str, list[Path]]:
    """A set whose photo n or mask n is the n-th mutation and whose other half is sound: kind -> the mutated files."""
    mutated: dict[str, list[Path]] = {"image": [], "mask": []}
    for kind in mutated:
        (folder / "train" / kind).mkdir(parents=True)
    for number in numbers:
        kind, ending, content = mutation(number)
        path = folder / "train" / kind / f"{number}.{ending}"
        path.write_bytes(content)
        mutated[kind].append(path)
        other = "mask" if kind == "image" else "image"
        (folder / "train" / other / f"{number}.png").write_bytes(sound()[other][0][1])
    return mutated


@pytest.fixture
def _in_time(request):
    """Ends a decoder in an endless loop."""
    if not hasattr(signal, "alarm"):
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("not done in time"))
    signal.alarm(round(60 + 4 * SECONDS_EACH * request.getfixturevalue("count")))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.full)])
def test_mutated_files_are_segmented_or_named(count, segmenter, tmp_path, capfd, _in_time):
    segmenter(np.zeros((48, 48, 3), np.uint8), np.ones((48, 48), bool))  # what the first photo costs is nobody's fault
    memory, start, told = peak_megabytes(), time.process_time(), Counter()
    for first in range(0, count, BATCH):
        place = tmp_path / str(first)
        mutated = write_batch(place / "set", range(first, min(first + BATCH, count)))
        unreadable = checked(place / "set", mutated)
        refused = segmented(segmenter, [*mutated["image"], *mutated["mask"]], place / "out")
        assert set(refused) == unreadable
        told.update(reason.split(" (")[0] for reason in refused.values())
        shutil.rmtree(place)
    shown = capfd.readouterr()
    assert shown.err == "", "a decoder speaks past Python"
    seconds, grown = time.process_time() - start, peak_megabytes() - memory
    print(
        f"{count} mutations: {count - told.total()} segmented, {told.total()} named; {seconds:.0f} s, +{grown:.0f} MB"
    )
    print(*(f"{number:6} {reason}" for reason, number in told.most_common()), sep="\n")
    assert count / 5 < told.total() < count, "mutations that always or never tell prove little"
    assert grown < MEGABYTES and seconds < SECONDS_EACH * count


def checked(folder: Path, mutated: dict[str, list[Path]]) -> set[Path]:
    """Puts the set at `folder` through check; gives the files it calls unreadable: all others were read."""
    report = check_set(folder, progress=False)
    part = report.parts["train"]
    unreadable = {Path(line.split(": ")[0]) for line in report.problems if re.search(UNREADABLE, line)}
    assert unreadable <= {*mutated["image"], *mutated["mask"]}
    for kind, read in (("image", sum(part.sizes.values())), ("mask", len(part.vessel))):
        assert part.files[kind] == read + sum(path.parent.name == kind for path in unreadable)
    return unreadable


def segmented(segmenter: Segmenter, paths: list[Path], output: Path) -> dict[Path, str]:
    """Puts `paths` through predict; gives what it says of each that it refused: all others have their pictures."""
    rows = segment_files(segmenter, paths, output, progress=False)
    assert [row["input"] for row in rows] == [str(path.resolve()) for path in paths]
    refused = {}
    for path, row in zip(paths, rows, strict=True):
        made = [(output / f"{row['name']}_{kind}.png").is_file() for kind in OUTPUTS]
        assert all(made) if row["status"] == DONE else not any(made)
        if row["status"] != DONE:
            assert re.search(UNREADABLE, row["status"]) and row["status"].isprintable()
            refused[path] = row["status"]
    return refused


def test_mutations_are_many_and_stay_the_same():
    first = [mutation(number) for number in range(260)]
    assert first == [mutation(number) for number in range(260)]
    assert len({content for _, _, content in first}) > 250
    assert {ending for _, ending, _ in first} == {ending for ending, _ in FORMATS}
