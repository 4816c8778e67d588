"""Topological persistence of weights: neural persistence of a layer, deep graph persistence of a network.

    NP_l = |(1 - w_1, ..., 1 - w_{n-1})|_2 / sqrt(n - 1)       w: the maximum spanning tree of |W_l| / max over layers |W|
    S = Z_1 (x) ... (x) Z_L,   (A (x) B)_ij = max_k min(A_ik, B_kj),   DGP = NP of S,   Z_l = |(W_l - mean) / std| / max Z

A layer is a bipartite graph whose edges appear from large to small; S_io is the weakest edge of the best path from an input
to an output. Girrbach, Christensen, Winther, Akata & Koepke (arXiv 2307.10865) show that NP is driven by the variance of the
weights and by where the large ones lie, so both numbers are shown with that spread and with those of shuffled weights: a
difference counts if it survives both. NP is due to Rieck et al. (arXiv 1812.09764).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from apical.core.chain import Chain
from apical.core.layers import Layer, effective_weight, is_weighted
from apical.core.transport import as_matrix, geometry
from apical.errors import ConfigError, UnsupportedModelError

Matrix = npt.NDArray[np.float64]
ENTRIES_AT_ONCE = 2**24
"""So many path strengths are held at a time."""


def tree_weights(edges: Matrix) -> Matrix:
    """Return the edge weights of a maximum spanning tree of a complete bipartite graph, from large to small.

    Prim's algorithm on the dense matrix, in O((rows + columns)^2).

    Args:
        edges: (rows, columns), the weight of the edge between each row and each column.

    Returns:
        (rows + columns - 1,).

    >>> tree_weights(np.array([[3.0, 1.0], [2.0, 2.5]]))
    array([3. , 2.5, 2. ])
    """
    rows, columns = edges.shape
    # best[v]: the largest edge from the tree to vertex v, rows first; -inf where there is none, or v is in the tree
    best = np.concatenate([np.full(rows, -np.inf), edges[0]])
    outside = np.ones(rows + columns, dtype=bool)
    outside[0] = False
    weights = np.empty(rows + columns - 1)
    for step in range(len(weights)):
        vertex = int(np.argmax(best))
        weights[step] = best[vertex]
        outside[vertex], best[vertex] = False, -np.inf
        reached, edge = (slice(rows, None), edges[vertex]) if vertex < rows else (slice(rows), edges[:, vertex - rows])
        best[reached] = np.where(outside[reached], np.maximum(best[reached], edge), -np.inf)
    return np.sort(weights)[::-1]


def neural_persistence(edges: Matrix, essential: bool = False) -> float:
    """Return the normalised 2-norm of the persistence of a layer's components, between 0 and 1.

    Args:
        edges: (rows, columns), absolute weights over the largest one of the network.
        essential: also count the component that never dies, as the paper's code does: `NP^2 + 1/(n - 1)`.

    >>> neural_persistence(np.ones((3, 4)))
    0.0
    """
    died = 1.0 - tree_weights(edges)
    return math.sqrt((float(died @ died) + essential) / len(died))


def strongest_paths(a: Matrix, b: Matrix) -> Matrix:
    """Return the (max, min) product: (rows, inner) and (inner, columns) -> (rows, columns), `max_k min(a_ik, b_kj)`.

    >>> strongest_paths(np.array([[3.0, 1.0]]), np.array([[2.0], [9.0]]))
    array([[2.]])
    """
    left, right = torch.from_numpy(np.ascontiguousarray(a)), torch.from_numpy(np.ascontiguousarray(b.T))
    chunk = max(1, ENTRIES_AT_ONCE // right.numel())
    parts = [torch.minimum(rows[:, None], right[None]).amax(-1) for rows in left.split(chunk)]
    result: Matrix = torch.cat(parts).numpy()
    return result


def standardised(weights: Sequence[Matrix]) -> list[Matrix]:
    """Return each layer's `|(W - mean) / std|` (population std), all divided by their largest entry; zero for constant W."""
    z = [np.abs(w - w.mean()) / (w.std() or 1.0) for w in weights]
    largest = max(float(layer.max()) for layer in z) or 1.0
    return [layer / largest for layer in z]


def deep_graph_persistence(weights: Sequence[Matrix], essential: bool = False) -> float:
    """DGP of layers (n_l, n_{l-1}) in the order in which they run.

    Args:
        weights: of every layer.
        essential: see :func:`neural_persistence`.

    Raises:
        ConfigError: the layers are not a row in which each takes the output of the one before.

    >>> round(deep_graph_persistence([np.array([[1.0, -1.0]]), np.array([[2.0], [0.0]])]), 3)
    0.0
    """
    for first, second in pairwise(weights):
        if first.shape[0] != second.shape[1]:
            raise ConfigError(f"a layer outputs {first.shape[0]} numbers and the next one expects {second.shape[1]}")
    first, *rest = (layer.T for layer in standardised(weights))
    strength = first
    for layer in rest:
        strength = strongest_paths(strength, layer)
    return neural_persistence(strength, essential)


