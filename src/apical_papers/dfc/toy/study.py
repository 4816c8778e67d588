"""The student-teacher study of deep feedback control: figures 1D, 2 and 3 of arXiv 2106.07887.

Trains DFC, DFC-SS and DFC-SSA with learned and with fixed feedback weights, DFA and BP on student-teacher regression
(15-10-10-5 tanh, linear output) with the released toy configuration; measures after each epoch the conditions of the theory;
and draws the compartments over time and the set of optimal feedback weights. Run

    python -m apical_papers.dfc.toy.study --out results/dfc-toy
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apical.bench.cells import kept
from apical.bench.page import write
from apical.bench.program import run_command
from apical.bench.run_folder import environment
from apical.data import Dataset
from apical_papers.dfc.toy.figures import conditions, optimal, traces
from apical_papers.dfc.toy.metrics import DAMPING, EIGENVALUE_SAMPLES, MEASURES
from apical_papers.dfc.toy.optimal import optimal_feedback
from apical_papers.dfc.toy.report import page
from apical_papers.dfc.toy.runs import (
    FAST,
    NOISE,
    SHOWN,
    STUDY,
    History,
    Plan,
    curves,
    load,
    plain,
    recipe,
    restored,
    train,
)
from apical_papers.dfc.toy.traces import K_P, NUDGE, POINTS, error_left, record, still_moving
from apical_papers.dfc.toy.verdicts import SOURCES, judge, tally, within_axes

TITLE = "Deep feedback control on student-teacher regression: conditions, alignment and compartments"
ABOUT = (
    "Figures 1D, 2 and 3 of arXiv 2106.07887. After each epoch, on a fixed batch of training samples: Conditions 1 and 2, "
    "the angle of the update to the damped minimum-norm and Gauss-Newton updates and to that of DFC-SSA, and the stability "
    "of the control loop. The paper states what these curves do and gives no numbers; thresholds here are our choice."
)


@dataclass(frozen=True)
class Options:
    """Deep feedback control on student-teacher regression."""

    out: Path
    """Output folder."""
    epochs: int = 150
    """Epochs of every training."""
    seeds: int = 3
    """Number of seeds, from 0 on."""
    samples: int = 5000
    """Training samples, at most 5000."""


def study(plan: Plan, out: Path, command: str, points: int = POINTS, draws: int = 2000) -> dict[str, Any]:
    """Train, measure, judge, draw; write results.json, the figures and report.html into `out`.

    Args:
        plan: how much to train.
        out: folder; created if necessary.
        command: the command line, for the record.
        points: time points of figure 1D.
        draws: number of random feedback matrices of figure 2.

    Returns:
        The content of results.json, with unrounded numbers.
    """
    spent, around = 0.0, environment("cpu", torch.get_num_threads())
    dataset = load(plan)
    histories: dict[str, list[History]] = {}
    for name, seed in plan.jobs():
        history, seconds = once(out, name, plan, seed, dataset)
        spent += seconds
        histories.setdefault(name, []).append(history)
        print(f"{spent:6.0f} s  {name:14} seed {seed}  {_last(history)}", flush=True)
    began = time.process_time()
    trace, cloud = record(plan, points), optimal_feedback(draws)
    lines = {name: curves(group) for name, group in histories.items()}
    results = {
        "title": TITLE,
        "about": ABOUT,
        "command": command,
        "environment": around,
        "cpu_seconds": spent + time.process_time() - began,
        "settings": settings(plan, points, draws),
        "measures": {key: label.replace("-\n", "-").replace("\n", " ") for key, label in MEASURES.items()},
        "sources": SOURCES,
        "failures": [group.failure for runs in histories.values() for group in runs if group.failure],
        "curves": lines,
        "checks": {
            "condition_two_of_random_feedback": {
                n: [h.before for h in group] for n, group in histories.items() if group[0].before
            },
            "simulated_dfc_at_the_end": histories["dfc"][0].simulated,
            "figure_1d": {
                kind: {"error_left": float(error_left(walk, goal).max()), "still_moving": float(still_moving(walk).max())}
                for kind, walk, goal in (
                    ("weak", trace.weak, trace.weak_target),
                    ("strong", trace.strong, trace.strong_target),
                )
            },
            "figure_2": {
                "largest_angle": float(cloud.angles.max()),
                "between_transpose_and_pseudoinverse": cloud.between,
                "typical_between_two": cloud.typical,
                "explained": cloud.explained.tolist(),
            },
        },
        "verdicts": judge(histories, trace, cloud),
        "axes": within_axes(lines),
    }
    curves_shown = {name: lines[name] for name in SHOWN}
    panels = list(MEASURES.items())[:6]
    drawings = [
        conditions(curves_shown, panels),
        traces(trace.weak, trace.strong, trace.weak_target, trace.strong_target, trace.typical),
        optimal(cloud),
    ]
    write(out, results, drawings, page)
    return results


def once(out: Path, name: str, plan: Plan, seed: int, dataset: Dataset) -> tuple[History, float]:
    """Return the history of one training and its seconds; saved in `out`/cells, and not trained again if it is there."""
    config = {"name": name, "seed": seed, "epochs": plan.epochs, "samples": plan.samples}
    content = kept(out / "cells" / f"{name}-{seed}.json", config, lambda: plain(train(name, plan, seed, dataset)))
    return restored(content), content["seconds"]


def settings(plan: Plan, points: int, draws: int) -> dict[str, Any]:
    """Return the settings that determine the numbers, for the record."""
    trained, fixed = (recipe(rule, plan, 0) for rule in ("dfc", "dfc-fixed"))
    return {
        "study": STUDY,
        "epochs": plan.epochs,
        "noise_epochs": recipe(NOISE, plan, 0).epochs,
        "samples": plan.samples,
        "seeds": list(plan.seeds),
        "steps_per_epoch": trained.steps_per_epoch(plan.samples),
        "batch_size": trained.batch_size,
        "optimizer": trained.optimizer,
        "lr": {"dfc": trained.lr[0], **{rule: recipe(rule, plan, 0).lr[0] for rule in ("dfa", "bp", FAST)}},
        "clip": trained.clip,
        "feedback_lr": trained.feedback_lr,
        "pretrain_lr": trained.pretrain_lr,
        "pretrain_epochs": trained.pretrain_epochs,
        "feedback_passes": trained.feedback_passes,
        "feedback_fraction": trained.feedback_fraction,
        "feedback_weight_decay": trained.feedback_weight_decay,
        "rule_options": list(trained.rule_options),
        "rule_options_fixed": list(fixed.rule_options),
        "feedback_update": f"expectation of the local rule; simulated noise in {NOISE}",
        "probe_samples": min(plan.probe, plan.samples),
        "damping": DAMPING,
        "eigenvalue_samples": EIGENVALUE_SAMPLES,
        "figure_1d": {"k_p": K_P, "nudge": NUDGE, "points": points},
        "figure_2": {"draws": draws},
        "paper": "300 epochs, 5000 samples, one seed, feedback learned from simulated noise; otherwise these settings",
    }


def _last(history: History) -> str:
    if history.failure:
        return history.failure
    angles = [f"{key} {history.values[key][-1]:.4g}" for key in ("condition_two", "minimum_norm") if key in history.values]
    return f"test loss {history.values['test_loss'][-1]:.4g}, {', '.join(angles)}"


def run(options: Options, command: str) -> dict[str, Any]:
    """Run the study with these options; print how many verdicts are reproduced."""
    results = study(Plan(options.epochs, options.samples, tuple(range(options.seeds))), options.out, command)
    print(tally(results["verdicts"]))
    return results


main = partial(run_command, "apical_papers.dfc.toy.study", Options, run, least={"seeds": 1})


if __name__ == "__main__":
    sys.exit(main())
