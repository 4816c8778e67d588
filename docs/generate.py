"""Write every part of README and docs that follows from the code, the results and the benchmarks.

    python docs/generate.py

Tables come from `results/<name>/` (a folder that `apical compare` wrote: summary.json and, where kept, compare.json,
verdicts.json and figures/), from single files `results/<name>.json`, from `benchmarks/results.json`, and from the
command line's own definitions. :func:`outputs` is pure, so that a test can compare what is committed with what would
be written.
"""

import ast
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apical import models
from apical.experiment.verdicts import Verdict, tally
from apical.recipes.catalogue import STUDIES
from apical.recipes.rules import RULES

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- made by docs/generate.py -->"
Row = Mapping[str, Any]


def outputs(root: Path = ROOT) -> dict[Path, str]:
    """Path -> content of every file that is generated, wholly or between markers."""
    folders = sorted(path.parent for path in (root / "results").glob("*/summary.json"))
    files = sorted((root / "results").glob("*.json"))
    benchmarks = load(root / "benchmarks" / "results.json") or {}
    written = {
        root / "docs" / "benchmarks.md": benchmark_page(benchmarks),
        root / "docs" / "results" / "index.md": results_index(folders, files),
        **{root / "docs" / "results" / f"{path.name}.md": comparison_page(path) for path in folders},
        **{root / "docs" / "results" / f"{path.stem}.md": file_page(path) for path in files},
    }
    blocks = {
        root / "README.md": {"results": readme_results(folders, benchmarks)},
        root / "docs" / "command-line.md": command_blocks(root / "src" / "apical" / "cli.py"),
    }
    for path, contents in blocks.items():
        text = path.read_text(encoding="utf-8")
        for name, content in contents.items():
            text = replace_block(text, name, content)
        written[path] = text
    return written


def main() -> None:
    """Write the outputs and remove pages of results that are gone."""
    written = outputs()
    for path in stale(written):
        path.unlink()
    for path, text in written.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def stale(written: Iterable[Path], root: Path = ROOT) -> list[Path]:
    """Pages of results that no longer exist."""
    return sorted(set((root / "docs" / "results").glob("*.md")) - set(written))


def replace_block(text: str, name: str, content: str) -> str:
    """`text` with everything between the markers of `name` replaced.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the markers {begin} and {end} are missing")
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"


def load(path: Path) -> Any:
    """The JSON in `path`; None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1) -> str:
    """A Markdown table; columns from `numeric_from` on are set to the right."""
    rule = ["---" if i < numeric_from else "---:" for i in range(len(header))]
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: Any, digits: int) -> str:
    """A number with so many decimals; a dash where there is none."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.{digits}f}" if known else "-"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, from two values on, standard deviation."""
    if not values:
        return "-"
    mean = number(statistics.mean(values), digits)
    return mean if len(values) < 2 else f"{mean} ± {number(statistics.stdev(values), digits)}"


def present(rows: Iterable[Row], key: str) -> list[float]:
    """The finite values of `key`."""
    values = [row.get(key) for row in rows]
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of `keys`, in the order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def comparison_table(rows: Sequence[Row]) -> str:
    """One line per rule: accuracy over its finished seeds, training loss, memory.

    Times are left to the benchmarks: a comparison shares its machine.
    """
    lines = []
    for (rule,), all_runs in grouped(rows, "rule").items():
        runs = [row for row in all_runs if row.get("status", "finished") == "finished"]
        memory = present(runs, "memory_mb")
        lines.append(
            [
                f"`{rule}`",
                str(len(runs)) if len(runs) == len(all_runs) else f"{len(runs)} of {len(all_runs)}",
                " / ".join(sorted({str(row.get("epochs")) for row in runs})) or "-",
                spread([100 * value for value in present(runs, "test_accuracy")], 2),
                spread(present(runs, "train_loss"), 4),
                number(statistics.median(memory), 0) if memory else "-",
            ]
        )
    header = ("rule", "seeds", "epochs", "test accuracy, %", "training loss", "memory, MB")
    return table(header, lines)


def title(folder: Path) -> str:
    """What a comparison was about."""
    plan = load(folder / "compare.json") or {}
    if plan.get("study") in STUDIES:
        return STUDIES[plan["study"]].title
    recipe = plan.get("recipe") or {}
    return f"{recipe['model']} on {recipe['data']}" if {"model", "data"} <= recipe.keys() else folder.name


