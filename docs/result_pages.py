"""The pages of measured results: comparisons of rules, studies of their own, single files of rows."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sweep_pages import tuning
from tables import (
    Row,
    code,
    console,
    data_name,
    facts,
    fitting,
    flat,
    grouped,
    load,
    loss_spread,
    number,
    plus_minus,
    present,
    significant,
    spread,
    table,
    tabulate,
    text,
    texts,
    toml,
    words,
)

from apical.bench.names import RULES
from apical.bench.papers import studies
from apical.bench.recipe import CHECKSUMS, parse_options
from apical.bench.report.verdicts import Verdict, tally

NOTE = "<!-- made by docs/generate.py -->"
LARGE = 1_000_000
"""Bytes from which a figure is shown as PNG instead of SVG."""

PHONE = 430
"""Points from which the letters of a figure are too small on a phone, where it scrolls instead."""

TAGS, MARKS, _ = toml("sources").values()
"""Where the numbers of a verdict come from, and the same for a study of its own."""


def joined(parts: Iterable[str]) -> str:
    """Paragraphs as a page."""
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def finished(rows: Iterable[Row]) -> list[Row]:
    """The runs that ended as planned."""
    return [row for row in rows if row.get("status", "finished") == "finished"]


def epochs(runs: Iterable[Row]) -> str:
    """How many epochs they have."""
    return " / ".join(sorted({str(row.get("epochs")) for row in runs})) or "-"


def score(runs: Sequence[Row]) -> str:
    """Test accuracy in percent or, where there is none, test loss, over runs."""
    accuracies = [100 * value for value in present(runs, "test_accuracy")]
    return spread(accuracies, 2) if accuracies else loss_spread(present(runs, "test_loss"))


def comparison_table(rows: Sequence[Row]) -> str:
    """One line per rule: accuracy (test loss, for regression) over its finished seeds, training loss, memory.

    Times are left to the benchmarks: a comparison shares its machine.
    """
    regression = bool(rows) and not present(rows, "test_accuracy") and bool(present(rows, "test_loss"))
    lines = []
    for (rule,), every in grouped(rows, "rule").items():
        runs = finished(every)
        seeds = str(len(runs)) if len(runs) == len(every) else f"{len(runs)} of {len(every)}"
        memory = present(runs, "memory_mb")
        losses = loss_spread(present(runs, "train_loss"))
        megabytes = number(statistics.median(memory), 0) if memory else "-"
        lines.append([f"`{rule}`", seeds, epochs(runs), score(runs), losses, megabytes])
    name = "test loss" if regression else "test accuracy, %"
    return table(("rule", "seeds", "epochs", name, "training loss", "memory, MB"), lines)


def title(folder: Path) -> str:
    """What a comparison was about."""
    plan = load(folder / "compare.json") or {}
    runs = finished(load(folder / "summary.json") or [])
    most = max((run["epochs"] for run in runs), default=0)
    if plan.get("study") in studies():
        return re.sub(r"\b(\d+) epochs", partial(_so_far, most), studies()[plan["study"]].title)
    recipe, rules = plan.get("recipe") or {}, plan.get("rules") or []
    if not {"model", "data"} <= recipe.keys():
        return folder.name
    who = f"{len(rules)} rules" if len(rules) > 4 else " and ".join(filter(None, (", ".join(rules[:-1]), *rules[-1:])))
    return f"{who} on {data_name(recipe['data'])}, {recipe['model']}"


def _so_far(most: int, planned: re.Match[str]) -> str:
    """ "5 of 40 epochs" where the title of a study says 40 and no run came so far."""
    return f"{most} of {planned[0]}" if most < int(planned[1]) else planned[0]


def origin(folder: Path) -> str:
    """The command and the commit behind a comparison."""
    plan, rows = load(folder / "compare.json") or {}, load(folder / "summary.json")
    parts = [console(plan["command"])] if plan.get("command") else []
    commits = sorted({str(row["commit"]) for row in rows if row.get("commit")})
    parts += [f"Commit {', '.join(f'`{commit}`' for commit in commits)}."] if commits else []
    parts = ["## How it was made", *parts] if parts else []
    if str(plan.get("study")).startswith("dfc-"):
        parts.append(
            "{doc}`../feedback-control` says which version of the paper the numbers are from and where the recipe departs "
            "from the authors' procedure."
        )
    return "\n\n".join(parts)


def departures(plan: Row) -> str:
    """A sentence on the settings in which a comparison differs from the study it names; empty if there are none."""
    study = studies().get(plan.get("study") or "")
    free = {"rule_options", "seed", "device", "threads", "checkpoint_steps", *CHECKSUMS}
    different: dict[str, None] = {}
    if study is None:
        return ""
    for rule, recipe in (plan.get("recipes") or {}).items():
        asked = study.row(rule).recipe.to_json()
        for key, value in recipe.items():
            if key not in free and not _chosen(rule, key, value, asked) and value != asked.get(key):
                instead = "not set" if asked.get(key) is None else words(asked[key])
                different[f"{key.replace('_', ' ')} {words(value)} instead of {instead}"] = None
        options = _options(recipe.get("rule_options") or (), asked["rule_options"])
        different |= dict.fromkeys(f"option {option} of `{rule}`" for option in options)
    return f"Unlike the recipe: {'; '.join(different)}." if different else ""


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

    def shown(row: Row, key: str) -> str | None:
        return None if row[key] is None else Verdict(**row).shown(row[key])

    def expected(row: Row) -> str:
        value = f"{shown(row, 'published')}"
        return f"at least {value}" if row["tolerance"] is None else f"{value} ± {row['tolerance']:g}"

    columns = {**texts("verdict", "what"), "rule": code("rule"), **texts("epoch")}
    columns |= {"reference": expected, "source": text("tag")}
    columns["measured"] = lambda row: plus_minus(shown(row, "measured") or "-", shown(row, "spread"))
    return judged(tabulate(verdicts, columns | {"seeds": text("n")}, numeric_from=99), "published")


def judged(verdicts: str, kind: str) -> str:
    """A table of verdicts, whose second column has long texts and gets room for them; on a phone it is a list.

    Args:
        verdicts: the table.
        kind: which columns it has, for the labels of the list.
    """
    return f":::{{container}} verdicts {kind}\n{verdicts}\n:::"


def in_budget(folder: Path, verdicts: Sequence[Row]) -> Sequence[Row]:
    """The verdicts as `apical reproduce` gave them, which are none where the budget is too small to tell."""
    kept = load(folder.parent / "reproductions" / f"{folder.name}.json")
    rows = (kept or {}).get("rows") or []
    if [row["rule"] for row in rows] != [row["rule"] for row in verdicts]:
        return verdicts
    return [{**row, "verdict": other["verdict"]} for row, other in zip(verdicts, rows, strict=True)]


def verdict_sentence(verdicts: Sequence[Row]) -> str:
    """How many reference numbers were reproduced, of those on which there is a verdict."""
    told = [row for row in verdicts if "too small" not in row["verdict"]]
    if verdicts and not told:
        return "The budget is too small for a verdict on any reference number."
    return tally([Verdict(**row) for row in told])


def sources(verdicts: Sequence[Row]) -> str:
    """A sentence that explains the tags these verdicts have."""
    used = [tag for tag in TAGS if any(row["tag"] == tag for row in verdicts)]
    return f"Sources: {'; '.join(f'`{tag}` {TAGS[tag]}' for tag in used)}." if used else ""


def comparison_page(folder: Path, standing: str = "") -> str:
    """The page of one comparison, which begins with what it is and how it came out."""
    summary, verdicts = load(folder / "summary.json"), load(folder / "verdicts.json")
    plan, judged_rows = load(folder / "compare.json"), in_budget(folder, verdicts or [])
    sentence = verdict_sentence(judged_rows) if verdicts else ""
    parts = [NOTE, f"# {title(folder)}", standing, sentence, departures(plan or {})]
    scores = f":::{{container}} scores\n{comparison_table(summary)}\n:::"
    parts += [*tuning(folder)] or [scores, *rates(plan)]
    if verdicts:
        parts += [
            "## Against reference numbers",
            sources(verdicts),
            verdict_table(judged_rows),
            *distances(verdicts, summary),
        ]
    return joined([*parts, *tried(folder), *figures(folder / "figures", f"{folder.name}/figures"), origin(folder)])


def rates(plan: Row | None) -> list[str]:
    """The learning rate of each rule, first and last, where not all have the same."""
    recipes = (plan or {}).get("recipes") or {}
    spans = {rule: dict.fromkeys(f"{lr:g}" for lr in recipe["lr"]) for rule, recipe in recipes.items()}
    texts = {rule: " to ".join([*span][:1] + [*span][1:][-1:]) for rule, span in spans.items()}
    if len(set(texts.values())) < 2:
        return []
    return [f"Learning rates: {', '.join(f'`{rule}` {text}' for rule, text in texts.items())}."]


def distances(verdicts: Sequence[Row], summary: Sequence[Row]) -> list[str]:
    """How far the accuracies of runs that ended before their reference's epoch are from it: no verdicts."""
    lines: dict[str, list[str]] = {}
    for row in sorted(verdicts, key=lambda each: each["epoch"]):
        ends = [run for run in finished(summary) if run["rule"] == row["rule"] and run["epochs"] < row["epoch"]]
        accuracies = [100 * value for value in present(ends, "test_accuracy")]
        if row["verdict"] == "not run" and row["what"] == "test accuracy, %" and accuracies and row["rule"] not in lines:
            ours, after = statistics.mean(accuracies), "/".join(map(str, sorted({run["epochs"] for run in ends})))
            cells = [f"{row['published']:.2f} after {row['epoch']} epochs", f"{ours:.2f} after {after}"]
            lines[row["rule"]] = [f"`{row['rule']}`", *cells, f"{ours - row['published']:+.2f}", str(len(ends))]
    if not lines:
        return []
    about = "There is no verdict if training ended before the reference's epoch; these are the distances, in points."
    return [about, table(("rule", "reference", "measured", "distance", "seeds"), lines.values())]


