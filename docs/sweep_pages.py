"""Sweeps: what was tuned how, whether the best lies inside what was tried, and what a table of all rules still lacks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tables import Row, fitting, load, number

from apical.bench.space import edges
from apical_papers.rates.recipe import DATA, EVERY, FOLDERS, RATES, SEEDS, shortfall


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
        f"All rules had the same number of trials, scored on {plan['validation']:,} held-out training images; the best was "
        f"trained again with new seeds, the same for all rules, and tested once. Budget of a run: {plan['epochs']} epochs "
        f"of {plan['train_limit'] or 'all'} images in batches of {plan['batch_size']}. Intervals: bootstrap over seeds."
    )
    loose = [f"Not bracketed: {', '.join(f'`{rule}`' for rule in outside)}; their best may lie outside the range tried."]
    return ["## Tuned alike", about, *(loose if outside else []), fitting(header, lines), *not_run(folder)]


def both(folder: Path) -> list[Path]:
    """The kept sweeps of the rules on the data of one of them."""
    return [
        path for name, data in FOLDERS.items() if data == FOLDERS[folder.name] and (path := folder.parent / name).exists()
    ]


def not_run(folder: Path) -> list[str]:
    """The rules of the library that the sweeps on the data lack, with what a run would take."""
    costs = (load(folder.parent / f"rates-{DATA[0]}" / "costs.json") or {}).get("rules", {})
    if folder.name not in FOLDERS:
        return []
    others = [f"Other rules: [{path.name}]({path.name}.md)." for path in both(folder) if path != folder]
    rules = {rule for path in both(folder) for rule in tuned(path)}
    left = [rule for rule in EVERY if rule.replace(":", "-") not in rules]
    left.sort(key=lambda rule: costs.get(rule, {}).get("seconds", float("inf")))
    takes = [f"`{rule}` {_seconds(costs.get(rule, {}))}" for rule in left]
    runs = len(RATES) + SEEDS
    said = f"Not run, with the processor time (on a busy machine) of one of the {runs} runs per rule: "
    return [*others, *([f"{said}{', '.join(takes)}."] if takes else [])]


def _seconds(cost: Row) -> str:
    return "(another network)" if "refused" in cost else f"{cost['seconds']:.0f} s" if cost else "(not measured)"


def lacking(folder: Path) -> str:
    """What the sweeps on the data of this one lack of the table that was asked for; empty for other folders."""
    if folder.name not in FOLDERS:
        return ""
    trials = [trial for path in both(folder) for trial in load(path / "sweep.json")["trials"]]
    rows = [row for path in both(folder) for row in load(path / "summary.json") if row["status"] == "finished"]
    return ", ".join(shortfall(trials, rows, load(folder / "compare.json")["recipe"]))


def best_of_all(root: Path) -> str:
    """The table of tuned rules on all data: accuracy, and the rate."""
    kept = [root / "results" / name for name in FOLDERS if (root / "results" / name).exists()]
    rows = {folder: tuned(folder) for folder in kept}
    rules = [rule for rule in (name.replace(":", "-") for name in EVERY) if any(rule in row for row in rows.values())]
    if not rules:
        return "No sweep of the rules is kept here yet."
    of = {data: [folder for folder in kept if FOLDERS[folder.name] == data] for data in DATA}
    of = {data: folders for data, folders in of.items() if folders}
    lines = [[f"`{rule}`", *(cell for each in of.values() for cell in _cells(each, rows, rule))] for rule in rules]
    heads = [head for data, folders in of.items() for head in (f"[{data}](results/{folders[0].name}.md), %", "rate")]
    return fitting(("rule", *heads), lines)


def _cells(folders: Sequence[Path], rows: Mapping[Path, Mapping[str, Row]], rule: str) -> Sequence[str]:
    folder = next((folder for folder in folders if rule in rows[folder]), None)
    if folder is None:
        return ("-", "-")
    rate = f"{rows[folder][rule]['settings']['lr']:g}"
    return (accuracy(folder, rule), f"{rate}, not bracketed" if rows[folder][rule]["ends"] else rate)
