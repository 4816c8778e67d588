"""Claims about networks with little or no training: product nodes for a Lorenz system, flows, and channels.

Run `python -m apical_papers.structure.theory --out results/structure-theory`. Networks with one, two and three product nodes
learn the vector field of the Lorenz system, whose quadratic terms span two dimensions (arXiv 2106.11409). Gradients in the
states of 50 Euler steps along orthogonal flows and with normal weights, and accuracies of both after backpropagation
(2006.11421). Orthogonal and normal weights as noisy channels, over gains (2212.01744). Each seed is saved in the folder when
it is finished. The marks were written before the run.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apical.bench.finding import Row, at_least, at_most, by_name, count, difference, mean_table, series
from apical.bench.program import Cells, SeedStudy, about_study
from apical.diagnostics.channel import Where, channel
from apical.models import flow, orthogonal_
from apical.models.orthogonal_flow import EulerStep, Flow
from apical_papers.digits import Digits, passes
from apical_papers.structure.trained import spearman

WIDTH, STEPS = 32, 50
NODES, STATES, STARTS, ITERATIONS = (1, 2, 3), 2000, 5, 500
GAINS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
NOISES: dict[Where, str] = {"every": "noise in every layer", "end": "noise at the end"}
ROUNDING = 16.0
"""Orders of magnitude of a condition number beyond which it is only rounding."""
RATE, BATCH = 0.05, 64

SETTINGS: dict[str, Any] = {
    "Lorenz: states, starts, steps of L-BFGS": f"{STATES}, {STARTS}, {ITERATIONS}",
    "flows: width, steps": f"{WIDTH}, {STEPS}; digits in {WIDTH} principal components; SGD at {RATE}, batches of {BATCH}",
    "channels": f"tanh, width {WIDTH}, depth 10, noise 0.1, 20 inputs",
}

ABOUT = about_study(
    "Product nodes, flows and channels: claims about structure at a small size",
    "How many product nodes emulate the Lorenz system; whether gradients keep their length along orthogonal flows; "
    "and whether orthogonal weights make the better channel.",
    "No table of these papers was found in a source that could be read. The marks were written before the run. Reproduced "
    "means that the 95 % interval (Student's t, paired over seeds) lies on its better side, or the mean past the mark.",
)


class Products(nn.Module):
    """`A x + c + G ((P x) * (R x))` with h product nodes: (batch, 3) -> (batch, 3)."""

    def __init__(self, h: int) -> None:
        super().__init__()
        self.linear, self.g = nn.Linear(3, 3), nn.Linear(h, 3, bias=False)
        self.p, self.r = nn.Linear(3, h, bias=False), nn.Linear(3, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The rate of change."""
        result: Tensor = self.linear(x) + self.g(self.p(x) * self.r(x))
        return result


def lorenz(state: Tensor, sigma: float = 10.0, rho: float = 28.0, beta: float = 8 / 3) -> Tensor:
    """The vector field: (batch, 3) -> (batch, 3)."""
    x, y, z = state.unbind(-1)
    return torch.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z], -1)


