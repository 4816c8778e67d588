"""Blocks that are taught one by one: closed forms equal autograd; gradients scale, accumulate, and are handed over."""

import pytest
import torch
from torch import Tensor, nn

from apical.core.credit import Credit, KnownGradients
from apical.core.teaching import Taught, Teaching

KINDS = [nn.ELU(), nn.ELU(0.5), nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.LeakyReLU(0.1), nn.Softplus(), nn.Identity(), None]


def taught(block: Taught, given: Tensor, signal: Tensor) -> list[Tensor]:
    """Roots of teaching one block."""
    teaching = Teaching()
    with torch.no_grad():
        teaching.teach(block(given, learns=True), signal)
    Credit.of(teaching.roots, signal, signal.detach().sum()).backward()
    return [root for root, _ in teaching.roots]


@pytest.mark.parametrize("activation", KINDS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_closed_forms_equal_autograd(activation: nn.Module | None, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=bias).double()
    given, signal = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    modules = [layer] if activation is None else [layer, activation]
    roots = taught(Taught(modules), given, signal)
    assert all(root is parameter for root, parameter in zip(roots, layer.parameters(), strict=True))
    found = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    (nn.Sequential(*modules)(given) * signal).sum().backward()
    for mine, parameter in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "modules",
    [
        [nn.Conv1d(2, 3, 3), nn.ReLU()],
        [nn.Linear(4, 3), nn.ReLU(inplace=True)],
        [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()],
        [nn.Flatten(), nn.Linear(8, 3)],
    ],
    ids=str,
)
def test_other_blocks_have_a_graph_that_stops_at_their_input(modules: list[nn.Module]) -> None:
    given = torch.randn(5, 2, 4, requires_grad=True)
    if isinstance(modules[0], nn.Linear):
        given = torch.randn(5, 4, requires_grad=True)
    block = Taught(modules)
    made = block(given, learns=True).made
    taught(block, given, torch.randn_like(made))
    assert all(parameter.grad is not None for module in modules for parameter in module.parameters())
    assert given.grad is None


class Offset(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) + self.weight.square().sum()


class Squared(nn.ReLU):
    def forward(self, v: Tensor) -> Tensor:
        return super().forward(v) ** 2


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *call: call[2].sin())
    return module


def given_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda v: v.cos() if isinstance(module, nn.Tanh) else v @ module.weight.T.abs() + module.bias
    return module


ODD: dict[str, list[nn.Module]] = {
    "overridden layer": [Offset(4, 3), nn.Tanh()],
    "overridden activation": [nn.Linear(4, 3), Squared()],
    "hooked layer": [hooked(nn.Linear(4, 3)), nn.Tanh()],
    "hooked activation": [nn.Linear(4, 3), hooked(nn.Tanh())],
    "forward on layer": [given_forward(nn.Linear(4, 3)), nn.Tanh()],
    "forward on activation": [nn.Linear(4, 3), given_forward(nn.Tanh())],
    "learnt slope": [nn.Linear(4, 3), nn.PReLU()],
    "softmax": [nn.Linear(4, 3), nn.Softmax(1)],
    "unknown module": [nn.Linear(4, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 2))],
}


@pytest.mark.parametrize("kind", ODD)
def test_closed_forms_are_not_taken_where_modules_compute_something_else(kind: str) -> None:
    torch.manual_seed(0)
    modules = [module.double() for module in ODD[kind]]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    given, block = torch.randn(5, 4).double(), Taught(modules)
    signal = torch.randn_like(nn.Sequential(*modules)(given))
    (root,) = taught(block, given, signal)
    assert not root.is_leaf
    found = [parameter.grad.clone() for parameter in parameters]
    expected = torch.autograd.grad((nn.Sequential(*modules)(given) * signal).sum(), parameters)
    for mine, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, gradient, rtol=1e-12, atol=1e-14)


def test_a_frozen_block_has_no_root() -> None:
    teaching = Teaching()
    teaching.loss(nn.Linear(2, 1).requires_grad_(False)(torch.ones(1, 2)).sum())
    assert not teaching.roots


def test_known_gradients_scale_and_accumulate() -> None:
    layer, given, signal = nn.Linear(4, 3), torch.randn(5, 4), torch.randn(5, 3)
    teaching = Teaching()
    with torch.no_grad():
        teaching.teach(Taught([layer])(given, learns=True), signal)
    loss = Credit.of(teaching.roots, signal, signal.sum()).loss
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(layer.weight.grad, 3 * signal.T @ given)
    loss.backward()
    torch.testing.assert_close(layer.weight.grad, 4 * signal.T @ given)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    taught(Taught([layer]), given, signal)
    torch.testing.assert_close(layer.weight.grad, 5 * signal.T @ given)


def test_known_gradients_are_handed_over_without_a_copy() -> None:
    weight, gradients = nn.Parameter(torch.randn(4, 3)), [torch.randn(4, 3)]
    place = gradients[0].data_ptr()
    root = KnownGradients.apply(gradients, weight)
    del gradients
    root.backward()
    assert weight.grad.data_ptr() == place


def test_without_gradient_nothing_is_kept() -> None:
    activity = Taught([nn.Linear(4, 3), nn.ELU()])(torch.randn(5, 4), learns=False)
    assert activity.block is None
    assert not activity.made.requires_grad


def test_a_block_that_begins_in_place_leaves_its_input_alone() -> None:
    given = torch.randn(5, 4)
    before = given.clone()
    Taught([nn.ReLU(inplace=True), nn.Linear(4, 3)])(given, learns=True)
    assert torch.equal(given, before)
