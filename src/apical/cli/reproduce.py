"""`apical reproduce`: run tables of papers by name, at a budget, with verdicts computed from tolerance and data."""

import re
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apical.bench.distributed import under_torchrun
from apical.bench.folders import check_writable, refuse_links, refuse_used, remove_tree
from apical.bench.papers import BUDGETS, SEEDS, Budget, Sizes, Table, studies, too_small
from apical.bench.papers import tables as all_tables
from apical.bench.progress import shown_path
from apical.bench.provenance import environment
from apical.bench.report.records import read
from apical.bench.report.verdicts import Verdict, judge
from apical.bench.run_folder import FolderLock
from apical.bench.state import brief, parse, read_json, write_json
from apical.cli import commands
from apical.cli.columns import columns, margin
from apical.cli.flags.training import Compare
from apical.cli.terminal import say, show_table
from apical.errors import ApicalError, CheckpointError, ConfigError, require_choice, unknown_name

if TYPE_CHECKING:
    from apical.cli.flags.reproduce import Reproduce

SMALL = "budget too small to tell"
Row = dict[str, Any]


def run(flags: "Reproduce", command: str) -> int:
    """Run the tables one after another; return the first exit status other than 0, or 0."""
    if under_torchrun():
        raise ConfigError("apical reproduce starts its own processes; do not run it under torchrun")
    if not flags.targets:
        _list()
        return 0
    tables = {name: table for target in flags.targets for name, table in tables_of(target).items()}
    for name, table in tables.items():
        _check(table, place(flags, name, table), flags)
    worst = 0
    for name, table in tables.items():
        status = reproduce(name, table, flags, command)
        worst = worst or status
        if status > 128:  # a signal: do not run the remaining tables either
            return status
    return worst


def tables_of(target: str) -> dict[str, Table]:
    """Return the tables that a target names, by "paper/table"."""
    paper, _, name = target.partition("/")
    if paper not in all_tables():
        raise unknown_name("paper", target, [f"{p}/{t}" for p, tables in all_tables().items() for t in tables])
    if not name:
        return {f"{paper}/{each}": table for each, table in all_tables()[paper].items()}
    require_choice(f"table of {paper}", name, all_tables()[paper])
    return {target: all_tables()[paper][name]}


def place(flags: "Reproduce", name: str, table: Table) -> Path:
    """Return where a table's runs go; the file, for a table that writes a file."""
    suffix = "" if flags.budget == "cpu" else f"-{flags.budget}"
    path = flags.out / f"{name.replace('/', '-')}{suffix}"
    return path.with_name(f"{path.name}.json") if table.result == "file" else path


def _check(table: Table, path: Path, flags: "Reproduce") -> None:
    check_writable(flags.out)
    if flags.kept:
        if flags.resume or flags.overwrite:
            raise ConfigError("--kept trains nothing; drop --resume and --overwrite")
        return
    if flags.ray and table.module:
        raise ConfigError("--ray is for tables of trainings; this table has its own program, which runs here: drop --ray")
    if flags.overwrite:
        refuse_links(path / "cells", path)
    if flags.resume or flags.overwrite:
        return
    if table.result == "file" and path.exists():
        raise ConfigError(f"{path} exists; add --overwrite to replace it, or choose another --out")
    if table.result == "folder":
        refuse_used(path)


def reproduce(name: str, table: Table, flags: "Reproduce", command: str) -> int:
    """Run one table, print its verdicts and save them; return the exit status."""
    path, sizes, status = place(flags, name, table), table.budgets[flags.budget], 0
    say(f"== {name}, budget {flags.budget}: {table.title}")
    if flags.kept:
        try:
            sizes, run = kept_run(path, table, sizes)
            rows = _rows_of(path, table, sizes)
        except ApicalError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({brief(error)}); run the table again") from None
    else:
        begun = time.perf_counter()
        status = _compare(table, path, sizes, flags, command) if table.study else _module(table, path, sizes, flags)
        if status not in (0, commands.DIVERGED):
            return status
        run = {
            "command": command,
            "seconds": round(time.perf_counter() - begun, 1),
            "environment": environment("cpu", torch.get_num_threads()),
        }
        rows = _rows_of(path, table, sizes)
    record = {"target": name, "title": table.title, "budget": flags.budget, "sizes": sizes, **run}
    record |= {"resumed": flags.resume, "rows": rows}
    record_path = flags.out / "reproductions" / f"{path.stem if table.result == 'file' else path.name}.json"
    record_path.parent.mkdir(parents=True, exist_ok=True)
    write_json(record_path, record)
    _tell(rows)
    say(f"verdicts: {shown_path(record_path)}")
    return status


