"""No error goes round a cut: on models as people write them, in any call sequence, however activations are called."""

import copy
import gc
import random
import re
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from leak_zoo import ZOO, Depth, Feed, Gru, InPlace, Mnist, Rnn, pre_activation, sequences, stream, token_loss, vectors
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import apical
from apical.core.credit import Credit, CreditRule
from apical.core.cut import CutRule
from apical.core.graph import Graph, vertex
from apical.core.losses import output_error
from apical.errors import ConfigError, UnsupportedModelError
from apical.testing import check_model

DFA, TDCA = apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def learning(model: nn.Module) -> set[str]:
    return {name for name, gradient in gradients(model).items() if bool(gradient.any())}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) / max(1.0, float(b[name].abs().max())) for name in a)


def silence(rule: nn.Module) -> None:
    for matrix in rule.feedback.buffers():
        matrix.zero_()


@pytest.mark.parametrize("name", ZOO)
def test_with_all_feedback_zero_the_last_unit_alone_learns(name: str) -> None:
    make, batch, loss, exact, last = ZOO[name]
    model, (inputs, targets) = make(), batch()
    rule = DFA(model, loss, exact=exact)
    torch.manual_seed(5)
    rule(inputs, targets).backward()
    assert not all(n.startswith(last) for n in learning(model))
    silence(rule)
    torch.manual_seed(5)
    rule(inputs, targets).backward()
    assert learning(model) == {n for n, _ in model.named_parameters() if n.startswith(last)}


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("depth", "in-place")])
def test_a_unit_hears_its_own_feedback_and_no_other(name: str) -> None:
    """Changing one matrix changes the parameters of one unit: each weighted layer's call hears one, and each is heard."""
    make, batch, loss, exact, _ = ZOO[name]
    model, (inputs, targets) = make(), batch()
    rule = DFA(model, loss, exact=exact)

    def after() -> dict[str, Tensor]:
        torch.manual_seed(5)
        rule(inputs, targets).backward()
        return gradients(model)

    before, heard = after(), {layer: 0 for layer in rule.layers}
    for matrix in rule.feedback.buffers():
        kept = matrix.clone()
        matrix.mul_(-2)
        moved = after()
        matrix.copy_(kept)
        changed = {n for n in before if not torch.equal(before[n], moved[n])}
        for layer in heard:
            heard[layer] += any(n in changed for n in (f"{layer}.weight", f"{layer}.bias"))
    paths = rule.credit_paths(inputs)
    for layer, count in heard.items():
        if f"{layer}.weight" in before and bool(before[f"{layer}.weight"].any()):  # no dead rectifier
            assert count == paths[layer].count("cut at"), layer
        assert "merged" not in paths[layer]


class Signals(CutRule):
    """Hands the units backpropagation's own errors."""

    given: dict[str, Tensor]

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output, cuts, teacher = self.run(inputs)
        names = [cut.name for cut in cuts]
        teacher.signal = lambda index, scale: self.given[names[index]] * scale
        loss, error = output_error(self.loss, output, targets)
        taught = [cut.root for cut in cuts if cut.root.requires_grad]
        return Credit([*taught, output], [*(None for _ in taught), error], output.detach(), loss)


@pytest.mark.parametrize("name", ZOO)
def test_backprops_errors_at_the_cuts_give_backprops_gradients(name: str) -> None:
    make, batch, loss, exact, _ = ZOO[name]
    model, (inputs, targets) = make(), batch()
    plain = copy.deepcopy(model)
    rule = Signals(model, loss, exact=exact)
    rule.given = {}
    torch.manual_seed(5)
    units = rule.hidden_units(inputs)
    output, trace = rule._cutting.trace(inputs)
    ends = {call.name: call.at for call in reversed(trace.calls) if call.kind != "layer" and call.at is not None}
    node = {unit: ends[unit] for unit in units}

    def keep(unit: str, number: int) -> object:
        def hook(grads: tuple[Tensor, ...]) -> None:
            rule.given[unit] = grads[number].clone()

        return hook

    for unit, (at, number) in node.items():
        at.register_prehook(keep(unit, number))
    loss(output, targets).backward()
    model.zero_grad()
    torch.manual_seed(5)
    loss(plain(inputs), targets).backward()
    for buffer, other in zip(model.buffers(), plain.buffers(), strict=True):
        buffer.copy_(other)
    torch.manual_seed(5)
    rule(inputs, targets).backward()
    assert distance(gradients(model), gradients(plain)) <= 1e-12


