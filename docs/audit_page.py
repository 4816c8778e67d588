"""The tables of kept audits: rules against criteria, narrow enough for a phone, and what the audit does not take."""

from pathlib import Path

from rule_pages import counted_cell, sign
from tables import Row, load, signs

from apical.bench.names import RULES

FOLDERS = {"perceptron": "audit", "transformer": "audit-gpt", "graph": "audit-graph", "flow": "audit-flow"}
"""Block of the page -> folder under results/."""


def audit_blocks(root: Path) -> dict[str, str]:
    """The generated blocks of the page: the criteria by number, and the audits that are kept."""
    audits = {name: load(root / "results" / folder / "audit.json") for name, folder in FOLDERS.items()}
    known: Row = next((audit for audit in audits.values() if audit is not None), {"criteria": ()})
    listed = "; ".join(f"**{i}** {c['title']}" for i, c in enumerate(known["criteria"], 1))
    return {"criteria": f"Columns are the criteria above: {listed}."} | {
        name: f"Not kept yet: `apical audit --out results/{FOLDERS[name]}`." if audit is None else findings(audit)
        for name, audit in audits.items()
    }


def findings(audit: Row) -> str:
    """Signs and numbers of one audit, rows with equal signs as one; and what papers claim otherwise."""
    numbers = {c["key"]: i for i, c in enumerate(audit["criteria"], 1)}
    measured = {key for key in numbers if any(row["verdicts"][key]["verdict"] == "measured" for row in audit["rows"])}
    reference = next((row for row in audit["rows"] if row["rule"] == "bp"), None)
    asked = [key for key in numbers if key not in measured]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in audit["rows"]:
        said = tuple(sign(row["verdicts"][key]) for key in asked)
        kind = RULES[row["rule"]].build if row["rule"] in RULES else None
        groups.setdefault((repr(kind), *said), []).append(row)
    lines = [[" ".join(f"`{row['rule']}`" for row in rows), *said] for (_, *said), rows in groups.items()]
    counts = [
        [f"`{row['rule']}`", *(counted_cell(key, row["verdicts"][key], reference) for key in numbers if key in measured)]
        for row in audit["rows"]
    ]
    epochs = f"{audit['epochs']} epoch{'s' if audit['epochs'] > 1 else ''}"
    parts = [
        f"Computed by `{audit['command']}` on {audit['model']}, after {epochs} of {audit['data']}. "
        "✓ yes, ~ partly, ✗ no, - not applicable.",
        signs(("rule", *(str(numbers[key]) for key in asked)), lines),
        "<details><summary>Robustness, in degrees by which updates turn, and cost</summary>",
        signs(("rule", *(str(i) for key, i in numbers.items() if key in measured)), counts, 1),
        "</details>",
    ]
    if claims := _claims(audit, numbers):
        parts.append(f"Differs from {audit['claims']}: {claims}.")
    if audit["refused"]:
        reasons = "; ".join(f"`{rule}`, for {why}" for rule, why in audit["refused"].items())
        parts.append(f"Not audited: {reasons}.")
    return "\n\n".join(parts)


def _claims(audit: Row, numbers: dict[str, int]) -> str:
    """Claims that the audit does not agree with."""
    return "; ".join(
        f"`{row['rule']}` on {numbers[key]} is {row['verdicts'][key]['verdict']}, claimed {claim['claimed']}"
        for row in audit["rows"]
        for key, claim in row["claims"].items()
        if not claim["agrees"]
    )
