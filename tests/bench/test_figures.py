"""Figures: which are drawn, their size, spread, determinism, and that they leave global state alone."""

import struct
import warnings

import matplotlib
import numpy as np
import pytest

from apical.bench.figures import curves as figures
from apical.bench.figures import style
from apical.bench.figures.lines import spread
from apical.bench.figures.overview import overview
from apical.bench.figures.style import RULES, styles
from apical.bench.names import RULES as NAMES
from apical.bench.recipe import WRAPPERS
from apical.bench.report.records import Comparison, Run


def run(rule, seed=0, epochs=4, layers=3, finished=True, **measures):
    """A run with accuracy 0.5 + seed/10 and given per-layer measures (a function of epoch and depth)."""
    records = []
    for epoch in range(epochs + 1):
        rows = {f"layer{i}": {key: measure(epoch, i) for key, measure in measures.items()} for i in range(layers)}
        loss = None if epoch == 0 else 2.0 / epoch
        records.append({"epoch": epoch, "test_accuracy": 0.5 + seed / 10, "train_loss": loss, "layers": rows})
    result = {"status": "finished", "test_accuracy": 0.5 + seed / 10} if finished else None
    return Run(rule, seed, {}, {}, tuple(range(epochs + 1)), tuple(records), result)


def comparison(*runs):
    return Comparison("", tuple(dict.fromkeys(r.rule for r in runs)), tuple(runs), single=False)


def falling(epoch, depth):
    return 90.0 / (epoch + 1) + depth


