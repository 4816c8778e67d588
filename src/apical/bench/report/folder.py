"""The report of a compare folder or a run folder: figures and one self-contained HTML page.

Everything in it is computed from the files of the runs, so a report can be remade at any time, even while runs are still
training. Runs without a final result are named and left out of the means.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apical.bench.checkpoint import write_atomically
from apical.bench.document import document, figure_block, reproduce, significant
from apical.bench.figures import curves as figures
from apical.bench.figures.style import styles
from apical.bench.recipe import FEEDBACK_FIELDS, Recipe
from apical.bench.report import html as report_html
from apical.bench.report import measures as measures_section
from apical.bench.report import placement as placement_section
from apical.bench.report import sample
from apical.bench.report.protocol import section, sureness
from apical.bench.report.records import Comparison, Run, Score, read
from apical.bench.report.verdicts import judge
from apical.bench.state import write_page
from apical.bench.statistics import busy_note
from apical.errors import CheckpointError

_NOT_CONFIG = {"rule", "rules", "seed", "seeds", "command", "out"}
_WHERE_SET = ("init", "measure", "beta2", "eps", "clip", "clip_over", "data_sha256", "model_sha256")


@dataclass(frozen=True)
class RuleSummary:
    """Results of one rule's runs.

    Attributes:
        colour: its colour in the figures.
        planned: number of seeds, finished or not.
        runs: the finished runs.
        ratio: time per step relative to backpropagation, of each run that has it.
    """

    rule: str
    name: str
    colour: str
    planned: int
    runs: Sequence[Run]
    ratio: tuple[float, ...]

    def values(self, key: str) -> tuple[float, ...]:
        """Return the measurement from result.json of each finished seed that has it."""
        return _numbers(run.final(key) for run in self.runs)

    def scores(self, score: Score) -> tuple[float, ...]:
        """The values by which rules are compared, accuracies in percent."""
        return tuple(score.scale * value for value in self.values(score.key))


def write(out: Path) -> Path:
    """Read the runs in `out`; write `out`/figures/*.png and *.svg and `out`/report.html, whose path is returned.

    If compare.json has published numbers, verdicts.json contains them together with the measured ones.

    Args:
        out: a compare folder (with runs/<rule>/seed-<k>/ in it) or one run folder.

    Raises:
        CheckpointError: `out` is not such a folder, a file in it is damaged (then nothing is written), or it cannot be
            written to.
    """
    out = Path(out)
    comparison = read(out)
    drawings = figures.draw(comparison)
    verdicts, sure = judge(comparison), sureness(comparison)
    shown = "\n".join(map(figure_block, drawings)) or "<p>No epoch has been recorded, so there is nothing to draw.</p>"
    body = f"""{report_html.problems(comparison.runs)}
<h2>Rules</h2>
{report_html.rules_table(summarise(comparison), comparison.score)}
{section(sure, comparison.score)}
{report_html.verdicts_table(verdicts)}
<h2>Figures</h2>
<div class="figures">
{shown}
</div>
{measures_section.section(comparison)}
{reproduce(comparison.command, config_rows(comparison), environment_rows(comparison))}
{sample.section(out, comparison.rules)}{placement_section.section(out, comparison.rules)}
<h2>Every run</h2>
{report_html.runs_table(comparison.runs, comparison.score)}
<p class="note">The figures are also next to this page, as PNG (200 dpi) and SVG, in the folder figures.</p>"""
    try:
        (out / "figures").mkdir(exist_ok=True)
        for drawing in drawings:
            drawing.write(out / "figures")
        if verdicts:
            write_atomically(
                out / "verdicts.json", (json.dumps([asdict(row) for row in verdicts], indent=1) + "\n").encode()
            )
        if sure and not comparison.single:
            write_atomically(out / "statistics.json", (json.dumps([row.record() for row in sure], indent=1) + "\n").encode())
        write_page(out / "report.html", document(_title(comparison), describe(comparison), body))
    except OSError as error:
        raise CheckpointError(f"the report cannot be written to {out}: {error.strerror or error}") from error
    return out / "report.html"


def summarise(comparison: Comparison) -> list[RuleSummary]:
    """Return one summary per rule, in the comparison's order."""
    style = styles(comparison.rules)
    bp_time = {run.seed: run.final("ms_per_step") for run in comparison.of("bp") if run.finished}
    typical = [value for value in bp_time.values() if math.isfinite(value)]
    fallback = statistics.median(typical) if typical else math.nan

    def ratio(run: Run) -> float:
        recorded = run.final("ratio_to_bp")
        return recorded if math.isfinite(recorded) else run.final("ms_per_step") / bp_time.get(run.seed, fallback)

    rows = []
    for rule in comparison.rules:
        runs = comparison.of(rule)
        done = [run for run in runs if run.finished]
        look = style[rule]
        rows.append(RuleSummary(rule, look.name, look.colour, len(runs), done, _numbers(map(ratio, done))))
    return rows


def describe(comparison: Comparison) -> str:
    """Return a paragraph of text: what was run, how close each rule came to backpropagation, and at what cost."""
    score = comparison.score
    rows = {row.rule: row for row in summarise(comparison) if row.scores(score)}
    return " ".join(
        sentence
        for sentence in (
            _what_was_run(comparison),
            _score_sentence(rows, score),
            _alignment_sentence(comparison, rows),
            _time_sentence(rows),
            _busy_sentence(comparison),
            _failures_sentence(comparison),
            _caution_sentence(rows, score),
        )
        if sentence
    )


def _title(comparison: Comparison) -> str:
    config = comparison.runs[0].config
    where = " on ".join(_shown(config[key]) for key in ("model", "data") if config.get(key))
    what = f"{comparison.rules[0]}, seed {comparison.runs[0].seed}" if comparison.single else "Credit rules compared"
    return f"{what}: {where}" if where else what


def _shown(name: Any) -> str:
    """Return only the file's name for a user's own file; the settings have the full path."""
    return Path(str(name)).name


def _what_was_run(comparison: Comparison) -> str:
    config = comparison.runs[0].config
    model = f" trained {_shown(config['model'])}" if config.get("model") else " trained a model"
    data = f" on {_shown(config['data'])}" if config.get("data") else ""
    epochs = f" for {_count(config['epochs'], 'epoch')}" if isinstance(config.get("epochs"), int) else ""
    if len(comparison.rules) == 1:
        who = styles(comparison.rules)[comparison.rules[0]].name
    else:
        who = f"{len(comparison.rules)} rules"
    return f"{who}{model}{data}{epochs}, with {_count(len({run.seed for run in comparison.runs}), 'seed')}."


def _score_sentence(rows: Mapping[str, RuleSummary], score: Score) -> str:
    if not rows:
        return f"No run has finished, so there is no final {'loss' if score.is_loss else 'accuracy'}."
    ranked = sorted(rows.values(), key=lambda row: statistics.mean(row.scores(score)), reverse=not score.is_loss)
    others = [row for row in ranked if row.rule != "bp"]
    if "bp" not in rows or not others:
        rank = "lowest" if score.is_loss else "highest"
        best = f"{ranked[0].name} reached {_reached(ranked[0], score)}"
        return best + (f", the {rank}; {_last(ranked[-1], score)}." if len(ranked) > 1 else ".")
    bp, best_other = rows["bp"], others[0]
    gap = statistics.mean(best_other.scores(score)) - statistics.mean(bp.scores(score))
    size = significant(abs(gap)) if score.is_loss else f"{abs(gap):.2f} points"
    level = gap == 0 or size.startswith("0.00 points")
    distance = "level" if level else f"{size} {'above' if gap > 0 else 'below'} it"
    text = (
        f"Backpropagation reached {_reached(bp, score)}; the best of the {'others' if len(others) > 1 else 'rest'}, "
        f"{best_other.name}, {_value(best_other, score)} ({distance})"
    )
    return f"{text}; {_last(others[-1], score)}." if len(others) > 1 else f"{text}."


def _value(row: RuleSummary, score: Score) -> str:
    return report_html.mean_and_spread(row.scores(score), score) + ("" if score.is_loss else " %")


def _reached(row: RuleSummary, score: Score) -> str:
    return f"a test loss of {_value(row, score)}" if score.is_loss else f"{_value(row, score)} test accuracy"


def _last(row: RuleSummary, score: Score) -> str:
    return f"{row.name} was {'highest' if score.is_loss else 'lowest'} with {_value(row, score)}"


def _alignment_sentence(comparison: Comparison, rows: Mapping[str, RuleSummary]) -> str:
    angles: list[tuple[float, str]] = []
    for rule, row in rows.items():
        finished = [run for run in comparison.of(rule) if run.finished and run.records]
        last = [run.curve("weight_alignment", layer)[-1] for run in finished for layer in run.layers]
        angles_of_layers = _numbers(last)
        if angles_of_layers and rule != "bp":
            angles.append((statistics.mean(angles_of_layers), row.name))
    if not angles:
        return ""
    (low, nearest), (high, farthest) = min(angles), max(angles)
    text = f"Averaged over layers, the feedback weights of {nearest} ended {low:.0f}° from the forward weights"
    return f"{text}, those of {farthest} {high:.0f}° (90° is chance)." if len(angles) > 1 else f"{text} (90° is chance)."


def _time_sentence(rows: Mapping[str, RuleSummary]) -> str:
    ratios = [(statistics.median(row.ratio), row.name) for row in rows.values() if row.ratio and row.rule != "bp"]
    if not ratios:
        return ""
    (low, quickest), (high, slowest) = min(ratios), max(ratios)
    if len(ratios) == 1:
        return f"A training step of {quickest} took {low:.2f} times as long as one of backpropagation."
    span = f"from {low:.2f} ({quickest}) to {high:.2f} ({slowest})"
    return f"A training step took {span} times as long as one of backpropagation."


def _busy_sentence(comparison: Comparison) -> str:
    times_of = {
        rule: [line.get("ms_per_step") for run in comparison.of(rule) for line in run.records] for rule in comparison.rules
    }
    return busy_note({rule: [time for time in times if time] for rule, times in times_of.items()})


def _failures_sentence(comparison: Comparison) -> str:
    failed = sum(not run.finished for run in comparison.runs)
    if not failed:
        return ""
    return f"{failed} of {_count(len(comparison.runs), 'run')} did not finish and are left out of the means."


def _caution_sentence(rows: Mapping[str, RuleSummary], score: Score) -> str:
    counts = {len(row.scores(score)) for row in rows.values()}
    if len(rows) < 2 or min(counts) > 2:
        return ""
    who = "each rule" if len(counts) == 1 else "some rules"
    return f"With {_count(min(counts), 'finished seed')} for {who}, small differences may be chance."


def config_rows(comparison: Comparison) -> list[tuple[str, str]]:
    """Return setting and value; if rules differ in a setting, each value with the rules that used it.

    Settings of learned feedback weights are one row, with the options that were set; some options are shown only if set.
    """
    hidden = _NOT_CONFIG | set(FEEDBACK_FIELDS)
    defaults = Recipe().to_json()
    keys = dict.fromkeys(key for run in comparison.runs for key in run.config if key not in hidden)
    texts = {key: [(run.rule, _words(run.config[key])) for run in comparison.runs if key in run.config] for key in keys}
    for key in _WHERE_SET:
        if all(run.config.get(key, defaults[key]) == defaults[key] for run in comparison.runs):
            texts.pop(key, None)
    feedback = [(run.rule, _feedback(run.config, defaults)) for run in comparison.runs]
    if any(text != "none" for _, text in feedback):
        texts["feedback"] = feedback
    rows = []
    for key, used in texts.items():
        users: dict[str, list[str]] = {}
        for rule, text in used:
            if rule not in users.setdefault(text, []):
                users[text].append(rule)
        same = len(users) == 1
        rows.append((key, "; ".join(value if same else f"{value} ({', '.join(who)})" for value, who in users.items())))
    for key, label in (("n_train", "training samples"), ("n_test", "test samples")):
        counts = {run.result[key] for run in comparison.runs if run.result and run.result.get(key) is not None}
        rows += [(label, " or ".join(map(_words, sorted(counts))))] if counts else []
    rows.append(("seeds", ", ".join(str(seed) for seed in sorted({run.seed for run in comparison.runs}))))
    return rows


def _feedback(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return the options of learned feedback weights that a run has set, as text."""
    settings = {key: config[key] for key in FEEDBACK_FIELDS if key in config and config[key] != defaults[key]}
    return _words({key.removeprefix("feedback_").replace("_", " "): value for key, value in settings.items()})


def environment_rows(comparison: Comparison) -> list[tuple[str, str]]:
    """Return versions, commit, platform and so on; every distinct value if runs differ, first and last of the times."""
    rows = []
    for key in dict.fromkeys(key for run in comparison.runs for key in run.environment):
        values = list(dict.fromkeys(_words(run.environment[key]) for run in comparison.runs if key in run.environment))
        if key == "started" and len(values) > 1:
            values = [f"{min(values)} to {max(values)}"]
        rows.append((key, "; ".join(values)))
    return rows


def _numbers(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(value for value in values if math.isfinite(value))


def _words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(item)}" for key, item in value.items()) or "none"
    return json.dumps(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
