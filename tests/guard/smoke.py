"""A guard for moves and rewrites: what every study and recipe gives at a tiny size must keep the same bits.

    python -m tests.guard.smoke --check                  run everything, say what differs from smoke.json
    python -m tests.guard.smoke --check --only compare/pfa-mnist settings
    python -m tests.guard.smoke --record [--only NAME ...]

Run it at the root of the repository, with real data where APICAL_DATA or the data folder has them; entries whose data are
missing are skipped. `--numbers` compares numbers and leaves texts alone, for changes of wording. Bits depend on the
processor and on torch's version, so record on the machine that checks. A name of --only may be a prefix such as `settings`.
"""

import argparse
import hashlib
import json
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.guard import entries  # sets the number of threads, so before torch
from tests.guard.entries import Made, MissingDataError

import numpy as np  # isort: skip
import torch  # isort: skip

FILE = Path(__file__).with_name("smoke.json")
SHOWN = 12
"""Differences that are printed for one entry."""


def machine() -> dict[str, str]:
    """What bits depend on besides the code: processors of one name may round otherwise, so arithmetic is looked at too."""
    cpu = f"{torch.backends.cpu.get_cpu_capability()} {platform.machine()}"
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        found = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", facts.read_text(encoding="utf-8"), re.MULTILINE))
        cpu = " ".join([cpu, *found.values()])
    return {"torch": torch.__version__, "numpy": np.__version__, "cpu": cpu, "arithmetic": arithmetic()}


def arithmetic() -> str:
    """A digest of the last bits of products, solutions and functions of sizes that networks have."""
    results: list[torch.Tensor] = []
    for dtype in (torch.float32, torch.float64):
        for rows, given, out in ((64, 64, 256), (64, 784, 256), (128, 256, 10), (16, 33, 65), (7, 15, 10)):
            draw = torch.Generator().manual_seed(0)
            x, w = (torch.randn(shape, generator=draw, dtype=dtype) for shape in ((rows, given), (out, given)))
            v = torch.nn.functional.linear(x, w, w[:, 0]) / given**0.5
            square = w[:10, :10] @ w[:10, :10].T + torch.eye(10, dtype=dtype)
            results += [v, v.T @ x, v @ w, v.tanh(), v.sigmoid(), v.exp(), v.softmax(1), v.sum(0), v.norm()]
            results += [torch.linalg.solve(square, w[:10, :3]), torch.linalg.qr(w[:, :10])[0]]
    return hashlib.sha256(b"".join(each.contiguous().numpy().tobytes() for each in results)).hexdigest()[:12]


