"""`apical sweep`: equal trials for every rule, scored on validation images; the best of each is tested afterwards."""

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apical.bench import compare as comparison
from apical.bench.checkpoint import REMEDY
from apical.bench.compare import Job, cores
from apical.bench.distributed import under_torchrun
from apical.bench.document import command_block, document, figure_block, table
from apical.bench.figures.sweep import draw
from apical.bench.folders import check_least, check_writable, refuse_used
from apical.bench.idle import refuse_idle
from apical.bench.materials import build_model, identified, load_data
from apical.bench.names import make_rule
from apical.bench.progress import shown_path
from apical.bench.provenance import environment
from apical.bench.recipe import Recipe, rule_name
from apical.bench.report import folder as report
from apical.bench.run_folder import FolderLock
from apical.bench.signals import Interrupted, StopSignals
from apical.bench.space import Axis, Grid, Optuna, applied, edges, grid, space
from apical.bench.state import read_json, write_json, write_page, write_state
from apical.bench.statistics import bootstrap
from apical.bench.sweep import Execute, Trial, clear, in_processes, on_ray
from apical.cli import commands
from apical.cli.terminal import say, show_table
from apical.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from apical.cli.flags.sweep import Sweep

TRIALS = 20
SHARE = 10
"""One in this many training images is held out for validation if the recipe holds out none."""


def run(flags: "Sweep", command: str) -> int:
    """Search, select and test; return the exit status."""
    rules, drafts, axes = _planned(flags)
    lock = _open(flags, command, drafts, axes)
    here = nullcontext(in_processes(make_rule, command, flags.jobs or cores()))
    trials: list[Trial] = []
    with on_ray(flags.ray, make_rule, command, flags.jobs or None) if flags.ray else here as train, StopSignals() as stop:
        try:
            for rule, recipe in zip(rules, drafts, strict=True):
                trials += _searched(flags, rule, recipe, axes[rule], train, stop)
            best = [winner(rule_name(rule), trials) for rule in rules]
            _keep(flags, command, axes, trials, best)
            status = _test(flags, command, [trial for trial in best if trial], stop)
        except Interrupted as interrupted:
            return commands.stopped(interrupted, command)
        finally:
            lock.release()
    _tell(flags.out, trials, best)
    return status


