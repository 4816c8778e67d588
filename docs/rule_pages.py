"""The generated parts of the pages on rules: names, audit, results, cost, the overview, and the tables to choose by."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmark_pages import setting
from circuits import circuits
from result_pages import epochs, finished, in_budget, score, study_sentence, title, verdict_sentence
from tables import Cell, Row, benchmarks, code, comparisons, fitting, load, number, own_studies, present, table, tabulate
from torch.nn import Linear

import apical.exports
from apical.bench.figures.audit import number_of
from apical.bench.names import AROUND, RULES
from apical.core.credit import CreditRule
from apical.rules.backprop import Backprop
from apical.testing import settings
from apical.testing.comparison import Factory
from apical_papers.rates.recipe import FOLDERS

NO_AUDIT = "No audit of plausibility is kept in `results/audit` yet."
WIDE = 5
"""Rules from which a comparison is wide enough to choose by."""


def rule_classes() -> dict[str, type[CreditRule]]:
    """Page name -> class, of every exported rule."""
    exported = vars(apical.exports).values()
    rules = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, CreditRule) and kind is not CreditRule]
    order = list(dict.fromkeys(entry.build for entry in RULES.values()))
    rules.sort(key=lambda kind: order.index(kind) if kind in order else len(order))
    return {page_name(kind): kind for kind in rules}


def page_name(kind: type) -> str:
    """The page of a rule is called after its file."""
    return kind.__module__.rpartition(".")[2].replace("_", "-")


def short_names(kind: type) -> list[str]:
    """The rule's names on the command line; "NAME:RULE" of a rule around another."""
    own = [name for name, entry in RULES.items() if entry.build is kind]
    return own + [f"{name}:RULE" for name, (wrap, _) in AROUND.items() if type(wrap(Backprop(Linear(2, 2)))) is kind]


def titled(name: str) -> str:
    """What a short name is."""
    return AROUND[name.removesuffix(":RULE")][1] if name.endswith(":RULE") else RULES[name].title


def rule_blocks(kind: type[CreditRule], root: Path) -> dict[str, str]:
    """The generated blocks of a rule's page."""
    names = short_names(kind)
    rows = [[f"`{name}`", titled(name)] for name in names]
    measured = [*audit_part(names, root), *results_part(names, root), *cost_part(names, root)]
    listed = table(("on the command line", "what it is"), rows, numeric_from=2)
    return {
        "names": "\n\n".join([listed, *drawn_part(page_name(kind), names, root)]),
        "measured": "\n\n".join(measured),
    }


def drawn_part(page: str, names: Sequence[str], root: Path) -> list[str]:
    """Who sends what to whom, with a learning curve beside it where one is kept."""
    circuit = circuits().get(page)
    if circuit is None:
        return []
    parts = [f"::::{{container}}\n```{{raw}} html\n:file: ../circuits/{page}.svg\n```\n\n{circuit.caption}\n::::"]
    curve = learning_curve(names, root)
    if curve is not None:
        about = f"[{title(curve)}](../results/{curve.name}.md): test accuracy over epochs, mean and spread over seeds."
        image = f"![Learning curves: {title(curve)}](../../results/{curve.name}/figures/accuracy.svg)"
        parts.append(f"::::{{container}}\n{image}\n\n{about}\n::::")
    return [":::::{container} beside", *parts, ":::::"]


def learning_curve(names: Sequence[str], root: Path) -> Path | None:
    """The comparison with a drawn accuracy that has most of these rules; among equals the demo, or that of fewest rules."""
    found = []
    for folder in comparisons(root):
        rules = {row["rule"] for row in load(folder / "summary.json") if row["epochs"] > 1}
        if (folder / "figures" / "accuracy.svg").exists() and rules & {*names}:
            found.append((len(rules & {*names}), folder.name == "demo", -len(rules), folder))
    return max(found)[-1] if found else None


def audit_part(names: Sequence[str], root: Path) -> list[str]:
    """The rule's rows of the audit."""
    audit = load(root / "results" / "audit" / "audit.json")
    if audit is None:
        return ["## Audit", NO_AUDIT]
    titles = {each["key"]: each["title"] for each in audit["criteria"]}
    rows = [
        [f"`{row['rule']}`", titles[key], "" if found["verdict"] == "measured" else sign(found), found["text"]]
        for row in audit["rows"]
        if row["rule"] in names
        for key, found in row["verdicts"].items()
        if key in titles
    ]
    if not rows:
        return ["## Audit", "The kept audit does not include this rule."]
    about = (
        f"Computed by `{audit['command']}` on {audit['model']}; {{doc}}`/audit` says how. "
        "✓ yes, ~ partly, ✗ no, - not applicable. {doc}`/choose` compares all rules."
    )
    forms = [f"`{row['rule']}` with {row['form']}" for row in audit["rows"] if row["rule"] in names and row.get("form")]
    about += f" Examined in the form that computes as the network would: {'; '.join(forms)}." if forms else ""
    return ["## Audit", about, table(("rule", "criterion", "verdict", "evidence"), rows, numeric_from=4)]


