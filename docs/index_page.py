"""The list of all results: every table of every paper, at what size it was run, how it came out, and where; and the rest."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gallery_page import AUDITS
from result_pages import NOTE, finished, joined
from sweep_pages import lacking
from tables import Row, data_name, grouped, load, significant, table

from apical.bench.papers import Table, papers, studies
from apical.data.catalogue import ENTRIES
from apical_papers.rates.recipe import FOLDERS

DATA = (
    "Fashion-MNIST",
    "MNIST",
    "CIFAR-10",
    "digits",
    "student-teacher",
    "CartPole and Pendulum",
    "functions",
    "exclusive or",
)
"""Data that titles and texts name, where no recipe does; the first that is named."""


FULL = "full"
CORE = ("pfa", "dfc", "ccl", "tdca")


class Standing(NamedTuple):
    """What one page of results is: a table of a paper or none, at full size or shortened how, and how it came out."""

    target: str
    size: str
    verdicts: tuple[str, ...]
    machine: str
    hours: str
    commit: str
    about: str

    @property
    def sentence(self) -> str:
        """The first line of the page."""
        if not self.target:
            own = "our own comparison or study, not a table of a paper"
            return f"**Done**: {own}." if self.size == FULL else f"**Incomplete**, {self.size}: {own}."
        said = "**Full size**" if self.size == FULL else f"**Shortened**: {self.size}"
        return f"{said} (`apical reproduce {self.target} --budget paper`)."


def standings(root: Path, records: Sequence[Row]) -> dict[str, Standing]:
    """By the name of the page: comparisons, studies, and files of rows under `results/`."""
    kept = {record["target"].replace("/", "-"): record for record in records}
    known = {}
    for path in sorted((root / "results").iterdir()):
        content = load(path / "results.json") or load(path / "compare.json") if path.is_dir() else load(path)
        if path.name not in (*AUDITS, "reproductions") and content is not None and (path.is_dir() or path.suffix == ".json"):
            content = content if isinstance(content, dict) else {"rows": content}
            runs = load(path / "summary.json") or content.get("rows") or []
            known[path.stem] = _standing(path, content, runs, kept.get(path.stem))
    return known


def tables() -> dict[str, Table]:
    """Every table of every paper, as `apical reproduce` names it."""
    return {f"{name}/{key}": each for name, paper in papers().items() for key, each in paper.tables.items()}


def _part(recipe: Row, runs: Sequence[Row]) -> dict[str, int]:
    """How many samples there were to learn from, where the copy of the data lacked some."""
    known = ENTRIES.get(recipe.get("data", ""))
    samples = next((row["n_train"] for row in runs if row.get("n_train")), None)
    if known is None or not known.layouts or samples is None or recipe.get("train_limit"):
        return {}
    whole = max(layout.train for layout in known.layouts)
    return {"train_limit": samples} if samples + recipe.get("validation", 0) < whole else {}


def _standing(path: Path, content: Row, runs: Sequence[Row], record: Row | None) -> Standing:
    named = {target.replace("/", "-"): target for target in tables()}
    by_study = {each.study: target for target, each in tables().items() if each.study}
    target = named.get(path.stem) or by_study.get(content.get("study") or path.stem, "")
    sizes = (record["sizes"] if record else _sizes(content, runs)) | _part(content.get("recipe") or {}, runs)
    verdicts = [row["verdict"] for row in record["rows"]] if record else _verdicts(path, content, runs)
    environment = (record or content).get("environment") or {}
    machines = [environment.get("gpu") or environment.get("cpu"), *(row.get("device") for row in runs)]
    commits = [environment.get("commit"), *(row.get("commit") for row in runs)]
    spent = [each.get("seconds") for each in (content, record or {}) if not each.get("resumed")]
    spent += [sum(row["seconds"] for row in runs)] if runs and all(row.get("seconds") for row in runs) else []
    hours = next((significant(seconds / 3600, 2) for seconds in spent if isinstance(seconds, int | float)), "-")
    full = {**(_recipe(tables()[target]) or {}), **tables()[target].budgets["paper"]} if target else {}
    return Standing(
        target,
        shortened(sizes, full) if target else absent(path, content, runs),
        tuple(verdicts),
        _first(machines),
        hours,
        _first(commits)[:8],
        f"{content.get('about', '')} {content.get('settings', '')}",
    )


def shortened(sizes: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    """ "full", or what is less than in the paper's budget.

    >>> shortened({"epochs": 5, "seeds": 3}, {"epochs": 40, "seeds": 3}), shortened({"epochs": 40}, {"epochs": 40})
    ('5 of 40 epochs', 'full')
    """
    less = [
        f"{sizes[key]:,} of {most:,} {key.replace('_', ' ')}"
        for key, most in full.items()
        if key != "train_limit" and not isinstance(most, str) and 0 < sizes.get(key, most) < most
    ]
    cut = sizes.get("train_limit")
    less += [f"{cut:,} training samples"] if cut and cut != full.get("train_limit") else []
    return ", ".join(less) or FULL


def absent(path: Path, content: Row, runs: Sequence[Row]) -> str:
    """ "full", or what a comparison or study of our own lacks of what it was to be.

    >>> absent(Path("own"), {"rules": ["bp", "fa"], "seeds": [0, 1]}, [{"rule": "bp"}, {"rule": "bp"}, {"rule": "fa"}])
    '3 of 4 runs'
    """
    if path.name in FOLDERS:
        return lacking(path) or FULL
    rules, seeds = content.get("rules"), content.get("seeds")
    planned = len(rules) * len(seeds) if rules and isinstance(seeds, list) else 0
    less = [f"{len(runs)} of {planned} runs"] if len(runs) < planned else []
    less += [f"{len(failures)} runs that failed"] if (failures := content.get("failures")) else []
    return ", ".join(less) or FULL


def _sizes(content: Row, runs: Iterable[Row]) -> dict[str, int]:
    """Epochs and seeds that the finished runs of every rule have, and the cut of the data."""
    runs = finished(runs)
    sizes = {key: value for key, value in (content.get("settings") or {}).items() if key in ("epochs", "seeds")}
    sizes = {key: len(value) if isinstance(value, list) else value for key, value in sizes.items()}
    epochs = [row.get("epochs", row.get("epoch")) for row in runs]
    counted = [sum(row.get("seeds", 1) for row in rows) for rows in grouped(runs, "rule").values()]
    sizes |= {"epochs": max(epochs)} if all(epochs) and epochs else {}
    sizes |= {"seeds": min(counted)} if counted else {}
    return sizes | {"train_limit": (content.get("recipe") or {}).get("train_limit") or 0}


def _verdicts(path: Path, content: Row, runs: Iterable[Row]) -> list[str]:
    rows = load(path / "verdicts.json") or content.get("verdicts") or [row for row in runs if row.get("verdict")]
    said = {"within": "reproduced", "outside": "not reproduced"}
    return [said.get(row["verdict"].split()[0], row["verdict"]) for row in rows]


def share(verdicts: Iterable[str]) -> str:
    """How many of the decided verdicts are "reproduced"."""
    decided = [each for each in verdicts if each in ("reproduced", "not reproduced")]
    return f"{decided.count('reproduced')} of {len(decided)}" if decided else "-"


def _first(values: Iterable[Any]) -> str:
    return next((str(value) for value in values if value), "-").replace("(R)", "").replace(" Processor", "")


def results_index(pages: Mapping[str, str], known: Mapping[str, Standing]) -> str:
    """The page.

    Args:
        pages: title of every page of results, by its name.
        known: what each is.
    """
    about = (
        "Every number on these pages is computed from files under `results/` in the repository, written by the commands "
        "that the pages name; {doc}`../how-results-are-made` explains how. *Size* is relative to `--budget paper`, the "
        "paper's epochs and at least as many seeds: full, how it was shortened, or not run. *Reproduced* counts verdicts, "
        "out of all that could be decided; {doc}`reproductions` has every verdict on one page."
    )
    rows = []
    for target, each in tables().items():
        mine = [name for name, standing in known.items() if standing.target == target and name in pages]
        rows += [_line(name, pages[name], data(each, pages[name], known[name].about), known[name]) for name in mine]
        rows += [] if mine else [[f"`{target}`", without_epochs(each.title), data(each), "not run", "", "", "", ""]]
    shown = [standing for name, standing in known.items() if name in pages]
    core = [target for target in tables() if target.partition("/")[0] in CORE]
    count = f"{_counted([*tables()], shown)} Of the four papers that the package began with: {_counted(core, shown)}"
    header = ("table", "what it is", "data", "size", "reproduced", "machine", "hours", "commit")
    others = [
        [f"[{text}]({name}.md)", *_where(known[name])]
        for name, text in pages.items()
        if name in known and not known[name].target
    ]
    rest = table(("what it is", "machine", "hours", "commit"), others, 99) if others else ""
    listed = "```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```" if pages else "None are kept here yet."
    parts = [NOTE, "# Results", about, count, f":::{{container}} small stacked index\n{table(header, rows, 99)}\n:::"]
    parts += ["## Comparisons and studies of our own", f":::{{container}} small stacked own\n{rest}\n:::"] if rest else []
    return joined([*parts, listed])


def _counted(targets: Sequence[str], known: Iterable[Standing]) -> str:
    """How many tables were run, and at the papers' size."""
    sizes = grouped([{"target": each.target, "full": each.size == FULL} for each in known], "target")
    run = [any(row["full"] for row in rows) for (target,), rows in sizes.items() if target in targets]
    share = f"{sum(run) / len(targets):.0%}".replace("%", " %") if targets else "none"
    return f"{len(targets)} tables, {len(run)} of them run, {sum(run)} at the paper's size ({share})."


def _line(name: str, title: str, data: str, standing: Standing) -> list[str]:
    return [
        f"`{standing.target}`",
        f"[{title}]({name}.md)",
        data,
        standing.size,
        share(standing.verdicts),
        *_where(standing),
    ]


def _where(standing: Standing) -> list[str]:
    return [standing.machine, standing.hours, standing.commit]


def without_epochs(title: str) -> str:
    """A table's title without the length of a training that it may not have had."""
    return re.sub(r", \d+ epochs", "", title)


def data(each: Table, *texts: str) -> str:
    """The data of a table: its recipe's, or what its texts name."""
    recipe = _recipe(each)
    named = "; ".join((each.title, *texts)).lower()
    return data_name(recipe["data"]) if recipe else next((name for name in DATA if name.lower() in named), "made for it")


def _recipe(each: Table) -> Row | None:
    """What a table that trains has in its recipe of data, and of how many of them; None of others."""
    if each.study not in studies():
        return None
    recipe = next(iter(studies()[each.study].rows.values())).recipe
    return {"data": recipe.data, "train_limit": recipe.train_limit}
