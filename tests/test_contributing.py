"""CONTRIBUTING's examples: what the page says is done, in a copy of the package, and then works."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

pytestmark = pytest.mark.xdist_group("contributing")  # all on one worker: the commands are run once
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MARKED = re.findall(r"<!-- ([^>]+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
FILES = {mark.removeprefix("file: "): code for mark, code in MARKED if mark.startswith("file: ")}
PYTHON = [path for path in FILES if path.endswith(".py")]


def block(mark: str) -> str:
    """The code block that follows the comment `<!-- mark -->`."""
    found = [code for name, code in MARKED if name == mark]
    assert len(found) == 1, f"CONTRIBUTING.md has {len(found)} blocks {mark!r}"
    return found[0]


def insert(path: Path, line: str, pattern: str, after: bool) -> None:
    """Put a line before, or after, the first line of a file that matches."""
    text = path.read_text(encoding="utf-8")
    found = re.search(pattern, text, re.MULTILINE)
    assert found, f"{path} has no line {pattern}"
    place = found.end() if after else found.start()
    path.write_text(text[:place] + line + text[place:], encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the examples' files and lines added, and a distribution of another package beside it."""
    root = tmp_path_factory.mktemp("copy")
    # with __pycache__, which stays valid, for times of files are copied; not with what another process is writing there
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("*.pyc.*"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for path, code in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(code, encoding="utf-8")
    for mark, code in MARKED:
        kind, _, place = mark.partition(": ")
        path, _, name = place.partition(", ")
        if kind == "line":
            with open(root / path, "a", encoding="utf-8") as file:
                file.write(code)
        elif kind == "import":
            insert(root / path, code, "^from apical", after=False)
        elif kind == "entry":
            insert(root / path, code, rf"^ *{re.escape(name)}\b.*[{{(\[]\n", after=True)
    facts = root / "elsewhere" / "tiny_paper-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-paper\nVersion: 1.0\n", encoding="utf-8")
    (facts / "entry_points.txt").write_text(
        block("entry point").replace('project.entry-points."apical.papers"', "apical.papers").replace('"', ""),
        encoding="utf-8",
    )
    return root


def run(copy: Path, *command: str) -> str:
    """Output of Python that sees the copy in place of the package."""
    paths = os.pathsep.join((str(copy / "src"), str(copy / "elsewhere")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


TEST_OPTIONS = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib")
CALLS = """
import contextlib, io, json, pathlib, sys
import apical, pytest
from apical import BinaryFeedbackAlignment
from apical.cli.main import main
assert 'BinaryFeedbackAlignment' in apical.__all__
ended = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            status = pytest.main(words[1:]) if words[0] == "pytest" else main(words)
        except SystemExit as end:
            status = end.code
    ended.append((status, said.getvalue()))
pathlib.Path("ended.json").write_text(json.dumps(ended))
"""
"""Runs commands one after the other in one process, because each process imports for seconds."""


@pytest.fixture(scope="module")
def said(copy: Path) -> dict[str, str]:
    """What each of the page's commands says in the copy; exit statuses are checked."""
    quick = ("--device", "cpu", "--jobs", "1")
    commands = {
        "train": [*command("command")[1:], "--device", "cpu", "--train-limit", "320"],
        "compare": [*command("compare")[1:], *quick],
        "recipes": ["list", "recipes"],
        "tables": ["reproduce"],
        "reproduce": [*command("reproduce")[1:], "--budget", "smoke", "--jobs", "1"],
        "versions": command("versions")[1:],
        "no package": ["versions", "--package", "no-such-package"],
        "test": ["pytest", *TEST_OPTIONS, "tests/rules/test_binary_feedback.py"],
    }
    run(copy, "-c", CALLS, json.dumps(list(commands.values())))
    ended = dict(zip(commands, json.loads((copy / "ended.json").read_text()), strict=True))
    assert {name: status for name, (status, _) in ended.items()} == {**dict.fromkeys(commands, 0), "no package": 2}, ended
    return {name: output for name, (_, output) in ended.items()}


def command(mark: str) -> list[str]:
    """The command in a block, without its prompt."""
    prompt, *words = shlex.split(block(mark))
    assert prompt == "$"
    assert words[0] == "apical"
    return words


def test_the_rule_is_short() -> None:
    assert len(block("file: src/apical/rules/binary_feedback.py").splitlines()) < 40


def test_the_rules_test_passes(said: dict[str, str]) -> None:
    assert "1 passed" in said["test"]


def test_the_command_line_knows_the_rule(copy: Path, said: dict[str, str]) -> None:
    assert "results: runs/binary" in said["train"]
    assert (copy / "runs/binary/result.json").exists()


def test_every_entry_is_one_line() -> None:
    entries = [code for mark, code in MARKED if mark.split(":")[0] in ("entry", "import")]
    assert len(entries) == 2 * 5  # rule, data set, model, figure, command
    assert all(len(code.splitlines()) == 1 for code in entries)


def test_layer_and_activation_are_known() -> None:
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block("run"), "CONTRIBUTING.md", "exec"), names)
    assert {"zero feedback", "feedback = weight", "feedback differs"} <= set(names["report"].passed)
    lines = [" ".join(line.split()) for line in str(names["placement"]).splitlines()]
    assert "2 ScaledLinear 3x16 own feedback" in lines


@pytest.mark.usefixtures("said")
def test_data_model_recipe_and_figure_work_together(copy: Path) -> None:
    rows = json.loads((copy / "runs/spirals/summary.json").read_text())
    assert {(row["rule"], row["n_train"], row["n_test"]) for row in rows} == {("bp", 400, 100), ("fa", 400, 100)}
    assert all(row["parameters"] >= 2 * 32 + 32 + 32 * 2 + 2 for row in rows)
    assert (copy / "runs/spirals/figures/speed.svg").exists()
    assert "Time per step" in (copy / "runs/spirals/report.html").read_text()


def test_a_paper_of_another_package_is_found_and_reproduced(copy: Path, said: dict[str, str]) -> None:
    assert "tiny-digits" in said["recipes"]
    assert "tiny/digits" in said["tables"]
    record = json.loads((copy / "runs/reproduced/reproductions/tiny-digits-smoke.json").read_text())
    told = [(row["rule"], row["reference"], row["source"], row["verdict"]) for row in record["rows"]]
    assert told == [("bp", "95.00 ± 3", "paper", "budget too small to tell")]  # its epoch 2 is not reached


def test_the_command_runs_and_refuses_in_one_line(said: dict[str, str]) -> None:
    assert numpy.__version__ in said["versions"]
    assert said["no package"].splitlines() == [
        "apical: error: --package no-such-package: not installed; install it, or name another"
    ]


def test_the_examples_are_in_the_style_of_the_house(copy: Path) -> None:
    run(copy, "-m", "ruff", "check", *PYTHON)
    run(copy, "-m", "ruff", "format", "--check", *PYTHON)
