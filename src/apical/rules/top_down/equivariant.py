"""A top-down network for any number of classes: one small perceptron T applied to each class separately.

    s_k = [p_k ; y_k ; p.y],   z_k = T([p_k ; y_k ; p.y]) - T([y_k ; y_k ; p.y])     for each class k
    c_L,k = z_k[0],   c_l = D_l z[:, l],   T(s) = V2 tanh(V1 s + b1)

where p_k is the class's own probability, y_k whether it is the right one, and p.y the probability of the right class: all
that T sees. It is the same for all classes, so that classes may be renamed (credits are renamed with them) and there may be
any number of them. Hidden layers are counted from the output; l is 1 for the topmost, and the deepest emission serves all
deeper layers. D_l (units, classes) is fixed and random, of the Xavier law that direct feedback alignment has: hidden credit
is direct feedback alignment of an evolved error, one for each layer. With T(s) = p_k it is direct feedback alignment.

Credit is relative to that of a class whose own probability is right, so that a right prediction gets none, and neither does
a class that is wrong and ruled out: with 50,000 classes nearly all are. Relative to T at p = y they would get one of the
same size each, which no evolution with few classes would notice.

This departs from TDCA (arXiv 2208.01416), whose network sees all classes together and is made for their number.
"""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.top_down.teacher import Output, Place, TopDownNetwork, written

CLASSES = "apical-teacher-classes-1"
"""The format of their files."""

CHUNK = 2**18
"""Maximum number of values of T's hidden layer held at a time, for networks with outputs at many positions."""

MANY = 256
"""With more classes than that, and than twice the topmost layer's units n, D_l is P_l Q, with Q (n, classes) for all l."""


class Feedback(NamedTuple):
    """The matrices of one network's hidden layers, in the order of execution.

    Attributes:
        emissions: which of T's emissions each layer takes.
        matrices: D_l^T (classes, width), or P_l^T (n, width).
        shared: Q^T (classes, n), where there are many classes.
    """

    emissions: list[int]
    matrices: list[Tensor]
    shared: Tensor | None

    def heard(self, z: Tensor) -> Tensor:
        """What the matrices are multiplied by, from one emission (rows, classes)."""
        return z if self.shared is None else z @ self.shared


