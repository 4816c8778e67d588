"""Rules on a small language model, each at its best learning rate, compared with n-gram counts and a trained read-out.

Run `python -m apical_papers.transformers.language --out results/transformers-language`. A pre-norm decoder of two blocks on
the sources of Python's standard library; equal steps and windows for all. Each arm is tried at learning rates of one ladder,
at seed 0: from its middle on, until the rate with the lowest loss on windows held out of the training text has a worse rate
on either side, or the ladder ends. Marks were written before this was run. Each training is saved in the folder when it is
finished, so an interrupted study continues.
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from apical.bench.finding import Row, at_most, difference, table
from apical.bench.program import about_study, keep_results, run_command
from apical.bench.statistics import student
from apical.data import Dataset
from apical.data.text.counts import count_losses
from apical.errors import ConfigError
from apical_papers.transformers.training import Arm, Setting, data, kept_training

MIRROR = "initial=mirror"
ARMS: dict[str, Arm] = {
    "bp": Arm("bp"),
    "kp-mirror": Arm("kp", (MIRROR,)),
    "pfa-mirror": Arm("pfa", (MIRROR,)),
    "pfa-wide-mirror": Arm("pfa", (MIRROR, "expansion=16")),
    "pfa-o-mirror": Arm("pfa-o", (MIRROR,)),
    "usf-current": Arm("usf", ("scale=current",)),
    "wm": Arm("wm"),
    "fa": Arm("fa"),
    "dfa": Arm("dfa", ("units=block",)),
    "dfa-head": Arm("dfa", ("units=block", "source=head")),
    "head only": Arm("bp", head_only=True),
    "tdca": Arm("tdca", ("units=block", "teacher=classes")),
    "tdca-unevolved": Arm("tdca-unevolved", ("units=block",)),
    "usf": Arm("usf"),
    "dfa-micro": Arm("dfa", ("units=micro",)),
    "kp-decay": Arm("kp", ("initial=random",), decay=2.5),
    "pfa-decay": Arm("pfa", ("initial=random",), decay=2.5),
    "pfa-wide-mirror-160": Arm("pfa", (MIRROR, "expansion=16", "mirror=160")),
}
"""Arms in the order of training. "decay" aligns by decay in the first quarter of the steps. The smallest possible angle of
B R is atan(1 / sqrt(lambda)): 17.5 degrees for an expansion lambda of 10, 14.0 for 16 ("wide"). With "160" vectors of noise
per input, the initial angle is half of that with the usual 40."""

Cells = Mapping[str, Sequence[Mapping[str, Any]]]
"""Saved results of each seed at the arm's rate, by arm; empty if the rule refused or nothing was trained."""

ABOUT = about_study(
    "Credit rules on a small language model",
    "Nats per character of the sources of Python's standard library, on modules that were not trained on.",
    "Marks come from a prototype's pilots (apart from apical, width 64, 400 steps) and were written before "
    "the runs; those called goal are what the study was planned to reach, entered after its first runs of kp and pfa. "
    "Reproduced means that the mean reaches the mark, or that the 95 % interval (Student's t, paired over seeds) of the "
    "difference lies on its better side.",
)


