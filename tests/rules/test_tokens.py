"""Direct feedback and top-down credit per token: identities of units that hold several layers, matrices per position."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.specimens import packed as packed_zoo
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import apical
from apical.core.credit import Credit
from apical.core.cut import CutRule
from apical.core.losses import output_error, token_cross_entropy
from apical.errors import ConfigError, UnsupportedModelError
from apical.models import CifarResNet, Transformer
from apical.rules.top_down.teacher import TopDownNetwork, load
from apical.testing import check_model
from apical.testing.two_ranks import on_two_ranks

DFA, TDCA = apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment
VOCABULARY, WIDTH, LENGTH, BATCH = 11, 8, 5, 3


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def decoder(norm: str = "pre", vocabulary: int = VOCABULARY) -> Transformer:
    return Transformer(vocabulary, WIDTH, 2, 2, LENGTH, norm=norm)


def tokens(vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    return torch.randint(vocabulary, (BATCH, LENGTH)), torch.randint(vocabulary, (BATCH, LENGTH))


def vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 6), torch.randint(4, (BATCH,))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, 8, 8), torch.randint(10, (BATCH,))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 4))


def apart() -> nn.Module:
    """No position sees another."""
    return nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, 7), nn.GELU(), nn.Linear(7, VOCABULARY))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) / max(1.0, float(b[name].abs().max())) for name in a)


def learned(rule: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    rule(inputs, targets).backward()
    return gradients(rule.model)


def silenced(rule: Any, inputs: Tensor, targets: Tensor) -> set[str]:
    rule(inputs, targets)
    for matrix in rule.feedback.buffers():
        matrix.zero_()
    return {name for name, gradient in learned(rule, inputs, targets).items() if bool(gradient.any())}


class Signals(CutRule):
    """Hands the units what it is given."""

    given: dict[str, Tensor]

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output, cuts, teacher = self.run(inputs)
        names = [cut.name for cut in cuts]
        teacher.signal = lambda index, scale: self.given[names[index]] * scale
        loss, error = output_error(self.loss, output, targets)
        taught = [cut.root for cut in cuts if cut.root.requires_grad]
        return Credit([*taught, output], [*(None for _ in taught), error], output.detach(), loss)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], Any]] = {
    "pre": (decoder, tokens, token_cross_entropy),
    "post": (partial(decoder, "post"), tokens, token_cross_entropy),
    "encoder": (packed_zoo.Encoder, tokens, token_cross_entropy),
    "residual": (partial(CifarResNet, 8), images, F.cross_entropy),
    "perceptron": (perceptron, vectors, F.cross_entropy),
}


def true_errors(rule: CutRule, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Backpropagation's at the outputs of the rule's units."""
    output, trace = rule._cutting.trace(inputs)
    ends = {call.name: call.at for call in reversed(trace.calls) if call.kind != "layer" and call.at is not None}
    given: dict[str, Tensor] = {}

    def keep(unit: str, number: int) -> Callable[[Any], None]:
        return lambda grads: given.__setitem__(unit, grads[number].clone())

    for unit in rule.hidden_units(inputs):
        ends[unit][0].register_prehook(keep(unit, ends[unit][1]))
    rule.loss(output, targets).backward()
    rule.model.zero_grad()
    return given


@pytest.mark.parametrize("units", ["block", "sublayer", "micro"])
@pytest.mark.parametrize("net", NETS)
def test_backprops_errors_at_the_ends_of_units_give_backprops_gradients(net: str, units: str) -> None:
    """T7."""
    make, batch, loss = NETS[net]
    model, (inputs, targets) = make(), batch()
    if net == "perceptron" and units == "block":
        with pytest.raises(UnsupportedModelError, match="units='sublayer'"):
            DFA(model, loss, units=units)(inputs, targets)
        return
    plain = copy.deepcopy(model)
    rule = Signals(model, loss, units=units)
    rule.given = {}
    rule.hidden_units(inputs)
    state = copy.deepcopy(model.state_dict())
    rule.given = true_errors(rule, inputs, targets)
    model.load_state_dict(state)
    expected = learned(apical.Backprop(plain, loss), inputs, targets)
    assert distance(learned(rule, inputs, targets), expected) <= 1e-12


