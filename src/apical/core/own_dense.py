"""Dense layers that a user wrote, recognised by trying them: the advice for one that is not registered."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


def is_dense(module: nn.Module) -> bool:
    """Return whether a user's module maps `h` to `weight h + bias` with these two parameters, whatever their values.

    >>> class Linear(nn.Module):
    ...     def __init__(self, n_in, n_out):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.randn(n_out, n_in))
    ...     def forward(self, h):
    ...         return torch.einsum("oi,...i->...o", self.weight, h)
    >>> is_dense(Linear(3, 2))
    True
    """
    own = dict(module.named_parameters())
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    if own or weight is None or weight.dim() != 2 or next(module.children(), None) is not None:
        return False
    if isinstance(weight, UninitializedParameter) or weight.is_meta or not weight.is_floating_point():
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(weight)

    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            twin = copy.deepcopy(module).train()
            for parameter in twin.parameters():
                parameter.copy_(noise(*parameter.shape))
            inputs = [noise(2, weight.shape[1]), noise(2, 3, weight.shape[1])]
            kept = dict(twin.named_parameters())
            wanted = [F.linear(h, kept["weight"], kept.get("bias")) for h in inputs]
            return all(torch.allclose(twin(h), y, rtol=1e-2, atol=1e-2) for h, y in zip(inputs, wanted, strict=True))
    except Exception:
        return False  # it cannot be called as a dense layer
