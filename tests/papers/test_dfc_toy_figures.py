"""Figures of feedback control: size, labels, which rules are drawn, determinism, and no global state."""

import struct
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

from apical.bench.figures.curves import Drawing
from apical.rules.feedback_control.trajectory import Trace
from apical_papers.dfc.toy import figures as figures_control

PANELS = [("condition_two", "Condition 2"), ("ssa", "angle to DFC-SSA\n(degrees)"), ("eigenvalue", "Re eig (1/s)")]


def curve(n: int = 3, **measures: list[float]) -> dict[str, Any]:
    metrics = {
        key: {"epochs": list(range(len(mean))), "mean": mean, "std": [0.1] * len(mean)} for key, mean in measures.items()
    }
    return {"n": n, "epochs": [0, 1], "metrics": metrics}


def trace(points: int = 1201, layers: tuple[int, ...] = (4, 3, 2), batch: int = 2) -> Trace:
    draw = torch.Generator().manual_seed(0)

    def made(n: int) -> torch.Tensor:
        return torch.randn(points, batch, n, generator=draw)

    soma, basal, apical = ([made(n) for n in layers] for _ in range(3))
    return Trace(0.005 * torch.arange(points), made(layers[-1]), made(layers[-1]), soma, basal, apical)


def size(drawing: Drawing) -> tuple[int, int]:
    width, height = struct.unpack(">II", drawing.png[16:24])
    return width, height


def texts(drawing: Drawing) -> str:
    """Matplotlib writes every text of an SVG as a comment beside its outlines."""
    return drawing.svg.decode()


def conditions() -> Drawing:
    lines = {
        "dfc": curve(condition_two=[0.9, 0.95], ssa=[1.0, 2.0], eigenvalue=[-0.5, -0.4]),
        "dfc-ssa": curve(condition_two=[0.9, 0.95], ssa=[0.0, 0.0]),
        "bp": curve(gauss_newton=[1.0, 2.0]),
    }
    return figures_control.conditions(lines, PANELS)


def test_conditions_are_lettered_labelled_and_name_the_rules_drawn() -> None:
    drawing = conditions()
    assert size(drawing)[0] == 1400
    shown = texts(drawing)
    for text in ("A", "B", "C", "Condition 2", "(degrees)", "Re eig (1/s)", "epoch", "DFC", "DFC-SSA"):
        assert f"<!-- {text} -->" in shown, text
    assert "<!-- BP -->" not in shown  # it has none of the panels' measures
    assert "<!-- D -->" not in shown
    assert "mean over 3 seeds" in drawing.caption


def test_the_reference_of_a_panel_is_not_drawn_in_it() -> None:
    assert figures_control._curves(matplotlib.figure.Figure().add_subplot(), {"dfc-ssa": curve(ssa=[0.0])}, "ssa") == set()


def test_spread_is_shown_only_over_several_seeds() -> None:
    for n, bands in ((1, 0), (3, 1)):
        axes = matplotlib.figure.Figure().add_subplot()
        figures_control._curves(axes, {"dfc": curve(n, ssa=[1.0, 2.0])}, "ssa")
        assert len(axes.collections) == bands
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    assert (low, high) == pytest.approx((0.9, 2.1))


def test_trace_shows_every_layer_and_both_kinds_of_control() -> None:
    drawing = figures_control.traces(trace(), trace(), torch.zeros(2, 2), torch.ones(2, 2), sample=1)
    assert size(drawing)[0] == 1400
    shown = texts(drawing)
    for text in ("output r_L", "control u", "layer 1", "layer 2", "output layer", "time (τ_u)", "soma v", "target"):
        assert f"<!-- {text} -->" in shown, text
    assert len(drawing.svg) < 600_000


def test_trajectories_are_thinned_but_keep_their_ends() -> None:
    values = torch.arange(2000.0)
    thinned = figures_control._thin(values)
    assert len(thinned) <= 502
    assert (thinned[0], thinned[-1]) == (0, 1999)
    assert figures_control._thin(torch.arange(5.0)).tolist() == [0, 1, 2, 3, 4]


def test_strongest_neurons() -> None:
    apical = torch.tensor([[9.0, 9, 9], [1.0, -3, 2]])
    assert figures_control._strongest(apical, 2) == [1, 2]


def optimal() -> Drawing:
    draw = np.random.default_rng(0)
    points: Any = SimpleNamespace(
        cloud=draw.normal(size=(50, 2)),
        transpose=np.zeros(2),
        pseudoinverse=np.ones(2),
        damped=draw.normal(size=(5, 2)),
        gammas=np.array([1e-5, 1.0, 2.0, 3.0, 100.0]),
        explained=np.array([0.6, 0.2]),
    )
    return figures_control.optimal(points)


def test_optimal_feedback_is_one_column_wide_and_names_its_points() -> None:
    drawing = optimal()
    assert size(drawing)[0] == 700
    shown = texts(drawing)
    for text in ("principal component 1 (60 % of variance)", "principal component 2 (20 % of variance)", "Jᵀ", "J⁺"):
        assert f"<!-- {text} -->" in shown, text
    assert "50 random feedback matrices" in drawing.caption
    assert "from 1e-05 to 100" in drawing.caption


@pytest.mark.parametrize("draw", [conditions, optimal])
def test_figures_are_deterministic_and_leave_global_state_alone(draw: Any) -> None:
    before = dict(matplotlib.rcParams)
    assert draw() == draw()
    assert dict(matplotlib.rcParams) == before