def _compare(table: Table, path: Path, sizes: Sizes, flags: "Reproduce", command: str) -> int:
    make_flags: Any = Compare
    compare_flags = make_flags(
        out=path, recipe=table.study, jobs=flags.jobs, ray=flags.ray, resume=flags.resume, overwrite=flags.overwrite, **sizes
    )
    return commands.compare(compare_flags, command)


def _module(table: Table, path: Path, sizes: Sizes, flags: "Reproduce") -> int:
    lock = FolderLock(path) if table.result == "folder" else FolderLock(path.parent, f".{path.name}.lock")
    lock.hold("reproducing", wait=0)
    _check(table, path, flags)  # again: the last holder of the lock may have written to it
    if flags.overwrite:
        remove_tree(path / "cells", path)
    options = [word for key, value in sizes.items() for word in (f"--{key.replace('_', '-')}", *str(value).split())]
    options += ["--jobs", str(flags.jobs)] if table.side_by_side else []
    threads = torch.get_num_threads()
    try:
        return int(import_module(table.module).main(["--out", str(path), *options]) or 0)
    except KeyboardInterrupt:
        print("stopped; finished parts are kept. Continue with the same command and --resume")
        return 130
    finally:
        torch.set_num_threads(threads)
        lock.release()


def kept_run(path: Path, table: Table, budget: Sizes) -> tuple[Sizes, Row]:
    """Return sizes, command, seconds and environment of the run in a folder.

    Raises:
        ConfigError: the folder contains no finished run of the table, or a run of another study.
    """
    files = [path] if table.result == "file" else [path / name for name in _needed(table)]
    if not all(file.exists() for file in files):
        raise ConfigError(f"--kept: {path} contains no finished run; drop --kept to run the table")
    content = read_json(files[0])
    if not table.study:
        asked = re.findall(r"--([\w-]+)[ =](\S+(?: (?!--)\S+)*)", content["command"])
        given = {name.replace("-", "_"): value for name, value in asked}
        sizes = {name: _like(value, given.get(name)) for name, value in budget.items()}
        return sizes, {key: content[key] for key in ("command", "seconds", "environment")}
    if content.get("study") != table.study:
        raise ConfigError(f"--kept: {path} contains a run of {content.get('study')}, not of {table.study}")
    own, runs = studies()[table.study].rows, _rows(path / "summary.json")
    recipes = {recipe["rule"]: recipe for recipe in content["recipes"].values()}
    sizes = {"epochs": min(recipe["epochs"] for recipe in recipes.values()), "seeds": len(content["seeds"])}
    for name in ("train_limit", "test_limit"):
        cut = [
            recipes[rule][name] for rule in recipes if rule in own and recipes[rule][name] != getattr(own[rule].recipe, name)
        ]
        sizes |= {name: cut[0]} if cut else {}
    seconds = sum(run["seconds"] for run in runs)
    return sizes, {"command": content["command"], "seconds": round(seconds, 1), "environment": {"commit": runs[0]["commit"]}}


def _needed(table: Table) -> list[str]:
    """Return the files that a finished run of a table leaves in its folder; verdicts only if there are published numbers."""
    if not table.study:
        return ["results.json"]
    study = studies()[table.study]
    is_judged = bool(study.claims) or any(row.published for row in study.rows.values())
    return ["compare.json", "summary.json", *(["verdicts.json"] if is_judged else [])]


def _rows_of(path: Path, table: Table, sizes: Sizes) -> list[Row]:
    return study_rows(path, sizes) if table.study else module_rows(path, table, sizes)


