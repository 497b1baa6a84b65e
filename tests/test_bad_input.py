"""Every kind of bad input, given to a command that takes such files: one line that names it, and nothing half done.

A kind is tried with one command, and every command with several kinds: `CASES`. `WORKS` only looks bad, and is taken.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import call, drawn, encoded, failing, png, write
from test_checkpoint import Bomb
from test_compare import scores

from retina_seg.images import read_image, read_mask, write_image
from retina_seg.utils import read_json, write_json

SMALL = ("--preset", "quick", "--size", "32", "--epochs", "1", "--patches", "4", "--device", "cpu")
CASES, WORKS = [], []
CONFIG, RESUME = "train --config", "train --resume"
NEW = r"good_\w+\.png|summary\.\w+|\.summary\.0\.csv"  # what predict leaves: good images are done, and what is not is said
WHOLE = NEW + r"|config\.json|history\.csv|\w+\.pth|\w+\.png|metrics\.\w+|comparison\.csv"


def case(kind, command, make, said, status=2, leaves="(?!)"):
    """A kind of bad input: `make(desk)` gives the arguments, `said` is in the one line, `leaves` may be new afterwards."""
    CASES.append(pytest.param(make, said, status, leaves, id=f"{command}: {kind}"))


def works(kind, command, make):
    said = {"check": "no problems", "predict": "0 failed"}.get(command, "written to")
    WORKS.append(pytest.param(make, said, id=f"{command}: {kind}"))


class Desk:
    """A folder to damage things in, with a sound dataset, run, checkpoint and image to start from."""

    def __init__(self, folder, tiny_set, tiny_run, monkeypatch):
        self.folder, self.tiny_set, self.tiny_run, self.monkeypatch = folder, tiny_set, tiny_run, monkeypatch
        self.weights, self.odd, self.pth = tiny_run / "checkpoint.pth", folder / "odd", folder / "odd.pth"

    def set(self, name="set"):
        return Path(shutil.copytree(self.tiny_set, self.folder / name))

    def raw(self):
        """CHASE_DB1 as published, two images of it."""
        for number, name in enumerate(("Image_01L", "Image_01R")):
            write(self.folder / "raw" / f"{name}.jpg", drawn(number, 96, 96).image)
            write(self.folder / "raw" / f"{name}_1stHO.png", drawn(number, 96, 96).mask)
        return self.folder / "raw"

    def images(self):
        return write(self.folder / "images/good.png", drawn(3, 96, 96).image).parent

    def checkpoint(self, **changes):
        """A checkpoint like the sound one but for `changes`."""
        return written(self.pth, {**torch.load(self.weights, weights_only=True), **changes})

    def run(self, **changes):
        """A copy of the sound run with these entries of its config changed."""
        shutil.copytree(self.tiny_run, self.odd)
        value = read_json(self.odd / "config.json")
        write_json(self.odd / "config.json", {**value, "config": {**value["config"], **changes}})
        return self.odd

    def scores(self, name, **changes):
        """The folder of a tested run, its metrics.json sound but for `changes`."""
        write_json(made(self.folder / name) / "metrics.json", {**scores([0.5]), **changes})
        return self.folder / name

    def command(self, name, given=None, output=None):
        """The arguments of a command: `given` for its usual input, or for what stands after --; all else sound."""
        command, _, what = name.partition(" --")
        output, data = output or self.folder / "out", self.tiny_set if what or given is None else given
        weights = given if what in ("weights", "checkpoint") else self.weights
        if what in ("config", "resume"):
            return [command, f"--{what}", given, *(["--output", output] if what == "config" else [])]
        if command == "predict":
            images = self.images() if what or given is None else given
            return [command, images, "--weights", weights, "--working-size", 64, "--output", output]
        if command in ("train", "run"):
            return [command, "--data", data, "--output", output, *SMALL]
        source = ("--run", given) if what == "run" else ("--checkpoint", weights)
        arguments = {
            "check": lambda: [data],
            "test": lambda: [*source, "--data", data, "--output", output, "--protocol", "native"],
            "prepare": lambda: ["chase_db1", given or self.raw(), output, "--size", 64],
            "compare": lambda: [self.scores("first"), given or self.scores("second"), "--output", output],
            "threshold": lambda: [given, "--data", self.tiny_set, "--output", output],
            "synth": lambda: [output, "--train", 1, "--test", 1, "--size", 64],
            "export": lambda: ["--weights", weights, "--output", output],
            "bench": lambda: ["--output", output / "below"],
            "degrade": lambda: ["--weights", weights, "--data", data, "--output", output / "below"],
        }
        return [command, *arguments[command]()]


def made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def written(path, content):
    made(path.parent)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return path


def damaged(command, where, damage):
    """Makes a command's arguments, with an input in which `damage` was done to a file."""

    def make(desk):
        folder = {"predict": desk.images, "prepare": desk.raw}.get(command, desk.set)()
        damage(folder / where)
        return desk.command(command, folder)

    return make


