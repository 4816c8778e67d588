"""Counter-current learning: its closed-form updates, their locality, what may be left out, its read-outs and errors."""

from itertools import pairwise

import ccl_reference as ref
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apical import CounterCurrentLearning, data
from apical.errors import ConfigError
from apical.rules.counter_current import pairing

SIZES = (5, 7, 6, 8, 3)
ACTIVATIONS = {"elu": (nn.ELU, ref.ELU), "relu": (nn.ReLU, ref.RELU), "tanh": (nn.Tanh, ref.TANH)}
PAIRS = {
    "inner": {"pair": "inner"},
    "inner, scale": {"pair": "inner", "scale": 0.3},
    "cosine": {"pair": "cosine"},
    "cosine, spread": {"pair": "cosine", "scale": 0.7, "spread": 0.4},
}
DEFAULT_SCALE = {"inner": 0.5, "cosine": 1.0}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)  # no code of a ReLU network is silent everywhere: its length would have no derivative


def network(activation: type[nn.Module] = nn.ELU, bias: bool = True, sizes: tuple[int, ...] = SIZES) -> nn.Sequential:
    modules: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        modules += [nn.Linear(fan_in, fan_out, bias=bias), activation()]
    return nn.Sequential(*modules[:-1]).double()


def batch(seed: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, SIZES[0], dtype=torch.double, generator=generator)
    return inputs, torch.randint(SIZES[-1], (size,), generator=generator)


def slow(rule: CounterCurrentLearning, phi: ref.Activation) -> ref.Networks:
    """Copies of all weights, as leaves."""
    layers = [module for module in rule.model.modules() if isinstance(module, nn.Linear)]
    v = [module[0].weight.detach().clone().requires_grad_() for module in reversed(rule.feedback)]
    return ref.Networks(
        [layer.weight.detach().clone().requires_grad_() for layer in layers],
        [None if layer.bias is None else layer.bias.detach().clone().requires_grad_() for layer in layers],
        [*[None] * (len(layers) - len(v)), *v],
        phi,
    )


