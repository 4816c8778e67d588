"""Write every part of README and docs that follows from the code, the results and the benchmarks.

    python docs/generate.py

Tables come from `results/<name>/` (a folder that `apical compare` wrote: summary.json and, where kept, compare.json,
verdicts.json and figures/; or one that a study of its own wrote: results.json and figures), from single files
`results/<name>.json`, from `results/reproductions`, the JSON files in `benchmarks/`, the papers that are installed,
the TOML files beside this script (which tables, sources and families there are), and the command line's own
definitions. What is not there is left out. :func:`outputs` is pure, so that a test can compare what is committed with
what would be written.
"""

from collections.abc import Iterable
from pathlib import Path

from audit_page import audit_blocks
from benchmark_pages import benchmark_page
from choose_page import choice
from circuits import circuits, drawing
from depth_page import picture
from front_page import demo_block, front_page, rules
from gallery_page import gallery
from index_page import results_index, standings
from paper_pages import paper_pages
from reproduction_page import reproduction_page
from result_pages import comparison_page, file_page, study_page, study_table, title
from rule_pages import overview, rule_blocks, rule_classes
from tables import benchmarks, comparisons, load, own_studies, reproductions, table, toml
from zoo_page import zoo_page

from apical import models
from apical.bench.names import RULES
from apical.bench.papers import papers
from apical.bench.papers import studies as all_studies
from apical.cli.flags.audit import Audit
from apical.cli.flags.evolve import Evolve
from apical.cli.flags.help import option_rows
from apical.cli.flags.landscape import Landscape
from apical.cli.flags.measure import Measure
from apical.cli.flags.reproduce import Reproduce
from apical.cli.flags.sweep import SweepFlags
from apical.cli.flags.training import CompareFlags, Flags, TrainFlags

ROOT = Path(__file__).resolve().parents[1]


def outputs(root: Path = ROOT) -> dict[Path, str]:
    """Path -> content of every file that is generated, wholly or between markers."""
    folders, studies, files = comparisons(root), own_studies(root), sorted((root / "results").glob("*.json"))
    records, measured = reproductions(root), benchmarks(root)
    known = standings(root, records)
    said = {name: standing.sentence for name, standing in known.items()}
    titles = {"reproductions": "Reproduced on demand"} if records else {}
    titles |= {path.name: title(path) for path in folders}
    titles |= {path.name: load(path / "results.json").get("title", path.name) for path in studies}
    titles |= {path.stem: dict(load(path)).get("title", path.stem) for path in files}
    written = {
        root / "docs" / "benchmarks.md": benchmark_page(measured),
        root / "docs" / "gallery.md": gallery(root),
        root / "docs" / "zoo.md": zoo_page(measured.get("zoo") or {}),
        root / "docs" / "results" / "index.md": results_index(titles, known),
        **({root / "docs" / "results" / "reproductions.md": reproduction_page(records)} if records else {}),
        **paper_pages(root, papers(), records),
        root / "docs" / "depth.svg": picture(root),
        **{root / "docs" / "circuits" / f"{page}.svg": drawing(circuit) for page, circuit in circuits().items()},
        **{root / "docs" / "results" / f"{path.name}.md": comparison_page(path, said[path.name]) for path in folders},
        **{root / "docs" / "results" / f"{path.name}.md": study_page(path, said[path.name]) for path in studies},
        **{root / "docs" / "results" / f"{path.stem}.md": file_page(path, said[path.stem]) for path in files},
    }
    blocks = {
        root / "README.md": front_page(root, measured, records, known.values()),
        root / "docs" / "command-line.md": command_blocks(),
        root / "docs" / "transformers.md": {
            name: study_table(root / "results" / f"transformers-{name}")
            for name in ("language", "language-4x256", "scaling")
        },
        root / "docs" / "rules.md": {"overview": overview(root), "families": rules(toml("families"), records)},
        root / "docs" / "choose.md": choice(root),
        root / "docs" / "audit.md": audit_blocks(root),
        root / "docs" / "index.md": {"demo": demo_block(root, "results/demo.md")},
        **{root / "docs" / "rules" / f"{page}.md": rule_blocks(kind, root) for page, kind in rule_classes().items()},
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


COMMANDS: dict[str, type] = {"compare": CompareFlags, "train": TrainFlags, "both": Flags, "evolve": Evolve}
COMMANDS |= {"landscape": Landscape, "audit": Audit, "measure": Measure, "reproduce": Reproduce, "sweep": SweepFlags}
"""Block of the command-line page -> class of flags."""


def command_blocks() -> dict[str, str]:
    """The blocks of the command-line page: options of the commands, and what there is to choose from."""
    rules = [[f"`{name}`", entry.title] for name, entry in RULES.items()]
    recipes = [[f"`{name}`", study.title, study.cost] for name, study in all_studies().items()]
    return {
        "rules": table(("rule", "what it is"), rules, numeric_from=2),
        "models": ", ".join(f"`{name}`" for name in models.names()),
        "recipes": table(("recipe", "what it is", "cost"), recipes, numeric_from=3),
        **{
            block: table(
                ("option", "default", "meaning"),
                [[f"`{option}`", *more] for option, *more in option_rows(flags)],
                numeric_from=3,
            )
            for block, flags in COMMANDS.items()
        },
    }


if __name__ == "__main__":
    main()
