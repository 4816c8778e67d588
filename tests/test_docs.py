"""The documentation is true: its code runs, its generated parts are what the generator writes, every rule is in it."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import tyro
from tests.generator import ROOT, script

import apical
from apical.bench.names import RULES
from apical.bench.papers import studies
from apical.bench.state import parse_object
from apical.cli.main import Command
from apical.core.credit import CreditRule

PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]


generate, results, choosing, index, circuits, audit_page, zoo_page = map(
    script, ("generate", "result_pages", "choose_page", "index_page", "circuits", "audit_page", "zoo_page")
)


def code(page: Path, language: str) -> str:
    """All code of one language on a page, joined."""
    return "\n".join(blocks(page, language))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


RUN = [
    page for page in PAGES if code(page, "python") and page.name != "bring-your-own-rule.md"
]  # which has a test of its own


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "bring-your-own-data.md":  # which writes files, and has some that people write
        monkeypatch.chdir(tmp_path)
        text = page.read_text(encoding="utf-8")
        for name, content in re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            (tmp_path / name).write_text(content, encoding="utf-8")
    others = {"lightning.md": ("lightning",), "trainers.md": ("accelerate", "lightning", "ignite", "skorch")}
    for package in others.get(page.name, ()):
        pytest.importorskip(package, reason=f"the example needs {package}, which is no requirement")
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
        if "accuracy" in names:
            assert names.pop("accuracy") > 0.9
    if page.name == "bring-your-own-data.md":
        assert f"prints `{names['points'].about}`" in text
        assert Path(names["result"].report).exists()
    if "right" in names:
        assert names["right"] > 0.8
    if "message" in names:
        assert names["message"].startswith("parameter '0.shift' is an orphan")
        assert len(names["trained"]) == 11 * 6
        assert all(names["trained"] + names["masked"])
    if page.name == "feedback-control.md":
        assert names["margin"] > 0
        assert names["sentence"] is None
        assert names["gap"][-1].max() < 1e-3 * names["trace"].apical[0][-1].abs().max()
        assert names["angle"] < 1e-3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_on_the_page_exist(page: Path) -> None:
    for line in code(page, "console").splitlines():
        _, found, arguments = line.partition("apical ")
        if found and line.startswith("$ ") and "source" not in line and "--help" not in arguments:
            tyro.cli(Command, args=shlex.split(arguments, comments=True))  # type: ignore[call-overload]


def test_generated_parts_are_up_to_date() -> None:
    written = generate.outputs()
    old = [path.name for path, text in written.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    assert not old, "run: python docs/generate.py"
    assert not generate.stale(written), "run: python docs/generate.py"


def test_every_rule_is_documented() -> None:
    """Each exported rule has a page of its own, with all that such a page has; each short name is in README and overview."""
    readme, index = (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        (ROOT / "docs" / "rules.md").read_text(encoding="utf-8"),
    )
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "rules").glob("*.md")}
    for name in apical.__all__:
        kind = getattr(apical, name)
        if isinstance(kind, type) and issubclass(kind, CreditRule) and kind is not CreditRule:
            assert f"`{name}`" in readme
            assert f"`{name}`" in index
            page = pages.pop(kind.__module__.rpartition(".")[2].replace("_", "-"))
            assert f"autoclass:: apical.{name}\n" in page
            assert f"apical.{name}(" in code_of(page), "no example"
            assert "$$\n" in page, "no equation"
            for heading in ("Equations", "What is local", "Example", "What it costs", "Audit", "Results", "Reference"):
                assert f"\n## {heading}\n" in page, heading
            assert name == "Backprop" or "\n## What the paper leaves open\n" in page
            assert "{cite:t}`" in page
    assert not pages, "pages of rules that are not exported"
    for name in RULES:
        assert f"`{name}`" in readme
        assert f"`{name}`" in index


def code_of(page: str) -> str:
    """The Python code on a page."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))


AUDIT = {
    "command": "apical audit",
    "commit": "abc",
    "model": "mlp-16",
    "seconds": 1.5,
    "criteria": [{"key": "transport", "title": "No transport", "question": "Does each weight do without the others?"}],
    "rows": [
        {
            "rule": rule,
            "title": rule,
            "verdicts": {"transport": {"verdict": said, "good": good, "text": text, "numbers": {}}},
        }
        for rule, said, good, text in (("bp", "no", False, "moved by 3"), ("fa", "yes", True, "moved by 0"))
    ],
}