def gradients(rule: CounterCurrentLearning) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("input_pair", [False, True], ids=["no input pair", "input pair"])
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_summed_local_losses(
    options: dict[str, object], input_pair: bool, bias: bool, activation: str
) -> None:
    module, phi = ACTIVATIONS[activation]
    rule = CounterCurrentLearning(network(module, bias), input_pair=input_pair, **options)
    assert len(rule.feedback) == len(SIZES) - 1 - (not input_pair)
    nets, (inputs, labels) = slow(rule, phi), batch()
    scale = options.get("scale", DEFAULT_SCALE[str(options["pair"])])
    losses = ref.local_losses(nets, inputs, labels, str(options["pair"]), scale, options.get("spread", 0.0))
    torch.stack(losses).sum().backward()
    credit = rule(inputs, labels)
    credit.backward()
    layers = [m for m in rule.model.modules() if isinstance(m, nn.Linear)]
    compared = list(zip([layer.weight for layer in layers], nets.u, strict=True))
    compared += list(zip([layer.bias for layer in layers], nets.c, strict=True)) if bias else []
    back = [module[0] for module in reversed(rule.feedback)]
    compared += list(zip([layer.weight for layer in back], nets.v[len(layers) - len(back) :], strict=True))
    for found, wanted in compared:
        assert wanted.grad.abs().max() > 1e-4  # a gradient that is zero would show nothing
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(credit.loss, losses[-1].detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(credit.logs["local"], torch.stack(losses[:-1]).sum().detach(), rtol=1e-10, atol=0)


def test_an_activation_behind_the_output_concerns_the_last_layer_alone() -> None:
    model = network()
    rules = [CounterCurrentLearning(net, input_pair=True) for net in (model, nn.Sequential(*model, nn.Tanh()))]
    rules[1].load_state_dict(rules[0].state_dict())
    inputs, labels = batch()
    found = []
    for rule in rules:
        rule(inputs, labels).backward()
        found.append(gradients(rule))
        rule.zero_grad()
    last = {"model.6.weight", "model.6.bias"}
    assert {name for name in found[0] if not torch.equal(found[0][name], found[1][name])} == last
    F.cross_entropy(torch.tanh(model(inputs)), labels).backward()
    torch.testing.assert_close(found[1]["model.6.weight"], model[6].weight.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found[1]["model.6.bias"], model[6].bias.grad, rtol=1e-10, atol=1e-14)


def test_lengths_of_any_size_have_exact_gradients() -> None:
    """Rows as short as the constant that is added to their length, where leaving it out would show."""
    a = torch.randn(4, 5, dtype=torch.double) * torch.tensor([[1e-9], [1e-8], [1e-4], [1.0]], dtype=torch.double)
    b, labels = torch.randn(3, 5, dtype=torch.double), torch.tensor([0, 2, 1, 1])
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    ref.pair_loss(leaves[0], leaves[1], labels, "cosine", 1.0, 0.5).backward()
    members = F.one_hot(labels, 3).double()
    for found, leaf in zip(pairing.cosine(a, b, members, 1.0, 0.5)[1:], leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=0)


def test_silent_samples_have_finite_gradients() -> None:
    a, b = torch.zeros(2, 5), torch.randn(3, 5)
    members = F.one_hot(torch.tensor([0, 1]), 3).float()
    for spread in (0.0, 0.5):
        for result in pairing.cosine(a, b, members, 1.0, spread):
            assert result.isfinite().all()
    for result in pairing.match(torch.zeros(2, 3, 2, 2), torch.randn(2, 3, 2, 2), 1.0):
        assert result.isfinite().all()


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_update_needs_no_weight_above_its_own(options: dict[str, object], depth: int) -> None:
    """Of F every weight above U_depth is drawn anew, of G every one below V_{depth + 1}: both updates stay to the bit."""
    rule = CounterCurrentLearning(network(bias=False), input_pair=True, **options)
    inputs, labels = batch()
    rule(inputs, labels).backward()
    before = gradients(rule)
    rule.zero_grad()
    layers, back = [rule.model[i] for i in (0, 2, 4, 6)], [module[0] for module in reversed(rule.feedback)]
    with torch.no_grad():
        for layer in layers[depth:] + back[:depth]:
            layer.weight.normal_()
    rule(inputs, labels).backward()
    after = gradients(rule)
    own = {f"model.{2 * (depth - 1)}.weight", f"feedback.{len(back) - 1 - depth}.0.weight"}
    assert all(torch.equal(before[name], after[name]) for name in own)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert f"model.{2 * depth}.weight" in changed
    assert f"feedback.{len(back) - depth}.0.weight" in changed


def test_weights_above_and_below_reach_an_update_through_its_activities_alone() -> None:
    """In a real pass U_3, U_4 and V_2 are new. The activities at U_2 and V_3 come from U_1, U_2, V_3 and V_4."""
    rule = CounterCurrentLearning(network(bias=False))
    inputs, labels = batch()
    rule(inputs, labels).backward()
    before = gradients(rule)
    rule.zero_grad()
    with torch.no_grad():
        for weight in (rule.model[4].weight, rule.model[6].weight, rule.feedback[2][0].weight):
            weight.normal_()
    rule(inputs, labels).backward()
    after = gradients(rule)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    last_two = {"feedback.0.0.weight", "feedback.2.0.weight"}  # V_4 meets a_3, V_2 meets a_1 with new codes
    assert changed == {"model.0.weight", "model.4.weight", "model.6.weight", *last_two}


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS)
def test_nothing_but_itself_depends_on_the_input_pair(options: dict[str, object]) -> None:
    rules = []
    for input_pair in (True, False):
        torch.manual_seed(0)
        rules.append(CounterCurrentLearning(network(), input_pair=input_pair, **options))
    whole, lean = rules
    lean.feedback.load_state_dict({k: v for k, v in whole.feedback.state_dict().items() if not k.startswith("3.")})
    initial = [weight.detach().clone() for weight in whole.parameters()]
    optimizers = [torch.optim.SGD(rule.parameters(), lr=0.005, momentum=0.9) for rule in rules]
    for step in range(20):
        for rule, optimizer in zip(rules, optimizers, strict=True):
            optimizer.zero_grad()
            rule(*batch(step)).backward()
        for ours, theirs in zip([*lean.model.parameters(), *lean.feedback.parameters()], shared(whole), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        for optimizer in optimizers:
            optimizer.step()
    moved = [(now - then).abs().max() for now, then in zip(whole.parameters(), initial, strict=True)]
    assert 1e-3 < min(moved) < max(moved) < 10
    for ours, theirs in zip([*lean.model.parameters(), *lean.feedback.parameters()], shared(whole), strict=True):
        assert torch.equal(ours, theirs)


def shared(whole: CounterCurrentLearning) -> list[nn.Parameter]:
    """All parameters but V_1."""
    return [*whole.model.parameters(), *whole.feedback[:-1].parameters()]


@pytest.mark.parametrize("pair", ["inner", "cosine"])
@pytest.mark.parametrize("input_pair", [False, True])
def test_every_depth_predicts_the_nearest_code(pair: str, input_pair: bool) -> None:
    rule = CounterCurrentLearning(network(), pair=pair, input_pair=input_pair)
    with torch.no_grad():
        rule.feedback[0][0].weight.mul_(
            torch.tensor([0.5, 1.0, 1.5])
        )  # codes of unequal length, so that the two read-outs differ
    nets, (inputs, _) = slow(rule, ref.ELU), batch(size=40)
    differ = []
    for depth in range(0 if input_pair else 1, 4):
        assert rule.predict(inputs, depth).tolist() == ref.read_out(nets, inputs, depth, pair == "cosine")
        differ.append(ref.read_out(nets, inputs, depth, True) != ref.read_out(nets, inputs, depth, False))
    assert any(differ)
    own = rule.model(inputs).argmax(1)
    assert torch.equal(rule.predict(inputs), own)
    assert torch.equal(rule.predict(inputs, 4), own)
    outs = rule.read_outs(inputs)
    assert list(outs) == ["0", "2", "4", "6"]
    assert all(torch.equal(classes, rule.predict(inputs, depth)) for depth, classes in enumerate(outs.values(), start=1))


def test_depths_without_a_read_out_are_refused() -> None:
    rule = CounterCurrentLearning(network())
    for depth in (-1, 0, 5):
        with pytest.raises(ConfigError, match=f"no read-out at depth {depth}; depths with one: 1, 2, 3, 4"):
            rule.predict(batch()[0], depth)


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS)
def test_updates_are_means_over_samples_unless_samples_repel_each_other(options: dict[str, object]) -> None:
    """A batch against the mean of its halves."""
    rule = CounterCurrentLearning(network(), **options)
    inputs, labels = batch()
    rule(inputs, labels).backward()
    whole = gradients(rule)
    rule.zero_grad()
    for half in (slice(3), slice(3, 6)):
        rule(inputs[half], labels[half]).backward()
    far = max(
        float((whole[name] - both / 2).abs().max() / whole[name].abs().max()) for name, both in gradients(rule).items()
    )
    if "spread" in options:
        assert far > 1e-2
    else:
        assert far < 1e-12


