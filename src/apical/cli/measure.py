"""`apical measure`: measure networks by name and trained ones from folders; print tables and write a page."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from apical.bench import checkpoint
from apical.bench.document import document, pairs, reproduce
from apical.bench.document import table as html_table
from apical.bench.folders import check_least
from apical.bench.landscape import run_folders
from apical.bench.materials import build_model, load_data, located
from apical.bench.measure import probe_batch
from apical.bench.names import make_rule
from apical.bench.network import MEASURES, find_measure, measured, short_name
from apical.bench.provenance import environment
from apical.bench.recipe import Recipe
from apical.bench.report.measures import of_networks_and_layers
from apical.bench.restore import restore_rule
from apical.bench.run_folder import RunFolder
from apical.bench.state import write_json, write_page
from apical.cli.commands import refuse_numbers
from apical.cli.terminal import check_alone, held, say, say_files, show_table
from apical.data.dataset import Dataset
from apical.errors import CheckpointError, ConfigError
from apical.models.own import is_own

if TYPE_CHECKING:
    from apical.cli.flags.measure import Measure

TITLES = {
    "persistence": "Persistence of the weights (np: neural persistence of layers, dgp: deep graph persistence)",
    "coding": "Codes of the activities",
    "learnability": "Jacobian in the weights: what can be learned from a few samples",
    "channel": "Jacobian in the input: what passes through, with noise of 0.1",
}
BEFORE = "before training"


def run(flags: "Measure", command: str) -> int:
    """Measure the targets; return the exit status."""
    with held(flags.out, "measuring", partial(_check, flags)):
        return _run(flags, command)


def _run(flags: "Measure", command: str) -> int:
    started = time.perf_counter()
    names = flags.measure or tuple(MEASURES)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    left_out: dict[str, list[str]] = {}
    for label, seed, model, dataset in _networks(flags, notes):
        inputs, _ = probe_batch(dataset.train, flags.samples)
        numbers: dict[str, Any] = {}
        for name in names:
            try:
                numbers |= measured((name,), model, inputs)
            except ConfigError as error:
                if flags.measure:
                    raise
                left_out.setdefault(str(error), []).append(label)
        rows.append({"network": label, "seed": seed, "measured": numbers})
    notes += [f"{', '.join(dict.fromkeys(labels))}: {why}" for why, labels in left_out.items()]
    notes = list(dict.fromkeys(notes))
    if not any(row["measured"] for row in rows):
        raise ConfigError("; ".join(notes) or "there is nothing to measure")
    record = {
        "command": command,
        "targets": list(flags.targets),
        "data": flags.data,
        "samples": flags.samples,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
        "notes": notes,
        "environment": environment("cpu", torch.get_num_threads()),
    }
    tables = [(short_name(name), *part) for name in names for part in _tables(rows, short_name(name))]
    _tell(record, tables)
    if flags.out is not None:
        write_json(flags.out / "measure.json", record)
        write_page(flags.out / "report.html", _page(record, tables))
        say_files(flags.out, ("measure.json", "report.html"))
    return 0


def _check(flags: "Measure") -> None:
    refuse_numbers(flags)
    if not flags.targets:
        raise ConfigError("apical measure needs a MODEL or the folder of a run or a comparison")
    check_least(flags, samples=2)
    given = {"--data": flags.data != "digits", "--init": bool(flags.init), "--seed": bool(flags.seed)}
    idle = [option for option, is_given in given.items() if is_given]
    if idle and all(Path(target).is_dir() for target in flags.targets):
        raise ConfigError(f"no effect here: {', '.join(idle)} (folders have their own); drop it")
    for name in flags.measure:
        find_measure(name)
    check_alone("measure", flags, "what was measured")


def _networks(flags: "Measure", notes: list[str]) -> Iterator[tuple[str, int, nn.Module, Dataset]]:
    """Yield each network with its label, its seed and its data."""
    load = lru_cache(maxsize=2)(load_data)
    for target in flags.targets:
        path = Path(target)
        if path.is_dir():
            yield from _trained(path, load, notes, prefix=f"{path.name}: " if len(flags.targets) > 1 else "")
        elif "/" in target and not is_own(target):
            raise ConfigError(f"there is no folder {target}")
        else:
            recipe = Recipe(**located({"data": flags.data, "model": target}), init=flags.init, seed=flags.seed)
            dataset = load(recipe)
            yield target.rpartition("/")[2], flags.seed, _initial(recipe, dataset), dataset


def _trained(source: Path, load: Any, notes: list[str], prefix: str) -> Iterator[tuple[str, int, nn.Module, Dataset]]:
    seen: set[tuple[str, str, int]] = set()
    for folder in map(RunFolder, run_folders(source)):
        if not folder.config.exists():
            notes.append(f"left out, because it has not started: {folder.path}")
            continue
        if not folder.checkpoint.exists():
            notes.append(f"left out, because it has no checkpoint: {folder.path}")
            continue
        recipe = folder.recipe()
        dataset = load(recipe)
        key = (recipe.model, recipe.init, recipe.seed)
        if key not in seen:  # every rule starts with the same weights
            seen.add(key)
            yield prefix + BEFORE, recipe.seed, _initial(recipe, dataset), dataset
        state = checkpoint.load(folder.checkpoint)
        checkpoint.seed_all(recipe.seed)
        rule = make_rule(recipe, build_model(recipe, dataset), dataset.input_shape)
        try:
            restore_rule(rule, state["rule"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder.checkpoint} does not fit its configuration ({error})") from error
        rule.detach()
        if not rule.feed_forward:
            notes.append(
                f"{recipe.rule_name} computes its answers differently; activities and Jacobians here are those of the "
                "model's forward pass"
            )
        if state["epoch"] < recipe.epochs:
            notes.append(f"{folder.path} ended after {state['epoch']} of {recipe.epochs} epochs")
        yield prefix + recipe.rule_name, recipe.seed, rule.model, dataset


def _initial(recipe: Recipe, dataset: Dataset) -> nn.Module:
    checkpoint.seed_all(recipe.seed)
    return build_model(recipe, dataset)


Part = tuple[str, list[str], list[list[str]]]
"""Title, column heads and rows of a table."""


def _tables(rows: Sequence[Mapping[str, Any]], measure: str) -> list[Part]:
    """Return a table of the networks, and one of their layers."""
    labels = dict.fromkeys(row["network"] for row in rows)
    cells = [([name], [row["measured"].get(measure, {}) for row in rows if row["network"] == name]) for name in labels]
    whole, layers = of_networks_and_layers(cells, ["network"], "layer")
    parts = [(TITLES.get(measure, measure), *whole), (f"{measure}, by layer", *layers)]
    return [part for part in parts if part[2]]


def _tell(record: Mapping[str, Any], tables: Sequence[tuple[str, str, list[str], list[list[str]]]]) -> None:
    alone = len({row["network"] for row in record["rows"]}) == 1
    for _, title, heads, lines in tables:
        if heads[1] == "layer":
            if not alone:  # the page shows them
                continue
            heads, lines = heads[1:], [line[1:] for line in lines]  # it is clear whose layers these are
        say(f"\n{title}")
        show_table(heads, lines, left=(heads[0], "layer"), whole=True)
    for note in record["notes"]:
        say(note)
    count = len(record["rows"])
    say(f"{count} {'network' if count == 1 else 'networks'} in {record['seconds']:.0f} s")


def _page(record: Mapping[str, Any], tables: Sequence[tuple[str, str, list[str], list[list[str]]]]) -> str:
    body = "".join(f"<h2>{title}</h2>{html_table(heads, lines)}" for _, title, heads, lines in tables)
    settings = {key: record[key] for key in ("targets", "data", "samples")}
    body += reproduce(record["command"], pairs(settings), pairs(record["environment"]))
    lead = "Measures of the networks, independent of the rule that trained them; means over seeds ± standard deviation. "
    return document("Measures of networks", lead + " ".join(record["notes"]), body, full=True)
