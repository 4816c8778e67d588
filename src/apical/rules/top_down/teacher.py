"""The top-down network of TDCA (arXiv 2208.01416): a small perceptron that computes credit, and its credit diffusion.

Its only inputs are the learner's prediction and target: no activity, no weight, no loss.

    s = [p ; y],   z = V3 tanh(V2 tanh(V1 s + b1) + b2) + b3,   one credit per hidden unit and per output

Credit diffusion: z holds only K values per hidden layer, emitted at sites spread evenly over it, and unit i takes

    c_i = sum_k M_ik z_k,  M_ik ~ exp(-(u_i - s_k)^2 / (2 tau^2)), rows of sum 1,  u_i = (i + 1/2)/n,  s_k = (k + 1/2)/K

with tau = 1/(2K). The paper's own operator is not known (only its abstract could be read); this is our reading of it. A
diffusing network serves hidden layers of any width.

Relative credit, an extension of ours: a learner that is right is left alone, and the n units of a layer share its credit,

    z = T([p ; y]) - T([y ; y]),   c_i divided by sqrt(n), as a layer's initial weights are

Without it a hidden unit gets credit of one sign for as long as training lasts, which tanh bounds and ReLU does not.

With output="error", another extension of ours, only hidden units get credit from the network; the output's is p - y,
available there. An evolved credit for the output makes logits large, which evolution rewards, but without other benefit.

Where targets are classes, the output's credit stands on the logits, or on the probabilities p = softmax(logits) as in the
authors' code. The softmax's Jacobian, p (c - c.p), vanishes where a learner is confidently wrong, so that credit on
probabilities says nothing there.
"""

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from apical.rules.top_down.equivariant import EquivariantNetwork

Place = Literal["logits", "probabilities"]
"""Where the output's credit for classes applies."""

Output = Literal["evolved", "error"]
"""Source of the output's credit: the network, or the error."""

FORMAT = "apical-teacher-2"
OLDER = "apical-teacher-1"
"""The format of files that do not say where credit applies; there it applies to probabilities."""