def _planned(flags: "Sweep") -> tuple[list[str], list[Recipe], dict[str, list[Axis]]]:
    """Return the rules, their recipes without the searched settings, and the axes, all checked."""
    if under_torchrun():
        raise ConfigError("apical sweep starts its own processes; do not run it under torchrun")
    check_least(flags, seeds=1, jobs=0, final_seeds=0, trials=1)
    if flags.search == "grid" and flags.trials is not None:
        raise ConfigError("--trials is for --search random and optuna; a grid search always runs every combination")
    if flags.tensorboard:
        raise ConfigError("--tensorboard is for train and compare; a sweep keeps metrics.jsonl of every trial: drop it")
    commands.refuse_numbers(flags)
    study = commands.find_study(flags.recipe)
    rules = list(dict.fromkeys(flags.rules or (tuple(study.rows) if study else commands.DEMO_RULES)))
    commands.check_rules(rules, flags)
    axes = space(rules, flags.space)
    drafts = [replace(commands.draft(flags, study, rule), probe=0) for rule in rules]
    drafts = [identified(item, load_data(item)) for item in commands.understood(drafts, flags, print)]
    commands.check_epochs(drafts)
    if flags.search == "grid":
        sizes = {rule_name(rule): len(grid(axes[rule])) for rule in rules}
        if len(set(sizes.values())) > 1:
            numbers = ", ".join(f"{rule} {size}" for rule, size in sizes.items())
            raise ConfigError(
                f"the grids have different sizes ({numbers}), so the comparison would not be fair; give all rules the same "
                "number of values, or use --search random or optuna with --trials"
            )
    if not drafts[0].validation:
        held_out = max(1, len(load_data(drafts[0]).train) // SHARE)
        drafts = [replace(recipe, validation=held_out) for recipe in drafts]
    recipes: list[Recipe] = []
    for rule, recipe in zip(rules, drafts, strict=True):  # known settings are built once, to check that they work
        trials = grid(axes[rule]) if flags.search == "grid" else [{}]
        recipes += commands.prepare([applied(recipe, settings) for settings in trials])[0]
    if not flags.resume:
        _refuse_idle(flags, rules, drafts, axes, recipes)
    return rules, drafts, axes


def _refuse_idle(
    flags: "Sweep",
    rules: Sequence[str],
    drafts: Sequence[Recipe],
    axes: Mapping[str, Sequence[Axis]],
    recipes: Sequence[Recipe],
) -> None:
    """Raise an error for settings and axes that no trial of any rule would use."""
    dataset, tried = load_data(drafts[0]), list(recipes)
    for rule, recipe in zip(rules, drafts, strict=True):
        for axis in axes[rule]:
            tried += [applied(recipe, {axis.name: value}) for value in axis.values or (axis.low, axis.high)]
    once = {recipe.rule_name: recipe for recipe in recipes}.values()  # feedback learning is the same in all trials of a rule
    rules_of = (make_rule(recipe, build_model(recipe, dataset), dataset.input_shape) for recipe in once)
    learning = any(parameter.requires_grad for rule in rules_of for parameter in rule.feedback_parameters())
    names = {axis.name: None for of_rule in axes.values() for axis in of_rule}  # in their order
    refuse_idle(flags.settings(), tried, dataset, has_feedback=learning, axes=tuple(names))


def _without(recipe: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name not in names}


def _open(flags: "Sweep", command: str, drafts: Sequence[Recipe], axes: Mapping[str, Sequence[Axis]]) -> FolderLock:
    """Make the folder, or check that it contains the same sweep; lock it against other sweeps.

    Defaults of settings on an axis may differ: a default tuned in the meantime does not affect the trials.
    """
    lock = FolderLock(flags.out)
    for held in (False, True):  # checked again once locked: it may have changed in between
        check_writable(flags.out, "plan.json")
        if not (flags.overwrite or flags.resume):
            refuse_used(flags.out)
        if not held:
            lock.hold("sweeping", wait=0)
    if flags.overwrite:
        clear(flags.out)
    recipes: dict[str, Any] = {recipe.rule_name: recipe.to_json() for recipe in drafts}
    plan: dict[str, Any] = {
        "space": list(flags.space),
        "search": flags.search,
        "trials": flags.trials,
        "seeds": flags.seeds,
        "search_seed": flags.search_seed,
        "jobs": (flags.jobs or cores()) if flags.search == "optuna" else None,
        "recipes": recipes,
    }
    path = flags.out / "plan.json"
    if path.exists():
        saved = read_json(path)
        if not isinstance(saved.get("recipes"), dict) or not all(isinstance(r, dict) for r in saved["recipes"].values()):
            raise CheckpointError(f"{path} is damaged (it has no recipes); {REMEDY}")
        plan["recipes"] = {**saved["recipes"], **recipes}  # rules may be added or dropped
        asked = json.loads(json.dumps(plan))
        unlike = [key for key in asked if key != "recipes" and saved.get(key) != asked[key]]
        settled = {rule_name(rule): {axis.name for axis in of_rule} for rule, of_rule in axes.items()}
        for rule, recipe in saved["recipes"].items():
            if _without(recipe, settled.get(rule, ())) != _without(asked["recipes"][rule], settled.get(rule, ())):
                unlike.append(f"recipe of {rule}")
        if unlike:
            raise CheckpointError(
                f"{flags.out} contains a sweep with other settings ({', '.join(unlike)}); resume with the same ones or use "
                "another --out"
            )
        if asked["recipes"].keys() == saved["recipes"].keys():
            return lock
    write_state(path, {**plan, "command": command, "environment": environment("cpu", torch.get_num_threads())})
    return lock


def _searched(
    flags: "Sweep",
    rule: str,
    recipe: Recipe,
    axes: Sequence[Axis],
    train: Execute,
    stop: StopSignals,
) -> list[Trial]:
    """Run all trials of one rule and return them."""
    search: Grid | Optuna
    if flags.search == "grid":
        search = Grid(grid(axes))
    else:
        search = Optuna(axes, flags.trials or TRIALS, flags.search_seed, random=flags.search == "random")
    batch = (flags.jobs or cores()) if flags.search == "optuna" else 1 << 30
    trials: list[Trial] = []
    name = rule_name(rule)
    while batch_settings := search.ask(batch):
        recipes, _ = commands.prepare([applied(recipe, settings) for settings in batch_settings])
        batch_trials = [
            _trial(flags, name, len(trials) + i, settings, prepared)
            for i, (settings, prepared) in enumerate(zip(batch_settings, recipes, strict=True))
        ]
        runs = [pair for trial in batch_trials for pair in zip(trial.recipes, trial.folders, strict=True)]
        told: set[int] = set()

        def refresh(batch_trials: Sequence[Trial] = batch_trials, told: set[int] = told) -> None:
            for trial in batch_trials:
                if trial.number not in told and len(trial.results()) == len(trial.folders):
                    told.add(trial.number)
                    score = "diverged" if trial.score is None else _shown(trial.score)
                    say(f"{name} trial {trial.number}: {words(trial.settings)}: {score}")

        train(runs, stop, refresh)
        refresh()
        search.tell([trial.score for trial in batch_trials])
        trials += batch_trials
    return trials


def _trial(flags: "Sweep", name: str, number: int, settings: dict[str, Any], recipe: Recipe) -> Trial:
    recipes = tuple(replace(recipe, seed=seed, threads=1) for seed in range(flags.seeds))
    folder = flags.out / "trials" / name / f"{number:03d}"
    folders = tuple(folder / f"seed-{seed}" for seed in range(flags.seeds))
    return Trial(name, number, settings, recipes, folders)


def winner(rule: str, trials: Sequence[Trial]) -> Trial | None:
    """Return the trial of a rule with the best validation score, the first of equals; None if all diverged."""
    scored = [(trial.score, -trial.number, trial) for trial in trials if trial.rule == rule and trial.score is not None]
    return max(scored, key=lambda score: score[:2])[2] if scored else None


def _keep(
    flags: "Sweep",
    command: str,
    axes: Mapping[str, Sequence[Axis]],
    trials: Sequence[Trial],
    best: Sequence[Trial | None],
) -> None:
    """Write sweep.json, best.json and the figure."""
    records, chosen = [trial.record() for trial in trials], {trial.rule: trial.number for trial in best if trial}
    record = {
        "command": command,
        "search": flags.search,
        "axes": {
            rule_name(rule): [
                {"name": a.name, "values": list(a.values), "range": None if a.values else [a.low, a.high], "log": a.log}
                for a in axes_of_rule
            ]
            for rule, axes_of_rule in axes.items()
        },
        "trials": records,
        "best": chosen,
        "final_seeds": flags.final_seeds if chosen else 0,
        "edges": edges(records, chosen),
        "is_loss": any(trial.score is not None and trial.score < 0 for trial in trials),
        "environment": environment("cpu", torch.get_num_threads()),
    }
    write_json(flags.out / "sweep.json", record)
    rows = {trial.rule: replace(trial.recipes[0], seed=0, threads=0).to_json() for trial in best if trial}
    about = f"best of {len(trials) // max(len(best), 1)} trials per rule, {flags.search}"
    if rows:
        write_json(flags.out / "best.json", {"title": f"{flags.out.name}: {about}", "rows": rows})
    drawing = draw(record)
    if drawing is not None:
        drawing.write(flags.out)
    figure = figure_block(drawing) if drawing is not None else ""
    write_page(flags.out / "sweep.html", page(record, figure))


def _test(flags: "Sweep", command: str, best: Sequence[Trial], stop: StopSignals) -> int:
    """Train the best settings again with new seeds and test them; return the exit status."""
    if not flags.final_seeds or not best:
        return 0 if best else commands.DIVERGED
    job = Job(
        recipes=tuple(replace(trial.recipes[0], threads=0) for trial in best),
        seeds=tuple(range(1000, 1000 + flags.final_seeds)),  # no trial used these
        out=flags.out / "final",
        make_rule=make_rule,
        command=command,
        jobs=flags.jobs,
        resume=True,
        about={"study": None, "published": {}, "claims": []},
    )
    comparison.check(job)
    say(f"testing the best of each rule with {flags.final_seeds} new seeds")
    rows = comparison.run(job, stop, lambda: None)
    report.write(job.out)
    return commands.DIVERGED if any(row["status"] == "diverged" for row in rows) else 0


def _tell(out: Path, trials: Sequence[Trial], best: Sequence[Trial | None]) -> None:
    summary = out / "final" / "summary.json"
    rows = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else []
    lines = []
    for rule in dict.fromkeys(trial.rule for trial in trials):
        own = [trial for trial in trials if trial.rule == rule]
        winner_of_rule = next((trial for trial in best if trial and trial.rule == rule), None)
        tested = [row for row in rows if row["rule"] == rule and row["status"] == "finished"]
        scores = [100 * row["test_accuracy"] if row["test_accuracy"] is not None else row["test_loss"] for row in tested]
        counts = [str(len(own)), str(sum(trial.score is None for trial in own))]
        best_of_rule = [words(winner_of_rule.settings) if winner_of_rule else "-"]
        best_of_rule += [_shown(winner_of_rule.score) if winner_of_rule and winner_of_rule.score is not None else "-"]
        tests = [bootstrap(scores).shown(), str(len(scores))] if scores else ["-", "-"]
        lines.append([rule, *counts, *best_of_rule, *tests])
    heads = ("rule", "trials", "diverged", "best settings", "validation", "test [95 %]", "n")
    show_table(heads, lines, left=("rule", "best settings"))
    for name in ("sweep.html", "best.json", "final/report.html"):
        if (out / name).exists():
            say(f"{Path(name).name}: {shown_path(out / name)}")
    best_of = {trial.rule: trial.number for trial in best if trial}
    for rule, ends in edges([trial.record() for trial in trials], best_of).items():
        if ends:
            say(f"{rule}: not bracketed, the best trial has {' and '.join(ends)} value; widen --space")
    if not best_of:
        say("every trial diverged, so there are no best settings: try other values in --space, such as a smaller lr")
        return
    names = " ".join(best_of)
    again = shlex.join(["apical", "compare", "--recipe", str(out / "best.json"), "--out", "DIR"])
    say(f"to train {names} with the best settings again: {again}")


def words(settings: Mapping[str, Any]) -> str:
    """Format settings for display.

    >>> words({"lr": 0.0123456, "expansion": 4})
    'lr 0.01235, expansion 4'
    """
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())


