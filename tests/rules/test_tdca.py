"""Top-down credit assignment against its equations, its limit, and what the specification says follows from them."""

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
from apical.rules.top_down.hand_built import HandBuiltTeacher, MixedTeacher, ShuffledTeacher, wired
from apical.rules.top_down.teacher import Place, TopDownNetwork, diffusion, load, parameters_of
from apical.testing import dense_network, residual_network

Rule = apical.TopDownCreditAssignment


def perceptron(sizes: tuple[int, ...] = (6, 5, 4, 3)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1])).double()


def batch(size: int = 7, features: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(size, features, dtype=torch.double, generator=draw), torch.arange(size) % classes


def arrays(module: nn.Module) -> list[tuple[Any, Any]]:
    """Weights and biases; no bias is one of zero."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return [(m.weight.detach().numpy(), 0.0 if m.bias is None else m.bias.detach().numpy()) for m in layers]


class Recorded(nn.Module):
    """Hands out credits that are known beforehand."""

    def __init__(self, credits: list[Tensor]) -> None:
        super().__init__()
        self.credits = credits

    def forward(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        return self.credits


@pytest.mark.parametrize("sites", [None, 1, 3])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("place", ["logits", "probabilities"])
def test_equals_the_equations_one_example_at_a_time(sites: int | None, relative: bool, place: Place) -> None:
    torch.manual_seed(0)
    model, teacher = perceptron(), TopDownNetwork(3, [5, 4], 8, sites, relative, place).double()
    nn.init.normal_(teacher.body[0].bias)
    x, y = batch()
    Rule(model, teacher=teacher)(x, y).backward()
    given = (arrays(model), arrays(teacher.body), x.numpy(), y.numpy(), sites)
    expected = reference.pseudo_gradients(*given, relative, place)
    for layer, (g_w, g_v) in zip([m for m in model if isinstance(m, nn.Linear)], expected, strict=True):
        np.testing.assert_allclose(layer.weight.grad, g_w, rtol=0, atol=1e-14)
        np.testing.assert_allclose(layer.bias.grad, g_v, rtol=0, atol=1e-14)


def test_by_default_credit_stands_on_the_logits_and_the_two_places_differ() -> None:
    """By the softmax's Jacobian, which a confident and wrong learner all but nulls."""
    credit = torch.randn(7, 3, dtype=torch.double)
    nothing = [torch.zeros(7, 5, dtype=torch.double), torch.zeros(7, 4, dtype=torch.double)]
    found: dict[Any, Tensor] = {}
    for place in (None, "logits", "probabilities"):
        torch.manual_seed(0)
        model, (x, y) = perceptron(), batch()
        with torch.no_grad():
            model[4].bias.copy_(torch.tensor([30.0, 0.0, 0.0]))  # sure of the first class
        Rule(model, teacher=Recorded([*nothing, credit]), credit=place)(x, y).backward()
        found[place] = model[4].weight.grad
    assert torch.equal(found[None], found["logits"])
    assert found["logits"].abs().max() > 0.01
    assert found["probabilities"].abs().max() < 1e-10


def test_the_error_as_credit_on_the_logits_is_backpropagations_last_layer() -> None:
    for hidden in ("silent", "random"):
        torch.manual_seed(0)
        model, (x, y) = perceptron(), batch()
        loss = F.cross_entropy(model(x), y)
        exact = torch.autograd.grad(loss, list(model.parameters()))
        Rule(model, teacher=HandBuiltTeacher(3, [5, 4], hidden))(x, y).backward()
        for parameter, gradient in zip(model[4].parameters(), exact[4:], strict=True):
            assert (parameter.grad - gradient).abs().max() < 1e-15
        assert all(bool(p.grad.any()) == (hidden == "random") for p in [*model[0].parameters(), *model[2].parameters()])


def test_hand_built_hidden_credit_is_fixed_random_feedback_of_the_error() -> None:
    teacher = HandBuiltTeacher(3, [5, 4], "random", sites=2, seed=1)
    draw = torch.Generator().manual_seed(1)
    p, y = torch.softmax(torch.randn(7, 3), 1), torch.eye(3)[torch.arange(7) % 3]
    credits = teacher(p, y)
    for credit, n in zip(credits[:2], (5, 4), strict=True):
        feedback = torch.from_numpy(reference.kernel(n, 2)).float() @ torch.randn(2, 3, generator=draw)
        assert (credit - (p - y) @ feedback.T / n**0.5).abs().max() < 1e-6
    assert torch.equal(credits[2], p - y)
    with pytest.raises(ConfigError, match='"silent" or "random"'):
        HandBuiltTeacher(3, [5], "loud")  # type: ignore[arg-type]


def test_shuffled_credits_are_those_of_other_examples() -> None:
    torch.manual_seed(0)
    network = TopDownNetwork(3, [5, 4], hidden=8)
    p, y = torch.softmax(torch.randn(7, 3), 1), torch.eye(3)[torch.arange(7) % 3]
    found = ShuffledTeacher(network, [5, 4])(p, y)
    for credit, whole in zip(found, network.credits(network(p, y), [5, 4]), strict=True):
        assert torch.equal(credit, whole[[6, 0, 1, 2, 3, 4, 5]])


def test_half_of_a_teacher_is_kept_and_the_rest_hand_built() -> None:
    torch.manual_seed(0)
    network = TopDownNetwork(3, [5, 4], hidden=8)
    p, y = torch.softmax(torch.randn(7, 3), 1), torch.eye(3)[torch.arange(7) % 3]
    own, built = network.credits(network(p, y), [5, 4]), HandBuiltTeacher(3, [5, 4], "random", seed=2)(p, y)
    for keep, wanted in (("hidden", [*own[:2], p - y]), ("output", [*built[:2], own[2]])):
        credits = MixedTeacher(network, [5, 4], keep, seed=2)(p, y)  # type: ignore[arg-type]
        assert all(torch.equal(one, other) for one, other in zip(credits, wanted, strict=True))


def token_loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


@pytest.mark.parametrize(("sites", "projected"), [(None, None), (2, None), (2, 2)])
def test_the_outputs_credit_may_be_the_error(sites: int | None, projected: int | None, tmp_path: Path) -> None:
    """On logits p - y is backpropagation's, at one place and at many; hidden credit stays the network's."""
    torch.manual_seed(0)
    sizes: Any = {"hidden": 8, "sites": sites, "relative": True, "projected": projected}
    network = TopDownNetwork(3, [5, 4], **sizes, output="error").double()
    evolved = TopDownNetwork(3, [5, 4], **sizes).double()
    weights = {name: weight for name, weight in network.state_dict().items() if name != "body.4.weight"}
    evolved.load_state_dict({**evolved.state_dict(), **weights})
    with torch.no_grad():
        evolved.body[-1].weight[: sum(network.emissions)] = network.body[-1].weight  # type: ignore[operator]
    network.save(tmp_path / "teacher.pt")
    for shape in ((), (6,)):  # many places make each unit's credit when it is asked for
        x, y = torch.randn(7, *shape, 6).double(), torch.randint(3, (7, *shape))
        start = perceptron().state_dict()
        models = [perceptron() for _ in range(3)]
        for model in models:
            model.load_state_dict(start)
        apical.Backprop(models[0], token_loss)(x, y).backward()
        Rule(models[1], token_loss, evolved)(x, y).backward()
        Rule(models[2], token_loss, load(tmp_path / "teacher.pt")[0])(x, y).backward()
        for number, (bp, own, error) in enumerate(zip(*(model.parameters() for model in models), strict=True)):
            wanted = own if number < 4 else bp
            assert (error.grad - wanted.grad).abs().max() < 1e-12  # type: ignore[operator]
    for wrong in ({"output": "none"}, {"output": "error", "credit": "probabilities"}):
        with pytest.raises(ConfigError, match="output must be"):
            TopDownNetwork(3, [5], **wrong)  # type: ignore[arg-type]


def test_a_wired_network_hands_out_nearly_the_error_and_random_feedback_of_it() -> None:
    torch.manual_seed(0)
    network = wired(TopDownNetwork(3, [6, 6], 8, sites=4, relative=True, shallower=True), seed=1)
    p, y = torch.softmax(3 * torch.randn(50, 3), 1), torch.eye(3)[torch.arange(50) % 3]
    *hidden, output = network.credits(network(p, y), [6, 6])
    assert (output - (p - y)).abs().max() < 0.05
    feedback = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for credit, sites in zip(hidden, feedback.split(4), strict=True):
        exact = (p - y) @ (diffusion(6, 4).float() @ sites).T / 6**0.5
        assert torch.cosine_similarity(credit.flatten(), exact.flatten(), 0) > 0.99
        assert (credit - exact).abs().max() < 0.05
    for unfit in (TopDownNetwork(3, [6], 8), TopDownNetwork(3, [6], 2, relative=True)):
        with pytest.raises(ConfigError, match="hand-wired"):
            wired(unfit)


def exact_credits(
    model: nn.Module, x: Tensor, y: Tensor, place: Place = "probabilities"
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """`B dL/da` of every activation in the order of execution and of the probabilities or logits, and BP's gradients."""
    seen: list[Tensor] = []
    kinds = (nn.ReLU, nn.Tanh)
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(o)) for m in model.modules() if isinstance(m, kinds)]
    logits = model(x)
    p = torch.softmax(logits, 1)
    for hook in hooks:
        hook.remove()
    loss = -p[torch.arange(len(y)), y].log().mean()
    parameters = dict(model.named_parameters())
    output = logits if place == "logits" else p
    found = torch.autograd.grad(loss, [*seen, output, *parameters.values()])
    credits = [len(y) * g for g in found[: len(seen) + 1]]
    return credits, dict(zip(parameters, found[len(seen) + 1 :], strict=True))