@pytest.mark.parametrize("name", ZOO)
def test_top_down_credit_trains_all_of_them(name: str) -> None:
    make, batch, loss, exact, _ = ZOO[name]
    model, (inputs, targets) = make(), batch()
    rule = TDCA(model, loss, exact=exact)
    model.train(name != "depth")
    rule(inputs, targets).backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    TDCA(model, loss, exact=exact, silent=True)(inputs, targets).backward()
    assert all(n.startswith(ZOO[name][4]) for n in learning(model))


class ByModules(nn.Module):
    """Everything the mode may see, as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.acts = nn.ModuleList([nn.ReLU(), nn.GELU(), nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip((self.a, self.b, self.c), self.acts, strict=True):
            x = act(layer(x))
        return self.d(x)


class ByFunctions(ByModules):
    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.tanh(self.c(F.gelu(self.b(self.a(x).relu())))))


@pytest.mark.parametrize("compiled", [False, True])
def test_functions_are_cut_as_modules_are(compiled: bool) -> None:
    """Bit for bit, eager and compiled (T14)."""
    inputs, targets = vectors()
    results = []
    for kind in (ByModules, ByFunctions):
        torch.manual_seed(1)
        model = kind()
        rule = DFA(model)
        rule(inputs, targets)
        for number, matrix in enumerate(rule.feedback.buffers()):
            torch.manual_seed(number)
            matrix.normal_()
        if compiled:
            torch._dynamo.reset()
            rule = torch.compile(rule, backend="aot_eager", fullgraph=True)
        rule(inputs, targets).backward()
        results.append(gradients(model))
    assert distance(*results) == 0


@pytest.mark.parametrize(
    "act",
    [
        *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.hardtanh),
        *(F.hardswish, F.hardsigmoid, F.logsigmoid, torch.tanh, torch.sigmoid, torch.relu, torch.special.expit),
        *(Tensor.relu, Tensor.tanh, Tensor.sigmoid, F.tanhshrink, F.softshrink, F.hardshrink, torch.selu),
        *(F.relu_, F.elu_, torch.relu_, Tensor.relu_, Tensor.tanh_, Tensor.sigmoid_, F.leaky_relu_),
        *(lambda x: F.relu(x, inplace=True), lambda x: F.silu(x, inplace=True), lambda x: F.threshold(x, 0.1, 0.0)),
    ],
)
def test_every_function_ends_a_unit(act: object) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(act(self.a(x)))

    model, (inputs, targets) = Net(), vectors()
    rule = DFA(model)
    rule(inputs, targets).backward()
    (unit,) = rule.hidden_units(inputs)
    assert unit.startswith("F.")
    matrix = next(rule.feedback.buffers())
    got, h = gradients(model), model.a(inputs)
    z = h.detach().requires_grad_()
    slope = torch.autograd.grad(act(z + 0).sum(), z)[0]
    error = (torch.softmax(model(inputs), 1) - F.one_hot(targets, 4)) / len(inputs)
    expected = ((error @ matrix) * slope).T @ inputs
    assert (got["a.weight"] - expected).abs().max() < 1e-12


def test_no_mode_where_activations_are_modules() -> None:
    rule = DFA(stream())
    rule(*vectors())
    assert not rule._cutting.is_functional


@pytest.mark.parametrize("make", [Rnn, lambda: Rnn(nn.Tanh()), Gru])
@pytest.mark.parametrize("kind", [DFA, TDCA])
def test_any_number_of_steps(make: type[nn.Module], kind: type[CreditRule]) -> None:
    """Each step hears feedback of its own; with silence the read-out alone learns, whatever came first."""
    model = make()
    rule = kind(model)
    for steps in (4, 6, 3, 9, 4):
        inputs, targets = sequences(steps)
        rule(inputs, targets).backward()
        assert learning(model) == dict(model.named_parameters()).keys()
        if kind is DFA:
            kept = copy.deepcopy(rule.feedback.state_dict())
            assert len(rule.hidden_units(inputs)) == steps
            silence(rule)
            rule(inputs, targets).backward()
            assert learning(model) == {"out.weight", "out.bias"}
            rule.feedback.load_state_dict(kept)


def test_one_matrix_serves_every_step_whatever_the_first_batch_was() -> None:
    """So ranks that begin with sequences of other lengths have the same matrix; steps not met before hear it too."""
    torch.manual_seed(3)
    rules = [DFA(Rnn(nn.Tanh())) for _ in range(2)]
    rules[1].load_state_dict(rules[0].state_dict())
    for steps in ((3, 6), (6, 3)):
        rule = rules[steps[0] == 6]
        for number in steps:
            rule(*sequences(number))
    (matrix,), (other,) = (list(rule.feedback.buffers()) for rule in rules)
    assert torch.equal(matrix, other)
    next(rule.feedback.buffers()).zero_()
    rule.zero_grad()
    rule(*sequences(9)).backward()
    learns = {name for name, gradient in gradients(rule.model).items() if gradient.any()}
    assert {name.split(".")[0] for name in learns} == {list(rule.layers)[-1].split(".")[0]}


def test_a_state_dict_holds_the_steps_that_were_met() -> None:
    rule, other = DFA(Rnn()), DFA(Rnn())
    rule(*sequences(6))
    other.load_state_dict(rule.state_dict())
    for steps in (3, 8):
        batch = sequences(steps)
        rule(*batch).backward()
        other(*batch).backward()
        assert distance(gradients(rule.model), gradients(other.model)) == 0


def test_other_paths_are_looked_at_when_they_are_met() -> None:
    """Stochastic depth: forty paths, none of which lets an error past."""
    model, (inputs, targets) = Depth(), vectors()
    rule = DFA(model)
    for _ in range(40):
        rule(inputs, targets)
    silence(rule)
    for _ in range(40):
        rule(inputs, targets).backward()
    assert learning(model) == {"c.weight", "c.bias"}


class Branches(nn.Module):
    """In training a skip goes round the activation; the layers and activations that are called are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Tanh()
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        r = self.act(self.b(self.act(h)))
        return self.c(r + h if self.skips else r)


