"""The command `retina-seg`: parse, call, print. The work is done in the modules it calls; they are imported when needed.

Exit status: 0 done; 1 the work found something wrong (`check`); 2 a mistake that its user can mend; 130 stopped by
Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence

PRESET_NAMES = ("notebook", "fast", "general", "tiny", "quick")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (None: the process's own) and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file may be called what the terminal's alphabet has no letters for
            stream.reconfigure(errors="backslashreplace")
    if "WORLD_SIZE" in os.environ:
        return _one_of_several(arguments)
    options = build_parser().parse_args(arguments)
    options.group = None
    return _call(options, lambda line: print(line, file=sys.stderr))


def _one_of_several(arguments: Sequence[str] | None) -> int:
    """`main` as one of the processes that torchrun started: what they all have to say, one of them says."""
    from retina_seg.distributed import join
    from retina_seg.utils import UserError

    try:
        with join() as group:
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    options = build_parser().parse_args(arguments)
            except SystemExit as stop:  # a bad option, or --help
                group.say_once(said.getvalue().rstrip(), sys.stderr if stop.code else sys.stdout)
                raise
            options.group = group
            return _call(options, group.say_once)
    except UserError as error:
        print(f"retina-seg: error: {one_line(str(error))}", file=sys.stderr)
        return 2


def _call(options: argparse.Namespace, complain: Callable[[str], object]) -> int:
    """The exit status of the command that was asked for; what is wrong goes to `complain`."""
    try:
        return _try(options, complain)
    except KeyboardInterrupt as stop:  # in an import too, which takes seconds
        complain(f"retina-seg: {one_line(str(stop)) or 'stopped'}")
        return 128 + getattr(stop, "signal", 2)


def _try(options: argparse.Namespace, complain: Callable[[str], object]) -> int:
    from retina_seg.utils import UserError

    try:
        if options.group and options.group.size > 1 and options.call not in (_train, _predict):
            raise UserError("several processes share train and predict only; run this command without torchrun")
        return options.call(options) or 0
    except UserError as error:
        complain(f"retina-seg: error: {one_line(str(error))}")
        return 2
    except FloatingPointError as error:
        complain(f"retina-seg: error: {one_line(str(error))}")
        return 1
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        return 1
    except OSError as error:  # what only the system knows: a name too long, a folder that may not be read, a full disk
        named = f"{error.filename}: " if error.filename else ""
        complain(f"retina-seg: error: {one_line(f'{named}{error.strerror or error}')}")
        return 2
    except MemoryError:
        complain("retina-seg: error: the memory of this machine is too small for that")
        return 2
    except RuntimeError as error:
        from retina_seg.distributed import has_lost_another

        if not options.group or not has_lost_another(error):
            raise
        complain(
            "retina-seg: error: another process has ended (what torchrun reports says which, and how); what was saved is "
            "good: go on with train --resume, or with the same predict"
        )
        return 1


def one_line(message: str) -> str:
    """`message` printable on one line: a file may be called anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in message)


def _say(*lines: str) -> None:
    """Print `lines`, each on one line whatever the files in it are called."""
    print("\n".join(map(one_line, lines)))


# ---------------------------------------------------------------------------------------------------------------- calls


def _run(options: argparse.Namespace) -> None:
    from retina_seg.run import run
    from retina_seg.test import original_lines, table

    value = run(options.data, options.output, options.preset, **_recipe_changes(options))
    print(table(value))
    _say(*original_lines(value))
    _say(f"written to {value['folder']}: metrics.json, curves.png, contact_sheet.png, images/")


def _train(options: argparse.Namespace) -> None:
    from dataclasses import replace
    from pathlib import Path

    from retina_seg.distributed import ALONE
    from retina_seg.train import PRESETS, TrainConfig, fit
    from retina_seg.utils import UserError

    if options.resume:
        config = TrainConfig.from_json(Path(options.resume) / "config.json")
        config.output = options.resume
        # how it is computed may change with the machine, what is computed may not
        changes = _recipe_changes(options)
        for name in ("device", "workers"):
            if name in changes:
                setattr(config, name, changes.pop(name))
        if changes:
            given = ", ".join("--" + name.replace("_", "-") for name in changes)
            raise UserError(
                f"--resume goes on with the run's own recipe; leave out {given}, or train anew with --config"
            )
    else:
        changes = _recipe_changes(options)
        if options.config:
            config = replace(TrainConfig.from_json(options.config), **changes)
        else:
            preset = options.preset or "fast"
            config = PRESETS[preset](**{"output": f"results/{preset}", **changes})
    group = options.group or ALONE
    done = fit(config, resume=bool(options.resume), group=group)
    if group.is_first:
        _say(f"written to {done.folder}: checkpoint.pth (epoch {done.best}), history.csv, curves.png, config.json")


