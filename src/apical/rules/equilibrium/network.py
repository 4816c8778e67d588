"""Equilibria of a chain with connections in both directions, for several real or complex nudges in parallel.

    v_k = P(W_k s_{k-1} + b_k) + d/ds_k [ s_{k+1} . P(B_{k+1} s_k) ] - beta de/ds_k,   s_k <- phi_k(v_k)

All layers update simultaneously from the old state. With B = W this descends an energy; P is pooling or the identity. The
linear maps are real, so a complex state is two rows of the batch, its real and its imaginary part: if all but two of N
phases come in conjugate pairs, they take N rows per sample, as N real ones would.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.activations import complex_parts, derivative
from apical.core.batch import require_shape
from apical.core.chain import Chain, Stage
from apical.core.credit import Loss, Root
from apical.core.local import outer, summed
from apical.core.losses import wanted
from apical.core.noise import normal
from apical.core.sigmoids import ShiftedSigmoid, complex_shifted_sigmoid
from apical.core.transport import geometry, pads_itself, transport
from apical.errors import ConfigError
from apical.rules.equilibrium.holomorphic import HOLOMORPHIC, pooled, unpooled
from apical.rules.equilibrium.phases import Phases

PROJECTIONS = (nn.Hardtanh, nn.ReLU, nn.ReLU6, nn.Identity)
"""Idempotent activations: with these a step may be damped before it is clipped, as in 2017."""

LOOK_EVERY = 8
"""Steps between checks of the residual where a tolerance may end a phase."""

Push = Callable[[Sequence[Tensor]], Tensor]
"""What the nudge adds to the potentials of the last layer of states, given all states, row by row."""


class Settled(NamedTuple):
    """States, each (rows, *shape), and the largest change of any state in the last step."""

    s: list[Tensor]
    residual: Tensor


class EquilibriumNetwork:
    """The states of a chain and their dynamics.

    Args:
        chain: stages 1..L.
        read_out: the last stage only reads the states; otherwise it is a state.
        damping: fraction of the old state that each step keeps, in [0, 1).
        noise: standard deviation of the noise added to potentials at every step of a training phase.
        generator: of the noise; None draws from PyTorch's global state.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        read_out: bool,
        damping: float = 0.0,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.chain, self.damping, self.noise, self.generator = chain, damping, noise, generator
        self.stages = chain.stages[:-1] if read_out else chain.stages
        self.reader = chain.stages[-1] if read_out else None

    def given(self, inputs: Tensor, phases: Phases | None = None) -> list[Tensor | None]:
        """The constant part of each layer's potential: from the input in the first, biases in the others.

        Args:
            inputs: of the first stage (batch, ...).
            phases: the phases that need rows; None is one real phase.

        Raises:
            UnsupportedModelError: the samples do not have the shape the chain was made for.
        """
        first = pooled(self.stages[0], self.stages[0].layer(self.stages[0].seen(inputs)))
        require_shape(self.stages[0].name, first, self.stages[0].shape)
        potentials: list[Tensor | None] = [first]
        p, q = (len(phases.re), len(phases.im)) if phases is not None else (1, 0)
        if p + q > 1:  # (batch, *shape) -> ((P + Q) batch, *shape): the input is real
            potentials = [
                torch.cat((first.repeat(p, *[1] * (first.dim() - 1)), first.new_zeros(q * len(first), *first.shape[1:])))
            ]
        for stage in self.stages[1:]:
            bias = stage.layer.bias
            if bias is None or q == 0 or not stage.is_dense:
                potentials.append(bias)
            else:  # the bias of imaginary rows is zero
                potentials.append(torch.cat((bias.expand(p * len(first), -1), bias.new_zeros(q * len(first), len(bias)))))
        return potentials

    def zeros(self, inputs: Tensor) -> list[Tensor]:
        """The initial states of a free phase."""
        return [inputs.new_zeros(len(inputs), *stage.shape) for stage in self.stages]

    def output(self, s: Sequence[Tensor]) -> Tensor:
        """The answer (rows, outputs) of real states."""
        return s[-1] if self.reader is None else self.reader.activation(self.reader.layer(self.reader.seen(s[-1])))

    def settle(
        self,
        s: list[Tensor],
        given: Sequence[Tensor | None],
        back: Sequence[Tensor],
        steps: int,
        push: Push | None = None,
        *,
        imaginary: int = 0,
        tolerance: float = 0.0,
        noisy: bool = False,
    ) -> Settled:
        """Take `steps` steps from the states `s`, or fewer if no state changes by more than `tolerance` (0 takes all).

        Args:
            back: B_2..B_K.
            push: the nudge.
            imaginary: number of rows at the end of each state that hold imaginary parts.
            noisy: whether noise is added.
        """
        before = s
        for number in range(steps):
            before, s = s, self.step(s, given, back, push, imaginary=imaginary, noisy=noisy)
            if (
                tolerance
                and not torch.compiler.is_compiling()
                and number % LOOK_EVERY == LOOK_EVERY - 1
                and float(_change(before, s)) <= tolerance
            ):
                break
        return Settled(s, _change(before, s))

    def step(
        self,
        s: Sequence[Tensor],
        given: Sequence[Tensor | None],
        back: Sequence[Tensor],
        push: Push | None = None,
        *,
        imaginary: int = 0,
        noisy: bool = False,
    ) -> list[Tensor]:
        """The states after one step."""
        states = []
        for k, stage in enumerate(self.stages):
            # v_k = P(W_k s_{k-1} + b_k) + B_{k+1}^T s_{k+1}, at the top - beta de/ds instead
            v = given[0] if k == 0 else _up(stage, s[k - 1], given[k], imaginary)
            assert v is not None
            if k + 1 < len(s):
                above = self.stages[k + 1]
                if above.is_dense:
                    # rows (phases batch, n_{k+1}) times B (n_{k+1}, n_k); given[0] serves every step and stays
                    v = torch.addmm(v, s[k + 1], back[k]) if k == 0 else v.addmm_(s[k + 1], back[k])
                else:
                    v = v + pulled(above, back[k], s[k + 1], s[k], imaginary)
            elif push is not None:
                v = v + push(s)
            if noisy and self.noise:
                real = len(v) - imaginary
                disturbed = v[:real] + self.noise * normal(v[:real], self.generator)
                v = torch.cat((disturbed, v[real:])) if imaginary else disturbed
            states.append(self._moved(stage, s[k], v, imaginary))
        return states

    def _moved(self, stage: Stage, old: Tensor, v: Tensor, imaginary: int) -> Tensor:
        if not self.damping:
            return activated(stage.activation, v, imaginary)
        if isinstance(stage.activation, PROJECTIONS):
            return activated(stage.activation, torch.lerp(v, old, self.damping), imaginary)
        return torch.lerp(activated(stage.activation, v, imaginary), old, self.damping)

    def errors(self, loss: Callable[[Tensor, Tensor], Tensor], s: Sequence[Tensor], targets: Tensor, q: int) -> Tensor:
        """`de/ds_K` per sample in each phase, or `de/dv` at the read-out's layer: (P + Q, batch, outputs).

        With Q > 0 these are parts of complex numbers.

        Args:
            loss: a batch mean e; complex phases need one of :data:`HOLOMORPHIC`.
            targets: (batch, ...).
            q: phases with an imaginary part, Q.
        """
        batch = len(targets)
        top = s[-1]
        if self.reader is not None:
            top = _up(self.reader, top, None, q * batch)
            if (bias := self.reader.layer.bias) is not None:
                top = torch.cat((top[: len(top) - q * batch] + bias, top[len(top) - q * batch :])) if q else top + bias
        activation = nn.Identity() if self.reader is None else self.reader.activation
        output = activated(activation, top, q * batch)
        if loss in HOLOMORPHIC and output.dim() == 2:
            parts = output.view(-1, batch, output.shape[-1])  # (P + Q, batch, outputs)
            error = HOLOMORPHIC[loss](parts, wanted(parts[0], targets), q)
        else:
            # phase by phase, since a loss may compare samples of a batch; per sample, not of the mean
            error = torch.cat([_derivative(loss, part, targets) * batch for part in output.split(batch)])
        if not isinstance(activation, nn.Identity):
            error = _before_activation(activation, top, error.view_as(top), q * batch)
        return error.view(-1, batch, *output.shape[1:])

    def nudged_by(self, error: Tensor, beta: Phases, s: Sequence[Tensor]) -> Tensor:
        """`-beta de/ds` for the last layer of states (rows, *shape), given the states and the result of :meth:`errors`."""
        push = -beta.times(error).flatten(0, 1)  # (P + Q, batch, outputs) -> (rows, outputs)
        if self.reader is None:
            return push
        return pulled(self.reader, self.reader.layer.weight, push, s[-1], len(beta.im) * error.shape[1])