@pytest.mark.parametrize("kind", ["dense", "residual", "lenet", "mlp-residual"])
@pytest.mark.parametrize("place", ["logits", "probabilities"])
def test_with_the_signals_of_backpropagation_it_is_backpropagation(kind: str, place: Place) -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    model, shape = {
        "dense": lambda: (dense_network(), (6,)),
        "residual": lambda: (residual_network(), (2, 8, 8)),
        "lenet": lambda: (models.build("lenet", (1, 28, 28), 4).double(), (1, 28, 28)),
        "mlp-residual": lambda: (models.build("mlp-residual-6-6-6", (5,), 4).double(), (5,)),
    }[kind]()
    x, y = torch.randn(6, *shape, dtype=torch.double, generator=draw), torch.arange(6) % 4
    credits, gradients = exact_credits(model, x, y, place)
    Rule(model, teacher=Recorded(credits), credit=place)(x, y).backward()
    for name, parameter in model.named_parameters():
        scale = max(1.0, float(gradients[name].abs().max()))
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-12 * scale, name


def test_update_is_the_gradient_of_credit_times_activity_with_the_input_held() -> None:
    torch.manual_seed(0)
    model, teacher = perceptron(), TopDownNetwork(3, [5, 4], hidden=8).double()
    x, y = batch()
    rule = Rule(model, teacher=teacher)
    rule(x, y).backward()
    with torch.no_grad():
        below = model[1](model[0](x))
        p = torch.softmax(model(x), 1)
        credit = teacher.credits(teacher(p, F.one_hot(y, 3).double()), [5, 4])[1]

        def value() -> float:
            return float((credit * model[3](model[2](below))).sum() / len(x))

        for index in [(0, 0), (1, 4), (3, 2)]:
            step, weight = 1e-6, model[2].weight
            weight[index] += step
            up = value()
            weight[index] -= 2 * step
            slope = (up - value()) / (2 * step)
            weight[index] += step
            assert abs(slope - weight.grad[index]) < 1e-8


