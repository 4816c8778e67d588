"""Parts of a chain learn, in threads and in processes, what the whole rule learns, bit for bit; the rest is refused."""

import copy
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apical
from apical import models
from apical.core.part import learn_in_threads, tried
from apical.errors import ApicalError, ConfigError, UnsupportedModelError

RULES: dict[str, Callable[..., Any]] = {
    "ccl": apical.CounterCurrentLearning,
    "ccl-input": partial(apical.CounterCurrentLearning, input_pair=True),
    "ccl-frozen": partial(apical.CounterCurrentLearning, feedback="frozen"),
    "ccl-free": partial(apical.CounterCurrentLearning, feedback="free"),
    "ccl-none": partial(apical.CounterCurrentLearning, feedback="none"),
    "dfa": apical.DirectFeedbackAlignment,
    "local-pred": apical.LocalClassifiers,
    "local-both": partial(apical.LocalClassifiers, local="both"),
    "mono-forward": partial(apical.LocalClassifiers, local="projection"),
}


def dense() -> nn.Module:
    torch.manual_seed(0)
    return models.build("mlp-elu-16-12-14", (1, 4, 5), 10)


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    first = (nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*first, nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32, 10))


def batch(seed: int, shape: tuple[int, ...] = (1, 4, 5), size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, *shape, generator=generator), torch.randint(0, 10, (size,), generator=generator)


def sgd(rule: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(rule.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """How a product is divided among threads may change its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rows", [[range(1), range(1, 4)], [range(3), range(3, 4)], [range(1), range(1, 2), range(2, 4)]])
def test_parts_learn_what_the_whole_rule_learns(name: str, rows: list[range]) -> None:
    rule = RULES[name](dense())
    inputs, targets = batch(0)
    rule.chain(inputs.shape[1:])
    tried(rule, rows, inputs, targets)  # compares bits
    learned = {key for key, p in rule.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "model.linear4.weight" in learned
    assert ("model.linear1.weight" in learned) == (name not in ("ccl-none", "local-pred"))  # read-outs start at zero


@pytest.mark.parametrize("name", ["ccl", "dfa", "local-both", "mono-forward"])
def test_parts_of_a_convolutional_network(name: str) -> None:
    options = {} if name == "dfa" else {"input_shape": (1, 8, 8)}
    rule = RULES[name](convolutional(), **options)
    rule.chain((1, 8, 8))
    tried(rule, [range(2), range(2, 3)], *batch(0, (1, 8, 8)))


def test_nothing_crosses_between_parts_but_activities_and_the_output_error() -> None:
    """Of direct feedback alignment: e = (softmax - one-hot) / batch comes down, h goes up."""
    rule = RULES["dfa"](dense())
    inputs, targets = batch(0)
    rule(inputs, targets)
    rule.chain(inputs.shape[1:])
    ((up, down),) = learn_in_threads(rule, [range(2), range(2, 4)], inputs, targets)
    elu2 = nn.Sequential(*list(rule.model.children())[:5])
    torch.testing.assert_close(up, [elu2(inputs).detach()])
    e = (rule.model(inputs).softmax(1) - nn.functional.one_hot(targets, 10)) / len(inputs)
    torch.testing.assert_close(down, [e.detach()])


def test_parts_that_learn_something_else_are_refused() -> None:
    class Own(apical.LocalClassifiers):
        def forward(self, inputs: Tensor, targets: Tensor) -> apical.Credit:
            return super().forward(inputs + 1, targets)

    rule = Own(dense())
    with pytest.raises(UnsupportedModelError, match=r"parameter 'model\.linear4\.weight' would learn differently .* Own"):
        apical.pipeline(rule, sgd(rule))(*batch(0))


def trained(name: str, model: nn.Module, shape: tuple[int, ...], piped: bool) -> tuple[Any, Any, list[float]]:
    """State of a rule and its optimiser after batches of which the last is small, at rates that change; and the losses."""
    torch.manual_seed(1)
    rule = RULES[name](model)
    optimizer = torch.optim.AdamW(rule.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    batches = [batch(seed, shape, 6 if seed < 9 else 4) for seed in range(10)]
    losses = []
    if piped:
        with apical.pipeline(rule, optimizer) as pipe:
            for number, (inputs, targets) in enumerate(batches):
                pipe(inputs, targets)
                schedule.step()
                if number == 4:
                    pipe.wait()  # weights may be read
            pipe.wait()
            found = copy.deepcopy((rule.state_dict(), optimizer.state_dict(), pipe.losses))
            _fail(pipe, name, batches[0])
            return found
    for inputs, targets in batches:
        optimizer.zero_grad()
        credit = rule(inputs, targets)
        credit.backward()
        optimizer.step()
        schedule.step()
        losses.append(credit.loss.item())
    return rule.state_dict(), optimizer.state_dict(), losses


def _fail(pipe: Any, name: str, example: tuple[Tensor, Tensor]) -> None:
    """Let the second process fail, or kill it: one line says so, and all processes end."""
    processes = [worker.process for worker in pipe._workers]
    inputs, targets = example
    if name != "dfa":
        os.kill(processes[0].pid, signal.SIGKILL)

    def go_on() -> None:
        for _ in range(4):
            pipe(inputs, torch.full_like(targets, 10) if name == "dfa" else targets)

    with pytest.raises(ApicalError) as caught:
        go_on()
    said = str(caught.value)
    assert said.startswith(
        "process 2 of 2 of the pipeline " + ("failed: IndexError" if name == "dfa" else "was killed by signal 9")
    )
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize(("name", "model", "shape"), [("ccl", dense, (1, 4, 5)), ("dfa", convolutional, (1, 8, 8))])
def test_two_processes_train_as_one_and_say_what_ended_them(name: str, model: Any, shape: tuple[int, ...]) -> None:
    found, known = (trained(name, model(), shape, piped=piped) for piped in (True, False))
    _equal(dict(enumerate(found)), dict(enumerate(known)))


class Third(nn.Module):
    """An activation with a constant of the default dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * torch.tensor(1 / 3))


def thirds() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(20, 12), Third(), nn.Linear(12, 12), Third(), nn.Linear(12, 12), Third(), nn.Linear(12, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def test_processes_have_the_default_dtype_of_the_one_that_asks() -> None:
    found = []
    torch.set_default_dtype(torch.double)
    try:
        for piped in (True, False):
            rule = apical.LocalClassifiers(thirds())
            optimizer = sgd(rule)
            inputs, targets = batch(0)
            if piped:
                with apical.pipeline(rule, optimizer) as pipe:
                    for _ in range(3):
                        pipe(inputs.double(), targets)
                    pipe.wait()
            else:
                for _ in range(3):
                    optimizer.zero_grad()
                    rule(inputs.double(), targets).backward()
                    optimizer.step()
            found.append(rule.model.state_dict())
    finally:
        torch.set_default_dtype(torch.float)
    _equal(*found)


def _equal(found: Any, known: Any) -> None:
    if isinstance(known, dict):
        assert found.keys() == known.keys()
        for key in known:
            _equal(found[key], known[key])
    elif isinstance(known, Tensor):
        assert torch.equal(found, known)
    else:
        assert found == known


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda: apical.Backprop(dense()), "Backprop has backward locking"),
        (lambda: apical.ProductFeedbackAlignment(dense()), "ProductFeedbackAlignment has backward locking"),
        (lambda: apical.ForwardForward(dense()), "ForwardForward has no parts"),
        (lambda: apical.LocalClassifiers(nn.Sequential(dense(), nn.Dropout(0.5))), "module 'model.1' draws random numbers"),
    ],
)
def test_other_rules_are_refused_by_name(rule: Any, words: str) -> None:
    made = rule()
    with pytest.raises(UnsupportedModelError, match=words):
        apical.pipeline(made, sgd(made))