# -------------------------------------------------------------------------------------------------- images and datasets


def sound(kind, mode=None):
    """A sound image of 96x96 as a file's bytes."""
    return encoded(drawn(5, 96, 96).image, kind, mode)


def replaced(content, suffix=".png"):
    return lambda path: (path.unlink(missing_ok=True), path.with_suffix(suffix).write_bytes(content()))


def redrawn(change):
    return lambda path: write_image(path, change(read_mask(path)))


def link(target):
    return lambda path: (path.unlink(missing_ok=True), path.symlink_to(target))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 96\n%%EndComments\nshowpage\n"
BOMB = lambda: png(20_000, 20_000, bytes(2501 * 20_000), 1, 0)  # noqa: E731
NARROW = redrawn(lambda mask: mask[:, :60])
IMAGE, MASK, TEST, INDEX = "train/image/1.png", "train/mask/1.png", "test/image/0.png", "photos.csv"
NO_IMAGE, DAMAGED, LARGE, NO_PAIR = "is not an image", "is damaged", "scale the image down", "1.png: has no partner"
for kind, command, where, damage, line in (
    ("an empty file", "check", IMAGE, replaced(lambda: b""), NO_IMAGE),
    ("PostScript, which would be run", "train", IMAGE, replaced(lambda: EPS), NO_IMAGE),
    ("a PNG cut short", "test", TEST, replaced(lambda: sound("PNG")[:9000]), DAMAGED),
    ("a JPEG cut short", "predict", "bad.jpg", replaced(lambda: sound("JPEG")[:2000], ".jpg"), DAMAGED),
    ("a PNG of 400 million pixels", "predict", "bad.png", replaced(BOMB), LARGE),
    ("a mask of another size", "check", MASK, NARROW, "1.png: is 60x96 but its image 96x96"),
    ("a mask of another size", "train", MASK, NARROW, "mask/1.png: is 60x96 but its image"),
    ("a field of view of another size", "run", "train/fov/1.png", NARROW, "fov/1.png: is 60x96 but its image"),
    ("an image without its mask", "train", MASK, Path.unlink, f"image/{NO_PAIR}"),
    ("a link in a circle", "train", IMAGE, link("1.png"), NO_PAIR),
    ("a pipe", "test", TEST, lambda p: (p.unlink(), os.mkfifo(p)), "0.png: has no partner"),
    ("a table of one endless field", "run", INDEX, lambda p: p.write_text("x" * 200_000), "photos.csv: "),
):
    leaves = {"predict": NEW, "test": r"1_errors\.png|1\.png"}.get(command, "(?!)")
    case(kind, command, damaged(command, where, damage), line, 1 if command in ("check", "predict") else 2, leaves)

