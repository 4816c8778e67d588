"""What diagnostics make of batches and outputs that are no tensor, of half precision, and of weights that are computed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from apical import Backprop, FeedbackAlignment
from apical.core.credit import CreditRule
from apical.diagnostics.alignment import gradient_alignment, gradients, layer_alignment
from apical.diagnostics.channel import channel
from apical.diagnostics.gauss_newton import gauss_newton_alignment, gauss_newton_direction, minimum_norm_alignment
from apical.diagnostics.landscape import flat, losses_at
from apical.diagnostics.learnability import learnability
from apical.diagnostics.memory import held_bytes, step_bytes
from apical.diagnostics.plausibility import examine
from apical.errors import ConfigError, UnsupportedModelError

Look = Callable[[CreditRule, Any, Tensor], Any]
LOOKS: dict[str, Look] = {
    "gauss-newton": gauss_newton_alignment,
    "minimum norm": minimum_norm_alignment,
    "learnability": lambda rule, x, y: learnability(rule.model, x, rule),
    "channel": lambda rule, x, y: channel(rule.model, x),
    "landscape": lambda rule, x, y: losses_at(rule.model, rule.loss, x, y)(flat(rule.model)[None]),
    "audit": lambda rule, x, y: examine(rule, x, y, Backprop(copy.deepcopy(rule.model), rule.loss)),
}
TARGETS = torch.arange(4) % 3


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class InDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        result: Tensor = self.net(batch["x"])
        return result


class OutDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


@pytest.mark.parametrize("look", LOOKS)
def test_inputs_that_are_no_tensor_are_refused(look: str) -> None:
    rule = Backprop(InDict())
    with pytest.raises((ConfigError, UnsupportedModelError), match=r"inputs that are one tensor .* not dict"):
        LOOKS[look](rule, {"x": torch.randn(4, 6)}, TARGETS)


@pytest.mark.parametrize("look", ["gauss-newton", "learnability", "channel", "audit"])
def test_outputs_that_are_no_tensor_are_refused(look: str) -> None:
    rule = Backprop(OutDict(), lambda output, targets: F.cross_entropy(output["logits"], targets))
    with pytest.raises(ConfigError, match="one tensor"):
        LOOKS[look](rule, torch.randn(4, 6), TARGETS)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    ("inputs", "message"), [(torch.randn(0, 6), "empty"), (torch.full((4, 6), torch.nan), "finite inputs")]
)
def test_empty_batches_and_nan_are_refused(look: str, inputs: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LOOKS[look](Backprop(mlp()), inputs, TARGETS[: len(inputs)])


@pytest.mark.parametrize("look", ["gauss-newton", "minimum norm", "audit"])
def test_half_precision_is_refused_where_equations_are_solved(look: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"bfloat16.*model\.float\(\)"):
        LOOKS[look](Backprop(mlp().bfloat16()), torch.randn(4, 6).bfloat16(), TARGETS)


@pytest.mark.parametrize("look", ["gauss-newton", "learnability", "audit"])
def test_normalisation_over_the_batch_alone_is_refused(look: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(UnsupportedModelError, match=r"module '1' \(BatchNorm1d\) normalises over the batch"):
        LOOKS[look](Backprop(model), torch.randn(4, 6), TARGETS)


def test_memory_counts_no_tensor_of_a_batch_in_a_dict() -> None:
    """The same bytes as of the network on the tensor itself."""
    x = torch.randn(4, 6)
    for measure in (held_bytes, step_bytes):
        assert measure(Backprop(InDict()), {"x": x}, TARGETS) == measure(Backprop(mlp()), x, TARGETS)


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.read = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.read(self.lstm(x)[0][:, -1])
        return result


@pytest.mark.parametrize("kind", ["lstm", "batch norm"])
def test_the_landscape_takes_networks_one_by_one_where_it_cannot_take_several(kind: str) -> None:
    torch.manual_seed(0)
    normal = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3))
    model, inputs = (Lstm(), torch.randn(4, 5, 6)) if kind == "lstm" else (normal, torch.randn(4, 6))
    start = flat(model)
    points = torch.stack([start, 0.5 * start])
    losses = losses_at(model, F.cross_entropy, inputs, TARGETS)(points)
    for point, loss in zip(points, losses, strict=True):
        nn.utils.vector_to_parameters(point, model.parameters())
        assert float(loss) == pytest.approx(F.cross_entropy(model(inputs), TARGETS).item(), rel=1e-6)


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(norm(nn.Linear(6, 8)), nn.Tanh(), norm(nn.Linear(8, 3)))


@pytest.mark.parametrize(
    "norm", [weight_norm, spectral_norm, nn.utils.weight_norm], ids=["weight", "spectral", "old weight"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_layers_with_computed_weights_are_compared_by_what_these_are_computed_from(norm: Any) -> None:
    inputs = torch.randn(4, 6)
    exact = gradient_alignment(Backprop(normed(norm)), inputs, TARGETS)
    assert exact.keys() == {"0", "2"}
    assert all(layer["gradient_alignment"] < 1e-3 for layer in exact.values())
    rule = FeedbackAlignment(normed(norm))
    angles = gradient_alignment(rule, inputs, TARGETS)
    assert angles["2"]["gradient_alignment"] < 1e-3  # the output's error is exact
    assert 5 < angles["0"]["gradient_alignment"] < 175
    own, backprop = gradients(rule, inputs, TARGETS)
    rule(inputs, TARGETS).backward()
    learned = [p.grad.flatten() for name, p in rule.model[0].named_parameters() if not name.endswith("bias")]
    torch.testing.assert_close(own["0"].flatten(), torch.cat(learned), rtol=1e-4, atol=1e-6)
    assert own["0"].shape == backprop["0"].shape


def test_gauss_newton_has_an_angle_for_layers_with_computed_weights() -> None:
    angles = gauss_newton_alignment(Backprop(normed(weight_norm)), torch.randn(4, 6), TARGETS)
    assert angles.keys() == {"0", "2", "all"}


def test_matrices_that_are_sites_are_compared_too() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.w.T) @ self.v.T

    torch.manual_seed(0)
    rule = FeedbackAlignment(Plain(), sites=("w", "v"))
    angles = gradient_alignment(rule, torch.randn(4, 6), TARGETS)
    assert angles.keys() == {"w", "v"}
    assert angles["v"]["gradient_alignment"] < 1e-3 < 5 < angles["w"]["gradient_alignment"]


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.read = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.read(self.layer(x).mean(1))
        return result


def test_gauss_newton_direction_of_a_transformer_layer_solves_its_equation() -> None:
    """`(G + damping I) dW = -dL/dW` with G from the whole Jacobian."""
    torch.manual_seed(0)
    model, inputs = Attends().double(), torch.randn(4, 3, 6, dtype=torch.double)
    fast = torch.backends.mha.get_fastpath_enabled()
    change = gauss_newton_direction(model, F.cross_entropy, inputs, TARGETS, 0.1, tolerance=1e-10)
    assert torch.backends.mha.get_fastpath_enabled() is fast
    parameters = list(model.eval().parameters())
    output = model(inputs)
    columns = [
        torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in output.flatten()
    ]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in columns])
    p = output.softmax(1).detach()
    hessian = torch.block_diag(*[(torch.diag(row) - torch.outer(row, row)) / len(p) for row in p])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(output, TARGETS), parameters)])
    flat_change = torch.cat([change[name].flatten() for name, _ in model.named_parameters()])
    solved = jacobian.T @ hessian @ jacobian @ flat_change + 0.1 * flat_change
    torch.testing.assert_close(solved, -gradient, rtol=1e-6, atol=1e-9)


LAYERWISE: dict[str, Look] = {
    "gradients": gradient_alignment,
    "gauss-newton": gauss_newton_alignment,
    "weights": lambda rule, x, y: layer_alignment(rule),
}


@pytest.mark.parametrize("look", LAYERWISE.values(), ids=LAYERWISE)
def test_parameters_in_parts_are_refused(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `fully_shard` parts them: only the wrapper's own forward puts them together."""
    monkeypatch.setattr("apical.core.placement.is_parted", lambda parameter: True)
    with pytest.raises(ConfigError, match=r"fully_shard.*before it is wrapped"):
        look(FeedbackAlignment(mlp()), torch.randn(4, 6), TARGETS)
