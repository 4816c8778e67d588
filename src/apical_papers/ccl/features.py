"""Figures of counter-current learning: features of both networks at every depth during training.

    python -m apical_papers.ccl.features --out results/ccl-features [--data mnist] [--method tsne]

After 0, 10, 100 and 1000 updates (figure 3 of arXiv 2409.19841) the activities of test samples and the codes of their
classes are plotted in two dimensions, by scikit-learn's PCA or t-SNE, fitted separately for each panel, with the linear CKA
of forward and feedback activity.
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import nn

from apical import data, models
from apical.bench.figures.curves import render
from apical.bench.program import run_command
from apical.bench.run_folder import environment, write_json
from apical.diagnostics.similarity import linear_cka
from apical.errors import ConfigError
from apical.rules.counter_current.counter_current_learning import CounterCurrentLearning


@dataclass(frozen=True)
class Options:
    """Plot features of counter-current learning at every depth."""

    out: Path
    """Output folder."""
    data: str = "digits"
    """Data set with classes."""
    model: str = "mlp-elu-256-256-256-256-256"
    """Network: a row of blocks."""
    updates: tuple[int, ...] = (0, 10, 100, 1000)
    """Numbers of updates after which features are plotted."""
    method: Literal["pca", "tsne"] = "pca"
    """Projection of features to two dimensions."""
    samples: int = 400
    """Number of test samples plotted."""
    batch_size: int = 32
    """Samples per update."""
    lr: float = 0.5
    """Learning rate of both networks."""
    seed: int = 0
    """Seed of weights and data order."""


Panel = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]
"""Samples (n, 2), codes (K, 2), CKA."""


def run(options: Options) -> dict[int, dict[str, Panel]]:
    """Train and project: updates -> layer -> panel."""
    if list(options.updates) != sorted(set(options.updates)) or not options.updates or options.updates[0] < 0:
        raise ConfigError("--updates must be increasing and not negative")
    dataset = data.load(options.data)
    if dataset.is_regression:
        raise ConfigError(f"the targets of {options.data} are numbers; give data with classes")
    torch.manual_seed(options.seed)
    model = models.build(options.model, dataset.input_shape, dataset.classes)
    rule = CounterCurrentLearning(model, input_shape=dataset.input_shape)
    optimizer = torch.optim.SGD(rule.parameters(), lr=options.lr)
    samples = slice(options.samples)
    inputs, labels = dataset.test.inputs[samples], dataset.test.targets[samples]
    panels_at: dict[int, dict[str, Panel]] = {}
    for update in range(options.updates[-1] + 1):
        if update in options.updates:
            panels_at[update] = {name: _panel(a, b, labels, options) for name, (a, b) in rule.pairs(inputs, labels).items()}
        batch = torch.randint(len(dataset.train), (options.batch_size,))
        optimizer.zero_grad()
        rule(dataset.train.inputs[batch], dataset.train.targets[batch]).backward()
        for parameters in (model.parameters(), rule.feedback_parameters()):
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return panels_at


def _panel(a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor, options: Options) -> Panel:
    """Scale the rows of both sides to unit length, as the paper compares them."""
    classes = labels.unique()
    first = [int((labels == label).nonzero()[0]) for label in classes]
    both = torch.cat([a, b[first]])
    both = both / both.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if options.method == "pca":
        flat = PCA(2, random_state=0).fit_transform(both.double().numpy())
    else:
        flat = TSNE(2, random_state=0, init="pca").fit_transform(both.double().numpy())
    return flat[: len(a)], flat[len(a) :], linear_cka(a, b)


def draw(panels_at: dict[int, dict[str, Panel]], labels: np.ndarray[Any, Any]) -> Figure:
    """Draw a row of panels for each number of updates, a column for each depth."""
    layers = list(next(iter(panels_at.values())))
    figure = Figure(figsize=(7.0, 1.5 * len(panels_at) + 0.3))
    grid = figure.subplots(len(panels_at), len(layers), squeeze=False)
    colours = matplotlib.colormaps["tab10"]
    for line, (update, panels) in zip(grid, panels_at.items(), strict=True):
        for axes, name in zip(line, layers, strict=True):
            samples, codes, cka = panels[name]
            axes.scatter(*samples.T, s=3, c=labels, cmap=colours, vmin=0, vmax=9, linewidths=0, alpha=0.6, rasterized=True)
            axes.scatter(*codes.T, s=30, marker="*", c=np.unique(labels), cmap=colours, vmin=0, vmax=9, ec="k", lw=0.4)
            axes.set_title(f"{name}, CKA {cka:.2f}" if update == next(iter(panels_at)) else f"CKA {cka:.2f}", pad=3)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
        line[0].set_ylabel(f"{update} updates")
    return figure


def study(options: Options, command: str) -> dict[str, Any]:
    """Draw the features, and write them with results.json; there are no verdicts."""
    panels_at = run(options)
    labels = data.load(options.data).test.targets[: options.samples].numpy()
    drawing = render("features", "", "", draw(panels_at, labels))
    options.out.mkdir(parents=True, exist_ok=True)
    drawing.write(options.out)
    about = (
        f"Dots: {options.samples} test samples of {options.data} at each layer of the forward network, by class. Stars: the "
        f"feedback network's codes of the classes. {options.method.upper().replace('TSNE', 't-SNE')}, each panel by itself, "
        "of rows scaled to unit length; CKA of the two populations above each panel."
    )
    results = {
        "title": f"Features of CCL at every depth, {options.data}",
        "about": about,
        "command": command,
        "settings": {**asdict(options), "out": str(options.out), "updates": " ".join(map(str, options.updates))},
        "cka": {str(update): {name: panel[2] for name, panel in panels.items()} for update, panels in panels_at.items()},
        "environment": environment("cpu", torch.get_num_threads()),
    }
    write_json(options.out / "results.json", results)
    print(f"written: {options.out}")
    return {"verdicts": []}


main = partial(run_command, "apical_papers.ccl.features", Options, study, least={"seed": 0})


if __name__ == "__main__":
    sys.exit(main())
