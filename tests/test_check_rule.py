"""The conformance suite finds planted faults, and says which: one rule for every fault, each otherwise in order."""

import itertools
import time

import pytest
import torch
from torch import Tensor, nn

import apical
from apical.core.credit import Credit, CreditRule, Loss
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.backprop import Backprop
from apical.testing import CHECKS, check_rule, dense_network, settings

SKIP = ("compile", "distributed")  # the slow ones; the planted faults do not concern them


class Exact(CreditRule):
    """Backpropagation, as the faultless base of the faulty rules."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output = self.model(inputs)
        loss = self.loss(output, targets)
        return Credit([loss], [self.signal(inputs)], output, loss)

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """Exact everywhere, which a rule that is backpropagation has to say."""
        return Backprop(self.model, self.loss).credit_paths(inputs)

    def signal(self, inputs: Tensor) -> Tensor | None:
        """Factor on the whole gradient."""
        return None


def test_the_faultless_base_passes() -> None:
    check_rule(Exact, skip=SKIP)


class LeavesForwardHook(Exact):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_hook(lambda *args: None)


class LeavesForwardPreHook(Exact):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_pre_hook(lambda *args: None)


class LeavesBackwardHook(Exact):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        [m for m in model.modules() if isinstance(m, nn.Linear)][-1].register_full_backward_hook(lambda *args: None)


class LeavesBackwardPreHook(Exact):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        [m for m in model.modules() if isinstance(m, nn.Linear)][-1].register_full_backward_pre_hook(lambda *args: None)


class LeavesParameterHook(Exact):
    """Doubles a gradient for ever."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        next(model.parameters()).register_hook(lambda grad: 2 * grad)


class DetachForgets(apical.FeedbackAlignment):
    def detach(self) -> nn.Module:
        return self.model


class DetachReturnsNothing(apical.FeedbackAlignment):
    def detach(self) -> None:
        super().detach()


class SumOverTheBatch(Exact):
    def signal(self, inputs: Tensor) -> Tensor:
        return torch.tensor(float(len(inputs)), dtype=torch.double)


CLOCK = itertools.count(time.time_ns() % 10**9)


class OwnGenerator(Exact):
    """Noise from a generator that no seed reaches."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        self.generator = torch.Generator().manual_seed(next(CLOCK))

    def signal(self, inputs: Tensor) -> Tensor:
        return 1 + 0.1 * torch.rand((), dtype=torch.double, generator=self.generator)


class FeedbackFromTheClock(apical.FeedbackAlignment):
    """Feedback drawn by such a generator, kept in order afterwards."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        generator = torch.Generator().manual_seed(next(CLOCK))
        for buffer in self.feedback.buffers():
            buffer.copy_(torch.randn(buffer.shape, dtype=buffer.dtype, generator=generator))


class Counter(Exact):
    """An annealed factor that forgets its step in a checkpoint."""

    steps = 0

    def signal(self, inputs: Tensor) -> Tensor:
        self.steps += 1
        return torch.tensor(1.0 / self.steps, dtype=torch.double)


class HiddenFeedback(apical.FeedbackAlignment):
    """Feedback in a list instead of buffers."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        self.matrices = {name: buffer.clone() for name, buffer in self.feedback.named_buffers()}
        self.feedback = nn.Module()

    def feedback_of(self, name: str) -> tuple[object, tuple[Tensor, ...]]:
        self.feedback._buffers.update(self.matrices)
        result = super().feedback_of(name)
        self.feedback._buffers.clear()
        return result


class IdleParameter(Exact):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        self.spare = nn.Parameter(torch.zeros(3))


class ForgetsTheBias(Exact):
    """Leaves the last parameter of the model without a gradient."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        last = list(self.model.parameters())[-1]
        last.requires_grad_(False)
        credit = super().forward(inputs, targets)
        last.requires_grad_(True)
        return credit


class NotANumber(Exact):
    def signal(self, inputs: Tensor) -> Tensor:
        return torch.tensor(float("nan"), dtype=torch.double)


class Infinite(Exact):
    def signal(self, inputs: Tensor) -> Tensor:
        return torch.tensor(float("inf"), dtype=torch.double)


