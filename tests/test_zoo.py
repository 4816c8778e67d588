"""Rules on models as people write them, in small."""

from functools import partial

import pytest
from benchmarks.specimens import ZOO, outcome

import apical
from apical.bench.names import RULES

SLOW = ("compiled",)


@pytest.mark.parametrize("model", ZOO)
def test_edges_train_everything(model: str) -> None:
    result = outcome(apical.FeedbackAlignment, ZOO[model], skip=SLOW)
    assert result.trained, result
    assert {"feedback reaches below", "zero feedback", "feedback = weight"} <= set(result.checks)


@pytest.mark.parametrize("model", ZOO)
def test_cuts_train_everything(model: str) -> None:
    result = outcome(apical.DirectFeedbackAlignment, ZOO[model], skip=SLOW)
    assert result.trained, result
    assert {"zero signals", "signals reach their unit"} <= set(result.checks)


@pytest.mark.parametrize("model", ZOO)
def test_top_down_credit_trains_everything(model: str) -> None:
    result = outcome(apical.TopDownCreditAssignment, ZOO[model], skip=SLOW)
    assert result.trained, result
    assert {"zero signals", "signals reach their unit"} <= set(result.checks)


@pytest.mark.parametrize("model", ["mnist-example", "vgg", "gpt", "tied", "dict", "experts"])
def test_a_silent_teacher_says_that_hidden_layers_get_no_credit(model: str) -> None:
    result = outcome(partial(apical.TopDownCreditAssignment, silent=True), ZOO[model], skip=SLOW)
    assert result.trained, result
    assert "zero signals" in result.checks
    assert "signals reach their unit" not in result.checks


@pytest.mark.compiles
@pytest.mark.parametrize("rule", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
def test_a_model_that_moves_rows_is_not_compiled_in_parts(rule: type[apical.CreditRule]) -> None:
    """No graph follows the rows, and what a compiler makes of the parts it can took a size for a tensor."""
    result = outcome(rule, ZOO["experts"])
    assert result.trained, result
    assert "compiled" in result.checks


def test_a_chain_rule_refuses_what_is_no_chain_by_name() -> None:
    result = outcome(apical.DeepFeedbackControl, ZOO["preact-resnet"], skip=SLOW)
    assert not result.trained
    assert "'" in result.refused


def test_a_fault_is_told_apart_from_a_refusal() -> None:
    class Silent(apical.FeedbackAlignment):
        def forward(self, inputs, targets):
            output = self.model(inputs)
            loss = self.loss(output, targets)
            return apical.Credit([loss], [None], output, loss)

    result = outcome(Silent, ZOO["masked"], skip=SLOW)
    assert not result.trained
    assert not result.refused
    assert "changes nothing below" in result.fault


@pytest.mark.parametrize(
    "name", ["ccl", "ccl-readout", "local-both", "ff-readout", "pc", "dfc-ss", "ddtp-linear", "dualprop"]
)
def test_rules_of_chains_train_a_perceptron_as_they_say(name: str) -> None:
    entry = RULES[name]
    result = outcome(partial(entry.build, **entry.options), ZOO["perceptron"], skip=SLOW)
    assert result.trained, result
    assert "placement" in result.checks