def test_a_skip_that_appears_later_is_seen() -> None:
    model, (inputs, targets) = Branches(), vectors()
    rule = DFA(model)
    rule(inputs, targets)
    model.skips = True
    rule(inputs, targets)
    silence(rule)
    rule(inputs, targets).backward()
    assert learning(model) == {"c.weight", "c.bias"}


def test_layers_frozen_at_first_are_parted_too() -> None:
    model = pre_activation()
    inputs, targets = torch.randn(4, 3, 8, 8), torch.arange(4)
    model.features.requires_grad_(False)
    rule = DFA(model)
    rule(inputs, targets).backward()
    assert learning(model) == {"linear.weight", "linear.bias"}
    assert set(rule.credit_paths(inputs).values()) == {"frozen", "exact"}
    model.requires_grad_(True)
    rule(inputs, targets)
    silence(rule)
    rule(inputs, targets).backward()
    assert learning(model) == {"linear.weight", "linear.bias"}


def test_activations_alone_are_refused_where_errors_go_round_them() -> None:
    with pytest.raises(UnsupportedModelError, match=r"round the cuts at '1\.f\.2'.*units="):
        DFA(stream(), units="activation")(*vectors())
    DFA(Rnn(), units="activation")(*sequences()).backward()


def test_further_cuts_by_name() -> None:
    model, (inputs, targets) = stream(), vectors()
    assert DFA(model).hidden_units(inputs) == ["0", "1.f.2", "1", "2.f.2", "2"]
    dense = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
    rule = DFA(dense, units=("1",))
    assert rule.hidden_units(inputs) == ["1", "2"]
    rule(inputs, targets).backward()
    assert rule.credit_paths(inputs) == {"0": "cut at '1'", "3": "exact"}
    with pytest.raises(ConfigError, match="'nine'"):
        DFA(model, units=("nine",))


