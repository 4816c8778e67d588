"""The top-down network for any number of classes: its equations and symmetry, and direct feedback alignment as its limit."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tdca_reference as reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical import models
from apical.errors import ConfigError, UnsupportedModelError
from apical.losses import token_cross_entropy
from apical.rules.top_down import equivariant
from apical.rules.top_down.equivariant import EquivariantNetwork, Feedback
from apical.rules.top_down.hand_built import wired
from apical.rules.top_down.teacher import TopDownNetwork, load

Rule = apical.TopDownCreditAssignment


def perceptron(sizes: tuple[int, ...] = (6, 5, 4, 3)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1])).double()


def batch(classes: int = 3, size: int = 7) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(size, 6, dtype=torch.double, generator=draw), torch.arange(size) % classes


def random_network(**options: Any) -> EquivariantNetwork:
    """With biases too, which unevolved networks begin without."""
    network = EquivariantNetwork(**options).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def predictions(classes: int, rows: int = 9) -> tuple[Tensor, Tensor]:
    p = torch.softmax(2 * torch.randn(rows, classes, dtype=torch.double), 1)
    return p, F.one_hot(torch.arange(rows) % classes, classes).double()


def matrices_of(rule: Rule) -> Feedback:
    """Those that the rule drew at its first batch."""
    (feedback,) = rule._matrices.values()
    return feedback


def learned(rule: apical.CreditRule, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    rule.zero_grad()
    rule(inputs, targets).backward()
    return {name: p.grad.clone() for name, p in rule.model.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("hidden", [0, 8])
@pytest.mark.parametrize("output", ["evolved", "error"])
@pytest.mark.parametrize(("layers", "sizes"), [(3, (6, 5, 4, 3)), (1, (6, 5, 4, 3)), (2, (6, 7, 5, 4, 2))])
def test_equals_the_equations_one_example_at_a_time(hidden: int, output: Any, layers: int, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, teacher = perceptron(sizes), random_network(layers=layers, hidden=hidden, output=output)
    x, y = batch(sizes[-1])
    rule = Rule(model, teacher=teacher)
    rule(x, y).backward()
    body = [m for m in teacher.body if isinstance(m, nn.Linear)]
    expected = reference.gradients_by_class(
        [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in model if isinstance(m, nn.Linear)],
        x.numpy(),
        y.numpy(),
        teacher=[(m.weight.detach().numpy(), 0.0 if m.bias is None else m.bias.detach().numpy()) for m in body],
        feedback=[matrix.T.numpy() for matrix in matrices_of(rule).matrices],
        layers=layers,
        error=output == "error",
    )
    for layer, (g_w, g_v) in zip([m for m in model if isinstance(m, nn.Linear)], expected, strict=True):
        assert np.abs(g_w).max() > 1e-3
        np.testing.assert_allclose(layer.weight.grad, g_w, rtol=0, atol=1e-12)
        np.testing.assert_allclose(layer.bias.grad, g_v, rtol=0, atol=1e-12)


def test_classes_with_other_numbers_get_the_same_credits() -> None:
    torch.manual_seed(0)
    network, (p, y), order = random_network(layers=2), predictions(5), torch.tensor([3, 0, 4, 1, 2])
    feedback = network.feedback(5, [6, 4], like=p)
    renamed = feedback._replace(matrices=[matrix[order] for matrix in feedback.matrices])
    *hidden, output = network.credits(network(p, y), [6, 4], feedback)
    *others, moved = network.credits(network(p[:, order], y[:, order]), [6, 4], renamed)
    assert (moved - output[:, order]).abs().max() < 1e-14
    for one, other in zip(hidden, others, strict=True):
        assert (one - other).abs().max() < 1e-13
        assert one.abs().max() > 0.1


def test_a_right_prediction_and_a_class_that_is_ruled_out_get_no_credit() -> None:
    network = random_network()
    y = F.one_hot(torch.arange(4), 4).double()
    assert not network(y, y).any()
    p = torch.tensor([[0.3, 0.7, 0.0, 0.0]], dtype=torch.double)
    z = network(p, y[:1])
    assert not z[..., 2:].any()
    assert z[..., :2].abs().min() > 1e-3


@pytest.mark.parametrize("classes", [2, 3, 17])
def test_the_same_network_serves_any_number_of_classes(classes: int) -> None:
    torch.manual_seed(0)
    model, teacher = perceptron((6, 5, 4, classes)), random_network()
    found = learned(Rule(model, teacher=teacher), *batch(classes, 34))
    assert all(bool(gradient.any()) for gradient in found.values())


def as_alignment(rule: Rule, other: apical.DirectFeedbackAlignment, x: Tensor, y: Tensor) -> None:
    """Give direct feedback alignment the matrices of the rule."""
    rule(x, y)
    other(x, y)
    feedback = matrices_of(rule)
    if feedback.shared is not None:
        assert other.projection is not None
        other.projection.copy_(feedback.shared)
    for unit, matrix in zip(rule.hidden_units(x), feedback.matrices, strict=True):
        other.set_feedback(unit, matrix)


def test_where_the_network_sends_the_error_it_is_direct_feedback_alignment() -> None:
    torch.manual_seed(0)
    model, (x, y) = perceptron(), batch()
    rule, other = Rule(model, teacher=wired(EquivariantNetwork(hidden=0)).double()), apical.DirectFeedbackAlignment(model)
    as_alignment(rule, other, x, y)
    assert distance(learned(rule, x, y), learned(other, x, y)) < 1e-15


@pytest.mark.parametrize("vocabulary", [7, 300])
def test_so_it_is_at_tokens_also_where_many_classes_share_a_projection(vocabulary: int) -> None:
    torch.manual_seed(0)
    model = models.build("gpt-2x8", (5,), vocabulary).double()
    x, y = torch.randint(0, vocabulary, (2, 3, 5))
    y[1, 2:] = -100
    teacher = wired(EquivariantNetwork(hidden=0)).double()
    rule = Rule(model, token_cross_entropy, teacher, units="block")
    other = apical.DirectFeedbackAlignment(model, token_cross_entropy, units="block")
    as_alignment(rule, other, x, y)
    assert (matrices_of(rule).shared is None) == (vocabulary == 7)
    assert distance(learned(rule, x, y), learned(other, x, y)) < 1e-14


def test_a_wired_network_sends_nearly_the_error() -> None:
    torch.manual_seed(0)
    p, y = predictions(6, 40)
    z = wired(EquivariantNetwork(hidden=8).double())(p, y)
    assert (z - (p - y)).abs().max() < 0.05


def test_matrices_have_the_size_of_direct_feedback_alignments(monkeypatch: pytest.MonkeyPatch) -> None:
    network, like = EquivariantNetwork(layers=1), torch.zeros(1)
    plain = network.feedback(200, [90, 60], like=like)
    monkeypatch.setattr(equivariant, "MANY", 100)
    shared = network.feedback(200, [90, 60], seed=1, like=like)
    assert plain.shared is None
    assert shared.shared is not None
    for width, whole, part in zip((90, 60), plain.matrices, shared.matrices, strict=True):
        law = (2 / (200 + width)) ** 0.5  # the standard deviation of the Xavier law
        for matrix in (whole, shared.shared @ part):
            assert float(matrix.std()) == pytest.approx(law, rel=0.05)


@pytest.mark.parametrize("output", ["evolved", "error"])
def test_credits_of_many_rows_are_made_in_parts(monkeypatch: pytest.MonkeyPatch, output: Any) -> None:
    torch.manual_seed(0)
    network, (p, y) = random_network(layers=2, hidden=8, output=output), predictions(5, 11)
    y[3] = 0.0  # of no interest
    widths, together = [6, 4, 3], network.credits(network(p, y), [6, 4, 3])
    monkeypatch.setattr(equivariant, "CHUNK", 2 * 5 * 8)  # two rows at a time
    later = network.later(p, y, widths, True)
    for index in (0, 1, 2, -1):
        assert (later(index) - together[index]).abs().max() < 1e-14


def test_tokens_are_taught_one_at_a_time_and_ignored_ones_count_for_nothing() -> None:
    torch.manual_seed(0)
    model, teacher = perceptron(), random_network()
    x, y = torch.randn(4, 6, 6).double(), torch.arange(24).view(4, 6) % 3
    y[0, 2:] = -100
    rule = Rule(model, token_cross_entropy, teacher)
    tokens = learned(rule, x, y)
    assert distance(tokens, learned(rule, x.flatten(0, 1), y.flatten())) < 1e-14
    assert distance(tokens, learned(rule, x[y >= 0], y[y >= 0])) < 1e-14


def test_the_steps_of_a_recurrent_network_share_a_matrix_and_an_emission() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.act, self.head = nn.Linear(9, 3), nn.Tanh(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 3)
            for step in x.unbind(1):
                h = self.act(self.cell(torch.cat([step, h], 1)))
            return self.head(h)

    torch.manual_seed(0)
    rule = Rule(Recurrent().double(), teacher=random_network(layers=3))
    rule(torch.randn(4, 3, 6).double(), torch.arange(4) % 3).backward()
    feedback = matrices_of(rule)
    assert feedback.emissions == [1, 1, 1]
    assert all(torch.equal(feedback.matrices[0], matrix) for matrix in feedback.matrices)


def test_matrices_follow_from_the_rules_seed_which_its_state_holds() -> None:
    teacher, (x, y) = random_network(), batch()
    rules = []
    for seed in (0, 1, 2):
        torch.manual_seed(0)
        model = perceptron()
        torch.manual_seed(seed)
        rules.append(Rule(model, teacher=teacher))
    first, second, third = (learned(rule, x, y) for rule in rules)
    assert distance(first, second) > 1e-3
    rules[2].load_state_dict(rules[0].state_dict())
    assert distance(first, learned(rules[2], x, y)) == 0
    assert distance(first, third) > 1e-3
    narrow = learned(rules[0].float(), x.float(), y)
    assert distance(first, {name: g.double() for name, g in narrow.items()}) < 1e-6


def test_numbers_as_targets_and_models_without_hidden_layers_are_refused() -> None:
    teacher, (x, _) = random_network(), batch()
    with pytest.raises(UnsupportedModelError, match="the targets are numbers"):
        Rule(perceptron(), F.mse_loss, teacher)(x, torch.randn(7, 3).double())
    with pytest.raises(UnsupportedModelError, match="no hidden layer"):
        Rule(nn.Linear(6, 3).double(), teacher=teacher)(*batch())
    with pytest.raises(ConfigError, match="not probabilities"):
        Rule(perceptron(), teacher=teacher, credit="probabilities")
    for wrong in ({"layers": 0}, {"hidden": -1}, {"output": "none"}):
        with pytest.raises(ConfigError):
            EquivariantNetwork(**wrong)  # type: ignore[arg-type]


def test_a_teacher_for_ten_classes_names_the_one_for_any_number() -> None:
    with pytest.raises(UnsupportedModelError, match="the shipped teacher 'classes'"):
        Rule(perceptron(), teacher=TopDownNetwork(10, [5, 4]).double())(*batch())
    with pytest.raises(UnsupportedModelError) as refusal:
        Rule(perceptron(), F.mse_loss, TopDownNetwork(10, [5, 4]).double())(batch()[0], torch.randn(7, 3).double())
    assert "'classes'" not in str(refusal.value)


@pytest.mark.parametrize("options", [{}, {"layers": 2, "hidden": 0}, {"hidden": 5, "output": "error"}])
def test_teacher_file_round_trip(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = random_network(**options)
    network.save(tmp_path / "teacher.pt", {"from": "a test"})
    again, provenance = load(tmp_path / "teacher.pt")
    assert provenance == {"from": "a test"}
    assert isinstance(again, EquivariantNetwork)
    assert again.sizes == network.sizes
    p, y = predictions(4)
    assert torch.equal(network(p, y), again(p, y))
    content = (tmp_path / "teacher.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    damaged = bytearray(content)
    at = content.index(network.body[-1].weight.detach().numpy().tobytes())
    damaged[at] ^= 1
    (tmp_path / "damaged.pt").write_bytes(bytes(damaged))
    for name in ("half.pt", "damaged.pt"):
        with pytest.raises(ConfigError, match="not a teacher file, or is damaged"):
            load(tmp_path / name)
