"""The README: short, and every number on it is that of a file."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.generator import ROOT, script

page = script("front_page")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len([line for line in example.splitlines() if line]) <= 8


def test_no_measurement_is_typed() -> None:
    """Outside generated blocks, code, links and HTML there is no number but versions and the licence's."""
    text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->|^```.*?^```|<img.*?>|\]\([^)]*\)", "", README, flags=re.S | re.M)
    assert re.findall(r"\d[\d.]*\d|\d", text) == ["3.11", "2.0"]


def test_the_figure_is_there_and_described() -> None:
    source, width, text = re.findall(r'<img src="(.*?)" width="(\d+)" alt="(.*?)">', README)[0]
    assert (ROOT / source).read_bytes().startswith(b"\x89PNG")
    assert int(width) <= 700, "wider than the figure has dots"
    assert "accuracy" in text
    assert "angle" in text


def test_every_rule_has_a_family() -> None:
    families = page.toml("families")
    named = [name for members in families.values() for name in members]
    assert sorted(named) == sorted(kind.__name__ for kind in page.rule_classes().values())


RECORDS: list[dict[str, Any]] = [
    {
        "target": "pfa/theory",
        "rows": [{"rule": "pfa", "verdict": "reproduced"}, {"rule": "pfa-o", "verdict": "not reproduced"}],
    },
    {
        "target": "pfa/mnist",
        "rows": [
            {"rule": "pfa", "verdict": "budget too small to tell"},
            {"rule": "kp", "verdict": "not run"},
            {"rule": "bp", "verdict": "reproduced"},
        ],
    },
]


def test_undecided_verdicts_count_neither_way() -> None:
    assert page.share(["reproduced", "not reproduced", "not run", "budget too small to tell"]) == "1 of 2"
    assert page.share(["not run"]) == "-"


def test_each_rule_has_its_papers_and_verdicts() -> None:
    families = {
        "edges": {"ProductFeedbackAlignment": ["2405.20594", "two matrices"], "KolenPollack": ["Kolen & Pollack", "x"]}
    }
    first, second = page.rules(families, RECORDS).splitlines()[2:]
    link = "[`ProductFeedbackAlignment`](rules/product-feedback-alignment.md)"
    paper = "[2405.20594](https://arxiv.org/abs/2405.20594)"
    assert first == f"| edges | {link} | `pfa` `pfa-o` `pfa-mirror` `pfa-o-mirror` | {paper} | two matrices | 1 of 2 |"
    assert second.endswith("| `kp` `kp-mirror` | Kolen & Pollack | x | - |")
    (line,) = page.by_family(families, RECORDS).splitlines()[2:]
    links = [
        f"[`{name}`](docs/rules/{at}.md) {names}"
        for name, at, names in (
            ("ProductFeedbackAlignment", "product-feedback-alignment", "`pfa` `pfa-o` `pfa-mirror` `pfa-o-mirror`"),
            ("KolenPollack", "kolen-pollack", "`kp` `kp-mirror`"),
        )
    ]
    assert line == f"| edges | {'; '.join(links)} | 1 of 2 |"


def test_each_paper_has_its_tables_and_verdicts() -> None:
    known = [
        page.Standing(record["target"], "full", tuple(row["verdict"] for row in record["rows"]), "-", "-", "-", "")
        for record in RECORDS
    ]
    lines = page.reproduced(ROOT, known).splitlines()
    title = "[Deep learning without weight symmetry](src/apical_papers/pfa/README.md)"
    assert f"| {title} | `pfa` | 2 of 4 | 2 of 3 | 2 |" in lines
    assert len(lines) == 5  # the others were not run
    assert lines[-1].startswith("Not run yet: ")
    assert lines[-1].count("README.md") == len(page.papers()) - 1


def test_why_is_counted_from_the_benchmarks() -> None:
    step = {"model": "MLP", "batch": 8, "precision": "float32", "rounds": 5}
    pairs = [(True, ""), (True, ""), (False, ""), (False, ""), (False, ""), (False, "stopped")]
    measured = {
        "zoo": {
            "rows": [{"model": f"m{i % 2}", "rule": f"r{i % 3}", "trained": t, "fault": f} for i, (t, f) in enumerate(pairs)]
        },
        "results": {"rows": [{**step, "rule": "fa", "ratio_to_bp": 1.1}, {**step, "rule": "pfa", "ratio_to_bp": 1.3}]},
        "control": {"rows": [{**step, "rule": "dfc", "ratio_to_bp": 3.04, "ratio_of_authors": 1006.9}]},
        "evolution": {"rows": [{"chunk": None, "speed_up": 1.0}, {"chunk": 64, "speed_up": 6.69}]},
    }
    zoo, cheap, control, population = page.why(measured)
    assert "6 pairs of 2 common models and 3 rules, 2 train" in zoo
    assert "3 are refused with the remedy, 1 get something else" in zoo
    assert "1.10 to 1.30 on MLP, batch 8, float32 (median of 5 rounds" in cheap
    assert "3.0 times backpropagation's" in control
    assert "1007 times its own" in control
    assert "64 learners at once train 6.7 times as fast" in population


def test_the_demo_has_its_accuracies() -> None:
    rows = [
        {"rule": rule, "seed": seed, "test_accuracy": a}
        for rule, seed, a in (("bp", 0, 0.97), ("bp", 1, 0.96), ("fa", 0, 0.9))
    ]
    text = page.demo(rows, {"recipe": {"model": "mlp-8", "epochs": 3}})
    assert "2 rules on handwritten digits, mlp-8, 3 epochs, n = 2 seeds" in text
    assert "`bp` 96.5 ± 0.7, `fa` 90.0" in text


@pytest.mark.parametrize("rows", [[], [{"megabytes": 1234, "seconds": 90.0, "build": "CPU", "cores": 2}]])
def test_installing_is_measured_or_said_not_to_be(rows: list[dict[str, Any]]) -> None:
    text = page.install({"rows": rows})
    assert text.startswith("Measured" if rows else "Not measured.")
    assert ("1.2 GB in 1.5 minutes with PyTorch's CPU build" in text) == bool(rows)


def test_without_results_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert "not kept" in page.demo_block(tmp_path)
    (tmp_path / "results" / "demo").mkdir()
    (tmp_path / "results" / "demo" / "summary.json").write_text(
        json.dumps([{"rule": "bp", "seed": 0, "test_accuracy": 1.0}])
    )
    (tmp_path / "results" / "demo" / "compare.json").write_text(json.dumps({"recipe": {"model": "m", "epochs": 1}}))
    assert "`bp` 100.0" in page.demo_block(tmp_path)
