"""The built site: every link and anchor leads somewhere, every page fits a screen and a phone, everything public is in it.

`make docs` and `make test` build it into docs/_build/html; without that, and without a Chromium, there is nothing to see.
"""

import importlib
import inspect
import json
import pkgutil
import re
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
from tests import browser

import apical
import apical.core
import apical.diagnostics
import apical.evolution
import apical.rules.counter_current
import apical.rules.equilibrium
import apical.rules.feedback_control
import apical.rules.top_down
from apical.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "_build" / "html"
PHONE, DESKTOP = 390, 1280
PACKAGES = (
    apical.core,
    apical.diagnostics,
    apical.evolution,
    apical.rules.counter_current,
    apical.rules.equilibrium,
    apical.rules.feedback_control,
    apical.rules.top_down,
)

built = pytest.mark.skipif(not (SITE / "objects.inv").exists(), reason="no built documentation: make docs")
looks = pytest.mark.skipif(browser.chromium() is None, reason="no Chromium found")


class Page(HTMLParser):
    """Links, sources and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name == "id":
                self.anchors.add(value)
            elif value and (name in ("href", "src") and tag != "base"):
                self.links.append(value)


def dead_links(folder: Path) -> list[str]:
    """The relative links of the pages in a folder that lead nowhere, as "page -> link"."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            known = pages.get(target)
            if not target.exists() or (anchor and known is not None and anchor not in known.anchors):
                dead.append(f"{path.relative_to(folder)} -> {link}")
    return dead


@built
def test_every_link_and_anchor_leads_somewhere() -> None:
    assert len(list(SITE.rglob("*.html"))) > 40
    assert not dead_links(SITE.resolve())


QUESTIONS = {  # clicks from the front page, and what the last page says
    "Which rule shall I take?": (("choose.html",), "accuracy in deep convolutional networks"),
    "How do I train my own model in my own loop?": (("your-own-loop.html",), "optimizer.step()"),
    "Does it train my kind of network?": (("zoo.html",), "pre-activation ResNet"),
    "Was the paper's table reproduced, and at what size?": (("results/index.html", "results/pfa-mnist.html"), "Reproduced:"),
    "What does a step cost?": (("benchmarks.html",), "time / BP"),
}


@built
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_within_two_clicks(question: str) -> None:
    clicks, answer = QUESTIONS[question]
    assert len(clicks) < 3
    page = SITE / "index.html"
    for click in clicks:
        text = page.read_text(encoding="utf-8")
        links = Page(text[text.index("<article") : text.index("</article>")]).links  # not those at the side
        targets = {(page.parent / unquote(urlsplit(link).path)).resolve() for link in links}
        page = (SITE / click).resolve()
        assert page in targets
    assert answer in re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here"></a><a href="b.html#gone"></a><img src="c.png"><a href="http://x">'
    )
    (tmp_path / "b.html").write_text('<p id="here"><a href="#nowhere"></a><a href="a.html">')
    assert sorted(dead_links(tmp_path)) == ["a.html -> b.html#gone", "a.html -> c.png", "b.html -> #nowhere"]


