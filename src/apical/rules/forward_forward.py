"""Forward-forward: hidden blocks learn to be active for positive and quiet for negative inputs; no error reaches them.

    z_0 = n(input),   h_l = f_l(sg(z_{l-1})),   z_l = n(h_l)              n(z) = z / sqrt(mean z^2): the next block cannot
    G_l = sum h_l^2 or mean h_l^2, for positive (+) and negative (-)      read the goodness G_l of the one before
    threshold    1/2 mean softplus(theta - G+) + 1/2 mean softplus(G- - theta)
    difference   mean softplus(-alpha (G+ - G-))                                                (SymBa)
    read-out     ell of W_L z_{L-1} + c_L + sum_{1<l<L-1} C_l z_l, for the read-out alone

Positive and negative inputs. "random", "all": the label overwrites the image's first K numbers, the true one or a wrong one
drawn each time, or every wrong one; the read-out and the answer see 1/K there. "images", self-contrastive: the first layer
receives an image twice, or with another of the batch, W(a + b) + 2c; no labels; the answer sees the image twice.
"hard": the wrong label k is drawn with probability p_k / sum_{j != y} p_j, p = softmax of the read-out's scores for the
neutral input.

The gradient at h_l is 2 h_l dL/dG_l (over the width for means): for a silent unit it is zero without any derivative.
Local: a block needs its input and one number per sample.

Sources: Hinton 2022, arXiv 2212.13345, and the code loweX/Forward-Forward; SymBa, arXiv 2303.08418; self-contrastive
forward-forward, arXiv 2409.11593, and its code.
Departures: no peer normalisation; weights start as the model has them; the read-out of "images" learns at the same time as
the hidden blocks, whose loss has no penalty on G+.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.batch import require_classes, require_one_type, require_samples
from apical.core.blocks import Block, blocks, through
from apical.core.containers import Containers
from apical.core.credit import Batch, Credit, CreditRule, Loss, Measures, Root, depth_accuracies
from apical.core.layers import is_norm, is_random
from apical.core.local import block_roots
from apical.core.losses import PLAIN, output_error, refuse_options, terms, value_at
from apical.core.rest import evaluating
from apical.core.units import key
from apical.errors import ConfigError, UnsupportedModelError, require_choice

Negatives = Literal["random", "hard", "all", "images"]
Objective = Literal["threshold", "difference"]
Goodness = Literal["sum", "mean"]
Answers = Literal["read-out", "goodness"]

EPSILON = 1e-8
"""Added to root mean squares by the published code."""


def normalised(z: Tensor) -> Tensor:
    """n(z): every sample (batch, ...) at mean square 1; zero stays zero. In float32 at least, whose range squares need."""
    flat = z.flatten(1).to(torch.promote_types(z.dtype, torch.float32))
    scale = torch.linalg.vector_norm(flat, dim=1, keepdim=True) / math.sqrt(flat.shape[1])  # has a derivative at zero, 0
    normalised: Tensor = flat / (scale + EPSILON)
    return normalised.to(z.dtype).view_as(z)


def write_label(inputs: Tensor, code: Tensor) -> Tensor:
    """Inputs (batch, ...) whose first K numbers are the code (batch, K)."""
    return torch.cat([code.to(inputs.dtype), inputs.flatten(1)[:, code.shape[1] :]], 1).view_as(inputs)


def threshold(positive: Tensor, negative: Tensor, theta: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its derivatives by the goodness of positive (B,) and negative samples (n B,), of which there may be zero."""
    up, down = theta[0] - positive, negative - theta[1]
    count = max(1, len(down))
    loss = (F.softplus(up).mean() + F.softplus(down).sum() / count) / 2
    return loss, -up.sigmoid() / (2 * len(up)), down.sigmoid() / (2 * count)


