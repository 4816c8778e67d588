"""Teaching single blocks: each block of a network is given a signal at its output, and learns from that alone.

Where a block is a matrix and an element-wise activation its gradients are computed immediately, while its activity is still
in the processor's cache; that spares autograd's bookkeeping too. Every other block keeps a separate graph, of which the
block's output is a root. Both are roots of the credit.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.activations import Activation, known, pulled_back
from apical.core.blocks import through
from apical.core.credit import Root
from apical.core.layers import computes_plainly, has_global_hook, is_hooked


class Activity(NamedTuple):
    """A block's output in one pass.

    Attributes:
        made: the output (batch, ...).
        block: the block, where its gradients have a closed form; otherwise `made` has a graph.
        given: its input.
        v: before the activation; or `made` again, where the derivative is known from that: one array less to keep.
        formulas: what is known of the block's activation.
    """

    made: Tensor
    block: "Taught | None" = None
    given: Tensor | None = None
    v: Tensor | None = None
    formulas: Activation | None = None


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
        formulas = self._formulas() if learns and self._is_closed(given) else None
        if formulas is not None:
            layer, phi = self.layer, self.activation
            if has_global_hook():  # of code that counts operations
                v = layer(given)
                made = v if phi is None else phi(v)
            else:
                own = layer._parameters
                v = F.linear(given, cast(Tensor, own["weight"]), own.get("bias"))
                made = v if phi is None else phi.forward(v)
            return Activity(made, self, given, made if formulas.from_output else v, formulas)
        with torch.set_grad_enabled(learns):
            given = given.detach().clone() if _in_place(self.modules[0]) else given.detach()  # others read it too
            return Activity(through(self.modules, given))

    def _is_closed(self, given: Tensor) -> bool:
        """Return whether the layer's gradients for this input are known without autograd: to be asked at every call.

        The layer must run its type's own forward, without hooks, on its own weight.
        """
        if not self.is_dense or given.dim() != 2 or torch.compiler.is_compiling():
            return False
        if torch.is_autocast_enabled(given.device.type):  # autograd knows better there
            return False
        return "weight" in self.layer._parameters and computes_plainly(self.layer) and not is_hooked(self.layer)

    def _formulas(self) -> Activation | None:
        """Return what is known of the activation if it acts on each neuron alone and does no more than its own forward."""
        phi = self.activation
        if phi is None:
            return _NONE
        formulas = None if _in_place(phi) or is_hooked(phi) else known(phi)
        return formulas if formulas is not None and formulas.elementwise else None


_NONE = Activation(nn.Identity.forward, from_output=True)


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
        made, block, given, v, formulas = activity
        if block is None or given is None or v is None:
            if made.requires_grad:
                self.roots.append((made, signal.view_as(made).to(made.dtype)))
            return
        if formulas is not None and formulas.pulled_back is not None:
            signal = formulas.pulled_back(block.activation, v, made, signal)
        elif block.activation is not None:
            signal = pulled_back(block.activation, v, made, signal)
        weight, bias = block.layer._parameters["weight"], block.layer._parameters.get("bias")
        if weight is not None and weight.requires_grad:
            self.roots.append((weight, signal.T @ given))
        if bias is not None and bias.requires_grad:
            self.roots.append((bias, signal.sum(0)))
