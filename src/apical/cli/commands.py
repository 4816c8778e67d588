"""Commands of the command line. Everything is checked before the first file is written."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from apical import data, models
from apical.bench import compare as comparison
from apical.bench import own_rules
from apical.bench.compare import Job
from apical.bench.distributed import joined, pick_device, under_torchrun
from apical.bench.folders import check_least, refuse_both
from apical.bench.idle import refuse_idle
from apical.bench.loop import Training
from apical.bench.materials import build_model, identified, load_data, located, loss_for
from apical.bench.measure import probe_batch
from apical.bench.names import (
    AROUND,
    RULES,
    check_options,
    constructor_options,
    find_rule,
    make_rule,
    merged,
    options_for,
    other_teacher,
    resolve,
)
from apical.bench.network import SAMPLES, measured
from apical.bench.papers import studies
from apical.bench.progress import Watch, Watched, describe, results_table, shown_path
from apical.bench.recipe import Recipe, rule_name
from apical.bench.report import folder as report
from apical.bench.run_folder import RunFolder
from apical.bench.signals import Interrupted, StopSignals
from apical.bench.state import read_json, write_state
from apical.bench.statistics import busy_note
from apical.bench.study import Study, from_file
from apical.bench.tensorboard import check_installed
from apical.bench.tuned_rates import own_training, tuned_rate
from apical.cli.columns import columns, margin
from apical.cli.terminal import Terminal, bar, say
from apical.core.credit import CreditRule
from apical.data.dataset import Dataset
from apical.errors import ConfigError, DivergenceError, UnsupportedModelError, require_choice

if TYPE_CHECKING:
    from apical.cli.flags.training import Compare, Flags, Train

DEMO_RULES = ("bp", "fa", "dfa", "usf", "kp", "pfa", "pfa-o")
DIVERGED = 3
"""Exit status of a comparison in which a run diverged."""


def compare(flags: "Compare", command: str) -> int:
    """Train the rules side by side and report; return the exit status."""
    try:
        rows, page = run_comparison(flags, command, Terminal())
    except Interrupted as interrupted:
        return stopped(interrupted, command)
    say(f"report: {shown_path(page)}")
    lost = [f"{row['rule']} seed {row['seed']}" for row in rows if row["status"] == "diverged"]
    if lost:
        print(f"apical: {len(lost)} of {len(rows)} runs diverged: {', '.join(lost)}", file=sys.stderr)
        return DIVERGED
    return 0


def run_comparison(flags: "Compare", command: str, console: Console) -> tuple[list[dict[str, Any]], Path]:
    """Train the rules side by side, print the final table, write the report; return summary.json's rows and the page."""
    if under_torchrun():
        raise ConfigError("apical compare runs its own processes; under torchrun use apical train")
    check_least(flags, seeds=1, jobs=0)
    refuse_both(flags)
    refuse_numbers(flags)
    study = find_study(flags.recipe)
    rules = flags.rules or tuple(study.rows if study else DEMO_RULES)
    names = check_rules(rules, flags)
    tell = partial(say, console=console)
    drafts = understood([draft(flags, study, rule) for rule in rules], flags, tell)
    check_epochs(drafts)
    recipes, notes = prepare(drafts, tell, _news(flags))
    tell_rates(drafts, flags, tell)
    published = {rule_name(r): [asdict(number) for number in study.row(r).published] for r in rules} if study else {}
    claims = (
        [asdict(c) for c in study.claims if c.epoch <= recipes[0].epochs and {c.rule, c.other} <= {*rules}] if study else []
    )
    job = Job(
        recipes=tuple(recipes),
        seeds=tuple(range(flags.seeds)),
        out=flags.out,
        make_rule=make_rule,
        command=command,
        jobs=flags.jobs,
        resume=flags.resume,
        overwrite=flags.overwrite,
        notes=dict(zip(names, notes, strict=True)),
        about={"study": flags.recipe, "published": published, "claims": claims},
        events=flags.tensorboard,
        ray=flags.ray,
    )
    comparison.check(job)
    watched = [Watched(rule, seed, job.folder(rule, seed)) for rule in names for seed in job.seeds]
    watch = Watch(console, watched, recipes[0].epochs, anew=flags.overwrite)
    with StopSignals() as stop, watch.shown():
        rows = comparison.run(job, stop, watch.refresh)
    console.print(results_table(rows))
    if note := busy_note({rule: [t for run in watched if run.rule == rule for t in run.times.values()] for rule in names}):
        tell(note)
    return rows, report.write(flags.out)