def test_paths_of_credit() -> None:
    model, (inputs, _) = stream(), vectors()
    cuts = {"0": "cut at '0'", "1.f.1": "cut at '1.f.2'", "1.f.3": "cut at '1'"}
    cuts |= {"2.f.1": "cut at '2.f.2'", "2.f.3": "cut at '2'", "3": "exact"}
    rule = DFA(model)
    assert rule.credit_paths(inputs) == cuts
    model[1].requires_grad_(False)
    assert rule.credit_paths(inputs) == cuts | {"1.f.1": "frozen", "1.f.3": "frozen"}
    merged = DFA(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), units="activation")
    assert merged.credit_paths(inputs) == {"0": "merged with '1'", "1": "cut at '2'", "3": "exact"}


def test_a_layer_that_is_not_called_has_no_credit() -> None:
    model, (inputs, targets) = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), vectors()
    model[1].spare = nn.Linear(2, 2)
    rule = DFA(model)
    rule(inputs, targets).backward()
    assert learning(model) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert rule.credit_paths(inputs)["1.spare"] == "no credit"


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.block, self.c = nn.Linear(6, 8), Feed(), nn.Linear(8, 4)
        self.b, self.reentrant = nn.Linear(8, 8), None

    def half(self, h: Tensor) -> Tensor:
        return self.block(F.silu(self.b(h)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.c(self.half(h) if self.reentrant is None else checkpoint(self.half, h, use_reentrant=self.reentrant))


def test_checkpoints_change_nothing_or_are_refused() -> None:
    model, (inputs, targets) = Checkpointed(), vectors()
    rule = DFA(model)
    rule(inputs, targets).backward()
    plain = gradients(model)
    model.reentrant = False
    rule(inputs, targets).backward()
    assert distance(gradients(model), plain) == 0
    silence(rule)
    rule(inputs, targets).backward()
    assert learning(model) == {"c.weight", "c.bias"}
    model.reentrant = True
    for checked in (rule, DFA(model)):
        with pytest.raises(UnsupportedModelError, match=r"'b'.*use_reentrant=False"):
            checked(inputs, targets)


@pytest.mark.parametrize("kind", [DFA, TDCA])
def test_hooks_go_in_any_order_and_with_their_rule(kind: type[CreditRule]) -> None:
    model, (inputs, targets) = InPlace(), vectors()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    rules = [kind(model) for _ in range(200)]
    for rule in rules[::20]:
        rule(inputs, targets).backward()
    random.Random(0).shuffle(rules)
    for rule in rules:
        rule.detach()
    assert hooks() == 0
    gc.disable()  # nothing may wait for it: there are no cycles
    try:
        for _ in range(50):
            rule = kind(model)
            rule(inputs, targets).backward()
            gone = weakref.ref(rule)
            del rule
            assert gone() is None
    finally:
        gc.enable()
    assert hooks() == 0


def test_a_copied_rule_cuts_its_own_model() -> None:
    rule = DFA(pre_activation())
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    rule(*batch).backward()
    expected = gradients(rule.model)
    twin = copy.deepcopy(rule)
    rule.detach()
    twin(*batch).backward()
    assert distance(gradients(twin.model), expected) == 0


@pytest.mark.parametrize("kind", [DFA, TDCA])
def test_batches_and_outputs_that_cannot_be(kind: type[CreditRule]) -> None:
    with pytest.raises(ConfigError, match="batch is empty"):
        kind(stream())(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stream()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    with pytest.raises(UnsupportedModelError, match=r"output is a dict.*wrap"):
        kind(Named())(*vectors())


def test_without_gradients_and_in_evaluation() -> None:
    model, (inputs, targets) = Mnist(), (torch.randn(2, 1, 28, 28), torch.arange(2))
    rule = DFA(model, F.nll_loss)
    with torch.inference_mode():
        assert not rule(inputs, targets).loss.requires_grad
    with torch.no_grad():
        rule(inputs, targets)
    model.eval()
    rule(inputs, targets).backward()
    assert learning(model) == dict(model.named_parameters()).keys()


def test_separators_are_found_by_counting_paths() -> None:
    """Modulo a prime: n dominates z if and only if (paths root to n) * (paths n to z) = paths root to z."""
    prime = 2**61 - 1
    model, (inputs, _) = stream(), vectors()
    first: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: first.append(output))
    graph = Graph([vertex(model(inputs))])
    root, lowest = graph.order[0], vertex(first[0])

    def paths(start: object) -> dict[object, int]:
        count = dict.fromkeys(graph.order, 0)
        count[start] = 1
        for at in graph.order:
            for child in graph.children[at]:
                count[child] = (count[child] + count[at]) % prime
        return count

    down = paths(root)
    dominators = [at for at in graph.order if down[at] * paths(at)[lowest] % prime == down[lowest]]
    nearest, chain = graph._dominators(frozenset([root])), [lowest]
    while nearest[chain[-1]] is not None:
        chain.append(nearest[chain[-1]])
    assert chain[::-1] == dominators
    assert 3 <= len(dominators) < len(graph.order)


def test_a_token_hears_the_error_of_its_own_place() -> None:
    """Without mixing, permuting positions permutes nothing in the update; a target to be ignored gives no signal."""
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7))
    inputs, targets = torch.randint(7, (4, 6)), torch.randint(7, (4, 6))
    rule = DFA(model, token_loss)
    rule(inputs, targets).backward()
    plain = gradients(model)
    b = rule.feedback.get_buffer("2")
    assert b.shape == (7, 8)
    order = torch.randperm(6)
    rule(inputs[:, order], targets[:, order]).backward()
    assert distance(gradients(model), plain) < 1e-14
    rule(torch.cat([inputs, inputs], 1), torch.cat([targets, targets], 1)).backward()
    assert distance(gradients(model), plain) < 1e-14
    targets[1, 2] = -100
    error = (torch.softmax(model(inputs), -1) - F.one_hot(targets.clamp(min=0), 7)) / 23
    error[1, 2] = 0
    h = model[1](model[0](inputs))
    expected = torch.einsum("btj,bti->ji", (error @ b) * (h > 0), model[0](inputs))
    rule(inputs, targets).backward()
    assert (gradients(model)["1.weight"] - expected).abs().max() < 1e-14


