"""A chain of spiking layers that run in parallel: every layer reads the spikes of the previous step.

    j_l = R_m (W_l s_{l-1} + V_l s_{l+1} + U_l c + b_l) - R_inh M_l s_l,    l = 1..L
    j_y = sum_l C_l s_l + b_y,   e = 2 (target - t_y) of positive samples

c are spikes of the class (the context), s_0 those of the input, drawn at each step. A synapse's update from one step
is the product of the spike it received and a number of its postsynaptic neuron:

    dW = - (R_m m) s^T      dM = - (R_inh m) s^T      dC = (1 - |C|) R_m e s^T / (number of positive samples)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apical.rules.contrastive_plasticity.neurons import Constants, Neurons, charge_, fire_, modulate_traces_, resting


class Synapses(NamedTuple):
    """Matrices (to, from), by hidden layer; biases and whole kinds may be missing.

    Attributes:
        up: W_1..W_L.
        bias: b_1..b_L.
        down: V_1..V_{L-1}.
        lateral: M_1..M_L.
        context: U_1..U_L.
        read: C_1..C_L.
        read_bias: b_y.
    """

    up: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    down: Sequence[Tensor]
    lateral: Sequence[Tensor]
    context: Sequence[Tensor]
    read: Sequence[Tensor]
    read_bias: Tensor | None


class State(NamedTuple):
    """State of all neurons after a step.

    Attributes:
        inputs: spikes of the input (rows, n_0).
        context: spikes of the class (rows, K), or None.
        neurons: all neurons with currents (rows, n_1 + ... + n_L + K), so that a step processes them in one pass.
        layers: hidden layers, as views of `neurons`.
        readout: the last K neurons.
        member: see :func:`.neurons.fire_`.
    """

    inputs: Tensor
    context: Tensor | None
    neurons: Neurons
    layers: Sequence[Neurons]
    readout: Neurons
    member: Tensor


def rest(x: Tensor, thresholds: Sequence[Tensor], context: bool) -> State:
    """State before the first step; x (..., n_0) gives only its shape. Thresholds (n,): hidden layers, then the read-out."""
    inputs = torch.zeros_like(x, memory_format=torch.contiguous_format).flatten(0, -2)
    classes = x.new_zeros(len(inputs), len(thresholds[-1])) if context else None
    neurons = resting(len(inputs), torch.cat(list(thresholds)))
    member = torch.block_diag(*(h.new_ones(1, len(h)) for h in thresholds))
    return _parted(inputs, classes, neurons, member, [len(h) for h in thresholds])


def twin(state: State) -> State:
    """A twin with separate memory for the neurons' spikes: two states alternate, so that the previous spikes are kept."""
    neurons = state.neurons._replace(s=torch.empty_like(state.neurons.s))
    sizes = [layer.s.shape[1] for layer in (*state.layers, state.readout)]
    return _parted(state.inputs, state.context, neurons, state.member, sizes)


def _parted(inputs: Tensor, context: Tensor | None, neurons: Neurons, member: Tensor, sizes: Sequence[int]) -> State:
    *layers, readout = (Neurons(*parts) for parts in zip(*(each.split(sizes, 1) for each in neurons), strict=True))
    return State(inputs, context, neurons, layers, readout, member)


def charge_all_(state: State, synapses: Synapses, constants: Constants) -> None:
    """Let potentials leak, and add the currents of a state's spikes."""
    r = constants.resistance
    below = state.inputs
    for k, layer in enumerate(state.layers):
        arriving = [(below, synapses.up[k], r)]
        if k < len(synapses.down):
            arriving.append((state.layers[k + 1].s, synapses.down[k], r))
        if state.context is not None:
            arriving.append((state.context, synapses.context[k], r))
        arriving.append((layer.s, synapses.lateral[k], -constants.inhibition))
        bias = synapses.bias[k]
        charge_(layer.v, arriving, None if bias is None else r * bias, constants)
        below = layer.s
    read = [(layer.s, each, 1.0) for layer, each in zip(state.layers, synapses.read, strict=True)]
    charge_(state.readout.v, read, synapses.read_bias, constants)


def advance_(before: State, after: State, synapses: Synapses, constants: Constants) -> None:
    """Take one step; its spikes are written to `after`, the twin of the previous state."""
    charge_all_(before, synapses, constants)
    fire_(after.neurons, after.member, constants)


def goodness_of(state: State) -> Tensor:
    """G of hidden layers (L, rows)."""
    t, m = state.neurons.t, state.neurons.m
    return (state.member @ torch.mul(t, t, out=m).T)[:-1]  # m is overwritten at every step


def modulate_(state: State, slopes: Tensor, target: Tensor) -> None:
    """Write m: of hidden layers by the derivative of a loss of goodness (L, rows), then t_y - target (positives, K)."""
    state.neurons.m.copy_(state.neurons.t)
    for layer, slope in zip(state.layers, slopes, strict=True):
        modulate_traces_(layer.m, slope.unsqueeze(1))
    state.readout.m[: len(target)].sub_(target)


def products(before: State, synapses: Synapses, constants: Constants, m: Sequence[Tensor], add: Callable[..., None]) -> None:
    """Add the update of hidden layers from one step: `add(kind, k, to, from, factor)`, minus a change `factor * to^T from`.

    Args:
        before: the state whose spikes are received.
        synapses: the existing ones; only these are updated.
        constants: R_m and R_inh.
        m: modulators (rows, n_l) after the step.
        add: adds one product.
    """
    r = constants.resistance
    for k, each in enumerate(m):
        add("up", k, each, before.inputs if k == 0 else before.layers[k - 1].s, r)
        add("lateral", k, each, before.layers[k].s, constants.inhibition)
        if k < len(synapses.down):
            add("down", k, each, before.layers[k + 1].s, r)
        if before.context is not None:
            add("context", k, each, before.context, r)


def read_products(before: State, constants: Constants, e: Tensor, add: Callable[..., None]) -> None:
    """Add the update of read-outs; e is `t_y - target` of positive samples (positives, K)."""
    for k, layer in enumerate(before.layers):
        add("read", k, e, layer.s[: len(e)], constants.resistance * 2 / len(e))
