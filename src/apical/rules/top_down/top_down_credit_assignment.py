"""Top-down credit assignment (Chen, Liu & Wang, arXiv 2208.01416): an evolved network computes credit.

    p = softmax(output),   c_l = T_theta([p ; y])_l,   g_l = 1/B sum_b (d a_l / d psi_l)^T c_l   with a_{l-1} held constant

The credit c_l replaces backpropagation's derivative of the loss with respect to a unit's output; the unit
turns it into a gradient of its parameters by its own Jacobian, so a tanh layer learns by a three-factor rule:
presynaptic activity, postsynaptic slope, credit. Nothing passes from layer to layer, no loss is differentiated, no weight is
transported. The credit's loss is only for reports.

The output's credit c_L stands on the logits. With credit="probabilities" it stands on p, as in the authors' later code, and
goes through the softmax, p (c_L - c_L.p), which silences it where the learner is confidently wrong.

Equations are those of that code; the paper itself could not be read beyond its abstract. Departures: the place of the
output's credit, unless credit="probabilities"; and in a residual block each activation has separate credit, so that no
transposed weight is used at all; there, the code backpropagates one step.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from apical.core.credit import Credit, Loss
from apical.core.cut import CutRule, Units, eagerly
from apical.core.losses import NUMBERS, PLAIN, refuse_options, terms, token_cross_entropy, value_at
from apical.core.outputs import detached, tensors
from apical.core.placement import OUTPUT_CREDIT
from apical.core.positions import class_axis, delivered, is_routed, matched, ordered, routed
from apical.core.signals import Cut, Teacher
from apical.errors import ConfigError, UnsupportedModelError, require_count
from apical.rules.top_down.equivariant import EquivariantNetwork, Feedback, Network
from apical.rules.top_down.teacher import Place, TopDownNetwork, described, load, through_softmax

PROJECTED = 64
"""Number of projected outputs for an unevolved teacher, used if outputs are more than four times as many."""

SHIPPED = Path(__file__).parents[2] / "evolution" / "teachers"


class TopDownCreditAssignment(CutRule):
    """A top-down network maps [prediction, target] to a credit for every unit.

    Args:
        model: any network; the part between two cuts is one unit, see `units`.
        loss: maps (output, targets) to a scalar batch mean; it is reported, and only parameters in it learn from it.
        teacher: the top-down network; or a file written by `apical evolve`; or the name of a shipped one. None
            draws an unevolved one at the first batch, as a control. "digits" serves ten classes; "classes", any number.
        hidden: units in each hidden layer of an unevolved top-down network.
        sites: emission sites per hidden layer of an unevolved one; None gives each unit its own credit.
        silent: give hidden units no credit, as a control: only the last layer learns.
        credit: where the credit of an output of classes stands: on "logits" or on "probabilities". None: where the
            teacher's does; on logits, if it does not say.
        exact: names of modules or parameters without known transport that keep their exact derivative within a unit.
        units, inside: where there are cuts, and what a credit passes within a unit, see :class:`apical.core.cut.CutRule`.

    Raises:
        ConfigError: the teacher file is missing or damaged; `credit` is unknown, or is not what the teacher was made for;
            or targets do not fit the outputs.
        UnsupportedModelError: see :class:`apical.core.cut.CutRule`; or the teacher was made for another number of layers,
            units or outputs.

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
        credit: Place | None = None,
        exact: Collection[str] = (),
        units: Units = "auto",
        inside: Literal["exact", "feedback"] = "exact",
    ) -> None:
        super().__init__(model, loss, "activation", exact, units, inside)
        refuse_options(self, "top-down credit assignment", (*PLAIN, NUMBERS))
        if isinstance(teacher, Path | str):
            teacher = load(shipped(str(teacher)))[0]
        self.credit = place_of(credit, teacher)
        require_count("hidden", hidden)
        if sites is not None:
            require_count("sites", sites)
        self.hidden, self.sites, self.silent = hidden, sites, silent
        seed = torch.randint(2**62, (), device="cpu")  # what is drawn follows from it, on every rank alike
        self.register_buffer("seed", seed)
        self._drawn: dict[tuple[int, ...], TopDownNetwork] = {}  # unevolved teachers; no state dict repeats them
        self._matrices: dict[tuple[Any, ...], Feedback] = {}  # likewise
        for parameter in teacher.parameters() if teacher is not None else ():
            parameter.requires_grad_(False)
        first = next(model.parameters())
        self.teacher = teacher.to(first.device, first.dtype) if teacher is not None else None

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit whose roots carry the top-down credits to the hidden units' outputs and to the model's output."""
        whole, cuts, late = self.run(inputs)
        output, *others = tensors(whole)
        if others:
            raise UnsupportedModelError(
                f"the model has {1 + len(others)} outputs, but top-down credit assignment needs the one that the targets "
                "are for; wrap the model in a module that returns that tensor"
            )
        loss = value_at(self.loss, whole, targets)
        if not isinstance(targets, Tensor):
            raise ConfigError(f"top-down credit needs targets as a tensor, not a {type(targets).__name__}")
        *_, topmost = self._whole.values()
        axis = class_axis(output, targets, isinstance(topmost, _ConvNd))
        moved = axis == 1 and targets.is_floating_point() and targets.dim() == output.dim()
        prediction, target = described(ordered(output.detach(), axis), ordered(targets, axis) if moved else targets)
        classes = not targets.is_floating_point()
        ignores = classes and not self.plain_roots
        if ignores and not self.takes_signals and targets.is_cpu:
            ignores = bool((targets < 0).any())
        if self.takes_signals or prediction.dim() < 3 or not isinstance(self._teacher(prediction, cuts), Network):
            *hidden, last = self.signals(prediction, target, cuts, classes=classes, ignores=ignores)
            late.signal = lambda index, scale: hidden[index] * scale.to(hidden[index].dtype)
        else:
            hidden, last = [], self._later(late, prediction, target, cuts, classes, ignores)
        signals = [*hidden, last.movedim(-1, axis).reshape(output.shape).to(output.dtype)]
        given = signals if self.takes_signals else [*(None for _ in cuts), signals[-1]]
        taught = [
            (root, signal)
            for root, signal in zip((*(cut.root for cut in cuts), output), given, strict=True)
            if root.requires_grad
        ]
        if self.silent:
            taught = taught[-1:]
        taught += terms(loss)
        return Credit.of(taught, detached(whole), loss)

    def signals(
        self, prediction: Tensor, target: Tensor, cuts: list[Cut], classes: bool, ignores: bool = True
    ) -> list[Tensor]:
        """Teaching signals of each hidden unit's shape, and the output's (batch, *places, outputs).

        Args:
            prediction, target: (batch, *places, outputs).
            classes: targets are class indices.
            ignores: rows of the target without a one count for nothing.
        """
        places, rows = prediction.shape[:-1], prediction.numel() // prediction.shape[-1]
        p, y = (part.reshape(rows, -1) for part in (prediction, target))
        credits = [credit.detach() for credit in self._credits(p, y, cuts, classes)]
        if classes and ignores:  # the mean over rows that have a label
            told = y.sum(1, keepdim=True)
            share = told * (rows / told.sum().clamp(min=1))
            credits = [credit * share.view(-1, *(1,) * (credit.dim() - 1)) for credit in credits]
        hidden, last = credits[:-1], credits[-1].view(*places, -1)
        if classes and self.credit == "probabilities":
            last = through_softmax(last, prediction)
        units = zip(hidden, cuts, strict=True)
        return [*(c if cut.name in self._idle else self._delivered(c, cut, places) for c, cut in units), last]

    def _later(
        self, late: Teacher, prediction: Tensor, target: Tensor, cuts: list[Cut], classes: bool, ignores: bool
    ) -> Tensor:
        """The output's credit (batch, *places, outputs); `late` computes each unit's on demand.

        With many positions, the credits of all units together would take more memory than the network's activity.
        """
        places, units = prediction.shape[:-1], [cut.bare() for cut in cuts]
        p, y = (part.flatten(0, -2) for part in (prediction, target))
        teacher, widths = cast(Network, self._teacher(prediction, cuts)), [cut.width for cut in cuts]
        p, y = (part.to(cast(Tensor, teacher.body[0].weight).dtype) for part in (p, y))
        with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
            teacher.check(p.shape[1], widths, classes)
            made = teacher.later(p, y, widths, classes, *self._feedback(teacher, p, cuts))
            told = y.sum(1, keepdim=True) if classes and ignores else y.new_ones(len(y), 1)
            share = told / told.sum().clamp(min=1)

        def emitted(number: int, share: Tensor) -> Tensor:
            return made(number).mul_(share.to(p.dtype)).view(*places, -1)

        late.signal = lambda index, scale: self._delivered(emitted(index, share * scale), units[index], places)
        with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
            last = emitted(-1, share)
        return through_softmax(last, prediction) if classes and self.credit == "probabilities" else last

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """The output's credit applies after the last cuts: p - y, cross-entropy's error, unless it was evolved."""
        is_entropy = self.loss in (F.cross_entropy, token_cross_entropy) or isinstance(self.loss, nn.CrossEntropyLoss)
        own = "exact" if is_entropy and getattr(self.teacher, "output", "evolved") == "error" else OUTPUT_CREDIT
        return {name: path.replace("exact", own) for name, path in super().credit_paths(inputs).items()}

    @staticmethod
    def _delivered(credit: Tensor, cut: Cut, places: torch.Size) -> Tensor:
        """A credit per channel, or one for each of the unit's neurons, as a signal of the unit's shape."""
        if credit.dim() > 2 and credit.shape == cut.shape and cut.rows is None:
            return credit.to(cut.dtype)
        values = credit.view(*places, -1)
        return routed(values, cut) if is_routed(values, cut) else delivered(matched(values, cut), cut)

    def _credits(self, prediction: Tensor, target: Tensor, cuts: list[Cut], classes: bool) -> list[Tensor]:
        """Credits (rows, width) of each unit and (rows, outputs) of the output, one example a row, as parts of a mean."""
        teacher, widths = self._teacher(prediction, cuts), [cut.width for cut in cuts]
        if not isinstance(teacher, Network):
            return [credit / len(prediction) for credit in teacher(prediction, target)]
        teacher.check(prediction.shape[1], widths, classes)
        prediction, target = (part.to(cast(Tensor, teacher.body[0].weight).dtype) for part in (prediction, target))
        emitted = teacher(prediction, target, classes) / len(prediction)
        return teacher.credits(emitted, widths, *self._feedback(teacher, prediction, cuts))

    def _feedback(self, teacher: Network, like: Tensor, cuts: list[Cut]) -> tuple[Feedback, ...]:
        """Matrices for the units, where the teacher needs them; the steps of a recurrent network share one."""
        if not isinstance(teacher, EquivariantNetwork):
            return ()
        names = tuple(self.first_use(cut.name) for cut in cuts)
        place = (like.shape[-1], names, *(cut.width for cut in cuts), like.dtype, like.device)
        if place not in self._matrices:
            self._draw_feedback(teacher, place, like, cuts)
        return (self._matrices[place],)

    @eagerly
    def _draw_feedback(self, teacher: EquivariantNetwork, place: tuple[Any, ...], like: Tensor, cuts: list[Cut]) -> None:
        widths, names = [cut.width for cut in cuts], place[1]
        self._matrices[place] = teacher.feedback(like.shape[-1], widths, int(self.seed), names, like=like)

    def _teacher(self, prediction: Tensor, cuts: list[Cut]) -> nn.Module:
        return self._teacher_of((prediction.shape[-1], *(cut.width for cut in cuts)), prediction.device)

    def _teacher_of(self, sizes: tuple[int, ...], device: torch.device) -> nn.Module:
        """The teacher for an output and units of these sizes; an unevolved one is drawn."""
        if self.teacher is not None:
            return self.teacher
        like = self._drawn[sizes].body[0].weight if sizes in self._drawn else None
        if like is None or like.device != device or like.dtype is not next(self.model.parameters()).dtype:
            self._draw(sizes, device)
        return self._drawn[sizes]

    @eagerly
    def _draw(self, sizes: tuple[int, ...], device: torch.device) -> None:
        """A network for an output and units of these sizes, from the seed."""
        with torch.random.fork_rng([]), torch.device("cpu"):
            torch.manual_seed(int(self.seed) % 2**63)
            projected = PROJECTED if sizes[0] > 4 * PROJECTED else None
            drawn = TopDownNetwork(sizes[0], sizes[1:], self.hidden, self.sites, credit=self.credit, projected=projected)
        self._drawn[sizes] = drawn.to(device, next(self.model.parameters()).dtype).requires_grad_(False)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._drawn.clear()  # the seed changes
        self._matrices.clear()
        super()._load_from_state_dict(*args)


def place_of(credit: Place | None, teacher: nn.Module | None) -> Place:
    """Where the output's credit stands: as asked, or as the teacher was made for.

    Raises:
        ConfigError: there is no such place, or the teacher was made for the other.
    """
    if credit not in (None, *get_args(Place)):
        raise ConfigError(f'credit must be "logits" or "probabilities", not {credit!r}')
    if not isinstance(teacher, Network):
        return credit or "logits"
    if credit not in (None, teacher.credit):
        raise ConfigError(
            f"the teacher's output credit uses {teacher.credit}, not {credit}; leave credit out, or evolve another "
            f"teacher: apical evolve --credit {credit}"
        )
    return teacher.credit


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