def _derivative(loss: Loss, output: Tensor, targets: Tensor) -> Tensor:
    """`de/d output`, with a clear error where `torch.func` cannot differentiate the loss.

    Raises:
        ConfigError: the loss changes tensors in place, or calls an old-style autograd function.
    """
    try:
        return torch.func.grad(loss)(output, targets)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "in-place" in str(error) or "functorch" in str(error):
            raise ConfigError(
                "equilibrium propagation differentiates the loss by torch.func.grad, which fails for this loss: it may "
                f"change no tensor in place, and an autograd.Function needs setup_context ({str(error).splitlines()[0]})"
            ) from error
        raise


def activated(activation: nn.Module, v: Tensor, imaginary: int) -> Tensor:
    """The activation of rows; the last `imaginary` rows are imaginary parts of the rows before them."""
    if imaginary == 0:
        result: Tensor = activation(v)
        return result
    real = len(v) - 2 * imaginary
    a, b = v[real : real + imaginary], v[real + imaginary :]
    if isinstance(activation, ShiftedSigmoid):
        rates = torch.empty_like(v)  # filled piece by piece, since concatenation would copy
        torch.sigmoid(torch.add(v.new_full((), -2.0), v[:real], alpha=4), out=rates[:real])
        rates[real : real + imaginary], rates[real + imaginary :] = complex_shifted_sigmoid(a, b)
        return rates
    return torch.cat((activation(v[:real]), *complex_parts(activation, a, b)))