def _test(options: argparse.Namespace) -> None:
    from retina_seg.test import default_output, original_lines, table, test
    from retina_seg.utils import UserError

    if not options.run and (options.output is None or options.part == "validation"):
        missing = "--output" if options.output is None else "--run"
        raise UserError(f"{missing} is needed here: --checkpoint alone names no folder and no held-out photos")
    output = options.output or default_output(
        options.run, options.protocol, options.part, options.flips, options.working_size, options.recolour
    )
    value = test(
        options.run or options.checkpoint,
        options.data,
        output,
        options.protocol,
        options.threshold,
        options.part,
        recolour=options.recolour,
        device=options.device,
        precision=options.precision,
        flips=options.flips,
        working_size=options.working_size,
    )
    print(table(value))
    _say(*original_lines(value))
    _say(f"written to {output}: metrics.json, metrics.csv, contact_sheet.png, curves_test.png, images/")


def _compare(options: argparse.Namespace) -> None:
    from retina_seg.compare import compare

    _say(*compare(options.runs, options.output))
    _say(f"written to {options.output}: comparison.csv, comparison.png")


def _threshold(options: argparse.Namespace) -> None:
    from retina_seg.threshold import threshold

    choices = {name: getattr(options, name) for name in ("device", "precision", "flips", "working_size")}
    _say(*threshold(options.runs, options.data, options.output, options.protocol, **choices))
    _say(f"written to {options.output}: thresholds.csv, thresholds.png")


def _predict(options: argparse.Namespace) -> int:
    from retina_seg.distributed import ALONE
    from retina_seg.folder import DONE, segment_files, weights_id
    from retina_seg.predict import Segmenter, find_checkpoint

    group = options.group or ALONE
    path = find_checkpoint(options.weights)
    choices = {
        "threshold": options.threshold,
        "working_size": options.working_size,
        "flips": options.flips,
    }
    device = str(group.device(options.device))
    segmenter = Segmenter.load(path, device=device, precision=options.precision, **choices)
    changed = [f"{name}={value}" for name, value in choices.items() if value]
    weights = " ".join([weights_id(path), *changed])
    rows = segment_files(segmenter, options.photos, options.output, options.overwrite, weights, group=group)
    if not group.is_first:
        return 0
    failed = [row for row in rows if row["status"] != DONE]
    for row in failed:
        print("retina-seg: " + one_line(f"{row['input']}: {row['status']}"), file=sys.stderr)
    skipped = sum(row["skipped"] for row in rows)
    _say(
        f"{len(rows) - len(failed) - skipped} segmented, {skipped} done before, {len(failed)} failed: {options.output}"
    )
    return 1 if failed else 0


def _export(options: argparse.Namespace) -> None:
    from retina_seg.export import export

    difference = export(options.weights, options.output)
    _say(f"written to {options.output}; its probabilities differ from torch's by at most {difference:.1g}")


def _prepare(options: argparse.Namespace) -> None:
    from retina_seg.prepare import prepare_set

    size = options.size if options.size == "native" else int(options.size)
    folder = prepare_set(options.set, options.source, options.destination, size, options.split)
    _say(f"written to {folder}; see what it holds: retina-seg check {folder}")


def _check(options: argparse.Namespace) -> int:
    from retina_seg.check import check_set

    report = check_set(options.data)
    _say(*report.lines())
    return 1 if report.problems else 0


def _synth(options: argparse.Namespace) -> None:
    from retina_seg.synthetic import write_set
    from retina_seg.utils import UserError

    size = (options.size, options.size)
    try:
        folder = write_set(options.destination, options.train, options.test, size, options.seed)
    except (OSError, ValueError) as error:  # the drawing room knows no other room, so its errors are Python's own
        raise UserError(str(error)) from None
    _say(f"written to {folder}: {options.train} training and {options.test} test photos")


def _bench(options: argparse.Namespace) -> None:
    from retina_seg.bench import bench, table

    names = ("output", "rounds", "photos", "size", "original", "fast", "data", "device", "precision", "growth")
    value = bench(**{name: getattr(options, name) for name in names})
    _say(*table(value), f"written to {options.output}: bench.json")


def _recipe_changes(options: argparse.Namespace) -> dict:
    """What the command line says of the recipe; for `run`, data and output are arguments of their own."""
    names = (
        *(("data", "output") if options.call is _train else ()),
        "epochs",
        "batch_size",
        "learning_rate",
        "seed",
        "size",
        "validation",
        "held_out",
        "split_seed",
        "fold",
        "precision",
        "device",
        "workers",
    )
    given = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


