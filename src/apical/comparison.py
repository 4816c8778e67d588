"""`apical.compare`: compare rules from Python, with data and models given by name, from files, or in memory."""

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import torch
from torch import nn

from apical.bench import own_rules
from apical.bench.progress import results_table
from apical.bench.recipe import CHECKSUMS, Recipe, check_kinds, rule_name
from apical.bench.signals import Interrupted
from apical.cli import commands
from apical.cli.flags.training import Compare
from apical.cli.terminal import Terminal
from apical.core.credit import CreditRule
from apical.data.own import sources as own_data
from apical.errors import ConfigError, require_choice
from apical.models import own as own_models
from apical.own_code import standard_settings

Metric = Literal["test accuracy", "test loss"]
_ELSEWHERE = {"rule", "rule_options", "data", "model", "epochs", "seed", *CHECKSUMS}


@dataclass(frozen=True)
class ComparedRule:
    """The results of one rule over its seeds.

    Attributes:
        rule: name of the rule.
        mean: mean test accuracy (0 to 1) or, for regression, test loss, over the seeds that finished; NaN if none did.
        spread: standard deviation over these seeds; NaN for fewer than two.
        n: number of seeds that finished.
        values: accuracy or loss of each of these seeds.
        diverged: number of seeds that diverged.
        ms_per_step: median time of a training step, in milliseconds; None if it was not measured.
    """

    rule: str
    mean: float
    spread: float
    n: int
    values: tuple[float, ...]
    diverged: int
    ms_per_step: float | None


@dataclass(frozen=True)
class Compared:
    """The result of a comparison: one row per rule, in the order requested.

    Attributes:
        metric: the quantity that the rows report.
        rows: one per rule.
        report: path of the page with figures and tables.
        records: one dictionary per rule and seed, as in summary.json.
    """

    metric: Metric
    rows: tuple[ComparedRule, ...]
    report: Path
    records: tuple[Mapping[str, Any], ...]

    def __getitem__(self, rule: str) -> ComparedRule:
        """Return the row of a rule.

        Raises:
            KeyError: the rule was not compared.
        """
        for row in self.rows:
            if row.rule == rule:
                return row
        raise KeyError(rule)

    def __iter__(self) -> Iterator[ComparedRule]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        console = Terminal(width=100, force_terminal=False)
        with console.capture() as capture:
            console.print(results_table(self.records))
        return capture.get().rstrip()


@standard_settings()
def compare(
    *,
    out: str | os.PathLike[str],
    rules: str | type[CreditRule] | Sequence[str | type[CreditRule]] | None = None,
    data: Any = None,
    model: str | Callable[..., nn.Module] | None = None,
    epochs: int | None = None,
    seeds: int = 3,
    recipe: str | None = None,
    rule_options: str | Sequence[str] | Mapping[str, Any] = (),
    jobs: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
    **settings: Any,
) -> Compared:
    """Train rules with the same seeds, data and settings, and write a report, as `apical compare` does.

    Training uses the default dtype and device, grad mode and autocast of a new process, whatever the program has set.

    Args:
        out: folder for runs and report; must be new or empty.
        rules: one or several of: short names (`apical list rules`), "FILE.py:CLASS", classes; None runs seven rules.
        data: name of a data set, path of a .npz or .csv file or of a folder of images, "FILE.py:FUNCTION"; or in memory: a
            `torch.utils.data.Dataset`, a pair of them (train, test), arrays or tensors (training inputs, training targets,
            test inputs, test targets), or just (inputs, targets). None uses digits, or the recipe's data.
        model: name of a network, "FILE.py:NAME", or a class or function that returns an `nn.Module`. Its parameters named
            `input_shape`, `in_features`, `num_outputs` or `num_classes` are filled in. None uses mlp-256-256.
        epochs: passes over the training samples; None uses 20, or the recipe's number.
        seeds: number of seeds; they are 0, 1, ...
        recipe: name of a paper's settings (`apical list recipes`), or a sweep's best.json.
        rule_options: "[RULE:]key=value" as on the command line, one or several, or a dictionary.
        jobs: number of seeds to run in parallel, each in its own process. More than one requires names instead of objects in
            memory, and the usual `if __name__ == "__main__":` around the call.
        resume: continue the runs in `out`.
        overwrite: replace the contents of `out`.
        show: print progress and the final table.
        settings: any other setting of :class:`apical.bench.recipe.Recipe`, such as lr=0.1, batch_size=64, probe=0.

    Returns:
        One row per rule, with mean, spread and number of seeds; and the path of the report.

    Raises:
        ApicalError: an argument is not usable; the message is one sentence that says which.
        KeyboardInterrupt: raised after the finished training has been saved; continue with resume=True.
    """
    rules = [rules] if isinstance(rules, str | type) else rules
    options = {name: _plain(value) for name, value in settings.items() if value is not None}
    epochs, seeds, jobs = _plain(epochs), _plain(seeds), _plain(jobs)
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if type(value) is not int:
            raise ConfigError(f"{name} must be a whole number; got {value!r}")
    in_memory = [
        what for what, value in (("data", data), ("model", model)) if value is not None and not isinstance(value, str | Path)
    ]
    in_memory += ["rules"] if any(not isinstance(rule, str) for rule in rules or ()) else []
    if jobs != 1 and in_memory:
        raise ConfigError(
            f"{' and '.join(in_memory)} in memory only, where other processes cannot read them; leave jobs at 1"
        )
    flags = Compare(
        out=Path(out).expanduser(),
        rules=None if rules is None else tuple(map(_rule, rules)),
        data=_data(data, numbers=options.get("loss") == "mse"),
        model=str(model) if isinstance(model, str | Path) else None if model is None else own_models.remember(model),
        epochs=epochs,
        seeds=seeds,
        recipe=recipe,
        rule_options=_options(rule_options) or None,
        jobs=jobs,
        resume=resume,
        overwrite=overwrite,
        **_settings(options, epochs),
    )
    arguments = {"rules": flags.rules, "data": flags.data, "model": flags.model, "epochs": epochs, "seeds": seeds, **options}
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items() if value is not None)
    try:
        records, page = commands.run_comparison(flags, f"apical.compare({text})", Terminal(quiet=not show))
    except Interrupted as interrupted:
        raise KeyboardInterrupt(f"stopped at {interrupted.where}; saved: continue with resume=True") from interrupted
    return _compared(records, page)