def test_other_optimisers_and_numbers_of_workers_are_refused() -> None:
    rule = apical.LocalClassifiers(dense())
    with pytest.raises(ConfigError, match="LBFGS may use several parameters"):
        apical.pipeline(rule, torch.optim.LBFGS(rule.parameters()))
    with pytest.raises(ConfigError, match="at least 2 workers, not 1"):
        apical.pipeline(rule, sgd(rule), workers=1)
    with pytest.raises(ConfigError, match="4 blocks cannot be divided among 5 workers"):
        apical.pipeline(rule, sgd(rule), workers=5)(*batch(0))
    with pytest.raises(ConfigError, match="the batch is empty"):
        apical.pipeline(rule, sgd(rule))(*batch(0, size=0))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda: apical.CounterCurrentLearning(dense(), mask=True), "mask=True"),
        (lambda: apical.DirectFeedbackAlignment(dense(), leaky=True), "Leave out leaky"),
        (lambda: apical.DirectFeedbackAlignment(models.build("resnet8", (1, 4, 5), 10)), "'.+'"),
        (
            lambda: apical.LocalClassifiers(dense(), loss=lambda output, targets: output.sum()),
            "cannot be sent to another process",
        ),
    ],
)
def test_what_only_a_batch_shows_is_refused_and_leaves_the_rule_as_it_was(rule: Any, words: str) -> None:
    made = rule()
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    with pytest.raises(ApicalError, match=words):
        apical.pipeline(made, sgd(made))(*batch(0))
    _equal(made.model.state_dict(), before)
    assert all(parameter.grad is None for parameter in made.parameters())
