"""Sweeps: what was tuned how, whether the best lies inside what was tried, and what a table of all rules still lacks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import Row, fitting, load, number

from apical.bench.space import edges
from apical_papers.rates.recipe import DATA, EVERY, RATES, SEEDS, shortfall

FOLDERS = {f"rates-{data}": data for data in DATA}
"""The sweeps of every rule of the library, and their data."""


def tuned(folder: Path) -> dict[str, Row]:
    """By rule: trials and how many diverged, the best settings and their score, and where they lie at an end."""
    record = load(folder / "sweep.json") or {"trials": [], "best": {}}
    ends = edges(record["trials"], record["best"])
    rows: dict[str, Row] = {}
    for rule, number_of_best in record["best"].items():
        own = [trial for trial in record["trials"] if trial["rule"] == rule]
        best = next(trial for trial in own if trial["number"] == number_of_best)
        diverged = sum(trial["score"] is None for trial in own)
        rows[rule] = {"trials": len(own), "diverged": diverged, "ends": ends[rule], **best}
    return rows


def accuracy(folder: Path, rule: str) -> str:
    """Mean test accuracy in per cent with its 95 % interval; a dash where there is none."""
    rows = [row for row in load(folder / "statistics.json") or [] if row["rule"] == rule and row.get("mean") is not None]
    return f"{rows[0]['mean']:.2f} [{rows[0]['low']:.2f}, {rows[0]['high']:.2f}]" if rows else "-"


def tuning(folder: Path) -> list[str]:
    """The part of a sweep's page on its trials; empty for other comparisons."""
    rules = tuned(folder)
    if not rules:
        return []
    summary, plan = load(folder / "summary.json"), load(folder / "compare.json")["recipe"]
    lines = []
    for rule, row in rules.items():
        seeds = sum(each["rule"] == rule and each["status"] == "finished" for each in summary)
        settings = ", ".join(f"{key} {value:g}" for key, value in row["settings"].items())
        inside = "no: " + ", ".join(row["ends"]) if row["ends"] else "yes"
        validation = number(100 * row["score"], 2)
        trials = f"{row['trials']} ({row['diverged']})"
        lines.append([f"`{rule}`", accuracy(folder, rule), str(seeds), settings, inside, validation, trials])
    header = ("rule", "test accuracy, % [95 %]", "seeds", "tuned", "bracketed", "validation, %", "trials (diverged)")
    outside = [rule for rule, row in rules.items() if row["ends"]]
    about = (
        f"Every rule had as many trials, judged by {plan['validation']:,} training images that were held out; the best was "
        f"trained again with new seeds, the same for all rules, and tested once. Budget of a run: {plan['epochs']} epochs "
        f"of {plan['train_limit'] or 'all'} images in batches of {plan['batch_size']}. Intervals: bootstrap over seeds."
    )
    loose = [f"Not bracketed: {', '.join(f'`{rule}`' for rule in outside)}; their best may lie beyond what was tried."]
    return ["## Tuned alike", about, *(loose if outside else []), fitting(header, lines), *not_run(folder, rules)]


def not_run(folder: Path, rules: Mapping[str, Any]) -> list[str]:
    """The rules of the library that a sweep of all of them lacks, with what a run would take."""
    costs = (load(folder.parent / next(iter(FOLDERS)) / "costs.json") or {}).get("rules", {})
    if folder.name not in FOLDERS:
        return []
    left = [rule for rule in EVERY if rule.replace(":", "-") not in rules]
    left.sort(key=lambda rule: costs.get(rule, {}).get("seconds", float("inf")))
    takes = [f"`{rule}` {_seconds(costs.get(rule, {}))}" for rule in left]
    runs = len(RATES) + SEEDS
    said = f"Not run, with the processor time, on a busy machine, of one of the {runs} runs that a rule takes: "
    return [f"{said}{', '.join(takes)}."] if takes else []


def _seconds(cost: Row) -> str:
    return "(another network)" if "refused" in cost else f"{cost['seconds']:.0f} s" if cost else "(not measured)"


def lacking(folder: Path) -> str:
    """What a sweep of every rule lacks of the table that was asked for; empty for other folders."""
    if folder.name not in FOLDERS:
        return ""
    record, recipe = load(folder / "sweep.json"), load(folder / "compare.json")["recipe"]
    rows = [row for row in load(folder / "summary.json") if row["status"] == "finished"]
    return ", ".join(shortfall(record["trials"], rows, recipe))


def best_of_all(root: Path) -> str:
    """The table of tuned rules on all data: accuracy, and the rate."""
    folders = {data: root / "results" / name for name, data in FOLDERS.items() if (root / "results" / name).exists()}
    found = {data: tuned(folder) for data, folder in folders.items()}
    names = [rule.replace(":", "-") for rule in EVERY]
    rules = [rule for rule in names if any(rule in each for each in found.values())]
    if not rules:
        return "No sweep of the rules is kept here yet."
    lines = [
        [f"`{rule}`", *(cell for data, each in found.items() for cell in _cells(folders[data], rule, each.get(rule)))]
        for rule in rules
    ]
    heads = [head for data, folder in folders.items() for head in (f"[{data}](results/{folder.name}.md), %", "rate")]
    return fitting(("rule", *heads), lines)


def _cells(folder: Path, rule: str, row: Row | None) -> Sequence[str]:
    if row is None:
        return ("-", "-")
    rate = f"{row['settings']['lr']:g}"
    return (accuracy(folder, rule), f"{rate}, not bracketed" if row["ends"] else rate)