def check_rules(rules: Sequence[str], flags: Any) -> list[str]:
    """Return the names of the rules; raise an error for unknown names, duplicates, and options that no rule takes."""
    for rule in rules:
        find_rule(rule)
    names = [rule_name(rule) for rule in rules]
    if len(set(names)) != len(names):
        remedy = "" if len(set(rules)) != len(rules) else "; results are named after the class, so rename one of them"
        raise ConfigError(f"--rules names a rule twice: {' '.join(rules)}{remedy}")
    check_options(rules, flags.rule_options or ())
    return names


def check_epochs(recipes: Sequence[Recipe]) -> None:
    """Raise an error if the recipes train for different numbers of epochs."""
    if len({item.epochs for item in recipes}) > 1:
        raise ConfigError("the rules of this recipe train for different numbers of epochs; set --epochs")


def train(flags: "Train", command: str) -> int:
    """Train one rule; return the exit status."""
    refuse_numbers(flags)
    study = find_study(flags.recipe)
    find_rule(flags.rule)
    recipe = draft(flags, study, flags.rule)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    world_of = joined(recipe.device, recipe.batch_size, drop_last=recipe.drop_last)
    with world_of as world, StopSignals() as stop, ExitStack() as held:
        tell = print if world.is_main else lambda line: None
        drafts = understood([recipe], flags, tell)
        (recipe,), (notes,) = prepare(drafts, tell, _news(flags))
        tell_rates(drafts, flags, tell)
        folder = RunFolder(flags.out, events=flags.tensorboard)
        held.callback(folder.unlock)
        state = folder.claim(recipe, resume=flags.resume, overwrite=flags.overwrite, world=world)
        if state == "finished":
            if world.is_main:
                print(f"{shown_path(flags.out)} is already finished: {recipe.epochs} epochs")
            return 0
        if state == "diverged":
            raise DivergenceError(str(read_json(folder.result).get("message", "the run diverged")))
        training = Training(recipe, load_data(recipe), make_rule, folder, world, stop)
        try:
            training.start(resume=state == "resumable", command=command, notes=notes)
            with progress_of(training, world.is_main) as (on_step, on_line):
                on_line()
                while training.epoch < recipe.epochs:
                    training.train_epoch(on_step)
                    on_line()
        except Interrupted as interrupted:
            return stopped(interrupted, command) if world.is_main else 128 + interrupted.signum
        if world.is_main:
            write_state(folder.result, training.result())
            print(f"results: {shown_path(flags.out)}")
    return 0


def draft(flags: "Flags", study: Study | None, rule: str) -> Recipe:
    """Return the recipe of one rule: the study's row or the defaults, overridden by the given options."""
    if flags.tensorboard:
        check_installed()
    recipe = study.row(rule).recipe if study else Recipe(rule=rule)
    settings = flags.settings()
    settings |= located({name: settings[name] for name in ("data", "model") if name in settings})
    for schedule in ("lr", "weight_decay"):
        if schedule in settings:
            settings.setdefault(f"{schedule}_epochs", ())
    options = settings.pop("rule_options", ())
    if flags.teacher is not None:
        options = (*options, *_taught_by(flags, rule))
    if not hasattr(flags, "rule"):  # of a comparison: for several rules
        options = options_for(rule, options)
    recipe = replace(recipe, **{**settings, "rule": rule, "rule_options": merged(recipe.rule_options, options)})
    if study or "lr" in settings:
        return recipe
    own = {} if "optimizer" in settings else own_training(recipe)
    recipe = replace(recipe, **{name: value for name, value in own.items() if name not in settings})
    rate = tuned_rate(recipe)
    return recipe if rate is None else replace(recipe, lr=(rate,))


def understood(drafts: Sequence[Recipe], flags: "Flags", tell: Callable[[str], None]) -> list[Recipe]:
    """Return the recipes, with the loss that suits the data unless one was given; describe the user's own data."""
    first, note = drafts[0], ""
    if flags.loss is None and (fits := loss_for(first)) in ("mse", "token_cross_entropy") and first.loss != fits:
        drafts = [replace(recipe, loss=fits) for recipe in drafts]
        kind = "numbers" if fits == "mse" else "tokens"
        note = f"the targets of {first.data.rpartition('/')[2]} are {kind}: the loss is {fits}"
    about = "" if first.data in data.names() else load_data(drafts[0]).about
    for line in filter(None, (about, note)):
        tell(line)
    return list(drafts)


