"""Local classifiers against their losses, differentiated block by block as the equations stand (float64)."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical import CounterCurrentLearning, LocalClassifiers
from apical.core.losses import squared_error, token_cross_entropy
from apical.diagnostics.cost import multiply_adds
from apical.diagnostics.memory import peak_bytes
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.backprop import Backprop
from apical.rules.local_classifiers import class_similarity, described, similarity, window
from apical.testing import check_model

LOCALS = ("prediction", "similarity", "both", "projection")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mlp(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((6, 8), (8, 7)):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if norm else []), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Linear(7, 4))


def images() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.LeakyReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 3, 3, padding=1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(48, 5), nn.LeakyReLU(), nn.Linear(5, 4)),
    )


NETWORKS = {"mlp": (mlp, (6,)), "batch-norm": (partial(mlp, True), (6,)), "images": (images, (2, 8, 8))}


def batch(name: str = "mlp", size: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, *NETWORKS[name][1], generator=generator), torch.arange(size) % 4


def parts(model: nn.Sequential) -> list[nn.Sequential]:
    """The blocks, cut by hand before every layer, and before a flattening."""
    groups: list[list[nn.Module]] = []
    for module in model:
        opens = isinstance(module, nn.Linear | nn.Conv2d) and not (groups and isinstance(groups[-1][-1], nn.Flatten))
        if opens or isinstance(module, nn.Flatten):
            groups.append([])
        groups[-1].append(module)
    return [nn.Sequential(*group) for group in groups]


def made(name: str, local: Any, **options: Any) -> LocalClassifiers:
    torch.manual_seed(5)
    rule = LocalClassifiers(NETWORKS[name][0](), local=local, input_shape=NETWORKS[name][1], **options)
    for reader in rule.read.values():  # away from zero, at which no hidden weight moves
        nn.init.normal_(reader.weight, std=0.3)
    return rule


def cosines(rows: Tensor) -> Tensor:
    """S as the paper's code computes it, of flat rows or images."""
    if rows.dim() > 2 and rows.shape[1] > 3:
        rows = rows.flatten(2).std(2)
    rows = rows.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    unit = rows / (1e-8 + rows.square().sum(1, keepdim=True).sqrt())
    return (unit @ unit.T).clamp(-1, 1)


def local_loss(rule: LocalClassifiers, number: int, h: Tensor, targets: Tensor, beta: float | None = None) -> Tensor:
    """ell_l of a hidden block, by autograd throughout."""
    prediction = similar = h.new_zeros(())
    if len(rule.read):
        prediction = F.cross_entropy(list(rule.read.values())[number](h.flatten(1)), targets)
    if len(rule.project):
        one_hot = F.one_hot(targets, 4).to(h.dtype)
        similar = F.mse_loss(cosines(list(rule.project.values())[number](h)), cosines(one_hot))
    share = {"prediction": 0.0, "projection": 0.0, "similarity": 1.0, "both": 0.99}[rule.local] if beta is None else beta
    return (1 - share) * prediction + share * similar


def expected(rule: LocalClassifiers, x: Tensor, targets: Tensor) -> list[Tensor]:
    """Gradients of the model's parameters."""
    blocks, found = parts(rule.model), []
    for number, block in enumerate(blocks):
        x = block(x.detach())
        loss = local_loss(rule, number, x, targets) if number < len(blocks) - 1 else F.cross_entropy(x, targets)
        found += torch.autograd.grad(loss, list(block.parameters()))
    return found


def gradients(rule: Any, x: Tensor, targets: Tensor) -> list[Tensor]:
    rule.zero_grad()
    rule(x, targets).backward()
    return [p.grad.clone() for p in rule.model.parameters()]


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-5), (a, b)


@pytest.mark.parametrize("local", LOCALS)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_each_blocks_own_loss(name: str, local: str) -> None:
    x, targets = batch(name)
    rule, twin = made(name, local), made(name, local)
    # S(Y) has the code's 1e-8 where it multiplies one-hot rows out, and a closed form here
    close(gradients(rule, x, targets), expected(twin, x, targets), 1e-11 if local in ("prediction", "projection") else 1e-7)
    for (name_, ours), theirs in zip(rule.model.named_buffers(), twin.model.buffers(), strict=True):
        assert torch.equal(ours, theirs), name_  # statistics moved once