def test_a_layers_update_depends_on_the_weights_above_only_through_the_prediction() -> None:
    torch.manual_seed(0)
    model, teacher = perceptron(), TopDownNetwork(3, [5, 4], hidden=8).double()
    x, y = batch()
    rule = Rule(model, teacher=teacher)
    rule(x, y).backward()
    kept = model[0].weight.grad.clone()
    p = torch.softmax(model(x), 1).detach()
    above = [w.detach().clone() for w in model[2].parameters()]
    signals = rule.signals
    for held in (True, False):
        model.zero_grad()
        with torch.no_grad():
            for w, old in zip(model[2].parameters(), above, strict=True):
                w.copy_(old + 0.5)
        if held:
            rule.signals = lambda prediction, *rest, **named: signals(p, *rest, **named)
        rule(x, y).backward()
        if held:
            assert torch.equal(model[0].weight.grad, kept)
            rule.signals = signals
    assert not torch.equal(model[0].weight.grad, kept)  # with a prediction of its own, it does change


def test_a_constant_added_to_all_credits_on_probabilities_changes_nothing() -> None:
    torch.manual_seed(0)
    model, teacher = perceptron(), TopDownNetwork(3, [5, 4], hidden=8, credit="probabilities").double()
    x, y = batch()
    rule = Rule(model, teacher=teacher)
    rule(x, y).backward()
    kept = model[4].weight.grad.clone()
    model.zero_grad()
    with torch.no_grad():
        teacher.body[4].bias[-3:] += 7.0
    rule(x, y).backward()
    assert (model[4].weight.grad - kept).abs().max() < 1e-14
    assert kept.abs().max() > 1e-3


