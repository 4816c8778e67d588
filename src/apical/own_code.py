"""Load, run and identify code that is not part of apical, given as `path/to/file.py:NAME` or `module:NAME`."""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import CellType, CodeType, ModuleType
from typing import Any

import numpy as np
import torch

from apical.errors import ApicalError, ConfigError

_modules: set[str] = set()
"""Names of the modules that were imported as users' code."""


def is_code(name: str) -> bool:
    """Return whether a name refers to something in a file or module.

    >>> is_code("nets.py:Net"), is_code("nets.py"), is_code("lenet")
    (True, True, False)
    """
    return ":" in name or name.endswith(".py")


def absolute(name: str) -> str:
    """Return the same name with the absolute path of its file, so that it means the same from any folder."""
    where, colon, attribute = name.rpartition(":")
    return f"{Path(where).expanduser().resolve()}{colon}{attribute}" if where.endswith(".py") else name


def import_from(name: str, kind: str, example: str, error: Callable[[str], ApicalError] = ConfigError) -> Any:
    """Return the object that `name` refers to. Runs the file or module; an unchanged file runs only once per process.

    Args:
        name: "path/to/file.py:NAME" or "module:NAME".
        kind: what the object should be, for messages, such as "rule".
        example: a valid name, for messages.
        error: class of the errors.

    Raises:
        ApicalError: there is no such file, module or attribute, or its code fails.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise error(f"{kind} {name!r}: give file and name, such as {example}")
    module = import_module(where, example, error)
    value = getattr(module, attribute, None)
    if value is None:
        names = [key for key, value in vars(module).items() if _is_own(value, module)]
        near = difflib.get_close_matches(attribute, names, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f". It defines: {', '.join(names) or 'nothing'}"
        raise error(f"{where} has no {attribute!r}{hint}")
    return value


def import_module(where: str, example: str, error: Callable[[str], ApicalError] = ConfigError) -> ModuleType:
    """Return the module of a file "path/to/file.py", or of that name; raises the same errors as :func:`import_from`."""
    if where.endswith(".py"):
        return _file(Path(where).expanduser().resolve(), where, error)
    with settings_kept(where, error):
        try:
            with generators_kept():
                module = importlib.import_module(where)
        except (Exception, SystemExit) as problem:
            hint = "" if "/" not in where else f"; for a file, say {example}"
            if Path(where.partition(".")[0]).is_dir() or Path(f"{where}.py").is_file():
                hint = "; to import from the current folder, set PYTHONPATH=."
            raise error(f"module {where} cannot be imported: {type(problem).__name__}: {problem}{hint}") from problem
    _modules.add(module.__name__)
    return module


@contextmanager
def generators_kept(seed: int | None = None) -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch after this context; within it they may start from a seed.

    The current folder, to which paths on the command line refer, is restored as well.
    """
    before, folder = (random.getstate(), np.random.get_state()), os.path.curdir
    with suppress(OSError):
        folder = os.getcwd()
    with torch.random.fork_rng([]):
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            with suppress(OSError):
                os.chdir(folder)


@contextmanager
def settings_kept(where: str, error: Callable[[str], ApicalError] = ConfigError) -> Iterator[None]:
    """Refuse changes to PyTorch's process-wide settings in this context: they would affect other rules, models and data.

    Args:
        where: what runs, for the message.

    Raises:
        ApicalError: the default dtype, default device or grad mode has changed afterwards; they are restored.
    """
    before = _settings()
    try:
        yield
    finally:
        after = _settings()
        torch.set_default_dtype(before["default dtype"])
        torch.set_grad_enabled(before["grad mode"])
        if after["default device"] != before["default device"]:
            torch.set_default_device(None if before["default device"].type == "cpu" else before["default device"])
    for what, value in after.items():
        if value != before[what]:
            raise error(
                f"{where} sets PyTorch's {what} to {value} for everything that this process trains: remove that, and "
                "convert only what needs it"
            )


