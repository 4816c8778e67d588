"""Reading finished and unfinished runs back from disk, for the report.

A compare folder holds runs/<rule>/seed-<k>/; a run folder holds config.json, environment.json, metrics.jsonl and, once
the run has ended, result.json. Missing files are not an error; unreadable files are.
"""

import json
import math
import re
import shlex
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apical.bench.figures.style import RULES
from apical.bench.recipe import rule_name
from apical.bench.report.checks import check_config, check_plan, check_result
from apical.bench.state import NotAnObjectError, brief, parse_object
from apical.data.containers import check_zip
from apical.errors import CheckpointError

Array = NDArray[np.float64]
_SCORES = [f"{split}_{kind}" for split in ("train", "test", "validation") for kind in ("loss", "accuracy")]
_MEASURES = (*_SCORES, "ms_per_step", "feedback_ms_per_step")


class Score(NamedTuple):
    """Quantity by which rules are compared: its key in the metrics, name, name with unit, and scale factor."""

    key: str
    name: str
    label: str
    scale: float

    @property
    def is_loss(self) -> bool:
        """Whether lower is better."""
        return self.key == "test_loss"


ACCURACY = Score("test_accuracy", "test accuracy", "test accuracy (%)", 100.0)
LOSS = Score("test_loss", "test loss", "test loss", 1.0)
NATS = Score("test_loss", "test loss", "test loss (nats per token)", 1.0)


@dataclass(frozen=True)
class Run:
    """One rule with one seed.

    Attributes:
        config: contents of config.json, empty if it was not written.
        environment: contents of environment.json, empty if it was not written.
        epochs: number of each recorded epoch, ascending; 0 is before training.
        records: the metrics of each epoch in `epochs`.
        result: contents of result.json, None while the run has not ended.
        examples: images and their reconstructions, each (n, channels, height, width), if the run saved any.
        panels: figures of the network, :class:`apical.core.credit.Panel` as a dictionary each.
    """

    rule: str
    seed: int
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    epochs: tuple[int, ...]
    records: tuple[Mapping[str, Any], ...]
    result: Mapping[str, Any] | None
    examples: tuple[Array, Array] | None = None
    panels: Sequence[Mapping[str, Any]] = ()

    @property
    def finished(self) -> bool:
        """True if the run ended as planned."""
        return self.result is not None and self.result.get("status", "finished") == "finished"

    @property
    def status(self) -> str:
        """State of the run as text: finished, diverged with its message, or the last epoch reached."""
        if self.finished:
            return "finished"
        if self.result is not None:
            message = next((str(self.result[key]) for key in ("message", "error") if self.result.get(key)), "")
            return str(self.result.get("status")) + (f": {message}" if message else "")
        if not self.epochs:
            return "not started"
        planned = self.config.get("epochs")
        return f"unfinished, epoch {self.epochs[-1]}" + (f" of {planned}" if planned is not None else "")

    @property
    def layers(self) -> list[str]:
        """Names of the layers with diagnostics, from the input to the output."""
        names: dict[str, None] = {}
        for record in self.records:
            names.update(dict.fromkeys(record.get("layers") or {}))
        return list(names)

    def curve(self, key: str, layer: str | None = None) -> Array:
        """Return the metric `key` of each epoch, of one layer if given; NaN where it was not measured. Shape (epochs,)."""
        rows = self.records if layer is None else [(r.get("layers") or {}).get(layer) or {} for r in self.records]
        return np.array([_finite(row.get(key)) for row in rows], dtype=np.float64)

    def final(self, key: str) -> float:
        """Return `key` from result.json or, if missing, from the last recorded epoch; NaN if it is in neither."""
        value = _finite((self.result or {}).get(key))
        return value if not math.isnan(value) or not self.records else _finite(self.records[-1].get(key))


@dataclass(frozen=True)
class Comparison:
    """All runs of a compare folder, or the one of a run folder.

    Attributes:
        command: the command line that made them, empty if not recorded.
        rules: short names in the order of the command line.
        runs: every run found or planned, by rule, then seed.
        single: True if the folder is one run folder.
        published: numbers to compare with, by rule, and `claims` about their order, as compare.json has them.
    """

    command: str
    rules: tuple[str, ...]
    runs: tuple[Run, ...]
    single: bool
    published: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    claims: Sequence[Mapping[str, Any]] = ()

    @property
    def score(self) -> Score:
        """The test accuracy or, if no run has one but some have a loss (regression), the test loss."""

        def has(key: str) -> bool:
            return any(math.isfinite(_finite(row.get(key))) for run in self.runs for row in (run.result or {}, *run.records))

        if not has(LOSS.key) or has(ACCURACY.key):
            return ACCURACY
        return NATS if any(run.config.get("loss") == "token_cross_entropy" for run in self.runs) else LOSS

    def of(self, rule: str) -> list[Run]:
        """Return the runs of one rule, by seed."""
        return [run for run in self.runs if run.rule == rule]


def read(folder: Path) -> Comparison:
    """Read a compare folder or a run folder.

    Raises:
        CheckpointError: `folder` is neither, contains no run, or contains a damaged file, which the message names.
    """
    if (folder / "runs").is_dir():
        return _read_compare(folder)
    if any((folder / name).is_file() for name in ("config.json", "metrics.jsonl", "result.json")):
        config = _checked(folder / "config.json", check_config)
        run = _read_run(folder, rule_name(str(config.get("rule", "unknown rule"))), config.get("seed", 0), config)
        return Comparison(_command(config), (run.rule,), (run,), single=True)
    raise CheckpointError(f"{folder} is neither a compare folder (no runs/ in it) nor a run folder (no config.json)")


