"""Sphinx configuration. The pages that docs/generate.py writes are part of the repository."""

import gc
import json
import logging
import os
import re
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

from docutils import nodes
from nbclient import NotebookClient
from sphinx import addnodes
from sphinx.application import Sphinx
from traitlets.config import Config

import apical

gc.set_threshold(100_000, 20, 100)  # pages are trees that last: to look for cycles in them takes a third of the time

sys.path.append(str(Path(__file__).parent))  # for the extension beside this file

project = "apical"
author = "The apical contributors"
copyright = f"{author}, Apache-2.0"
release = version = apical.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.bibtex", "myst_nb", "mathml"]
html_math_renderer = "mathml"
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
bibtex_default_style = "plain"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
default_role = "code"  # docstrings quote code with single backticks

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False

nb_execution_mode = "force"  # notebooks are run at every build, and an error in one ends it
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds for a cell, where all of them take a few: the machine may be busy
nb_merge_streams = True
logging.getLogger("traitlets").setLevel(logging.WARNING)
JUPYTER = Path(__file__).parent / "_build" / "jupyter"  # a kernel of this very Python, which keeps still
KERNEL = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
(JUPYTER / "kernels" / "python3").mkdir(parents=True, exist_ok=True)
(JUPYTER / "kernels" / "python3" / "kernel.json").write_text(
    json.dumps({"argv": KERNEL, "display_name": "Python 3", "language": "python"}), encoding="utf-8"
)
os.environ["JUPYTER_PATH"] = str(JUPYTER)
PATIENT = Config({"NotebookClient": {"startup_timeout": 300}})
NotebookClient.__init__ = partialmethod(NotebookClient.__init__, config=PATIENT)  # myst-nb has no option for it

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["apical.css"]
html_title = f"apical {release}"
html_copy_source = False
TITLES: dict[str, nodes.bullet_list] = {}


def docstring_to_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings quote code with single backticks, and mean `*` and `|` as they stand; modules indent their equations."""
    text = "\n".join(lines)
    blocks = re.split(r"(\n\n(?: {4,}.*\n)+)", f"{text}\n") if what == "module" else [text]
    for i in range(0, len(blocks), 2):
        blocks[i] = quoted(blocks[i])
    for i in range(1, len(blocks), 2):
        blocks[i] = f"\n\n::{blocks[i]}"
    lines[:] = "".join(blocks).split("\n")


def quoted(text: str) -> str:
    """Text outside equations: marks other than those of quoted code are escaped."""
    parts = re.split(r"(:[\w:]+:`[^`]+`|`[^`]+`)", text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"^(?!\s*(?:>>>|\.\.\.)).*$", lambda m: re.sub(r"[*|]", r"\\\g<0>", m[0]), parts[i], flags=re.M)
        if i and re.match(r"\w", parts[i]):  # as in `Module`s: the end of a quotation must not touch a letter
            parts[i] = "\\ " + parts[i]
    return "".join(parts)


def without_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples stand under "Attributes" in the docstring of their class already."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def titles_at_the_side(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """The tree at the side has titles only, but for every page Sphinx copies all headings there are, and then drops them."""
    if "toctree" not in context:
        return
    every, make = app.env.tocs, context["toctree"]
    if not TITLES:
        TITLES.update({name: without_headings(toc.deepcopy()) for name, toc in every.items()})

    def quickly(**options: Any) -> str:
        app.env.tocs = TITLES if options.get("titles_only") else every
        try:
            return make(**options)
        finally:
            app.env.tocs = every

    context["toctree"] = quickly


def without_headings(toc: nodes.bullet_list) -> nodes.bullet_list:
    """What `titles_only` leaves of a page's table of contents: its title, and trees of other pages below it."""
    for entry in toc.children:
        if len(entry) > 1:
            if trees := list(entry.findall(addnodes.toctree)):
                entry[1][:] = trees
            else:
                entry.pop(1)
    return toc


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", titles_at_the_side, priority=400)  # before furo
    app.connect("autodoc-skip-member", without_fields)
    app.connect("autodoc-process-docstring", docstring_to_rst, priority=400)  # before napoleon
