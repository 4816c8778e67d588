"""Help, version, lists and errors of the command line: short, whole, and pointing at the right option."""

from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console

import apical
from apical.bench.papers import studies, tables
from apical.bench.progress import Watch, Watched
from apical.bench.run_folder import RunFolder
from apical.cli.columns import columns
from apical.cli.main import COMMANDS, main


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"apical {apical.__version__}\n"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen_and_leaves_no_option_out(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([*([command] if command else []), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) < 80
    assert any(line.startswith("Example") for line in lines)
    words = " ".join(lines).split()
    if command in ("", "data"):
        assert set(COMMANDS) <= set(words) if not command else "fetch" in words
        return
    for item in fields(COMMANDS[command]):
        option = f"--{item.name.replace('_', '-')}"
        assert option in words or item.name in ("runs", "rules", "targets", "folder", "what")


def test_the_whole_help_has_every_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", "--help-all"])
    assert caught.value.code == 0
    assert "TensorBoard events" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("compare --epoch 3 --out q", "unknown option --epoch (did you mean --epochs?); see apical compare --help"),
        ("compare", "--out DIR is missing; see apical compare --help"),
        (
            "compare --optimizer sgdd --out q",
            "--optimizer must be one of adam, adamw, input-adam, muon, nadam, radam, sgd; got 'sgdd' (did you mean sgd?)",
        ),
        ("compare --seeds 1.5 --out q", "--seeds K needs a whole number; got '1.5'; see apical compare --help"),
        ("compare --epochs x --out q", "--epochs N needs a whole number; got 'x'"),
        ("compare --lr fast --out q", "--lr RATE ... needs numbers; got 'fast'"),
        ("comprae", "unknown command 'comprae' (did you mean compare?)"),
        ("train --out", "--out needs a value"),
        ("list rule", "did you mean rules?"),
        ("report", "is missing; see apical report --help"),
        ("compare --rules --out q", "--rules needs at least one name"),
        ("compare --rules 5 --out q", "--rules 5: expected names of rules, such as pfa; --seeds sets the number of seeds"),
        ("train --rule 5 --out q", "--rule 5: expected the name of a rule"),
        ("train --data 3 --out q", "--data 3: expected a name, a file or a folder; --train-limit sets"),
        ("train --model 64 --out q", "--model 64: expected a name with widths, such as mlp-64-64"),
        ("sweep --rules 2 --space lr=0.1 --out q", "--rules 2: expected names of rules"),
        ("audit 5", "rules 5: expected names of rules"),
    ],
)
def test_errors_are_one_line_and_point_at_the_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [None, 80, 30])
def test_names_in_lists_are_never_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int | None
) -> None:
    names = [*studies(), *(f"{paper}/{table}" for paper, its in tables().items() for table in its)]
    monkeypatch.setattr("apical.cli.commands.margin", lambda: width)
    monkeypatch.setattr("apical.cli.reproduce.margin", lambda: width)
    assert main(["list", "recipes"]) == 0
    assert main(["reproduce"]) == 0
    printed = capsys.readouterr().out
    assert set(names) <= {line.split()[0] for line in printed.splitlines() if line.split()}
    assert "\u2026" not in printed
    if width == 80:
        assert all(len(line) <= 80 for line in printed.splitlines()[:-1])


def test_a_last_column_without_room_gets_its_own_lines() -> None:
    assert columns([("a" * 20, "one two three")], 30) == ["a" * 20, "    one two three"]


def test_many_runs_print_few_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    """As `make demo` does: seven rules, three seeds, 20 epochs. The last epoch of every run is among them."""
    runs = [Watched(f"r{i}", seed, RunFolder(tmp_path / f"{i}-{seed}")) for i in range(7) for seed in range(3)]
    console = Console(width=80, force_terminal=False)
    watch = Watch(console, runs, 20)
    with console.capture() as capture, watch.shown():
        for run in runs:
            run.folder.path.mkdir()
            text = '{"epoch": %d, "train_loss": 1.0, "test_loss": 1.0, "test_accuracy": 0.5, "ms_per_step": 1.0}\n'
            run.folder.metrics.write_text("".join(text % epoch for epoch in range(21)))
        watch.refresh()
    printed = capture.get().splitlines()
    assert len(printed) <= 45
    assert sum("epoch  20/20" in line for line in printed) == 21
