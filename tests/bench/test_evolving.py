"""An evolution in its folder: kept, continued after anything with the same result, refused where it must be, reported."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import Command

from apical.bench import run_folder
from apical.bench.evolve.loop import Evolution, EvolutionFolder, classification, strategy
from apical.bench.evolve.recipe import ADDED, EvolutionRecipe
from apical.bench.state import write_state
from apical.cli.main import main
from apical.errors import CheckpointError, ConfigError
from apical.evolution.workers import Here
from apical.rules.top_down.teacher import load
from apical.rules.top_down.top_down_credit_assignment import shipped
from apical_papers.tdca.recipes import EVOLUTIONS

pytest.importorskip("evotorch")
pytestmark = pytest.mark.usefixtures("undrawn")
Start = Callable[..., Command]
SMALL = ("--model", "mlp-tanh-6", "--population", "8", "--hidden", "4", "--steps", "4", "--examples", "30", "--sites", "2")


def evolve(out: Path, *more: str) -> int:
    return main(["evolve", *SMALL, "--out", str(out), *more])


def weights(path: Path) -> dict[str, Any]:
    return load(path / "teacher.pt")[0].state_dict()


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evolution") / "whole"
    assert evolve(out, "--generations", "6") == 0
    return out


def test_the_authors_regime_at_another_size(tmp_path: Path) -> None:
    """Their residual learner and credit, on fewer and smaller lifetimes."""
    size = ["--data", "digits", "--model", "mlp-residual-6-6-6", "--examples", "30", "--steps", "2", "--population", "4"]
    assert main(["evolve", "--recipe", "mnist-residual", *size, "--generations", "1", "--out", str(tmp_path)]) == 0
    network = load(tmp_path / "teacher.pt")[0]
    assert list(network.widths) == [6] * 5  # a credit for each activation, two in a block
    assert (network.credit, network.relative) == ("probabilities", False)
    authors = {"steps": 150, "lr": 0.01, "population": 800, "examples": 0, "starts": "fixed", "generations": 2000}
    assert asdict(EVOLUTIONS["mnist-residual"]).items() >= authors.items()


def test_it_writes_teachers_with_their_provenance(whole: Path) -> None:
    network, provenance = load(whole / "teacher.pt")
    assert (network.outputs, network.widths, network.sites) == (10, (6,), 2)
    assert provenance["recipe"]["generations"] == 6
    assert provenance["command"].startswith("apical evolve")
    assert provenance["environment"]["torch"] == torch.__version__
    assert load(whole / "best.pt")[1]["which"] == "fittest of the last generation"
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["best"] >= line["mean"] for line in lines)
    page = (whole / "report.html").read_text()
    assert "6 of 6 generations" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "")


def test_its_report_can_be_written_again(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = shutil.copytree(whole, tmp_path / "copy")
    (copied / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(copied)]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    assert "Fitness over generations" in (copied / "report.html").read_text(encoding="utf-8")


def test_stopped_and_resumed_it_ends_as_if_never_stopped(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    assert evolve(out, "--generations", "2") == 0
    assert evolve(out, "--generations", "6", "--resume") == 0
    assert same(out, whole)


def test_the_seed_matters(whole: Path, tmp_path: Path) -> None:
    assert evolve(tmp_path / "again", "--generations", "6") == 0
    assert same(tmp_path / "again", whole)
    assert evolve(tmp_path / "other", "--generations", "6", "--seed", "1") == 0
    assert not same(tmp_path / "other", whole)


def begun(apical: Start, out: Path, generations: int) -> Command:
    """An evolution that has two generations behind it."""
    process = apical("evolve", *SMALL, "--out", out, "--generations", generations)
    for _ in range(1200):
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= 2:
            return process
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it did not start")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_it_resumes_with_the_same_result(apical: Start, tmp_path: Path, how: signal.Signals) -> None:
    process = begun(apical, tmp_path / "cut", 4000)
    os.kill(process.pid, how)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    done = len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines())
    assert how == signal.SIGKILL or f"stopped at generation {done}; saved. Continue with: apical evolve" in said
    total = str(done + 3)
    assert evolve(tmp_path / "cut", "--generations", total, "--resume") == 0
    assert evolve(tmp_path / "whole", "--generations", total) == 0
    assert same(tmp_path / "cut", tmp_path / "whole")
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["generation"] for line in lines] == list(range(1, done + 4))


def test_an_evolution_begins_with_a_teacher(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ["--begin", str(whole / "teacher.pt"), "--sigma", "1e-9", "--generations", "1"]  # hardly moves
    assert evolve(tmp_path / "on", *first) == 0
    for name, weight in weights(tmp_path / "on").items():
        assert torch.allclose(weight, weights(whole)[name], atol=1e-6)
    assert load(tmp_path / "on" / "teacher.pt")[1]["recipe"]["begin"] == str(whole / "teacher.pt")
    capsys.readouterr()
    assert evolve(tmp_path / "other", *first, "--sites", "3", "--relative", "False", "--credit", "probabilities") == 2
    said = capsys.readouterr().err
    assert "cannot start from" in said
    assert "emissions: [2] vs [3]; relative: True vs False; credit: logits vs probabilities" in said
    assert not (tmp_path / "other").exists()


def test_the_teacher_is_the_average_of_the_centres(tmp_path: Path) -> None:
    """Weighted by k (k+1) (k+2) for generation k, up to a factor."""
    recipe = EvolutionRecipe(model=("mlp-tanh-6",), population=8, hidden=4, steps=4, examples=30, sites=2, generations=4)
    evolution, centres = Evolution(classification(recipe), strategy(recipe), Here(33)), []
    for _ in range(4):
        evolution.step()
        centres.append(evolution.search.center.clone())
    shares = [k * (k + 1) * (k + 2) for k in (1, 2, 3, 4)]
    expected = sum(share * centre for share, centre in zip(shares, centres, strict=True)) / sum(shares)
    assert (evolution.average - expected).abs().max() < 1e-6
    assert (evolution.average - centres[-1]).abs().max() > 1e-4
    assert evolve(tmp_path / "out", "--generations", "4") == 0
    assert load(tmp_path / "out" / "teacher.pt")[1]["which"].startswith("average")
    written = torch.cat([weight.flatten() for weight in weights(tmp_path / "out").values()])
    assert (written - expected).abs().max() < 1e-6


def test_learners_of_several_depths_get_one_teacher_that_serves_them_all() -> None:
    recipe = EvolutionRecipe(model=("mlp-tanh-6", "mlp-5-4-3"), hidden=4, sites=2, examples=20, steps=2, population=4)
    task = classification(recipe)
    network = task.network(0)
    assert (network.widths, network.shallower) == ((5, 4, 3), True)
    individuals = task.start + 0.3 * torch.randn(3, task.start.numel(), generator=torch.Generator().manual_seed(0))
    deep, shallow = task.fitness(individuals, 1), task.fitness(individuals, 0)
    top = classification(replace(recipe, model=("mlp-tanh-6",)))
    last = slice(-(10 + 2) * 4, None)  # rows of the topmost layer that one hidden layer and the outputs take
    alone = torch.cat([individuals[:, : top.start.numel() - 12 * 4], individuals[:, last]], 1)
    assert torch.allclose(shallow, top.fitness(alone, 0), atol=1e-6)
    assert not torch.allclose(deep, shallow)


def test_evolution_may_start_from_a_teacher_wired_by_hand() -> None:
    recipe = EvolutionRecipe(model=("mlp-tanh-6",), hidden=12, sites=2, begin="wired", examples=60, steps=40, lr=0.05)
    task = classification(recipe)
    unwired = classification(replace(recipe, begin=""))
    both = torch.stack([task.start, unwired.start])
    wired, random = task.fitness(both, 0).tolist()
    assert wired > random + 0.5  # nats; nothing has been evolved yet
    with pytest.raises(ConfigError, match="hand-wired"):
        classification(replace(recipe, hidden=9))


@pytest.mark.parametrize("held_out", [False, True])
def test_fitness_may_be_the_mean_over_the_last_steps(held_out: bool) -> None:
    """Full batches: the loss after k steps is that of a lifetime of k steps, judged at its end alone."""
    recipe = EvolutionRecipe(model=("mlp-5",), hidden=12, begin="wired", examples=20, steps=6, lr=0.1, held_out=held_out)
    task = classification(replace(recipe, settled=3))
    individuals = torch.stack([task.start, -task.start])
    ends = [classification(replace(recipe, steps=steps)).fitness(individuals, 2) for steps in (4, 5, 6)]
    assert not torch.allclose(ends[0], ends[2], rtol=1e-3)
    torch.testing.assert_close(task.fitness(individuals, 2), sum(ends) / 3, rtol=1e-5, atol=1e-6)
    for wrong in (0, 7):
        with pytest.raises(ConfigError, match="settled"):
            classification(replace(recipe, settled=wrong))


def test_tasks_take_networks_in_turn() -> None:
    asked = {"hidden": 4, "sites": 2, "examples": 20, "steps": 2}
    names = ("mlp-tanh-6", "mlp-5", "mlp-tanh-3")
    both = classification(EvolutionRecipe(model=names, **asked))
    alone = [classification(EvolutionRecipe(model=(name,), **asked)) for name in names]
    individuals = both.start + 0.3 * torch.randn(3, both.start.numel(), generator=torch.Generator().manual_seed(0))
    for generation in range(4):
        found = both.fitness(individuals, generation)
        for turn, task in enumerate(alone):
            assert torch.equal(found, task.fitness(individuals, generation)) == (turn == generation % 3)


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX")
def test_two_evolutions_cannot_share_a_folder(
    apical: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE", 0.2)
    out = tmp_path / "shared"
    process = begun(apical, out, 4000)
    try:
        for flag in ("--resume", "--overwrite"):
            assert evolve(out, "--generations", "4000", flag) == 2
            captured = capsys.readouterr().err
            assert f"another process is evolving in {out}; choose another --out" in captured
            assert len(captured.strip().splitlines()) == 1
        assert process.poll() is None  # the first goes on undisturbed
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == list(range(1, len(lines) + 1))
    assert evolve(out, "--generations", "2", "--overwrite") == 0  # the lock ended with its holder


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--generations", "6"), "is not empty; add --resume"),
        (("--generations", "6", "--resume", "--lr", "0.5"), "other options (saved vs given): lr: 0.02 vs 0.5"),
        (("--generations", "3", "--resume"), "has 6 finished generations, more than --generations 3"),
    ],
)
def test_what_does_not_fit_the_folder_is_said(
    whole: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert evolve(whole, *more) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--population", "7"), "population must be even"),
        (("--ways", "11"), "2 to 10 classes"),
        (("--examples", "99999"), "has 1437 of these classes; use fewer (--examples)"),
        (("--data", "nothing"), "unknown data set 'nothing'"),
        (("--model", "mlp"), "does not give its hidden widths"),
        (("--recipe", "digit"), "did you mean 'digits'"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--data", "student-teacher"), "numeric targets"),
        (("--batch-size", "31"), "batches of 31 from 30 examples"),
    ],
)
def test_unusable_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert evolve(tmp_path / "out", "--generations", "1", *more) == 2
    captured = capsys.readouterr().err
    assert said in captured
    assert len(captured.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_evolution_that_diverges_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evolve(tmp_path / "out", "--generations", "2", "--sigma", "1e30") == 2
    assert "the evolution diverged in generation 1" in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_a_damaged_checkpoint_is_said(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "damaged"
    assert evolve(out, "--generations", "1") == 0
    (out / "checkpoint.pt").write_bytes(b"nonsense")
    assert evolve(out, "--generations", "2", "--resume") == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_teacher_from_a_file_trains_another_width(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "digits", "--train-limit", "96", "--epochs", "1", "--device", "cpu", "--out"]
    teacher = ["--teacher", str(whole / "teacher.pt")]
    assert main(["train", "--rule", "tdca", "--model", "mlp-tanh-12", *teacher, *options, str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert f"teacher='{whole / 'teacher.pt'}'" in config["rule_options"]
    compared = ["compare", "--rules", "bp", "tdca", "--model", "mlp-tanh-9", "--seeds", "1", *teacher, *options]
    assert main([*compared, str(tmp_path / "both")]) == 0
    assert {row["rule"] for row in json.loads((tmp_path / "both" / "summary.json").read_text())} == {"bp", "tdca"}
    capsys.readouterr()
    assert main(["train", "--rule", "tdca", "--model", "mlp-tanh-8-8", *teacher, *options, str(tmp_path / "deep")]) == 2
    assert "cannot teach a learner with hidden widths [8, 8]" in capsys.readouterr().err
    assert main(["train", "--rule", "fa", *teacher, *options, str(tmp_path / "fa")]) == 2
    assert "none of the rules fa has a teacher" in capsys.readouterr().err
    assert main(["train", "--rule", "tdca", "--teacher", "no.pt", *options, str(tmp_path / "none")]) == 2
    assert "there is no teacher file no.pt" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["mlp-256-256", "mlp-tanh-64-64"])
def test_the_shipped_teacher_trains_digits_at_once(tmp_path: Path, model: str) -> None:
    """On the model that `apical compare` takes by default, and on another activation and width; unevolved it fails."""
    options = ["--data", "digits", "--model", model, "--epochs", "6", "--device", "cpu", "--probe", "0"]
    accuracy, loss = {}, {}
    for rule in ("tdca", "tdca-unevolved"):
        ended = main(["train", "--rule", rule, *options, "--out", str(tmp_path / rule)])
        assert ended == 0 or rule == "tdca-unevolved"  # that one may diverge
        lines = [json.loads(line) for line in (tmp_path / rule / "metrics.jsonl").read_text().splitlines()]
        accuracy[rule], loss[rule] = lines[-1]["test_accuracy"], [line["train_loss"] for line in lines[1:]]
    assert accuracy["tdca"] > 0.8
    assert accuracy["tdca"] > accuracy["tdca-unevolved"] + 0.2
    assert loss["tdca"][-1] < 0.5 * loss["tdca"][0]


def test_the_shipped_teacher_was_made_by_the_committed_recipe() -> None:
    assert {**ADDED, **load(shipped("digits"))[1]["recipe"]} == EVOLUTIONS["digits"].to_json()


def test_an_evolution_from_before_an_option_was_added_may_be_continued(tmp_path: Path) -> None:
    folder, recipe = EvolutionFolder(tmp_path), EvolutionRecipe()
    saved = {name: value for name, value in recipe.to_json().items() if name not in ADDED}
    write_state(folder.config, saved)
    assert not folder.check(recipe, resume=True, overwrite=False)  # nothing to object to, and no checkpoint yet
    with pytest.raises(CheckpointError, match="settled: 1 vs 2"):
        folder.check(replace(recipe, settled=2), resume=True, overwrite=False)