def test_units_end_where_the_specification_says() -> None:
    inputs = tokens()[0]
    units = {
        "block": ["blocks.0", "norm"],
        "sublayer": ["blocks.0.F.add", "blocks.0", "blocks.1.F.add", "norm"],
        "micro": ["blocks.0.F.add", "blocks.0.gelu", "blocks.0", "blocks.1.F.add", "blocks.1.gelu", "norm"],
    }
    for kind, ends in units.items():
        assert DFA(decoder(), token_cross_entropy, units=kind).hidden_units(inputs) == ends
    post = DFA(decoder("post"), token_cross_entropy, units="micro").hidden_units(inputs)  # Launay et al.'s three points
    assert post == [f"blocks.{i}.{part}" for i in range(2) for part in ("norm1", "gelu", "norm2")]
    assert DFA(perceptron(), units="sublayer").hidden_units(vectors()[0]) == ["1", "4"]
    residual = DFA(CifarResNet(8), units="sublayer").hidden_units(images()[0])
    assert len(residual) == 4  # behind the stem, and behind each of three sums with its activation


def test_what_leaks_is_refused_and_what_does_not_is_not() -> None:
    """T13."""
    inputs, targets = tokens()
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.0\.attention\.q' around the cuts"):
        DFA(decoder(), token_cross_entropy, units="activation")(inputs, targets)
    for units in ("block", "sublayer", "micro", "auto"):
        for inside in ("exact", "feedback"):
            rule = DFA(decoder(), token_cross_entropy, units=units, inside=inside)
            assert silenced(rule, inputs, targets) == {"head.weight", "head.bias"}
    for units in ("activation", "block", "sublayer"):
        names = silenced(DFA(CifarResNet(8), units=units), *images())
        assert len(names) == 2  # the head's weight and bias
        assert all(dict(CifarResNet(8).named_parameters())[name].shape[0] == 10 for name in names)


@pytest.mark.parametrize("make", [packed_zoo.Recurrent, partial(packed_zoo.Recurrent, nn.GRU), packed_zoo.Attends])
@pytest.mark.parametrize("units", ["auto", "sublayer"])
def test_attention_and_recurrent_modules_are_one_layer_each(make: Callable[[], nn.Module], units: str) -> None:
    model, inputs, targets = make(), torch.randn(BATCH, 4, 5), torch.randint(4, (BATCH,))
    rule = DFA(model, units=units)
    assert learned(rule, inputs, targets).keys() == dict(model.named_parameters()).keys()
    assert silenced(rule, inputs, targets) == {"out.weight", "out.bias"}
    assert not [row for row in rule.placement(inputs) if row.layer != "out" and "cut at" not in row.path]
    TDCA(model, units=units)(inputs, targets).backward()


class Cells(nn.Module):
    """A cell with two outputs, moment by moment; only the last of one is answered with."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = state = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            hidden, state = self.cell(x[:, t], (hidden, state))
        result: Tensor = self.out(hidden)
        return result


def test_both_outputs_of_a_cell_are_cut() -> None:
    model, inputs, targets = Cells(), torch.randn(BATCH, 3, 5), torch.randint(4, (BATCH,))
    rule = DFA(model)
    assert {"cell", "cell:1"} <= {name.partition("#")[0] for name in rule.hidden_units(inputs)}
    assert silenced(rule, inputs, targets) == {"out.weight", "out.bias"}


def test_feedback_alignment_without_later_branches_is_direct_feedback_with_the_heads_matrix() -> None:
    """T9, the last norm's Jacobian being 1."""
    model, (inputs, targets) = decoder(), tokens()
    model.norm = nn.Identity()
    alignment = apical.FeedbackAlignment(model, token_cross_entropy, first_layer=True)
    for name in ("attention.q", "attention.k", "attention.v", "up"):
        alignment.set_feedback(f"blocks.1.{name}", torch.zeros_like(model.get_submodule(f"blocks.1.{name}").weight))
    expected = learned(alignment, inputs, targets)
    direct = DFA(model, token_cross_entropy, units="block", inside="feedback")
    direct(inputs, targets)
    direct.inside.load_state_dict(alignment.feedback.state_dict())
    for unit in direct.hidden_units(inputs):
        direct.set_feedback(unit, alignment.feedback.get_buffer("head"))
    assert distance(learned(direct, inputs, targets), expected) <= 1e-12


