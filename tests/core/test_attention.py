"""Attention from its parts against PyTorch's, and the backward passes of `attention=` against hand-written equations."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from apical import Backprop, DirectFeedbackAlignment, FeedbackAlignment, KolenPollack, SignSymmetry
from apical.core.attention import attend, causal, mixed, scaled_dot_product
from apical.core.credit import CreditRule
from apical.diagnostics.interventions import Probe
from apical.diagnostics.positions import across_positions
from apical.errors import ConfigError, UnsupportedModelError
from apical.testing import check_model
from apical.testing.two_ranks import on_two_ranks

SAMPLES, TIME, WIDTH, HEADS, VOCABULARY = 3, 5, 8, 2, 7

MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without biases": {"bias": False},
    "other widths": {"kdim": 6, "vdim": 4},
    "bias rows": {"add_bias_kv": True},
    "zero row": {"add_zero_attn": True, "batch_first": True},
    "both rows": {"add_bias_kv": True, "add_zero_attn": True},
    "dropout": {"dropout": 0.4},
}


def hidden(masked: bool = True) -> Tensor:
    mask = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
    return mask if masked else ~mask


def padding() -> Tensor:
    rows = torch.zeros(SAMPLES, TIME, dtype=torch.bool)
    rows[0, -2:] = True
    return rows


CALLS: dict[str, dict[str, Any]] = {
    "with weights": {},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "mask": {"attn_mask": hidden()},
    "mask, without weights": {"attn_mask": hidden(), "need_weights": False},
    "causal": {"attn_mask": hidden(), "is_causal": True, "need_weights": False},
    "numbers as mask": {"attn_mask": torch.linspace(-1, 1, TIME * TIME, dtype=torch.double).view(TIME, TIME)},
    "mask of each head": {"attn_mask": torch.randn(SAMPLES * HEADS, TIME, TIME, dtype=torch.double)},
    "padding": {"key_padding_mask": padding()},
    "padding and mask": {"key_padding_mask": padding(), "attn_mask": hidden(), "need_weights": False},
}


def made(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return module


def given(module: nn.MultiheadAttention, cross: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    widths = (WIDTH, module.kdim or WIDTH, module.vdim or WIDTH)
    rows = [torch.randn(TIME, SAMPLES, width, dtype=torch.double, requires_grad=True) for width in widths]
    if not cross and len(set(widths)) == 1:
        rows = [rows[0]] * 3
    if not module.batch_first:
        return rows
    turned: dict[int, Tensor] = {id(row): row.detach().transpose(0, 1).contiguous().requires_grad_() for row in rows}
    return [turned[id(row)] for row in rows]


def with_gradients(call: Callable[..., Any], module: nn.Module, rows: list[Tensor], **options: Any) -> list[Tensor]:
    torch.manual_seed(2)
    output, weights = call(*rows, **options)
    torch.manual_seed(3)
    loss = (output * torch.randn_like(output)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn_like(weights)).sum()
    leaves = list({id(row): row for row in rows}.values()) + list(module.parameters())
    return [output, *([] if weights is None else [weights]), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_from_its_parts_it_is_pytorchs(options: dict[str, Any], arguments: dict[str, Any]) -> None:
    module = made(**options)
    for cross in (False, True):
        rows = given(module, cross)
        expected = with_gradients(module, module, rows, **arguments)
        found = with_gradients(lambda *a, **k: attend(module, *a, **k), module, rows, **arguments)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_one_sample_without_a_batch() -> None:
    module = made()
    rows = torch.randn(TIME, WIDTH, dtype=torch.double)
    for one, other in zip(attend(module, rows, rows, rows), module(rows, rows, rows), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}, {"bias": False}], ids=["packed", "separate", "no bias"])
def test_projections_go_through_the_function(options: dict[str, Any]) -> None:
    module, seen = made(**options), []

    def linear(name: str, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((name, inputs.shape[-1], tuple(weight.shape)))
        return 2 * F.linear(inputs, weight, bias)

    doubled = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    rows = given(module, True)
    torch.testing.assert_close(attend(module, *rows, linear=linear)[0], doubled(*rows)[0], rtol=1e-12, atol=1e-12)
    kdim, vdim = options.get("kdim", WIDTH), options.get("vdim", WIDTH)
    assert seen == [("q", WIDTH, (WIDTH, WIDTH)), ("k", kdim, (WIDTH, kdim)), ("v", vdim, (WIDTH, vdim)), ("out", 8, (8, 8))]


SDPA: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "truth values": {"attn_mask": hidden(False)},
    "numbers": {"attn_mask": torch.randn(TIME, TIME, dtype=torch.double)},
    "scale": {"scale": 0.3},
    "no key at all": {"attn_mask": torch.tensor([[False] * TIME] + [[True] * TIME] * (TIME - 1))},
}


@pytest.mark.parametrize("options", SDPA.values(), ids=SDPA)
def test_scaled_dot_product_is_pytorchs(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(SAMPLES, HEADS, TIME, 4, dtype=torch.double, requires_grad=True) for _ in range(3)]
    error = torch.randn(SAMPLES, HEADS, TIME, 4, dtype=torch.double)
    expected = F.scaled_dot_product_attention(*rows, **options)
    for attention in ("exact", "fixed", "present"):
        found = scaled_dot_product(*rows, **options, attention=attention)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found = scaled_dot_product(*rows, **options)
    gradients = [torch.autograd.grad(output, rows, error) for output in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_grouped_queries() -> None:
    q, k = torch.randn(2, 4, TIME, 3), torch.randn(2, 2, TIME, 3)
    expected = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    torch.testing.assert_close(scaled_dot_product(q, k, k, enable_gqa=True), expected)


@pytest.mark.parametrize("attention", ["exact", "fixed", "present"])
def test_backward_passes_are_the_equations(attention: Any) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(TIME, 4, dtype=torch.double, requires_grad=True) for _ in range(3))
    dy, s = torch.randn(TIME, 4, dtype=torch.double), 0.5
    mask = causal(TIME, TIME, q)
    y, a = mixed(q, k, v, mask, attention=attention)
    dq, dk, dv = torch.autograd.grad(y, (q, k, v), dy)
    a = (s * q @ k.T + mask).softmax(-1).detach()
    da = dy @ v.detach().T
    ds = a * (da - (a * da).sum(-1, keepdim=True))
    none = torch.zeros_like(dq)
    expected = {
        "exact": (s * ds @ k, s * ds.T @ q, a.T @ dy),
        "fixed": (none, none, a.T @ dy),
        "present": (s * ds @ k, none, a.diagonal().unsqueeze(1) * dy),
    }[attention]
    for one, other in zip((dq, dk, dv), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("attention", ["fixed", "present"])
def test_learned_rows_of_keys_and_values_keep_what_is_theirs(attention: Any) -> None:
    module = made(add_bias_kv=True)
    rows = given(module)
    output, _ = attend(module, *rows, attention=attention)
    expected, weights = module(*rows, average_attn_weights=False)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    bias = module.bias_v
    assert bias is not None
    one, other = (torch.autograd.grad(y.square().sum(), bias)[0] for y in (output, expected))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert weights.shape[-1] == TIME + 1


class Block(nn.Module):
    """Pre-norm, by `F.scaled_dot_product_attention`, by hand, or by PyTorch's module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.act, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind in ("function", "unflatten"):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + causal(TIME, TIME, q)
        return F.dropout(F.softmax(scores, dim=-1), 0.0) @ v

    def split(self, y: Tensor) -> Tensor:
        result: Tensor = y.unflatten(-1, (HEADS, -1)) if self.kind == "unflatten" else y.view(*y.shape[:2], HEADS, -1)
        return result

    def mix(self, y: Tensor) -> Tensor:
        q, k, v = (self.split(layer(y)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed: Tensor = self.o(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + (checkpoint(self.mix, y, use_reentrant=False) if self.kind == "checkpoint" else self.mix(y))
        change: Tensor = self.down(self.act(self.up(self.between(x))))
        return x + change


class Transformer(nn.Module):
    """Tokens (batch, time) to (batch, vocabulary, time)."""

    def __init__(self, kind: str = "function") -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TIME, WIDTH)
        self.blocks = nn.Sequential(Block(kind), Block(kind))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.tokens(tokens) + self.places(torch.arange(tokens.shape[1])))
        output: Tensor = self.head(self.norm(x))
        return output.transpose(1, 2)


class Packed(nn.Module):
    """PyTorch's encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=self.head.weight.dtype)
        output: Tensor = self.head(self.layer(self.tokens(tokens), src_mask=mask, is_causal=True))
        return output.transpose(1, 2)


def network(kind: str = "function") -> nn.Module:
    torch.manual_seed(0)
    return Transformer(kind).double() if kind != "module" else Packed().double()


def one_block(kind: str = "function") -> nn.Module:
    """For the compiler, which traces a second block as it does the first."""
    model = network(kind)
    model.blocks = model.blocks[:1]  # type: ignore[index]
    return model


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(VOCABULARY, (SAMPLES, TIME)), torch.randint(VOCABULARY, (SAMPLES, TIME))


def gradients(rule: CreditRule) -> dict[str, Tensor]:
    rule.zero_grad()
    rule(*batch()).backward()
    found = {name: p.grad for name, p in rule.model.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("kind", ["function", "module"])
def test_exact_is_backpropagation(kind: str) -> None:
    exact, reference = Backprop(network(kind), attention="exact"), network(kind)
    F.cross_entropy(reference(batch()[0]), batch()[1]).backward()
    found = gradients(exact)
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(found[name], parameter.grad)


@pytest.mark.parametrize("kind", ["function", "module"])
def test_fixed_maps_teach_neither_queries_nor_keys(kind: str) -> None:
    found, exact = gradients(Backprop(network(kind), attention="fixed")), gradients(Backprop(network(kind)))
    assert found.keys() == exact.keys()
    zero = {name for name, gradient in found.items() if not float(gradient.norm())}
    if kind == "function":
        assert zero == {f"blocks.{i}.{layer}.{part}" for i in (0, 1) for layer in "qk" for part in ("weight", "bias")}
        assert torch.allclose(found["blocks.1.v.weight"], exact["blocks.1.v.weight"], atol=1e-14)
    else:
        packed = found["layer.self_attn.in_proj_weight"].chunk(3)
        assert [float(part.norm()) > 0 for part in packed] == [False, False, True]
        assert torch.allclose(packed[2], exact["layer.self_attn.in_proj_weight"].chunk(3)[2], atol=1e-14)


def shares(rule: CreditRule) -> dict[str, float]:
    found, reason = across_positions(Probe(rule, *batch()))
    assert not reason
    return found


@pytest.mark.parametrize("kind", ["function", "module"])
@pytest.mark.parametrize("make", [Backprop, FeedbackAlignment, DirectFeedbackAlignment], ids=lambda make: make.__name__)
def test_present_gives_no_credit_across_positions(make: Any, kind: str) -> None:
    """The specification's T12, and the same of the other rules."""
    options: dict[str, Any] = {} if make is Backprop or kind == "function" else {"exact": ("layer.self_attn",)}
    exact = shares(make(network(kind), **options))
    keys = [name for name in exact if name.endswith((".k", ".v", "in_proj_weight"))]
    assert keys
    assert all(exact[name] > 0.1 for name in keys)
    present = shares(make(network(kind), **options, attention="present"))
    assert max(present.values()) < 1e-12
    assert not any(name.endswith(".k") for name in present)  # no error, so no change either


def test_feedback_and_attention_go_together() -> None:
    """The error of the attention module goes through feedback of the projections: (1) of the specification, by hand."""
    model = network()
    rule = FeedbackAlignment(model, attention="fixed")
    found = gradients(rule)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in other.named_modules():
            if isinstance(module, nn.Linear):
                assert name in rule.feedback_weights()
    head = rule.feedback_weights()["head"]
    tokens, targets = batch()
    x = model.tokens(tokens) + model.places(torch.arange(TIME))  # type: ignore[operator]
    x = model.blocks(x).detach().requires_grad_()  # type: ignore[operator]
    normed = model.norm(x)  # type: ignore[operator]
    output = model.head(normed)  # type: ignore[operator]
    (error,) = torch.autograd.grad(F.cross_entropy(output.transpose(1, 2), targets), output, retain_graph=True)
    torch.testing.assert_close(found["head.weight"], torch.einsum("bto,bti->oi", error, normed))
    (below,) = torch.autograd.grad(normed, x, error @ head)
    gelu = torch.einsum("bti,bto->io", below, _before_down(model, tokens))
    torch.testing.assert_close(found["blocks.1.down.weight"], gelu)
    assert not float(found["blocks.1.k.weight"].norm())


def _before_down(model: nn.Module, tokens: Tensor) -> Tensor:
    given: list[Tensor] = []
    handle = model.get_submodule("blocks.1.down").register_forward_pre_hook(lambda _, args: given.append(args[0].detach()))
    model(tokens)
    handle.remove()
    return given[0]


def test_attention_by_hand_is_refused_by_name() -> None:
    for attention in ("fixed", "present"):
        with pytest.raises(UnsupportedModelError, match=r"'blocks.0' computes attention itself"):
            FeedbackAlignment(network("hand"), attention=attention)(*batch())  # type: ignore[arg-type]
    gradients(FeedbackAlignment(network("hand"), attention="exact"))


def test_checkpoints_and_models_without_attention_are_refused() -> None:
    class Checkpointed(Block):
        def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    model = network("checkpoint")
    model.blocks = nn.Sequential(Checkpointed("checkpoint")).double()
    with pytest.raises(UnsupportedModelError, match=r"checkpoint, which repeats the forward pass of 'blocks.0'"):
        Backprop(model, attention="fixed")(*batch())
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(UnsupportedModelError, match="changes nothing in Sequential"):
        Backprop(plain, attention="fixed")(torch.randn(2, 4), torch.tensor([0, 1]))


def test_unknown_options_and_cross_attention_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown attention"):
        Backprop(network(), attention="past")  # type: ignore[arg-type]
    module = made()
    rows = given(module, cross=True)
    with pytest.raises(UnsupportedModelError, match="needs self-attention"):
        attend(module, *rows, attention="present")
    q, k = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    with pytest.raises(UnsupportedModelError, match="3 queries attend to 5 keys"):
        mixed(q, k, k, attention="present")


@pytest.mark.parametrize("make", [FeedbackAlignment, SignSymmetry, KolenPollack])
def test_rules_and_copies_keep_the_option(make: Any) -> None:
    rule = make(network(), attention="present")
    first = gradients(rule)
    again = gradients(copy.deepcopy(rule))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(rule(*batch()).output, network()(batch()[0]))
    assert torch.equal(rule.detach()(batch()[0]), network()(batch()[0]))


def test_under_a_compiler() -> None:
    rule = Backprop(one_block(), attention="present")
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="call the rule once"):  # the compiler wraps it
        compiled(*batch())
    torch._dynamo.reset()
    eager = gradients(rule)
    rule.zero_grad()
    compiled(*batch()).backward()
    for name, parameter in rule.model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [Backprop, FeedbackAlignment])