def load(file: Path = FILE) -> dict[str, Any]:
    """What was recorded."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"entries": {}}
    return content


def dump(recorded: Mapping[str, Any], file: Path = FILE) -> None:
    """Write a recording, a line for each file or setting."""
    lines = [f'{{\n"machine": {_text(recorded["machine"])},\n"entries": {{']
    parts = []
    for name, made in sorted(recorded["entries"].items()):
        inner = ",\n".join(f"  {json.dumps(key)}: {_text(value)}" for key, value in made.items())
        parts.append(f"{json.dumps(name)}: {{\n{inner}}}")
    file.write_text("\n".join([*lines, ",\n".join(parts), "}}"]) + "\n", encoding="utf-8")


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def names(only: Sequence[str] = ()) -> dict[str, Callable[[], Made]]:
    """Entries by name, in the order of `only`: names, or beginnings of names.

    Raises:
        SystemExit: there is none of that name.
    """
    every: dict[str, Callable[[], Made]] = {**entries.settings()}
    every |= {name: partial(_in_a_folder, make) for name, make in entries.results().items()}
    if not only:
        return every
    chosen: dict[str, Callable[[], Made]] = {}
    for word in only:
        fitting = {name: make for name, make in every.items() if name == word or name.startswith(word + "/")}
        if not fitting:
            raise SystemExit(f"guard: no entry {word!r}; they are: {' '.join(every)}")
        chosen |= fitting
    return chosen


def _in_a_folder(make: Callable[[Path], Made]) -> Made:
    with tempfile.TemporaryDirectory() as folder:
        return make(Path(folder) / "out")


def differences(was: Any, now: Any, *, numbers: bool = False, where: str = "") -> Iterator[str]:
    """Where two recordings of one entry differ, a line each.

    Args:
        was: recorded.
        now: of this code.
        numbers: leave texts alone.
        where: path to them.

    >>> list(differences({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2.5}]}))
    ['a/1/b: 2.0 -> 2.5']
    >>> list(differences({"texts": "x", "n": float("nan")}, {"texts": "y", "n": float("nan")}, numbers=True))
    []
    """
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(key for key in now if key not in was)]:
            inside = f"{where}/{key}".lstrip("/")
            if key not in now or key not in was:
                yield f"{inside}: only {'recorded' if key in was else 'now'}"
            elif not (numbers and key == "texts"):
                yield from differences(was[key], now[key], numbers=numbers, where=inside)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for i, (first, second) in enumerate(zip(was, now, strict=True)):
            yield from differences(first, second, numbers=numbers, where=f"{where}/{i}".lstrip("/"))
    elif repr(was) != repr(now) and not (
        numbers and isinstance(was, str) and isinstance(now, str) and "numbers" not in where
    ):
        yield f"{where}: {was!r} -> {now!r}"


def run(chosen: Sequence[str], jobs: int) -> Iterator[tuple[str, Made | None]]:
    """Entries of this code by name, None where data are missing, in the order in which they are finished."""
    if jobs == 1:
        yield from map(made, chosen)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(made, name) for name in chosen]):
            yield done.result()


def made(name: str) -> tuple[str, Made | None]:
    """One entry. Prints the processor time it takes, unless it takes none."""
    begun = time.process_time()
    try:
        content: Made = json.loads(json.dumps(names()[name](), default=str))
    except MissingDataError as error:
        print(f"skipped {name}: {error}", flush=True)
        return name, None
    except Exception as error:  # any: the others are still to be checked
        traceback.print_exc()
        return name, {"failed": f"{type(error).__name__}: {error}"}
    if not name.startswith("settings/"):
        print(f"{name}  {time.process_time() - begun:.1f} s", flush=True)
    return name, content


def check(results: Iterable[tuple[str, Made | None]], recorded: Mapping[str, Any], *, numbers: bool) -> dict[str, list[str]]:
    """What differs, by entry, and printed; entries that match, are skipped or were never recorded are not in it."""
    wrong: dict[str, list[str]] = {}
    for name, content in results:
        if content is None:
            continue
        if name not in recorded:
            print(f"new, not recorded: {name}", flush=True)
        elif found := list(differences(recorded[name], content, numbers=numbers)):
            wrong[name] = found
            more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
            print(*(f"    {line}" for line in [f"{name} differs:", *found[:SHOWN], *more]), sep="\n", flush=True)
    return wrong


def record(results: Iterable[tuple[str, Made | None]], kept: dict[str, Made], file: Path = FILE) -> list[str]:
    """Write what comes to the file, as it comes; returns the names of entries that failed, which are left out.

    Settings are the same on every machine, so after them alone the file goes on naming the one that made its results.
    """
    failed, made_on = [], load(file).get("machine", machine())
    for name, content in results:
        if content is not None and "failed" in content:
            failed.append(name)
        elif content is not None:
            kept[name] = content
            if not name.startswith("settings/"):
                made_on = machine()
                dump({"machine": made_on, "entries": kept}, file)
    dump({"machine": made_on, "entries": kept}, file)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or check; returns the exit status: 0, or 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.guard.smoke", description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--record", action="store_true", help="write smoke.json; with --only, replace these entries in it")
    action.add_argument("--check", action="store_true", help="compare with smoke.json")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="entries, or beginnings of their names")
    parser.add_argument("--numbers", action="store_true", help="compare no texts")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="entries at a time, each in a process")
    chosen = parser.parse_args(arguments)
    found, recording, begun, status = list(names(chosen.only)), load(), time.perf_counter(), 0
    if chosen.record:
        failed = record(run(found, chosen.jobs), recording["entries"] if chosen.only else {})
        print(f"{len(failed)} of {len(found)} entries failed" + (f": {' '.join(failed)}" if failed else ""))
        status = int(bool(failed))
    else:
        if recording.get("machine") != machine():
            print(f"recorded with {recording.get('machine')}, this is {machine()}: last bits may differ for that alone")
        wrong = check(run(found, chosen.jobs), recording["entries"], numbers=chosen.numbers)
        gone = [] if chosen.only else sorted(recording["entries"].keys() - set(found))
        wrong |= {name: ["is gone"] for name in gone}
        print(f"{len(wrong)} of {len(found)} entries differ" + (f": {' '.join(wrong)}" if wrong else ""))
        status = int(bool(wrong))
    print(f"{time.perf_counter() - begun:.0f} s in all")
    return status


if __name__ == "__main__":
    sys.exit(main())
