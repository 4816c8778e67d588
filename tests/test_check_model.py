"""check_model finds planted faults and says which, leaves everything as it was, and says what it did not try."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.credit import Credit, CreditRule
from apical.errors import ConfigError, UnsupportedModelError
from apical.testing import check_model
from apical.testing.model import CHECKS

QUICK = ("compiled",)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    return nn.Sequential(*layers).double()


def batch(dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 6, dtype=dtype, generator=generator), torch.randint(4, (8,), generator=generator)


class SilentBackprop(apical.FeedbackAlignment):
    """Has feedback weights, and does not use them."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        self.require_attached()
        output = self.model(inputs)
        loss = self.loss(output, targets)
        return Credit([loss], [None], output, loss)


class Elsewhere(apical.FeedbackAlignment):
    """Feedback of one layer also decides how much a layer above it learns."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        credit = super().forward(inputs, targets)
        loss = credit.loss + self.feedback_weight("2").square().sum() * self.model[4].weight.sum()
        return Credit([loss], [None], credit.output.detach(), loss)


class Leaks(apical.FeedbackAlignment):
    """Adds a little of the exact gradient."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        credit = super().forward(inputs, targets)
        exact = self.loss(self.model(inputs), targets)
        return Credit([credit.loss + 0.1 * exact], [None], credit.output.detach(), credit.loss)


class CutsLeak(apical.DirectFeedbackAlignment):
    """The same with cuts."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        credit = super().forward(inputs, targets)
        exact = self.loss(self.model(inputs), targets)
        return Credit([*credit.roots, exact], [*credit.signals, None], credit.output.detach(), credit.loss.detach())


class OtherOutput(apical.Backprop):
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output = self.model(inputs) + 1
        loss = self.loss(output, targets)
        return Credit([loss], [None], output, loss)


class NotANumber(apical.Backprop):
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        credit = super().forward(inputs, targets)
        return Credit(credit.roots, [torch.tensor(float("nan"), dtype=torch.double)], credit.output, credit.loss)


class Doubled(apical.Backprop):
    """Is not what its placement says."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        credit = super().forward(inputs, targets)
        return Credit(credit.roots, [torch.tensor(2.0, dtype=torch.double)], credit.output, credit.loss)


class SaysFrozen(apical.Backprop):
    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        return super().credit_paths(inputs) | {"2": "frozen"}


