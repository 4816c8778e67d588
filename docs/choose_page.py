"""The page to choose a rule by: six lines, then families, then everything that was measured, folded."""

import statistics
from collections.abc import Mapping
from pathlib import Path

from result_pages import title
from rule_pages import (
    NO_AUDIT,
    accuracies,
    audit_table,
    benchmark_rows,
    costs,
    page_name,
    ratios_to_bp,
    residual,
    rule_classes,
    scores,
    short_names,
    step_time,
)
from sweep_pages import best_of_all
from tables import Row, grouped, load, number, present, table, toml


def choice(root: Path) -> dict[str, str]:
    """The generated blocks."""
    audit = load(root / "results" / "audit" / "audit.json")
    lines = [line for each in toml("choose")["lines"] if (line := decision(each, audit or {"rows": []}, root))]
    decisions = table(("you want", "take", "because"), lines, 99)
    return {
        "decision": f":::{{container}} stacked decision\n{decisions}\n:::" if lines else "Nothing is kept to decide by yet.",
        "families": families(root),
        "audit": NO_AUDIT if audit is None else audit_table(audit),
        "tuned": best_of_all(root),
        "accuracy": accuracies(root),
        "cost": costs(root),
    }


def decision(asked: Mapping[str, str], audit: Row, root: Path) -> list[str]:
    """What is wanted, the rule with the best accuracy of those that have it, and the numbers; empty if there is none."""
    folder = root / "results" / asked["comparison"]
    runs = load(folder / "summary.json") or []
    criteria = asked.get("criteria", ())
    fit = {row["rule"] for row in audit["rows"] if all(row["verdicts"].get(key, {}).get("good") for key in criteria)}
    members = toml("families").get(asked.get("family", ""), {})
    named = [name for kind in rule_classes().values() if kind.__name__ in members for name in short_names(kind)]
    means = {
        name: statistics.mean(values)
        for (name,), rows in grouped(runs, "rule").items()
        if name in (named or fit) and (values := present(rows, "test_accuracy"))
    }
    if not means:
        return []
    best = max(means, key=means.__getitem__)
    because = _score(folder, best) + (f"; {_score(root / 'results' / asked['also'], best)}" if "also" in asked else "")
    ratios = ratios_to_bp(benchmark_rows(root), [best], asked["network"])
    because += f"; a step takes {number(statistics.median(ratios), 2)} of backpropagation's time" if ratios else ""
    page = next(page for page, kind in rule_classes().items() if best in short_names(kind))
    return [asked["want"], f"[`{best}`](rules/{page}.md)", f"{because}."]


def _score(folder: Path, rule: str) -> str:
    seeds, _, score, backprop = scores(load(folder / "summary.json"), rule)
    return f"{score} % on [{title(folder)}](results/{folder.name}.md), where backpropagation has {backprop} (n = {seeds})"


def families(root: Path) -> str:
    """One line per family: its rules, the networks they take, and their time."""
    kinds = {kind.__name__: kind for kind in rule_classes().values()}
    lines = []
    for family, members in toml("families").items():
        mine = [kinds[name] for name in members]
        links = ", ".join(f"[{_plain(kind)}](rules/{page_name(kind)}.md)" for kind in mine)
        takes = {residual(kind) for kind in mine}
        networks = "chains and rows of blocks" if takes == {False} else "any" if takes == {True} else "differ by rule"
        ratios = [ratio for kind in mine for ratio in ratios_to_bp(benchmark_rows(root), short_names(kind), "MLP")]
        lines.append([family, links, networks, step_time(ratios)])
    text = table(("family", "rules", "networks", "time / BP, MLP"), lines, 3)
    return f":::{{container}} stacked families\n{text}\n:::"


def _plain(kind: type) -> str:
    """The title of a rule's page."""
    page = Path(__file__).parent / "rules" / f"{page_name(kind)}.md"
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").partition(":")[0]
