"""The conformance suite of credit-assignment rules: run it on your own rule with :func:`check_rule`.

Everything runs in float64, where no ReLU tie flips. Each check is a function that raises `AssertionError` with a sentence
saying what the rule did wrong; :data:`CHECKS` lists them for `pytest.mark.parametrize`.

The networks are a dense chain and a residual BatchNorm network. A rule may be made for chains of layers alone: if its
factory refuses the residual network by an `UnsupportedModelError` that quotes the name of one of its modules, only the chain
is used.
"""

import os
import pickle
import tempfile
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from torch.nn.parallel import DistributedDataParallel

from apical.core.credit import CreditRule, Loss
from apical.errors import UnsupportedModelError
from apical.rules.backprop import Backprop

Factory = Callable[[nn.Module, Loss], CreditRule]
Setting = tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]


class _Block(nn.Module):
    """Pre-sum convolution block with a projection shortcut, as in a ResNet."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(c_out), nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(c_out), nn.ReLU()
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c_in, h, w) -> (batch, c_out, h/stride, w/stride)."""
        hidden = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        result: Tensor = self.relu2(hidden + self.shortcut(x))
        return result


def dense_network() -> nn.Sequential:
    """Small float64 network for inputs (batch, 6) and 4 classes."""
    layers = (nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4))
    return nn.Sequential(*layers).double()


def residual_network() -> nn.Sequential:
    """Small float64 residual BatchNorm network for inputs (batch, 2, 8, 8) and 4 classes."""
    stem = (nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return nn.Sequential(*stem, _Block(4, 4, 1), _Block(4, 6, 2), *head).double()


def _dense_batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 6, dtype=torch.double, generator=generator)
    return inputs, torch.randint(0, 4, (size,), generator=generator)


def _image_batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 2, 8, 8, dtype=torch.double, generator=generator)
    return inputs, torch.randint(0, 4, (size,), generator=generator)


def settings(factory: Factory) -> list[Setting]:
    """The test networks that the rule trains, each with its `batch(seed)`: the residual one comes last, if at all.

    Raises:
        AssertionError: the rule refuses the residual network without quoting the name of one of its modules, or leaves a
            trace on the network it refused.
    """
    both: list[Setting] = [(dense_network, _dense_batch), (residual_network, _image_batch)]
    torch.manual_seed(0)
    model = residual_network()
    names = [name for name, _ in model.named_modules() if name]
    try:
        factory(model, F.cross_entropy)
    except UnsupportedModelError as error:
        if not any(repr(name) in str(error) for name in names):
            raise AssertionError(
                f"the residual network is refused by an error that names none of its modules: {error}"
            ) from error
        if left := [name for name, module in model.named_modules() if _hooked(module)]:
            raise AssertionError(f"the residual network is refused, but hooks are left on {left}") from error
        return both[:1]
    return both


def _make(factory: Factory, network: Callable[[], nn.Module] = dense_network, seed: int = 0) -> CreditRule:
    torch.manual_seed(seed)
    return factory(network(), F.cross_entropy)