def figures(folder: Path, where: str) -> list[str]:
    """The heading and the figures of a folder, which lies at `results/<where>`."""
    drawn = []
    for path in sorted(folder.glob("*.svg")):
        small = path.stat().st_size < LARGE or not path.with_suffix(".png").exists()
        shown = path if small else path.with_suffix(".png")
        caption = toml("captions").get(path.stem, "")
        picture = f"![{path.stem.replace('_', ' ')}](../../results/{where}/{shown.name})"
        drawn += [f":::{{container}} wide\n{picture}\n:::" if points(path) > PHONE else picture]
        drawn += [caption] if caption else []
    return ["## Figures", *drawn] if drawn else []


def points(figure: Path) -> float:
    """The width of an SVG; 0 where it does not say."""
    with figure.open(encoding="utf-8") as file:
        width = re.search(r'<svg[^>]*\bwidth="([\d.]+)pt"', file.read(2000))
    return float(width[1]) if width else 0.0


def study_page(folder: Path, standing: str = "") -> str:
    """The page of a study with measures of its own: `results.json` with verdicts and curves, and its figures."""
    results = load(folder / "results.json")
    parts = _head(results, folder.name, standing, study_sentence(results))
    parts += [f"**Runs that failed**: {'; '.join(results['failures'])}."] if results.get("failures") else []
    parts += _study_verdicts(results)
    if results.get("curves"):
        parts += ["## At the end of training", final_values(results["curves"], results.get("measures") or {})]
    parts += figures(folder, folder.name)
    for each in results.get("tables") or []:
        numeric = (i for i, cell in enumerate(each["rows"][0]) if cell[:1].isdigit() and " to " not in cell)
        first = next(numeric, len(each["header"]))  # ranges break into lines
        parts += [f"## {each['title']}", each["note"], fitting(each["header"], each["rows"], numeric_from=first)]
    parts += tried(folder)
    for name in ("checks", "settings", "environment"):
        parts += [f"## {name.capitalize()}", facts(results[name])] if flat(results.get(name) or {}) else []
    return joined([*parts, *_command(results)])


