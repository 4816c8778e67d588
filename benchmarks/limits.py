"""Lower bounds of a training step: its matrix products timed alone, and the passes over memory that its mathematics needs.

The products, and solutions of linear systems, are those of one actual step, repeated in sequence with the same tensors. A
feedback weight that depends on the forward weight must be computed in every step: this moves a minimum number of bytes, at
the speed at which this machine adds two matrices of the same shapes.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv", "convolution", "convolution_backward"}
SOLVES = {"linalg_lu_factor_ex", "linalg_lu_solve", "_linalg_solve_ex", "linalg_cholesky_ex", "cholesky_solve"}

FORCED = {
    "kp": ("W + c E", 12),
    "pfa": ("W + c E", 12),
    "pfa-o": ("W + c E", 12),
    "usf": ("s sign(W)", 8),
    "brsf": ("|U_t| sign(W)", 12),
    "frsf": ("|U| sign(W)", 12),
}
"""Formula of the feedback weight, and bytes read and written per float32 entry."""

WATCHED = {"kp": 8, "pfa": 8, "pfa-o": 8}
"""Bytes per weight read to detect changes made by other code, after each step and before the next."""


class Products(TorchDispatchMode):
    """Records every matrix product, convolution and linear solve, to repeat them with the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.partition("::")[2] in PRODUCTS | SOLVES:
            self.calls.append(lambda: func(*args, **(kwargs or {})))
        return result


def products(step: Callable[[], None]) -> Callable[[], None]:
    """Return the products of one step, alone."""
    with Products() as noted, torch.no_grad(), torch.enable_grad():
        step()
    calls = noted.calls

    @torch.no_grad()
    def run() -> None:
        for call in calls:
            call()

    return run


def in_turns(runs: list[Callable[[], Any]], rounds: int, times: int) -> list[list[float]]:
    """Return seconds of process time of each, by round; each has one untimed run before the timed ones."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, found in zip(runs, seconds, strict=True):
            run()
            begun = time.process_time()
            for _ in range(times):
                run()
            found.append((time.process_time() - begun) / times)
    return seconds


def seconds_per_byte(shapes: list[torch.Size], rounds: int = 15) -> float:
    """Return the seconds per byte of adding matrices of these shapes: two are read and one is written."""
    sets: list[tuple[Tensor, Tensor, Tensor]] = [tuple(torch.randn(3, *shape)) for shape in shapes]  # type: ignore[misc]

    def add() -> None:
        for a, b, c in sets:
            torch.add(a, b, alpha=0.5, out=c)

    moved = sum(3 * a.numel() * a.element_size() for a, _, _ in sets)
    return statistics.median(in_turns([add], rounds, max(1, 2**22 // moved))[0]) / moved


def limits(
    name: str,
    step: Callable[[], None],
    bp: Callable[[], None],
    fed_back: int,
    per_byte: float,
    rounds: int,
    times: int,
    more: int = 0,
) -> dict[str, Any]:
    """Return the floor of a rule's step as a multiple of backpropagation's, and its parts.

    Args:
        name: name of the rule.
        step, bp: a training step of the rule and of backpropagation.
        fed_back: number of entries of all weights that propagate errors.
        per_byte: see :func:`seconds_per_byte`.
        rounds, times: number of rounds, and of calls of each in a round.
        more: bytes that the step must move and backpropagation need not, in addition to those of feedback weights.
    """
    own, its = products(step), products(bp)
    taken, basis, whole = in_turns([own, its, bp], rounds, times)
    what, each = FORCED.get(name, ("", 0))
    forced, watched = each * fed_back + more, WATCHED.get(name, 0) * fed_back
    further = statistics.median((a - b) / c for a, b, c in zip(taken, basis, whole, strict=True))
    step_of_bp = statistics.median(whole)
    floor = 1 + further + forced * per_byte / step_of_bp
    return {
        "products_ms": round(1e3 * statistics.median(taken), 4),
        "products_of_bp_ms": round(1e3 * statistics.median(basis), 4),
        "feedback": what,
        "forced_mb": round(forced / 1e6, 3),
        "watched_mb": round(watched / 1e6, 3),
        "gb_per_s": round(1e-9 / per_byte, 1) if per_byte else None,
        "floor": round(floor, 4),
        "floor_watched": round(floor + watched * per_byte / step_of_bp, 4),
    }