class ShiftsOutput(Exact):
    """Adds to one logit for as long as it is attached."""

    shift = (0.5, 0.0, 0.0, 0.0)

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        self._hooks.append(model.register_forward_hook(lambda m, a, output: output + output.new_tensor(self.shift)))


class ShiftsOutputEvenly(ShiftsOutput):
    """Adds to all logits, which no gradient of the cross-entropy shows."""

    shift = (0.5, 0.5, 0.5, 0.5)


class ShiftsOutputInTraining(Exact):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        self._hooks.append(model.register_forward_hook(lambda m, a, output: 2 * output if m.training else None))


class ReportsAnotherOutput(Exact):
    """`Credit.output` is not the model's output, though the loss agrees with it."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output = self.model(inputs) + 0.1 * torch.eye(4, dtype=torch.double)[0]
        loss = self.loss(output, targets)
        return Credit([loss], [None], output, loss)


class ReportsAnotherLoss(Exact):
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        credit = super().forward(inputs, targets)
        return Credit(credit.roots, credit.signals, credit.output, 2 * credit.loss)


class Overwrites(Exact):
    """Sets `.grad` instead of adding to it."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        self.zero_grad()
        return super().forward(inputs, targets)


class ChangesTheModel(Exact):
    """Appends a module and never takes it away."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        model.register_buffer("mark", torch.zeros(()))


class ChangesTheWeights(Exact):
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        with torch.no_grad():
            next(self.model.parameters()).mul_(0.99)
        return super().forward(inputs, targets)


class SkipsWhatItDoesNotKnow(Exact):
    """Trains dense layers and convolutions, and says nothing of the rest."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        for module in model.modules():
            if isinstance(module, nn.Bilinear | nn.GRU):
                module.requires_grad_(False)


FAULTS = {
    LeavesForwardHook: "hooks are left on",
    LeavesForwardPreHook: "hooks are left on",
    LeavesBackwardHook: "hooks are left on",
    DetachForgets: "hooks are left on",
    DetachReturnsNothing: r"detach\(\) must return the model",
    SumOverTheBatch: "a batch twice over",
    Counter: "state-dict round trip",
    HiddenFeedback: "state-dict round trip",
    IdleParameter: "parameter 'spare' got no gradient.*without_gradient",
    ForgetsTheBias: r"parameter 'model\.4\.bias' got no gradient",
    NotANumber: "gradient of .* is not finite",
    Infinite: "gradient of .* is not finite",
    ShiftsOutput: "credit.output is not the output of the model",
    ShiftsOutputEvenly: "credit.output is not the output of the model",
    ShiftsOutputInTraining: "credit.output is not the output of the model",
    ReportsAnotherOutput: "credit.output is not the output of the model",
    OwnGenerator: "two runs with one seed",
    FeedbackFromTheClock: "two runs with one seed",
    LeavesBackwardPreHook: "hooks are left on",
    LeavesParameterHook: "hooks are left on",
    ReportsAnotherLoss: "loss",
    Overwrites: "does not add up",
    ChangesTheModel: "state-dict keys or classes",
    ChangesTheWeights: "output",
    SkipsWhatItDoesNotKnow: "neither trained nor refused",
}


