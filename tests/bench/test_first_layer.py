"""Whether a rule can train a model follows from the model's graph, not from what is measured beside."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from apical.bench.names import make_rule, needs_feedback, resolve
from apical.bench.recipe import Recipe
from apical.models import build


class Reversed(nn.Module):
    """Registers its head before the layer that feeds it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.norm = nn.Linear(3, 2), nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


@pytest.mark.parametrize("probe", [0, 8])
@pytest.mark.parametrize("rule", ["fa", "usf", "kp", "pfa", "wm"])
def test_a_head_registered_first_trains_whatever_is_measured(rule: str, probe: int) -> None:
    recipe, _ = resolve(Recipe(rule=rule, probe=probe, batch_size=4), 16)
    model = Reversed()
    made = make_rule(recipe, model, (4,))
    made(torch.randn(5, 4), torch.arange(5) % 2).backward()
    assert bool(model.body.weight.grad.abs().sum() > 0)  # type: ignore[union-attr]
    assert "head" in made.feedback_weights()


def test_a_model_in_order_needs_none_and_an_option_given_stays() -> None:
    model = build("mlp-4-4", (3,), 2)
    assert not needs_feedback(model, (3,))
    recipe, _ = resolve(Recipe(rule="fa", probe=0, batch_size=4), 16)
    assert "linear1" not in make_rule(recipe, model, (3,)).feedback_weights()
    asked = replace(recipe, rule_options=("first_layer=True",))
    assert "linear1" in make_rule(asked, build("mlp-4-4", (3,), 2), (3,)).feedback_weights()


def test_looking_changes_nothing() -> None:
    model = Reversed()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert needs_feedback(model, (4,))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not model.head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


class Words(nn.Module):
    """Embeds whole numbers; its head is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.embedding = nn.Linear(3, 2), nn.Linear(4, 3), nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(x).mean(1))))


def test_a_model_that_embeds_whole_numbers() -> None:
    assert needs_feedback(Words(), (3,))


def test_a_model_that_takes_no_zeros_is_left_to_the_rule() -> None:
    assert not needs_feedback(nn.Sequential(nn.Linear(7, 2)), (3,))
