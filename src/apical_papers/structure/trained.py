"""Networks trained on digits: the persistence of their weights under eight rules, learned wirings, and random codes."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from apical.core.credit import CreditRule
from apical.diagnostics.coding import covariance_spectrum, gaussian_entropy
from apical.diagnostics.persistence import persistence
from apical.models import mlp
from apical.models.graph import GraphClassifier
from apical_papers.digits import Digits, passes

BATCH = 64
RULES = {"bp": 0.1, "fa": 0.1, "dfa": 0.1, "usf": 0.1, "pfa-o": 0.1, "dtp": 0.1, "ccl": 1.0, "mono-forward": 0.1}
"""Rules whose nets are measured, with learning rates of plain SGD, chosen after inspecting the accuracy of one seed."""

WIRINGS: dict[str, tuple[str | float, str, str, float]] = {
    "chain": ("chain", "fixed", "bp", 0.0),
    "residual": ("residual", "fixed", "bp", 0.0),
    "complete": ("complete", "fixed", "bp", 0.0),
    "random": (0.5, "fixed", "bp", 0.0),
    "learned": ("complete", "learned", "bp", 0.0),
    "learned, L1": ("complete", "learned", "bp", 1e-2),
    "attention": ("complete", "attention", "bp", 0.0),
    "chain, fa": ("chain", "fixed", "fa", 0.0),
    "learned, fa": ("complete", "learned", "fa", 0.0),
}
"""Wiring, edges, rule and gamma of graphs with eight nodes."""

NODES, WIDTH, GRAPH_LR = 8, 64, 0.05


def trained(
    rule: str, model: nn.Module, digits: Digits, lr: float, epochs: int, after: Callable[[], None] = lambda: None
) -> CreditRule:
    """Return the rule after plain SGD; `after` is called after every step."""
    *_, learner = passes(rule, model, digits, lr, BATCH, epochs, after=after)
    return learner


def numbers(model: nn.Module) -> dict[str, Any]:
    """Return the saved part of a network's persistence."""
    numbers = persistence(model, shuffles=3)
    assert numbers.deep_shuffled is not None
    return {
        "np": list(numbers.layers.values()),
        "np shuffled": [mean for mean, _ in numbers.shuffled.values()],
        "np shuffled std": [std for _, std in numbers.shuffled.values()],
        "spread": list(numbers.spread.values()),
        "dgp": numbers.deep,
        "dgp shuffled": numbers.deep_shuffled[0],
    }


def topology(digits: Digits, seed: int, epochs: int) -> dict[str, Any]:
    """Return persistence before training, and after it under each rule."""
    results: dict[str, Any] = {}
    for rule, lr in RULES.items():
        torch.manual_seed(seed)
        model = mlp(digits.x.shape[1], [64, 64], 10)
        results.setdefault("untrained", {**numbers(model), "accuracy": digits.accuracy(model)})
        learner = trained(rule, model, digits, lr, epochs)
        results[rule] = {**numbers(model), "accuracy": digits.accuracy(learner)}
    return results


def wirings(digits: Digits, seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """Return the test accuracy of each wiring, the share of its edges below 0.01, and the accuracy without these."""
    results = {}
    for name, (wiring, edges, rule, gamma) in WIRINGS.items():
        torch.manual_seed(seed)
        model = GraphClassifier(digits.x.shape[1], WIDTH, NODES, 10, wiring, edges)  # type: ignore[arg-type]

        def shrink(model: GraphClassifier = model, gamma: float = gamma) -> None:
            if gamma:
                model.graph.shrink_(GRAPH_LR * gamma)

        trained(rule, model, digits, GRAPH_LR, epochs, shrink)
        accuracy = digits.accuracy(model)
        count = sum(len(cast(Any, mix).senders) for mix in model.graph.mixes)
        share = model.graph.prune_() / count
        results[name] = {"accuracy": accuracy, "pruned": share, "accuracy pruned": digits.accuracy(model)}
    return results


def codes(digits: Digits, seed: int, networks: int = 30) -> float:
    """Return Spearman's rho between the Gaussian entropy of random features and the accuracy of a linear read-out.

    Features are two ReLU layers with masks whose density and locality vary between networks.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = digits.x.shape[1]
    side = round(pixels**0.5)
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1).float()
    target = nn.functional.one_hot(digits.y, 10).float()
    rows = []
    for _ in range(networks):
        density, radius = torch.rand(2, generator=generator).tolist()
        centres = places[torch.randint(pixels, (100,), generator=generator)]
        near = (places[:, None] - centres[None]).norm(dim=-1) < side * (0.1 + 0.9 * radius)
        first = near & (torch.rand(pixels, 100, generator=generator) < 0.05 + 0.95 * density)
        second = torch.rand(100, 100, generator=generator) < 0.05 + 0.95 * density
        h, test = digits.x, digits.test[0]
        for mask in (first, second):
            weight = torch.randn(mask.shape, generator=generator) * mask / mask.sum(0).clamp(min=1).sqrt()
            h, test = torch.relu(h @ weight), torch.relu(test @ weight)
        entropy = gaussian_entropy(covariance_spectrum(h))
        scale, shift = h.std(0).clamp(min=1e-6), h.mean(0)
        features = torch.cat([(h - shift) / scale, torch.ones(len(h), 1)], 1)
        read = torch.linalg.solve(features.T @ features + torch.eye(101), features.T @ target)
        seen = torch.cat([(test - shift) / scale, torch.ones(len(test), 1)], 1)
        rows.append((entropy, float(((seen @ read).argmax(1) == digits.test[1]).double().mean())))
    return spearman(*zip(*rows, strict=True))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation of two series; equal values get the mean of their ranks. 0 if one is constant.

    >>> round(spearman([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]), 9)
    0.5
    """
    from scipy import stats  # its import takes a third of a second

    return float(stats.spearmanr(a, b).statistic) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0
