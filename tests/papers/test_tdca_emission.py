"""What is shown of an evolved network's credit is what the network sends."""

from typing import Any

import torch

from apical.rules.top_down.teacher import TopDownNetwork
from apical_papers.tdca.emission import credit_figure, network_of, sent_to_outputs


def cell(sites: int | None, gain: float) -> dict[str, Any]:
    """What would be kept of an evolution that found `gain (p - y)` for the output: tanh is nearly linear here."""
    network = TopDownNetwork(4, [32], 16, sites, relative=True)
    small, top = 1e-3, network.body[-1]
    with torch.no_grad():
        for layer in (network.body[0], network.body[2]):
            layer.weight.zero_()  # type: ignore[operator, union-attr]
        network.body[0].weight[:4, :4] = small * torch.eye(4)  # type: ignore[index, operator]
        network.body[2].weight[:4, :4] = torch.eye(4)  # type: ignore[index, operator]
        top.weight[-4:, :] = gain / small * torch.eye(4, 16)  # type: ignore[index, operator]
    config = {"model": "mlp-tanh-32", "ways": 4, "hidden": 16, "relative": True, "credit": "logits", "output": "evolved"}
    config |= {} if sites is None else {"sites": sites}
    return {"config": config, "teacher": torch.nn.utils.parameters_to_vector(network.parameters()).tolist()}


def test_a_network_is_rebuilt_from_what_was_kept() -> None:
    for sites in (None, 4):
        network = network_of(cell(sites, 3.0))
        p, y = torch.softmax(torch.randn(5, 4), 1), torch.eye(4)[[0, 1, 2, 3, 0]]
        torch.testing.assert_close(network.credits(network(p, y), [32])[-1], 3 * (p - y), rtol=0, atol=1e-3)


def test_means_over_predictions_are_those_of_the_error() -> None:
    p, signals = sent_to_outputs([cell(None, 1.0), cell(None, -2.0)], bins=10)
    for y in (0, 1):
        assert bool(((signals[0, y] - (p - y)).abs() < 0.05).all())  # half a bin
    torch.testing.assert_close(signals[1], -2 * signals[0], rtol=1e-3, atol=1e-3)


def test_lines_are_drawn_at_the_size_of_the_error() -> None:
    p = torch.linspace(0, 1, 11)
    axes = credit_figure(p, torch.stack([p, p - 1])[None] * 7, ("wrong", "right"), "p", "credit").axes[0]
    for line, expected in zip(axes.get_lines()[:2], (p, p - 1), strict=True):
        torch.testing.assert_close(torch.tensor(line.get_ydata()).float(), expected)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["wrong", "right", "by hand: p - y"]