class SaysTrained(apical.Backprop):
    """Says that a layer is trained which the model does not use for this batch."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        self.model[2].requires_grad_(False)
        credit = super().forward(inputs, targets)
        self.model[2].requires_grad_(True)
        return credit


class ClaimsOwnSignals(CreditRule):
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output = self.model(inputs)
        loss = self.loss(output, targets)
        return Credit([loss], [None], output, loss)


class Unseeded(apical.Backprop):
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        credit = super().forward(inputs, targets)
        signal = torch.tensor(1 + random.random(), dtype=torch.double)
        return Credit(credit.roots, [signal], credit.output, credit.loss)


class LossIsNoRoot(apical.FeedbackAlignment):
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        credit = super().forward(inputs, targets)
        loss = self.loss(self.model(inputs), targets)
        made = Credit(credit.roots, credit.signals, credit.output, loss)
        made.__class__ = PlainLoss
        return made


class PlainLoss(Credit):
    """Whose loss backpropagates."""

    @property
    def loss(self) -> Tensor:
        return self._loss


class OtherCompiled(apical.Backprop):
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        return super().forward(2 * inputs if torch.compiler.is_compiling() else inputs, targets)


class OtherUnderAutocast(apical.Backprop):
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        return super().forward(-inputs if torch.is_autocast_enabled("cpu") else inputs, targets)


class SmallBatchesFail(apical.Backprop):
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        credit = super().forward(inputs, targets)
        factor = 1.0 if len(inputs) == 8 else float("nan")
        return Credit(credit.roots, [torch.tensor(factor, dtype=torch.double)], credit.output, credit.loss)


FAULTS = {
    SilentBackprop: "changing the feedback of layer '2' changes nothing below it",
    Elsewhere: r"changing the feedback of layer '2' changes '4\.weight', which is not below it",
    Leaks: "with zero feedback of layer '2' an error still reaches '0",
    OtherOutput: "credit.output is not what the model answers",
    NotANumber: "gradient of .* is not finite",
    SaysFrozen: r"'2\.weight' is said to be 'frozen', but it got a gradient",
    SaysTrained: r"'2\.weight' is said to be 'exact', but it got no gradient",
    Doubled: "under backpropagation the gradient of .* is not backpropagation's",
    ClaimsOwnSignals: "said to have a signal of its own, but all gradients are backpropagation's",
    Unseeded: "two steps from one seed differ|not backpropagation's",
    LossIsNoRoot: "does not make three times the gradient",
    OtherUnderAutocast: "under autocast the update turns by",
    SmallBatchesFail: "on a batch of 4 the gradient of .* is not finite",
}


@pytest.mark.parametrize(("kind", "message"), FAULTS.items())
def test_planted_faults_are_found_and_named(kind: Callable[..., CreditRule], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_model(kind(network(), F.cross_entropy), *batch(), skip=QUICK)


@pytest.mark.compiles
def test_another_update_when_compiled_is_found() -> None:
    with pytest.raises(AssertionError, match=r"compiled, the gradient of .* is another one"):
        check_model(OtherCompiled(network()), *batch())


def test_exact_errors_round_the_cuts_are_found() -> None:
    with pytest.raises(AssertionError, match="with all signals zero an error still reaches '0"):
        check_model(CutsLeak(network()), *batch(), skip=QUICK)


@pytest.mark.parametrize(
    "kind", [apical.Backprop, apical.FeedbackAlignment, apical.KolenPollack, apical.DeepFeedbackControl]
)
def test_everything_is_left_as_it_was_found(kind: Callable[..., CreditRule]) -> None:
    rule = kind(network())
    rule(*batch()).backward()
    state = {name: value.clone() for name, value in rule.state_dict().items()}
    grads = {name: q.grad.clone() for name, q in rule.named_parameters() if q.grad is not None}
    ids = {name: id(q.grad) for name, q in rule.named_parameters()}
    attributes, random_state = set(rule.__dict__), torch.get_rng_state()
    check_model(rule, *batch(), skip=QUICK)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(rule.__dict__) == attributes
    assert rule.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in rule.state_dict().items())
    assert {name: id(q.grad) for name, q in rule.named_parameters()} == ids
    assert all(torch.equal(dict(rule.named_parameters())[name].grad, grad) for name, grad in grads.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [apical.Backprop, apical.FeedbackAlignment])
def test_models_in_lower_precision(kind: Callable[..., CreditRule], dtype: torch.dtype) -> None:
    report = check_model(kind(network().to(dtype)), *batch(dtype), skip=QUICK)
    assert "feedback = weight" in report.passed or kind is apical.Backprop


def test_the_report_says_what_was_tried_and_what_not() -> None:
    report = check_model(apical.FeedbackAlignment(network()), *batch(), skip=QUICK)
    assert report.passed["feedback = weight"] == "2 layers"
    assert report.passed["batch sizes"] == "8 and 4 samples"
    assert report.skipped["compiled"] == "skipped on request"
    assert report.skipped["zero signals"] == "the rule makes no cuts"
    assert report.passed.keys() | report.skipped.keys() == CHECKS.keys()
    assert not report.passed.keys() & report.skipped.keys()
    text = str(report)
    assert "checks passed" in text
    assert str(report.placement) in text


def test_sequences_are_tried_in_three_lengths() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.act, self.out = nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.act(self.read(x)).mean(1))

    report = check_model(apical.FeedbackAlignment(Mean()), torch.randn(8, 6, 5), torch.arange(8) % 4, skip=QUICK)
    assert report.passed["lengths"] == "lengths 6, 5, 3"


@pytest.mark.compiles
def test_compiled_is_checked_or_said_why_not() -> None:
    assert check_model(apical.FeedbackAlignment(network()), *batch()).passed["compiled"] == "aot_eager"

    class Draws(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5)

    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Draws(8, 4)).double()
    assert "random" in check_model(apical.Backprop(model), *batch()).skipped["compiled"]


def test_a_refusal_comes_through() -> None:
    with pytest.raises(UnsupportedModelError, match="'1'"):
        check_model(apical.FeedbackAlignment(nn.Sequential(nn.Linear(6, 8), nn.Bilinear(8, 8, 4))), *batch())


class OnAGraph(nn.Module):
    """Takes as many rows as the graph has nodes, one of its layers without any unit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.none, self.c, self.edges = nn.Linear(6, 8), nn.Linear(8, 0), nn.Linear(8, 4), torch.eye(8).double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.edges @ self.a(x))
        return self.c(torch.cat([h, torch.relu(self.none(h))], 1))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", [apical.FeedbackAlignment, apical.WeightMirror, apical.ProductFeedbackAlignment])
