"""Sign symmetry: feedback shares only the signs of the forward weights.

    delta_l = (K_{l+1}^T delta_{l+1}) * f'(a_l)

    uniform    K = s sign(W)                 Liao, Leibo & Poggio (arXiv 1510.05067); Xiao et al. (arXiv 1811.03567)
    batchwise  K = |U_t| sign(W), U_t redrawn for every batch     Moskovitz et al. (arXiv 1812.06488)
    fixed      K = |U_0| sign(W), U_0 drawn once

Not local: the sign of every weight is transported at every step; its magnitude is not. For uniformly distributed
weights the angle between K and W is arccos(sqrt(3)/2) = 30 degrees in the first variant.
"""

import math
from collections.abc import Callable, Collection
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import Attention, Loss
from apical.core.edge import EdgeRule, Feedback
from apical.core.effective import weight_now
from apical.core.packed import row_blocks
from apical.core.transport import Geometry, as_matrix, geometry
from apical.core.units import Layer, key
from apical.errors import ConfigError, UnsupportedModelError, require_choice


def signs(shape: Geometry | None, weight: Tensor, magnitude: Tensor) -> Tensor:
    """`s sign(W)`, or `|U_0| sign(W)`."""
    return weight.sign().mul_(magnitude)


class DrawnSigns:
    """`|U| sign(W)` with U uniform in (-bound, bound), drawn when it is first needed.

    The state of its generator is stored instead of U, which takes as much memory as the weight.

    Args:
        generator: for U; None draws from PyTorch's global state.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.source: torch.Generator | None = None
        self.state: Tensor | None = None  # of the source before U was drawn
        self.uses = 0

    def __call__(self, shape: Geometry | None, weight: Tensor, bound: Tensor) -> Tensor:
        """The feedback, with the same U every time; a compiled graph draws U for each use, and so allows one."""
        if torch.compiler.is_compiling():
            return weight.sign().mul_(_drawn(weight, self.generator)).mul_(bound)
        source = self.source = self.source or self.generator or _global_generator(weight.device)
        if self.state is None:
            self.state = source.get_state()
            return weight.sign().mul_(_drawn(weight, source)).mul_(bound)
        now = source.get_state()
        source.set_state(self.state)
        u = _drawn(weight, source)
        source.set_state(now)
        return weight.sign().mul_(u).mul_(bound)


def _global_generator(device: torch.device) -> torch.Generator:
    """The generator of `torch.rand` on a device; if it is not accessible, one with a seed from the CPU's."""
    if device.type == "cpu":
        return torch.default_generator
    generators: tuple[torch.Generator, ...] = getattr(torch.get_device_module(device), "default_generators", ())
    if not generators:
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
    return generators[device.index or 0]


