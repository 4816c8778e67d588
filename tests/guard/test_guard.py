"""Settings, claims and the quickest results are those of smoke.json; `python -m tests.guard.smoke --check` runs all."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.guard import entries, smoke
from tests.guard.digests import summary

RECORDED = smoke.load()
QUICK = (
    *("reproduce/pfa/theory", "reproduce/ep/logic", "evolve/digits", "study/ccl_features", "study/at_epoch"),
    *("compare/tp-digits", "compare/ep-digits", "compare/corinfomax-digits", "compare/dfc-student-teacher"),
)
"""Entries of a second or two, none of which needs downloaded data."""


SETTINGS = [name for name in RECORDED["entries"] if name.startswith("settings/")]
NOW = entries.settings()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_as_recorded(name: str) -> None:
    made = json.loads(json.dumps(NOW[name](), default=str))
    assert list(smoke.differences(RECORDED["entries"][name], made)) == []


def test_no_entry_is_gone_and_every_study_is_recorded() -> None:
    assert RECORDED["entries"].keys() <= smoke.names().keys()
    assert {name for name in NOW if name.startswith("settings/studies/")} <= set(SETTINGS)


@pytest.mark.skipif(RECORDED["machine"] != smoke.machine(), reason=f"last bits are those of {RECORDED['machine']}")
@pytest.mark.parametrize("name", QUICK)
def test_results_have_the_bits_recorded(name: str) -> None:
    _, made = smoke.made(name)
    assert made is not None
    assert list(smoke.differences(RECORDED["entries"][name], made, numbers=True)) == []


def recording(**changed: Any) -> dict[str, Any]:
    """A run's metrics in two epochs, summarised."""
    last = {"epoch": 2, "loss": 0.25, "layers": {"linear1": {"angle": 31.5}}, "note": "as before", "seconds": 1.0}
    return {"metrics.jsonl": summary([{"epoch": 1, "loss": 0.5}, {**last, **changed}])}


def test_the_last_bit_of_a_number_shows() -> None:
    found = list(smoke.differences(recording(), recording(loss=0.25000000000000006)))
    assert any("last/loss: 0.25 -> 0.25000000000000006" in line for line in found)
    nested = list(smoke.differences(recording(), recording(layers={"linear1": {"angle": 31.500000000000004}}), numbers=True))
    assert any("metrics.jsonl/numbers" in line for line in nested)


def test_times_and_modules_do_not_show_and_texts_only_if_asked_for() -> None:
    assert list(smoke.differences(recording(), recording(seconds=2.0))) == []
    moved = [recording(note=f"see apical{place}.pfa_theory") for place in (".recipes", "_papers.pfa")]
    assert list(smoke.differences(*moved)) == []
    reworded = recording(note="in other words")
    assert [line.partition(":")[0] for line in smoke.differences(recording(), reworded)] == ["metrics.jsonl/texts"]
    assert list(smoke.differences(recording(), reworded, numbers=True)) == []


def test_a_check_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept: dict[str, Any] = {}
    smoke.record([smoke.made("settings/recipe")], kept, tmp_path / "smoke.json")
    back = smoke.load(tmp_path / "smoke.json")
    assert back["machine"] == smoke.machine()
    assert smoke.check([smoke.made("settings/recipe")], back["entries"], numbers=False) == {}
    back["entries"]["settings/recipe"]["momentum"] = 0.5
    found = smoke.check([smoke.made("settings/recipe"), ("unknown", {})], back["entries"], numbers=False)
    assert found == {"settings/recipe": ["momentum: 0.5 -> 0.9"]}
    said = capsys.readouterr().out
    assert "momentum: 0.5 -> 0.9" in said
    assert "new, not recorded: unknown" in said
    assert smoke.check([("settings/recipe", None)], back["entries"], numbers=False) == {}


def test_unknown_entries_are_refused() -> None:
    with pytest.raises(SystemExit, match="no entry 'compare/pfa-minst'"):
        smoke.names(["compare/pfa-minst"])


def test_an_entry_that_fails_differs_and_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(entries.PLACES, "recipe", "apical.no_such_module:Recipe")
    failed = smoke.made("settings/recipe")
    assert "no_such_module" in str(failed[1])
    assert any(
        "no_such_module" in line or "only recorded" in line
        for line in smoke.check([failed], RECORDED["entries"], numbers=True)["settings/recipe"]
    )
    kept: dict[str, Any] = {}
    assert smoke.record([failed], kept, tmp_path / "smoke.json") == ["settings/recipe"]
    assert kept == {}
