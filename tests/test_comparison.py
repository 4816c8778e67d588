"""`apical.compare`: the comparison of the command line from Python, with data, models and rules in memory."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import apical
from apical.errors import ApicalError
from apical.models import own

pytestmark = pytest.mark.usefixtures("undrawn")
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16, "probe": 0, "device": "cpu", "show": False}
Y = torch.arange(90) % 3
X = torch.randn(90, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)[Y]
PAIR = (TensorDataset(X[:60], Y[:60]), TensorDataset(X[60:], Y[60:]))


class Net(nn.Module):
    """Two layers."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(in_features, 8), nn.ReLU(), nn.Linear(8, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return result


class Other(Net):
    """The same, by another class."""


class Mine(apical.FeedbackAlignment):
    """A rule in memory."""


def test_objects_in_memory(tmp_path: Path) -> None:
    done = apical.compare(rules=["bp", Mine], data=PAIR, model=Net, seeds=2, out=tmp_path / "out", lr=0.1, **QUICK)
    assert [row.rule for row in done] == ["bp", "Mine"]
    assert done.metric == "test accuracy"
    assert done.report == tmp_path / "out" / "report.html"
    assert done.report.exists()
    row = done["bp"]
    assert row.n == len(row.values) == 2
    assert row.mean == pytest.approx(sum(row.values) / 2)
    assert row.spread == pytest.approx(abs(row.values[0] - row.values[1]) / 2**0.5)
    assert row.values == tuple(record["test_accuracy"] for record in done.records if record["rule"] == "bp")
    assert "Mine" in str(done)
    page = done.report.read_text()
    assert "in-memory:Net" in page
    with pytest.raises(KeyError):
        done["fa"]


def test_resumed_with_the_same_objects_only(tmp_path: Path) -> None:
    def compare(epochs: int, data: Any, model: Any) -> apical.comparison.Compared:
        settings = {**QUICK, "epochs": epochs}
        return apical.compare(rules=["bp"], data=data, model=model, seeds=1, out=tmp_path, resume=epochs > 1, **settings)

    compare(1, PAIR, Net)
    assert compare(2, PAIR, Net).records[0]["epochs"] == 2
    with pytest.raises(ApicalError, match="in-memory:TensorDataset"):
        compare(3, (PAIR[0], TensorDataset(X[60:] + 1, Y[60:])), Net)
    with pytest.raises(ApicalError, match="in-memory:Other"):
        compare(3, PAIR, Other)


