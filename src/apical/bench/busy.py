"""Whether step times mean anything: on a machine that does other work as well they vary from epoch to epoch."""

import statistics
from collections.abc import Mapping, Sequence

LIMIT = 0.25
"""Share of the median that the middle half of the epochs' times may span."""
FEWEST = 4
"""Epochs below which nothing is said."""


def spread(times: Sequence[float]) -> float:
    """Distance between the quartiles over the median; 0 for fewer than :data:`FEWEST` times.

    >>> spread([1.0, 1.0, 1.0, 1.0, 9.0]), spread([1.0, 1.0, 2.0, 3.0, 3.0])
    (0.0, 1.0)
    """
    if len(times) < FEWEST:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle if middle > 0 else 0.0


def busy_note(times: Mapping[str, Sequence[float]]) -> str:
    """A sentence where the times of some rule spread too far to compare; otherwise nothing.

    Args:
        times: of each rule, a step's time in every epoch of every seed.
    """
    widths = {rule: spread(values) for rule, values in times.items()}
    rule = max(widths, key=lambda name: widths[name], default="")
    if not rule or widths[rule] <= LIMIT:
        return ""
    return (
        f"Times are rough, because the machine was busy: the middle half of the step times of {rule} spans "
        f"{100 * widths[rule]:.0f} % of their median (more than {100 * LIMIT:.0f} %)."
    )