class Moments(nn.Module):
    """(time, batch, ...) in, time * batch rows out."""

    def __init__(self, flat: bool, early: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.flat, self.early = nn.Linear(6, 8), nn.Linear(8, 4), flat, early

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.flatten(0, 1) if self.early else x))
        return self.b(h.flatten(0, 1) if self.flat and not self.early else h)


def test_rows_are_matched_whatever_the_axes() -> None:
    inputs, targets, results = torch.randn(5, 3, 6), torch.arange(15).view(5, 3) % 4, []
    for flat, early in ((False, False), (True, False), (True, True)):
        torch.manual_seed(1)
        model = Moments(flat, early)
        DFA(model, F.cross_entropy if flat else token_loss)(inputs, targets.flatten() if flat else targets).backward()
        results.append(gradients(model))
    assert distance(results[0], results[1]) < 1e-15
    assert distance(results[0], results[2]) < 1e-15

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x[0]))
            return self.c(torch.tanh(self.b(h.repeat(len(x), 1))))

    with pytest.raises(UnsupportedModelError, match=r"'F\.tanh'.*errors cannot be matched"):
        DFA(Mixed())(inputs, targets.flatten())


class Computed(nn.Module):
    """The layer between two others makes its weight `(8, 6)` of parameters, by activations too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.below, self.layer, self.above, self.kind = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 3), kind
        self.softplus = nn.Softplus()
        if kind == "parametrised":
            parametrize.register_parametrization(self.layer, "weight", nn.Softplus())

    def weight(self) -> Tensor:
        if self.kind == "module":
            return self.softplus(self.layer.weight)
        return self.layer.weight if self.kind in ("parametrised", "parts") else F.softplus(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.below(x))
        if self.kind == "parametrised":
            v = self.layer(h)
        elif self.kind == "parts":
            w = self.layer.weight
            v = F.linear(h[:, :2], w[:, :2], self.layer.bias) + F.linear(h[:, 2:], w[:, 2:])
        else:
            v = F.linear(h, self.weight(), self.layer.bias)
        return self.above(torch.tanh(v))


def credited(
    kind: type[CutRule], model: nn.Module, batch: tuple[Tensor, Tensor], given: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Call a rule with the feedback of another, and return its own."""
    torch.manual_seed(3)  # of the teacher
    rule = kind(model)
    rule(*batch)
    own = {name: value for name, value in rule.state_dict().items() if not name.startswith("model.")}
    for value, wanted in zip(own.values(), own.values() if given is None else given.values(), strict=True):
        value.copy_(wanted)
    rule(*batch).backward()
    return own