@pytest.mark.parametrize("attention", ["fixed", "present"])
def test_compiled_is_eager_however_heads_are_split(make: Any, attention: Any) -> None:
    """Also by `Tensor.unflatten`, which the compiler does not follow below function modes by itself.

    Backward passes are traced by :func:`test_under_a_compiler`, and at several lengths.
    """
    rule = make(one_block("unflatten"), attention=attention)
    eager = gradients(rule)
    rule.zero_grad()
    torch._dynamo.reset()
    torch.compile(rule, backend="eager", fullgraph=True)(*batch()).backward()
    for name, parameter in rule.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-10, atol=1e-12)
    assert eager["blocks.0.v.weight"].norm() > 0


@pytest.mark.parametrize("make", [Backprop, FeedbackAlignment, DirectFeedbackAlignment])
@pytest.mark.parametrize("attention", ["exact", "fixed", "present"])
def test_the_conformance_checks_of_a_users_model(make: Any, attention: Any) -> None:
    report = check_model(make(network(), attention=attention), *batch(), skip=("compiled",))
    assert "placement" in report.passed


def on_rank(rank: int, name: str, attention: Any, kind: str) -> dict[str, Tensor]:
    """Gradients of one rank of two on its part of a batch, or of one process (rank -1) on all of it."""
    rule = RULES[name](network(kind), attention=attention)
    tokens, targets = (torch.cat([x, x.flip(1)]) for x in batch())  # six samples
    if rank < 0:
        rule(tokens, targets).backward()
    else:
        ranks = DistributedDataParallel(rule)  # it averages gradients for as long as it lives
        ranks(tokens[rank::2], targets[rank::2]).backward()
    return {key: q.grad.clone() for key, q in rule.model.named_parameters() if q.grad is not None}


