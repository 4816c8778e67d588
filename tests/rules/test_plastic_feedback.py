"""Kolen-Pollack and PFA in the default form against the papers' equations, in anyone's training loop.

The reference keeps B and R as parameters, sends the errors with explicit matrices, and hands gradients to the very optimiser
that the rule is given; whatever a loop does to gradients or weights is done to both.
"""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrize, prune

import apical
from apical.errors import ConfigError

KP, PFA = apical.KolenPollack, apical.ProductFeedbackAlignment
RULES = {"kp": KP, "pfa": partial(PFA, expansion=3), "pfa-o": partial(PFA, feedback="orthogonal")}
each_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)
per_class = pytest.mark.parametrize("make", [RULES["kp"], RULES["pfa"]], ids=["kp", "pfa"])
"""For what takes seconds: "pfa-o" is the class of "pfa" with other numbers in B."""


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def build(make: Callable[..., Any], **options: Any) -> Any:
    model = net()
    torch.manual_seed(1)
    return make(model, **options)


class Literal(nn.Module):
    """The papers' equations for :func:`net`: `r = B^T delta`, error `R^T r`, `dW = delta h^T`, `dR = r h^T` (KP: B = 1)."""

    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        rule = build(make, form="explicit")
        self.model, self.layers = rule.model, rule.layers
        pfa = isinstance(rule, PFA)
        names = ("2", "4")
        self.b = {n: rule.expansion.get_buffer(n).clone() if pfa else torch.eye(len(rule.layers[n].weight)) for n in names}
        self.r = nn.ParameterDict({n: rule.plastic_of(n).detach().clone() for n in names})
        rule.detach()

    def plastic_of(self, name: str) -> nn.Parameter:
        return self.r[name]

    def feedback_weights(self) -> dict[str, Tensor]:
        return {name: self.b[name] @ r.detach() for name, r in self.r.items()}

    @torch.no_grad()
    def learn(self, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        """Add gradients of `scale` times the loss."""
        first, second, third = self.model[0], self.model[2], self.model[4]
        h1 = torch.tanh(first(x))
        h2 = torch.tanh(second(h1))
        delta3 = scale * (torch.softmax(third(h2), dim=1) - F.one_hot(y, 4)) / len(x)
        r3 = delta3 @ self.b["4"]
        delta2 = (r3 @ self.r["4"]) * (1 - h2**2)
        r2 = delta2 @ self.b["2"]
        delta1 = (r2 @ self.r["2"]) * (1 - h1**2)
        for layer, delta, h in ((first, delta1, x), (second, delta2, h1), (third, delta3, h2)):
            add(layer.weight, delta.T @ h)
            add(layer.bias, delta.sum(0))
        add(self.r["4"], r3.T @ h2)
        add(self.r["2"], r2.T @ h1)


def add(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.requires_grad:
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient


def learn(rule: Any, step: int, scale: float = 1.0) -> None:
    if isinstance(rule, Literal):
        rule.learn(*batch(step), scale)
    elif scale == 1.0:
        rule(*batch(step)).backward()
    else:
        (rule(*batch(step)).loss * scale).backward()


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
STEPS = 40
LATE = 100
"""Steps that take in the look at whole weights of every 64th step."""
LONG = 300
"""Steps over which rounding must not add up either."""

Loop = Callable[[Any], None]
"""Trains a rule, or the reference, in place."""


def loop(
    optimiser: Callable[..., Any] = SGD,
    gradients: Callable[[Any, int], None] | None = None,
    weights: Callable[[Any, int], None] | None = None,
    parameters: Callable[[Any], Any] = lambda rule: rule.parameters(),
    steps: int = STEPS,
) -> Loop:
    def run(rule: Any) -> None:
        optimizer = optimiser(parameters(rule))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            optimizer.zero_grad()
            learn(rule, step)
            if gradients is not None:
                gradients(rule, step)
            optimizer.step()
            schedule.step()
            if weights is not None:
                weights(rule, step)

    return run


def agree(make: Callable[..., Any], run: Loop, tolerance: float = 1e-10, **options: Any) -> Any:
    """Train the default form and the reference alike; the rule."""
    rule, literal = build(make, **options), Literal(make)
    run(rule)
    run(literal)
    for (name, a), b in zip(rule.model.named_parameters(), literal.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(b.detach().abs().max()))), name
    found = rule.feedback_weights()
    for name, value in literal.feedback_weights().items():
        assert torch.allclose(found[name], value, rtol=0, atol=tolerance * max(1.0, float(value.abs().max()))), name
    return rule


def closed(rule: Any) -> list[str]:
    return [name for name in rule.layers if rule.mismatch_of(name) is not None]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0, "weight_decay": 0.05},
    "momentum": {},
    "nesterov": {"nesterov": True},
    "dampening": {"dampening": 0.5},
    "maximize": {"maximize": True, "lr": 0.003},
    "no decay": {"weight_decay": 0.0},
    "one by one": {"foreach": False},
    "fused": {"fused": True},
    "tensor rate": {"lr": torch.tensor(0.05)},
}


