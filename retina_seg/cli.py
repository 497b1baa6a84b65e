"""The command `retina-seg`: parse, call, print. The work is done in the modules it calls; they are imported when needed.

Exit status: 0 done; 1 the work found something wrong (`check`), or some images failed; 2 a mistake that its user can mend;
130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import argparse
import dataclasses
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retina_seg.arguments import COMMANDS, argument, build_parser, command, given_options
from retina_seg.config import ENGINE_PRECISIONS, ENGINES, PRESETS, TrainConfig
from retina_seg.sets.files import PARTS
from retina_seg.sets.prepare import SETS, SPLITS
from retina_seg.utils import UserError, user_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (None: the process's own) and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file may have a name that the terminal's encoding cannot show
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module="PIL")  # its remarks on odd files
    options = build_parser().parse_args(arguments)
    if options.command not in ("train", "predict") and os.environ.get("WORLD_SIZE", "1") != "1":
        return _fail("several processes share train and predict only; run this command without torchrun", 2)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        for module in options.modules:
            _import(module)
        return COMMANDS[options.command][0](options) or 0
    except UserError as error:
        return _fail(str(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt as error:
        _say(f"retina-seg: {error if str(error) else 'stopped'}", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        return 1
    except OSError as error:  # what only the system knows: a name too long, a folder that may not be read, a full disk
        named = f"{error.filename}: " if error.filename else ""
        return _fail(f"{named}{error.strerror or error}", 2)
    except MemoryError:
        return _fail("the memory of this machine is too small for that", 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _import(module: str) -> None:
    """Import a user's module, found from the working folder too. Raises `UserError`: there is none, or it fails."""
    sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(module.removesuffix(".py"))
    except Exception as error:  # a user's module raises anything
        raise UserError(f"--import {module}: cannot be imported ({type(error).__name__}: {error})") from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends the work as Ctrl-C does."""


def _terminate(*_: Any) -> None:
    raise _Terminated


def _say(*lines: str, file: Any = None) -> None:
    """Print `lines`, each on one line whatever the files in it are called."""
    for line in lines:
        shown = (c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
        print("".join(shown), file=file, flush=True)


def _fail(message: str, status: int) -> int:
    # the message's own further lines; any other line break is a name's and is escaped
    _say(*f"retina-seg: error: {message}".replace("\n    ", "\0    ").split("\0"), file=sys.stderr)
    return status


PATTERNS = (
    argument("--images", 'instead: a pattern in quotes, as "training/images/*.tif"', nargs="+", metavar="PATTERN"),
    argument("--masks", 'and their masks, as "training/1st_manual/*.gif"', nargs="+", metavar="PATTERN"),
    argument("--pairs", "instead: the CSV file of --data", metavar="CSV"),
)
FOLDER = "the dataset's folder, one above it, or a CSV file with columns image, mask[, part, fov, mask_2nd, photo, …]"
DATA = (argument("--data", f"{FOLDER} (default: Data1)"), *PATTERNS)


def _data(options: argparse.Namespace, default: Any = "Data1") -> Any:
    """The dataset by --data, --pairs, or --images and --masks."""
    patterns = given_options(options, "images", "masks")
    one = options.data or options.pairs
    if len(patterns) == 1 or (patterns and one) or (options.data and options.pairs):
        raise UserError("give --data, or --pairs, or both --images and --masks")
    for name, files in patterns.items():
        if len(files) > 1:  # the shell has put in the files
            raise UserError(f'--{name} {files[0]} …: put the pattern in quotes, as --{name} "folder/*.png"')
    return {name: files[0] for name, files in patterns.items()} or one or default


WEIGHTS = argument("--weights", "pretrained weights (general, drive, tiny), a file, or a run's folder", "general")
THRESHOLD = argument("--threshold", "vessel above this probability (default: the checkpoint's)", type=float)
PROTOCOL = "notebook: 512x512, aspect ratio not kept, threshold 0.5, as the original; native: the images' own size, "
PROTOCOL += "inside the field of view"
RUNS = argument("runs", "folders of runs", nargs="+", metavar="RUN")
PIXEL_SIZE = argument("--pixel-size", "micrometres a pixel, for measures in micrometres", type=float)
STYLE = argument("--style", "label style: auto, fine, balanced, bold or a dataset's name (default: the checkpoint's)")
NETWORK = (
    argument("--working-size", "scale to this field-of-view diameter, pixels (default: the checkpoint's)", type=int),
    argument("--tta", "test-time augmentation: mean over 8 orientations (default: off)", action="store_true"),
    STYLE,
    argument("--device", "cpu, cuda, …; auto: a GPU where there is one", "auto"),
    argument("--engine", "auto: OpenVINO on processors, where it is installed", "auto", choices=ENGINES),
)
PRECISION = "float32 gives the same results everywhere, bfloat16 and int8 are faster"
EXACT_NETWORK = (*NETWORK, argument("--precision", PRECISION, "float32", choices=ENGINE_PRECISIONS))
EXACT_NAMES = ("working_size", "tta", "style", "device", "engine", "precision")


@command(
    "segment images of any size",
    "predict images/ --output vessels/",
    argument("images", "files, folders with all below them, .txt or .csv lists of paths", nargs="+", metavar="INPUT"),
    argument("--output", "folder for maps and summary.csv; mirrors the input's sub-folders", required=True),
    argument("--save", "any of masks,probability,overlay,fov", "masks,probability,overlay", metavar="NAMES"),
    argument("--report", "write report.html: images, measures, remarks (default: off)", action="store_true"),
    argument("--dry-run", "say what would be done, write nothing (default: off)", action="store_true"),
    argument("--jobs", "images at once (default: up to 4, by processor cores)", type=int),
    argument("--measure", "add measures of the vessels to the summaries (default: off)", action="store_true"),
    PIXEL_SIZE,
    WEIGHTS,
    argument("--overwrite", "segment again what is done (default: skip it)", action="store_true"),
    THRESHOLD,
    *NETWORK,
    argument("--precision", PRECISION, "auto", choices=ENGINE_PRECISIONS),
)
def _predict(options: argparse.Namespace) -> int:
    from retina_seg.analysis.report import write_report
    from retina_seg.checkpoint import WEIGHTS, find_weights, weights_id
    from retina_seg.device import environment
    from retina_seg.distributed import process_group
    from retina_seg.inference.batch import DONE, plan_images, segment_images
    from retina_seg.inference.segmenter import Segmenter
    from retina_seg.runs import remarks

    if options.pixel_size is not None and not (options.measure or options.report):
        raise UserError("--pixel-size is for measures; add --measure or --report")
    path = find_weights(options.weights).resolve()
    options.measure |= options.report
    options.save += ",report" * options.report
    measures = {"measure": options.measure, "pixel_size": options.pixel_size}
    choices = given_options(options, "threshold", "working_size", "tta", "style")
    computed = given_options(options, "engine", "precision")
    made_with = [path.stem if path.parent == WEIGHTS.resolve() else str(path), weights_id(path)]
    given = {name: value for name, value in (choices | computed | measures).items() if value and value != "auto"}
    made_with += [name if value is True else f"{name}={value}" for name, value in given.items()]
    with process_group() as world:
        plan = plan_images(options.images, options.output, " ".join(made_with), options.overwrite, options.save)
        if not options.dry_run:
            segmenter = Segmenter.load(path, device=str(world.device(options.device)), **choices, **computed)
            rows = segment_images(segmenter, plan, options.jobs, world=world, **measures)
    if not world.is_main:
        return 0
    _say(*remarks(path))
    where = f"{options.output}{plan.passed}"
    if options.dry_run:
        _say(*(f"{row['input']} -> {Path(options.output, row['name'])}_*" for row in list(plan.begun.values())[:3]))
        _say(f"dry run: {len(plan.begun)} to segment, {len(plan.images) - len(plan.begun)} done before: {where}")
        return 0
    skipped, failed = sum(row["skipped"] for row in rows), [row for row in rows if row["status"] != DONE]
    _say(*(f"retina-seg: {row['input']}: {row['status']}" for row in failed), file=sys.stderr)
    if doubtful := sum(row["gradable"] in ("doubtful", "no") for row in rows):
        _say(f"{doubtful} doubtful or not gradable: see gradable and remark in {Path(options.output, 'summary.csv')}")
    _say(f"{len(rows) - len(failed) - skipped} segmented, {skipped} done before, {len(failed)} failed: {where}")
    if options.report:
        settings = {"engine": segmenter.engine, **environment(segmenter.device, segmenter.precision)}
        _say(f"to look at: {write_report(options.output, settings)}")
    return int(bool(failed))


@command(
    "train and test in one go; on synthetic images, by the preset quick, where Data1 is empty",
    "run --data Data1",
    argument("--preset", "where options start from (default: fast; quick on synthetic images)", choices=PRESETS),
    *DATA,
    argument("--output", "the run's folder, or the next free name", "results/run"),
)
def _run(options: argparse.Namespace) -> None:
    from retina_seg.data import list_pairs
    from retina_seg.runs import free_folder
    from retina_seg.sets.layout import check_apart
    from retina_seg.sets.synthetic import data_or_synthetic
    from retina_seg.test import original_lines, table, test
    from retina_seg.train import fit

    TrainConfig.from_preset(options.preset or "fast", **given_options(options)).check()  # before a set is written
    folder, synthetic = data_or_synthetic(data := _data(options))
    if synthetic:
        _say(f"{data} holds no images yet: using synthetic ones in {folder} (real ones: --data, or retina-seg prepare)")
    training, tested = (list_pairs(folder, part) for part in PARTS)
    check_apart(training, tested)
    _say(f"{folder}: {len(training)} training and {len(tested)} test images")
    preset = options.preset or ("quick" if synthetic else "fast")
    where = {"data": folder if isinstance(folder, dict) else str(folder), "output": str(free_folder(options.output))}
    run = fit(TrainConfig.from_preset(preset, **given_options(options), **where))
    value = test(run.folder, folder, run.folder)
    print(table(value))
    _say(*original_lines(value), f"written to {run.folder}: metrics.json, curves.png, contact_sheet.png, images/")


@command(
    "train a network",
    "train --preset notebook --data Data1 --output results/notebook",
    argument("--preset", "where the options below start from (default: fast)", choices=PRESETS),
    argument("--config", "start from the config.json of a run instead", metavar="JSON"),
    argument("--resume", "go on with the run in this folder after its last whole epoch, to --epochs", metavar="RUN"),
    argument("--data", "the dataset's folder; several are trained on together (default: Data1)", nargs="+"),
    *PATTERNS,
    argument("--output", "the run's folder (default: results/<preset>)"),
)
def _train(options: argparse.Namespace) -> None:
    from retina_seg.distributed import process_group
    from retina_seg.train import fit

    if len(source := given_options(options, "preset", "config", "resume")) > 1:
        raise UserError(f"--{' and --'.join(source)}: give one of them")
    changes = {**given_options(options), **given_options(options, "output")}
    if data := _data(options, default=None):
        changes["data"] = data[0] if isinstance(data, list) and len(data) == 1 else data
    if options.resume:
        # how it is computed may change with the machine, what is computed may not
        if given := ", ".join("--" + n.replace("_", "-") for n in changes if n not in ("device", "workers", "epochs")):
            raise UserError(f"--resume goes on by the run's own config; leave out {given}, or train anew with --config")
        if not (path := user_path(options.resume) / "config.json").exists():
            raise UserError(f"{options.resume}: holds no run to go on with; train without --resume")
        config = dataclasses.replace(TrainConfig.from_json(path), output=options.resume, **changes)
    elif options.config:
        config = dataclasses.replace(TrainConfig.from_json(options.config), **changes)
    else:
        preset = options.preset or "fast"
        config = TrainConfig.from_preset(preset, **{"output": f"results/{preset}", **changes})
    with process_group() as world:
        run = fit(config, resume=bool(options.resume), world=world)
    if world.is_main:
        _say(f"written to {run.folder}: checkpoint.pth (epoch {run.best}), history.csv, curves.png, config.json")


@command(
    "score a network on a dataset",
    "test --run results/notebook --data Data1",
    argument("--run", "the folder of a training"),
    argument("--checkpoint", "a checkpoint file, the original's too, or the name of pretrained weights"),
    *DATA,
    argument("--output", "folder for scores and images (default: the run's; in it native/, validation/)"),
    argument("--protocol", PROTOCOL, "notebook", choices=("notebook", "native")),
    argument("--part", "the test images, or those that the run held out", "test", choices=("test", "validation")),
    argument("--threshold", "vessel above this probability (default: the protocol's)", type=float),
    *EXACT_NETWORK,
)
def _test(options: argparse.Namespace) -> None:
    from retina_seg.runs import default_output
    from retina_seg.test import original_lines, table, test

    if bool(options.run) == bool(options.checkpoint):
        raise UserError("give one of --run and --checkpoint")
    if not options.run and options.output is None:
        raise UserError("--output is needed here: --checkpoint alone names no folder")
    names = (options.run, options.protocol, options.part, options.tta, options.working_size, options.style)
    output = options.output or default_output(*names)
    how = given_options(options, "protocol", "threshold", "part", *EXACT_NAMES)
    value = test(options.run or options.checkpoint, _data(options), output, **how)
    print(table(value))
    written = f"written to {output}: metrics.json, metrics.csv, contact_sheet.png, curves_test.png, images/"
    _say(*original_lines(value), written)


@command(
    "compare tested runs image by image; the first is the reference",
    "compare results/notebook results/fast",
    RUNS,
    argument("--output", "folder for table and plot", "results/comparison"),
)
def _compare(options: argparse.Namespace) -> None:
    from retina_seg.analysis.compare import compare

    _say(*compare(options.runs, options.output), f"written to {options.output}: comparison.csv, comparison.png")


@command(
    "choose a threshold on the images that trainings with --validation photos held out, as those of --fold 0, 1, …",
    "threshold results/fold-0 results/fold-1 --data Data1",
    RUNS,
    *DATA,
    argument("--output", "folder for table and plot", "results/threshold"),
    argument("--protocol", PROTOCOL, "native", choices=("notebook", "native")),
    *EXACT_NETWORK,
)
def _threshold(options: argparse.Namespace) -> None:
    from retina_seg.analysis.threshold import threshold

    lines = threshold(options.runs, _data(options), **given_options(options, "output", "protocol", *EXACT_NAMES))
    _say(*lines, f"written to {options.output}: thresholds.csv, thresholds.png")


@command(
    "measure robustness: F1 on images that are dimmed, hazy, blurred, of another size, …",
    "degrade --weights general --data Data1",
    WEIGHTS,
    *DATA,
    argument("--output", "folder for table and plot", "results/degraded"),
    argument("--part", "validation: images that the run --weights held out", "test", choices=(*PARTS, "validation")),
    THRESHOLD,
    *EXACT_NETWORK,
)
def _degrade(options: argparse.Namespace) -> None:
    from retina_seg.analysis.degrade import degrade

    how = given_options(options, "output", "part", "threshold", *EXACT_NAMES)
    _say(*degrade(options.weights, _data(options), **how), f"written to {options.output}: degrade.csv, degrade.png")


@command(
    "measure vessel masks (area, length, calibre, branches, tortuosity, fractal dimension); compare two folders",
    "measure vessels/ --output table.csv --pixel-size 7.5",
    argument("masks", "masks, or folders; of predict's output the vessels", nargs="+", metavar="MASKS"),
    argument("--output", "the table, a row a mask; definitions: help(retina_seg.analysis.measure)", required=True),
    PIXEL_SIZE,
    argument("--discs", "table of optic discs, for zones B and C: name, x, y, diameter in pixels", metavar="TABLE"),
    argument("--fov", "folder of fields of view (default: *_fov.png beside a mask, or the frame)", metavar="DIR"),
    argument("--against", "other masks of the same images: ICC(2,1), bias, limits of agreement", metavar="OTHER_MASKS"),
)
def _measure(options: argparse.Namespace) -> int:
    from retina_seg.analysis.agreement import agreement_lines
    from retina_seg.analysis.measure_masks import DONE, measure_masks

    how = given_options(options, "output", "pixel_size", "discs", "fov", "against")
    rows, agreement = measure_masks(options.masks, **how)
    failed = [row for row in rows if row["status"] != DONE]
    _say(*(f"retina-seg: {row['input']}: {row['status']}" for row in failed), file=sys.stderr)
    _say(*agreement_lines(agreement), f"{len(rows) - len(failed)} measured, {len(failed)} failed: {options.output}")
    return int(bool(failed))


@command(
    "bring a public dataset into the Data1 layout",
    "prepare drive DRIVE Data1",
    argument("set", "which dataset it is", choices=SETS),
    argument("source", "the folder as downloaded and unpacked"),
    argument("destination", "a new or empty folder"),
    argument("--size", "side in pixels, aspect ratio not kept, or native", "512"),
    argument("--split", "or all in one part", "usual", choices=SPLITS),
)
def _prepare(options: argparse.Namespace) -> None:
    from retina_seg.sets.prepare import prepare_set

    folder = prepare_set(options.set, options.source, options.destination, options.size, options.split)
    _say(f"written to {folder}; see what it holds: retina-seg check {folder}")


@command(
    "report what a dataset holds and what is wrong with it",
    "check Data1",
    argument("data", f"{FOLDER} (default: Data1)", nargs="?", metavar="DATA"),
    *PATTERNS,
)
def _check(options: argparse.Namespace) -> int:
    from retina_seg.sets.check import check_set

    report = check_set(_data(options))
    _say(*report.lines())
    return 1 if report.problems else 0


@command(
    "write a dataset of synthetic images",
    "synth results/synthetic --train 20",
    argument("destination", "a new or empty folder"),
    argument("--train", "training images", 12),
    argument("--test", "test images", 4),
    argument("--size", "side in pixels", 512),
    argument("--seed", "another seed, other images", 0),
)
def _synth(options: argparse.Namespace) -> None:
    from retina_seg.sets.synthetic import write_set

    folder = write_set(options.destination, options.train, options.test, (options.size, options.size), options.seed)
    _say(f"written to {folder}: {options.train} training and {options.test} test images")


@command(
    "write a network as an ONNX file, for programs without torch, or prepare weights for 8 bits",
    "export --weights general --output vessels.onnx",
    WEIGHTS,
    argument("--output", "the ONNX file; its name ends in .onnx"),
    STYLE,
    argument("--engine", "openvino prepares weights for predict", "onnx", choices=("onnx", "openvino")),
    argument("--precision", "of --engine openvino", choices=("int8",)),
    argument("--data", "whose training images are measured for int8; several folders may be given", nargs="+"),
)
def _export(options: argparse.Namespace) -> None:
    from retina_seg.inference.export import calibrate, export
    from retina_seg.runs import remarks

    if options.engine == "openvino":
        if options.precision is None or options.data is None or options.output or options.style:
            raise UserError("--engine openvino: needs --precision int8 and --data, and takes no --output and --style")
        path, count = calibrate(options.weights, options.data)
        _say(f"written to {path}: ranges of activations on {count} images; predict uses them")
        return
    if options.output is None or options.precision or options.data:
        raise UserError("--engine onnx: needs --output, and takes no --precision and --data")
    difference = export(options.weights, options.output, options.style)
    _say(*remarks(options.weights))
    _say(f"written to {options.output}; its probabilities differ from torch's by at most {difference:.1g}")


@command(
    "measure the speed of the original and of this package, here and now",
    "bench --rounds 5",
    argument("--output", "folder for bench.json", "results/run-bench"),
    argument("--rounds", "how often each is measured", 5),
    argument("--images", "of the whole test and the folder", 20),
    argument("--size", "side of an image, pixels", 512),
    argument("--device", "cpu, cuda, …", "cpu"),
)
def _bench(options: argparse.Namespace) -> None:
    from retina_seg.analysis.bench import bench, table

    value = bench(**given_options(options, "output", "rounds", "images", "size", "device"))
    _say(*table(value), f"written to {options.output}: bench.json")
