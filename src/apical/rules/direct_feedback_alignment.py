"""Direct feedback alignment (Noekland, arXiv 1609.01596).

    e = dL/d output,   error at hidden activity h_l:  B_l e,   dW_l = ((B_l e) * f'(a_l)) h_{l-1}^T,   B_l fixed and random

Every hidden unit hears the output error at once; nothing waits for the layers above, and no weight is transported. The
last layer learns by its exact gradient, which is local.

"full" feedback gives each neuron of a feature map its own row of B_l. "broadcast" gives each channel one number for the
whole map, as in the code of arXiv 2108.13446, which places it at the layers' inputs and lets exact errors leak through
residual connections; `leaky=True` does that too, for comparison with its published numbers.
"""

from collections.abc import Collection
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import Credit, Loss
from apical.core.cut import Cut, CutRule, eagerly
from apical.core.losses import output_error, terms
from apical.core.transport import geometry, pads_itself, transport
from apical.core.units import Layer, key
from apical.errors import ConfigError


class DirectFeedbackAlignment(CutRule):
    """The output error reaches every hidden unit directly through a fixed random matrix.

    B_l is drawn from the Xavier uniform law of its shape (outputs, neurons), at the first batch, when sizes are known.

    Args:
        model: network whose activations are modules; what lies between two activations is one unit.
        loss: maps (output, targets) to a scalar batch mean.
        feedback: "full", or "broadcast": one number per channel (at dense units the two are the same). With `leaky`,
            broadcast passes the error through a transposed convolution with a fixed kernel of the layer's geometry.
        leaky: replace the error at every weighted layer's input instead of behind every activation, so that
            residual connections still carry exact errors.
        exact: names of modules or parameters without known transport that keep their exact derivative within a unit.

    Raises:
        ConfigError: unknown feedback.
        UnsupportedModelError: no activation modules between the layers.

    >>> model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    >>> rule = DirectFeedbackAlignment(model)
    >>> credit = rule(torch.randn(8, 4), torch.arange(8) % 3)
    >>> credit.backward()
    >>> {name: tuple(b.shape) for name, b in rule.feedback.named_buffers()}
    {'1': (3, 5)}
    """

    seed: Tensor

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        feedback: Literal["full", "broadcast"] = "full",
        leaky: bool = False,
        exact: Collection[str] = (),
    ) -> None:
        if feedback not in ("full", "broadcast"):
            raise ConfigError(f'feedback must be "full" or "broadcast", not {feedback!r}')
        super().__init__(model, loss, "input" if leaky else "activation", exact)
        self.kind = feedback
        self.feedback = nn.Module()
        self.register_buffer("seed", torch.randint(2**62, ()))  # all B_l follow from it, on every rank alike

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit whose roots carry `B_l e` to the hidden units' outputs, and the model's output with `e`."""
        output, cuts, teacher = self.run(inputs)
        loss, error = output_error(self.loss, output, targets, traced=self.plain_roots)
        errors, names = error.flatten(1), self.hidden_units(inputs)
        for name, cut in zip(names, cuts, strict=True):
            if key(name) not in self.feedback._buffers:
                self._draw(name, self._size(name, cut.shape, errors), output.device)
        signals: list[Tensor | None] = []
        if self.takes_signals:
            signals = [self.signal(name, cut, errors) for name, cut in zip(names, cuts, strict=True)]
        else:
            teacher.signal = lambda index, scale: self.signal(names[index], cuts[index], errors * scale)
            signals = [None for _ in cuts]
        taught: list[tuple[Tensor, Tensor | None]] = [
            (cut.root, signal) for cut, signal in zip(cuts, signals, strict=True) if cut.root.requires_grad
        ]
        if output.requires_grad:
            taught.append((output, error))
        taught += [(term, None) for term in terms(loss)]
        return Credit([root for root, _ in taught], [signal for _, signal in taught], output.detach(), loss)

    def signal(self, name: str, cut: Cut, errors: Tensor) -> Tensor:
        """`B_l e` for one hidden unit, of the unit's shape (batch, ...), from errors (batch, outputs)."""
        b = self.feedback.get_buffer(key(name)).to(errors.dtype)
        if b.dim() > 2:  # a kernel of the layer that reads this tensor
            return _broadcast(self.layers[name.split("#")[0]], b, cut.shape, errors).to(cut.dtype)
        result = errors @ b
        if result.numel() < cut.shape.numel():  # one number per channel
            return result.view(*result.shape, *(1,) * (len(cut.shape) - 2)).expand(cut.shape).to(cut.dtype)
        return result.view(cut.shape).to(cut.dtype)

    def _size(self, name: str, shape: torch.Size, errors: Tensor) -> tuple[int, ...]:
        outputs = errors.shape[1]
        if self.kind == "full" or len(shape) == 2:
            return (outputs, shape[1:].numel())
        if self.where == "activation":
            return (outputs, shape[1])
        return (outputs, shape[1], *self.layers[name.split("#")[0]].weight.shape[2:])

    @eagerly
    def _draw(self, name: str, size: tuple[int, ...], device: torch.device) -> None:
        position = (self._hidden or []).index(name)
        generator = torch.Generator().manual_seed((int(self.seed) + position) % 2**63)
        parameter = next(self.model.parameters())
        value = nn.init.xavier_uniform_(torch.empty(size, dtype=parameter.dtype), generator=generator)
        self.feedback.register_buffer(key(name), value.to(device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}feedback."
        for name, value in state_dict.items():
            if name.startswith(start) and name[len(start) :] not in self.feedback._buffers:
                self.feedback.register_buffer(name[len(start) :], torch.empty_like(value, device=self.seed.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _broadcast(layer: Layer, kernel: Tensor, shape: torch.Size, errors: Tensor) -> Tensor:
    """The error at every output position of the layer, sent to its input by a fixed kernel (outputs, c_in, k...)."""
    backward = geometry(layer)
    if backward is None or backward.transposed or pads_itself(layer):
        raise ConfigError(
            "leaky broadcast feedback is defined for convolutions that pad evenly with zeros only; use "
            'feedback="full" or leaky=False'
        )
    with torch.no_grad():
        spatial = layer(layer.weight.new_zeros(1, *shape[1:])).shape[2:]
    everywhere = errors.view(*errors.shape, *(1,) * len(spatial)).expand(*errors.shape, *spatial)
    template = errors.new_empty(1).expand(shape)
    return transport(backward._replace(groups=1), everywhere.contiguous(), kernel, template)
