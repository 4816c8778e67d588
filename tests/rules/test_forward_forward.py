"""Forward-forward against its losses, differentiated layer by layer as the equations stand (float64)."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical import ForwardForward
from apical.diagnostics.cost import multiply_adds
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.forward_forward import difference, drawn_wrong, normalised, threshold, write_label
from apical.testing import check_model

K = 4


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    hidden = [part for a, b in ((9, 8), (8, 7), (7, 6)) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(6, K))


def images() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 6), nn.Tanh(), nn.Linear(6, K)),
    )


NETWORKS = {"mlp": (mlp, (9,)), "images": (images, (2, 6, 6))}


def batch(name: str = "mlp", size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, *NETWORKS[name][1], generator=generator), torch.arange(size) % K


def parts(model: nn.Sequential) -> list[nn.Sequential]:
    groups: list[list[nn.Module]] = []
    for module in model:
        opens = isinstance(module, nn.Linear | nn.Conv2d) and not (groups and isinstance(groups[-1][-1], nn.Flatten))
        if opens or isinstance(module, nn.Flatten):
            groups.append([])
        groups[-1].append(module)
    return [nn.Sequential(*group) for group in groups]


def n(z: Tensor) -> Tensor:
    flat = z.flatten(1)
    return (flat / (flat.square().mean(1, keepdim=True).sqrt() + 1e-8)).view_as(z)


def put(x: Tensor, labels: Tensor | None) -> Tensor:
    flat = x.clone().flatten(1)
    flat[:, :K] = 1 / K if labels is None else F.one_hot(labels, K).to(x.dtype)
    return flat.view_as(x)


def reference(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    wrong: Sequence[Tensor],
    objective: str = "threshold",
    mean: bool = False,
    thresholds: tuple[float, float] | None = None,
) -> list[Tensor]:
    """Gradients of the hidden parameters, for these wrong labels of each sample."""
    found: list[Tensor] = []
    positive, negative = n(put(x, y)), [n(put(x, labels)) for labels in wrong]
    for block in parts(model)[:-1]:
        h, others = block(positive.detach()), [block(each.detach()) for each in negative]

        def g(h: Tensor) -> Tensor:
            return h.flatten(1).square().mean(1) if mean else h.flatten(1).square().sum(1)

        high, low = thresholds or (1.0 if mean else float(h[0].numel()),) * 2
        if objective == "difference":
            loss = torch.stack([-F.logsigmoid(4 * (g(h) - g(each))) for each in others]).mean()
        else:
            up = F.binary_cross_entropy_with_logits(g(h) - high, torch.ones(len(x)))
            down = torch.stack(
                [F.binary_cross_entropy_with_logits(g(each) - low, torch.zeros(len(x))) for each in others]
            ).mean()
            loss = (up + down) / 2
        found += torch.autograd.grad(loss, list(block.parameters()))
        positive, negative = n(h), [n(each) for each in others]
    return found


def gradients(rule: ForwardForward, x: Tensor, targets: Tensor) -> list[Tensor]:
    rule.zero_grad()
    rule(x, targets).backward()
    return [p.grad.clone() for p in rule.model.parameters() if p.grad is not None]


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-5), (a, b)


def all_wrong(y: Tensor) -> list[Tensor]:
    return [(y + away) % K for away in range(1, K)]


@pytest.mark.parametrize(("objective", "mean"), [("threshold", False), ("threshold", True), ("difference", True)])
@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_gradients_with_all_wrong_labels(name: str, objective: Any, mean: bool) -> None:
    model, (x, y) = NETWORKS[name][0](), batch(name)
    rule = ForwardForward(
        model, negatives="all", objective=objective, goodness="mean" if mean else "sum", input_shape=NETWORKS[name][1]
    )
    expected = reference(model, x, y, all_wrong(y), objective, mean)
    close(gradients(rule, x, y)[:-2], expected, 1e-11)


@pytest.mark.parametrize("theta", [2.5, (1.5, 4.0)])
def test_thresholds_are_one_for_both_kinds_or_one_for_each(theta: float | tuple[float, float]) -> None:
    model, (x, y) = mlp(), batch()
    high, low = theta if isinstance(theta, tuple) else (theta, theta)
    rule = ForwardForward(model, negatives="all", theta=theta)
    close(gradients(rule, x, y)[:-2], reference(model, x, y, all_wrong(y), thresholds=(high, low)), 1e-11)


def test_random_wrong_labels_are_wrong_and_average_to_all() -> None:
    model, (x, y) = mlp(), batch(size=2)
    rule, every = ForwardForward(model), ForwardForward(model, negatives="all")
    candidates = {(a, b): reference(model, x, y, [(y + torch.tensor([a, b])) % K]) for a in range(1, K) for b in range(1, K)}
    seen = set()
    for _ in range(60):
        ours = gradients(rule, x, y)[:-2]
        fits = [
            drawn for drawn, theirs in candidates.items() if all(torch.allclose(*p) for p in zip(ours, theirs, strict=True))
        ]
        assert len(fits) == 1
        seen |= set(fits)
    assert len(seen) == 9
    mean = [torch.stack(grads).mean(0) for grads in zip(*candidates.values(), strict=True)]
    close(gradients(every, x, y)[:-2], mean, 1e-11)


def test_hard_negatives_are_drawn_as_the_read_out_believes() -> None:
    scores, y = torch.randn(K, K), torch.arange(K)
    chances = scores.softmax(1)
    chances.fill_diagonal_(0)
    chances /= chances.sum(1, keepdim=True)
    count = 20_000
    drawn = drawn_wrong(scores.repeat(count, 1), y.repeat(count)).view(count, K)
    shares = F.one_hot(drawn, K).double().mean(0)
    assert (shares - chances).abs().max() < 5 * 0.5 / count**0.5  # five deviations of a share, at most
    assert torch.equal(shares.diagonal(), torch.zeros(K))


def test_a_read_out_that_is_sure_chooses_the_hard_negative() -> None:
    model, (x, y) = mlp(), batch()
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.tensor([0.0, 300.0, 200.0, 100.0]))  # label 1; where that is the true one, 2
    ours = gradients(ForwardForward(model, negatives="hard"), x, y)[:-2]
    wrong = torch.where(y == 1, 2, 1)
    close(ours, reference(model, x, y, [wrong]), 1e-11)


def test_two_classes_have_one_wrong_label() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2))
    x, y = batch()[0], torch.arange(6) % 2
    every = gradients(ForwardForward(model, negatives="all"), x, y)
    for negatives in ("random", "hard"):
        close(gradients(ForwardForward(model, negatives=negatives), x, y), every, 1e-13)  # type: ignore[arg-type]


def test_a_straight_through_relu_would_change_nothing() -> None:
    """Where a unit is silent its signal is zero: the published code's ReLU that passes gradients there is a ReLU."""

    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            return v.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, signal: Tensor) -> Tensor:
            return signal

    model, (x, y) = mlp(), batch()
    ours = gradients(ForwardForward(model, negatives="all"), x, y)[:2]
    z = n(torch.cat([put(x, y), *(put(x, wrong) for wrong in all_wrong(y))]))
    g = StraightThrough.apply(model[0](z)).square().sum(1) - 8
    loss = (F.softplus(-g[:6]).mean() + F.softplus(g[6:]).mean()) / 2
    close(ours, torch.autograd.grad(loss, list(model[0].parameters())), 1e-12)