def _gradients(rule: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def _train(rule: nn.Module, steps: range, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.SGD(rule.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for step in steps:
        optimizer.zero_grad()
        rule(*_dense_batch(step)).backward()
        optimizer.step()
    return optimizer


def _same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float, what: str) -> None:
    if a.keys() != b.keys():
        raise AssertionError(f"{what}: different tensors: {sorted(a.keys() ^ b.keys())}")
    for name, value in a.items():
        if value.is_floating_point():
            far = (value.to(b[name]) - b[name]).abs().max() if value.numel() else torch.zeros(())
            if not far <= tolerance * max(1.0, float(b[name].abs().max() if value.numel() else 0.0)):
                raise AssertionError(f"{what}: {name!r} differs by {float(far):.3g}")


def check_gradients(factory: Factory, without_gradient: Collection[str] = ()) -> None:
    """Every trainable parameter gets a finite `.grad`; output and loss are those of the model (or of `answer`)."""
    for network, batch in settings(factory):
        rule = _make(factory, network)
        plain = _answer(factory, network, rule, batch(0)[0])
        torch.manual_seed(1)
        credit = rule(*batch(0))
        if credit.output.shape != (8, 4) or credit.loss.dim() != 0:
            raise AssertionError(f"output {tuple(credit.output.shape)} or loss {tuple(credit.loss.shape)} has a wrong shape")
        if not torch.allclose(credit.output, plain, rtol=1e-12, atol=1e-12):
            raise AssertionError("credit.output is not the output of the model, or what `answer` gives")
        if not torch.allclose(credit.loss, F.cross_entropy(credit.output, batch(0)[1])):
            raise AssertionError("credit.loss is not the loss of credit.output")
        credit.backward()
        first = _gradients(rule)
        for name, parameter in rule.named_parameters():
            if parameter.requires_grad and name not in first and name not in without_gradient:
                raise AssertionError(f"parameter {name!r} got no gradient; declare it in without_gradient if meant")
            if name in first and not first[name].isfinite().all():
                raise AssertionError(f"the gradient of {name!r} is not finite")


@torch.no_grad()
def _answer(factory: Factory, network: Callable[[], nn.Module], rule: CreditRule, inputs: Tensor) -> Tensor:
    """Output of a fresh model, or what a fresh rule answers where that is not its model's feed-forward pass."""
    torch.manual_seed(0)
    answer: Tensor = network()(inputs) if rule.feed_forward else _make(factory, network).answer(inputs)
    return answer


def check_accumulation(factory: Factory) -> None:
    """The gradients of a second backward pass add up to those of the first."""
    summed, apart = _make(factory), _make(factory)
    parts = []
    for seed in range(2):
        for rule in (summed, apart):
            torch.manual_seed(seed)
            rule(*_dense_batch(seed)).backward()
        parts.append(_gradients(apart))
        apart.zero_grad()
    both = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    _same(_gradients(summed), both, 1e-12, "a second backward does not add up")


def check_detach(factory: Factory) -> None:
    """Attached, the model alone is still the plain model; detached, nothing is left on it."""
    network, batch = settings(factory)[-1]
    torch.manual_seed(0)
    model, (inputs, targets) = network().eval(), batch(0)
    before, keys, kinds = model(inputs), list(model.state_dict()), [type(m) for m in model.modules()]
    rule = factory(model, F.cross_entropy)
    rule(inputs, targets).backward()
    model.zero_grad()
    if not torch.equal(model(inputs), before):
        raise AssertionError("while the rule is attached, the model alone gives another output")
    F.cross_entropy(model(inputs), targets).backward()
    attached = _gradients(model)
    if rule.detach() is not model:
        raise AssertionError("detach() must return the model it was given")
    left = [name for name, module in model.named_modules() if _hooked(module)]
    if left:
        raise AssertionError(f"hooks are left on {left}")
    model.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    _same(attached, _gradients(model), 1e-12, "the model alone does not backpropagate exactly while the rule is attached")
    if list(model.state_dict()) != keys or [type(m) for m in model.modules()] != kinds:
        raise AssertionError("the model's state-dict keys or classes changed")
    if not torch.equal(model.eval()(inputs), before):
        raise AssertionError("the model's output changed")


def _hooked(module: nn.Module) -> bool:
    """Whether anything hangs on the module or its own parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    tensors = [p for p in module.parameters(recurse=False) if p._backward_hooks or p._post_accumulate_grad_hooks]
    return bool(tensors) or "forward" in module.__dict__ or any(getattr(module, kind) for kind in kinds)


def check_determinism(factory: Factory) -> None:
    """Same seed, same bits."""
    states = []
    for _ in range(2):
        rule = _make(factory)
        torch.manual_seed(1)
        _train(rule, range(3))
        states.append(rule.state_dict())
    _same(states[0], states[1], 0.0, "two runs with one seed")


def check_state_dict(factory: Factory) -> None:
    """A rule restored from its state dict takes the bit-same next steps."""
    rule = _make(factory)
    optimizer = _train(rule, range(3))
    state, optimizer_state = rule.state_dict(), optimizer.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        torch.save((state, optimizer_state), Path(folder) / "state.pt")
        state, optimizer_state = torch.load(Path(folder) / "state.pt", weights_only=True)
    other = _make(factory, seed=9)
    other.load_state_dict(state)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    other_optimizer.load_state_dict(optimizer_state)
    for each, its in ((rule, optimizer), (other, other_optimizer)):
        torch.manual_seed(3)
        _train(each, range(3, 6), its)
    _same(other.state_dict(), rule.state_dict(), 0.0, "after a state-dict round trip")


def check_batch_mean(factory: Factory) -> None:
    """The gradient is a batch mean: a batch twice over gives what the batch gives."""
    results = []
    for copies in (1, 2):
        rule = _make(factory)
        inputs, targets = _dense_batch(0)
        torch.manual_seed(1)
        rule(inputs.repeat(copies, 1), targets.repeat(copies)).backward()
        results.append(_gradients(rule))
    _same(results[0], results[1], 1e-12, "a batch twice over")


def check_compile(factory: Factory) -> None:
    """`torch.compile(rule, fullgraph=True)` gives the same gradients (graph capture; no C++ compiler is needed)."""
    rule = _make(factory)
    torch.manual_seed(1)
    rule(*_dense_batch(0)).backward()
    rule.zero_grad()
    torch.manual_seed(2)
    rule(*_dense_batch(1)).backward()
    eager = _gradients(rule)
    other = _make(factory)
    torch.manual_seed(1)
    other(*_dense_batch(0)).backward()
    other.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    torch.manual_seed(2)
    compiled(*_dense_batch(1)).backward()
    _same(_gradients(other), eager, 1e-12, "compiled")


def check_unsupported(factory: Factory) -> None:
    """A model the rule cannot train is refused with an error that names the module; or else it is trained."""
    for name, odd in (("mixer", nn.Bilinear(6, 6, 6)), ("gru", nn.GRU(6, 6, batch_first=True))):
        model = nn.Sequential()
        model.add_module("first", nn.Linear(6, 6))
        model.add_module(name, _Adapter(odd))
        model.add_module("last", nn.Linear(6, 4))
        try:
            rule = factory(model.double(), F.cross_entropy)
            rule(*_dense_batch(0)).backward()
        except UnsupportedModelError as error:
            if name not in str(error):
                raise AssertionError(f"the error does not name the unsupported module {name!r}: {error}") from error
        else:
            missing = [n for n, p in model.named_parameters() if p.grad is None]
            if missing:
                raise AssertionError(f"{missing} were neither trained nor refused")


class _Adapter(nn.Module):
    """Makes a layer of unusual signature take and give (batch, features)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) -> (batch, 6)."""
        if isinstance(self.layer, nn.Bilinear):
            result: Tensor = self.layer(x, x)
            return result
        result = self.layer(x.unsqueeze(1))[0].squeeze(1)
        return result


def check_oracle(factory: Factory, oracle: Callable[[CreditRule], None]) -> None:
    """In the limit that `oracle` puts the rule into, its gradients are backpropagation's, to 1e-12."""
    for network, batch in settings(factory):
        rule = _make(factory, network)
        rule(*batch(0)).backward()  # whatever is made at the first batch exists from here on
        rule.zero_grad()
        oracle(rule)
        rule(*batch(1)).backward()
        own = _gradients(rule.model)
        rule.detach()
        rule.zero_grad()
        exact = Backprop(rule.model)
        exact(*batch(1)).backward()
        _same(own, _gradients(rule.model), 1e-12, "in its oracle limit the rule is not backpropagation")


def check_distributed(factory: Factory) -> None:
    """Two gloo ranks under DistributedDataParallel, half the batch each, equal one process on the joined batch."""
    try:
        pickle.dumps(factory)
    except Exception as error:
        raise AssertionError(f"the factory must be importable by other processes (no lambda): {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_rank, (factory, folder), nprocs=2)
        except ProcessExitedException as error:
            raise AssertionError(
                f"a rank ended before its end ({error}); is the module that defines the factory importable from sys.path?"
            ) from error
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.manual_seed(0)
    rule = factory(dense_network(), F.cross_entropy)
    torch.manual_seed(1)
    _train(rule, range(4))
    _same(ranks[0], ranks[1], 0.0, "the two ranks")
    _same(ranks[0], _trained(rule), 1e-10, "two ranks against one process")


def _trained(rule: CreditRule) -> dict[str, Tensor]:
    """What a rule has learned, in whatever form one process or several keep it: the model, the feedback, other buffers."""
    model = {f"model.{name}": value for name, value in rule.model.state_dict().items()}
    feedback = {f"feedback of {name}": value for name, value in rule.feedback_weights().items()}
    return {**({} if feedback else rule.state_dict()), **model, **feedback}


def _rank(rank: int, factory: Factory, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    rule = factory(dense_network(), F.cross_entropy)
    torch.manual_seed(1)
    parallel = DistributedDataParallel(rule)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for step in range(4):
        inputs, targets = _dense_batch(step)
        optimizer.zero_grad()
        parallel(inputs[rank::2], targets[rank::2]).backward()
        optimizer.step()
    torch.save(_trained(rule), Path(folder) / f"{rank}.part")
    (Path(folder) / f"{rank}.part").rename(Path(folder) / f"{rank}.pt")
    while not (Path(folder) / f"{1 - rank}.pt").exists():  # nobody leaves while the other still communicates
        time.sleep(0.01)
    os._exit(0)  # gloo's destructor can wait for ever for a thread that waits for the interpreter lock


CHECKS: dict[str, Callable[[Factory], None]] = {
    "gradients": check_gradients,
    "detach": check_detach,
    "determinism": check_determinism,
    "accumulation": check_accumulation,
    "state_dict": check_state_dict,
    "batch_mean": check_batch_mean,
    "compile": check_compile,
    "unsupported": check_unsupported,
    "distributed": check_distributed,
}


def check_rule(
    factory: Factory,
    oracle: Callable[[CreditRule], None] | None = None,
    without_gradient: Collection[str] = (),
    skip: Collection[str] = (),
) -> None:
    """Run the whole suite on a rule.

    Args:
        factory: `factory(model, loss)` makes the rule; a rule class itself, or a `functools.partial` of one.
        oracle: puts a rule into the limit in which it must equal backpropagation (for feedback alignment: copies the
            forward weights into the feedback weights).
        without_gradient: names of rule parameters that legitimately get no gradient.
        skip: names of checks from :data:`CHECKS` to leave out.

    Raises:
        AssertionError: the first thing the rule does wrong.

    >>> check_rule(Backprop, skip=("distributed", "compile"))
    """
    checks: dict[str, Callable[[Factory], None]] = dict(CHECKS)
    checks["gradients"] = partial(check_gradients, without_gradient=without_gradient)
    for name, check in checks.items():
        if name not in skip:
            check(factory)
    if oracle is not None:
        check_oracle(factory, oracle)
