"""The page that says which rule trains which model, of what `benchmarks/zoo.py` measured."""

from result_pages import NOTE, joined
from tables import Row, facts, table


def zoo_page(zoo: Row) -> str:
    """The page, of what zoo.json in benchmarks/ holds; it may be empty."""
    parts = [
        NOTE,
        "# Which rule trains which model",
        "Small versions of models as people write them, each with every rule. *Trained* means that every applicable check "
        "of {py:func}`~apical.testing.check_model` passed: by intervention, each layer gets the rule's credit, and nothing "
        "gets backpropagation's in its place. Otherwise the rule refuses the model, for the numbered reason below.",
    ]
    rows = zoo.get("rows") or []
    if not rows:
        return joined([*parts, "No measurement is kept here yet: `python benchmarks/zoo.py` makes one."])
    models = dict(zoo["models"])
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    reasons: dict[str, int] = {}
    cells: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["trained"]:
            cells[row["model"], row["rule"]] = "trained"
        else:
            why = f"Fault: {row['fault']}" if row["fault"] else row["refused"]
            cells[row["model"], row["rule"]] = f"no ({reasons.setdefault(why, len(reasons) + 1)})"
    parts.append(table(("rule", *models.values()), [[f"`{r}`", *(cells[m, r] for m in models)] for r in rules], 99))
    parts += ["## Refused because", "\n".join(f"{i}. {_plain(why)}" for why, i in reasons.items())]
    passed = dict.fromkeys(rules, frozenset[str]())
    for row in rows:
        passed[row["rule"]] |= frozenset(row["checks"])
    checks = [[name, text, ", ".join(f"`{r}`" for r in rules if name in passed[r])] for name, text in zoo["checks"].items()]
    parts += ["## What was checked", table(("check", "what must hold", "tried with"), checks, 99)]
    about = {"command": "python benchmarks/zoo.py", "seconds": zoo.get("seconds"), **(zoo.get("environment") or {})}
    return joined([*parts, facts(about)])


def _plain(text: str) -> str:
    """A sentence of the program's, so that Markdown does not read anything into it."""
    return "".join(f"\\{c}" if c in "*_<>[]`" else c for c in text)
