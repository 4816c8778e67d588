"""TDCA with ReLU learners: obstacles, and an evolution of hidden credit only.

Run `python -m apical_papers.tdca.classification.relu --out results/tdca-relu`. Tasks and learners are those of the arm
"relu" of the classification study, with separate meta-seeds. Arms: "error", where the output's credit is the error and
fitness is the mean loss over the last steps, and "evolved", as in the classification study, to analyse its credit.
The first was chosen on the development meta-seed 1500 with 24 separate tasks. The marks, for that arm, set before the run:

    accuracy within 1 point of tuned backpropagation's
    loss below tuned backpropagation's, below tuned direct feedback alignment's, below the hand-built teachers'
    loss below that with the credits of other examples
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from tyro.conf import arg

from apical.bench.finding import Row, series
from apical.bench.finding import table as table_of
from apical.bench.program import about_study, keep_results, run_command
from apical.errors import require_choice
from apical.evolution.classification import Classification
from apical_papers.tdca.classification import study as base
from apical_papers.tdca.classification.report import NAMES, percent
from apical_papers.tdca.classification.verdicts import STRICT, Cell, harness, lower, near
from apical_papers.tdca.trials import GRID, LAST, SWING

ARMS = {"error": replace(base.ARMS["relu"], settled=LAST, output="error"), "evolved": base.ARMS["relu"]}
CONTROLS = ("hand-silent", "hand-random", "bp", "dfa")
RULES = {"error": ("tdca", "shuffled", *CONTROLS), "evolved": ("tdca", "hidden-half", "output-half")}
"""Without evolution, and without hidden credit, the arm "error" is the hand-built teacher with silent hidden units."""
FIRST = 3000
"""The first meta-seed."""
DISSECTED = 2
"""Meta-seeds of the arm "evolved", which has no marks."""
GENERATIONS = 60
TASKS, VALIDATION = 32, 32
"""Number of test tasks, and of tasks for choosing learning rates."""
TITLES = {
    **NAMES,
    "tdca": "TDCA",
    "hidden-half": "its hidden credit, the error at the output",
    "output-half": "its output credit, random feedback for hidden units",
}
ABOUT = about_study(
    "TDCA with ReLU learners, and what stands in its way",
    "Learners of 32 ReLU units, tasks of four classes of digits. In the classification study single tasks decided "
    "the mean loss of TDCA here. Runs on a development meta-seed suggested why: an evolved credit for the output makes "
    "logits several times those under the error. That lowers the loss of a learner that is right without making it right "
    "more often; at Adam's constant rate the loss of such a learner swings from step to step, so that its end is luck. "
    "Here the output's credit is the error, hidden credit alone is evolved, and fitness is the mean loss over the last ten "
    "steps. The arm with an evolved output, as before, is there to be taken apart.",
    "Means over unseen tasks, paired over meta-seeds (independent evolutions): TDCA minus the other, each "
    "rule at the learning rate of one grid with the lowest mean training loss on validation tasks. Set before the run. "
    "Reproduced means that the 95 % interval of the mean difference (Student's t) lies on the better side of the mark.",
)


@dataclass(frozen=True)
class Options:
    """TDCA with ReLU learners; finished evolutions in --out are kept."""

    out: Annotated[Path, arg(metavar="DIR")]
    """Folder of the study."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms to evolve; the first one has the marks."""
    generations: int = GENERATIONS
    """Generations of each evolution."""
    seeds: int = base.SEEDS
    """Meta-seeds: independent evolutions of the arm with marks."""
    jobs: int = 0
    """Evolutions run in parallel; 0: one per core."""


def cell(generations: int, arm: str, seed: int) -> dict[str, Any]:
    """Run one evolution and its trials, all rules at the learning rate of evolution and at their own."""
    train, test = base.digits()
    setting = ARMS[arm]
    about, teachers = base.evolved(setting, seed, train, generations)
    of_rule = dict.fromkeys(RULES[arm], teachers["tdca"])
    result = base.both_rates(Classification([test], setting), seed, (VALIDATION, TASKS), of_rule)
    return {"seed": seed, **about, "teacher": teachers["tdca"].tolist(), **result}