@pytest.mark.parametrize("local", LOCALS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_read_outs_and_projections_learn(name: str, local: str) -> None:
    x, targets = batch(name)
    rule, twin = made(name, local), made(name, local)
    gradients(rule, x, targets)
    blocks = parts(twin.model)
    for number, block in enumerate(blocks[:-1]):
        x = block(x.detach())
        for modules, others, beta in ((rule.read, twin.read, 0.0), (rule.project, twin.project, None)):
            if len(modules):
                ours = [p.grad for p in list(modules.values())[number].parameters()]
                loss = local_loss(twin, number, x.detach(), targets, beta)
                theirs = torch.autograd.grad(loss, list(list(others.values())[number].parameters()))
                close(ours, theirs, 1e-11 if beta == 0 else 1e-7)


def test_class_similarity_is_that_of_one_hot_rows() -> None:
    labels = torch.randint(5, (12,))
    torch.testing.assert_close(
        class_similarity(labels, 5, torch.double), cosines(F.one_hot(labels, 5).double()), atol=1e-7, rtol=0
    )


def test_the_similaritys_gradient_is_autograds() -> None:
    rows, wanted = torch.randn(9, 6, requires_grad=True), class_similarity(torch.arange(9) % 3, 3, torch.double)
    loss, ours = similarity(rows.detach(), wanted)
    exact = (cosines(rows) - wanted).square().mean()
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(ours, torch.autograd.grad(exact, rows)[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_silent_or_even_sample_has_no_direction(value: float) -> None:
    rows, wanted = torch.randn(5, 6), class_similarity(torch.arange(5) % 3, 3, torch.double)
    rows[2] = value
    for kind in (torch.double, torch.float32):
        loss, pulled = similarity(rows.to(kind), wanted.to(kind))
        assert loss.isfinite()
        assert pulled.isfinite().all()
        assert not pulled[2].any()
        assert float(pulled.abs().max()) < 10


@pytest.mark.parametrize("local", ["similarity", "both"])
def test_blocks_with_silent_samples_stay_finite(local: str) -> None:
    """ReLU without normalisation: the published code makes NaN here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4))
    rule, (x, targets) = LocalClassifiers(model, local=local), batch(size=20)
    with torch.no_grad():
        model[0].bias -= 1.0
    assert bool((model[:2](x) == 0).all(1).any())
    optimizer = torch.optim.Adam(rule.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        rule(x, targets).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in rule.parameters())


def test_the_tied_read_out_of_the_last_hidden_block_is_backprop() -> None:
    rule, (x, targets) = made("mlp", "prediction"), batch()
    with torch.no_grad():
        rule.read["2"].weight.copy_(rule.model[4].weight)
        rule.read["2"].bias.copy_(rule.model[4].bias)
    close(gradients(rule, x, targets)[2:], gradients(Backprop(rule.model), x, targets)[2:], 1e-14)


def test_composed_read_outs_of_a_linear_network_are_backprop() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 7), nn.Identity(), nn.Linear(7, 4))
    rule, (x, targets) = LocalClassifiers(model), batch()
    (w1, c1), (w2, c2) = ((model[i].weight.detach(), model[i].bias.detach()) for i in (2, 4))
    with torch.no_grad():
        rule.read["0"].weight.copy_(w2 @ w1)
        rule.read["0"].bias.copy_(w2 @ c1 + c2)
        rule.read["2"].weight.copy_(w2)
        rule.read["2"].bias.copy_(c2)
    close(gradients(rule, x, targets), gradients(Backprop(model), x, targets), 1e-13)


def test_a_zero_read_out_moves_no_hidden_weight() -> None:
    rule, (x, targets) = LocalClassifiers(mlp()), batch()
    *hidden, weight, bias = gradients(rule, x, targets)
    assert not any(gradient.any() for gradient in hidden)
    assert weight.any()
    assert bias.any()
    assert rule.read["0"].weight.grad.any()


def test_no_other_layer_matters() -> None:
    x, targets = batch()
    for local in LOCALS:
        rule = made("mlp", local)
        before = gradients(rule, x, targets)
        with torch.no_grad():
            rule.model[2].weight.add_(0.1)
        assert all(torch.equal(a, b) for a, b in zip(before[:2], gradients(rule, x, targets)[:2], strict=True))


def test_both_is_the_weighted_sum() -> None:
    x, targets = batch()
    found = {}
    for local in ("prediction", "similarity", "both"):
        rule = made("mlp", local, beta=0.7)
        for reader in rule.read.values():
            nn.init.constant_(reader.weight, 0.1)
            reader.weight.data[0] = 0.3
        for number, projection in enumerate(rule.project.values()):
            nn.init.normal_(projection.weight, generator=torch.Generator().manual_seed(number))
        found[local] = gradients(rule, x, targets)
    mixed = [0.3 * a + 0.7 * b for a, b in zip(found["prediction"][:4], found["similarity"][:4], strict=True)]
    close(found["both"][:4], mixed, 1e-13)


def test_one_joint_step_is_the_codes_order() -> None:
    """There each block takes its step within its forward pass, and hands on what it made before it."""
    rule, twin, (x, targets) = made("mlp", "both"), made("mlp", "both"), batch()
    optimizer = torch.optim.Adam(rule.parameters(), 1e-2, eps=1e-25)
    own = [
        torch.optim.Adam([*block.parameters(), *read.parameters(), *project.parameters()], 1e-2, eps=1e-25)
        for block, read, project in zip(parts(twin.model), twin.read.values(), twin.project.values(), strict=False)
    ]
    last = torch.optim.Adam(twin.model[4].parameters(), 1e-2, eps=1e-25)
    for _ in range(3):
        optimizer.zero_grad()
        rule(x, targets).backward()
        optimizer.step()
        h = x
        for number, (block, step) in enumerate(zip(parts(twin.model), [*own, last], strict=True)):
            h = block(h.detach())
            step.zero_grad()
            loss = local_loss(twin, number, h, targets) if step is not last else 0.01 * F.cross_entropy(h, targets)
            loss.backward()  # the code's factor 1 - beta, which Adam divides out
            step.step()
    for ours, theirs in zip(rule.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_squared_errors_are_counter_current_learning_with_free_codes() -> None:
    x, targets = batch()
    rule = LocalClassifiers(mlp(), loss=squared_error, local="projection")
    other = CounterCurrentLearning(mlp(), loss=squared_error, pair="inner", scale=0.5, feedback="free")
    for name, width in (("2", 7), ("0", 8)):
        codes = other.feedback[0 if name == "2" else 1].rows
        assert codes.shape == (4, width)
        with torch.no_grad():
            rule.read[name].weight.copy_(codes)
    ours, theirs = gradients(rule, x, targets), gradients(other, x, targets)
    factors = [256 * 0.5 / width * 2 / 4 for width in (8, 8, 7, 7)]
    close([factor * gradient for factor, gradient in zip(factors, ours, strict=False)], theirs[:4], 1e-13)
    close(ours[4:], theirs[4:], 1e-13)


def test_dropout_acts_behind_what_the_loss_sees() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 4))
    rule, (x, targets) = LocalClassifiers(model, local="projection"), batch()
    ours = gradients(rule, x, targets)[:2]
    loss = F.cross_entropy(rule.read["0"](model[:2](x)), targets)
    close(ours, torch.autograd.grad(loss, list(model[0].parameters())), 1e-13)
    assert bool(((rule(x, targets).output - model.eval()(x)).abs() > 1e-3).any())


def test_terms_of_the_loss_count_once() -> None:
    model, (x, targets) = mlp(), batch()
    weight = model[0].weight
    rule = LocalClassifiers(model, lambda o, y: F.cross_entropy(o, y) + 0.5 * weight.square().sum(), local="projection")
    plain = LocalClassifiers(mlp(), local="projection")
    plain.load_state_dict(rule.state_dict())
    close([gradients(rule, x, targets)[0] - weight.detach()], [gradients(plain, x, targets)[0]], 1e-12)


@pytest.mark.filterwarnings("error")
def test_numbers_as_targets() -> None:
    torch.manual_seed(0)
    model, (x, _) = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), batch()
    rule = LocalClassifiers(model, F.mse_loss, local="projection")
    y = torch.randn(9)
    flat, column = gradients(rule, x, y), gradients(rule, x, y.unsqueeze(1))
    loss = F.mse_loss(rule.read["0"](model[:2](x)), y.unsqueeze(1))
    close(flat[:2], torch.autograd.grad(loss, list(model[0].parameters())), 1e-13)
    close(flat, column, 0.0)


def test_frozen_parts_and_micro_batches() -> None:
    rule, (x, targets) = made("mlp", "prediction"), batch(size=8)
    rule.model[0].weight.requires_grad_(False)
    whole = {name: g for name, g in zip(dict(rule.named_parameters()), _all(rule, x, targets), strict=True) if g is not None}
    assert "model.0.weight" not in whole
    rule.zero_grad()
    for chosen in (slice(0, 4), slice(4, 8)):
        (rule(x[chosen], targets[chosen]).loss / 2).backward()
    for name, parameter in rule.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-12, atol=1e-15)


def _all(rule: LocalClassifiers, x: Tensor, targets: Tensor) -> list[Tensor | None]:
    rule.zero_grad()
    rule(x, targets).backward()
    return [None if p.grad is None else p.grad.clone() for p in rule.parameters()]


def test_half_precision_points_the_same_way() -> None:
    rule, (x, targets) = made("mlp", "both"), batch()
    exact = torch.cat([g.flatten() for g in gradients(rule, x, targets)])
    rule.to(torch.bfloat16)
    low = torch.cat([g.flatten() for g in gradients(rule, x.bfloat16(), targets)]).double()
    assert float(torch.cosine_similarity(exact, low, 0)) > 0.99


def test_pooling_leaves_at_most_so_many_numbers() -> None:
    assert window((64, 16, 16), 4096) == (2, 2)
    assert window((128, 7, 5), 1000) == (4, 2)
    assert window((10, 1, 1), 4) == (1, 1)
    rule = made("images", "prediction", pool=20)
    assert [reader.in_features for reader in rule.read.values()] == [20, 12, 5]
    x, targets = batch("images")
    h = parts(images())[0](x)
    rule.read["0"].weight.grad = None
    gradients(rule, x, targets)
    pooled = F.avg_pool2d(h, 2).flatten(1).detach()
    loss = F.cross_entropy(rule.read["0"](pooled), targets)
    close([rule.read["0"].weight.grad], torch.autograd.grad(loss, rule.read["0"].weight), 1e-12)


def test_what_is_described_of_images() -> None:
    assert described(torch.randn(5, 4, 6, 6)).shape == (5, 4)
    assert described(torch.randn(5, 3, 6, 6)).shape == (5, 108)
    assert described(torch.randn(5, 4, 1, 6)).shape == (5, 24)
    assert described(torch.randn(5, 7)).shape == (5, 7)


def test_read_outs_answer_at_every_depth() -> None:
    rule, (x, _) = made("mlp", "prediction"), batch()
    h = rule.model[:2](x)
    found = rule.read_outs(x)
    assert list(found) == ["0", "2", "4"]
    assert torch.equal(found["0"], rule.read["0"](h).argmax(1))
    assert torch.equal(found["4"], rule.model(x).argmax(1))
    assert list(made("mlp", "similarity").read_outs(x)) == ["4"]


@pytest.mark.parametrize("local", LOCALS)
def test_rows_of_a_dense_layer_are_no_images(local: Any) -> None:
    """Positions of a sequence are not channels: read-out and projection take all numbers as they come."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(40, 4))
    rule, x, targets = LocalClassifiers(model, local=local, input_shape=(5, 3), pool=10), torch.randn(9, 5, 3), batch()[1]
    for reader in rule.read.values():
        nn.init.normal_(reader.weight, std=0.3)
    ours = gradients(rule, x, targets)[:2]
    h = model[:2](x).flatten(1)
    loss = local_loss(rule, 0, h, targets)
    close(ours, torch.autograd.grad(loss, list(model[0].parameters())), 1e-7)


def test_accuracy_at_each_depth_is_of_one_class_per_sample() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    rule, x, labels = LocalClassifiers(model, input_shape=(1, 4, 4)), torch.randn(4, 1, 4, 4), torch.randint(4, (4, 4, 4))
    rule(x, labels).backward()  # a class per pixel
    assert rule.measures((x, labels), [(x, labels)]).depths == {}


@pytest.mark.parametrize("local", LOCALS)
def test_on_models_of_ones_own(local: str) -> None:
    for name in ("mlp", "images"):
        check_model(made(name, local), *batch(name), skip=("compiled",))


@pytest.mark.parametrize("local", ["prediction", "projection"])
def test_activities_of_one_block_are_held_at_a_time(local: Any) -> None:
    """At depth 10 less than half of backpropagation's activities, beside the gradients."""
    torch.set_default_dtype(torch.float32)
    layers = [part for _ in range(10) for part in (nn.Linear(32, 32), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    x, targets = torch.randn(1000, 32), torch.randint(10, (1000,))
    held = []
    for rule, made_in_call in ((Backprop(model), False), (LocalClassifiers(model, local=local), True)):
        rule(x, targets)  # whose first batch is looked at
        own = [*rule.parameters(), x, targets]
        gradient = sum(p.numel() * 4 for p in rule.parameters()) if made_in_call else 0
        held.append(peak_bytes(lambda rule=rule: rule(x, targets), own) - gradient)
    assert held[1] < 0.5 * held[0]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="local"):
        LocalClassifiers(mlp(), local="predict")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="beta"):
        LocalClassifiers(mlp(), local="both", beta=1.0)
    with pytest.raises(ConfigError, match="label_smoothing"):
        LocalClassifiers(mlp(), nn.CrossEntropyLoss(label_smoothing=0.1), local="both")
    with pytest.raises(ConfigError, match="1 output"):
        LocalClassifiers(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), F.mse_loss, local="similarity")
    with pytest.raises(ConfigError, match="one label per sample"):
        LocalClassifiers(mlp(), local="similarity")(batch()[0], torch.randn(9, 4))
    with pytest.raises(ConfigError, match="empty"):
        LocalClassifiers(mlp())(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    with pytest.raises(UnsupportedModelError, match=r"layer .0. gave \(3, 8\) per sample"):
        LocalClassifiers(mlp(), token_cross_entropy)(torch.randn(8, 3, 6), torch.zeros(8, 3, dtype=torch.long))
    rule = LocalClassifiers(mlp())
    rule.model.float()
    with pytest.raises(ConfigError, match="move"):
        rule(*batch())
    for width in (1, 2):  # of which centred rows are zero, or +-1: no signal could turn them
        with pytest.raises(UnsupportedModelError, match=f"'0' returns {width} number"):
            LocalClassifiers(nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 4)), local="both")
        assert not similarity(torch.randn(5, width), torch.eye(5))[1].abs().gt(1e-6).any()
    with pytest.raises(UnsupportedModelError, match="'first'"):
        LocalClassifiers(Skip())


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(x + self.first(x))
        return result


@pytest.mark.parametrize("local", LOCALS)
def test_multiply_adds(local: Any) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 9, bias=False), nn.ReLU(), nn.Linear(9, 4, bias=False)]
    rule, (x, targets) = LocalClassifiers(nn.Sequential(*layers), local=local), batch(size=8)
    rule(x, targets)  # whose first batch is looked at
    weights, outputs, width, squares = 48 + 72 + 36, 4, 8 + 9, 64 + 81
    expected = 2 * weights
    expected += 3 * outputs * width if local != "similarity" else 0
    expected += 3 * squares + 2 * 8 * width if local in ("similarity", "both") else 0
    assert multiply_adds(lambda: rule(x, targets).backward()) == 8 * expected
