"""The pages of measured results: comparisons of rules, studies of their own, single files of rows, and their list."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import Row, console, facts, flat, grouped, load, loss_spread, number, present, significant, spread, table, words

from apical.bench.names import RULES
from apical.bench.papers import studies
from apical.bench.recipe import parse_options
from apical.bench.report.verdicts import Verdict, tally

NOTE = "<!-- made by docs/generate.py -->"

TAGS = {
    "fig": "is read off the published curves",
    "paper": "stands in the paper",
    "code": "is named in the authors' repository, for a single run",
    "order": "is an order of two rules",
    "ours": "comes from a prototype of ours, for settings that the paper does not have",
}
"""Where the numbers of a verdict come from."""

MARKS = {"statement": "statements of the paper", "our mark": "thresholds of our choice"}
"""The same for a study of its own."""

LARGE = 1_000_000
"""Bytes from which a figure is shown as PNG instead of SVG."""


def comparison_table(rows: Sequence[Row]) -> str:
    """One line per rule: accuracy (test loss, for regression) over its finished seeds, training loss, memory.

    Times are left to the benchmarks: a comparison shares its machine.
    """
    regression = bool(rows) and not present(rows, "test_accuracy") and bool(present(rows, "test_loss"))
    lines = []
    for (rule,), all_runs in grouped(rows, "rule").items():
        runs = [row for row in all_runs if row.get("status", "finished") == "finished"]
        memory = present(runs, "memory_mb")
        accuracies = [100 * value for value in present(runs, "test_accuracy")]
        lines.append(
            [
                f"`{rule}`",
                str(len(runs)) if len(runs) == len(all_runs) else f"{len(runs)} of {len(all_runs)}",
                " / ".join(sorted({str(row.get("epochs")) for row in runs})) or "-",
                loss_spread(present(runs, "test_loss")) if regression else spread(accuracies, 2),
                loss_spread(present(runs, "train_loss")),
                number(statistics.median(memory), 0) if memory else "-",
            ]
        )
    score = "test loss" if regression else "test accuracy, %"
    return table(("rule", "seeds", "epochs", score, "training loss", "memory, MB"), lines)


def title(folder: Path) -> str:
    """What a comparison was about."""
    plan = load(folder / "compare.json") or {}
    if plan.get("study") in studies():
        return studies()[plan["study"]].title
    recipe = plan.get("recipe") or {}
    return f"{recipe['model']} on {recipe['data']}" if {"model", "data"} <= recipe.keys() else folder.name


def origin(folder: Path) -> str:
    """The command and the commit behind a comparison, and where it left its recipe."""
    plan, rows = load(folder / "compare.json") or {}, load(folder / "summary.json")
    parts = [console(plan["command"])] if plan.get("command") else []
    commits = sorted({str(row["commit"]) for row in rows if row.get("commit")})
    parts += [f"Commit {', '.join(f'`{commit}`' for commit in commits)}."] if commits else []
    if str(plan.get("study")).startswith("dfc-"):
        parts.append(
            "{doc}`../feedback-control` says which version of the paper the numbers are from and where the recipe departs "
            "from the authors' procedure."
        )
    return "\n\n".join([*parts, departures(plan)]).strip()


def departures(plan: Row) -> str:
    """A sentence on the settings in which a comparison differs from the study it names; empty if there are none."""
    study = studies().get(plan.get("study") or "")
    free = {"rule_options", "seed", "device", "threads", "checkpoint_steps"}
    found: dict[str, None] = {}
    if study is None:
        return ""
    for rule, recipe in (plan.get("recipes") or {}).items():
        asked = study.row(rule).recipe.to_json()
        for key, value in recipe.items():
            if key not in free and not _chosen(rule, key, value, asked) and value != asked.get(key):
                instead = "not set" if asked.get(key) is None else words(asked[key])
                found[f"{key.replace('_', ' ')} {words(value)} instead of {instead}"] = None
        found |= dict.fromkeys(
            f"option {text} of `{rule}`" for text in _options(recipe.get("rule_options") or (), asked["rule_options"])
        )
    return f"**Not the recipe as it stands**: {'; '.join(found)}." if found else ""


def _chosen(rule: str, key: str, value: Any, asked: Row) -> bool:
    """Whether the command filled in a setting that the recipe leaves to the rule."""
    if key.startswith("weight_decay"):
        return not asked["weight_decay"]
    default = {"clip": "clip", "feedback_weight_decay": "feedback_decay"}.get(key)
    return default is not None and not asked[key] and rule in RULES and value == getattr(RULES[rule], default)


def _options(used: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Options of a rule's constructor that differ from those asked for, but for what the command adds of its own accord.

    An option that only the recipe has was added to it after this comparison, because a command can replace options only.
    """
    given, wanted = parse_options(used), parse_options(asked)
    added = {"first_layer", "form"} - wanted.keys()
    return [
        f"{key} {words(value)} instead of {words(wanted.get(key, 'the default'))}"
        for key, value in given.items()
        if key not in added and value != wanted.get(key)
    ]