@contextmanager
def standard_settings() -> Iterator[None]:
    """Use PyTorch's default dtype and device, grad and inference mode and autocast of a new process within this context.

    Code that trains whole networks runs this way: one process gives the same numbers as several, whatever the caller set.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with ExitStack() as stack:
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


def _settings() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
    }


def checksum(value: Any, name: str) -> str:
    """Return 16 hex digits of the SHA-256 of the file that defines a class or function, or else of the file in its name.

    Empty if there is no such file.
    """
    try:
        path = inspect.getfile(inspect.unwrap(value))
    except TypeError:  # a partial function, or an object that can be called
        module = sys.modules.get(name.rpartition(":")[0], None)
        path = str(file_of(name) or (module and module.__file__) or "")
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def source_checksum(value: Any) -> str:
    """Return 16 hex digits of the SHA-256 of only a class, a function or another callable.

    That is the source of a class, or the code of a function with the values that it uses: defaults, enclosed variables,
    arguments of a partial function, attributes of an object.
    """
    if inspect.isclass(value):
        with suppress(TypeError, OSError):
            return hashlib.sha256(inspect.getsource(value).encode()).hexdigest()[:16]
    return hashlib.sha256(repr(_identity(value)).encode()).hexdigest()[:16]


def _identity(value: Any, depth: int = 6) -> Any:
    """Return what distinguishes a value in any process: numbers, strings, arrays and code; for the rest, the type."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if depth == 0:
        return type(value).__name__
    if isinstance(value, Mapping):
        return [(str(key), _identity(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, tuple | list):
        return [_identity(item, depth - 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(_identity(item, depth - 1)) for item in value)
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta:
        value = value.detach().cpu().resolve_conj().resolve_neg()
        value = (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return [value.shape, str(value.dtype), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, partial):
        return [_identity(part, depth - 1) for part in (value.func, value.args, value.keywords)]
    if inspect.ismethod(value):
        return [_identity(value.__func__, depth - 1), _identity(value.__self__, depth - 1)]
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        held = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *cells]
        return [_parts(value.__code__), *(_identity(item, depth - 1) for item in held)]
    if inspect.isclass(value):
        return [_parts(item.__code__) for item in vars(value).values() if hasattr(item, "__code__")]
    return [type(value).__name__, _identity(type(value), depth - 1), _identity(getattr(value, "__dict__", {}), depth - 1)]


def _parts(code: CodeType) -> tuple[Any, ...]:
    constants = [_parts(constant) if isinstance(constant, CodeType) else constant for constant in code.co_consts]
    return (code.co_code, code.co_names, constants)


def described(error: BaseException, path: Path | None) -> str:
    """Describe an exception in one line, with the line of the file at which it occurred."""
    lines = [error.lineno] if isinstance(error, SyntaxError) else []
    lines += [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if path and Path(frame.filename) == path]
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(text.split())
    return f"{type(error).__name__}: {text}" + (f" (line {lines[0] if len(lines) == 1 else lines[-1]})" if lines else "")


def blamed(error: BaseException) -> str | None:
    """Describe in one line an exception that occurred in user code or in what that called; None for any other."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [frame for frame in frames if frame.f_globals.get("__name__", "") in _modules]
    return f"{own[-1].f_code.co_filename} failed: {described(error, Path(own[-1].f_code.co_filename))}" if own else None


def file_of(name: str) -> Path | None:
    """Return the file in a name "path/to/file.py:NAME"; None for a module."""
    where = name.rpartition(":")[0]
    return Path(where).expanduser().resolve() if where.endswith(".py") else None


def _is_own(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _file(path: Path, title: str, error: Callable[[str], ApicalError]) -> ModuleType:
    if not path.is_file():
        raise error(f"there is no file {title}" + (f" (looked for {path})" if title != str(path) else ""))
    name = f"_apical_own_{hashlib.sha256(bytes(path) + path.read_bytes()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None  # the name ends in .py
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    _modules.add(name)
    if str(path.parent) not in sys.path:  # files in the same folder can be imported, as when it is run
        sys.path.append(str(path.parent))
    _check_imports(path, title, error)
    sys.modules[name] = module  # dataclasses look up their module
    try:
        with settings_kept(title, error):
            _run(partial(specification.loader.exec_module, module), path, title, error)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _run(execute: Callable[[], object], path: Path, title: str, error: Callable[[str], ApicalError]) -> None:
    """Run the code of a file."""
    try:
        with generators_kept():
            execute()
    except (Exception, SystemExit) as problem:  # sys.exit() in a script that is not meant as a module
        inside = isinstance(problem, ImportError) and "relative import" in str(problem)
        hint = f"; name it by its package: PACKAGE.{path.stem}:NAME, with PYTHONPATH=." if inside else ""
        raise error(f"{title} cannot be loaded: {described(problem, path)}{hint}") from problem


def _check_imports(path: Path, title: str, error: Callable[[str], ApicalError]) -> None:
    """Refuse a file that would import another module than the one in its folder, such as an installed `utils`."""
    left, seen = [path], {path}
    while left:
        for name in _imported(left.pop()) - sys.stdlib_module_names:
            places = (path.parent / f"{name}.py", path.parent / name / "__init__.py")
            beside = next((place.resolve() for place in places if place.is_file()), None)
            if beside is None or beside in seen:
                continue
            origin = _origin(name)
            if origin and _differ(Path(origin), beside):
                raise error(f"{title} imports {name!r}, which resolves to {origin}, not {beside}: rename the latter")
            left.append(beside)
            seen.add(beside)


def _imported(path: Path) -> set[str]:
    """Return the top-level names of a file's absolute imports."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):
        return set()  # running it reports the error
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}


def _origin(name: str) -> str | None:
    """Return the file that a module comes from, whether already imported or not."""
    with suppress(ImportError, ValueError):
        found = importlib.util.find_spec(name)
        return found.origin if found else None
    return None


def _differ(a: Path, b: Path) -> bool:
    return a.resolve() != b and (not a.is_file() or a.read_bytes() != b.read_bytes())