def _read_compare(folder: Path) -> Comparison:
    plan = _checked(folder / "compare.json", check_plan)
    recipe, recipes = plan.get("recipe") or {}, plan.get("recipes") or {}
    runs: dict[tuple[str, int], Run] = {}
    for path in sorted((folder / "runs").glob("*/seed-*")):
        seed = re.fullmatch(r"seed-(\d+)", path.name)
        if seed and path.is_dir():
            config = {**recipe, **recipes.get(path.parent.name, {}), **_checked(path / "config.json", check_config)}
            runs[path.parent.name, int(seed[1])] = _read_run(path, path.parent.name, int(seed[1]), config)
    planned = [str(rule) for rule in plan.get("rules") or []]
    for rule in planned:
        for seed_number in plan.get("seeds") or []:
            absent = Run(rule, seed_number, {**recipe, **recipes.get(rule, {})}, {}, (), (), None)
            runs.setdefault((rule, seed_number), absent)
    if not runs:
        raise CheckpointError(f"{folder / 'runs'} contains no run folder (<rule>/seed-<number>)")
    order = list(RULES)
    others = sorted({rule for rule, _ in runs} - set(planned), key=lambda r: (order.index(r) if r in order else 99, r))
    rules = (*dict.fromkeys(planned), *others)
    ordered = tuple(runs[key] for key in sorted(runs, key=lambda key: (rules.index(key[0]), key[1])))
    command = _command(plan) or next(filter(None, (_command(run.config) for run in ordered)), "")
    published, claims = plan.get("published") or {}, plan.get("claims") or []
    return Comparison(command, rules, ordered, single=False, published=published, claims=claims)


def _read_run(folder: Path, rule: str, seed: int, config: Mapping[str, Any]) -> Run:
    records = _read_metrics(folder / "metrics.jsonl")
    result = _checked(folder / "result.json", check_result) if (folder / "result.json").exists() else None
    environment = _read_object(folder / "environment.json")
    epochs = tuple(sorted(records))
    done = (result or {}).get("epochs")
    if isinstance(done, int) and done > 0 and done not in records:
        raise CheckpointError(f"{folder / 'metrics.jsonl'} is damaged: epoch {done}, the last of the run, is missing")
    lines = tuple(records[epoch] for epoch in epochs)
    examples, panels = _read_examples(folder / "examples.npz"), _read_panels(folder / "panels.json")
    return Run(rule, seed, config, environment, epochs, lines, result, examples, panels)


def _read_panels(path: Path) -> Sequence[Mapping[str, Any]]:
    panels = _read_object(path).get("panels", []) if path.exists() else []
    fields = ("title", "kind", "x", "y", "values", "categories")
    if not isinstance(panels, list) or not all(isinstance(panel, dict) and set(fields) <= panel.keys() for panel in panels):
        raise CheckpointError(f"{path} is damaged: it contains no figures")
    return panels


def _read_examples(path: Path) -> tuple[Array, Array] | None:
    if not path.exists():
        return None
    try:
        check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            images, outputs = file["images"].astype(np.float64), file["made"].astype(np.float64)
    except (OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if images.ndim != 4 or outputs.shape != images.shape:
        raise CheckpointError(f"{path} is damaged: images of shapes {images.shape} and {outputs.shape}")
    return images, outputs


def _read_metrics(path: Path) -> dict[int, Mapping[str, Any]]:
    """Return the record of each epoch; if a resumed run repeats an epoch, the later record counts.

    A last line without a line ending comes from a run that was killed while writing, and is left out.
    """
    text = _read_text(path)
    records: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        if not line.strip():
            continue
        record = _parse(line, f"{path}, line {number}")
        if type(record.get("epoch")) is not int:
            raise CheckpointError(f"{path}, line {number}: no metrics record with an epoch number")
        layers = record.get("layers") or {}
        if not isinstance(layers, dict) or not all(isinstance(row, dict) for row in layers.values()):
            raise CheckpointError(f"{path}, line {number}: 'layers' does not map layer names to measurements")
        for row, keys in ((record, _MEASURES), *((row, tuple(row)) for row in layers.values())):
            for key in keys:
                if not isinstance(row.get(key), int | float | None):
                    raise CheckpointError(f"{path}, line {number}: {key!r} is not a number")
        records[record["epoch"]] = record
    return records


def _checked(path: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Return the JSON object in `path`, with the types that the check requires; empty if there is no such file."""
    content = _read_object(path)
    try:
        check(content)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {brief(error)}") from error
    return content


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; empty if there is no such file."""
    text = _read_text(path)
    return _parse(text, str(path)) if path.exists() else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return parse_object(text, finite=False)  # earlier versions wrote NaN for diverged values
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where} is damaged: not JSON ({error.msg})") from error
    except NotAnObjectError:
        raise CheckpointError(f"{where} does not contain a JSON object") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: {brief(error)}") from error


def _command(record: Mapping[str, Any]) -> str:
    command: str | Sequence[str] = record.get("command") or ""
    return command if isinstance(command, str) else shlex.join(map(str, command))


def _finite(value: Any) -> float:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return math.nan
