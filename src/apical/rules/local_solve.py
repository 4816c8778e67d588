"""Local solver instead of the outer product: each layer's update changes its pre-activations as the errors require.

    outer product    dW^T = -mu A^T D / B         changes the batch's pre-activations by -mu A A^T D / B: samples interfere
    here             dW^T = -mu (A^T A + lam I)^-1 A^T D        changes them by -mu D, if there are fewer samples than inputs
    lam              damping * trace(A^T A) / n                 n inputs, the bias among them

D are the errors that the wrapped rule sends to the layer, per sample (not divided by B), A the layer's inputs.
Only the inputs and the finished gradient D^T A / B are needed. One sample: normalised least mean squares. Much damping: the
direction of the wrapped rule. All layers are solved from one forward pass, with fixed activities.

Local: needs the inverse correlation of a layer's inputs and its weight change, nothing from other layers.
Source: "consequentialism weight updates", arXiv 2003.05164 (abstract; equations derived). It equals K-FAC's step with the
input factor only, and ProxProp's for a linear layer.
Departures: the paper's damping, rates and data are not known to us; `damping` is relative to the inputs' mean power.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from apical.core.checkpointing import refuse_checkpointing
from apical.core.credit import Credit, CreditRule
from apical.core.cut import eagerly
from apical.core.graph import lasting
from apical.core.layers import computes_plainly
from apical.core.losses import refuse_options
from apical.core.processes import summed
from apical.core.rest import undisturbed
from apical.core.sites import only_tensor
from apical.core.solve import (
    cosine,
    errors_of,
    gram,
    off_span,
    patches,
    require_patches,
    solved,
    solved_by_rows,
    stacked,
    strength,
)
from apical.core.stepping import distributed
from apical.core.transport import as_matrix, geometry
from apical.core.units import Found, weighted_layers
from apical.core.wrapped import LayerHook, WrappedRule, innermost, solve_taps
from apical.errors import ApicalError, ConfigError, UnsupportedModelError

PROBE = 2
"""Number of samples used to test whether the rule's gradients are computed from the layers' inputs."""

TINY = 1e-300
"""In place of zero in a quotient."""

REMEDY = "wrap a rule whose layers learn from their inputs: backpropagation, FA, DFA, CCL, DTP"


class Problem:
    """One layer's problem in one batch: its inputs, known once the rule was called, and the gradient, known later.

    Attributes:
        calls: inputs of each call, in order.
        errors: by the call's number, the errors at its output, during the test of how gradients are computed.
    """

    def __init__(self, rule: "LocalSolve", name: str) -> None:
        self.rule, self.name, self.layer = rule, name, rule.layers[name]
        own = self.layer._parameters
        self.trained = {key: p for key in ("weight", "bias") if (p := own.get(key)) is not None and p.requires_grad}
        self.calls: list[Tensor] = []
        self.errors: dict[int, Tensor] = {}
        self.rows: Tensor | None = None
        self.product: Tensor | None = None  # A^T A over all processes, where there are several
        self.samples = 1.0

    def rows_of(self, which: str) -> Tensor:
        """A (m, n) of the "first" call, the "last", or of "all"."""
        return self._rows({"first": self.calls[:1], "last": self.calls[-1:]}.get(which, self.calls))

    def _rows(self, calls: list[Tensor]) -> Tensor:
        rows = [patches(self.layer, inputs) for inputs in calls]
        return stacked(rows, "weight" in self.trained, "bias" in self.trained)

    def off(self, gradient: Tensor, which: str) -> float | None:
        """Share of G (n_out, n) that is not computed from these calls' inputs; None if this cannot be determined."""
        rows = self.rows_of(which)
        if len(rows) < rows.shape[1]:
            return off_span(gradient, rows)
        if not self.errors:
            return None
        picked = {"first": [0], "last": [len(self.calls) - 1]}.get(which, sorted(self.errors))
        if not self.errors.keys() >= set(picked):  # others may come from the rule's own derivatives
            return 1.0
        change = torch.zeros_like(gradient)
        for call in picked:
            shape, error = geometry(self.layer), self.errors[call]
            d = error if shape is None else error.movedim(-1 - len(shape.stride), -1)  # (..., n_out)
            change += d.reshape(-1, d.shape[-1]).double().T @ self._rows([self.calls[call]])
        # a rule may have scaled the signals of single units: G_j = c_j d_j^T A
        scale = (gradient * change).sum(1, keepdim=True) / change.square().sum(1, keepdim=True).clamp_min(TINY)
        return float((gradient - scale * change).norm() / gradient.norm())

    def joined(self, gradients: list[Tensor]) -> Tensor:
        """G (n_out, n) in float64."""
        named = dict(zip(self.trained, gradients, strict=True))
        parts = [as_matrix(geometry(self.layer), named["weight"])] if "weight" in named else []
        return torch.cat([*parts, *([named["bias"].unsqueeze(1)] if "bias" in named else [])], 1).double()

    def settle(self, samples: float) -> None:
        """Record the number of samples of the rule's call; share what must be summed over processes."""
        self.samples = samples
        if self.calls:
            self.rows = self.rows_of(self.rule.calls_used or "all")
            if distributed():
                self.product = summed(gram(self.rows))

    def apply(self, gradient: Tensor) -> Tensor:
        """`B G (A^T A + lam I)^-1`."""
        assert self.rows is not None
        n = self.rows.shape[1]
        if self.product is not None:
            lam = strength(self.product.trace(), n, self.rule.damping)
            return self.samples * solved(gradient, self.product, lam)
        lam = strength(self.rows.square().sum(), n, self.rule.damping)
        if lam == 0:
            return gradient * 0
        if len(self.rows) < n:
            return self.samples * solved_by_rows(gradient, self.rows, lam)
        return self.samples * solved(gradient, gram(self.rows), lam)

    def __call__(self, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Solve, in the backward pass.

        Raises:
            UnsupportedModelError: the layer learns although it was not called, or from an unknown one of its calls.
        """
        if self.rows is None:
            if not any(bool(gradient.any()) for gradient in gradients):
                return gradients
            raise _not_called(self.name, self.rule)
        if len(self.calls) > 1 and self.rule.calls_used is None:
            raise UnsupportedModelError(
                f"layer {self.name!r} was called {len(self.calls)} times, and which of its inputs "
                f"{type(innermost(self.rule)).__name__} learns from could not be determined so far; use another batch"
            )
        change = self.apply(self.joined(list(gradients)))
        return tuple(
            part.reshape(gradient.shape).to(gradient.dtype)
            for part, gradient in zip(self.parts(change), gradients, strict=True)
        )

    def parts(self, change: Tensor) -> list[Tensor]:
        """Columns of each trained parameter."""
        if len(self.trained) == 1:
            return [change]
        return [change[:, :-1], change[:, -1]]


class LocalSolve(WrappedRule):
    """Wrap a rule, and solve each layer's gradient for the change that the errors require.

    The step does not depend on the size of the inputs, so learning rates are near 1, whatever the batch size. Micro-batches
    are solved one by one, and momentum or Adam see solved gradients.

    Args:
        rule: any rule whose weight gradients are outer products of its signals and the layers' inputs in the first, the last
            or all of their calls: backpropagation, the feedback-alignment family, DFA, TDCA, CCL, predictive coding, target
            propagation. This is tested on a few samples of the first batch.
        damping: per sample, relative to the mean power of the inputs.
        exact: names of modules of unknown kind that keep their gradient; None: those of the rule.

    Raises:
        ConfigError: damping is not positive; or the rule's feedback gets the weight's own update; or the loss's reduction
            is not the mean.
        UnsupportedModelError: a layer is not a single matrix on its inputs, or uses a function of its weight; or, at the
            first batch, the rule's gradients are not computed from the layers' inputs.

    >>> from apical.rules.backprop import Backprop
    >>> model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    >>> rule = LocalSolve(Backprop(model))
    >>> x, y = torch.randn(8, 40), torch.arange(8) % 3
    >>> rule(x, y).backward()
    >>> all(with_ > 0.98 for _, with_ in rule.interference(x, y).values())
    True
    """

    def __init__(self, rule: CreditRule, damping: float = 1e-2, exact: Collection[str] | None = None) -> None:
        super().__init__(rule)
        inner = innermost(rule)
        if not 0 < damping < float("inf"):
            raise ConfigError(f"damping must be positive and finite, not {damping}")
        if getattr(inner, "takes_weight_updates", False):
            raise ConfigError(
                f"the feedback of {type(inner).__name__} must get the weight's own update, which LocalSolve changes; wrap "
                "FeedbackAlignment or WeightMirror"
            )
        if any(isinstance(part, LocalSolve) for part in rule.modules()):
            raise ConfigError("the rule is already wrapped in LocalSolve: wrap a rule only once")
        refuse_options(inner, "LocalSolve", ("reduction",))
        self.damping = damping
        self.layers = weighted_layers(self.model, getattr(inner, "exact", ()) if exact is None else exact, shared=True)
        self._found = Found(self.model)
        for name, layer in self.layers.items():
            require_patches(name, layer)
        self.calls_used: str | None = None
        self._unsure = True  # how some layer's gradients are computed, on some process
        self._problems: dict[str, Problem] | None = None  # while the rule is called
        self._watches = False
        self._attach()

    def _attach(self) -> None:
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_hook(LayerHook(self, name, _note), with_kwargs=True))
            self._hooks.append(layer.register_forward_hook(LayerHook(self, name, _watch)))

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """The wrapped rule's credit, whose gradients are solved in the backward pass.

        Raises:
            ConfigError: in a graph of `torch.compile(fullgraph=True)`.
            UnsupportedModelError: see :class:`LocalSolve`.
        """
        if torch.compiler.is_compiling():
            raise ConfigError(
                "LocalSolve solves in the backward pass, which cannot be compiled; do not compile the rule, or "
                "leave out fullgraph=True, and it runs eagerly"
            )
        return self._solving(inputs, targets)

    @eagerly
    def _solving(self, inputs: Tensor, targets: Tensor) -> Credit:
        if not torch.is_grad_enabled():
            return super().forward(inputs, targets)
        self.require_attached()
        found = None
        if self._unsure:
            found = self._look(inputs, targets)
            self._unsure = bool(summed(torch.tensor(float(self._unsure), device=inputs.device)))
        problems = {name: Problem(self, name) for name in self.layers}
        credit = self._noting(problems, _named(self._taps(problems), problems), inputs, targets)
        samples = float(summed(torch.tensor(float(len(inputs)), device=credit._loss.device)))
        for name, problem in problems.items():
            if problem.trained:
                if found is not None and name in found:  # a rule may call layers more often on its first batch
                    problem.calls = problem.calls[-len(found[name][0].calls) :]
                problem.settle(samples)
        return credit

    def _taps(self, problems: dict[str, Problem]) -> dict[str, tuple[Tensor, ...]]:
        """Replacements of each layer's trained parameters. Problems do not store them: their graph stores the problem."""
        taps = {}
        for name, problem in problems.items():
            if any(p.requires_grad for p in problem.layer.parameters()) and not computes_plainly(problem.layer):
                raise _no_parameter(name)
            if problem.trained:
                taps[name] = solve_taps(problem, list(problem.trained.values()))
        return taps

    def _noting(self, problems: dict[str, Problem], taps: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Credit:
        self._problems = problems
        try:
            return self.tapped(taps, inputs, targets)
        finally:
            self._problems = None

    def _measured(self, inputs: Tensor, targets: Tensor) -> dict[str, tuple[Problem, Tensor]]:
        """Each layer's problem, and the wrapped rule's own gradient G (n_out, n) on a batch, without side effects."""
        with undisturbed(self, parameters=True), torch.enable_grad():
            self.restart()
            self.rule(inputs, targets)  # creates everything that the first batch creates
            self.restart()
            problems = {name: Problem(self, name) for name in self.layers}
            taps = self._taps(problems)
            self._watches = True
            credit = self._noting(problems, _named(taps, problems), inputs, targets)
            every = [tap for own in taps.values() for tap in own]
            if not credit.loss.requires_grad or not every:
                return {}
            found = iter(torch.autograd.grad(credit.loss, every, allow_unused=True))
        measured = {}
        for name, own in taps.items():
            pairs = [(next(found), tap) for tap in own]
            if any(gradient is not None for gradient, _ in pairs):
                filled = [torch.zeros_like(tap) if gradient is None else gradient for gradient, tap in pairs]
                measured[name] = (problems[name], problems[name].joined(filled))
        return measured

    def _look(self, inputs: Tensor, targets: Tensor) -> dict[str, tuple[Problem, Tensor]] | None:
        """Determine on a few samples from which of a layer's calls its gradient is computed; return the measurements.

        Raises:
            UnsupportedModelError: some layer's gradient is not computed from its inputs.
        """
        if not isinstance(inputs, Tensor):
            raise UnsupportedModelError(f"{type(self).__name__} needs inputs that are one tensor (batch, ...)")
        few = tree_map(lambda part: part[:PROBE] if isinstance(part, Tensor) and part.dim() else part, targets)
        try:
            measured = self._measured(inputs[:PROBE], few)
        except (ApicalError, RuntimeError, ValueError, LookupError):  # too few for this model or rule
            measured = self._measured(inputs, targets)
        inner = type(innermost(self)).__name__
        allowed = 1e-2 if any(p.dtype != torch.float64 for p in self.model.parameters()) else 1e-6
        kinds = [torch.finfo(p.dtype) for p in self.model.parameters() if p.is_floating_point()]
        least = max(kind.tiny / kind.eps for kind in kinds)
        asked = {name: pair for name, pair in measured.items() if _is_telling(pair[1], least)}
        self._unsure = len(asked) < len(measured)  # no error has reached some layer yet
        for name, (problem, _) in asked.items():
            if not problem.calls:
                raise _not_called(name, self)
        wrong: list[list[str]] = []
        for which in ("last", "first", "all") if self.calls_used is None else (self.calls_used,):
            shares = {name: problem.off(gradient, which) for name, (problem, gradient) in asked.items()}
            seen = {name: share <= allowed for name, share in shares.items() if share is not None}
            wrong.append([name for name, good in seen.items() if not good])
            if seen and all(seen.get(name, len(problem.calls) == 1) for name, (problem, _) in asked.items()):
                self.calls_used = which
                return measured
        if any(wrong):
            name = min(filter(None, wrong), key=len)[0]
            raise UnsupportedModelError(
                f"the gradient that {inner} gives layer {name!r} is not computed from the layer's inputs, so "
                f"LocalSolve cannot solve for it; {REMEDY}"
            )
        for name, (problem, _) in asked.items():
            if len(problem.calls) == 1:
                raise UnsupportedModelError(
                    f"whether the gradient that {inner} gives layer {name!r} is computed from the layer's inputs cannot be "
                    f"determined, so LocalSolve cannot solve for it; {REMEDY}"
                )
        self._unsure = True
        return measured

    def interference(self, inputs: Tensor, targets: Tensor) -> dict[str, tuple[float, float]]:
        """Cosines between the actual and requested changes of pre-activations, by layer, without and with solving.

        The requested change is -D; the change by a step is A dW^T. Where a layer has more samples (or positions) than
        inputs, only the part of the request that a weight change can reach counts. No side effects.

        Args:
            inputs: (batch, ...).
            targets: of the loss.
        """
        if self.calls_used is None:
            self._look(inputs, targets)
        cosines = {}
        for name, (problem, gradient) in self._measured(inputs, targets).items():
            if not bool(gradient.isfinite().all()):
                cosines[name] = (math.nan, math.nan)
            elif problem.calls:
                problem.settle(len(inputs))
                rows = problem.rows
                assert rows is not None
                asked = errors_of(gradient, rows)
                cosines[name] = (cosine(asked, rows @ gradient.T), cosine(asked, rows @ problem.apply(gradient).T))
        return cosines


def _named(taps: dict[str, tuple[Tensor, ...]], problems: dict[str, Problem]) -> dict[str, Tensor]:
    """Taps by the names of their parameters."""
    return {
        f"{name}.{key}".lstrip("."): tap
        for name, own in taps.items()
        for key, tap in zip(problems[name].trained, own, strict=True)
    }


def _watch(rule: LocalSolve, name: str, layer: nn.Module, args: Any, output: Any) -> None:
    """Store the error at a layer's output during the test of how gradients are computed."""
    at = lasting(output) if isinstance(output, Tensor) else None
    if rule._problems is None or not rule._watches or at is None:
        return
    problem = rule._problems[name]
    call, errors, shape = len(problem.calls) - 1, problem.errors, output.shape

    def keep(arrived: tuple[Tensor | None, ...]) -> None:
        error = arrived[at[1]]
        if error is not None:
            errors[call] = error.reshape(shape) if error.numel() == shape.numel() else error

    at[0].register_prehook(keep)


def _note(rule: LocalSolve, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Store a layer's inputs during the rule's call, after any hooks have changed them."""
    if rule._problems is None:
        return
    refuse_checkpointing(name)
    inputs = args[0] if args and isinstance(args[0], Tensor) else only_tensor(name, args, kwargs)
    rule._problems[name].calls.append(inputs.detach())


def _is_telling(gradient: Tensor, least: float) -> bool:
    """Whether a gradient is finite, and not so small that it was rounded to a few digits, as denormal numbers are."""
    return bool(gradient.isfinite().all()) and bool((gradient.abs() > least).any())


def _not_called(name: str, rule: LocalSolve) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(innermost(rule)).__name__} does not call layer {name!r} as a module, so its inputs are not known; {REMEDY}"
    )


def _no_parameter(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {name!r} computes with a function of its parameters, for which LocalSolve cannot solve; remove the function "
        "(a parametrisation, weight norm, pruning)"
    )