def _before_activation(activation: nn.Module, v: Tensor, error: Tensor, imaginary: int) -> Tensor:
    """`phi'(v) error` for rows as in :func:`activated`."""
    real = len(v) - 2 * imaginary
    flat = derivative(activation, v[:real], activation(v[:real])) * error[:real]
    if imaginary == 0:
        return flat
    a, b = v[real : real + imaginary], v[real + imaginary :]
    # phi' = d Re phi / da + i d Im phi / da
    re, im = torch.func.jvp(lambda a: complex_parts(activation, a, b), (a,), (torch.ones_like(a),))[1]
    x, y = error[real : real + imaginary], error[real + imaginary :]
    return torch.cat((flat, re * x - im * y, re * y + im * x))


def _up(stage: Stage, s: Tensor, given: Tensor | None, imaginary: int) -> Tensor:
    """`P(W s + b)`; `given` is the bias, or rows of it."""
    weight = stage.layer.weight
    if stage.is_dense:
        return s @ weight.T if given is None else torch.addmm(given, s, weight.T)
    v = stage.linear(s)
    if given is not None:
        bias = given if isinstance(stage.layer, nn.Linear) else given.view(-1, *[1] * (v.dim() - 2))
        v = torch.cat((v[: len(v) - imaginary] + bias, v[len(v) - imaginary :])) if imaginary else v + bias
    return pooled(stage, v, imaginary)


