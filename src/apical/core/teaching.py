"""Teaching single blocks: each block of a network is given a signal at its output, and learns from that alone.

Where a block is a matrix and an element-wise activation its gradients are written down at once, while its activity is still
in the processor's cache; that spares autograd's bookkeeping too. Every other block keeps a graph of its own, of which the
block's output is a root. Both are roots of the credit.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from apical.core.activations import is_elementwise, needs_output_alone, pulled_back
from apical.core.blocks import through
from apical.core.credit import Root
from apical.core.layers import computes_plainly, is_hooked


class Activity(NamedTuple):
    """A block's output in one pass.

    Attributes:
        made: the output (batch, ...).
        block: the block, where its gradients have a closed form; otherwise `made` has a graph.
        given: its input.
        v: before the activation; or `made` again, where the derivative is known from that: one array less to keep.
    """

    made: Tensor
    block: "Taught | None" = None
    given: Tensor | None = None
    v: Tensor | None = None


class Taught:
    """A block that can be taught by itself.

    Args:
        modules: of the block, in order.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self.layer, *rest = self.modules
        self.activation = rest[0] if rest else None
        self.is_dense = isinstance(self.layer, nn.Linear) and len(rest) < 2

    def __call__(self, given: Tensor, learns: bool) -> Activity:
        """Run the block on an input (batch, ...), to which it will not send errors back. To be called without gradient.

        Args:
            given: the input.
            learns: whether the block may be taught afterwards.
        """
        if learns and self.has_closed_form(given):
            v = self.layer(given)
            if self.activation is None:
                return Activity(v, self, given, v)
            made = self.activation(v)
            return Activity(made, self, given, made if needs_output_alone(self.activation) else v)
        with torch.set_grad_enabled(learns):
            given = given.detach().clone() if _in_place(self.modules[0]) else given.detach()  # others read it too
            return Activity(through(self.modules, given))

    def has_closed_form(self, given: Tensor) -> bool:
        """Whether the gradients for this input are known without autograd: to be asked at every call.

        Layer and activation must run their types' own forward, without hooks, on the layer's own weight.
        """
        if not self.is_dense or given.dim() != 2 or torch.compiler.is_compiling():
            return False
        if torch.is_autocast_enabled(given.device.type):  # autograd knows better there
            return False
        if is_hooked(self.layer) or not computes_plainly(self.layer):
            return False
        phi = self.activation
        return phi is None or (is_elementwise(phi) and not (_in_place(phi) or is_hooked(phi)))


def _in_place(module: nn.Module | None) -> bool:
    return bool(getattr(module, "inplace", False))


class Teaching:
    """Collects what blocks learn in one pass.

    Attributes:
        roots: losses, outputs of blocks, and parameters with their gradients.
    """

    def __init__(self) -> None:
        self.roots: list[Root] = []

    def loss(self, loss: Tensor) -> None:
        """Teach the block behind a scalar loss, unless it is frozen."""
        if loss.requires_grad or not torch.is_grad_enabled():
            self.roots.append((loss, None))

    def teach(self, activity: Activity, signal: Tensor) -> None:
        """Teach a block `signal`, the gradient of what it shall descend with respect to its output, of that one's size.

        To be called without gradient.
        """
        made, block, given, v = activity
        if block is None or given is None or v is None:
            if made.requires_grad:
                self.roots.append((made, signal.view_as(made).to(made.dtype)))
            return
        if block.activation is not None:
            signal = pulled_back(block.activation, v, made, signal)
        weight, bias = cast(nn.Linear, block.layer).weight, cast(nn.Linear, block.layer).bias
        if weight.requires_grad:
            self.roots.append((weight, signal.T @ given))
        if bias is not None and bias.requires_grad:
            self.roots.append((bias, signal.sum(0)))