def verdict_table(verdicts: Sequence[Row]) -> str:
    """One line per published number: what it is, its value, ours, and the verdict."""
    lines = []
    for row in verdicts:
        shown = Verdict(**row).shown
        expected = shown(row["published"])
        expected = f"at least {expected}" if row["tolerance"] is None else f"{expected} ± {row['tolerance']:g}"
        ours = "-" if row["measured"] is None else shown(row["measured"])
        ours += f" ± {shown(row['spread'])}" if row["spread"] is not None else ""
        seeds = str(row["n"]) if row["n"] else "-"
        lines.append([f"`{row['rule']}`", row["what"], str(row["epoch"]), expected, row["tag"], ours, seeds, row["verdict"]])
    return table(
        ("rule", "what", "after epoch", "reference", "source", "measured", "seeds", "verdict"), lines, numeric_from=2
    )


def verdict_sentence(verdicts: Sequence[Row]) -> str:
    """How many reference numbers were reproduced, by where they are from."""
    return tally([Verdict(**row) for row in verdicts])


def sources(verdicts: Sequence[Row]) -> str:
    """A sentence that explains the tags these verdicts have."""
    used = [tag for tag in TAGS if any(row["tag"] == tag for row in verdicts)]
    return f"Sources: {'; '.join(f'`{tag}` {TAGS[tag]}' for tag in used)}." if used else ""


def comparison_page(folder: Path) -> str:
    """The page of one comparison."""
    parts = [NOTE, f"# {title(folder)}", origin(folder), comparison_table(load(folder / "summary.json"))]
    verdicts = load(folder / "verdicts.json")
    if verdicts:
        parts += ["## Against reference numbers", verdict_sentence(verdicts), sources(verdicts), verdict_table(verdicts)]
        parts += distances(verdicts, load(folder / "summary.json"))
    parts += figures(folder / "figures", f"{folder.name}/figures")
    return joined(parts)


def distances(verdicts: Sequence[Row], summary: Sequence[Row]) -> list[str]:
    """How far the accuracies of runs that ended before their reference's epoch are from it: no verdicts."""
    lines, seen = [], set()
    for row in sorted(verdicts, key=lambda each: each["epoch"]):
        ends = [run for run in summary if run["rule"] == row["rule"] and run.get("test_accuracy") is not None]
        ends = [run for run in ends if run["status"] == "finished" and run["epochs"] < row["epoch"]]
        if row["verdict"] != "not run" or row["what"] != "test accuracy, %" or not ends or row["rule"] in seen:
            continue
        seen.add(row["rule"])
        ours = statistics.mean(100 * run["test_accuracy"] for run in ends)
        epochs = "/".join(map(str, sorted({run["epochs"] for run in ends})))
        lines.append(
            [
                f"`{row['rule']}`",
                f"{row['published']:.2f} after {row['epoch']} epochs",
                f"{ours:.2f} after {epochs}",
                f"{ours - row['published']:+.2f}",
                str(len(ends)),
            ]
        )
    if not lines:
        return []
    about = "Where training ended before the reference's epoch there is no verdict; these are the distances, in points."
    return [about, table(("rule", "reference", "measured", "distance", "seeds"), lines)]


def figures(folder: Path, where: str) -> list[str]:
    """The heading and the figures of a folder, which lies at `results/<where>`."""
    drawn = []
    for path in sorted(folder.glob("*.svg")):
        small = path.stat().st_size < LARGE or not path.with_suffix(".png").exists()
        shown = path if small else path.with_suffix(".png")
        drawn.append(f"![{path.stem.replace('_', ' ')}](../../results/{where}/{shown.name})")
    return ["## Figures", *drawn] if drawn else []


def joined(parts: Iterable[str]) -> str:
    """Paragraphs as a page."""
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def study_page(folder: Path) -> str:
    """The page of a study with measures of its own: `results.json` with verdicts and curves, and its figures."""
    results = load(folder / "results.json")
    parts = [NOTE, f"# {results.get('title', folder.name)}", str(results.get("about", ""))]
    parts += [console(results["command"])] if results.get("command") else []
    parts += [f"**Runs that failed**: {'; '.join(results['failures'])}."] if results.get("failures") else []
    parts += _study_verdicts(results)
    if results.get("curves"):
        parts += ["## At the end of training", final_values(results["curves"], results.get("measures") or {})]
    parts += figures(folder, folder.name)
    for each in results.get("tables") or []:
        first = next((i for i, cell in enumerate(each["rows"][0]) if cell[:1].isdigit()), len(each["header"]))
        parts += [f"## {each['title']}", each["note"], table(each["header"], each["rows"], numeric_from=first)]
    for name in ("checks", "settings", "environment"):
        parts += [f"## {name.capitalize()}", facts(results[name])] if flat(results.get(name) or {}) else []
    return joined(parts)


