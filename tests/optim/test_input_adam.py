"""Input-wise Adam against its equations, and what it is for: its step commutes with a matrix from the left."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import apical
from apical.data import load
from apical.errors import ConfigError
from apical.optim import InputAdam


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def test_the_equations_number_by_number() -> None:
    """Five steps with decay, every sum written out."""
    lr, beta1, beta2, eps, decay = 0.1, 0.8, 0.9, 1e-6, 0.3
    w, bias = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))
    expected, flat = w.detach().tolist(), bias.detach().tolist()
    optimizer = InputAdam([w, bias], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    m, v = [[0.0, 0.0] for _ in range(3)], [0.0, 0.0]
    mean, square = [0.0, 0.0], [0.0, 0.0]
    for t in range(1, 6):
        w.grad, bias.grad = torch.randn(3, 2), torch.randn(2)
        for j in range(2):
            v[j] = beta2 * v[j] + (1 - beta2) * sum(float(w.grad[i, j]) ** 2 for i in range(3)) / 3
            mean[j] = beta1 * mean[j] + (1 - beta1) * float(bias.grad[j])
            square[j] = beta2 * square[j] + (1 - beta2) * float(bias.grad[j]) ** 2
            flat[j] -= lr * decay * flat[j]
            flat[j] -= lr * mean[j] / (1 - beta1**t) / (math.sqrt(square[j] / (1 - beta2**t)) + eps)
            for i in range(3):
                m[i][j] = beta1 * m[i][j] + (1 - beta1) * float(w.grad[i, j])
                expected[i][j] -= lr * decay * expected[i][j]
                expected[i][j] -= lr * m[i][j] / (1 - beta1**t) / (math.sqrt(v[j] / (1 - beta2**t)) + eps)
        optimizer.step()
    assert torch.allclose(w.detach(), torch.tensor(expected), rtol=0, atol=1e-13)
    assert torch.allclose(bias.detach(), torch.tensor(flat), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 3, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize("given", [False, True], ids=["orthogonal", "random"])
def test_its_step_commutes_with_a_matrix_from_the_left(shape: tuple[int, ...], given: bool) -> None:
    """T5: `u(B^T G) = B^T u(G)` for orthogonal B, where v is equal, with v given for a random one."""
    b = torch.randn(6, 6) if given else torch.linalg.qr(torch.randn(6, 6))[0]
    w, r = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.empty(shape))

    def left(x: Tensor) -> Tensor:
        result: Tensor = (b.T @ x.flatten(1)).view(shape)
        return result

    r.data = left(w.data)
    optimizer = InputAdam([w, r], lr=0.1, weight_decay=0.1, betas=(0.9, 1 - 2**-53 if given else 0.999))
    v = torch.rand(1, *shape[1:])
    for p in (w, r) if given else ():  # after so many steps, and so slow, v stays
        optimizer.state[p].update(step=10**18, exp_avg=torch.zeros_like(p), exp_avg_sq=v.clone())
    for _ in range(20):
        w.grad = torch.randn(shape)
        r.grad = left(w.grad)
        optimizer.step()
    assert torch.allclose(r.detach(), left(w.detach()), rtol=0, atol=1e-12)


def test_a_state_continues_and_a_closure_is_called() -> None:
    layers = [nn.Linear(4, 3), nn.Linear(4, 3)]
    optimizers = [InputAdam(layer.parameters(), lr=0.1) for layer in layers]
    x = torch.randn(5, 4)

    def steps(layer: nn.Linear, optimizer: InputAdam) -> None:
        for _ in range(3):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = layer(x).square().sum()
                loss.backward()
                return loss

            assert float(optimizer.step(closure).detach()) > 0

    steps(layers[0], optimizers[0])
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for layer, optimizer in zip(layers, optimizers, strict=True):
        steps(layer, optimizer)
    assert torch.equal(layers[0].weight, layers[1].weight)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}])
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="InputAdam needs"):
        InputAdam([nn.Parameter(torch.zeros(1))], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("feedback", ["orthogonal", "random"])
def test_pfa_learns_by_its_own_local_step_and_stays_aligned(feedback: str) -> None:
    """P2, P3: with a state of its own R is what it would be by W's change; exactly for orthogonal B, nearly for random."""
    paths = []
    for update in ("own", "shared"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
        rule = apical.ProductFeedbackAlignment(
            model,
            feedback=feedback,  # type: ignore[arg-type]
            update=update,
            initial="mirror",
        )
        optimizer = InputAdam(rule.parameters(), lr=0.01, weight_decay=0.01)
        for _ in range(60):
            x = torch.randn(16, 6)
            optimizer.zero_grad()
            rule(x, x[:, :4].argmax(dim=1)).backward()
            optimizer.step()
        paths.append(rule.feedback_weights()["2"])
        assert getattr(rule.plastic_of("2"), "outputs", 12) == 12
    if feedback == "orthogonal":
        assert torch.allclose(paths[0], paths[1], rtol=0, atol=1e-11)
    else:
        assert float(nn.functional.cosine_similarity(paths[0].flatten(), paths[1].flatten(), dim=0)) > 0.99


def angles(optimiser: type[torch.optim.Optimizer], update: str) -> list[float]:
    """Degrees between product and weight of the topmost layer, after the first and the last of 150 steps on digits."""
    torch.manual_seed(0)
    digits = load("digits")
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
    ).double()
    rule = apical.ProductFeedbackAlignment(model, update=update, initial="mirror")  # type: ignore[arg-type]
    optimizer = optimiser(rule.parameters(), lr=0.01)  # type: ignore[call-arg]
    found = []
    for step in range(150):
        batch = torch.randint(len(digits.train), (32,))
        optimizer.zero_grad()
        rule(digits.train.inputs[batch].double(), digits.train.targets[batch]).backward()
        optimizer.step()
        if step in (0, 149):
            name, path = list(rule.feedback_weights().items())[-1]
            cosine = nn.functional.cosine_similarity(path.flatten(), rule.layers[name].weight.flatten(), dim=0)
            found.append(math.degrees(math.acos(float(cosine.detach()))))
    return found


@pytest.mark.filterwarnings("ignore:update=.own. moves R by AdamW")
def test_own_state_keeps_the_angle_under_input_adam_and_loses_it_under_adamw() -> None:
    """Pilot M9 in small. Expected for isotropic weights and expansion 10: arctan(1 / sqrt(10)) = 17.5 degrees."""
    for first, last in (angles(InputAdam, "own"), angles(torch.optim.AdamW, "shared")):
        assert 13 < first < 22
        assert 13 < last < 22
    _, drifted = angles(torch.optim.AdamW, "own")
    assert drifted > 27
