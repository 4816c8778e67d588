"""Models seen as chains: what is accepted, what each stage computes, and that every refusal names module and remedy."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import apical
from apical.bench.names import find_rule
from apical.core.chain import Chain
from apical.errors import UnsupportedModelError


class Lenet(nn.Module):
    """A chain that is no Sequential: nested modules, one activation used three times, Identity in between."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.LeakyReLU(0.1, inplace=True)
        self.features = nn.ModuleDict({"a": nn.Conv2d(1, 3, 3, padding=1), "b": nn.Conv2d(3, 4, 3, stride=2)})
        self.pool, self.flat, self.skip = nn.AvgPool2d(2), nn.Flatten(), nn.Identity()
        self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip(self.relu(self.features["a"](x)))
        x = self.relu(self.skip(self.features["b"](x)))
        return self.head(self.flat(self.pool(x)))


class Forward(nn.Module):
    """Two dense layers of one width and a function of them."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _seen(x: Tensor, look: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor itself, after a look at it that nothing comes of."""
    look(x)
    return x


class FunctionalLenet(nn.Module):
    """The same written with functions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2)
        self.c, self.d = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.a(x), inplace=True)
        x = F.relu_(self.b(x))
        x = F.avg_pool2d(x, 2)
        return self.d(torch.tanh(self.c(x.view(len(x), -1))))


ACCEPTED: dict[str, tuple[nn.Module, tuple[int, ...], list[str]]] = {
    "one layer": (nn.Linear(4, 3), (4,), [""]),
    "mlp": (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,), ["0", "2"]),
    "activation last": (nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3), nn.Tanh()), (4,), ["0", "2"]),
    "no activations": (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), (4,), ["0", "1"]),
    "activation first": (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)), (4,), ["1"]),
    "flatten first": (nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)), (3, 4), ["1", "3"]),
    "reshaped": (nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 3)), (4,), ["0", "3"]),
    "lenet": (Lenet(), (1, 6, 6), ["features.a", "features.b", "head.0", "head.2"]),
    "functional lenet": (FunctionalLenet(), (1, 6, 6), ["a", "b", "c", "d"]),
    "functional": (Forward(lambda m, x: m.second(F.relu(m.first(x)))), (4,), ["first", "second"]),
    "functional in place": (Forward(lambda m, x: m.second(m.first(x).relu_())), (4,), ["first", "second"]),
    "generated": (torch.fx.symbolic_trace(Forward(lambda m, x: m.second(m.first(x).tanh()))), (4,), ["first", "second"]),
    "looks at a function": (
        Forward(lambda m, x: m.second(m.act(_seen(m.first(x), lambda y: y.relu().sum())))),
        (4,),
        ["first", "second"],
    ),
    "pool between": (
        nn.Sequential(
            nn.Conv1d(2, 3, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(3, 2, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten()
        ).append(nn.Linear(2, 3)),
        (2, 8),
        ["0", "3", "6"],
    ),
    "circular": (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.ReLU()), (1, 4, 4), ["0"]),
    "same": (nn.Sequential(nn.Conv2d(1, 2, 2, padding="same"), nn.ReLU(), nn.Conv2d(2, 1, 2)), (1, 4, 4), ["0", "2"]),
}


@pytest.fixture(params=ACCEPTED)
def accepted(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, ...], list[str]]:
    torch.manual_seed(0)
    model, shape, names = ACCEPTED[request.param]
    return model.double(), shape, names


def test_stages_compute_what_the_model_computes(accepted: tuple[nn.Module, tuple[int, ...], list[str]]) -> None:
    model, shape, names = accepted
    inputs = torch.randn(3, *shape, dtype=torch.double)
    before = inputs.clone()
    expected = model(inputs.clone()).detach()
    chain = Chain(model, shape)
    states = chain.run(inputs)
    assert [stage.name for stage in chain.stages] == names
    assert torch.equal(states.r[-1], expected)
    assert torch.equal(inputs, before)
    assert not states.r[-1].requires_grad
    for i, stage in enumerate(chain.stages):
        assert states.v[i].shape == (3, *stage.shape)
        assert states.r[i].shape == (3, *stage.input_shape)
        assert stage.size == states.v[i][0].numel()
        assert torch.equal(stage.layer(stage.seen(states.r[i])), states.v[i])
        assert torch.equal(stage.activation(states.v[i].clone()), states.r[i + 1])
        kept = states.v[i].clone()
        stage.activation(states.v[i])
        assert torch.equal(states.v[i], kept)  # not in place, or the potentials would be lost
        assert chain.weights[i] is stage.layer.weight


def test_linear_part_and_its_transpose(accepted: tuple[nn.Module, tuple[int, ...], list[str]]) -> None:
    model, shape, _ = accepted
    for stage in Chain(model, shape).stages:
        rates = torch.randn(2, *stage.input_shape, dtype=torch.double)
        zero = stage.layer(stage.seen(torch.zeros_like(rates)))
        expected = (stage.layer(stage.seen(rates)) - zero).detach()
        with torch.no_grad():
            torch.testing.assert_close(stage.linear(rates), expected, rtol=1e-12, atol=1e-13)
            added = torch.randn(2, *stage.shape, dtype=torch.double)
            torch.testing.assert_close(stage.linear(rates, added), expected + added, rtol=1e-12, atol=1e-13)
            rows = torch.randn(4, stage.size, dtype=torch.double)
            pulled = stage.transposed(rows)
        assert pulled.shape == (4, rates[0].numel())
        products = (rows @ expected.flatten(1).T, pulled @ rates.flatten(1).T)  # <rows, W rates> = <rows W, rates>
        torch.testing.assert_close(*products, rtol=1e-11, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    size=st.integers(5, 8),
)
def test_transpose_of_any_convolution(
    channels: int, kernel: int, stride: int, padding: int, dilation: int, size: int
) -> None:
    layer = nn.Conv2d(channels, 2, kernel, stride, padding, dilation).double()
    (stage,) = Chain(layer, (channels, size, size)).stages
    rates, rows = torch.randn(2, channels, size, size).double(), torch.randn(3, stage.size).double()
    with torch.no_grad():
        products = (rows @ stage.linear(rates).flatten(1).T, stage.transposed(rows) @ rates.flatten(1).T)
    torch.testing.assert_close(*products, rtol=1e-11, atol=1e-12)


def test_making_a_chain_leaves_the_model_as_it_was() -> None:
    model = Lenet().train()
    model.head.eval()
    torch.manual_seed(3)
    state, keys = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    Chain(model, (1, 6, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.head.training
    assert not model.head[0].training
    assert model.relu.inplace
    assert all(torch.equal(value, keys[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Bent(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() ** 2


class Maximum(nn.AvgPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel_size)


class Scale(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class WithPair(Forward):
    def __init__(self) -> None:
        super().__init__(lambda m, x: m.pair(m.first(x), x))
        self.pair = Pair()


def residual(m: Forward, x: Tensor) -> Tensor:
    return m.second(m.act(m.first(x))) + x


def inner_residual(m: Forward, x: Tensor) -> Tensor:
    return m.second(m.first(x) + x)


def residual_in_place(m: Forward, x: Tensor) -> Tensor:
    hidden = m.first(x)
    hidden += x
    return m.second(m.act(hidden))


def output_in_place(m: Forward, x: Tensor) -> Tensor:
    output = m.second(m.act(m.first(x)))
    return output.mul_(2)


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...] | None, str]] = {
    "batch norm": (
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
        None,
        r"'1' \(BatchNorm1d\).*remove it",
    ),
    "layer norm": (nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), None, r"'1' \(LayerNorm\).*remove it"),
    "max pool": (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)),
        (1, 6, 6),
        r"'1' \(MaxPool2d\) is not linear; use average",
    ),
    "adaptive max": (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveMaxPool2d(2)),
        (1, 6, 6),
        r"'1' \(AdaptiveMaxPool2d\).*remove",
    ),
    "dropout": (nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)), None, r"'1' \(Dropout\).*random; remove it"),
    "prelu": (nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)), None, r"'1' \(PReLU\).*remove it"),
    "rrelu": (nn.Sequential(nn.Linear(4, 5), nn.RReLU(), nn.Linear(5, 3)), None, r"'1' \(RReLU\).*remove it"),
    "softmax": (nn.Sequential(nn.Linear(4, 5), nn.Softmax(1)), None, r"'1' \(Softmax\).*remove it"),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.ReLU()), (1, 6, 6), r"'0' \(ConvTranspose2d\): transposed"),
    "residual": (
        Forward(residual),
        None,
        r"output is not the output of module 'second' but the result of 'add': a function, a sum",
    ),
    "inner sum": (
        Forward(inner_residual),
        None,
        r"input of module 'second' is not the output of module 'first'.*sum.*chain",
    ),
    "sum in place": (Forward(residual_in_place), None, r"input of module 'act' is not the output of module 'first'.*sum"),
    "output in place": (
        Forward(output_in_place),
        None,
        r"is not the output of module 'second' but the result of 'mul': a function, a sum",
    ),
    "functional after a sum": (
        Forward(lambda m, x: m.second(F.relu(m.first(x) + x))),
        None,
        r"input of function 'F.relu' is not the output of module 'first' but the result of 'add'.*a sum",
    ),
    "functional maximum": (
        Forward(lambda m, x: m.second(F.max_pool1d(m.first(x), 1))),
        None,
        r"'F.max_pool1d' \(MaxPool1d\) is not linear; use average pooling",
    ),
    "functional softmax": (
        Forward(lambda m, x: F.log_softmax(m.second(m.first(x)), dim=1)),
        None,
        r"'F.log_softmax' \(LogSoftmax\) is not supported in a chain",
    ),
    "other functions in training": (
        Forward(lambda m, x: m.second(F.relu(m.first(x)) if m.training else torch.tanh(m.first(x)))),
        None,
        r"calls different modules in training mode \('first', 'F.relu' \(ReLU\(\)\), 'second'\) and in evaluation mode",
    ),
    "other options in training": (
        Forward(lambda m, x: m.second((F.relu if m.training else F.relu6)(m.first(x)))),
        None,
        r"calls different modules in training mode .*ReLU\(\).* and in evaluation mode .*ReLU6",
    ),
    "several outputs": (Forward(lambda m, x: {"y": m.second(m.first(x))}), None, r"output is a dict.*wrap the model"),
    "dropout in training": (
        Forward(lambda m, x: m.second(F.dropout(m.act(m.first(x)), 0.5, m.training))),
        None,
        r"input of module 'second' is not the output of module 'act' but the result of 'dropout'.*a function",
    ),
    "noise in training": (
        Forward(lambda m, x: m.second(m.act(m.first(x)) + (torch.randn(4) if m.training else 0))),
        None,
        r"input of module 'second' is not the output of module 'act'.*a function",
    ),
    "other modules in training": (
        Forward(lambda m, x: m.second(m.act(m.first(x))) if m.training else m.second(m.first(x))),
        None,
        r"Forward calls different modules in training mode \('first', 'act', 'second'\) and in evaluation mode \('first'",
    ),
    "overridden activation": (
        nn.Sequential(nn.Linear(4, 4), Bent(), nn.Linear(4, 4)),
        None,
        r"'1' \(Bent\) is not known.*apical.register_activation\(Bent\)",
    ),
    "overridden pool": (
        nn.Sequential(nn.Conv2d(1, 2, 2), Maximum(2), nn.Conv2d(2, 2, 2)),
        (1, 6, 6),
        r"'1' \(Maximum\) is not known",
    ),
    "overridden identity": (nn.Sequential(nn.Linear(4, 4), Scale()), None, r"'1' \(Scale\) is not known"),
    "scaled input": (
        Forward(lambda m, x: m.second(m.first(2 * x))),
        None,
        r"input of module 'first' is not the model's input",
    ),
    "branch": (
        Forward(lambda m, x: (m.first(x), m.second(x))[1]),
        None,
        r"input of module 'second' is not the output of .*'first'",
    ),
    "twice": (
        Forward(lambda m, x: m.first(m.act(m.first(x)))),
        None,
        r"layer 'first' is called twice; use a separate layer",
    ),
    "shared": (nn.Sequential(*[nn.Linear(4, 4)] * 2), None, r"'1' is the same object as module '0'; give each place"),
    "two arguments": (WithPair(), None, r"module 'pair' does not map one tensor to one tensor"),
    "own module": (
        nn.Sequential(nn.Linear(4, 4), Square(), nn.Linear(4, 4)),
        None,
        r"'1' \(Square\) is not known.*replace it",
    ),
    "two activations": (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh()),
        None,
        r"'2' \(Tanh\) does not follow.*move it",
    ),
    "late activation": (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.Tanh(), nn.Conv2d(2, 2, 2)),
        (1, 6, 6),
        r"'2' \(Tanh\) does not follow a weighted layer directly; move it",
    ),
    "tail": (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()),
        (1, 6, 6),
        r"'2' \(Flatten\) follows the last.*end the",
    ),
    "bilinear": (nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4)), None, r"'1' \(Bilinear\).*replace it"),
    "no layer": (nn.Sequential(nn.ReLU()), (4,), "no Linear or convolution"),
    "no shape": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), None, r"layer '0' is a convolution: pass input_shape"),
    "wrong shape": (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),
        (3, 6, 6),
        r"cannot be run on a sample of shape \(3, 6, 6\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_chain_is_refused_by_name(name: str) -> None:
    model, shape, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        Chain(model, shape)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training


CHANGES = {
    "hook on activation": ("1", lambda model: model[1].register_forward_hook(lambda m, given, made: made**2)),
    "hook before activation": ("1", lambda model: model[1].register_forward_pre_hook(lambda m, given: (given[0] + 1,))),
    "hook on pool": ("3", lambda model: model[3].register_forward_hook(lambda m, given, made: made + 1)),
    "hook on layer": ("2", lambda model: model[2].register_forward_hook(lambda m, given, made: made + 1)),
    "forward of activation": ("1", lambda model: setattr(model[1], "forward", torch.sin)),
    "forward of pool": ("3", lambda model: setattr(model[3], "forward", lambda x: F.max_pool2d(x, 2))),
    "forward of layer": ("2", lambda model: setattr(model[2], "forward", lambda x: model[2]._conv_forward(x, 1.0, None))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_the_chain_are_refused_at_the_next_batch(change: str) -> None:
    name, make = CHANGES[change]
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 2), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    )
    chain, inputs = Chain(model, (1, 6, 6)), torch.randn(2, 1, 6, 6)
    chain.run(inputs)
    make(model)
    with pytest.raises(UnsupportedModelError, match=f"'{name}'"):
        chain.run(inputs)
    with pytest.raises(UnsupportedModelError, match=f"'{name}'"):
        chain.enter(inputs)


@pytest.mark.parametrize("name", ["dfc-ss", "dtp", "ep", "pc", "ccl", "local-both", "ff"])
def test_dropout_that_is_put_between_layers_later_is_refused(name: str) -> None:
    """In evaluation it does nothing; in training the rule would leave it out."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    rule, batch = find_rule(name).build(model), (torch.rand(8, 6), torch.arange(8) % 4)
    rule(*batch)
    model.insert(2, nn.Dropout(0.5))
    with pytest.raises(UnsupportedModelError, match="computes another function than when the rule was made"):
        rule(*batch)


