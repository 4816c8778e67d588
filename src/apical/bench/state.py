"""JSON objects kept between processes: read strictly, with a checksum of their content, so that damage is detected.

The checksum is the member "sha256" of the object, computed over its other members in canonical form. An object without it
(from an earlier version, or written by hand) is read unchecked.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from apical.bench.checkpoint import REMEDY, write_atomically
from apical.errors import CheckpointError

SEAL = "sha256"
_DIGEST = re.compile("[0-9a-f]{64}")
DEEPEST = 64
"""Largest depth of nesting accepted in JSON."""


class NotAnObjectError(ValueError):
    """JSON, but not an object."""


def parse(text: str, *, finite: bool = True) -> Any:
    """Return the value of a JSON text.

    Args:
        finite: refuse numbers that are not finite.

    Raises:
        ValueError: it is not JSON, has a number that is not finite or too large an integer, or is nested too deeply.

    >>> parse('{"lr": [1e-3]}')
    {'lr': [0.001]}
    >>> parse('{"lr": 1e999}')
    Traceback (most recent call last):
        ...
    ValueError: 1e999 is not finite
    """
    try:
        number = _number if finite else float
        value = json.loads(text, parse_constant=number, parse_float=number, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def parse_object(text: str, *, finite: bool = True) -> dict[str, Any]:
    """Return the JSON object of a text, without its checksum, which is verified.

    Args:
        finite: refuse numbers that are not finite even without a checksum; objects with one never have any.

    Raises:
        ValueError: it is not an object, or as :func:`parse` does, or the checksum differs, or its name is damaged.
    """
    value = parse(text, finite=finite)
    if not isinstance(value, dict):
        raise NotAnObjectError("it is not a JSON object")
    if SEAL not in value and value and _DIGEST.fullmatch(str(list(value.values())[-1])):
        raise ValueError("the name of its checksum is damaged")
    seal = value.pop(SEAL, None)
    if seal is not None and seal != checksum(value):
        raise ValueError("its checksum does not match its content")
    return value


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members with their checksum.

    Raises:
        ValueError: a number is not finite.
    """
    return {**value, SEAL: checksum(value)}


def checksum(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the members as they are read back, in the order of their names."""
    plain = json.loads(json.dumps(value, allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is not a JSON object, or is damaged.
        OSError: it cannot be read.
    """
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({brief(error)}); {REMEDY}") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, for people and other programs."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_state(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum atomically."""
    write_json(path, sealed(value))


def read_lines(path: Path, check: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Return the objects of a file, one per line; none if there is no file. An incomplete last line is left out.

    Args:
        check: raises ValueError or TypeError for an invalid object.

    Raises:
        CheckpointError: a line before the last is damaged.
    """
    lines: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            if text:
                line = parse_object(text)
                check(line)
                lines.append(line)
        except (ValueError, TypeError):
            if number >= len(texts) - 1:
                break
            raise CheckpointError(f"{path}, line {number}, is damaged; start again with --overwrite") from None
    return lines


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write objects atomically, one per line with its checksum."""
    write_atomically(path, "".join(map(_line, lines)).encode())


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append an object as one line with its checksum, and flush it to disk."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(_line(line))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(sealed(value)) + "\n"


def write_page(path: Path, page: str) -> None:
    """Write an HTML page atomically; names in it that are not valid text, such as a folder's, are escaped."""
    write_atomically(path, page.encode("utf-8", errors="backslashreplace"))


def brief(error: BaseException) -> str:
    """Return the first line of an error, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120].rstrip(".")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _integer(text: str) -> int:
    if len(text) > 19 or abs(int(text)) > sys.maxsize:
        raise ValueError(f"{text[:20]} is too large an integer")
    return int(text)
