"""The study of the shipped teacher: comparisons of made-up accuracies, judged by hand."""

import json
from pathlib import Path

import pytest

from apical_papers.tdca.shipped import main


def comparison(folder: Path, model: str, tdca: list[float], data: str = "digits") -> str:
    """A folder as `apical compare` leaves it: BP with a mean of 0.97, DFA diverged, no credit to hidden units at 0.90."""
    accuracies = {"bp": [0.96, 0.97, 0.98], "dfa": [0.1, 0.1, 0.1], "tdca": tdca, "tdca-silent": [0.89, 0.90, 0.91]}
    rows = [
        {"rule": rule, "test_accuracy": value, "status": "diverged" if rule == "dfa" else "finished", "seconds": 2}
        for rule, values in accuracies.items()
        for value in values
    ]
    recipes = {rule: {"data": data, "model": model, "lr": [0.02]} for rule in accuracies}
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(rows))
    (folder / "compare.json").write_text(json.dumps({"recipes": recipes}))
    return str(folder)


def test_verdicts_by_hand(tmp_path: Path) -> None:
    folders = [
        comparison(tmp_path / "a", "mlp-8", [0.955, 0.96, 0.99]),  # the worst 1.5 points below 97 %, which is not above them
        comparison(tmp_path / "b", "mlp-9", [0.9549, 0.99, 0.99]),
        comparison(tmp_path / "c", "mlp-8", [0.945, 0.945, 0.945], "mnist"),
        comparison(tmp_path / "d", "cnn-4", [0.90, 0.91, 0.92]),  # one point above silence, on every seed
    ]
    assert main(["--comparisons", *folders, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    near = {row["what"].split(":")[0]: (row["mean"], row["verdict"]) for row in results["verdicts"] if "≥" in row["mark"]}
    assert near == {
        "digits, mlp-8": (3, "reproduced"),
        "digits, mlp-9": (2, "not reproduced"),
        "mnist, mlp-8": (3, "reproduced"),
    }
    hidden = [row for row in results["verdicts"] if "hidden" in row["what"]]
    assert [row["verdict"] for row in hidden] == ["reproduced"] * 4
    assert hidden[3]["mean"] == pytest.approx(1.0)
    assert results["seconds"] == 4 * 12 * 2
    rows = results["tables"][0]["rows"]
    assert rows[1][3:] == ["0", "diverged", "-", "-"]
    assert rows[6][5:] == ["0.83", "-1.51"]  # of mlp-9: 97.83 and 95.49 against 97


def test_what_is_no_comparison_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lacking = comparison(tmp_path / "a", "mlp-8", [0.9])
    for folder, words in ((lacking, "fewer than two finished runs of tdca"), (str(tmp_path), "contains no comparison")):
        assert main(["--comparisons", folder, "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