def test_batches_that_the_model_does_not_take_are_not_tried(kind: Callable[..., CreditRule]) -> None:
    report = check_model(kind(OnAGraph().double()), *batch(), skip=QUICK)
    assert report.skipped["batch sizes"] == "the model takes batches of this size only"


@pytest.mark.parametrize("kind", [apical.DirectFeedbackAlignment, apical.PredictiveCoding])
def test_a_batch_without_any_gradient_accuses_nobody(kind: Callable[..., CreditRule]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    with pytest.raises(ConfigError, match="all gradients of the loss are zero"):
        check_model(kind(model), batch()[0], torch.zeros(8, dtype=torch.long), skip=QUICK)


def test_unknown_checks_are_refused() -> None:
    with pytest.raises(ValueError, match="colour"):
        check_model(apical.Backprop(network()), *batch(), skip=("colour",))


class SilentInName(apical.TopDownCreditAssignment):
    """Says that hidden units get no signal, and sends them one."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        self.silent = False
        credit = super().forward(inputs, targets)
        self.silent = True
        return credit


def test_a_control_that_teaches_hidden_units_all_the_same_is_found() -> None:
    with pytest.raises(AssertionError, match=r"'0\.weight' is said to be 'no credit', but it got a gradient"):
        check_model(SilentInName(network(), silent=True), *batch(), skip=QUICK)


class BackpropUnderAutocast(apical.FeedbackAlignment):
    """Has feedback weights of its own only in full precision."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(inputs, targets)
        output = self.model(inputs)
        loss = self.loss(output, targets)
        return Credit([loss], [None], output, loss)


def chain_with_kinks(seed: int, width: int = 16, depth: int = 5) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Activations |x|, some units of which lie so near their kink that rounding decides the sign of their derivative."""
    torch.manual_seed(seed)
    model = nn.Sequential(*apical.models.flow(width, depth).children(), nn.Linear(width, 10))
    return model, torch.randn(16, width), torch.randint(10, (16,))


@pytest.mark.parametrize(("depth", "seed"), [(5, 1), (20, 1), (50, 7)])
@pytest.mark.parametrize("kind", [apical.FeedbackAlignment, apical.DirectFeedbackAlignment, apical.SignSymmetry])
def test_units_at_a_kink_may_change_sides_under_autocast(kind: Callable[..., CreditRule], depth: int, seed: int) -> None:
    model, inputs, targets = chain_with_kinks(seed, depth=depth)
    others = CHECKS.keys() - {"autocast"}
    report = check_model(kind(model), inputs, targets, skip=others)
    assert "degrees" in report.passed["autocast"]


@pytest.mark.parametrize("depth", [5, 50])
def test_another_update_under_autocast_is_found_in_spite_of_kinks(depth: int) -> None:
    model, inputs, targets = chain_with_kinks(4, depth=depth)
    with pytest.raises(AssertionError, match=r"turns by \d+ degrees; rounding to bfloat16 explains \d+"):
        check_model(BackpropUnderAutocast(model), inputs, targets, skip=CHECKS.keys() - {"autocast"})


@pytest.mark.parametrize("silent", [False, True])
def test_a_last_unit_of_two_layers_may_have_feedback_between_them(silent: bool) -> None:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.LayerNorm(7), nn.Linear(7, 4))
    rule = apical.TopDownCreditAssignment(
        nn.Sequential(*layers).double(), silent=silent, units="activation", inside="feedback"
    )
    report = check_model(rule, *batch(), skip=QUICK)
    assert report.placement.path("2") == "own feedback"
    assert report.placement.path("0") == ("no credit" if silent else "cut at '1'")
    assert "zero signals" in report.passed


class Skipping(nn.Module):
    """A block that chance leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.last((h + self.block(h)).relu() if float(torch.rand(())) < 0.5 else h)


def test_a_rule_that_draws_before_a_model_that_draws_is_not_accused() -> None:
    """The weight mirror's noise comes first, so the model's chance is another than in backpropagation with the same seed."""
    for seed in range(4):
        torch.manual_seed(seed)
        rule = apical.WeightMirror(Skipping(), warmup=1)
        report = check_model(rule, torch.randn(8, 6), torch.arange(8) % 4, skip=("compiled", "autocast"))
        assert "determinism" in report.passed


class Narrow(nn.Linear):
    """float64 parameters, float32 arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


@pytest.mark.parametrize("kind", [apical.Backprop, apical.FeedbackAlignment, apical.TopDownCreditAssignment])
def test_precision_is_that_of_the_arithmetic(kind: type[apical.CreditRule]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Narrow(6, 8), nn.ReLU(), Narrow(8, 7), nn.ReLU(), Narrow(7, 4)).double()
    check_model(kind(model), torch.randn(8, 6).double(), torch.arange(8) % 4, skip=("compiled", "autocast"))


def test_what_is_no_rule_and_one_check_by_its_name() -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(8, 4), torch.arange(8) % 3
    with pytest.raises(ConfigError, match=r"a rule around your model, such as FeedbackAlignment\(model\); got a Sequential"):
        check_model(model, x, y)  # type: ignore[arg-type]
    assert "compiled" in check_model(apical.FeedbackAlignment(model), x, y, skip="compiled").skipped


def test_a_frozen_last_layer_accuses_nobody() -> None:
    """As an adapter's, which trains hidden layers alone."""
    model = network()
    model[4].requires_grad_(False)
    report = check_model(apical.DirectFeedbackAlignment(model), *batch(), skip=QUICK)
    assert report.passed["zero signals"] == "0 parameters of the last unit"
    assert report.placement.path("4") == "frozen"


def test_lengths_that_a_rule_refuses_are_said_and_accuse_nobody() -> None:
    """A row of feedback for each neuron of a map serves maps of one size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    rule = apical.DirectFeedbackAlignment(nn.Sequential(nn.Unflatten(1, (1, -1)), model))
    report = check_model(rule, torch.randn(8, 12).double(), torch.arange(8) % 3, skip=QUICK)
    assert report.skipped["lengths"].startswith("the rule refuses sequences of length 11: the feedback of unit")


class Refined(nn.Module):
    """Each cell refines a state that came from below, by a message made of it, as gated graph networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
        self.cells = nn.ModuleList([nn.GRUCell(5, 5), nn.GRUCell(5, 5)])

    def forward(self, x: Tensor) -> Tensor:
        state = self.embed(x)
        for cell in self.cells:
            for _ in range(2):
                state = cell(torch.relu(state), state)
        return self.head(state)


def test_a_cells_state_is_another_way_down() -> None:
    report = check_model(apical.FeedbackAlignment(Refined().double()), *batch(), skip=QUICK)
    assert report.passed["zero feedback"] == "5 layers"


class Branch(nn.Module):
    """A residual branch that begins with a zero weight, or that a tiny scale makes small beside what rounding hides."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.c, self.skip, self.out = (nn.Linear(*n) for n in ((6, 8), (8, 8), (8, 8), (8, 8), (8, 4)))
        self.scale = scale
        if scale == 1:
            nn.init.zeros_(self.c.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        branch = self.c(torch.relu(self.b(torch.relu(h.detach() if self.scale < 1 else h))))
        return self.out(self.skip(h).float().to(x) + self.scale * branch)


@pytest.mark.parametrize("scale", [1, 1e-9])
def test_branches_that_hardly_count_accuse_nobody(scale: float) -> None:
    torch.manual_seed(0)
    rule = apical.FeedbackAlignment(Branch(scale).double(), first_layer=True)
    report = check_model(rule, *batch(), skip=QUICK)
    assert report.passed["zero feedback"] == "5 layers"


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_a_gradient_that_is_rounding_alone_is_no_fault(seed: int, dtype: torch.dtype) -> None:
    """A bias before a batch normalisation: its error sums to zero, and what is left differs from step to step."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)),
    ).to(dtype)
    inputs, targets = torch.randn(8, 3, 8, 8).to(dtype), torch.randint(3, (8,))
    for rule in (apical.Backprop(model), apical.FeedbackAlignment(model)):
        check_model(rule, inputs, targets, skip=["compiled"])
        rule.detach()
    with pytest.raises(AssertionError, match="changes nothing below it"):
        check_model(SilentBackprop(model), inputs, targets, skip=["compiled"])