def test_dense_blocks_keep_no_graph() -> None:
    """One root is the loss, which reaches the last layer alone; the others are parameters with closed forms."""
    rule = CounterCurrentLearning(network())
    names = {id(parameter): name for name, parameter in rule.named_parameters()}
    roots = rule(*batch()).roots
    [loss] = [root for root in roots if not root.is_leaf]
    assert {names[id(leaf)] for leaf in leaves(loss)} == {"model.6.weight", "model.6.bias"}
    assert {names[id(root)] for root in roots if root.is_leaf} == set(names.values()) - {"model.6.weight", "model.6.bias"}


def leaves(root: Tensor) -> list[Tensor]:
    """Parameters that a root's graph leads to."""
    found, waiting = [], [root.grad_fn]
    while waiting:
        node = waiting.pop()
        found += [node.variable] if hasattr(node, "variable") else []
        waiting += [child for child, _ in node.next_functions if child is not None]
    return found


def test_a_step_multiplies_what_the_equations_ask_for() -> None:
    """F: U_l A and Z^T A, 4 P per sample. G, without V_1: the same per class. A pair: R, R B and R^T A, 6 d K per sample."""
    rule = CounterCurrentLearning(network(bias=False))
    inputs, labels = batch()
    with FlopCounterMode(display=False) as counter:
        rule(inputs, labels).backward()
    size, classes = len(labels), SIZES[-1]
    products = [below * above for below, above in pairwise(SIZES)]
    expected = 4 * size * sum(products) + 4 * classes * sum(products[1:]) + 6 * size * classes * sum(SIZES[1:-1])
    assert counter.get_total_flops() == expected


