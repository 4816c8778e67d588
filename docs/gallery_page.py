"""The gallery: every figure of the results, with what it shows and a link to its page."""

from collections.abc import Sequence
from pathlib import Path

from result_pages import NOTE, joined, title
from tables import load, toml

AUDITS = {
    "audit": ("Audit of plausibility", "choose.md"),
    "audit-gpt": ("Audit on a transformer", "audit.md"),
    "audit-graph": ("Audit on a graph", "audit.md"),
    "audit-flow": ("Audit on a flow", "audit.md"),
}
"""Folders under results/ that have no page of their own: heading, and the page that has their numbers."""


def gallery(root: Path) -> str:
    """The page, of all figures under `results/`."""
    about = "Every figure here is drawn by the command on the page that its caption links to."
    parts = [NOTE, "# Gallery", about]
    for folder in sorted(path for path in (root / "results").iterdir() if path.is_dir()):
        pictures = figures(folder)
        if pictures:
            parts += [f"## {heading(folder)}", "::::{container} gallery", *(card(folder, path, root) for path in pictures)]
            parts += ["::::"]
    return joined(parts)


def heading(folder: Path) -> str:
    """What the figures of a folder are about."""
    if folder.name in AUDITS:
        return AUDITS[folder.name][0]
    content = load(folder / "results.json") or {}
    return str(content.get("title") or title(folder))


def figures(folder: Path) -> Sequence[Path]:
    """The figures of a folder: of each the PNG, or else the SVG."""
    found = {path.with_suffix(""): path for suffix in ("svg", "png") for path in folder.rglob(f"*.{suffix}")}
    return [found[stem] for stem in sorted(found)]


def card(folder: Path, path: Path, root: Path) -> str:
    """One figure with its caption."""
    what = path.stem.replace("_", " ")
    page = f"results/{folder.name}.md"
    if folder.name in AUDITS:
        page = AUDITS[folder.name][1]
    caption = f"{toml('captions').get(path.stem, f'{what.capitalize()}.')} [Data]({page})."
    where = path.relative_to(root).as_posix()
    return f":::{{figure}} ../{where}\n:alt: {what}: {heading(folder)}\n\n{caption}\n:::"
