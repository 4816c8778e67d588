"""Direct feedback alignment (Noekland, arXiv 1609.01596).

    e = dL/d output,   error at hidden activity h_l:  B_l e,   dW_l = ((B_l e) * f'(a_l)) h_{l-1}^T,   B_l fixed and random

Every hidden unit receives the output error directly; nothing waits for the layers above, and no weight is transported. The
last layer learns by its exact gradient, which is local.

"full" feedback gives each neuron of a feature map its own row of B_l. "broadcast" gives each channel one number for the
whole map, as in the code of arXiv 2108.13446, which applies it at the layers' inputs and lets exact errors leak through
residual connections; `leaky=True` does the same, for comparison with its published numbers.

If a network has outputs at many positions (tokens, pixels), each position of a unit receives its own error through
one matrix (outputs, channels); units with other positions receive the sum, see :mod:`apical.core.positions`. So do units
with tokens in a network with one output, in equal parts: the number of tokens may vary.

With many outputs (a vocabulary), one matrix Q maps them to the width of the head's input, and each unit has a small
P_l: B_l = Q P_l. Or P_l receives the error at the head's input, through the head's weight (Launay et al., arXiv 2006.12878).
"""

import copy
from collections.abc import Collection, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, Literal, cast
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from apical.core.activations import is_activation
from apical.core.blocks import Block, blocks, through
from apical.core.credit import Attention, Credit, Loss, Root
from apical.core.cut import CutRule, Units, eagerly
from apical.core.effective import weight_now
from apical.core.layers import computes_plainly
from apical.core.losses import require_dependence, terms
from apical.core.outputs import detached, output_errors, side_by_side, tensors
from apical.core.part import Part
from apical.core.plain_chain import Sender
from apical.core.positions import class_axis, delivered, is_routed, matched, neurons, ordered, routed
from apical.core.signals import Cut, HandedOn, Teacher
from apical.core.transport import geometry, pads_itself, transport
from apical.core.units import Layer, key
from apical.errors import ConfigError, UnsupportedModelError, require_choice

SOURCES = ("auto", "output", "factored", "head")