def emulation_error(h: int, seed: int, starts: int = STARTS) -> float:
    """Return the least error of `starts` trainings on test states, RMS relative to that of the (standardised) field."""
    torch.manual_seed(seed)
    u, test = (torch.randn(STATES, 3, dtype=torch.double) for _ in range(2))
    scale = lorenz(10 * u).std(0)
    target, wanted = lorenz(10 * u) / scale, lorenz(10 * test) / scale
    errors = []
    for _ in range(starts):
        model = Products(h).double()
        optimizer = torch.optim.LBFGS(
            model.parameters(),
            max_iter=ITERATIONS,
            tolerance_grad=1e-14,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (model(u) - target).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            errors.append(float((model(test) - wanted).norm() / wanted.norm()))
    return min(errors)


def normal(gain: float, tied: bool = False) -> nn.Sequential:
    """Make Euler steps with normal weights of deviation gain / sqrt(width): separate per step, or tied."""
    steps = [EulerStep(WIDTH, 1 / STEPS) for _ in range(STEPS)]
    weight = torch.randn(1 if tied else STEPS, WIDTH, WIDTH) * gain / WIDTH**0.5
    for step, each in zip(steps, weight.expand(STEPS, -1, -1), strict=True):
        step.linear.weight = nn.Parameter(each.clone())
    return nn.Sequential(*steps)


ORTHOGONAL: tuple[Flow, ...] = ("isospectral", "gated", "tied")
FLOWS: dict[str, Callable[[], nn.Sequential]] = {
    **{name: partial(flow, WIDTH, STEPS, name, residual=True) for name in ORTHOGONAL},
    "normal": partial(normal, 1.0),
    "normal, gain 3": partial(normal, 3.0),
    "normal, gain 3, tied": partial(normal, 3.0, tied=True),
}
"""Chains of Euler steps `x + |W x| / N`; the first three along orthogonal weights."""

TRAINED = (*ORTHOGONAL, "normal")


def gradient_norms(steps: nn.Sequential, x: Tensor, targets: Tensor) -> Tensor:
    """Return |dL/dx_k| over |dL/dx_N| of every sample, k = 0..N-1: (N, batch)."""
    states = [x.requires_grad_()]
    for step in steps:
        states.append(step(states[-1]))
    loss = nn.functional.cross_entropy(orthogonal_(nn.Linear(WIDTH, 10))(states[-1]), targets, reduction="sum")
    norms = torch.stack([each.norm(dim=1) for each in torch.autograd.grad(loss, states)])
    return norms[:-1] / norms[-1]


class Components(Digits):
    """Digits in their first principal components, each with variance one."""

    def __init__(self, name: str = "mnist") -> None:
        super().__init__(name)
        mean = self.x.mean(0)
        values, vectors = torch.linalg.eigh((self.x - mean).T @ (self.x - mean) / len(self.x))
        to = vectors[:, -WIDTH:] / values[-WIDTH:].sqrt()
        self.x, self.test = (self.x - mean) @ to, ((self.test[0] - mean) @ to, self.test[1])


def gradients(seed: int) -> dict[str, dict[str, float]]:
    """Return by flow the smallest and largest norm over steps and 20 samples."""
    ranges = {}
    for name, make in FLOWS.items():
        torch.manual_seed(seed)
        norms = gradient_norms(make(), torch.randn(20, WIDTH), torch.randint(10, (20,)))
        ranges[name] = {"least": float(norms.min()), "largest": float(norms.max())}
    return ranges


def accuracies(digits: Digits, seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """Return accuracies (0 to 1) on test digits, after backpropagation through flows with a read-out."""
    reached = {}
    for name in TRAINED:
        torch.manual_seed(seed)
        *_, learner = passes("bp", nn.Sequential(*FLOWS[name](), nn.Linear(WIDTH, 10)), digits, RATE, BATCH, epochs)
        reached[name] = {"accuracy": digits.accuracy(learner)}
    return reached


def channels(seed: int) -> dict[str, dict[str, float]]:
    """Return nats under both models of noise, and the condition number, by weights and gain."""
    rows = {}
    inputs = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(seed))
    for kind in ("orthogonal", "normal"):
        for gain in GAINS:
            torch.manual_seed(seed)
            layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(10)]
            for layer in layers:
                draw = nn.init.orthogonal_ if kind == "orthogonal" else partial(nn.init.normal_, std=1 / WIDTH**0.5)
                draw(layer.weight)
                layer.weight.data.mul_(gain)
            model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
            found = {where: channel(model, inputs, 0.1, where) for where in NOISES}
            nats = {where: each.nats for where, each in found.items()}
            rows[f"{kind}, gain {gain:g}"] = nats | {"condition": min(found["end"].log10_condition, ROUNDING)}
    return rows


