"""Top-down credit assignment (Chen, Liu & Wang, arXiv 2208.01416): an evolved network hands out credit.

    p = softmax(output),   c_l = T_theta([p ; y])_l,   g_l = 1/B sum_b (d a_l / d psi_l)^T c_l   with a_{l-1} held constant

The credit c_l stands where backpropagation would put the derivative of the loss with respect to a unit's output; the unit
turns it into a gradient of its own parameters by its own Jacobian, so a tanh layer learns by a three-factor rule:
presynaptic activity, postsynaptic slope, credit. Nothing passes from layer to layer, no loss is differentiated, no weight is
transported. The loss that the credit reports is for people alone. Credits on class probabilities go through the softmax.

Equations are those of the authors' later code; the paper itself could not be read beyond its abstract. A departure: in a
residual block each activation has credit of its own, so that no transposed weight is used at all; there, the code
backpropagates one step.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import Credit, Loss
from apical.core.cut import Cut, CutRule, eagerly
from apical.core.losses import refuse_options, terms, value_at
from apical.core.top_down import TopDownNetwork, described, load, spread, through_softmax
from apical.errors import ConfigError

SHIPPED = Path(__file__).parent.parent / "evolution" / "teachers"


class TopDownCreditAssignment(CutRule):
    """A top-down network maps [prediction, target] to a credit for every unit.

    Args:
        model: network whose activations are modules; what lies between two activations is one unit.
        loss: maps (output, targets) to a scalar batch mean; it is reported, and only parameters in it learn from it.
        teacher: the top-down network; or a file written by `apical evolve`; or the name of a shipped one ("digits"). None
            draws an unevolved one at the first batch, as a control.
        hidden: units in each hidden layer of an unevolved top-down network.
        sites: emission sites per hidden layer of an unevolved one; None gives each unit a credit of its own.
        silent: hand out no credit to hidden units, as a control: only the last layer learns.
        exact: names of modules or parameters without known transport that keep their exact derivative within a unit.

    Raises:
        ConfigError: the teacher file is missing or damaged.
        UnsupportedModelError: no activation modules between the layers; or, at the first batch, the teacher was made for
            another number of layers, units or outputs.

    >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    >>> rule = TopDownCreditAssignment(model, teacher=TopDownNetwork(3, [5], hidden=8))
    >>> rule(torch.randn(8, 4), torch.arange(8) % 3).backward()
    >>> [name for name, p in model.named_parameters() if p.grad is not None]
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    seed: Tensor

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        teacher: nn.Module | Path | str | None = None,
        hidden: int = 30,
        sites: int | None = None,
        silent: bool = False,
        exact: Collection[str] = (),
    ) -> None:
        super().__init__(model, loss, "activation", exact)
        refuse_options(loss, "top-down credit assignment")
        if isinstance(teacher, Path | str):
            teacher = load(shipped(str(teacher)))[0]
        self.hidden, self.sites, self.silent = hidden, sites, silent
        self.register_buffer("seed", torch.randint(2**62, ()))  # an unevolved teacher follows from it, on every rank alike
        self._drawn: list[TopDownNetwork] = []  # the unevolved teacher; in a list, so that no state dict repeats it
        self._checked = False
        for parameter in teacher.parameters() if teacher is not None else ():
            parameter.requires_grad_(False)
        first = next(model.parameters())
        self.teacher = teacher.to(first.device, first.dtype) if teacher is not None else None

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit whose roots carry the top-down credits to the hidden units' outputs and to the model's output."""
        output, cuts, late = self.run(inputs)
        loss = value_at(self.loss, output, targets)
        prediction, target = described(output.detach(), targets)
        signals = self.signals(prediction, target, cuts, output, classes=not targets.is_floating_point())
        late.signal = lambda index, scale: signals[index] * scale.to(signals[index].dtype)
        given = signals if self.takes_signals else [*(None for _ in cuts), signals[-1]]
        taught = [
            (root, signal)
            for root, signal in zip((*(cut.root for cut in cuts), output), given, strict=True)
            if root.requires_grad
        ]
        if self.silent:
            taught = taught[-1:]
        taught += [(term, None) for term in terms(loss)]
        return Credit([root for root, _ in taught], [signal for _, signal in taught], output.detach(), loss)

    def signals(self, prediction: Tensor, target: Tensor, cuts: list[Cut], output: Tensor, classes: bool) -> list[Tensor]:
        """Teaching signals of each hidden unit's shape and the output's, for predictions and targets (batch, outputs)."""
        widths = [cut.shape[1] for cut in cuts]
        if self.teacher is None and (not self._drawn or self._drawn[0].body[0].weight.device != prediction.device):
            self._draw(prediction.shape[1], widths)
        teacher = self.teacher if self.teacher is not None else self._drawn[0]
        counts = target.sum(1) if classes else torch.ones_like(target[:, 0])  # 0 where the loss ignores the label
        if isinstance(teacher, TopDownNetwork):
            if not self._checked:
                teacher.check(prediction.shape[1], widths)
                self._checked = True
            emitted = _share(teacher(prediction, target), counts)  # the batch mean of (1), where it costs least
            credits = teacher.credits(emitted, widths)
        else:
            credits = [_share(credit, counts) for credit in teacher(prediction, target)]
        *hidden, last = (credit.detach() for credit in credits)
        if classes:
            last = through_softmax(last, prediction)
        return [
            *(spread(credit, cut.shape).to(cut.dtype) for credit, cut in zip(hidden, cuts, strict=True)),
            last.view(output.shape).to(output.dtype),
        ]

    @eagerly
    def _draw(self, outputs: int, widths: list[int]) -> None:
        like = next(self.model.parameters())
        with torch.random.fork_rng([]):
            torch.manual_seed(int(self.seed) % 2**63)
            drawn = TopDownNetwork(outputs, widths, self.hidden, self.sites)
        self._drawn = [drawn.to(like.device, like.dtype).requires_grad_(False)]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._drawn = []  # the seed changes
        super()._load_from_state_dict(*args)


def _share(credit: Tensor, counts: Tensor) -> Tensor:
    """Each sample's share of the mean of credits (batch, ...) over the samples that count, (batch,) of ones and zeros."""
    return credit * counts.view(-1, *[1] * (credit.dim() - 1)) / counts.sum()


def shipped(name: str) -> str:
    """Path of the teacher shipped under that name; any other name is a path already."""
    path = SHIPPED / f"{name}.pt"
    if path.exists():
        return str(path)
    if not Path(name).exists():
        known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.pt"))) or "none"
        raise ConfigError(
            f"there is no teacher file {name} (shipped teachers: {known}); `apical evolve --out DIR` writes one"
        )
    return name
