"""`apical reproduce`: from a name to verdicts, whatever happens in between."""

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from apical.bench.papers import BUDGETS, SEEDS, Table, studies, tables, too_small
from apical.bench.program import SeedStudy
from apical.bench.recipe import Recipe
from apical.bench.report.verdicts import Verdict
from apical.bench.study import Claim, Published, Row, Study
from apical.cli.main import main
from apical.cli.reproduce import SMALL, tables_of, verdict
from apical.errors import CheckpointError
from apical_papers.dfc.toy import study as dfc_toy
from apical_papers.dfc.toy.runs import History, Plan

pytestmark = pytest.mark.usefixtures("undrawn")
TABLES = [(f"{paper}/{name}", table) for paper, its in tables().items() for name, table in its.items()]


def number(verdict: str = "reproduced", epoch: int = 5, n: int = SEEDS) -> Verdict:
    return Verdict("pfa", "test accuracy, %", epoch, 97.0, 0.5, "fig", 97.1 if n else None, 0.1, n, verdict)


def test_verdicts_are_told_only_where_the_budget_reaches() -> None:
    assert verdict(number(), 5, cut=False) == "reproduced"
    assert verdict(number("not reproduced"), 5, cut=False) == "not reproduced"
    assert verdict(number(), None, cut=False) == "reproduced"
    assert verdict(number(), 4, cut=False) == SMALL
    assert verdict(number(n=SEEDS - 1), 5, cut=False) == SMALL
    assert verdict(number(), 5, cut=True) == SMALL
    assert verdict(number("not run", n=0), 5, cut=False) == "not run"
    assert verdict(number("not run", n=0), 4, cut=False) == SMALL


@pytest.mark.parametrize(("name", "table"), TABLES, ids=[name for name, _ in TABLES])
def test_every_table_can_be_run_at_every_budget(name: str, table: Table) -> None:
    assert bool(table.study) != bool(table.module)
    assert set(table.budgets) == set(BUDGETS)
    assert table.study in studies() or table.module
    if table.module:
        assert too_small(table, table.budgets["smoke"])
        assert not too_small(table, table.budgets["paper"])
    else:
        own = studies()[table.study]
        numbers = [number.epoch for row in own.rows.values() for number in row.published]
        epochs = max(numbers + [claim.epoch for claim in own.claims], default=1)
        assert int(table.budgets["paper"]["epochs"]) >= epochs
        assert int(table.budgets["paper"]["seeds"]) >= SEEDS
        smoke = {**own.default.to_json(), **table.budgets["smoke"]}
        if not smoke["data"].startswith("digits"):  # which are as few as that
            looked_at = smoke["train_limit"] + smoke["test_limit"] + smoke["validation"]
            assert looked_at <= 1500, "a smoke budget is a minute or two"
    assert tables_of(name) == {name: table}


class AboutToRunError(Exception):
    """All options are taken."""


BY_SEED = [
    (name, table, module)
    for name, table in TABLES
    if table.module and ("by_seed" in vars(module := import_module(table.module)) or isinstance(module.main, SeedStudy))
]


