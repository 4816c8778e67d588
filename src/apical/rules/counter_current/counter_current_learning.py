"""Counter-current learning (Kao & Hariharan, NeurIPS 2024, arXiv 2409.19841).

Two networks of mirrored shape run in opposite directions and train each other. F maps inputs x to outputs, G maps targets
(the one-hot code of every class; or the target images of an autoencoder) to the input space. Every block's input is
detached, so a loss at a depth reaches only the two blocks that meet there:

    forward   a_l     = f_l(sg(a_{l-1}))        a_0 = x,   l = 1..L      f_l: layer, normalisation, activation, pooling
    feedback  b_{l-1} = g_l(sg(b_l))            b_L = I (a row per class), or the targets
    pairs     ell_l(a_l, b_l)                   l < L, descended by both sides
    output    ell_L = the loss of a_L, for f_L alone

With A, B the flattened rows of a pair, and M[i, k] = 1 where sample i is of class k:

    inner     (256 s / d_l) mean (A B^T - M)^2                                   the authors' code for perceptrons
    cosine    the same with rows of unit length, and anti-collapse terms          that for convolutions
    match     both sides' distance, and that of their centred maps               that for autoencoders

Their gradients have closed forms (:mod:`apical.rules.counter_current.pairing`) and are propagated through one block
each (:mod:`apical.core.teaching`). Local: an update needs the two activities at its depth, its
block's input, and the label. G never reads F, so both may run at the same time, and no update waits for a layer above.

Departures. The paper uses the identity as the target of a pair and rows of unit length everywhere; its code, followed
here, uses the membership matrix M, and no normalisation for perceptrons. g_1 and the input pair are left out by default: no
prediction depends on them (`input_pair=True` keeps them).
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.batch import fitted, require_classes, require_memory, require_one_type, require_samples
from apical.core.blocks import Block, blocks, through
from apical.core.containers import Containers
from apical.core.credit import Batch, Credit, CreditRule, Loss, Measures, Root, depth_accuracies
from apical.core.effective import weight_now
from apical.core.feedback import put
from apical.core.layers import is_weighted
from apical.core.losses import output_error, refuse_options, require_dependence, terms
from apical.core.part import Part
from apical.core.placement import layer_paths
from apical.core.rest import evaluating
from apical.core.similarity import linear_cka
from apical.core.teaching import Activity, Taught, Teaching
from apical.core.transport import geometry
from apical.errors import ConfigError, require_choice, unknown_name
from apical.rules.counter_current.codes import FreeCodes, draw_orthogonal, held
from apical.rules.counter_current.mirror import Enlarge, facing, follow, mirrored, mirrors
from apical.rules.counter_current.pairing import EPSILON, Pulled, cosine, inner, match, membership

Pair = Literal["auto", "inner", "cosine", "match"]
Feedback = Literal["mirror", "frozen", "free", "none"]

SURE = 0.1
"""The mask of the authors' code omits samples whose class probability is within this distance of 1."""


