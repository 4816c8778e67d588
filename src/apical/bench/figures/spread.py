"""Mean and spread of a measure over the seeds of a rule."""

from collections.abc import Sequence

import numpy as np

from apical.bench.report.records import Array, Run


def spread(runs: Sequence[Run], key: str, layer: str | None = None, first: int = 0) -> tuple[Array, Array, Array, int]:
    """Epochs from `first` on, mean and standard deviation (NaN for one run) over the runs, and the number of runs."""
    curves = [(run.epochs, run.curve(key, layer)) for run in runs]
    curves = [(epochs, values) for epochs, values in curves if has_values(values)]
    axis = sorted({epoch for epochs, _ in curves for epoch in epochs})
    late = np.array(axis, dtype=np.float64) >= first
    table = np.full((len(curves), len(axis)), np.nan)
    for row, (epochs, values) in zip(table, curves, strict=True):
        row[[axis.index(epoch) for epoch in epochs]] = values
    count = np.isfinite(table).sum(axis=0)
    mean = column_mean(table)
    squares = np.nansum((table - mean) ** 2, axis=0)
    deviation = np.sqrt(squares / np.where(count > 1, count - 1, np.nan))
    return np.array(axis, dtype=np.float64)[late], mean[late], deviation[late], len(curves)


def column_mean(table: Array) -> Array:
    """Mean of each column over its finite entries; NaN where there is none."""
    count = np.isfinite(table).sum(axis=0)
    mean: Array = np.nansum(table, axis=0) / np.where(count > 0, count, np.nan)
    return mean


def has_values(values: Array) -> bool:
    """Whether any is finite."""
    return bool(np.isfinite(values).any())
