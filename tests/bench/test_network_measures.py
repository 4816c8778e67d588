"""`apical measure` and `--measure`: what they print, keep and refuse, on models by name, users' own and trained folders."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import apical
from apical.bench.network import MEASURES, WHOLE, measured
from apical.bench.recipe import Recipe
from apical.cli.main import main
from apical.cli.terminal import show_table
from apical.diagnostics.persistence import persistence
from apical.errors import ConfigError

pytestmark = pytest.mark.usefixtures("undrawn")
OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_features, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(in_features, 6), nn.BatchNorm1d(6), nn.GELU())
        self.head = nn.Linear(6, num_classes)
    def forward(self, x):
        return self.head(self.body(x) + 0.1)

def norms(model, inputs):
    return {"norm": sum(p.norm().item() for p in model.parameters()), "samples": len(inputs)}

def wrong(model, inputs):
    return 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_model_of_ones_own(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["measure", f"{own}:Net", "--measure", *MEASURES, f"{own}:norms", "--samples", "40", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "1 network in" in printed
    record = json.loads((out / "measure.json").read_text())
    (row,) = record["rows"]
    assert set(row["measured"]) == {*MEASURES, "norms"}
    assert row["measured"]["norms"][WHOLE]["samples"] == 40
    assert "dgp" not in row["measured"]["persistence"][WHOLE]  # no row of layers
    assert "<h2>norms" in (out / "report.html").read_text()


def test_a_comparison_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "runs", tmp_path / "out"
    arguments = "--rules bp fa --data digits --model mlp-8 --epochs 2 --seeds 2 --train-limit 128 --jobs 1 --probe 0"
    assert main(["compare", *arguments.split(), "--measure", "persistence", "coding", "--out", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "Measures of the network" in page
    assert "dgp shuffled" in page
    lines = [json.loads(line) for line in (folder / "runs/fa/seed-1/metrics.jsonl").read_text().splitlines()]
    assert [sorted(line.get("measured", {})) for line in lines] == [["coding", "persistence"]] * 3
    assert main(["measure", str(folder), "--measure", "persistence", "--out", str(out)]) == 0
    rows = json.loads((out / "measure.json").read_text())["rows"]
    assert [(row["network"], row["seed"]) for row in rows] == [
        ("before training", 0),
        ("bp", 0),
        ("before training", 1),
        ("bp", 1),
        ("fa", 0),
        ("fa", 1),
    ]
    assert rows[-1]["measured"]["persistence"] == lines[-1]["measured"]["persistence"]
    assert rows[2]["measured"]["persistence"] == lines[0]["measured"]["persistence"]
    assert main(["measure", str(folder / "runs/fa/seed-0")]) == 0
    assert "2 networks" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["spiking-6-5", "first-spike-6", "graph-4x3", "flow-4x3", "cnn-elu-2-3"])
def test_every_kind_of_network_has_every_measure(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", name, "--samples", "8"]) == 0
    printed = capsys.readouterr().out
    assert "cannot be measured" not in printed
    assert printed.count(f"\n{name} ") >= len(MEASURES)


def test_why_a_measure_is_left_out_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs"
    monkeypatch.delitem(MEASURES, "learnability")
    arguments = "--rules bp fa --data copy --model gpt-1x8 --epochs 1 --seeds 1 --epoch-steps 2 --jobs 1 --probe 0"
    assert main(["compare", *arguments.split(), "--out", str(folder)]) == 0
    capsys.readouterr()
    assert main(["measure", str(folder), "--samples", "4"]) == 0
    assert capsys.readouterr().out.count("before training, bp, fa: channel cannot be measured") == 1


def test_of_rules_that_answer_in_their_own_way_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--rules csdp --data digits --model spiking-6-5 --epochs 1 --seeds 2 --epoch-steps 2 --jobs 1 --probe 0"
    assert main(["compare", *arguments.split(), "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["measure", str(tmp_path), "--measure", "coding"]) == 0
    said = "csdp computes its answers differently; activities and Jacobians here are those of the model's forward pass"
    assert " ".join(capsys.readouterr().out.split()).count(said) == 1


def test_heads_of_narrow_tables_break_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    heads = ["network", *("participation ratio per unit" for _ in range(4))]
    show_table(heads, [["x", "1", "2", "3", "4"]], left=["network"])
    printed = capsys.readouterr().out
    assert printed.count("participation") == 4


def test_measuring_changes_no_result(tmp_path: Path) -> None:
    results = []
    for extra in ([], ["--measure", *MEASURES]):
        out = tmp_path / str(len(extra))
        arguments = "--rule dfa --data digits --model mlp-8 --epochs 2 --train-limit 128 --probe 0 --device cpu"
        assert main(["train", *arguments.split(), *extra, "--out", str(out)]) == 0
        results.append(json.loads((out / "result.json").read_text()))
    for key in ("train_loss", "test_loss", "test_accuracy", "config_hash"):
        assert results[0][key] == results[1][key]


def test_initial_weights_by_name(tmp_path: Path) -> None:
    arguments = "--rule bp --data digits --model mlp-8-8 --epochs 1 --train-limit 64 --probe 0 --init looks-linear"
    assert main(["train", *arguments.split(), "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["init"] == "looks-linear"
    assert Recipe().hash() != Recipe(init="orthogonal").hash()
    assert Recipe().hash() == Recipe(measure=("coding",)).hash() == "6c9a38573051"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["measure"], "needs a MODEL or the folder"),
        (["measure", "mlp-8", "--measure", "persistance"], "did you mean 'persistence'?"),
        (["measure", "mlp-8", "--samples", "1"], "--samples must be at least 2"),
        (["measure", "mlp-8", "--init", "orthogonl"], "did you mean 'orthogonal'?"),
        (["measure", "runs/nothing"], "there is no folder runs/nothing"),
        (["measure", "mlp-9-9", "--init", "looks-linear"], "layer 'linear1' has 9; give it an even number"),
        (["train", "--measure", "codings", "--out", "q"], "did you mean 'coding'?"),
        (["train", "--init", "ortho", "--out", "q"], "did you mean 'orthogonal'?"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert list(tmp_path.iterdir()) == []


def test_what_a_measure_may_return(own: Path) -> None:
    with pytest.raises(ConfigError, match="must return numbers by name \\(a dictionary\\), got int"):
        measured((f"{own}:wrong",), nn.Linear(2, 2), torch.randn(3, 2))
    with pytest.raises(ConfigError, match="channel cannot be measured on this model"):
        measured(("channel",), nn.Embedding(3, 2), torch.tensor([1, 2]))


def test_a_model_under_a_rule_is_measured_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3))
    alone = measured(MEASURES, model, torch.randn(20, 5, generator=torch.Generator().manual_seed(1)))
    rule = apical.FeedbackAlignment(model)
    rule(torch.randn(4, 5), torch.arange(4) % 3).backward()
    assert measured(MEASURES, rule.model, torch.randn(20, 5, generator=torch.Generator().manual_seed(1))) == alone
    assert persistence(rule.model) == persistence(model)


def test_a_measure_of_ones_own_does_not_change_what_is_trained(tmp_path: Path) -> None:
    """It writes weights, gradients, modes and random state, and forgets to put them back."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\n"
        "def pruned(model, inputs):\n"
        "    model.eval()\n"
        "    model(inputs).sum().backward()\n"
        "    torch.manual_seed(3)\n"
        "    with torch.no_grad():\n"
        "        for parameter in model.parameters():\n"
        "            parameter.zero_()\n"
        "    return {'accuracy': 0.1}\n"
    )
    small = ("--rule", "fa", "--data", "digits", "--train-limit", "200", "--model", "mlp-8", "--epochs", "1", "--out")
    assert main(["train", *small, str(tmp_path / "bare")]) == 0
    assert main(["train", *small, str(tmp_path / "measured"), "--measure", f"{tmp_path}/mine.py:pruned"]) == 0
    bare, with_measure = (torch.load(tmp_path / name / "checkpoint.pt")["rule"] for name in ("bare", "measured"))
    assert bare.keys() == with_measure.keys()
    assert all(torch.equal(bare[key], with_measure[key]) for key in bare)


def test_options_of_models_do_nothing_for_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", str(tmp_path), "--data", "mnist", "--seed", "3"]) == 2
    assert "no effect here: --data, --seed (folders have their own)" in capsys.readouterr().err