def tell_rates(drafts: Sequence[Recipe], flags: "Flags", tell: Callable[[str], None]) -> None:
    """Report learning rates and optimisers that differ from the common defaults although none were given."""
    common = [] if flags.recipe or "lr" in flags.settings() else drafts
    tuned = [item for item in common if tuned_rate(item)]
    for item in common if "optimizer" not in flags.settings() else ():
        if own_training(item):
            tell(f"{item.rule_name} trains with adam at {item.lr[0]:g}; --optimizer and --lr change this")
    if tuned:
        rates, rest = (
            ", ".join(f"{item.rule_name} {item.lr[0]:g}" for item in drafts if (item in tuned) is wanted)
            for wanted in (True, False)
        )
        message = f"learning rates tuned for each rule on these data: {rates}; --lr overrides them"
        tell(message + (f"; not tuned: {rest}" if rest else ""))


def _taught_by(flags: "Flags", rule: str) -> tuple[str, ...]:
    """Return the option that sets the rule's teacher file; empty for rules of a comparison without a teacher."""
    of_them = getattr(flags, "rules", None) or (rule,)
    if not any("teacher" in constructor_options(find_rule(other)) for other in of_them):
        raise ConfigError(
            f"--teacher {flags.teacher}: none of the rules {' '.join(of_them)} has a teacher; use it with tdca"
        )
    return (f"teacher={str(flags.teacher)!r}",) if "teacher" in constructor_options(find_rule(rule)) else ()


def _news(flags: "Flags") -> dict[str, Any]:
    """Return the settings given for a new run; empty for a resumed run, which was accepted with them when it started."""
    return {} if flags.resume else flags.settings()


def prepare(
    drafts: Sequence[Recipe], tell: Callable[[str], None] | None = None, given: Mapping[str, Any] | None = None
) -> tuple[list[Recipe], list[list[str]]]:
    """Return the recipes with the rules' defaults, and notes. Builds each model and rule once, to check that it works.

    Args:
        tell: called with a line of text if the trained network differs from the named model.
        given: settings given by the user; those without any effect raise an error.
    """
    first = drafts[0]
    pick_device(first.device)
    dataset = load_data(first)
    recipes, notes, apart, has_feedback = [], [], [], False
    for item in drafts:
        classes = None if dataset.is_regression else dataset.classes
        recipe, choices = resolve(identified(item, dataset), len(dataset.train), classes)
        recipe.check_targets(are_numbers=dataset.is_regression, are_tokens=dataset.is_sequences)
        if (recipe.flip or recipe.crop) and dataset.train.inputs.dim() != 4:
            shape = dataset.input_shape
            raise ConfigError(
                f"--flip and --crop need images (channels, height, width); samples of {recipe.data} are {shape}"
            )
        model = build_model(recipe, dataset)
        with named(recipe):
            rule = make_rule(recipe, model, dataset.input_shape)
        recipes.append(recipe)
        notes.append([*([dataset.about] if dataset.about else []), *choices, *rule.remarks])
        if tell is not None:
            for remark in rule.remarks:
                tell(f"{recipe.rule_name}: {remark}")
            if note := other_teacher(item, classes):
                tell(note)
        apart.append(rule.learns_apart)
        has_feedback = has_feedback or any(parameter.requires_grad for parameter in rule.feedback_parameters())
        if recipe.measure and len(recipes) == 1:  # every rule trains the same network
            measured(recipe.measure, rule.model, probe_batch(dataset.train, SAMPLES)[0])
        refuse_untaught(recipe, rule, dataset)
    for i, recipe in enumerate(recipes):
        if any(apart) and not apart[i] and recipe.has_feedback_passes:
            recipes[i] = replace(recipe, pretrain_epochs=0, feedback_passes=0)
            notes[i].append(f"no feedback passes: {recipe.rule_name} has no feedback weights to train separately")
        recipes[i].check_phases(two_phase=apart[i])
    refuse_idle(given or {}, recipes, dataset, has_feedback=has_feedback)
    return recipes, notes


def refuse_untaught(recipe: Recipe, rule: CreditRule, dataset: Dataset) -> None:
    """Raise a rule's errors before any training starts; some rules detect what they cannot train only at the first batch.

    Args:
        rule: a throw-away instance, not used afterwards.

    Raises:
        ConfigError, UnsupportedModelError: the rule's own, with its name.
    """
    with named(recipe), suppress(DivergenceError):  # training reports it, and continues with the other rules
        own_rules.checked(rule, rule(*probe_batch(dataset.train, FEW))).backward()