def diffusion(units: int, sites: int, tau: float | None = None) -> Tensor:
    """The kernel M (units, sites) in float64; `tau` is 1/(2 sites) unless given.

    >>> diffusion(4, 2).sum(1).round(decimals=12).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    at_units = (torch.arange(units, dtype=torch.double) + 0.5) / units
    at_sites = (torch.arange(sites, dtype=torch.double) + 0.5) / sites
    width = 1 / (2 * sites) if tau is None else tau
    return torch.softmax(-((at_units[:, None] - at_sites) ** 2) / (2 * width**2), dim=1)


class TopDownNetwork(nn.Module):
    """Maps [prediction, target] (batch, 2 outputs) to one credit per hidden unit and per output.

    Args:
        outputs: of the learner: classes, or numbers it predicts.
        widths: units (channels) of each hidden layer of the learner, in the order of execution.
        hidden: units in each of the two hidden layers of this network.
        sites: emission sites per hidden layer (credit diffusion); None emits one credit per unit.
        relative: credit is relative to that of a right prediction, and shared by the units of a hidden layer.
        credit: the output's stands on "logits" or on "probabilities".
        shallower: also serve learners with fewer hidden layers. Layers are counted from the output, so that such a learner
            takes the credits of the topmost ones. Needs `sites`.
        projected: for many outputs (a vocabulary): how many numbers a fixed random matrix Q brings prediction and target to,
            [p Q ; y Q]; the output's credit is z Q^T. None: none.
        seed: of Q.
        output: the output's credit is "evolved", one of the network's own, or the "error", p - y, which needs no weights.

    Raises:
        ConfigError: a size is not positive, a choice is unknown, or the error is to stand on probabilities.

    >>> network = TopDownNetwork(10, [100, 100, 100])
    >>> sum(p.numel() for p in network.parameters())
    11170
    >>> sum(p.numel() for p in TopDownNetwork(10, [100, 100, 100], sites=10).parameters())
    2800
    """

    def __init__(
        self,
        outputs: int,
        widths: Sequence[int],
        hidden: int = 30,
        sites: int | None = None,
        relative: bool = False,
        credit: Place = "logits",
        shallower: bool = False,
        projected: int | None = None,
        seed: int = 0,
        output: Output = "evolved",
    ) -> None:
        super().__init__()
        if min(outputs, hidden, *widths, *(size for size in (sites, projected) if size is not None)) < 1:
            raise ConfigError(
                f"a top-down network needs positive sizes; got outputs={outputs}, widths={list(widths)}, "
                f"hidden={hidden}, sites={sites}, projected={projected}"
            )
        if credit not in get_args(Place):
            raise ConfigError(f'credit must be "logits" or "probabilities", not {credit!r}')
        if output not in get_args(Output) or (output == "error" and credit != "logits"):
            raise ConfigError(
                f'output must be "evolved", or "error" with credit="logits"; got output={output!r}, credit={credit!r}'
            )
        if shallower and sites is None:
            raise ConfigError("a top-down network for learners of several depths needs emission sites (sites=K)")
        self.outputs, self.widths, self.hidden = outputs, tuple(widths), hidden
        self.sites, self.relative, self.credit, self.shallower, self.output = sites, relative, credit, shallower, output
        self.share = 0.5  # the power of a layer's width that relative credit is divided by
        self.projected = projected
        self.projection: Tensor | None
        random = torch.Generator().manual_seed(seed)
        drawn = (
            None if projected is None else torch.randn(outputs, projected, generator=random, device="cpu") / projected**0.5
        )
        self.register_buffer("projection", None if drawn is None else drawn.to(torch.get_default_device()))
        seen = projected or outputs
        emitted = sum(self.emissions) + (seen if output == "evolved" else 0)
        self.body = nn.Sequential(
            nn.Linear(2 * seen, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, emitted, bias=not relative),  # which a difference would cancel
        )
        for layer in self.body:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self._kernels: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments that create another network like this one, for any widths of its learners if there is diffusion."""
        names = ("outputs", "emissions", "hidden", "relative", "credit", "share", "shallower", "output")
        return {name: getattr(self, name) for name in names}

    @property
    def emissions(self) -> list[int]:
        """Number of values emitted to each hidden layer."""
        return [width if self.sites is None else self.sites for width in self.widths]

    def check(self, outputs: int, widths: Sequence[int], classes: bool = True) -> None:
        """Refuse a learner whose shape this network cannot serve; `classes` says whether its targets are.

        Raises:
            UnsupportedModelError: another number of outputs or hidden layers, or, without diffusion, other widths.
        """
        wanted = f"a learner with hidden widths {list(widths)} and {outputs} outputs"
        fits = 1 <= len(widths) <= len(self.widths) if self.shallower else len(widths) == len(self.widths)
        if outputs != self.outputs or not fits:
            depths = f"{'1 to ' * (self.shallower and len(self.widths) > 1)}{len(self.widths)}"
            layers = "hidden layer" if depths == "1" else "hidden layers"
            raise UnsupportedModelError(
                f"the top-down network was made for {depths} {layers} and {self.outputs} outputs and "
                f"cannot teach {wanted}; "
                + ("use the shipped teacher 'classes', which accepts any number of classes, or " if classes else "")
                + "evolve one for it: apical evolve --model ..."
            )
        if self.sites is None and tuple(widths) != self.widths:
            raise UnsupportedModelError(
                f"the top-down network gives one credit to each unit of hidden layers {list(self.widths)}, so cannot teach "
                f"{wanted}; only one with diffusion (apical evolve --sites K) fits other widths"
            )

    def forward(self, prediction: Tensor, target: Tensor, classes: bool = False) -> Tensor:
        """Emitted values (batch, sum of emissions + outputs) from prediction and target (batch, outputs).

        Args:
            prediction, target: as :func:`described` makes them.
            classes: every row of the target has a single one, or is of no interest.
        """
        emitted: Tensor = self.body[-1](self.state(prediction, target, classes))
        return emitted if self.output == "evolved" else torch.cat([emitted, prediction - target], 1)

    def state(self, prediction: Tensor, target: Tensor, classes: bool = False) -> Tensor:
        """What the topmost layer reads, (batch, hidden)."""
        below, seen = self.body[:-1], self._seen
        state: Tensor = below(torch.cat([seen(prediction), seen(target)], 1))
        if self.relative:  # the topmost layer is linear: V3 a - V3 b = V3 (a - b)
            if classes:  # the number of right answers is limited
                every = seen(torch.eye(self.outputs, dtype=target.dtype, device=target.device))
                state = state - target @ below(torch.cat([every, every], 1))
            else:
                state = state - below(torch.cat([seen(target), seen(target)], 1))
        return state

    def _seen(self, values: Tensor) -> Tensor:
        return values if self.projection is None else values @ self.projection

    def emitters(self, widths: Sequence[int]) -> list[tuple[Tensor, Tensor | None]]:
        """Weights (width, hidden) and biases (width,) that map a state to each hidden layer's credit, and the output's, if
        that is evolved."""
        top = cast(nn.Linear, self.body[-1])
        sizes, output = self.emissions, self.output == "evolved"
        if output:
            sizes.append(self.projected or self.outputs)
        weights = top.weight.split(sizes)
        biases = [None for _ in sizes] if top.bias is None else list(top.bias.split(sizes))
        pairs = list(zip(weights, biases, strict=True))[len(self.widths) - len(widths) :]
        spread: list[Tensor | None] = [None if self.sites is None else self._kernel(width, top.weight) for width in widths]
        layers = []
        last = ([self.projection], [1]) if output else ([], [])
        for (weight, bias), matrix, width in zip(pairs, [*spread, *last[0]], [*widths, *last[1]], strict=True):
            if matrix is not None:
                weight, bias = matrix @ weight, None if bias is None else matrix @ bias
            layers.append((weight / width**self.share if self.relative else weight, bias))
        return layers

    def credits(self, emitted: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """Credits (batch, width) of each hidden layer, and (batch, outputs) of the output, from emitted values."""
        projection = self.projection if self.output == "evolved" else None
        *hidden, last = emitted.split([*self.emissions, self.outputs if projection is None else projection.shape[1]], dim=1)
        hidden = hidden[len(hidden) - len(widths) :]  # counted from the output
        if self.relative:
            hidden = [z / width**self.share for z, width in zip(hidden, widths, strict=True)]
        if self.sites is not None:
            hidden = [z @ self._kernel(width, z).T for z, width in zip(hidden, widths, strict=True)]
        return [*hidden, last if projection is None else last @ projection.T]

    def later(self, prediction: Tensor, target: Tensor, widths: Sequence[int], classes: bool) -> Callable[[int], Tensor]:
        """A function that makes a layer's credit (rows, width) by its number, or the output's (rows, outputs) by -1.

        As :meth:`credits` of :meth:`forward`, for many rows: credit is computed on demand.
        """
        state, emitters = self.state(prediction, target, classes), self.emitters(widths)

        def credit(index: int) -> Tensor:
            if index == -1 and self.output == "error":
                return prediction - target
            return F.linear(state, *emitters[index])

        return credit

    def _kernel(self, units: int, like: Tensor) -> Tensor:
        place = (units, like.dtype, like.device)
        if place not in self._kernels:
            self._kernels[place] = diffusion(units, self.sites or 1).to(like.device, like.dtype)
        return self._kernels[place]

    def save(self, path: Path | str, provenance: dict[str, Any] | None = None) -> None:
        """Write weights, sizes and provenance (any JSON values) to one file, atomically."""
        content = {
            "format": FORMAT,
            "outputs": self.outputs,
            "widths": list(self.widths),
            "hidden": self.hidden,
            "sites": self.sites,
            "relative": self.relative,
            "credit": self.credit,
            "share": self.share,
            "shallower": self.shallower,
            "projected": self.projected,
            "output": self.output,
            "weights": self.state_dict(),
            "provenance": json.dumps(provenance or {}, sort_keys=True),
        }
        written(path, content)


def written(path: Path | str, content: dict[str, Any]) -> None:
    """Write a file by `torch.save`, atomically."""
    temporary = Path(path).with_name(f"{Path(path).name}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: Path | str) -> "tuple[TopDownNetwork | EquivariantNetwork, dict[str, Any]]":
    """The top-down network of a file, and the provenance stored with it.

    Raises:
        ConfigError: there is no such file, or it is not a (whole) teacher file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:
                raise ValueError(f"{member} has a wrong checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        network = _of(content, path)
        network.to(next(iter(content["weights"].values())).dtype).load_state_dict(content["weights"])
        return network, json.loads(content["provenance"])
    except FileNotFoundError:
        raise ConfigError(f"there is no teacher file {path}; `apical evolve --out DIR` writes DIR/teacher.pt") from None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{path} is not a teacher file, or is damaged ({type(error).__name__}): evolve it again"
        ) from error


def _of(content: dict[str, Any], path: Path | str) -> "TopDownNetwork | EquivariantNetwork":
    """A network with the sizes in a file's content."""
    from apical.rules.top_down.equivariant import CLASSES, EquivariantNetwork

    if content["format"] == CLASSES:
        return EquivariantNetwork(content["layers"], content["hidden"], content["output"])
    if content["format"] not in (FORMAT, OLDER):
        raise ConfigError(f"{path} has the format {content['format']!r}, not {FORMAT!r} or {CLASSES!r}")
    if content["format"] == OLDER:
        content = {"relative": False, **content, "credit": "probabilities", "share": 1.0, "shallower": False}
    names = ("outputs", "widths", "hidden", "sites", "relative", "credit", "shallower", "projected", "output")
    network = TopDownNetwork(**{name: {"projected": None, "output": "evolved", **content}[name] for name in names})
    if type(content["share"]) not in (int, float) or not 0 <= content["share"] <= 1:
        raise ValueError(f"share {content['share']!r}")
    network.share = content["share"]
    return network


def parameters_of(outputs: int, widths: Sequence[int], hidden: int, sites: int | None, relative: bool = False) -> int:
    """Weights and biases of such a network: (2N+1)H + (H+1)H + (H+1)C, or HC at the end where credit is relative."""
    emitted = outputs + sum(width if sites is None else sites for width in widths)
    return (2 * outputs + 1) * hidden + (hidden + 1) * hidden + (hidden + (not relative)) * emitted


def described(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and target as the top-down network sees them, both (batch, *places, outputs).

    Class indices: softmax probabilities and one-hot labels; rows of zeros where an index is negative, as those are that
    losses ignore. Numbers: the output and the targets themselves.

    Args:
        output: (batch, *places, outputs).
        targets: class indices (batch, *places), or numbers of the output's shape; (batch,) for one output.

    Raises:
        ConfigError: targets that fit neither way.
    """
    if targets.is_floating_point():
        if targets.numel() != output.numel() or targets.shape[0] != output.shape[0]:
            raise ConfigError(
                f"targets of shape {tuple(targets.shape)} do not fit outputs of shape {tuple(output.shape)}; give numbers "
                "of the output's shape, or class indices"
            )
        return output, targets.reshape(output.shape).to(output.dtype)
    if targets.shape != output.shape[:-1] or output.shape[-1] < 2:
        raise ConfigError(
            f"class indices of shape {tuple(targets.shape)} do not fit outputs of shape {tuple(output.shape)}: top-down "
            "credit needs at least two classes with one output each, or floating-point targets"
        )
    label = (targets.unsqueeze(-1) == torch.arange(output.shape[-1], device=targets.device)).to(output.dtype)
    return torch.softmax(output, -1), label


def through_softmax(credit: Tensor, prediction: Tensor) -> Tensor:
    """Credit on probabilities p pulled back to the logits: `p (c - c.p)`, (..., classes)."""
    return prediction * (credit - (credit * prediction).sum(-1, keepdim=True))