def verdicts(cells: Sequence[Cell]) -> list[Row]:
    """Return all verdicts; none if the arm was not run."""
    if not cells:
        return []
    others = {"bp": "tuned BP's", **{rule: STRICT[rule] for rule in ("dfa", "shuffled", "hand-silent", "hand-random")}}
    return [near("C8", cells, before="accuracy"), *lower("C8", cells, others), *harness(cells)]


def table(arms: Mapping[str, Sequence[Cell]], part: str, title: str) -> dict[str, Any]:
    """Return a table with one row per rule and arm."""

    def row(arm: str, rule: str) -> list[Any]:
        trials = series(arms[arm], part, rule)
        losses = [loss for trial in trials for loss in trial["losses"]]
        rates = " ".join(f"{rate:g}" for rate in sorted({trial["lr"] for trial in trials}))
        shares = [percent(series(trials, key)) for key in ("accuracy", "swings", "dead")]
        name = TITLES[rule] if rule != "tdca" else f"TDCA, the output's credit {'is the error' if arm == 'error' else arm}"
        middle, worst = f"{median(losses):.2g}", f"{max(losses):.2g}"
        return [name, str(len(trials)), rates, series(trials, "loss"), middle, worst, *shares, series(trials, "logit")]

    note = (
        "Learning rates; training loss in nats, mean with 95 % interval over meta-seeds, then median and worst of all "
        f"tasks; accuracy on held-out images; tasks whose loss exceeds {SWING:g} at one of the last {LAST} steps; hidden "
        "units that are silent for all training images; mean magnitude of the logits."
    )
    header = (
        "rule",
        "meta-seeds",
        "rates",
        "loss",
        "median",
        "worst",
        "accuracy, %",
        "swings, %",
        "silent units, %",
        "logits",
    )
    return table_of(title, note, header, (row(arm, rule) for arm in arms for rule in RULES[arm]))


def study(options: Options, command: str) -> dict[str, Any]:
    """Run missing evolutions, and write results.json and report.html.

    Raises:
        ConfigError: an arm is unknown.
        CheckpointError: the folder contains evolutions with other settings.
    """
    for arm in options.arms:
        require_choice("arm", arm, ARMS)
    config = {
        "generations": options.generations,
        "strategy": asdict(base.STRATEGY),
        "tasks for tests": TASKS,
        "validation tasks": VALIDATION,
        "images for evolution": base.SEEN,
        "learning rates": list(GRID),
    }
    seeds = {arm: range(FIRST, FIRST + (options.seeds if arm == "error" else DISSECTED)) for arm in options.arms}
    settings_of = {(arm, seed): replace(ARMS[arm], seed=seed) for arm in options.arms for seed in seeds[arm]}
    make = partial(cell, options.generations)
    every = base.kept_evolutions(options.out, config, settings_of, make, options.jobs)
    arms: dict[str, list[Cell]] = {arm: [] for arm in options.arms}
    for (arm, _), content in zip(settings_of, every, strict=True):
        arms[arm].append(content)
    facts = {"meta-seeds": f"{FIRST} to {FIRST + options.seeds - 1}", **config}
    facts |= {key: value for key, value in base.plain(asdict(ARMS["error"])).items() if key != "seed"}
    parts = {"tuned": "With tuned learning rates", "same_rate": "All at the learning rate of evolution"}
    tables = [table(arms, part, title) for part, title in parts.items()]
    return keep_results(options.out, command, ABOUT, facts, every, verdicts(arms.get("error", ())), tables)


main = partial(run_command, "apical_papers.tdca.classification.relu", Options, study)


if __name__ == "__main__":
    sys.exit(main())
