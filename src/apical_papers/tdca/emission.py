"""Credit that evolved top-down networks send to an output, compared with the hand-built credit, the error p - y."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from apical.rules.top_down.teacher import TopDownNetwork

COLOURS = ("#0072B2", "#D55E00")
OF_LOGITS = (("wrong class", "right class"), "probability of the class", "credit of the logit")
"""Names and labels of the credit for class logits."""


def credit_figure(p: Tensor, signals: Tensor, names: tuple[str, str], across: str, up: str) -> Figure:
    """Draw credit over probability, a line per network (S) and value of y, scaled to the size of p - y, which is also drawn.

    Args:
        p: probabilities (n,).
        signals: (S, 2, n), for y = 0 and y = 1.
        names: names of the two.
        across, up: labels of the axes.
    """
    hand = torch.stack([p, p - 1])
    size = signals.square().mean((1, 2), keepdim=True).sqrt() / hand.square().mean().sqrt()
    figure = Figure(figsize=(4.6, 3.0))
    axes = figure.subplots()
    for y, (name, colour) in enumerate(zip(names, COLOURS, strict=True)):
        for number, line in enumerate((signals / size)[:, y]):
            axes.plot(p, line, color=colour, lw=0.9, label=None if number else name)
    for y, line in enumerate(hand):
        axes.plot(p, line, color="#000000", lw=1.2, linestyle=(0, (4, 1.5)), label=None if y else "by hand: p - y")
    axes.set(xlabel=across, ylabel=up)
    axes.legend(loc="best")
    return figure


def network_of(cell: Mapping[str, Any]) -> TopDownNetwork:
    """Return the final network of an evolution of the classification study, from its saved weights."""
    config = cell["config"]
    width = int(config["model"].rpartition("-")[2])  # of the learner's single hidden layer
    sizes = (config["ways"], [width], config["hidden"], config.get("sites"))
    network = TopDownNetwork(*sizes, relative=config["relative"], credit=config["credit"], output=config["output"])
    torch.nn.utils.vector_to_parameters(torch.tensor(cell["teacher"]), network.parameters())
    return network


def sent_to_outputs(cells: Sequence[Mapping[str, Any]], bins: int = 20, draws: int = 20_000) -> tuple[Tensor, Tensor]:
    """Return probabilities (bins,) and the mean credit (S, 2, bins) of an output there, for a wrong and the right class.

    Predictions are drawn at random, from uncertain to certain; the mean is over predictions in the bin and over classes.
    """
    generator = torch.Generator().manual_seed(0)
    classes = cells[0]["config"]["ways"]
    sharp = 8 * torch.rand(draws, 1, generator=generator)
    p = torch.softmax(sharp * torch.randn(draws, classes, generator=generator), 1)
    y = torch.eye(classes)[torch.randint(classes, (draws,), generator=generator)]
    at, kinds = (p * bins).long().clamp(max=bins - 1).flatten(), y.flatten().long()
    place = kinds * bins + at
    count = torch.zeros(2 * bins).index_add_(0, place, torch.ones(len(place)))
    means = []
    for network in map(network_of, cells):
        with torch.no_grad():
            credit = network.credits(network(p, y), network.widths)[-1].flatten()
        means.append(torch.zeros(2 * bins).index_add_(0, place, credit) / count)
    return (torch.arange(bins) + 0.5) / bins, torch.stack(means).view(len(cells), 2, bins)
