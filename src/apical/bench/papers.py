"""Papers: recipes for `apical compare --recipe`, and tables and figures for `apical reproduce PAPER/TABLE`.

A paper is a :class:`Paper` that an installed package registers under the entry-point group `apical.papers`; those of apical
are in the package `apical_papers`. A table is either a study of trainings, run by the engine of `apical compare`, or a
module with its own command line. A budget sets how much of it is run. A verdict is given only if the budget is large enough:
it must reach the epoch of the number, with enough seeds and all data; otherwise it is "budget too small to tell".
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, NamedTuple, cast

from apical.bench.evolve.recipe import EvolutionRecipe
from apical.bench.study import Study
from apical.errors import ConfigError

Budget = Literal["smoke", "cpu", "paper"]
BUDGETS: tuple[Budget, ...] = ("smoke", "cpu", "paper")

SEEDS = 3
"""Smallest number of seeds for a verdict."""

GROUP = "apical.papers"
"""The entry-point group under which packages register their papers."""

Sizes = dict[str, int | float | str]
Given = Mapping[str, int | float | str]
"""Options that determine the size of a run: --epochs, --seeds, --train-limit, --generations ..."""


@dataclass(frozen=True)
class Table:
    """One table or figure.

    Attributes:
        study: name of the study of trainings; if it is empty,
        module: module with a `main(arguments)` that takes `--out` and the sizes as options.
        needs: smallest sizes of a module's run for which its verdicts are valid.
        result: what the module writes: a "folder" with results.json, or a "file", from which its `verdicts` makes the rows.
        side_by_side: whether the module takes --jobs.
        hours: measured wall-clock hours on two shared virtual cores, by budget.
    """

    title: str
    budgets: dict[Budget, Sizes]
    study: str = ""
    module: str = ""
    needs: Sizes = field(default_factory=dict)
    result: Literal["folder", "file"] = "folder"
    side_by_side: bool = False
    hours: dict[Budget, float] = field(default_factory=dict)


class Claims(NamedTuple):
    """A table of claims.

    Attributes:
        source: paper and table.
        columns: short names of rules, by the paper's column heading.
        rows: for each criterion a verdict per column; "unclear" claims are left out.
    """

    source: str
    columns: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Paper:
    """The recipes, tables and claims of one paper or one family of papers.

    Attributes:
        title: title of the paper, or of the first of the family.
        reference: authors, venue and "arXiv NUMBER" or "doi NUMBER"; further papers after semicolons.
        studies: recipes by name, for `apical compare --recipe`.
        tables: by name, for `apical reproduce PAPER/TABLE`.
        evolutions: recipes by name, for `apical evolve --recipe`.
        claims: its claims about the plausibility of rules, for `apical audit`.
    """

    title: str = ""
    reference: str = ""
    studies: Mapping[str, Study] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    evolutions: Mapping[str, EvolutionRecipe] = field(default_factory=dict)
    claims: tuple[Claims, ...] = ()


@cache
def papers() -> dict[str, Paper]:
    """Return all installed papers, by the name of their entry point.

    Raises:
        ConfigError: none is installed, one cannot be loaded, or two have the same name.
    """
    installed: dict[str, Paper] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in installed:
            raise ConfigError(f"two installed packages have a paper {entry.name!r} (entry-point group {GROUP}); remove one")
        installed[entry.name] = _load(entry)
    if not installed:
        raise ConfigError(f"no papers are installed (entry-point group {GROUP}); install apical with pip, also from a clone")
    return installed


def _load(entry: EntryPoint) -> Paper:
    try:
        paper = entry.load()
    except Exception as error:  # from another package
        raise ConfigError(f"the paper {entry.name!r} ({entry.value}) cannot be loaded: {error!r}") from error
    if not isinstance(paper, Paper):
        raise ConfigError(f"the paper {entry.name!r} ({entry.value}) is not an apical.bench.papers.Paper")
    return paper


@cache
def studies() -> dict[str, Study]:
    """Return the recipes of all papers, by name."""
    return _together("studies", "recipe")


@cache
def evolutions() -> dict[str, EvolutionRecipe]:
    """Return the evolution recipes of all papers, by name."""
    return _together("evolutions", "evolution recipe")


def _together(attribute: str, kind: str) -> dict[str, Any]:
    together: dict[str, Any] = {}
    for name, paper in papers().items():
        for key, value in cast(Mapping[str, Any], getattr(paper, attribute)).items():
            if key in together:
                raise ConfigError(f"two papers have a {kind} {key!r}; one of them is {name!r}")
            together[key] = value
    return together


def claims() -> tuple[Claims, ...]:
    """Return the claims of all papers about the plausibility of rules."""
    return tuple(table for paper in papers().values() for table in paper.claims)


@cache
def tables() -> dict[str, dict[str, Table]]:
    """Return the tables of all papers that have any, by paper and name."""
    return {name: dict(paper.tables) for name, paper in papers().items() if paper.tables}


def table_of(
    studies: Mapping[str, Study], name: str, smoke: Sizes, cpu: Sizes, paper: Sizes, hours: dict[Budget, float] | None = None
) -> Table:
    """Make a table from a study of trainings.

    Args:
        smoke, cpu, paper: sizes of the three budgets.
    """
    study = studies[name]
    if study.default.validation:  # thousands of images, which every rule and seed would evaluate
        smoke = {**smoke, "validation": 200}
    return Table(study.title, {"smoke": smoke, "cpu": cpu, "paper": paper}, study=name, hours=hours or {})


def own_study(title: str, module: str, smoke: Given, cpu: Given, paper: Given, **more: Any) -> Table:
    """Make the table of a module with its own command line; its verdicts are valid from the sizes of the budget "cpu".

    Args:
        smoke, cpu, paper: sizes of the three budgets.
        more: fields that differ from these.
    """
    needs = {name: size for name, size in cpu.items() if isinstance(size, int)}
    usual = {"module": module, "needs": needs, "side_by_side": True}
    return Table(title, {"smoke": dict(smoke), "cpu": dict(cpu), "paper": dict(paper)}, **{**usual, **more})


def seed_study(
    title: str,
    module: str,
    *,
    epochs: tuple[int, int, int],
    seeds: tuple[int, int, int],
    least: int | None = None,
    hours: dict[Budget, float] | None = None,
) -> Table:
    """Make the table of a study that runs seed by seed; its verdicts are valid from the sizes of the budget "cpu".

    Args:
        epochs, seeds: sizes of the three budgets.
        least: smallest number of seeds for verdicts, if fewer are enough.
    """
    smoke, cpu, paper = ({"epochs": n, "seeds": k} for n, k in zip(epochs, seeds, strict=True))
    needs = {**cpu, "seeds": least or seeds[1]}
    return own_study(title, module, smoke, cpu, paper, needs=needs, hours=hours or {})


def cut(images: int, epochs: int = 1, seeds: int = 2) -> Sizes:
    """Make a smoke budget with this many training images."""
    return {"epochs": epochs, "seeds": seeds, "train_limit": images, "test_limit": 200}


def too_small(table: Table, sizes: Sizes) -> bool:
    """Return whether a module's run is too small for its verdicts."""
    return any(int(sizes[name]) < int(least) for name, least in table.needs.items() if name in sizes)


def claimed(rule: str, tables: Iterable[Claims]) -> dict[str, str]:
    """Return the tables' claims about a rule, by criterion; the first table that has the rule counts.

    >>> table = Claims("a paper", {"WM": ("wm",), "SF": ("usf", "frsf")}, {"one_phase": ("no", "unclear")})
    >>> claimed("wm", [table]), claimed("usf", [table]), claimed("dfc", [table])
    ({'one_phase': 'no'}, {}, {})
    """
    claims: dict[str, str] = {}
    for table in tables:
        for place, rules in enumerate(table.columns.values()):
            if rule in rules:
                claims = {key: row[place] for key, row in table.rows.items() if row[place] != "unclear"} | claims
    return claims
