"""The conformance suite of credit-assignment rules: run it on your own rule with :func:`check_rule`.

Everything runs in float64, where no ReLU tie flips. Each check is a function that raises `AssertionError` with a sentence
saying what the rule did wrong; :data:`CHECKS` lists them for `pytest.mark.parametrize`.

The networks are a dense chain and a residual BatchNorm network. A rule may be made for chains of layers alone: if its
factory refuses the residual network by an `UnsupportedModelError` that quotes the name of one of its modules, only the chain
is used.
"""

import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import CreditRule
from apical.core.wrappers import COMPILES
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.backprop import Backprop
from apical.testing.comparison import Factory, Setting, gradients, make, require_same, train
from apical.testing.distributed import check_distributed
from apical.testing.networks import dense_batch, dense_network, image_batch, residual_network
from apical.testing.odd_check import check_odd_modules


def settings(factory: Factory) -> list[Setting]:
    """The test networks that the rule trains, each with its `batch(seed)`: the residual one comes last, if at all.

    Raises:
        AssertionError: the rule refuses the residual network without quoting the name of one of its modules, or leaves a
            trace on the network it refused.
    """
    both: list[Setting] = [(dense_network, dense_batch), (residual_network, image_batch)]
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
        if hooked := [name for name, module in model.named_modules() if _hooked(module)]:
            raise AssertionError(f"the residual network is refused, but hooks are left on {hooked}") from error
        return both[:1]
    return both


def check_gradients(factory: Factory, without_gradient: Collection[str] = ()) -> None:
    """Every trainable parameter gets a finite `.grad`; output and loss are those of the model (or of `answer`)."""
    for network, batch in settings(factory):
        rule = make(factory, network)
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
        first = gradients(rule)
        for name, parameter in rule.named_parameters():
            if parameter.requires_grad and name not in first and name not in without_gradient:
                raise AssertionError(f"parameter {name!r} got no gradient; declare it in without_gradient if meant")
            if name in first and not first[name].isfinite().all():
                raise AssertionError(f"the gradient of {name!r} is not finite")


@torch.no_grad()
def _answer(factory: Factory, network: Callable[[], nn.Module], rule: CreditRule, inputs: Tensor) -> Tensor:
    """Output of a fresh model, or what a fresh rule answers where that is not its model's feed-forward pass."""
    torch.manual_seed(0)
    answer: Tensor = network()(inputs) if rule.feed_forward else make(factory, network).answer(inputs)
    return answer


def check_accumulation(factory: Factory) -> None:
    """The gradients of a second backward pass add up to those of the first."""
    summed, apart = make(factory), make(factory)
    parts = []
    for seed in range(2):
        for rule in (summed, apart):
            torch.manual_seed(seed)
            rule.accumulate(*dense_batch(seed))
        parts.append(gradients(apart))
        apart.zero_grad()
    both = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    require_same(gradients(summed), both, 1e-12, "a second backward does not add up")


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
        raise AssertionError("while the rule is attached, the model alone gives a different output")
    F.cross_entropy(model(inputs), targets).backward()
    attached = gradients(model)
    if rule.detach() is not model:
        raise AssertionError("detach() must return the model it was given")
    hooked = [name for name, module in model.named_modules() if _hooked(module)]
    if hooked:
        raise AssertionError(f"hooks are left on {hooked}")
    model.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    require_same(
        attached, gradients(model), 1e-12, "the model alone does not backpropagate exactly while the rule is attached"
    )
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
        rule = make(factory)
        torch.manual_seed(1)
        train(rule, range(3))
        states.append(rule.state_dict())
    require_same(states[0], states[1], 0.0, "two runs with one seed")


def check_state_dict(factory: Factory) -> None:
    """A rule restored from its state dict takes the bit-same next steps."""
    rule = make(factory)
    optimizer = train(rule, range(3))
    state, optimizer_state = rule.state_dict(), optimizer.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        torch.save((state, optimizer_state), Path(folder) / "state.pt")
        state, optimizer_state = torch.load(Path(folder) / "state.pt", weights_only=True)
    other = make(factory, seed=9)
    other.load_state_dict(state)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    other_optimizer.load_state_dict(optimizer_state)
    for subject, its in ((rule, optimizer), (other, other_optimizer)):
        torch.manual_seed(3)
        train(subject, range(3, 6), its)
    require_same(other.state_dict(), rule.state_dict(), 0.0, "after a state-dict round trip")