def drawn(*runs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {drawing.stem: drawing for drawing in figures.draw(comparison(*runs))}


def test_figures_follow_the_data():
    assert set(drawn(run("bp"))) == {"accuracy", "loss", "final_accuracy"}
    assert set(drawn(run("bp", finished=False))) == {"accuracy", "loss"}
    assert "weight_alignment" in drawn(run("fa", weight_alignment=falling))
    assert set(drawn(run("dfa", gradient_alignment=falling))) >= {"gradient_alignment"}
    assert "gradient_alignment" not in drawn(run("bp", gradient_alignment=lambda *_: 0.0))


def test_nothing_recorded_draws_nothing():
    assert drawn(Run("fa", 0, {}, {}, (), (), None)) == {}


@pytest.mark.parametrize("layers", [1, 6, 7, 20, 60])
@pytest.mark.parametrize("rules", [("fa",), ("fa", "pfa"), ("fa", "pfa", "kp")])
def test_layer_panels_for_any_depth_and_number_of_rules(layers, rules):
    runs = comparison(*(run(rule, seed, layers=layers, weight_alignment=falling) for rule in rules for seed in range(3)))
    (spec,) = (spec for spec in figures._LAYER_FIGURES if spec.key == "weight_alignment")
    with warnings.catch_warnings(), matplotlib.rc_context(figures.RC):
        warnings.simplefilter("error")
        drawing = figures.render(spec.key, "", figures._layer_caption(spec, runs), figures._layers(runs, spec))
    assert drawing is not None
    assert drawing.png
    assert drawing.svg
    assert ("dashed: mean over layers" in drawing.caption) == (layers > 6)


def test_every_rule_of_the_command_line_has_a_name_of_its_own():
    assert set(NAMES) == set(RULES)
    assert styles(["grapes-fa"])["grapes-fa"].name == "GRAPES around Feedback alignment"
    assert styles(["cwu-matched-fa"])["cwu-matched-fa"].name.endswith("mean step around Feedback alignment")
    assert set(style.AROUND) == set(WRAPPERS)


def test_thirteen_rules_have_different_looks():
    rules = [*RULES, "first", "second", "third"]
    looks = [(style.colour, style.marker, style.line) for style in styles(rules).values()]
    assert len({colour for colour, _, _ in looks}) == len(rules)
    assert styles(rules)["pfa"] == styles(["pfa"])["pfa"]
    assert {"accuracy", "final_accuracy"} <= set(drawn(*(run(rule, seed) for rule in rules for seed in range(2))))


def test_a_rule_at_chance_does_not_press_the_others_together():
    rules = list(RULES)[:9]
    accuracies = {rule: 0.9 + 0.01 * i for i, rule in enumerate(rules)} | {rules[4]: 0.1}
    runs = [run(rule) for rule in rules]
    runs = [Run(r.rule, 0, {}, {}, r.epochs, r.records, {**r.result, "test_accuracy": accuracies[r.rule]}) for r in runs]
    axes = figures._final_score(comparison(*runs)).axes[0]
    assert axes.get_xlim()[0] > 80
    assert [text.get_text() for text in axes.texts] == ["\u2190 10.0"]
    few = figures._final_score(comparison(*runs[:5])).axes[0]
    assert few.get_xlim()[0] < 10
    assert not few.texts


def test_png_is_one_column_wide_at_200_dpi():
    for drawing in drawn(run("fa", weight_alignment=falling), run("pfa", weight_alignment=falling)).values():
        width, _ = struct.unpack(">II", drawing.png[16:24])
        assert width == 700


def test_svg_is_deterministic_and_undated():
    first, second = (drawn(run("fa", weight_alignment=falling), run("bp")) for _ in range(2))
    assert first == second
    assert all(b"<dc:date>" not in drawing.svg for drawing in first.values())


def test_spread_is_the_sample_deviation_over_the_runs_that_have_an_epoch():
    runs = [run("fa", 0), run("fa", 1), run("fa", 2, epochs=2)]
    epochs, mean, deviation, count = spread(runs, "test_accuracy")
    assert count == 3
    assert epochs.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(mean, [0.6, 0.6, 0.6, 0.55, 0.55])
    np.testing.assert_allclose(deviation, [0.1, 0.1, 0.1, np.std([0.5, 0.6], ddof=1), np.std([0.5, 0.6], ddof=1)])


def test_missing_and_infinite_values_leave_gaps():
    gappy = run("fa", weight_alignment=lambda epoch, depth: None if epoch == 2 else float("inf") if depth else 45.0)
    assert "weight_alignment" in drawn(gappy, run("pfa", weight_alignment=falling))


def test_dollar_signs_and_underscores_in_names_are_text():
    assert "accuracy" in drawn(run("$x$_1", weight_alignment=falling), run("a$b", weight_alignment=falling))


def test_global_plotting_state_is_untouched():
    before = dict(matplotlib.rcParams)
    drawn(run("fa", weight_alignment=falling))
    assert dict(matplotlib.rcParams) == before


def test_the_overview_shows_every_rules_score_and_the_angle_in_its_first_layer():
    deeper = lambda epoch, depth: float("nan") if depth == 0 else 10.0 * depth + epoch  # noqa: E731
    runs = [run("bp"), *(run("fa", seed, gradient_alignment=deeper) for seed in range(3))]
    above, below = overview(comparison(*runs)).axes
    assert [line.get_label() for line in above.lines] == ["bp", "fa"]
    np.testing.assert_allclose(above.lines[1].get_ydata(), [60.0] * 4)  # the mean of 50, 60 and 70 %
    assert [line.get_label() for line in below.lines][:-1] == ["fa"]  # and chance
    np.testing.assert_allclose(below.lines[0].get_ydata(), [11.0, 12.0, 13.0, 14.0])  # layer 1, epochs 1 to 4
    assert above.get_ylabel() == "test accuracy (%)"
    assert "degrees" in below.get_ylabel()
    assert below.get_xlabel() == "epoch"


def test_without_an_angle_there_is_no_overview():
    assert overview(comparison(run("bp", gradient_alignment=lambda *_: 0.0), run("fa"))) is None
    assert "overview" in drawn(run("bp"), run("fa", gradient_alignment=falling))


def test_an_angle_over_ninety_degrees_is_inside_the_overview():
    figure = overview(comparison(run("fa", gradient_alignment=lambda *_: 150.0)))
    assert figure.axes[1].get_ylim()[1] >= 150.0


def test_one_epoch_is_a_marker_and_its_axis_has_whole_epochs():
    figure = overview(comparison(run("bp", epochs=1), run("fa", epochs=1, gradient_alignment=falling)))
    for axes in figure.axes:
        for line in axes.lines:
            assert len(line.get_xdata()) > 1 or line.get_markevery() is None
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_a_run_that_diverged_in_its_first_epoch_is_drawn_as_points():
    runs = comparison(run("fa", epochs=0, weight_alignment=falling), run("kp", weight_alignment=falling))
    spec = next(spec for spec in figures._LAYER_FIGURES if spec.key == "weight_alignment")
    diverged, trained = figures._layers(runs, spec).axes[:2]
    assert {line.get_marker() for line in diverged.lines[1:]} == {"."}
    assert {line.get_marker() for line in trained.lines[1:]} == {"None"}


@pytest.mark.parametrize("length", [45, 82])
def test_a_rule_with_a_long_name_is_drawn(length):
    """More letters than a column is wide: a legend of no columns, and no room for the axes beside the names."""
    name = "Rule".ljust(length, "x")
    figures_ = drawn(
        run("bp"), *(run(name, seed, gradient_alignment=falling, weight_alignment=falling) for seed in range(3))
    )
    assert {"accuracy", "final_accuracy", "gradient_alignment", "overview"} <= set(figures_)
