"""How sure a comparison is, and what its scores cost: from run folders to report."""

import json
from pathlib import Path

import pytest

from apical.bench.figures.cost import compute, seconds
from apical.bench.report.protocol import section, sureness
from apical.bench.report.records import read
from apical.bench.statistics import bootstrap, sign_flip
from apical.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("protocol") / "out"
    arguments = ["--rules", "bp", "dfa", "--model", "mlp-16", "--epochs", "2", "--seeds", "3", "--jobs", "1", "--probe", "0"]
    assert main(["compare", *arguments, "--train-limit", "320", "--batch-size", "32", "--out", str(out)]) == 0
    return out


def test_multiply_adds_are_those_of_all_steps(folder: Path) -> None:
    steps, batch, epochs = 10, 32, 2
    expected = {"bp": 2 * 64 * 16 + 3 * 16 * 10, "dfa": 2 * 64 * 16 + 2 * 16 * 10 + 10 * 16}
    for row in json.loads((folder / "summary.json").read_text()):
        assert row["multiply_adds"] == steps * batch * epochs * expected[row["rule"]]
    lines = [json.loads(line) for line in (folder / "runs/bp/seed-0/metrics.jsonl").read_text().splitlines()]
    assert [line["multiply_adds"] for line in lines] == [k * steps * batch * expected["bp"] for k in range(3)]


def test_a_resumed_run_counts_on(folder: Path, tmp_path: Path) -> None:
    arguments = [
        "train",
        "--rule",
        "bp",
        "--model",
        "mlp-16",
        "--train-limit",
        "320",
        "--probe",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--epochs", "1"]) == 0
    assert main([*arguments, "--epochs", "2", "--resume"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["multiply_adds"] == json.loads((folder / "summary.json").read_text())[0]["multiply_adds"]


def test_rules_are_paired_with_backpropagation_by_seed(folder: Path) -> None:
    rows = json.loads((folder / "summary.json").read_text())
    scores = {rule: [100 * row["test_accuracy"] for row in rows if row["rule"] == rule] for rule in ("bp", "dfa")}
    differences = [a - b for a, b in zip(scores["dfa"], scores["bp"], strict=True)]
    bp, dfa = json.loads((folder / "statistics.json").read_text())
    assert "p_sign_flip" not in bp
    assert bp["mean"] == pytest.approx(bootstrap(scores["bp"]).mean)
    assert dfa["difference_mean"] == pytest.approx(sum(differences) / 3)
    assert dfa["difference_low"] == pytest.approx(bootstrap(differences).low)
    assert dfa["p_sign_flip"] == sign_flip(differences)
    assert dfa["difference_n"] == 3
    report = (folder / "report.html").read_text()
    assert "How sure is that?" in report
    assert bootstrap(differences).shown(2) in report


def test_scores_are_drawn_against_cost(folder: Path) -> None:
    comparison = read(folder)
    for figure, label in ((seconds(comparison), "training time (s)"), (compute(comparison), "multiply-adds (10⁹)")):
        assert figure is not None
        axes = figure.axes[0]
        assert axes.get_xlabel() == label
        assert [len(line.get_xdata()) for line in axes.get_lines()] == [2, 2]  # type: ignore[arg-type]
    drawn = compute(comparison)
    assert drawn is not None
    last = drawn.axes[0].get_lines()[0].get_xdata()[-1]  # type: ignore[index]
    assert last == pytest.approx(1e-9 * json.loads((folder / "summary.json").read_text())[0]["multiply_adds"])
    assert (folder / "figures/accuracy_seconds.svg").exists()
    assert (folder / "figures/accuracy_compute.png").exists()


@pytest.mark.usefixtures("undrawn_here")
def test_runs_of_before_have_no_cost_and_still_a_report(folder: Path) -> None:
    for path in folder.glob("runs/*/*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(
                json.dumps({k: v for k, v in line.items() if k not in ("multiply_adds", "sha256")}) + "\n" for line in lines
            )
        )
    assert compute(read(folder)) is None
    assert main(["report", str(folder)]) == 0


@pytest.mark.usefixtures("undrawn_here")
def test_one_seed_says_nothing_of_sureness(tmp_path: Path) -> None:
    out = tmp_path / "one"
    arguments = ["--rules", "bp", "fa", "--model", "mlp-8", "--epochs", "1", "--seeds", "1", "--probe", "0"]
    assert main(["compare", *arguments, "--train-limit", "64", "--out", str(out)]) == 0
    comparison = read(out)
    assert section(sureness(comparison), comparison.score) == ""
    assert json.loads((out / "statistics.json").read_text())[1]["difference_low"] is None
