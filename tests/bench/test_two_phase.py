"""Feedback passes: their order, optimiser and clipping, resuming within them, and several processes."""

import copy
import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bench.two_phase import RECIPE, NoisyMirror, begin, small_digits, train_on
from torch import Tensor

from apical.bench.loop import Training
from apical.bench.optimizer import clip, make_optimizer
from apical.bench.passes import passes, total_steps
from apical.bench.recipe import Recipe
from apical.bench.schedule import data_order
from apical.bench.signals import Interrupted, StopSignals
from apical.core.credit import CreditRule
from apical.data import Dataset
from apical.errors import ConfigError, DivergenceError
from apical.rules.backprop import Backprop
from apical.testing.two_ranks import on_two_ranks

STEPS = 5  # 160 samples in batches of 32


@pytest.fixture(scope="module")
def samples() -> Dataset:
    return small_digits()


def mirror(training: Training) -> NoisyMirror:
    assert isinstance(training.rule, NoisyMirror)
    return training.rule


def kinds(recipe: Recipe, epoch: int) -> list[tuple[str, str, int]]:
    return [(item.kind, item.phase, item.steps) for item in passes(recipe, epoch, 10)]


def test_passes_of_the_first_and_of_later_epochs() -> None:
    feedback, pretrain, main = ("feedback", "feedback", 10), ("pretrain", "feedback", 10), ("main", "forward", 10)
    assert kinds(RECIPE, 1) == [pretrain, pretrain, feedback, main, feedback, feedback]
    assert kinds(RECIPE, 2) == [feedback, main, feedback, feedback]
    assert kinds(replace(RECIPE, feedback_passes=1, pretrain_epochs=0), 1) == [feedback, main]
    assert kinds(replace(RECIPE, feedback_passes=0), 1) == [pretrain, pretrain, ("main", "both", 10)]
    assert total_steps(RECIPE, 2, 10) == 100


def test_every_pass_has_an_order_of_its_own_and_the_main_one_that_of_other_rules() -> None:
    orders = [item.order(100, 7) for epoch in (1, 2) for item in passes(RECIPE, epoch, 10)]
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 10
    assert torch.equal(orders[3], data_order(100, 7, 1))
    assert torch.equal(orders[7], data_order(100, 7, 2))


@pytest.mark.parametrize(("fraction", "steps"), [(0.25, 2), (0.01, 1)])
def test_a_fraction_of_the_batches(fraction: float, steps: int) -> None:
    recipe = replace(RECIPE, feedback_fraction=fraction)
    assert [item.steps for item in passes(recipe, 2, 10)] == [steps, 10, steps, steps]


def test_the_rule_is_told_what_to_learn(samples: Dataset, tmp_path: Path) -> None:
    training = begin(RECIPE, samples, tmp_path)
    rule = mirror(training)
    rule.seen.clear()
    training.train_epoch()
    assert rule.seen[: 6 * STEPS] == ["feedback"] * 3 * STEPS + ["forward"] * STEPS + ["feedback"] * 2 * STEPS
    assert rule.phase == "forward"  # for measurements


def test_the_loop_is_plain_torch(samples: Dataset, tmp_path: Path) -> None:
    """The whole of two epochs, from the equations of the stub rule and one optimiser per set of weights and purpose."""
    recipe = replace(RECIPE, lr=(0.05, 0.01), lr_epochs=(1,), weight_decay=(1e-2, 1e-3), weight_decay_epochs=(1,))
    recipe = replace(
        recipe, optimizer="adam", feedback_beta1=0.5, feedback_beta2=0.9, feedback_eps=1e-3, clip=0.1, beta2=0.9
    )
    training = begin(recipe, samples, tmp_path)
    model, q = copy.deepcopy(training.rule.model), torch.zeros(10, 10, requires_grad=True)
    assert training._rng is not None
    noise = torch.Generator()
    noise.set_state(training._rng["cpu"])
    forward = torch.optim.Adam(model.parameters(), betas=(0.9, 0.9))
    slow: dict[str, Any] = {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.01}
    before, after = torch.optim.Adam([q], lr=0.1, **slow), torch.optim.Adam([q], lr=0.03, **slow)
    for epoch, lr, decay in ((1, 0.05, 1e-2), (2, 0.01, 1e-3)):
        for item in passes(recipe, epoch, STEPS):
            for batch in item.order(160, 0).split(32):
                output = model(samples.train.inputs[batch])
                if item.kind == "main":
                    forward.param_groups[0].update(lr=lr, weight_decay=decay)
                    forward.zero_grad()
                    torch.nn.functional.cross_entropy(output, samples.train.targets[batch]).backward()
                    for weight in model.parameters():
                        shorten([weight], 0.1)
                    forward.step()
                else:
                    q.grad = q.detach() - torch.randn(10, 10, generator=noise) - output.detach().mean(0)
                    shorten([q], 0.1)
                    (before if item.kind == "pretrain" else after).step()
        training.train_epoch()
        noise.set_state(training._rng["cpu"])  # what a measurement draws is not this test's matter
    ours = training.rule.model.state_dict()
    assert all(torch.allclose(value, ours[name], atol=1e-6) for name, value in model.state_dict().items())
    assert torch.allclose(mirror(training).q, q, atol=1e-6)


