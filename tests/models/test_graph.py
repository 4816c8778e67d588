"""Learned connectivity: what special wirings are, what an edge learns under each rule, and sparsity."""

import gc
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import apical
from apical.cli.main import main
from apical.core.wrappers import COMPILES
from apical.errors import ConfigError
from apical.models import Graph, build
from apical.models.graph import Attention, GraphClassifier, Mix
from apical.testing import check_model
from apical.testing.two_ranks import on_two_ranks


def nodes(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.ReLU(), nn.Linear(4, 4)).double() for _ in range(count)]


def states(model: Graph, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """u_1.. and x_0.. by the equations."""
    a = model.adjacency().double()
    received, sent = [], [x]
    for i in range(1, len(a)):
        received.append(sum(a[i, j] * sent[j] for j in range(i)))
        if i < len(a) - 1:
            sent.append(model.nodes[i - 1](received[-1]))
    return received, sent


@pytest.mark.parametrize("wiring", ["complete", "chain", "residual", 0.5])
def test_the_equations(wiring: str | float) -> None:
    model = Graph(nodes(), wiring).double()
    x = torch.randn(5, 4).double()
    assert (model(x) - states(model, x)[0][-1]).abs().max() < 1e-15
    a = model.adjacency()
    assert torch.equal(a, a.tril(-1))
    assert all(row[i - 1] for i, row in enumerate(a) if i)


@pytest.mark.parametrize(("share", "wiring"), [(0, "chain"), (1.0, "complete")])
def test_no_share_and_the_whole_of_the_earlier_nodes(share: float, wiring: str) -> None:
    assert torch.equal(Graph(nodes(5), share).adjacency(), Graph(nodes(5), wiring).adjacency())


def test_a_chain_is_a_chain() -> None:
    own = nodes()
    model, plain = Graph(own, "chain", "fixed").double(), nn.Sequential(*own)
    x = torch.randn(5, 4).double()
    assert torch.equal(model(x), plain(x))
    for one, other in zip(
        torch.autograd.grad(model(x).square().sum(), list(model.parameters())),
        torch.autograd.grad(plain(x).square().sum(), list(plain.parameters())),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_two_before_are_a_residual_network() -> None:
    """Node i hears the one before and the one before that, half of each."""
    one, two, three = own = nodes()
    x = torch.randn(5, 4).double()
    first = one(x)
    second = two((first + x) / 2)
    third = three((second + first) / 2)
    assert (Graph(own, "residual").double()(x) - (third + second) / 2).abs().max() < 1e-15


def test_edges_of_one_are_the_dense_sum() -> None:
    own = nodes()
    model = Graph(own).double()
    with torch.no_grad():
        for mix in model.mixes:
            mix.alpha.fill_(1)
    total = x = torch.randn(5, 4).double()
    for node in own:
        total = total + node(total)
    assert (model(x) - total).abs().max() < 1e-14


def test_only_the_order_of_dependence_matters() -> None:
    """Two nodes that do not hear each other change places."""
    first, second, last = nodes()
    torch.manual_seed(1)
    a = torch.rand(5, 5).tril(-1).double()
    a[2, 1] = 0
    order = [0, 2, 1, 3, 4]
    x = torch.randn(5, 4).double()
    results = []
    for own, matrix in (([first, second, last], a), ([second, first, last], a[order][:, order])):
        model = Graph(own).double()
        with torch.no_grad():
            for i, mix in enumerate(model.mixes, start=1):
                mix.alpha.copy_(matrix[i, :i])
        results.append(model(x))
    assert (results[0] - results[1]).abs().max() < 1e-15


@pytest.mark.parametrize(
    "kind",
    [
        apical.Backprop,
        apical.FeedbackAlignment,
        apical.SignSymmetry,
        apical.KolenPollack,
        apical.ProductFeedbackAlignment,
    ],
)
def test_an_edge_learns_error_times_activity_and_hands_it_on(kind: type) -> None:
    """dL/dalpha_ij = sum over the batch of <e_i, x_j>, and dL/dx_j = sum_i alpha_ij e_i."""
    torch.manual_seed(2)
    model = GraphClassifier(6, 4, 3, 3, "complete", "learned").double()
    rule = kind(model)
    sent: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}
    behind: dict[int, Tensor] = {}

    def look(i: int, mix: nn.Module) -> None:
        def keep(module: nn.Module, args: tuple[list[Tensor]], result: Tensor) -> None:
            sent.update(enumerate(args[0]))
            args[0][-1].register_hook(lambda error: behind.update({i - 1: error}))
            result.register_hook(lambda error: errors.update({i: error}))

        mix.register_forward_hook(keep)

    for i, mix in enumerate(model.graph.mixes, start=1):
        look(i, mix)
        with torch.no_grad():
            mix.alpha.copy_(torch.randn(i))
    rule(torch.randn(7, 6).double(), torch.arange(7) % 3).backward()
    for i, mix in enumerate(model.graph.mixes, start=1):
        expected = torch.stack([(errors[i] * sent[j]).sum() for j in mix.senders])
        assert (mix.alpha.grad - expected).abs().max() < 1e-14
    alpha = [mix.alpha.detach() for mix in model.graph.mixes]
    for j, error in behind.items():
        assert (error - sum(alpha[i - 1][j] * errors[i] for i in range(j + 1, 5))).abs().max() < 1e-14
    assert sorted(behind) == [0, 1, 2, 3]


def test_feedback_of_the_transpose_is_backpropagation() -> None:
    torch.manual_seed(3)
    model = GraphClassifier(6, 4, 3, 3, "complete", "attention").double()
    x, y = torch.randn(7, 6).double(), torch.arange(7) % 3
    rule = apical.FeedbackAlignment(model)
    apical.Backprop(model)(x, y).backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for name in rule.feedback_weights():
        rule.set_feedback(name, model.get_submodule(name).weight.detach())
    rule(x, y).backward()
    for name, p in model.named_parameters():
        assert (p.grad - exact[name]).abs().max() < 1e-14


def test_under_dfa_errors_reach_edges_without_a_weight() -> None:
    """e_i = relu'(u_i) * B_i e, the signal of the activation right behind u_i. The node's weight has no part in it."""
    torch.manual_seed(4)
    model = GraphClassifier(6, 4, 3, 3, "complete", "learned").double()
    rule = apical.DirectFeedbackAlignment(model)
    x, y = torch.randn(7, 6).double(), torch.arange(7) % 3
    rule(x, y).backward()
    output = model(x)
    e = torch.autograd.grad(nn.functional.cross_entropy(output, y), output)[0]
    received, sent = states(model.graph, model.stem(x))
    for i, mix in enumerate(model.graph.mixes):
        b = rule.feedback.get_buffer(f"graph/nodes/{i}/0" if i < 3 else "relu")
        error = (received[i] > 0) * (e @ b)
        assert (mix.alpha.grad - torch.stack([(error * sent[j]).sum() for j in mix.senders])).abs().max() < 1e-12


def test_a_look_at_the_placement_leaves_the_cuts_as_they_were() -> None:
    """Further cuts that a look finds are found again afterwards."""
    torch.manual_seed(4)
    x, y = torch.randn(7, 6), torch.arange(7) % 3
    grads = []
    for look in (False, True):
        torch.manual_seed(5)
        model = GraphClassifier(6, 4, 3, 3, "complete", "learned")
        rule = apical.DirectFeedbackAlignment(model)
        if look:
            assert all("cut at" in row.path for row in rule.placement(x) if row.kind == "Linear" and row.layer != "head")
        rule(x, y).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["fa", "dfa", "usf", "pfa"])