def results_part(names: Sequence[str], root: Path) -> list[str]:
    """Every comparison and study that has the rule, with its numbers beside backpropagation's."""
    rows = []
    for folder in comparisons(root):
        summary, judged = load(folder / "summary.json"), in_budget(folder, load(folder / "verdicts.json") or [])
        for name in names:
            if any(row["rule"] == name for row in summary):
                sentence = verdict_sentence([row for row in judged if row["rule"] == name]) if judged else "-"
                link = f"[{title(folder)}](../results/{folder.name}.md)"
                rows.append([link, f"`{name}`", sentence or "-", *scores(summary, name)])
    parts = ["## Results"]
    if rows:
        header = ("comparison", "rule", "reference numbers", "seeds", "epochs", "score", "backpropagation")
        parts += ["Test accuracy in %, or test loss for numeric targets; mean ± standard deviation over seeds."]
        parts += [f":::{{container}} stacked compared\n{table(header, rows, numeric_from=3)}\n:::"]
    further = []
    for folder in own_studies(root):
        content = load(folder / "results.json")
        mine = [row for row in content.get("verdicts") or [] if belongs(row["rule"], names)]
        if mine or any(belongs(key, names) for key in content.get("curves") or {}):
            sentence = study_sentence({"verdicts": mine})
            further.append(f"- [{content['title']}](../results/{folder.name}.md). {sentence}".rstrip())
    for path in sorted((root / "results").glob("*.json")):
        content = load(path)
        listed = content.get("rows") if isinstance(content, dict) else content
        if any(row.get("rule") in names for row in listed or []) or path.stem.split("-")[0] in names:
            further.append(f"- [{content.get('title', path.stem)}](../results/{path.stem}.md)")
    parts += ["Studies:", "\n".join(further)] if further else []
    return parts if len(parts) > 1 else ["## Results", "None are kept here yet."]


def belongs(key: str, names: Sequence[str]) -> bool:
    """Whether a study's row is about the rule: by its name, among others', or by a form of it such as `tdca-relative`."""
    if ", " in key:
        return any(belongs(part, names) for part in key.split(", "))
    if key in RULES:
        return key in names
    near = [name for name in RULES if key.startswith(f"{name}-")]
    return bool(near) and max(near, key=len) in names


def scores(rows: Sequence[Row], name: str) -> list[str]:
    """Seeds, epochs and score of a rule in a comparison, and the score of backpropagation there."""
    runs, reference = ([row for row in finished(rows) if row["rule"] == rule] for rule in (name, "bp"))
    return [str(len(runs)), epochs(runs), score(runs), "-" if name == "bp" else score(reference)]


def cost_part(names: Sequence[str], root: Path) -> list[str]:
    """Time and memory of a step relative to backpropagation, wherever it was measured."""
    rows = [row for row in benchmark_rows(root) if row["rule"] in names]
    about = "A training step relative to backpropagation's in the same run; {doc}`/benchmarks` says how this was measured."
    columns: dict[str, Cell] = {
        "rule": code("rule"),
        "model": setting,
        "device": lambda row: str(row.get("device") or "cpu"),
    }
    columns |= {"time / BP": lambda row: number(row.get("ratio_to_bp"), 2)}
    columns |= {"peak memory / BP": lambda row: number(row.get("peak_memory_ratio"), 2)}
    return ["## Time and memory", about, tabulate(rows, columns, numeric_from=3)] if rows else []


def benchmark_rows(root: Path) -> list[Row]:
    """The rows of every benchmark of training steps."""
    files = benchmarks(root)
    return [row for name in ("results", "control", "ccl") for row in files.get(name, {}).get("rows") or []]


def overview(root: Path) -> str:
    """One line per rule, and the list of the pages."""
    rows = []
    for page, kind in rule_classes().items():
        names = ", ".join(f"`{name}`" for name in short_names(kind))
        ratios = ratios_to_bp(benchmark_rows(root), short_names(kind), "MLP")
        rows.append([f"[`{kind.__name__}`](rules/{page}.md)", names, "yes" if residual(kind) else "no", step_time(ratios)])
    header = ("rule", "on the command line", "residual networks", "time / BP, MLP")
    pages = "\n".join(f"rules/{page}" for page in rule_classes())
    return f"{table(header, rows, numeric_from=3)}\n\n```{{toctree}}\n:hidden:\n\n{pages}\n```"


