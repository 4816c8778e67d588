"""Options of `apical sweep`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from apical.cli.flags.shown import shown
from apical.cli.flags.training import Flags

Search = Literal["grid", "random", "optuna"]


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """Options that only sweep has; a separate base, so that they are listed first."""

    rules: Annotated[tuple[str, ...] | None, shown("RULE ...", "(default: bp fa dfa usf kp pfa pfa-o)")] = None
    """Rules to tune, all with the same number of trials; see `apical list rules`."""
    space: Annotated[tuple[str, ...], shown("[RULE:]KEY=VALUES ...", "(required)")]
    """What to try: a list (lr=0.01,0.03,0.1) or a range (lr=log(1e-4,1), momentum=uniform(0,0.99)) for a setting of the
    recipe or an option of the rule; with RULE: only for that one (pfa:expansion=4,10)."""
    search: Annotated[Search, shown("grid|random|optuna", "(default: grid)")] = "grid"
    """All combinations of lists; or --trials random ones; or chosen by Optuna (tree-structured Parzen estimator)."""
    trials: Annotated[int | None, shown("N", "(default: 20)")] = None
    """Trials of each rule, for random and optuna."""
    seeds: Annotated[int, shown("K", "(default: 1)")] = 1
    """Seeds of each trial; its score is their mean."""
    final_seeds: Annotated[int, shown("K", "(default: 3)")] = 3
    """Seeds with which the best trial of each rule is trained again and tested; 0 skips this."""
    search_seed: Annotated[int, shown("N", "(default: 0)")] = 0
    """Seed of the search."""
    jobs: Annotated[int, shown("N", "(default: one per core)")] = 0
    """Trainings run in parallel; Optuna proposes this many trials at a time."""
    ray: Annotated[str | None, shown("local|ADDRESS", "(default: off)")] = None
    """Train on a Ray cluster: one started here, or a running one (`ray start --head`) that sees --out as a shared folder."""
    rule_options: Annotated[tuple[str, ...] | None, shown("[RULE:]KEY=VALUE ...")] = None
    """Options of one rule, such as pfa:expansion=4, or, without a rule's name, of every rule that has them."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Flags, SweepFlags):
    """Tune rules with equal trials on validation images, then test the best of each."""
