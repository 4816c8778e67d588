"""Weight mirror (Akrout, Wilson, Humphreys, Lillicrap & Tweed, arXiv 1904.05391).

Between training steps each layer is driven by zero-mean noise x; the correlation of its linear response with the noise
copies the forward weight into the feedback weight:

    y = W x,   B <- (1 - rho) B + rho y x^T / var(x),   E[y x^T] = var(x) W
    delta_l = (B_{l+1}^T delta_{l+1}) * f'(a_l),   dW_l = delta_l h_{l-1}^T

Local: B's synapse sees x and y. The price is a second mode in which the layers are driven one at a time.

For a layer that computes with a function of its parameter, W is the weight it computes with.

Departures from the released code: Gaussian noise on one receptive field, linear response without bias, and an averaging
rate rho instead of growth control, which in that code is computed and never stored. The angle to W settles near
arctan(sqrt(rho fan_in / (2 batch))).
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import Attention, Loss
from apical.core.edge import EdgeRule, Feedback, stored
from apical.core.mirror import mirror, require_affine
from apical.core.units import key
from apical.errors import ConfigError, require_count


class WeightMirror(EdgeRule):
    """Feedback weights learned from noise, in a separate mode.

    Args:
        model: network of Linear, convolution, attention and recurrent layers; other modules keep their exact derivative.
        loss: maps (output, targets) to a scalar batch mean.
        rate: averaging rate rho in [0, 1] of a mirror step; one is taken before every training step.
        batch: noise samples per mirror step.
        warmup: mirror steps taken at construction.
        exact: names of modules or parameters that keep their exact derivative.
        first_layer: also hold feedback for the first layer (read-outs only).
        generator: for initial feedback and noise; None draws from PyTorch's global state.
        sites, through_time: see :class:`apical.core.edge.EdgeRule`.
        attention: which parts of attention's backward pass are kept: "exact", "fixed" or "present"; see
            :mod:`apical.core.attention`.

    Raises:
        ConfigError: rate outside [0, 1], or batch < 1.

    >>> model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    >>> rule = WeightMirror(model, warmup=500)
    >>> cosine = F.cosine_similarity(rule.feedback_weights()["2"].flatten(), model[2].weight.flatten(), dim=0)
    >>> bool(cosine > 0.95)
    True
    """

    renews = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        rate: float = 0.01,
        batch: int = 128,
        warmup: int = 500,
        exact: Collection[str] = (),
        first_layer: bool = False,
        generator: torch.Generator | None = None,
        sites: Collection[str] = (),
        through_time: bool = True,
        attention: Attention = "exact",
    ) -> None:
        if not 0.0 <= rate <= 1.0:
            raise ConfigError(f"rate must lie in [0, 1], not rate={rate}")
        require_count("batch", batch)
        require_count("warmup", warmup, 0)
        super().__init__(model, loss, exact, first_layer, sites, through_time)
        self.attention = attention
        self.rate, self.batch, self.generator = rate, batch, generator
        self.feedback = self.random_feedback(generator)
        self.mirror(warmup)

    @torch.no_grad()
    def mirror(self, steps: int = 1) -> None:
        """Take `steps` mirror steps on every layer, with its weight held fixed."""
        self.require_attached()
        if not self.rate:
            return
        for name in self.layers:
            require_affine(self, name)
        weights = {name: self.forward_weight(name) for name in self.layers}
        if any(weight.is_meta for weight in weights.values()):
            raise ConfigError("the model is on the meta device, which holds no weights to mirror: move it to another device")
        for _ in range(steps):
            for name, weight in weights.items():
                feedback = self.feedback.get_buffer(key(name))
                device = feedback.device if self.generator is None else self.generator.device
                size = (self.batch, weight.shape[1:].numel())
                noise = torch.randn(size, generator=self.generator, dtype=feedback.dtype, device=device).to(feedback.device)
                with torch.autocast(feedback.device.type, enabled=False):  # the mirror works in the feedback's own precision
                    feedback.lerp_(mirror(weight.to(feedback), noise), self.rate)

    def set_feedback(self, name: str, B: Tensor) -> None:
        """Replace the matrix B of one layer; later mirror steps update it.

        Args:
            name: the layer.
            B: in the shape of the layer's weight.

        Raises:
            ConfigError: unknown layer, or a wrong shape.
        """
        self.copy_feedback(self.feedback, name, B)

    def prepare(self, inputs: Any) -> None:
        """One mirror step."""
        if self.training:
            self.mirror()

    def feedback_of(self, name: str) -> Feedback:
        """The present mirrored matrix B of this layer: the next mirror step changes the buffer."""
        return stored, (self.feedback.get_buffer(key(name)).clone(),)
