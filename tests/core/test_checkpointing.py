"""Activation checkpoints are seen, of either kind, and a graph can be cut inside one without disturbing it."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apical.core import checkpointing
from apical.errors import UnsupportedModelError


@pytest.fixture(params=["hooks", "stack"])
def detection(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detection by PyTorch's own list of hooks, and the way of versions that do not show it."""
    if request.param == "stack":
        monkeypatch.setattr(checkpointing, "_top_hooks", None)


@pytest.mark.usefixtures("detection")
def test_a_checkpoint_is_seen_while_it_records_and_at_no_other_time() -> None:
    seen = []

    def block(x: Tensor) -> Tensor:
        seen.append(checkpointing.is_checkpointed())
        return x.exp()

    x = torch.randn(3, requires_grad=True)
    block(x)
    with torch.autograd.graph.save_on_cpu():
        block(x)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert seen == [False, False, True, False]  # the last is the repeated pass


@pytest.mark.usefixtures("detection")
@pytest.mark.parametrize("reentrant", [False, True])
def test_refused_by_the_name_of_the_layer(reentrant: bool) -> None:
    def block(x: Tensor) -> Tensor:
        checkpointing.refuse_checkpointing("body.3")
        return x.exp()

    x = torch.randn(3, requires_grad=True)
    block(x)
    with torch.no_grad():
        block(x)  # no checkpoint: a frozen backbone
    with pytest.raises(UnsupportedModelError, match=r"'body\.3'"):
        checkpoint(block, x, use_reentrant=reentrant)


def test_severed_graph_inside_a_checkpoint() -> None:
    """The error stops at the cut, and every other gradient is what it is without a checkpoint."""
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    x = torch.randn(5, 3, dtype=torch.double)
    plain = False

    def block(h: Tensor) -> Tensor:
        h = torch.tanh(first(h))
        return torch.tanh(last(h if plain else checkpointing.sever(h)))

    found = []
    for on in (False, True):
        plain = False
        output = checkpoint(block, x, use_reentrant=False) if on else block(x)
        plain = True  # the repeated pass knows nothing of the cut
        output.square().sum().backward()
        assert first.weight.grad is None or not first.weight.grad.any()
        found.append(last.weight.grad.clone())
        last.zero_grad()
    assert torch.equal(found[0], found[1])
    assert found[0].any()
