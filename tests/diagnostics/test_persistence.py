"""Persistence against scipy's spanning trees and paths found one by one, and what it does not depend on."""

import itertools
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from apical.diagnostics.persistence import (
    deep_graph_persistence,
    neural_persistence,
    persistence,
    standardised,
    strongest_paths,
    tree_weights,
)
from apical.errors import ConfigError, UnsupportedModelError

RANDOM = np.random.default_rng(0)


def naive_tree(edges: np.ndarray) -> list[float]:
    """Kruskal: edges from large to small, each kept that joins two components."""
    rows, columns = edges.shape
    component = list(range(rows + columns))
    kept = []
    order = sorted(itertools.product(range(rows), range(columns)), key=lambda place: -edges[place])
    for i, j in order:
        a, b = component[i], component[rows + j]
        if a != b:
            kept.append(float(edges[i, j]))
            component = [a if c == b else c for c in component]
    return kept


def naive_persistence(edges: np.ndarray) -> float:
    """Root of the sum of (1 - w)^2 over the tree, over the root of its number of edges: one less than there are vertices."""
    return math.sqrt(sum((1 - w) ** 2 for w in naive_tree(edges))) / math.sqrt(sum(edges.shape) - 1)


def naive_deep(weights: Sequence[np.ndarray]) -> float:
    """DGP entry by entry: every path from an input to an output, and its weakest edge."""
    z = []
    for w in weights:
        mean = sum(w.ravel()) / w.size
        z.append(np.abs(w - mean) / math.sqrt(sum((w.ravel() - mean) ** 2) / w.size))
    largest = max(layer.max() for layer in z)
    strength = np.zeros((weights[0].shape[1], len(weights[-1])))
    inner = list(itertools.product(*(range(len(w)) for w in weights[:-1])))
    for i, o in np.ndindex(strength.shape):
        paths = ([i, *units, o] for units in inner)
        strength[i, o] = max(min(layer[path[k + 1], path[k]] for k, layer in enumerate(z)) for path in paths) / largest
    return naive_persistence(strength)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 1), (4, 6), (13, 9)])
def test_tree_of_kruskal(shape: tuple[int, int]) -> None:
    edges = RANDOM.random(shape)
    assert np.array_equal(tree_weights(edges), naive_tree(edges))
    assert neural_persistence(edges) == pytest.approx(naive_persistence(edges), abs=1e-15)


def test_tree_of_scipy_and_the_cut_property() -> None:
    sparse, csgraph = pytest.importorskip("scipy.sparse"), pytest.importorskip("scipy.sparse.csgraph")
    edges = RANDOM.random((60, 40))
    tree = tree_weights(edges)
    graph = sparse.csr_matrix(np.block([[np.zeros((60, 60)), 2 - edges], [np.zeros((40, 100))]]))
    found = 2 - csgraph.minimum_spanning_tree(graph).data
    assert len(tree) == 99
    assert np.abs(np.sort(found)[::-1] - tree).max() < 1e-15
    assert set(edges.max(0)) | set(edges.max(1)) <= set(tree)


@pytest.mark.parametrize("at_once", [1, 45, 2**24])
def test_paths_one_by_one_and_associativity(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apical.diagnostics.persistence.ENTRIES_AT_ONCE", at_once)
    a, b, c = (RANDOM.random(shape) for shape in ((3, 4), (4, 5), (5, 2)))
    whole = strongest_paths(strongest_paths(a, b), c)
    assert np.array_equal(whole, strongest_paths(a, strongest_paths(b, c)))
    for i, o in itertools.product(range(3), range(2)):
        best = max(min(a[i, k], b[k, m], c[m, o]) for k in range(4) for m in range(5))
        assert whole[i, o] == best


def test_what_np_does_not_depend_on() -> None:
    edges = RANDOM.random((6, 8))
    edges /= edges.max()
    value = neural_persistence(edges)
    assert 0 <= value <= 1
    assert neural_persistence(edges[RANDOM.permutation(6)][:, RANDOM.permutation(8)]) == pytest.approx(value, abs=1e-15)
    assert neural_persistence(edges, essential=True) ** 2 == pytest.approx(value**2 + 1 / 13, abs=1e-14)
    for place in np.ndindex(edges.shape):
        raised = edges.copy()
        raised[place] = min(1.0, raised[place] + 0.3)
        assert neural_persistence(raised) <= value + 1e-15
    assert neural_persistence(np.ones((3, 4))) == 0
    assert neural_persistence(np.ones((3, 4)), essential=True) == pytest.approx(6**-0.5)


def test_signs_and_scale_of_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    before = persistence(model)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.where(torch.rand_like(layer.weight) < 0.5, -3.0, 3.0))
    after = persistence(model)
    for name, value in before.layers.items():
        assert after.layers[name] == pytest.approx(value, abs=1e-14)
    assert after.deep != pytest.approx(before.deep, abs=1e-6)