def pulled(stage: Stage, weight: Tensor, above: Tensor, s: Tensor, imaginary: int = 0) -> Tensor:
    """`d/ds [ above . P(weight s) ]`, of the shape of s."""
    layer = stage.layer
    if isinstance(layer, nn.Linear) and all(isinstance(module, nn.Flatten) for module in stage.before):
        return (above @ weight).view_as(s)
    if not (stage.before or stage.after or pads_itself(layer)):
        return transport(geometry(layer), above, weight, s)

    def up(rates: Tensor) -> Tensor:
        inputs = stage.seen(rates)
        return F.linear(inputs, weight) if isinstance(layer, nn.Linear) else layer._conv_forward(inputs, weight, None)

    linearised = torch.func.vjp(up, s)
    result: Tensor = linearised[1](unpooled(stage, above, linearised[0], imaginary))[0]
    return result


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a - b).abs().amax() for a, b in zip(after, before, strict=True)]).amax()


def stage_roots(stage: Stage, signal: Tensor, rates: Tensor, batch: float, real: int, imaginary: int = 0) -> list[Root]:
    """Weight and bias with the gradients of `signal . P(W rates + b)`, summed over rows and divided by the batch size.

    Args:
        signal: complex conjugate if there are imaginary rows.
        real: number of first rows, which are real parts; a bias uses only these.
        imaginary: number of last rows, which are imaginary parts of the rows before them.
    """
    bias, signal = stage.layer.bias, _at_layer(stage, signal, rates, imaginary)
    roots = weight_roots(stage, stage.layer.weight, signal, rates, batch, pulled_back=True)
    if bias is not None and bias.requires_grad:
        roots.append((bias, summed(signal[:real], geometry(stage.layer)) / batch))
    return roots


def weight_roots(
    stage: Stage,
    weight: Tensor,
    signal: Tensor,
    rates: Tensor,
    batch: float,
    imaginary: int = 0,
    *,
    pulled_back: bool = False,
) -> list[Root]:
    """`weight`, in the shape of the stage's, with its gradient; empty if frozen."""
    if not weight.requires_grad:
        return []
    signal = signal if pulled_back else _at_layer(stage, signal, rates, imaginary)
    return [(weight, outer(stage, signal, rates) / batch)]


def _at_layer(stage: Stage, signal: Tensor, rates: Tensor, imaginary: int) -> Tensor:
    """The signal at the layer's own output, before pooling."""
    return unpooled(stage, signal, stage.linear(rates), imaginary, conjugate=True) if stage.after else signal


def jacobian_product(stages: Sequence[Stage], back: Sequence[Tensor], d: Sequence[Tensor]) -> list[Tensor]:
    """`J d` of the field `W_k u_{k-1} + B_{k+1}^T u_{k+1} - u_k` in the activities u, ignoring the activation."""
    product = []
    for k, stage in enumerate(stages):
        # row k of J d: W_k d_{k-1} + B_{k+1}^T d_{k+1} - d_k
        v = -d[k] if k == 0 else pooled(stage, stage.linear(d[k - 1])) - d[k]
        product.append(v + pulled(stages[k + 1], back[k], d[k + 1], d[k]) if k + 1 < len(stages) else v)
    return product


def homeostatic_loss(product: Callable[[list[Tensor]], list[Tensor]], noise: list[Tensor]) -> Tensor:
    """`E[ |J e|^2 - e^T J J e ]` per neuron, which is `|J - J^T|^2 / 2` on average over noise e (Laborieux & Zenke 2024).

    Args:
        product: e -> J e, rows by rows.
        noise: standard normal, (draws, ...) for each layer.
    """
    once = product(noise)  # J e
    twice = product(once)  # J J e
    total = torch.stack([(a * a - e * b).sum() for a, b, e in zip(once, twice, noise, strict=True)]).sum()
    return total / sum(e.numel() for e in noise)
