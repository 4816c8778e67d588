"""The study of non-convex functions: measures and verdicts by hand, and a tiny run that is stopped, resumed and reported."""

import json
from pathlib import Path

import pytest
import torch

from apical.bench.finding import count, difference
from apical.evolution.functions import METHODS
from apical_papers.tdca.functions import study as tdca_functions
from apical_papers.tdca.functions.report import verdicts, wilson
from apical_papers.tdca.functions.study import LARGE, PLANE, Case, measured, tuned

RASTRIGIN = Case("rastrigin", 2, "recurrent")


def test_measures_by_hand() -> None:
    shifts = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.double)
    ends = shifts + torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.2]], dtype=torch.double)
    middle = shifts + torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 0.2]], dtype=torch.double)
    starts = shifts + torch.tensor([[3.0, 4.0], [2.0, 0.0], [0.0, 0.2]], dtype=torch.double)
    found = measured(RASTRIGIN.of, torch.stack([starts, middle, ends]), shifts)
    at = 10 + 0.04 - 10 * torch.cos(torch.tensor(0.4 * torch.pi, dtype=torch.double))
    assert found["final"] == pytest.approx((0 + 1 + float(at)) / 3)
    assert found["best"] == pytest.approx((0 + 0 + float(at)) / 3)  # the second was at the minimum on its way
    assert found["successes"] == 2  # the second ends in the next basin
    lost = torch.full_like(ends, torch.nan)
    diverged = measured(RASTRIGIN.of, torch.stack([starts, lost]), shifts)
    assert diverged["final"] == pytest.approx(float(RASTRIGIN.of(starts - shifts).mean()))
    assert diverged["best"] == pytest.approx(diverged["final"])


def test_the_best_rate_is_that_of_the_lowest_value() -> None:
    found = tuned(RASTRIGIN, 16, 60)
    assert found["rates"].keys() == set(METHODS)
    for method, values in found["values"].items():
        by_rate = {float(rate): value for rate, value in values.items()}
        assert len(by_rate) >= 6
        assert min(by_rate, key=by_rate.__getitem__) == pytest.approx(found["rates"][method], rel=1e-2)


def test_a_difference_is_reproduced_only_if_its_interval_excludes_equality() -> None:
    theirs = [1.0, 1.1, 0.9, 1.0, 1.05]
    clear = difference("E1", "a", "b", [0.1, 0.2, 0.15, 0.1, 0.2], theirs, less=True)
    assert clear["verdict"] == "reproduced"
    assert clear["mean"] == pytest.approx(-0.86)
    assert clear["low"] < clear["mean"] < clear["high"] < 0
    assert clear["p_student"] < 0.05
    assert difference("E1", "a", "b", [0.1, 2.0, 0.2, 1.1, 0.9], theirs, less=True)["verdict"] == "not reproduced"
    assert difference("E1", "a", "b", [0.1, 0.2, 0.15, 0.1, 0.2], theirs, less=False)["verdict"] == "not reproduced"
    assert [count("E1", "a", "b", holds, 2)["verdict"] for holds in ([True, True, False], [True, False, False])] == [
        "reproduced",
        "not reproduced",
    ]


def made(case: Case, ours: float, **theirs: float) -> dict[str, object]:
    """The cell of a case with five meta-seeds, in which every method but those named ends near 1."""
    noise = (0.0, 0.01, -0.01, 0.02, -0.02)
    methods = {name: theirs.get(name, 1.0) for name in ("gd", "momentum", "adam", "random")}
    return {
        "seeds": [{"methods": {"tdca": {"final": ours + each}}} for each in noise],
        "controls": {
            str(case.dimension): {"seeds": [{name: {"final": value} for name, value in methods.items()}] * len(noise)}
        },
    }


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [5, 5]),
        ({PLANE[0]: {"random": 0.4}}, [4, 5]),  # random points alone are better on one function
        ({PLANE[0]: {"momentum": 0.4}, PLANE[1]: {"adam": 0.5}}, [3, 5]),  # equality is not better
        ({case: {"gd": 0.1} for case in LARGE[:4]}, [5, 1]),
    ],
)
def test_a_function_counts_if_every_control_is_worse(changed: dict[Case, dict[str, float]], expected: list[int]) -> None:
    cells = {case: made(case, 0.5, **changed.get(case, {})) for case in (*PLANE, *LARGE)}
    rows = verdicts(cells, {"plane": PLANE, "large": LARGE})
    assert [row["mean"] for row in rows[:2]] == expected
    reached = [expected[0] >= 4, expected[1] >= 2]
    assert [row["verdict"] == "reproduced" for row in rows[:2]] == reached
    assert len(rows) == 2 + len(PLANE) + len(LARGE)
    for case, other in changed.items():
        (row,) = (row for row in rows if row["what"].startswith(case.title))
        assert row["mean"] == pytest.approx(0.5 - min(other.values()))


def test_wilson_interval() -> None:
    low, high = wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))


def run(folder: Path, *more: str) -> int:
    short = ["--generations", "3", "--generations-large", "2", "--generations-further", "2", "--starts", "8", "--seeds", "2"]
    return tdca_functions.main(["--out", str(folder), *short, "--jobs", "1", *more])


@pytest.mark.usefixtures("undrawn_here")
def test_a_study_is_written_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tdca_functions, "PLANE", (RASTRIGIN,))
    monkeypatch.setattr(tdca_functions, "FURTHER", ())
    monkeypatch.setattr(tdca_functions, "LARGE", LARGE[:1])
    monkeypatch.setattr(tdca_functions, "STATELESS", (Case("rastrigin", 2, "stateless"),))
    monkeypatch.setattr(tdca_functions, "VALIDATION", 16)
    whole = tdca_functions.together

    def stopping(tasks: object, populations: object, generation: int) -> object:
        if generation == 2:
            raise KeyboardInterrupt
        return whole(tasks, populations, generation)  # type: ignore[arg-type]

    monkeypatch.setattr(tdca_functions, "together", stopping)
    assert run(tmp_path / "a") == 130
    assert "continue from" in capsys.readouterr().err
    monkeypatch.setattr(tdca_functions, "together", whole)
    assert run(tmp_path / "a") == 0
    assert run(tmp_path / "b") == 0
    values = [json.loads((tmp_path / name / "results.json").read_text())["verdicts"] for name in "ab"]
    assert values[0] == values[1]
    kept = {path.name: path.read_bytes() for path in (tmp_path / "a" / "cells").iterdir()}
    assert run(tmp_path / "a") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "a" / "cells").iterdir()} == kept
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert {"title", "command", "environment", "settings", "verdicts", "tables", "seconds"} <= results.keys()
    assert {row["verdict"] for row in results["verdicts"]} <= {"reproduced", "not reproduced"}
    assert all(len(row) == len(each["header"]) for each in results["tables"] for row in each["rows"])
    page = (tmp_path / "a" / "report.html").read_text()
    assert "data:image/svg+xml" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "a" / "trajectories.png").read_bytes().startswith(b"\x89PNG")
    assert run(tmp_path / "c", "--groups", "large", "--first", "40") == 0
    alone = json.loads((tmp_path / "c" / "results.json").read_text())
    assert alone["title"].endswith("ten dimensions, longer evolutions")
    assert {row["rule"] for row in alone["verdicts"]} == {"tdca-coordinate"}
    assert all(each["rows"] for each in alone["tables"])
    capsys.readouterr()
    assert run(tmp_path / "a", "--groups", "lage") == 2
    assert "did you mean 'large'" in capsys.readouterr().err
    assert run(tmp_path / "a", "--starts", "9") == 2
    assert "other settings" in capsys.readouterr().err
