"""Short help: the commands by topic, and for each command an example and its most common options.

`--help-all` shows every option with its whole text.
"""

import ast
import inspect
import re
import textwrap
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

WIDTH = 79
_COLUMN = 26
"""Column in which the texts of options begin."""

OVERVIEW = """apical: train PyTorch networks with credit-assignment rules other than
backpropagation, and measure what the rules do.

Start here (about a minute on two cores, no download), then open the report:

  apical compare --out runs/demo

Train
  compare     several rules side by side, with several seeds, and a report
  train       one rule; under torchrun, with several processes
  sweep       tune rules with equal trials, then test the best of each
  evolve      a top-down network that assigns credit, for the rule tdca
Measure
  audit       what rules need that a brain may lack
  measure     networks: their weights, codes and Jacobians
  landscape   paths of training on their loss surface
  report      redraw the figures and the page of a folder
Papers
  reproduce   tables of papers, compared with the published numbers
Look up
  list        rules, models, data or recipes
  data        data sets on this machine, and downloads

Examples
  apical compare --rules bp fa pfa --data mnist --model mlp-512-512 \\
      --epochs 5 --seeds 3 --out runs/mnist
  apical compare --data mine.npz --model my_model.py:Net --out runs/mine
  apical compare --recipe pfa-mnist --out runs/pfa-mnist

Ctrl-C saves; the same command with --resume continues.
apical COMMAND --help: the command's options. apical --version: its version."""

EXAMPLES = {
    "compare": ("apical compare --rules bp fa dfa --data mine.npz --out runs/mine",),
    "train": ("apical train --rule pfa --data digits --epochs 5 --out runs/pfa",),
    "sweep": ("apical sweep --rules bp dfa --space lr=0.01,0.03,0.1 --out runs/sweep",),
    "evolve": ("apical evolve --recipe digits --out runs/teacher",),
    "audit": ("apical audit bp fa pfa --out runs/audit",),
    "measure": ("apical measure my_model.py:Net --data mine.npz", "apical measure runs/demo --out runs/measured"),
    "landscape": ("apical train --trajectory 20 --out runs/bp", "apical landscape runs/bp --out runs/landscape"),
    "reproduce": ("apical reproduce pfa/mnist --budget smoke --out runs/papers",),
    "report": ("apical report runs/demo",),
    "list": ("apical list rules",),
    "data": ("apical data list", "apical data fetch mnist"),
}

_WHAT = ("recipe", "data", "model", "rule_options")
_TRAINING = ("epochs", "batch_size", "lr", "optimizer", "loss", "validation", "train_limit", "device")
_SAVING = ("out", "resume", "overwrite")
TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "compare": {"What": ("rules", *_WHAT, "seeds"), "Training": _TRAINING, "Running": ("jobs", "ray"), "Results": _SAVING},
    "train": {"What": ("rule", *_WHAT, "seed"), "Training": _TRAINING, "Results": (*_SAVING, "trajectory")},
    "sweep": {
        "What": ("rules", "space", "search", "trials", "seeds", "final_seeds", *_WHAT[:3]),
        "Training": ("epochs", "batch_size", "validation", "device"),
        "Running": ("jobs", "ray"),
        "Results": _SAVING,
    },
    "data": {},
    "evolve": {
        "What": ("recipe", "data", "model", "sites"),
        "Search": ("generations", "population", "strategy", "sigma", "step"),
        "Learners": ("tasks", "examples", "ways", "steps", "lr", "optimizer"),
        "Running": ("ray", "workers"),
        "Results": (*_SAVING, "seed"),
    },
}
"""Options shown by topic; a command's other options are only named. A command that is missing here shows all its options."""


def option_rows(flags: type[Any]) -> list[list[str]]:
    """Return each option as it is written ("--epochs N"), its default (or "required") and its text."""
    texts = field_texts(flags)
    rows = [
        (_option(name, hint)[0], _setting(hint, "help_behavior_hint"), texts.get(name, ""))
        for name, hint in _hints(flags).items()
    ]
    return [[option, default.strip("()").removeprefix("default: "), text] for option, default, text in rows]


def short_help(command: str, flags: type[Any]) -> str:
    """Return usage, purpose, example and options of a command, in lines of at most :data:`WIDTH` characters.

    Args:
        flags: the dataclass of its options.
    """
    texts, hints = field_texts(flags), _hints(flags)
    options = {name: _option(name, hint) for name, hint in hints.items()}
    topics = TOPICS.get(command, {"Options": tuple(options)})
    named = [option for option, (_, is_positional) in options.items() if is_positional]
    rest = "list|fetch NAME" if command == "data" else "[OPTIONS]" if len(options) > len(named) else ""
    use = " ".join(["apical", command, *(options[name][0] for name in named), rest])
    lines = [f"Use: {use.strip()}", "", *textwrap.wrap(" ".join((inspect.getdoc(flags) or "").split()), WIDTH)]
    lines += ["", "Example", *(f"  {line}" for line in EXAMPLES[command])]
    for topic, names in topics.items():
        lines += ["", topic]
        for name in names:
            lines += _entry(options[name][0], _sentence(texts.get(name, ""), hints[name]))
    if command == "data":
        return "\n".join(lines)
    others = [options[name][0].split()[0] for name in options if not any(name in names for names in topics.values())]
    if others:
        more = f"More (apical {command} --help-all describes them): {' '.join(others)}"
        lines += ["", *textwrap.wrap(more, WIDTH, break_on_hyphens=False)]
    return "\n".join(lines)


def _option(name: str, hint: Any) -> tuple[str, bool]:
    """Return an option as it is written, and whether it is positional."""
    metavar = _setting(hint, "metavar")
    is_positional = "Positional" in repr(hint) or "POSITIONAL" in repr(getattr(hint, "__metadata__", ()))
    if is_positional:
        choices = next((get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal), ())
        return metavar or "|".join(map(str, choices)) or name.upper(), True
    return f"--{name.replace('_', '-')} {metavar}".strip(), False


def _entry(option: str, text: str) -> list[str]:
    """Return an option with its text next to it, or below if the option is long."""
    body = textwrap.wrap(text, WIDTH - _COLUMN, break_on_hyphens=False)
    if len(option) > _COLUMN - 4:
        return [f"  {option}", *(" " * _COLUMN + line for line in body)]
    first, *rest = body or [""]
    return [f"  {option:{_COLUMN - 2}s}{first}".rstrip(), *(" " * _COLUMN + line for line in rest)]


def _sentence(text: str, hint: Any) -> str:
    """Return the first sentence of an option's text, and its default."""
    first = re.split(r"(?<!\.)\.\s+(?=[A-Z])|; ", " ".join(text.split()))[0].rstrip(".")
    return f"{first} {_setting(hint, 'help_behavior_hint')}".strip()


def _hints(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {item.name: hints[item.name] for item in fields(kind)}


def _setting(hint: Any, name: str) -> str:
    """Return an option's metavar, default or help from its annotation; empty if it has none."""
    return next((value for item in getattr(hint, "__metadata__", ()) if (value := getattr(item, name, None))), "")


def field_texts(kind: type[Any]) -> dict[str, str]:
    """Return the text of each field: the docstring under it, in the class or a base, or the help in its annotation."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # made by make_dataclass
            continue
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return texts | {name: _setting(hint, "help") for name, hint in _hints(kind).items() if _setting(hint, "help")}
