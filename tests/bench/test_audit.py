"""`apical audit` from the command line: what it keeps, draws, refuses."""

import json
from pathlib import Path

import pytest
from matplotlib.text import Text

from apical.bench.figures.audit import numbers
from apical.bench.names import RULES, constructor_options
from apical.bench.papers import claimed, claims
from apical.cli.audit import _tell
from apical.cli.main import main
from apical.diagnostics.plausibility import CRITERIA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audit") / "out"
    assert main(["audit", "bp", "fa", "dfa", "kp", "pfa", "--epochs", "1", "--out", str(out)]) == 0
    return out


def test_what_is_kept(folder: Path) -> None:
    record = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    assert [row["rule"] for row in record["rows"]] == ["bp", "fa", "dfa", "kp", "pfa"]
    keys = [criterion["key"] for criterion in record["criteria"]]
    assert keys == [criterion.key for criterion in CRITERIA]
    for row in record["rows"]:
        assert list(row["verdicts"]) == keys
        assert all(verdict["text"] for verdict in row["verdicts"].values())
        for key, claim in row["claims"].items():
            assert claim["agrees"] == (claim["claimed"] == row["verdicts"][key]["verdict"])
    by_rule = {row["rule"]: row for row in record["rows"]}
    assert by_rule["pfa"]["form"] == "form='literal'"
    assert by_rule["bp"]["form"] == ""
    assert by_rule["fa"]["verdicts"]["parameters"]["numbers"]["parameters"] == 48 * 32 + 32 * 10
    assert by_rule["dfa"]["verdicts"]["parameters"]["numbers"]["parameters"] == 10 * (48 + 32)
    assert by_rule["bp"]["claims"]["no_sign_transport"] == {"claimed": "no", "agrees": True}
    assert all(row["placement"] for row in record["rows"])
    assert by_rule["bp"]["placement"].startswith("exact: ")
    for name in ("audit.png", "audit.svg", "audit_numbers.png", "audit_numbers.svg"):
        assert (folder / name).stat().st_size > 10_000


@pytest.mark.parametrize("has_bp", [True, False])
def test_costs_are_said_to_be_relative_where_there_is_a_reference(
    folder: Path, has_bp: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    record["rows"] = [row for row in record["rows"] if has_bp or row["rule"] != "bp"]
    _tell(record)
    assert ("relative to bp" in capsys.readouterr().out) is has_bp
    figure = numbers(record)
    figure.canvas.draw()
    assert any("relative to bp" in text.get_text() for text in figure.findobj(Text)) is has_bp


def test_a_rule_that_cannot_train_the_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "bp", "dfc", "--model", "mlp-residual-8-8", "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert "not audited: dfc: " in said
    assert main(["audit", "dfc", "--model", "mlp-residual-8-8", "--epochs", "1"]) == 2
    assert "dfc: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bpp"], "unknown rule 'bpp'; did you mean 'bp'?"),
        (["bp", "--model", "mpl-8"], "unknown model 'mpl-8'"),
        (["bp", "--data", "digit"], "did you mean 'digits'?"),
        (["bp", "--data", "student-teacher"], "an audit needs classes"),
        (["bp", "--epochs", "0"], "--epochs must be positive"),
        (["bp", "--lr", "-1"], "--lr"),
        (["bp", "--model", "flow-16x6", "--lr", "10"], "try a learning rate below 10"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_used_folder_is_not_replaced_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "bp", "--out", str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_claims_are_about_rules_and_criteria_that_exist() -> None:
    for table in claims():
        assert {rule for rules in table.columns.values() for rule in rules} <= set(RULES)
        assert set(table.rows) <= {criterion.key for criterion in CRITERIA}
        assert all(len(row) == len(table.columns) for row in table.rows.values())
    assert claimed("bp", claims())["no_symmetry"] == "no"


def test_physical_forms_are_options_of_their_rules() -> None:
    for entry in RULES.values():
        assert set(entry.physical) <= set(constructor_options(entry))


SEQUENCES = """
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self, tokens=16, width=8):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(tokens, width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, tokens)

    def forward(self, tokens):
        x = self.tokens(tokens)
        y = self.norm(x)
        return self.head(x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y), is_causal=True))
"""


def test_a_model_of_tokens_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(SEQUENCES, encoding="utf-8")
    (tmp_path / "text.txt").write_text("It is the same with words as with weights; " * 60, encoding="utf-8")
    data, model, out = str(tmp_path / "text.txt"), f"{tmp_path / 'net.py'}:Net", tmp_path / "out"
    assert main(["audit", "bp", "fa", "pfa", "--model", model, "--data", data, "--epochs", "1", "--out", str(out)]) == 0
    record = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    for row in record["rows"]:
        assert row["verdicts"]["no_credit_across_positions"]["verdict"] == "no"
        assert row["verdicts"]["no_credit_across_positions"]["numbers"]["asked"] == 4
        assert 0 <= row["accuracy"] <= 1
    assert {row["rule"]: row["verdicts"]["no_sign_transport"]["verdict"] for row in record["rows"]} == {
        "bp": "no",
        "fa": "yes",
        "pfa": "yes",
    }
    assert "No credit across positions" in capsys.readouterr().out