def test_frozen_weights_get_no_gradient() -> None:
    rule = CounterCurrentLearning(network())
    rule(*batch()).backward()
    whole = gradients(rule)
    rule.zero_grad()
    frozen = {"model.2.weight", "model.2.bias", "feedback.1.0.weight"}
    for name, parameter in rule.named_parameters():
        parameter.requires_grad_(name not in frozen)
    rule(*batch()).backward()
    rest = gradients(rule)
    assert set(rest) == set(whole) - frozen
    assert all(torch.equal(rest[name], whole[name]) for name in rest)


def test_feedback_weights_stand_beside_those_they_mirror() -> None:
    rule = CounterCurrentLearning(network())
    weights = rule.feedback_weights()
    assert list(weights) == ["2", "4", "6"]
    for module, (name, weight) in zip(reversed(rule.feedback), weights.items(), strict=True):
        assert torch.equal(weight, module[0].weight.T)
        assert weight.shape == rule.model[int(name)].weight.shape
    assert list(CounterCurrentLearning(network(), input_pair=True).feedback_weights()) == ["0", "2", "4", "6"]
    assert {id(p) for p in rule.feedback_parameters()} == {id(p) for p in rule.feedback.parameters()}


def test_targets_that_are_no_labels_are_refused() -> None:
    rule = CounterCurrentLearning(network())
    inputs, labels = batch()
    for targets in (labels.double(), F.one_hot(labels, 3)):
        with pytest.raises(ConfigError, match="one class label per sample"):
            rule(inputs, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair": "outer"}, "'outer'.*inner"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"pair": "cosine", "spread": -1.0}, "spread not negative"),
        ({"pair": "cosine", "spread": float("inf")}, "spread not negative"),
        ({"spread": 0.5}, "spread is an option of pair='cosine'"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CounterCurrentLearning(network(), **options)


@pytest.mark.parametrize("pair", ["inner", "cosine"])
def test_digits_are_learned_in_five_epochs(pair: str) -> None:
    """Above what the last layer alone learns on the random features under it."""
    digits = data.load("digits")
    scores = {}
    for hidden in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.ELU(),
            nn.Linear(64, 64),
            nn.ELU(),
            nn.Linear(64, 64),
            nn.ELU(),
            nn.Linear(64, 10),
        )
        rule = CounterCurrentLearning(model, pair=pair)
        trained = rule.parameters() if hidden else model[-1].parameters()
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for _ in range(5):
            for index in torch.randperm(len(digits.train.targets)).split(32):
                optimizer.zero_grad()
                rule(digits.train.inputs[index], digits.train.targets[index]).backward()
                for network_weights in (model.parameters(), rule.feedback_parameters()):
                    nn.utils.clip_grad_norm_(network_weights, 1.0)
                optimizer.step()
        scores[hidden] = float((rule.predict(digits.test.inputs) == digits.test.targets).float().mean())
    assert scores[True] > 0.9
    assert scores[True] > scores[False] + 0.05


class Masked:
    """The masked rule beside the slow reference in which a sure sample's activities are zero in every pair."""

    def __init__(self, pair: str, spread: float, input_pair: bool, sure: tuple[int, ...]) -> None:
        options = {"pair": pair, "spread": spread} if pair == "cosine" else {"pair": pair}
        model = network()
        self.inputs, _ = batch()
        with torch.no_grad():  # the output is sure of its class where the last layer's weights are large
            hidden = model[:-1](self.inputs)
            wished = torch.full((6, 3), 1 / 3, dtype=torch.double).log()
            self.labels = torch.arange(6) % 3
            for i in sure:
                wished[i, self.labels[i]] += 9.0
            solution = torch.linalg.lstsq(torch.cat((hidden, torch.ones(6, 1).double()), 1), wished).solution
            model[-1].weight.copy_(solution[:-1].T)
            model[-1].bias.copy_(solution[-1])
        self.rule = CounterCurrentLearning(model, mask=True, input_pair=input_pair, **options)
        self.spread, self.pair = spread, pair

    def expected(self) -> dict[str, Tensor]:
        nets = slow(self.rule, ref.ELU)
        a, b = ref.forward(nets, self.inputs), ref.feedback(nets)
        chance = torch.softmax(a[-1].detach(), 1)
        keep = [bool(abs(chance[i, label] - 1) >= 0.1) for i, label in enumerate(self.labels)]
        scale = DEFAULT_SCALE[self.pair]
        a[:-1] = [torch.stack([row if k else torch.zeros_like(row) for row, k in zip(p, keep, strict=True)]) for p in a[:-1]]
        meet = [(p, q) for p, q in zip(a[:-1], b[:-1], strict=True) if q is not None]
        loss = sum(ref.pair_loss(p, q, self.labels, self.pair, scale, self.spread) for p, q in meet)
        loss = loss + ref.cross_entropy(a[-1], self.labels)
        leaves = {f"u{i}": u for i, u in enumerate(nets.u)} | {f"v{i}": v for i, v in enumerate(nets.v) if v is not None}
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))

    def own(self) -> dict[str, Tensor]:
        self.rule.zero_grad()
        self.rule(self.inputs, self.labels).backward()
        layers = [m for m in self.rule.model.modules() if isinstance(m, nn.Linear)]
        offset = len(layers) - len(self.rule.feedback)
        found = {f"u{i}": layer.weight.grad for i, layer in enumerate(layers)}
        return found | {f"v{offset + i}": m[0].weight.grad for i, m in enumerate(reversed(self.rule.feedback))}


