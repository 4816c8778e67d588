"""Rules that are not part of apical, named on the command line as `path/to/file.py:Class` or `module:Class`."""

import difflib
import hashlib
import inspect
from pathlib import Path

from apical import own_code
from apical.core.credit import Credit, CreditRule
from apical.errors import ConfigError
from apical.own_code import import_module

IN_MEMORY = "in-memory:"
"""Prefix of the names of rules that exist only in this process."""
_memory: dict[str, type[CreditRule]] = {}


def load_class(name: str) -> type[CreditRule]:
    """Return the class named by `name`. Runs the code of the file or module, once in this process.

    Raises:
        ConfigError: there is no such file, module or class, its code fails, or the class is not a rule.
    """
    if name in _memory:
        return _memory[name]
    if name.startswith(IN_MEMORY):
        raise ConfigError(f"rule {name!r} existed only in the memory of the program that started this; continue from there")
    where, _, kind = name.rpartition(":")
    if not where or not kind:
        raise ConfigError(f"rule {name!r} needs a file and a class, such as my_rule.py:MyRule")
    module = import_module(where, "path/to/file.py:Class")
    member = getattr(module, kind, None)
    if member is None:
        rules = [key for key, value in vars(module).items() if _is_rule(value) and value.__module__ == module.__name__]
        near = difflib.get_close_matches(kind, rules, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f". Its rules: {', '.join(rules) or 'none'}"
        raise ConfigError(f"{where} has no class {kind!r}{hint}")
    if not _is_rule(member):
        raise ConfigError(f"{name} is not a rule: derive the class from apical.CreditRule, or from EdgeRule or CutRule")
    if missing := _missing(member):
        raise ConfigError(f"{name} is not a complete rule: it has no method {missing[0]!r}")
    rule: type[CreditRule] = member
    return rule


def remember(kind: type[CreditRule]) -> str:
    """Register a class of this process; return its name for :func:`load_class`.

    Raises:
        ConfigError: the class is not a rule.
    """
    if not _is_rule(kind):
        what = repr(kind) if isinstance(kind, type) else f"a {type(kind).__name__}"
        raise ConfigError(f"{what} is not a rule: pass a class derived from apical.CreditRule")
    if missing := _missing(kind):
        raise ConfigError(f"{kind.__name__} is not a complete rule: it has no method {missing[0]!r}")
    name = IN_MEMORY + kind.__name__
    _memory[name] = kind
    return name


def checked(rule: CreditRule, credit: object) -> Credit:
    """Return the credit that a rule returned for a batch.

    Raises:
        ConfigError: the return value is not a credit.
    """
    if not isinstance(credit, Credit):
        raise ConfigError(f"{type(rule).__name__}.forward returns a {type(credit).__name__}, not apical.core.credit.Credit")
    return credit


def title(kind: type[CreditRule]) -> str:
    """Return the first line of the class's own docstring; its name if it has none."""
    text = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    return text.splitlines()[0].rstrip(".") if text else kind.__name__


def origin(name: str) -> str:
    """Return a sentence with the location and the present checksum of the rule's code."""
    kind = load_class(name)
    if name in _memory:
        return f"{kind.__name__} comes from memory ({kind.__module__}), sha256 {own_code.source_checksum(kind)}"
    path = Path(inspect.getfile(kind))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return f"{kind.__name__} comes from {name.rpartition(':')[0]}, sha256 {checksum}"


def changes(name: str, notes: object) -> list[str]:
    """Return how the code of a user's rule differs from the notes of a run; nothing for a rule of apical."""
    if ":" not in name or not isinstance(notes, list):
        return []
    head, mark, now = origin(name).partition(" comes from ")
    saved = next((note for note in notes if isinstance(note, str) and note.startswith(head + mark)), now)
    before, after = (text.rpartition(", sha256 ")[2] for text in (saved, now))
    return [] if before == after else [f"the code of {name}, sha256: {before} vs {after}"]


def _is_rule(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, CreditRule)


def _missing(kind: type[CreditRule]) -> list[str]:
    """Return methods that a base requires but the class lacks. Modules have no metaclass that would check this."""
    return [name for name, _ in inspect.getmembers(kind, lambda m: getattr(m, "__isabstractmethod__", False))]