@each_rule
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_sgd_takes_the_closed_form_and_is_exact(make: Any, options: dict[str, Any]) -> None:
    steps = STEPS if options else LONG
    rule = agree(make, loop(lambda parameters: SGD(parameters, **copy.deepcopy(options)), steps=steps))
    assert closed(rule) == ["2", "4"]
    assert rule.remarks == []
    assert all(rule.plastic_of(name).numel() == 0 for name in rule.layers)


def freeze(rule: Any, step: int) -> None:
    if step == 13:
        rule.model[2].weight.requires_grad_(False)
    if step == 26:
        rule.model[2].weight.requires_grad_(True)


def eventful(rule: Any, step: int) -> None:
    """What may happen to weights in a long training, one thing after another."""
    if step in (50, 80):
        rule.model[2].weight.requires_grad_(step == 80)
    if step == 110:
        other_weights(rule)
    if step == 160 or step >= 280:
        with torch.no_grad():
            rule.model[4].weight.mul_(torch.rand(4, 7, generator=torch.Generator().manual_seed(2)) < 0.5)


def clipped(rule: Any, step: int) -> None:
    """By tensor, by value, and by the norm of all, after another."""
    if step < 100:
        per_tensor(rule, step)
    elif step < 200:
        clip_grad_value_(rule.parameters(), 0.01)
    else:
        clip_grad_norm_(rule.parameters(), 0.05)


@per_class
@pytest.mark.parametrize("gradients", [None, clipped], ids=["", "clipped"])
def test_a_long_training_with_everything_that_may_happen(make: Any, gradients: Any) -> None:
    rule = agree(make, loop(weights=eventful, gradients=gradients, steps=LONG))
    assert any(("frozen" if gradients is None else "explicit") in remark for remark in rule.remarks), rule.remarks


def frozen_before(rule: Any) -> None:
    rule.model[2].requires_grad_(False)
    loop(parameters=lambda rule: [p for p in rule.parameters() if p.requires_grad])(rule)


@each_rule
def test_a_frozen_layer_keeps_its_own_feedback(make: Any) -> None:
    """Case c1: W stands still, and B or R learns on."""
    rule = agree(make, frozen_before)
    assert closed(rule) == ["4"]
    assert [remark for remark in rule.remarks if "'2'" in remark and "frozen" in remark]


@each_rule
def test_a_layer_frozen_for_a_while(make: Any) -> None:
    rule = agree(make, loop(weights=freeze))
    assert closed(rule) == ["4"]
    assert "frozen" in rule.remarks[0]


