"""Equations as MathML, written when the pages are built: browsers typeset it without a script and without a network."""

import re
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
ElementTree.register_namespace("", NAMESPACE.strip("{}"))
ENVIRONMENTS = ("aligned", "cases", "matrix", "pmatrix", "bmatrix")
log = logging.getLogger(__name__)


def mathml(latex: str, display: bool) -> str:
    """The equation as a `<math>` element.

    Raises:
        ValueError: there is something in it that is not known.
    """
    for name in re.findall(r"\\begin\{(.*?)\}", latex):
        if name not in ENVIRONMENTS:
            raise ValueError(f"no MathML for the environment {name} in {latex}")
    latex = latex.replace("{aligned}", "{align*}")  # the name that the converter knows
    root = ElementTree.fromstring(
        convert(latex, display="block" if display else "inline").replace("<mi>&</mi>", "<mi>\\</mi>")
    )
    for element in root.iter(f"{NAMESPACE}msup"):
        if len(element) == 2 and element[1].text in ("\u2032", "\u2033"):  # a prime is raised by itself
            element.tag = f"{NAMESPACE}mrow"
            element[1].tag, element[1].attrib = f"{NAMESPACE}mo", {"lspace": "0", "rspace": "0"}
    for element in root.iter():
        text = element.text or ""
        if "\\" in text:
            raise ValueError(f"no MathML for {text.strip()} in {latex}")
        if element.tag == f"{NAMESPACE}mo" and text.isalpha() and text.isascii():
            element.tag = f"{NAMESPACE}mi"  # the name of a function is no operator with space around it
        if text == "\u2016":
            element.set("stretchy", "false")  # both bars of a norm as they are: one of them may carry an exponent
        if side := element.attrib.pop("columnalign", None):  # browsers know the style only
            element.set("style", f"text-align: {side}")
    return ElementTree.tostring(root, encoding="unicode")


def _written(self: HTML5Translator, node: nodes.Element, display: bool) -> None:
    try:
        formula = mathml(node.astext(), display)
    except Exception as error:  # whatever the converter does not like: the page is named, and -W makes it an error
        log.warning("equation: %s: %s", type(error).__name__, error, location=node)
        formula = self.encode(node.astext())
    if display:
        number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
        self.body.append(f'<div class="math">{number}{formula}</div>')
    else:
        self.body.append(formula)
    raise nodes.SkipNode


def inline(self: HTML5Translator, node: nodes.math) -> None:
    """An equation within a line."""
    _written(self, node, display=False)


def block(self: HTML5Translator, node: nodes.math_block) -> None:
    """An equation of its own."""
    _written(self, node, display=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer; `html_math_renderer = "mathml"` uses it."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