@contextmanager
def named(recipe: Recipe) -> Iterator[None]:
    """Prefix errors raised by a rule with its name."""
    try:
        yield
    except (ConfigError, UnsupportedModelError) as error:
        name = f"rule {recipe.rule_name!r}"
        raise error if str(error).startswith(name) else type(error)(f"{name}: {error}") from error


FEW = 8
"""Number of samples on which a rule is tried."""

_NUMBERS = {
    "rules": "expected names of rules, such as pfa; --seeds sets the number of seeds per rule, --epochs the training length",
    "rule": "expected the name of a rule, such as pfa; --epochs sets the training length",
    "data": "expected a name, a file or a folder; --train-limit sets the number of samples",
    "model": "expected a name with widths, such as mlp-64-64",
    "recipe": "expected the name of a recipe; see apical list recipes",
}


def refuse_numbers(flags: Any) -> None:
    """Raise an error for a number or an empty value in place of a name, and suggest the option probably meant."""
    for option, remedy in _NUMBERS.items():
        values = getattr(flags, option, None)
        where = option if option == "rules" and hasattr(flags, "model") and not hasattr(flags, "seeds") else f"--{option}"
        if values == () and hasattr(flags, "seeds"):
            raise ConfigError(f"{where} needs at least one name; see apical list rules")
        for value in (values,) if isinstance(values, str) else values or ():
            if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?", value):
                raise ConfigError(f"{where} {value}: {remedy}")


def find_study(name: str | None) -> Study | None:
    """Return the study with that name, or from a JSON file such as a sweep's best.json; None for None."""
    if name is None:
        return None
    if name.endswith(".json"):
        return from_file(Path(name))
    require_choice("recipe", name, studies())
    return studies()[name]


def stopped(interrupted: Interrupted, command: str) -> int:
    """Print how to continue; return the exit status that a shell expects."""
    words = [word for word in shlex.split(command) if word not in ("--overwrite", "--resume")]
    print(f"stopped at {interrupted.where}; saved. Continue with: {shlex.join([*words, '--resume'])}")
    return 128 + interrupted.signum


@contextmanager
def progress_of(training: Training, visible: bool) -> Iterator[tuple[Any, Any]]:
    """Yield callbacks that show steps (a bar, only in a terminal) and finished epochs."""

    def on_line() -> None:
        say(describe(training.line, training.recipe.epochs))

    if not visible:
        yield None, lambda: None
        return
    with bar(training.steps_planned, training.recipe.rule_name) as update:
        yield lambda step: update(completed=training.steps_done), on_line


def listing(flags: Any, command: str) -> int:
    """Print the rules, models, data sets or recipes."""
    if flags.what == "rules":
        rows = [(name, entry.title) for name, entry in RULES.items()]
        rows += [(f"{name}:RULE", title) for name, (_, title) in AROUND.items()]
    elif flags.what == "recipes":
        rows = [(name, f"{study.title}; {study.cost}") for name, study in studies().items()]
    else:
        rows = data_rows() if flags.what == "data" else [(name, "") for name in models.names()]
    print("\n".join(columns(rows, margin())))
    return 0


def data_rows() -> list[tuple[str, str]]:
    """Return each data set with its location."""
    return [(row.name, "; ".join(filter(None, (row.what, row.images, row.where)))) for row in data.status()]


def fetch_or_list(flags: Any, command: str) -> int:
    """Download a data set and print its location, or print all data sets."""
    name = getattr(flags.action, "name", None)
    if name is not None:
        require_choice("data set", name, data.names())
        print(data.fetch(name))
    else:
        print("\n".join(columns(data_rows(), margin())))
    return 0


def write_report(flags: Any, command: str) -> int:
    """Write the report of a folder and print its path."""
    folder = flags.folder
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"no permission to write in {folder}")
    config = folder / "config.json"
    if config.is_file() and "population" in read_json(config):
        from apical.bench.evolve.loop import EvolutionFolder
        from apical.bench.report import evolution

        print(shown_path(evolution.write(EvolutionFolder(folder))))
        return 0
    print(shown_path(report.write(folder)))
    return 0


RUN: dict[str, Callable[[Any, str], int]] = {
    "compare": compare,
    "train": train,
    "report": write_report,
    "data": fetch_or_list,
    "list": listing,
}
"""Functions of the commands that have no separate file."""
