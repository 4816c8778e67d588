"""Models of Hugging Face's `transformers`, small: a rule is what it says on them, and their Trainer trains with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apical
from apical.losses import token_cross_entropy
from apical.testing import check_model

transformers = pytest.importorskip("transformers", reason="transformers is no requirement")

ATTENTION = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RULES = [
    apical.FeedbackAlignment,
    apical.SignSymmetry,
    apical.KolenPollack,
    apical.ProductFeedbackAlignment,
    apical.DirectFeedbackAlignment,
]


class Logits(nn.Module):
    """The model's output of scores alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.net(inputs).logits
        return scores


def bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=30, hidden_size=16, num_labels=3, **ATTENTION, **STILL)
    net: nn.Module = transformers.BertForSequenceClassification(config)
    return net


def llama() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=30, hidden_size=16, num_key_value_heads=1, **ATTENTION)
    net: nn.Module = transformers.LlamaForCausalLM(config)
    return net


def gpt2() -> nn.Module:
    """With `nn.Linear` in the place of its layers that store the transpose, as the documentation says."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, **off)
    net: nn.Module = transformers.GPT2LMHeadModel(config)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Conv1D":
                linear = nn.Linear(*child.weight.shape)  # type: ignore[misc,arg-type]
                linear.load_state_dict({"weight": child.weight.T, "bias": child.bias})  # type: ignore[union-attr,operator]
                setattr(module, name, linear)
    return net


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    net: nn.Module = transformers.ResNetForImageClassification(config)
    return net


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [bert, llama, gpt2, resnet])
def test_promises_on_their_models(make: Any, rule: Any) -> None:
    torch.manual_seed(0)
    model = Logits(make()).double()
    words, images = torch.randint(0, 30, (4, 7)), torch.randn(4, 3, 32, 32).double()
    if make in (llama, gpt2):
        report = check_model(rule(model, loss=token_cross_entropy), words, words.roll(-1, 1), skip=("compiled",))
    else:
        report = check_model(rule(model), images if make is resnet else words, torch.arange(4) % 3, skip=("compiled",))
    assert {"gradients", "placement", "scaled loss"} <= report.passed.keys()


def test_layers_that_store_the_transpose_are_refused() -> None:
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(apical.errors.UnsupportedModelError, match="Conv1D"):
        apical.FeedbackAlignment(transformers.GPT2LMHeadModel(config))


@pytest.mark.parametrize("rule", RULES)
def test_their_trainer(rule: Any, tmp_path: Path) -> None:
    """It accumulates over two batches and clips; ten epochs learn three classes that lie apart."""
    pytest.importorskip("accelerate", reason="their Trainer needs accelerate")

    class Taught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rule = rule(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)))

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            credit = self.rule(inputs, labels)
            return {"loss": credit.loss, "logits": credit.output.detach()}

    torch.manual_seed(0)
    labels = torch.arange(96) % 3
    inputs = torch.randn(96, 8) + 3 * torch.eye(8)[labels]
    samples = [{"inputs": x, "labels": int(y)} for x, y in zip(inputs, labels, strict=True)]
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10_000}
    options = {"num_train_epochs": 10, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-2, weight_decay=0.01, use_cpu=True, **options, **quiet
    )
    taught = Taught()
    transformers.Trainer(model=taught, args=arguments, train_dataset=samples).train()
    model = taught.rule.detach().eval()
    assert (model(inputs).argmax(1) == labels).float().mean() > 0.9
