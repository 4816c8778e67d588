"""Audits of models with positions: credit across them, rows in the span of inputs, and fused or functional weights."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical import Backprop, FeedbackAlignment, SignSymmetry, WeightMirror
from apical.core.credit import Credit, CreditRule
from apical.diagnostics.interventions import Probe
from apical.diagnostics.plausibility import CRITERIA, Findings, examine, judge
from apical.diagnostics.positions import across_positions, inputs_at, not_presynaptic, outside
from apical.errors import ConfigError

VOCABULARY, TIME, WIDTH, HEADS, BATCH = 11, 8, 12, 2, 3
PLACE = TIME // 2
"""The position whose target the audit changes."""


class Block(nn.Module):
    """Pre-norm, with a causal mask."""

    def __init__(self, kind: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.act, self.down = nn.Linear(WIDTH, 2 * WIDTH), kind(), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y, shape = self.before(x), x.shape
        q, k, v = (layer(y).view(*shape[:2], HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(shape))
        change: Tensor = self.down(self.act(self.up(self.between(x))))
        return x + change


class Transformer(nn.Module):
    """(batch, time) token indices to (batch, vocabulary, time)."""

    def __init__(self, blocks: int = 2, kind: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TIME, WIDTH)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.head(self.norm(x))
        return output.transpose(1, 2)


class Packed(nn.Module):
    """PyTorch's own encoder layer, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=self.head.weight.dtype)
        output: Tensor = self.head(self.layer(self.tokens(tokens), src_mask=mask, is_causal=True))
        return output.transpose(1, 2)


class Recurrent(nn.Module):
    """An LSTM, a dense layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm = nn.Embedding(VOCABULARY, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.mid, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.mid(self.lstm(self.tokens(tokens))[0]).relu())
        return output.transpose(1, 2)


class Cell(nn.Module):
    """Layers that are called once a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.inner = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.outer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.tokens.weight.new_zeros(len(tokens), WIDTH)
        outputs = []
        for x in self.tokens(tokens).unbind(1):
            state = torch.tanh(self.outer(x) + self.inner(state))
            outputs.append(self.head(state))
        return torch.stack(outputs, 2)