@pytest.mark.parametrize("kind", ["parametrised", "module", "function", "parts"])
@pytest.mark.parametrize("rule", [DFA, TDCA])
def test_an_activation_of_a_weight_ends_no_unit_even_with_as_many_samples_as_rows(rule: type[CutRule], kind: str) -> None:
    batch, model = (torch.randn(8, 5), torch.arange(8) % 3), Computed(kind)
    plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    for mine, its in zip(plain[::2], (model.below, model.layer, model.above), strict=True):
        weight = model.weight() if its is model.layer else its.weight
        mine.load_state_dict({"weight": weight.detach(), "bias": its.bias.detach()})
    credited(rule, plain, batch, credited(rule, model, batch))
    parameters = [model.below.weight, *(p for name, p in model.layer.named_parameters() if "bias" not in name)]
    through = torch.autograd.grad(model.weight(), parameters[1:], plain[2].weight.grad)
    for parameter, wanted in zip(parameters, (plain[0].weight.grad, *through), strict=True):
        assert torch.allclose(parameter.grad, wanted, rtol=0, atol=1e-12)


class Generated(nn.Module):
    """One layer makes the weight of the next of a code that is a parameter, as hypernetworks do."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.hidden, self.made = nn.Parameter(torch.randn(8, 4)), nn.Linear(4, 7), nn.Linear(7, 6)
        self.below, self.above = nn.Linear(5, 6), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.made(torch.tanh(self.hidden(self.code)))
        return self.above(torch.tanh(F.linear(torch.tanh(self.below(x)), weight)))


@pytest.mark.parametrize("rule", [DFA, TDCA])
def test_a_layer_that_sees_no_batch_is_exact_or_refused(rule: type[CutRule]) -> None:
    batch = torch.randn(8, 5), torch.arange(8) % 3
    with pytest.raises(UnsupportedModelError, match=r"'hidden' works on parameters, not on the batch"):
        rule(Generated(), exact=("code",))(*batch)
    model = Generated()
    taught = rule(model, exact=("code", "hidden", "made"))
    assert taught.hidden_units(batch[0]) == ["F.tanh", "F.tanh#1"]
    check_model(taught, *batch, skip=("compiled",))


class FedBack(nn.Module):
    """Its outputs go into a hidden layer, and back out: the read-out must keep the output's own error."""

    def __init__(self, detaches: bool) -> None:
        super().__init__()
        self.enter, self.step, self.out = nn.Linear(6, 8), nn.Linear(12, 8), nn.Linear(8, 4)
        self.detaches = detaches

    def forward(self, x: Tensor) -> Tensor:
        h, y, made = torch.tanh(self.enter(x)), x.new_zeros(len(x), 4), []
        for _ in range(3):
            h = torch.tanh(self.step(torch.cat([h, y.detach() if self.detaches else y], 1)))
            y = self.out(h)
            made.append(y)
        return torch.stack(made, 1)


@pytest.mark.parametrize("make", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
def test_a_read_out_that_is_fed_back_is_no_hidden_unit(make: Any) -> None:
    inputs, targets = torch.randn(5, 6), torch.arange(5).unsqueeze(1).repeat(1, 3) % 4

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), targets.flatten())

    with pytest.raises(UnsupportedModelError, match=r"would reach 'out'.*detach what goes that way"):
        make(FedBack(False), loss)(inputs, targets)
    check_model(make(FedBack(True), loss), inputs, targets, skip=("compiled", "autocast"))