def shorten(weights: list[Any], largest: float) -> None:
    norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in weights))
    for weight in weights:
        weight.grad *= min(1.0, largest / norm)


def test_forward_tensors_are_clipped_one_by_one_and_feedback_together() -> None:
    rule = Pair()
    recipe = Recipe(clip=2.0, weight_decay=(0.0,))
    for parameter, size in zip(rule.parameters(), (1.0, 4.0, 3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([size])
    clip(make_optimizer(recipe, rule), 2.0)
    norms = [float(parameter.grad) for parameter in rule.parameters() if parameter.grad is not None]
    assert norms == pytest.approx([1.0, 2.0, 3 * 2 / 5, 4 * 2 / 5], rel=1e-5)


class Pair(Backprop):
    two_phase = True

    def __init__(self) -> None:
        super().__init__(torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1)) for _ in range(2)]))
        self.q = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1)) for _ in range(2)])

    def feedback_parameters(self) -> list[torch.nn.Parameter]:
        return list(self.q)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_groups_of_the_optimiser(optimizer: str) -> None:
    recipe = Recipe(optimizer=optimizer, momentum=0.8, beta2=0.99, eps=1e-6, weight_decay=(0.1,), feedback_beta1=0.3)  # type: ignore[arg-type]
    rule = Pair()
    forward, feedback = make_optimizer(recipe, rule).param_groups
    assert forward["params"] == list(rule.model.parameters())
    assert feedback["params"] == list(rule.q)
    if optimizer == "sgd":
        assert (forward["momentum"], feedback["momentum"]) == (0.8, 0.3)
    else:
        assert (forward["betas"], forward["eps"]) == ((0.8, 0.99), 1e-6)
        assert (feedback["betas"], feedback["eps"]) == ((0.3, 0.99), 1e-6)
    rule.q.requires_grad_(False)
    (alone,) = make_optimizer(recipe, rule).param_groups
    assert alone["params"] == list(rule.model.parameters())


