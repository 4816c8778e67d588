"""What trains whole networks gives the same numbers whatever the calling program has set for all of PyTorch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import apical


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "double": partial(default, torch.float64),
    "bfloat16": partial(default, torch.bfloat16),
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "device": partial(torch.device, "meta"),
}


def compared(out: Path) -> list[tuple[float, ...]]:
    rows = apical.compare(
        rules=["bp", "fa"], data="digits", model="mlp-16", epochs=1, seeds=1, probe=0, out=out, show=False
    ).rows
    return [row.values for row in rows]


def probabilities() -> np.ndarray:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 5))
    classifier = apical.CreditClassifier(rule="pfa", hidden=8, epochs=2, random_state=0).fit(x, x[:, 0] > 0)
    return classifier.predict_proba(x)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[float, ...]], np.ndarray]:
    return compared(tmp_path_factory.mktemp("compared") / "plain"), probabilities()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_callers_settings_change_nothing(
    name: str, tmp_path: Path, expected: tuple[list[tuple[float, ...]], np.ndarray]
) -> None:
    with SETTINGS[name]():
        before = (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
        )
        rows, answers = compared(tmp_path / "run"), probabilities()
        after = (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
        )
    assert before == after
    assert rows == expected[0]
    assert np.array_equal(answers, expected[1])