def test_signals_by_goodness() -> None:
    up, down = torch.randn(5, requires_grad=True), torch.randn(15, requires_grad=True)
    for (loss, *slopes), exact in (
        (threshold(up.detach(), down.detach(), (1.0, 2.0)), (F.softplus(1 - up).mean() + F.softplus(down - 2).mean()) / 2),
        (difference(up.detach(), down.detach(), 4.0), F.softplus(-4 * (up.repeat(3) - down)).mean()),
    ):
        torch.testing.assert_close(loss, exact.detach())
        for ours, theirs in zip(slopes, torch.autograd.grad(exact, [up, down]), strict=True):
            torch.testing.assert_close(ours, theirs)
    _, *slopes = difference(torch.ones(4), torch.ones(4), 4.0)
    torch.testing.assert_close(slopes[0], torch.full((4,), -4 / 8))  # G+ = G-: -alpha/(2B) and alpha/(2B)
    torch.testing.assert_close(slopes[1], torch.full((4,), 4 / 8))


def test_the_size_of_a_layer_is_hidden_from_the_next() -> None:
    z = torch.rand(3, 2, 4)
    torch.testing.assert_close(normalised(z), normalised(7 * z), rtol=1e-6, atol=0)
    torch.testing.assert_close(normalised(z).square().mean((1, 2)), torch.ones(3), rtol=1e-6, atol=0)
    assert not normalised(torch.zeros(2, 3)).any()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalisation_in_every_precision(kind: torch.dtype) -> None:
    z = torch.tensor([[300.0, 400.0], [0.0, 0.0], [3e-4, 4e-4]], dtype=kind)  # squares of 300 are no numbers of float16
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, 0.8]]) * 2**0.5
    torch.testing.assert_close(normalised(z).double(), expected, rtol=1e-2, atol=0)


