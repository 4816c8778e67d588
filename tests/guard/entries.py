"""What the guard runs, through the public commands, and what it reads from the tables of studies.

`PLACES` is all that the guard knows of where things are in the package.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch
from matplotlib.figure import Figure
from tests.guard.digests import folder

PLACES = {
    "tables": "apical.bench.papers:tables",
    "studies": "apical.bench.papers:studies",
    "evolutions": "apical.bench.papers:evolutions",
    "claims": "apical_papers.pfa.claims:CLAIMS",
    "rules": "apical.bench.names:RULES",
    "recipe": "apical.bench.recipe:Recipe",
    "ccl_features": "apical_papers.ccl.features:main",
    "tdca_landscape": "apical_papers.tdca.landscape:main",
    "at_epoch": "apical.bench.at_epoch:main",
}
"""Module and name of each thing that has no command."""

SIZES = {
    "epochs": 2,
    "seeds": 1,
    "batch-size": 16,
    "train-limit": 48,
    "test-limit": 32,
    "probe": 16,
    "threads": 1,
    "jobs": 1,
}
"""Of the comparisons: three steps in each of two epochs."""

VALIDATION = 16
FEWER = {"batch-size": 2, "train-limit": 4, "test-limit": 2, "probe": 2, "epochs": 1}
"""Instead, for networks that settle image by image for seconds."""

LONG = ("ep-cifar10", "ep-cifar10-holomorphic")
AUDITED = ("bp", "fa", "dfa", "usf", "kp", "wm", "pfa", "pfa-o", "dfc-ss", "ccl", "dtp", "ep", "corinfomax", "tdca")

Made = dict[str, Any]


class MissingDataError(Exception):
    """What an entry needs is not here."""


def place(name: str) -> Any:
    """The thing that :data:`PLACES` names."""
    module, _, attribute = PLACES[name].partition(":")
    thing = getattr(import_module(module), attribute)
    return thing() if name in ("tables", "studies", "evolutions") else thing


def settings() -> dict[str, Callable[[], Made]]:
    """Entries that compute nothing: every setting, published number, claim and budget."""
    made: dict[str, Callable[[], Made]] = {
        "settings/claims": lambda: {**place("claims")._asdict(), "columns": tuple(place("claims").columns)},
        "settings/recipe": lambda: place("recipe")().to_json(),
    }
    made |= {f"settings/rules/{name}": partial(_rule, entry) for name, entry in place("rules").items()}
    made |= {f"settings/studies/{name}": partial(_study, study) for name, study in place("studies").items()}
    made |= {f"settings/evolutions/{name}": recipe.to_json for name, recipe in place("evolutions").items()}
    for paper, tables in place("tables").items():
        made |= {f"settings/tables/{paper}/{name}": partial(_table, table) for name, table in tables.items()}
    return made


def _rule(entry: Any) -> Made:
    given = {item.name: getattr(entry, item.name) for item in fields(entry) if item.name != "title"}
    return {**given, "build": entry.build.__name__}


def _study(study: Any) -> Made:
    """All of a study; a row's recipe is what it has other than the study's default, and that other than the defaults."""
    plain, default = place("recipe")().to_json(), study.default.to_json()
    rows = {
        rule: {"recipe": _other(row.recipe.to_json(), default), "published": [_number(each) for each in row.published]}
        for rule, row in study.rows.items()
    }
    return {
        "default": _other(default, plain),
        "rows": rows,
        "claims": [_number(claim) for claim in study.claims],
    }


def _other(ours: Made, theirs: Made) -> Made:
    assert ours.keys() == theirs.keys()
    return {key: value for key, value in ours.items() if value != theirs[key]}


def _number(record: Any) -> str:
    return " ".join(f"{key}={value!r}" for key, value in asdict(record).items() if value is not None)


def _table(table: Any) -> Made:
    given = {key: value for key, value in asdict(table).items() if key != "title"}
    return {**given, "module": table.module.rpartition(".")[2]}


def results() -> dict[str, Callable[[Path], Made]]:
    """Entries that compute, each into a folder that it is given."""
    made: dict[str, Callable[[Path], Made]] = {}
    for paper, tables in place("tables").items():
        for name, table in tables.items():
            if table.module or place("studies")[table.study].default.data.startswith("digits"):
                made[f"reproduce/{paper}/{name}"] = partial(_reproduce, f"{paper}/{name}")
    made |= {f"compare/{name}": partial(_compare, name) for name in place("studies")}
    made |= {f"evolve/{name}": partial(_evolve, name) for name in place("evolutions")}
    made["audit"] = _audit
    made["study/ccl_features"] = partial(_study_alone, "ccl_features", ("--updates", "0", "3", "--samples", "60"))
    made["study/tdca_landscape"] = partial(_study_alone, "tdca_landscape", ("--starts", "2"))
    made["study/at_epoch"] = _at_epoch
    return made


def _reproduce(target: str, out: Path) -> Made:
    apical("reproduce", target, "--budget", "smoke", "--jobs", "1", "--out", str(out))
    return folder(out)


def _compare(name: str, out: Path) -> Made:
    study = place("studies")[name]
    sizes = SIZES | (FEWER if name in LONG else {}) | ({"validation": VALIDATION} if study.default.validation else {})
    options = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    apical("compare", "--recipe", name, *options, "--out", str(out), allowed=(0, 3))  # 3: a run diverged
    return folder(out)


def _evolve(name: str, out: Path) -> Made:
    sizes = ("--generations", "2", "--population", "8", "--examples", "64", "--steps", "5", "--chunk", "9", "--settled", "1")
    apical("evolve", "--recipe", name, *sizes, "--out", str(out))
    return folder(out)


def _audit(out: Path) -> Made:
    apical("audit", *AUDITED, "--model", "mlp-12-8", "--epochs", "1", "--out", str(out))
    return folder(out)


def _study_alone(name: str, options: Sequence[str], out: Path) -> Made:
    call(place(name), ["--out", str(out), *options])
    return folder(out)


def _at_epoch(out: Path) -> Made:
    """Of runs that are made for it."""
    options = [word for key, value in SIZES.items() for word in (f"--{key}", str(value))]
    apical("compare", "--recipe", "tp-digits", "--rules", "bp", "dfa", *options, "--out", str(out / "runs"))
    written = out / "made" / "table.json"
    written.parent.mkdir()
    call(place("at_epoch"), [str(out / "runs"), "--epoch", "1", "--recipe", "tp-digits", "--out", str(written)])
    return folder(written.parent)


def apical(*words: str, allowed: Sequence[int] = (0,)) -> None:
    """Run the command line in this process, silently.

    Raises:
        MissingDataError: its data are not here.
        RuntimeError: it failed.
    """
    from apical.__main__ import main

    def run(arguments: Sequence[str]) -> Any:
        before, sys.argv = sys.argv, ["apical", *arguments]
        handler = signal.getsignal(signal.SIGINT)
        try:
            return main()
        finally:
            sys.argv = before
            signal.signal(signal.SIGINT, handler)  # which the program sets for itself

    call(run, words, allowed)


def call(main: Callable[[Sequence[str]], Any], words: Sequence[str], allowed: Sequence[int] = (0,)) -> None:
    """Run a program's `main` on one thread and with nothing printed or drawn; its status must be one of those allowed.

    Raises:
        MissingDataError: it says that its data are not here.
        RuntimeError: it failed.
    """
    said = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
    undrawn = patch.object(Figure, "draw", lambda *_: None)  # figures are half of the time, and not guarded
    with _one_thread(), undrawn, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(words) or 0
    if status in allowed:
        return
    said.seek(0)
    text = said.read().strip()
    if ": looked in " in text or "has no training split" in text:
        raise MissingDataError(text.splitlines()[-1])
    raise RuntimeError(f"{' '.join(words)}: status {status}\n{text}")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Within, torch and all that is started have one thread, which decides the last bits of sums."""
    before = torch.get_num_threads()
    kept = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ.update(dict.fromkeys(kept, "1"))
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
