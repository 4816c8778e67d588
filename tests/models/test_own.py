"""Models of one's own: made with what they take, and refused in one line where they do not fit the data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apical import models
from apical.errors import ConfigError
from apical.models import own

FILE = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, in_features, num_classes=7, width=5):
        super().__init__(nn.Flatten(), nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, num_classes))

def by_shape(input_shape, outputs):
    channels, height, width = input_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, outputs))

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

made = plain()

def same():
    return made

def lazy(outputs):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(outputs))

def needs(width):
    return nn.Linear(width, 3)

def fails():
    raise ValueError("no such thing")

def number():
    return 3

def seeded():
    torch.manual_seed(7)
    return plain()
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


@pytest.mark.parametrize("name", ["Net", "by_shape", "plain"])
def test_arguments_are_filled_in_by_name(file: Path, name: str) -> None:
    model = models.build(f"mine.py:{name}", (1, 3, 4), 3)
    assert model(torch.zeros(2, 1, 3, 4)).shape == (2, 3)


def test_weights_follow_the_seed(file: Path) -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(models.build(f"{file}:Net", (1, 3, 4), 3).state_dict()["1.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_from_a_module() -> None:
    assert isinstance(models.build("torch.nn:Flatten", (3,), 3), nn.Flatten)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "needs",
            "needs an argument 'width'; give it a default, or pass a function that builds the model. These are filled in: ",
        ),
        ("fails", "cannot be built: ValueError: no such thing (line "),
        ("number", "returns a value of type int, not a torch.nn.Module"),
        ("seeded", "calls torch.manual_seed, so all seeds would start alike; remove the call"),
        ("made", "is an existing module"),
        ("Nett", "did you mean 'Net'?"),
    ],
)
def test_refused(file: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        models.build(f"mine.py:{name}", (1, 3, 4), 3)
    assert said in str(caught.value)


def test_the_same_module_twice_is_refused(file: Path) -> None:
    models.build("mine.py:same", (1, 3, 4), 3)
    with pytest.raises(ConfigError, match="returns the same module twice"):
        models.build("mine.py:same", (1, 3, 4), 3)


def test_unknown_names_say_how_to_name_ones_own() -> None:
    with pytest.raises(ConfigError, match=r"or your own: FILE\.py:CLASS_OR_FUNCTION"):
        models.build("nett", (3,), 3)


class Scalar(nn.Module):
    """(N, ...) -> (N,)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1)


class Pair(nn.Module):
    """Two outputs."""

    def forward(self, x: Tensor) -> Any:
        return x, x


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Linear(4, 5), "maps inputs (2, 4) to (2, 5), but points needs (2, 3): 3 outputs for each sample"),
        (Scalar, "maps inputs (2, 4) to (2,), but points needs (2, 3)"),
        (Pair, "it returns a tuple: wrap it in a module whose forward returns only the outputs"),
        (lambda: nn.Linear(6, 3), "does not accept inputs of shape (2, 4), 2 samples of points: RuntimeError"),
    ],
)
def test_the_output_must_fit(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        own.check_output(make(), "mine.py:Net", torch.zeros(2, 4), 3, "points")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_check_changes_nothing_but_lazy_layers(file: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    own.check_output(model, "Net", torch.randn(2, 4, generator=torch.Generator()), 3, "points")
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lazy = models.build("mine.py:lazy", (1, 3, 4), 3)
    own.check_output(lazy, "Net", torch.zeros(2, 1, 3, 4), 3, "points")
    assert lazy.get_submodule("1").weight.shape == (3, 12)