# --------------------------------------------------------------------------------------------------------------- parser


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="retina-seg",
        description="Retinal vessel segmentation: a light U-Net with two attention gates. Not a medical device.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(
        commands, "run", _run, "train and test in one go; synthetic photos where Data1 is empty", "run --data Data1"
    )
    _data(run)
    run.add_argument(
        "--output", default="results/run", help="the run's folder (default: %(default)s, or the next free name)"
    )
    run.add_argument("--preset", choices=PRESET_NAMES, help="the recipe (default: fast; quick on synthetic photos)")
    _recipe(run)

    train = _command(
        commands, "train", _train, "train a network", "train --preset notebook --data Data1 --output results/notebook"
    )
    train.add_argument(
        "--data",
        nargs="+",
        action=_OneOrMore,
        help="the set's folder, or one that holds it; several are trained on together (default: Data1, with --config its own)",
    )
    train.add_argument("--output", help="the run's folder (default: results/<preset>)")
    source = train.add_mutually_exclusive_group()
    source.add_argument("--preset", choices=PRESET_NAMES, help="the recipe (default: fast)")
    source.add_argument("--config", metavar="JSON", help="the recipe in a run's config.json")
    source.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    _recipe(train)

    test = _command(
        commands, "test", _test, "score a checkpoint on a test set", "test --run results/notebook --data Data1"
    )
    which = test.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", help="the folder of a training")
    which.add_argument("--checkpoint", help="a checkpoint file, the original's too, or the name of weights that ship")
    _data(test)
    test.add_argument(
        "--output", help="folder for scores and pictures (default: the run's; in it native/, validation/)"
    )
    test.add_argument(
        "--protocol",
        choices=("notebook", "native"),
        default="notebook",
        help="512x512 and threshold 0.5 as the original, or the photos' own size (default: %(default)s)",
    )
    test.add_argument(
        "--part",
        choices=("test", "validation"),
        default="test",
        help="the set's test photos, or the training photos that the run held out (default: %(default)s)",
    )
    test.add_argument("--threshold", type=float, help="cut at this probability (default: the protocol's)")
    test.add_argument(
        "--recolour",
        type=int,
        default=0,
        help="score each photo so many times in the drawn colours of other cameras (default: once, in its own)",
    )
    _network(test)

    predict = _command(
        commands, "predict", _predict, "segment photos of any size", "predict photos/ eye.jpg --output vessels"
    )
    predict.add_argument(
        "photos", nargs="+", metavar="PHOTO_OR_FOLDER", help="photo files, or folders with all below them"
    )
    predict.add_argument("--output", required=True, help="folder for the pictures and summary.csv")
    predict.add_argument(
        "--weights",
        default="general",
        help="weights that ship, a checkpoint file, or a run's folder (default: %(default)s)",
    )
    predict.add_argument("--overwrite", action="store_true", help="segment again what is done (default: skip it)")
    predict.add_argument("--threshold", type=float, help="cut at this probability (default: the checkpoint's)")
    predict.add_argument(
        "--working-size", type=int, help="diameter the field of view is brought to (default: as trained)"
    )
    predict.add_argument("--flips", action="store_true", help="average over eight orientations (default: off)")
    predict.add_argument("--device", default="auto", help="cpu, cuda, … (default: %(default)s)")
    predict.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="arithmetic (default: %(default)s)"
    )

    compare = _command(
        commands, "compare", _compare, "hold tested runs against each other", "compare results/notebook results/fast"
    )
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders with a metrics.json; the first is the reference"
    )
    compare.add_argument(
        "--output", default="results/comparison", help="folder for table and picture (default: %(default)s)"
    )

    threshold = _command(
        commands,
        "threshold",
        _threshold,
        "choose a threshold on the photos that trainings held out",
        "threshold results/fold-0 results/fold-1 --data Data1",
    )
    threshold.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of trainings with --validation photos, as of --fold 0, 1, …"
    )
    _data(threshold)
    threshold.add_argument(
        "--output", default="results/threshold", help="folder for table and picture (default: %(default)s)"
    )
    threshold.add_argument(
        "--protocol",
        choices=("native", "notebook"),
        default="native",
        help="the photos' own size in the field of view, or 512x512 over the frame (default: %(default)s)",
    )
    _network(threshold)

    export = _command(
        commands,
        "export",
        _export,
        "write a network as an ONNX file, for programs without torch",
        "export --weights general --output vessels.onnx",
    )
    export.add_argument(
        "--weights",
        default="general",
        help="weights that ship, a checkpoint file, or a run's folder (default: %(default)s)",
    )
    export.add_argument("--output", required=True, help="the file; its name ends in .onnx")

    prepare = _command(
        commands, "prepare", _prepare, "bring a public set into the Data1 layout", "prepare drive DRIVE Data1"
    )
    prepare.add_argument("set", choices=("drive", "chase_db1", "stare", "hrf", "les-av"), help="which set it is")
    prepare.add_argument("source", help="the folder as downloaded and unpacked")
    prepare.add_argument("destination", help="a new or empty folder")
    prepare.add_argument("--size", default="512", type=_size, help="side in pixels, or native (default: %(default)s)")
    prepare.add_argument(
        "--split", choices=("usual", "train", "test"), default="usual", help="or all in one part (default: %(default)s)"
    )

    check = _command(commands, "check", _check, "say what a set holds and what is wrong with it", "check Data1")
    check.add_argument("data", metavar="DATA", help="the set's folder")

    synth = _command(commands, "synth", _synth, "draw a set of synthetic photos", "synth results/synthetic --train 20")
    synth.add_argument("destination", help="a new or empty folder")
    synth.add_argument("--train", type=int, default=12, help="training photos (default: %(default)s)")
    synth.add_argument("--test", type=int, default=4, help="test photos (default: %(default)s)")
    synth.add_argument("--size", type=int, default=512, help="side in pixels (default: %(default)s)")
    synth.add_argument("--seed", type=int, default=0, help="another seed, other photos (default: %(default)s)")

    bench = _command(
        commands, "bench", _bench, "measure the original's way against this package's, here and now", "bench --rounds 5"
    )
    bench.add_argument("--output", default="results/bench", help="folder for bench.json (default: %(default)s)")
    bench.add_argument("--rounds", type=int, default=7, help="how often each way is measured (default: %(default)s)")
    bench.add_argument("--photos", type=int, default=20, help="of the whole test (default: %(default)s)")
    bench.add_argument("--size", type=int, default=512, help="side of a photo, pixels (default: %(default)s)")
    bench.add_argument("--original", help="a checkpoint of the original's network (default: random weights)")
    bench.add_argument("--fast", default="drive", help="weights of the fast network (default: %(default)s)")
    bench.add_argument("--data", help="a set whose test photos to use (default: synthetic photos)")
    bench.add_argument("--device", default="auto", help="cpu, cuda, … (default: the processor, and a GPU if there)")
    bench.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="ours (default: %(default)s)"
    )
    bench.add_argument(
        "--growth", action="store_true", help="steps a second and memory over batch, window, workers too (default: off)"
    )
    return parser