@pytest.mark.parametrize(("rule", "message"), FAULTS.items())
def test_planted_fault_is_found_and_named(rule: type[CreditRule], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_rule(rule, skip=SKIP)


@pytest.mark.parametrize("rule", [OwnGenerator, FeedbackFromTheClock])
def test_own_generator_is_found_by_the_determinism_check(rule: type[CreditRule]) -> None:
    with pytest.raises(AssertionError, match="two runs with one seed"):
        CHECKS["determinism"](rule)


def test_declared_exception_is_accepted() -> None:
    check_rule(IdleParameter, without_gradient=("spare",), skip=SKIP)


class ChainsOnly(Exact):
    """Trains Sequentials of dense layers, and says what it misses elsewhere."""

    message = "module '1' (BatchNorm2d) is no part of a chain; remove it"

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            raise UnsupportedModelError(self.message)
        super().__init__(model, loss)


class ChainsOnlyAndForgetful(ChainsOnly):
    def detach(self) -> nn.Module:
        self.model.register_forward_hook(lambda *args: None)
        return self.model


class ChainsOnlyAndWrong(ChainsOnly):
    def signal(self, inputs: Tensor) -> Tensor:
        return torch.tensor(float("nan"), dtype=torch.double)


class RefusesWithoutAName(ChainsOnly):
    message = "this model is no chain; use another rule"


class RefusesByAWrongName(ChainsOnly):
    message = "module 'stem' (BatchNorm2d) is no part of a chain; remove it"


class RefusesByKind(ChainsOnly):
    message = "BatchNorm2d and 1 more module are no part of a chain; remove them"


class RefusesTooLate(ChainsOnly):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_hook(lambda *args: None)
        super().__init__(model, loss)


class RefusesByAnotherError(ChainsOnly):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        try:
            super().__init__(model, loss)
        except UnsupportedModelError as error:
            raise ValueError(str(error)) from error


def test_rules_for_chains_are_judged_on_the_chain() -> None:
    check_rule(ChainsOnly, oracle=lambda rule: None, skip=SKIP)
    assert [network for network, _ in settings(ChainsOnly)] == [dense_network]
    assert len(settings(Exact)) == 2


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ChainsOnlyAndForgetful, "hooks are left on"),
        (ChainsOnlyAndWrong, "gradient of .* is not finite"),
        (RefusesWithoutAName, "names none of its modules: this model is no chain"),
        (RefusesByAWrongName, "names none of its modules: module 'stem'"),
        (RefusesByKind, "names none of its modules"),
        (RefusesTooLate, "is refused, but hooks are left on"),
    ],
)
def test_faults_of_rules_for_chains_are_found(rule: type[CreditRule], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_rule(rule, skip=SKIP)


def test_other_errors_are_no_refusal() -> None:
    with pytest.raises(ValueError, match="no part of a chain"):
        check_rule(RefusesByAnotherError, skip=SKIP)


def test_a_wrong_oracle_limit_of_a_rule_for_chains_is_found() -> None:
    class Doubled(ChainsOnly):
        def signal(self, inputs: Tensor) -> Tensor:
            return torch.tensor(2.0, dtype=torch.double)

    with pytest.raises(AssertionError, match="is not backpropagation"):
        check_rule(Doubled, oracle=lambda rule: None, skip=CHECKS)


def test_skipped_checks_are_skipped() -> None:
    check_rule(SumOverTheBatch, skip=(*SKIP, "batch_mean"))


def test_a_wrong_oracle_limit_is_found() -> None:
    with pytest.raises(AssertionError, match="is not backpropagation"):
        check_rule(apical.FeedbackAlignment, oracle=lambda rule: None, skip=CHECKS)


def test_data_dependent_python_in_a_rule_fails_the_compile_check() -> None:
    class Branches(Exact):
        def signal(self, inputs: Tensor) -> Tensor | None:
            return None if float(inputs.sum()) > 0 else torch.tensor(1.0, dtype=torch.double)

    with pytest.raises(Exception, match=r"(?i)graph|unsupported|data"):
        CHECKS["compile"](Branches)


def test_a_factory_other_processes_cannot_import_is_refused() -> None:
    with pytest.raises(AssertionError, match="importable"):
        CHECKS["distributed"](lambda model, loss: Exact(model, loss))


def test_a_rule_that_sums_over_ranks_differently_is_found() -> None:
    """Batch statistics of one rank are not those of the batch: the ranks agree with each other, not with one process."""
    with pytest.raises(AssertionError, match="two ranks against one process"):
        CHECKS["distributed"](RankDependent)


class RankDependent(Exact):
    def signal(self, inputs: Tensor) -> Tensor:
        return inputs.abs().max()


def test_a_rule_in_the_place_of_its_class_and_unknown_checks_are_said() -> None:
    with pytest.raises(ConfigError, match="give the class, or a function of model and loss; got a FeedbackAlignment"):
        check_rule(apical.FeedbackAlignment(nn.Linear(2, 2)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"skip names no checks: \['compiled'\]; known: .*compile"):
        check_rule(apical.FeedbackAlignment, skip="compiled")