def _shown(score: float) -> str:
    return f"{100 * score:.2f} %" if score >= 0 else f"loss {-score:.4g}"


def page(record: Mapping[str, Any], figure: str) -> str:
    """Return the sweep as one HTML page; every name and value is escaped."""
    ends = {rule: at for rule, at in record["edges"].items() if at}
    beyond = "; ".join(f"{rule}: {' and '.join(at)} value" for rule, at in ends.items())
    lines = []
    for row in sorted(record["trials"], key=lambda row: (row["rule"], 1e300 if row["score"] is None else -row["score"])):
        score = "diverged" if row["score"] is None else _shown(row["score"])
        mark = ", best" if record["best"].get(row["rule"]) == row["number"] else ""
        lines.append([row["rule"] + mark, str(row["number"]), words(row["settings"]), score, f"{row['seconds']:.1f}"])
    lead = "All rules had the same number of trials. Trials are scored on validation images; the test images were "
    if record["final_seeds"]:
        lead += "used only after the choice, for the best trial of each rule, trained again with new seeds."
    else:
        lead += "not used."
    if beyond:
        lead += f" Not bracketed, so a better value may lie outside the range searched: {beyond}."
    link = '<p><a href="final/report.html">The report of the best trials</a></p>\n' if record["final_seeds"] else ""
    body = f"""{link}{figure}
<h2>Trials</h2>
{table(("Rule", "Trial", "Settings", "Validation", "Seconds"), lines)}
<h2>Do this again</h2>
{command_block(record["command"])}"""
    return document("Sweep", lead, body, full=True)