def _command(commands, name: str, call, summary: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"example: retina-seg {example}"
    )
    parser.set_defaults(call=call)
    return parser


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="Data1", help="the set's folder, or one that holds it (default: %(default)s)")


def _network(parser: argparse.ArgumentParser) -> None:
    """How the network is used where it is scored."""
    parser.add_argument(
        "--working-size", type=int, help="diameter the field of view is brought to (default: the checkpoint's)"
    )
    parser.add_argument("--flips", action="store_true", help="average over eight orientations (default: off)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "auto"),
        default="float32",
        help="arithmetic; float32 gives the same scores everywhere (default: %(default)s)",
    )


def _recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("changes to the recipe", "what is not given is the recipe's own")
    group.add_argument("--epochs", type=int, help="passes (default: notebook 10, quick 3, fast 20, else 36)")
    group.add_argument("--batch-size", type=int, help="photos a step and process (default: 2)")
    group.add_argument("--learning-rate", type=float, help="its peak (default: notebook 1e-4, else 2e-3)")
    group.add_argument("--seed", type=int, help="of all that is drawn (default: 42)")
    group.add_argument(
        "--size",
        type=int,
        help="side the network is fed, pixels (default: notebook 512, else 256)",
    )
    group.add_argument(
        "--validation",
        choices=("test", "photos", "files", "none"),
        help="what validates: the test part as in the original, held-out photos, held-out files (variants of one photo on "
        "both sides, to show the leak), nothing (default: notebook test, else none)",
    )
    group.add_argument("--held-out", type=int, help="photos (or files) held out for validation (default: 4)")
    group.add_argument("--split-seed", type=int, help="of the draw that holds photos out (default: 42)")
    group.add_argument("--fold", type=int, help="hold out this lot of that draw, from 0 on (default: 0)")
    group.add_argument("--precision", choices=("auto", "float32", "bfloat16"), help="arithmetic (default: auto)")
    group.add_argument("--device", help="cpu, cuda, … (default: auto)")
    group.add_argument("--workers", type=int, help="processes that load photos (default: 0)")


class _OneOrMore(argparse.Action):
    """A list of several values, the value itself where there is one."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def _size(text: str) -> str:
    if text != "native" and not (text.isdecimal() and int(text) >= 32):
        raise argparse.ArgumentTypeError(f"{text!r} is neither native nor a number of pixels from 32 on")
    return text


def _version() -> str:
    from retina_seg import __version__

    return __version__