def origin(folder: Path) -> str:
    """The command and the commit behind a comparison, and where it left its recipe."""
    plan, rows = load(folder / "compare.json") or {}, load(folder / "summary.json")
    parts = [f"```console\n$ {plan['command']}\n```"] if plan.get("command") else []
    commits = sorted({str(row["commit"]) for row in rows if row.get("commit")})
    parts += [f"Commit {', '.join(f'`{commit}`' for commit in commits)}."] if commits else []
    return "\n\n".join([*parts, departures(plan)]).strip()


def departures(plan: Row) -> str:
    """A sentence on the settings in which a comparison differs from the study it names; empty if there are none."""
    study = STUDIES.get(plan.get("study") or "")
    free = {"rule_options", "seed", "device", "threads", "checkpoint_steps"}
    found: dict[str, None] = {}
    if study is None:
        return ""
    for rule, recipe in (plan.get("recipes") or {}).items():
        asked = study.row(rule).recipe.to_json()
        for key, value in recipe.items():
            chosen = key.startswith("weight_decay") and not asked["weight_decay"]  # left to the rule's default
            if key not in free and not chosen and value != asked.get(key):
                instead = "not set" if asked.get(key) is None else words(asked[key])
                found[f"{key.replace('_', ' ')} {words(value)} instead of {instead}"] = None
    return f"**Not the recipe as it stands**: {'; '.join(found)}." if found else ""


def verdict_table(verdicts: Sequence[Row]) -> str:
    """One line per published number: what it is, its value, ours, and the verdict."""
    lines = []
    for row in verdicts:
        expected = number(row["published"], 2)
        expected = f"at least {expected}" if row["tolerance"] is None else f"{expected} ± {row['tolerance']:g}"
        ours = number(row["measured"], 2) + (f" ± {number(row['spread'], 2)}" if row["spread"] is not None else "")
        seeds = str(row["n"]) if row["n"] else "-"
        lines.append([f"`{row['rule']}`", row["what"], str(row["epoch"]), expected, row["tag"], ours, seeds, row["verdict"]])
    return table(
        ("rule", "what", "after epoch", "reference", "source", "measured", "seeds", "verdict"), lines, numeric_from=2
    )


def verdict_sentence(verdicts: Sequence[Row]) -> str:
    """How many reference numbers were reproduced, by where they are from."""
    return tally([Verdict(**row) for row in verdicts])


