"""Local classifiers: every block has its own loss, and no error crosses blocks.

    h_l = f_l(sg(h_{l-1})),   h_0 = x,   l = 1..L                      sg: no error goes back
    prediction   ell_l = ell(M_l pool(h_l) + c_l, y)                   the model's loss of a linear read-out, 0 at first
    projection   the same without c_l and pooling, M_l drawn at random           (Mono-Forward)
    similarity   ell_l = mean (S(P_l h_l) - S(Y))^2                    S: cosines of a batch's centred rows, (B, B)
    both         (1 - beta) prediction + beta similarity
    output       ell of h_L, for the last block alone

For images S uses each channel's standard deviation over pixels. S(Y) is 1 for samples of the same class and -1/(K-1) for
others. Every gradient at h_l has a closed form and is propagated through one block, so activities of one block are kept at a
time. Local: a block needs its input, its own read-out and the label.

Sources: Nokland & Eidnes 2019, arXiv 1901.06656, and its code; Mono-Forward, arXiv 2501.09238.
Departures: one optimiser and one backward for all blocks, which is exactly the code's order of steps (each block passes on
its output from before its step). A sample that silences a block has no direction and gets no similarity signal; the code has
NaN. With "both" the read-outs and the last block descend their whole loss; the code gives them the share 1 - beta of
it: its Adam cancels this factor, but plain SGD would leave them a hundredth of their rate. Mono-Forward answers from its
read-outs' scores; here the model's last block answers.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.activations import is_activation
from apical.core.batch import fitted, require_classes, require_one_type, require_samples
from apical.core.blocks import Block, blocks, through
from apical.core.containers import Containers
from apical.core.credit import Batch, Credit, CreditRule, Loss, Measures, Root, depth_accuracies
from apical.core.layers import is_random
from apical.core.local import block_roots
from apical.core.losses import output_error, refuse_options, terms, value_at
from apical.core.part import Part
from apical.core.placement import layer_paths
from apical.core.processes import gathered
from apical.core.rest import evaluating
from apical.core.teaching import Activity, Taught, Teaching
from apical.core.units import key
from apical.errors import ConfigError, UnsupportedModelError, require_choice, require_count

Local = Literal["prediction", "similarity", "both", "projection"]
LOCALS: tuple[Local, ...] = ("prediction", "similarity", "both", "projection")

EPSILON = 1e-8
"""Added to lengths by the authors' code."""

_AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def class_similarity(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """S(Y) of one-hot labels (B,), without a product: 1 within a class, -1/(K-1) between classes; (B, B).

    With several processes it includes the columns of all.
    """
    same = (labels.unsqueeze(1) == gathered(labels)).to(dtype)
    return same - (1 - same) / (classes - 1)


def similarity(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """`mean (S(rows) - wanted)^2` and its gradient, for rows (B, d) and wanted (B, B).

    Rows of zero length, up to rounding, have no direction; their gradient is zero. Several processes compare each own row
    with those of all, wanted then (B, sum of all B); the average of their gradients is that of the whole batch.
    """
    centred = rows - rows.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    far = length + EPSILON
    u = centred / far
    every = gathered(u)
    miss = u @ every.T - wanted  # D: (B, B)
    pulled = (4 / miss.numel()) * (miss @ every)
    along = (pulled * u).sum(1, keepdim=True) * far / length.clamp_min(EPSILON)
    pulled = (pulled - u * along) / far  # through the division by the length
    silent = length <= EPSILON + 2 * torch.finfo(rows.dtype).eps * rows.norm(dim=1, keepdim=True)
    pulled = pulled.masked_fill(silent, 0.0)
    return miss.square().mean(), pulled - pulled.mean(1, keepdim=True)


def described(activity: Tensor) -> Tensor:
    """Input of S, (B, d): flat activities; for images with more than 3 channels, each channel's deviation over pixels."""
    if activity.dim() > 2 and activity.shape[1] > 3 and activity.shape[2] > 1:
        return activity.flatten(2).std(2)
    return activity.flatten(1)


def window(image: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Average-pooling window that reduces an image (channels, *sides) to at most `most` numbers, doubling sides in turn.

    >>> window((64, 16, 16), 4096), window((64, 16, 16), 4095)
    ((2, 2), (4, 2))
    """
    channels, *sides = image
    kernel = [1] * len(sides)
    turn = 0
    while channels * math.prod(_after(sides, kernel)) > most and any(k < n for k, n in zip(kernel, sides, strict=True)):
        axis = turn % len(sides)
        kernel[axis] = min(2 * kernel[axis], sides[axis])
        turn += 1
    return tuple(kernel)


def _after(sides: Sequence[int], kernel: Sequence[int]) -> list[int]:
    return [math.ceil(n / k) for n, k in zip(sides, kernel, strict=True)]


class _Hidden:
    """A hidden block: the modules before its own loss, and trailing dropout, which comes after the loss."""

    def __init__(self, block: Block, most: int) -> None:
        modules = list(block.modules)
        while is_random(modules[-1]) and not is_activation(modules[-1]):
            modules.pop()
        self.block, self.taught, self.behind = block, Taught(modules), block.modules[len(modules) :]
        is_image = 2 <= len(block.image) <= 4 and not isinstance(block.layer, nn.Linear)
        self.image = block.image if is_image else ()
        self.window = window(self.image, most) if self.image and most else ()
        sizes = _after(self.image[1:], self.window) if self.window else block.shape
        self.features = math.prod(sizes) * (self.image[0] if self.window else 1)

    def handed_on(self, h: Tensor) -> Tensor:
        """The next block's input, without gradient."""
        above = h.detach()
        for module in self.behind:
            above = module(above.clone())
        return above

    def pooled(self, h: Tensor) -> Tensor:
        """Input of a read-out, (batch, features)."""
        if self.window and max(self.window) > 1:
            h = _AVERAGES[len(self.window)](h.view(-1, *self.image), self.window, ceil_mode=True)
        return h.flatten(1)

    def projection(self) -> nn.Module:
        """P_l: a bias-free map of the block's output to its own size; 3 x 3 for outputs of convolutions."""
        like = self.block.like
        if self.image:
            kind, channels = _CONVOLUTIONS[len(self.image) - 1], self.image[0]
            return kind(channels, channels, 3, padding=1, bias=False, dtype=like.dtype, device=like.device)
        width = math.prod(self.block.shape)
        return nn.Linear(width, width, bias=False, dtype=like.dtype, device=like.device)


class LocalClassifiers(CreditRule):
    """Every hidden block is trained by its own loss: of a linear read-out, or the match of two similarity matrices.

    Args:
        model: a row of blocks (see :func:`apical.core.blocks.blocks`): Linear and convolution layers with normalisation,
            activations and pooling, one after another; no skips.
        loss: maps (output, targets) to a scalar batch mean. It is also the read-outs' loss.
        local: "prediction", "similarity", "both", or "projection" (Mono-Forward).
        beta: weight of the similarity loss in "both".
        pool: maximum number of values of a feature map that a read-out sees; larger maps are averaged over windows.
            "projection" sees all.
        input_shape: of one sample, where there are convolutions.

    Raises:
        ConfigError: an option out of range; under "similarity" and "both" also a loss with options that the labels alone do
            not have, fewer than two classes or, in use, targets that are not class labels.
        UnsupportedModelError: the model is not a row of blocks, or a block is too narrow to compare; names a module.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    >>> rule = LocalClassifiers(model, local="both")
    >>> credit = rule(torch.randn(8, 4), torch.arange(8) % 3)
    >>> credit.backward()
    >>> sorted(credit.logs), list(rule.read_outs(torch.randn(8, 4)))
    (['local', 'local 0', 'local 2'], ['0', '2', '4'])
    """

    output_alone = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        local: Local = "prediction",
        beta: float = 0.99,
        pool: int = 4096,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, loss)
        require_choice("local", local, LOCALS)
        require_count("pool", pool)
        if not 0 < beta < 1:
            raise ConfigError(f"beta must lie between 0 and 1, got beta={beta}")
        self.local = local
        self.predicts, self.compares = local != "similarity", local in ("similarity", "both")
        self.beta = beta if local == "both" else float(self.compares)  # the similarity's share
        if self.compares:
            refuse_options(self, f"local={local!r}")
        self.head, self.row = blocks(model, input_shape)
        self._containers = Containers(model)
        self._last = Taught(self.row[-1].modules)
        self._hidden = [_Hidden(block, 0 if local == "projection" else pool) for block in self.row[:-1]]
        self.read, self.project = nn.ModuleDict(), nn.ModuleDict()
        outputs = math.prod(self.row[-1].shape)
        if self.compares and outputs < 2:
            raise ConfigError(f"local={local!r} compares classes, but the model has {outputs} output; use 'prediction'")
        for hidden in self._hidden:
            name, like, width = key(hidden.block.name), hidden.block.like, math.prod(hidden.block.shape)
            if self.compares and width < 3:
                raise UnsupportedModelError(
                    f"the block of layer {hidden.block.name!r} returns {width} number(s) per sample, but local={local!r} "
                    "compares directions around their mean, which takes three or more; widen it, or pass local='prediction'"
                )
            if self.predicts:
                self.read[name] = nn.Linear(
                    hidden.features, outputs, bias=local != "projection", dtype=like.dtype, device=like.device
                )
                if local != "projection":
                    for parameter in self.read[name].parameters():
                        nn.init.zeros_(parameter)
            if self.compares:
                self.project[name] = hidden.projection()

    def feedback_parameters(self) -> list[nn.Parameter]:
        """Read-outs M_l, c_l and projections P_l."""
        return [*self.read.parameters(), *self.project.parameters()]

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch: targets are class labels (batch,) or, without a similarity loss, what the loss accepts."""
        self.require_attached()
        self._check(inputs, targets)
        self._containers.require_intact(inputs, self._output)
        if not torch.is_grad_enabled():
            output = self._output(inputs)
            return Credit.of([], output, value_at(self.loss, output, fitted(self.loss, output, targets)))
        logs: dict[str, Tensor] = {}
        with torch.no_grad():
            roots, below = self._climb(self._hidden, through(self.head, inputs), targets, logs)
            learned, output, loss = self._top(below, targets)
        total = torch.stack(list(logs.values())).sum() if logs else loss.detach().new_zeros(())
        return Credit.of([*roots, *learned], output, loss, {"local": total, **logs})

    def _climb(
        self, row: Sequence[_Hidden], below: Tensor, targets: Tensor, logs: dict[str, Tensor]
    ) -> tuple[list[Root], Tensor]:
        """Return the gradients of consecutive hidden blocks and the last one's output; their losses go into `logs`."""
        roots: list[Root] = []
        wanted = self._wanted(targets) if self.compares else None
        for hidden in row:
            activity = hidden.taught(below, learns=True)
            below = hidden.handed_on(activity.made)
            learned, logs[f"local {hidden.block.name}"] = self._learned(hidden, activity, targets, wanted)
            roots += learned
            del activity, learned
        return roots, below

    def _top(self, below: Tensor, targets: Tensor) -> tuple[list[Root], Tensor, Tensor]:
        """Return the last block's gradients, the model's output and its loss."""
        activity = self._last(below, learns=True)
        output = activity.made.detach()
        loss, error = output_error(self.loss, output, fitted(self.loss, output, targets))
        return [*self._roots(activity, [(activity.made, error)]), *terms(loss)], output, loss

    def chain(self, input_shape: Sequence[int]) -> tuple[list[nn.Module], list[Block]]:
        """See :class:`apical.core.part.Separable`."""
        return self.head, self.row

    @torch.no_grad()
    def learn_part(self, part: Part, inputs: Tensor, targets: Tensor) -> tuple[list[Root], Tensor | None]:
        """See :class:`apical.core.part.Separable`."""
        if part.below is None:
            self._check(inputs, targets)
        below = through(self.head, inputs) if part.below is None else part.below.receive()
        roots, below = self._climb(self._hidden[part.levels.start : part.levels.stop], below, targets, {})
        if part.above is not None:
            part.above.send(below)
            return roots, None
        learned, _, loss = self._top(below, targets)
        return [*roots, *learned], loss

    def _wanted(self, targets: Tensor) -> Tensor:
        """S(Y), in float32 at least."""
        wide = torch.promote_types(self.row[-1].like.dtype, torch.float32)
        return class_similarity(targets, math.prod(self.row[-1].shape), wide)

    def _learned(
        self, hidden: _Hidden, activity: Activity, targets: Tensor, wanted: Tensor | None
    ) -> tuple[list[Root], Tensor]:
        """Gradients of a block and its read-out, and the block's loss, all detached outside the graph of the block."""
        h, name, like = activity.made, key(hidden.block.name), hidden.block.like
        hidden.block.require_shape(h)
        wide, closed = torch.promote_types(like.dtype, torch.float32), activity.block is not None
        taught: list[tuple[Tensor, Tensor]] = []  # functions of h, and their signals
        roots: list[Root] = []
        total = torch.zeros((), dtype=wide, device=h.device)
        if wanted is not None:
            project = self.project[name]
            with torch.set_grad_enabled(not closed):
                rows = described(project(h.view(-1, *hidden.image) if hidden.image else h.flatten(1)))
            with torch.autocast(h.device.type, enabled=False):
                loss, signal = similarity(rows.detach().to(wide), wanted)
                total = total + self.beta * loss
                signal = signal * self.beta
            if closed:  # P_l is a matrix
                assert isinstance(project, nn.Linear)
                signal = signal.to(h.dtype)
                roots += [(project.weight, signal.T @ h)] if project.weight.requires_grad else []
                rows, signal = h, signal @ project.weight
            taught.append((rows, signal))
        if self.predicts:
            with torch.set_grad_enabled(not closed):
                a = hidden.pooled(h)
            with torch.autocast(h.device.type, enabled=False):
                loss, signal, read = self._predicted(self.read[name], a.detach().to(wide), targets)
                total = total + (1 - self.beta) * loss
                taught.append((a, signal * (1 - self.beta) if self.beta else signal))
            roots += read
        return [*roots, *self._roots(activity, taught)], total

    def _roots(self, activity: Activity, taught: list[tuple[Tensor, Tensor]]) -> list[Root]:
        """A block's gradients from signals at its output or, where it keeps a graph, at functions of it."""
        if activity.block is None:
            return block_roots(taught, self.parameters())
        teaching, (signal, *others) = Teaching(), [signal for _, signal in taught]
        for other in others:
            signal = signal + other
        teaching.teach(activity, signal.to(activity.made.dtype))
        return teaching.roots

    def _predicted(self, reader: nn.Module, a: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, list[Root]]:
        """A read-out's loss for its input (batch, d), the signal G M of that shape, and its own gradients."""
        assert isinstance(reader, nn.Linear)
        m, c = reader.weight, reader.bias
        logits = F.linear(a, m.to(a.dtype), None if c is None else c.to(a.dtype)).view(len(a), *self.row[-1].shape)
        loss, g = output_error(self.loss, logits, fitted(self.loss, logits, targets))
        g = g.flatten(1)  # G: (batch, K)
        roots: list[Root] = [(m, (g.T @ a).to(m.dtype))] if m.requires_grad else []
        if c is not None and c.requires_grad:
            roots.append((c, g.sum(0).to(c.dtype)))
        return loss.detach(), g @ m.to(a.dtype), roots

    def _output(self, inputs: Tensor) -> Tensor:
        """h_L."""
        return through([*self.head, *self.row], inputs)

    def _check(self, inputs: Tensor, targets: Tensor) -> None:
        require_samples(inputs)
        require_one_type(type(self).__name__, self.row[-1].like, self.feedback_parameters())
        if not self.compares:
            return
        if targets.is_floating_point() or targets.shape != inputs.shape[:1]:
            raise ConfigError(
                f"local={self.local!r} compares classes and needs one label per sample, not targets of shape "
                f"{tuple(targets.shape)}; use local='prediction'"
            )
        require_classes(targets, math.prod(self.row[-1].shape))

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """Exact for the last block, whose loss is the model's."""
        return layer_paths(self.model, inputs, "signal of its own", exact=(self.row[-1].name,))

    def measures(self, probe: Batch, test: Sequence[Batch]) -> Measures:
        """The accuracy of :meth:`read_outs`."""
        return Measures(depths=depth_accuracies(self.read_outs, test))

    @torch.no_grad()
    def read_outs(self, inputs: Tensor) -> dict[str, Tensor]:
        """Classes (batch,) predicted by each read-out, by layer, and last by the model itself; in evaluation mode."""
        with evaluating(self):
            h, scores = through(self.head, inputs), {}
            for hidden in self._hidden:
                h = hidden.block(h)
                if self.predicts:
                    scores[hidden.block.name] = self.read[key(hidden.block.name)](hidden.pooled(h))
            scores[self.row[-1].name] = self.row[-1](h).flatten(1)
        return {name: score.argmax(1) for name, score in scores.items()}