def reference(model: nn.Module, inputs: Tensor, targets: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Equation (3) on :func:`apart`: c_bt = e_bt B."""
    table, first, act, _ = model
    with torch.no_grad():
        error = torch.softmax(model(inputs), -1) - F.one_hot(targets.clamp(min=0), VOCABULARY)
        error = error * (targets >= 0)[..., None] / (targets >= 0).sum()
    hidden = act(first(table(inputs)))
    learned = torch.autograd.grad(hidden, [*table.parameters(), *first.parameters()], error @ b)
    seen = hidden.detach().flatten(0, 1)
    by_hand = [error.flatten(0, 1).T @ seen, error.sum((0, 1))]
    return dict(zip((name for name, _ in model.named_parameters()), [*learned, *by_hand], strict=True))


@pytest.mark.parametrize("classes_last", [True, False])
@pytest.mark.parametrize("feedback", ["auto", "position", "broadcast"])
def test_one_matrix_serves_every_position(classes_last: bool, feedback: Any) -> None:
    model, (inputs, targets) = apart(), tokens()
    targets[0, 1] = targets[2] = -100
    net = model if classes_last else nn.Sequential(model, Transposed())
    rule = DFA(net, token_cross_entropy if classes_last else F.cross_entropy, feedback)
    found = learned(rule, inputs, targets)
    (matrix,) = rule.feedback.buffers()
    assert matrix.shape == (VOCABULARY, 7)
    expected = reference(model, inputs, targets, matrix)
    assert distance(found if classes_last else {name[2:]: g for name, g in found.items()}, expected) <= 1e-12


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("kind", [DFA, partial(TDCA, hidden=5)])
def test_positions_are_alike(kind: Any) -> None:
    """T15."""
    model, (inputs, targets) = apart(), tokens()
    targets[0, 0] = -100
    rule = kind(model, token_cross_entropy)
    once = learned(rule, inputs, targets)
    order = torch.randperm(LENGTH)
    assert distance(learned(rule, inputs[:, order], targets[:, order]), once) <= 1e-12
    assert distance(learned(rule, inputs.repeat(1, 2), targets.repeat(1, 2)), once) <= 1e-12
    other = inputs.clone()
    other[0, 0] = (inputs[0, 0] + 1) % VOCABULARY  # nothing is learned at a masked target
    assert distance(learned(rule, other, targets), once) <= 1e-12


def test_sources() -> None:
    model, (inputs, targets) = decoder(vocabulary=40), tokens(40)
    factored = DFA(model, token_cross_entropy)
    found = learned(factored, inputs, targets)
    assert factored.projection.shape == (40, WIDTH)
    assert {b.shape[0] for b in factored.feedback.buffers()} == {WIDTH}
    whole = DFA(model, token_cross_entropy, source="output")
    whole(inputs, targets)
    for name, small in factored.feedback.named_buffers():
        whole.feedback.get_buffer(name).copy_(factored.projection @ small)
    assert distance(learned(whole, inputs, targets), found) <= 1e-12
    small = DFA(decoder(), token_cross_entropy)
    small(*tokens())
    assert small.projection is None
    with pytest.raises(ConfigError, match="unknown source"):
        DFA(decoder(), source="top")


def test_factors_have_the_law_of_their_product() -> None:
    torch.set_default_dtype(torch.float)
    model = Transformer(400, 64, 1, 2, 4)
    rule = DFA(model, token_cross_entropy)
    rule(torch.randint(400, (2, 4)), torch.randint(400, (2, 4)))
    assert {small.shape[1] for small in rule.feedback.buffers()} == {64, 256}
    for small in rule.feedback.buffers():
        product = rule.projection @ small
        wanted = (2 / (400 + small.shape[1])) ** 0.5
        assert float(product.std()) == pytest.approx(wanted, rel=0.05)


def test_the_heads_input_is_the_heads_weight_at_work_and_says_so() -> None:
    model, (inputs, targets) = decoder(), tokens()
    rule = DFA(model, token_cross_entropy, units="block", source="head")
    found = learned(rule, inputs, targets)
    expected = learned(apical.Backprop(model, token_cross_entropy), inputs, targets)
    top = {name for name in found if name.startswith(("blocks.1", "norm", "head"))}
    assert distance({n: found[n] for n in top}, {n: expected[n] for n in top}) <= 1e-12  # local to the head's input
    assert {name: b.shape for name, b in rule.feedback.named_buffers()} == {"blocks/0": (WIDTH, WIDTH)}
    assert any("weight transport" in remark for remark in rule.remarks)
    plain = Signals(model, token_cross_entropy, units="block")
    plain.given = {}
    _, error = output_error(token_cross_entropy, model(inputs).detach(), targets)
    below = error @ model.head.weight.detach()
    plain.given = {"norm": below, "blocks.0": below @ rule.feedback.get_buffer("blocks/0")}
    assert distance(learned(plain, inputs, targets), found) <= 1e-12
    with pytest.raises(UnsupportedModelError, match="source='factored'"):
        DFA(nn.Sequential(apart(), nn.LogSoftmax(-1)), token_cross_entropy, source="head")(inputs, targets)


def test_full_feedback_hears_all_places_and_position_refuses_others() -> None:
    model, (inputs, targets) = apart(), tokens()
    rule = DFA(model, token_cross_entropy, "full")
    rule(inputs, targets).backward()
    assert [b.shape for b in rule.feedback.buffers()] == [(LENGTH * VOCABULARY, LENGTH * 7)]
    recurrent = packed_zoo.Recurrent()
    with pytest.raises(UnsupportedModelError, match="feedback='auto'"):
        DFA(recurrent, feedback="position")(torch.randn(BATCH, 4, 5), torch.randint(4, (BATCH,)))
    with pytest.raises(ConfigError, match="unknown inside"):
        DFA(model, inside="random")
    with pytest.raises(ConfigError, match="units must be"):
        DFA(model, units="blocks")


@pytest.mark.parametrize(
    ("source", "inside", "backend"), [("auto", "exact", "eager"), ("head", "feedback", "aot_eager")]
)  # the second traces the backward pass, of errors that come from the head and of feedback inside the blocks
def test_state_copies_and_graphs_hold_all_matrices(source: Any, inside: Any, backend: str) -> None:
    inputs, targets = tokens(40)
    make = partial(DFA, loss=token_cross_entropy, units="block", source=source, inside=inside)
    rule = make(decoder(vocabulary=40))
    expected = learned(rule, inputs, targets)
    again = make(decoder(vocabulary=40))
    again.load_state_dict(rule.state_dict())
    assert distance(learned(again, inputs, targets), expected) == 0
    assert distance(learned(copy.deepcopy(rule), inputs, targets), expected) == 0
    (rule(inputs, targets).loss / 2).backward()
    (rule(inputs, targets).loss / 2).backward()
    assert distance(gradients(rule.model), expected) <= 1e-12
    torch._dynamo.reset()
    torch.compile(rule, backend=backend, fullgraph=True)(inputs, targets).backward()
    assert distance(gradients(rule.model), expected) <= 1e-12
    before = set(rule.model.state_dict())
    model = rule.detach()
    assert set(model.state_dict()) == before
    assert not any("forward" in vars(module) for module in model.modules())


class Known(nn.Module):
    """Hands out credits that it was given."""

    credits: list[Tensor]

    def forward(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        return self.credits


@pytest.mark.parametrize("units", ["block", "sublayer"])
def test_top_down_credits_that_are_backprops_give_backprops_gradients(units: Any) -> None:
    """T20: N supervised positions, credits N dL/dh."""
    model, (inputs, targets) = decoder(), tokens()
    targets[1, 2:] = -100
    rule = TDCA(model, token_cross_entropy, Known(), units=units)
    given = true_errors(rule, inputs, targets)
    _, error = output_error(token_cross_entropy, model(inputs).detach(), targets)
    supervised = int((targets >= 0).sum())
    rows = [*(given[unit] for unit in rule.hidden_units(inputs)), error]
    rule.teacher.credits = [supervised * row.flatten(0, 1) for row in rows]
    expected = learned(apical.Backprop(model, token_cross_entropy), inputs, targets)
    assert distance(learned(rule, inputs, targets), expected) <= 1e-12


@pytest.mark.parametrize("options", [{}, {"sites": 3}, {"relative": True}, {"sites": 2, "relative": True, "projected": 4}])
@pytest.mark.parametrize("credit", ["logits", "probabilities"])
def test_credits_made_when_asked_for_are_those_made_at_once(options: dict[str, Any], credit: Any) -> None:
    """Equation (4) from what the top-down network emits."""
    model, (inputs, targets) = apart(), tokens()
    targets[0, 1:] = -100
    teacher = TopDownNetwork(VOCABULARY, [7], 5, credit=credit, **options)
    nn.init.normal_(teacher.body[-1].weight)
    rule = TDCA(model, token_cross_entropy, teacher)
    found = learned(rule, inputs, targets)
    p = torch.softmax(model(inputs).detach(), -1)
    y = F.one_hot(targets.clamp(min=0), VOCABULARY).double()
    emitted = teacher(p.flatten(0, 1), y.flatten(0, 1), True)
    share = (targets >= 0).double() / (targets >= 0).sum()
    hidden, last = (c.detach().view(BATCH, LENGTH, -1) * share[..., None] for c in teacher.credits(emitted, [7]))
    if credit == "probabilities":
        last = p * (last - (last * p).sum(-1, keepdim=True))
    body, head = model[:3], model[3]
    state = body(inputs)
    lower = torch.autograd.grad(state, [*body.parameters()], hidden)
    upper = torch.autograd.grad(head(state.detach()), [*head.parameters()], last)
    expected = dict(zip((name for name, _ in model.named_parameters()), [*lower, *upper], strict=True))
    assert distance(found, expected) <= 1e-12


def test_many_outputs_are_seen_through_a_projection_that_is_saved(tmp_path: Any) -> None:
    inputs, targets = tokens(300)
    rule = TDCA(decoder(vocabulary=300), token_cross_entropy, units="block")
    rule(inputs, targets).backward()
    (teacher,) = rule._drawn.values()
    assert teacher.projection.shape == (300, 64)
    assert teacher.body[0].in_features == 128
    teacher.save(tmp_path / "teacher.pt")
    kept, _ = load(tmp_path / "teacher.pt")
    assert torch.equal(kept.projection, teacher.projection)
    assert kept.projected == 64


@pytest.mark.parametrize("kind", [DFA, TDCA])
def test_precision_is_the_models(kind: Any) -> None:
    torch.set_default_dtype(torch.float)
    inputs, targets = tokens(40)
    rule = kind(decoder(vocabulary=40), token_cross_entropy, units="block", inside="feedback")
    expected = learned(rule, inputs, targets)
    with torch.autocast("cpu", torch.bfloat16):
        credit = rule(inputs, targets)
    credit.backward()
    for name, gradient in gradients(rule.model).items():
        if name.endswith("k.bias"):  # which softmax does not feel
            continue
        assert float(F.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0)) > 0.99, name
    rule.to(torch.bfloat16)
    rule(inputs, targets).backward()
    assert {gradient.dtype for gradient in gradients(rule.model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [DFA, TDCA])
@pytest.mark.parametrize("options", [{"units": "block"}, {"units": "micro", "inside": "feedback"}])
def test_models_of_tokens_are_checked(kind: Any, options: dict[str, Any]) -> None:
    assert "placement" in check_model(kind(decoder(), token_cross_entropy, **options), *tokens(), skip=("compiled",)).passed


def trained(rank: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of one rank of two on its half of a batch, or of one process (rank -1) on all of it."""
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    rule = DFA(decoder(vocabulary=40), token_cross_entropy, **options)
    torch.manual_seed(1)
    inputs, targets = torch.randint(40, (4, LENGTH)), torch.randint(40, (4, LENGTH))
    if rank < 0:
        rule(inputs, targets).loss.backward()
    else:
        half = slice(2 * rank, 2 * rank + 2)
        parallel = DistributedDataParallel(rule)
        parallel(inputs[half], targets[half]).loss.backward()
    return gradients(rule.model)


@pytest.mark.parametrize("options", [{}, {"units": "block", "source": "head", "inside": "feedback"}])
def test_two_ranks_are_one_process(options: dict[str, Any]) -> None:
    """T19."""
    alone = trained(-1, options)
    for rank in on_two_ranks(trained, options):
        assert distance(rank, alone) <= 1e-12