def test_feedback_follows_the_forward_schedule_unless_it_has_rates_of_its_own(samples: Dataset, tmp_path: Path) -> None:
    recipe = replace(RECIPE, lr=(0.1, 0.01), lr_epochs=(1,), weight_decay=(0.02, 0.0), weight_decay_epochs=(1,))
    seen = []
    for lr, decay in ((None, None), (0.03, 0.5)):
        run = begin(replace(recipe, feedback_lr=lr, feedback_weight_decay=decay), samples, tmp_path / str(lr))
        for _ in range(2):
            run.train_epoch()
            seen.append([(group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups])
    assert seen == [
        [(0.1, 0.02), (0.1, 0.02)],
        [(0.01, 0.0), (0.01, 0.0)],
        [(0.1, 0.02), (0.03, 0.5)],
        [(0.01, 0.0), (0.03, 0.5)],
    ]


def test_metrics_count_forward_steps_only_and_logs_are_averaged(samples: Dataset, tmp_path: Path) -> None:
    training = begin(RECIPE, samples, tmp_path)
    assert training.line["feedback_ms_per_step"] is None
    before: list[Tensor] = []
    rule = mirror(training)
    losses: list[float] = []

    def watch(module: CreditRule, _: object, credit: Any) -> None:
        before.append(module.q.detach().norm())  # type: ignore[union-attr]
        if module.phase == "forward":
            losses.append(float(credit.loss))

    hook = rule.register_forward_hook(watch)
    training._step_megabytes = lambda: 1.0  # type: ignore[method-assign]
    on_step_count = 6 * STEPS
    line = training.train_epoch(lambda step: step == on_step_count and hook.remove())
    assert len(before) == on_step_count
    assert len(losses) == STEPS
    assert line["train_loss"] == pytest.approx(sum(losses) / STEPS)
    assert line["logs"]["q"] == pytest.approx(float(sum(before)) / on_step_count, rel=1e-5)
    assert line["logs"]["twice"] == pytest.approx(2 * sum(losses) / STEPS, rel=1e-5)
    assert line["feedback_ms_per_step"] > 0
    assert line["ms_per_step"] > 0
    assert 1e3 * line["seconds"] > STEPS * (line["ms_per_step"] + line["feedback_ms_per_step"])
    result = training.result()
    assert result["steps_per_epoch"] == STEPS
    assert result["feedback_ms_per_step"] == line["feedback_ms_per_step"]
    assert training.steps_done == on_step_count
    assert training.steps_planned == on_step_count + 4 * STEPS


@pytest.mark.parametrize("every", [0, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resuming_is_exact_in_every_pass(
    samples: Dataset, tmp_path: Path, assert_same_state: Callable[[Path, Path], None], optimizer: str, every: int
) -> None:
    recipe = replace(RECIPE, optimizer=optimizer, lr=(0.01,), crop=1, checkpoint_steps=every)  # type: ignore[arg-type]
    whole = begin(recipe, samples, tmp_path / "whole")
    for _ in range(2):
        whole.train_epoch()
    stop = StopSignals()
    stops = {(0, step) for step in (3, 5, 10, 13, 17, 20, 24, 29)} | {(1, 2), (1, 9), (1, 12)}
    places = []
    part = begin(recipe, samples, tmp_path / "part", stop=stop)
    while part.epoch < 2:

        def on_step(step: int, part: Training = part) -> None:
            if (part.epoch, step) in stops:
                stops.remove((part.epoch, step))
                stop.signum = signal.SIGTERM

        try:
            part.train_epoch(on_step)
        except Interrupted as interrupted:
            places.append(interrupted.where)
            part.folder.unlock()
            stop.signum = None
            part = begin(recipe, samples, tmp_path / "part", stop=stop, resume=True)
    assert stops == set()
    assert places[0] == "epoch 1, step 3 (pretrain pass)"
    assert places[3] == "epoch 1, step 13 (feedback pass)"
    assert places[4] == "epoch 1, step 17"
    assert_same_state(tmp_path / "whole" / "checkpoint.pt", tmp_path / "part" / "checkpoint.pt")
    timed = ("ms_per_step", "feedback_ms_per_step", "seconds")
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in run.folder.read_metrics()] for run in (whole, part)
    ]
    assert lines[0] == lines[1]
    assert lines[0][1]["logs"].keys() == {"q", "twice"}


def test_a_killed_run_goes_on_from_a_checkpoint_within_pretraining(
    samples: Dataset, tmp_path: Path, assert_same_state: Callable[[Path, Path], None]
) -> None:
    recipe = replace(RECIPE, checkpoint_steps=3, epochs=1)
    begin(recipe, samples, tmp_path / "whole").train_epoch()
    part = begin(recipe, samples, tmp_path / "part")

    def on_step(step: int) -> None:
        if step == 8:
            raise KeyboardInterrupt  # nothing is saved any more, as if it were killed

    with pytest.raises(KeyboardInterrupt):
        part.train_epoch(on_step)
    part.folder.unlock()
    saved = torch.load(tmp_path / "part" / "checkpoint.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (0, 6)
    begin(recipe, samples, tmp_path / "part", resume=True).train_epoch()
    assert_same_state(tmp_path / "whole" / "checkpoint.pt", tmp_path / "part" / "checkpoint.pt")


@pytest.mark.parametrize("at", [7, 18])
def test_an_unstable_rule_is_a_divergence_with_its_own_advice(samples: Dataset, tmp_path: Path, at: int) -> None:
    training = begin(RECIPE, samples, tmp_path)
    rule = mirror(training)
    rule.seen.clear()
    rule.unstable_at = at
    with pytest.raises(DivergenceError, match=r"noisy-mirror with seed 0 diverged in epoch 1, step \d+") as caught:
        training.train_epoch()
    message = str(caught.value)
    assert "the loop gain is too high: raise alpha above 0.5; the last good checkpoint (epoch 0) is kept" in message
    assert "--lr" not in message
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["message"]) == ("diverged", message)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 0


def test_a_rule_that_is_unstable_before_it_learned_has_no_gradient_yet(
    samples: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = NoisyMirror.__init__

    def unstable_at_first(rule: NoisyMirror, *arguments: Any) -> None:
        build(rule, *arguments)
        rule.unstable_at = 1

    monkeypatch.setattr(NoisyMirror, "__init__", unstable_at_first)
    training = begin(RECIPE, samples, tmp_path)
    assert training.line["layers"] == {}
    assert training.train_epoch()["layers"]["linear1"]["gradient_alignment"] == pytest.approx(0, abs=0.1)


def test_feedback_that_is_not_finite_is_noticed_at_the_end_of_its_pass(samples: Dataset, tmp_path: Path) -> None:
    training = begin(replace(RECIPE, pretrain_lr=1e30), samples, tmp_path)
    with pytest.raises(DivergenceError, match=r"epoch 1, step 5, .*parameter q is not finite"):
        training.train_epoch()


def test_a_rule_without_feedback_weights_refuses_feedback_passes(samples: Dataset, tmp_path: Path) -> None:
    from apical.bench.distributed import World
    from apical.bench.names import make_rule
    from apical.bench.run_folder import RunFolder

    recipe = replace(RECIPE, rule="fa")
    with pytest.raises(ConfigError, match="--pretrain-epochs 2: rule 'fa'"):
        Training(recipe, samples, make_rule, RunFolder(tmp_path / "run"), World(0, 1, torch.device("cpu")))
    assert not (tmp_path / "run").exists()


def test_two_ranks_equal_one_process(samples: Dataset, tmp_path: Path) -> None:
    on_two_ranks(train_on, str(tmp_path / "two"))
    alone = begin(RECIPE, samples, tmp_path / "one")
    for _ in range(RECIPE.epochs):
        alone.train_epoch()
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    for name, value in one["rule"].items():
        assert torch.allclose(value, two["rule"][name], rtol=0, atol=1e-5), name
    for key in ("train_loss", "test_loss", "train_accuracy"):
        assert one["metrics"][key] == pytest.approx(two["metrics"][key], abs=1e-5)
    for name, value in one["metrics"]["logs"].items():
        assert two["metrics"]["logs"][name] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(("rule", "options"), [("dfc-ssa", ("learn=noise",)), ("dfc", ()), ("strong-dfc", ())])
@pytest.mark.parametrize("passes_per_epoch", [0, 2])
def test_resuming_deep_feedback_control_is_exact(
    samples: Dataset,
    tmp_path: Path,
    assert_same_state: Callable[[Path, Path], None],
    rule: str,
    options: tuple[str, ...],
    passes_per_epoch: int,
) -> None:
    from apical.bench.distributed import World
    from apical.bench.names import make_rule
    from apical.bench.run_folder import RunFolder

    recipe = replace(RECIPE, rule=rule, model="mlp-tanh-8", feedback_passes=passes_per_epoch, pretrain_epochs=1)
    recipe = replace(recipe, rule_options=options, optimizer="adam", lr=(1e-3,), feedback_lr=1e-4, pretrain_lr=1e-4)

    def start(path: Path, stop: StopSignals | None = None) -> Training:
        training = Training(recipe, samples, make_rule, RunFolder(path), World(0, 1, torch.device("cpu")), stop)
        training.start(resume=path.exists(), command="test", notes=[], environment={"commit": None})
        return training

    whole, stop = start(tmp_path / "whole"), StopSignals()
    initial = {name: value.clone() for name, value in whole.rule.state_dict().items()}
    whole.train_epoch()
    for at in (2, 8):  # in pre-training and after it
        part = start(tmp_path / "part", stop)

        def on_step(step: int, at: int = at) -> None:
            stop.signum = signal.SIGTERM if step == at else None

        with pytest.raises(Interrupted):
            part.train_epoch(on_step)
        part.folder.unlock()
        stop.signum = None
    start(tmp_path / "part").train_epoch()
    assert_same_state(tmp_path / "whole" / "checkpoint.pt", tmp_path / "part" / "checkpoint.pt")
    learned = [parameter for parameter in whole.rule.feedback_parameters() if parameter.requires_grad]
    assert learned
    changed = {name for name, value in whole.rule.state_dict().items() if not torch.equal(value, initial[name])}
    trained = {name for name, parameter in whole.rule.named_parameters() if parameter.requires_grad}
    assert trained <= changed