def difference(positive: Tensor, negative: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same for SymBa's loss; negatives are in the order of the positives, repeated n times."""
    ahead = alpha * (positive - negative.view(-1, len(positive)))  # alpha Delta: (n, B)
    count = max(1, ahead.numel())
    push = alpha * (-ahead).sigmoid() / count
    return F.softplus(-ahead).sum() / count, -push.sum(0), push.flatten()


def drawn_wrong(scores: Tensor, targets: Tensor) -> Tensor:
    """Labels (B,) other than the targets (B,), drawn in proportion to the softmax of the scores (B, K)."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    others = wide.scatter(1, targets.long().unsqueeze(1), -math.inf)
    return (others - torch.empty_like(wide).exponential_().log()).argmax(1)  # the largest with Gumbel noise


class ForwardForward(CreditRule):
    """Hidden blocks learn from their own goodness, and the last block reads the normalised hidden activity.

    The answer comes from the rule (:meth:`answer`); the model alone has neither label nor normalisation.

    Args:
        model: a row of blocks (see :func:`apical.core.blocks.blocks`), at least two: layers with activations and pooling,
            one after another; no skips, normalisation or dropout.
        loss: maps (output, targets) to a scalar batch mean; it trains the read-out.
        negatives: "random", "hard" (wrong labels that the read-out finds likely), "all" or "images" (self-contrastive).
        objective: "threshold" or "difference".
        goodness: "sum" or "mean" of squares; None: "mean" for images and differences, otherwise "sum".
        theta: the threshold, or a pair for positive and negative samples; None: a mean square of 1, and for images the
            published 4 and 6 in the first block.
        alpha: slope of the loss of differences.
        answers: "read-out", or "goodness": a label's score is the goodness it produces in all but the first block.
        train_hidden: False is a control: hidden blocks are frozen, only the read-out learns.
        write: puts a label's code (batch, K) into inputs (batch, ...); by default in place of their first K numbers, which
            the rule then never uses.
        input_shape: of one sample, where there are convolutions.

    Raises:
        ConfigError: an option out of range, fewer than two classes, or a loss with options that the labels alone do not
            have; or, in use, targets that are not class labels.
        UnsupportedModelError: the model is not such a row; the message names a module.

    >>> model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> rule = ForwardForward(model)
    >>> credit = rule(torch.rand(6, 9), torch.arange(6) % 3)
    >>> credit.backward()
    >>> tuple(rule.answer(torch.rand(6, 9)).shape), list(rule.read_outs(torch.rand(6, 9)))
    ((6, 3), ['0', '2'])
    """

    output_alone = True
    feed_forward = False

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        negatives: Negatives = "random",
        objective: Objective = "threshold",
        goodness: Goodness | None = None,
        theta: float | tuple[float, float] | None = None,
        alpha: float = 4.0,
        answers: Answers = "read-out",
        train_hidden: bool = True,
        write: Callable[[Tensor, Tensor], Tensor] = write_label,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, loss)
        require_choice("negatives", negatives, ("random", "hard", "all", "images"))
        require_choice("objective", objective, ("threshold", "difference"))
        require_choice("goodness", goodness or "sum", ("sum", "mean"))
        require_choice("answers", answers, ("read-out", "goodness"))
        self.self_contrastive = negatives == "images"
        if self.self_contrastive and answers == "goodness":
            raise ConfigError(
                "negatives='images' learns without labels, so goodness cannot rank classes; use answers='read-out'"
            )
        refuse_options(self, "forward-forward", ("ignore_index", "reduction") if self.self_contrastive else tuple(PLAIN))
        if not 0 < alpha < math.inf:
            raise ConfigError(f"alpha must be positive, got {alpha}")
        if theta is not None and not all(map(math.isfinite, theta if isinstance(theta, tuple) else (theta,))):
            raise ConfigError(f"theta must be one finite number or two, got {theta}")
        self.head, self.row = blocks(model, input_shape)
        self.hidden = self.row[:-1]
        self._refuse_modules()
        self._containers = Containers(model)
        self.classes = math.prod(self.row[-1].shape)
        if self.classes < 2:
            raise ConfigError(f"forward-forward needs at least two classes, but the model has {self.classes} output")
        self.negatives, self.objective, self.alpha, self.answers = negatives, objective, alpha, answers
        default: Goodness = "mean" if self.self_contrastive or objective == "difference" else "sum"
        self.goodness = default if goodness is None else goodness
        self.theta = [self._theta(number, theta) for number in range(len(self.hidden))]
        self.train_hidden, self.write = train_hidden, write
        is_drawn = self.self_contrastive or (negatives in ("random", "hard") and self.classes > 2)
        self.random_per_sample = train_hidden and is_drawn
        self.read = nn.ModuleDict()
        for block in self.hidden[1:-1]:  # the first shows the label too directly; the last block reads the last itself
            like = block.like
            self.read[key(block.name)] = nn.Linear(
                math.prod(block.shape), self.classes, bias=False, dtype=like.dtype, device=like.device
            )
            nn.init.zeros_(self.read[key(block.name)].weight)  # type: ignore[arg-type]
        inside = [p for block in self.hidden for module in block.modules for p in module.parameters()]
        self._still = [p for p in inside if p.requires_grad and not train_hidden]
        for parameter in self._still:  # with several processes, all wait for every possible gradient
            parameter.requires_grad_(False)

    def _refuse_modules(self) -> None:
        if not self.hidden:
            raise UnsupportedModelError(f"layer {self.row[0].name!r} is the only one; forward-forward needs a hidden layer")
        names = {module: name for name, module in self.model.named_modules()}
        hidden = [*self.head, *(module for block in self.hidden for module in block.modules)]
        for module in (*hidden, *self.row[-1].modules):
            if is_random(module) or (is_norm(module) and module in hidden):
                why = "draws new random numbers" if is_random(module) else "fixes the norm of activity, the goodness"
                raise UnsupportedModelError(
                    f"module {names[module]!r} ({type(module).__name__}) {why}, so forward-forward cannot compare "
                    "positive and negative inputs after it; remove it"
                )

    def _theta(self, number: int, given: float | tuple[float, float] | None) -> tuple[float, float]:
        """Thresholds of a hidden block for positive and negative samples."""
        if given is not None:
            return given if isinstance(given, tuple) else (given, given)
        if self.self_contrastive and number == 0:
            return (4.0, 6.0) if self.goodness == "mean" else (4.0 * self._width(number), 6.0 * self._width(number))
        one = 1.0 if self.goodness == "mean" else float(self._width(number))
        return one, one

    def _width(self, number: int) -> int:
        return math.prod(self.hidden[number].shape)

    def detach(self) -> nn.Module:
        """See :meth:`apical.core.credit.CreditRule.detach`; frozen hidden blocks may learn again."""
        for parameter in self._still:
            parameter.requires_grad_(True)
        return super().detach()

    @property
    def remarks(self) -> list[str]:
        """Remark that the trained predictor is not the model alone."""
        given = "the image twice in the first layer" if self.self_contrastive else "a neutral label in the input"
        if not self.self_contrastive and self.write is write_label:
            given += f", whose first {self.classes} numbers it overwrites (write= puts it elsewhere)"
        return [f"the answer uses {given}, and normalises between blocks; the model alone does neither"]

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch: `inputs` (batch, ...), `targets` (batch,) class labels."""
        self.require_attached()
        self._check(inputs, targets)
        self._containers.require_intact(inputs, self._plain)
        if not torch.is_grad_enabled():
            output = self.answer(inputs)
            return Credit.of([], output, value_at(self.loss, output, targets))
        parameters = list(self.parameters())
        roots: list[Root] = []
        logs: dict[str, Tensor] = {}
        with torch.no_grad():
            read = self._features(inputs)
        logits = self._read(read)
        with torch.no_grad():
            z = self._contrasted(inputs, targets, logits) if self.train_hidden else None
        for number, block in enumerate(self.hidden if z is not None else ()):
            assert z is not None
            if number or not self.self_contrastive:
                h = block(z.detach())
            else:
                h = self._joined(block, z.detach(), self._partners(z))
            with torch.no_grad(), torch.autocast(h.device.type, enabled=False):
                loss, signal = self._judged(number, h.detach(), len(inputs))
                logs[f"local {block.name}"] = loss
                z = normalised(h)
            roots += block_roots([(h, signal)], parameters)
            del h, signal
        loss, error = output_error(self.loss, logits, targets)
        roots += block_roots([(logits, error)], parameters)
        output = logits.detach()
        if self.answers == "goodness":
            with torch.no_grad():
                output = self.answer(inputs)
            loss = value_at(self.loss, output, targets)
        total = torch.stack(list(logs.values())).sum() if logs else loss.detach().new_zeros(())
        return Credit.of([*roots, *terms(loss)], output, loss, {"local": total, **logs})

    def answer(self, inputs: Tensor) -> Tensor:
        """Scores of the classes (batch, K): the read-out's, or each label's goodness; differentiable."""
        if self.answers == "read-out":
            return self._read(self._features(inputs))
        first, *others = self._goodness_of_labels(inputs)
        return torch.stack(others or [first]).sum(0)

    def measures(self, probe: Batch, test: Sequence[Batch]) -> Measures:
        """The accuracy of :meth:`read_outs`."""
        return Measures(depths=depth_accuracies(self.read_outs, test))

    @torch.no_grad()
    def read_outs(self, inputs: Tensor) -> dict[str, Tensor]:
        """Classes (batch,) with the highest goodness in each hidden block, by layer; empty without labels."""
        if self.self_contrastive:
            return {}
        with evaluating(self):
            scores = self._goodness_of_labels(inputs)
        return {block.name: score.argmax(1) for block, score in zip(self.hidden, scores, strict=True)}

    def _goodness_of_labels(self, inputs: Tensor) -> list[Tensor]:
        """Mean squares (batch, K) of each hidden block, for every label."""
        by_label: list[list[Tensor]] = []
        for label in range(self.classes):
            code = F.one_hot(torch.full((len(inputs),), label, device=inputs.device), self.classes)
            z = self._given(self.write(inputs, code))
            by_label.append([])
            for block in self.hidden:
                h = block(z)
                by_label[-1].append(h.flatten(1).square().mean(1))
                z = normalised(h)
        return [torch.stack(scores, 1) for scores in zip(*by_label, strict=True)]

    def _contrasted(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """z_0 of positive, then negative inputs (B + n B, ...); of images (B, ...), joined after the first layer."""
        if self.self_contrastive:
            return self._given(inputs)
        k = self.classes
        if self.negatives == "all":
            away = torch.arange(k, device=targets.device).unsqueeze(1)  # 0 is the true label
        elif self.negatives == "hard":
            wrong = drawn_wrong(logits.flatten(1), targets)
            away = torch.stack([torch.zeros_like(targets), wrong - targets])
        else:
            drawn = torch.randint(1, k, targets.shape, device=targets.device)
            away = torch.stack([torch.zeros_like(drawn), drawn])
        labels = ((targets + away) % k).flatten()
        given = inputs.repeat(len(away), *(1,) * (inputs.dim() - 1))
        return self._given(self.write(given, F.one_hot(labels, k)))

    def _partners(self, z: Tensor) -> Tensor | None:
        """Another sample of the batch for each (B,): all shifted by one drawn offset; None where there is no other."""
        if len(z) == 1:
            return None
        own = torch.arange(len(z), device=z.device)
        return (own + torch.randint(1, len(z), (), device=z.device)) % len(z)

    def _joined(self, block: Block, z: Tensor, partners: Tensor | None) -> Tensor:
        """The first block's output for images given twice (B, ...) and, behind them, with their partners."""
        place = block.modules.index(block.layer)
        v = through(block.modules[: place + 1], z)
        return through(block.modules[place + 1 :], v + v if partners is None else torch.cat([v + v, v + v[partners]]))

    def _judged(self, number: int, h: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Loss of a hidden block, and the signal at its output h (B + n B, ...)."""
        wide = torch.promote_types(h.dtype, torch.float32)
        squares = h.flatten(1).to(wide).square()
        g = squares.sum(1) if self.goodness == "sum" else squares.mean(1)
        if self.objective == "threshold":
            loss, up, down = threshold(g[:samples], g[samples:], self.theta[number])
        else:
            loss, up, down = difference(g[:samples], g[samples:], self.alpha)
        slope = 2 * torch.cat([up, down]) / (1 if self.goodness == "sum" else squares.shape[1])
        return loss, h * slope.view(-1, *(1,) * (h.dim() - 1))

    def _features(self, inputs: Tensor) -> list[Tensor]:
        """z_1..z_{L-1} of the read-out's pass: a neutral label, or the image twice."""
        if not self.self_contrastive:
            inputs = self.write(inputs, inputs.new_full((len(inputs), self.classes), 1 / self.classes))
        z, features = self._given(inputs), []
        for number, block in enumerate(self.hidden):
            h = block(z) if number or not self.self_contrastive else self._joined(block, z, None)
            block.require_shape(h)  # thresholds and read-outs depend on its size
            z = normalised(h)
            features.append(z)
        return features

    def _read(self, z: Sequence[Tensor]) -> Tensor:
        """The read-out of z_1..z_{L-1}, summed at the point of the last block where there is one number per class."""
        last = self.row[-1]
        after = last.modules.index(last.layer) + 1
        made, tail = through(last.modules[:after], z[-1]), list(last.modules[after:])
        while made.shape[1:].numel() != self.classes:  # pooling
            made = tail.pop(0)(made)
        for block, below in zip(self.hidden[1:-1], z[1:-1], strict=True):
            made = made + self.read[key(block.name)](below.flatten(1)).view_as(made)
        return through(tail, made)

    def _given(self, inputs: Tensor) -> Tensor:
        """z_0."""
        return normalised(through(self.head, inputs))

    def _plain(self, inputs: Tensor) -> Tensor:
        """The output of the model alone."""
        return through([*self.head, *self.row], inputs)

    def _check(self, inputs: Tensor, targets: Tensor) -> None:
        require_samples(inputs)
        if not inputs.is_floating_point():
            raise ConfigError(f"forward-forward scales its inputs, which are {inputs.dtype}; pass floating-point numbers")
        if targets.is_floating_point() or targets.shape != inputs.shape[:1]:
            raise ConfigError(
                f"forward-forward needs one class label per sample, not targets of shape {tuple(targets.shape)} and "
                f"{targets.dtype}"
            )
        require_one_type(type(self).__name__, self.row[0].like, self.read.parameters())
        require_classes(targets, self.classes)
        if not self.self_contrastive and self.write is write_label and inputs[0].numel() < self.classes:
            raise ConfigError(
                f"a label overwrites {self.classes} input numbers, but there are only {inputs[0].numel()}; pass write="
            )
