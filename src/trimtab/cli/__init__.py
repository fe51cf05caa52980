"""The `trimtab` command: sub-commands made from the typed signatures of the functions that they call.

A sub-command's module, and with it torch and transformers, is imported only when that sub-command is asked for, so that
`trimtab --help` answers at once. A parameter that is a dataclass gives its fields as options of their own.

Exit status: 0 done, 2 bad input or a file that cannot be read or written (a line names it), 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser

import trimtab
from trimtab.core.errors import TrimtabError

__all__ = ["main"]


@dataclasses.dataclass(frozen=True)
class Command:
    """Where a sub-command's function is, and one line of help."""

    module: str
    function: str
    help: str

    def load(self) -> Callable[..., object]:
        """The function; this imports what it needs."""
        function: Callable[..., object] = getattr(importlib.import_module(f"trimtab.cli.{self.module}"), self.function)
        return function


COMMANDS: dict[str, Command | dict[str, Command]] = {
    "demo": Command("demo", "demo", "read a real model through a sparse dictionary, and show it in a page"),
    "methods": Command("methods", "methods", "list the nineteen methods and say which are there"),
    "sae": {
        "train": Command("sae", "train", "train dictionaries on a model's activations"),
        "eval": Command("sae", "evaluate", "measure a dictionary on text"),
        "explain": Command("sae", "explain", "find what latents respond to, and write a page to browse them"),
        "show": Command("sae", "show", "show which latents fire on a text"),
        "score": Command("sae_finished", "score", "score how well latents are explained by their tokens"),
        "stitch": Command("sae_finished", "stitch", "put a dictionary and its additions into one"),
    },
    "align": Command("align", "align", "train a model on preferences, with a reference that follows it"),
    "distill": Command("distill", "distill", "train a student on what it writes itself, towards a teacher"),
    "gallery": {
        "run": Command("gallery", "run", "measure methods beside their baselines"),
        "report": Command("gallery", "report", "write the page of a gallery's results"),
        "prepare": Command("gallery", "prepare", "rebuild the micro checkpoints by their recipes"),
    },
}

GROUPS = {
    "sae": "sparse dictionaries of a model's activations",
    "gallery": "every method beside its baselines",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, command = _parser(arguments)
        options = parser.parse_args(arguments)
        if command is None:
            parser.print_help()
        else:
            _call(command, options)
    except KeyboardInterrupt:
        print("trimtab: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (TrimtabError, OSError) as error:  # a full disk, a directory that cannot be written
        print(f"trimtab: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser(arguments: Sequence[str]) -> tuple[ArgumentParser, Command | None]:
    """The parser, filled only along the sub-command that `arguments` name, and that sub-command."""
    words = [word for word in arguments if not word.startswith("-")][:2]
    parser = ArgumentParser(prog="trimtab", description=_first_line(trimtab), version=trimtab.__version__)
    chosen = None
    commands = parser.add_subcommands(required=False)
    for name, entry in COMMANDS.items():
        if isinstance(entry, Command):
            wanted = words[:1] == [name]
            commands.add_subcommand(name, _command_parser(entry if wanted else None), help=entry.help)
            chosen = entry if wanted else chosen
            continue
        group = ArgumentParser(description=GROUPS[name])
        commands.add_subcommand(name, group, help=GROUPS[name])
        if words[:1] == [name]:
            members = group.add_subcommands()
            for member, command in entry.items():
                wanted = words[1:] == [member]
                members.add_subcommand(member, _command_parser(command if wanted else None), help=command.help)
                chosen = command if wanted else chosen
    return parser, chosen


def _command_parser(command: Command | None) -> ArgumentParser:
    """Options from the signature: positional parameters are positional, keyword-only ones are options."""
    if command is None:
        return ArgumentParser()
    function = command.load()
    hints = typing.get_type_hints(function)
    described = {p.arg_name: p.description for p in docstring_parser.parse(inspect.getdoc(function) or "").params}
    parser = ArgumentParser(description=_first_line(function))
    parser.add_argument("--config", action="config", help="a YAML file of options")
    for name, parameter in inspect.signature(function).parameters.items():
        hint, required = hints[name], parameter.default is parameter.empty
        about: dict[str, Any] = {"help": described.get(name)}
        if dataclasses.is_dataclass(hint):
            parser.add_class_arguments(hint, as_group=False)
            continue
        if hint is bool:
            parser.add_argument(f"--{name}", action="store_true", **about)
            continue
        positional = parameter.kind is not parameter.KEYWORD_ONLY
        if typing.get_origin(hint) is list:
            about |= {"nargs": "+" if required or not positional else "*", "type": typing.get_args(hint)[0]}
        else:
            about["type"] = hint
        if not required:
            about["default"] = parameter.default
        elif not positional:
            about["required"] = True
        parser.add_argument(name if positional else f"--{name}", **about)
    return parser


def _dataclass_parameters(function: Callable[..., object]) -> dict[str, type]:
    hints = typing.get_type_hints(function)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


def _call(command: Command, options: Any) -> None:
    """Call the command's function with the options of its sub-command, dataclasses put together from their fields."""
    function = command.load()
    while options.get("subcommand"):
        options = options[options["subcommand"]]
    values = {name: value for name, value in vars(options).items() if name != "config"}
    arguments = {}
    for name, config in _dataclass_parameters(function).items():
        arguments[name] = config(**{field.name: values.pop(field.name) for field in dataclasses.fields(config)})
    function(**values, **arguments)


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]