def exact(device: str) -> AbstractContextManager[object]:
    """Disable autocast inside; free where autocast is off."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class CounterCurrentLearning(CreditRule):
    """Two anti-parallel networks that train each other by local losses.

    Args:
        model: a row of blocks (see :func:`apical.core.blocks.blocks`): Linear and convolution layers with
            normalisation, activations and pooling, one after another.
        loss: maps (output, targets) to a scalar batch mean; it trains only the last block.
        pair: "inner", "cosine" or "match"; "auto" is "inner" for perceptrons and "cosine" for models with convolutions.
        scale: s, weight of the pairs' losses; None: 0.5 for "inner", otherwise 1.
        spread: r, weight of the anti-collapse terms of "cosine"; above 0 samples of a batch depend on each other. None: 0.5
            for "cosine" with convolutions, otherwise 0.
        feedback: "mirror" builds G from the model; "frozen" does too, but does not train G; "free" replaces G by trainable
            codes at every depth (per-layer classifiers); "none" has no pairs, so that only the last block learns.
            Or a list of G's modules, from the top: the first maps codes (K, K) to (K, *output of block L-1), and so
            on, down to the first block's output or to the input.
        input_pair: keep g_1 and the pair at the input, although no prediction depends on them.
        mask: omit from the pairs the samples whose class already has a probability above 0.9.
        enlarge: how G enlarges images, "nearest" or "transposed" (see :func:`apical.rules.counter_current.mirror.mirrored`).
        orthogonal: draw G as the authors' autoencoder does: orthogonal, a thousand times smaller in blocks that enlarge
            images, zero in the block that reconstructs the input.
        input_shape: of one sample; required for models with convolutions.

    Raises:
        UnsupportedModelError: the model is not such a sequence, or a layer has no mirror; the message names the layer.
        ConfigError: an option is out of range; or, in use, targets do not fit the pairs' loss.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 3))
    >>> rule = CounterCurrentLearning(model)
    >>> rule(torch.randn(8, 4), torch.randint(3, (8,))).backward()
    >>> {name: tuple(v.shape) for name, v in rule.feedback_weights().items()}
    {'2': (5, 6), '4': (3, 5)}
    >>> tuple(rule.predict(torch.randn(8, 4), depth=1).shape)
    (8,)
    """

    classes: Tensor

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        pair: Pair = "auto",
        scale: float | None = None,
        spread: float | None = None,
        feedback: Feedback | Sequence[nn.Module] | nn.Sequential | nn.ModuleList = "mirror",
        input_pair: bool = False,
        mask: bool = False,
        enlarge: Enlarge = "nearest",
        orthogonal: bool = False,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, loss)
        refuse_options(self, "counter-current learning", ("ignore_index", "reduction"))
        require_choice("pair", pair, ("auto", "inner", "cosine", "match"))
        require_choice("enlarge", enlarge, ("nearest", "transposed"))
        self.head, self.row = blocks(model, input_shape)
        self._containers = Containers(model)
        images = any(geometry(block.layer) is not None for block in self.row)
        self.pair = ("cosine" if images else "inner") if pair == "auto" else pair
        self.scale = (0.5 if self.pair == "inner" else 1.0) if scale is None else scale
        self.spread = (0.5 if images and self.pair == "cosine" else 0.0) if spread is None else spread
        if not (0 < self.scale < math.inf and 0 <= self.spread < math.inf):
            raise ConfigError(f"scale must be positive and spread not negative, got scale={scale}, spread={spread}")
        if self.spread and self.pair != "cosine":
            raise ConfigError(f"spread is an option of pair='cosine'; pair={self.pair!r} has no anti-collapse terms")
        if self.pair == "match" and (mask or feedback == "free"):
            raise ConfigError("pair='match' uses no class labels, so mask and feedback='free' do not apply")
        self.mask, self.input_pair = mask, input_pair
        self.feedback = nn.ModuleList(self._feedback(feedback, enlarge))
        self._mirrors = mirrors(self.feedback)
        self._forth = [Taught(block.modules) for block in self.row[:-1]]
        self._back = [Taught(tuple(module) if isinstance(module, nn.Sequential) else (module,)) for module in self.feedback]
        top, like = self.row[-1].shape, self.row[-1].like
        if self.pair != "match":
            require_memory(
                f"codes of {math.prod(top)} classes",
                2 * math.prod(top) ** 2 * like.element_size(),
                like,
                "counter-current learning takes networks with few outputs, or pair='match', which needs no codes",
            )
        codes = torch.empty(0 if self.pair == "match" else math.prod(top), *top, dtype=like.dtype, device=like.device)
        self.register_buffer("classes", codes, persistent=False)  # b_L
        _one_hot(self)
        self.register_load_state_dict_post_hook(_one_hot)  # type: ignore[no-untyped-call]  # `to_empty` leaves garbage
        if orthogonal and isinstance(feedback, str):
            draw_orthogonal(self.row, self.feedback)
        if isinstance(feedback, str) and feedback == "frozen":
            self.feedback.requires_grad_(False)
        taught = {id(p) for module in self.row[-1].modules for p in module.parameters()}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in taught]
        self._still = others if isinstance(feedback, str) and feedback == "none" else []
        for parameter in self._still:  # with several processes, all wait for every possible gradient
            parameter.requires_grad_(False)

    def detach(self) -> nn.Module:
        """See :meth:`apical.core.credit.CreditRule.detach`; parameters that "none" froze may learn again."""
        for parameter in self._still:
            parameter.requires_grad_(True)
        return super().detach()

    def _feedback(self, feedback: object, enlarge: Enlarge) -> list[nn.Module]:
        """G's modules from the top."""
        depths = len(self.row) - (not self.input_pair)
        if not isinstance(feedback, str):
            return self._checked(feedback)
        if feedback == "none" or not depths:
            return []
        if feedback == "free":
            below = [self.row[level].input_shape for level in range(len(self.row) - 1, len(self.row) - 1 - depths, -1)]
            return [FreeCodes(math.prod(self.row[-1].shape), shape, self.row[-1].like) for shape in below]
        if feedback not in ("mirror", "frozen"):
            raise unknown_name("feedback", feedback, ("mirror", "frozen", "free", "none"))
        return list(mirrored(self.row, enlarge, depths))

    def _checked(self, feedback: object) -> list[nn.Module]:
        """Take the user's feedback network, and run it once to check its shapes."""
        modules = list(feedback) if isinstance(feedback, Sequence | nn.Sequential | nn.ModuleList) else []
        if len(modules) not in (len(self.row) - 1, len(self.row)) or not all(isinstance(m, nn.Module) for m in modules):
            wanted = f"{len(self.row) - 1} modules, or {len(self.row)} with one that reconstructs the input"
            raise ConfigError(f"feedback takes {wanted}; got {len(modules)}")
        self.input_pair = len(modules) == len(self.row)
        like = self.row[-1].like
        b = like.new_zeros(2, *self.row[-1].shape)
        for block, module in zip(reversed(self.row), modules, strict=False):
            with evaluating(module), torch.no_grad():
                b = module(b)
            if b.shape[1:] != block.input_shape:
                shape = tuple(b.shape[1:])
                raise ConfigError(
                    f"the feedback module facing layer {block.name!r} returns shape {shape}, not {block.input_shape}"
                )
        return modules

    @property
    def _levels(self) -> range:
        """Depths of the pairs."""
        return range(len(self.row) - len(self.feedback), len(self.row) if self.feedback else 0)

    def feedback_parameters(self) -> list[nn.Parameter]:
        """The weights of G."""
        return list(self.feedback.parameters())

    def feedback_weights(self) -> dict[str, Tensor]:
        """G's weights by the name of the layer of F opposite them (:func:`apical.rules.counter_current.mirror.facing`)."""
        weights = {}
        for block, module in list(zip(reversed(self.row), self.feedback, strict=False))[::-1]:
            layers = [layer for layer in module.modules() if is_weighted(layer)]
            weight = facing(weight_now(layers[0]), block.layer, layers[0]) if len(layers) == 1 else None
            if weight is not None:
                weights[block.name] = weight
        return weights

    def set_feedback(self, layer: str, **matrices: Tensor) -> None:
        """Set `G`, the weight of the feedback block opposite a layer, (d_{l-1}, d_l) or a kernel; or free codes `B`.

        Raises:
            ConfigError: unknown layer or symbol, or a wrong shape.
        """
        handles = {block.name: held(m) for block, m in zip(reversed(self.row), self.feedback, strict=False)}
        put(type(self).__name__, layer, handles, matrices)

    @torch.no_grad()
    def states(self, inputs: Tensor, targets: Tensor) -> dict[str, list[Tensor]]:
        """Activities "a", a_0..a_L (batch, ...), and codes "b", b_0..b_L (K, ...), in evaluation mode; nothing is learned.

        With "match" the codes are (batch, ...). Depths without a block of the feedback network have an empty b.
        """
        targets = self._check(inputs, targets)
        with evaluating(self):
            return {"a": self._activities(inputs), "b": self.codes(targets)}

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch with class labels (batch,) or, for "match", target outputs (batch, ...)."""
        self.require_attached()
        targets = self._check(inputs, targets)
        self._containers.require_intact(inputs, lambda x: self._activities(x)[-1])
        follow(self._mirrors)
        learns, teaching, levels = torch.is_grad_enabled(), Teaching(), self._levels
        with torch.no_grad():
            b = self._codes(targets, learns)
            goals = self._goals(targets)
            a, local = Activity(self._prepared(inputs)), {}
            waiting: dict[int, Activity] = {}  # for the mask, which depends on the output
            for level in range(len(self.row)):
                a = self._forth[level - 1](a.made, learns) if level else a
                if level in levels and self.mask:
                    waiting[level] = a
                elif level in levels:  # immediately, while the activity is in the cache
                    local[level] = self._meet(level, a, b[level], goals, teaching)
        output = self.row[-1](a.made.detach())
        with torch.no_grad():
            unsure = self._unsure(output, targets) if self.mask else None
            for level, activity in waiting.items():
                local[level] = self._meet(level, activity, b[level], goals, teaching, unsure)
        loss = self._teach_output(output, targets, teaching)
        return Credit.of(teaching.roots, output.detach(), loss, self._logs(local, loss))

    def _teach_output(self, output: Tensor, targets: Tensor, teaching: Teaching) -> Tensor:
        """Train the last block and return the loss."""
        targets = fitted(self.loss, output, targets)
        if self.pair == "match" and self._height > 1:  # only the error grows with the images, not other terms
            loss, error = output_error(self.loss, output, targets)
            teaching.teach(Activity(output), error * self._height)
            teaching.roots += terms(loss)
        else:
            loss = self.loss(output, targets)
            if output.requires_grad and not torch.compiler.is_compiling():
                require_dependence(loss, output)
            teaching.loss(loss)
        return loss

    def chain(self, input_shape: Sequence[int]) -> tuple[list[nn.Module], list[Block]]:
        """See :class:`apical.core.part.Separable`."""
        return self.head, self.row

    def learn_part(self, part: Part, inputs: Tensor, targets: Tensor) -> tuple[list[Root], Tensor | None]:
        """See :class:`apical.core.part.Separable`; a part holds the blocks of G that compute the codes at its depths."""
        if self.mask:
            raise ConfigError("with mask=True pairs wait for the output, so parts cannot learn in parallel; pass mask=False")
        if part.below is None:
            targets = self._check(inputs, targets)
        follow(self._mirrors)
        first, last, teaching = part.levels.start, len(self.row), Teaching()
        pairs = [level for level in self._levels if first < level <= part.levels.stop or level == first == 0]
        a, b = {}, {}

        def descend(code: Tensor) -> None:
            for level in reversed(pairs):
                b[level] = self._back[last - 1 - level](code, True)
                code = b[level].made
            if part.below is not None:
                part.below.send(code)

        with torch.no_grad():
            if part.above is None:
                descend(self._top(targets))
            a[first] = Activity(self._prepared(inputs) if part.below is None else part.below.receive())
            for level in range(first, min(part.levels.stop, last - 1)):
                a[level + 1] = self._forth[level](a[level].made, True)
            if part.above is not None:
                part.above.send(a[part.levels.stop].made.detach())
                descend(part.above.receive())
            goals = self._goals(targets)
            for level in pairs:
                self._meet(level, a[level], b[level], goals, teaching)
        loss = None
        if part.above is None:
            loss = self._teach_output(self.row[-1](a[last - 1].made.detach()), targets, teaching)
        return teaching.roots, loss

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """Exact for the last block, whose loss is the model's; for image outputs the error is multiplied by their height."""
        scaled = self.pair == "match" and self._height > 1
        return layer_paths(self.model, inputs, "signal of its own", exact=() if scaled else (self.row[-1].name,))

    def _logs(self, local: dict[int, Tensor], loss: Tensor) -> dict[str, Tensor]:
        """The pairs' losses ell_l by F's layer below (or "input"), and their sum."""
        names = {level: self.row[level - 1].name if level else "input" for level in local}
        total = torch.stack(list(local.values())).sum() if local else loss.new_zeros(())
        return {"local": total, **{f"local {names[level]}": value for level, value in local.items()}}

    def _prepared(self, inputs: Tensor) -> Tensor:
        """a_0."""
        return through(self.head, inputs)

    def _goals(self, targets: Tensor) -> Tensor:
        """M (batch, K); with "match", the targets."""
        return targets if self.pair == "match" else membership(targets, len(self.classes), self.classes.dtype)

    def _top(self, targets: Tensor | None) -> Tensor:
        """b_L."""
        if self.pair != "match":
            return self.classes
        assert targets is not None
        return targets.reshape(len(targets), *self.row[-1].shape).to(self.row[-1].like.dtype)

    def _codes(self, targets: Tensor | None, learns: bool) -> list[Activity]:
        """b_0..b_L; depths without a block of G are empty."""
        b = [Activity(self._top(targets))]
        for module in self._back:
            b.append(module(b[-1].made, learns))
        empty = Activity(self.row[-1].like.new_empty(0))
        return [empty] * (len(self.row) + 1 - len(b)) + b[::-1]

    def _meet(
        self, level: int, a: Activity, b: Activity, goals: Tensor, teaching: Teaching, unsure: Tensor | None = None
    ) -> Tensor:
        """Train the two blocks that meet at a depth, and return the pair's loss."""
        if level:
            self.row[level - 1].require_shape(a.made)
        if self.pair == "inner" and a.block is not None and unsure is None:  # vectors in the weights' own precision
            loss, for_a, for_b = inner(a.made, b.made, goals, self.scale)
            teaching.teach(a, for_a)
            teaching.teach(b, for_b)
            return loss
        with exact(goals.device.type):
            loss, for_a, for_b = self._pull(level, a.made.detach(), b.made.detach(), goals, unsure)
            teaching.teach(a, for_a)
            teaching.teach(b, for_b)
        return loss

    def codes(self, targets: Tensor | None = None) -> list[Tensor]:
        """G's pass: b_0..b_L, each (K, ...), or (batch, ...) for "match"; depths without a block of G are empty."""
        with torch.no_grad():
            return [activity.made for activity in self._codes(targets, learns=False)]

    def _pull(self, level: int, a: Tensor, b: Tensor, goals: Tensor, unsure: Tensor | None) -> Pulled:
        """The pair of one depth."""
        dtype = self.row[-1].like.dtype
        a, b = a.to(dtype), b.to(dtype)
        if self.pair == "match":
            height = a.shape[2] if a.dim() > 2 else 1
            return match(a.flatten(1), b.flatten(1), self.scale * height) if level == 0 else match(a, b, self.scale)
        a, b = a.flatten(1), b.flatten(1)
        a = a if unsure is None else a * unsure
        loss, for_a, for_b = (
            inner(a, b, goals, self.scale) if self.pair == "inner" else cosine(a, b, goals, self.scale, self.spread)
        )
        return loss, for_a if unsure is None else for_a * unsure, for_b

    @property
    def _height(self) -> int:
        """H_L, the height of the model's output images."""
        return self.row[-1].image[1] if len(self.row[-1].image) > 1 else 1

    def _unsure(self, output: Tensor, labels: Tensor) -> Tensor:
        """1 for samples whose class is still uncertain, otherwise 0; (batch, 1)."""
        sure = output.detach().flatten(1).float().softmax(1).gather(1, labels.unsqueeze(1)) > 1 - SURE
        return (~sure).to(self.row[-1].like.dtype)

    def _check(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The targets, with labels as indices."""
        require_samples(inputs)
        if targets.dim() == 0 or len(targets) != len(inputs):
            raise ConfigError(f"{len(inputs)} inputs came with targets of shape {tuple(targets.shape)}")
        like = self.row[-1].like
        require_one_type(type(self).__name__, like, [self.classes])
        classes = not targets.is_floating_point() and targets.dim() == 1
        if self.pair != "match" and not classes:
            raise ConfigError(f"counter-current learning with pair={self.pair!r} needs one class label per sample")
        if self.pair != "match":
            require_classes(targets, len(self.classes))
        elif not (targets.is_floating_point() and targets[0].numel() == math.prod(self.row[-1].shape)):
            raise ConfigError("counter-current learning with pair='match' needs targets of the output's size")
        return targets.long() if classes else targets

    def _activities(self, inputs: Tensor) -> list[Tensor]:
        """a_0..a_L."""
        a = [self._prepared(inputs)]
        for block in self.row:
            a.append(block(a[-1]))
        return a

    def measures(self, probe: Batch, test: Sequence[Batch]) -> Measures:
        """The similarity (linear CKA) of each pair on the probe batch, and the accuracy of the read-outs."""
        likeness = {name: {"pair_cka": linear_cka(a, b)} for name, (a, b) in self.pairs(*probe).items()}
        return Measures(layers=likeness, depths=depth_accuracies(self.read_outs, test))

    @torch.no_grad()
    def pairs(self, inputs: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The two activities at each depth, both (batch, d), by the name of F's layer below; in evaluation mode."""
        targets = self._check(inputs, targets)
        with evaluating(self):
            a, b = self._activities(inputs), self.codes(targets)
        own = [row if self.pair == "match" or not len(row) else row[targets] for row in b]
        return {self.row[level - 1].name: (a[level].flatten(1), own[level].flatten(1)) for level in self._levels if level}

    @torch.no_grad()
    def read_outs(self, inputs: Tensor) -> dict[str, Tensor]:
        """:meth:`predict` at every depth, by the name of the layer; empty where there are no classes."""
        if self.pair == "match":
            return {}
        with evaluating(self):
            a, b = self._activities(inputs), self.codes()
        levels = [*(level for level in self._levels if level), len(self.row)]
        return {self.row[level - 1].name: self._nearest(level, a[level], b[level]) for level in levels}

    @torch.no_grad()
    def predict(self, inputs: Tensor, depth: int | None = None) -> Tensor:
        """Return classes (batch,) read out at a depth 1..L: the nearest code of G there; at L (default) the model's output.

        Raises:
            ConfigError: this depth has no read-out.
        """
        last = len(self.row)
        depth = last if depth is None else depth
        if self.pair == "match" or depth not in (*self._levels, last):
            there = "none" if self.pair == "match" else ", ".join(map(str, (*self._levels, last)))
            raise ConfigError(f"there is no read-out at depth {depth}; depths with one: {there}")
        with evaluating(self):
            return self._nearest(depth, self._activities(inputs)[depth], self.codes()[depth])

    def _nearest(self, depth: int, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.flatten(1), b.flatten(1)
        if depth == len(self.row):
            return a.argmax(1)
        return (a @ (b / (b.norm(dim=1, keepdim=True) + EPSILON) if self.pair == "cosine" else b).T).argmax(1)


def _one_hot(rule: CounterCurrentLearning, _: object = None) -> None:
    """The codes of the classes, (K, *shape of the output)."""
    rule.classes.copy_(torch.eye(len(rule.classes), device="cpu").view_as(rule.classes))