for kind, command, where, damage in (
    ("CMYK", "test", TEST, replaced(lambda: sound("JPEG", "CMYK"), ".jpg")),
    ("a palette, then rubbish", "check", IMAGE, replaced(lambda: sound("GIF", "P") + bytes(5000), ".gif")),
    ("masks of 0 and 1", "train", MASK, redrawn(lambda mask: mask // 255)),
    ("folders in a circle", "train", "train/again", lambda path: path.symlink_to(path.parents[1])),
):
    works(kind, command, damaged(command, where, damage))


def from_home(make):
    """Makes the arguments of `make` with every path below the home folder, written with ~."""
    place = lambda desk: desk.monkeypatch.setenv("HOME", str(desk.folder)) or str(desk.folder)  # noqa: E731
    return lambda desk: [str(argument).replace(place(desk), "~") for argument in make(desk)]


for command in ("check", "train", "test", "predict", "prepare", "synth"):
    works("paths with ~", command, from_home(damaged(command, "", lambda path: None)))

# --------------------------------------------------------------------------------------------------- inputs and outputs


def circle(desk):
    """Folders that lead into each other without end."""
    for name in ("a", "b"):
        (made(desk.odd / "below") / name).symlink_to(desk.odd, target_is_directory=True)
    return desk.odd


def with_weights(key, value):
    """Makes a checkpoint in which one weight is `value`."""

    def make(desk):
        weights = torch.load(desk.weights, weights_only=True)["state_dict"]
        return desk.checkpoint(state_dict={**weights, key: value})

    return make


FILE, LONG = (lambda d: written(d.odd, b"mine")), (lambda d: d.folder / ("odd" * 100))
PIPE, LOOP = (lambda d: os.mkfifo(d.odd) or d.odd), (lambda d: link("odd")(d.odd) and d.odd)
NAN_OUTPUT = with_weights("e1.conv.conv.1.running_var", torch.full((32,), -1.0))  # finite, but below 0
WEIGHTS, CHECKPOINT, EXPORT = "predict --weights", "test --checkpoint", "export --weights"
UNSAFE, WIDE = "odd.pth: .*read safely", {"width": 10**9}
LOCKED = ("check", "predict") if os.geteuid() else ()  # root may read anything
for kind, commands, make, line in (
    ("a file", ("check", "run", CHECKPOINT, "prepare", EXPORT), FILE, "odd"),
    ("an empty folder", ("test", "predict", "test --run", RESUME), lambda d: made(d.odd), "odd"),
    ("not there", ("predict", "train", "degrade", CONFIG, "threshold"), lambda d: d.odd, "odd"),
    ("of too long a name", (CHECKPOINT,), LONG, "odd"),
    ("a pipe", (WEIGHTS, CONFIG, "compare"), PIPE, "odd"),
    ("a link to nowhere", (WEIGHTS,), lambda d: link("nowhere")(d.odd) and d.odd, "odd"),
    ("a link in a circle", ("train", RESUME), LOOP, "odd"),
    ("folders in a circle", ("train", "predict", "prepare"), circle, "odd"),
    ("locked", LOCKED, lambda d: d.odd.mkdir(0o400) or d.odd, "odd"),
    ("code", (WEIGHTS, CHECKPOINT), lambda d: written(d.pth, {"state_dict": Bomb(str(d.odd))}), UNSAFE),
    ("too wide", (WEIGHTS,), lambda d: d.checkpoint(model="fast_attention_unet", arguments=WIDE), "does not take"),
    ("a frame of text", (CHECKPOINT,), lambda d: d.checkpoint(frame="resize"), "odd.pth: its working frame"),
    ("a threshold of 7", (WEIGHTS,), lambda d: d.checkpoint(threshold=7.0), "odd.pth: its threshold 7.0"),
    ("an output of NaN", (CHECKPOINT,), NAN_OUTPUT, "the network's output is NaN"),
    ("no JSON", (CONFIG, "compare"), lambda d: written(d.odd, b"\x89PNG\r\n\x1a\n\xff"), "odd: is not JSON"),
    ("endless JSON", (CONFIG, "compare"), lambda d: written(d.odd, b'{"a":' * 100_000), "odd: is not JSON"),
    ("epochs 2.5", (RESUME,), lambda d: d.run(epochs=2.5), "odd/config.json: --epochs"),
    ("no scores", ("compare",), lambda d: d.scores("odd", images=[{"name": "1"}]), "odd/metrics.json: holds no scores"),
    ("no scores at all", ("compare",), lambda d: made(d.odd), "odd/metrics.json: holds no scores; write them"),
    ("code to resume from", (RESUME,), lambda d: written(d.run() / "last.pth", Bomb(str(d.odd))).parent, "safely"),
):
    for command in commands:
        case(f"an input: {kind}", command, lambda d, c=command, m=make: d.command(c, m(d)), line)
case("a pipe among the inputs", "predict", lambda d: d.command("predict", PIPE(d)), "odd", 1, NEW)
case("an output of NaN", "predict", lambda d: d.command(WEIGHTS, NAN_OUTPUT(d)), "good.png: .*NaN", 1, NEW)
case("one run alone", "compare", lambda d: ["compare", d.scores("odd")], "two runs")
case("no output", "test", lambda d: ["test", "--checkpoint", "drive", "--data", d.tiny_set], "--output is needed")
case("no run", "degrade", lambda d: [*d.command("degrade"), "--part", "validation"], "held out no training photos")
case("no such command", "paint", lambda d: ["paint"], "paint")

for command, make, line in (
    ("train", lambda d: FILE(d) / "below", "odd"),
    ("run", LONG, "odd"),
    ("test", FILE, "odd"),
    ("predict", LOOP, "odd"),
    ("synth", LOOP, "odd"),
    ("export", FILE, "odd"),
    ("export", lambda d: made(d.folder / "odd.onnx"), "odd.onnx"),
    ("train", lambda d: d.run(), "odd: already holds a run"),
    ("prepare", lambda d: d.raw() / "odd", "odd: lies inside"),
    ("prepare", lambda d: written(d.odd / "a.txt", b"").parent, "odd: is not empty .a.txt"),
    ("predict", lambda d: written(d.odd / "good_vessels.png", b"").parent, "good_vessels.png: is there already"),
    ("predict", lambda d: written(d.odd / "summary.csv", b"a,b").parent, "odd/summary.csv: is"),
    ("test", lambda d: written(d.odd / "metrics.json", b"{}").parent, "odd/metrics.json: holds other scores"),
):
    case(f"an output: {line}", command, lambda d, c=command, m=make: d.command(c, output=m(d)), line)

# ------------------------------------------------------------------------------- options, full disks, names of all kinds

for command, *options in (
    ("train", "--device", "cuda:99"),
    ("train", "--size", 10**9),
    ("train", "--model-arguments", "{"),
    ("predict", "--working-size", 10**9),
    ("check", "--size", 9),
    ("bench", "--rounds", 0),
    ("degrade", "--threshold", 2),
    ("export", "--output", "new/below/x.pth"),
    ("train", "--augmentation", "bend"),
    ("train", "--epochs", "many"),
    ("train", "--config", "given twice"),  # the preset and a config
    ("predict", "--save", "masks,maps"),
    ("predict", "--jobs", 0),
    *((command, "--style", "thin") for command in ("predict", "export", "degrade")),
):
    name = f"{options[-2]} {str(options[-1])[:10]}"
    case(name, command, lambda d, c=command, o=options: [*d.command(c), *o], rf"{options[-2].strip('-')}\b")


def full_disk(command, after):
    """Makes arguments; after `after` files, there is no space left."""

    def make(desk):
        arguments, full = desk.command(command), OSError(28, "No space left on device")
        desk.monkeypatch.setattr(os, "replace", failing(os.replace, after, full))
        return arguments

    return make


for command, after in (("train", 1), ("test", 2), ("predict", 2), ("compare", 1), ("prepare", 2), ("synth", 1)):
    case("a full disk", command, full_disk(command, after), "cannot be written .No space left", leaves=WHOLE)


def named(command, name, good):
    """Makes arguments with files of that name, good ones or no images."""

    def make(desk):
        file, data = f"{os.fsdecode(name)}.png", desk.set()
        if command == "predict":
            return desk.command(command, written(desk.images() / file, sound("PNG") if good else b"x").parent)
        for kind in ("image", "mask", "fov"):
            path = data / ("test" if command == "test" else "train") / kind / "0.png"
            path.rename(path.with_name(file)) if good else written(path.with_name(file), b"x")
        (data / "photos.csv").unlink()
        return desk.command(command, data)

    return make


# a name with a line break, quotes, braces, another alphabet, a byte no alphabet has, a control character; how it is shown
ODD_NAME = b'a\nb it\'s "an" `eye` $HOME 100%s{0} \xe7\x9c\xbc \xe9 \x1b[31m'
SHOWN = re.escape(r"""a\nb it's "an" `eye` $HOME 100%s{0} 眼 \udce9 \x1b[31m""")
for command in ("check", "train", "predict", "test"):
    kind_of_file, status = ("(image|mask)", 2) if command in ("train", "test") else ("images?", 1)
    make, line = named(command, ODD_NAME, False), f"{kind_of_file}/{SHOWN}.png: {NO_IMAGE}"
    case("a bad file of an odd name", command, make, line, status, WHOLE)
    works("an odd name", command, named(command, ODD_NAME, True))

# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture
def desk(tmp_path, tiny_set, tiny_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, tiny_set, tiny_run, monkeypatch)


def there(folder):
    """Every file, link and folder below `folder` with a digest of what it holds."""
    paths = [Path(place, name) for place, folders, names in os.walk(folder) for name in (*folders, *names)]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}


BAR = re.compile(r"[\w ]+:\s+(\d+%\|.*\||\d+).*\[[^\[]*\]|\s*")


def refusal(status, out, err, said):
    """Checks that a refusal is one line, and what it says."""
    err = err.replace("\n    ", " ")  # a message's own further lines: how a dataset looks
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
    assert call(*arguments) == status
    refusal(status, *capsys.readouterr(), said)
    after = there(desk.folder)
    assert {path: after.get(path) for path in before} == before
    for path in after.keys() - before.keys():
        if path.is_dir():
            assert any(path.iterdir())  # no empty folder is left
            continue
        assert re.fullmatch(leaves, path.name)
        readers = {".png": read_image, ".pth": lambda p: torch.load(p, weights_only=True)}
        readers |= {".json": lambda p: json.loads(p.read_text(encoding="utf-8"))}
        readers.get(path.suffix, Path.read_bytes)(path)  # whole


@pytest.mark.parametrize(("make", "said"), WORKS)
def test_what_only_looks_bad_is_taken(make, said, desk, capsys):
    assert call(*make(desk)) == 0
    assert said in capsys.readouterr().out and not Path("~").exists()


def test_a_process_of_its_own_says_the_same(desk):
    arguments = [sys.executable, "-m", "retina_seg", *named("check", b"caf\xe9", False)(desk)]
    done = subprocess.run(arguments, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    refusal(done.returncode, done.stdout, done.stderr, f"train/image/.*{NO_IMAGE}")
