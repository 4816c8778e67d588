"""Data and models of one's own through the commands: the same in every process, and refused once they have changed."""

import json
from pathlib import Path

import numpy as np
import pytest

from apical.cli.main import main

pytestmark = pytest.mark.usefixtures("undrawn")
FILE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Module):
    def __init__(self, in_features, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(in_features, 8), nn.ReLU(), nn.Linear(8, num_classes))

    def forward(self, x):
        return self.body(x)

def wrong():
    return nn.Linear(4, 9)

def pair():
    y = torch.arange(90) % 3
    x = torch.randn(90, 4) + 3 * torch.eye(4)[y]
    return TensorDataset(x[:60], y[:60]), TensorDataset(x[60:], y[60:])
"""
QUICK = ("--epochs", "1", "--batch-size", "8", "--probe", "8", "--device", "cpu", "--jobs", "1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    generator = np.random.default_rng(0)
    np.savez("own.npz", x=generator.normal(size=(60, 4)), y=np.arange(60) % 3)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("apical: error: ")
    assert error.count("\n") == 1
    return error


def test_worker_processes_train_the_same_data_and_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--rules", "bp", "dfa", "--data", "mine.py:pair", "--model", "mine.py:Net", "--seeds", "2", *QUICK]
    assert main([*command, "--out", "a", "--jobs", "2"]) == 0
    assert "mine.py:pair: 60 training and 30 test samples of shape (4,); 3 classes" in capsys.readouterr().out
    assert main([*command, "--out", "b"]) == 0
    a, b = (json.loads(Path(name, "summary.json").read_text()) for name in "ab")
    assert [row["train_loss"] for row in a] == [row["train_loss"] for row in b]
    config = json.loads((folder / "a/runs/dfa/seed-1/config.json").read_text())
    assert config["data"] == f"{folder}/mine.py:pair"
    assert config["model"] == f"{folder}/mine.py:Net"
    assert len(config["data_sha256"]) == len(config["model_sha256"]) == 16
    around = json.loads((folder / "a/runs/dfa/seed-1/environment.json").read_text())
    assert around["data_source"] == f"{folder}/mine.py:pair, sha256 {config['data_sha256']}"
    assert config["data_sha256"] in (folder / "a/report.html").read_text()


def test_changed_data_or_model_are_not_resumed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "--data", "own.npz", "--model", "mine.py:Net", "--out", str(folder / "run"), *QUICK[:-2]]
    assert main(command) == 0
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    again = [word.replace("own.npz", "../own.npz").replace("mine.py", "../mine.py") for word in command]
    assert main([*again, "--epochs", "2", "--resume"]) == 0  # the same files, named from elsewhere
    (folder / "mine.py").write_text(FILE.replace("8", "9"))
    assert "the content of" in (said := refused(capsys, *again, "--epochs", "3", "--resume"))
    assert "mine.py:Net, sha256" in said
    (folder / "mine.py").write_text(FILE)
    np.savez(folder / "own.npz", x=np.ones((60, 4)), y=np.arange(60) % 3)
    assert "own.npz, sha256" in refused(capsys, *again, "--epochs", "3", "--resume")


def test_moved_data_and_models_are_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--data", "own.npz", "--model", "mine.py:Net", "--out", "run", *QUICK[:-2]]
    assert main(command) == 0
    (folder / "elsewhere").mkdir()
    (folder / "own.npz").rename(folder / "elsewhere" / "points.npz")
    (folder / "mine.py").rename(folder / "elsewhere" / "nets.py")
    again = [*command, "--epochs", "2", "--resume", "--data", "elsewhere/points.npz"]
    assert main([*again, "--model", "elsewhere/nets.py:Net"]) == 0
    assert json.loads((folder / "run/config.json").read_text())["data"] == f"{folder}/elsewhere/points.npz"
    (folder / "elsewhere" / "nets.py").write_text(FILE + "\nAnother = Net\n")
    assert "model: " in refused(capsys, *again, "--epochs", "3", "--model", "elsewhere/nets.py:Another")


def test_a_sweep_and_its_best_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "--rules", "bp", "--data", "own.npz", "--model", "mine.py:Net", "--space", "lr=0.01,0.1"]
    assert main([*command, "--final-seeds", "0", "--out", "sweep", *QUICK]) == 0
    compare = ["compare", "--recipe", "sweep/best.json", "--seeds", "1", "--jobs", "1"]
    np.savez(folder / "own.npz", x=np.ones((60, 4)), y=np.arange(60) % 3)
    assert "own.npz changed since the run began" in refused(capsys, *compare, "--out", "best")
    assert main([*compare, "--data", "own.npz", "--out", "best"]) == 0  # named again: as it is now


def test_an_audit_and_a_landscape(folder: Path) -> None:
    assert main(["audit", "bp", "--data", "mine.py:pair", "--model", "mine.py:Net", "--epochs", "1", "--out", "audit"]) == 0
    record = json.loads((folder / "audit/audit.json").read_text())
    assert len(record["data_sha256"]) == len(record["model_sha256"]) == 16
    own = ["--data", "mine.py:pair", "--model", "mine.py:Net"]
    assert main(["train", *own, "--trajectory", "2", "--out", "run", *QUICK[:-2]]) == 0
    assert main(["landscape", "run", "--grid", "3", "--out", "landscape"]) == 0


def test_numbers_choose_the_loss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("own.npz", x=np.random.default_rng(0).normal(size=(60, 4)), y=np.linspace(0, 1, 60))
    assert main(["train", "--data", "own.npz", "--model", "mlp-4", "--out", "run", *QUICK[:-2]]) == 0
    assert "the targets of own.npz are numbers: the loss is mse" in capsys.readouterr().out
    assert json.loads(Path("run/config.json").read_text())["loss"] == "mse"
    asked = ["train", "--data", "own.npz", "--model", "mlp-4", "--loss", "cross_entropy", "--out", "other"]
    assert "are numbers, not classes: add --loss mse" in refused(capsys, *asked)


def test_whole_numbers_are_embedded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "words.py").write_text(
        """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2))