@pytest.mark.parametrize(("table", "module"), [row[1:] for row in BY_SEED], ids=[row[0] for row in BY_SEED])
def test_a_program_takes_the_sizes_of_every_budget(
    table: Table, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*arguments: Any) -> None:
        raise AboutToRunError

    monkeypatch.setattr("apical.bench.program.side_by_side", begin)
    for sizes in table.budgets.values():
        options = [word for key, value in sizes.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        with pytest.raises(AboutToRunError):
            module.main(["--out", str(tmp_path), *options])


def study() -> Study:
    """Digits, two rules, and published numbers of which one is met, one is not, and one lies beyond."""
    base = Recipe(data="digits", model="mlp-16", epochs=3, batch_size=32, lr=(0.02,), train_limit=320, test_limit=100)
    numbers = (
        Published("accuracy", 2, 50.0, 50.0, "fig"),
        Published("accuracy", 2, 300.0, 1.0, "fig"),
        Published("accuracy", 3, 50.0, 50.0, "fig"),
    )
    rows = {rule: Row(Recipe(**{**base.to_json(), "rule": rule, **_tuples(base)}), numbers) for rule in ("bp", "fa")}
    return Study("A small table", "seconds", rows, base, (Claim("bp", "fa", 2, -100.0),))


def _tuples(recipe: Recipe) -> dict[str, Any]:
    return {key: getattr(recipe, key) for key in ("lr", "lr_epochs", "weight_decay", "weight_decay_epochs", "rule_options")}


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(studies(), "small", study())
    sizes = {"smoke": {"epochs": 1, "seeds": 1}, "cpu": {"epochs": 2, "seeds": 3}, "paper": {"epochs": 3, "seeds": 3}}
    monkeypatch.setitem(tables(), "toy", {"table": Table("A small table", sizes, study="small")})  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_table")
def test_a_study_becomes_a_table_of_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "toy/table", "--out", str(tmp_path), "--jobs", "1"]) == 0
    record = json.loads((tmp_path / "reproductions" / "toy-table.json").read_text())
    assert [row["verdict"] for row in record["rows"]] == 2 * ["reproduced", "not reproduced", SMALL] + ["reproduced"]
    first = record["rows"][0]
    assert first["n"] == 3
    assert first["low"] <= first["measured"] <= first["high"]
    assert record["sizes"] == {"epochs": 2, "seeds": 3}
    assert "3 reproduced, 2 not reproduced, 2 budget too small to tell" in " ".join(capsys.readouterr().out.split())
    assert main(["reproduce", "toy/table", "--out", str(tmp_path), "--jobs", "1"]) == 2
    assert main(["reproduce", "toy/table", "--out", str(tmp_path), "--jobs", "1", "--resume"]) == 0
    again = json.loads((tmp_path / "reproductions" / "toy-table.json").read_text())
    assert again["rows"] == record["rows"]


