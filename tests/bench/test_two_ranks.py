"""Two gloo ranks equal one process on the joined batch, for every rule of the command line."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # in the processes, which know no conftest

import two_ranks

from apical.bench.names import RULES
from apical.testing.two_ranks import on_two_ranks

pytestmark = pytest.mark.xdist_group("two ranks")  # all on one worker: every rule is trained once
OWN = dict.fromkeys(("ff", "scff"), "negatives are drawn") | {
    name: "spikes are drawn" for name in RULES if name.startswith("csdp")
}
TRAINED = [name for name, entry in RULES.items() if "teacher" not in entry.options and name not in OWN]  # ten classes only


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, torch.Tensor]]:
    """What every rule learns on two ranks."""
    first, _ = on_two_ranks(two_ranks.train_all)
    return first


@pytest.mark.parametrize("rule", TRAINED)
def test_two_ranks_equal_one_process(states: dict[str, dict[str, torch.Tensor]], rule: str) -> None:
    alone = two_ranks.train(two_ranks.make(rule), 0, 1)
    assert alone.keys() == states[rule].keys()
    for name, value in alone.items():
        assert torch.allclose(states[rule][name].double(), value.double(), rtol=0, atol=1e-8), name


@pytest.fixture(scope="module")
def shared() -> dict[str, dict[str, torch.Tensor]]:
    """What every model learns of whose parameters each rank holds a part."""
    first, _ = on_two_ranks(two_ranks.train_sharded)
    return first


sharding = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch has fully_shard on GPUs alone"
)


@sharding
@pytest.mark.parametrize("rule", two_ranks.SHARDED)
def test_ranks_that_share_the_parameters_equal_one_process(shared: dict[str, dict[str, torch.Tensor]], rule: str) -> None:
    """By `credit.loss.backward()` and `credit.backward()`, whose direct way would pass by what `fully_shard` waits for."""
    alone = two_ranks.train_model(two_ranks.make(rule), 0, 1)
    for name, value in alone.items():
        assert torch.allclose(shared[rule][name], value, rtol=0, atol=1e-8), name


@sharding
def test_rules_that_share_the_parameters_step_load_and_look() -> None:
    """Layers have 16, 12 and 5 rows: two ranks' parts are unequal."""
    (first, said), (second, _) = on_two_ranks(two_ranks.train_sharded_further)
    for rule in (*two_ranks.ADAPTIVE, *two_ranks.CONSTRAINED):
        assert all(torch.equal(value, second[rule][name]) for name, value in first[rule].items())
    for rule in two_ranks.ADAPTIVE:
        alone = two_ranks.train_further(two_ranks.make(rule), 0, 1)
        assert alone.keys() == first[rule].keys()
        for name, value in alone.items():
            assert torch.allclose(first[rule][name], value, rtol=0, atol=1e-10), name
    assert "fully_shard" in said
