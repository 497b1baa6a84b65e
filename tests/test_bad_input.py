"""Every kind of bad input, given to every command that takes such files: one line that names it, and nothing half done.

`python tests/test_bad_input.py` prints the table: kind, command, exit status, and the line its user reads.
"""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from retina_seg import cli
from retina_seg.folder import PLAN
from retina_seg.images import read_label, read_photo, write_picture
from retina_seg.metrics import SCORES
from retina_seg.model import CHECKPOINT_FORMAT, build_model
from retina_seg.synthetic import SyntheticPhoto, draw_photo
from retina_seg.utils import read_json, write_json

resource = pytest.importorskip("resource", reason="pipes, links and such names are POSIX")

SMALL = ("--preset", "quick", "--size", "32", "--epochs", "1", "--device", "cpu")
SECONDS, MEGABYTES = 20, 400  # of the processor and of memory: what one refusal may cost at the very most


class Bench:
    """A folder to spoil things in, with a sound set, run, checkpoint and photo to start from."""

    def __init__(self, folder: Path, tiny_set: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.tiny_set, self.tiny_run, self.monkeypatch = folder, tiny_set, tiny_run, monkeypatch
        self.out = folder / "out"
        self.weights = tiny_run / "checkpoint.pth"

    def set(self, name: str = "set") -> Path:
        return Path(shutil.copytree(self.tiny_set, self.folder / name))

    def run(self, name: str = "run") -> Path:
        return Path(shutil.copytree(self.tiny_run, self.folder / name))

    def raw(self) -> Path:
        """CHASE_DB1 as published, two photos of it."""
        folder = self.folder / "raw"
        for number, name in enumerate(("Image_01L", "Image_01R")):
            eye = drawn(number, 64, 64)
            for ending, picture in ((".jpg", eye.photo), ("_1stHO.png", eye.mask)):
                folder.mkdir(exist_ok=True)
                write_picture(folder / f"{name}{ending}", picture)
        return folder

    def photos(self) -> Path:
        """A folder with one good photo."""
        (self.folder / "photos").mkdir()
        write_picture(self.folder / "photos/good.png", photo())
        return self.folder / "photos"

    def checkpoint(self, **changes) -> Path:
        """A checkpoint like the sound one but for `changes`."""
        return saved(self.folder / "odd.pth", {**torch.load(self.weights, weights_only=True), **changes})

    def config(self, **changes) -> Path:
        """A run's config.json, sound but for these entries of its recipe; in the folder of a run without weights."""
        value = read_json(self.tiny_run / "config.json")
        value["recipe"] |= {"data": str(self.tiny_set), "output": str(self.out), "size": 32, "frame": "fov", **changes}
        (self.folder / "run").mkdir()
        path = self.folder / "run/config.json"
        path.write_text(json.dumps(value))
        return path

    def scores(self, name: str, **changes) -> Path:
        """The folder of a tested run, its metrics.json sound but for `changes`."""
        mean = dict.fromkeys(SCORES, 0.5)
        region = {"mean": mean, "std": mean, "pooled": mean, "ci95": {"f1": [0.4, 0.6]}}
        images = [{"name": "1", "frame": mean, "fov": mean}]
        value = {"protocol": {"size": "native", "part": "test"}, "frame": region, "fov": region, "images": images}
        (self.folder / name).mkdir()
        write_json(self.folder / name / "metrics.json", {**value, **changes})
        return self.folder / name


@dataclass(frozen=True)
class Case:
    """A kind of bad input and a command it is given to.

    Attributes:
        make: spoils something on the bench; gives the command's arguments.
        said: what the one line must hold, piece by piece.
        status: the exit status: 1 where the command reports on many files, else 2.
        leaves: a regular expression for files that may be new afterwards, each whole.
    """

    kind: str
    command: str
    make: Callable[[Bench], list]
    said: tuple[str, ...]
    status: int = 2
    leaves: str = "(?!)"


CASES: list[Case] = []
WORKS: list[Case] = []  # kinds that look bad and are taken: the same table, with status 0


@cache
def drawn(seed: int, height: int, width: int) -> SyntheticPhoto:
    return draw_photo(seed, height, width)


def photo() -> np.ndarray:
    return drawn(3, 64, 72).photo


def saved(path: Path, value) -> Path:
    torch.save(value, path)
    return path


# ------------------------------------------------------------------------------------------------------- broken pictures


def encoded(ending: str, mode: str = "RGB", **options) -> bytes:
    """A sound picture of 96x96 as a file's bytes."""
    file = io.BytesIO()
    Image.fromarray(drawn(5, 96, 96).photo).convert(mode).save(file, ending, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int = 8, colour: int = 2, rows: bytes = b"\0" * 99) -> bytes:
    """A PNG file that claims a size, whatever its rows hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


@cache
def bomb() -> bytes:
    """A sound PNG of 20,000 x 20,000 black pixels in a few dozen kilobytes."""
    return png(20_000, 20_000, 1, 0, bytes(2501 * 20_000))


def cut(ending: str) -> bytes:
    content = encoded(ending)
    return content[: len(content) // 2]


def deep(dtype: type, ending: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((96, 96), 3, dtype)).save(file, ending)
    return file.getvalue()


NO_PICTURE, DAMAGED, LARGE = "is not a picture", "is damaged or cut short", "pixels; scale the photo down"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 96\n%%EndComments\nshowpage\n"
JPEG_65500 = re.sub(rb"(?s)(\xff\xc0..\x08)....", lambda found: found[1] + b"\xff\xdc" * 2, encoded("JPEG"), count=1)
# kind -> (ending, content, what is said)
PICTURES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "an empty file": ("png", lambda: b"", NO_PICTURE),
    "text": ("png", lambda: b"not a picture\n" * 50, NO_PICTURE),
    "PDF": ("jpg", lambda: b"%PDF-1.7\n" + bytes(500), NO_PICTURE),
    "PostScript, which would be run": ("png", lambda: EPS, NO_PICTURE),
    "SVG": ("png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', NO_PICTURE),
    "HDR": ("png", lambda: b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 96 +X 96\n" + bytes(9999), NO_PICTURE),
    "HEIC": ("jpg", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), NO_PICTURE),
    "a PNG cut short": ("png", lambda: cut("PNG"), DAMAGED),
    "a JPEG cut short": ("jpg", lambda: cut("JPEG"), DAMAGED),
    "a TIFF cut short": ("tif", lambda: cut("TIFF"), "not a picture|damaged"),
    "a packed TIFF of zeros": ("tif", lambda: zeroed(encoded("TIFF", compression="tiff_adobe_deflate")), DAMAGED),
    "a TIFF of 55,000 samples a pixel": ("tif", lambda: tagged(encoded("TIFF"), 277, 55_000), "not a picture|damaged"),
    "a GIF cut short": ("gif", lambda: cut("GIF"), DAMAGED),
    "a BMP cut short": ("bmp", lambda: cut("BMP"), DAMAGED),
    "a WebP cut short": ("webp", lambda: cut("WEBP"), "not a picture|damaged"),
    "a PPM cut short": ("ppm", lambda: cut("PPM"), DAMAGED),
    "a PNG of one wrong byte": ("png", lambda: flipped(encoded("PNG")), DAMAGED),
    "a PNG that claims 100,000 x 100,000": ("png", lambda: png(100_000, 100_000), LARGE),
    "a JPEG that claims 65,500 x 65,500": ("jpg", lambda: JPEG_65500, LARGE),
    "a PNG of 400 million pixels": ("png", bomb, LARGE),
    "a PPM that claims 10^9 x 10^9": ("ppm", lambda: b"P6 1000000000 1000000000 255\n" + bytes(99), LARGE),
    "a BMP of negative width": (
        "bmp",
        lambda: encoded("BMP")[:18] + b"\xff" * 4 + encoded("BMP")[22:],
        LARGE,
    ),
    "a PGM with no grey levels": ("pgm", lambda: b"P5 96 96 0\n" + bytes(96 * 96), "not a picture|damaged"),
    "a TIFF of floats": ("tif", lambda: deep(np.float32, "TIFF"), "has 32 bits a pixel"),
    "a TIFF of 32-bit integers": ("tif", lambda: deep(np.int32, "TIFF"), "has 32 bits a pixel"),
}


def zeroed(content: bytes) -> bytes:
    """The packed pixels of a TIFF turned to zeros, its tables left whole."""
    with Image.open(io.BytesIO(content)) as image:
        starts, counts = image.tag_v2[273], image.tag_v2[279]
    for start, count in zip(starts, counts, strict=True):
        content = content[:start] + bytes(count) + content[start + count :]
    return content


def tagged(content: bytes, tag: int, value: int) -> bytes:
    """A TIFF with the first short value of one of its tags replaced."""
    start = struct.unpack("<I", content[4:8])[0] + 2
    place = next(at for at in range(start, len(content), 12) if struct.unpack("<H", content[at : at + 2])[0] == tag)
    return content[: place + 8] + struct.pack("<H", value) + content[place + 10 :]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def in_the_place_of(path: Path, content: bytes, ending: str) -> Path:
    path.unlink()
    path = path.with_suffix(f".{ending}")
    path.write_bytes(content)
    return path


def add_pictures() -> None:
    for kind, (ending, content, said) in PICTURES.items():

        def in_set(bench, command, part="train", where="image", ending=ending, content=content):
            data = bench.set()
            name = "1.png" if part == "train" else "0.png"
            in_the_place_of(data / part / where / name, content(), ending)
            return set_command(bench, command, data)

        def in_folder(bench, ending=ending, content=content):
            (bench.photos() / f"bad.{ending}").write_bytes(content())
            return predict(bench, bench.folder / "photos")

        def alone(bench, ending=ending, content=content):
            (bench.folder / f"bad.{ending}").write_bytes(content())
            return predict(bench, bench.folder / f"bad.{ending}")

        def published(bench, where, ending=ending, content=content):
            in_the_place_of(bench.raw() / f"Image_01R{where}", content(), ending)
            return ["prepare", "chase_db1", bench.folder / "raw", bench.out, "--size", 64]

        for command in ("check", "train", "test"):
            part, name = ("test", "0") if command == "test" else ("train", "1")
            for what, where in (("photo", "image"), ("mask", "mask")):
                add(
                    kind,
                    f"{command} ({what})",
                    lambda b, c=command, p=part, w=where, i=in_set: i(b, c, p, w),
                    (f"{where}/{name}.{ending}", said),
                    1 if command == "check" else 2,
                )
        add(kind, "run (photo)", lambda b, i=in_set: i(b, "run"), (f"1.{ending}", said))
        add(kind, "predict (folder)", in_folder, (f"bad.{ending}", said), 1, r"good_\w+\.png|summary\.csv")
        add(kind, "predict (file)", alone, (f"bad.{ending}", said), 1, r"summary\.csv")
        add(kind, "prepare (photo)", lambda b, p=published: p(b, ".jpg"), (f"Image_01R.{ending}", said))
        add(kind, "prepare (mask)", lambda b, p=published: p(b, "_1stHO.png"), (f"Image_01R_1stHO.{ending}", said))


def add(kind, command, make, said, status=2, leaves="(?!)") -> None:
    said = (said,) if isinstance(said, str) else said
    CASES.append(Case(kind, command, make, said, status, leaves))


def predict(bench: Bench, *photos, **options) -> list:
    given = {"--weights": bench.weights, "--working-size": 64, **{f"--{k}": v for k, v in options.items()}}
    return ["predict", *photos, "--output", bench.out, *(part for item in given.items() for part in item)]


def set_command(bench: Bench, command: str, data) -> list:
    if command == "check":
        return ["check", data]
    if command == "test":
        return ["test", "--checkpoint", bench.weights, "--data", data, "--output", bench.out, "--protocol", "native"]
    return [command, "--data", data, "--output", bench.out, *SMALL]


add_pictures()


# ------------------------------------------------------------------------------------------------------------- odd sets


def odd_set(kind, check: str | None, train: str | None, test: str | None = None):
    """Registers a function that spoils the set at `data`: what check, train (and run) and test say of it."""

    def register(spoil):
        def make(bench, command):
            data = bench.set()
            spoil(data)
            return set_command(bench, command, data)

        said = {"check": check, "train": train, "run": train, "test": test}
        for command, line in said.items():
            if line is not None:
                add(kind, command, lambda b, c=command: make(b, c), line, 1 if command == "check" else 2)
        return spoil

    return register


def both_parts(data: Path, where: str) -> list[Path]:
    return [data / "train" / where / "1.png", data / "test" / where / "0.png"]


@odd_set(
    "photo and mask of two sizes", "1.png: is 60x96 but its photo 96x96", r"1.png: differ in size", "0.png: differ in"
)
def _(data):
    for path in both_parts(data, "mask"):
        write_picture(path, read_label(path)[:, :60])


@odd_set(
    "a field of view of another size", "fov/1.png: is 60x96", "fov/1.png: differs in size", "fov/0.png: differs in"
)
def _(data):
    for path in both_parts(data, "fov"):
        write_picture(path, read_label(path)[:, :60])


@odd_set("a second observer of another size", "mask_2nd/0.png: is 60x96", None, "mask_2nd/0.png: differs in size")
def _(data):
    write_picture(made(data / "test/mask_2nd") / "0.png", read_label(data / "test/mask/0.png")[:, :60])


@odd_set(
    "a photo without its mask", "image/1.png: has no mask", "image/1.png: has no partner", "image/0.png: has no par"
)
def _(data):
    for path in both_parts(data, "mask"):
        path.unlink()


@odd_set(
    "a mask without its photo", "mask/1.png: has no photo", "mask/1.png: has no partner", "mask/0.png: has no partn"
)
def _(data):
    for path in both_parts(data, "image"):
        path.unlink()


@odd_set(
    "two files of one name", "1.png: has the name of 1.jpg", "image: two files are called 1", "two files are called 0"
)
def _(data):
    for path in both_parts(data, "image"):
        write_picture(path.with_suffix(".jpg"), read_photo(path))


@odd_set("no folder of masks", "train/mask: no such folder", "train/mask: no such folder", "test/mask: no such folder")
def _(data):
    for part in ("train", "test"):
        shutil.rmtree(data / part / "mask")


@odd_set("a file for a folder of photos", "train/image: no such folder", "train/image: no such folder")
def _(data):
    shutil.rmtree(data / "train/image")
    (data / "train/image").write_text("")


@odd_set("no training photos", "train/image: holds no pictures", "train/image: holds no pictures")
def _(data):
    shutil.rmtree(data / "train/image")
    (data / "train/image").mkdir()
    (data / "photos.csv").unlink()


@odd_set("a photo of an ending that is none", "1.png: has no photo", "mask/1.png: has no partner", "mask/0.png: has no")
def _(data):
    for path in both_parts(data, "image"):
        path.rename(path.with_suffix(".picture"))


@odd_set("an all-black photo", "image/1.png: shows nothing", None)
def _(data):
    write_picture(data / "train/image/1.png", np.zeros((96, 96, 3), np.uint8))


@odd_set("a photo of one pixel", "mask/1.png: is 96x96 but its photo 1x1", "1.png: differ in size (1x1 and 96x96)")
def _(data):
    write_picture(data / "train/image/1.png", photo()[30:31, 30:31])


@odd_set("an all-black mask", "mask/1.png: is empty, all black", None)
def _(data):
    write_picture(data / "train/mask/1.png", np.zeros((96, 96), np.uint8))


@odd_set(
    "a mask in colours too dark to be read", "mask/1.png: is black where it is read: its brightest value is 76", None
)
def _(data):
    label = read_label(data / "train/mask/1.png")
    write_picture(data / "train/mask/1.png", np.stack([label, label * 0, label * 0], axis=2))


@odd_set("a photo among the masks", "mask/1.png: is no label", None)
def _(data):
    write_picture(data / "train/mask/1.png", np.clip(drawn(5, 96, 96).photo, 40, 220))


@odd_set("an inverted mask", "mask/1.png: calls", None)
def _(data):
    write_picture(data / "train/mask/1.png", 255 - read_label(data / "train/mask/1.png"))


@odd_set("a test photo among the training photos", "stands in train too, as", None)
def _(data):
    shutil.copy(data / "train/image/1.png", data / "test/image/0.png")


@odd_set(
    "a photos.csv without its columns", "photos.csv: is not a table", "photos.csv: is not a", "photos.csv: is not a"
)
def _(data):
    (data / "photos.csv").write_text("a,b\n1,2\n")


@odd_set(
    "a photos.csv of bytes", "photos.csv: is not a table", "photos.csv: is not a table", "photos.csv: is not a table"
)
def _(data):
    (data / "photos.csv").write_bytes(os.urandom(2000) + b"\xff\xfe")


@odd_set(
    "a photos.csv cut short", "photos.csv: is not a table", "photos.csv: is not a table", "photos.csv: is not a table"
)
def _(data):
    (data / "photos.csv").write_text("part,name,photo\ntrain,0,0\ntrain,1\ntest,0\n")


@odd_set(
    "a photos.csv of one endless field", "photos.csv: is not a table", "photos.csv: is not a", "photos.csv: is not a"
)
def _(data):
    (data / "photos.csv").write_text("part,name,photo\ntrain,0," + "x" * 200_000)


@odd_set("a photo that is a link to nowhere", "1.png: has no photo", "1.png: has no partner", "0.png: has no partner")
def _(data):
    for path in both_parts(data, "image"):
        path.unlink()
        path.symlink_to("nowhere.png")


@odd_set("a photo that is a link in a circle", "1.png: has no photo", "1.png: has no partner", "0.png: has no partner")
def _(data):
    for path in both_parts(data, "image"):
        path.unlink()
        path.symlink_to(path.name)


@odd_set("a photo that is a pipe", "1.png: has no photo", "1.png: has no partner", "0.png: has no partner")
def _(data):
    for path in both_parts(data, "image"):
        path.unlink()
        os.mkfifo(path)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def published_folder(bench: Bench) -> Path:
    made(bench.folder / "raw/training/images")
    return bench.folder / "raw"


for name in ("check", "train", "test"):
    add(
        "a set as published",
        name,
        lambda b, c=name: set_command(b, c, published_folder(b)),
        "raw: is a set as published",
    )
    add(
        "two sets in one folder",
        name,
        lambda b, c=name: set_command(b, c, (b.set("both/a"), b.set("both/b"))[0].parent),
        "both: holds several sets",
    )
add(
    "two sets of one name",
    "train",
    lambda b: ["train", "--data", b.set("a/set"), b.set("b/set"), "--output", b.out, *SMALL],
    "--data: several sets need folders of different names",
)


# ---------------------------------------------------------------------------------------------------------------- paths


def take(bench: Bench, command: str, path) -> list:
    """The arguments that give `path` to a command as its input."""
    if command in ("check", "train", "run", "test"):
        return set_command(bench, command, path)
    return {
        "predict": lambda: predict(bench, path),
        "predict --weights": lambda: predict(bench, bench.photos(), weights=path),
        "test --checkpoint": lambda: [
            *("test", "--checkpoint", path),
            *("--data", bench.tiny_set, "--output", bench.out),
        ],
        "test --run": lambda: ["test", "--run", path, "--data", bench.tiny_set, "--output", bench.out],
        "train --config": lambda: ["train", "--config", path, "--output", bench.out],
        "train --resume": lambda: ["train", "--resume", path],
        "prepare": lambda: ["prepare", "chase_db1", path, bench.out],
        "compare": lambda: ["compare", bench.scores("first"), path, "--output", bench.out],
    }[command]()


INPUTS = ("check", "train", "run", "test", "predict", "predict --weights", "test --checkpoint", "test --run")
INPUTS += ("train --config", "train --resume", "prepare", "compare")
LOADS = ("predict --weights", "test --checkpoint", "test --run")


def as_file(bench: Bench) -> Path:
    path = bench.folder / "odd"
    path.write_text("mine")
    return path


def as_link(bench: Bench, to: str) -> Path:
    path = bench.folder / "odd"
    path.symlink_to(to)
    return path


def as_pipe(bench: Bench) -> Path:
    os.mkfifo(bench.folder / "odd")
    return bench.folder / "odd"


def as_circle_of_folders(bench: Bench) -> Path:
    folder = made(bench.folder / "odd/below")
    for name in ("a", "b"):
        (folder / name).symlink_to(bench.folder / "odd", target_is_directory=True)
    return bench.folder / "odd"


def add_paths() -> None:
    kinds = {
        "a path that is not there": (lambda b: b.folder / "odd", {"run"}),
        "a file where a folder is asked for": (as_file, {"predict"}),
        "an empty folder": (lambda b: made(b.folder / "odd"), {"run"}),
        "a name longer than a file system takes": (lambda b: b.folder / ("odd" * 100), set()),
        "a link to nowhere": (lambda b: as_link(b, "nowhere"), {"run"}),
        "a link in a circle": (lambda b: as_link(b, "odd"), {"run"}),
        "folders in a circle": (as_circle_of_folders, {"run"}),
        "a pipe": (as_pipe, set()),
    }
    if os.geteuid():  # root may read anything
        kinds["a folder that may not be read"] = (lambda b: locked(made(b.folder / "odd"), 0), {*LOADS, "compare"})
        kinds["a file that may not be read"] = (lambda b: locked(as_file(b), 0), {"test --run"})
    # predict reports on these as on any photo among many
    one_of_many = ("a link to nowhere", "a link in a circle", "a pipe", "a file that may not be read")
    for kind, (make, left_out) in kinds.items():
        for command in INPUTS:
            if command not in left_out:
                status = 1 if command == "predict" and kind in one_of_many else 2
                leaves = r"summary\.csv" if status == 1 else "(?!)"
                add(kind, command, lambda b, m=make, c=command: take(b, c, m(b)), "odd", status, leaves)


add_paths()

# -------------------------------------------------------------------------------------------------------------- outputs


def give(bench: Bench, command: str, output) -> list:
    """The arguments of a command whose input is sound and that writes to `output`."""
    data = bench.tiny_set
    return {
        "train": lambda: ["train", "--data", data, "--output", output, *SMALL],
        "train --resume": lambda: ["train", "--resume", output],
        "run": lambda: ["run", "--data", data, "--output", output, *SMALL],
        "test": lambda: ["test", "--checkpoint", bench.weights, "--data", data, "--output", output],
        "predict": lambda: [*predict(bench, bench.photos()), "--output", output],
        "compare": lambda: ["compare", bench.scores("first"), bench.scores("second"), "--output", output],
        "prepare": lambda: ["prepare", "chase_db1", bench.raw(), output, "--size", 64],
        "synth": lambda: ["synth", output, "--train", 1, "--test", 1, "--size", 64],
    }[command]()


OUTPUTS = ("train", "run", "test", "predict", "compare", "prepare", "synth")


def locked(path: Path, mode: int) -> Path:
    path.chmod(mode)
    return path


def add_outputs() -> None:
    kinds = {
        "an output that is a file": as_file,
        "an output below a file": lambda b: as_file(b) / "below",
        "an output of too long a name": lambda b: b.folder / ("odd" * 100),
    }
    kinds["an output that is a link in a circle"] = lambda b: as_link(b, "odd")
    if os.geteuid():  # root may write anywhere
        kinds["an output that is locked"] = lambda b: locked(made(b.folder / "odd"), 0o500)
    for kind, make in kinds.items():
        for command in OUTPUTS:
            add(kind, command, lambda b, m=make, c=command: give(b, c, m(b)), "odd")

    def used(bench, name, content="mine"):
        (made(bench.folder / "odd") / name).write_text(content)
        return bench.folder / "odd"

    add("an output in use", "train", lambda b: give(b, "train", b.run("odd")), "odd: already holds a run")
    add("an output in use", "prepare", lambda b: give(b, "prepare", used(b, "a.txt")), "odd: is not empty (a.txt)")
    add("an output in use", "synth", lambda b: give(b, "synth", used(b, "a.txt")), "odd is already in use")
    for what, content in (
        ("another's", "a,b\n1,2\n"),
        ("cut short", ",".join(("input", "name")) + "\n"),
        ("bytes", "\0"),
    ):
        add(
            f"a summary.csv {what}",
            "predict",
            lambda b, c=content: give(b, "predict", used(b, "summary.csv", c)),
            "odd/summary.csv: is not a summary",
        )
    header = "input,name,width,height,fov_diameter,vessel_share,seconds,weights,status\n"
    add(
        "a summary.csv with rows cut short",
        "predict",
        lambda b: give(b, "predict", used(b, "summary.csv", header + "/a/b.png\n")),
        "odd/summary.csv: is not a summary",
    )
    for what, content in (("of other photos", '{"protocol": {"name": "native"}}'), ("no JSON", "{"), ("a list", "[]")):
        add(
            f"a metrics.json {what}",
            "test",
            lambda b, c=content: give(b, "test", used(b, "metrics.json", c)),
            "odd/metrics.json: ",
        )
    add("an output inside the input", "prepare", lambda b: give(b, "prepare", b.folder / "raw/odd"), "odd: lies inside")
    add(
        "a resume without a config.json",
        "train --resume",
        lambda b: give(b, "train --resume", used(b, "last.pth")),
        "odd",
    )


add_outputs()

# ---------------------------------------------------------------------------------------------------------- checkpoints


class Malice:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def malicious(bench: Bench, plain: bool) -> Path:
    value = {"format": CHECKPOINT_FORMAT, "state_dict": Malice(bench.folder / "made by malice")}
    path = bench.folder / "odd.pth"
    if plain:
        path.write_bytes(pickle.dumps(value))
        return path
    return saved(path, value)


def part_of(bench: Bench, content: bytes) -> Path:
    (bench.folder / "odd.pth").write_bytes(content)
    return bench.folder / "odd.pth"


def with_weights(bench: Bench, change: Callable[[dict], object], plain: bool = False) -> Path:
    weights = torch.load(bench.weights, weights_only=True)["state_dict"]
    change(weights)
    return saved(bench.folder / "odd.pth", weights) if plain else bench.checkpoint(state_dict=weights)


def fast(bench: Bench, **arguments) -> Path:
    weights = build_model("fast_attention_unet", width=4, deepest=8).state_dict()
    return bench.checkpoint(model="fast_attention_unet", arguments=arguments, state_dict=weights)


def unpacking(bench: Bench) -> Path:
    """A checkpoint whose archive is packed, which torch never does: 512 MB of zeros in a few."""
    source = saved(bench.folder / "sound.pth", {"a": torch.zeros(1)})
    path = bench.folder / "odd.pth"
    with zipfile.ZipFile(source) as sound, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for item in sound.infolist():
            with packed.open(item.filename, "w", force_zip64=True) as file:
                if item.filename.endswith("/data/0"):
                    for _ in range(8):
                        file.write(bytes(2**26))
                else:
                    file.write(sound.read(item.filename))
    return path


def wide(bench: Bench) -> Path:
    """Weights of 400 GB by their shape, one number in the file."""
    shapes = {key: value.shape for key, value in fast_on_paper(50_000).items()}
    return bench.checkpoint(
        model="fast_attention_unet",
        arguments={"width": 50_000},
        state_dict={key: torch.zeros(()).expand(shape) for key, shape in shapes.items()},
    )


def fast_on_paper(width: int) -> dict:
    from retina_seg.model import FastAttentionUNet

    with torch.device("meta"):
        return FastAttentionUNet(width=width).state_dict()


OTHER = "odd.pth: the weights are of another architecture"
UNSAFE = "odd.pth: is not a checkpoint that can be read safely"
FRAME = "odd.pth: its working frame"
CHECKPOINTS: dict[str, tuple[Callable[[Bench], Path], str]] = {
    "a checkpoint that would run code": (lambda b: malicious(b, False), UNSAFE),
    "a pickle that would run code": (lambda b: malicious(b, True), UNSAFE),
    "a checkpoint of a whole network": (lambda b: saved(b.folder / "odd.pth", nn.Linear(2, 2)), UNSAFE),
    "an empty checkpoint": (lambda b: part_of(b, b""), UNSAFE),
    "text for a checkpoint": (lambda b: part_of(b, b"weights?\n" * 99), UNSAFE),
    "a photo for a checkpoint": (lambda b: part_of(b, encoded("PNG")), UNSAFE),
    "a checkpoint cut short": (lambda b: part_of(b, b.weights.read_bytes()[:100_000]), UNSAFE),
    "a checkpoint that unpacks to half a gigabyte": (unpacking, UNSAFE),
    "a list for a checkpoint": (lambda b: saved(b.folder / "odd.pth", [1, 2]), "odd.pth: is not a checkpoint of this"),
    "a checkpoint of a later version": (
        lambda b: b.checkpoint(format="retina_seg checkpoint 9"),
        "odd.pth: is not a ch",
    ),
    "a checkpoint without weights": (lambda b: b.checkpoint(state_dict=None), "odd.pth: the checkpoint is incomplete"),
    "another architecture": (lambda b: saved(b.folder / "odd.pth", nn.Linear(2, 2).state_dict()), OTHER),
    "an unknown architecture": (
        lambda b: b.checkpoint(model="u_net_of_tomorrow"),
        "odd.pth: model 'u_net_of_tomorrow'",
    ),
    "a weight missing": (lambda b: with_weights(b, lambda w: w.pop("e1.conv.conv.0.weight")), OTHER),
    "a weight missing in a plain state dict": (
        lambda b: with_weights(b, lambda w: w.pop("e1.conv.conv.0.weight"), plain=True),
        OTHER,
    ),
    "a weight too many": (lambda b: with_weights(b, lambda w: w.update(more=torch.zeros(3))), OTHER),
    "a weight of another shape": (
        lambda b: with_weights(b, lambda w: w.update({"finaloutput.weight": torch.zeros(1, 7, 1, 1)})),
        OTHER,
    ),
    "a weight that is text": (lambda b: with_weights(b, lambda w: w.update({"finaloutput.bias": "0"})), OTHER),
    "a weight whose name is a number": (lambda b: with_weights(b, lambda w: w.update({7: torch.zeros(1)})), OTHER),
    "weights that are no numbers": (
        lambda b: with_weights(b, lambda w: w["finaloutput.weight"].fill_(float("nan"))),
        "odd.pth: holds weights that are not finite",
    ),
    "a network 10^9 wide": (lambda b: fast(b, width=10**9), "odd.pth: "),
    "a network 100,000 wide": (lambda b: fast(b, width=100_000), "odd.pth: "),
    "a network 10^30 wide": (lambda b: fast(b, width=10**30), "odd.pth: "),
    "a network without width": (lambda b: fast(b, width=0), "odd.pth: "),
    "a network of width -1": (lambda b: fast(b, width=-1), "odd.pth: "),
    "a network whose width is text": (lambda b: fast(b, width="wide"), "odd.pth: "),
    "arguments no network takes": (lambda b: fast(b, depth=3), "odd.pth: "),
    "arguments whose names are numbers": (lambda b: b.checkpoint(arguments={1: 2}), "odd.pth: "),
    "arguments that name the network twice": (lambda b: b.checkpoint(arguments={"name": "x"}), "odd.pth: "),
    "gigabytes of weights in a small file": (wide, "odd.pth: "),
    "a frame of 10^9 pixels": (lambda b: b.checkpoint(frame={"kind": "fov", "fov_diameter": 1e9}), FRAME),
    "a frame of endless pixels": (lambda b: b.checkpoint(frame={"kind": "fov", "fov_diameter": float("inf")}), FRAME),
    "a frame whose largest is below its smallest": (
        lambda b: b.checkpoint(frame={"kind": "fov", "fov_diameter": 90.0, "largest_diameter": 80.0}),
        FRAME,
    ),
    "a frame whose largest is no number": (
        lambda b: b.checkpoint(frame={"kind": "fov", "fov_diameter": 90.0, "largest_diameter": float("nan")}),
        FRAME,
    ),
    "a frame of 10^6 x 10^6": (lambda b: b.checkpoint(frame={"kind": "squeeze", "size": [10**6, 10**6]}), FRAME),
    "a frame of text": (lambda b: b.checkpoint(frame={"kind": "squeeze", "size": ["big", "big"]}), FRAME),
    "a frame that is text": (lambda b: b.checkpoint(frame="squeeze"), FRAME),
    "a threshold that is text": (lambda b: b.checkpoint(threshold="high"), "odd.pth: its threshold"),
    "a threshold of 7": (lambda b: b.checkpoint(threshold=7.0), "odd.pth: its threshold"),
    "a threshold that is no number": (lambda b: b.checkpoint(threshold=float("nan")), "odd.pth: its threshold"),
}


def as_run(bench: Bench, path: Path) -> Path:
    """The folder of a run with the file `path` for its checkpoint."""
    run = bench.run()
    shutil.move(path, run / "checkpoint.pth")
    return run


for name, (build, line) in CHECKPOINTS.items():
    for loader in LOADS:
        in_run = loader == "test --run"
        add(
            name,
            loader,
            lambda b, c=loader, m=build, r=in_run: take(b, c, as_run(b, m(b)) if r else m(b)),
            line.replace("odd.pth", "checkpoint.pth") if in_run else line,
        )


def answering_nothing(weights: dict) -> None:
    """Finite weights whose answer is no number: the variance of a layer below zero."""
    weights["e1.conv.conv.1.running_var"].fill_(-1)


add(
    "weights that answer nothing",
    "predict",
    lambda b: predict(b, b.photos(), weights=with_weights(b, answering_nothing)),
    ("good.png", "no number"),
    1,
    r"summary\.csv",
)
add(
    "weights that answer nothing",
    "test --checkpoint",
    lambda b: take(b, "test --checkpoint", with_weights(b, answering_nothing)),
    "no number",
)

# -------------------------------------------------------------------------------------------------------------- recipes

CONFIGS: dict[str, tuple[Callable[[Bench], Path], str]] = {
    name: (lambda b, c=content: written(b, c), "config.json: ")
    for name, content in {
        "an empty config.json": b"",
        "a config.json that is no JSON": b"{'recipe': 1}",
        "a config.json of bytes": b"\xff\xfe\0\x80" * 50,
        "a config.json that is a list": b"[1]",
        "a config.json nested without end": b"[" * 200_000,
        "a config.json without a recipe": b"{}",
        "a config.json whose recipe is a list": b'{"recipe": [1]}',
    }.items()
}
CONFIGS |= {
    f"a recipe with {name} {json.dumps(value)[:30]}": (lambda b, n=name, v=value: b.config(**{n: v}), said)
    for name, value, said in (
        ("tomorrow", 1, "config.json: the recipe has unknown entries: tomorrow"),
        ("epochs", "ten", "epochs"),
        ("epochs", True, "epochs"),
        ("epochs", 2.5, "epochs"),
        ("epochs", None, "epochs"),
        ("batch_size", 0, "--batch-size 0"),
        ("batch_size", 10**9, "--batch-size 1000000000"),
        ("size", 10**9, "--size 1000000000"),
        ("model", "u_net_of_tomorrow", "model 'u_net_of_tomorrow' is unknown"),
        ("model", 5, "model"),
        ("model_arguments", [1], "model_arguments"),
        ("model_arguments", {"width": 9}, "model 'attention_unet' cannot be built with {'width': 9}"),
        ("data", 5, "data"),
        ("data", [5], "data"),
        ("data", None, "data"),
        ("data", "odd\0name", "data|no such folder"),
        ("learning_rate", "fast", "learning_rate"),
        ("learning_rate", float("nan"), "--learning-rate nan"),
        ("augmentation", [1], "augmentation"),
        ("augmentation", {"rotate": "far"}, "augmentation rotate far"),
        ("augmentation", {"noise": -1}, "augmentation noise -1"),
        ("augmentation", {"tomorrow": 1}, "augmentation tomorrow: unknown"),
        ("frame", ["fov"], "frame"),
        ("fov_diameter", "wide", "fov_diameter"),
        ("fov_diameter", 1e9, "fov_diameter 1000000000.0"),
        ("held_out", "four", "held_out"),
        ("seed", "x", "seed"),
        ("workers", "many", "workers"),
        ("device", 5, "device"),
        ("device", "warp", "--device warp"),
        ("precision", "float7", "--precision float7"),
        ("warmup", "slow", "warmup"),
        ("ema", "long", "ema"),
    )
}
CONFIGS["a recipe for a network 10^9 wide"] = (
    lambda b: b.config(model="fast_attention_unet", model_arguments={"width": 10**9}),
    "model 'fast_attention_unet' cannot be built with {'width': 1000000000}",
)
CONFIGS["a recipe for a network 100,000 wide"] = (
    lambda b: b.config(model="fast_attention_unet", model_arguments={"width": 100_000}),
    "model 'fast_attention_unet' cannot be built with {'width': 100000}",
)


def written(bench: Bench, content: bytes) -> Path:
    path = made(bench.folder / "run") / "config.json"
    path.write_bytes(content)
    return path


for name, (build, line) in CONFIGS.items():
    add(name, "train --config", lambda b, m=build: ["train", "--config", m(b)], line)
    add(name, "train --resume", lambda b, m=build: ["train", "--resume", m(b).parent], line)
for name in (5, "\0"):
    add(
        f"a recipe with output {json.dumps(name)}",
        "train --config",
        lambda b, v=name: ["train", "--config", b.config(output=v)],
        "output|cannot make this folder",
    )


# --------------------------------------------------------------------------------------------------------------- scores

METRICS: dict[str, bytes | dict] = {
    "an empty metrics.json": b"",
    "a metrics.json of something else": b'{"name": "retina", "version": 3}',
    "a metrics.json that is a list": b"[]",
    "a metrics.json of bytes": b"\x89PNG\r\n\x1a\n\xff",
    "a metrics.json nested without end": b'{"a":' * 100_000,
    "a metrics.json without a protocol": {"protocol": None},
    "a metrics.json whose protocol is a list": {"protocol": []},
    "a metrics.json without a mean": {"fov": {}},
    "a metrics.json whose photos are numbers": {"images": [1, 2]},
    "a metrics.json whose photos have no scores": {"images": [{"name": "1"}]},
    "a metrics.json whose scores are text": {"frame": {key: dict.fromkeys(SCORES, "good") for key in ("mean", "std")}},
    "a metrics.json without photos": {"images": []},
}


def spoilt_scores(bench: Bench, value: bytes | dict) -> Path:
    if isinstance(value, dict):
        return bench.scores("odd", **value)
    (made(bench.folder / "odd") / "metrics.json").write_bytes(value)
    return bench.folder / "odd"


for name, content in METRICS.items():
    add(
        name,
        "compare",
        lambda b, v=content: take(b, "compare", spoilt_scores(b, v)),
        ("odd/metrics.json", "scores|JSON"),
    )
add("one run alone", "compare", lambda b: ["compare", b.scores("odd"), "--output", b.out], "compare needs two runs")


def run_with(bench: Bench, **changes) -> Path:
    run = bench.run("odd")
    write_json(run / "config.json", {**read_json(run / "config.json"), **changes})
    return run


for name, change in {
    "a run that held out nothing": {"validation": []},
    "a run that held out a number": {"validation": 5, "recipe": {"validation": "photos"}},
    "a run that held out a list of lists": {"validation": [[1]], "recipe": {"validation": "photos"}},
    "a run that held out other photos": {"validation": ["eye"], "recipe": {"validation": "photos"}},
    "a run whose recipe is a list": {"recipe": [1]},
}.items():
    add(
        name,
        "test --part validation",
        lambda b, c=change: [*take(b, "test --run", run_with(b, **c)), "--part", "validation"],
        "odd",
    )
    add(
        name,
        "threshold",
        lambda b, c=change: ["threshold", run_with(b, **c), "--data", b.tiny_set, "--output", b.out],
        "odd",
    )
add(
    "one photo held out by two runs",
    "threshold",
    lambda b: [
        *("threshold", run_with(b, validation=["0"], recipe={"validation": "photos"}), b.folder / "odd"),
        *("--data", b.tiny_set, "--output", b.out),
    ],
    "holds out photo 0",
)

# -------------------------------------------------------------------------------------------------------------- options


def add_options() -> None:
    train = [("--device", "warp"), ("--device", "cuda:99"), ("--device", ""), ("--epochs", 0), ("--batch-size", -1)]
    train += [("--batch-size", 10**9), ("--size", 0), ("--size", 10**9), ("--learning-rate", "nan"), ("--workers", -1)]
    train += [("--held-out", 99), ("--fold", 99), ("--seed", -1), ("--seed", 10**30)]
    for option, value in train:
        more = {"--held-out": ["--validation", "photos"], "--fold": ["--validation", "photos", "--held-out", 1]}
        more = more.get(option, [])
        for command in ("train", "run"):
            add(
                f"{option} {str(value)[:10]}",
                command,
                lambda b, c=command, o=option, v=value, m=tuple(more): [*set_command(b, c, b.tiny_set), *m, o, v],
                f"{option} {str(value)[:10]}",
            )
    for option, value in (("--threshold", 0), ("--threshold", 1), ("--threshold", "nan"), ("--device", "warp")):
        for command in ("test", "predict"):
            add(
                f"{option} {value}",
                command,
                lambda b, c=command, o=option, v=value: [*give(b, c, b.out), o, v],
                (option,),
            )
    for value in (0, -5, 31, 10**5, 10**9):
        for command in ("predict", "test"):
            add(
                f"--working-size {value}",
                command,
                lambda b, c=command, v=value: [*give(b, c, b.out), "--working-size", v],
                f"--working-size {value}",
            )
    for command, option, values in (("prepare", "--size", (0, "tiny", 10**9)), ("synth", "--size", (0, 10**9))):
        for value in values:
            add(
                f"{option} {value}",
                command,
                lambda b, c=command, o=option, v=value: [*give(b, c, b.out), o, v],
                f"{value}|{option}",
            )
    for option, value in (("--train", -1), ("--train", 10**9), ("--seed", -1)):
        add(f"{option} {value}", "synth", lambda b, o=option, v=value: [*give(b, "synth", b.out), o, v], f"{value}")


add_options()

# ------------------------------------------------------------------------------------------------- full disks, odd names


def full_disk(bench: Bench, name: str, after: int, make: list) -> list:
    """From its `after`-th call on, the system's function `name` finds no space left."""
    real, calls = getattr(os, name), []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    bench.monkeypatch.setattr(os, name, fail)
    return make


WHOLE = r"\.plan\.csv|config\.json|history\.csv|\w+\.pth|\w+\.png|summary\.csv|metrics\.\w+|comparison\.csv"
for name in ("train", "run", "test", "predict", "compare", "prepare"):
    for function in ("fsync", "replace"):
        for count in (0, 2):
            if (name, count) != ("compare", 2):  # it writes two files
                add(
                    f"a disk that is full at {function} {count + 1}",
                    name,
                    lambda b, c=name, f=function, n=count: full_disk(b, f, n, give(b, c, b.out)),
                    ("cannot be written", "No space left"),
                    leaves="(?!)" if count == 0 or name == "prepare" else WHOLE,
                )
add(
    "a disk that is full at replace 1",
    "synth",
    lambda b: full_disk(b, "replace", 0, give(b, "synth", b.out)),
    "No space left",
)

NAMES = {
    "spaces": b"an eye",
    "other alphabets": "眼-глаз-ü".encode(),
    "a dash in front": b"-eye",
    "a new line": b"an\neye",
    "quotes": b'it\'s "an" `eye` $HOME $_',
    "per cent and braces": b"100%s{0}",
    "bytes no alphabet has": b"caf\xe9",
    "the greatest length": b"e" * 251,
    "a control character": b"eye\x1b[31m",
}


def shown(name: bytes) -> str:
    return cli.one_line(os.fsdecode(name))


def add_names() -> None:
    for kind, name in NAMES.items():
        file = os.fsdecode(name) + ".png"

        def in_set(bench, command, file=file):
            data = bench.set()
            for part in ("train", "test"):
                (data / part / "image" / file).write_text("no picture")
                (data / part / "mask" / file).write_text("no picture")
            return set_command(bench, command, data)

        def in_folder(bench, file=file):
            (bench.photos() / file).write_text("no picture")
            return predict(bench, bench.folder / "photos")

        kind = f"a bad file of a name with {kind}"
        add(kind, "check", lambda b, i=in_set: i(b, "check"), (f"train/image/{shown(name)}.png", NO_PICTURE), 1)
        for command in ("train", "run"):
            add(kind, command, lambda b, c=command, i=in_set: i(b, c), (f"{shown(name)}.png", NO_PICTURE))
        add(kind, "test", lambda b, i=in_set: i(b, "test"), (f"{shown(name)}.png", NO_PICTURE), 2, WHOLE)
        add(kind, "predict", in_folder, (f"{shown(name)}.png", NO_PICTURE), 1, r"good_\w+\.png|summary\.csv")


add_names()


# -------------------------------------------------------------------------------------------------- what only looks bad


def works(kind: str, ending: str, content: Callable[[], bytes], *commands: str) -> None:
    """Registers a picture that predict takes for a photo, and that `commands` take in a set of photos of 96x96."""

    def in_folder(bench):
        (bench.photos() / f"odd.{ending}").write_bytes(content())
        return predict(bench, bench.folder / "photos")

    def in_set(bench, command):
        data = bench.set()
        in_the_place_of(data / "train/image/1.png", content(), ending)
        in_the_place_of(data / "test/image/0.png", flopped(content()), ending)
        return [*set_command(bench, command, data), *(["--preset", "notebook"] if command == "train" else [])]

    WORKS.append(Case(kind, "predict", in_folder, ("2 segmented, 0 done before, 0 failed",), 0))
    for command in commands:
        said = "no problems" if command == "check" else "written to"
        WORKS.append(Case(kind, command, lambda b, c=command: in_set(b, c), (said,), 0))


def flopped(content: bytes) -> bytes:
    """Another eye in the same format: the same one in both parts would be a problem of its own."""
    with Image.open(io.BytesIO(content)) as image:
        other = Image.fromarray(drawn(6, image.height, image.width).photo).convert(image.mode.replace("I;16", "L"))
        file = io.BytesIO()
        other.save(file, image.format)
    return file.getvalue()


def sixteen_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(drawn(5, 96, 96).photo[..., 1].astype(np.uint16) * 257).save(file, "PNG")
    return file.getvalue()


@cache
def moving(ending: str, frames: int) -> bytes:
    """An animation for ever: its first frame is a photo."""
    file = io.BytesIO()
    first = Image.fromarray(drawn(5, 96, 96).photo)
    more = [Image.new("RGB", (96, 96), (shade % 256, shade // 256, 0)) for shade in range(frames)]
    first.save(file, ending, save_all=True, append_images=more, loop=0, duration=20)
    return file.getvalue()


def in_a_circle_of_frames() -> bytes:
    """A TIFF whose next picture is the same one, for ever."""
    content = encoded("TIFF")
    start = struct.unpack("<I", content[4:8])[0]
    end = start + 2 + 12 * struct.unpack("<H", content[start : start + 2])[0]
    return content[:end] + struct.pack("<I", start) + content[end + 4 :]


for name, (made_of, bytes_of) in {
    "a photo of 16 bits": ("png", sixteen_bits),
    "a photo with transparency": ("png", lambda: encoded("PNG", "RGBA")),
    "a photo of a palette": ("gif", lambda: encoded("GIF", "P")),
    "a photo in grey": ("jpg", lambda: encoded("JPEG", "L")),
    "a photo in printer's colours": ("jpg", lambda: encoded("JPEG", "CMYK")),
    "a TIFF in printer's colours": ("tif", lambda: encoded("TIFF", "CMYK")),
    "a JPEG that calls itself PNG": ("png", lambda: encoded("JPEG")),
    "a GIF of 500 frames without end": ("gif", lambda: moving("GIF", 500)),
    "a WebP that moves": ("webp", lambda: moving("WEBP", 20)),
    "a TIFF whose frames go in a circle": ("tif", in_a_circle_of_frames),
    "rubbish behind the picture": ("jpg", lambda: encoded("JPEG") + os.urandom(5000)),
    "a packed TIFF": ("tif", lambda: encoded("TIFF", compression="tiff_lzw")),
}.items():
    works(name, made_of, bytes_of, "check", *(("train", "test") if "16 bits" in name else ()))
for name, side in {
    "a photo of one pixel": (1, 1),
    "a photo of one row": (3000, 1),
    "a photo of one column": (1, 3000),
}.items():
    works(name, "png", lambda s=side: png(*s, rows=bytes([0, *[9] * 3 * s[0]] * s[1])))
works("an all-black photo", "png", lambda: png(64, 64, rows=bytes(64 * 193)))


def taken_set(kind: str, command: str, said: str):
    """Registers a function that changes the set at `data` in a way that is taken, and said."""

    def register(change):
        def make(bench):
            data = bench.set()
            change(data)
            return [*set_command(bench, command, data), *(["--preset", "notebook"] if command == "train" else [])]

        WORKS.append(Case(kind, command, make, (said,), 0))
        return change

    return register


@taken_set("masks of 0 and 1", "check", "4 masks are of 0 and 1 rather than 0 and 255; they are read as that")
@taken_set(
    "masks of 0 and 1", "train", "mask/0.png and 3 more: holds 0 and 1 instead of 0 and 255: 1 is taken as vessel"
)
def _(data):
    for path in (data / "train/mask").iterdir():
        write_picture(path, read_label(path) // 255)


@taken_set("a mask that is all black", "train", "mask/1.png: warning: the label is all black")
def _(data):
    write_picture(data / "train/mask/1.png", np.zeros((96, 96), np.uint8))


@taken_set("a mask in colours too dark to be read", "train", "mask/1.png: warning: the label is dark")
def _(data):
    label = read_label(data / "train/mask/1.png")
    write_picture(data / "train/mask/1.png", np.stack([label, label * 0, label * 0], axis=2))


@taken_set("no photos.csv", "check", "no problems")
@taken_set("no photos.csv", "train", "written to")
def _(data):
    (data / "photos.csv").unlink()


@taken_set("a photos.csv of a spreadsheet", "check", "no problems")
def _(data):
    (data / "photos.csv").write_bytes(b"\xef\xbb\xbf" + (data / "photos.csv").read_bytes())


@taken_set("a set with folders in a circle", "check", "no problems")
@taken_set("a set with folders in a circle", "train", "written to")
def _(data):
    for place in (data, data / "train", data / "train/image"):
        (place / "again").symlink_to(data, target_is_directory=True)


def odd_photos(bench: Bench, command: str, name: bytes) -> list:
    data = bench.set()
    for part, number in (("train", 1), ("test", 0)):
        for kind in ("image", "mask", "fov"):
            (data / part / kind / f"{number}.png").rename(data / part / kind / f"{os.fsdecode(name)}.png")
    (data / "photos.csv").unlink()
    return [*set_command(bench, command, data), *(["--preset", "notebook"] if command == "train" else [])]


def odd_run(bench: Bench, name: bytes) -> list:
    shutil.move(bench.scores("first"), bench.folder / os.fsdecode(name))
    return ["compare", bench.folder / os.fsdecode(name), bench.scores("second"), "--output", bench.out]


for name, text in NAMES.items():
    for command, said, make in (
        (
            "predict --output",
            "1 segmented",
            lambda b, t: [*predict(b, b.photos()), "--output", b.folder / os.fsdecode(t)],
        ),
        ("check", "no problems", lambda b, t: ["check", b.set(os.fsdecode(t))]),
        ("compare", "written to", odd_run),
        ("train (photos)", "written to", lambda b, t: odd_photos(b, "train", t)),
        ("test (photos)", "written to", lambda b, t: odd_photos(b, "test", t)),
        ("check (photos)", "no problems", lambda b, t: odd_photos(b, "check", t)),
    ):
        WORKS.append(Case(f"a name with {name}", command, lambda b, m=make, t=text: m(b, t), (said,), 0))

# -------------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture
def bench(tmp_path, tiny_set, tiny_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, tiny_set, tiny_run, monkeypatch)


@pytest.fixture(autouse=True)
def _in_time():
    """Ends a test that waits for what never comes: a pipe without a writer, a folder in a circle."""

    def give_up(*_):
        pytest.fail(f"waits, or is not done in {3 * SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(3 * SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def there(folder: Path) -> dict[str, str]:
    """Every file and link below `folder` with a digest of what it holds."""
    found = {}
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            key = str(path.relative_to(folder))
            readable = path.is_file() and path.stat().st_mode & 0o400
            found[key] = hashlib.sha256(path.read_bytes()).hexdigest() if readable else "not read"
    return found


BAR = re.compile(r"[\w ]+:\s+(\d+%\|.*\||\d+).*\[[^\[]*\]|\s*")


def call(arguments: list) -> int:
    """The command's exit status, having seen that it warns of nothing; as for its user, a warning is no error."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for unseen in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", unseen)
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # the parser's own
            status = int(stop.code or 0)
    assert not [str(warning.message) for warning in seen]
    return status


def refusal(status: int, out: str, err: str, said: tuple[str, ...]) -> str:
    """The one line that a refusal gave, having seen that there is no other."""
    assert "Traceback" not in err
    lines = [line for line in re.split(r"[\r\n]", err) if not BAR.fullmatch(line)]
    if lines and lines[0].startswith("usage:"):  # of the parser: how the command is called, then the line
        lines = lines[-1:]
    if status == 1 and not lines:  # a report: what it found stands among other lines
        lines = [
            line for line in out.splitlines() if line.startswith("problem: ") and all(map(line.__contains__, said[:1]))
        ]
    assert len(lines) == 1, lines
    assert lines[0].startswith(("retina-seg", "problem: "))
    for piece in said:
        assert piece in lines[0] or re.search(piece, lines[0]), lines[0]
    return lines[0]


def name_of(case: Case) -> str:
    return f"{case.command}: {case.kind}"


def marked(cases: list[Case]) -> list:
    """All of `cases`: a quarter of each kind's commands in the short form, another quarter for the next kind."""
    by_kind: dict[str, list[Case]] = {}
    for case in cases:
        by_kind.setdefault(case.kind, []).append(case)
    return [
        pytest.param(
            case, id=name_of(case), marks=() if place % 4 == number % min(4, len(of_kind)) else pytest.mark.full
        )
        for number, of_kind in enumerate(by_kind.values())
        for place, case in enumerate(of_kind)
    ]


@pytest.mark.parametrize("case", marked(CASES))
def test_bad_input_is_one_line_that_names_it(case, bench, capfd, record_property):
    arguments = case.make(bench)
    before, memory, start = there(bench.folder), peak_memory(), time.process_time()
    capfd.readouterr()
    status = call(arguments)
    shown = capfd.readouterr()
    seconds = time.process_time() - start
    line = refusal(status, shown.out, shown.err, case.said)
    record_property("row", (case.kind, case.command, status, line.replace(str(bench.folder), "…")))
    assert status == case.status
    after = there(bench.folder)
    new = [Path(name).name for name in after.keys() - before.keys()]
    assert not [name for name in new if not re.fullmatch(case.leaves, name)]
    half = [name for name in new if name.startswith(".") or "partial" in name or "tmp" in name]
    assert not [name for name in half if name != PLAN]  # a call that is broken off keeps the names it gave
    assert {name: after.get(name) for name in before} == before
    assert_whole(bench.folder / name for name in after.keys() - before.keys())
    assert peak_memory() - memory < MEGABYTES and seconds < SECONDS


@pytest.mark.parametrize("case", marked(WORKS))
def test_what_only_looks_bad_is_taken(case, bench, capfd, record_property):
    arguments = case.make(bench)
    capfd.readouterr()
    status = call(arguments)
    shown = capfd.readouterr()
    assert not [line for line in re.split(r"[\r\n]", shown.err) if not BAR.fullmatch(line)]
    assert all(piece in shown.out for piece in case.said), shown.out
    line = next(line for line in shown.out.splitlines() if case.said[0] in line)
    record_property("row", (case.kind, case.command, status, line.replace(str(bench.folder), "…")))
    assert status == 0


def peak_memory() -> float:
    """Megabytes this process had at the most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def assert_whole(paths) -> None:
    """What a refusal left behind can be read to its end."""
    for path in paths:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            read_photo(path)
        elif path.suffix == ".pth":
            torch.load(path, weights_only=True)


def test_there_are_kinds_enough():
    assert len({case.kind for case in CASES}) >= 40
    assert len({name_of(case) for case in (*CASES, *WORKS)}) == len(CASES) + len(WORKS)
    commands = {case.command.split()[0] for case in CASES}
    assert commands == {"check", "train", "run", "test", "predict", "prepare", "compare", "threshold", "synth"}


IN_A_PROCESS = (
    "check (photo): a TIFF of 55,000 samples a pixel",
    "check: a bad file of a name with bytes no alphabet has",
    "predict: a pipe",
    "predict --weights: a pickle that would run code",
)


@pytest.mark.parametrize(
    "name", [IN_A_PROCESS[0], *(pytest.param(n, marks=pytest.mark.full) for n in IN_A_PROCESS[1:])]
)
def test_a_process_of_its_own_says_the_same(name, bench):
    case = next(case for case in CASES if name_of(case) == name)
    command = [sys.executable, "-m", "retina_seg", *map(str, case.make(bench))]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    refusal(done.returncode, done.stdout, done.stderr, case.said)
    assert done.returncode == case.status


class _Table:
    """Prints a line a test, as they end."""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            print(f"{report.nodeid}\n{report.longreprtext}")
        for kind, command, status, line in (value for name, value in report.user_properties if name == "row"):
            if report.when == "call":
                print(f"{kind} | {command} | {status} | {line}")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-o", "addopts=", "-p", "no:terminal"], plugins=[_Table()]))
