"""Other people's trainers: they get a loss and do with it what they do, and the rule trains as in a loop of one's own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import apical

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
