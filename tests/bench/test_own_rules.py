"""Rules that are not part of apical: found by file or module, in comparisons like any other, refused in one sentence."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from apical import FeedbackAlignment
from apical.bench.figures.style import styles
from apical.bench.names import find_rule, options_for
from apical.cli.main import main
from apical.errors import ConfigError

pytestmark = pytest.mark.usefixtures("undrawn")
QUICK = ("--model", "mlp-16", "--train-limit", "320", "--probe", "32", "--device", "cpu", "--seeds", "2")
RULE = '''
from apical import FeedbackAlignment


class Louder(FeedbackAlignment):
    """Feedback alignment with larger feedback.

    More words.
    """

    def __init__(self, model, loss, gain=1.0, first_layer=False):
        super().__init__(model, loss, first_layer=first_layer)
        for feedback in self.feedback.buffers():
            feedback.mul_(gain)
'''


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with a rule in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RULE)
    return "mine.py"


def test_a_rule_from_a_file_is_its_class(file: str) -> None:
    entry = find_rule("mine.py:Louder")
    assert issubclass(entry.build, FeedbackAlignment)  # type: ignore[arg-type]
    assert entry.title == "Feedback alignment with larger feedback"
    assert find_rule(f"{Path(file).resolve()}:Louder").build is find_rule("./mine.py:Louder").build


def test_a_rule_from_a_module() -> None:
    assert find_rule("apical.rules.feedback_alignment:FeedbackAlignment").build is FeedbackAlignment


def test_options_go_by_the_class(file: str) -> None:
    options = ("Louder:gain=2", "fa:first_layer=True")
    assert options_for("mine.py:Louder", options) == ("gain=2",)


def test_in_a_comparison(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In two worker processes, then resumed, beside fa: the same rule where the gain is 1, so the same numbers."""
    command = ("compare", "--rules", "fa", "mine.py:Louder", "--rule-options", "Louder:gain=1.0", "--out", "out", *QUICK)
    assert main([*command, "--epochs", "1", "--jobs", "2"]) == 0
    assert main([*command, "--epochs", "2", "--resume", "--jobs", "1"]) == 0
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())
    losses = {(row["rule"], row["seed"]): row["train_loss"] for row in rows}
    assert [losses["Louder", seed] for seed in (0, 1)] == [losses["fa", seed] for seed in (0, 1)]
    config = json.loads((tmp_path / "out" / "runs" / "Louder" / "seed-0" / "config.json").read_text())
    assert config["rule"] == "mine.py:Louder"
    checksum = hashlib.sha256(RULE.encode()).hexdigest()[:12]
    assert f"Louder comes from mine.py, sha256 {checksum}" in config["notes"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Louder" in report
    assert "mine.py:Louder" in report  # in the command that made it
    assert styles(["fa", "Louder"])["Louder"].colour != styles(["fa", "Louder"])["fa"].colour


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.py:Rule", "there is no file absent.py"),
        ("mine.py", "needs a file and a class, such as my_rule.py:MyRule"),
        ("mine.py:Lauder", "mine.py has no class 'Lauder'; did you mean 'Louder'?"),
        ("mine.py:Zzz", "mine.py has no class 'Zzz'. Its rules: Louder"),
        ("broken.py:Rule", "broken.py cannot be loaded: SyntaxError: .* \\(line 2\\)"),
        ("failing.py:Rule", "failing.py cannot be loaded: ZeroDivisionError: division by zero \\(line 3\\)"),
        ("torch.nn:Linear", "torch.nn:Linear is not a rule: derive the class from apical.CreditRule"),
        ("apical.core.edge:EdgeRule", "has no method 'feedback_of'"),
        ("no_such_module:Rule", "module no_such_module cannot be imported"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(file: str, tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "broken.py").write_text("x = 1\nclass Rule(\n")
    (tmp_path / "failing.py").write_text("x = 1\n\nx / 0\n")
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(ConfigError, match=said):
            find_rule(name)


def test_two_classes_of_one_name_are_refused(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.py").write_text(RULE)
    assert main(["compare", "--rules", "mine.py:Louder", "other.py:Louder", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert "--rules names a rule twice: mine.py:Louder other.py:Louder; results are named after the class, so rename" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", ["import sys; sys.exit()", "raise SystemExit", "exit(3)"])
def test_a_file_that_ends_the_program_is_said(file: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(file).write_text(f"{RULE}\n\n{code}\n")
    assert main(["train", "--rule", f"{file}:Louder", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("apical: error: mine.py cannot be loaded: SystemExit:")
    assert said.count("\n") == 1


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_memory_that_is_not_there_is_one_line(file: str, jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    late = "        torch.empty(1 << 60) if len(inputs) > 8 else None\n        return super().forward(inputs, targets)\n"
    Path(file).write_text(f"import torch\n{RULE}\n    def forward(self, inputs, targets):\n{late}")
    assert main(["compare", "--rules", f"{file}:Louder", *QUICK, "--probe", "0", "--jobs", jobs, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("apical: error: out of memory: take a smaller model")
    assert said.count("\n") == 1


SETTINGS = {
    "default dtype": "torch.set_default_dtype(torch.bfloat16)",
    "default device": "torch.set_default_device('meta')",
    "grad mode": "torch.set_grad_enabled(False)",
}
MODEL = """

def net(in_features, num_classes):
    {}
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(in_features, num_classes))


def data():
    {}
    return torch.rand(40, 3), torch.arange(40) % 2
"""


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_for_the_whole_process_are_refused_and_put_back(
    file: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else every rule of a comparison would train in bfloat16 because the file of one says so."""
    before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    code = SETTINGS[what]
    Path("top.py").write_text(f"import torch\n{code}\n{RULE}{MODEL.format('', '')}")
    Path("inside.py").write_text(f"import torch\n{RULE}\n        {code}\n{MODEL.format(code, code)}")
    sys.path.insert(0, str(tmp_path))
    try:
        for name in ("top.py", "top.py", "top", "inside.py"):  # twice: what was refused is no module that is there
            for option in (["--rules", "bp", f"{name}:Louder"], ["--model", f"{name}:net"], ["--data", f"{name}:data"]):
                if name == "top" and option[0] != "--rules":
                    continue
                assert main(["compare", *option, *QUICK[2 * (option[0] == "--model") :], "--out", "out"]) == 2, (
                    name,
                    option,
                )
                said = capsys.readouterr().err
                assert f"sets PyTorch's {what} to" in said
                assert said.count("\n") == 1
                assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == before
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("top", None)
    assert not Path("out").exists()


def test_an_exception_that_is_no_exception_is_said(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What pytest.skip raises derives from BaseException alone."""
    Path(file).write_text(f"import pytest\n{RULE}\n\npytest.importorskip('no_such_module')\n")
    assert main(["train", "--rule", f"{file}:Louder", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert f"{Path(file).resolve()} failed: Skipped: could not import 'no_such_module'" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_rule_that_ends_the_program_while_it_trains_is_said(
    file: str, jobs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(file).write_text(f"import sys\n{RULE}\n    def forward(self, inputs, targets):\n        sys.exit(7)\n")
    assert main(["compare", "--rules", f"{file}:Louder", *QUICK, "--probe", "0", "--jobs", jobs, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert "mine.py, line" in said
    assert "(SystemExit: 7)" in said
    assert said.count("\n") == 1
    late = "        pytest.skip('planted') if len(inputs) > 8 else None\n        return super().forward(inputs, targets)\n"
    Path(file).write_text(f"import pytest\n{RULE}\n    def forward(self, inputs, targets):\n{late}")
    assert main(["compare", "--rules", f"{file}:Louder", *QUICK, "--probe", "0", "--jobs", jobs, "--out", "other"]) == 2
    said = capsys.readouterr().err
    assert "mine.py failed: Skipped: planted (line " in said
    assert said.count("\n") == 1


def test_a_process_that_ends_without_a_word_has_not_trained(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`os._exit(0)`, by a rule or a library beneath it, looks like success from outside; not in the trial, which is here."""
    late = "        os._exit(0) if len(inputs) > 8 else None\n        return super().forward(inputs, targets)\n"
    Path(file).write_text(f"import os\n{RULE}\n    def forward(self, inputs, targets):\n{late}")
    assert main(["compare", "--rules", f"{file}:Louder", *QUICK, "--probe", "0", "--jobs", "2", "--out", "out"]) == 2
    assert "the process of seed" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_rule_that_fails_while_it_trains_is_said_with_file_and_line(
    file: str, jobs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    late = "        {}['of\\nmine'] if len(inputs) > 8 else None\n        return super().forward(inputs, targets)\n"
    text = f"{RULE}\n    def forward(self, inputs, targets):\n{late}"
    Path(file).write_text(text)
    line = text.splitlines().index("        {}['of\\nmine'] if len(inputs) > 8 else None") + 1
    assert main(["compare", "--rules", f"{file}:Louder", *QUICK, "--probe", "0", "--jobs", jobs, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert f"mine.py failed: KeyError: 'of\\nmine' (line {line})" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            "def forward(self, inputs, targets):\n        return self.loss(self.model(inputs), targets)",
            "forward returns a Tensor",
        ),
        ("def forward(self, inputs, targets):\n        super().forward(inputs, targets)", "forward returns a NoneType"),
        ("def measures(self, probe, test):\n        return {'norm': 1.0}", "measures returns a dict"),
    ],
)
def test_a_method_that_returns_something_else_is_said(
    file: str, method: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first would train by backpropagation under the rule's name."""
    Path(file).write_text(f"{RULE}\n    {method}\n")
    assert main(["compare", "--rules", f"{file}:Louder", *QUICK, "--jobs", "1", "--out", "out"]) == 2
    assert f"Louder.{said}, not apical.core.credit." in capsys.readouterr().err
    if "forward" in said:
        assert main(["audit", f"{file}:Louder", "--epochs", "1"]) == 2
        assert f"Louder.{said}, not apical.core.credit.Credit" in capsys.readouterr().err


def test_names_that_people_type() -> None:
    with pytest.raises(ConfigError, match="unknown rule 'feedbackalignment': its name on the command line is 'fa'"):
        find_rule("feedbackalignment")
    with pytest.raises(ConfigError, match="unknown rule 'bp,fa': separate names of rules by spaces"):
        find_rule("bp,fa")


def test_resume_refuses_a_rule_that_has_changed(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its run would be half of the one and half of the other, under the checksum of the latter."""
    for name in ("mine.py:Louder", "grapes:mine.py:Louder"):
        command = ("train", "--rule", name, *QUICK[:-2], "--resume", "--out", name.replace(":", "-"))
        Path(file).write_text(RULE)
        assert main([*command, "--epochs", "1"]) == 0
        Path(file).write_text(RULE + "\n# another\n")
        capsys.readouterr()
        assert main([*command, "--epochs", "2"]) == 2
        sums = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in (RULE, RULE + "\n# another\n")]
        assert f"the code of mine.py:Louder, sha256: {sums[0]} vs {sums[1]}" in capsys.readouterr().err
        Path(file).write_text(RULE)
        assert main([*command, "--epochs", "2"]) == 0
