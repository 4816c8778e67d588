"""Which axis of a matrix its module sums over: feedback replaces a matrix (n_out, n_in)."""

from collections.abc import Iterable

import torch
from torch import Tensor

FACTORS = {"_saved_mat2": -1, "_saved_batch2": -1, "_saved_self": -2, "_saved_mat1": -2, "_saved_batch1": -2}
"""Where products keep their factors for the backward pass, and the axis of each that is the output's."""


@torch.no_grad()  # layers inside may keep notes, which are asked for no derivative of derivatives
def is_turned(weight: Tensor, outputs: Iterable[Tensor]) -> bool:
    """Return whether a weight is multiplied as (n_in, n_out) in all products on the way to the outputs that show it.

    >>> weight, x, y = (torch.randn(*shape, requires_grad=True) for shape in ((3, 3), (2, 3), (2, 3)))
    >>> is_turned(weight, [x @ weight]), is_turned(weight, [torch.nn.functional.linear(y, weight)])
    (True, False)
    """
    rows, columns = zip(weight.shape, weight.stride(), strict=True)
    waiting, seen, turned = [output.grad_fn for output in outputs], set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [below for below, _ in node.next_functions]
        for name, axis in FACTORS.items() if "mm" in node.name().lower() else ():
            factor = getattr(node, name, None)
            if isinstance(factor, Tensor) and factor.untyped_storage()._cdata == weight.untyped_storage()._cdata:
                over = factor.shape[axis], factor.stride(axis)
                turned += [over == columns] if over in (rows, columns) else []
    return bool(turned) and all(turned)
