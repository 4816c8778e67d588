"""How many bytes a piece of work holds at one time, counted tensor by tensor: exact on any device, no allocator noise."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apical.diagnostics.alignment import unchanged


class _Ledger(TorchDispatchMode):
    """Counts the storages that operations create, for as long as they live."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.living().values()))
        return result

    def living(self) -> dict[int, tuple[StorageWeakRef, int]]:
        """Return the storages that are alive, and their sizes."""
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        return self.live


def peak_bytes(work: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Return the largest number of bytes held at one time by tensors that `work()` creates.

    What single operations use inside and free before they return is not seen.

    Args:
        work: is called once.
        known: tensors that exist already (parameters, buffers, inputs) and shall not be counted.

    >>> import torch
    >>> peak_bytes(lambda: torch.ones(256) + torch.ones(256)) // 1024  # two summands and the sum
    3
    """
    ledger = _Ledger(known)
    with ledger:
        work()
    return ledger.peak


def held_bytes(rule: Any, inputs: Any, targets: Any) -> int:
    """Return the bytes that a rule holds between its call and the backward pass, beyond model, rule and batch."""
    with unchanged(rule):
        ledger = _Ledger([*rule.parameters(), *rule.buffers(), *_tensors_in(inputs, targets)])
        with ledger:
            credit = rule(inputs, targets)
        held = sum(size for _, size in ledger.living().values())
        del credit
    return held


def step_bytes(rule: Any, inputs: Any, targets: Any) -> int:
    """Return the peak bytes of one forward and backward pass of a rule beyond model, rule and batch, with gradients."""
    with unchanged(rule):
        tensors = [*rule.parameters(), *rule.buffers(), *_tensors_in(inputs, targets)]
        return peak_bytes(lambda: rule.accumulate(inputs, targets), tensors)


def _tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors in a value, also those in dicts and tuples."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
