"""`apical audit`: rules are trained shortly, measured, shown as a table, and kept with a figure."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from apical.bench.audit import audit
from apical.bench.checkpoint import write_atomically
from apical.bench.distributed import under_torchrun
from apical.bench.figures.audit import SIGNS, draw, number_of
from apical.bench.folders import check_writable, refuse_used
from apical.bench.materials import identified, load_data, located
from apical.bench.names import RULES, find_rule
from apical.bench.papers import claims
from apical.bench.progress import shown_path
from apical.bench.provenance import environment
from apical.bench.recipe import Recipe
from apical.bench.run_folder import FolderLock
from apical.bench.state import write_json
from apical.cli.commands import refuse_numbers
from apical.data.dataset import Dataset, Split
from apical.diagnostics.plausibility import CRITERIA
from apical.errors import ApicalError, ConfigError

if TYPE_CHECKING:
    from apical.cli.flags.audit import Audit

IMAGES = 2000
"""Training images that are used at most."""

SEQUENCES = 500
"""Training sequences that are used at most."""

FILES = ("audit.json", "audit.png", "audit.svg")


def run(flags: "Audit", command: str) -> int:
    """Audit the rules; returns the exit status.

    Raises:
        ApicalError: an option is not usable, or no rule can train the model.
    """
    _check(flags)
    rules = list(dict.fromkeys(flags.rules or RULES))
    started = time.perf_counter()
    dataset = load_data(_asked(flags))
    if dataset.about:
        print(dataset.about)
    most = SEQUENCES if dataset.is_sequences else IMAGES
    if len(dataset.train) > most:
        dataset = replace(dataset, train=Split(dataset.train.inputs[:most], dataset.train.targets[:most]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small
    held = nullcontext() if flags.out is None else FolderLock(flags.out).held("auditing", wait=0)
    try:
        with held:
            _check(flags)  # again: its last holder may have written it since
            return _run(rules, flags, dataset, command, started)
    finally:
        torch.set_num_threads(threads)


def _run(rules: Sequence[str], flags: "Audit", dataset: Dataset, command: str, started: float) -> int:
    rows, refused = _audited(rules, flags, dataset)
    recipe = identified(_asked(flags), dataset)
    if not rows:
        raise ConfigError("; ".join(f"{rule}: {why}" for rule, why in refused.items()))
    where = environment("cpu", 1)
    record: dict[str, Any] = {
        "command": command,
        "model": flags.model,
        "data": flags.data,
        "data_sha256": recipe.data_sha256,
        "model_sha256": recipe.model_sha256,
        "epochs": flags.epochs,
        "seed": flags.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "criteria": [{"key": c.key, "title": c.title, "question": c.question} for c in CRITERIA],
        "rows": rows,
        "refused": refused,
        "claims": "; ".join(table.source for table in claims()),
        "commit": where["commit"],
        "environment": where,
    }
    _tell(record)
    if flags.out is not None:
        drawing = draw(record)
        write_json(flags.out / "audit.json", record)
        write_atomically(flags.out / "audit.png", drawing.png)
        write_atomically(flags.out / "audit.svg", drawing.svg)
        for name in FILES:
            print(f"{name.rpartition('.')[2]}: {shown_path(flags.out / name)}")
    return 0


def _asked(flags: "Audit") -> Recipe:
    return Recipe(**located({"data": flags.data, "model": flags.model}))


def _check(flags: "Audit") -> None:
    if under_torchrun():
        raise ConfigError("apical audit is single-process; do not run it under torchrun")
    refuse_numbers(flags)
    for rule in flags.rules:
        find_rule(rule)
    out: Path | None = flags.out
    if out is not None:
        check_writable(out)
        if not flags.overwrite:
            refuse_used(out, "add --overwrite to replace the audit in it")


def _audited(rules: Sequence[str], flags: "Audit", dataset: Dataset) -> tuple[list[dict[str, Any]], dict[str, str]]:
    rows, refused = [], {}
    with _shown(rules) as advance:
        for rule in rules:
            advance(rule)
            try:
                rows.append(audit(rule, flags.model, dataset, flags.epochs, flags.seed).record())
            except ApicalError as error:
                refused[rule] = " ".join(str(error).split())
    return rows, refused


def _tell(record: dict[str, Any]) -> None:
    console = Console()
    lines = [["rule", *(criterion["title"] for criterion in record["criteria"])]]
    reference = next((row for row in record["rows"] if row["rule"] == "bp"), None)
    for row in record["rows"]:
        cells = []
        for criterion in record["criteria"]:
            key = criterion["key"]
            verdict = row["verdicts"][key]
            sign = SIGNS.get(verdict["verdict"]) or number_of(key, verdict, reference)
            cells.append(sign + ("*" if key in row["claims"] and not row["claims"][key]["agrees"] else ""))
        lines.append([row["rule"], *cells])
    if 6 * len(lines[0]) > console.width:
        lines = [list(line) for line in zip(*lines, strict=True)]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, title in enumerate(lines[0]):
        table.add_column(title, justify="center" if i else "left", vertical="bottom", min_width=5)
    for cells in lines[1:]:
        table.add_row(*cells)
    console.print(table, soft_wrap=False)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say("")
    say(f"{SIGNS['yes']} yes  {SIGNS['partly']} partly  {SIGNS['no']} no  {SIGNS['not applicable']} not applicable")
    say("Noise, sparse, one bit: degrees by which hidden updates turn. Multiply-adds and bytes held: relative to bp.")
    disagreements = [
        f"{row['rule']}, {title.lower()}: claimed {row['claims'][key]['claimed']}, {row['verdicts'][key]['text']}"
        for row in record["rows"]
        for key, title in ((c["key"], c["title"]) for c in record["criteria"])
        if key in row["claims"] and not row["claims"][key]["agrees"]
    ]
    if disagreements:
        say(f"* measured otherwise than claimed in {record['claims']}:")
    for line in disagreements:
        say(f"  {line}")
    say("What the error of each layer passes through:")
    for row in record["rows"]:
        say(f"  {row['rule']}: {row['placement']}")
    for rule, why in record["refused"].items():
        say(f"not audited: {rule}: {why}")
    number = len(record["rows"])
    say(f"{number} {'rule' if number == 1 else 'rules'} in {record['seconds']:.0f} s")


@contextmanager
def _shown(rules: Sequence[str]) -> Iterator[Any]:
    """A function to be told of the rule that is next: a bar, in a terminal only."""
    console = Console()
    if not console.is_terminal:
        yield lambda rule: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(rules))

        def advance(rule: str) -> None:
            progress.update(task, description=f"auditing {rule}")
            progress.advance(task)

        yield advance