@dataclass(frozen=True)
class Options:
    """Credit rules on a small language model."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("results/transformers-language")
    seeds: Annotated[int, arg(metavar="K")] = 3
    """Number of seeds, for weights and windows; the first one chooses the learning rate."""
    steps: Annotated[int, arg(metavar="N")] = 400
    """Steps of each training, a multiple of 4."""
    width: Annotated[int, arg(metavar="N")] = 96
    """Width of the stream."""
    blocks: Annotated[int, arg(metavar="N")] = 2
    """Number of blocks of the model."""
    rates: Annotated[tuple[float, ...], arg(metavar="RATE ...")] = (5e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2)
    """Learning rates in ascending order; each arm is tried at as many as needed to bracket the best."""
    arms: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = tuple(ARMS)
    """Arms to train."""
    kept: bool = False
    """Train nothing: report the results in the folder, also of a stopped study."""


def study(
    options: Options, command: str, about: Mapping[str, Any], judge: Callable[[Cells, Mapping[str, float]], list[Row]]
) -> dict[str, Any]:
    """Run missing trainings, then write results.json and report.html.

    Args:
        about: title, about and sources of the results.
        judge: maps the saved results of each arm, and the losses of counts, to verdicts.
    """
    unknown = [name for name in options.arms if name not in ARMS]
    if unknown or options.steps % 4 or not options.rates or list(options.rates) != sorted(set(options.rates)):
        raise ConfigError(f"--arms must be among {', '.join(ARMS)}, --steps a multiple of 4, --rates ascending")
    dataset = data()
    tried = {
        name: tuned(options.rates, lambda lr, name=name: _training(options, dataset, name, lr, 0))  # type: ignore[misc]
        for name in options.arms
    }
    tried = {name: row for name, row in tried.items() if row}
    best = {name: _best(row) for name, row in tried.items()}
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in tried}
    for seed in range(options.seeds):  # arm by arm within a seed, so that a stopped study has complete seeds
        for name, lr in best.items():
            cell = None if lr is None or len(cells[name]) < seed else _training(options, dataset, name, lr, seed)
            if cell is not None:
                cells[name].append(cell)
    counts = count_losses(dataset.train, dataset.test, dataset.classes)
    every = [cell for group in (*(row.values() for row in tried.values()), *cells.values()) for cell in group]
    settings = {
        "data": dataset.about,
        "sha256 of the text": dataset.sha256,
        "model": f"gpt-{options.blocks}x{options.width}",
        "steps": options.steps,
        "seeds, at most": options.seeds,
        "learning rates": list(options.rates),
        "commits of the trainings": sorted({str(cell["commit"])[:12] for cell in every if "commit" in cell}),
    }
    once = {str(cell["config"]): cell for cell in every}.values()  # the best rate is among those tried
    rows = judge({name: _whole(group) for name, group in cells.items()}, counts)
    return keep_results(options.out, command, about, settings, once, rows, tables(options, tried, best, cells, counts))


def _training(options: Options, dataset: Dataset, name: str, lr: float, seed: int) -> Any:
    """Return the result of a training; None if only saved results are wanted and it is not saved."""
    setting = Setting(name, lr, seed, options.width, options.steps, options.blocks)
    if options.kept and not (options.out / "cells" / setting.file).exists():
        return None
    return kept_training(options.out, ARMS, dataset, setting, retries=not options.kept)


def tuned(rates: Sequence[float], training: Callable[[float], Any]) -> dict[float, Mapping[str, Any]]:
    """Return the results of the rates needed to bracket the best, tried from the middle of the ladder on.

    Args:
        training: maps a rate to its result, None if it is not available.
    """
    first = {(len(rates) - 1) // 2, len(rates) // 2}
    cells, waiting = dict[float, Mapping[str, Any]](), [rates[place] for place in sorted(first)]
    while waiting:
        cell = training(waiting[0])
        if cell is None:
            break
        cells[waiting.pop(0)] = cell
        best = _best(cells)
        if not waiting and best is not None:
            waiting = [lr for lr in _neighbours(rates, best) if lr not in cells]
    return {lr: cells[lr] for lr in rates if lr in cells}


def is_bracketed(rates: Sequence[float], cells: Mapping[float, Mapping[str, Any]]) -> bool:
    """Return whether the best rate has a worse one of the ladder on either side."""
    best = _best(cells)
    return best is not None and len(_neighbours(rates, best)) == 2 and all(lr in cells for lr in _neighbours(rates, best))


def _neighbours(rates: Sequence[float], lr: float) -> Sequence[float]:
    place = rates.index(lr)
    return [*rates[max(0, place - 1) : place], *rates[place + 1 : place + 2]]


def _best(cells: Mapping[float, Mapping[str, Any]]) -> float | None:
    """Return the rate with the lowest loss on held-out windows; None if every training was refused or diverged."""
    scores = [(cell["held out"], lr) for lr, cell in cells.items() if cell["held out"] is not None]
    return min(scores)[1] if scores else None


def _whole(cells: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [] if any(cell["test"] is None for cell in cells) else cells


def verdicts(cells: Cells, counts: Mapping[str, float]) -> list[Row]:
    """Return verdicts for those of the marks M1 to M8 that have numbers."""
    test, ratio, angle = partial(losses_of, cells), partial(loss_ratio, cells), partial(end_angle, cells)

    def within(arm: str, share: float) -> list[Row]:
        return less("goal", arm, f"{1 + share:g} times that of bp", test(arm), [(1 + share) * b for b in test("bp")])

    def below(mark: str, arm: str, other: str, by: float) -> list[Row]:
        return less(mark, arm, f"that of {other}, plus {by:g}", [a + by for a in test(arm)], test(other))

    def less(mark: str, arm: str, what: str, ours: Sequence[float], theirs: Sequence[float]) -> list[Row]:
        pairs = list(zip(ours, theirs, strict=False))  # over common seeds
        both = zip(*pairs, strict=True)
        return [difference(mark, arm, f"test loss minus {what}", *both, less=True)] if len(pairs) > 1 else []

    kp = cells.get("kp-mirror", ())
    return [
        *_at_most("M1", "bp", "test loss minus that of the bigram table", [x - counts["bigram"] for x in test("bp")], -0.4),
        *ratio("M2", "kp-mirror", 1.03),
        *_at_most("M2", "kp-mirror", "largest angle at step 1, degrees", _largest(kp, "first"), 12.0),
        *_at_most("M2", "kp-mirror", "mean angle, last step minus first", _turned(kp), 0.0),
        *ratio("M3", "pfa-mirror", 1.05),
        *angle("M3", "pfa-mirror", 19.0),
        *ratio("M4", "pfa-o-mirror", 1.03),
        *ratio("goal", "kp-mirror", 1.02),
        *(row for arm in _PRODUCT for row in ratio("goal", arm, 1.05)),
        *within("kp-mirror", 0.02),
        *(row for arm in _PRODUCT for row in within(arm, 0.05)),
        *(row for arm in ("kp-mirror", *_PRODUCT) for row in angle("goal", arm, 15.0)),
        *(row for arm in _DECAY for row in (*ratio("M5", arm, 1.15), *angle("M5", arm, 20.0))),
        *ratio("M6", "usf-current", 1.12),
        *below("M6", "usf-current", "usf", 0.03),
        *below("M7", "fa", "head only", 0.2),
        *below("M7", "kp-mirror", "fa", 0.2),
        *(row for arm in _DIRECT for row in (*below("M8", arm, "head only", 0.1), *below("M8", "bp", arm, 0.2))),
        *below("M8", "dfa", "dfa-micro", 0.0),
    ]


_DIRECT = ("dfa", "dfa-head")
"""With the output error, and with the error at the read-out's input, as in the prototype."""
_DECAY = ("kp-decay", "pfa-decay")
_PRODUCT = ("pfa-mirror", "pfa-wide-mirror", "pfa-o-mirror")


