"""Small versions of typical models: on each, every rule trains as documented or refuses the model (:func:`outcome`)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import CreditRule, Loss
from apical.errors import ConfigError, UnsupportedModelError
from apical.testing.model import ModelReport, check_model

from . import images, packed, sequences


@dataclass(frozen=True)
class Specimen:
    """One model and how to feed it.

    Attributes:
        inputs: makes a batch (batch, ...) from a generator.
        loss: maps (output, targets) to a scalar batch mean.
    """

    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    targets: Callable[[torch.Generator], Tensor]
    loss: Loss = field(default=F.cross_entropy)


@dataclass(frozen=True)
class Outcome:
    """Outcome of one rule on one model.

    Attributes:
        trained: every check of :func:`apical.testing.check_model` that applies passed.
        refused: why the rule refuses the model, if it does.
        fault: the fault that was found, if any.
    """

    trained: bool
    checks: tuple[str, ...] = ()
    refused: str = ""
    fault: str = ""


def per_token(output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (batch, length, classes)."""
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def of_dictionary(output: Any, targets: Tensor) -> Tensor:
    """Cross-entropy of `output["logits"]`."""
    return F.cross_entropy(output["logits"], targets)


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(6, *shape, dtype=torch.double, generator=generator)


def _classes(number: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(number, (6, *shape), generator=generator)


ZOO: dict[str, Specimen] = {
    "perceptron": Specimen("perceptron of ReLU", sequences.perceptron, _normal(6), _classes(4)),
    "tanh": Specimen("perceptron of tanh", partial(sequences.perceptron, nn.Tanh), _normal(6), _classes(4)),
    "lenet": Specimen("LeNet with average pooling", images.lenet, _normal(1, 8, 8), _classes(10)),
    "mnist-example": Specimen(
        "PyTorch's basic MNIST example", images.MnistExample, _normal(1, 12, 12), _classes(10), F.nll_loss
    ),
    "vgg": Specimen("VGG", images.Vgg, _normal(3, 8, 8), _classes(10)),
    "preact-resnet": Specimen("pre-activation ResNet", images.PreActivationResNet, _normal(3, 8, 8), _classes(10)),
    "densenet": Specimen("DenseNet", images.DenseNet, _normal(3, 8, 8), _classes(10)),
    "mobilenet": Specimen("MobileNet", images.MobileNet, _normal(3, 8, 8), _classes(10)),
    "senet": Specimen("SENet", images.SeNet, _normal(3, 8, 8), _classes(10)),
    "unet": Specimen("UNet", images.UNet, _normal(1, 8, 8), _classes(3, 8, 8)),
    "gpt": Specimen("hand-written GPT", sequences.Gpt, _classes(11, 5), _classes(11, 5), per_token),
    "vit": Specimen("vision transformer", sequences.Vit, _normal(3, 8, 8), _classes(10)),
    "rnn": Specimen("hand-written RNN, three lengths", sequences.Rnn, _normal(6, 5), _classes(4)),
    "attention": Specimen("nn.MultiheadAttention, self and cross", packed.Attends, _normal(6, 5), _classes(4)),
    "encoder": Specimen("nn.TransformerEncoder", packed.Encoder, _classes(11, 5), _classes(11, 5), per_token),
    "lstm": Specimen("nn.LSTM of two layers", packed.Recurrent, _normal(6, 5), _classes(4)),
    "gru": Specimen("nn.GRU", partial(packed.Recurrent, nn.GRU, 1), _normal(6, 5), _classes(4)),
    "tied": Specimen("tied embedding and head, a GRU cell", packed.Tied, _classes(11, 5), _classes(11, 5), per_token),
    "masked": Specimen("masked and standardised layers", sequences.MaskedAndStandardised, _normal(6), _classes(4)),
    "shared": Specimen("a layer used three times", sequences.Shared, _normal(6), _classes(4)),
    "frozen": Specimen("a frozen layer", sequences.frozen, _normal(6), _classes(4)),
    "weight-norm": Specimen("weight norm", sequences.weight_normed, _normal(6), _classes(4)),
    "dict": Specimen("an output in a dictionary", sequences.DictOutput, _normal(6), _classes(4), of_dictionary),
    "stochastic-depth": Specimen("stochastic depth", sequences.StochasticDepth, _normal(6), _classes(4)),
    "experts": Specimen("mixture of experts", sequences.MixtureOfExperts, _normal(6), _classes(4)),
}
"""Specimens by short name."""


def outcome(factory: Callable[..., CreditRule], specimen: Specimen, skip: tuple[str, ...] = ()) -> Outcome:
    """Build the rule for a new model, in double precision, and check it."""
    torch.manual_seed(0)
    model = specimen.make().double()
    generator = torch.Generator().manual_seed(1)
    inputs, targets = specimen.inputs(generator), specimen.targets(generator)
    try:
        report: ModelReport = check_model(factory(model, specimen.loss), inputs, targets, skip=skip)
    except (UnsupportedModelError, ConfigError) as error:
        return Outcome(False, refused=" ".join(str(error).split()))
    except Exception as error:
        return Outcome(False, fault=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return Outcome(True, tuple(report.passed))