def test_an_answer_has_a_derivative_where_a_sample_is_silent() -> None:
    model, (x, _) = nn.Sequential(nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, K)), batch()
    with torch.no_grad():
        model[0].bias -= 1000
    for options in ({}, {"answers": "goodness"}, {"negatives": "images"}):
        given = torch.cat([x, torch.zeros(1, 9)]).requires_grad_()
        ForwardForward(model, **options).answer(given).sum().backward()
        assert given.grad.isfinite().all()


def test_no_later_layer_matters() -> None:
    (x, y), model = batch(), mlp()
    rule = ForwardForward(model, negatives="all")
    before = gradients(rule, x, y)
    with torch.no_grad():
        model[2].weight.add_(0.1)
    assert all(torch.equal(a, b) for a, b in zip(before[:2], gradients(rule, x, y)[:2], strict=True))


def test_the_read_out_is_one_of_all_hidden_layers_but_the_first() -> None:
    model, (x, y) = mlp(), batch()
    rule = ForwardForward(model, negatives="all")
    assert list(rule.read) == ["2"]
    assert not rule.read["2"].weight.any()
    nn.init.normal_(rule.read["2"].weight)
    z = n(put(x, None))
    features = []
    for block in parts(model)[:-1]:
        z = n(block(z)).detach()
        features.append(z)
    joined = nn.functional.linear(
        torch.cat(features[1:], 1), torch.cat([rule.read["2"].weight, model[6].weight], 1), model[6].bias
    )
    torch.testing.assert_close(rule.answer(x), joined)
    credit = rule(x, y)
    torch.testing.assert_close(credit.output, joined)
    torch.testing.assert_close(credit.loss, F.cross_entropy(joined, y))
    rule.zero_grad()
    credit.backward()
    expected = torch.autograd.grad(F.cross_entropy(joined, y), [rule.read["2"].weight, *model[6].parameters()])
    close([rule.read["2"].weight.grad, *(p.grad for p in model[6].parameters())], expected, 1e-12)


