"""Share of the credit that reaches the first layer of a deep chain, under each rule, at the initial weights."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from apical.bench.finding import Row
from apical.bench.finding import table as table_of
from apical.bench.names import RULES as EVERY
from apical.bench.names import find_rule
from apical.errors import ApicalError
from apical.models import critical_, flow, orthogonal_, xavier_

RULES = (
    *("bp", "fa", "dfa", "usf", "pfa", "pfa-o", "dtp", "ddtp-linear", "dfc-ssa", "strong-dfc", "tdca-unevolved", "ccl"),
    *("pc", "pc-error", "dualprop", "mono-forward", "ff", "ep"),
)
"""Rules of the study of structure and depth."""

SLOW = {"pc": 50, "ep": 50, "strong-dfc": 50}
"""Largest depth measured for slow rules in that study: beyond it their networks settle for seconds."""

FURTHER = tuple(rule for rule in EVERY if rule not in RULES or rule in SLOW)
"""Rules of a separate table, `structure/depth`: all other named rules, and those that the study measures only in part."""

DEPTHS = (10, 50, 200)
WIDTH, SAMPLES = 32, 1
SEEDS = 3
"""Seeds of the study whose chains are measured: the rest of the study is cheaper."""

REFUSED = "refused: "
"""Prefix of the rule's own reason if there is no number."""


def chain(depth: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Make `depth` layers of one width, each with its activation."""
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(WIDTH, WIDTH), activation())))


def _abs() -> nn.Module:
    return nn.LeakyReLU(-1.0)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "|x|, orthogonal flow": lambda depth: flow(WIDTH, depth),
    "|x|, Xavier": lambda depth: xavier_(chain(depth, _abs)),
    "tanh, orthogonal": lambda depth: orthogonal_(chain(depth, nn.Tanh)),
    "tanh, critical": lambda depth: critical_(chain(depth, nn.Tanh)),
    "tanh, Xavier": lambda depth: xavier_(chain(depth, nn.Tanh)),
}
"""Chains by activation and initial weights. For |x| critical weights are normal with Xavier's variance."""

EXACT = next(iter(NETWORKS))


def network(name: str, depth: int, seed: int) -> nn.Sequential:
    """Make a chain with an orthogonal read-out of ten classes."""
    torch.manual_seed(seed)
    body = NETWORKS[name](depth)
    return nn.Sequential(*body.children(), orthogonal_(nn.Linear(WIDTH, 10)))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Draw single samples: inputs (samples, 1, width) and classes (samples, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, 1, WIDTH, generator=generator), torch.randint(10, (SAMPLES, 1), generator=generator)


def arrival(rule: str, name: str, depth: int, seed: int) -> float | str:
    """Return the gradient norm of layer 1 over that of the last hidden layer, RMS over single samples; or why there is none.

    One sample at a time, because the gradient of a batch also depends on the alignment of activities, which depth changes.
    """
    model = network(name, depth, seed)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    ends, squares = (layers[0], layers[-2]), [0.0, 0.0]
    entry = find_rule(rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rules warn that feedback is untrained
        try:
            learner = entry.build(model, **entry.options)
            for x, y in zip(*batch(seed), strict=True):
                model.zero_grad()
                learner.accumulate(x, y)
                for i, layer in enumerate(ends):
                    grad = layer.weight.grad
                    squares[i] += 0.0 if grad is None else float(grad.double().square().sum())
        except ApicalError as error:
            return REFUSED + " ".join(str(error).split())
    if not all(map(math.isfinite, squares)):
        return "not finite"
    return math.sqrt(squares[0] / squares[1]) if squares[1] else "no credit at the last hidden layer"


def measure(
    seed: int, rules: Sequence[str] = RULES, depths: Sequence[int] = DEPTHS, until: Mapping[str, int] = MappingProxyType({})
) -> dict[str, dict[str, dict[str, float | str]]]:
    """Map network, rule and depth to the ratio of gradient norms.

    Args:
        until: largest depth at which a rule is measured.
    """

    def entry(rule: str, name: str, depth: int) -> float | str:
        return arrival(rule, name, depth, seed) if depth <= until.get(rule, depth) else "not run"

    return {name: {rule: {str(depth): entry(rule, name, depth) for depth in depths} for rule in rules} for name in NETWORKS}


def ratios(cells: Any, name: str, rule: str, depth: int) -> list[float]:
    """Return the numbers of all seeds that have one."""
    values = [cell["depth"][name][rule].get(str(depth)) for cell in cells if cell["depth"]]
    return [value for value in values if isinstance(value, float)]


def reason(cells: Any, name: str, rule: str, depth: int) -> str:
    """Return why there is no number."""
    values = [cell["depth"][name][rule][str(depth)] for cell in cells if cell["depth"]]
    return next(str(value) for value in values if isinstance(value, str))


def table(cells: Any, name: str, rules: Sequence[str] = RULES, depths: Sequence[int] = DEPTHS) -> Row:
    """Return the table of one network, rule by rule."""

    refusals: dict[str, str] = {}

    def entry(rule: str, layers: int) -> str:
        values = ratios(cells, name, rule, layers)
        if values:
            return _geometric(values)
        why = reason(cells, name, rule, layers)
        if why.startswith(REFUSED):
            refusals.setdefault(rule, why.removeprefix(REFUSED))
            return "refused"
        return why

    rows = [[rule, *(entry(rule, layers) for layers in depths)] for rule in rules]
    note = "At the initial weights and initial feedback, single samples; geometric mean over seeds and its range."
    return table_of(
        f"Gradient norm of layer 1 over that of the last hidden layer: {name}",
        " ".join([note, *(f"{rule} refuses: {why}." for rule, why in refusals.items())]),
        ["rule", *(f"depth {layers}" for layers in depths)],
        rows,
    )


def _geometric(values: Sequence[float]) -> str:
    if min(values) <= 0:
        return f"{fmean(values):.2g}" if max(values) else "0"
    return f"{math.exp(fmean(map(math.log, values))):.2g} ({min(values):.2g} to {max(values):.2g})"
