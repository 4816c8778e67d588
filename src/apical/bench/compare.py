"""Comparisons of several rules with several seeds; rules are interleaved epoch by epoch so that times are comparable."""

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apical.bench import workers
from apical.bench.cluster import cluster
from apical.bench.distributed import World, pick_device
from apical.bench.folders import check_writable, refuse_links, refuse_used
from apical.bench.loop import MakeRule, Training
from apical.bench.materials import load_data
from apical.bench.recipe import Recipe
from apical.bench.run_folder import FolderLock, RunFolder
from apical.bench.signals import Interrupted, StopSignals
from apical.bench.state import read_json, write_json, write_state
from apical.data import Dataset
from apical.errors import DivergenceError

Refresh = Callable[[], None]
RUNS = ("runs", "runs/*", "runs/*/seed-*")
"""Names of the nested folders that contain a comparison's runs, outermost first."""


@dataclass(frozen=True)
class Job:
    """One comparison.

    Attributes:
        recipes: one resolved recipe per rule; their seeds are replaced by `seeds`.
        seeds: seeds to run each rule with.
        out: the comparison's folder.
        make_rule: function that builds a rule; importable by name.
        command: command line to record.
        jobs: parallel processes; 0 means one per seed, at most one per core.
        notes: automatically chosen settings, per rule.
        about: further entries of compare.json, such as published numbers.
        events: also write TensorBoard events into the run folders.
        ray: address of a Ray cluster that trains the seeds, or "local"; None trains them here.
    """

    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    out: Path
    make_rule: MakeRule
    command: str = ""
    jobs: int = 0
    resume: bool = False
    overwrite: bool = False
    notes: dict[str, list[str]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    events: bool = False
    ray: str | None = None

    @property
    def rules(self) -> list[str]:
        """Names of the rules."""
        return [recipe.rule_name for recipe in self.recipes]

    @property
    def workers(self) -> int:
        """Number of parallel processes."""
        return min(self.jobs or cores(), len(self.seeds))

    def folder(self, rule: str, seed: int) -> RunFolder:
        """Folder of one run."""
        return RunFolder(self.out / "runs" / rule / f"seed-{seed}", events=self.events)

    def recipe(self, index: int, seed: int) -> Recipe:
        """Return the recipe of one run, with its share of the cores."""
        recipe = self.recipes[index]
        return replace(recipe, seed=seed, threads=recipe.threads or max(1, cores() // self.workers))


def cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(job: Job) -> None:
    """Raise an error if the results of a comparison could not be written. Writes nothing.

    Raises:
        ConfigError: the folder is not empty or not writable.
        CheckpointError: a run to be resumed has other options.
    """
    check_writable(job.out, "compare.json")
    if not (job.resume or job.overwrite):
        refuse_used(job.out)
    if job.overwrite:
        for path in (job.out / "figures", *(path for pattern in RUNS for path in job.out.glob(pattern))):
            refuse_links(path, job.out)
    for seed in job.seeds:
        for index, rule in enumerate(job.rules):
            job.folder(rule, seed).check(job.recipe(index, seed), resume=job.resume, overwrite=job.overwrite)


def run(job: Job, stop: StopSignals, refresh: Refresh) -> list[dict[str, Any]]:
    """Train everything, then write summary.json; return its rows.

    Args:
        job: what to train; :func:`check` has passed, and is repeated once the folder is locked.
        refresh: called periodically, to show progress.

    Raises:
        ConfigError: another process is running a comparison in the folder, or has done so since the check.
        Interrupted: a signal was received; every run is saved.
        ApicalError: a worker failed.
        OSError: disk full or no permission.
    """
    with FolderLock(job.out).held("comparing"):
        check(job)
        prepare(job)
        return _run(job, stop, refresh)


def _run(job: Job, stop: StopSignals, refresh: Refresh) -> list[dict[str, Any]]:
    if job.ray:
        there = replace(job, out=job.out.resolve(), resume=True, overwrite=False)  # a restarted task continues
        with cluster(job.ray, job.jobs or None) as tasks:
            tasks(_train_task, [(there, seed) for seed in job.seeds], stop, refresh)
    elif job.workers == 1:
        for seed in job.seeds:
            with _threads(job.recipe(0, seed).threads):
                train_seed(job, seed, stop, refresh)
    else:
        workers.run(job.seeds, job.workers, partial(_train_worker, job), stop, refresh)
    refresh()
    rows = summarise(job)
    write_json(job.out / "summary.json", rows)
    return rows


def prepare(job: Job) -> None:
    """Create the folder and compare.json; with `overwrite`, first remove an older comparison's files and nothing else."""
    if job.overwrite:
        for folder in sorted(job.out.glob(RUNS[-1])):
            held = RunFolder(folder)
            held.lock(wait=0)
            held.clear()
            held.unlock(remove=True)
            if not any(folder.parent.iterdir()):
                folder.parent.rmdir()
        for pattern in ("summary.json", "report.html", "figures/*.png", "figures/*.svg"):
            for path in job.out.glob(pattern):
                path.unlink()
    job.out.mkdir(parents=True, exist_ok=True)
    recipes = {recipe.rule_name: recipe.to_json() for recipe in job.recipes}
    about = {"command": job.command, "rules": job.rules, "seeds": list(job.seeds), "recipe": job.recipes[0].to_json()}
    write_state(job.out / "compare.json", {**about, "recipes": recipes, **job.about})


def train_seed(job: Job, seed: int, stop: StopSignals, refresh: Refresh) -> None:
    """Train all rules with one seed in this process, an epoch of each in turn.

    Raises:
        Interrupted: a signal was received; every run is saved.
    """
    with ExitStack() as held:
        open_runs = _open_runs(job, seed, stop, refresh, held)
        for epoch in range(1, job.recipes[0].epochs + 1):
            for training in list(open_runs):
                if training.epoch >= min(epoch, training.recipe.epochs):
                    continue
                try:
                    training.train_epoch()
                except DivergenceError:
                    open_runs.remove(training)  # recorded in its result.json; the others continue
                refresh()
        for training in open_runs:
            result = training.result()
            result["ratio_to_bp"] = ratio_to_bp(training.folder, job.folder("bp", seed))
            write_state(training.folder.result, result)
    refresh()


def _open_runs(job: Job, seed: int, stop: StopSignals, refresh: Refresh, held: ExitStack) -> list[Training]:
    """Return the seed's unfinished runs, started or resumed; their folders stay locked until `held` closes."""
    runs: list[Training] = []
    dataset: Dataset | None = None
    for index, rule in enumerate(job.rules):
        recipe, folder = job.recipe(index, seed), job.folder(rule, seed)
        if stop.signum:
            raise Interrupted(stop.signum, "the start")
        held.callback(folder.unlock)
        state = folder.claim(recipe, resume=job.resume, overwrite=job.overwrite)
        if state in ("finished", "diverged"):
            folder.unlock()
            continue
        world = World(0, 1, pick_device(recipe.device))
        dataset = runs[-1].dataset if runs else load_data(recipe)
        training = Training(recipe, dataset, job.make_rule, folder, world, stop)
        try:
            training.start(resume=state == "resumable", command=job.command, notes=job.notes.get(rule, []))
        except DivergenceError:
            continue
        runs.append(training)
        refresh()
    return runs


def ratio_to_bp(folder: RunFolder, bp: RunFolder) -> float | None:
    """Return the median over epochs of the rule's time per step over backprop's in the same epoch; None without backprop."""
    mine, theirs = _times(folder), _times(bp)
    ratios = [mine[epoch] / theirs[epoch] for epoch in mine.keys() & theirs.keys()]
    return statistics.median(ratios) if ratios else None


def _times(folder: RunFolder) -> dict[int, float]:
    return {line["epoch"]: line["ms_per_step"] for line in folder.read_metrics() if line.get("ms_per_step")}


def summarise(job: Job) -> list[dict[str, Any]]:
    """Return one row per rule and seed, from the runs' result.json."""
    rows = []
    for rule in job.rules:
        for seed in job.seeds:
            folder = job.folder(rule, seed)
            result = {
                "ratio_to_bp": None,
                "memory_mb": None,
                "commit": read_json(folder.environment).get("commit"),
                **folder.read_result(),
            }
            result["memory_mb"] = result.pop("peak_memory_mb", None)
            rows.append(result)
    return rows


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Limit torch to `number` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(number, before) if "OMP_NUM_THREADS" in os.environ else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_task(job: Job, seed: int) -> None:
    """Train one seed on a cluster, where no signals are sent."""
    _train_worker(job, seed, StopSignals())


def _train_worker(job: Job, seed: int, stop: StopSignals) -> None:
    """Train one seed in a worker process, silently: the parent reads the run folders."""
    torch.set_num_threads(job.recipe(0, seed).threads)
    train_seed(job, seed, stop, lambda: None)
