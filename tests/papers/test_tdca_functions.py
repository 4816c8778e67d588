"""The study of non-convex functions: measures and verdicts by hand, and a tiny run that is stopped, resumed and reported."""

import json
from pathlib import Path

import pytest
import torch

from apical.bench.finding import count, difference
from apical_papers.tdca.functions import study as tdca_functions
from apical_papers.tdca.functions.report import wilson
from apical_papers.tdca.functions.study import Case, measured, tuned

RASTRIGIN = Case("rastrigin", 2)


def test_measures_by_hand() -> None:
    shifts = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.double)
    ends = shifts + torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.2]], dtype=torch.double)
    middle = shifts + torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 0.2]], dtype=torch.double)
    starts = shifts + torch.tensor([[3.0, 4.0], [1.1, 0.0], [0.0, 0.2]], dtype=torch.double)
    found = measured(RASTRIGIN, ends, shifts, torch.stack([starts, middle, ends]))
    at = 10 + 0.04 - 10 * torch.cos(torch.tensor(0.4 * torch.pi, dtype=torch.double))
    assert found["final"] == pytest.approx((0 + 1 + float(at)) / 3)
    assert found["successes"] == 2  # the first and the last; the second is in the next basin
    assert found["crossed"] == 1  # the first alone went from one basin to another
    assert found["detour"] == pytest.approx(1.0)  # median of 7/5, 1 and 0
    lost = torch.full_like(ends, torch.nan)
    assert measured(RASTRIGIN, lost, shifts, torch.stack([starts, lost]))["final"] == pytest.approx(
        float(RASTRIGIN.of(starts - shifts).mean())
    )


def test_the_best_rate_is_that_of_the_lowest_value() -> None:
    found = tuned(RASTRIGIN, 16)["places"]["shifted"]
    for method in ("gd", "adam"):
        values = {float(rate): value for rate, value in found["values"][method].items()}
        assert len(values) >= 6
        assert min(values, key=values.__getitem__) == pytest.approx(found["rates"][method], rel=1e-2)
    lowest = {method: min(found["values"][method].values()) for method in ("gd", "adam")}
    assert found["best"] == min(lowest, key=lowest.__getitem__)


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


def test_wilson_interval() -> None:
    low, high = wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))


def run(folder: Path, *more: str) -> int:
    short = ["--generations", "2", "--generations-further", "1", "--generations-large", "1", "--starts", "8", "--seeds", "2"]
    return tdca_functions.main(["--out", str(folder), *short, *more])


def test_a_study_is_written_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tdca_functions, "CORE", (RASTRIGIN,))
    monkeypatch.setattr(tdca_functions, "FURTHER", ())
    monkeypatch.setattr(tdca_functions, "LARGE", ())
    whole = tdca_functions.evolved

    def stopping(case: Case, kind: str, options: tdca_functions.Options, seed: int) -> object:
        if seed == 1:
            raise KeyboardInterrupt
        return whole(case, kind, options, seed)  # type: ignore[arg-type]

    monkeypatch.setattr(tdca_functions, "evolved", stopping)
    assert run(tmp_path) == 130
    assert "goes on" in capsys.readouterr().err
    first = (tmp_path / "cells" / "rastrigin-2d-absolute-0.json").read_bytes()
    calls = []
    monkeypatch.setattr(tdca_functions, "evolved", lambda *given: calls.append(given[3]) or whole(*given))
    assert run(tmp_path) == 0
    assert calls == [1, 1]
    assert (tmp_path / "cells" / "rastrigin-2d-absolute-0.json").read_bytes() == first
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"title", "command", "environment", "settings", "verdicts", "tables", "seconds"} <= results.keys()
    assert {row["verdict"] for row in results["verdicts"]} <= {"reproduced", "not reproduced"}
    assert all(len(row) == len(each["header"]) for each in results["tables"] for row in each["rows"])
    page = (tmp_path / "report.html").read_text()
    assert "data:image/svg+xml" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "trajectories.png").read_bytes().startswith(b"\x89PNG")
    assert run(tmp_path, "--generations", "3") == 2
    assert "other settings" in capsys.readouterr().err