def _study_verdicts(results: Row) -> list[str]:
    parts = []
    if results.get("verdicts"):
        lines = [
            [
                row["figure"],
                f"`{row['rule']}`" if row["rule"] else "-",
                row["what"],
                row["mark"],
                _measured(row),
                str(row["n"] or "-"),
                row["source"],
                row["verdict"],
            ]
            for row in results["verdicts"]
        ]
        meaning = "\n".join(f"- *{name}*: {text}" for name, text in (results.get("sources") or {}).items())
        header = ("figure", "rule", "what", "mark", "measured", "n", "source", "verdict")
        parts += ["## Verdicts", study_sentence(results), meaning, table(header, lines, numeric_from=3)]
    if results.get("axes"):
        inside = {True: "inside", False: "outside", None: "not run"}
        axes = [
            [row["measure"].replace("_", " "), _range(row["limits"]), _range(row["range"]), inside[row["inside"]]]
            for row in results["axes"]
        ]
        parts += ["### Against the axes of the authors' plots", table(("measure", "axis", "mean curves", "verdict"), axes)]
    return parts


def _measured(row: Row) -> str:
    """A mean with its standard deviation or, where there is one, its interval."""
    if row.get("low") is not None:
        return f"{significant(row['mean'])} [{significant(row['low'], 3)}, {significant(row['high'], 3)}]"
    return significant(row["mean"]) + (f" ± {significant(row['std'], 2)}" if row["std"] is not None else "")


def _range(limits: Sequence[float] | None) -> str:
    return "-" if limits is None else " to ".join(map(significant, limits))


def study_sentence(results: Row) -> str:
    """How many of a study's verdicts are reproduced, by where their marks are from."""
    parts = []
    for (source,), rows in grouped(results.get("verdicts") or [], "source").items():
        tried = [row for row in rows if row["verdict"] != "not run"]
        if tried:
            parts.append(
                f"{sum(row['verdict'] == 'reproduced' for row in tried)} of {len(tried)} {MARKS.get(source, source)}"
            )
    return f"Reproduced: {'; '.join(parts)}." if parts else ""


def final_values(curves: Mapping[str, Mapping[str, Any]], measures: Mapping[str, str]) -> str:
    """One line per rule, one column per measure: mean and standard deviation over seeds after the last epoch."""
    known = dict.fromkeys(key for curve in curves.values() for key in curve["metrics"])
    columns = [key for key in (*measures, *(key for key in known if key not in measures)) if key in known]
    lines = []
    for rule, curve in curves.items():
        cells = [_last(curve["metrics"].get(key), curve["n"]) for key in columns]
        lines.append([f"`{rule}`", str(curve["n"]), str(curve["epochs"][-1]) if curve["epochs"] else "-", *cells])
    return table(("rule", "seeds", "epochs", *(measures.get(key, key.replace("_", " ")) for key in columns)), lines)


def _last(curve: Mapping[str, Sequence[float]] | None, n: int) -> str:
    if curve is None or not curve["mean"]:
        return "-"
    mean = significant(curve["mean"][-1])
    return mean if n < 2 else f"{mean} ± {significant(curve['std'][-1], 2)}"


def file_page(path: Path) -> str:
    """The page of a single results file: a list of rows, or an object with `rows` and, if it likes, `title`, `about`."""
    content = load(path)
    content = content if isinstance(content, dict) else {"rows": content}
    parts = [NOTE, f"# {content.get('title', path.stem)}", str(content.get("about", ""))]
    if content.get("command"):
        parts.append(console(content["command"]))
    rows = content.get("rows") or []
    columns = [key for key in dict.fromkeys(k for row in rows for k in row)]
    parts.append(table([c.replace("_", " ") for c in columns], [[words(row.get(c)) for c in columns] for row in rows]))
    return joined(parts)


def results_index(folders: Sequence[Path], files: Sequence[Path], first: Sequence[str] = ()) -> str:
    """The list of the results pages."""
    parts = [
        NOTE,
        "# Results",
        "Every number on these pages is computed from files under `results/` in the repository, which the commands named on "
        "them wrote. {doc}`../how-results-are-made` says how.",
    ]
    names = [*first, *(path.name for path in folders)] + [path.stem for path in files]
    parts.append("```{toctree}\n:maxdepth: 1\n\n" + "\n".join(names) + "\n```" if names else "None are kept here yet.")
    return joined(parts)
