"""The table of all rules: its command trains the setting that was written down, and what it lacks is counted."""

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.generator import script

from apical.bench.names import AROUND, RULES
from apical.bench.recipe import Recipe
from apical.bench.space import Axis
from apical.cli import sweep as command
from apical.cli.main import main
from apical_papers.rates.cost import cost
from apical_papers.rates.recipe import DATA, EVERY, LEAST, RATES, SETTING, SWEEPS, arguments, shortfall

pages = script("sweep_pages")


class PlannedError(Exception):
    pass


@pytest.mark.parametrize("data", DATA)
def test_the_command_has_the_setting_and_the_grid(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stop(flags: Any, _: str, drafts: list[Recipe], axes: Any) -> None:
        seen.update(flags=flags, drafts=drafts)
        raise PlannedError

    monkeypatch.setattr(command, "_open", stop)
    monkeypatch.setattr(command, "load_data", lambda recipe: None)
    monkeypatch.setattr(command, "identified", lambda recipe, data: recipe)
    monkeypatch.setattr(command.commands, "prepare", lambda recipes: (recipes, {}))
    with pytest.raises(PlannedError):
        main(arguments(data, ("bp", "cwu:bp"), str(tmp_path)))
    free = {"lr": (), "threads": 0, "probe": 0}
    for draft, rule in zip(seen["drafts"], ("bp", "cwu:bp"), strict=True):
        asked = replace(SETTING, rule=rule, data=data)
        unlike = {f.name for f in fields(Recipe) if getattr(draft, f.name) != getattr(asked, f.name)}
        assert unlike <= free.keys()
    assert command.space(["bp"], seen["flags"].space)["bp"] == [Axis("lr", RATES)]
    assert (seen["flags"].final_seeds, seen["flags"].seeds, seen["flags"].resume) == (LEAST["seeds"], 1, True)


def test_the_grid_is_what_was_asked_for() -> None:
    assert len(RATES) >= LEAST["trials"] == 12
    steps = [after / before for before, after in pairwise(RATES)]
    assert all(2 <= step <= 2.5 + 1e-9 for step in steps)
    assert set(EVERY) == {*RULES, *(f"{name}:bp" for name in AROUND)}
    run = [rule for tiers in SWEEPS.values() for tier in tiers for rule in tier]
    assert run.count("bp") == len(SWEEPS)  # once in each, so that they may be compared
    assert len({*run}) == len(run) - len(SWEEPS) + 1
    assert {*EVERY} - {*run} == {"mupc"}  # which takes another network


def test_what_a_sweep_lacks_is_counted() -> None:
    names = [rule.replace(":", "-") for rule in EVERY]
    trials = [{"rule": rule} for rule in names for _ in range(12)]
    rows = [{"rule": rule} for rule in names for _ in range(5)]
    full = {"train_limit": 10_000, "epochs": SETTING.epochs}
    assert shortfall(trials, rows, full) == []
    assert shortfall(trials, rows, full | {"train_limit": None}) == []  # all of them
    assert shortfall(trials[1:], rows, full) == ["11 of 12 trials"]
    assert shortfall(trials, rows[5:-1], full) == ["4 of 5 seeds", f"{len(EVERY) - 1} of {len(EVERY)} rules"]
    assert shortfall(trials, rows, full | {"epochs": 3}) == [f"3 of {SETTING.epochs} epochs"]


def test_a_rule_that_refuses_the_network_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apical_papers.rates import cost as module

    monkeypatch.setattr(module, "SETTING", Recipe(model="mlp-8", epochs=2, batch_size=16, train_limit=64, validation=32))
    monkeypatch.setattr(module, "DATA", ("digits",))
    load = [module.once(module.load_data) for _ in module.BATCHES]
    assert "mu parametrisation" in cost("mupc", load, tmp_path / "mu")["refused"]
    assert cost("bp", load, tmp_path / "bp")["seconds"] > 0


def test_a_page_says_what_is_not_bracketed(tmp_path: Path) -> None:
    folder = sweep_of(tmp_path / "results" / "rates-mnist", best={"bp": 1, "fa": 0})
    text = "\n".join(pages.tuning(folder))
    assert "| `bp` | 91.00 [90.50, 91.50] | 2 | lr 0.1 | yes | 80.00 | 3 (1) |" in text
    assert "| `fa` | - | 2 | lr 0.01 | no: lr at its lowest | 80.00 | 3 (1) |" in text
    assert "Not bracketed: `fa`; " in text
    assert pages.lacking(folder).startswith("3 of 12 trials, 2 of 5 seeds, 64 of 10,000 training images")
    assert "`cwu:bp` 7 s" in text
    assert "`mupc` (another network)" in text
    assert "`dfa` (not measured)" in text
    assert "| `fa` | - | 0.01, not bracketed |" in pages.best_of_all(tmp_path)


def sweep_of(folder: Path, best: dict[str, int]) -> Path:
    """A folder as a small sweep of two rules leaves it."""
    from apical.bench.state import write_json

    folder.mkdir(parents=True)
    scores = dict(enumerate((0.8, 0.8, None)))
    trials = [
        {"rule": rule, "number": i, "settings": {"lr": 10.0 ** (i - 2)}, "score": score, "seconds": 1.0}
        for rule in best
        for i, score in scores.items()
    ]
    write_json(folder / "sweep.json", {"trials": trials, "best": best})
    write_json(folder / "compare.json", {"recipe": {"epochs": 1, "train_limit": 64, "batch_size": 8, "validation": 32}})
    rows = [{"rule": rule, "status": "finished"} for rule in best for _ in range(2)]
    write_json(folder / "summary.json", rows)
    write_json(folder / "statistics.json", [{"rule": "bp", "mean": 91.0, "low": 90.5, "high": 91.5, "n": 2}])
    write_json(folder / "costs.json", {"rules": {"cwu:bp": {"seconds": 7.2}, "mupc": {"refused": "no"}}})
    return folder
