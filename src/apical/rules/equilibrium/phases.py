"""Nudges of equilibrium propagation, real or complex, the weights of their states in an estimate, and their agreement."""

from collections.abc import Sequence
from math import cos, pi, sin
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apical.core.noise import coins

Estimator = Literal["one-sided", "random-sign", "symmetric", "five-point", "holomorphic"]
ESTIMATORS = ("one-sided", "random-sign", "symmetric", "five-point", "holomorphic")


class Phases(NamedTuple):
    """One complex number per phase: `re` (P,), and `im` (Q,) of the last Q of them; the others are real.

    Values of phases are parts (P + Q, batch, ...): P real parts, then Q imaginary ones.
    """

    re: Tensor
    im: Tensor

    def times(self, parts: Tensor) -> Tensor:
        """Each phase's value times its number, of the same shape."""
        p, q = len(self.re), len(self.im)
        shape = (-1, *[1] * (parts.dim() - 1))
        re = self.re.view(shape)
        if q == 0:
            return parts * re
        im, real, imaginary = self.im.view(shape), parts[:p], parts[p:]
        turned = real[p - q :] * re[p - q :] - imaginary * im
        return torch.cat((real[: p - q] * re[: p - q], turned, imaginary * re[p - q :] + real[p - q :] * im))

    @property
    def complex(self) -> Tensor:
        """The numbers themselves (P,), real where all of them are."""
        return torch.complex(self.re, F.pad(self.im, (len(self.re) - len(self.im), 0))) if len(self.im) else self.re

    def complex_values(self, rows: Tensor, batch: int) -> Tensor:
        """Values of phases (P, batch, ...) from rows (P batch + Q batch, ...), real where all phases are."""
        p, q = len(self.re), len(self.im)
        parts = rows.view(p + q, batch, *rows.shape[1:])
        if q == 0:
            return parts
        return torch.complex(parts[:p], torch.cat((torch.zeros_like(parts[: p - q]), parts[p:])))

    def conjugate_rows(self, parts: Tensor) -> Tensor:
        """Negate imaginary parts: the sum over rows of `a' b` is then the real part of the sum of `a b`."""
        q = len(self.im)
        return torch.cat((parts[: len(parts) - q], -parts[len(parts) - q :])) if q else parts


def phases(
    estimator: Estimator, size: float, points: int, like: Tensor, generator: torch.Generator | None
) -> tuple[Phases, Phases]:
    """beta_p and c_p; only one of a conjugate pair is settled, with twice the weight."""
    one, none = like.new_ones(1), like.new_zeros(0)
    if estimator in ("one-sided", "random-sign"):
        sign = coins((1,), like, generator) if estimator == "random-sign" else 1
        signed = sign * one * size
        return Phases(signed, none), Phases(-1 / signed, none)
    if estimator == "five-point":
        steps = size * like.new_tensor([1.0, -1.0, 2.0, -2.0])
        return Phases(steps, none), Phases(-like.new_tensor([8.0, -8.0, -1.0, 1.0]) / (12 * size), none)
    n = points if estimator == "holomorphic" else 2
    real = [1.0, -1.0] if n % 2 == 0 else [1.0]
    turns = [2 * pi * p / n for p in range(1, (n + 1) // 2)]
    re, im = real + [cos(turn) for turn in turns], [sin(turn) for turn in turns]
    times = [1.0] * len(real) + [2.0] * len(turns)
    beta = Phases(size * like.new_tensor(re), size * like.new_tensor(im))
    c_re = [-m / (n * size) * x for m, x in zip(times, re, strict=True)]  # 1 / exp(i turn) = exp(-i turn)
    c_im = [2 / (n * size) * y for y in im]
    return beta, Phases(like.new_tensor(c_re), like.new_tensor(c_im))


def shares(beta: Phases, c: Phases) -> Tensor:
    """`-beta_p c_p`, which is real: the weight of each settled phase in a mean over all (P,)."""
    share = -beta.re * c.re[: len(beta.re)]
    return share + F.pad(beta.im * c.im, (len(beta.re) - len(beta.im), 0)) if len(beta.im) else share


def off_branch(free: Sequence[Tensor], nudged: Sequence[Tensor], share: Tensor) -> Tensor:
    """Distance of the phases' mean state from the free one, relative to the phases' own distance; 0 without movement.

    The mean on the circle of a function that is analytic inside equals its value at the centre, up to
    O(beta^N). If the distance is not small, nudges are too large for a continuous branch of equilibria; more nudges do not
    help.
    """
    gaps, moves = [], []
    for s, centre in zip(nudged, free, strict=True):
        parts = s.view(-1, *centre.shape)[: len(share)]
        gaps.append(((parts * share.view(-1, *[1] * centre.dim())).sum(0) - centre).abs().amax())
        moves.append((parts - centre).abs().amax())
    return torch.stack(gaps).amax() / torch.stack(moves).amax().clamp_min(torch.finfo(free[0].dtype).tiny)
