"""How alike two populations represent the same samples."""

from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return linear centred kernel alignment (Kornblith et al., arXiv 1905.00414), 0 to 1; NaN if a population is constant.

    `|Yc^T Xc|^2 / (|Xc^T Xc| |Yc^T Yc|)` in Frobenius norms, by the samples' Gram matrices where those are smaller.

    Args:
        x: activities (n, d).
        y: activities (n, d'), of the same samples.

    >>> import torch
    >>> x = torch.randn(20, 3)
    >>> round(linear_cka(x, 2 * x + 1), 6)
    1.0
    """
    x, y = (a.detach().double() - a.detach().double().mean(0) for a in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):
        gram_x, gram_y = x @ x.T, y @ y.T
        return float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
