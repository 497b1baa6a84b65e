"""Every kind of bad input, given to a command that takes such files: one line that names it, and nothing half done.

A kind is tried with one command, and every command with several kinds: `CASES`. `WORKS` only looks bad, and is taken.
"""

import hashlib
import io
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoint import Bomb
from torch import nn

from retina_seg import cli
from retina_seg.images import read_grey, read_image, write_image
from retina_seg.metrics import SCORES
from retina_seg.sets.synthetic import synthetic_image
from retina_seg.utils import read_json, write_json

SMALL = ("--preset", "quick", "--size", "32", "--epochs", "1", "--patches", "4", "--device", "cpu")
CASES, WORKS = [], []
NEW = r"good_\w+\.png|summary\.csv|\.summary\.0\.csv"  # what predict leaves: good images are done, and what is not is said
WHOLE = NEW + r"|config\.json|history\.csv|\w+\.pth|\w+\.png|metrics\.\w+|comparison\.csv"


def case(kind, command, make, said, status=2, leaves="(?!)"):
    """A kind of bad input: `make(desk)` gives the arguments, `said` is in the one line, `leaves` may be new afterwards."""
    CASES.append(pytest.param(make, said, status, leaves, id=f"{command}: {kind}"))


def works(kind, command, make):
    said = {"check": "no problems", "predict": "0 failed"}.get(command, "written to")
    WORKS.append(pytest.param(make, said, id=f"{command}: {kind}"))


class Desk:
    """A folder to damage things in, with a sound dataset, run, checkpoint and image to start from."""

    def __init__(self, folder, tiny_set, tiny_run):
        self.folder, self.tiny_set, self.tiny_run, self.weights = (
            folder,
            tiny_set,
            tiny_run,
            tiny_run / "checkpoint.pth",
        )
        self.odd, self.out, self.pth = folder / "odd", folder / "out", folder / "odd.pth"

    def set(self, name="set"):
        return Path(shutil.copytree(self.tiny_set, self.folder / name))

    def raw(self):
        """CHASE_DB1 as published, two images of it."""
        for number, name in enumerate(("Image_01L", "Image_01R")):
            write_image(made(self.folder / "raw") / f"{name}.jpg", drawn(number).image)
            write_image(self.folder / "raw" / f"{name}_1stHO.png", drawn(number).mask)
        return self.folder / "raw"

    def images(self):
        write_image(made(self.folder / "images") / "good.png", drawn(3).image)
        return self.folder / "images"

    def checkpoint(self, **changes):
        """A checkpoint like the sound one but for `changes`."""
        return saved(self.pth, {**torch.load(self.weights, weights_only=True), **changes})

    def run(self, **changes):
        """A copy of the sound run with these entries of its config changed."""
        shutil.copytree(self.tiny_run, self.odd)
        value = read_json(self.odd / "config.json")
        write_json(self.odd / "config.json", {**value, "config": {**value["config"], **changes}})
        return self.odd

    def scores(self, name, **changes):
        """The folder of a tested run, its metrics.json sound but for `changes`."""
        mean = dict.fromkeys(SCORES, 0.5)
        region = {"mean": mean, "std": mean, "pooled": mean, "ci95": {"f1": [0.4, 0.6]}}
        images = [{"name": "1", "frame": mean, "fov": mean}]
        value = {"protocol": {"size": "native", "part": "test"}, "frame": region, "fov": region, "images": images}
        write_json(made(self.folder / name) / "metrics.json", {**value, **changes})
        return self.folder / name

    def command(self, name, given=None, output=None):
        """The arguments of a command: `given` for its usual input, or for what stands after --; all else sound."""
        command, _, what = name.partition(" --")
        output, data = output or self.out, self.tiny_set if what or given is None else given
        weights = given if what in ("weights", "checkpoint") else self.weights
        if what in ("config", "resume"):
            return [command, f"--{what}", given, *(["--output", output] if what == "config" else [])]
        if command == "predict":
            images = self.images() if what or given is None else given
            return [command, images, "--weights", weights, "--working-size", 64, "--output", output]
        source = ("--run", given) if what == "run" else ("--checkpoint", weights)
        arguments = {
            "check": lambda: [data],
            "train": lambda: ["--data", data, "--output", output, *SMALL],
            "run": lambda: ["--data", data, "--output", output, *SMALL],
            "test": lambda: [*source, "--data", data, "--output", output, "--protocol", "native"],
            "prepare": lambda: ["chase_db1", given or self.raw(), output, "--size", 64],
            "compare": lambda: [self.scores("first"), given or self.scores("second"), "--output", output],
            "threshold": lambda: [given, "--data", self.tiny_set, "--output", output],
            "synth": lambda: [output, "--train", 1, "--test", 1, "--size", 64],
            "export": lambda: ["--weights", weights, "--output", output],
        }
        return [command, *arguments[command]()]