def load():
    x = torch.randint(0, 5, (60, 3))
    return x, (x.sum(1) > 6).long()
"""
    )
    words = ["--data", "words.py:load", "--model", "words.py:net"]
    assert main(["train", "--rule", "dfa", *words, "--out", "run", *QUICK[:-2]]) == 0
    assert main(["audit", "bp", *words, "--epochs", "1"]) == 0
    said = refused(capsys, "train", *words[:2], "--model", "mlp-4", "--out", "other")
    assert "they are integers: return floats, unless the model embeds them" in said


def test_a_model_that_does_not_embed_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.txt").write_text("the cat sat on the mat. " * 100)
    said = refused(capsys, "train", "--data", "own.txt", "--model", "mlp-8", "--context", "8", "--out", "out")
    assert said.endswith("; they are tokens, which the model must embed first, as gpt-2x64 does\n")


def test_an_evolution(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "evolve",
        "--data",
        "own.npz",
        "--model",
        "mine.py:Net",
        "--population",
        "4",
        "--steps",
        "2",
        "--examples",
        "16",
    ]
    assert main([*command, "--generations", "1", "--out", "out"]) == 0
    config = json.loads((folder / "out/config.json").read_text())
    assert config["data"] == [f"{folder}/own.npz"]
    assert len(config["data_sha256"][0]) == len(config["model_sha256"][0]) == 16
    assert main([*command, "--generations", "2", "--out", "out", "--resume"]) == 0
    (folder / "mine.py").write_text(FILE.replace("8", "9"))
    assert "model_sha256" in refused(capsys, *command, "--generations", "3", "--out", "out", "--resume")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "mine.py:wrong"), "model mine.py:wrong maps inputs (2, 4) to (2, 9), but own.npz needs (2, 3)"),
        (("--model", "mine.py:Nett"), "did you mean 'Net'?"),
        (("--model", "mine.py"), "give file and name"),
        (("--data", "absent.npz"), "no such file or folder"),
        (("--data", "own.parquet"), "no such file or folder"),
        (("--flip", "True"), "--flip and --crop need images (channels, height, width)"),
        (("--data", "owm"), "or your own: FILE.npz, FILE.csv, FILE.txt, FOLDER, FILE.py:FUNCTION"),
    ],
)
def test_refused_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert said in refused(capsys, "train", "--data", "own.npz", *arguments, "--out", "out")
    assert not (folder / "out").exists()


def test_a_file_gets_the_module_that_lies_beside_it_or_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two folders have a `helpers_of_mine.py` each: Python imports the first for both."""
    for name, width in (("a", 4), ("b", 6)):
        (folder / name).mkdir()
        (folder / name / "helpers_of_mine.py").write_text(f"WIDTH = {width}\n")
        (folder / name / "net.py").write_text(FILE.replace("import torch\n", "import torch\nimport helpers_of_mine\n", 1))
    words = ["train", "--data", "own.npz", "--epochs", "1"]
    assert main([*words, "--model", "a/net.py:Net", "--out", "out"]) == 0
    said = refused(capsys, *words, "--model", "b/net.py:Net", "--out", "other")
    assert said.endswith(
        f"b/net.py imports 'helpers_of_mine', which resolves to {folder}/a/helpers_of_mine.py, not "
        f"{folder}/b/helpers_of_mine.py: rename the latter\n"
    )
    (folder / "b" / "helpers_of_mine.py").write_text("WIDTH = 4\n")  # the same
    assert main([*words, "--model", "b/net.py:Net", "--out", "other"]) == 0


def test_a_file_that_changes_the_folder_does_not_move_the_run(folder: Path) -> None:
    (folder / "far").mkdir()
    (folder / "far" / "net.py").write_text("import os\nos.chdir(os.path.dirname(os.path.abspath(__file__)))\n" + FILE)
    assert main(["train", "--data", "own.npz", "--epochs", "1", "--model", "far/net.py:Net", "--out", "out"]) == 0
    assert (folder / "out" / "result.json").is_file()
    assert not (folder / "far" / "out").exists()


def test_names_are_printed_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not `:cat:` as a picture, nor `[bold]` as a style."""
    (folder / "mine.py").write_text(FILE + "\ncat = pair\n")
    (folder / "own.npz").rename(folder / "own[bold].npz")
    assert (
        main(
            [
                "compare",
                "--rules",
                "bp",
                "--data",
                "mine.py:cat",
                "--model",
                "mine.py:Net",
                "--seeds",
                "1",
                *QUICK,
                "--out",
                "a",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("mine.py:cat: 60 training")
    assert (
        main(
            [
                "compare",
                "--rules",
                "bp",
                "--data",
                "own[bold].npz",
                "--model",
                "mlp-4",
                "--seeds",
                "1",
                *QUICK,
                "--out",
                "[i]b",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert said.startswith("own[bold].npz: 48 training")
    assert said.endswith("report: [i]b/report.html\n")
    assert main(["measure", "mine.py:Net", "--data", "mine.py:cat", "--measure", "persistence", "--out", "c[red]"]) == 0
    assert "json: c[red]/measure.json" in capsys.readouterr().out
