"""Rules that are not part of apical, named on the command line as `path/to/file.py:Class` or `module:Class`."""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType

from apical.core.credit import CreditRule
from apical.errors import ConfigError


def load_class(name: str) -> type[CreditRule]:
    """The class that `name` says. Runs the code of the file or module, once in this process.

    Raises:
        ConfigError: there is no such file, module or class, its code fails, or the class is no rule.
    """
    where, _, kind = name.rpartition(":")
    if not where or not kind:
        raise ConfigError(f"rule {name!r}: say file and class, such as my_rule.py:MyRule")
    module = _file(Path(where).expanduser().resolve(), where) if where.endswith(".py") else _module(where)
    found = getattr(module, kind, None)
    if found is None:
        rules = [key for key, value in vars(module).items() if _is_rule(value) and value.__module__ == module.__name__]
        near = difflib.get_close_matches(kind, rules, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f". Its rules: {', '.join(rules) or 'none'}"
        raise ConfigError(f"{where} has no class {kind!r}{hint}")
    if not _is_rule(found):
        raise ConfigError(f"{name} is no rule: derive the class from apical.CreditRule, or from EdgeRule or CutRule")
    if missing := _missing(found):
        raise ConfigError(f"{name} is no complete rule: it has no method {missing[0]!r}")
    rule: type[CreditRule] = found
    return rule


def title(kind: type[CreditRule]) -> str:
    """The first line of the class's own docstring; its name where it has none."""
    text = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    return text.splitlines()[0].rstrip(".") if text else kind.__name__


def origin(name: str) -> str:
    """A sentence on where the rule's code lies, with the checksum that it has now."""
    kind = load_class(name)
    path = Path(inspect.getfile(kind))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return f"{kind.__name__} comes from {name.rpartition(':')[0]}, sha256 {checksum}"


def _is_rule(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, CreditRule)


def _missing(kind: type[CreditRule]) -> list[str]:
    """Methods that a base leaves to the class and the class does not have. Modules have no metaclass that would tell."""
    return [name for name, _ in inspect.getmembers(kind, lambda m: getattr(m, "__isabstractmethod__", False))]


def _file(path: Path, shown: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {shown} (looked for {path})")
    name = f"_apical_rule_{hashlib.sha256(bytes(path)).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None  # the name ends in .py
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # sys.exit() in a script that is no module
        del sys.modules[name]
        raise ConfigError(f"{shown} cannot be loaded: {_said(error, path)}") from error
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        hint = "" if "/" not in name else "; for a file, say path/to/file.py:Class"
        raise ConfigError(f"module {name} cannot be imported: {type(error).__name__}: {error}{hint}") from error


def _said(error: BaseException, path: Path) -> str:
    """The exception, and the line of the file at which it came up."""
    lines = [error.lineno] if isinstance(error, SyntaxError) else []
    lines += [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" + (f" (line {lines[0] if len(lines) == 1 else lines[-1]})" if lines else "")