def test_the_audit_becomes_a_table_to_choose_by_and_a_row_on_each_page(tmp_path: Path) -> None:
    (tmp_path / "results" / "audit").mkdir(parents=True)
    (tmp_path / "results" / "audit" / "audit.json").write_text(json.dumps(AUDIT))
    choose = choosing.choice(tmp_path)["audit"]
    assert "| rule | No transport |\n| --- | --- |\n| `bp` | ✗ |\n| `fa` | ✓ |" in choose
    assert "| No transport | Does each weight do without the others? | `fa` |" in choose
    page = generate.rule_blocks(apical.FeedbackAlignment, tmp_path)["measured"]
    assert "| `fa` | No transport | ✓ | moved by 0 |" in page
    assert "moved by 3" not in page
    absent = generate.rule_blocks(apical.WeightMirror, tmp_path)["measured"]
    assert "The kept audit does not include this rule." in absent
    assert "None are kept here yet." in absent


def test_a_rules_page_lists_its_comparisons_and_their_verdicts(comparison: Path) -> None:
    row = {"rule": "pfa", "what": "angle, °", "epoch": 5, "published": 20.3, "tolerance": 1.5, "tag": "fig", "n": 2}
    verdicts = [{**row, "measured": 20.5, "spread": 0.25, "verdict": "reproduced"}]
    (comparison / "verdicts.json").write_text(json.dumps(verdicts))
    root = comparison.parents[1]
    page = generate.rule_blocks(apical.ProductFeedbackAlignment, root)["measured"]
    link = "[PFA on MNIST, 784-512-512-10, 1 of 40 epochs](../results/study.md)"
    said = "Reproduced: 1 of 1 read off the published curves."
    assert f"| {link} | `pfa` | {said} | 1 | 1 | 94.00 | 96.50 ± 0.71 |" in page
    own = generate.rule_blocks(apical.Backprop, root)["measured"]
    assert f"| {link} | `bp` | No reference number was reached. | 2 | 1 | 96.50 ± 0.71 | - |" in own


def test_the_cost_of_a_rule_is_that_of_the_benchmarks(tmp_path: Path) -> None:
    row = {"model": "MLP", "batch": 8, "device": "cpu", "precision": "float32", "peak_memory_ratio": 1.5}
    rows = [{**row, "rule": "fa", "ratio_to_bp": 1.25}, {**row, "rule": "dfa", "ratio_to_bp": 0.5}]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results.json").write_text(json.dumps({"rows": rows}))
    page = generate.rule_blocks(apical.FeedbackAlignment, tmp_path)["measured"]
    assert "| `fa` | MLP, batch 8, float32 | cpu | 1.25 | 1.50 |" in page
    assert "dfa" not in page
    assert "| `fa` | 1.25 | - | - |" in choosing.choice(tmp_path)["cost"]


def test_rules_are_said_to_take_residual_networks_where_they_do() -> None:
    assert generate.overview(ROOT).count("| yes |") + generate.overview(ROOT).count("| no |") == len(generate.rule_classes())
    assert "[`CounterCurrentLearning`](rules/counter-current-learning.md) | `ccl`" in generate.overview(ROOT)


def test_the_gallery_has_each_figure_once(study: Path) -> None:
    page = generate.gallery(study.parents[1])
    assert "## Toy" in page
    assert page.count(":::{figure}") == 1
    assert ":::{figure} ../results/toy/conditions.png\n:alt: conditions: Toy\n\nConditions. [Data](results/toy.md)." in page


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target


RUNS = (("bp", 0, 0.97, "finished"), ("bp", 1, 0.96, "finished"), ("pfa", 0, 0.94, "finished"), ("pfa", 1, 0.1, "diverged"))


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """A comparison of two rules, two seeds each, one of them diverged, with hand-made numbers."""
    folder = tmp_path / "results" / "study"
    rows = []
    for rule, seed, accuracy, status in RUNS:
        row = {"rule": rule, "seed": seed, "epochs": 1, "test_accuracy": accuracy, "train_loss": 0.25, "status": status}
        rows.append({**row, "ratio_to_bp": 1.25 if rule == "pfa" else 1.0, "memory_mb": None, "commit": "abc"})
    study = studies()["pfa-mnist"]
    plan = {"command": "apical compare", "rules": ["bp", "pfa"], "seeds": [0, 1], "study": "pfa-mnist"}
    plan["recipes"] = {rule: {**study.row(rule).recipe.to_json(), "epochs": 1} for rule in ("bp", "pfa")}
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(rows))
    (folder / "compare.json").write_text(json.dumps(plan))
    return folder


