"""What papers claim about the plausibility of rules, in the terms of the audit, for holding against what it measures."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Claims(NamedTuple):
    """A table of claims.

    Attributes:
        source: paper and table.
        columns: short names of rules, by the paper's heading of the column.
        rows: for each criterion a verdict per column; a claim that says "unclear" is left out.
    """

    source: str
    columns: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, tuple[str, ...]]


def claimed(rule: str, tables: Iterable[Claims]) -> dict[str, str]:
    """What the tables say of a rule, by criterion; empty where they say nothing; the first that says anything counts.

    >>> table = Claims("a paper", {"WM": ("wm",), "SF": ("usf", "frsf")}, {"one_phase": ("no", "unclear")})
    >>> claimed("wm", [table]), claimed("usf", [table]), claimed("dfc", [table])
    ({'one_phase': 'no'}, {}, {})
    """
    claims: dict[str, str] = {}
    for table in tables:
        for place, rules in enumerate(table.columns.values()):
            if rule in rules:
                claims = {key: row[place] for key, row in table.rows.items() if row[place] != "unclear"} | claims
    return claims