class PerToken(nn.Module):
    """No mixing between positions; a weight held as (n_in, n_out), used functionally; samples and positions joined."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.matrix = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 3)
        self.head = nn.Linear(2 * WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = (self.tokens(tokens).reshape(-1, WIDTH) @ self.matrix).relu()
        output: Tensor = self.head(hidden)
        return output


def batch(flat: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(VOCABULARY, (BATCH, TIME), generator=generator) for _ in range(2))
    return tokens, targets.flatten() if flat else targets


def made(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().double()


def examined(
    rule: Callable[[nn.Module], CreditRule] = Backprop, kind: Callable[[], nn.Module] = Transformer, flat: bool = False
) -> Findings:
    return examine(rule(made(kind)), *batch(flat), Backprop(made(kind, 9)))


def by_hand(model: nn.Module, tokens: Tensor, targets: Tensor, weight: Tensor, given: Tensor, place: int) -> float:
    """Equation 2 for backpropagation: the gradient of the loss at one position only is linear in that error."""
    found = []
    for wanted in (targets, torch.where(torch.arange(TIME) == place, (targets + 1) % VOCABULARY, targets)):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(tokens), wanted), weight)
        found.append(gradient)
    difference = found[1] - found[0]
    projector = torch.eye(len(given), dtype=given.dtype) - torch.outer(given, given) / given.square().sum()
    return float((difference @ projector).norm() / difference.norm())


def test_shares_are_those_of_the_equation() -> None:
    model = made(Transformer)
    probe = Probe(Backprop(model), *batch())
    shares, reason = across_positions(probe)
    assert reason == ""
    inputs: dict[str, Tensor] = {}
    for name in shares:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, args, __, name=name: inputs.update({name: args[0]}))
    model(probe.sample[0])
    for name, share in shares.items():
        weight = model.get_parameter(f"{name}.weight")
        given = inputs[name].detach()[0, PLACE]
        assert share == pytest.approx(by_hand(model, *probe.sample, weight, given, PLACE), abs=1e-10)
    assert {name for name, share in shares.items() if share < 1e-10} == {
        *(f"blocks.1.{name}" for name in ("q", "o", "up", "down")),
        "head",
    }
    assert all(shares[f"blocks.{block}.{name}"] > 0.1 for block in (0, 1) for name in ("k", "v"))


def test_the_audit_of_backpropagation_on_a_transformer() -> None:
    found = examined()
    verdicts = judge(found)
    assert len(verdicts) == len(CRITERIA)
    assert verdicts["no_credit_across_positions"].verdict == "no"
    assert "k" in verdicts["no_credit_across_positions"].text
    assert verdicts["no_sign_transport"].verdict == "no"
    assert verdicts["one_phase"].verdict == "yes"
    assert verdicts["no_derivative"].verdict == "no"
    assert set(found.presynaptic) == set(found.layers)
    assert max(share for share in found.presynaptic.values() if share == share) < 1e-12


def test_feedback_alignment_reads_no_weights_and_credits_the_past() -> None:
    verdicts = judge(examined(FeedbackAlignment))
    assert verdicts["no_sign_transport"].verdict == verdicts["no_magnitude_transport"].verdict == "yes"
    assert verdicts["no_credit_across_positions"].verdict == "no"
    assert verdicts["local"].verdict == "partly"
    assert judge(examined(SignSymmetry))["no_sign_transport"].verdict == "no"


def test_a_model_that_does_not_mix_positions_gives_none_credit_across_them() -> None:
    found = examined(lambda model: Backprop(model), PerToken, flat=True)
    verdicts = judge(found)
    assert found.layers == ["matrix", "head"]
    assert verdicts["no_credit_across_positions"].verdict == "yes"
    assert verdicts["no_sign_transport"].verdict == "no"
    assert max(found.presynaptic.values()) < 1e-12


class Pools(CreditRule):
    """Backpropagation of the mean error: every position hears of all."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output = self.model(inputs)
        leaf = output.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(leaf, targets)
        (error,) = torch.autograd.grad(loss, leaf)
        return Credit([output], [error.mean(0, keepdim=True).expand_as(error)], output, loss.detach())


def test_credit_to_all_positions_is_found_where_the_model_mixes_none() -> None:
    assert judge(examined(lambda model: Pools(model, F.cross_entropy), PerToken, True))[
        "no_credit_across_positions"
    ].verdict == ("no")