def test_a_comparison_becomes_a_table_of_finished_seeds(comparison: Path) -> None:
    page = generate.comparison_page(comparison)
    assert "| `bp` | 2 | 1 | 96.50 ± 0.71 | 0.2500 ± 0.0000 | - |" in page
    assert "| `pfa` | 1 of 2 | 1 | 94.00 | 0.2500 | - |" in page
    assert "# PFA on MNIST, 784-512-512-10, 1 of 40 epochs" in page
    assert "Unlike the recipe: epochs 1 instead of 40." in page


def test_verdicts_are_listed_and_counted(comparison: Path) -> None:
    row = {"rule": "pfa", "what": "angle, °", "epoch": 5, "published": 20.3, "tolerance": 1.5, "tag": "fig", "n": 2}
    near = {**row, "measured": 20.5, "spread": 0.25, "verdict": "reproduced"}
    absent = {**row, "measured": None, "spread": None, "n": 0, "verdict": "not run"}
    order = {**row, "published": 0.0, "tolerance": None, "measured": -1.0, "spread": None, "verdict": "not reproduced"}
    (comparison / "verdicts.json").write_text(json.dumps([near, absent, order]))
    page = generate.comparison_page(comparison)
    assert "Reproduced: 1 of 2 read off the published curves." in page
    assert "| reproduced | angle, ° | `pfa` | 5 | 20.30 ± 1.5 | fig | 20.50 ± 0.25 | 2 |" in page
    assert "| not run | angle, ° | `pfa` | 5 | 20.30 ± 1.5 | fig | - | - |" in page
    assert "| not reproduced | angle, ° | `pfa` | 5 | at least 0.00 | fig | -1.00 | 2 |" in page
    assert page.index("Reproduced: 1 of 2") < page.index("| rule | seeds |") < page.index("$ apical compare"), (
        "verdict first"
    )


def test_runs_that_ended_early_state_their_distance(comparison: Path) -> None:
    row = {"rule": "bp", "what": "test accuracy, %", "published": 97.0, "tolerance": 0.5, "tag": "fig", "measured": None}
    row |= {"n": 0, "spread": None, "verdict": "not run"}
    (comparison / "verdicts.json").write_text(json.dumps([{**row, "epoch": 40}, {**row, "epoch": 20}]))
    page = generate.comparison_page(comparison)
    assert "| `bp` | 97.00 after 20 epochs | 96.50 after 1 | -0.50 | 2 |" in page
    assert "97.00 after 40 epochs" not in page
    (comparison / "verdicts.json").write_text(json.dumps([{**row, "epoch": 1}]))  # it ran to there and has no number
    assert "points." not in generate.comparison_page(comparison)


def test_small_losses_are_no_zeros(comparison: Path) -> None:
    rows = [
        {"rule": "dfc", "seed": seed, "epochs": 1, "test_accuracy": None, "test_loss": 0.1125, "train_loss": loss}
        for seed, loss in enumerate((7.61e-8, 8.61e-8))
    ]
    (comparison / "summary.json").write_text(json.dumps(rows))
    row = {"rule": "dfc", "what": "train loss", "epoch": 100, "tag": "code", "n": 1, "spread": None}
    verdict = {**row, "published": 7.61e-8, "tolerance": 1.5e-7, "measured": 8.11e-8, "verdict": "reproduced"}
    (comparison / "verdicts.json").write_text(json.dumps([verdict]))
    page = generate.comparison_page(comparison)
    assert "| rule | seeds | epochs | test loss | training loss |" in page
    assert "| `dfc` | 2 | 1 | 0.1125 ± 0.0000 | 8.11e-08 ± 7.1e-09 |" in page
    assert "| reproduced | train loss | `dfc` | 100 | 7.61e-08 ± 1.5e-07 | code | 8.11e-08 | 1 |" in page
    assert "Sources: `code` is named in the authors' repository, for a single run." in page