@pytest.mark.parametrize("sure", [(), (1, 4), tuple(range(6))], ids=["none", "two", "all"])
@pytest.mark.parametrize("input_pair", [False, True])
@pytest.mark.parametrize(("pair", "spread"), [("inner", 0.0), ("cosine", 0.0)])
def test_a_masked_sample_is_absent_from_every_pair(
    pair: str, spread: float, input_pair: bool, sure: tuple[int, ...]
) -> None:
    masked = Masked(pair, spread, input_pair, sure)
    own, expected = masked.own(), masked.expected()
    for name, value in expected.items():
        assert (own[name] - (0 if value is None else value)).abs().max() < 1e-10, name
    if len(sure) == 6:
        assert all(not own[name].any() for name in own if name != f"u{len(masked.rule.row) - 1}")
    else:
        assert all(own[name].any() for name in own)


@pytest.mark.parametrize("input_pair", [False, True])
def test_with_spread_a_masked_sample_is_left_out_of_both_terms_and_codes_still_spread(input_pair: bool) -> None:
    part, whole = Masked("cosine", 0.4, input_pair, (1, 4)), Masked("cosine", 0.4, input_pair, tuple(range(6)))
    before = {name: grad.clone() for name, grad in part.own().items()}
    part.inputs[1] += 1e-5  # still sure: nothing but the output layer hears of it
    after = part.own()
    top = f"u{len(part.rule.row) - 1}"
    assert all((before[name] - after[name]).abs().max() < 1e-12 for name in before if name != top)
    own = whole.own()
    assert all(not own[name].any() for name in own if name[0] == "u" and name != top)
    assert any(own[name].any() for name in own if name[0] == "v")


def test_masked_samples_teach_no_free_codes() -> None:
    masked = Masked("inner", 0.0, True, tuple(range(6)))
    rule = CounterCurrentLearning(masked.rule.model, mask=True, input_pair=True, feedback="free")
    rule(masked.inputs, masked.labels).backward()
    assert len(rule.feedback) == 4
    assert all(not codes.rows.grad.any() for codes in rule.feedback)


def test_the_logs_have_the_loss_of_every_pair() -> None:
    rule = CounterCurrentLearning(network(), input_pair=True)
    credit = rule(*batch())
    nets = slow(rule, ref.ELU)
    inputs, labels = batch()
    expected = ref.local_losses(nets, inputs, labels, "inner", 0.5)[:-1]
    names = ["local input", "local 0", "local 2", "local 4"]
    assert list(credit.logs) == ["local", *names]
    for name, value in zip(names, expected, strict=True):
        assert abs(credit.logs[name] - value) < 1e-12
    assert abs(credit.logs["local"] - sum(expected)) < 1e-12


def test_memory_that_was_emptied_and_loaded_again_has_the_codes() -> None:
    """`to_empty` leaves anything in buffers that no state dict holds."""
    inputs, labels = batch()
    found = []
    rule = CounterCurrentLearning(network())
    kept = {key: value.clone() if isinstance(value, Tensor) else value for key, value in rule.state_dict().items()}
    for emptied in (False, True):
        if emptied:
            rule.to_empty(device="cpu")
            with torch.no_grad():
                for tensor in (*rule.parameters(), *rule.buffers()):
                    tensor.fill_(3)
            rule.load_state_dict(kept)
        rule.zero_grad()
        rule(inputs, labels).backward()
        found.append(gradients(rule))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
