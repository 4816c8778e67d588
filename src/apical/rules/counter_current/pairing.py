"""Losses of a pair of populations that train each other, and their gradients in closed form (arXiv 2409.19841).

A, B are the flattened rows of a pair, M[i, k] = 1 where sample i is of class k, and hats mark rows of unit length:

    inner     (256 s / d) mean (A B^T - M)^2
    cosine    s mean (Ahat Bhat^T - M)^2 + r mean (Ahat Ahat^T - I)^2 + r mean (Bhat Bhat^T - I)^2
    match     s H (mean (a - b)^2 + mean (c(a) - c(b))^2)      H image height, c(.) centred maps of unit length

The paper has the identity in place of M in the second; these are the losses of its code, for perceptrons, convolutions
and autoencoders.
"""

import torch
from torch import Tensor

WIDTH = 256
"""Layer width at which the inner loss has weight s: a constant of the authors' code."""

EPSILON = 1e-8
"""Added to lengths by the authors' code."""

Pulled = tuple[Tensor, Tensor, Tensor]
"""Loss of a pair, and its gradients with respect to a and b."""


def membership(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """M (batch, classes) of labels (batch,)."""
    return torch.zeros(len(labels), classes, dtype=dtype, device=labels.device).scatter_(1, labels.unsqueeze(1), 1.0)


def inner(a: Tensor, b: Tensor, members: Tensor, scale: float) -> Pulled:
    """The inner-product loss of a pair: a (batch, d), b (K, d), M (batch, K), scale s."""
    weight = WIDTH * scale / (a.shape[1] * members.numel())
    miss = torch.addmm(members, a, b.T, beta=-1)  # A B^T - M: (batch, K)
    flat = miss.view(-1)
    loss = torch.dot(flat, flat) * weight
    miss = miss * (2 * weight)  # d loss / d (A B^T)
    return loss, miss @ b, miss.T @ a  # (batch, d), (K, d)


def cosine(a: Tensor, b: Tensor, members: Tensor, scale: float, spread: float) -> Pulled:
    """The loss of the angles between a pair's rows, with anti-collapse terms of weight `spread`; a, b as in :func:`inner`.

    Rows of unit length are never formed: their products are computed as products of rows divided by lengths.
    """
    length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    far_a, far_b = length_a + EPSILON, length_b + EPSILON
    both = far_a * far_b.T  # |a_i| |b_k|: (batch, K)
    cosines = (a @ b.T) / both  # Ahat Bhat^T
    miss = cosines - members  # Ahat Bhat^T - M
    loss = scale * miss.square().mean()
    miss = miss * (2 * scale / miss.numel())  # d loss / d cosines
    # d loss / d a = (miss / both) b - (sum_k miss cosines) a / (|a| far_a); the same for b
    along, between = miss * cosines, miss / both
    for_a, more_a = _turned(a, length_a, far_a, between @ b, along.sum(1, keepdim=True), spread)
    for_b, more_b = _turned(b, length_b, far_b, between.T @ a, along.sum(0).unsqueeze(1), spread)
    return loss + more_a + more_b, for_a, for_b


def _turned(
    rows: Tensor, length: Tensor, far: Tensor, pulled: Tensor, along: Tensor, spread: float
) -> tuple[Tensor, Tensor | float]:
    """Gradient of one side, and its anti-collapse loss.

    Args:
        rows: the side (n, d).
        length: of each row (n, 1); `far` is that plus EPSILON.
        pulled: gradient from the other side (n, d), before its component along each row is removed.
        along: that component, in units of the row's unit vector (n, 1).
        spread: weight of the anti-collapse term.
    """
    if not spread:
        return torch.addcmul(pulled, rows, _over(along, length, far), value=-1), 0.0
    square = far * far.T  # (n, n)
    cosines = (rows @ rows.T) / square
    # Ahat Ahat^T - I
    apart = cosines - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    loss = spread * apart.square().mean()
    apart = apart * (4 * spread / apart.numel())  # each pair of rows occurs twice in the symmetric matrix
    along = along + (apart * cosines).sum(1, keepdim=True)
    return torch.addmm(pulled, apart / square - torch.diag(_over(along, length, far).squeeze(1)), rows), loss


def _over(along: Tensor, length: Tensor, far: Tensor) -> Tensor:
    """`along / (length far)`; the length itself has no EPSILON and may be zero, where `along` is zero too."""
    return along / length.clamp_min(torch.finfo(length.dtype).tiny) / far


def match(a: Tensor, b: Tensor, scale: float) -> Pulled:
    """The loss of an autoencoder's pair, both (batch, d) or (batch, channels, H, ...); centred maps for images only."""
    weight = scale * (a.shape[2] if a.dim() > 2 else 1)
    apart = a - b
    # s H mean (a - b)^2 and its gradient
    loss, for_a = weight * apart.square().mean(), apart * (2 * weight / a.numel())
    for_b = -for_a
    if a.dim() > 2:
        (u, length_u), (v, length_v) = _centred(a), _centred(b)
        apart = u - v  # c(a) - c(b)
        loss = loss + weight * apart.square().mean()
        pulled = apart * (2 * weight / a.numel())
        for_a = for_a + _uncentred(pulled, u, length_u).view_as(a)
        for_b = for_b - _uncentred(pulled, v, length_v).view_as(b)
    return loss, for_a, for_b


def _centred(maps: Tensor) -> tuple[Tensor, Tensor]:
    """c(maps) (batch, channels, pixels): each map without its mean, over its length plus EPSILON; and that length."""
    flat = maps.flatten(2)
    flat = flat - flat.mean(2, keepdim=True)  # (batch, channels, pixels)
    length = flat.norm(dim=2, keepdim=True)
    return flat / (length + EPSILON), length


def _uncentred(gradient: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """Turn a gradient with respect to c(maps) into one with respect to the maps, flattened."""
    far = length + EPSILON
    along = (gradient * unit).sum(2, keepdim=True) * far / length.clamp_min(torch.finfo(length.dtype).tiny)
    back = (gradient - unit * along) / far  # through the division by the length
    return back - back.mean(2, keepdim=True)  # through the subtraction of the mean