def residual(kind: type[CreditRule]) -> bool:
    """Whether the rule takes the residual BatchNorm network of the conformance suite, or chains of layers alone.

    A rule around another takes what that one takes, if it takes it around backpropagation.
    """
    wraps = [wrap for name, (wrap, _) in AROUND.items() if f"{name}:RULE" in short_names(kind)]
    factory: Factory = (lambda model, loss: wraps[0](Backprop(model, loss))) if wraps else kind
    return len(settings(factory)) == 2


def step_time(ratios: Sequence[float]) -> str:
    """The range of times relative to backpropagation, over names and settings."""
    low, high = (f"{value:.2f}" for value in (min(ratios, default=0), max(ratios, default=0)))
    return "-" if not ratios else low if low == high else f"{low} to {high}"


def ratios_to_bp(rows: Sequence[Row], names: Sequence[str], network: str) -> list[float]:
    """Times of a step relative to backpropagation's, of rules on a kind of network."""
    return present((row for row in rows if row["rule"] in names and network in row["model"]), "ratio_to_bp")


def audit_table(audit: Row) -> str:
    """All rules by all criteria, the numbers, what the criteria ask, and for each the rules that do well."""
    rules, criteria = audit["rows"], audit["criteria"]
    counted = [c for c in criteria if any(row["verdicts"][c["key"]]["verdict"] == "measured" for row in rules)]
    asked = [c for c in criteria if c not in counted and any(sign(row["verdicts"][c["key"]]) != "-" for row in rules)]
    reference = next((row for row in rules if row["rule"] == "bp"), None)
    relative = {"multiply_adds", "held"} if reference else set()
    titles = [c["title"] + (", relative to bp" if c["key"] in relative else "") for c in counted]
    signs = [[f"`{row['rule']}`", *(sign(row["verdicts"][c["key"]]) for c in asked)] for row in rules]
    numbers = [
        [f"`{row['rule']}`", *(counted_cell(c["key"], row["verdicts"][c["key"]], reference) for c in counted)]
        for row in rules
    ]
    good = {c["key"]: " ".join(f"`{row['rule']}`" for row in rules if row["verdicts"][c["key"]]["good"]) for c in asked}
    questions = [[c["title"], c["question"], good.get(c["key"], "")] for c in (*asked, *counted)]
    return "\n\n".join(
        [
            f"Computed by `{audit['command']}` on {audit['model']}; {{doc}}`audit` says how.",
            "![Rules against criteria](../results/audit/audit.png)",
            "✓ yes, ~ partly, ✗ no, - not applicable:",
            table(("rule", *(c["title"] for c in asked)), signs, 99),
            "Robustness in degrees by which updates turn, and cost:",
            table(("rule", *titles), numbers, 1),
            table(("criterion", "the question", "✓ for"), questions, 99),
        ]
    )


def sign(verdict: Row) -> str:
    """A verdict as a table shows it."""
    return {"yes": "✓", "no": "✗", "partly": "~", "not applicable": "-"}[verdict["verdict"]]


def counted_cell(key: str, verdict: Row, reference: Row | None) -> str:
    """A measured number as a table shows it."""
    return number_of(key, verdict, reference) if verdict["verdict"] == "measured" else "-"


def accuracies(root: Path) -> str:
    """Test accuracy of the rules in every comparison with many of them."""
    columns: dict[str, str] = {}
    found: dict[tuple[str, str], str] = {}
    for folder in comparisons(root):
        rows = load(folder / "summary.json")
        names = list(dict.fromkeys(row["rule"] for row in rows))
        if folder.name not in FOLDERS and len(names) >= WIDE and present(rows, "test_accuracy"):
            ended = epochs(row for row in rows if row.get("status") != "diverged")
            columns[folder.name] = f"[{folder.name}](results/{folder.name}.md), {ended} epochs"
            found |= {(name, folder.name): scores(rows, name)[2] for name in names}
    if not columns:
        return "No comparison of many rules is kept here yet."
    names = [name for name in RULES if any((name, column) in found for column in columns)]
    lines = [[f"`{name}`", *(found.get((name, column), "-") for column in columns)] for name in names]
    return fitting(("rule", *columns.values()), lines)


def costs(root: Path) -> str:
    """Time of a step relative to backpropagation: the median over the settings of each kind of network."""
    kinds = ("MLP", "LeNet", "ResNet")
    rows = benchmark_rows(root)
    lines = []
    for name in RULES:
        ratios = [ratios_to_bp(rows, [name], kind) for kind in kinds]
        if any(ratios):
            lines.append([f"`{name}`", *(number(statistics.median(each), 2) if each else "-" for each in ratios)])
    return table(("rule", *(f"{kind}, time / BP" for kind in kinds)), lines) if lines else "No benchmark is kept here yet."
