"""Learning rates where none is asked for: those of the sweep over digits, in the setting of that sweep alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from apical.bench.names import RULES, resolve
from apical.bench.recipe import Recipe, from_json
from apical.bench.space import edges
from apical.bench.tuned_rates import DIGITS, FASHION, MNIST, SMALL, own_training, tuned_rate
from apical.cli.main import main
from apical_papers.rates.recipe import FOLDERS, SETTING

RESULTS = Path(__file__).parents[2] / "results"
SWEEPS = [RESULTS / name / "best.json" for name in ("rates-digits", "rates-digits-tdca")]
"""The later one, of more seeds, counts."""


def test_rates_are_those_of_the_sweep() -> None:
    rows = {name: from_json(row) for sweep in SWEEPS for name, row in json.loads(sweep.read_text())["rows"].items()}
    assert {name: (rate,) for name, rate in DIGITS.items()} == {name: row.lr for name, row in rows.items()}
    for name, row in rows.items():  # and all else is at its default
        assert replace(row, validation=0, probe=256) == replace(
            resolve(Recipe(rule=name, lr=row.lr, probe=0), 1197)[0], probe=256
        )


@pytest.mark.parametrize(("data", "rates"), [("mnist", MNIST), ("fashion-mnist", FASHION)])
def test_rates_on_images_are_those_of_their_sweep_that_are_bracketed(data: str, rates: dict[str, float]) -> None:
    rows, inside = {}, {}
    for folder in [RESULTS / name for name, of in FOLDERS.items() if of == data]:
        best = {row["rule"]: from_json(row) for row in json.loads((folder / "best.json").read_text())["rows"].values()}
        record = json.loads((folder / "sweep.json").read_text())
        ends = edges(record["trials"], record["best"])
        inside |= {rule: row.lr[0] for rule, row in best.items() if not ends[row.rule_name]}
        assert all(rows[rule] == best[rule] for rule in rows.keys() & best.keys())  # tuned twice alike
        rows |= best
    assert rates == inside
    for rule, row in rows.items():
        own = own_training(Recipe(rule=rule))
        asked = replace(SETTING, rule=rule, data=data, probe=0, **{**own, "lr": row.lr})
        assert row == resolve(asked, SMALL.train_limit)[0]
        assert rule not in rates or (tuned_rate(replace(SMALL, rule=rule, data=data, **own)),) == row.lr


def test_the_setting_of_the_table_is_the_one_its_rates_are_for() -> None:
    assert replace(SETTING, validation=0) == SMALL


def test_variants_and_controls_have_the_rate_of_their_rule() -> None:
    rates = {name: tuned_rate(Recipe(rule=name)) for name in RULES}
    for name, control in RULES.items():
        if "a control" in control.title:
            assert rates[name] is not None, f"{name} is held against a rule that was tuned"
    assert rates["tdca-silent"] == rates["tdca-unevolved"] == rates["tdca"]
    assert rates["ff-readout"] == rates["ff"] != rates["scff"]
    assert rates["pc-one-step"] == rates["pc-error"]
    assert rates["ep"] is None


@pytest.mark.parametrize(
    "change", [{"epochs": 1}, {"model": "mlp-8"}, {"data": "mnist"}, {"optimizer": "adam"}, {"batch_size": 8}]
)
def test_another_setting_has_the_common_rate(change: dict[str, object]) -> None:
    assert tuned_rate(replace(Recipe(rule="kp"), **change)) is None


def test_a_rule_may_have_an_optimiser_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from apical.bench import compare

    jobs = []
    monkeypatch.setattr(compare, "check", lambda job: (jobs.append(job), 1 / 0))  # nothing is trained
    for options in (["--epochs", "3"], ["--lr", "0.02"], ["--optimizer", "sgd"], ["--weight-decay", "0.1"]):
        with pytest.raises(ZeroDivisionError):
            main(["compare", "--rules", "bp", "csdp", *options, "--out", str(tmp_path)])
    of = [{item.rule: (item.optimizer, item.lr, item.weight_decay) for item in job.recipes} for job in jobs]
    common = of[0]["bp"]
    assert common[0] == "sgd"
    assert of[0]["csdp"] == ("adam", (0.04,), (0.0,))
    assert of[1]["csdp"] == of[2]["csdp"] == ("sgd", (0.02,), common[2])
    assert of[3]["csdp"] == ("adam", (0.04,), (0.1,))
    assert capsys.readouterr().out.count("csdp trains with adam at 0.04; --optimizer and --lr change this") == 2


def test_a_comparison_says_its_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from apical.bench import compare

    jobs = []
    monkeypatch.setattr(compare, "check", lambda job: (jobs.append(job), 1 / 0))  # nothing is trained
    for options in ([], ["--lr", "0.02"], ["--epochs", "2"]):
        with pytest.raises(ZeroDivisionError):
            main(["compare", "--rules", "ccl", "ep", *options, "--out", str(tmp_path)])
    assert [[recipe.lr for recipe in job.recipes] for job in jobs] == [[(0.2,), (0.02,)], [(0.02,)] * 2, [(0.02,)] * 2]
    assert capsys.readouterr().out.count("ccl 0.2; --lr overrides them; not tuned: ep 0.02") == 1