def test_hooks_that_only_look_are_welcome() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), []
    chain, inputs = Chain(model), torch.randn(2, 4)
    expected = chain.run(inputs)
    for module in model:
        module.register_forward_hook(lambda module, given, made: seen.append(made))
        module.register_forward_pre_hook(lambda module, given: None)
    states = chain.run(inputs)
    assert all(torch.equal(a, b) for a, b in zip(states.v + states.r, expected.v + expected.r, strict=True))
    assert seen


def test_hooks_that_only_look_may_see_what_is_no_number() -> None:
    """NaN is not equal to itself, and no change; a hook that puts numbers in its place makes one."""
    model, inputs = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.full((2, 4), torch.nan)
    chain, seen = Chain(model), []
    model[1].register_forward_hook(lambda module, given, made: seen.append(made))
    assert chain.run(inputs).r[-1].isnan().all()
    assert seen
    model[1].register_forward_hook(lambda module, given, made: made.nan_to_num())
    with pytest.raises(UnsupportedModelError, match=r"a hook on module '1' \(Tanh\) changes"):
        chain.run(inputs)


@pytest.mark.parametrize("changes", [False, True])
def test_hooks_on_every_module_may_look_and_not_change(changes: bool) -> None:
    chain, inputs = Chain(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))), torch.randn(2, 4)
    expected = chain.run(inputs)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, given, made: 2 * made if changes and isinstance(module, nn.Tanh) else None
    )
    try:
        if changes:
            with pytest.raises(UnsupportedModelError, match=r"a hook on module '1' \(Tanh\) changes"):
                chain.run(inputs)
        else:
            assert torch.equal(chain.run(inputs).r[-1], expected.r[-1])
    finally:
        hook.remove()


def test_checkpointed_segments_are_seen_through() -> None:
    model = Forward(lambda m, x: m.second(checkpoint(lambda y: m.act(m.first(y)), x, use_reentrant=False)))
    assert [stage.name for stage in Chain(model).stages] == ["first", "second"]


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 3)
        self.spare, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class Keyed(Spare):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x["image"])


@pytest.mark.parametrize("rule", [apical.DeepFeedbackControl, apical.CounterCurrentLearning])
def test_every_layer_that_is_not_called_is_named(rule: type[apical.CreditRule]) -> None:
    with pytest.raises(UnsupportedModelError, match="layers 'spare', 'other' were not called"):
        rule(Spare())


@pytest.mark.parametrize("rule", [apical.DeepFeedbackControl, apical.CounterCurrentLearning])
def test_a_model_that_takes_no_tensor_is_refused_in_words(rule: type[apical.CreditRule]) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be run on a sample of shape"):
        rule(Keyed())
