"""Feedback that begins as a mirror of the weights: Kolen-Pollack and PFA."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apical
from apical.core.mirror import mirror, mirrored
from apical.errors import ConfigError, UnsupportedModelError

KP, PFA = apical.KolenPollack, apical.ProductFeedbackAlignment
RULES = {
    "kp": KP,
    "kp-closed": partial(KP, form="closed"),
    "pfa": PFA,
    "pfa-closed": partial(PFA, form="closed"),
    "pfa-o": partial(PFA, feedback="orthogonal"),
    "pfa-sparse": partial(PFA, density=0.5),
}


def degrees(a: Tensor, b: Tensor) -> float:
    cosine = float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    return math.degrees(math.acos(min(1.0, cosine)))


@pytest.mark.parametrize("per_input", [10, 40, 160])
def test_the_angle_is_that_of_the_theory(per_input: int) -> None:
    """T17: arctan sqrt((n_in + 1) / N), within a degree."""
    torch.manual_seed(0)
    w = torch.randn(80, 60)
    theory = math.degrees(math.atan(math.sqrt(61 / (60 * per_input))))
    assert abs(degrees(mirrored(w, per_input), w) - theory) < 1


def test_the_mean_is_the_weight() -> None:
    """T17: E[B_0] = W, within four standard errors of 4000 independent copies."""
    torch.manual_seed(0)
    w = torch.randn(3, 4, dtype=torch.float64)
    copies = torch.stack([mirrored(w, 2) for _ in range(4000)])
    assert bool(((copies.mean(0) - w).abs() < 4 * copies.std(0) / math.sqrt(4000)).all())


def test_chunks_are_a_running_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(3, 4, dtype=torch.float64)
    monkeypatch.setattr("apical.core.mirror.CHUNK", 4 * 9)
    copied = mirrored(w, 7, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (9, 9, 9, 1)]
    assert torch.allclose(copied, mirror(w, torch.cat(noise)), rtol=0, atol=1e-14)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(150, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    )


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_every_layer_begins_near_its_weight(make: Any) -> None:
    """PFA's product B R is then near M W; convolutions too. The first step of AdamW takes the closed form."""
    rule = make(model(), initial="mirror")
    assert any("driven alone by 40 noise vectors" in remark for remark in rule.remarks)
    path = {name: value.clone() for name, value in rule.feedback_weights().items()}
    sparse = getattr(rule, "density", 1.0) < 1
    for name, layer in rule.layers.items():
        target = layer.weight.detach()
        if isinstance(rule, PFA) and rule.form != "closed" and not sparse:
            b = rule.expansion.get_buffer(name)
            rows = target.movedim(1, 0) if isinstance(layer, nn.ConvTranspose2d) else target
            mixed = (b @ b.T @ rows.flatten(1)).view_as(rows)
            target = mixed.movedim(0, 1) if isinstance(layer, nn.ConvTranspose2d) else mixed
        elif isinstance(rule, PFA):
            continue
        assert degrees(path[name], target) < 12, name
    optimizer = torch.optim.AdamW(rule.parameters(), lr=1e-3)
    rule(torch.randn(4, 1, 8, 8), torch.arange(4) % 3).backward()
    optimizer.step()
    assert all((rule.mismatch_of(name) is None) == sparse for name in rule.layers)
    found = rule.feedback_weights()
    assert all(degrees(found[name], path[name]) < 3 for name in rule.layers)


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_seeds_and_the_default(make: Any) -> None:
    def state(**options: Any) -> dict[str, Tensor]:
        built = model()
        torch.manual_seed(1)
        result: dict[str, Tensor] = make(built, **options).state_dict()
        return result

    for options in ({"initial": "mirror"}, {}):
        first, second = state(**options), state(**options)
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    plain, random = state(), state(initial="random", mirror=7)
    assert all(torch.equal(value, random[name]) for name, value in plain.items())


def test_weights_that_are_loaded_later_can_be_mirrored_anew() -> None:
    for make in (KP, partial(KP, form="closed"), partial(PFA, feedback="orthogonal")):
        rule: Any = make(model(), initial="mirror")
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
        for step in range(4):
            if step == 2:
                with torch.no_grad():
                    for layer in rule.layers.values():
                        layer.weight.normal_()
                rule.mirror(40)
            optimizer.zero_grad()
            rule(torch.randn(4, 1, 8, 8), torch.arange(4) % 3).backward()
            optimizer.step()
        assert all(degrees(rule.feedback_weights()[name], layer.weight) < 12 for name, layer in rule.layers.items())


class Skipping(nn.Linear):
    """With a way beside its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., :3].relu()


@pytest.mark.parametrize("make", [KP, PFA])
def test_what_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="unknown initial 'mirrored'; did you mean 'mirror'"):
        make(model(), initial="mirrored")
    with pytest.raises(ConfigError, match=r"mirror .* must be a whole number"):
        make(model(), initial="mirror", mirror=0)
    with pytest.raises(UnsupportedModelError, match=r"layer '1'.*affine map"):
        make(nn.Sequential(nn.Linear(3, 4), Skipping(4, 3)), initial="mirror")
