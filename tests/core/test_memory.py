"""Matrices that grow with the square of a layer's outputs are refused before they exhaust the memory."""

from pathlib import Path

import pytest
import torch
from torch import nn

from apical import CounterCurrentLearning, DeepFeedbackControl, ProductFeedbackAlignment, StrongDeepFeedbackControl
from apical.core.batch import container_limits, device_memory, require_memory
from apical.errors import UnsupportedModelError

WIDE = 2_000_000  # outputs, whose square takes 16 TB


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, WIDE))


@pytest.mark.parametrize("feedback", ["random", "orthogonal", "identity"])
def test_product_feedback_names_the_layer_and_what_it_needs(feedback: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"B \(2000000, \d+\) and R of layer '2' need .* GB, and cpu has .*exact=\['2'\]"
    ):
        ProductFeedbackAlignment(network(), feedback=feedback)  # type: ignore[arg-type]


def test_the_remedy_of_product_feedback_works() -> None:
    rule = ProductFeedbackAlignment(network(), exact=["2"])
    rule(torch.randn(2, 1), torch.tensor([3, 4])).backward()


@pytest.mark.parametrize("rule", [DeepFeedbackControl, StrongDeepFeedbackControl])
@pytest.mark.parametrize("feedback", ["product", "random"])
def test_control_from_too_many_outputs_is_refused(rule: type, feedback: str) -> None:
    with pytest.raises(UnsupportedModelError, match="feedback matrices from 2000000 outputs"):
        rule(network(), feedback=feedback)


def test_codes_of_too_many_classes_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="codes of 2000000 classes"):
        CounterCurrentLearning(network())


def test_what_fits_is_let_through() -> None:
    like = torch.zeros(1)
    limit = device_memory(like.device)
    assert limit is not None
    require_memory("a matrix", limit, like, "")
    with pytest.raises(UnsupportedModelError):
        require_memory("a matrix", limit + 1, like, "")


def test_a_device_of_unknown_memory_is_not_judged() -> None:
    require_memory("a matrix", 1 << 60, torch.zeros(1, device="meta"), "")


@pytest.mark.parametrize(("text", "limits"), [("1073741824\n", [1 << 30]), ("max\n", []), (None, [])])
def test_the_limit_of_a_container_counts(tmp_path: Path, text: str | None, limits: list[int]) -> None:
    file = tmp_path / "memory.max"
    if text is not None:
        file.write_text(text)
    assert container_limits([str(file)]) == limits