def other_weights(rule: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    state = {name: 0.7 * torch.randn(value.shape, generator=generator) for name, value in rule.model.state_dict().items()}
    rule.model.load_state_dict(state)


def loaded(when: int) -> Loop:
    def weights(rule: Any, step: int) -> None:
        if step == when:
            other_weights(rule)

    def run(rule: Any) -> None:
        weights(rule, -1)
        if when == -1:
            before = {name: value.clone() for name, value in rule.feedback_weights().items()}
            other_weights(rule)
            assert all(torch.equal(value, before[name]) for name, value in rule.feedback_weights().items())
        loop(weights=weights)(rule)

    return run


def pruned(through_data: bool, *when: int) -> Loop:
    def weights(rule: Any, step: int) -> None:
        if not when or step in when:
            mask = torch.rand(7, 8, generator=torch.Generator().manual_seed(2)) < 0.5
            weight = rule.model[2].weight
            if through_data:
                weight.data.mul_(mask)
            else:
                with torch.no_grad():
                    weight.mul_(mask)

    return loop(weights=weights, steps=LATE if max(when, default=0) > STEPS else STEPS)


def one_element(rule: Any, step: int) -> None:
    if step in (0, 1, 50):
        rule.model[4].weight.data[1, 1] += 0.5


def max_norm(rule: Any, step: int) -> None:
    for layer in (rule.model[2], rule.model[4]):
        with torch.no_grad():
            layer.weight.copy_(torch.renorm(layer.weight, 2, 0, 0.8))


def swapped(rule: Any, step: int) -> None:
    """An average of the weights is put in for an evaluation, and taken out again."""
    if step % 25 == 10:
        kept = copy.deepcopy(rule.model.state_dict())
        rule.model.load_state_dict({name: 0.5 * value for name, value in kept.items()})
        rule.model.load_state_dict(kept)


MOVES = {
    "loaded before the first step": loaded(-1),
    "loaded in mid-training": loaded(15),
    "pruned at every step": pruned(False),
    "pruned once": pruned(False, 15),
    "pruned through .data at every step": pruned(True),
    "pruned through .data twice": pruned(True, 3, 71),
    "one element through .data": loop(weights=one_element, steps=LATE),
    "max-norm": loop(weights=max_norm),
    "averages swapped in and out": loop(weights=swapped),
}


@each_rule
@pytest.mark.parametrize("run", MOVES.values(), ids=MOVES)
def test_weights_that_move_from_outside_leave_the_feedback_where_it_is(make: Any, run: Loop) -> None:
    """Case c2: only the optimiser's steps are shared."""
    assert closed(agree(make, run)) == ["2", "4"]


def per_tensor(rule: Any, step: int) -> None:
    for parameter in rule.parameters():
        clip_grad_norm_([parameter], 0.01)


def trainable(rule: Any) -> list[nn.Parameter]:
    return [parameter for parameter in rule.parameters() if parameter.grad is not None]


def by_hand(rule: Any, step: int) -> None:
    for parameter in trainable(rule):
        parameter.grad.data.clamp_(-0.002, 0.002)


def replaced(rule: Any, step: int) -> None:
    for parameter in trainable(rule):
        parameter.grad = 0.5 * parameter.grad.sign() * parameter.grad.abs().sqrt()


CLIPS: dict[str, Callable[[Any, int], None]] = {
    "norm over rule": lambda rule, step: clip_grad_norm_(rule.parameters(), 0.05),
    "norm over model": lambda rule, step: clip_grad_norm_(rule.model.parameters(), 0.05),
    "norm that never acts": lambda rule, step: clip_grad_norm_(rule.parameters(), 1e9),
    "per tensor": per_tensor,
    "value": lambda rule, step: clip_grad_value_(rule.parameters(), 0.002),
    "through .data": by_hand,
    "replaced": replaced,
}


@each_rule
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clipping_keeps_the_feedback_explicit_and_says_so(make: Any, clip: Callable[[Any, int], None]) -> None:
    """Case c3."""
    rule = agree(make, loop(gradients=clip))
    assert closed(rule) == []
    assert "gradients were changed" in rule.remarks[0]


@each_rule
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("form", ["auto", "closed"])
def test_clipping_that_begins_late_is_refused_before_anything_moves(make: Any, clip: Any, form: str) -> None:
    rule = build(make, form=form)
    before: list[Tensor] = []

    def late(rule: Any, step: int) -> None:
        if step >= 20:
            before[:] = [parameter.detach().clone() for parameter in rule.model.parameters()]
            clip(rule, step)

    with pytest.raises(ConfigError, match=r"layer '2'.*form=\"explicit\""):
        loop(gradients=late, steps=60)(rule)
    if clip is not by_hand:  # which is looked for at first and now and then
        assert all(torch.equal(a, b) for a, b in zip(before, rule.model.parameters(), strict=True))


def split(**other: Any) -> Callable[[Any], Any]:
    def groups(rule: Any) -> Any:
        mine = [rule.plastic_of(name) for name in ("2", "4")]
        rest = [p for p in rule.parameters() if all(p is not m for m in mine)]
        return [{"params": rest}, {"params": mine, **other}]

    return groups


def no_decay_for_biases(rule: Any) -> Any:
    every = list(rule.parameters())
    return [
        {"params": [p for p in every if p.dim() == 1 and p.numel()], "weight_decay": 0.0},
        {"params": [p for p in every if p.dim() != 1 or not p.numel()]},
    ]


@each_rule
def test_parameter_groups(make: Any) -> None:
    assert closed(agree(make, loop(parameters=no_decay_for_biases))) == ["2", "4"]
    assert closed(agree(make, loop(parameters=split()))) == ["2", "4"]
    rule = agree(make, loop(parameters=split(lr=0.01)))
    assert closed(rule) == []
    assert "different options" in rule.remarks[0]


@each_rule
def test_options_that_come_apart_in_mid_training(make: Any) -> None:
    def run(rule: Any) -> None:
        optimizer = SGD(split()(rule))
        for step in range(STEPS):
            if step == STEPS // 2:
                optimizer.param_groups[1]["weight_decay"] = 0.1
            optimizer.zero_grad()
            learn(rule, step)
            optimizer.step()

    rule = agree(make, run)
    assert closed(rule) == []
    assert "different options" in rule.remarks[0]


OTHERS = {
    "adam": (partial(torch.optim.Adam, lr=0.01), "weight decay of Adam enters its moments"),
    "rmsprop": (partial(torch.optim.RMSprop, lr=0.001), "weight decay of RMSprop enters its moments"),
    "own": (
        partial(type("Own", (torch.optim.SGD,), {}), lr=0.05, momentum=0.9),
        "not known to be a decay plus a function of each",
    ),
}


@each_rule
@pytest.mark.parametrize("name", OTHERS)
def test_other_optimisers_move_the_explicit_feedback(make: Any, name: str) -> None:
    steps = 30 if name == "rmsprop" else STEPS  # where a gradient is next to zero it magnifies rounding without bound
    optimiser, reason = OTHERS[name]
    rule = agree(make, loop(partial(optimiser, weight_decay=0.01), steps=steps), tolerance=1e-8)
    assert closed(rule) == []
    assert reason in rule.remarks[0]


@each_rule
def test_an_optimiser_that_is_linear_without_memory_takes_the_closed_form(make: Any) -> None:
    """Its rate falls by a law of its own, which is found by trying it on single numbers."""
    assert closed(agree(make, loop(partial(torch.optim.ASGD, lr=0.05, weight_decay=0.01)))) == ["2", "4"]


def closures(optimiser: Callable[..., Any], steps: int) -> Loop:
    def run(rule: Any) -> None:
        optimizer = optimiser(rule.parameters())
        for step in range(steps):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                learn(rule, step)
                return F.cross_entropy(rule.model(batch(step)[0]), batch(step)[1])

            optimizer.step(closure)

    return run


@each_rule
def test_closures(make: Any) -> None:
    """Lightning's automatic optimisation, and optimisers that ask for the loss again."""
    assert closed(agree(make, closures(SGD, STEPS))) == ["2", "4"]
    assert closed(agree(make, closures(partial(torch.optim.LBFGS, lr=0.1, max_iter=3), 10))) == []


@each_rule
def test_accumulation_and_scaled_losses(make: Any) -> None:
    def run(rule: Any) -> None:
        optimizer = SGD(rule.parameters())
        for step in range(STEPS):
            learn(rule, step, scale=0.25)
            if step % 4 == 3:
                optimizer.step()
                optimizer.zero_grad(set_to_none=step < STEPS // 2)

    assert closed(agree(make, run)) == ["2", "4"]


@each_rule
def test_a_gradient_scaler(make: Any) -> None:
    def run(rule: Any) -> None:
        optimizer = SGD(rule.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10)
        for step in range(30):
            optimizer.zero_grad()
            learn(rule, step, scale=float(scaler.scale(torch.ones(()))))
            if step == 15:
                rule.model[2].weight.grad[0, 0] = torch.inf  # this step is skipped
            scaler.step(optimizer)
            scaler.update()

    rule = agree(make, run)
    assert closed(rule) == ["2", "4"]


@each_rule
def test_another_optimiser_in_mid_training(make: Any) -> None:
    """SGD with new momentum stays closed; Adam goes back to explicit feedback."""

    def run(rule: Any) -> None:
        loop(steps=100)(rule)
        loop(steps=50)(rule)
        optimizer = torch.optim.Adam(rule.parameters(), lr=1e-3, weight_decay=0.01)
        for step in range(50):
            optimizer.zero_grad()
            learn(rule, step)
            optimizer.step()

    # the part of R that B does not see is gone with the closed form; Adam's moments, with decay in them, would see it
    rule = agree(make, run, tolerance=0.05 if make is RULES["pfa"] else 1e-8)
    assert closed(rule) == []
    assert "weight decay of Adam" in rule.remarks[0]


@each_rule
def test_backpropagation_between_steps_is_no_step_of_the_feedback(make: Any) -> None:
    """The model alone is trained for a while, with the same optimiser: the feedback has no gradient and stands still."""

    def run(rule: Any) -> None:
        optimizer = SGD(rule.parameters())
        for step in range(50):
            optimizer.zero_grad()
            if 20 <= step < 25:
                F.cross_entropy(rule.model(batch(step)[0]), batch(step)[1]).backward()
            else:
                learn(rule, step)
            optimizer.step()

    rule = agree(make, run)
    assert "not this rule's" in rule.remarks[0]


@each_rule
def test_evaluations_change_nothing(make: Any) -> None:
    """A layer that is frozen for an evaluation is not taken out of the closed form, with tensors of that mode."""

    def weights(rule: Any, step: int) -> None:
        if isinstance(rule, Literal) or step % 10:
            return
        rule.model[2].weight.requires_grad_(False)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert not rule(*batch(step)).loss.requires_grad
        rule.model[2].weight.requires_grad_(True)

    assert closed(agree(make, loop(weights=weights, steps=30))) == ["2", "4"]


@each_rule
def test_a_penalty_on_the_weights_is_not_shared(make: Any) -> None:
    model = net()

    def penalised(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets) + 1e-3 * model[2].weight.pow(2).sum()

    rule = make(model, penalised)
    optimizer = SGD(rule.parameters())
    for step in range(3):
        optimizer.zero_grad()
        rule(*batch(step)).backward()
        optimizer.step()
    assert closed(rule) == ["4"]
    assert "penalty" in rule.remarks[0]


@each_rule
def test_set_feedback_in_every_phase(make: Any) -> None:
    def run(rule: Any) -> None:
        optimizer = SGD(rule.parameters())
        for step in range(50):
            if step in (0, 20):
                torch.manual_seed(step)
                r = torch.randn(len(literal.b["4"].T), 7)
                if isinstance(rule, Literal):
                    rule.r["4"].data.copy_(r)
                else:
                    rule.set_feedback("4", **{"B" if isinstance(rule, KP) else "R": r})
                    assert torch.allclose(rule.feedback_weight("4"), literal.b["4"] @ r, rtol=0, atol=1e-12)
            optimizer.zero_grad()
            learn(rule, step)
            optimizer.step()

    literal = Literal(make)
    assert closed(agree(make, run)) == ["2", "4"]


def test_set_feedback_refuses_wrong_shapes_and_names() -> None:
    with pytest.raises(ConfigError, match="'4' has shape"):
        build(KP).set_feedback("4", B=torch.ones(7, 4))
    with pytest.raises(ConfigError, match="no layer '3'"):
        build(KP).set_feedback("3", B=torch.ones(7, 4))
    with pytest.raises(ConfigError, match="4 rows"):
        build(PFA).set_feedback("4", B=torch.ones(7, 4))
    with pytest.raises(ConfigError, match="R of layer '4'"):
        build(PFA).set_feedback("4", R=torch.ones(7, 7))
    with pytest.raises(ConfigError, match="together"):
        build(PFA, form="closed").set_feedback("4", R=torch.ones(40, 7))


@pytest.mark.parametrize("b_rows", [4, 5])
def test_set_feedback_of_a_closed_product(b_rows: int) -> None:
    rule = build(PFA, form="closed")
    b, r = torch.randn(4, b_rows), torch.randn(b_rows, 7)
    rule.set_feedback("4", B=b, R=r)
    assert torch.allclose(rule.feedback_weight("4"), b @ r, rtol=0, atol=1e-10)


@each_rule
@pytest.mark.parametrize("form", ["auto", "explicit"])
def test_an_optimiser_without_the_feedback_is_refused(make: Any, form: str) -> None:
    """SGD over `model.parameters()`: W learns and the feedback never would."""
    with pytest.raises(ConfigError, match=r"rule.parameters\(\), not model.parameters\(\)"):
        loop(parameters=lambda rule: rule.model.parameters(), steps=4)(build(make, form=form))


@each_rule
def test_two_optimisers(make: Any) -> None:
    """One for the model and one for the feedback: explicit, whichever steps first."""

    def run(rule: Any) -> None:
        mine = [rule.plastic_of(name) for name in ("2", "4")]
        both = [SGD(rule.model.parameters()), torch.optim.SGD(mine, lr=0.02)]
        for step in range(STEPS):
            rule.zero_grad()
            learn(rule, step)
            for optimizer in both if step % 2 else reversed(both):
                optimizer.step()

    rule = agree(make, run)
    assert "different optimisers" in rule.remarks[0]


def moved_by_hand(rule: Any) -> None:
    for step in range(20):
        rule.zero_grad()
        learn(rule, step)
        with torch.no_grad():
            for parameter in rule.parameters():
                parameter.sub_(0.05 * parameter.grad)


@each_rule
def test_a_loop_that_moves_weights_by_hand_stays_explicit(make: Any) -> None:
    assert closed(agree(make, moved_by_hand)) == []


@each_rule
def test_a_loop_that_moves_weights_by_hand_is_refused_in_closed_form(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"torch.optim.Optimizer"):
        moved_by_hand(build(make, form="closed"))


REFUSED = {
    "Adam": (loop(partial(torch.optim.Adam, weight_decay=0.1), steps=2), "decay of Adam.*use AdamW"),
    "frozen": (frozen_before, "frozen"),
    "clipped": (loop(gradients=CLIPS["value"], steps=2), "was changed"),
}


@each_rule
@pytest.mark.parametrize("name", REFUSED)
def test_the_closed_form_refuses_what_it_cannot_follow(make: Any, name: str) -> None:
    run, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        run(build(make, form="closed"))


@each_rule
def test_the_closed_form_from_the_beginning(make: Any) -> None:
    rule = agree(make, loop(), form="closed")
    assert len(list(rule.parameters())) == 6
    agree(make, loaded(-1), form="closed")
    agree(make, pruned(False), form="closed")


def masked(model: nn.Sequential) -> nn.Sequential:
    prune.l1_unstructured(model[2], "weight", 0.5)
    return model


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def doubled(model: nn.Sequential) -> nn.Sequential:
    layer = Doubled(8, 7)
    layer.load_state_dict(model[2].state_dict())
    model[2] = layer
    return model


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.sinh()


def parametrised(model: nn.Sequential) -> nn.Sequential:
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    return model


def old_norm(model: nn.Sequential) -> nn.Sequential:
    nn.utils.weight_norm(model[2])
    return model


FUNCTIONS = {"prune": masked, "subclass": doubled, "parametrisation": parametrised, "weight_norm": old_norm}


@each_rule
@pytest.mark.parametrize("name", FUNCTIONS)
def test_layers_with_a_function_of_their_weight_learn_feedback_by_the_literal_rule(make: Any, name: str) -> None:
    """Case r7: `dR = r h^T` with delta at the layer's output, and the path B R below it."""
    rule = make(FUNCTIONS[name](net()))
    seen: dict[str, Tensor] = {}
    rule.model[2].register_forward_hook(lambda module, args, output: seen.update(h=args[0].detach(), a=output))
    path = rule.feedback_weight("2")
    credit = rule(*batch(0))
    below: list[Tensor] = []
    rule.model[0].register_full_backward_hook(lambda module, given, got: below.append(got[0]))
    seen["a"].register_hook(lambda gradient: seen.update(delta=gradient))
    credit.backward()
    b = torch.eye(7) if isinstance(rule, KP) else rule.expansion.get_buffer("2")
    expected = (seen["delta"] @ b).T @ seen["h"]
    assert torch.allclose(rule.plastic_of("2").grad, expected, rtol=0, atol=1e-13)
    assert float(expected.norm()) > 0
    h = torch.tanh(rule.model[0](batch(0)[0])).detach()
    error = seen["delta"] @ path * (1 - h**2)
    assert torch.allclose(rule.model[0].bias.grad, error.sum(0), rtol=0, atol=1e-13)
    optimizer = SGD(rule.parameters())
    optimizer.step()
    assert closed(rule) == ["4"]
    assert "function of its weight" in rule.remarks[0]


@each_rule
def test_pruning_by_torch_in_mid_training(make: Any) -> None:
    """From there on explicitly, from the feedback and its momentum as they were."""
    rule, explicit = build(make), build(make, form="explicit")
    for each in (rule, explicit):
        optimizer = SGD(each.parameters())
        for step in range(30):
            if step == 15:
                prune.random_unstructured(each.model[2], "weight", 0.0)
            optimizer.zero_grad()
            learn(each, step)
            optimizer.step()
    assert closed(rule) == ["4"]
    for name, value in explicit.feedback_weights().items():
        assert torch.allclose(rule.feedback_weights()[name], value, rtol=0, atol=1e-12)


def resumed(rule: Any, optimizer: Any, make: Any, order: str) -> tuple[Any, Any]:
    file = io.BytesIO()
    torch.save((rule.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    state, rates = torch.load(file, weights_only=True)
    torch.manual_seed(77)
    other = make(net())
    if order == "rule first":
        other.load_state_dict(state)
    fresh = SGD([p for p in other.parameters() if p.requires_grad])
    fresh.load_state_dict(rates)
    if order == "optimiser first":
        other.load_state_dict(state)
    return other, fresh


@each_rule
@pytest.mark.parametrize("order", ["rule first", "optimiser first"])
@pytest.mark.parametrize("kind", ["explicit", "closed", "jumped", "clipped", "opened"])
def test_state_dicts_continue_bit_for_bit(make: Any, order: str, kind: str) -> None:
    rule = build(make)
    optimizer = SGD(rule.parameters())

    def train(rule: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            learn(rule, step)
            if kind == "clipped" and step == 0:
                clip_grad_value_(rule.parameters(), 0.01)
            optimizer.step()

    if kind == "explicit":
        learn(rule, 0)
    train(rule, optimizer, range(0 if kind == "explicit" else 5))
    if kind == "jumped":
        rule.model[2].weight.data.mul_(0.5)
        rule.model[4].weight.data.mul_(0.5)
    if kind == "opened":
        rule.model[2].weight.requires_grad_(False)
        train(rule, optimizer, range(5, 7))
        rule.model[2].weight.requires_grad_(True)
    other, fresh = resumed(rule, optimizer, make, order)
    for each, its in ((rule, optimizer), (other, fresh)):
        train(each, its, range(7, 14))
    assert other.remarks == rule.remarks
    assert closed(other) == closed(rule)
    mine, theirs = rule.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@each_rule
def test_an_explicit_state_has_one_size_whatever_was_decided(make: Any) -> None:
    """torch.distributed.checkpoint compares sizes before it loads."""
    rule = build(make)
    before = {name: value.shape for name, value in rule.state_dict().items()}
    rule.reasons.update(dict.fromkeys(rule.layers, "several processes share their gradients"))
    assert {name: value.shape for name, value in rule.state_dict().items()} == before
    other = build(make)
    other.load_state_dict(rule.state_dict())
    assert other.reasons == rule.reasons


@each_rule
def test_an_earlier_state_is_taken_back(make: Any) -> None:
    """A state from before the first step, loaded into a rule in closed form."""
    rule = build(make)
    start = copy.deepcopy(rule.state_dict())
    loop(steps=10)(rule)
    assert closed(rule) == ["2", "4"]
    rule.load_state_dict(start)
    assert closed(rule) == []
    once = copy.deepcopy(rule.feedback_weights())
    assert all(torch.equal(value, once[name]) for name, value in build(make).feedback_weights().items())
    loop(steps=10)(rule)
    assert closed(rule) == ["2", "4"]


@each_rule
def test_a_copy_of_a_rule_trains_alike(make: Any) -> None:
    rule = build(make)
    loop(steps=5)(rule)
    other = copy.deepcopy(rule)
    for each in (rule, other):
        loop(steps=20)(each)
    for name, value in rule.feedback_weights().items():
        assert torch.equal(other.feedback_weights()[name], value)
    assert not torch.equal(other.feedback_weights()["2"], build(make).feedback_weights()["2"])


@each_rule
def test_nothing_is_left_in_torch_or_on_the_weights(make: Any) -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    import apical.core.stepping as stepping

    before = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    others = len(stepping._observers)
    rules = [build(make) for _ in range(3)]
    loop(steps=2)(rules[0])
    for rule in rules:
        rule.detach()
        assert not any(p._post_accumulate_grad_hooks for p in rule.model.parameters())
    assert len(stepping._observers) <= others
    if not others:
        assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) <= before


@per_class
def test_compiled_rules_change_form_after_the_first_step(make: Any) -> None:
    rule = build(make)
    torch._dynamo.reset()
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    eager = build(make)
    for each in (compiled, eager):
        optimizer = SGD(each.parameters())
        for step in range(6):
            optimizer.zero_grad()
            each(*batch(step)).backward()
            optimizer.step()
    assert closed(rule) == closed(eager) == ["2", "4"]
    for name, value in eager.feedback_weights().items():
        assert torch.allclose(rule.feedback_weights()[name], value, rtol=0, atol=1e-12)
