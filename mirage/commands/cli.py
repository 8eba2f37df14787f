"""The command line, `mirage`: a module per command, with its `Options` and its `run`; tyro makes the parser of them."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import tyro

from .. import __version__
from ..optional import MissingExtraError
from . import demo, evaluate, generate, info, prepare, train, worldscore
from .arguments import REGISTRY

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "generate": generate,
    "train": train,
    "prepare": prepare,
    "evaluate": evaluate,
    "worldscore": worldscore,
    "info": info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Its exit status: 0, or 2 for what the user can fix, which is said in a line on stderr.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--version"]:
        print(f"mirage {__version__}")
        raise SystemExit(0)
    name, options = parse(given)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a folder's name need not be text
    try:
        status: int = COMMANDS[name].run(options)
        return status
    except (OSError, ValueError, MissingExtraError) as error:
        said = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        print(f"mirage {name}: {said or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """Parse a command line: the command's name and its `Options`.

    Raises:
        SystemExit: after help (0) or what is wrong (2) has been printed.
    """
    options = tyro.extras.subcommand_cli_from_dict(
        {name: command.Options for name, command in COMMANDS.items()},
        prog="mirage",
        description="Latent spatial memory for video world models.",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        registry=REGISTRY,
    )
    name = next(name for name, command in COMMANDS.items() if command.Options is type(options))
    return name, options