def test_from_zero_weights_backpropagation_is_stuck_and_credit_is_not() -> None:
    torch.manual_seed(0)
    x, y = batch()
    moved = {}
    for name in ("bp", "tdca"):
        model = perceptron()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        teacher = TopDownNetwork(3, [5, 4], hidden=8).double()
        rule = apical.Backprop(model) if name == "bp" else Rule(model, teacher=teacher)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            rule(x, y).backward()
            optimizer.step()
        moved[name] = [float(layer.weight.detach().abs().max()) for layer in model if isinstance(layer, nn.Linear)]
    assert moved["bp"] == [0.0, 0.0, 0.0]
    assert min(moved["tdca"]) > 1e-6


def test_numbers_as_targets_pass_no_softmax() -> None:
    torch.manual_seed(0)
    model = perceptron()
    x, _ = batch()
    y = torch.randn(7, 3, dtype=torch.double)
    output = model(x)
    output.retain_grad()
    F.mse_loss(output, y).backward()
    exact = [p.grad.clone() for p in model[4].parameters()]
    credit = len(x) * output.grad
    model.zero_grad()
    silent = [torch.zeros(7, 5, dtype=torch.double), torch.zeros(7, 4, dtype=torch.double)]
    Rule(model, F.mse_loss, teacher=Recorded([*silent, credit]))(x, y).backward()
    for parameter, wanted in zip(model[4].parameters(), exact, strict=True):
        assert (parameter.grad - wanted).abs().max() < 1e-14
    assert model[0].weight.grad.abs().max() == 0


def test_credit_of_a_channel_is_that_of_its_mean_activity() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 2)).double()
    x, y = torch.randn(5, 1, 6, 6, dtype=torch.double), torch.arange(5) % 2
    credit = torch.randn(5, 3, dtype=torch.double)
    Rule(model, teacher=Recorded([credit, torch.zeros(5, 2, dtype=torch.double)]))(x, y).backward()
    got = model[0].weight.grad.clone()
    model.zero_grad()
    (model[1](model[0](x)).mean((2, 3)) * credit).sum().div(5).backward()
    assert (got - model[0].weight.grad).abs().max() < 1e-14


@pytest.mark.parametrize(("units", "sites"), [(10, 3), (5, 5), (3, 8)])
def test_diffusion_kernel(units: int, sites: int) -> None:
    np.testing.assert_allclose(diffusion(units, sites), reference.kernel(units, sites), rtol=0, atol=1e-15)
    assert (diffusion(units, sites).sum(1) - 1).abs().max() < 1e-15


def test_as_many_narrow_sites_as_units_do_not_diffuse() -> None:
    assert (diffusion(6, 6, tau=1e-3) - torch.eye(6)).abs().max() < 1e-12


@pytest.mark.parametrize(("sites", "count"), [(None, 11_170), (10, 2_800), (1, 1_963)])
def test_parameter_counts_of_the_specification(sites: int | None, count: int) -> None:
    network = TopDownNetwork(10, [100, 100, 100], 30, sites)
    assert sum(p.numel() for p in network.parameters()) == count == parameters_of(10, [100, 100, 100], 30, sites)


@pytest.mark.parametrize("sites", [None, 2])
def test_relative_credit_is_that_of_the_prediction_minus_that_of_a_right_one(sites: int | None) -> None:
    torch.manual_seed(0)
    relative, plain = (TopDownNetwork(3, [5, 4], 8, sites, relative=is_so).double() for is_so in (True, False))
    plain.load_state_dict({**relative.state_dict(), "body.4.bias": torch.randn(plain.body[-1].out_features)})
    p = torch.softmax(torch.randn(7, 3, dtype=torch.double), 1)
    y = torch.eye(3, dtype=torch.double)[torch.arange(7) % 3]
    got = relative.credits(relative(p, y), [5, 4])
    ours, right = plain.credits(plain(p, y), [5, 4]), plain.credits(plain(y, y), [5, 4])
    for credit, a, b, n in zip(got, ours, right, (5, 4, 1), strict=True):
        assert (credit - (a - b) / n**0.5).abs().max() < 1e-12
    assert not any(bool(credit.any()) for credit in relative.credits(relative(y, y), [5, 4]))  # right: left alone
    count = sum(parameter.numel() for parameter in relative.parameters())
    assert count == parameters_of(3, [5, 4], 8, sites, relative=True) < parameters_of(3, [5, 4], 8, sites)


