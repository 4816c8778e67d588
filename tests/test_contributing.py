"""CONTRIBUTING's worked example: what the page says is done, in a copy of the package, and then works."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(mark: str) -> str:
    """The code block that follows the comment `<!-- mark -->`."""
    found = re.search(rf"<!-- {re.escape(mark)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found, f"CONTRIBUTING.md has no block {mark!r}"
    return found[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the example's files and lines added."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("src/apical/rules/binary_feedback.py", "tests/rules/test_binary_feedback.py"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(block(f"file: {path}"), encoding="utf-8")
    names = root / "src/apical/bench/names.py"
    with open(root / "src/apical/exports.py", "a", encoding="utf-8") as file:
        file.write(block("line: src/apical/exports.py"))
    start = "RULES: dict[str, Entry] = {\n"
    text = names.read_text(encoding="utf-8")
    assert start in text
    entry = f"{start}{block('entry: src/apical/bench/names.py')}"
    names.write_text(text.replace(start, f"{block('import: src/apical/bench/names.py')}{entry}"), encoding="utf-8")
    return root


def run(copy: Path, *command: str) -> str:
    """Output of a command that sees the copy in place of the package."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rule_is_short() -> None:
    assert len(block("file: src/apical/rules/binary_feedback.py").splitlines()) < 40


def test_its_test_passes(copy: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib")
    assert "1 passed" in run(copy, "pytest", *options, "tests/rules/test_binary_feedback.py")


def test_it_is_public(copy: Path) -> None:
    (copy / "user.py").write_text(
        "import apical\nfrom apical import BinaryFeedbackAlignment\n\nassert 'BinaryFeedbackAlignment' in apical.__all__\n"
    )
    run(copy, "user")


def test_the_command_line_knows_it(copy: Path) -> None:
    _, name, *arguments = shlex.split(block("command"))
    assert name == "apical"
    assert "results: runs/binary" in run(copy, "apical", *arguments, "--device", "cpu", "--train-limit", "320")
    assert (copy / "runs/binary/result.json").exists()


def test_the_example_is_in_the_style_of_the_house(copy: Path) -> None:
    for path in ("src/apical/rules/binary_feedback.py", "tests/rules/test_binary_feedback.py"):
        shutil.copy(ROOT / "pyproject.toml", copy)
        run(copy, "ruff", "check", path)
        run(copy, "ruff", "format", "--check", path)
