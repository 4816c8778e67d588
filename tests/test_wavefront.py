"""The wavefront of counter-current learning is the sequential training, bit for bit; a partner that is gone is reported."""

import copy
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from benchmarks.wavefront import BATCHES, Key, Net, PartnerError, TwoProcesses, make_net, sequential, two_streams
from torch import Tensor, nn

import apical
from apical import models

MODEL, SHAPE, BATCH = "mlp-elu-16-12-14", (1, 4, 5), 6


def tiny() -> Net:
    """Rates at which weights move, and a threshold that is reached."""
    return make_net(MODEL, SHAPE, BATCH, lr=0.1, clip=0.05)


def weights(net: Net) -> list[Tensor]:
    return [weight.clone() for weight in (*net.forth, *net.back)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the other process: how a product is divided among threads may change its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_reference_is_the_rule() -> None:
    net = tiny()
    torch.manual_seed(0)
    rule = apical.CounterCurrentLearning(models.build(MODEL, SHAPE, 10))
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    for t in range(20):
        optimizer.zero_grad()
        rule(net.inputs[t % BATCHES].view(BATCH, *SHAPE), net.members[t % BATCHES].argmax(1)).backward()
        for parameter in rule.parameters():
            nn.utils.clip_grad_norm_([parameter], 0.05)
        optimizer.step()
    sequential(net, 0, 20)
    assert not equal(weights(net), weights(tiny()))
    torch.testing.assert_close(net.forth, [weight.detach() for weight in rule.model.parameters()])
    torch.testing.assert_close(net.back[::-1], [weight.detach() for weight in rule.feedback_parameters()])


class Posted:
    """Signals of one process: what is waited for must have been posted."""

    def __init__(self) -> None:
        self.open: Counter[Key] = Counter()

    def post(self, key: Key) -> None:
        self.open[key] += 1
        assert self.open[key] == 1, f"{key} was posted twice before anyone waited"

    def wait(self, key: Key) -> None:
        self.open[key] -= 1
        assert self.open[key] == 0, f"waits for {key}, which is not there"


@pytest.mark.parametrize("schedule", ["wavefront", "concurrent"])
def test_the_order_in_which_streams_are_given_their_work(schedule: str) -> None:
    reference, net, signals = tiny(), tiny(), Posted()
    sequential(reference, 0, 9)
    two_streams(schedule, net, signals, (None, None), 0, 9)
    assert equal(weights(net), weights(reference))
    left = {key for key, count in signals.open.items() if count}
    assert left == {("updated", level) for level in range(1, net.last + 1)}  # for which the device's synchronisation stands


def test_one_sweep_is_the_reference() -> None:
    reference, net = tiny(), tiny()
    sequential(reference, 0, 20)
    sequential(net, 0, 20, sweep=True)
    assert equal(weights(net), weights(reference))


def test_two_processes_train_bit_for_bit_as_one_and_a_killed_one_is_reported() -> None:
    reference, nets = tiny(), {"wavefront": tiny(), "concurrent": tiny()}
    start = copy.deepcopy(weights(reference))
    sequential(reference, 0, 20)
    workers = TwoProcesses(nets, patience=30)
    try:
        for schedule, net in nets.items():
            workers.run(schedule, 0, 13)
            workers.run(schedule, 13, 7)
            assert equal(weights(net), weights(reference)), schedule
        assert not any(map(torch.equal, start, weights(reference)))
        assert workers.process.pid is not None
        os.kill(workers.process.pid, signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(PartnerError, match="exit code: -9"):
            workers.run("wavefront", 20, 5)
        assert time.monotonic() - begun < workers.signals.patience  # by its death, not by waiting
    finally:
        workers.close()


def test_a_process_that_hangs_is_not_waited_for() -> None:
    workers = TwoProcesses({"wavefront": tiny()}, patience=30)
    try:
        workers.run("wavefront", 0, 2)
        workers.signals.patience = 0.5
        assert workers.process.pid is not None
        os.kill(workers.process.pid, signal.SIGSTOP)
        with pytest.raises(PartnerError, match="hangs: no"):
            workers.run("wavefront", 2, 5)
        assert not workers.process.is_alive()
    finally:
        workers.close()
