"""525 damaged state files of every kind, read by the commands that read them: one line and exit status 2 each."""

import contextlib
import io
import json
import math
import random
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from apical import data
from apical.bench import compare, provenance, sweep
from apical.bench.checkpoint import digest, read_sealed, write_sealed
from apical.bench.report import folder as report
from apical.bench.run_folder import RunFolder
from apical.bench.state import parse_object, sealed
from apical.cli import commands
from apical.cli import main as cli
from apical.cli.main import main
from apical.errors import ApicalError
from apical.rules.top_down.teacher import load as load_teacher

pytest.importorskip("evotorch")
pytestmark = [
    pytest.mark.xdist_group("damage"),  # all on one worker: the folders are made once
    pytest.mark.usefixtures("undrawn"),
]

SMALL = ("--data", "digits", "--model", "mlp-6", "--train-limit", "64", "--test-limit", "32", "--device", "cpu")
SMALL = (*SMALL, "--probe", "0", "--threads", "1")
TRAIN = ("train", *SMALL, "--trajectory", "1")
COMPARE = ("compare", "--rules", "bp", "fa", "--seeds", "1", "--jobs", "1", *SMALL, "--epochs", "1")
EVOLVE = ("evolve", "--population", "4", "--hidden", "4", "--sites", "2", "--examples", "20", "--steps", "2")
EVOLVE = (*EVOLVE, "--model", "mlp-tanh-4")
SWEEP = ("sweep", "--rules", "bp", "--space", "lr=0.01,0.1", "--seeds", "1", "--jobs", "1", "--final-seeds", "1", *SMALL)
SWEEP = (*SWEEP, "--epochs", "1")


@dataclass(frozen=True)
class Kind:
    """A state file: where it is, and the command that reads it, in which {} stands for the folder."""

    file: str
    command: tuple[str, ...]

    @property
    def folder(self) -> str:
        return self.file.split("/")[0]