def tried(folder: Path) -> list[str]:
    """What does not hold there, why, and what was tried, from `tried.toml`."""
    rows = toml("tried").get(folder.name)
    return ["## What does not hold, why, and what was tried", fitting(["where", "why", "tried"], rows, 99)] if rows else []


def study_table(folder: Path) -> str:
    """The first table of a study of its own, with its settings in a sentence; says so where it is not kept."""
    if not (folder / "results.json").exists():
        return "No results are kept."
    results = load(folder / "results.json")
    first, settings = results["tables"][0], results.get("settings") or {}
    said = "; ".join(
        f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in settings.items()
    )
    sentence = f"From [the study's page](results/{folder.name}.md). Settings: {said}."
    return joined([sentence, first["note"], fitting(first["header"], first["rows"])])


def _head(content: Row, name: str, *said: str) -> list[str]:
    """Title, what it is and how it came out, and the explanation."""
    return [NOTE, f"# {content.get('title', name)}", *said, str(content.get("about", ""))]


def _command(content: Row) -> list[str]:
    return ["## How it was made", console(content["command"])] if content.get("command") else []


def _study_verdicts(results: Row) -> list[str]:
    parts = []
    if results.get("verdicts"):
        meaning = "\n".join(f"- *{name}*: {about}" for name, about in (results.get("sources") or {}).items())
        columns = {**texts("verdict", "what"), "rule": code("rule"), **texts("mark"), "measured": _measured}
        columns |= texts("n", "source", "figure")
        parts += ["## Verdicts", meaning, judged(tabulate(results["verdicts"], columns, numeric_from=99), "marks")]
    if results.get("axes"):
        inside = {True: "inside", False: "outside", None: "not run"}
        columns = {"measure": lambda row: row["measure"].replace("_", " "), "axis": lambda row: _range(row["limits"])}
        columns |= {"mean curves": lambda row: _range(row["range"]), "verdict": lambda row: inside[row["inside"]]}
        parts += ["### Against the axes of the authors' plots", tabulate(results["axes"], columns)]
    return parts


