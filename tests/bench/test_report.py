"""The report of synthetic compare folders: numbers, honesty about failures, damage, determinism."""

import json
import math
import random
from html.parser import HTMLParser

import pytest

from apical.bench.report import folder as report
from apical.bench.report.records import ACCURACY, read
from apical.errors import CheckpointError

pytestmark = pytest.mark.xdist_group("report")  # all on one worker: the report is drawn once
RECIPE = {
    "data": "mnist",
    "model": "mlp-512-512",
    "epochs": 5,
    "batch_size": 64,
    "learning_rate": 0.01,
    "momentum": 0.9,
}
FINAL = {
    "bp": 0.979,
    "fa": 0.949,
    "dfa": 0.954,
    "usf": 0.9785,
    "kp": 0.977,
    "pfa": 0.9782,
    "pfa-o": 0.9791,
    "new<&>": 0.9,
}
ANGLE = {"fa": 82.0, "usf": 31.0, "kp": 13.0, "pfa": 20.0, "pfa-o": 13.5, "new<&>": 60.0}
LAYERS = ("linear1", "linear2", "linear3")


def record(rule, epoch, draw, layers=LAYERS):
    """A plausible line of metrics.jsonl: learning curves and angles that fall exponentially."""
    fade = math.exp(-epoch)
    accuracy = 0.1 if epoch == 0 else FINAL[rule] - 0.06 * fade + draw.gauss(0, 0.002)
    rows = {}
    for depth, layer in enumerate(layers):
        angle = None if rule not in ANGLE else ANGLE[rule] + (90 - ANGLE[rule]) * fade + depth * (1 - fade)
        gradient = 0.0 if rule == "bp" or layer == layers[-1] else ANGLE.get(rule, 60.0) * 0.8 * (1 - fade) + 90 * fade
        ratio = None if angle is None else 0.5 + 0.5 * (1 - fade) + 0.02 * depth
        rows[layer] = {"weight_alignment": angle, "norm_ratio": ratio, "gradient_alignment": gradient}
        rows[layer]["gradient_norm_ratio"] = 1.0
    return {
        "epoch": epoch,
        "train_loss": None if epoch == 0 else 0.02 + 1.2 * fade * (1.01 - FINAL[rule]) * 10 + 0.002 * draw.random(),
        "train_accuracy": None,
        "test_loss": 2.3 if epoch == 0 else 0.3 * (1.05 - FINAL[rule]),
        "test_accuracy": accuracy,
        "validation_accuracy": None,
        "ms_per_step": None if epoch == 0 else 1.4 + 0.01 * draw.random(),
        "seconds": 9.0 * epoch,
        "lr": 0.01,
        "weight_decay": 0.03 if epoch < 2 else 9e-5,
        "layers": rows,
    }


