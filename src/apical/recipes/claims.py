"""What papers claim about the plausibility of rules, in the terms of the audit, for holding against what it measures."""

from typing import NamedTuple

RULE_NAMES = {
    "BP": ("bp",),
    "FA": ("fa",),
    "DFA": ("dfa",),
    "SF": ("usf", "brsf", "frsf"),
    "KP": ("kp",),
    "WM": ("wm",),
    "PFA": ("pfa",),
}
"""Short names of the paper's columns; PAL, its eighth, is not built."""


class Claims(NamedTuple):
    """A table of claims: for each criterion a verdict per column; a claim that says "unclear" is left out."""

    source: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]


PFA_TABLE = Claims(
    "arXiv 2405.20594 version 1, table 1",
    ("BP", "FA", "DFA", "SF", "KP", "WM", "PFA"),
    {
        "no_sign_transport": ("no", "yes", "yes", "no", "yes", "yes", "yes"),
        "no_magnitude_transport": ("no", "yes", "yes", "yes", "yes", "yes", "yes"),
        "one_phase": ("yes", "yes", "yes", "unclear", "yes", "no", "yes"),
        "no_symmetry": ("no", "partly", "partly", "partly", "no", "no", "yes"),
        "close_to_backprop": ("yes", "no", "no", "no", "yes", "yes", "yes"),
    },
)
"""Its row "BP-level accuracy" is answered by results, not by an audit. What it calls no separate phase for feedback learning
is asked here as one response per step."""


def claimed(rule: str, table: Claims = PFA_TABLE) -> dict[str, str]:
    """What the table says of a rule, by criterion; empty where it says nothing.

    >>> claimed("wm")["one_phase"], "one_phase" in claimed("usf"), claimed("dfc")
    ('no', False, {})
    """
    for place, column in enumerate(table.columns):
        if rule in RULE_NAMES[column]:
            return {key: row[place] for key, row in table.rows.items() if row[place] != "unclear"}
    return {}
