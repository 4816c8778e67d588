"""The study of reinforcement learning: test settings, a stopped evolution that continues exactly, verdicts, and a report."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from apical.errors import CheckpointError
from apical.evolution.population import Lifetime
from apical.evolution.reinforcement import Reinforcement, Setting, reinforce
from apical_papers.tdca.reinforcement import study as tdca_reinforcement
from apical_papers.tdca.reinforcement.report import verdicts
from apical_papers.tdca.reinforcement.study import TRAIN, UNSEEN, compared, evolve, places_of_test, tuned, without_hidden


def small(seed: int = 0) -> Reinforcement:
    return Reinforcement(Setting(lifetime=Lifetime(steps=2, lr=0.05), steps=12, last=1, seed=seed))


def test_settings_of_the_test() -> None:
    found = places_of_test(small(), 0, 3)
    assert all(values.shape == (3 * 7,) for values in found.values())
    assert found.keys() == {"length", "force_mag", "gravity"}
    assert bool(((found["length"][:3] >= 0.4) & (found["length"][:3] <= 0.6)).all())
    assert bool((found["gravity"][:3] == 9.8).all())
    for number, (name, value) in enumerate(UNSEEN.values(), start=1):
        part = slice(3 * number, 3 * number + 3)
        assert bool((found[name][part] == value).all())
        usual = {"length": 0.5, "force_mag": 10.0, "gravity": 9.8}
        assert all(bool((found[other][part] == usual[other]).all()) for other in usual if other != name)


def test_an_evolution_continues_exactly(tmp_path: Path) -> None:
    tasks = [small(0), small(1)]
    whole = evolve(tasks, 3, tmp_path / "whole.pt")
    evolve(tasks, 1, tmp_path / "parts.pt")
    parts = evolve(tasks, 3, tmp_path / "parts.pt")
    assert parts["centers"] == whole["centers"]
    assert parts["curve"] == whole["curve"]
    assert whole["centers"][0] != whole["centers"][1]
    assert whole["centers"][0] != tasks[0].start.tolist()
    with pytest.raises(CheckpointError, match="more than --generations 2"):
        evolve(tasks, 2, tmp_path / "parts.pt")
    (tmp_path / "parts.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        evolve(tasks, 3, tmp_path / "parts.pt")


def test_rates_and_tests_of_reinforce() -> None:
    task = small()
    found = tuned(task, lambda n: reinforce, 0, 3)
    assert found["returns"][f"{found['rate']:g}"] == max(found["returns"].values())
    assert len(found["returns"]) == 6
    both = compared(task, 0, 3, {"one": (reinforce, 0.05), "other": (reinforce, 0.05)})
    assert both["one"] == both["other"]
    assert list(both["one"]["end"]) == [TRAIN, *UNSEEN]
    assert both["one"]["end"][TRAIN] == pytest.approx(both["one"]["curve"][-1])


def test_without_hidden_credit() -> None:
    hidden, output = without_hidden(lambda *given: (torch.ones(1, 3, 2), torch.ones(1, 2, 2)))(*[torch.zeros(1)] * 4)
    assert not bool(hidden.any())
    assert bool(output.all())


def cells(training: float, unseen: list[float]) -> list[dict[str, object]]:
    """Five meta-seeds in which TDCA beats REINFORCE by so much on average."""
    made = []
    for noise in np.linspace(-1, 1, 5):
        lead = dict(zip((TRAIN, *UNSEEN), [training, *unseen], strict=True))
        ours = {place: 100 + value + noise for place, value in lead.items()}
        theirs = dict.fromkeys(lead, 100.0)
        others = ("tdca-as-evolved", "tdca-no-hidden", "unevolved", "reinforce", "reinforce-same-rate")
        made.append(
            {"methods": {"tdca": {"end": ours, "curve": [20.0 + noise]}, **{name: {"end": theirs} for name in others}}}
        )
    return made


@pytest.mark.parametrize(
    ("training", "unseen", "expected"),
    [
        (5.0, [3, 3, 3, 3, -9, -9], ["reproduced", "reproduced"]),
        (0.5, [3, 3, 3, -1, -9, -9], ["not reproduced", "not reproduced"]),
        (-5.0, [3, 3, 3, 3, 3, 3], ["not reproduced", "reproduced"]),
    ],
)
def test_verdicts(training: float, unseen: list[float], expected: list[str]) -> None:
    rows = verdicts(cells(training, unseen), (TRAIN, *UNSEEN))
    assert [row["verdict"] for row in rows[:2]] == expected
    assert rows[0]["mean"] == pytest.approx(training)


def test_a_study_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tdca_reinforcement, "Setting", partial(Setting, lifetime=Lifetime(steps=5), steps=25))
    given = ["--out", str(tmp_path), "--seeds", "2", "--generations", "1", "--lifetimes", "2"]
    assert tdca_reinforcement.main(given) == 0
    first = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["verdict"] for row in results["verdicts"]} <= {"reproduced", "not reproduced"}
    assert results["settings"]["top_down_network"] == [5, 12, 12, 18]
    assert results["settings"]["policy"] == [4, 16, 2]
    assert "data:image/svg+xml" in (tmp_path / "report.html").read_text()
    assert tdca_reinforcement.main(given) == 0
    again = capsys.readouterr().out
    assert "generation 1" in first
    assert "generation 1" not in again
    assert tdca_reinforcement.main([*given, "--seeds", "1"]) == 2
