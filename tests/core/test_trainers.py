"""Other people's trainers: they get a loss and do with it what they do, and the rule trains as in a loop of one's own."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import apical
from apical.errors import ConfigError, UnsupportedModelError

RULES = [
    apical.Backprop,
    apical.DirectFeedbackAlignment,
    apical.KolenPollack,
    apical.ProductFeedbackAlignment,
    apical.CounterCurrentLearning,
    apical.DeepFeedbackControl,
    apical.DifferenceTargetPropagation,
    apical.EquilibriumPropagation,
]


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(8, 6, dtype=torch.double, generator=generator), torch.randint(0, 4, (8,), generator=generator))
        for _ in range(8)
    ]


def make(rule: Any) -> apical.CreditRule:
    torch.manual_seed(0)
    made: apical.CreditRule = rule(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double())
    return made


def optimizer_of(rule: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def own_loop(rule: apical.CreditRule, accumulate: int) -> dict[str, Tensor]:
    """The reference: gradients of micro-batches are summed by `credit.backward()` and divided by hand."""
    optimizer = optimizer_of(rule)
    for number, (inputs, targets) in enumerate(data(), start=1):
        torch.manual_seed(number)
        rule(inputs, targets).backward()
        if number % accumulate == 0:
            for parameter in rule.parameters():
                if parameter.grad is not None:
                    parameter.grad /= accumulate
            optimizer.step()
            optimizer.zero_grad()
    return learned(rule)


def learned(rule: apical.CreditRule) -> dict[str, Tensor]:
    """Trained parameters; of plastic feedback, which loops keep in different forms, the value."""
    plastic = isinstance(rule, apical.KolenPollack | apical.ProductFeedbackAlignment)
    own = {name: p.detach() for name, p in rule.named_parameters() if name.startswith("model.") or not plastic}
    return {**own, **rule.feedback_weights()} if plastic else own


class Wrapped(nn.Module):
    """What Hugging Face's Trainer trains: a module that returns a dictionary with a loss."""

    def __init__(self, rule: apical.CreditRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        credit = self.rule(inputs, labels)
        return {"loss": credit.loss, "logits": credit.output}


@pytest.mark.parametrize("rule", RULES)
def test_a_trainer_that_takes_the_loss_from_a_dictionary(rule: Any) -> None:
    """The heart of `transformers.Trainer.training_step`, with its evaluation in between."""
    wrapped = Wrapped(make(rule))
    optimizer = optimizer_of(wrapped)
    for number, (inputs, labels) in enumerate(data(), start=1):
        wrapped.train()
        torch.manual_seed(number)
        outputs = wrapped(inputs=inputs, labels=labels)
        loss = outputs["loss"] / 4
        loss.backward()
        assert loss.detach().isfinite()
        if number % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
            wrapped.eval()
            with torch.inference_mode():
                evaluated = wrapped(inputs=inputs, labels=labels)
            assert not evaluated["loss"].requires_grad
            assert evaluated["logits"].numpy().shape == (8, 4)
    expected = own_loop(make(rule), 4)
    for name, value in expected.items():
        torch.testing.assert_close(learned(wrapped.rule)[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_lightning(rule: Any, automatic: bool) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is no requirement")

    class Taught(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic
            self.rule, self.validated = make(rule), 0

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            torch.manual_seed(index + 1)
            loss: Tensor = self.rule(*batch).loss
            if not automatic:
                optimizer = self.optimizers()
                self.manual_backward(loss / 4)
                if index % 4 == 3:
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            self.validated += not self.rule(*batch).loss.requires_grad

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.rule)

    module = Taught()
    options = {"accumulate_grad_batches": 4, "gradient_clip_val": 1e6} if automatic else {}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, **quiet, **options)
    trainer.fit(module, DataLoader(data(), batch_size=None), DataLoader(data()[:2], batch_size=None))
    assert module.validated == 2
    for name, value in own_loop(make(rule), 4).items():
        torch.testing.assert_close(learned(module.rule)[name], value, rtol=1e-12, atol=1e-12)


def mapped(output: Any, function: Any) -> Any:
    """How Lightning's Fabric maps the tensors of a dataclass: a copy whose fields it sets."""
    fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    result = copy.deepcopy(output, {id(value): value for value in fields.values()})
    for name, value in fields.items():
        setattr(result, name, function(value))
    return result


@pytest.mark.parametrize("way", ["loss", "credit"])
@pytest.mark.parametrize("rule", RULES)
def test_a_trainer_that_maps_the_tensors_of_an_output(rule: Any, way: str) -> None:
    """Fabric converts types by `.to`, which may make another tensor, and hooks what it finds."""
    trained, seen = make(rule), []
    optimizer = optimizer_of(trained)
    for number, (inputs, targets) in enumerate(data(), start=1):
        torch.manual_seed(number)
        credit = mapped(trained(inputs, targets), lambda value: 2 * value)
        credit.loss.register_hook(seen.append)
        assert credit.output.shape == (8, 4)
        (credit.loss if way == "loss" else credit).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == 8
    reference = make(rule)
    optimizer = optimizer_of(reference)
    for number, (inputs, targets) in enumerate(data(), start=1):
        torch.manual_seed(number)
        reference(inputs, targets).backward()
        for parameter in reference.parameters():
            if parameter.grad is not None:
                parameter.grad *= 2
        optimizer.step()
        optimizer.zero_grad()
    for name, value in learned(reference).items():
        torch.testing.assert_close(learned(trained)[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_fabric(rule: Any) -> None:
    fabric = pytest.importorskip("lightning.fabric", reason="Lightning is no requirement")
    trained = make(rule)
    torch.set_default_dtype(torch.double)  # which Fabric gives every output
    try:
        around = fabric.Fabric(accelerator="cpu", devices=1)
        module, optimizer = around.setup(trained, optimizer_of(trained))
        for number, (inputs, targets) in enumerate(data(), start=1):
            torch.manual_seed(number)
            around.backward(module(inputs, targets).loss / 4)
            if number % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.set_default_dtype(torch.float)
    for name, value in own_loop(make(rule), 4).items():
        torch.testing.assert_close(learned(trained)[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [*RULES, apical.PredictiveCoding, apical.DualPropagation, apical.StrongDeepFeedbackControl])
def test_inputs_in_the_short_type_of_autocast(rule: Any) -> None:
    """Trainers convert them, and a layer takes them there: the same numbers as in the model's own type."""
    found = []
    for short in (False, True):
        made = make(rule).float()
        inputs, targets = data()[0]
        inputs = inputs.bfloat16()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = made(inputs if short else inputs.float(), targets).loss
        loss.backward()
        found.append([p.grad for p in made.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_format_that_keeps_every_storage_once(rule: Any) -> None:
    """safetensors by way of accelerate: tensors of one address and size are one, and empty ones have all the same."""
    trained = make(rule)
    optimizer = optimizer_of(trained)
    for inputs, targets in data()[:3]:
        optimizer.zero_grad()
        trained(inputs, targets).backward()
        optimizer.step()
    storages = [(s.data_ptr(), s.nbytes()) for s in (value.untyped_storage() for value in trained.state_dict().values())]
    assert len(set(storages)) == len(storages)
    again = nn.ModuleDict({"rule": make(rule)})
    again.load_state_dict({f"rule.{name}": value.clone() for name, value in trained.state_dict().items()})
    for name, value in learned(trained).items():
        assert torch.equal(learned(again["rule"])[name], value)


@pytest.mark.parametrize("rule", RULES)
def test_hooks_for_gradients_of_single_samples_serve_or_are_refused(rule: Any) -> None:
    """Opacus writes a counter of forward passes on every parameter."""
    made = make(rule)
    for parameter in made.model.parameters():
        parameter._forward_counter = 0  # type: ignore[attr-defined]
    if rule is apical.Backprop:
        made(*data()[0]).backward()
        return
    with pytest.raises(UnsupportedModelError, match=r"Opacus .* use Backprop, FeedbackAlignment or SignSymmetry"):
        made(*data()[0])


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("rule", RULES[1:])
def test_a_copy_by_parts_with_another_model_is_refused(rule: Any, begun: bool) -> None:
    """As higher's patched modules and the replicas of DataParallel are made."""
    made = make(rule)
    if begun:
        made(*data()[0]).backward()
    replica = made._replicate_for_data_parallel()
    replica._modules["model"] = copy.deepcopy(made.model)
    with pytest.raises(ConfigError, match=r"this copy of a rule has another model"):
        replica(*data()[0])
    copy.deepcopy(made)(*data()[0]).backward()
