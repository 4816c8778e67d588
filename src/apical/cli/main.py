"""The command line: `apical COMMAND`. Torch is imported only by commands that compute."""

import errno
import io
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg, subcommand

from apical import __version__
from apical.bench.folders import refuse_both
from apical.cli.flags.audit import Audit
from apical.cli.flags.evolve import Evolve
from apical.cli.flags.help import OVERVIEW, option_rows, short_help
from apical.cli.flags.landscape import Landscape
from apical.cli.flags.measure import Measure
from apical.cli.flags.reproduce import Reproduce
from apical.cli.flags.sweep import Sweep
from apical.cli.flags.training import Compare, Train
from apical.cli.flags.usage import explained
from apical.cli.interrupts import LINE, STATUS, Raise, end, handled
from apical.errors import ApicalError, ConfigError, out_of_memory

DESCRIPTION = "Train PyTorch networks with credit-assignment rules other than backpropagation."


@dataclass(frozen=True)
class Report:
    """Write the figures and report.html of a folder."""

    folder: Positional[Path]
    """Folder of a comparison, a run or an evolution."""


@dataclass(frozen=True)
class DataFetch:
    """Download a data set, checked against its known checksum; an interrupted download continues."""

    name: Positional[Annotated[str, arg(metavar="NAME")]]
    """Data set."""


@dataclass(frozen=True)
class DataList:
    """List data sets and where they were found."""


@dataclass(frozen=True)
class Data:
    """Download a data set, or list those on this machine."""

    action: OmitArgPrefixes[
        Annotated[DataFetch, subcommand("fetch", prefix_name=False)]
        | Annotated[DataList, subcommand("list", prefix_name=False)]
    ]


@dataclass(frozen=True)
class List:
    """List the available rules, models, data sets or recipes."""

    what: Positional[Literal["rules", "models", "data", "recipes"]]
    """What to list."""


COMMANDS: dict[str, type] = {
    "compare": Compare,
    "train": Train,
    "evolve": Evolve,
    "landscape": Landscape,
    "audit": Audit,
    "measure": Measure,
    "reproduce": Reproduce,
    "sweep": Sweep,
    "report": Report,
    "data": Data,
    "list": List,
}
"""The flags of each command. `run(flags, command)` in `apical.cli.<name>`, imported only then, runs it, or the function in
`apical.cli.commands.RUN`."""

Command: Any = Union[  # noqa: UP007  (of a list)
    tuple(Annotated[flags, subcommand(name, prefix_name=False)] for name, flags in COMMANDS.items())
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 2 for an error, 3 diverged, 128 + signal if interrupted."""
    arguments = [_at_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    status = _status(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from apical.bench.distributed import leave

        leave(status)
    return status


def _at_home(word: str) -> str:
    """Expand `~` in a path, which shells do not expand after an equals sign: --out=~/runs."""
    option, mark, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + mark + (os.path.expanduser(value) if value.startswith("~") else value)


def _parsed(arguments: Sequence[str]) -> Any:
    """Return the command and its options."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(
                Command,
                prog="apical",
                description=DESCRIPTION,
                args=["--help" if word == "--help-all" else word for word in arguments],
                config=(FlagCreatePairsOff,),
            )
    except SystemExit as error:
        if error.code in (0, None):
            raise
        options = [row[0] for row in option_rows(COMMANDS[arguments[0]])] if arguments[0] in COMMANDS else []
        raise ConfigError(explained(box.getvalue(), arguments, COMMANDS, options)) from None


def _asked_for(arguments: Sequence[str]) -> str | None:
    """Return the version or help that was requested; None for a command to run, or help that tyro prints."""
    if arguments == ["--version"]:
        return f"apical {__version__}"
    if not arguments or arguments[0] in ("-h", "--help"):
        return OVERVIEW
    if arguments[0] in COMMANDS and any(word in ("-h", "--help") for word in arguments[1:]):
        return None if arguments[0] == "data" and len(arguments) > 2 else short_help(arguments[0], COMMANDS[arguments[0]])
    return None


def _status(arguments: Sequence[str]) -> int:
    parsed = None
    try:
        if (text := _asked_for(arguments)) is not None:
            print(text, flush=True)
            return 0
        parsed = _parsed(arguments)
        with handled(end):
            run = _runner(parsed)
        _require_numbers(parsed)
        refuse_both(parsed)
        with handled(Raise()):
            return run(parsed, shlex.join(["apical", *arguments]))
    except ApicalError as error:
        message = str(error)
    except BrokenPipeError:
        return _unheard()
    except OSError as error:
        message = _said(error, parsed)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich exits this way
            return _unheard()
        if parsed is None:  # tyro's, after help
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{frame.filename}, line {frame.lineno}, ended the program (SystemExit: {error.code})"
    except KeyboardInterrupt:
        print(LINE, file=sys.stderr, flush=True)
        return STATUS
    except BaseException as error:  # also what pytest.skip raises
        from apical import own_code

        if (told := out_of_memory(error) or own_code.blamed(error)) is None:
            raise
        message = told
    # under torchrun every process prints it: the first to end gets the others killed, perhaps before they print
    print("apical: error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 2


def _require_numbers(flags: Any) -> None:
    """Refuse whole numbers that PyTorch does not take, infinity and what is not a number."""
    for name, value in vars(flags).items():
        most = 2**63 - 1 if name in ("seed", "search_seed") else 2**31 - 1
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"--{name.replace('_', '-')} must be finite, got {number}")
            if isinstance(number, int) and number > most:
                raise ConfigError(f"--{name.replace('_', '-')} must be at most {most}, got {number}")


def _unheard() -> int:
    """Return the exit status of a program whose reader, such as `head`, has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for output that Python flushes at exit
    return 128 + 13


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _said(error: OSError, parsed: Any) -> str:
    """Return a system error as one line; for a full disk, with the folder and how to continue."""
    out = getattr(parsed, "out", None) or getattr(parsed, "folder", None)
    where = error.filename or (out if error.errno in _FULL else None)
    text = (error.strerror or str(error)) + (f": {where}" if where else "")
    if error.errno in _FULL and hasattr(parsed, "resume"):
        text += f"; what was saved in {out} is kept: free some space, then run the same command with --resume"
    return text


def _runner(parsed: Any) -> Callable[[Any, str], int]:
    """Return the function that runs a command; imports torch and everything else that the command needs."""
    from apical.cli.commands import RUN

    name = next(name for name, flags in COMMANDS.items() if flags is type(parsed))
    run: Callable[[Any, str], int] = RUN.get(name) or import_module(f"apical.cli.{name}").run
    return run
