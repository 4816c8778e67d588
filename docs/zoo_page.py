"""The page that says which rule trains which model, of what `benchmarks/zoo.py` measured."""

import re

from result_pages import NOTE, joined
from tables import Row, facts, table

NAME = re.compile(r"'([^']+)'(?: \(\w+\))?")
DETAIL = re.compile(
    rf"{NAME.pattern}|[\[(][\d, ]+[\])]|\b\d+x?\d*\b|\b\w+(?=, which needs one tensor| needs the one tensor)"
)


def zoo_page(zoo: Row) -> str:
    """The page, of what zoo.json in benchmarks/ holds; it may be empty."""
    parts = [
        NOTE,
        "# Which rule trains which model",
        "Small versions of models as people write them, each with every rule. *Trained* means that every applicable check "
        "of {py:func}`~apical.testing.check_model` passed: by intervention, each layer gets the rule's credit, and nothing "
        "gets backpropagation's in its place. Otherwise the rule refuses the model: the table has the number of the "
        "reason below, and the first module that it names. Rules that simulate or invert a whole network take chains and "
        "rows of blocks only, which few of these models are. {doc}`bring-your-own-model` has the remedies.",
    ]
    rows = zoo.get("rows") or []
    if not rows:
        return joined([*parts, "No measurement is kept here yet: `python benchmarks/zoo.py` makes one."])
    models = dict(zoo["models"])
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    reasons: dict[str, int] = {}
    cells: dict[tuple[str, str], str] = {}
    for row in rows:
        why = f"Fault: {row['fault']}" if row["fault"] else row["refused"]
        cells[row["model"], row["rule"]] = "trained" if row["trained"] else _refusal(why, reasons)
    columns: dict[tuple[str, ...], list[str]] = {}
    for rule in rules:
        columns.setdefault(tuple(cells[model, rule] for model in models), []).append(rule)
    header = ["model", *(" ".join(f"`{rule}`" for rule in group) for group in columns.values())]
    body = table(header, [[title, *line] for title, *line in zip(models.values(), *columns, strict=True)], 99)
    parts.append(f":::{{container}} small\n{body}\n:::")
    parts += ["## Refused because", "\n".join(f"{i}. {_plain(why)}" for why, i in reasons.items())]
    passed = dict.fromkeys(rules, frozenset[str]())
    for row in rows:
        passed[row["rule"]] |= frozenset(row["checks"])
    checks = [[name, text, " ".join(f"`{r}`" for r in rules if name in passed[r])] for name, text in zoo["checks"].items()]
    applied = [line for line in checks if line[2]]
    parts += [
        "## What was checked",
        "All models were run in double precision. Compilation is slow, so one rule of each kind, feedback edges and cuts, "
        "was compiled; `check_model` compiles any rule on a model of yours.",
        table(("check", "what must hold", "passed by"), applied, 99),
    ]
    about = {"command": "python benchmarks/zoo.py", "seconds": zoo.get("seconds"), **(zoo.get("environment") or {})}
    return joined([*parts, facts(about)])


def _refusal(why: str, reasons: dict[str, int]) -> str:
    """The number of a sentence whose names and numbers are left out, and the first name in it."""
    named = NAME.search(why)
    found = reasons.setdefault(DETAIL.sub("…", why), len(reasons) + 1)
    return f"no ({found}) `{named[1]}`" if named else f"no ({found})"


def _plain(text: str) -> str:
    """A sentence of the program's, so that Markdown does not read anything into it."""
    plain = "".join(f"\\{c}" if c in "*_<>[]`" else c for c in text)
    return re.sub(r"apical \w+ --.*", r"`\g<0>`", plain)