def _cell(seed: int, epochs: int) -> dict[str, Any]:
    return {
        "lorenz": {str(h): {"error": emulation_error(h, seed)} for h in NODES},
        "gradients": gradients(seed),
        "accuracy": accuracies(Components(), seed, epochs),
        "channels": channels(seed),
    }


def verdicts(cells: Cells) -> list[Row]:
    """Judge the number of product nodes, the bound on gradients, and the better channel."""
    one, two, three = (series(cells, "lorenz", str(h), "error") for h in NODES)
    rows = [
        at_least("Lorenz", "bp", "error with 1 product node", one, 0.01),
        at_most("Lorenz", "bp", "error with 2 product nodes", two, 1e-6),
        at_most("Lorenz", "bp", "error with 3 product nodes", three, 1e-6),
    ]
    low, high = (1 - 1 / STEPS) ** STEPS, (1 + 1 / STEPS) ** STEPS
    for name in FLOWS:
        inside = [low <= row["least"] and row["largest"] <= high for row in series(cells, "gradients", name)]
        if name in ORTHOGONAL:
            what = f"{name}: seeds whose gradients stay within [{low:.3f}, {high:.3f}]"
            rows.append(count("flow", "bp", what, inside, len(cells)))
        elif "gain 3" in name:
            what = f"{name}: seeds whose gradients leave [{low:.3f}, {high:.3f}]"
            rows.append(count("flow", "bp", what, [not each for each in inside], len(cells)))
    plain = series(cells, "accuracy", "normal", "accuracy")
    for name in ORTHOGONAL:
        more = [a - b for a, b in zip(series(cells, "accuracy", name, "accuracy"), plain, strict=True)]
        rows.append(at_least("flow", "bp", f"{name}: accuracy less that of normal weights", more, -0.02))
    for where, title in NOISES.items():
        for gain in (g for g in GAINS if 0.8 <= g <= 2):
            ours, others = (series(cells, "channels", f"{kind}, gain {gain:g}", where) for kind in ("orthogonal", "normal"))
            what = f"{title}, gain {gain:g}: nats of orthogonal weights less those of normal ones"
            rows.append(difference("channel", "none", what, ours, others, less=False))
    rows_of = ([row for name, row in cell["channels"].items() if name.startswith("orthogonal")] for cell in cells)
    rho = [spearman(*([row[key] for row in of_cell] for key in ("condition", "end"))) for of_cell in rows_of]
    rows.append(at_most("channel", "none", "noise at the end: rank correlation of nats with the condition", rho, -0.99))
    return rows


def tables(cells: Cells) -> list[Row]:
    """Return tables of means over seeds with 95 % intervals."""
    part = partial(by_name, cells)
    means = "Mean over seeds with 95 % interval"
    field = f"Root mean square on {STATES} test states over that of the field; the best of {STARTS} starts. {means}."
    condition = (
        f"{means}; condition: log10 of the largest over the smallest singular value of the Jacobian, at most {ROUNDING:g}."
    )
    return [
        mean_table("Lorenz system: error by product nodes", field, "nodes", part("lorenz"), {"error": "error"}),
        mean_table(
            f"Norm of the gradient in the states of {STEPS} Euler steps, over that in the last",
            f"Over all steps and 20 samples. {means}.",
            "weights",
            part("gradients"),
            {"least": "least", "largest": "largest"},
        ),
        mean_table("Test accuracy of flows", f"0 to 1. {means}.", "weights", part("accuracy"), {"accuracy": "accuracy"}),
        mean_table("Channels (nats)", condition, "weights", part("channels"), NOISES | {"condition": "condition"}),
    ]


main = SeedStudy(
    "apical_papers.structure.theory",
    ABOUT,
    SETTINGS,
    _cell,
    verdicts,
    tables,
    epochs=5,
    passes="of every network that is trained.",
)


if __name__ == "__main__":
    sys.exit(main())
