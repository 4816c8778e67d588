"""Spiking layers in a row that run in parallel: every layer reads the spikes of the step before.

    j_l = R_m (W_l s_{l-1} + V_l s_{l+1} + U_l c + b_l) - R_inh M_l s_l,    l = 1..L
    j_y = sum_l C_l s_l + b_y,   e = 2 (target - t_y) of positive samples

c are spikes of the class (the context), s_0 those of the input, drawn at each step. What a synapse learns from one step
is the product of the spike that reached it and a number of the neuron behind it:

    dW = - (R_m m) s^T      dM = - (R_inh m) s^T      dC = (1 - |C|) R_m e s^T / (number of positive samples)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apical.rules.contrastive_plasticity.neurons import Constants, Neurons, resting, stepped


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
    """Of all neurons after a step: spikes of the input (rows, n_0) and the context (rows, K) or none, and the layers."""

    inputs: Tensor
    context: Tensor | None
    layers: Sequence[Neurons]
    readout: Neurons


def rest(x: Tensor, thresholds: Sequence[Tensor], context: bool) -> State:
    """Before the first step; x (rows, n_0) only for its form. Thresholds (n,): of hidden layers, then of the read-out."""
    *hidden, last = (resting(len(x), h) for h in thresholds)
    return State(torch.zeros_like(x), x.new_zeros(len(x), last.v.shape[1]) if context else None, hidden, last)


def currents(state: State, synapses: Synapses, constants: Constants) -> tuple[list[Tensor], Tensor]:
    """j_1..j_L and j_y, each (rows, n), from the spikes of a state."""
    found = []
    for k, (layer, up, bias, lateral) in enumerate(
        zip(state.layers, synapses.up, synapses.bias, synapses.lateral, strict=True)
    ):
        below = state.inputs if k == 0 else state.layers[k - 1].s
        j = below @ up.T if bias is None else torch.addmm(bias, below, up.T)
        if k < len(synapses.down):
            j = j.addmm_(state.layers[k + 1].s, synapses.down[k].T)
        if state.context is not None:
            j = j.addmm_(state.context, synapses.context[k].T)
        found.append(j.addmm_(layer.s, lateral.T, beta=constants.resistance, alpha=-constants.inhibition))
    jy = state.readout.v.new_zeros(()) if synapses.read_bias is None else synapses.read_bias
    for layer, read in zip(state.layers, synapses.read, strict=True):
        jy = torch.addmm(jy, layer.s, read.T)
    return found, jy


def advance(state: State, synapses: Synapses, constants: Constants, inputs: Tensor, context: Tensor | None) -> State:
    """One step; new spikes of input and context are what the step after this one reads."""
    j, jy = currents(state, synapses, constants)
    layers = [stepped(layer, each, constants) for layer, each in zip(state.layers, j, strict=True)]
    return State(inputs, context, layers, stepped(state.readout, jy, constants))


def products(before: State, synapses: Synapses, constants: Constants, m: Sequence[Tensor], add: Callable[..., None]) -> None:
    """What one step teaches hidden layers: `add(kind, k, to, from, factor)`, minus a matrix's change `factor * to^T from`.

    Args:
        before: the state whose spikes arrived.
        synapses: only for which there are.
        constants: R_m and R_inh.
        m: modulators (rows, n_l) after the step.
        add: takes them up.
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
    """The same for read-outs; e is `t_y - target` times 2 / positives, (rows, K), zero for negative samples."""
    for k, layer in enumerate(before.layers):
        add("read", k, e, layer.s, constants.resistance)
