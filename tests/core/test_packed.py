"""Attention, recurrent modules and users' own parameters carry feedback: the same gradients as edges written by hand."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import apical
from apical.core.edge import EdgeRule
from apical.core.packed import Part
from apical.errors import ConfigError, UnsupportedModelError

D = torch.double
RULES: dict[str, Callable[..., EdgeRule]] = {
    "fa": apical.FeedbackAlignment,
    "usf": apical.SignSymmetry,
    "frsf": partial(apical.SignSymmetry, variant="fixed"),
    "usf-current": partial(apical.SignSymmetry, scale="current"),
    "kp": apical.KolenPollack,
    "kp-closed": partial(apical.KolenPollack, form="closed"),
    "pfa": apical.ProductFeedbackAlignment,
    "pfa-closed": partial(apical.ProductFeedbackAlignment, form="closed"),
    "wm": partial(apical.WeightMirror, warmup=3, rate=0.0),
}


class Fed(torch.autograd.Function):
    """`x W^T`, whose backward sends the error down by K: an edge written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(x, feedback)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor, None]:
        x, feedback = ctx.saved_tensors
        return delta @ feedback, delta.flatten(0, -2).T @ x.flatten(0, -2), None


def fed(x: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = Fed.apply(x, weight, feedback)
    return result if bias is None else result + bias


class Around(nn.Module):
    """A module between two layers, so that an error passes it on its way to what learns below."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.below, self.module, self.call = nn.Linear(5, 8), module, call
        self.above = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.above(self.call(self.module, torch.tanh(self.below(x))))
        return result


def around(module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], width: int = 8) -> Around:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return Around(module, call, width).double()


def inputs() -> Tensor:
    return torch.randn(3, 6, 5, dtype=D, generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(3))
    (output * weights).sum().backward()
    return {name: q.grad.clone() for name, q in model.named_parameters() if q.grad is not None}


def squared(output: Tensor, targets: Tensor) -> Tensor:
    return (output * targets).sum()


def ruled(rule: EdgeRule, x: Tensor, output: Tensor) -> dict[str, Tensor]:
    rule.model.zero_grad()
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(3))
    rule(x, weights).backward()
    return {name: q.grad.clone() for name, q in rule.model.named_parameters() if q.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert (value - b[name]).abs().max() <= tolerance * max(1.0, float(b[name].abs().max())), name


MASKS = {
    "none": {},
    "causal": {"attn_mask": torch.full((6, 6), -math.inf, dtype=D).triu(1)},
    "bool": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True] * 2] * 3)},
    "fast": {"need_weights": False},
    "heads": {"average_attn_weights": False},
}


def by_hand(
    m: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, feedback: dict[str, Tensor], **options: Any
) -> Tensor:
    """Multi-head attention, batch first, from edges; masks as in PyTorch."""
    if m.in_proj_weight is None:
        weights = [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight]
        ks = [feedback["q_proj"], feedback["k_proj"], feedback["v_proj"]]
    else:
        weights, ks = list(m.in_proj_weight.chunk(3)), list(feedback["in_proj"].chunk(3))
    biases = m.in_proj_bias.chunk(3)
    rows = [fed(x, w, b, c) for x, w, b, c in zip((q, k, v), weights, ks, biases, strict=True)]
    q, k, v = (x.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for x in rows)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    mask = options.get("attn_mask")
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if "key_padding_mask" in options:
        scores = scores.masked_fill(options["key_padding_mask"][:, None, None, :], -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return fed(mixed, m.out_proj.weight, feedback["out_proj"], m.out_proj.bias)


def feedback_of(rule: EdgeRule, prefix: str = "module.") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): b for name, b in rule.feedback_weights().items()}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_is_edges_written_by_hand(mask: str, batch_first: bool) -> None:
    """T1, with masks."""

    def call(m: nn.Module, h: Tensor) -> Tensor:
        h = h if batch_first else h.transpose(0, 1)
        y = m(h, h, h, **MASKS[mask])[0]
        return y if batch_first else y.transpose(0, 1)  # type: ignore[no-any-return]

    model, x = around(nn.MultiheadAttention(8, 2, batch_first=batch_first), call), inputs()
    rule = apical.FeedbackAlignment(model, squared)
    feedback = feedback_of(rule)
    own = ruled(rule, x, model(x))
    h = torch.tanh(model.below(x))
    output = fed(
        by_hand(model.module, h, h, h, feedback, **MASKS[mask]), model.above.weight, feedback["above"], model.above.bias
    )
    same(own, gradients(model, output), 1e-12)


@pytest.mark.parametrize("widths", [{}, {"kdim": 3, "vdim": 4}])
def test_cross_attention_is_edges_written_by_hand(widths: dict[str, int]) -> None:
    """T1, of several widths."""
    key, value = torch.randn(3, 4, widths.get("kdim", 8), dtype=D), torch.randn(3, 4, widths.get("vdim", 8), dtype=D)
    model = around(nn.MultiheadAttention(8, 2, batch_first=True, **widths), lambda m, h: m(h, key, value)[0])
    rule, x = apical.FeedbackAlignment(model, squared), inputs()
    feedback = feedback_of(rule)
    own = ruled(rule, x, model(x))
    y = by_hand(model.module, torch.tanh(model.below(x)), key, value, feedback)
    same(own, gradients(model, fed(y, model.above.weight, feedback["above"], model.above.bias)), 1e-12)


def layer_by_hand(m: nn.Module, x: Tensor, feedback: dict[str, Tensor], first: bool) -> Tensor:
    """A transformer layer from edges, without dropout; a decoder layer attends to x itself as its memory."""

    def part(prefix: str, q: Tensor, memory: Tensor) -> Tensor:
        own = {key.removeprefix(f"{prefix}."): b for key, b in feedback.items() if key.startswith(f"{prefix}.")}
        return by_hand(m.get_submodule(prefix), q, memory, memory, own)  # type: ignore[arg-type]

    def feed_forward(h: Tensor) -> Tensor:
        up, down = m.get_submodule("linear1"), m.get_submodule("linear2")
        hidden = torch.relu(fed(h, up.weight, feedback["linear1"], up.bias))
        return fed(hidden, down.weight, feedback["linear2"], down.bias)

    memory, parts = x, [lambda h: part("self_attn", h, h), feed_forward]
    if isinstance(m, nn.TransformerDecoderLayer):
        parts.insert(1, lambda h: part("multihead_attn", h, memory))
    for number, run in enumerate(parts, 1):
        norm = m.get_submodule(f"norm{number}")
        x = x + run(norm(x)) if first else norm(x + run(x))
    return x


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("first", [True, False])
def test_transformer_layers_are_edges_written_by_hand(kind: type[nn.Module], first: bool) -> None:
    """T1, of layers with residual sums and norms, before or behind."""
    model = around(layer(kind, first), lambda m, h: m(h) if kind is nn.TransformerEncoderLayer else m(h, h))
    rule, x = apical.FeedbackAlignment(model, squared), inputs()
    feedback = feedback_of(rule)
    own = ruled(rule, x, model(x))
    y = layer_by_hand(model.module, torch.tanh(model.below(x)), feedback, first)
    same(own, gradients(model, fed(y, model.above.weight, feedback["above"], model.above.bias)), 1e-12)


def step(kind: str, x: Tensor, h: Tensor, c: Tensor, w: list[Any], k: list[Any]) -> tuple[Tensor, Tensor]:
    """One step of a recurrent layer from edges: w = [w_ih, w_hh, b_ih, b_hh], k the feedback of the first two."""
    a, b = fed(x, w[0], k[0], w[2]), fed(h, w[1], k[1], w[3])
    if kind == "RNN":
        return torch.tanh(a + b), c
    if kind == "GRU":
        (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
        r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
        n = torch.tanh(an + r * bn)
        return n + z * (h - n), c
    i, f, g, o = (a + b).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def recurrent_by_hand(m: nn.RNNBase, x: Tensor, feedback: dict[str, Tensor]) -> Tensor:
    """A recurrent module, batch first, from edges: layers, both directions, projections."""
    for layer in range(m.num_layers):
        sides = []
        for suffix in [f"l{layer}", f"l{layer}_reverse"][: 2 if m.bidirectional else 1]:
            w = [getattr(m, f"{part}_{suffix}") for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            k = [feedback[f"weight_ih_{suffix}"], feedback[f"weight_hh_{suffix}"]]
            h, c = x.new_zeros(len(x), m.proj_size or m.hidden_size), x.new_zeros(len(x), m.hidden_size)
            outputs = []
            for t in range(x.shape[1]) if "reverse" not in suffix else reversed(range(x.shape[1])):
                h, c = step(m.mode.split("_")[0], x[:, t], h, c, w, k)
                if m.proj_size:
                    h = fed(h, getattr(m, f"weight_hr_{suffix}"), feedback[f"weight_hr_{suffix}"], None)
                outputs.append(h)
            sides.append(torch.stack(outputs if "reverse" not in suffix else outputs[::-1], 1))
        x = torch.cat(sides, -1)
    return x


RECURRENT: dict[str, tuple[Callable[[], nn.RNNBase], int]] = {
    "rnn": (lambda: nn.RNN(8, 8, 2, batch_first=True), 8),
    "gru": (lambda: nn.GRU(8, 8, 2, batch_first=True), 8),
    "lstm": (lambda: nn.LSTM(8, 8, 2, batch_first=True), 8),
    "lstm-both": (lambda: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True), 12),
    "gru-both": (lambda: nn.GRU(8, 6, 1, batch_first=True, bidirectional=True), 12),
    "lstm-projected": (lambda: nn.LSTM(8, 8, 2, batch_first=True, proj_size=6), 6),
    "lstm-both-projected": (lambda: nn.LSTM(8, 8, 1, batch_first=True, bidirectional=True, proj_size=3), 6),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_modules_are_edges_written_by_hand(name: str) -> None:
    """T1, of recurrent nets: layers, both directions, projections."""
    make, width = RECURRENT[name]
    model, x = around(make(), lambda m, h: m(h)[0], width), inputs()
    rule = apical.FeedbackAlignment(model, squared)
    feedback = feedback_of(rule)
    own = ruled(rule, x, model(x))
    y = recurrent_by_hand(model.module, torch.tanh(model.below(x)), feedback)
    same(own, gradients(model, fed(y, model.above.weight, feedback["above"], model.above.bias)), 1e-12)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_cells_are_edges_written_by_hand(kind: str) -> None:
    """T1, of cells."""

    def run(m: nn.Module, h: Tensor) -> Tensor:
        state, states = None, []
        for t in range(h.shape[1]):
            state = m(h[:, t], state)
            states.append(state[0] if kind == "LSTM" else state)
        return torch.stack(states, 1)

    model, x = around(getattr(nn, f"{kind}Cell")(8, 8), run), inputs()
    rule = apical.FeedbackAlignment(model, squared)
    feedback = feedback_of(rule)
    own = ruled(rule, x, model(x))
    m, below = model.module, torch.tanh(model.below(x))
    h = c = x.new_zeros(3, 8)
    states = []
    for t in range(6):
        w = [m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh]
        h, c = step(kind, below[:, t], h, c, w, [feedback["weight_ih"], feedback["weight_hh"]])
        states.append(h)
    output = fed(torch.stack(states, 1), model.above.weight, feedback["above"], model.above.bias)
    same(own, gradients(model, output), 1e-12)


def layer(kind: type[nn.Module], first: bool) -> nn.Module:
    return kind(8, 2, 16, 0.0, batch_first=True, norm_first=first)  # type: ignore[call-arg]


STACKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda m, h: m(h, h, h)[0]),
    "biased": (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True), lambda m, h: m(h, h, h)[0]),
    "encoder-layer": (lambda: layer(nn.TransformerEncoderLayer, True), lambda m, h: m(h)),
    "encoder": (lambda: nn.TransformerEncoder(layer(nn.TransformerEncoderLayer, False), 2), lambda m, h: m(h)),
    "decoder": (lambda: nn.TransformerDecoder(layer(nn.TransformerDecoderLayer, True), 2), lambda m, h: m(h, h)),
    "transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True),
        lambda m, h: m(h, h),
    ),
    **{name: (make, lambda m, h: m(h)[0]) for name, (make, width) in RECURRENT.items() if width == 8},
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("mode", [True, False])
def test_with_the_weights_as_feedback_bits_are_those_of_backpropagation(name: str, dtype: torch.dtype, mode: bool) -> None:
    """T2."""
    make, call = STACKS[name]
    model, x = around(make(), call).to(dtype).train(mode), inputs().to(dtype)
    exact = gradients(model, model(x))
    rule = apical.FeedbackAlignment(model, squared)
    for site, held in rule.layers.items():
        rule.set_feedback(site, held.weight.detach())
    own = ruled(rule, x, model(x))
    assert own.keys() == exact.keys()
    assert all(torch.equal(own[n], exact[n]) for n in own)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("stack", ["encoder", "lstm", "gru"])
def test_every_rule_is_exact_feedback_alignment_with_its_own_feedback(name: str, stack: str) -> None:
    make, call = STACKS[stack]
    model, x = around(make(), call), inputs()
    rule = RULES[name](model, squared)
    own = ruled(rule, x, model(x))
    feedback = {n: b.detach().clone() for n, b in rule.feedback_weights().items()}
    if name.startswith(("kp", "pfa")) and "closed" not in name:
        assert all(parameter.grad is not None for parameter in rule.feedback_parameters())
    rule.detach()
    fixed = apical.FeedbackAlignment(model, squared)
    for site, b in feedback.items():
        fixed.set_feedback(site, b)
    same(own, ruled(fixed, x, model(x)), 1e-12)


@pytest.mark.parametrize("name", ["kp", "pfa"])
@pytest.mark.parametrize("stack", ["attention", "lstm"])
def test_plastic_feedback_of_a_module_gets_its_weights_gradient(name: str, stack: str) -> None:
    make, call = STACKS[stack]
    model, x = around(make(), call), inputs()
    rule = RULES[name](model, squared)
    ruled(rule, x, model(x))
    for site, held in rule.layers.items():
        expected = held.weight.grad
        assert expected is not None
        if name == "pfa":
            b = rule.expansion.get_buffer(site.replace(".", "/"))  # type: ignore[union-attr]
            expected = b.T @ expected
        grad = rule.plastic_of(site).grad  # type: ignore[attr-defined]
        assert torch.allclose(grad, expected, rtol=0, atol=1e-12)


class Separate(nn.Module):
    """Self-attention with a layer for each of q, k and v."""

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out_proj = (nn.Linear(8, 8) for _ in range(4))
        with torch.no_grad():
            for layer, w, b in zip(
                (self.q, self.k, self.v), fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3), strict=True
            ):
                layer.weight.copy_(w), layer.bias.copy_(b)
            self.out_proj.weight.copy_(fused.out_proj.weight), self.out_proj.bias.copy_(fused.out_proj.bias)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (part(h).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        a = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.out_proj((a @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["fa", "usf", "usf-current", "frsf", "kp", "kp-closed", "pfa", "pfa-closed"])
def test_fused_and_separate_projections_are_the_same_rule(name: str) -> None:
    """T11."""
    fused = around(nn.MultiheadAttention(8, 2, batch_first=True), STACKS["attention"][1])
    apart = copy.deepcopy(fused)
    apart.module, apart.call = Separate(fused.module).double(), lambda m, h: m(h)
    x = inputs()
    torch.manual_seed(5)
    one = RULES[name](fused, squared)
    torch.manual_seed(5)
    three = RULES[name](apart, squared)
    blocks = [three.feedback_weight(f"module.{part}") for part in "qkv"]
    if name.startswith("pfa"):  # B and R are drawn in another order
        if name == "pfa-closed":
            return
        key = "module/in_proj"
        one.expansion.get_buffer(key).copy_(torch.block_diag(*(three.expansion.get_buffer(f"module/{p}") for p in "qkv")))
        with torch.no_grad():
            one.plastic_of("module.in_proj").copy_(torch.cat([three.plastic_of(f"module.{p}") for p in "qkv"]))  # type: ignore[attr-defined]
    for site in ("module.out_proj", "above") if name.startswith("pfa") else ():
        one.set_feedback(site, three.expansion.get_buffer(site.replace(".", "/")), three.plastic_of(site).detach())  # type: ignore[attr-defined]
    torch.testing.assert_close(one.feedback_weight("module.in_proj"), torch.cat(blocks), rtol=0, atol=1e-14)
    a, b = ruled(one, x, fused(x)), ruled(three, x, apart(x))
    for kind in ("weight", "bias"):
        b[f"module.in_proj_{kind}"] = torch.cat([b.pop(f"module.{part}.{kind}") for part in "qkv"])
    same(a, b, 1e-12)


def test_each_gate_has_the_law_of_a_layer_of_its_own() -> None:
    torch.manual_seed(0)
    rule = apical.FeedbackAlignment(nn.Sequential(nn.Linear(4, 64), Last(nn.LSTM(64, 64)), nn.Linear(64, 2)))
    for part in ("1.of.weight_ih_l0", "1.of.weight_hh_l0"):
        for gate in rule.feedback_weight(part).chunk(4):
            assert 0.95 * math.sqrt(6 / 128) < float(gate.abs().max()) <= math.sqrt(6 / 128)


class Last(nn.Module):
    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x)[0]  # type: ignore[no-any-return]


# Time


def lstm_network() -> tuple[Around, Tensor, Tensor]:
    model, x = around(nn.LSTM(8, 7, batch_first=True), lambda m, h: m(h)[0], 7), inputs()
    return model, x, torch.randn(3, 6, 4, dtype=D, generator=torch.Generator().manual_seed(3))


def test_an_lstm_without_errors_through_time_learns_by_e_prop() -> None:
    """T10."""
    model, x, error = lstm_network()
    rule = apical.FeedbackAlignment(model, squared, through_time=False)
    assert "module.weight_hh_l0" not in rule.layers
    own = ruled(rule, x, model(x))
    m, signals = model.module, error @ rule.feedback_weight("above")
    with torch.no_grad():
        h = c = x.new_zeros(3, 7)
        below = torch.tanh(model.below(x))
        traces = [x.new_zeros(3, 28, width) for width in (8, 7, 1)]  # of the cell state, by input, recurrence and bias
        totals = [x.new_zeros(28, width) for width in (8, 7, 1)]
        for t in range(6):
            presynaptic = (below[:, t], h, x.new_ones(3, 1))
            i, f, g, o = (below[:, t] @ m.weight_ih_l0.T + m.bias_ih_l0 + h @ m.weight_hh_l0.T + m.bias_hh_l0).chunk(4, -1)
            i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
            direct = torch.cat([g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), torch.zeros_like(o)], -1)
            c = f * c + i * g
            h = o * torch.tanh(c)
            keeps = torch.cat([f, f, f, torch.zeros_like(f)], -1)
            from_cell = (signals[:, t] * o * (1 - torch.tanh(c) ** 2)).repeat(1, 4)
            from_gate = torch.cat([x.new_zeros(3, 21), signals[:, t] * torch.tanh(c) * o * (1 - o)], -1)
            for k, y in enumerate(presynaptic):
                traces[k] = keeps[:, :, None] * traces[k] + direct[:, :, None] * y[:, None, :]
                totals[k] += (from_cell[:, :, None] * traces[k] + from_gate[:, :, None] * y[:, None, :]).sum(0)
    for name, expected in zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"), totals, strict=True):
        found = own[f"module.{name}"]
        assert (found - expected.view_as(found)).abs().max() <= 1e-12, name


class Leaky(nn.Module):
    """h_t = (1 - a) h_{t-1} + a tanh(W h_{t-1} + U x_t)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.RNNCell(5, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, states = x.new_zeros(len(x), 7), []
        for t in range(x.shape[1]):
            h = 0.7 * h + 0.3 * self.cell(x[:, t], h)
            states.append(h)
        return self.out(torch.stack(states, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["fa", "usf", "kp", "pfa", "wm"])
def test_a_leaky_network_without_errors_through_time_learns_by_rflo(name: str) -> None:
    """T10."""
    torch.manual_seed(0)
    model, x = Leaky().double(), inputs()
    rule = RULES[name](model, squared, through_time=False)
    own = ruled(rule, x, model(x))
    error = torch.randn(3, 6, 4, dtype=D, generator=torch.Generator().manual_seed(3))
    signals, cell = error @ rule.feedback_weight("out"), model.cell
    with torch.no_grad():
        h, traces = x.new_zeros(3, 7), [x.new_zeros(3, 7, width) for width in (5, 7)]
        totals = [x.new_zeros(7, width) for width in (5, 7)]
        for t in range(6):
            phi = torch.tanh(x[:, t] @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh)
            for k, y in enumerate((x[:, t], h)):
                traces[k] = 0.7 * traces[k] + 0.3 * (1 - phi**2)[:, :, None] * y[:, None, :]
                totals[k] += (signals[:, t, :, None] * traces[k]).sum(0)
            h = 0.7 * h + 0.3 * phi
    assert (own["cell.weight_ih"] - totals[0]).abs().max() <= 1e-12
    assert (own["cell.weight_hh"] - totals[1]).abs().max() <= 1e-12


def test_through_time_needs_a_recurrent_module() -> None:
    with pytest.raises(ConfigError, match="through_time=False"):
        apical.FeedbackAlignment(nn.Linear(3, 2), through_time=False)


# Tied, shared and functional weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.between = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.between(self.table(tokens))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["fa", "kp", "pfa", "usf"])
def test_a_tied_embedding_gets_the_heads_part_and_its_own(name: str) -> None:
    """T8."""
    model, tokens = Tied().double(), torch.tensor([[1, 2, 2], [0, 8, 1]])
    rule = RULES[name](model, squared)
    b, k = rule.feedback_weight("head").detach().clone(), rule.feedback_weight("between").detach().clone()
    own = ruled(rule, tokens, model(tokens))
    error = torch.randn(2, 3, 9, dtype=D, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        h = torch.tanh(model.between(model.table(tokens)))
        below = ((error @ b) * (1 - h * h)) @ k
        expected = error.flatten(0, 1).T @ h.flatten(0, 1)
        expected.index_add_(0, tokens.flatten(), below.flatten(0, 1))
    assert torch.allclose(own["table.weight"], expected, rtol=0, atol=1e-12)
    if name == "kp":  # B hears both uses, as the weight does
        assert torch.equal(rule.plastic_of("head").grad, own["table.weight"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["kp", "pfa"])
def test_closed_forms_follow_a_tied_weight_as_explicit_ones_do(name: str) -> None:
    tokens, targets = torch.tensor([[1, 2, 2], [0, 8, 1]]), torch.tensor([[2, 2, 3], [8, 1, 4]])

    def loss(output: Tensor, goals: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), goals.flatten())

    found = []
    for form in ("explicit", "auto"):
        torch.manual_seed(1)
        rule = {"kp": apical.KolenPollack, "pfa": apical.ProductFeedbackAlignment}[name](Tied().double(), loss, form=form)
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            rule(tokens, targets).backward()
            optimizer.step()
        found.append(rule.feedback_weight("head"))
    assert torch.allclose(*found, rtol=0, atol=1e-12)


class Own(nn.Module):
    """A module that multiplies by its parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight)


@pytest.mark.parametrize("name", RULES)
def test_a_parameter_named_as_a_site_is_a_layer(name: str) -> None:
    model = around(Own(), lambda m, h: m(h))
    layered = copy.deepcopy(model)
    layered.module = nn.Linear(8, 8, bias=False).double()
    layered.module.weight = nn.Parameter(model.module.weight.detach().clone())
    found, x = [], inputs()
    for each, options, site in ((model, {"sites": ("module.weight",)}, "module.weight"), (layered, {}, "module")):
        torch.manual_seed(4)
        rule = RULES[name](each, squared, **options)
        assert site in rule.layers
        found.append(ruled(rule, x, each(x)))
    same(*found, 1e-12)


def test_a_parameter_that_is_no_site_is_refused_with_the_remedy() -> None:
    model = around(Own(), lambda m, h: m(h))
    with pytest.raises(UnsupportedModelError, match=r"'module.weight'.*sites"):
        apical.FeedbackAlignment(model)
    with pytest.raises(ConfigError, match="no such parameter"):
        apical.FeedbackAlignment(model, sites=("module.other",))
    with pytest.raises(ConfigError, match="no matrix"):
        apical.FeedbackAlignment(model, sites=("below.bias",))


def test_a_site_that_is_used_through_a_copy_is_refused() -> None:
    class Copied(Own):
        def forward(self, h: Tensor) -> Tensor:
            return F.linear(h, self.weight * 2)

    model = around(Copied(), lambda m, h: m(h))
    rule = apical.FeedbackAlignment(model, squared, sites=("module.weight",))
    with pytest.raises(UnsupportedModelError, match=r"'module'.*function of its weight"):
        rule(inputs(), torch.randn(3, 6, 4))


class Holder(Own):
    """Its parameter is registered before the layer whose output it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(self.below(h).tanh())


class Twice(Own):
    """Its parameter multiplies what it has made itself."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(super().forward(h).tanh())


@pytest.mark.parametrize("kind", [Holder, Twice])
def test_a_site_whose_input_needs_an_error_is_not_the_first_layer(kind: type[nn.Module]) -> None:
    model, x, y = kind().double(), torch.randn(5, 8, dtype=D), torch.randn(5, 8, dtype=D)
    if kind is Twice:  # nothing else trains, so that only a forward pass can tell
        with pytest.raises(UnsupportedModelError, match=r"'weight' was treated as the first one.*first_layer=True"):
            apical.FeedbackAlignment(model, squared, sites=("weight",))(x, y)
    rule = apical.FeedbackAlignment(model, squared, sites=("weight",), first_layer=kind is Twice)
    rule.feedback_weights()["weight"].copy_(model.weight.detach())  # then it is backpropagation
    same(ruled(rule, x, y), gradients(model, model(x)), 1e-12)


def test_a_module_used_twice_has_one_feedback() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model, x = around(attention, lambda m, h: m(m(h, h, h)[0], h, h)[0]), inputs()
    rule = apical.FeedbackAlignment(model, squared)
    feedback = feedback_of(rule)
    own = ruled(rule, x, model(x))
    h = torch.tanh(model.below(x))
    y = by_hand(model.module, by_hand(model.module, h, h, h, feedback), h, h, feedback)
    same(own, gradients(model, fed(y, model.above.weight, feedback["above"], model.above.bias)), 1e-12)


# What cannot be done is refused by name


def test_a_parametrised_recurrent_weight_is_refused() -> None:
    model = around(nn.LSTM(8, 8, batch_first=True), lambda m, h: m(h)[0])
    parametrize.register_parametrization(model.module, "weight_hh_l0", nn.Identity())
    with pytest.raises(UnsupportedModelError, match="'module'"):
        apical.FeedbackAlignment(model, squared)


def test_a_subclass_that_computes_otherwise_is_refused() -> None:
    class Odd(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    with pytest.raises(UnsupportedModelError, match=r"module\.in_proj_weight"):
        apical.FeedbackAlignment(around(Odd(8, 2), STACKS["attention"][1]), squared)


def test_within_a_checkpoint_it_is_refused() -> None:
    model = around(nn.MultiheadAttention(8, 2), lambda m, h: checkpoint(lambda z: m(z, z, z)[0], h, use_reentrant=False))
    with pytest.raises(UnsupportedModelError, match=r"'module'.*checkpoint"):
        apical.FeedbackAlignment(model, squared)(inputs(), torch.randn(3, 6, 4))


@pytest.mark.parametrize(
    "make", [apical.DeepFeedbackControl, apical.DualPropagation, apical.CounterCurrentLearning, apical.PredictiveCoding]
)
def test_rules_that_need_chains_refuse_it_by_name(make: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Last(nn.LSTM(8, 8)), nn.Linear(8, 4))
    with pytest.raises(UnsupportedModelError, match=r"'2\.of' \(LSTM\)"):
        make(model)


def test_a_weight_of_attention_used_outside_is_refused() -> None:
    model = around(nn.MultiheadAttention(8, 2, batch_first=True), lambda m, h: F.linear(m(h, h, h)[0], m.out_proj.weight))
    with pytest.raises(UnsupportedModelError, match=r"'module\.out_proj' is also used outside"):
        apical.FeedbackAlignment(model, squared)(inputs(), torch.randn(3, 6, 4))


def test_a_weight_changed_before_the_backward_pass_is_refused() -> None:
    model = around(nn.LSTM(8, 8, batch_first=True), lambda m, h: m(h)[0])
    credit = apical.FeedbackAlignment(model, squared)(inputs(), torch.randn(3, 6, 4))
    with torch.no_grad():
        model.module.weight_hh_l0.add_(1.0)
    with pytest.raises(RuntimeError, match="modified"):
        credit.backward()


# As people train


@pytest.mark.parametrize("name", ["fa", "usf", "kp", "pfa"])
@pytest.mark.parametrize("stack", ["attention", "encoder"])
def test_under_autocast_the_error_follows_the_feedback(name: str, stack: str) -> None:
    """T16."""
    make, call = STACKS[stack]
    model, x = around(make(), call).float(), inputs().float()
    rule = RULES[name](model, squared)
    usual = ruled(rule, x, model(x))
    exact = gradients(model, model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = ruled(rule, x, model(x).float())
    mine, exactly, theirs = (torch.cat([g["below.weight"].flatten()]) for g in (lower, usual, exact))
    assert F.cosine_similarity(mine, exactly, dim=0) > 0.98
    assert F.cosine_similarity(mine, theirs, dim=0) < 0.9 or name == "usf"


@pytest.mark.parametrize("name", ["fa", "kp", "pfa"])
def test_rule_and_state_are_copied_saved_and_continued(name: str) -> None:
    model, x = around(nn.LSTM(8, 8, batch_first=True), lambda m, h: m(h)[0]), inputs()
    rule = RULES[name](model, squared)
    ruled(rule, x, model(x))
    copied = copy.deepcopy(rule)
    same(ruled(copied, x, model(x)), ruled(rule, x, model(x)), 0.0)
    other = RULES[name](around(nn.LSTM(8, 8, batch_first=True), model.call), squared)
    other.load_state_dict(rule.state_dict())
    same(ruled(other, x, model(x)), ruled(rule, x, model(x)), 0.0)
    assert rule.detach() is model
    assert all("forward" not in module.__dict__ for module in model.modules())
    copy.deepcopy(model)


def test_a_part_can_be_pickled() -> None:
    part = Part(nn.GRUCell(2, 3), "weight_hh", nn.GRUCell(2, 3), 3, recurrent=True)
    assert pickle.loads(pickle.dumps(part)).weight.shape == (9, 3)


@pytest.mark.parametrize("name", ["fa", "pfa"])
def test_frozen_parts_hand_the_error_down(name: str) -> None:
    model, x = around(nn.MultiheadAttention(8, 2, batch_first=True), STACKS["attention"][1]), inputs()
    usual = ruled(RULES["fa"](model, squared), x, model(x)) if name == "fa" else {}
    torch.manual_seed(0)
    model.module.requires_grad_(False)
    rule = RULES[name](model, squared)
    own = ruled(rule, x, model(x))
    assert not any(n.startswith("module") for n in own)
    assert bool(own["below.weight"].any())
    assert not usual or own["below.weight"].shape == usual["below.weight"].shape


def test_packed_sequences_of_several_lengths() -> None:
    def call(m: nn.Module, h: Tensor) -> Tensor:
        rows = nn.utils.rnn.pack_padded_sequence(h, torch.tensor([6, 4, 2]), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(m(rows)[0], batch_first=True)[0]

    model, x = around(nn.GRU(8, 8, batch_first=True), call), inputs()
    exact = gradients(model, model(x))
    rule = apical.FeedbackAlignment(model, squared)
    other = ruled(rule, x, model(x))
    assert not torch.allclose(other["below.weight"], exact["below.weight"])
    for site, held in rule.layers.items():
        rule.set_feedback(site, held.weight.detach())
    same(ruled(rule, x, model(x)), exact, 0.0)


def test_pfa_counts_rows_not_sequences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    rule = apical.ProductFeedbackAlignment(model, squared, form="explicit")
    for _ in range(2):  # rows are counted at one batch for the next
        rule(torch.randn(3, 6, 5, dtype=D), torch.randn(3, 6, 4, dtype=D)).backward()
    assert not rule.literal("2")  # 18 rows, 16 units
    narrow = apical.ProductFeedbackAlignment(copy.deepcopy(rule.detach()), squared, form="explicit")
    narrow(torch.randn(3, 2, 5, dtype=D), torch.randn(3, 2, 4, dtype=D)).backward()
    assert narrow.literal("2")


def test_where_the_literal_form_cannot_be_had_is_said() -> None:
    packed = apical.ProductFeedbackAlignment(around(nn.MultiheadAttention(8, 2), STACKS["attention"][1]), form="literal")
    (remark,) = [remark for remark in packed.remarks if "passes through the precomputed product B R" in remark]
    assert "'module.in_proj', 'module.out_proj'" in remark
    assert "'above'" not in remark
    dense = apical.ProductFeedbackAlignment(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), form="literal")
    assert not any("precomputed product" in remark for remark in dense.remarks)


def test_the_current_scale_is_the_weights_root_mean_square() -> None:
    torch.manual_seed(0)
    model = around(nn.MultiheadAttention(8, 2), STACKS["attention"][1])
    rule = apical.SignSymmetry(model, squared, scale="current")
    with torch.no_grad():
        model.module.in_proj_weight[:8] *= 3
    for found, weight in zip(
        rule.feedback_weight("module.in_proj").chunk(3), model.module.in_proj_weight.chunk(3), strict=True
    ):
        assert torch.allclose(found, weight.sign() * weight.square().mean().sqrt(), rtol=0, atol=1e-14)
    above = rule.feedback_weight("above")
    assert torch.allclose(above, model.above.weight.sign() * model.above.weight.square().mean().sqrt(), rtol=0, atol=1e-14)


def test_compiled_attention_is_eager_attention() -> None:
    model, x = around(nn.MultiheadAttention(8, 2, batch_first=True), STACKS["attention"][1]), inputs()
    rule = apical.FeedbackAlignment(model, squared)
    eager = ruled(rule, x, model(x))
    torch._dynamo.reset()
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    compiled(x, torch.randn(3, 6, 4, dtype=D, generator=torch.Generator().manual_seed(3))).backward()
    same({name: q.grad.clone() for name, q in model.named_parameters()}, eager, 1e-12)


def test_recurrent_modules_run_outside_a_compiled_graph() -> None:
    model, x = around(nn.GRU(8, 8, batch_first=True), lambda m, h: m(h)[0]), inputs()
    rule = apical.FeedbackAlignment(model, squared)
    targets = torch.randn(3, 6, 4, dtype=D, generator=torch.Generator().manual_seed(3))
    eager = ruled(rule, x, model(x))
    torch._dynamo.reset()
    model.zero_grad()
    torch.compile(rule, backend="aot_eager")(x, targets).backward()
    same({name: q.grad.clone() for name, q in model.named_parameters()}, eager, 1e-12)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"'module' cannot be compiled under .*leave out fullgraph=True"):
        torch.compile(rule, backend="aot_eager", fullgraph=True)(x, targets)


@pytest.mark.parametrize("used", ["last", "hidden", "cell", "both"])
def test_no_error_goes_round_the_cuts_by_any_output_of_a_recurrent_module(used: str) -> None:
    def call(m: nn.Module, h: Tensor) -> Tensor:
        out, (hidden, cell) = m(h)
        return {"last": out[:, -1], "hidden": hidden[-1], "cell": cell[-1], "both": out.mean(1) + hidden[-1]}[used]  # type: ignore[no-any-return]

    model, x = around(nn.LSTM(8, 8, batch_first=True), call), inputs()
    rule = apical.DirectFeedbackAlignment(model, F.cross_entropy)
    targets = torch.tensor([0, 1, 2])
    assert [row.path.startswith("cut") for row in rule.placement(x)] == [True, True, False]
    F.cross_entropy(model(x), targets).backward()
    exact = {name: q.grad.clone() for name, q in model.named_parameters()}
    model.zero_grad()
    rule(x, targets).backward()
    for name, q in model.named_parameters():
        close = torch.allclose(q.grad, exact[name], rtol=1e-6, atol=0)
        assert close == name.startswith("above"), name
