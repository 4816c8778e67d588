"""A rule whose feedback weights can learn apart, small enough to follow by hand, and its training on two ranks."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical import data
from apical.bench.distributed import World
from apical.bench.loop import Training
from apical.bench.recipe import Recipe
from apical.bench.run_folder import RunFolder
from apical.bench.signals import StopSignals
from apical.core.credit import Credit, CreditRule, Loss
from apical.data import Dataset
from apical.errors import InstabilityError


class NoisyMirror(CreditRule):
    """Backprop forward; the feedback Q (10, 10) descends `0.5 |Q - noise - mean output|^2`.

    Attributes:
        seen: phase of every call.
        unstable_at: number of the call that fails; 0 for none.
    """

    two_phase = True

    def __init__(self, model: nn.Module, loss: Loss = F.cross_entropy) -> None:
        super().__init__(model, loss)
        self.q = nn.Parameter(torch.zeros(10, 10))
        self.seen: list[str] = []
        self.unstable_at = 0

    def feedback_parameters(self) -> list[nn.Parameter]:
        return [self.q]

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        self.seen.append(self.phase)
        if len(self.seen) == self.unstable_at:
            raise InstabilityError("the loop gain is too high: raise alpha above 0.5")
        output = self.model(inputs)
        loss, roots, logs = self.loss(output, targets), [], {"q": self.q.detach().norm()}
        if self.phase != "feedback":
            roots.append(loss)
            logs["twice"] = 2 * loss.detach()
        if self.phase != "forward":
            noise = torch.randn(10, 10)
            roots.append(0.5 * (self.q - noise - output.detach().mean(0)).square().sum())
        return Credit(roots, [None] * len(roots), output.detach(), loss.detach(), logs)


def make_rule(recipe: Recipe, model: nn.Module, input_shape: tuple[int, ...]) -> NoisyMirror:
    return NoisyMirror(model)


RECIPE = Recipe(
    rule="noisy-mirror",
    model="mlp-16",
    epochs=2,
    batch_size=32,
    train_limit=160,
    weight_decay=(1e-3,),
    probe=32,
    device="cpu",
    pretrain_epochs=2,
    feedback_passes=3,
    feedback_lr=0.03,
    pretrain_lr=0.1,
    feedback_weight_decay=0.01,
)


def begin(
    recipe: Recipe,
    dataset: Dataset,
    path: Path,
    *,
    resume: bool = False,
    stop: StopSignals | None = None,
    world: World | None = None,
) -> Training:
    training = Training(recipe, dataset, make_rule, RunFolder(path), world or World(0, 1, torch.device("cpu")), stop)
    training.start(resume=resume, command="test", notes=[], environment={"commit": None})
    return training


def small_digits() -> Dataset:
    return data.load("digits", train_limit=160)


def train_on(rank: int, folder: str) -> None:
    """All epochs, on rank `rank` of two."""
    training = begin(RECIPE, small_digits(), Path(folder), world=World(rank, 2, torch.device("cpu")))
    for _ in range(RECIPE.epochs):
        training.train_epoch()