def test_what_dgp_does_not_depend_on() -> None:
    first, second = RANDOM.standard_normal((6, 5)), RANDOM.standard_normal((3, 6))
    value = deep_graph_persistence([first, second])
    order = RANDOM.permutation(6)
    assert deep_graph_persistence([first[order], second[:, order]]) == pytest.approx(value, abs=1e-14)
    assert deep_graph_persistence([-2 * first + 7, 0.3 * second - 1]) == pytest.approx(value, abs=1e-13)
    assert deep_graph_persistence([first]) == pytest.approx(neural_persistence(standardised([first])[0]), abs=1e-15)


@pytest.mark.parametrize("widths", [(3, 2), (4, 3, 2), (5, 2, 4, 3)])
def test_values_of_a_model_by_hand(widths: tuple[int, ...]) -> None:
    weights = [RANDOM.standard_normal((n, m)) * (k + 1) + 0.3 for k, (m, n) in enumerate(pairwise(widths))]
    model = nn.Sequential(*(part for w in weights for part in (nn.Linear(*w.shape[::-1]), nn.ReLU())))[:-1].double()
    with torch.no_grad():
        for layer, weight in zip(model[::2], weights, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
    found, largest = persistence(model), max(np.abs(w).max() for w in weights)
    assert found.deep == pytest.approx(naive_deep(weights), abs=1e-14)
    official = persistence(model, essential=True)
    assert official.deep == pytest.approx(math.sqrt(naive_deep(weights) ** 2 + 1 / (widths[0] + widths[-1] - 1)), abs=1e-14)
    assert official.deep_shuffled[0] > found.deep_shuffled[0]
    for k, w in enumerate(weights):
        edges = [abs(v) / largest for v in w.ravel()]
        mean = sum(edges) / len(edges)
        value = naive_persistence(np.abs(w) / largest)
        assert found.layers[str(2 * k)] == pytest.approx(value, abs=1e-15)
        assert official.layers[str(2 * k)] ** 2 == pytest.approx(value**2 + 1 / (sum(w.shape) - 1), abs=1e-14)
        spread = math.sqrt(sum((v - mean) ** 2 for v in edges) / len(edges))
        assert found.spread[str(2 * k)] == pytest.approx(spread, abs=1e-15)


def test_shuffles_are_drawn_from_all_orders_of_each_layer() -> None:
    """Against the mean and the standard deviation over all of them: 6! orders of the first layer, and 2 of the second."""
    weights = [np.array([[1.0, -0.7, 0.3], [0.1, 0.05, -0.2]]), np.array([[0.05, -0.5]])]
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    with torch.no_grad():
        for layer, weight in zip(model, weights, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
    orders = [[np.reshape(order, w.shape) for order in itertools.permutations(w.ravel())] for w in weights]
    shuffles = 1000
    found = persistence(model, shuffles)
    assert found.deep_shuffled is not None
    deep = [naive_deep(network) for network in itertools.product(*orders)]
    for (mean, deviation), values in (
        (found.deep_shuffled, deep),
        *((found.shuffled[str(k)], [naive_persistence(np.abs(w)) for w in orders[k]]) for k in range(2)),
    ):
        assert mean == pytest.approx(np.mean(values), abs=4 * np.std(values) / shuffles**0.5 + 1e-15)
        assert deviation == pytest.approx(np.std(values), rel=0.1, abs=1e-15)
    assert found.shuffled["0"][1] > 0.01
    assert found.deep_shuffled[1] > 0.01


def test_models_of_other_kinds() -> None:
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    found = persistence(convolution)
    assert list(found.layers) == ["0", "3"]
    assert found.deep is None
    largest = max(float(p.detach().abs().max()) for p in (convolution[0].weight, convolution[3].weight))
    edges = convolution[0].weight.detach().flatten(1).abs().double().numpy() / largest  # a row for each output channel
    assert found.layers["0"] == pytest.approx(naive_persistence(edges), abs=1e-15)
    with pytest.raises(UnsupportedModelError, match="no layer, and no other matrix"):
        persistence(nn.ReLU())
    with torch.no_grad():
        convolution[3].weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="layer '3' is not finite"):
        persistence(convolution)
    with pytest.raises(ConfigError, match="outputs 4 numbers"):
        deep_graph_persistence([np.ones((4, 3)), np.ones((2, 5))])


def test_matrices_of_modules_that_are_no_layers() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(7, 4), "rnn": nn.LSTM(4, 3), "attend": nn.MultiheadAttention(4, 2)})
    model["read"] = nn.utils.parametrizations.weight_norm(nn.Linear(4, 7))
    found = persistence(model)
    packed = ["words.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "attend.in_proj_weight"]
    assert list(found.layers) == ["attend.out_proj", "read", *packed]
    assert found.deep is None
    model["read"] = nn.Linear(4, 7)
    model["read"].weight = model["words"].weight  # one matrix, once
    assert list(persistence(model).layers) == ["attend.out_proj", "read", *packed[1:]]
    matrix = model["rnn"].weight_hh_l0.detach().abs().double().numpy()
    largest = max(float(p.detach().abs().max()) for p in model.parameters() if p.dim() > 1)
    assert persistence(model).layers["rnn.weight_hh_l0"] == pytest.approx(neural_persistence(matrix / largest))


def test_the_model_is_only_read() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert persistence(model) == persistence(model)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