def _like(value: int | float | str, text: str | None) -> int | float | str:
    """Return the text as a number if the value is one; the value itself if there is no text."""
    return value if text is None else type(value)(text)


def study_rows(path: Path, sizes: Sizes) -> list[Row]:
    """Return every published number of a comparison with the measured one, its interval and the verdict."""
    cut = any(name.endswith("_limit") for name in sizes)
    epochs = int(sizes["epochs"]) if "epochs" in sizes else None
    return [
        {
            "rule": item.rule,
            "what": f"{item.what}, epoch {item.epoch}",
            "reference": _reference(item),
            "source": item.tag,
            "measured": item.measured,
            "low": item.low,
            "high": item.high,
            "n": item.n,
            "verdict": verdict(item, epochs, cut=cut),
        }
        for item in _judged(path)
    ]


def _judged(path: Path) -> Sequence[Verdict]:
    """Judge the runs or, if only their summary is kept, return the verdicts given when they ended."""
    if (path / "runs").exists():
        return judge(read(path))
    kept = path / "verdicts.json"
    return [Verdict(**row) for row in _rows(kept)] if kept.exists() else []


def _rows(path: Path) -> list[Row]:
    try:
        rows = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({brief(error)}); run the table again") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CheckpointError(f"{path} is damaged (it is not a list of objects); run the table again")
    return rows


def verdict(row: Verdict, epochs: int | None, *, cut: bool) -> str:
    """Return the verdict on one number, if the budget is large enough for one.

    Args:
        row: the number, and the verdict that tolerance and data give.
        epochs: of the budget; None for those of the table.
    """
    if epochs is not None and row.epoch > epochs:
        return SMALL
    if row.n == 0:
        return row.verdict
    return SMALL if cut or row.n < SEEDS else row.verdict


def _reference(row: Verdict) -> str:
    value = row.shown(row.published)
    return f"at least {value}" if row.tolerance is None else f"{value} ± {row.tolerance:g}"


def module_rows(path: Path, table: Table, sizes: Sizes) -> list[Row]:
    """Return a module's verdicts; none if the budget is smaller than they require."""
    content: Mapping[str, Any] = read_json(path if table.result == "file" else path / "results.json")
    small = too_small(table, sizes)
    rows = []
    for claim in import_module(table.module).verdicts(content) if table.result == "file" else content["verdicts"]:
        row = {key: claim.get(key) for key in ("rule", "what", "source", "low", "high", "n")}
        row |= {
            "reference": claim["mark"],
            "measured": claim["mean"],
            "verdict": SMALL if small else claim["verdict"],
        }
        rows.append(row)
    return rows


def _tell(rows: Sequence[Row]) -> None:
    heads = ("rule", "what", "reference", "source", "ours [95 %]", "n", "verdict")
    lines = [[*(row[key] for key in heads[:4]), measured(row), str(row["n"] or "-"), row["verdict"]] for row in rows]
    show_table(heads, lines, left=(*heads[:5], "verdict"))
    outcomes = [row["verdict"] for row in rows]
    say(", ".join(f"{outcomes.count(word)} {word}" for word in dict.fromkeys(outcomes)) or "no published numbers")


def measured(row: Row) -> str:
    """Return the measured value with its 95 % interval.

    >>> measured({"measured": 98.125, "low": 98.0, "high": 98.25})
    '98.12 [98, 98.25]'
    """
    if row["measured"] is None:
        return "-"
    if row["low"] is None or row["high"] is None:
        return f"{row['measured']:.4g}"
    return f"{row['measured']:.4g} [{row['low']:.4g}, {row['high']:.4g}]"


def _list() -> None:
    rows = [("table", *BUDGETS, "what it is")]
    for paper, tables in all_tables().items():
        for name, table in tables.items():
            rows.append((f"{paper}/{name}", *(cost(table, budget) for budget in BUDGETS), table.title))
    print("\n".join(columns(rows, margin())))
    print("\nTimes on two cores; - where none was measured. apical reproduce PAPER/TABLE --budget smoke takes minutes.")


def cost(table: Table, budget: Budget) -> str:
    """Return the measured hours of a budget as text."""
    hours = table.hours.get(budget)
    return "-" if hours is None else f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.1f} h"