def heading_anchors(text: str) -> set[str]:
    """The anchors that GitHub and MyST give the headings of a Markdown file."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_with_anchors_lead_to_headings(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", text):
        target = ROOT / path if path else ROOT / name
        assert anchor in heading_anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def public(package: ModuleType) -> list[str]:
    """Full names of the public functions and classes that the modules of a package define."""
    names = []
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if own and not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                names.append(f"{module.__name__}.{name}")
    return names


@built
def test_everything_public_is_in_the_reference() -> None:
    packed = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]  # four lines, then one object a line: name, kind, ...
    entries = [line.split(" ") for line in zlib.decompress(packed).decode().splitlines()]
    known = {name for name, kind, *_ in entries if kind.startswith("py:")}
    exported = {f"apical.{name}" for name in apical.__all__} - {"apical.Credit", "apical.CreditRule"}
    assert exported <= known
    assert {"apical.core.credit.Credit", "apical.core.credit.CreditRule", "apical.testing.check_rule"} <= known
    shown = known | {getattr(apical, name).__module__ + f".{name}" for name in apical.__all__}
    missing = [name for package in PACKAGES for name in public(package) if name not in shown]
    assert not missing, f"add to docs/api.md: {missing}"


def faults(found: list[dict[str, object]]) -> list[str]:
    """What is wrong with the pages that were looked at."""
    return [json.dumps(page) for page in found if "failure" in page or any(page[key] for key in browser.FAULTS)]


@built
@looks
def test_every_page_fits_a_phone_and_a_screen(tmp_path: Path) -> None:
    pages = sorted(
        f"/site/{path.relative_to(SITE).as_posix()}" for path in SITE.rglob("*.html") if "_static" not in path.parts
    )
    found, console = browser.look_at({"site": SITE.resolve()}, pages, (PHONE, DESKTOP), tmp_path / "browser")
    assert len(found) == 2 * len(pages)
    assert not faults(found)
    assert not console
    wide = {page["page"]: page["cut"] for page in found if page["width"] == DESKTOP and page["cut"]}
    assert not wide, "wider than the page: fewer columns, or fitting()"
    by_name = {page["page"]: page for page in found if page["width"] == PHONE}
    assert by_name["/site/rules/deep-feedback-control.html"]["equations"] > 10
    assert by_name["/site/gallery.html"]["images"] > 20
    for name in ("index", "choose", "rules", "results/index"):  # what a stranger reads first does not even scroll
        assert not by_name[f"/site/{name}.html"]["cut"], name


@looks
def test_a_report_fits_a_phone_and_a_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = (
        "--epochs",
        "2",
        "--seeds",
        "2",
        "--jobs",
        "1",
        "--train-limit",
        "320",
        "--model",
        "mlp-32-32",
        "--device",
        "cpu",
    )
    name = "RuleWhoseNameHasMoreLettersThanATelephoneIsWide" * 2
    (tmp_path / "own.py").write_text(f"import apical\n\n\nclass {name}(apical.FeedbackAlignment):\n    pass\n")
    assert main(["compare", "--rules", "bp", "fa", "dfa", f"own.py:{name}", "--out", "out", *quick]) == 0
    found, console = browser.look_at({"out": tmp_path / "out"}, ["/out/report.html"], (PHONE, DESKTOP), tmp_path / "browser")
    assert [page["images"] > 3 for page in found] == [True, True]
    assert not faults(found)
    assert not console


@looks
def test_a_bad_page_is_found_out(tmp_path: Path) -> None:
    """What the two tests before rely on: the browser sees each kind of fault."""
    bad = {
        "wide": '<div style="width: 500px; height: 9px"></div>',
        "image": '<img src="missing.png">',
        "script": "<script>undefined_name()</script>",
        "equation": "<math><mi>\\alpha</mi></math>",
        "cut": '<div class="table-wrapper" style="overflow-x: auto"><div style="width: 500px; height: 9px">x</div></div>',
        "tiny": '<svg class="circuit" viewBox="0 0 360 90" width="90"><text x="9" y="30" font-size="12">x</text></svg>',
        "good": '<div style="overflow-x: auto"><div style="width: 500px; height: 9px"></div></div><math><mi>a</mi></math>',
    }
    for name, body in bad.items():
        (tmp_path / f"{name}.html").write_text(f'<!doctype html><link rel="icon" href="data:,"><title>{name}</title>{body}')
    found, console = browser.look_at(
        {"bad": tmp_path}, [f"/bad/{name}.html" for name in bad], (PHONE,), tmp_path / "browser"
    )
    by_name = {page["title"]: page for page in found}
    assert by_name["wide"]["overflow"] == 500 + 8 - PHONE  # 8: the margin that browsers give a page
    assert by_name["image"]["broken"]
    assert by_name["equation"]["raw"] == ["\\alpha"]
    assert any("undefined_name" in line for line in console)
    assert by_name["cut"]["cut"] == by_name["tiny"]["tiny"] == ["x"]
    assert len(faults(found)) == 4
    assert not any(by_name["good"][key] for key in browser.FAULTS)


@built
def test_no_page_shows_where_it_was_built() -> None:
    """Warnings and defaults in examples and notebooks would."""
    places = (str(ROOT), sys.prefix, str(Path.home()))
    told = [path.name for path in SITE.rglob("*.html") if any(place in path.read_text(encoding="utf-8") for place in places)]
    assert not told
