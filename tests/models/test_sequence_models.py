"""Models of tokens and of patches: shapes, causality, what they are made of, and clear refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apical import models
from apical.errors import ConfigError
from apical.losses import token_cross_entropy
from apical.models import Transformer


@pytest.mark.parametrize("name", ["gpt-2x96", "gpt-1x10", "lstm-128", "gru-96", "rnn-8"])
def test_the_future_does_not_matter(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, (12,), 7)
    tokens = torch.randint(7, (3, 12))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 7
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 12, 7)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])
    earlier = tokens.clone()
    earlier[:, 0] = (earlier[:, 0] + 1) % 7
    assert not torch.allclose(model(earlier)[:, -1], before[:, -1])


def reference(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Equations of section 3.1, position by position."""
    x = model.tokens.weight[tokens] + model.positions.weight[: tokens.shape[1]]
    for block in model.blocks:
        h = block.norm1(x)
        a = block.attention
        q, k, v = a.q(h), a.k(h), a.v(h)
        size = q.shape[-1] // a.heads
        mixed = torch.zeros_like(q)
        for head in range(a.heads):
            part = slice(head * size, (head + 1) * size)
            for t in range(tokens.shape[1]):
                scores = (q[:, t : t + 1, part] * k[:, : t + 1, part]).sum(-1) / math.sqrt(size)
                mixed[:, t, part] = (scores.softmax(-1)[..., None] * v[:, : t + 1, part]).sum(1)
        x = x + a.o(mixed)
        x = x + block.down(F.gelu(block.up(block.norm2(x))))
    return model.head(model.norm(x))  # type: ignore[no-any-return]


def test_the_decoder_computes_what_the_equations_say() -> None:
    torch.manual_seed(0)
    model = Transformer(11, width=8, blocks=2, heads=2, context=6).double()
    tokens = torch.randint(11, (2, 5))
    torch.testing.assert_close(model(tokens), reference(model, tokens), atol=1e-12, rtol=0)


def test_every_weight_of_a_block_is_a_linear_layer_and_the_activation_a_module() -> None:
    model = Transformer(11)
    kinds = {name: type(module) for name, module in model.named_modules() if not list(module.children())}
    linear = {name for name, kind in kinds.items() if kind is nn.Linear}
    parts = ("attention.q", "attention.k", "attention.v", "attention.o", "up", "down")
    assert linear == {f"blocks.{i}.{part}" for i in range(2) for part in parts} | {"head"}
    assert sum(kind is nn.GELU for kind in kinds.values()) == 2
    assert kinds["norm"] is nn.LayerNorm


def test_post_norm_and_tied() -> None:
    model = Transformer(11, width=8, heads=2, norm="post", tied=True)
    assert model.head.weight is model.tokens.weight
    assert isinstance(model.norm, nn.Identity)
    stream = model.blocks(torch.randn(2, 4, 8))
    torch.testing.assert_close(stream.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 10, "heads": 4}, "cannot have 4 heads"),
        ({"norm": "none"}, "'pre' or 'post'"),
        ({"blocks": 0}, "at least 1"),
    ],
)
def test_a_decoder_that_cannot_be(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Transformer(11, **options)  # type: ignore[arg-type]


def test_too_long_a_sequence_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="context 4 takes tokens"):
        Transformer(11, width=8, context=4)(torch.zeros(1, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("gpt-2x96", (1, 8, 8), "needs sequences of tokens"),
        ("lstm-8", (3, 32, 32), "needs sequences of tokens"),
        ("gpt-96", (8,), "write for example gpt-2x96"),
        ("gru", (8,), "write for example gru-96"),
        ("vit", (64,), "needs images"),
        ("mixer", (1, 9, 9), "cannot be cut into squares of 2x2"),
    ],
)
def test_a_name_that_does_not_fit(name: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        models.build(name, shape, 10)


@pytest.mark.parametrize("name", ["vit", "mixer"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8)])
def test_patches_know_where_they_are(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model, images = models.build(name, shape, 10), torch.randn(2, *shape)
    assert model(images).shape == (2, 10)
    assert not torch.allclose(model(images), model(images.flip(-1)))


def test_token_cross_entropy_is_the_mean_over_positions_with_a_target() -> None:
    torch.manual_seed(0)
    output, targets = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(5, (3, 4))
    targets[0, :3] = -100
    chosen = [(b, t) for b in range(3) for t in range(4) if targets[b, t] >= 0]
    by_hand = -sum(output[b, t].log_softmax(-1)[targets[b, t]] for b, t in chosen) / len(chosen)
    torch.testing.assert_close(token_cross_entropy(output, targets), by_hand)
    torch.testing.assert_close(token_cross_entropy(output, targets), F.cross_entropy(output.transpose(1, 2), targets))
    labels = torch.randint(5, (3,))
    assert torch.equal(token_cross_entropy(output[:, 0], labels), F.cross_entropy(output[:, 0], labels))
    with pytest.raises(ConfigError, match="takes logits"):
        token_cross_entropy(output.transpose(1, 2), targets)