class Maker:
    """An object that makes a network."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, self.width), nn.ReLU(), nn.Linear(self.width, num_classes))


def enclosed(width: int) -> Any:
    return lambda num_classes: Maker(width)(num_classes)


def with_default(width: int) -> Any:
    def make(num_classes: int, width: int = width) -> nn.Module:
        return Maker(width)(num_classes)

    return make


@pytest.mark.parametrize(
    "make",
    [
        Maker,
        lambda width: Maker(width).__call__,
        lambda width: partial(Maker(width), num_classes=3),
        lambda width: partial(nn.Linear, *(4, 3), bias=width > 8),
        lambda width: partial(Maker, torch.full((2,), width)),
        lambda width: partial(Maker, torch.full((2,), width, dtype=torch.bfloat16)),
        lambda width: partial(Maker, np.arange(width)),
        lambda width: partial(Maker, {"a", "b", width}),
        enclosed,
        with_default,
    ],
)
def test_what_a_maker_of_models_holds_is_part_of_it(make: Any) -> None:
    """Code alone would take the second for the first, and `resume=True` would hand out the results of the first."""
    first, again, other = (own.checksum(own.remember(make(width))) for width in (8, 8, 16))
    assert first == again
    assert first != other


def test_a_file_whose_model_is_a_partial_function_has_its_checksum(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from functools import partial\nfrom torch import nn\nmake = partial(nn.Linear, 4, 3)\n"
    )
    expected = hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest()[:16]
    assert own.checksum(f"{tmp_path}/net.py:make") == expected


def test_a_device_and_options_as_python_has_them(tmp_path: Path) -> None:
    done = apical.compare(
        rules="pfa",
        rule_options={"expansion": 4},
        data=PAIR,
        model=Net,
        seeds=1,
        out=tmp_path / "a",
        **{**QUICK, "device": torch.device("cpu")},
    )
    config = json.loads((tmp_path / "a" / "runs" / "pfa" / "seed-0" / "config.json").read_text())
    assert (config["rule_options"], config["device"]) == (["expansion=4"], "cpu")
    assert done["pfa"].n == 1
    apical.compare(rules="pfa", rule_options="expansion=4", data=PAIR, model=Net, seeds=1, out=tmp_path / "b", **QUICK)


def test_arrays_names_and_regression(tmp_path: Path) -> None:
    numbers = apical.compare(
        rules=["bp"], data=(X.numpy(), X[:, 0].numpy()), model="mlp-8", seeds=1, out=tmp_path / "a", **QUICK
    )
    assert numbers.metric == "test loss"
    limits: dict[str, Any] = {"train_limit": X.new_tensor(64).int(), "test_limit": (Y[:1] * 0 + 50).numpy()[0]}
    named = apical.compare(rules="bp", model="mlp-8", seeds=1, out=tmp_path / "b", **limits, **QUICK)
    assert named["bp"].spread != named["bp"].spread  # of one seed there is none
    assert (named.records[0]["n_train"], named.records[0]["n_test"]) == (64, 50)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": Net(4, 3)}, "an existing module"),
        ({"lrr": 0.1}, "unknown setting of apical.compare 'lrr'; did you mean 'lr'?"),
        ({"data": 3}, "data: got int"),
        ({"data": PAIR, "model": lambda: nn.Linear(4, 7)}, "maps inputs (2, 4) to (2, 7)"),
        ({"data": PAIR, "model": Net, "jobs": 2}, "data and model in memory only, where other processes cannot read them"),
        ({"rules": [int]}, "is not a rule"),
        ({"rules": ["bpp"]}, "did you mean 'bp'?"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"seeds": [0, 1]}, "seeds must be a whole number; got [0, 1]"),
        ({"rules": "bpp"}, "unknown rule 'bpp'"),
        ({"rules": [apical.FeedbackAlignment(Net(4, 3))]}, "a FeedbackAlignment is not a rule: pass a class"),
        ({"epochs": 1.5}, "epochs is 1.5, but this setting takes another kind of value"),
        ({"lr": "0.1"}, "lr is '0.1', but this setting takes another kind of value"),
        ({"device": "gpu"}, "unknown --device 'gpu'; did you mean 'cpu'?"),
        ({"beta2": 0.5}, "no effect here: --beta2 (--optimizer sgd has none); drop it"),
        ({"resume": True, "overwrite": True}, "give only one of them"),
    ],
)
def test_refused(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ApicalError) as caught:
        apical.compare(out=tmp_path / "out", **arguments)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


class Failing(apical.FeedbackAlignment):
    """Fails after its trial."""

    def forward(self, inputs: Tensor, targets: Tensor) -> apical.Credit:
        if len(inputs) > 8:
            raise ValueError("planted")
        return super().forward(inputs, targets)


def test_after_an_error_the_folder_is_free(tmp_path: Path) -> None:
    """A notebook keeps the last traceback, and with it everything that its frames hold."""
    with pytest.raises(ValueError, match="planted") as kept:
        apical.compare(rules=["bp", Failing], data=PAIR, model=Net, seeds=1, out=tmp_path / "out", **QUICK)
    done = apical.compare(rules=["bp", Mine], data=PAIR, model=Net, seeds=1, out=tmp_path / "out", overwrite=True, **QUICK)
    assert done["Mine"].n == 1
    assert kept.traceback