class Questions(nn.Module):
    """Learned queries ask the tokens, with a residual connection, as class attention and object queries do."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, 6))
        self.embed, self.norm, self.softmax = nn.Linear(4, 6), nn.LayerNorm(6), nn.Softmax(-1)
        self.q, self.kv, self.project, self.head = nn.Linear(6, 6), nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(6, 3)
        self.up, self.down, self.act = nn.Linear(6, 8), nn.Linear(8, 6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(len(x), -1, -1)
        keys, values = self.kv(torch.cat([query, self.embed(x)], 1)).chunk(2, -1)
        asked = self.softmax(self.q(self.norm(query)) @ keys.transpose(1, 2))
        query = query + self.project(asked @ values)
        query = query + self.down(self.act(self.up(query)))
        return self.head(query.mean(1))


@pytest.mark.parametrize("kind", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
def test_learned_queries_are_trained_once_they_are_exact(kind: Any) -> None:
    """Each remedy that the messages name works, and nothing below a cut hears an error that goes round it."""
    inputs, targets = torch.randn(5, 3, 4).double(), torch.arange(5) % 3
    exact: tuple[str, ...] = ("query",)
    while True:
        rule = kind(Questions().double(), exact=exact)
        try:
            rule(inputs, targets)
            break
        except UnsupportedModelError as refusal:
            (name,) = re.findall(r"pass exact=\('(.*)',\)", str(refusal))
            if name in exact:
                raise
            exact = (*exact, name)
    assert set(exact) <= {"query", "norm.weight", "norm.bias"}
    report = check_model(rule, inputs, targets, skip=("compiled",))
    assert report.placement.path("head") == {"TopDownCreditAssignment": "the output's credit"}.get(kind.__name__, "exact")
    assert report.placement.path("q").startswith("cut at")


class Biased(nn.Module):
    """Attention in windows with a bias that a network makes of distances, and that a buffer looks up (Swin v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.project, self.head = nn.Linear(4, 6), nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 3)
        self.bias = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 1))
        self.distances: Tensor
        self.index: Tensor
        self.register_buffer("distances", torch.arange(-2.0, 3).view(-1, 1))
        self.register_buffer("index", torch.arange(3).view(-1, 1) - torch.arange(3) + 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = self.qkv(h).chunk(3, -1)
        bias = torch.sigmoid(self.bias(self.distances)[self.index.view(-1)].view(3, 3))
        h = h + self.project((q @ k.transpose(1, 2) + bias).softmax(-1) @ v)
        return self.head(h.mean(1))


@pytest.mark.parametrize("kind", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
def test_what_the_models_own_index_looks_up_is_not_made_of_the_batch(kind: Any) -> None:
    inputs, targets = torch.randn(5, 3, 4).double(), torch.arange(5) % 3
    with pytest.raises(UnsupportedModelError, match=r"'bias.0' works on parameters"):
        kind(Biased().double())(inputs, targets)
    rule = kind(Biased().double(), exact=("bias",))
    check_model(rule, inputs, targets, skip=("compiled",))
    assert "F.sigmoid" not in rule.hidden_units(inputs)


@pytest.mark.parametrize("make", [DFA, TDCA])
def test_one_graph_from_the_first_batch_says_to_call_the_rule_before(make: Any) -> None:
    torch._dynamo.reset()
    rule = make(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    batch = torch.randn(6, 4), torch.arange(6) % 3
    compiled = torch.compile(rule, backend="eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="call the rule on one before it is compiled with fullgraph=True"
    ):
        compiled(*batch)
    rule(*batch)
    compiled(*batch).backward()
    assert learning(rule.model)


class Mapped(nn.Module):
    """An activation within `torch.vmap`, with or without its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        return self.last(torch.vmap(lambda h: torch.tanh(self.middle(h)))(hidden))  # type: ignore[no-any-return]


def test_a_unit_that_ends_inside_a_transform_is_refused_by_name() -> None:
    batch = torch.randn(6, 6), torch.arange(6) % 3
    with pytest.raises(UnsupportedModelError, match=r"'middle' inside a transform of torch\.func"):
        DFA(Mapped())(*batch)
    with pytest.raises(UnsupportedModelError, match=r"'F\.tanh#1' ends inside a transform of torch\.func"):
        DFA(Mapped(), exact=("middle",))(*batch)


class Unread(nn.Module):
    """A branch on which no output depends, as the last feed-forward of JumboViT, leaves its unit before the cut."""

    def __init__(self, has_branch: bool) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.unread = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.has_branch = has_branch

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.middle(torch.tanh(self.first(inputs)))
        if self.has_branch:
            self.unread(hidden)
        return self.last(torch.tanh(hidden))  # type: ignore[no-any-return]


def test_a_branch_that_no_output_reads_changes_nothing() -> None:
    found = []
    for has_branch in (False, True):
        torch.manual_seed(0)
        model = Unread(has_branch)
        rule = DFA(model)
        inputs, targets = torch.randn(4, 6), torch.arange(4) % 3
        rule(inputs, targets)
        for number, matrix in enumerate([*rule.feedback.buffers()][:2]):
            matrix.data.copy_(torch.sin(torch.arange(1.0, 1 + matrix.numel()) + number).view_as(matrix))
        rule(inputs, targets).backward()
        found.append(gradients(model))
    unread = {name for name in found[1] if name.startswith("unread.") and bool(found[1][name].any())}
    assert not unread
    assert all(found[0][f"{name}.weight"].any() for name in ("first", "middle"))
    assert distance(found[0], {name: found[1][name] for name in found[0]}) < 1e-12


class Autoencoder(nn.Module):
    """A variational autoencoder, whose mean and variance are outputs that the decoder reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.spread = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.decoder, self.output = nn.Linear(3, 8), nn.Linear(8, 6)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.tanh(self.encoder(inputs))
        mean, spread = self.mean(hidden), self.spread(hidden)
        code = mean + torch.randn_like(mean) * torch.exp(spread / 2)
        return self.output(torch.tanh(self.decoder(code))), mean, spread


def divergence(mean: Tensor, spread: Tensor) -> Tensor:
    return (mean.square() + spread.exp() - 1 - spread).sum(1).mean() / 2


def evidence(output: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> Tensor:
    return F.mse_loss(output[0], targets) + divergence(*output[1:])


def test_what_is_an_output_and_read_inside_has_its_own_error_and_the_units_signal() -> None:
    """The mean's bias hears d KL / d mean + s, the spread's d KL / d spread + s * noise * exp(spread / 2) / 2."""
    inputs = torch.randn(1, 6)
    model = Autoencoder()
    torch.manual_seed(5)
    rule = DFA(model, evidence)
    torch.manual_seed(5)
    _, mean, spread = model(inputs)
    torch.manual_seed(5)
    noise = torch.randn_like(mean)
    exact = torch.autograd.grad(divergence(mean, spread), (model.mean.bias, model.spread.bias))
    torch.manual_seed(5)
    rule(inputs, inputs).backward()
    assert rule.hidden_units(inputs) == ["F.tanh", "F.add", "F.tanh#1"]
    signal = model.mean.bias.grad - exact[0]
    expected = signal * noise[0] * torch.exp(spread[0].detach() / 2) / 2
    assert signal.abs().min() > 1e-6
    torch.testing.assert_close(model.spread.bias.grad - exact[1], expected, rtol=1e-10, atol=1e-12)
    model.zero_grad()
    silence(rule)
    torch.manual_seed(5)
    rule(inputs, inputs).backward()
    torch.testing.assert_close((model.mean.bias.grad, model.spread.bias.grad), exact, rtol=1e-10, atol=1e-12)
    assert {name.partition(".")[0] for name in learning(model)} == {"mean", "spread", "output"}


class Around(nn.Module):
    """The first layer's output is an output of the model, and an error comes down to it beside the unit's cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(inputs)
        return self.last(torch.tanh(hidden)) + hidden, hidden


def test_an_output_that_others_are_added_to_is_no_way_round_the_cuts() -> None:
    with pytest.raises(UnsupportedModelError, match="the error would reach 'first' around the cuts"):
        DFA(
            Around(), lambda output, targets: F.mse_loss(output[0], targets) + output[1].square().mean(), units="activation"
        )(torch.randn(4, 6), torch.randn(4, 8))