@pytest.mark.parametrize("model", ["graph-8x2", "graph-attention-8x2"])
def test_promises_on_the_model(name: str, model: str) -> None:
    """Compiled once by edges, fixed and learned, and by cuts: SignSymmetry's edges are compiled in its conformance."""
    from apical.bench.names import find_rule

    torch.manual_seed(5)
    net = build(model, (6,), 3)
    entry = find_rule(name)
    is_compiled = (name, model) in {("dfa", "graph-8x2"), ("fa", "graph-attention-8x2"), ("pfa", "graph-attention-8x2")}
    skip = () if is_compiled else ("compiled",)
    report = check_model(entry.build(net, **entry.options), torch.randn(8, 6), torch.arange(8) % 3, skip=skip)
    assert (is_compiled and COMPILES) == ("compiled" in report.passed)


def test_sparsity() -> None:
    model = Graph(nodes(), "complete").double()
    mix = model.mixes[2]
    assert isinstance(mix, Mix)
    with torch.no_grad():
        mix.alpha.copy_(torch.tensor([0.0, 0.005, -0.4], dtype=torch.double))
    model.shrink_(1e-3)
    assert (mix.alpha - torch.tensor([0.0, 0.004, -0.399], dtype=torch.double)).abs().max() < 1e-15
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mix.alpha.grad = torch.tensor([0.9e-3, 0.0, 0.0]).double()  # |gradient| < gamma: an edge at zero stays there
    optimizer.step()
    model.shrink_(0.1 * 1e-3)
    assert mix.alpha[0] == 0
    assert model.prune_() == 2
    assert mix.alpha[1] == 0