@pytest.mark.usefixtures("small_table")
def test_what_is_kept_is_judged_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "toy-table"
    assert main(["reproduce", "toy/table", "--kept", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"apical: error: --kept: {out} contains no finished run")
    by_hand = ["compare", "--recipe", "small", "--epochs", "2", "--seeds", "3", "--jobs", "1", "--out", str(out)]
    assert main(by_hand) == 0
    ran = [json.loads((out / "summary.json").read_text())[0][key] for key in ("seconds", "commit")]
    shutil.rmtree(out / "runs")  # as in a repository
    assert main(["reproduce", "toy/table", "--kept", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "reproductions" / "toy-table.json").read_text())
    assert [row["verdict"] for row in record["rows"]] == 2 * ["reproduced", "not reproduced", SMALL] + ["reproduced"]
    assert record["sizes"] == {"epochs": 2, "seeds": 3}
    assert record["command"].startswith("apical compare --recipe small")
    assert record["seconds"] >= round(ran[0], 1)
    assert record["environment"]["commit"] == ran[1]
    assert main(["reproduce", "toy/table", "--kept", "--resume", "--out", str(tmp_path)]) == 2
    (out / "verdicts.json").write_text('{"rule": "bp"}')
    assert main(["reproduce", "toy/table", "--kept", "--out", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err
    for name, text in {"verdicts": '[{"rule": "bp"}]', "summary": "[]", "compare": '{"study": "small"}'}.items():
        (out / f"{name}.json").write_text(text)
        assert main(["reproduce", "toy/table", "--kept", "--out", str(tmp_path)]) == 2
        assert "is damaged" in capsys.readouterr().err


@pytest.mark.usefixtures("small_table")
def test_a_kept_run_without_numbers_to_judge_it_by_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {rule: replace(row, published=()) for rule, row in study().rows.items()}
    monkeypatch.setitem(studies(), "small", replace(study(), rows=rows, claims=()))
    out = tmp_path / "toy-table"
    assert main(["compare", "--recipe", "small", "--epochs", "1", "--seeds", "1", "--jobs", "1", "--out", str(out)]) == 0
    assert not (out / "verdicts.json").exists()
    shutil.rmtree(out / "runs")  # as in a repository
    assert main(["reproduce", "toy/table", "--kept", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "reproductions" / "toy-table.json").read_text())
    assert (record["rows"], record["sizes"]) == ([], {"epochs": 1, "seeds": 1})
    (out / "summary.json").unlink()
    assert main(["reproduce", "toy/table", "--kept", "--out", str(tmp_path)]) == 2


@pytest.mark.usefixtures("small_table")
def test_a_kept_run_that_was_cut_tells_nothing(tmp_path: Path) -> None:
    limits = ["--epochs", "2", "--seeds", "3", "--train-limit", "64", "--jobs", "1"]
    assert main(["compare", "--recipe", "small", *limits, "--out", str(tmp_path / "toy-table")]) == 0
    assert main(["reproduce", "toy/table", "--kept", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "reproductions" / "toy-table.json").read_text())
    assert record["sizes"] == {"epochs": 2, "seeds": 3, "train_limit": 64}
    assert {row["verdict"] for row in record["rows"]} == {SMALL}


@pytest.mark.usefixtures("small_table")
def test_a_smoke_budget_tells_nothing(tmp_path: Path) -> None:
    assert main(["reproduce", "toy", "--budget", "smoke", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "reproductions" / "toy-table-smoke.json").read_text())
    assert {row["verdict"] for row in record["rows"]} == {SMALL}


def test_a_study_of_its_own(tmp_path: Path) -> None:
    assert main(["reproduce", "pfa/theory", "--budget", "smoke", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "reproductions" / "pfa-theory-smoke.json").read_text())
    assert {row["verdict"] for row in record["rows"]} == {SMALL}
    assert all(abs(row["measured"] - float(row["reference"].split()[0])) < 2 for row in record["rows"])
    assert main(["reproduce", "pfa/theory", "--budget", "smoke", "--out", str(tmp_path)]) == 2


def test_what_there_is_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name, _ in TABLES)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("pfaa/mnist", "unknown paper 'pfaa/mnist'; did you mean 'pfa/mnist'?"),
        ("pfa/mnits", "unknown table of pfa 'mnits'; did you mean 'mnist'?"),
    ],
)
def test_unknown_names(target: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", target, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


PLAN = Plan(1, 32, (0,), probe=16, noise_epochs=1, pretrain_epochs=1)


def test_an_interrupted_study_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    trained = dfc_toy.train

    def counted(name: str, *rest: Any) -> History:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(name)
        return trained(name, *rest)

    monkeypatch.setattr(dfc_toy, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        dfc_toy.study(PLAN, tmp_path / "cut", "", points=20, draws=20)
    assert len(list((tmp_path / "cut" / "cells").glob("*.json"))) == 3
    monkeypatch.setattr(dfc_toy, "train", lambda name, *rest: calls.append(name) or trained(name, *rest))
    second = dfc_toy.study(PLAN, tmp_path / "cut", "", points=20, draws=20)
    assert calls == [name for name, _ in PLAN.jobs()]  # each once
    monkeypatch.setattr(dfc_toy, "train", trained)
    first = dfc_toy.study(PLAN, tmp_path / "whole", "", points=20, draws=20)
    assert json.dumps(first["curves"]) == json.dumps(second["curves"])
    assert json.dumps(first["verdicts"]) == json.dumps(second["verdicts"])
    with pytest.raises(CheckpointError, match="other settings"):
        dfc_toy.study(replace(PLAN, samples=256), tmp_path / "cut", "", points=20, draws=20)


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> History:
        raise KeyboardInterrupt

    monkeypatch.setattr(dfc_toy, "train", interrupted)
    assert main(["reproduce", "dfc/toy", "--budget", "smoke", "--out", str(tmp_path)]) == 130
    said = capsys.readouterr()
    assert (said.out + said.err).count("--resume") == 1
    assert not (tmp_path / "reproductions").exists()