def test_a_file_says_what_its_credit_is(tmp_path: Path) -> None:
    for relative, place, shallower in ((True, "logits", True), (False, "probabilities", False)):
        TopDownNetwork(3, [5], 8, 2, relative, place, shallower).save(tmp_path / "teacher.pt")
        network = load(tmp_path / "teacher.pt")[0]
        assert (network.relative, network.credit, network.shallower) == (relative, place, shallower)
        assert Rule(perceptron((6, 5, 3)), teacher=network).credit == place


def test_a_file_of_the_older_format_means_probabilities_and_credit_over_n(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = TopDownNetwork(3, [5], 8, relative=True)
    network.save(tmp_path / "teacher.pt")
    content = torch.load(tmp_path / "teacher.pt")
    for name in ("credit", "share", "shallower"):
        del content[name]
    torch.save({**content, "format": "apical-teacher-1"}, tmp_path / "older.pt")
    older = load(tmp_path / "older.pt")[0]
    assert (older.credit, older.relative, older.shallower) == ("probabilities", True, False)
    older.save(tmp_path / "again.pt")  # in the newer format, and no different
    p, y = torch.softmax(torch.randn(7, 3), 1), torch.eye(3)[torch.arange(7) % 3]
    for one in (older, load(tmp_path / "again.pt")[0]):
        found, newer = one.credits(one(p, y), [5]), network.credits(network(p, y), [5])
        assert (found[0] * 5 - newer[0] * 5**0.5).abs().max() < 1e-6
        assert one.credit == "probabilities"


def test_another_place_of_credit_than_the_teachers_is_refused() -> None:
    with pytest.raises(ConfigError, match="uses logits, not probabilities"):
        Rule(perceptron(), teacher=TopDownNetwork(3, [5, 4]), credit="probabilities")
    for make in (lambda: Rule(perceptron(), credit="loss"), lambda: TopDownNetwork(3, [5], credit="loss")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match='"logits" or "probabilities"'):
            make()


@pytest.mark.parametrize("widths", [(9,), (7, 9), (8, 7, 9)])
def test_layers_of_a_shallower_learner_are_counted_from_the_output(widths: tuple[int, ...]) -> None:
    """Its layers take the emissions that the topmost layers of the deepest take."""
    torch.manual_seed(0)
    teacher = TopDownNetwork(3, [5, 5, 5], 8, sites=2, relative=True, shallower=True).double()
    model, (x, y) = perceptron((6, *widths, 3)), batch()
    Rule(model, teacher=teacher)(x, y).backward()
    expected = reference.pseudo_gradients(arrays(model), arrays(teacher.body), x.numpy(), y.numpy(), 2, relative=True)
    for layer, (g_w, g_v) in zip([m for m in model if isinstance(m, nn.Linear)], expected, strict=True):
        np.testing.assert_allclose(layer.weight.grad, g_w, rtol=0, atol=1e-14)
        np.testing.assert_allclose(layer.bias.grad, g_v, rtol=0, atol=1e-14)


def test_a_deeper_learner_or_one_without_hidden_layers_is_refused() -> None:
    teacher = TopDownNetwork(3, [5, 5], 8, sites=2, shallower=True).double()
    for sizes in ((6, 5, 5, 5, 3), (6, 3)):
        with pytest.raises(UnsupportedModelError, match="1 to 2 hidden layers and 3 outputs"):
            Rule(perceptron(sizes), teacher=teacher)(*batch())
    with pytest.raises(ConfigError, match="emission sites"):
        TopDownNetwork(3, [5], shallower=True)


def test_only_the_model_learns() -> None:
    rule = Rule(perceptron(), teacher=TopDownNetwork(3, [5, 4], hidden=8).double())
    assert [name for name, p in rule.named_parameters() if p.requires_grad and not name.startswith("model.")] == []


def test_silent_teaches_the_last_layer_alone() -> None:
    model = perceptron()
    Rule(model, teacher=TopDownNetwork(3, [5, 4], hidden=8).double(), silent=True)(*batch()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["4.weight", "4.bias"]


def test_teacher_file_round_trip_and_another_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = TopDownNetwork(3, [5, 4], hidden=8, sites=2)
    teacher.save(tmp_path / "teacher.pt", {"from": "a test"})
    again, provenance = load(tmp_path / "teacher.pt")
    assert provenance == {"from": "a test"}
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), again.parameters(), strict=True))
    wide = perceptron((6, 50, 40, 3)).float()
    x, y = batch()
    Rule(wide, teacher=tmp_path / "teacher.pt")(x.float(), y).backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in wide.parameters())


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (TopDownNetwork(3, [5], hidden=8), "1 hidden layer and 3 outputs"),
        (TopDownNetwork(4, [5, 4], hidden=8), "2 hidden layers and 4 outputs"),
        (TopDownNetwork(3, [5, 9], hidden=8), "only one with diffusion"),
    ],
)
def test_a_teacher_made_for_another_network_is_refused(teacher: TopDownNetwork, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        Rule(perceptron(), teacher=teacher)(*batch())


@pytest.mark.parametrize("content", [b"", b"not a teacher", None])
def test_a_damaged_or_missing_teacher_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "teacher.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="teacher"):
        Rule(perceptron(), teacher=path)


def test_a_checkpoint_is_no_teacher(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="not a teacher file"):
        Rule(perceptron(), teacher=tmp_path / "other.pt")


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="positive sizes"):
        TopDownNetwork(3, [5, 0])
    with pytest.raises(ConfigError, match="positive sizes"):
        TopDownNetwork(3, [5], sites=0)