def _measured(row: Row) -> str:
    """A mean with its standard deviation or, where there is one, its interval."""
    if row.get("low") is not None:
        return f"{significant(row['mean'])} [{significant(row['low'], 3)}, {significant(row['high'], 3)}]"
    return plus_minus(significant(row["mean"]), None if row["std"] is None else significant(row["std"], 2))


def _range(limits: Sequence[float] | None) -> str:
    return "-" if limits is None else " to ".join(map(significant, limits))


def study_sentence(results: Row) -> str:
    """How many of a study's verdicts are reproduced, by where their marks are from."""
    parts = []
    for (source,), rows in grouped(results.get("verdicts") or [], "source").items():
        run = [row["verdict"] for row in rows if row["verdict"] != "not run"]
        parts += [f"{run.count('reproduced')} of {len(run)} {MARKS.get(source, source)}"] if run else []
    return f"Reproduced: {'; '.join(parts)}." if parts else ""


def final_values(curves: Mapping[str, Mapping[str, Any]], measures: Mapping[str, str]) -> str:
    """One line per rule, one column per measure: mean and standard deviation over seeds after the last epoch."""
    known = dict.fromkeys(key for curve in curves.values() for key in curve["metrics"])
    columns = [key for key in dict.fromkeys((*measures, *known)) if key in known]
    lines = []
    for rule, curve in curves.items():
        cells = [_last(curve["metrics"].get(key), curve["n"]) for key in columns]
        lines.append([f"`{rule}`", str(curve["n"]), str(curve["epochs"][-1]) if curve["epochs"] else "-", *cells])
    return fitting(("rule", "seeds", "epochs", *(measures.get(key, key.replace("_", " ")) for key in columns)), lines)


def _last(curve: Mapping[str, Sequence[float]] | None, n: int) -> str:
    if curve is None or not curve["mean"]:
        return "-"
    return plus_minus(significant(curve["mean"][-1]), None if n < 2 else significant(curve["std"][-1], 2))


def file_page(path: Path, standing: str = "") -> str:
    """The page of a single results file: a list of rows, or an object with `rows` and, if it likes, `title`, `about`."""
    content = load(path)
    content = content if isinstance(content, dict) else {"rows": content}
    rows = content.get("rows") or []
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("device", "commit")))
    cells = [[words(row.get(column)) for column in columns] for row in rows]
    parts = [*_head(content, path.stem, standing), fitting([column.replace("_", " ") for column in columns], cells)]
    where = {key: ", ".join(dict.fromkeys(str(row[key]) for row in rows if row.get(key))) for key in ("device", "commit")}
    parts += [f"{key.capitalize()}: {value}." for key, value in where.items() if value]
    return joined([*parts, *_command(content)])
