"""Slow, independent re-implementation of counter-current learning on dense chains (arXiv 2409.19841), by autograd.

Written from the paper and its equations with explicit loops over samples and classes; nothing of `apical` is used. Every
layer's input is detached, all losses are summed, and autograd does the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

ELU: Activation = lambda z: torch.where(z > 0, z, torch.exp(z.clamp(max=0.0)) - 1)  # noqa: E731
RELU: Activation = lambda z: torch.where(z > 0, z, torch.zeros_like(z))  # noqa: E731
TANH: Activation = torch.tanh


@dataclass
class Networks:
    """F with U_1..U_L (d_l, d_{l-1}) and biases (None: without), G with V_1..V_L (d_{l-1}, d_l); V_1 may be None."""

    u: list[Tensor]
    c: list[Tensor | None]
    v: list[Tensor | None]
    phi: Activation


def forward(nets: Networks, x: Tensor) -> list[Tensor]:
    """A_0..A_L; every layer sees a detached input; A_L are the logits."""
    a = [x]
    for depth, (u, c) in enumerate(zip(nets.u, nets.c, strict=True), start=1):
        z = a[-1].detach() @ u.T
        z = z if c is None else z + c
        a.append(nets.phi(z) if depth < len(nets.u) else z)
    return a


def feedback(nets: Networks) -> list[Tensor | None]:
    """B_0..B_L, a row per class; B_0 is linear, and None without V_1."""
    top = nets.v[-1]
    classes = nets.u[-1].shape[0] if top is None else top.shape[1]
    b: list[Tensor | None] = [torch.eye(classes, dtype=nets.u[0].dtype)]
    for depth in range(len(nets.v), 0, -1):
        v, above = nets.v[depth - 1], b[0]
        if v is None or above is None:
            b.insert(0, None)
            continue
        z = above.detach() @ v.T
        b.insert(0, nets.phi(z) if depth > 1 else z)
    return b


def unit(row: Tensor) -> Tensor:
    """row / (|row| + 1e-8)."""
    return row / ((row * row).sum().sqrt() + 1e-8)


def squares(left: list[Tensor], right: list[Tensor], wanted: Callable[[int, int], bool]) -> Tensor:
    """Mean over all pairs of (inner product - 1 where wanted, - 0 elsewhere)^2."""
    terms = []
    for i, p in enumerate(left):
        for k, q in enumerate(right):
            terms.append(((p * q).sum() - (1.0 if wanted(i, k) else 0.0)) ** 2)
    return torch.stack(terms).mean()


def pair_loss(a: Tensor, b: Tensor, labels: Tensor, pair: str, scale: float, spread: float) -> Tensor:
    """ell_l of one depth."""
    rows, codes = list(a), list(b)
    if pair == "inner":
        return 256 * scale / a.shape[1] * squares(rows, codes, lambda i, k: int(labels[i]) == k)
    rows, codes = [unit(row) for row in rows], [unit(code) for code in codes]
    loss = scale * squares(rows, codes, lambda i, k: int(labels[i]) == k)
    return loss + spread * (squares(rows, rows, lambda i, j: i == j) + squares(codes, codes, lambda i, j: i == j))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Batch mean of -log softmax at the label."""
    terms = [torch.log(torch.exp(row - row[label]).sum()) for row, label in zip(logits, labels.tolist(), strict=True)]
    return torch.stack(terms).mean()


def local_losses(nets: Networks, x: Tensor, labels: Tensor, pair: str, scale: float, spread: float = 0.0) -> list[Tensor]:
    """ell_0..ell_{L-1}, those without a code of G left out, and last the cross-entropy of the logits."""
    a, b = forward(nets, x), feedback(nets)
    meet = [(p, q) for p, q in zip(a[:-1], b[:-1], strict=True) if q is not None]
    return [*(pair_loss(p, q, labels, pair, scale, spread) for p, q in meet), cross_entropy(a[-1], labels)]


def read_out(nets: Networks, x: Tensor, depth: int, normalised: bool) -> list[int]:
    """The class whose code at `depth` has the largest inner product (cosine) with each sample; ties do not occur."""
    a = forward(nets, x)[depth].detach()
    code = feedback(nets)[depth]
    assert code is not None
    found = []
    for row in a:
        score = [float((row * (unit(k) if normalised else k)).sum()) for k in code.detach()]
        found.append(max(range(len(score)), key=score.__getitem__))
    return found