def test_read_outs_add_up_behind_pooling() -> None:
    layers = [part for a, b in ((2, 5), (5, 6), (6, 4)) for part in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    model, (x, y) = nn.Sequential(*layers, nn.Conv2d(4, K, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), batch("images")
    rule = ForwardForward(model, negatives="all", input_shape=(2, 6, 6))
    nn.init.normal_(rule.read["2"].weight)
    z, features = n(put(x, None)), []
    for number in (0, 2, 4):
        z = n(model[number : number + 2](z)).detach()
        features.append(z)
    expected = model[6:](z) + F.linear(features[1].flatten(1), rule.read["2"].weight)
    torch.testing.assert_close(rule.answer(x), expected)
    torch.testing.assert_close(rule(x, y).output, expected)


def test_answers_by_goodness_try_every_label() -> None:
    model, (x, y) = mlp(), batch()
    rule = ForwardForward(model, negatives="all", answers="goodness")
    scores = []
    by_layer = []
    for label in range(K):
        z, found = n(put(x, torch.full((6,), label))), []
        for block in parts(model)[:-1]:
            h = block(z)
            found.append(h.square().mean(1))
            z = n(h)
        scores.append(found[1] + found[2])
        by_layer.append(found)
    torch.testing.assert_close(rule.answer(x), torch.stack(scores, 1))
    torch.testing.assert_close(rule(x, y).loss.detach(), F.cross_entropy(torch.stack(scores, 1), y).detach())
    for number, name in enumerate(("0", "2", "4")):
        expected = torch.stack([found[number] for found in by_layer], 1).argmax(1)
        assert torch.equal(rule.read_outs(x)[name], expected)
    other = ForwardForward(model, negatives="all")
    close(gradients(rule, x, y), gradients(other, x, y), 0.0)  # the same is learned


def test_a_convolutional_label_may_be_written_elsewhere() -> None:
    model, (x, y) = images(), batch("images")

    def write(x: Tensor, code: Tensor) -> Tensor:
        return x + code.to(x.dtype).mean(1).view(-1, 1, 1, 1) + code.to(x.dtype)[:, :2].view(-1, 2, 1, 1)

    ours = gradients(ForwardForward(model, negatives="all", write=write, input_shape=(2, 6, 6)), x, y)
    corner = gradients(ForwardForward(model, negatives="all", input_shape=(2, 6, 6)), x, y)
    assert not torch.allclose(ours[0], corner[0])
    assert torch.equal(write_label(x, F.one_hot(y, K)).flatten(1)[:, K:], x.flatten(1)[:, K:])


@pytest.mark.parametrize("name", NETWORKS)
def test_self_contrastive_gradients(name: str) -> None:
    """The first layer is given two images at once: its weight applied to a long input whose halves share it."""
    model, (x, y) = NETWORKS[name][0](), batch(name)
    rule = ForwardForward(model, negatives="images", input_shape=NETWORKS[name][1])
    torch.manual_seed(7)
    ours = gradients(rule, x, y)[:-2]
    torch.manual_seed(7)
    offset = int(torch.randint(1, len(x), ()))
    found: list[Tensor] = []
    a, b = n(x), n(x).roll(-offset, 0)
    first, *others = parts(model)[:-1]
    for number, block in enumerate([first, *others]):
        if number == 0:
            layer, rest = block[0], block[1:]
            positive, negative = rest(2 * layer(a)), rest(layer(a) + layer(b))
        else:
            positive, negative = block(n(positive).detach()), block(n(negative).detach())
        up, down = (h.flatten(1).square().mean(1) for h in (positive, negative))
        theta = (4.0, 6.0) if number == 0 else (1.0, 1.0)
        loss = (F.softplus(theta[0] - up).mean() + F.softplus(down - theta[1]).mean()) / 2
        found += torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
    close(ours, found, 1e-11)
    z = n(first[1:](2 * first[0](n(x))))
    for block in others[:-1]:
        z = n(block(z))
    torch.testing.assert_close(rule.answer(x), parts(model)[-1](n(others[-1](z))))  # other read-outs are zero


@pytest.mark.parametrize("objective", ["threshold", "difference"])
def test_a_single_image_has_no_negative(objective: Any) -> None:
    model, (x, y) = mlp(), batch(size=1)
    rule = ForwardForward(model, negatives="images", objective=objective)
    ours = gradients(rule, x, y)[:2]
    goodness = F.relu(2 * model[0](n(x))).square().mean(1)
    loss = F.softplus(4 - goodness).mean() / 2 if objective == "threshold" else 0 * goodness.sum()
    close(ours, torch.autograd.grad(loss, list(model[0].parameters())), 1e-12)


def test_the_control_leaves_hidden_layers_alone() -> None:
    model, (x, y) = mlp(), batch()
    rule = ForwardForward(model, train_hidden=False)
    rule(x, y).backward()
    assert [p.grad is not None for p in model.parameters()] == [False] * 6 + [True] * 2
    assert rule.read["2"].weight.grad.any()
    assert rule.placement(x).path("0") == "frozen"
    rule.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_micro_batches_add_up() -> None:
    rule, (x, y) = ForwardForward(mlp(), negatives="all"), batch(size=8)
    whole = gradients(rule, x, y)
    rule.zero_grad()
    for chosen in (slice(0, 4), slice(4, 8)):
        (rule(x[chosen], y[chosen]).loss / 2).backward()
    close([p.grad for p in rule.model.parameters()], whole, 1e-12)


def test_statistics_of_the_last_block_move_once() -> None:
    for options in ({}, {"answers": "goodness"}, {"negatives": "hard"}):
        model, (x, y) = nn.Sequential(*mlp(), nn.BatchNorm1d(K)), batch()
        rule = ForwardForward(model, **options)  # type: ignore[arg-type]
        rule(x, y)
        assert int(model[-1].num_batches_tracked) == 1
        rule.eval()
        rule(x, y)
        rule.read_outs(x)
        assert int(model[-1].num_batches_tracked) == 1


def test_it_is_said_that_a_label_overwrites_numbers() -> None:
    (remark,) = ForwardForward(mlp()).remarks
    assert "first 4 numbers" in remark
    for options in ({"negatives": "images"}, {"write": lambda x, code: x}):
        (remark,) = ForwardForward(mlp(), **options).remarks
        assert "numbers" not in remark


def test_without_gradient_and_in_inference_mode() -> None:
    rule, (x, y) = ForwardForward(mlp(), negatives="all"), batch()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            credit = rule(x, y)
        torch.testing.assert_close(credit.output.clone(), rule.answer(x).detach())
        assert not credit.loss.requires_grad


@pytest.mark.parametrize("options", [{"negatives": n} for n in ("hard", "all", "images")] + [{"objective": "difference"}])
def test_on_models_of_ones_own(options: Any) -> None:
    for name in NETWORKS:
        rule = ForwardForward(NETWORKS[name][0](), input_shape=NETWORKS[name][1], **options)
        check_model(rule, *batch(name), skip=("compiled",))


def test_half_precision_points_the_same_way() -> None:
    rule, (x, y) = ForwardForward(mlp(), negatives="all"), batch()
    exact = torch.cat([g.flatten() for g in gradients(rule, x, y)])
    rule.to(torch.bfloat16)
    low = torch.cat([g.flatten() for g in gradients(rule, x.bfloat16(), y)]).double()
    assert float(torch.cosine_similarity(exact, low, 0)) > 0.99


def test_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'1' \(LayerNorm\)"):
        ForwardForward(nn.Sequential(nn.Linear(9, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, K)))
    for first in (nn.BatchNorm1d(9, affine=False), nn.Dropout(0.2)):  # would count, or mask, every pass of a batch
        with pytest.raises(UnsupportedModelError, match=r"'0' \((BatchNorm1d|Dropout)\)"):
            ForwardForward(nn.Sequential(first, nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, K)))
    with pytest.raises(UnsupportedModelError, match=r"'2' \(Dropout\)"):
        ForwardForward(nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, K)))
    with pytest.raises(UnsupportedModelError, match=r"'0'.*hidden"):
        ForwardForward(nn.Sequential(nn.Linear(9, K)))
    with pytest.raises(ConfigError, match="negatives"):
        ForwardForward(mlp(), negatives="wrong")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="answers"):
        ForwardForward(mlp(), negatives="images", answers="goodness")
    with pytest.raises(ConfigError, match="1 output"):
        ForwardForward(nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 1)))
    x, y = batch()
    rule = ForwardForward(mlp())
    with pytest.raises(ConfigError, match="empty"):
        rule(x[:0], y[:0])
    with pytest.raises(ConfigError, match="ignore_index"):
        rule(x, y - 100)
    with pytest.raises(ConfigError, match="one class label"):
        rule(x, torch.randn(6, K))
    with pytest.raises(ConfigError, match="write="):
        ForwardForward(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, K)))(x[:, :3], y)


@pytest.mark.parametrize(("negatives", "passes"), [("random", 2), ("hard", 2), ("all", K)])
def test_multiply_adds(negatives: Any, passes: int) -> None:
    """Forward pass and weight gradient of every labelled input, the neutral pass, and the read-outs."""
    torch.manual_seed(0)
    layers = [nn.Linear(9, 8, bias=False), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.ReLU(), nn.Linear(7, K, bias=False)]
    rule, (x, y) = ForwardForward(nn.Sequential(*layers), negatives=negatives), batch(size=8)
    rule(x, y)  # whose first batch is looked at
    hidden, read = 72 + 56, 28
    assert multiply_adds(lambda: rule(x, y).backward()) == 8 * ((2 * passes + 1) * hidden + 2 * read)