@cache
def drawn(seed):
    return synthetic_image(seed, 96, 96)


def made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def saved(path, value):
    torch.save(value, path)
    return path


def written(path, content):
    made(path.parent).joinpath(path.name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def damaged(command, where, damage):
    """Makes a command's arguments, with a dataset in which `damage` was done to a file."""

    def make(desk):
        damage(desk.set() / where)
        return desk.command(command, desk.folder / "set")

    return make


# -------------------------------------------------------------------------------------------------------------- images


def encoded(ending, mode="RGB", array=None, **options):
    """A sound image of 96x96, or `array`, as a file's bytes."""
    file = io.BytesIO()
    image = Image.fromarray(drawn(5).image).convert(mode) if array is None else Image.fromarray(array)
    image.save(file, ending, **options)
    return file.getvalue()


def png(width, height, bits=8, colour=2, rows=b"\0" * 99):
    """A PNG file that claims a size, whatever its rows hold."""
    content = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def with_image(command, place, content):
    """Makes a command's arguments, with an input in which one image is `content()`; `place` has its ending."""

    def make(desk):
        raw = command == "prepare"
        folder = {"predict": desk.images, "prepare": desk.raw}.get(command, desk.set)()
        (folder / place).with_suffix(".jpg" if raw else ".png").unlink(missing_ok=True)
        path = written(folder / place, content())
        return desk.command(command, path if place == "alone.png" else folder)

    return make


NO_IMAGE, DAMAGED, LARGE = "is not an image", "is damaged", "scale the image down"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 96\n%%EndComments\nshowpage\n"
for kind, command, place, line, content in (
    ("an empty file", "check", "train/image/1.png", NO_IMAGE, lambda: b""),
    ("text", "predict", "alone.png", NO_IMAGE, lambda: b"not an image\n" * 50),
    ("PDF", "prepare", "Image_01R.jpg", NO_IMAGE, lambda: b"%PDF-1.7\n" + bytes(500)),
    ("PostScript, which would be run", "train", "train/image/1.png", NO_IMAGE, lambda: EPS),
    ("a PNG cut short", "test", "test/image/0.png", DAMAGED, lambda: encoded("PNG")[:9000]),
    ("a JPEG cut short", "predict", "bad.jpg", DAMAGED, lambda: encoded("JPEG")[:2000]),
    ("a TIFF cut short", "check", "train/mask/1.tif", f"{NO_IMAGE}|{DAMAGED}", lambda: encoded("TIFF")[:9000]),
    ("a WebP cut short", "run", "train/image/1.webp", f"{NO_IMAGE}|{DAMAGED}", lambda: encoded("WEBP")[:900]),
    ("a PNG that claims 100,000 x 100,000", "train", "train/mask/1.png", LARGE, lambda: png(100_000, 100_000)),
    ("a PNG of 400 million pixels", "predict", "b.png", LARGE, lambda: png(20_000, 20_000, 1, 0, bytes(2501 * 20_000))),
):
    leaves = {"predict": NEW, "test": r"1_errors\.png|1\.png"}.get(command, "(?!)")
    status = 1 if command in ("check", "predict") else 2
    case(kind, command, with_image(command, place, content), f"{Path(place).name}: .*({line})", status, leaves)
for command, place, content in (
    ("predict", "odd.png", lambda: encoded("PNG", array=drawn(5).image[..., 1].astype(np.uint16) * 257)),
    ("train", "train/image/1.png", lambda: encoded("PNG", "RGBA")),
    ("test", "test/image/0.jpg", lambda: encoded("JPEG", "CMYK")),
    ("check", "train/image/1.gif", lambda: encoded("GIF", "P") + bytes(5000)),
    ("predict", "odd.png", lambda: png(3000, 1, rows=b"\0" + b"\x09" * 9000)),
):
    works(f"an unusual {place}", command, with_image(command, place, content))

# ------------------------------------------------------------------------------------------------------------ datasets


def redrawn(change):
    return lambda path: write_image(path, change(read_grey(path)))


def link(target):
    return lambda path: (path.unlink(missing_ok=True), path.symlink_to(target))


NARROW = redrawn(lambda mask: mask[:, :60])
for kind, command, where, damage, line in (
    ("a mask of another size", "check", "train/mask/1.png", NARROW, "1.png: is 60x96 but its image 96x96"),
    ("a mask of another size", "train", "train/mask/1.png", NARROW, "mask/1.png: differ in size"),
    ("a field of view of another size", "run", "train/fov/1.png", NARROW, "fov/1.png: differs in size"),
    ("an image without its mask", "train", "train/mask/1.png", Path.unlink, "image/1.png: has no partner"),
    ("a mask without its image", "check", "train/image/1.png", Path.unlink, "mask/1.png: has no partner"),
    ("no folder of masks", "test", "test/mask", shutil.rmtree, "test/mask: no such folder"),
    ("no training images", "train", "train/image", lambda p: [i.unlink() for i in p.iterdir()], "holds no images"),
    ("a link to nowhere", "check", "train/image/1.png", link("nowhere.png"), "1.png: has no partner"),
    ("a link in a circle", "train", "train/image/1.png", link("1.png"), "1.png: has no partner"),
    ("a pipe", "test", "test/mask/0.png", lambda p: (p.unlink(), os.mkfifo(p)), "0.png: has no partner"),
    ("a table of other columns", "check", "photos.csv", lambda p: p.write_text("a,b\n1,2\n"), "photos.csv: is no"),
    ("a table of bytes", "train", "photos.csv", lambda p: p.write_bytes(bytes(range(256))), "photos.csv: "),
    ("a table of one endless field", "run", "photos.csv", lambda p: p.write_text("x" * 200_000), "photos.csv: "),
):
    case(kind, command, damaged(command, where, damage), line, 1 if command == "check" else 2)

works("masks of 0 and 1", "train", damaged("train", "train/mask/1.png", redrawn(lambda mask: mask // 255)))
works("no photos.csv", "check", damaged("check", "photos.csv", Path.unlink))
works("folders in a circle", "train", damaged("train", "train/again", lambda path: path.symlink_to(path.parents[1])))

# --------------------------------------------------------------------------------------------------- inputs and outputs

FILE, EMPTY, MISSING = (lambda d: written(d.odd, "mine")), (lambda d: made(d.odd)), (lambda d: d.odd)
LONG, PIPE = (lambda d: d.folder / ("odd" * 100)), (lambda d: os.mkfifo(d.odd) or d.odd)
LINK, LOOP = (lambda d: link("nowhere")(d.odd) and d.odd), (lambda d: link("odd")(d.odd) and d.odd)
BELOW = lambda d: written(d.odd, "mine") / "below"  # noqa: E731


def circle(desk):
    """Folders that lead into each other without end."""
    for name in ("a", "b"):
        (made(desk.odd / "below") / name).symlink_to(desk.odd, target_is_directory=True)
    return desk.odd


def published(desk):
    return made(desk.odd / "training/images").parents[1]


def locked(desk):
    desk.odd.mkdir(0o400)
    return desk.odd


for kind, make, *commands in (
    ("a file", FILE, "check", "run", "test --checkpoint", "prepare", "export --weights"),
    ("an empty folder", EMPTY, "test", "predict", "test --run", "train --resume", "compare"),
    ("not there", MISSING, "predict", "train --config", "threshold"),
    ("of too long a name", LONG, "test --checkpoint"),
    ("a pipe", PIPE, "predict --weights", "train --config", "compare"),
    ("a link to nowhere", LINK, "predict --weights"),
    ("a link in a circle", LOOP, "train", "train --resume"),
    ("folders in a circle", circle, "train", "predict", "prepare"),
    ("two datasets", lambda d: (d.set("odd/a"), d.set("odd/b")) and d.odd, "check"),
    ("a dataset as published", published, "train"),
    *([("locked", locked, "check", "predict", "test")] if os.geteuid() else []),  # root may read anything
):
    for command in commands:
        case(f"an input: {kind}", command, lambda d, c=command, m=make: d.command(c, m(d)), "odd")
case("a pipe among the inputs", "predict", lambda d: d.command("predict", PIPE(d)), "odd", 1, NEW)
for command, make in (
    *(("train", BELOW), ("run", LONG), ("test", FILE), ("predict", LOOP)),
    *(("compare", BELOW), ("prepare", FILE), ("synth", LOOP), ("export", FILE)),
):
    case("an output in the way", command, lambda d, c=command, m=make: d.command(c, output=m(d)), "odd")
for command, name, content, line in (
    ("prepare", "a.txt", "mine", "odd: is not empty .a.txt"),
    ("synth", "a.txt", "mine", "odd: is not empty .a.txt"),
    ("predict", "good_vessels.png", "mine", "good_vessels.png: is there already"),
    ("predict", "summary.csv", "a,b\n1,2\n", "odd/summary.csv: is"),
    ("test", "metrics.json", '{"protocol": {}}', "metrics.json: holds other scores"),
):
    make = lambda d, a=(command, name, content): d.command(a[0], output=written(d.odd / a[1], a[2]).parent)  # noqa: E731
    case(f"an output with {name}", command, make, line)
case("an output with a run", "train", lambda d: d.command("train", output=d.run()), "odd: already holds a run")
case("an output in its input", "prepare", lambda d: d.command("prepare", output=d.raw() / "odd"), "odd: lies inside")

# -------------------------------------------------------------------------------------- checkpoints, configs and scores


def with_weights(key, value):
    def make(desk):
        weights = torch.load(desk.weights, weights_only=True)["state_dict"]
        return desk.checkpoint(state_dict={**weights, key: value})

    return make


UNSAFE, OTHER, FRAME = "read safely", "another architecture", "its working frame"
for (kind, make, line), command in zip(
    (
        ("a checkpoint that would run code", lambda d: saved(d.pth, {"state_dict": Bomb(str(d.out))}), UNSAFE),
        ("a pickle that would run code", lambda d: written(d.pth, pickle.dumps({"format": Bomb(str(d.out))})), UNSAFE),
        ("a whole network", lambda d: saved(d.pth, nn.Linear(2, 2)), UNSAFE),
        ("a checkpoint cut short", lambda d: written(d.pth, d.weights.read_bytes()[:100_000]), UNSAFE),
        ("another network", lambda d: saved(d.pth, nn.Linear(2, 2).state_dict()), OTHER),
        ("a weight that is not finite", with_weights("output1.bias", torch.full((3,), np.nan)), "not finite"),
        (
            "a network 10^9 wide",
            lambda d: d.checkpoint(model="fast_attention_unet", arguments={"width": 10**9}),
            "does not take them|memory",
        ),
        ("a frame of 10^9 pixels", lambda d: d.checkpoint(frame={"kind": "fov", "fov_diameter": 1e9}), FRAME),
        ("a frame that is text", lambda d: d.checkpoint(frame="resize"), FRAME),
        ("a threshold of 7", lambda d: d.checkpoint(threshold=7.0), "its threshold 7.0"),
    ),
    cycle(("predict --weights", "test --checkpoint", "export --weights")),
    strict=False,
):
    case(kind, command, lambda d, c=command, m=make: d.command(c, m(d)), f"odd.pth: .*({line})")
NAN_OUTPUT = with_weights("e1.conv.conv.1.running_var", torch.full((32,), -1.0))  # finite, but below 0
case("an output of NaN", "test", lambda d: d.command("test --checkpoint", NAN_OUTPUT(d)), "the network's output is NaN")
case("an output of NaN", "predict", lambda d: d.command("predict --weights", NAN_OUTPUT(d)), "is NaN", 1, NEW)

NESTED, BYTES = b'{"a":' * 100_000, b"\x89PNG\r\n\x1a\n\xff"
for content in (b"", BYTES, NESTED):
    make = lambda d, c=content: d.command("train --config", written(d.odd / "config.json", c))  # noqa: E731
    case(f"a config.json of {content[:9]}", "train --config", make, "odd/config.json: is not JSON")
for values in ({"epochs": 2.5}, {"data": [5]}, {"tomorrow": 1}):
    make = lambda d, v=values: d.command("train --resume", d.run(**v))  # noqa: E731
    case(f"a config with {values}", "train --resume", make, f"odd/config.json: .*{next(iter(values))}")
for content in ({"protocol": None}, {"images": [{"name": "1"}]}, {"images": []}):
    make = lambda d, c=content: d.command("compare", d.scores("odd", **c))  # noqa: E731
    case(f"a metrics.json with {content}", "compare", make, "odd/metrics.json: holds no scores")
case(
    "a metrics.json of bytes", "compare", lambda d: d.command("compare", written(d.odd / "metrics.json", BYTES)), "JSON"
)
case("one run alone", "compare", lambda d: ["compare", d.scores("odd"), "--output", d.out], "two runs")
case("no held-out images", "threshold", lambda d: d.command("threshold", d.run()), "odd/config.json: held out no")

# ------------------------------------------------------------------------------- options, full disks, names of all kinds

for command, *options in (
    *(("train", "--device", "cuda:99"), ("train", "--epochs", 0), ("run", "--batch-size", -1)),
    *(("train", "--size", 10**9),),
    *(
        ("train", "--validation", "photos", "--held-out", 99),
        ("train", "--seed", 10**30),
        ("test", "--threshold", "nan"),
    ),
    *(("train", "--model-arguments", "{"), ("predict", "--working-size", 10**9), ("test", "--run", "other")),
    *(("prepare", "--size", "tiny"), ("synth", "--size", 10**9), ("check", "--size", 9)),
):
    name = f"{options[-2]} {str(options[-1])[:10]}"
    case(name, command, lambda d, c=command, o=options: [*d.command(c), *o], rf"{options[-2].strip('-')}\b")


def full_disk(command, function, after):
    """Makes arguments; from its `after`-th call on, the system's `function` finds no space left."""
    real, calls = getattr(os, function), []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    def make(desk):
        arguments = desk.command(command)
        desk.monkeypatch.setattr(os, function, fail)
        return arguments

    return make


for command, function, after in (
    *(("train", "replace", 1), ("run", "fsync", 0), ("test", "replace", 2), ("predict", "fsync", 2)),
    *(("compare", "replace", 1), ("prepare", "replace", 2), ("synth", "fsync", 1)),
):
    make, said = full_disk(command, function, after), "cannot be written .No space left"
    case(f"a disk that is full at {function} {after + 1}", command, make, said, leaves=WHOLE)


def named(command, name, good):
    """Makes arguments with files of that name, good ones or no images."""

    def make(desk):
        file, data = f"{os.fsdecode(name)}.png", desk.set()
        if command == "predict":
            return desk.command(command, written(desk.images() / file, encoded("PNG") if good else "x").parent)
        for kind in ("image", "mask", "fov"):
            path = data / ("test" if command == "test" else "train") / kind / "0.png"
            path.rename(path.with_name(file)) if good else written(path.with_name(file), "x")
        (data / "photos.csv").unlink()
        return desk.command(command, data)

    return make


NAMES = (  # a file's name, and how it is shown
    ("a dash first", b"-eye", "-eye"),
    ("a new line", b"an\neye", r"an\neye"),
    ("quotes", b'it\'s "an" `eye` $HOME $_', 'it\'s "an" `eye` $HOME $_'),
    ("braces, other alphabets", "100%s{0} 眼".encode(), "100%s{0} 眼"),
    ("bytes no alphabet has", b"caf\xe9", r"caf\udce9"),
    ("230 letters", b"e" * 230, "e" * 230),
    ("a control character", b"eye\x1b[31m", r"eye\x1b[31m"),
)
COMMANDS = ("check", "train", "predict", "test")
for (kind, name, line), command, other in zip(NAMES, cycle(COMMANDS), cycle(COMMANDS[::-1]), strict=False):
    make, line = named(command, name, False), f"images?/{re.escape(line)}.png: {NO_IMAGE}"
    case(f"a bad file, {kind}", command, make, line, 1 if command in ("check", "predict") else 2, WHOLE)
    works(f"a name with {kind}", other, named(other, name, True))

# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture
def desk(tmp_path, tiny_set, tiny_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for what never comes"))
    signal.alarm(120)
    desk = Desk(tmp_path, tiny_set, tiny_run)
    desk.monkeypatch = monkeypatch
    yield desk
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def there(folder):
    """Every file and link below `folder` with a digest of what it holds."""
    paths = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}


def call(arguments):
    """The command's exit status; the parser's own too."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


BAR = re.compile(r"[\w ]+:\s+(\d+%\|.*\||\d+).*\[[^\[]*\]|\s*")


def refusal(status, out, err, said):
    """Checks that a refusal is one line, and what it says."""
    lines = [line for line in re.split(r"[\r\n]", err) if not BAR.fullmatch(line)]
    lines = lines[-1:] if lines and lines[0].startswith("usage:") else lines  # the parser says how it is called
    if status == 1 and not lines:  # a report: what it found is among other lines
        lines = [line for line in out.splitlines() if line.startswith("problem: ") and re.search(said, line)]
    assert len(lines) == 1 and lines[0].startswith(("retina-seg", "problem: ")), lines
    assert re.search(said, lines[0]), lines[0]


@pytest.mark.parametrize(("make", "said", "status", "leaves"), CASES)
def test_bad_input_is_one_line_that_names_it(make, said, status, leaves, desk, capsys):
    arguments = make(desk)
    before = there(desk.folder)
    capsys.readouterr()
    assert call(arguments) == status
    refusal(status, *capsys.readouterr(), said)
    after = there(desk.folder)
    assert {path: after.get(path) for path in before} == before
    for path in after.keys() - before.keys():
        assert re.fullmatch(leaves, path.name)
        readers = {".json": read_json, ".png": read_image, ".pth": lambda p: torch.load(p, weights_only=True)}
        readers.get(path.suffix, Path.read_bytes)(path)  # whole


@pytest.mark.parametrize(("make", "said"), WORKS)
def test_what_only_looks_bad_is_taken(make, said, desk, capsys):
    assert call(make(desk)) == 0
    assert said in capsys.readouterr().out


def test_a_process_of_its_own_says_the_same(desk):
    arguments = [sys.executable, "-m", "retina_seg", *named("check", b"caf\xe9", False)(desk)]
    done = subprocess.run(arguments, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    refusal(done.returncode, done.stdout, done.stderr, f"train/image/.*{NO_IMAGE}")
