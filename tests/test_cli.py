"""The command line: what it prints, what it refuses, and that a refusal leaves nothing on disk."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from apical.cli.flags.training import Compare, Train
from apical.cli.main import main

pytestmark = pytest.mark.usefixtures("undrawn")
QUICK = ("--model", "mlp-16", "--epochs", "1", "--train-limit", "320", "--probe", "32", "--device", "cpu")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command prints on stderr before it exits with 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("apical: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compare", "--rules", "bp", "pfaa"), "unknown rule 'pfaa'; did you mean 'pfa'?"),
        (("compare", "--rules", "bp", "bp"), "twice"),
        (("compare", "--data", "mnits"), "did you mean 'mnist'?"),
        (("compare", "--model", "lenett"), "did you mean 'lenet'?"),
        (("compare", "--model", "lenet"), "28x28 or 32x32"),
        (("compare", "--recipe", "pfa-mnits"), "did you mean 'pfa-mnist'?"),
        (("compare", "--seeds", "0"), "--seeds must be at least 1"),
        (("compare", "--seeds", "99999999999999999999"), "--seeds must be at most 2147483647"),
        (("train", "--seed", "99999999999999999999"), "--seed must be at most 9223372036854775807"),
        (("train", "--threads", "99999999999999999999"), "--threads must be at most"),
        (("train", "--lr", "0.1", "nan", "--lr-epochs", "3"), "--lr must be finite, got nan"),
        (("evolve", "--sigma", "inf"), "--sigma must be finite, got inf"),
        (("compare", "--jobs", "-1"), "--jobs must be at least 0"),
        (("compare", "--batch-size", "0"), "--batch-size must be positive"),
        (("compare", "--lr", "-1"), "--lr must be positive"),
        (("compare", "--lr", "0.1", "0.01"), "--lr-epochs needs 1"),
        (("compare", "--batch-size", "5000"), "larger than the 1437 training samples"),
        (("compare", "--train-limit", "99999"), "1437"),
        (("train", "--rule", "pfax"), "did you mean 'pfa'?"),
        (("train", "--rule", "pfa", "--rule-options", "expanson=3"), "did you mean 'expansion'?"),
        (("train", "--rule", "pfa", "--rule-options", "expansion=wide"), "expansion"),
        (("train", "--rule", "bp", "--rule-options", "x=1"), "no option 'x'"),
        (("train", "--rule", "fa", "--rule-options", "exact=3"), "exact"),
        (("train", "--rule", "fa", "--feedback-passes", "1"), "--feedback-passes 1: rule 'fa'"),
        (("compare", "--rules", "bp", "fa", "--pretrain-epochs", "3"), "--pretrain-epochs 3: rule 'bp'"),
        (("train", "--clip", "-1"), "--clip must be zero or positive"),
        (("compare", "--rules", "bp", "pfa", "--rule-options", "pfa:expanson=3"), "did you mean 'expansion'?"),
        (("compare", "--rules", "bp", "pfa", "--rule-options", "kp:form=explicit"), "unknown rule in --rule-options 'kp'"),
        (("compare", "--rules", "bp", "dfa", "--rule-options", "expansion=3"), "none of the rules bp dfa has an option"),
        (("compare", "--rules", "bp", "pfa", "--rule-options", "expansion"), "key=value"),
        (("train", "--data", "digit"), "did you mean 'digits'?"),
        (("train", "--epochs", "0"), "--epochs must be positive"),
        (("train", "--rules", "bp"), "unknown option --rules (did you mean --rule?)"),
        (("train", "--clip-over", "network"), "no effect here: --clip-over (--clip is off); drop it"),
        (("compare", "--lr-min", "0.001"), "no effect here: --lr-min (--lr-cosine is off); drop it"),
        (("compare", "--resume", "--overwrite"), "--resume continues what is in the folder and --overwrite replaces it"),
        (("evolve", "--resume", "--overwrite"), "--resume continues what is in the folder and --overwrite replaces it"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    assert said in refused(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


TEXT = ("--data", "text-python", "--model", "gpt-1x16", "--context", "16", "--train-limit", "64", "--test-limit", "32")


def test_a_rule_that_cannot_teach_the_model_is_refused_before_any_trains(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["--rules", "bp", "tdca", "--teacher", "digits", *TEXT]
    assert main(["compare", *given, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("apical: error: rule 'tdca': the top-down network was made for")
    assert "96 outputs; use the shipped teacher 'classes'" in said.err
    assert "ms/step" not in said.out
    assert os.listdir(tmp_path) == []


def test_data_of_other_classes_than_ten_have_the_teacher_for_any_number(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["train", "--rule", "tdca", *TEXT, "--epochs", "1", "--epoch-steps", "1", "--out", str(out)]) == 0
    said = "tdca uses the teacher 'classes': there are 96 classes, and 'digits' is for ten"
    assert said in capsys.readouterr().out
    assert "teacher='classes'" in json.loads((out / "config.json").read_text())["rule_options"]


def test_missing_data_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APICAL_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = refused(capsys, "train", "--data", "mnist", "--out", str(tmp_path / "out"))
    assert "apical data fetch mnist" in said
    assert os.listdir(tmp_path) == []


def test_a_place_where_no_folder_can_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(capsys, "train", *QUICK, "--out", str(tmp_path / "file" / "run"))
    if sys.platform == "linux":
        refused(capsys, "train", *QUICK, "--out", "/proc/apical-run")
        refused(capsys, "compare", "--rules", "bp", "--seeds", "1", *QUICK, "--out", "/proc/apical-run")


def test_train_writes_a_run_folder_and_finishes_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = ["train", "--rule", "pfa", "--rule-options", "expansion=4", *QUICK, "--out", str(out)]
    assert main(train) == 0
    assert "epoch   1/1" in capsys.readouterr().out
    files = {path.name for path in out.iterdir()} - {".lock"}
    assert files == {"config.json", "environment.json", "metrics.jsonl", "checkpoint.pt", "result.json", "placement.json"}
    config = json.loads((out / "config.json").read_text())
    assert config["rule_options"] == ["expansion=4", "first_layer=True"]
    assert config["command"].startswith("apical train --rule pfa")
    assert len(config["weight_decay"]) == 2
    assert "--overwrite" in refused(capsys, *train)
    assert main([*train, "--resume"]) == 0
    assert "already finished" in capsys.readouterr().out
    assert "batch_size: 32 vs 16" in refused(capsys, *train, "--resume", "--batch-size", "16")
    (out / "checkpoint.pt").write_bytes(b"rubbish")
    assert "damaged" in refused(capsys, *train, "--resume", "--epochs", "2")
    assert main([*train, "--overwrite"]) == 0


def test_divergence_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["train", "--rule", "fa", *QUICK, "--epochs", "9", "--lr", "1e20", "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("apical: error: fa with seed 0 diverged in epoch")
    assert errors.count("\n") == 1


def test_compare_reports(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--rules", "bp", "dfa", "--seeds", "2", "--jobs", "1", *QUICK, "--out", "out"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "dfa    seed 1  epoch   1/1" in output
    assert output.strip().endswith(f"report: {os.path.join('out', 'report.html')}")
    rows = json.loads(Path("out/summary.json").read_text())
    assert [row["rule"] for row in rows] == ["bp", "bp", "dfa", "dfa"]
    assert "--resume to continue" in refused(capsys, *arguments)
    assert main([*arguments, "--resume"]) == 0
    assert json.loads(Path("out/summary.json").read_text()) == rows
    assert main(["report", "out"]) == 0


def test_compare_exits_with_3_when_a_run_diverges(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["compare", "--rules", "bp", "fa", "--seeds", "1", *QUICK, "--epochs", "9", "--lr", "1e20"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 3
    errors = capsys.readouterr().err
    assert errors == "apical: 2 of 2 runs diverged: bp seed 0, fa seed 0\n"


def test_a_recipe_is_used_and_explicit_options_win(tmp_path: Path) -> None:
    from apical.cli.commands import draft, find_study

    flags = Compare(out=tmp_path, recipe="pfa-mnist", epochs=5)
    study = find_study("pfa-mnist")
    for rule, decay in (("bp", (1e-4,)), ("pfa-o", (0.03, 9e-5))):
        recipe = draft(flags, study, rule)
        assert (recipe.epochs, recipe.data, recipe.batch_size) == (5, "mnist", 64)
        assert recipe.lr == (0.01, 0.005, 0.0025)
        assert recipe.weight_decay == decay
    other = draft(Compare(out=tmp_path, recipe="pfa-mnist", lr=(0.1,)), study, "bp")
    assert (other.lr, other.lr_epochs) == ((0.1,), ())


def test_rule_options_of_a_comparison(tmp_path: Path) -> None:
    from apical.cli.commands import draft

    options = ("pfa:expansion=4", "first-layer=True", "pfa:exact=('a:b',)")
    flags = Compare(out=tmp_path, rule_options=options)
    assert draft(flags, None, "pfa").rule_options == ("expansion=4", "first-layer=True", "exact=('a:b',)")
    assert draft(flags, None, "kp").rule_options == ("first-layer=True",)
    assert draft(flags, None, "bp").rule_options == ()


def test_given_rule_options_replace_those_of_a_recipe_and_leave_the_others(tmp_path: Path) -> None:
    from dataclasses import replace

    from apical.bench.recipe import Recipe
    from apical.cli.commands import draft
    from apical_papers.pfa.recipes import Row, Study

    row = Row(replace(Recipe(rule="pfa"), rule_options=("expansion=2", "form=explicit")), ())
    study = Study("title", "cost", {"pfa": row}, Recipe())
    for flags in (
        Train(out=tmp_path, rule="pfa", rule_options=("expansion=7",)),
        Compare(out=tmp_path, rule_options=("pfa:expansion=7",)),
    ):
        assert draft(flags, study, "pfa").rule_options == ("form=explicit", "expansion=7")


def test_options_of_feedback_and_optimiser_reach_the_recipe(tmp_path: Path) -> None:
    from apical.cli.commands import draft

    given = {
        "beta2": 0.99,
        "eps": 1e-7,
        "clip": 1.0,
        "feedback_lr": 1e-4,
        "feedback_beta1": 0.5,
        "feedback_beta2": 0.9,
        "feedback_eps": 1e-6,
        "feedback_weight_decay": 0.1,
        "pretrain_epochs": 10,
        "pretrain_lr": 1e-3,
        "feedback_passes": 3,
        "feedback_fraction": 0.5,
        "loss": "mse",
    }
    recipe = draft(Train(out=tmp_path, **given), None, "bp")  # type: ignore[arg-type]
    assert {name: getattr(recipe, name) for name in given} == given


def test_every_field_of_a_recipe_has_an_option() -> None:
    from dataclasses import fields

    from apical.bench.recipe import CHECKSUMS, Recipe

    assert {field.name for field in fields(Recipe)} - {*CHECKSUMS} <= {field.name for field in fields(Train)}


def test_a_comparison_leaves_feedback_passes_to_the_rules_that_learn_feedback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.bench.two_phase import NoisyMirror

    from apical.bench import names as rules
    from apical.bench.recipe import Recipe
    from apical.cli import commands

    monkeypatch.setitem(rules.RULES, "noisy", rules.Entry(NoisyMirror, "for this test"))
    asked = Recipe(pretrain_epochs=2, feedback_passes=1, train_limit=64, device="cpu")
    recipes, notes = commands.prepare([dataclasses.replace(asked, rule=rule) for rule in ("bp", "noisy")])
    assert [(recipe.pretrain_epochs, recipe.feedback_passes) for recipe in recipes] == [(0, 0), (2, 1)]
    assert any("bp has no feedback weights" in note for note in notes[0])
    assert not any("no feedback passes" in note for note in notes[1])


def test_it_is_told_where_what_is_trained_differs_from_the_model() -> None:
    from apical.bench.recipe import Recipe
    from apical.cli import commands

    asked = [
        Recipe(rule=rule, model=model, train_limit=64, device="cpu")
        for rule, model in (
            ("bp", "mlp-8"),
            ("ep", "mlp-8"),
            ("hep", "mlp-sigmoid-8"),
            ("corinfomax", "mlp-8"),
            ("corinfomax", "mlp-box-8"),
        )
    ]
    told: list[str] = []
    _, notes = commands.prepare(asked, told.append)
    assert told == [
        "ep: ReLU states after linear1 are clipped at 1 (bounded=False turns this off)",
        "corinfomax: activities of linear1 and linear2 stay in [0, 1], whatever activation follows these layers",
    ]
    assert [any(line.endswith(note) for line in told for note in each) for each in notes] == [
        False,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("what", ["rules", "models", "data", "recipes"])
def test_lists(capsys: pytest.CaptureFixture[str], what: str) -> None:
    assert main(["list", what]) == 0
    known = {"rules": "pfa-o", "models": "autoencoder-<widths>", "data": "student-teacher-1", "recipes": "pfa-cifar10-small"}
    assert known[what] in capsys.readouterr().out


def test_data_list_and_fetch_of_an_unknown_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    assert "digits" in capsys.readouterr().out
    assert "did you mean 'mnist'" in refused(capsys, "data", "fetch", "mnits")
    said = "apical: error: apical data needs a subcommand: fetch or list; see apical data --help\n"
    assert refused(capsys, "data") == said


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "apical compare --rules bp fa pfa" in capsys.readouterr().out


def test_a_path_behind_an_equals_sign_may_begin_at_home(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    assert f"--out {tmp_path}/used is not empty" in refused(capsys, "train", "--out=~/used", *QUICK)
    assert "nothing is not a folder" in refused(capsys, "report", "~/nothing")


def test_report_of_a_folder_without_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    refused(capsys, "report", str(tmp_path))
    refused(capsys, "report", str(tmp_path / "none"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("model", "rule", "said"),
    [
        ("mlp-bn-8", "dfc", "rule 'dfc': module"),  # refused as the rule is made
        ("mlp-residual-8-8", "dtp", "rule 'dtp': "),
    ],
)
def test_a_refusal_of_one_of_several_rules_has_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str, rule: str, said: str
) -> None:
    arguments = ("compare", "--rules", "bp", rule, "--data", "digits", "--model", model, "--out", str(tmp_path / "out"))
    assert refused(capsys, *arguments).startswith(f"apical: error: {said}")
