"""`apical audit`: train rules briefly, measure them, print a table and save it with a figure."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from apical.bench.audit import audit
from apical.bench.figures.audit import SIGNS, draw, number_of
from apical.bench.materials import identified, load_data, located
from apical.bench.names import RULES, find_rule
from apical.bench.papers import claims
from apical.bench.provenance import environment
from apical.bench.recipe import Recipe
from apical.bench.state import write_json
from apical.cli.commands import refuse_numbers
from apical.cli.terminal import Terminal, bar, check_alone, held, say, say_files
from apical.data.dataset import Dataset, Split
from apical.diagnostics.plausibility import CRITERIA
from apical.errors import ApicalError, ConfigError

if TYPE_CHECKING:
    from apical.cli.flags.audit import Audit

IMAGES = 2000
"""Largest number of training images used."""

SEQUENCES = 500
"""Largest number of training sequences used."""


def run(flags: "Audit", command: str) -> int:
    """Audit the rules; return the exit status."""
    rules = list(dict.fromkeys(flags.rules or RULES))
    started, threads = time.perf_counter(), torch.get_num_threads()
    with held(flags.out, "auditing", partial(_check, flags)):
        dataset = load_data(_asked(flags))
        if dataset.about:
            print(dataset.about)
        most = SEQUENCES if dataset.is_sequences else IMAGES
        if len(dataset.train) > most:
            dataset = replace(dataset, train=Split(dataset.train.inputs[:most], dataset.train.targets[:most]))
        torch.set_num_threads(1)  # the matrices are small
        try:
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
        "lr": flags.lr,
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
        drawings = draw(record)
        write_json(flags.out / "audit.json", record)
        for drawing in drawings:
            drawing.write(flags.out)
        say_files(flags.out, ("audit.json", *(f"{d.stem}.{kind}" for d in drawings for kind in ("png", "svg"))))
    return 0


def _asked(flags: "Audit") -> Recipe:
    return Recipe(**located({"data": flags.data, "model": flags.model}))


def _check(flags: "Audit") -> None:
    refuse_numbers(flags)
    for rule in flags.rules:
        find_rule(rule)
    check_alone("audit", flags, "the audit")


def _audited(rules: Sequence[str], flags: "Audit", dataset: Dataset) -> tuple[list[dict[str, Any]], dict[str, str]]:
    rows, refused = [], {}
    with bar(len(rules)) as update:
        for rule in rules:
            update(advance=1, description=f"auditing {rule}")
            try:
                rows.append(audit(rule, flags.model, dataset, flags.epochs, flags.seed, flags.lr).record())
            except ApicalError as error:
                refused[rule] = " ".join(str(error).split())
    return rows, refused


def _tell(record: dict[str, Any]) -> None:
    console = Terminal()
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

    say("")
    say(f"{SIGNS['yes']} yes  {SIGNS['partly']} partly  {SIGNS['no']} no  {SIGNS['not applicable']} not applicable")
    unit = "" if reference is None else " Multiply-adds and bytes held: relative to bp."
    say(f"Noise, sparse, one bit: degrees by which hidden updates turn.{unit}")
    disagreements = [
        f"{row['rule']}, {title.lower()}: claimed {row['claims'][key]['claimed']}, {row['verdicts'][key]['text']}"
        for row in record["rows"]
        for key, title in ((c["key"], c["title"]) for c in record["criteria"])
        if key in row["claims"] and not row["claims"][key]["agrees"]
    ]
    if disagreements:
        say(f"* differs from the claim in {record['claims']}:")
    for line in disagreements:
        say(f"  {line}")
    say("What the error of each layer passes through:")
    for row in record["rows"]:
        say(f"  {row['rule']}: {row['placement']}")
    for rule, why in record["refused"].items():
        say(f"not audited: {rule}: {why}")
    number = len(record["rows"])
    say(f"{number} {'rule' if number == 1 else 'rules'} in {record['seconds']:.0f} s")