def attended(model: Graph, x: Tensor) -> Tensor:
    """u_n with alpha_i = softmax(R_i x_0 + r_i) of each sample."""
    sent = [x]
    for i, mix in enumerate(model.mixes, start=1):
        logits = x @ mix.router.weight.T + mix.router.bias
        alpha = logits.exp() / logits.exp().sum(1, keepdim=True)
        received = sum(alpha[:, [j]] * sent[j] for j in range(i))
        if i < len(model.mixes):
            sent.append(model.nodes[i - 1](received))
    return received


def test_attention() -> None:
    model = Graph(nodes(), edges="attention", features=4).double()
    x = torch.randn(5, 4).double().requires_grad_()
    mix = model.mixes[1]
    assert isinstance(mix, Attention)
    alpha = mix.weights(x)
    assert (alpha.sum(1) - 1).abs().max() < 1e-15
    assert (model(x) - attended(model, x)).abs().max() < 1e-14
    assert not torch.autograd.grad(alpha[:, 0].sum(), x, allow_unused=True)[0:1][0]
    assert (model.adjacency(x)[1:].sum(1) - 1).abs().max() < 1e-6  # in float32
    with pytest.raises(ConfigError, match="pass inputs to adjacency"):
        model.adjacency()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"wiring": "ring"}, "wiring must be"),
        ({"wiring": 2.0}, "wiring must be"),
        ({"edges": "soft"}, "unknown edges"),
        ({"edges": "attention"}, "needs features="),
    ],
)
def test_bad_input(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Graph(nodes(), **arguments)
    with pytest.raises(ConfigError, match="nodes of one width"):
        build("graph-8-4", (6,), 3)


def step(rule: nn.Module, optimizer: torch.optim.Optimizer, part: slice) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 6, generator=generator).double(), torch.arange(8) % 3
    optimizer.zero_grad()
    rule(x[part], y[part]).backward()
    optimizer.step()


def learned(rank: int | None, kind: type, edges: str) -> dict[str, Tensor]:
    torch.manual_seed(6)
    rule = kind(GraphClassifier(6, 4, 3, 3, "complete", edges).double(), F.cross_entropy)  # type: ignore[arg-type]
    part = slice(None) if rank is None else slice(rank, None, 2)
    called = rule if rank is None else DistributedDataParallel(rule)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    for _ in range(3):
        step(called, optimizer, part)
    return {name: value.detach() for name, value in rule.model.named_parameters()}


@pytest.mark.parametrize("edges", ["learned", "attention"])
@pytest.mark.parametrize("kind", [apical.FeedbackAlignment, apical.DirectFeedbackAlignment, apical.ProductFeedbackAlignment])
def test_two_ranks_are_one(kind: type, edges: str) -> None:
    ranks, alone = on_two_ranks(learned, kind, edges), learned(None, kind, edges)
    for name, value in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert (ranks[0][name] - value).abs().max() < 1e-12, name


@pytest.mark.parametrize("kind", [apical.FeedbackAlignment, apical.DirectFeedbackAlignment])
def test_steps_leave_no_tensors(kind: type) -> None:
    rule = kind(GraphClassifier(6, 4, 3, 3, "complete", "learned").double())
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.01)
    alive = []
    for _ in range(3):
        for _ in range(8):
            step(rule, optimizer, slice(None))
        gc.collect()
        alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert alive[2] <= alive[1]  # others may have let go of theirs meanwhile


@pytest.mark.parametrize("edges", ["learned", "attention"])
def test_what_is_drawn_of_a_graph_are_its_edges(edges: str) -> None:
    model = GraphClassifier(5, 4, 3, 3, "complete", edges)  # type: ignore[arg-type]
    x = torch.randn(6, 5)
    (drawn,) = model.matrices(x).values()
    assert torch.equal(drawn, model.graph.adjacency(model.stem(x)))
    assert not drawn.triu().any()


def test_a_report_draws_the_edges_over_training(tmp_path: Path) -> None:
    arguments = "--rules bp --data digits --model graph-4x2 --epochs 2 --seeds 1 --train-limit 64 --jobs 1 --probe 8"
    assert main(["compare", *arguments.split(), "--out", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "runs" / "bp" / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    kept = [line["matrices"] for line in lines]
    (before,), (after,) = (found.values() for found in (kept[0], kept[-1]))
    assert before["3"] == {"0": pytest.approx(1 / 3), "1": pytest.approx(1 / 3), "2": pytest.approx(1 / 3), "3": 0}
    assert before != after
    assert (tmp_path / "figures" / "matrices_bp_0.svg").exists()
    assert "matrices_bp_0" in (tmp_path / "report.html").read_text()
