"""The page on rules of your own: what it says is done in an empty folder, word for word, and then works."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.command import Command, run_pytest

from apical.cli.main import main

pytestmark = pytest.mark.usefixtures("undrawn")
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "bring-your-own-rule.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [line[2:] for line in re.findall(r"<!-- command -->\n```console\n(\$ [^\n]*)\n```", PAGE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the page's files written into it."""
    root = tmp_path_factory.mktemp("own")
    for name, text in FILES.items():
        (root / name).write_text(text, encoding="utf-8")
    return root


def run(folder: Path, command: str, *more: str) -> str:
    """Output of a `python ...` command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *shlex.split(command.removeprefix("python ")), *more]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_what_is_done_here() -> None:
    assert list(FILES) == ["partial_transport.py", "test_partial_transport.py", "measured.py"]
    assert len(FILES["partial_transport.py"].splitlines()) < 40
    assert [command.split()[0] for command in COMMANDS] == ["python", "apical", "apical", "apical", "apical"]


def test_its_test_passes(folder: Path, tmp_path: Path) -> None:
    python, module, name, *arguments = COMMANDS[0].split()
    assert (python, module, name) == ("python", "-m", "pytest")
    tests = Command([*arguments, "-q", "-p", "no:cacheprovider"], tmp_path, {"PWD": str(folder)}, run_pytest)
    output, errors = tests.communicate(timeout=300)
    assert tests.returncode == 0, output + errors
    assert "1 passed" in output


def test_it_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert main([*shlex.split(COMMANDS[1])[1:], "--device", "cpu", "--train-limit", "320", "--jobs", "1"]) == 0
    assert "PartialTransport" in (folder / "runs/partial/report.html").read_text()
    rows = json.loads((folder / "runs/partial/summary.json").read_text())
    assert [(row["rule"], row["seed"]) for row in rows] == [
        (rule, seed) for rule in ("bp", "fa", "PartialTransport") for seed in (0, 1)
    ]
    line = (folder / "runs/partial/runs/PartialTransport/seed-0/metrics.jsonl").read_text().splitlines()[0]
    angles = [layer["weight_alignment"] for layer in json.loads(line)["layers"].values() if layer["weight_alignment"]]
    assert angles  # half of the synapses, of equal law: cos = sqrt(share)
    assert all(abs(angle - 45) < 3 for angle in angles)


def test_its_options_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert main([*shlex.split(COMMANDS[2])[1:], "--device", "cpu", "--train-limit", "320", "--jobs", "1"]) == 0
    config = json.loads((folder / "runs/less/runs/PartialTransport/seed-0/config.json").read_text())
    assert "share=0.2" in config["rule_options"]


def test_it_is_audited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert main(shlex.split(COMMANDS[3])[1:]) == 0
    record = json.loads((folder / "audits/partial/audit.json").read_text())
    found = {row["rule"]: row["verdicts"] for row in record["rows"]}
    assert list(found) == ["bp", "fa", "PartialTransport"]
    for key in ("no_sign_transport", "no_magnitude_transport"):
        assert [found[rule][key]["verdict"] for rule in found] == ["no", "yes", "no"]
    assert abs(found["PartialTransport"]["no_symmetry"]["numbers"]["degrees"] - 45) < 10


def test_its_measures_are_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert main([*shlex.split(COMMANDS[4])[1:], "--device", "cpu", "--train-limit", "320"]) == 0
    lines = [json.loads(line) for line in (folder / "runs/measured/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:  # the feedback is fixed
        norms = [layer["feedback_norm"] for layer in line["layers"].values() if "feedback_norm" in layer]
        assert len(norms) == 3
        assert sum(norms) == pytest.approx(line["feedback_norms"])
        assert line["feedback_norms"] == lines[0]["feedback_norms"] > 0


def test_it_is_in_the_style_of_the_house(folder: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", folder)
    for check in (
        ("check", "--ignore", "I"),
        ("format", "--check"),
    ):  # apical is a third party there: imports sort otherwise
        run(folder, f"python -m ruff {' '.join(check)} partial_transport.py")