def losses_of(cells: Cells, arm: str) -> list[float]:
    """Of each seed."""
    return [cell["test"] for cell in cells.get(arm, ())]


def loss_ratio(cells: Cells, mark: str, arm: str, most: float) -> list[Row]:
    """Judge the test loss relative to that of the same seeds of bp."""
    values = [a / b for a, b in zip(losses_of(cells, arm), losses_of(cells, "bp"), strict=False)]
    return _at_most(mark, arm, "test loss over that of bp", values, most)


def end_angle(cells: Cells, mark: str, arm: str, most: float) -> list[Row]:
    """Judge the mean angle of feedback to weights after the last step."""
    return _at_most(mark, arm, "mean angle at the end, degrees", _mean(cells.get(arm, ()), "last"), most)


def _at_most(mark: str, rule: str, what: str, values: Sequence[float], most: float) -> list[Row]:
    """Judge the mean; no verdict without values."""
    return [at_most(mark, rule, what, values, most)] if values else []


def _mean(cells: Sequence[Mapping[str, Any]], when: str) -> list[float]:
    return [statistics.mean(cell["angles"][when].values()) for cell in cells if cell["angles"][when]]


def _largest(cells: Sequence[Mapping[str, Any]], when: str) -> list[float]:
    return [max(cell["angles"][when].values()) for cell in cells if cell["angles"][when]]