@dataclass(frozen=True)
class Persistence:
    """What :func:`persistence` measures.

    Attributes:
        layers: NP by layer.
        shuffled: mean and standard deviation over shuffles of the same, by layer.
        spread: std of `|W| / max |W|` by layer, which drives NP.
        deep: DGP; None for what is no row of dense layers.
        deep_shuffled: mean and standard deviation over shuffles of the same.
    """

    layers: Mapping[str, float]
    shuffled: Mapping[str, tuple[float, float]]
    spread: Mapping[str, float]
    deep: float | None
    deep_shuffled: tuple[float, float] | None


def persistence(model: nn.Module, shuffles: int = 5, seed: int = 0, essential: bool = False) -> Persistence:
    """Return the persistence of a model's weights, and of the same weights shuffled within their layers.

    Args:
        model: any network; of convolutions each output channel is a row. Matrices of other modules (recurrent ones,
            attention, embeddings, a user's own) go by names such as "rnn.weight_hh_l0"; with them there is no DGP.
        shuffles: how many.
        seed: of the shuffles.
        essential: see :func:`neural_persistence`.

    Raises:
        ConfigError: a weight is not finite, or all are zero.
        UnsupportedModelError: the model has no such weight.

    >>> found = persistence(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> list(found.layers), found.deep is not None
    (['0', '2'], True)
    """
    weights = _weights(model)
    if not weights:
        raise UnsupportedModelError(f"{type(model).__name__} has no layer, and no other matrix, whose weights persist")
    for name, weight in weights.items():
        if not np.isfinite(weight).all():
            raise ConfigError(f"the weight of layer {name!r} is not finite")
    largest = max(float(np.abs(weight).max(initial=0.0)) for weight in weights.values())
    if not largest:
        raise ConfigError("every weight of the model is zero, which has no persistence")
    is_row = _is_dense_row(model, len(weights))
    random = np.random.default_rng(seed)
    networks = [[_shuffled(weight, random) for weight in weights.values()] for _ in range(shuffles)]

    def of(matrices: Sequence[Matrix]) -> list[float]:
        return [neural_persistence(np.abs(matrix) / largest, essential) for matrix in matrices]

    values = np.array([of(matrices) for matrices in networks]).reshape(shuffles, len(weights))
    deep = [deep_graph_persistence(matrices, essential) for matrices in (list(weights.values()), *networks) if is_row]
    return Persistence(
        dict(zip(weights, of(list(weights.values())), strict=True)),
        {name: _moments(values[:, i]) for i, name in enumerate(weights)} if shuffles else {},
        {name: float((np.abs(weight) / largest).std()) for name, weight in weights.items()},
        deep[0] if deep else None,
        _moments(np.array(deep[1:])) if len(deep) > 1 else None,
    )


def _weights(model: nn.Module) -> dict[str, Matrix]:
    """Of weighted layers, then every other parameter with rows and columns, by name."""
    weights: dict[str, Matrix] = {}
    seen: set[Tensor] = set()
    inside = [f"{name}." for name, module in model.named_modules() if is_weighted(module)]
    for name, module in model.named_modules():
        if is_weighted(module):
            weights[name] = _matrix(module)
            seen.update(module.parameters())
    for name, parameter in model.named_parameters():
        is_other = parameter not in seen and not name.startswith(tuple(inside))
        if is_other and parameter.is_floating_point() and parameter.dim() > 1 and min(parameter.flatten(1).shape) > 1:
            weights[name] = parameter.detach().flatten(1).double().cpu().numpy()
    return weights


def _matrix(layer: Layer) -> Matrix:
    with torch.no_grad():
        weight: Tensor | None = effective_weight(layer)
    applied = layer.weight if weight is None else weight
    matrix: Matrix = as_matrix(geometry(layer), applied).detach().double().cpu().numpy()
    return matrix


def _shuffled(weight: Matrix, random: np.random.Generator) -> Matrix:
    result: Matrix = random.permutation(weight.ravel()).reshape(weight.shape)
    return result


def _moments(values: Matrix) -> tuple[float, float]:
    return float(values.mean()), float(values.std())


def _is_dense_row(model: nn.Module, layers: int) -> bool:
    try:
        stages = Chain(model).stages
    except UnsupportedModelError:
        return False
    return len(stages) == layers and all(isinstance(stage.layer, nn.Linear) for stage in stages)