def test_numbers_for_one_output_may_lack_its_axis() -> None:
    results = []
    for shape in ((7,), (7, 1)):
        torch.manual_seed(0)
        model = perceptron((6, 5, 4, 1))
        x, _ = batch()
        Rule(model, lambda o, t: F.mse_loss(o, t.view(7, 1)))(x, torch.arange(7.0).double().view(shape)).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("targets", [torch.randn(7, 2), torch.zeros(7, 3, dtype=torch.long), torch.randn(3, 7)])
def test_targets_that_do_not_fit_are_refused(targets: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"do not fit outputs of shape \(7, 3\)"):
        Rule(perceptron(), lambda o, t: o.sum())(batch()[0], targets)
    with pytest.raises(ConfigError, match="at least two classes"):
        Rule(perceptron((6, 5, 1)), lambda o, t: o.sum())(batch()[0], torch.zeros(7, dtype=torch.long))


def test_ignored_labels_count_for_nothing() -> None:
    """The update is that of the batch without them."""
    torch.manual_seed(0)
    model, teacher = perceptron(), TopDownNetwork(3, [5, 4], hidden=8).double()
    rule, (x, y) = Rule(model, teacher=teacher), batch()
    y[2] = y[5] = -100
    rule(x, y).backward()
    ignoring = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    rule(x[y >= 0], y[y >= 0]).backward()
    for parameter, value in zip(model.parameters(), ignoring, strict=True):
        assert (parameter.grad - value).abs().max() < 1e-15


def test_tokens_are_taught_one_at_a_time() -> None:
    """A network without mixing: (batch, places) tokens learn as batch * places samples."""
    torch.manual_seed(0)
    model, teacher = perceptron(), TopDownNetwork(3, [5, 4], hidden=8).double()
    rule = Rule(model, lambda o, t: F.cross_entropy(o.flatten(0, -2), t.flatten()), teacher=teacher)
    x, y = torch.randn(4, 6, 6).double(), torch.arange(24).view(4, 6) % 3
    results = []
    for inputs, targets in ((x, y), (x.flatten(0, 1), y.flatten())):
        rule(inputs, targets).backward()
        results.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-15


def test_credits_of_backpropagation_at_functions_are_backpropagation() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.b(x.new_ones(()) * F.relu(self.a(x)))))

    torch.manual_seed(0)
    model, (x, y) = Functional().double(), batch()
    h = [F.relu(model.a(x))]
    h.append(torch.tanh(model.b(h[0])))
    logits = model.c(h[1])
    exact = torch.autograd.grad(F.cross_entropy(logits, y), [*h, logits, *model.parameters()])
    Rule(model, teacher=Recorded([7 * g for g in exact[:3]]))(x, y).backward()
    for parameter, gradient in zip(model.parameters(), exact[3:], strict=True):
        assert (parameter.grad - gradient).abs().max() < 1e-14


def test_an_unevolved_teacher_moves_with_the_rule_after_its_first_batch() -> None:
    rule = apical.TopDownCreditAssignment(dense_network())
    inputs, targets = torch.rand(8, 6, dtype=torch.double), torch.arange(8) % 4
    rule(inputs, targets).backward()
    exact = rule.model[0].weight.grad.clone()
    rule.zero_grad()
    rule.float()(inputs.float(), targets).backward()
    torch.testing.assert_close(rule.model[0].weight.grad, exact.float(), rtol=1e-4, atol=1e-6)
