"""Options of `apical audit`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from apical.cli.flags.shown import shown


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Measure what rules need that a brain may lack: weight transport, locality, locking, phases, robustness, cost."""

    rules: Positional[Annotated[tuple[str, ...], shown("RULES ...", "(default: all)")]] = ()
    """Rules to audit; see `apical list rules`."""
    model: Annotated[str, shown("NAME|FILE.py:CLASS", "(default: mlp-48-32)")] = "mlp-48-32"
    """Network, or your own. The no-derivative test needs a piecewise-linear activation such as ReLU."""
    data: Annotated[str, shown("NAME|FILE|FOLDER", "(default: digits)")] = "digits"
    """Data set on which the rules are trained before the audit; at most 2,000 images or 500 sequences are used."""
    epochs: Annotated[int, shown("N", "(default: 5)")] = 5
    """Epochs of that training."""
    lr: Annotated[float, shown("RATE", "(default: 0.02)")] = 0.02
    """Learning rate of that training, for every rule. Lower it if a rule diverges."""
    seed: Annotated[int, shown("N", "(default: 0)")] = 0
    """Seed of weights, feedback and data order."""
    out: Annotated[Path | None, shown("DIR", "(default: print only)")] = None
    """Folder for audit.json and the figures audit and audit_numbers; must be new or empty."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace what is in --out."""