class Decays(CreditRule):
    """A part of the weights themselves is added to their updates."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output = self.model(inputs)
        loss = self.loss(output, targets)
        decay = 0.1 * torch.stack([p.square().sum() for p in self.model.parameters() if p.dim() > 1]).sum()
        return Credit([loss, decay], [None, None], output.detach(), loss.detach())


def test_what_no_input_made_is_found_in_a_token_model() -> None:
    def shares(rule: CreditRule) -> dict[str, float]:
        return not_presynaptic(Probe(rule, *batch()))

    assert shares(Decays(made(Transformer), F.cross_entropy))["head"] > 1e-3
    assert shares(Backprop(made(Transformer)))["head"] < 1e-12
    assert judge(examined(lambda model: Decays(model, F.cross_entropy)))["local"].verdict == "no"


def test_where_inputs_span_everything_it_is_said() -> None:
    def narrow() -> nn.Module:
        return nn.Sequential(nn.Embedding(VOCABULARY, 5), nn.Linear(5, 2 * TIME), nn.ReLU(), nn.Linear(2 * TIME, VOCABULARY))

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = narrow()

        def forward(self, tokens: Tensor) -> Tensor:
            output: Tensor = self.body(tokens)
            return output.transpose(1, 2)

    found = examined(Backprop, Last)
    assert math.isnan(found.presynaptic["body.1"])
    assert found.presynaptic["body.3"] < 1e-12
    assert "not asked of the inputs of body.1" in judge(found)["local"].text


def test_rows_outside_a_span() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert outside(torch.tensor([[5.0, 1.0, 0.0]]), rows) == 0.0
    assert outside(torch.tensor([[3.0, 0.0, 4.0]]), rows) == pytest.approx(0.8)


def test_inputs_of_layers_that_are_used_twice() -> None:
    first, second = torch.randn(TIME, 3), torch.randn(TIME, 3)
    at = inputs_at([first, second], TIME)
    assert at is not None
    assert torch.equal(at[2], torch.stack([first[2], second[2]]))
    moments = inputs_at([row for pair in zip(first.split(1), second.split(1), strict=True) for row in pair], TIME)
    assert moments is not None
    assert torch.equal(moments[2], at[2])
    assert inputs_at([first[:3]], TIME) is None


@pytest.mark.parametrize("kind", [Packed, Recurrent], ids=["encoder layer", "lstm"])
def test_layers_with_exact_derivatives_are_seen_to_read_weights(kind: type[nn.Module]) -> None:
    exact = "layer.self_attn" if kind is Packed else "lstm"
    found = examined(lambda model: FeedbackAlignment(model, exact=(exact,)), kind)
    verdicts = judge(found)
    assert any(name.startswith(exact) for name in found.learns)
    assert verdicts["no_sign_transport"].verdict == "no"
    assert verdicts["no_symmetry"].verdict == "no"
    assert verdicts["one_phase"].verdict == "yes"
    assert verdicts["no_credit_across_positions"].verdict == "no"
    assert any(name.startswith(exact) and share > 0.1 for name, share in found.crossing.items())


def test_moments_are_positions() -> None:
    found = examined(Backprop, Cell)
    assert set(found.crossing) == {"outer", "inner", "head"}
    assert found.crossing["head"] < 1e-10 < 0.1 < found.crossing["inner"]
    assert set(found.responses.values()) == {1}
    assert found.peeks is not None
    assert judge(examined(lambda model: WeightMirror(model, warmup=2), Cell))["one_phase"].numbers["responses"] == 2


def test_one_answer_per_sample_has_no_positions() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    samples = torch.randn(4, 6, dtype=torch.double), torch.randint(4, (4,))
    verdict = judge(examine(Backprop(model), *samples, Backprop(model)))["no_credit_across_positions"]
    assert verdict.verdict == "not applicable"
    assert "one answer" in verdict.text


def test_errors_that_a_loss_joins_are_not_asked_about() -> None:
    def joined(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets).square()

    verdict = judge(examined(lambda model: Backprop(model, joined)))["no_credit_across_positions"]
    assert verdict.verdict == "not applicable"
    assert "joins" in verdict.text


def test_ignored_targets_and_padding() -> None:
    tokens, targets = batch()
    targets[:, PLACE] = -100
    found = examine(Backprop(made(Transformer)), tokens, targets, Backprop(made(Transformer)))
    assert judge(found)["no_credit_across_positions"].verdict == "no"


def test_a_layer_that_computes_with_a_function_of_its_weight_is_named() -> None:
    class Masked(nn.Linear):
        def forward(self, h: Tensor) -> Tensor:
            return F.linear(h, self.weight.tril(), self.bias)

    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Masked(6, 4)).double()
    samples = torch.randn(4, 6, dtype=torch.double), torch.randint(4, (4,))
    with pytest.raises(ConfigError, match="cannot follow '2'"):
        examine(Backprop(model), *samples, Backprop(model))


def test_tied_weights_count_once() -> None:
    class Tied(Transformer):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight = self.tokens.weight

    found = examined(Backprop, Tied)
    assert found.layers[-1] == "head"
    assert found.crossing["head"] > 1e-3  # the look-up's part reaches rows of the table that were not given at that position