def _rule(rule: str | type[CreditRule]) -> str:
    return rule if isinstance(rule, str) else own_rules.remember(rule)


def _options(options: str | Sequence[str] | Mapping[str, Any]) -> tuple[str, ...]:
    """Return rule options in the form used on the command line."""
    if isinstance(options, Mapping):
        return tuple(f"{name}={_plain(value)}" for name, value in options.items())
    return (options,) if isinstance(options, str) else tuple(options)


def _data(data: Any, *, numbers: bool) -> str | None:
    if data is None:
        return None
    return str(data) if isinstance(data, str | Path) else own_data.remember(data, numbers=numbers)


def _plain(value: Any) -> Any:
    """Convert NumPy and torch numbers to Python numbers, and a device to its name."""
    if isinstance(value, torch.device):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _settings(options: Mapping[str, Any], epochs: int | None) -> dict[str, Any]:
    """Return settings in the form used by the recipe: a single value given for a schedule becomes a schedule.

    Raises:
        ConfigError: there is no such setting, or a value has the wrong type.
    """
    names = {item.name for item in fields(Recipe)} - _ELSEWHERE
    for name in options:
        require_choice("setting of apical.compare", name, names)
    origins = {name: get_origin(kind) for name, kind in get_type_hints(Recipe).items()}
    values = {
        name: (value,) if origins[name] is tuple and isinstance(value, int | float) else value
        for name, value in options.items()
    }
    try:  # the recipe checks its own choices and reports them
        given = {**values, "epochs": epochs or 1}
        check_kinds({name: value for name, value in given.items() if origins[name] is not Literal})
    except TypeError as error:
        raise ConfigError(f"{error}, but this setting takes another kind of value") from None
    return {name: tuple(value) if origins[name] is tuple else value for name, value in values.items()}


def _compared(records: Sequence[Mapping[str, Any]], page: Path) -> Compared:
    is_loss = all(record.get("test_accuracy") is None for record in records)
    key = "test_loss" if is_loss else "test_accuracy"
    rows = []
    for rule in dict.fromkeys(rule_name(record["rule"]) for record in records):
        own = [record for record in records if record["rule"] == rule]
        values = tuple(float(record[key]) for record in own if record["status"] == "finished")
        times = [record["ms_per_step"] for record in own if record["ms_per_step"] is not None]
        rows.append(
            ComparedRule(
                rule=rule,
                mean=statistics.mean(values) if values else float("nan"),
                spread=statistics.stdev(values) if len(values) > 1 else float("nan"),
                n=len(values),
                values=values,
                diverged=sum(record["status"] == "diverged" for record in own),
                ms_per_step=statistics.median(times) if times else None,
            )
        )
    return Compared("test loss" if is_loss else "test accuracy", tuple(rows), page, tuple(records))
