"""Calls of packed modules (:mod:`apical.core.packed`) under a rule: one swap for all weights of a module."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.utils._pytree import tree_leaves, tree_map

from apical.core import graph
from apical.core.attention import attend
from apical.core.checkpointing import is_checkpointed, refuse_hidden
from apical.core.credit import Attention
from apical.core.effective import unchanged
from apical.core.layer_forward import Wrapped
from apical.core.layers import is_packed
from apical.core.orientation import is_turned
from apical.core.packed import Part
from apical.core.packed_swap import PackedSwap
from apical.errors import UnsupportedModelError

UNCOMPILED = (
    "feedback replaces the weights of attention and recurrent modules in eager mode only: leave out fullgraph=True, and "
    "the rest of the model is compiled"
)

_checked: set[tuple[Any, ...]] = set()


def eagerly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function outside of compiled graphs. The compiler is imported only now, as that takes as long as PyTorch."""
    if "torch._dynamo" in sys.modules:
        call = torch.compiler.disable(call)
    return call(*args, **kwargs)


eagerly._torchdynamo_disable = True  # type: ignore[attr-defined]  # what the compiler looks for
eagerly._torchdynamo_disable_msg = UNCOMPILED  # type: ignore[attr-defined]


class Bundle:
    """What a rule stores about one packed module.

    Args:
        name: name of the module.
        wrapped: its wrapper.
        parts: its weights, by their names in the rule.
        feedback: returns a function that computes the feedback of a part in the backward pass of this call.
        first: the part that was taken for the first layer, if it is one of these.
        project: `project(part, block, input, weight, bias)`, one projection of attention with its own feedback, for
            compiled graphs, in which there is no swap.
    """

    def __init__(
        self,
        name: str,
        wrapped: Wrapped,
        parts: Mapping[str, Part],
        feedback: Callable[[str], Callable[[], Tensor]],
        first: str | None,
        project: Callable[[str, int, Tensor, Tensor, Tensor | None], Tensor],
    ) -> None:
        self.name, self.module, self.forward = name, wrapped.layer, wrapped.forward
        self.parts, self.first = dict(parts), first
        self.swap, self.project = PackedSwap(feedback), project
        self.attention: Attention = "exact"
        self._checked = False

    def refuse_substitutes(self) -> None:
        """Refuse a weight that is computed from other parameters.

        Raises:
            UnsupportedModelError: names the part.
        """
        for name, part in self.parts.items():
            if not part._parameters:
                raise UnsupportedModelError(
                    f"layer {self.name!r} ({type(self.module).__name__}) computes with a function of its weight {name!r}, "
                    f"so no feedback can stand in for it; remove the function, or pass exact=({self.name!r},)"
                )

    def settle(self) -> None:
        """Restore, after the forward pass, the weights of a recurrent network that were replaced."""
        if isinstance(self.module, RNNBase) and any(w is not None and not w.is_leaf for w in self.module._flat_weights):
            self.module._flat_weights = [getattr(self.module, name, None) for name in self.module._flat_weights_names]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass, with feedback in place of its weights in the backward pass."""
        if not torch.is_grad_enabled():
            refuse_hidden(self.name)
            return self.forward(*args, **kwargs)
        if torch.compiler.is_compiling() and isinstance(self.module, nn.MultiheadAttention):
            self._require_no_error_at_first(args, kwargs)
            return attend(self.module, *args, **kwargs, attention=self.attention, linear=self._projected)
        return eagerly(self._call, *args, **kwargs)

    def _projected(self, kind: str, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute one of the projections "q", "k", "v", "out" of attention."""
        prefix = f"{self.name}." if self.name else ""
        if f"{prefix}{kind}_proj" in self.parts:
            return self.project(f"{prefix}{kind}_proj", 0, inputs, weight, bias)
        return self.project(f"{prefix}in_proj", "qkv".index(kind), inputs, weight, bias)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if is_checkpointed():
            raise UnsupportedModelError(
                f"layer {self.name!r} ({type(self.module).__name__}) runs inside torch.utils.checkpoint, which stores "
                "tensors in its own way; move it out of the checkpoint"
            )
        self.refuse_substitutes()
        self._require_no_error_at_first(args, kwargs)
        if not self._checked:
            self._check(args, kwargs)
        with self._ready(args, kwargs) as weights, self.swap.over(weights):
            result = self.forward(*args, **kwargs)
        if self.first in self.swap.met and not is_packed(self.module):  # the error at its input will use the weight
            self._refuse_error_at_first()
        return result

    def _require_no_error_at_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.first is not None and any(value.requires_grad for value in _inputs(self.module, args, kwargs)):
            self._refuse_error_at_first()

    def _refuse_error_at_first(self) -> None:
        raise UnsupportedModelError(
            f"layer {self.first!r} was treated as the first one, but its input needs an error; pass first_layer=True"
        )

    @contextmanager
    def _ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the weights as the call will keep them: already cast under autocast; without kernels that repack them."""
        weights = {name: part._parameters["weight"] for name, part in self.parts.items()}
        device = next(iter(weights.values())).device.type
        native = torch.backends.cudnn.flags(enabled=False) if device == "cuda" and isinstance(self.module, RNNBase) else None
        with native or nullcontext():
            if not torch.is_autocast_enabled(device):
                yield list(weights.items())
                return
            dtype = torch.get_autocast_dtype(device)
            cast = {name: weight.to(dtype) if weight.dtype == torch.float32 else weight for name, weight in weights.items()}
            with _placed(self.module, {self.parts[name]: weight for name, weight in cast.items()}):
                yield list(cast.items())

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check, once per kind of module and device, that the notes of the weights give the same gradients as the weights.

        Raises:
            UnsupportedModelError: they do not.
        """
        floats = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        if not all(x.numel() for x in floats):
            return
        self._checked = True
        own = {name: part._parameters["weight"] for name, part in self.parts.items()}
        weight = next(iter(own.values()))
        kind: tuple[Any, ...] = (
            type(self.module),
            weight.device.type,
            weight.dtype,
            torch.is_autocast_enabled(weight.device.type),
        )
        kind += tuple(part.parameter for part in self.parts.values())
        known = is_packed(self.module)
        if known and kind in _checked:
            return
        same, used, met = self._tried(args, kwargs, lambda name: lambda: own[name])
        missing = [name for name, part in self.parts.items() if name in used - met and not part.recurrent]
        wrong = False
        if known:
            exact, _, _ = self._tried(args, kwargs, None)
            without, _, _ = self._tried(args, kwargs, lambda name: lambda: torch.zeros_like(own[name]))
            number = len({id(value) for value in _inputs(self.module, args, kwargs)})
            wrong = any(error is not None and bool(error.any()) for error in without[:number])
            wrong = wrong or not all(_same(a, b) for a, b in zip(exact, same, strict=True))
        for name in () if known else self._tried(args, kwargs, None)[1]:
            raise UnsupportedModelError(
                f"sites names {name!r}, which {type(self.module).__name__} applies as a matrix (n_in, n_out): keep its "
                f"transpose there, (n_out, n_in), and apply that, F.linear(x, weight); or pass exact=({name!r},) instead"
            )
        if missing or wrong:
            where = f" {missing[0]!r}" if missing else ""
            raise UnsupportedModelError(
                f"layer {self.name!r} ({type(self.module).__name__}) computes with a function of its weight{where}, so no "
                f"feedback can stand in for it; write it from nn.Linear, or pass exact=({self.name!r},)"
            )
        if known:
            _checked.add(kind)

    def _tried(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], feedback: Callable[[str], Callable[[], Tensor]] | None
    ) -> tuple[list[Tensor | None], set[str], set[str]]:
        """Return the gradients of inputs and parameters from a separate call, the parts used, and those met.

        For a user's module: no gradients, and without feedback the parts that it applies as (n_in, n_out).
        """
        copies: dict[int, Tensor] = {}

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            if id(value) not in copies:
                copies[id(value)] = value.detach().clone().requires_grad_()
            return copies[id(value)]

        with unchanged(self.module, next(iter(self.parts.values())).weight.device), torch.enable_grad():
            torch.manual_seed(0)
            for value in _inputs(self.module, args, kwargs):
                copied(value)
            mine, named = tree_map(copied, (args, kwargs))
            with self._ready(args, kwargs) as weights:
                swap = PackedSwap(feedback or self.swap.feedback).over(weights)
                with nullcontext() if feedback is None else swap:
                    made = self.forward(*mine, **named)
            outputs = [x for x in tree_leaves(made) if isinstance(x, Tensor) and x.requires_grad]
            own = {name: part._parameters["weight"] for name, part in self.parts.items()}
            others = [p for p in self.module.parameters() if p.requires_grad and all(p is not q for q in own.values())]
            targets = [*copies.values(), *(q for q in own.values() if q.requires_grad), *others]
            if not is_packed(self.module) and feedback is None:
                return [], {name for name, q in own.items() if is_turned(q, outputs)}, set()
            if not is_packed(self.module):
                used = {id(leaf) for x in outputs for leaf in graph.leaves(x.grad_fn)}
                return [], {name for name, q in own.items() if id(q) in used or not q.is_leaf}, swap.met
            generator = torch.Generator().manual_seed(0)
            errors = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in outputs]
            return list(torch.autograd.grad(outputs, targets, errors, allow_unused=True)), set(own), swap.met


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors through which the error leaves the module towards earlier layers: no masks, no states."""
    values = list(args) + list(kwargs.values())
    if isinstance(module, nn.MultiheadAttention):
        names = ("query", "key", "value")
        values = [*args[:3], *(kwargs[name] for name in names if name in kwargs)]
    elif is_packed(module):
        values = [args[0] if args else kwargs["input"]]
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]


@contextmanager
def _placed(module: nn.Module, weights: Mapping[Part, Tensor]) -> Iterator[None]:
    """Replace parameters by tensors within this context."""
    before = {part: part.module._parameters[part.parameter] for part in weights}
    flat: dict[str, Any] = {
        key: module.__dict__[key] for key in ("_flat_weights", "_flat_weight_refs") if key in module.__dict__
    }
    try:
        for part, weight in weights.items():
            part.module._parameters[part.parameter] = weight  # type: ignore[assignment]
        yield
    finally:
        for part, parameter in before.items():
            part.module._parameters[part.parameter] = parameter
        module.__dict__.update(flat)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
