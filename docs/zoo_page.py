"""The page that says which rule trains which model, of what `benchmarks/zoo.py` measured."""

import re
from collections.abc import Collection, Mapping, Sequence
from string import ascii_uppercase

from result_pages import NOTE, joined
from rule_pages import rule_classes, short_names
from tables import Row, facts, signs, table

NAME = re.compile(r"(?<!\w)'([^']+)'(?: \(\w+\))?")
DETAIL = re.compile(
    rf"{NAME.pattern}|[\[(][\d, ]+[\])]|\b\d+(?:\.\d+|x\d+)?\b|\b\w+(?=, which needs one tensor| needs the one tensor)"
)
FAULT = "fault"


def zoo_page(zoo: Row) -> str:
    """The page, of what zoo.json in benchmarks/ holds; it may be empty."""
    parts = [
        NOTE,
        "# Which rule trains which model",
        "Small versions of common models, each with every rule. ✓ means that every applicable check "
        "of {py:func}`~apical.testing.check_model` passed: by intervention, each layer gets the rule's credit, and nothing "
        "gets backpropagation's instead. A number refers to the reason, below the table, why the rules of the column "
        "refuse the model. Rules that simulate or invert a whole network accept only chains and rows of blocks; few of "
        "these models qualify. {doc}`bring-your-own-model` has the remedies.",
    ]
    rows = zoo.get("rows") or []
    if not rows:
        return joined([*parts, "No measurement is kept here yet: `python benchmarks/zoo.py` makes one."])
    models, reasons = dict(zoo["models"]), list(dict.fromkeys(_reason(row) for row in rows if row["refused"]))
    columns = dict(zip(ascii_uppercase, _columns(rows, models), strict=False))
    outcomes = {(row["model"], row["rule"]): row for row in rows}
    body = [
        [title, *(_cell([outcomes[model, rule] for rule in group], reasons) for group in columns.values())]
        for model, title in models.items()
    ]
    parts += [
        table(("column", "rules"), [[letter, merged(group)] for letter, group in columns.items()], 99),
        "A rule's page lists its short names; names in brackets are given if other names of the rule are in another column.",
        signs(("model", *columns), body),
        *_faults(rows, models),
        "## Refused because",
        "\n".join(f"{i}. {_plain(why)}.\n   *In {_where(why, rows, models)}.*" for i, why in enumerate(reasons, 1)),
        "## What was checked",
        "All models were run in double precision. Compilation is slow, so one rule of each kind, feedback edges and cuts, "
        "was compiled; `check_model` compiles any rule on your own model.",
        _checks(zoo["checks"], rows),
    ]
    about = {"command": "python benchmarks/zoo.py", "seconds": zoo.get("seconds"), **(zoo.get("environment") or {})}
    return joined([*parts, facts(about)])


def merged(names: Collection[str]) -> str:
    """Rules by class, each with its page; short names where only some of a class are meant.

    >>> merged(["fa"])
    '[FeedbackAlignment](rules/feedback-alignment.md)'
    """
    parts = []
    for page, kind in rule_classes().items():
        own = short_names(kind)
        meant = [name for name in own if name in names]
        if meant:
            some = f" ({' '.join(f'`{name}`' for name in meant)})" if len(meant) < len(own) else ""
            parts.append(f"[{kind.__name__}](rules/{page}.md){some}")
    return ", ".join(parts)


def _columns(rows: Sequence[Row], models: Collection[str]) -> list[list[str]]:
    """Rules that train the same models; what trains most is first."""
    results = {(row["model"], row["rule"]): FAULT if row["fault"] else row["trained"] for row in rows}
    groups: dict[tuple[bool | str, ...], list[str]] = {}
    for rule in dict.fromkeys(row["rule"] for row in rows):
        groups.setdefault(tuple(results[model, rule] for model in models), []).append(rule)
    return [groups[pattern] for pattern in sorted(groups, key=lambda pattern: -pattern.count(True))]


def _cell(rows: Sequence[Row], reasons: Sequence[str]) -> str:
    """The outcome that all of these rows have, or the numbers of their reasons."""
    if rows[0]["trained"] or rows[0]["fault"]:
        return "✓" if rows[0]["trained"] else FAULT
    return ", ".join(str(number) for number in sorted({reasons.index(_reason(row)) + 1 for row in rows}))


def _reason(row: Row) -> str:
    """The sentence of a refusal without its names and numbers."""
    return DETAIL.sub("…", row["refused"])


def _where(why: str, rows: Sequence[Row], models: Mapping[str, str]) -> str:
    """In which models, and the first module that is named there."""
    first: dict[str, str] = {}
    for row in rows:
        if row["refused"] and _reason(row) == why:
            named = NAME.search(row["refused"])
            first.setdefault(row["model"], f" (`{named[1]}`)" if named else "")
    if len(first) == len(models):
        return "all models"
    return "; ".join(f"{models[model]}{name}" for model, name in first.items())


def _faults(rows: Sequence[Row], models: Mapping[str, str]) -> list[str]:
    found = [f"- `{row['rule']}`, {models[row['model']]}: {_plain(row['fault'])}" for row in rows if row["fault"]]
    return ["## Faults", "\n".join(found)] if found else []


def _checks(about: Mapping[str, str], rows: Sequence[Row]) -> str:
    """What each check that applied holds to, and which rules passed it on some model."""
    passed = {name: {row["rule"] for row in rows if name in row["checks"]} for name in about}
    everyone = {row["rule"] for row in rows if row["trained"]}
    lines = [
        [name, text, "every rule that trains a model" if passed[name] == everyone else merged(passed[name])]
        for name, text in about.items()
        if passed[name]
    ]
    return f":::{{container}} stacked checks\n{table(('check', 'what must hold', 'passed by'), lines, 99)}\n:::"


def _plain(text: str) -> str:
    """A sentence of the program's, so that Markdown does not read anything into it."""
    plain = "".join(f"\\{c}" if c in "*_<>[]`" else c for c in text)
    return re.sub(r"apical \w+ --.*", r"`\g<0>`", plain)
