"""Layers with a forward of a user's own that pads, cuts or normalises around the one product with their weight.

An edge replaces the backward map of a whole layer, which such a layer is more than. A swap replaces the weight alone, at the
product inside, and autograd differentiates the rest: as if the rest were modules before and behind. Autograd must keep the
weight itself for that: under autocast it is cast beforehand, and compiled graphs break at the layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from apical.core.checkpointing import are_tensors_hooked
from apical.core.effective import inputs_for, probe, unchanged
from apical.core.layers import computes_plainly, is_registered
from apical.core.packed_swap import PackedSwap
from apical.core.sites import options_of
from apical.core.transport import geometry
from apical.core.units import Layer
from apical.errors import UnsupportedModelError


class Within:
    """Runs one such layer, with feedback in place of its weight in the backward pass.

    Args:
        name: the layer's.
        layer: the layer.
        forward: its own forward.
        feedback: is asked in the forward pass for what makes the feedback weight in the backward pass.
    """

    def __init__(
        self, name: str, layer: Layer, forward: Callable[..., Any], feedback: Callable[[], Callable[[], Tensor]]
    ) -> None:
        self.name, self.layer, self.forward = name, layer, forward
        self._options: dict[str, Any] = {}
        self._shapes: set[torch.Size] = set()  # of inputs with which it was tried, with these options
        self.swap = PackedSwap(lambda _: feedback())

    def __call__(self, call: Callable[[], Any], inputs: Tensor) -> Any:
        """Run the layer's forward pass on these inputs.

        Raises:
            UnsupportedModelError: inside a checkpoint, or where error passes by another way than the weight by now.
        """
        from apical.core.bundle import eagerly  # few models have such layers

        return eagerly(self._call, call, inputs)

    def _call(self, call: Callable[[], Any], inputs: Tensor) -> Any:
        own, weight = self.layer._parameters, self.layer._parameters.get("weight")
        if weight is None or are_tensors_hooked():
            raise self._refusal()
        if self._options != (options := options_of(self.layer)):
            self._options, self._shapes = options, set()
        if inputs.shape not in self._shapes and inputs.numel():  # another way may be for long or large batches
            if not weight_stands_alone(self.layer, self.forward, inputs.detach()):
                raise self._refusal()
            self._shapes.add(inputs.shape)
        kind = weight.device.type
        shortened = torch.is_autocast_enabled(kind) and weight.dtype is torch.float32
        used = weight.to(torch.get_autocast_dtype(kind)) if shortened else weight
        own["weight"] = used  # type: ignore[assignment]  # the cast weight, which autograd then keeps
        try:
            with self.swap.over([(self.name, used)]):
                output = call()
        finally:
            own["weight"] = weight
        if not self.swap.met:
            raise self._refusal()
        return output

    def _refusal(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"layer {self.name!r} ({type(self.layer).__name__}) does more in its forward than apply its weight, so "
            "feedback can stand in for the weight only outside checkpoints and hooks on saved tensors; move the rest "
            f"into a separate module, or pass exact=({self.name!r},)"
        )


def works_around(layer: Layer, call: Callable[[Tensor], Any]) -> bool:
    """:func:`weight_stands_alone` at some of the inputs that a layer of this type may take: its first batch tells of others.

    A dense layer may read (batch, features) or (batch, time, features), a convolution channels first or last.
    """
    if torch.compiler.is_compiling():
        return False
    around = inputs_for(layer)[:2]
    other = around.unsqueeze(1).expand(-1, 3, -1) if around.dim() == 2 else around.movedim(1, -1)
    return weight_stands_alone(layer, call) or weight_stands_alone(layer, call, other.contiguous())


def reads_own_weight(name: str, layer: nn.Module) -> bool:
    """Return whether the layer's units have its weight unchanged: its forward method does more around the product.

    Of all other layers it is that of an affine map, see :func:`apical.core.effective.measured_weight`.

    Raises:
        UnsupportedModelError: neither can be said.
    """
    if computes_plainly(layer) or is_registered(layer) or probe(name, layer, layer.forward)[0]:
        return False
    known = cast(Layer, layer)
    if works_around(known, layer.forward) and _answers_by_rows(known):
        return True
    raise UnsupportedModelError(
        f"layer {name!r} ({type(layer).__name__}) computes more than an affine map of its input, and not around its own "
        "weight, so the weights of its units are unknown; move what is not affine into a separate module"
    )


def _answers_by_rows(layer: Layer) -> bool:
    """Return whether a dense layer has as many outputs as rows in its weight."""
    around = inputs_for(layer)[:2]
    with unchanged(layer, around.device), torch.no_grad():
        for inputs in (around, around.unsqueeze(1).expand(-1, 3, -1)) if geometry(layer) is None else ():
            with suppress(RuntimeError, ValueError, IndexError):
                return int(layer.forward(inputs).shape[-1]) == len(layer.weight)
    return True


def weight_stands_alone(layer: Layer, call: Callable[[Tensor], Any], near: Tensor | None = None) -> bool:
    """Return whether all error at a layer's input passes through its weight as it is.

    Tried on noise, with noise in everything the layer holds besides its weight: a path that is zero at first counts.

    Args:
        layer: of a type with known geometry.
        call: its own forward.
        near: inputs to be tried with noise; by default made up for the layer.
    """
    weight = layer._parameters.get("weight")
    if weight is None or torch.compiler.is_compiling() or are_tensors_hooked():
        return False

    def error(inputs: Tensor, feedback: Tensor | None) -> tuple[Tensor, bool]:
        torch.manual_seed(0)
        swap = PackedSwap(lambda _: lambda: weight if feedback is None else feedback)
        if feedback is None:
            output = call(inputs)
        else:
            with swap.over([("weight", weight)]):
                output = call(inputs)
        return torch.autograd.grad(output, inputs, torch.ones_like(output))[0], bool(swap.met)

    try:
        with unchanged(layer, weight.device), torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
            generator = torch.Generator().manual_seed(0)
            around = inputs_for(layer)[:2] if near is None else near.to(weight.dtype)
            inputs = (around + torch.randn(around.shape, generator=generator, device="cpu").to(around)).requires_grad_()
            with _noisy([p for p in (*layer.parameters(), *layer.buffers()) if p is not weight], generator):
                exact, _ = error(inputs, None)
                own, met = error(inputs, weight.detach())
                none, _ = error(inputs, torch.zeros_like(weight))
    except Exception:
        return False  # not to be called like this: its first batch will tell
    return met and torch.equal(own, exact) and bool(exact.any()) and not bool(none.any())


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return numbers from 0.5 to 1.5, so that variances and divisors stay what they are."""
    return torch.rand(like.shape, generator=generator, device="cpu").add_(0.5).to(like)


@contextmanager
def _noisy(tensors: Sequence[Tensor], generator: torch.Generator) -> Iterator[None]:
    """Within, tensors of real numbers hold noise."""
    before = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, own in before:
            tensor.data = _noise(own, generator)
        yield
    finally:
        for tensor, own in before:
            tensor.data = own