def test_options_that_are_not_the_recipes_are_named() -> None:
    study = studies()["dfc-mnist"].row("dfc-ssa").recipe.to_json()
    kept = [option for option in study["rule_options"] if not option.startswith(("alpha=", "k_p="))]
    used = {**study, "rule_options": [*kept, "k_p=7", "learn=noise", "first_layer=True"]}
    sentence = results.departures({"study": "dfc-mnist", "recipes": {"dfc-ssa": used}})
    assert "option k_p 7 instead of 0 of `dfc-ssa`" in sentence
    assert "option learn noise instead of the default of `dfc-ssa`" in sentence
    assert "first_layer" not in sentence
    assert "alpha" not in sentence  # a record cannot lack an option that was there


def test_settings_that_a_recipe_leaves_to_the_rule_are_no_departure() -> None:
    recipe = studies()["pfa-mnist"].row("strong-dfc").recipe.to_json()
    filled = {**recipe, "clip": RULES["strong-dfc"].clip}
    assert results.departures({"study": "pfa-mnist", "recipes": {"strong-dfc": filled}}) == ""
    sentence = results.departures({"study": "pfa-mnist", "recipes": {"strong-dfc": {**filled, "clip": 7.0}}})
    assert sentence == "Unlike the recipe: clip 7 instead of 0."


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of its own with hand-made numbers."""
    folder = tmp_path / "results" / "toy"
    folder.mkdir(parents=True)
    row = {"figure": "3", "rule": "dfc", "what": "angle, °", "mark": "<= 30", "std": None, "n": 1, "source": "our mark"}
    content = {
        "title": "Toy",
        "about": "About.",
        "command": "python -m toy",
        "measures": {"angle": "angle |°|"},
        "sources": {"our mark": "we chose it"},
        "curves": {
            "dfc": {"n": 2, "epochs": [0, 9], "metrics": {"angle": {"mean": [40.0, 22.05], "std": [1.0, 3.1234]}}},
            "bp": {"n": 0, "epochs": [], "metrics": {}},
        },
        "verdicts": [
            {**row, "mean": 22.05, "verdict": "reproduced"},
            {**row, "mean": 36.15, "std": 6.81, "n": 3, "verdict": "not reproduced"},
            {**row, "mean": None, "n": 0, "source": "statement", "verdict": "not run"},
        ],
        "axes": [{"measure": "angle", "limits": [0.0, 70.0], "range": None, "inside": None, "source": "axis"}],
        "settings": {"seeds": [0, 1], "lr": {"bp": 0.1}},
    }
    (folder / "results.json").write_text(json.dumps(content))
    for name in ("conditions.png", "conditions.svg"):
        (folder / name).write_text("")
    return folder


def test_a_study_of_its_own_becomes_a_page(study: Path) -> None:
    page = generate.study_page(study)
    assert (
        "# Toy\n\nReproduced: 1 of 2 thresholds of our choice.\n\nAbout.\n\n## Verdicts\n\n- *our mark*: we chose it" in page
    )
    assert page.endswith("## How it was made\n\n```console\n$ python -m toy\n```\n")
    assert "| not reproduced | angle, ° | `dfc` | <= 30 | 36.15 ± 6.8 | 3 | our mark | 3 |" in page
    assert "| not run | angle, ° | `dfc` | <= 30 | - | - | statement | 3 |" in page
    assert "| angle | 0 to 70 | - | not run |" in page
    assert "| rule | seeds | epochs | angle \\|°\\| |" in page
    assert "| `dfc` | 2 | 9 | 22.05 ± 3.1 |\n| `bp` | 0 | - | - |" in page
    assert "| seeds | 0, 1 |\n| lr bp | 0.1 |" in page
    assert "![conditions](../../results/toy/conditions.svg)" in page


@pytest.fixture(scope="module")
def mathml() -> Any:
    return pytest.importorskip("mathml", reason="the documentation's requirements are not installed").mathml


def test_equations_become_mathml(mathml: Any) -> None:
    assert mathml("a_l", False).count("<msub><mi>a</mi><mi>l</mi></msub>") == 1
    rows = mathml(r"\begin{aligned} a &= b \\ c &= d \end{aligned}", True)
    assert rows.count("<mtr>") == 2
    assert rows.count("text-align: right") == rows.count("text-align: left") == 2
    assert 'display="block"' in rows
    assert "<mi>softmax</mi>" in mathml(r"\operatorname{softmax}(x)", False)
    assert "<msup>" not in mathml("f'(x)", False)


@pytest.mark.parametrize("latex", [r"\nosuchcommand x", r"a & b", r"\begin{nosuch} a \end{nosuch}"])
def test_equations_that_would_not_be_typeset_are_an_error(mathml: Any, latex: str) -> None:
    with pytest.raises(ValueError, match="no MathML"):
        mathml(latex, False)


def test_every_equation_of_the_pages_is_typeset(mathml: Any) -> None:
    found = 0
    for page in PAGES:
        text = re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for display, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$]+?)\$", text, re.DOTALL):
            assert "<math" in mathml(display or inline, bool(display))
            found += 1
    assert found > 100


def test_the_benchmarks_of_feedback_control_have_their_verdicts() -> None:
    row = {"rule": "dfc-ssa", "model": "mlp", "batch": 128, "precision": "float32", "ms_per_step": 12.5, "ratio_to_bp": 2.5}
    row |= {"quartiles": [2.4, 2.6], "target": 3.0, "within_target": True}
    rows = [
        {**row, "ratio_of_authors": 3.1, "faster_than_authors": 1.24},
        {**row, "rule": "dfc feedback update", "target": 2.0, "within_target": False, "floor": 2.1},  # which forbids it
    ]
    walk = {"simulation": "steady state", "ms_per_controller_step": 0.5, "floor_ms": 0.4, "ratio_to_floor": 1.25}
    walk |= {"target": None, "within_target": None}
    solve = {"solve": "784 outputs", "batch": 128, "ms_below": 20.0, "ms_dense": 900.0}
    control = {"rows": rows, "simulation": [walk], "solve": [solve], "environment": {"torch": "2"}}
    page = generate.benchmark_page({"control": control})
    assert "| `dfc-ssa` | 12.50 | 2.50 | 2.40 to 2.60 | at most 3 | - | met | 3.1 | 1.2 |" in page
    assert "| 12.50 | 2.50 | 2.40 to 2.60 | at most 2 | 2.10 | missed: below the floor | - | - |" in page
    assert "| steady state | 0.500 | 0.400 | 1.25 | - | - |" in page
    assert "| 784 outputs | 128 | 20.0 | 900.0 |" in page
    assert "No measurement is kept here yet." in generate.benchmark_page({})


def test_benchmarks_become_tables_by_device() -> None:
    row = {
        "model": "mlp",
        "batch": 64,
        "device": "cpu",
        "precision": "float32",
        "ms_per_step": 1.5,
        "peak_memory_ratio": None,
    }
    rows = [{**row, "rule": "bp", "ratio_to_bp": 1.0}, {**row, "rule": "fa", "ratio_to_bp": 1.0234}]
    page = generate.benchmark_page({"results": {"environment": {"torch": "2", "gpu": {"name": "none"}}, "rows": rows}})
    assert "## cpu\n\n### mlp, batch 64, float32" in page
    assert "| `fa` | 1.500 | 1.023 | - |" in page
    assert "| gpu name | none |" in page


def test_a_results_file_becomes_a_table(tmp_path: Path) -> None:
    path = tmp_path / "theory.json"
    path.write_text(json.dumps({"title": "Theory", "rows": [{"expansion": 1, "angle": 45.04321}, {"expansion": 10}]}))
    assert "# Theory\n\n| expansion | angle |\n| --- | ---: |\n| 1 | 45.04 |\n| 10 | - |" in generate.file_page(path)


def test_missing_markers_are_an_error() -> None:
    text = generate.replace_block("<!-- a:begin --> old <!-- a:end -->", "a", "new")
    assert text == "<!-- a:begin -->\n\nnew\n\n<!-- a:end -->"
    with pytest.raises(ValueError, match="missing"):
        generate.replace_block("text", "a", "new")


def test_the_package_is_the_one_beside_the_documentation() -> None:
    assert Path(sys.modules["apical"].__file__ or "").is_relative_to(ROOT / "src")


def test_learning_rates_are_told_where_they_differ() -> None:
    recipes = {"bp": {"lr": [0.1, 0.03, 0.01]}, "ccl": {"lr": [0.2]}}
    assert results.rates({"recipes": recipes}) == ["Learning rates: `bp` 0.1 to 0.01, `ccl` 0.2."]
    assert results.rates({"recipes": {"bp": {"lr": [0.1]}, "ccl": {"lr": [0.1]}}}) == results.rates(None) == []


def test_every_rule_has_a_drawing_of_its_circuit() -> None:
    drawn = circuits.circuits()
    assert set(drawn) == set(generate.rule_classes()), "describe the rule in docs/circuits.toml"
    for page, circuit in drawn.items():
        svg = ElementTree.fromstring(circuits.drawing(circuit))
        width, height = map(float, svg.attrib["viewBox"].split()[2:])
        texts = svg.findall(".//{*}text")
        assert all(0 < float(each.attrib["x"]) < width and 0 < float(each.attrib["y"]) < height for each in texts)
        assert len(texts) > len(circuit.nodes), "labels and a legend"
        assert f":file: ../circuits/{page}.svg" in (ROOT / "docs" / "rules" / f"{page}.md").read_text(encoding="utf-8")


def test_an_arrow_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="is no arrow"):
        circuits.drawing(circuits.Circuit(["a a 0 0", "b b 1 0"], ["a - b w"], [], ""))


def test_the_learning_curve_is_of_the_comparison_that_knows_most(comparison: Path) -> None:
    root = comparison.parents[1]
    assert script("rule_pages").learning_curve(["pfa"], root) is None
    (comparison / "figures").mkdir()
    (comparison / "figures" / "accuracy.svg").write_text("")
    assert script("rule_pages").learning_curve(["pfa"], root) is None, "one epoch is no curve"
    runs = [{**row, "epochs": 2} for row in json.loads((comparison / "summary.json").read_text())]
    (comparison / "summary.json").write_text(json.dumps(runs))
    assert script("rule_pages").learning_curve(["pfa"], root) == comparison
    assert script("rule_pages").learning_curve(["dfa"], root) is None


def test_a_wide_figure_is_marked_so_that_it_scrolls_on_a_phone(tmp_path: Path) -> None:
    for name, width in (("one", 300), ("two", 504)):
        (tmp_path / f"{name}.svg").write_text(f'<?xml version="1.0"?><svg height="9pt" width="{width}.5pt" x="y"></svg>')
    _, one, two = script("result_pages").figures(tmp_path, "study")
    assert one == "![one](../../results/study/one.svg)"
    assert two == ":::{container} wide\n![two](../../results/study/two.svg)\n:::"


def test_the_index_says_of_every_table_whether_it_was_run_and_how(comparison: Path, study: Path) -> None:
    root = comparison.parents[1]
    known = index.standings(root, [])
    assert known["study"].target == "pfa/mnist"
    assert known["study"].sentence.startswith("**Shortened**: 1 of 40 epochs, 1 of 5 seeds (")
    assert not known["toy"].target
    page = index.results_index({"study": "MNIST", "toy": "Toy"}, known)
    assert f"{len(index.tables())} tables, 1 of them run, 0 at the paper's size (0 %)." in page
    assert "| `pfa/mnist` | [MNIST](study.md) | MNIST | 1 of 40 epochs, 1 of 5 seeds | - | - | - | abc |" in page
    assert "| `pfa/cifar10` | PFA on CIFAR-10, ResNet-20 | CIFAR-10 | not run |  |  |  |  |" in page
    assert "| [Toy](toy.md) | - | - | - |" in page
    assert all(f"`{target}`" in page for target in index.tables())


def test_a_copy_that_lacks_samples_is_not_full() -> None:
    runs = [{"n_train": 5000}]
    assert index._part({"data": "cifar-100", "validation": 5000}, runs) == {"train_limit": 5000}
    assert index._part({"data": "cifar-100", "validation": 5000}, [{"n_train": 45000}]) == {}
    assert index._part({"data": "cifar-100", "train_limit": 5000}, runs) == index._part({"data": "digits"}, runs) == {}


def test_full_size_is_full() -> None:
    full = {"epochs": 40, "seeds": 3}
    assert index.shortened(full, full) == index.shortened({**full, "seeds": 5}, full) == "full"
    assert index.shortened({**full, "train_limit": 640}, full) == "640 training samples"


def test_the_decision_takes_the_best_rule_that_has_what_is_wanted(comparison: Path) -> None:
    asked = {"want": "speed", "criteria": ["transport"], "comparison": "study", "network": "MLP"}
    verdicts = {"bp": False, "pfa": True, "fa": True}
    audit = {"rows": [{"rule": rule, "verdicts": {"transport": {"good": good}}} for rule, good in verdicts.items()]}
    want, take, because = choosing.decision(asked, audit, comparison.parents[1])
    assert (want, take) == ("speed", "[`pfa`](rules/product-feedback-alignment.md)")
    assert because.startswith("94.00 % on [PFA on MNIST")
    assert "backpropagation has 96.50 ± 0.71 (n = 1)" in because
    assert choosing.decision(asked, {"rows": []}, comparison.parents[1]) == []


def test_audits_are_tables_of_numbered_criteria_in_which_equal_rows_of_a_class_are_one(tmp_path: Path) -> None:
    rows = [{**AUDIT["rows"][int(rule != "bp")], "rule": rule, "claims": {}} for rule in ("bp", "pfa", "pfa-o")]
    rows[1] = {**rows[1], "claims": {"transport": {"claimed": "no", "agrees": False}}}
    more = {"epochs": 1, "data": "digits", "refused": {"dfc": "it is no chain"}, "claims": "table 1"}
    (tmp_path / "results" / "audit").mkdir(parents=True)
    (tmp_path / "results" / "audit" / "audit.json").write_text(json.dumps({**AUDIT, **more, "rows": rows}))
    found = audit_page.audit_blocks(tmp_path)
    assert found["criteria"] == "Columns are the criteria above: **1** No transport."
    assert "| rule | 1 |\n| --- | --- |\n| `bp` | ✗ |\n| `pfa` `pfa-o` | ✓ |" in found["perceptron"]
    assert "`pfa` on 1 is yes, claimed no" in found["perceptron"]
    assert "Not audited: `dfc`, for it is no chain." in found["perceptron"]
    assert found["transformer"] == "Not kept yet: `apical audit --out results/audit-gpt`."


def test_the_zoo_has_a_column_for_rules_that_train_the_same_models() -> None:
    def row(rule: str, model: str, refused: str = "", fault: str = "") -> dict[str, object]:
        trained = not (refused or fault)
        checks = ["gradients"] if trained else []
        return {"rule": rule, "model": model, "trained": trained, "refused": refused, "fault": fault, "checks": checks}

    rows = [row(rule, model) for rule in ("fa", "kp", "kp-mirror") for model in ("a", "b")]
    rows += [row("pfa", "a"), row("pfa", "b", refused="layer 'x' is called 3 times; split it")]
    rows += [row("dfc", "a", refused="module 'y' (Dropout) is random"), row("dfc", "b", fault="E: it_leaks")]
    page = zoo_page.zoo_page(
        {"rows": rows, "models": {"a": "first", "b": "second"}, "checks": {"gradients": "They are there.", "other": "Not."}}
    )
    every = ", ".join(
        f"[{kind}](rules/{name}.md)"
        for kind, name in (("FeedbackAlignment", "feedback-alignment"), ("KolenPollack", "kolen-pollack"))
    )
    assert f"| A | {every} |" in page
    assert "| B | [ProductFeedbackAlignment](rules/product-feedback-alignment.md) (`pfa`) |" in page
    assert "| model | A | B | C |" in page
    assert "| first | ✓ | ✓ | 2 |" in page
    assert "| second | ✓ | 1 | fault |" in page
    assert "1. layer … is called … times; split it.\n   *In second (`x`).*" in page
    assert "2. module … is random.\n   *In first (`y`).*" in page
    assert r"- `dfc`, second: E: it\_leaks" in page
    assert "| gradients | They are there. | every rule that trains a model |" in page
    assert "Not." not in page


def test_kept_results_are_as_they_were_written() -> None:
    for path in sorted((ROOT / "results").glob("*/*.json")):
        text = path.read_text(encoding="utf-8")
        if not text.startswith("["):
            parse_object(text)  # which compares the checksum, where there is one


def test_the_picture_of_depth_has_every_rule_of_both_studies(tmp_path: Path) -> None:
    from depth_page import TITLE, look, picture

    assert picture(tmp_path) == ""
    for study, rows in (("structure-study", [["bp", "1 (1 to 1)"], ["pc", "not run"]]), ("structure-depth", [["pc", "0"]])):
        (tmp_path / "results" / study).mkdir(parents=True)
        table = {"title": f"{TITLE}tanh, critical", "header": ["rule", "depth 50"], "rows": rows}
        (tmp_path / "results" / study / "results.json").write_text(json.dumps({"tables": [table]}))
    drawn = picture(tmp_path)
    assert drawn.count("<rect") == 2
    assert "pc, tanh, critical, depth 50: 0<" in drawn
    assert [
        look(cell)[-1] for cell in ("0.0011 (0.001 to 0.002)", "1e-13", "0", "40", "refused", "not finite", "not run")
    ] == [
        *("\u22123", "\u221213", "\u00d7", "2", "\u00b7", "\u221e", "-"),
    ]