def check_batch_mean(factory: Factory) -> None:
    """The gradient is a batch mean: a batch twice over gives what the batch gives.

    Of a rule that declares `random_per_sample`, which cannot show it, the declaration is checked: two seeds differ.
    """
    if make(factory).random_per_sample:
        _check_is_random(factory)
        return
    results = []
    for copies in (1, 2):
        rule = make(factory)
        inputs, targets = dense_batch(0)
        torch.manual_seed(1)
        rule.accumulate(inputs.repeat(copies, 1), targets.repeat(copies))
        results.append(gradients(rule))
    require_same(results[0], results[1], 1e-12, "a batch twice over")


def _check_is_random(factory: Factory) -> None:
    drawn = []
    for seed in range(2):
        rule = make(factory)
        torch.manual_seed(seed)
        rule.accumulate(*dense_batch(0))
        drawn.append(gradients(rule))
    if all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0]):
        raise AssertionError("the rule declares random_per_sample, but another seed gives the same gradients")


def check_compile(factory: Factory, backend: str = "aot_eager") -> None:
    """`torch.compile(rule, fullgraph=True)` gives the same gradients.

    Args:
        factory: makes the rule.
        backend: what runs the graph; "aot_eager" traces its backward pass, too, "eager" captures it alone. Neither needs a
            C++ compiler.

    Raises:
        AssertionError: the compiled rule gives other gradients.
    """
    rule = make(factory)
    torch.manual_seed(1)
    rule.accumulate(*dense_batch(0))
    rule.zero_grad()
    torch.manual_seed(2)
    rule.accumulate(*dense_batch(1))
    eager = gradients(rule)
    other = make(factory)
    torch.manual_seed(1)
    other(*dense_batch(0)).backward()
    other.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(other, backend=backend, fullgraph=True)
    torch.manual_seed(2)
    compiled(*dense_batch(1)).backward()
    require_same(gradients(other), eager, 1e-12, "compiled")


def check_unsupported(factory: Factory) -> None:
    """A model the rule cannot train is refused with an error that names the module; or else it is trained."""
    for name, odd in (("mixer", nn.Bilinear(6, 6, 6)), ("gru", nn.GRU(6, 6, batch_first=True))):
        model = nn.Sequential()
        model.add_module("first", nn.Linear(6, 6))
        model.add_module(name, _Adapter(odd))
        model.add_module("last", nn.Linear(6, 4))
        try:
            rule = factory(model.double(), F.cross_entropy)
            rule.accumulate(*dense_batch(0))
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
        rule = make(factory, network)
        rule.accumulate(*batch(0))  # everything created in the first batch exists now
        rule.zero_grad()
        oracle(rule)
        rule.accumulate(*batch(1))
        own = gradients(rule.model)
        rule.detach()
        rule.zero_grad()
        exact = Backprop(rule.model)
        exact(*batch(1)).backward()
        require_same(own, gradients(rule.model), 1e-12, "in its oracle limit the rule is not backpropagation")


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
    "odd_modules": check_odd_modules,
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
        skip: names of checks from :data:`CHECKS` to leave out; before PyTorch 2.13, which compiles no rules, that is also
            "compile".

    Raises:
        AssertionError: the first thing the rule does wrong.

    >>> check_rule(Backprop, skip=("distributed", "compile"))
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        kind = type(factory).__name__
        raise ConfigError(f"check_rule makes many rules: give the class, or a function of model and loss; got a {kind}")
    skip = {skip} if isinstance(skip, str) else set(skip)
    if unknown := skip - CHECKS.keys():
        raise ValueError(f"skip names no checks: {sorted(unknown)}; known: {', '.join(CHECKS)}")
    checks: dict[str, Callable[[Factory], None]] = dict(CHECKS)
    checks["gradients"] = partial(check_gradients, without_gradient=without_gradient)
    for name, check in checks.items():
        if name not in skip and (COMPILES or name != "compile"):
            check(factory)
    if oracle is not None:
        check_oracle(factory, oracle)
