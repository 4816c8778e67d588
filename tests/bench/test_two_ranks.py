"""Two gloo ranks under torchrun equal one process on the joined batch, for every rule of the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apical.bench.names import RULES

pytestmark = pytest.mark.xdist_group("two ranks")  # all on one worker: the processes are started once
HERE = Path(__file__).parent
OWN = dict.fromkeys(("ff", "scff"), "negatives are drawn") | {
    name: "spikes are drawn" for name in RULES if name.startswith("csdp")
}
TRAINED = [name for name, entry in RULES.items() if "teacher" not in entry.options and name not in OWN]  # ten classes only


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("two") / "states.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["--nproc-per-node", "2", str(HERE / "two_ranks.py"), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode == 0, ended.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("rule", TRAINED)
def test_two_ranks_equal_one_process(two_ranks: dict[str, dict[str, torch.Tensor]], rule: str) -> None:
    sys.path.insert(0, str(HERE))
    try:
        import two_ranks as script
    finally:
        sys.path.remove(str(HERE))
    alone = script.train(script.make(rule), 0, 1)
    assert alone.keys() == two_ranks[rule].keys()
    for name, value in alone.items():
        assert torch.allclose(two_ranks[rule][name].double(), value.double(), rtol=0, atol=1e-8), name