def _turned(cells: Sequence[Mapping[str, Any]]) -> list[float]:
    return [last - first for first, last in zip(_mean(cells, "first"), _mean(cells, "last"), strict=True)]


def tables(
    options: Options,
    tried: Mapping[str, Mapping[float, Mapping[str, Any]]],
    best: Mapping[str, float | None],
    cells: Cells,
    counts: Mapping[str, float],
) -> list[Row]:
    """Return tables of each arm at its rate, with the counts, and of the losses by which rates were chosen."""
    bp = [cell["test"] for cell in _whole(cells.get("bp", ()))]
    rows = []
    for name in sorted(cells, key=lambda name: _order(cells[name])):
        whole = _whole(cells[name])
        if not whole:
            refused = next((cell["refused"] for cell in (*cells[name], *tried[name].values()) if cell.get("refused")), "-")
            rows.append([name, "refused", "-", "-", "-", refused])
            continue
        values = [cell["test"] for cell in whole]
        over = student([100 * (a / b - 1) for a, b in zip(values, bp, strict=False)]).shown(1) if bp else "-"
        angles = " -> ".join(f"{statistics.mean(_mean(whole, when)):.3g}" for when in _WHEN if _mean(whole, when))
        numbers = ", ".join(f"{value:.3f}" for value in values)
        rows.append([name, student(values).shown(3), over, f"{best[name]:g}", angles or "-", numbers])
    rows += [[f"{name} counts", f"{value:.4g}", "-", "-", "-", "-"] for name, value in counts.items()]
    rates = [f"{lr:g}" for lr in options.rates]
    inside = {name: "yes" if is_bracketed(options.rates, row) else "no" for name, row in tried.items()}
    chosen = [[name, *(_held_out(row.get(lr)) for lr in options.rates), inside[name]] for name, row in tried.items()]
    return [
        table(
            "Test loss, nats per character",
            "Mean over seeds with 95 % interval (Student's t), at the rate with the least loss on held-out windows. Percent "
            "are over the same seeds of bp. Angles are those of feedback to weights, mean over layers, after the first step "
            "and the last. The seed that chose the rate is among the seeds.",
            ["arm", "test loss", "% over bp", "rate", "angle, degrees", "each seed"],
            rows,
        ),
        table(
            "Loss on held-out windows, by learning rate",
            "Seed 0, nats per character; a dash is a rate that was not tried. The best is bracketed where a lower and a "
            "higher rate are worse.",
            ["arm", *rates, "bracketed"],
            chosen,
        ),
    ]


_WHEN = ("first", "last")


def _order(cells: Sequence[Mapping[str, Any]]) -> float:
    whole = _whole(cells)
    return statistics.mean(cell["test"] for cell in whole) if whole else float("inf")


def _held_out(cell: Mapping[str, Any] | None) -> str:
    return "-" if cell is None or cell["held out"] is None else f"{cell['held out']:.4f}"


main = partial(run_command, "apical_papers.transformers.language", Options, partial(study, about=ABOUT, judge=verdicts))


if __name__ == "__main__":
    sys.exit(main())