class Matrices(nn.Module):
    """B_l by unit. Copies of a rule that has not yet seen all units draw the same matrices as the rule.

    Averages of parameters and buffers are copies that see no batch (`torch.optim.swa_utils.AveragedModel(rule)`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._copies = WeakSet[Matrices]()

    def add(self, name: str, matrix: Tensor) -> None:
        """Keep a matrix that was drawn."""
        self.register_buffer(name, matrix)
        for copied in self._copies:
            if name not in copied._buffers:
                copied.add(name, matrix.clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Matrices":
        result = memo[id(self)] = Matrices()
        result._buffers.update(copy.deepcopy(self._buffers, memo))
        self._copies.add(result)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_copies"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._copies = WeakSet()


class DirectFeedbackAlignment(CutRule):
    """The output error reaches every hidden unit directly through a fixed random matrix.

    B_l is drawn from the Xavier uniform law of its shape (outputs, neurons) when its unit is first seen; all follow from one
    seed and the units' names. At feature maps it is scaled down as the layers above shrink errors: see `scale`.

    Args:
        model: any network; the part between two cuts is one unit, see `units`.
        loss: maps (output, targets) to a scalar batch mean.
        feedback: "auto": a matrix (outputs, channels) at tokens, and at every position if the network has many outputs; a
            row for each neuron of a map if there is one output. "full": a row for each neuron in any case, for the
            errors of all positions. "broadcast": one number per channel in any case (at dense units all are the same).
            "position": as "auto", but units must have the positions of the output (else refused). With `leaky`, broadcast
            sends the error through a transposed convolution with a fixed kernel of the layer's geometry.
        leaky: replace the error at every weighted layer's input instead of after every activation, so that
            residual connections still carry exact errors.
        exact: names of modules or parameters without known transport that keep their exact derivative within a unit.
        units, inside: where the cuts are, and which path errors take within a unit, see :class:`apical.core.cut.CutRule`.
        source: what the matrices receive: "output", the error there; "factored", that error times one fixed random matrix
            (outputs, width of the head's input) for all units; "head", the error at the head's input, through the head's own
            weight: this is weight transport; a unit that the head reads directly receives this error itself. "auto" is
            "factored" for positional outputs whose number exceeds twice the head's inputs.
        scale: of feedback to feature maps. "map": full feedback has the norm of true errors at the start of training. It is
            divided by the square root of the number of positions that averaging above the unit pools, and multiplied by
            the gain, if below 1, of each layer above it that all paths pass and no normalisation follows: the root mean
            square of its weight over that of the Xavier law, 0.58 for a square layer in PyTorch's default initialisation.
            (Max-pooling does not change their norm.) Broadcast feedback is divided by the number of positions of
            the map. "xavier": neither; errors grow with the map. `leaky` always uses the latter.
        attention: which parts of attention's backward pass are kept: "exact", "fixed" or "present"; see
            :mod:`apical.core.attention`.

    Raises:
        ConfigError: unknown feedback, units, inside, source or scale.
        UnsupportedModelError: see :class:`apical.core.cut.CutRule`.

    >>> model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    >>> rule = DirectFeedbackAlignment(model)
    >>> credit = rule(torch.randn(8, 4), torch.arange(8) % 3)
    >>> credit.backward()
    >>> {name: tuple(b.shape) for name, b in rule.feedback.named_buffers()}
    {'1': (3, 5)}
    """

    seed: Tensor
    projection: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        feedback: Literal["auto", "full", "broadcast", "position"] = "auto",
        leaky: bool = False,
        exact: Collection[str] = (),
        units: Units = "auto",
        scale: Literal["map", "xavier"] = "map",
        source: Literal["auto", "output", "factored", "head"] = "auto",
        inside: Literal["exact", "feedback"] = "exact",
        attention: Attention = "exact",
    ) -> None:
        require_choice("feedback", feedback, ("auto", "full", "broadcast", "position"))
        require_choice("scale", scale, ("map", "xavier"))
        require_choice("source", source, SOURCES)
        super().__init__(model, loss, "input" if leaky else "activation", exact, units, inside)
        self.attention = attention
        self.kind, self.source = feedback, source
        self.scale = "xavier" if leaky else scale
        self.feedback = Matrices()
        seed = torch.randint(2**62, (), device="cpu")  # all matrices follow from it, on every rank alike
        self.register_buffer("seed", seed)
        self.register_buffer("projection", None)  # Q
        self._places = self._order()
        self._read: list[bool] = []  # which of several outputs the loss reads

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit whose root is the loss: its error enters the last unit directly and the others as `B_l e`."""
        output, cuts, teacher = self.run(inputs)
        if isinstance(output, Tensor) and output.requires_grad and not self.takes_signals:
            return self._one_root(output, targets, cuts, teacher)
        outputs = tensors(output)
        loss, found = output_errors(self.loss, output, targets, traced=self.plain_roots)
        found = self._as_read(found, output, targets)
        self.require_ends(output, found)
        read = [(part, error) for part, error in zip(outputs, found, strict=True) if error is not None]
        convolution = isinstance(self._topmost(), _ConvNd)
        errors = side_by_side([e for _, e in read], [class_axis(part, targets, convolution) for part, _ in read])
        if not torch.is_grad_enabled():
            cuts = []  # validation, perhaps with other outputs
        heard = self._heard(errors) if cuts else errors
        self._prepare_all(cuts, heard)
        signals: list[Tensor | None] = []
        if self.takes_signals:
            signals = [None if cut.name in self._idle else self.signal(cut, heard) for cut in cuts]
        else:
            units = [cut.bare() for cut in cuts]
            teacher.signal = lambda index, scale: self.signal(units[index], _times(heard, scale))
            signals = [None for _ in cuts]
        taught: list[tuple[Tensor, Tensor | None]] = [
            (cut.root, signal) for cut, signal in zip(cuts, signals, strict=True) if cut.root.requires_grad
        ]
        taught += [(part, error) for part, error in read if part.requires_grad]
        taught += terms(loss)
        return Credit.of(taught, detached(output), loss)

    def _as_read(self, errors: list[Tensor | None], output: Any, targets: Any) -> list[Tensor | None]:
        """The same, with None for outputs the loss does not read; a compiled or transformed loss gives zeros for those."""
        if len(errors) > 1 and torch.is_grad_enabled():
            if not self.takes_signals:
                self._read = [error is not None for error in errors]
            elif len(self._read) != len(errors):
                self._look(detached(output), targets)
            errors = [error if read else None for error, read in zip(errors, self._read, strict=True)]
        return errors

    @eagerly
    def _look(self, output: Any, targets: Any) -> None:
        """Record which outputs the loss reads, outside the compiled graph."""
        self._read = [error is not None for error in output_errors(self.loss, output, targets)[1]]

    def _one_root(self, output: Tensor, targets: Tensor, cuts: list[Cut], teacher: Teacher) -> Credit:
        """The same with the model's one output in one backward pass: the loss hands `e` to the output, which hands it on."""
        axis = class_axis(output, targets, isinstance(self._topmost(), _ConvNd))
        like = ordered(output.detach(), axis)
        factor = self._source(like) if cuts else None
        if factor is not None:
            like = like[..., :1].expand(*like.shape[:-1], factor.shape[1])
        self._prepare_all(cuts, self._flat(like))
        units = [cut.bare() for cut in cuts]
        hear = partial(_hear, self, axis, teacher, units)
        read = cast(Tensor, cast(Any, HandedOn).apply(output, hear, *(cut.root for cut in cuts)))
        loss = self.loss(read, targets)
        require_dependence(loss, read)
        chain = self.plain_chain()
        self._by_hand = chain if chain is not None and chain.note(self, targets) else None
        return Credit([loss], [None], output.detach(), loss)

    def senders_by_hand(self, inputs: Tensor) -> list[Sender] | None:
        """`B_l e` for each unit of a plain chain, for :meth:`apical.core.plain_chain.PlainChain.credit`."""
        chain = self.plain_chain()
        if chain is None or self.silent or self.plain_roots or self._idle or self.source not in ("auto", "output"):
            return None
        units = [self.feedback._buffers.get(self._at(stage.activation_name)) for stage in chain.stages[:-1]]
        widths = [stage.layer.weight.shape[0] for stage in chain.stages]
        if any(b is None or b.shape != (widths[-1], width) for b, width in zip(units, widths, strict=False)):
            return None
        return [partial(_sent, cast(Tensor, b)) for b in units]

    def chain(self, input_shape: Sequence[int]) -> tuple[list[nn.Module], list[Block]]:
        """See :class:`apical.core.part.Separable`."""
        self._head_modules, self._blocks = blocks(self.model, input_shape)
        return self._head_modules, self._blocks

    def learn_part(self, part: Part, inputs: Tensor, targets: Tensor) -> tuple[list[Root], Tensor | None]:
        """See :class:`apical.core.part.Separable`; every part receives the same output error.

        The blocks are those of :meth:`chain`; the rule must have seen a batch, which determines the units.
        """
        units = [] if self._separation is None else self._separation.units
        if self.where == "input" or self._inner or len(units) != len(self._blocks) - 1:
            raise UnsupportedModelError(
                "direct feedback alignment learns by parts only if every block but the last is one unit that ends with an "
                f"activation; here {len(self._blocks)} blocks have {len(units)} units. Leave out leaky, inside and units, "
                "and put one activation after each layer"
            )
        activities: dict[int, Tensor] = {}
        with torch.no_grad():
            h = through(self._head_modules, inputs) if part.below is None else part.below.receive()
        for level in part.levels:
            modules = self._blocks[level].modules
            end = 1 + max((i for i, module in enumerate(modules) if is_activation(module)), default=len(modules) - 1)
            end = len(modules) if level == len(units) else end
            activities[level] = through(modules[:end], h.detach())
            with torch.no_grad():
                h = through(modules[end:], activities[level].detach())
        taught: list[Root] = []
        loss = None
        if part.above is not None:
            part.above.send(h)
            heard = part.above.receive()
        else:
            output = activities.pop(len(units))
            loss, (error,) = output_errors(self.loss, output, targets)
            assert error is not None
            heard = self._heard(side_by_side([error], [class_axis(output, targets, isinstance(self._topmost(), _ConvNd))]))
            taught = [(output, error), *terms(loss)]
        if part.below is not None:
            part.below.send(heard)
        for level, h in activities.items():
            axis = 1 if h.dim() > 2 and isinstance(self._blocks[level].layer, _ConvNd) else -1
            taught.append((h, self.signal(Cut(h.detach(), h.shape, h.dtype, units[level], axis), heard)))
        return taught, loss

    def signal(self, cut: Cut, errors: Tensor) -> Tensor:
        """`B_l e` for one hidden unit, of the unit's shape (batch, ...), from errors (batch, *places, outputs).

        With another `source`, that signal replaces the errors.
        """
        if self._hears_itself(cut):
            return delivered(matched(errors, cut), cut)
        b = cast(Tensor, self.feedback._buffers[self._at(cut.name)]).to(errors.dtype)
        if len(cut.shape) == 2 and errors.dim() == 2 and cut.rows is None is cut.answers and len(errors) == cut.shape[0]:
            return (errors @ b).to(cut.dtype)
        if b.dim() > 2:  # a kernel of the layer that reads this tensor
            return _broadcast(self.layers[cut.name.split("#")[0]], b, cut.shape, errors).to(cut.dtype)
        if is_routed(errors, cut):
            return routed(errors @ b, cut)
        return delivered(matched(errors, cut) @ b, cut, divided=self.scale == "map")

    def _heard(self, errors: Tensor) -> Tensor:
        """What the matrices receive: (batch, *places, outputs or head inputs), or all positions of an output flattened."""
        factor = self._source(errors)
        if factor is not None:
            half = errors.dtype in (torch.float16, torch.bfloat16)
            with torch.no_grad(), torch.autocast(errors.device.type, enabled=False):
                errors = errors.float() @ factor.float() if half else errors @ factor.to(errors.dtype)
        return self._flat(errors)

    def _flat(self, heard: Tensor) -> Tensor:
        return heard.flatten(1) if self.kind == "full" and heard.dim() > 2 else heard

    def _source(self, errors: Tensor) -> Tensor | None:
        """The matrix that multiplies errors of this shape before feedback; None if feedback uses the errors themselves."""
        kind, outputs = self.source, errors.shape[-1]
        if kind == "auto":
            head = weight_now(self._topmost())
            is_wide = errors.dim() > 2 and self.kind != "full" and self.where == "activation"
            kind = "factored" if is_wide and outputs > 2 * head.shape[1] else "output"
        if kind == "output":
            return None
        return self._head(outputs).weight.detach() if kind == "head" else self._factor(outputs, errors.device)

    def _factor(self, outputs: int, device: torch.device) -> Tensor:
        """Q (outputs, head inputs)."""
        if self.projection is None:
            self._draw_projection((outputs, weight_now(self._topmost()).shape[1]), device)
        projection = cast(Tensor, self.projection)
        if projection.shape[0] != outputs:
            raise ConfigError(
                f"the feedback has {projection.shape[0]} outputs, but the loss reads {outputs}; create a new rule"
            )
        return projection

    def _head(self, outputs: int) -> Layer:
        """The layer whose output is the model's.

        Raises:
            UnsupportedModelError: there is no such layer, or it is not a plain Linear.
        """
        for name in self.heads:
            layer = self.layers[name]
            if geometry(layer) is None and computes_plainly(layer) and layer.weight.shape[0] == outputs:
                return layer
        raise UnsupportedModelError(
            "source='head' sends the error through the Linear layer that returns the model's output, but there is "
            "no such layer; pass source='factored'"
        )

    def _hears_itself(self, cut: Cut) -> bool:
        """Whether the unit's error is that at the head's input, which is local to the head."""
        return self.source == "head" and self.readers.get(cut.name) in self.heads

    @property
    def remarks(self) -> list[str]:
        """Weights that errors pass through."""
        head = "The error at the head's input goes through the head's own weight (source='head'): that is weight transport."
        return [*super().remarks, *([head] if self.source == "head" else [])]

    def set_feedback(self, name: str, B: Tensor) -> None:
        """Set the feedback matrix of a unit, by the name of the unit or of a weighted layer whose error crosses its cut.

        Args:
            name: of the unit ("relu1", "relu1#2") or layer.
            B: (outputs, neurons of the unit) or, one number per channel, (outputs, channels); see `feedback`. Where another
                `source` than the output is used, the width of the head's input replaces the outputs.

        Raises:
            ConfigError: there is no such unit, or the matrix has another shape.
        """
        unit = name
        paths = self._separation.paths if self._separation is not None else {}
        if name in paths and self._at(name) not in self.feedback._buffers:
            above = sorted({self.first_use(unit) for units, _ in paths[name] for unit in units})
            if len(above) != 1 or not above[0]:
                has = "learns by its exact gradient" if above == [""] else f"reads the units {', '.join(map(repr, above))}"
                raise ConfigError(f"layer {name!r} {has}; set_feedback needs the name of one unit")
            unit = above[0]
        matrix = self.feedback._buffers.get(self._at(unit))
        if matrix is None:
            known = sorted(b.replace("/", ".").strip(".") for b in self.feedback._buffers)
            names = ", ".join(known) or "none before the first batch"
            raise ConfigError(f"set_feedback: there is no unit or layer {name!r} with feedback; units: {names}")
        if B.shape != matrix.shape:
            raise ConfigError(
                f"set_feedback: B of unit {unit!r} is {tuple(matrix.shape)}, outputs by neurons, not {tuple(B.shape)}"
            )
        matrix.copy_(B)

    def _at(self, unit: str) -> str:
        """Key of a unit's matrix: one for all steps of a recurrent network."""
        return key(self.first_use(unit))

    def _topmost(self) -> Layer:
        return next(reversed(self._whole.values()))

    def _prepare_all(self, cuts: list[Cut], heard: Tensor) -> None:
        for cut in cuts:
            if not (self._hears_itself(cut) or cut.name in self._idle):
                self._prepare(cut, heard)

    def _prepare(self, cut: Cut, errors: Tensor) -> None:
        """Draw the matrix of a unit seen for the first time, or check that it fits."""
        if cut.shape[0] != errors.shape[0] and not is_routed(errors, cut) and self.where == "activation":
            matched(errors, cut)  # raises here rather than in the backward pass
        size, at = self._size(cut, errors), self._at(cut.name)
        matrix = self.feedback._buffers.get(at)
        if matrix is None:
            is_map = len(size) == 2 and size[1] > cut.width  # each neuron with its own row
            share = self._shares.get(cut.name, 1.0) if is_map and self.scale == "map" else 1.0
            if self.projection is not None:
                outputs, inner = self.projection.shape
                share /= _product_law(outputs, inner, cut.width)
            if self.kind == "position" and matched(errors, cut).dim() < max(3, errors.dim()):
                raise UnsupportedModelError(
                    f"the unit at {cut.name!r} has outputs of shape {tuple(cut.shape)}, with other positions than the "
                    "model's output; pass feedback='auto', which sends it the sum of the errors"
                )
            self._draw(self.first_use(cut.name), size, share, errors.device)
        elif matrix.shape != size:
            raise ConfigError(
                f"the feedback of unit {cut.name!r} has the shape {tuple(matrix.shape)}, but this batch needs "
                f"{tuple(size)}: maps or outputs have another size; feedback='broadcast' accepts maps of any size"
            )

    def _size(self, cut: Cut, errors: Tensor) -> tuple[int, ...]:
        outputs = errors.shape[-1]
        dense, are_tokens = len(cut.shape) == 2, cut.axis == -1 and self.where == "activation" and self.kind != "full"
        if self.where == "input" and self.kind == "broadcast" and not dense:
            return (outputs, cut.shape[1], *self.layers[cut.name.split("#")[0]].weight.shape[2:])
        if dense or self.kind == "broadcast" or errors.dim() > 2 or are_tokens:
            return (outputs, cut.width)
        return (outputs, neurons(errors, cut))

    def _order(self) -> dict[str, int]:
        """Positions of the units in registration order, from which seeds follow: independent of the first batch."""
        first, kinds = next(iter(self._whole)), self._whole if self.where == "input" else self._cutting.activations
        names = [name for name, _ in self.model.named_modules() if name in kinds or name == first]
        return {name: place for place, name in enumerate(names[names.index(first) + 1 :])}

    @eagerly
    def _draw(self, name: str, size: tuple[int, ...], share: float, device: torch.device) -> None:
        place = self._places.get(name)
        if place is None:  # further uses, functions, blocks: by name
            place = int.from_bytes(sha256(name.encode()).digest()[:7], "big")
        self.feedback.add(key(name), self._drawn(size, place).div_(share**0.5).to(device))

    @eagerly
    def _draw_projection(self, size: tuple[int, ...], device: torch.device) -> None:
        self.projection = self._drawn(size, int.from_bytes(sha256(b"projection").digest()[:7], "big")).to(device)

    def _drawn(self, size: tuple[int, ...], place: int) -> Tensor:
        """A matrix from the Xavier uniform law."""
        generator = torch.Generator().manual_seed((int(self.seed) + place) % 2**63)
        empty = torch.empty(size, dtype=next(self.model.parameters()).dtype, device="cpu")
        return nn.init.xavier_uniform_(empty, generator=generator)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        start, own = f"{prefix}feedback.", self.feedback._buffers
        held = {name.removeprefix(start): value for name, value in state_dict.items() if name.startswith(start)}
        for name in own.keys() - held.keys():  # from before the first batch; redrawn from the seed of that state
            del own[name]
        for name in (name for name in held if name not in own):  # in their order, which a set would not keep
            self.feedback.register_buffer(name, torch.empty_like(held[name], device=self.seed.device))
        projection = state_dict.get(f"{prefix}projection")
        self.projection = None if projection is None else torch.empty_like(projection, device=self.seed.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _product_law(outputs: int, inner: int, width: int) -> float:
    """Factor on the squared entries of P with which Q P follows the Xavier law of (outputs, width).

    Args:
        outputs, inner: of Q, which has the Xavier law.
        width: of P, which has the Xavier law except for this factor.

    >>> _product_law(50, 8, 8)
    1.0
    """
    return (outputs + inner) * (inner + width) / (2 * inner * (outputs + width))


def _hear(rule: DirectFeedbackAlignment, axis: int, teacher: Teacher, units: list[Cut], error: Tensor) -> None:
    """Computes the units' signals from the error at the output."""
    heard = rule._heard(ordered(error, axis))
    teacher.signal = lambda index, _: rule.signal(units[index], heard)


def _sent(b: Tensor, delta: Tensor, error: Tensor) -> Tensor:
    """`B_l e` (batch, neurons) from the error at the output (batch, outputs)."""
    return error.mm(b.to(error.dtype))


def _times(errors: Tensor, scale: Tensor) -> Tensor:
    """The product; the scale is usually 1, which is free to check on the CPU."""
    return errors if scale.is_cpu and float(scale) == 1.0 else errors * scale


def _broadcast(layer: Layer, kernel: Tensor, shape: torch.Size, errors: Tensor) -> Tensor:
    """Send the error at every output position of the layer to its input through a fixed kernel (outputs, c_in, k...)."""
    backward = geometry(layer)
    if backward is None or backward.transposed or pads_itself(layer):
        raise ConfigError(
            "leaky broadcast feedback is defined only for convolutions with symmetric zero padding; use "
            'feedback="full" or leaky=False'
        )
    with torch.no_grad():
        spatial = layer.forward(layer.weight.new_zeros(1, *shape[1:])).shape[2:]
    everywhere = errors.view(*errors.shape, *(1,) * len(spatial)).expand(*errors.shape, *spatial)
    template = errors.new_empty(1).expand(shape)
    return transport(backward._replace(groups=1), everywhere.contiguous(), kernel, template)
