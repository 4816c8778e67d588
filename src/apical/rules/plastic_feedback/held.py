"""R in closed form, which has no values: reading or writing them first creates the explicit R with its present values.

Averages of all parameters, an optimiser around an optimiser, decay by hand: whatever moves `rule.parameters()` besides the
optimiser moves R as well. Once R was touched, the layer keeps R explicitly, and `rule.remarks` reports it.
"""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from apical.rules.plastic_feedback.plastic_rule import PlasticRule

TOUCHED = "something other than the optimiser reads or writes it, as averages of rule.parameters() do"
ABOUT = {
    *(
        "grad",
        "backward",
        "requires_grad",
        "requires_grad_",
        "grad_fn",
        "is_leaf",
        "retains_grad",
        "output_nr",
        "_version",
        "_base",
    ),
    *("_backward_hooks", "_post_accumulate_grad_hooks", "register_hook", "register_post_accumulate_grad_hook", "_is_view"),
    *("shape", "size", "dim", "ndim", "numel", "nelement", "stride", "storage_offset", "layout", "is_contiguous", "nbytes"),
    *("dtype", "element_size", "itemsize", "is_floating_point", "is_complex", "is_sparse", "is_sparse_csr", "is_quantized"),
    *("device", "get_device", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_mkldnn", "is_nested", "is_shared"),
    *("is_inference", "is_pinned", "data_ptr", "storage", "untyped_storage", "_typed_storage", "name", "names", "__hash__"),
    *("isfinite", "isnan", "isinf"),
}
"""Queries of a tensor that need no values; checks for non-finite numbers use the weight's: if these are finite, R's
are too."""


class Held(nn.Parameter):
    """An R without elements."""

    holder: "tuple[weakref.ref[PlasticRule], str]"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make R explicit first, if its values are asked for."""
        name = func.__name__
        if name in ("__get__", "__set__", "__delete__"):
            name = func.__self__.__name__
            if func.__name__ == "__set__" and name == "requires_grad":
                rest(*args)
        if name == "requires_grad_":
            rest(*args, **(kwargs or {}))
        elif name not in ABOUT:
            for part in tree_leaves((args, kwargs)):
                rule = part.holder[0]() if type(part) is Held else None
                if rule is not None:
                    rule.steps.open(part.holder[1], TOUCHED)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        with torch._C.DisableTorchFunctionSubclass():
            memo[id(self)] = nn.Parameter(self.data.clone(), self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)


def rest(plastic: Held, requires_grad: bool = True) -> None:
    """Note that R is frozen, or no longer: at the next batch a frozen one takes values, which stay."""
    rule = plastic.holder[0]()
    if rule is not None:
        (rule.steps.resting.discard if requires_grad else rule.steps.resting.add)(plastic.holder[1])


def vacate(plastic: nn.Parameter, rule: "PlasticRule", name: str) -> None:
    """Remove R's values."""
    fill(plastic, plastic.new_empty((0, *plastic.shape[1:])) if type(plastic) is not Held else None)
    plastic.grad = None
    plastic.__class__ = Held
    setattr(plastic, "holder", (weakref.ref(rule), name))  # noqa: B010


def fill(plastic: nn.Parameter, values: Tensor | None) -> None:
    """Give R these values."""
    plastic.__class__ = nn.Parameter
    plastic.__dict__.pop("holder", None)
    if values is not None:
        plastic.data = values


class Plastics(nn.ParameterDict):
    """The R of every layer; a rule stores, loads and moves those with values."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Skip tensors without values: other formats take two tensors without elements for a shared one."""
        with torch._C.DisableTorchFunctionSubclass():
            super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._held():
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *args: Any
    ) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        for name in self._held():
            if prefix + name in missing:
                missing.remove(prefix + name)

    def _held(self) -> list[str]:
        return [name for name, plastic in self._parameters.items() if type(plastic) is Held]

    def extra_repr(self) -> str:
        """Types and shapes."""
        with torch._C.DisableTorchFunctionSubclass():
            return super().extra_repr()