def comparison_page(folder: Path) -> str:
    """The page of one comparison."""
    parts = [NOTE, f"# {title(folder)}", origin(folder), comparison_table(load(folder / "summary.json"))]
    verdicts = load(folder / "verdicts.json")
    if verdicts:
        parts += [
            "## Against reference numbers",
            verdict_sentence(verdicts),
            "Sources: `fig` is read off the published curves, `paper` stands in the text, `order` is an order of two rules, "
            "and `ours` comes from a prototype of ours, for settings that the paper does not have.",
            verdict_table(verdicts),
        ]
    figures = sorted((folder / "figures").glob("*.svg"))
    if figures:
        where = f"../../results/{folder.name}/figures"
        parts += ["## Figures", *(f"![{path.stem.replace('_', ' ')}]({where}/{path.name})" for path in figures)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def file_page(path: Path) -> str:
    """The page of a single results file: a list of rows, or an object with `rows` and, if it likes, `title`, `about`."""
    content = load(path)
    content = content if isinstance(content, dict) else {"rows": content}
    parts = [NOTE, f"# {content.get('title', path.stem)}", str(content.get("about", ""))]
    if content.get("command"):
        parts.append(f"```console\n$ {content['command']}\n```")
    rows = content.get("rows") or []
    columns = [key for key in dict.fromkeys(k for row in rows for k in row)]
    parts.append(table([c.replace("_", " ") for c in columns], [[words(row.get(c)) for c in columns] for row in rows]))
    return "\n\n".join(part for part in parts if part) + "\n"


def words(value: Any) -> str:
    """A table cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return "-" if value is None else str(value)


def results_index(folders: Sequence[Path], files: Sequence[Path]) -> str:
    """The list of the results pages."""
    parts = [
        NOTE,
        "# Results",
        "Every number on these pages is computed from files under `results/` in the repository, which the commands named on "
        "them wrote. {doc}`../how-results-are-made` says how.",
    ]
    names = [path.name for path in folders] + [path.stem for path in files]
    parts.append("```{toctree}\n:maxdepth: 1\n\n" + "\n".join(names) + "\n```" if names else "None are kept here yet.")
    return "\n\n".join(parts) + "\n"


def setting(row: Row) -> str:
    """Model, batch and precision of a benchmark row."""
    precision = row.get("precision")
    return f"{row.get('model')}, batch {row.get('batch')}" + (f", {precision}" if precision else "")


def benchmark_page(benchmarks: Row) -> str:
    """The page of the benchmarks."""
    parts = [
        NOTE,
        "# Benchmarks",
        "Time and memory of one training step relative to backpropagation, all rules interleaved in one run so that they "
        "see the same machine. `make bench` measures this table on your machine and writes it here.",
    ]
    rows = benchmarks.get("rows") or []
    if not rows:
        return "\n\n".join([*parts, "No measurement is kept here yet."]) + "\n"
    for (device,), of_device in grouped(rows, "device").items():
        parts.append(f"## {device}" if device else "## CPU")
        for members in grouped(of_device, "model", "batch", "precision").values():
            lines = [
                [
                    f"`{row['rule']}`",
                    number(row.get("ms_per_step"), 3),
                    number(row.get("ratio_to_bp"), 3),
                    number(row.get("peak_memory_ratio"), 3),
                ]
                for row in members
            ]
            header = ("rule", "ms per step", "time / BP", "peak memory / BP")
            parts += [f"### {setting(members[0])}", table(header, lines)]
    facts = flat(benchmarks.get("environment") or {})
    parts += ["## Measured with", table(("what", "value"), facts, numeric_from=2)] if facts else []
    return "\n\n".join(parts) + "\n"


def flat(value: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Keys and values of a nested object."""
    lines: list[list[str]] = []
    for key, item in value.items():
        lines += flat(item, f"{prefix}{key} ") if isinstance(item, dict) else [[f"{prefix}{key}", words(item)]]
    return lines


def readme_results(folders: Sequence[Path], benchmarks: Row) -> str:
    """The results block of the README."""
    parts = []
    for folder in folders:
        picture = f"results/{folder.name}/figures/accuracy.png"
        verdicts = load(folder / "verdicts.json")
        link = f"[Command, verdicts and figures](docs/results/{folder.name}.md)."
        link = f"{verdict_sentence(verdicts)} {link}" if verdicts else link
        parts += [f"**{title(folder)}**", departures(load(folder / "compare.json") or {})]
        parts += [comparison_table(load(folder / "summary.json")), link]
        parts += [f"![test accuracy against epochs]({picture})"] if (folder / "figures" / "accuracy.png").exists() else []
    for (device,), rows in grouped(benchmarks.get("rows") or [], "device").items():
        settings = list(dict.fromkeys(setting(row) for row in rows))
        ratio = {(row["rule"], setting(row)): row.get("ratio_to_bp") for row in rows}
        lines = [
            [f"`{rule}`", *(number(ratio.get((rule, where)), 2) for where in settings)]
            for rule in dict.fromkeys(row["rule"] for row in rows)
        ]
        parts += [
            f"**Time per training step relative to backpropagation: {device or 'CPU'}**",
            table(("rule", *settings), lines),
        ]
    if benchmarks.get("rows"):
        parts.append("[Milliseconds, memory and machine](docs/benchmarks.md).")
    return "\n\n".join(filter(None, parts)) or "None are kept here yet: `make demo` and `make bench` make some."


def command_blocks(source: Path) -> dict[str, str]:
    """The blocks of the command-line page: options of the commands, and what there is to choose from."""
    classes = {n.name: n for n in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)}
    header = ("option", "default", "meaning")
    studies = [[f"`{name}`", study.title, study.cost] for name, study in STUDIES.items()]
    return {
        "rules": table(
            ("rule", "what it is"), [[f"`{name}`", entry.title] for name, entry in RULES.items()], numeric_from=2
        ),
        "models": ", ".join(f"`{name}`" for name in models.names()),
        "recipes": table(("recipe", "what it is", "cost"), studies, numeric_from=3),
        **{
            block: table(header, options(classes[name]), numeric_from=3)
            for block, name in (("compare", "CompareFlags"), ("train", "TrainFlags"), ("both", "Flags"))
        },
    }


def options(flags: ast.ClassDef) -> list[list[str]]:
    """Option, default (or "required") and meaning of each field of a class of command-line flags."""
    lines = []
    for field, text in zip(flags.body, flags.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            calls = [node for node in ast.walk(field.annotation) if isinstance(node, ast.Call)]
            given = [str(a.value) for call in calls for a in call.args if isinstance(a, ast.Constant)]
            metavar, hint = (*given, "", "")[:2]
            name = ast.unparse(field.target).replace("_", "-")
            lines.append(
                [
                    f"`--{name} {metavar}`".replace(" `", "`"),
                    hint.strip("()").removeprefix("default: "),
                    str(text.value.value),
                ]
            )
    return lines


if __name__ == "__main__":
    main()