def _drawn(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers uniform in [0, 1)."""
    if generator is None:
        return torch.rand_like(like)
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)


def current_scale(weight: Tensor, blocks: int = 1) -> Tensor:
    """Present root mean square of a weight; of each row block, (n_out, 1), if there are several."""
    if blocks == 1:
        return weight.square().mean().sqrt()
    scales: Tensor = torch.stack([block.square().mean().sqrt() for block in weight.chunk(blocks)])
    return scales.repeat_interleave(len(weight) // blocks).unsqueeze(1)


class SignSymmetry(EdgeRule):
    """The error travels back through the signs of the forward weights.

    Args:
        model: network of Linear, convolution, attention and recurrent layers; other modules keep their exact derivative.
        loss: maps (output, targets) to a scalar batch mean.
        variant: "uniform" (uSF), "batchwise" (brSF) or "fixed" (frSF).
        scale: magnitude law. "xavier": uniform variant sqrt(2/(fan_in+fan_out)), drawn variants the Xavier uniform
            law; "kaiming": standard deviation sqrt(1/(3 fan_in)), PyTorch's default initialisation; "xiao": the released
            code of arXiv 1811.03567, sqrt(2/(k^2 c_out)) for convolutions and 1/sqrt(n_in) for dense layers; "current":
            present root mean square of the weight, one number per layer that is transported in addition to the signs. In a
            residual network, where a branch's error is added to the stream's, magnitudes matter.
        exact: names of modules or parameters that keep their exact derivative.
        first_layer: also hold feedback for the first layer (read-outs only).
        generator: for random magnitudes; None draws from PyTorch's global state.
        sites, through_time: see :class:`apical.core.edge.EdgeRule`.
        attention: which parts of attention's backward pass are kept: "exact", "fixed" or "present"; see
            :mod:`apical.core.attention`.

    Raises:
        ConfigError: unknown variant or scale.

    >>> model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    >>> rule = SignSymmetry(model, variant="uniform")
    >>> rule(torch.randn(8, 4), torch.arange(8) % 3).backward()
    >>> bool((rule.feedback_weights()["2"].sign() == model[2].weight.sign()).all())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        variant: Literal["uniform", "batchwise", "fixed"] = "uniform",
        scale: Literal["xavier", "kaiming", "xiao", "current"] = "xavier",
        exact: Collection[str] = (),
        first_layer: bool = False,
        generator: torch.Generator | None = None,
        sites: Collection[str] = (),
        through_time: bool = True,
        attention: Attention = "exact",
    ) -> None:
        require_choice("variant", variant, ("uniform", "batchwise", "fixed"))
        require_choice("scale", scale, ("xavier", "kaiming", "xiao", "current"))
        super().__init__(model, loss, exact, first_layer, sites, through_time)
        self.attention = attention
        self.variant, self.scale, self.generator = variant, scale, generator
        self.renews = variant == "batchwise"
        self.magnitude = nn.Module()
        for name, layer in self.layers.items():
            weight = weight_now(layer)
            value = torch.as_tensor(standard_deviation(layer, scale), dtype=weight.dtype, device=weight.device)
            if variant != "uniform":
                value = value * math.sqrt(3.0)  # bound of the uniform law with that standard deviation
            if variant == "fixed":
                value = _drawn(weight, generator) * value
            self.magnitude.register_buffer(key(name), value)

    def feedback_of(self, name: str) -> Feedback:
        """Signs of the weight that this layer computes with, with the variant's magnitude; "batchwise" draws it now."""
        compute: Callable[..., Tensor] = DrawnSigns(self.generator) if self.variant == "batchwise" else signs
        weight, magnitude = self.forward_weight(name).detach(), cast(Tensor, self.magnitude._buffers[key(name)])
        if self.scale == "current":
            magnitude = magnitude * current_scale(weight, row_blocks(self.layers[name]))
        return compute, (weight, magnitude)

    def send(self, name: str, delta: Tensor, error: Tensor) -> Tensor:
        """The same for a layer of a plain chain, which computes with its own weight."""
        if self.scale == "current":
            return super().send(name, delta, error)
        magnitude = cast(Tensor, self.magnitude._buffers[key(name)])
        return delta.mm(signs(None, self.layers[name].weight.detach(), magnitude))

    def _feedback_now(self, name: str) -> Feedback:
        compute, tensors = super()._feedback_now(name)
        if isinstance(compute, DrawnSigns) and torch.compiler.is_compiling():
            compute.uses += 1
            if compute.uses > row_blocks(self.layers[name]) or self.generator is not None:
                what = f"calls layer {name!r} again" if self.generator is None else "has its own generator"
                raise UnsupportedModelError(
                    f'sign symmetry in variant "batchwise" {what}, so a compiled graph cannot draw its magnitudes: train '
                    "without torch.compile"
                )
        return compute, tensors

    def set_feedback(self, name: str, U: Tensor) -> None:
        """Replace U_0 of one layer in variant "fixed"; the feedback is `|U_0| sign(W)`.

        Args:
            name: the layer.
            U: of the shape of the layer's weight.

        Raises:
            ConfigError: unknown layer, a wrong shape, or another variant, which has nothing to set.
        """
        if self.variant != "fixed":
            raise ConfigError(
                f'sign symmetry in variant "{self.variant}" computes its feedback from the weights; there is nothing to '
                'set, use variant="fixed"'
            )
        self.copy_feedback(self.magnitude, name, U.abs())


def standard_deviation(layer: Layer, scale: str) -> float:
    """Standard deviation of the forward weight under the named initialisation law; 1 for "current"."""
    weight = weight_now(layer)
    if scale == "current":
        return 1.0
    if scale == "xavier":
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
        return math.sqrt(2.0 / (fan_in + fan_out // row_blocks(layer)))
    rows = as_matrix(geometry(layer), weight)
    if scale == "kaiming":
        return 1.0 / math.sqrt(3.0 * rows.shape[1])
    if geometry(layer) is None:
        return 1.0 / math.sqrt(rows.shape[1])
    return math.sqrt(2.0 / (weight[0, 0].numel() * rows.shape[0]))
