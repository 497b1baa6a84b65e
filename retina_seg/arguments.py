"""The arguments of the command `retina-seg`: how its jobs declare them, and the parser that is made of them."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

from retina_seg import __version__
from retina_seg.config import GROUPS, PRESETS, TrainConfig

Argument = tuple[str, dict[str, Any]]  # a name, and what `add_argument` takes with it
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int | None], str, str, tuple[Argument, ...]]] = {}


def command(summary: str, example: str, *arguments: Argument) -> Callable[[Any], Any]:
    """Registers the function below as a command: its help, an example, its arguments."""

    def register(call: Any) -> Any:
        COMMANDS[call.__name__.strip("_")] = (call, summary, example, arguments)
        return call

    return register


def argument(name: str, help: str, default: Any = None, **more: Any) -> Argument:
    """An argument of a command: its help names its default, whose type it has."""
    if default is not None:
        more |= {"default": default, "type": type(default)}
        help += f" (default: {default})"
    return name, {"help": help, **more}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    about = "Retinal vessel segmentation: a light U-Net with two attention gates. Not a medical device."
    parser = argparse.ArgumentParser("retina-seg", description=about)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    modules = "import this module first, which registers own networks and losses (register_model, register_loss)"
    parser.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE", help=modules)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    presets = "\n".join(["", "presets:", *(f"  {name:<10}{preset.summary}" for name, preset in PRESETS.items())])
    for name, (_, summary, example, arguments) in COMMANDS.items():
        trains = name in ("run", "train")
        one = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + "." + ("\n" + presets if trains else ""),
            epilog=f"example: retina-seg {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for argument_name, how in arguments:
            one.add_argument(argument_name, **how)
        if trains:
            _add_config_options(one)
    return parser


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    """An option for every field of `TrainConfig` that has a help text, in its groups."""
    group: Any = parser
    for item in (field for field in dataclasses.fields(TrainConfig) if field.metadata):
        if item.name in GROUPS:
            group = parser.add_argument_group(GROUPS[item.name])
        kind, choices = item.metadata["kind"], item.metadata["choices"] or None
        group.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=json.loads if kind is dict else kind,
            choices=choices,
            metavar=None if choices else {dict: "JSON", int: "N", float: "X", str: "NAME"}[kind],
            help=f"{item.metadata['help']} (default: {_default_text(item.name)})".replace("%", "%%"),
        )


def _default_text(name: str) -> str:
    """The presets' values of a field: one where all agree, else the commonest first."""
    values = {preset: getattr(TrainConfig.from_preset(preset), name) for preset in PRESETS}
    shown = {preset: "not set" if value is None else json.dumps(value).strip('"') for preset, value in values.items()}
    usual = max(shown.values(), key=list(shown.values()).count)
    return ", ".join([usual, *(f"{preset} {value}" for preset, value in shown.items() if value != usual)])


def given_options(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options called `names` that are set; without names, those of `TrainConfig`."""
    names = names or tuple(item.name for item in dataclasses.fields(TrainConfig) if item.metadata)
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}