class EquivariantNetwork(nn.Module):
    """Maps prediction and target (batch, classes) to credits of hidden units and logits, for any number of classes.

    Args:
        layers: number of hidden layers with their own emission, counted from the output.
        hidden: units in the hidden layer of T; 0 makes T linear.
        output: the output's credit is "evolved", z_k[0], or the "error", p_k - y_k.

    Raises:
        ConfigError: a size is not positive (hidden: negative), or output is neither.

    >>> network = EquivariantNetwork(layers=4, hidden=8)
    >>> sum(p.numel() for p in network.parameters())
    72
    >>> p, y = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> [tuple(credit.shape) for credit in network.credits(network(p, y), [32, 16])]
    [(1, 32), (1, 16), (1, 3)]
    """

    credit: Place = "logits"

    def __init__(self, layers: int = 4, hidden: int = 8, output: Output = "evolved") -> None:
        super().__init__()
        if layers < 1 or hidden < 0:
            raise ConfigError(f"layers must be positive and hidden not negative; got layers={layers}, hidden={hidden}")
        if output not in get_args(Output):
            raise ConfigError(f'output must be "evolved" or "error"; got {output!r}')
        self.layers, self.hidden, self.output = layers, hidden, output
        below = [nn.Linear(3, hidden), nn.Tanh()] if hidden else []
        emitted = layers + (output == "evolved")
        self.body = nn.Sequential(*below, nn.Linear(hidden or 3, emitted, bias=False))  # which a difference would cancel
        for layer in self.body:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self._feedback: dict[tuple[Any, ...], Feedback] = {}

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments that create another network like this one."""
        return {"layers": self.layers, "hidden": self.hidden, "output": self.output}

    def check(self, outputs: int, widths: Sequence[int], classes: bool = True) -> None:
        """Refuse a learner that this network cannot teach.

        Raises:
            UnsupportedModelError: its targets are numbers, or it has no hidden layer.
        """
        if not classes:
            raise UnsupportedModelError(
                "the top-down network was made for classes and reads their probabilities, but the targets are numbers; "
                "evolve a TopDownNetwork for them, or choose another rule (dfa)"
            )
        if not widths:
            raise UnsupportedModelError("the model has no hidden layer that the top-down network could send credit to")

    def forward(self, prediction: Tensor, target: Tensor, classes: bool = True) -> Tensor:
        """z (1 + layers, batch, classes): the output's credit, then the emissions of hidden layers from the output down.

        Args:
            prediction: probabilities (batch, classes).
            target: one-hot, or all zero where a row does not count.
            classes: for the interface of :class:`apical.rules.top_down.teacher.TopDownNetwork`; there is no other kind.
        """
        return self._emitted(prediction, target, cast(nn.Linear, self.body[-1]).weight)

    def _emitted(self, prediction: Tensor, target: Tensor, top: Tensor) -> Tensor:
        """z for those rows of V2 that `top` has, below p - y if that is the output's credit."""
        error = prediction - target
        if not self.hidden:
            z = top[:, :1, None] * error
        else:
            bottom = cast(nn.Linear, self.body[0])
            own, of_target, of_right = bottom.weight.T.unsqueeze(-1)  # V1, (hidden, 1) each
            q = (prediction * target).sum(1)
            bias = of_right * q + bottom.bias.unsqueeze(-1)  # (hidden, batch)
            wrong = torch.addcmul(bias.unsqueeze(-1), own.unsqueeze(-1), prediction).tanh_()  # (hidden, batch, classes)
            wrong = wrong.sub_(bias.tanh().unsqueeze(-1))
            right = torch.tanh(own * q + of_target + bias) - torch.tanh(own + of_target + bias)
            z = torch.where(target > 0, (top @ right).unsqueeze(-1), (top @ wrong.flatten(1)).view(-1, *error.shape))
        return z if self.output == "evolved" else torch.cat([error.unsqueeze(0), z])

    def credits(self, z: Tensor, widths: Sequence[int], feedback: Feedback | None = None) -> list[Tensor]:
        """Credits (batch, width) of each hidden layer, and (batch, classes) of the output, from z.

        Args:
            feedback: of the layers; None takes that of seed 0.
        """
        used = self.feedback(z.shape[2], widths, like=z) if feedback is None else feedback
        heard = {number: used.heard(z[number]) for number in set(used.emissions)}
        hidden = [heard[number] @ matrix for number, matrix in zip(used.emissions, used.matrices, strict=True)]
        return [*hidden, z[0]]

    def later(
        self, prediction: Tensor, target: Tensor, widths: Sequence[int], classes: bool, feedback: Feedback | None = None
    ) -> Callable[[int], Tensor]:
        """A function that makes a layer's credit (rows, width) by its number, or the output's (rows, classes) by -1.

        As :meth:`credits` of :meth:`forward`, for many rows: some at a time pass T.
        """
        used = self.feedback(prediction.shape[1], widths, like=prediction) if feedback is None else feedback
        numbers, evolved = sorted(set(used.emissions)), self.output == "evolved"
        top = cast(nn.Linear, self.body[-1]).weight[[0, *numbers] if evolved else [number - 1 for number in numbers]]
        rows = max(1, CHUNK // (prediction.shape[1] * max(self.hidden, 1)))
        parts: list[list[Tensor]] = []
        for p, y in zip(prediction.split(rows), target.split(rows), strict=True):
            last, *hidden = self._emitted(p, y, top)
            parts.append([last, *map(used.heard, hidden)])
        last, *heard = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        of = dict(zip(numbers, heard, strict=True))
        return lambda index: last if index == -1 else of[used.emissions[index]] @ used.matrices[index]

    def feedback(
        self, outputs: int, widths: Sequence[int], seed: int = 0, names: Sequence[str] = (), *, like: Tensor
    ) -> Feedback:
        """The matrices of a learner's hidden layers, drawn once from the Xavier uniform law.

        Args:
            outputs: classes.
            widths: units of each layer, in the order of execution.
            seed: they follow from it and from the layers' names.
            names: of the layers; those of the same name (the steps of a recurrent network) share one. None: they are
                numbered from the output.
            like: has their type and device.
        """
        named = tuple(names) or tuple(map(str, range(len(widths), 0, -1)))
        place = (seed, outputs, tuple(widths), named, like.dtype, like.device)
        if place not in self._feedback:
            self._feedback[place] = drawn(self.layers, outputs, widths, seed, named, like)
        return self._feedback[place]

    def save(self, path: Path | str, provenance: dict[str, Any] | None = None) -> None:
        """Write weights, sizes and provenance (any JSON values) to one file, atomically."""
        origin = json.dumps(provenance or {}, sort_keys=True)
        written(path, {"format": CLASSES, **self.sizes, "weights": self.state_dict(), "provenance": origin})


Network = TopDownNetwork | EquivariantNetwork
"""Kinds of top-down networks that compute credit at many positions on demand."""


def drawn(layers: int, outputs: int, widths: Sequence[int], seed: int, names: Sequence[str], like: Tensor) -> Feedback:
    """See :meth:`EquivariantNetwork.feedback`; `layers` as there."""

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> Tensor:
        place = int.from_bytes(sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed((seed + place) % 2**63)
        numbers = torch.empty(rows, columns, dtype=torch.double, device="cpu")  # whatever the type: they are the same in all
        return nn.init.xavier_uniform_(numbers, scale, generator).to(like.dtype).to(like.device)

    depth = {name: number for number, name in enumerate(dict.fromkeys(reversed(names)), start=1)}
    emissions = [min(depth[name], layers) for name in names]
    shared, inner, of_name = None, outputs, dict(zip(names, widths, strict=True))
    if outputs > max(MANY, 2 * widths[-1]):
        inner = widths[-1]
        shared = matrix("*", outputs, inner)
    made = {}
    for name, width in of_name.items():
        # squares so large that those of P_l Q have the Xavier law's size
        square = 1.0 if shared is None else (outputs + inner) * (inner + width) / (2 * inner * (outputs + width))
        made[name] = matrix(name, inner, width, square**0.5)
    return Feedback(emissions, [made[name] for name in names], shared)
