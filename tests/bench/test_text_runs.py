"""Training on sequences: nats instead of accuracies, groups of the optimiser, warm-up, and what a report shows."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apical.bench.distributed import World
from apical.bench.loop import Training
from apical.bench.materials import load_data, model_for
from apical.bench.names import make_rule, resolve
from apical.bench.optimizer import make_optimizer, set_rate
from apical.bench.recipe import Recipe
from apical.bench.report import folder as report
from apical.bench.report.records import read
from apical.bench.run_folder import RunFolder, write_json
from apical.cli.main import main
from apical.data import Split
from apical.errors import ConfigError
from apical.losses import token_cross_entropy
from apical.rules.backprop import Backprop

pytestmark = pytest.mark.usefixtures("undrawn")
GPT = """
import torch
from torch import nn

class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd=8):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.c_attn, self.lm_head = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        q, k, v = self.c_attn(x).chunk(3, -1)
        return self.lm_head(x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
"""
TEXT = Recipe(
    data="text-python",
    model="gpt-1x8",
    context=8,
    epochs=2,
    epoch_steps=3,
    batch_size=4,
    train_limit=200,
    test_limit=20,
    loss="token_cross_entropy",
    probe=4,
    lr=(0.05,),
    weight_decay=(0.0,),
    device="cpu",
)


@pytest.fixture
def begin() -> Callable[..., Training]:
    def make(recipe: Recipe, path: Path, resume: bool = False) -> Training:
        dataset = load_data(recipe)
        resolved, notes = resolve(recipe, len(dataset.train))
        training = Training(resolved, dataset, make_rule, RunFolder(path), World(0, 1, torch.device("cpu")))
        training.start(resume=resume, command="test", notes=notes, environment={"commit": None})
        return training

    return make


def nats(model: torch.nn.Module, split: Split) -> float:
    with torch.no_grad():
        return float(token_cross_entropy(model(split.inputs), split.targets))


def test_a_text_is_judged_by_nats(begin: Callable[..., Training], tmp_path: Path) -> None:
    for rule in ("bp", "fa"):
        training = begin(replace(TEXT, rule=rule), tmp_path / "runs" / rule / "seed-0")
        assert training.steps_per_epoch == 3
        for _ in range(2):
            training.train_epoch()
        result = training.result()
        write_json(training.folder.result, result)
        assert result["test_accuracy"] is None
        assert result["test_loss"] == pytest.approx(nats(training.rule.model, training.dataset.test), rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(result["test_loss"]))
        assert result["bits_per_token"] == pytest.approx(result["test_loss"] / math.log(2))
        written = json.loads((training.folder.path / "sample.json").read_text())
        assert (len(written["begun"]), len(written["drawn"])) == (8, 300)
    comparison = read(tmp_path)
    assert comparison.score.label == "test loss (nats per token)"
    page = report.write(tmp_path).read_text()
    for words in ("Perplexity", "Bits per token", "Generated text", "Test loss,&nbsp;nats"):
        assert words in page
    assert "accuracy" not in page.lower()


def test_a_task_is_judged_by_right_answers(begin: Callable[..., Training], tmp_path: Path) -> None:
    training = begin(replace(TEXT, data="copy", model="gru-8", context=6), tmp_path)
    line = training.train_epoch()
    test = training.dataset.test
    asked = test.targets >= 0
    with torch.no_grad():
        right = training.rule.model(test.inputs).argmax(-1)[asked] == test.targets[asked]
    assert line["test_accuracy"] == pytest.approx(float(right.double().mean()))
    assert line["test_loss"] == pytest.approx(nats(training.rule.model, test), rel=1e-5)
    assert 0 <= line["train_accuracy"] <= 1
    assert not (tmp_path / "sample.json").exists()


def test_a_stopped_run_goes_on_bit_for_bit(begin: Callable[..., Training], tmp_path: Path) -> None:
    recipe = replace(
        TEXT, optimizer="adamw", decay_on="matrices", weight_decay=(0.1,), lr_warmup=4, lr_cosine=2, lr_final=0.1
    )
    whole = begin(recipe, tmp_path / "whole")
    lines = [whole.train_epoch() for _ in range(2)]
    first = begin(recipe, tmp_path / "parts")
    first.train_epoch()
    first.folder.unlock()
    second = begin(recipe, tmp_path / "parts", resume=True)
    assert second.train_epoch()["test_loss"] == lines[1]["test_loss"]
    for a, b in zip(whole.rule.parameters(), second.rule.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_matrices_decay() -> None:
    recipe = replace(TEXT, optimizer="adamw", decay_on="matrices", weight_decay=(0.5,))
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    optimizer = make_optimizer(recipe, Backprop(model))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: decays[id(parameter)] for name, parameter in model.named_parameters()}
    assert named == {"0.weight": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.5, "2.bias": 0.0}


def test_the_rate_rises_and_falls_with_steps() -> None:
    recipe = replace(TEXT, lr=(1.0,), lr_warmup=4, lr_cosine=2, lr_final=0.1)
    optimizer, seen = make_optimizer(recipe, Backprop(torch.nn.Linear(2, 2))), []
    for step in range(20):
        set_rate(optimizer, recipe, step, 10)
        seen.append(optimizer.param_groups[0]["lr"])
    by_hand = [min(1, (t + 1) / 4) * (0.1 + 0.45 * (1 + math.cos(math.pi * t / 20))) for t in range(20)]
    assert seen == pytest.approx(by_hand)


def test_hashes_of_older_recipes_stay() -> None:
    assert Recipe().hash() == replace(Recipe(), context=64).hash()
    assert Recipe().hash() != replace(Recipe(), context=65).hash()
    assert Recipe(decay_on="matrices").hash() != Recipe().hash()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "cross_entropy"}, "add --loss token_cross_entropy"),
        ({"data": "digits", "model": "mlp-8"}, "drop --loss token_cross_entropy"),
        ({"lr_final": 0.1}, "--lr-final is where --lr-cosine ends"),
        ({"tokens": "words"}, "--tokens"),
    ],
)
def test_what_does_not_go_together(
    options: dict[str, Any], said: str, begin: Callable[..., Training], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        begin(replace(TEXT, **options), tmp_path)


def test_an_own_gpt_on_an_own_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt.py").write_text(GPT)
    Path("story.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 30)
    arguments = ["--data", "story.txt", "--context", "12", "--epochs", "1", "--seeds", "1", "--jobs", "1", "--probe", "4"]
    assert main(["compare", "--model", "gpt.py:GPT", "--rules", "bp", "fa", *arguments, "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert "the loss is token_cross_entropy" in said
    assert "perplexity" in said
    config = json.loads(Path("out/runs/fa/seed-0/config.json").read_text())
    assert len(config["data_sha256"]) == 16
    assert "Generated text" in Path("out/report.html").read_text()


def test_a_gpt_that_says_one_position_is_told_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("last.py").write_text(GPT.replace("return self", "x = x[:, -1:]; q = q[:, -1:]; return self"))
    with pytest.raises(ConfigError, match=r"needs \(2, 8, 96\): 96 outputs for each token, at every position"):
        model_for(f"{tmp_path}/last.py:GPT", load_data(TEXT))