RULES = {"fa": FeedbackAlignment, "dfa": DirectFeedbackAlignment}


@pytest.mark.parametrize("attention", ["fixed", "present"])
@pytest.mark.parametrize(("name", "kind"), [("fa", "function"), ("fa", "module"), ("dfa", "function")])
def test_two_ranks_are_one_process(name: str, attention: Any, kind: str) -> None:
    alone = on_rank(-1, name, attention, kind)
    for rank in on_two_ranks(on_rank, name, attention, kind):
        assert rank.keys() == alone.keys()
        assert max(float((rank[key] - alone[key]).abs().max()) for key in alone) <= 1e-12


class Weighing(nn.Module):
    """A module of attention that also returns its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        output: Tensor = self.head(x + self.attention(x, x, x)[0])
        return output.transpose(1, 2)


@pytest.mark.parametrize("attention", ["fixed", "present"])
def test_feedback_of_a_packed_module_eager_and_compiled(attention: Any) -> None:
    torch.manual_seed(0)
    rule = FeedbackAlignment(Weighing().double(), attention=attention)
    probe = Probe(rule, *batch())
    assert set(probe.responses.values()) == {1}
    found, _ = across_positions(probe)
    assert (max(found.values()) < 1e-12) == (attention == "present")
    eager = gradients(rule)
    rule.zero_grad()
    torch.compile(rule, backend="aot_eager", fullgraph=True)(*batch()).backward()
    for name, parameter in rule.model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-10, atol=1e-12)


class Written(nn.Module):
    """One block whose projections are parameters of its own, multiplied by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.packed = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        parts = F.linear(x, self.packed).unflatten(-1, (3, HEADS, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        output: Tensor = self.head(x + mixed.transpose(1, 2).flatten(2))
        return output.transpose(1, 2)


LENGTHS = ((4, TIME), (4, TIME - 1), (3, TIME - 2))


def of_length(call: Any, length: int, samples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    call.zero_grad()
    call(*torch.randint(VOCABULARY, (2, samples, length), generator=generator)).backward()
    named = dict(call.named_parameters())
    return {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in named.items() if p.grad is not None}


def of_written(attention: Any, sites: tuple[str, ...]) -> FeedbackAlignment:
    torch.manual_seed(0)
    return FeedbackAlignment((Written() if sites else Transformer()).double(), attention=attention, sites=sites)


@pytest.mark.parametrize("attention", ["exact", "fixed", "present"])
@pytest.mark.parametrize("sites", [(), ("packed",)], ids=["layers", "sites"])
def test_a_window_of_any_length_is_trained_as_by_a_rule_that_has_seen_no_other(
    attention: Any, sites: tuple[str, ...]
) -> None:
    rule = of_written(attention, sites)
    for samples, length in LENGTHS:
        found = of_length(rule, length, samples)
        assert found.keys() >= {"model.head.weight", "model.tokens.weight"}
        torch.testing.assert_close(found, of_length(of_written(attention, sites), length, samples), rtol=1e-12, atol=1e-14)


def test_compiled_at_several_lengths() -> None:
    rule = FeedbackAlignment(one_block(), attention="present")
    torch._dynamo.reset()
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    for samples, length in LENGTHS[:2]:  # the second with symbolic lengths
        eager = of_length(rule, length, samples)
        torch.testing.assert_close(of_length(compiled, length, samples), eager, rtol=1e-10, atol=1e-12)