KINDS = (
    Kind("run/config.json", (*TRAIN, "--epochs", "3", "--resume", "--out", "{}")),
    Kind("run/result.json", (*TRAIN, "--epochs", "3", "--resume", "--out", "{}")),
    Kind("run/metrics.jsonl", (*TRAIN, "--epochs", "3", "--resume", "--out", "{}")),
    Kind("run/checkpoint.pt", (*TRAIN, "--epochs", "3", "--resume", "--out", "{}")),
    Kind("run/trajectory.pt", (*TRAIN, "--epochs", "3", "--resume", "--out", "{}")),
    Kind("run/config.json", ("report", "{}")),
    Kind("run/environment.json", ("report", "{}")),
    Kind("run/metrics.jsonl", ("report", "{}")),
    Kind("run/result.json", ("report", "{}")),
    Kind("run/examples.npz", ("report", "{}")),
    Kind("run/placement.json", ("report", "{}")),
    Kind("run/trajectory.pt", ("landscape", "{}", "--out", "{}-surface", "--grid", "3")),
    Kind("both/compare.json", ("report", "{}")),
    Kind("both/runs/bp/seed-0/config.json", (*COMPARE, "--resume", "--out", "{}")),
    Kind("both/runs/fa/seed-0/result.json", (*COMPARE, "--resume", "--out", "{}")),
    Kind("both/runs/bp/seed-0/metrics.jsonl", (*COMPARE[:-1], "2", "--resume", "--out", "{}")),
    Kind("evolution/config.json", (*EVOLVE, "--generations", "3", "--resume", "--out", "{}")),
    Kind("evolution/checkpoint.pt", (*EVOLVE, "--generations", "3", "--resume", "--out", "{}")),
    Kind("evolution/metrics.jsonl", (*EVOLVE, "--generations", "3", "--resume", "--out", "{}")),
    Kind(
        "evolution/teacher.pt", (*TRAIN, "--rule", "tdca", "--teacher", "{}/teacher.pt", "--epochs", "1", "--out", "{}-run")
    ),
    Kind("search/plan.json", (*SWEEP, "--resume", "--out", "{}")),
    Kind("search/trials/bp/001/seed-0/result.json", (*SWEEP, "--resume", "--out", "{}")),
)
NUMBER = re.compile(rb"(?<=[ \[:,])-?\d+(\.\d+)?(e-?\d+)?(?=[,\]}\n])")
ODD = (None, True, -1, 10**30, math.nan, math.inf, -0.5, "", "text", "\ud800", [], [[]], {}, {"a": {}}, [1, "a"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as they should be."""
    root = tmp_path_factory.mktemp("whole")
    assert main([*TRAIN, "--epochs", "2", "--out", str(root / "run")]) == 0
    RunFolder(root / "run").write_examples((torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)))
    assert main([*COMPARE, "--out", str(root / "both")]) == 0
    assert main([*EVOLVE, "--generations", "2", "--out", str(root / "evolution")]) == 0
    assert main([*SWEEP, "--out", str(root / "search")]) == 0
    return root


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Data are read once, each command line is parsed once, and nothing is drawn."""
    parse, flags = cli.tyro.cli, dict[tuple[str, ...], Any]()

    def parse_once(command: Any, *, args: list[str], **options: Any) -> Any:
        if tuple(args) not in flags:
            flags[tuple(args)] = parse(command, args=args, **options)
        return flags[tuple(args)]

    load = lru_cache(data.load)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.tyro, "cli", parse_once)
        for module in (commands, compare, sweep):
            patch.setattr(module, "load_data", lambda recipe: load(recipe.data, train_limit=64, test_limit=32))
        patch.setattr(report.figures, "draw", lambda comparison: [])
        patch.setattr(provenance, "environment", lambda *_: {"commit": None})
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every test has its copy: one folder, so that command lines are the same."""
    return tmp_path_factory.mktemp("place")


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(kind: Kind, root: Path, arguments: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and stderr of the command that reads the file."""
    folder = str(root / kind.folder)
    errors = io.StringIO()
    with limited(60), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        status = main([argument.replace("{}", folder) for argument in arguments])
    return status, errors.getvalue()


def content(path: Path) -> Any:
    """What a file says, so that damage to what says nothing (a blank, padding) can be told; None for damage seen."""
    try:
        if path.suffix == ".json":
            return parse_object(path.read_text(encoding="utf-8"))
        if path.suffix == ".jsonl":
            return [parse_object(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if path.suffix == ".npz":
            return report.read(path.parent).runs[0].examples[0].tolist()  # type: ignore[index]
        if path.name == "teacher.pt":
            return digest(load_teacher(path)[0].state_dict())
        return digest(read_sealed(path, path.name))
    except (ValueError, ApicalError, TypeError):
        return None


def hurt(whole: bytes, dice: random.Random, *, text: bool) -> bytes:
    """The content with one kind of damage."""
    spot, damaged = dice.randrange(len(whole)), bytearray(whole)
    numbers = list(NUMBER.finditer(whole)) if text else []
    kind = dice.choice(("cut", "flip", "flip", "flip", "noise", "zeros", "empty", *(("number",) * 5 if numbers else ())))
    if kind == "cut":
        return whole[:spot]
    if kind == "empty":
        return b""
    if kind == "flip":
        damaged[spot] ^= 1 << dice.randrange(8)
    elif kind == "noise":
        damaged[spot : spot + 9] = dice.randbytes(9)
    elif kind == "zeros":
        damaged[spot : spot + 99] = bytes(len(damaged[spot : spot + 99]))
    else:
        found = dice.choice(numbers)
        instead = dice.choice((b"NaN", b"1e999", b"-Infinity", b"[" * 90_000, b'"7"', b"null", b"{}", b"9" * 5000))
        damaged[found.start() : found.end()] = instead
    return bytes(damaged)


def branches(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested dictionaries and lists: container and key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from branches(inner)


def is_torn_end(kind: Kind, path: Path, before: Any) -> bool:
    """Whether only the last line of metrics is hurt, as a kill while writing does: it is left out, or written again."""
    if path.suffix != ".jsonl":
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line, good in zip(lines, before[:-1], strict=False):
        try:
            if parse_object(line) != good:
                return False
        except ValueError:
            return False
    return len(lines) >= len(before) - 1 and "\n" not in lines[len(before) - 1 :]


def copied(whole: Path, kind: Kind, place: Path) -> Path:
    for old in place.iterdir():
        shutil.rmtree(old)
    shutil.copytree(whole / kind.folder, place / kind.folder)
    if "--epochs" in kind.command and kind.file.endswith(("metrics.jsonl", ".pt")):
        (place / kind.file).with_name("result.json").unlink(missing_ok=True)  # as of a run that was killed
    return place / kind.file


JSON = [kind for kind in KINDS if ".json" in kind.file]


@pytest.mark.parametrize("kind", JSON, ids=lambda kind: f"{kind.file} {kind.command[0]}")
def test_a_checksum_does_not_go_unseen_because_its_name_is_damaged(
    whole: Path, quick: None, place: Path, kind: Kind
) -> None:
    path = copied(whole, kind, place)
    named = path.read_text(encoding="utf-8")
    assert '"sha256"' in named
    path.write_text(named.replace('"sha256"', '"sha257"', 1), encoding="utf-8")
    status, errors = read(kind, place, kind.command)
    assert (status, len(errors.splitlines())) == (2, 1), errors
    assert "damaged" in errors


@pytest.mark.parametrize("number", range(len(KINDS)), ids=lambda number: f"{KINDS[number].file} {KINDS[number].command[0]}")
def test_a_damaged_file_is_one_line_and_exit_status_2(whole: Path, quick: None, place: Path, number: int) -> None:
    kind, dice = KINDS[number], random.Random(number)
    before = content(whole / kind.file)
    assert before is not None
    tried = 0
    while tried < 25:
        path = copied(whole, kind, place)
        path.write_bytes(hurt(path.read_bytes(), dice, text=path.suffix in (".json", ".jsonl")))
        if content(path) == before or is_torn_end(kind, path, before):
            continue
        tried += 1
        damaged = path.read_bytes()
        status, errors = read(kind, place, kind.command)
        assert status == 2, (errors, damaged[:2000])
        assert errors.startswith("apical: error: "), errors
        assert errors.count("\n") == 1, errors
        assert Path(kind.file).name in errors, errors


@pytest.mark.parametrize("number", range(len(KINDS)), ids=lambda number: f"{KINDS[number].file} {KINDS[number].command[0]}")
def test_an_odd_value_with_a_checksum_of_its_own_is_no_traceback(whole: Path, quick: None, place: Path, number: int) -> None:
    """Somebody else's program wrote the file: what it says is read as far as it is used, or refused in one line."""
    kind, dice = KINDS[number], random.Random(number)
    refused = 0
    for _ in range(25):
        path = copied(whole, kind, place)
        if not make_odd(path, dice):
            continue
        status, errors = read(kind, place, kind.command)
        assert status in (0, 2, 3), errors
        assert errors.count("\n") == (status != 0), errors
        refused += status == 2
    assert refused or path.name in ("environment.json", "examples.npz")


@pytest.mark.parametrize("name", ["rule", "seed", "status"])
def test_a_result_that_does_not_say_whose_it_is(whole: Path, quick: None, place: Path, name: str) -> None:
    kind = next(kind for kind in KINDS if kind.file == "both/runs/fa/seed-0/result.json")
    path = copied(whole, kind, place)
    path.write_text(json.dumps(sealed({**parse_object(path.read_text()), name: None})))
    status, errors = read(kind, place, kind.command)
    assert (status, errors.count("\n")) == (2, 1), errors
    assert "result.json is damaged" in errors


@pytest.mark.parametrize("name", ["loss", "hits"])
def test_a_checkpoint_with_sums_that_are_no_numbers(whole: Path, quick: None, place: Path, name: str) -> None:
    kind = next(kind for kind in KINDS if kind.file == "run/checkpoint.pt")
    path = copied(whole, kind, place)
    state = read_sealed(path, path.name)
    state["partial"][name] = torch.tensor(math.nan)
    write_sealed(path, state)
    status, errors = read(kind, place, kind.command)
    assert (status, errors.count("\n")) == (2, 1), errors
    assert "'partial' does not fit this run (sums that are not finite)" in errors


def make_odd(path: Path, dice: random.Random) -> bool:
    """Put an odd value in a random place of the file, and write it as the program would; False if it cannot be."""
    if path.suffix == ".npz":
        return False
    lines = path.read_text(encoding="utf-8").split("\n") if path.suffix == ".jsonl" else []
    place = dice.randrange(max(1, len(lines) - 1))
    if path.suffix == ".pt":
        value = torch.load(path, weights_only=True)
    else:
        value = parse_object(lines[place] if lines else path.read_text(encoding="utf-8"))
    container, key = dice.choice(list(branches(value)))
    old = container[key]
    odd: list[Any] = list(ODD)
    if isinstance(old, torch.Tensor):
        odd += 3 * [torch.zeros(3, 2), torch.full_like(old, 2).to(torch.int64), old.to(torch.float64) * math.nan]
    if dice.random() < 0.2:
        del container[key]
    else:
        container[key] = dice.choice(odd)
    try:
        if path.suffix == ".pt":
            value.pop("sha256", None)
            torch.save(value, path) if path.name == "teacher.pt" else write_sealed(path, value)
        elif lines:
            lines[place] = json.dumps(sealed(value))
            path.write_text("\n".join(lines))
        else:
            path.write_text(json.dumps(sealed(value)))
    except (ValueError, UnicodeError):
        return False
    return True
