import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apical.bench.loop import Training
from apical.bench.recipe import Recipe
from apical.bench.signals import Interrupted, StopSignals
from apical.core.credit import Batch, CreditRule, Measures, depth_accuracies
from apical.errors import ConfigError, DivergenceError
from apical.rules.backprop import Backprop
from apical.rules.feedback_alignment import FeedbackAlignment
from apical.rules.plastic_feedback.plastic_rule import PlasticRule

Begin = Callable[..., Training]


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in training.rule.model.state_dict().items()}


def test_metrics_of_epoch_zero_and_of_a_finished_epoch(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    training = begin(replace(small, rule="fa"), tmp_path)
    line = training.train_epoch()
    zero, one = training.folder.read_metrics()
    assert one == line
    assert zero["epoch"] == 0
    assert zero["train_loss"] is None
    assert zero["ms_per_step"] is None
    assert one["epoch"] == 1
    assert 0 < one["train_loss"] < zero["test_loss"]
    assert 0 <= one["test_accuracy"] <= 1
    assert one["ms_per_step"] > 0
    assert one["seconds"] > 0
    assert (one["lr"], one["weight_decay"]) == (0.05, 1e-4)
    assert list(one["layers"]) == ["linear1", "linear2"]
    for layer in one["layers"].values():
        assert layer.keys() == {"weight_alignment", "norm_ratio", "gradient_alignment", "gradient_norm_ratio"}
    assert one["layers"]["linear2"]["gradient_alignment"] == pytest.approx(0, abs=1e-3)
    assert one["layers"]["linear1"]["gradient_alignment"] > 10


class Measuring(Backprop):
    """Measures under a name; an infinite number too."""

    name = "pulse"
    layer_name = "own"

    def measures(self, probe: Batch, test: Sequence[Batch]) -> Measures:
        assert self.training
        torch.rand(1)
        seen = sum(len(targets) for _, targets in test)
        depths = depth_accuracies(lambda x: {"linear2": self.model(x).argmax(1)}, test)
        return Measures(
            {self.name: 2.0, "seen": seen}, {"linear1": {self.layer_name: math.inf}, "hidden": {"own": 1.0}}, depths
        )


def measuring(begin: Begin, recipe: Recipe, folder: Path, name: str = "pulse", layer_name: str = "own") -> Training:
    """Training with it."""

    def make_rule(recipe: Recipe, model: torch.nn.Module, input_shape: tuple[int, ...]) -> CreditRule:
        rule = Measuring(model)
        rule.name, rule.layer_name = name, layer_name
        return rule

    return begin(recipe, folder, make_rule=make_rule)


def test_a_rules_own_measures_are_in_every_line(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    training, plain = measuring(begin, small, tmp_path / "own"), begin(small, tmp_path / "bp")
    for line in (*training.folder.read_metrics(), training.train_epoch()):
        assert (line["pulse"], line["seen"], line["condition_two"]) == (2.0, len(training.dataset.test), None)
        assert line["layers"]["linear1"]["own"] is None
        assert line["layers"]["hidden"] == {"own": 1.0}
        assert line["depths"] == {"linear2": pytest.approx(line["test_accuracy"])}
    plain.train_epoch()
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(training).items())
    assert "pulse" not in measuring(begin, replace(small, probe=0), tmp_path / "off").line
    with pytest.raises(ConfigError, match="'test_loss' is reserved"):
        measuring(begin, small, tmp_path / "clash", name="test_loss")
    with pytest.raises(ConfigError, match="'gradient_alignment' is reserved"):
        measuring(begin, small, tmp_path / "layer", layer_name="gradient_alignment")


class Writing(FeedbackAlignment):
    """Leaves weights, buffers, gradients, modes and random numbers other than they were."""

    def __init__(self, model: torch.nn.Module, writes: bool) -> None:
        super().__init__(model)
        self.writes, self.noise = writes, torch.Generator().manual_seed(1)

    def measures(self, probe: Batch, test: Sequence[Batch]) -> Measures:
        if self.writes:
            self.eval()
            torch.manual_seed(torch.randint(9, (), generator=self.noise))
            with torch.no_grad():
                for tensor in (*self.parameters(), *self.buffers()):
                    tensor.zero_()
                for parameter in self.parameters():
                    parameter.grad = torch.ones_like(parameter)
        return Measures({"mine": 1.0})


def test_what_a_rules_own_measures_write_is_undone(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    ends = []
    for writes in (False, True):
        training = begin(
            replace(small, rule="fa"), tmp_path / str(writes), make_rule=lambda _, model, __, w=writes: Writing(model, w)
        )
        training.train_epoch()
        rule = training.rule
        ends.append(
            ({name: value.clone() for name, value in rule.state_dict().items()}, rule.training, rule.noise.get_state())
        )
    (bare, mode, noise), (measured, its, other) = ends
    assert bare.keys() == measured.keys()
    assert all(torch.equal(value, measured[name]) for name, value in bare.items())
    assert mode is its
    assert torch.equal(noise, other)


def test_accuracy_is_that_of_the_model_on_the_test_images(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    training = begin(small, tmp_path)
    line = training.train_epoch()
    test = training.dataset.test
    with torch.no_grad():
        output = training.rule.model(test.inputs)
    assert line["test_accuracy"] == pytest.approx((output.argmax(1) == test.targets).double().mean().item())
    assert line["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(output, test.targets).item(), rel=1e-5)


def test_a_seed_gives_every_rule_the_same_first_weights(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    trainings = [begin(replace(small, rule=rule), tmp_path / rule) for rule in ("bp", "dfa", "pfa", "wm")]
    first = weights(trainings[0])
    for training in trainings[1:]:
        assert all(torch.equal(value, first[name]) for name, value in weights(training).items())
    other = weights(begin(replace(small, seed=1), tmp_path / "other"))
    assert not torch.equal(other["linear1.weight"], first["linear1.weight"])


def test_backprop_loop_is_plain_torch(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    from apical.bench.schedule import data_order

    training = begin(replace(small, weight_decay=(1e-3,)), tmp_path)
    import copy

    model, train = copy.deepcopy(training.rule.model), training.dataset.train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for batch in data_order(320, 0, 1).split(32):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(train.inputs[batch]), train.targets[batch]).backward()
        optimizer.step()
    training.train_epoch()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights(training).items())


def test_schedules_reach_the_optimiser(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    recipe = replace(small, epochs=3, lr=(0.1, 0.01), lr_epochs=(1,), weight_decay=(0.02, 1e-4), weight_decay_epochs=(2,))
    training = begin(recipe, tmp_path)
    seen = []
    for _ in range(3):
        line = training.train_epoch()
        group = training.optimizer.param_groups[0]
        assert (line["lr"], line["weight_decay"]) == (group["lr"], group["weight_decay"])
        seen.append((line["lr"], line["weight_decay"]))
    assert seen == [(0.1, 0.02), (0.01, 0.02), (0.01, 1e-4)]


def test_runs_trained_in_turn_do_not_disturb_each_other_or_the_caller(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    recipe = replace(small, rule="wm")  # draws from the global generator at every step
    alone = begin(recipe, tmp_path / "alone")
    for _ in range(2):
        alone.train_epoch()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = begin(recipe, tmp_path / "first"), begin(replace(recipe, rule="brsf"), tmp_path / "second")
    for _ in range(2):
        first.train_epoch()
        second.train_epoch()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(alone).items())


@pytest.mark.parametrize("recipe", [{"amp": "bf16"}, {"optimizer": "adam"}, {"optimizer": "adamw"}, {"crop": 1}])
@pytest.mark.parametrize("rule", ["bp", "pfa"])
def test_variants_learn(begin: Begin, small: Recipe, tmp_path: Path, recipe: dict[str, str], rule: str) -> None:
    lr = (0.01,) if "optimizer" in recipe else (0.05,)
    training = begin(replace(small, rule=rule, lr=lr, probe=0, **recipe), tmp_path)  # type: ignore[arg-type]
    for _ in range(5):
        line = training.train_epoch()
    assert line["test_accuracy"] > 0.5
    assert line["layers"] == {}


def test_divergence_stops_names_the_remedy_and_keeps_the_last_good_checkpoint(
    begin: Begin, small: Recipe, tmp_path: Path
) -> None:
    training = begin(replace(small, rule="fa", lr=(1e20,), epochs=5), tmp_path)

    def train() -> None:
        for _ in range(5):
            training.train_epoch()

    with pytest.raises(DivergenceError, match=r"fa with seed 0 diverged in epoch \d, step \d+, at lr 1e\+20") as caught:
        train()
    assert "smaller --lr" in str(caught.value)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in saved["rule"].values())
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "diverged"
    assert result["message"] == str(caught.value)
    assert saved["epoch"] == result["epochs"]


def test_a_signal_ends_after_the_step_and_saves(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    stop = StopSignals()
    training = begin(small, tmp_path, stop=stop)

    def on_step(step: int) -> None:
        if step == 4:
            stop.signum = 2

    with pytest.raises(Interrupted, match="epoch 1, step 4"):
        training.train_epoch(on_step)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (saved["epoch"], saved["step"], saved["partial"]["examples"]) == (0, 4, 128)


def test_result_has_the_medians_and_sizes(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    training = begin(small, tmp_path)
    for _ in range(2):
        training.train_epoch()
    result = training.result()
    assert result["status"] == "finished"
    assert result["epochs"] == 2
    assert (result["n_train"], result["n_test"], result["steps_per_epoch"]) == (320, 360, 10)
    assert result["parameters"] == 64 * 32 + 32 + 32 * 10 + 10
    held = 4 * result["parameters"] * 3 / 2**20  # weights, gradients, momentum, in MiB; activities come on top
    assert held < result["peak_memory_mb"] < held + 1
    assert math.isfinite(result["ms_per_step"])
    assert result["config_hash"] == training.recipe.hash()


def test_rules_are_given_the_loss_and_where_they_ask_for_it_the_shape_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn import Linear, Module, functional

    from apical.bench import names as rules
    from apical.core.credit import Loss
    from apical.rules.backprop import Backprop

    class Shaped(Backprop):
        def __init__(self, model: Module, loss: Loss, input_shape: tuple[int, ...] | None = None, depth: int = 1) -> None:
            super().__init__(model, loss)
            self.shape, self.depth = input_shape, depth

    monkeypatch.setitem(rules.RULES, "shaped", rules.Entry(Shaped, "for this test"))
    recipe = Recipe(rule="shaped", rule_options=("depth=3",), loss="mse")
    rule = rules.make_rule(recipe, Linear(2, 2), (1, 8, 8))
    assert isinstance(rule, Shaped)
    assert (rule.shape, rule.depth, rule.loss) == ((1, 8, 8), 3, functional.mse_loss)
    assert rules.make_rule(Recipe(rule="fa"), Linear(2, 2), (2,)).loss is functional.cross_entropy
    assert rules.constructor_options(rules.RULES["shaped"]) == ["depth"]


@pytest.mark.parametrize("rule", ["kp", "pfa", "pfa-o"])
def test_nothing_in_training_makes_feedback_explicit(begin: Begin, small: Recipe, tmp_path: Path, rule: str) -> None:
    """Feedback that follows its weight in closed form does so under the trainer's looks, counts and checkpoints too."""
    training = begin(replace(small, rule=rule, epochs=2), tmp_path)
    for _ in range(2):
        training.train_epoch()
    assert isinstance(training.rule, PlasticRule)
    assert all(training.rule.plastic_of(name).numel() == 0 for name in training.rule.layers)
    assert training.rule.reasons == {}