def write_run(folder, rule, seed, epochs=5, status="finished", layers=LAYERS, recipe=RECIPE):
    draw = random.Random(f"{rule}-{seed}")
    folder.mkdir(parents=True)
    decay = "0.03, then 9e-05" if rule.startswith("pfa") else "0.0001"
    config = {**recipe, "rule": rule, "seed": seed, "weight_decay": decay, "command": f"apical train --rule {rule}"}
    (folder / "config.json").write_text(json.dumps(config))
    environment = {"apical": "0.1.0", "torch": "2.13.0", "commit": None, "platform": "Linux", "threads": 1}
    environment |= {"data_source": "folder mnist (IDX files)", "started": f"2025-01-01T00:0{seed}:00"}
    (folder / "environment.json").write_text(json.dumps(environment))
    records = [record(rule, epoch, draw, layers) for epoch in range(epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    if status is None:
        return
    slowness = {"bp": 1.0, "dfa": 0.97, "pfa": 1.22, "pfa-o": 1.18}.get(rule, 1.03) + 0.01 * seed * (rule != "bp")
    result = {"rule": rule, "seed": seed, "epochs": epochs, "test_accuracy": records[-1]["test_accuracy"]}
    result |= {"train_loss": records[-1]["train_loss"], "ms_per_step": 1.4 * slowness, "parameters": 669706}
    result |= {"ratio_to_bp": slowness, "peak_memory_mb": 310.2, "n_train": 60000, "status": status}
    if status == "diverged":
        result |= {"message": "loss is <NaN> in epoch 2", "test_accuracy": None, "train_loss": math.nan}
    (folder / "result.json").write_text(json.dumps(result))


def write_compare(folder, rules, seeds, layers=LAYERS, recipe=RECIPE):
    folder.mkdir(parents=True, exist_ok=True)
    command = f"apical compare --rules {' '.join(rules)} --data mnist --seeds {len(seeds)} --out 'my <results>'"
    plan = {"command": command, "rules": list(rules), "seeds": list(seeds), "recipe": recipe}
    (folder / "compare.json").write_text(json.dumps(plan))
    for rule in rules:
        for seed in seeds:
            write_run(folder / "runs" / rule / f"seed-{seed}", rule, seed, layers=layers, recipe=recipe)
    return folder


def write_troubled(folder):
    """Three seeds of every rule; one run diverged, one was killed in mid-line, one never started."""
    write_compare(folder, list(FINAL), range(3))
    runs = folder / "runs"
    for path in (runs / "fa" / "seed-1", runs / "kp" / "seed-2", runs / "usf" / "seed-0"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    write_run(runs / "fa" / "seed-1", "fa", 1, epochs=2, status="diverged")
    write_run(runs / "kp" / "seed-2", "kp", 2, epochs=3, status=None)
    with (runs / "kp" / "seed-2" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "train_lo')
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A compare folder with trouble in it and its report; tests only read it."""
    folder = write_troubled(tmp_path_factory.mktemp("compare"))
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def page(written):
    return Page((written / "report.html").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """Text of a page, its attributes, and a check that tags are balanced."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.source, self.text, self.attributes, self.open = text, "", [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_and_figures_are_written_and_self_contained(written, page):
    stems = {
        "accuracy",
        "accuracy_seconds",
        "loss",
        "final_accuracy",
        "weight_alignment",
        "gradient_alignment",
        "norm_ratio",
        "overview",
    }
    assert {file.name for file in (written / "figures").iterdir()} == {f"{s}.{e}" for s in stems for e in ("png", "svg")}
    links = [value for key, value in page.attributes if key in ("src", "href")]
    assert len(links) == len(stems)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert "<script" not in page.source
    assert "url(" not in page.source
    assert not (written / "report.html.part").exists()


def test_page_states_rules_numbers_and_how_to_reproduce(page):
    for expected in (
        "Product feedback alignment (orthogonal) pfa-o",
        "mlp-512-512 on mnist",
        "669,706",
        "training samples60000",
        "--out 'my <results>'",
        "0.0001 (bp, fa, dfa, usf, kp, new<&>); 0.03, then 9e-05 (pfa, pfa-o)",
        "folder mnist (IDX files)",
        "2025-01-01T00:00:00 to 2025-01-01T00:02:00",
        "new<&>",
    ):
        assert expected in page.text, expected


def test_names_are_escaped(page):
    assert "new<&>" not in page.source


def test_runs_without_a_result_are_shown_and_left_out_of_means(written, page):
    assert "fa, seed 1: diverged: loss is <NaN> in epoch 2" in page.text
    assert "kp, seed 2: unfinished, epoch 3 of 5" in page.text
    assert "usf, seed 0: not started" in page.text
    assert "3 of 24 runs did not finish" in page.text
    rows = {row.rule: row for row in report.summarise(read(written))}
    assert {rule: len(row.runs) for rule, row in rows.items() if len(row.runs) < 3} == {"fa": 2, "kp": 2, "usf": 2}


def test_summary_numbers_are_those_of_the_runs(written):
    row = next(row for row in report.summarise(read(written)) if row.rule == "pfa")
    results = [json.loads((written / "runs" / "pfa" / f"seed-{k}" / "result.json").read_text()) for k in range(3)]
    assert row.scores(ACCURACY) == tuple(100 * result["test_accuracy"] for result in results)
    assert row.ratio == pytest.approx((1.22, 1.23, 1.24))
    assert row.values("parameters")[0] == 669706


def test_ratio_falls_back_to_bp_of_the_same_seed(tmp_path):
    folder = write_compare(tmp_path / "out", ["bp", "pfa"], [0, 1])
    for file in folder.glob("runs/*/*/result.json"):
        result = json.loads(file.read_text())
        file.write_text(
            json.dumps({**result, "ratio_to_bp": None, "ms_per_step": result["ms_per_step"] * (result["seed"] + 1)})
        )
    row = report.summarise(read(folder))[1]
    assert row.ratio == pytest.approx((1.22, 1.23))


@pytest.mark.usefixtures("undrawn_here")
def test_memory_has_no_column_where_no_run_recorded_it(tmp_path, page):
    assert "Peak memory" in page.text
    write_run(tmp_path / "run", "pfa", 0)
    file = tmp_path / "run" / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peak_memory_mb": None}))
    assert "Peak memory" not in report.write(tmp_path / "run").read_text(encoding="utf-8")


def test_planned_runs_that_never_started_keep_their_rule_s_settings(tmp_path):
    (tmp_path / "runs").mkdir()
    recipes = {"bp": {**RECIPE, "weight_decay": [0.0001]}, "pfa": {**RECIPE, "weight_decay": [0.03, 0.0001]}}
    plan = {"rules": ["bp", "pfa"], "seeds": [0], "recipe": recipes["bp"], "recipes": recipes}
    (tmp_path / "compare.json").write_text(json.dumps(plan))
    assert ("weight_decay", "0.0001 (bp); 0.03, 0.0001 (pfa)") in report.config_rows(read(tmp_path))


def test_description_says_what_was_found(tmp_path):
    text = report.describe(read(write_compare(tmp_path / "out", ["bp", "fa", "pfa"], [0])))
    assert text.startswith("3 rules trained mlp-512-512 on mnist for 5 epochs, with 1 seed.")
    assert "the best of the others, Product feedback alignment," in text
    assert "Feedback alignment was lowest with" in text
    assert "90° is chance" in text
    assert "to 1.22 (Product feedback alignment) times as long" in text
    assert "With 1 finished seed for each rule, small differences may be chance." in text


@pytest.mark.usefixtures("undrawn_here")
def test_single_run_folder(tmp_path):
    write_run(tmp_path / "run", "pfa", 4)
    text = Page(report.write(tmp_path / "run").read_text(encoding="utf-8")).text
    assert "pfa, seed 4: mlp-512-512 on mnist" in text
    assert "apical train --rule pfa" in text


def test_run_that_has_recorded_nothing_yet(tmp_path):
    (tmp_path / "runs" / "fa" / "seed-0").mkdir(parents=True)
    text = Page(report.write(tmp_path).read_text(encoding="utf-8")).text
    assert "fa, seed 0: not started" in text
    assert "No run has finished" in text
    assert "nothing to draw" in text


def test_repeated_epoch_of_a_resumed_run_counts_once(tmp_path):
    write_run(tmp_path / "run", "fa", 0, epochs=2)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record("fa", 2, random.Random(9)) | {"test_accuracy": 0.5}) + "\n")
    run = read(tmp_path / "run").runs[0]
    assert run.epochs == (0, 1, 2)
    assert run.curve("test_accuracy")[-1] == 0.5


def test_same_runs_give_the_same_bytes(written):
    files = [written / "report.html", *sorted((written / "figures").iterdir())]
    first = [file.read_bytes() for file in files]
    report.write(written)
    assert [file.read_bytes() for file in files] == first


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("compare.json", "{", r"compare\.json is damaged"),
        ("compare.json", "[1]", r"compare\.json does not contain a JSON object"),
        ("runs/bp/seed-0/config.json", "nonsense", r"config\.json is damaged"),
        ("runs/bp/seed-0/result.json", '"x"', r"result\.json does not contain"),
        ("runs/bp/seed-0/metrics.jsonl", '{"epoch": 0\n{"epoch": 1}\n', r"metrics\.jsonl, line 1 is damaged"),
        ("runs/bp/seed-0/metrics.jsonl", '{"loss": 0}\n', r"metrics\.jsonl, line 1: no metrics record"),
        ("runs/bp/seed-0/metrics.jsonl", '{"epoch": 0, "test_accuracy": "a"}\n', "'test_accuracy' is not a number"),
        ("runs/bp/seed-0/metrics.jsonl", '{"epoch": 0, "layers": [1]}\n', "layer names"),
        ("runs/bp/seed-0/metrics.jsonl", b"\xff\xfe\n", r"metrics\.jsonl cannot be read"),
    ],
)
def test_damage_names_the_file_and_writes_nothing(tmp_path, file, content, message):
    folder = write_compare(tmp_path / "out", ["bp"], [0])
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message) as caught:
        report.write(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()
    assert not (folder / "figures").exists()


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a compare folder"):
        report.write(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match="contains no run folder"):
        report.write(tmp_path)


def test_unwritable_folder(tmp_path):
    folder = write_compare(tmp_path / "out", ["bp"], [0])
    (folder / "figures").write_text("a file where the folder should go")
    with pytest.raises(CheckpointError, match="cannot be written"):
        report.write(folder)
    assert not (folder / "report.html").exists()


def test_no_local_path_in_the_page(written, page):
    assert str(written) not in page.source


def test_options_of_learned_feedback_are_one_row_where_they_are_set(tmp_path):
    from apical.bench.recipe import Recipe

    plain = {key: value for key, value in Recipe().to_json().items() if key not in ("rule", "seed")}
    write_run(tmp_path / "runs/bp/seed-0", "bp", 0, recipe=plain)
    rows = dict(report.config_rows(read(tmp_path)))
    assert rows["loss"] == "cross_entropy"
    assert not {"feedback", "feedback_lr", "pretrain_epochs", "clip", "eps", "beta2"} & rows.keys()
    learned = {**plain, "feedback_lr": 1e-4, "pretrain_epochs": 10, "feedback_passes": 3, "clip": 1.0}
    write_run(tmp_path / "runs/fa/seed-0", "fa", 0, recipe=learned)
    rows = dict(report.config_rows(read(tmp_path)))
    assert rows["feedback"] == "none (bp); lr: 0.0001, pretrain epochs: 10, passes: 3 (fa)"
    assert rows["clip"] == "0.0 (bp); 1.0 (fa)"
    assert "eps" not in rows
