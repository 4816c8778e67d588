"""Rules whose feedback learns with the weights: R receives `B^T` times the gradient of W (Kolen-Pollack, PFA).

Two forms of the same mathematics, layer by layer:

    explicit   R is a parameter with its own gradient, for any optimiser.
    closed     F = W + c E_0 instead of R (:mod:`.mismatch`), while the optimiser moves W and R alike.

Under an optimiser whose decay is separate from the gradient step (AdamW, NAdam and RAdam with decoupled decay, Muon,
Adam without decay), R takes `B^T` times the *change* of W, `R' = k R + B^T (W' - k W)`: F follows by `c <- k c`, whatever
was done to the gradients. If B is the identity, a separate state of R would do the same.

Form "auto" starts explicitly. Before the first step has moved anything it checks the optimiser and the final
gradients, and uses the closed form for every layer where it is exact. Before a step where it would not be, it goes
back, with the present R and momentum of R, or raises.
"""

import json
import warnings
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from apical.core.credit import Loss
from apical.core.edge import EdgeRule
from apical.core.effective import weight_now
from apical.core.mirror import mirrored, require_affine
from apical.core.packed import Part
from apical.core.processes import parted, whole
from apical.core.transport import as_matrix, from_matrix
from apical.core.units import key
from apical.errors import ConfigError, UnsupportedModelError, require_choice, require_count
from apical.rules.plastic_feedback.held import Held, Plastics, fill, rest, vacate
from apical.rules.plastic_feedback.mismatch import Mismatch
from apical.rules.plastic_feedback.sharing import FUNCTION
from apical.rules.plastic_feedback.steps import FROZEN, MOVED, Steps

if TYPE_CHECKING:
    from apical.core.plain_chain import Sender

Form = Literal["auto", "closed", "explicit", "literal", "fused"]
Initial = Literal["random", "mirror"]


class PlasticRule(EdgeRule):
    """Base of the rules with plastic feedback.

    Args:
        model, loss, exact, first_layer, sites, through_time: see :class:`apical.core.edge.EdgeRule`.
        form: "auto", "closed", or any other name for explicit.
        sparse: R has no closed form.

    Attributes:
        update: "shared" if R changes by `B^T` times W's change where the optimiser's decay is separate, in any form; "own"
            if an explicit R always moves by the optimiser's state.
        reasons: why a layer keeps its feedback explicitly, by layer.
        moved_by: the optimiser, other than SGD, whose change of W a feedback last followed.
        clips: something has changed W's gradient before such an optimiser's step.
        alone: why an explicit R moves by the optimiser's state although update is "shared", by layer.
    """

    update: Literal["shared", "own"] = "shared"

    takes_weight_updates: ClassVar[bool] = True
    """The feedback must get the weight's own update: a wrapper must not change only one of them."""

    ALIKE: ClassVar[bool] = False
    """Whether R has W's gradients, from which a separate optimiser state computes the same change."""

    PLASTIC: ClassVar[str]
    """Name of the `nn.ParameterDict` that holds the R of every layer; without elements in closed form."""

    MISMATCH: ClassVar[str]
    """Name of the `nn.ModuleDict` that holds the mismatch of the layers in closed form."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        exact: Collection[str],
        first_layer: bool,
        form: Form,
        sparse: bool = False,
        sites: Collection[str] = (),
        through_time: bool = True,
    ) -> None:
        super().__init__(model, loss, exact, first_layer, sites, through_time)
        self.form: Form = form
        self.alone: dict[str, str] = {}
        self.moved_by = ""
        self._is_stale = False
        self.clips = False
        self._mirrored = 0
        self.reasons: dict[str, str] = dict.fromkeys(self.layers, "sparse feedback has no closed form") if sparse else {}
        if form == "auto":
            self.decisions = Decisions(self.reasons, [*self.layers])
        setattr(self, self.PLASTIC, Plastics())
        setattr(self, self.MISMATCH, nn.ModuleDict())
        self.register_state_dict_pre_hook(_measure)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_follow_again)  # type: ignore[no-untyped-call]
        own = {name: layer._parameters.get("weight") for name, layer in self.layers.items()}
        counts = Counter(id(weight) for weight in own.values() if weight is not None)
        self._tied = {name for name, weight in own.items() if counts[id(weight)] > 1}
        for name in self._tied if form != "closed" else ():
            if isinstance(part := self.layers[name], Part):
                owner = next(module for module, held in self.model.named_modules() if held is part.owner)
                raise UnsupportedModelError(
                    f"layer {name!r} shares its weight with another module, where {type(self).__name__}'s feedback gets "
                    f"no separate gradient; untie them, or pass exact=({owner!r},)"
                )
        self._tapped = {name for name in self.layers if self.is_plain(name) and name not in self._tied}
        self._called: set[str] = set()  # layers, since the last step of their optimiser
        self._steps: Steps | None = Steps(self)

    @abstractmethod
    def to_weight(self, name: str, plastic: Tensor) -> Tensor:
        """`M^-1 B R`, the weight for which the path `B R` is `M W`; of the layer's weight's shape."""

    @abstractmethod
    def from_weight(self, name: str, weight: Tensor) -> Tensor:
        """`B^T W`, of R's shape."""

    @property
    def remarks(self) -> list[str]:
        """Which layers keep their feedback explicitly although the form is "auto", and why; and the mirror at birth."""
        layers = defaultdict(list)
        for name, reason in self.reasons.items():
            layers[reason].append(repr(name))
        remarks = super().remarks + [
            f"{type(self).__name__} keeps the feedback of {', '.join(names)} explicitly: {reason}"
            for reason, names in layers.items()
        ]
        if self.clips and self.ALIKE:
            remarks.append(
                f"under {self.moved_by} {type(self).__name__}'s feedback copies the weights' change and has no gradient: "
                'clipping by the norm of all gradients leaves it out; form="explicit" includes it'
            )
        if self._mirrored:
            remarks.append(
                f"the feedback of {type(self).__name__} started as a mirror of the weights: each layer was driven alone by "
                f"{self._mirrored} noise vectors per input in a second phase, once, before the first step"
            )
        return remarks

    def mirror(self, vectors: int = 40, generator: torch.Generator | None = None) -> None:
        """Restart with feedback that noise copies from the present weights: R_0 = mean of `(B^T y) x^T`, y = W x.

        Args:
            vectors: number of noise vectors per input of a layer; the angle to W is about `arctan(1 / sqrt(vectors))`.
            generator: of the noise; None draws from PyTorch's global state.

        Raises:
            ConfigError: vectors < 1.
            UnsupportedModelError: a layer is not affine in the noise.
        """
        check_initial("mirror", vectors)
        for name in self.layers:
            require_affine(self, name)
        for name in self.layers:
            self.reopen(name)
            shape, weight = self.geometries[name], self.forward_weight(name).detach()
            copied = from_matrix(shape, mirrored(as_matrix(shape, weight), vectors, generator), weight)
            mismatch = self.mismatch_of(name)
            if mismatch is None:
                self.plastic_of(name).data.copy_(self.from_weight(name, copied))
            else:
                mismatch.feedback.copy_(copied)
                mismatch.measure(weight)
        self._mirrored = vectors

    def outputs(self, name: str) -> int:
        """Output channels of a layer."""
        return len(as_matrix(self.geometries[name], weight_now(self.layers[name])))

    def own_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The optimiser's state that R would now have, from that of its weight; empty where it restarts."""
        return {}

    def prepare(self, inputs: Any) -> None:
        """Determine the form in which each layer learns."""
        if not torch.compiler.is_compiling():
            self._before_forward()
        self._called.update(self.layers)

    def goes_by_weights(self) -> bool:
        """In closed form, where a batch by hand leaves nothing to tell from its gradients either."""
        return self._is_closed() and not self.steps.is_sampled()

    def _is_closed(self) -> bool:
        return len(self._mismatches()._modules) == len(self.layers)

    def senders_by_hand(self, inputs: Tensor) -> "Sequence[Sender] | None":
        """The same where no weight has moved unannounced; that they are plain, trained and apart has been seen."""
        senders = super().senders_by_hand(inputs)
        return senders if self._is_closed() else None

    def prepare_by_hand(self, inputs: Any) -> None:
        """As :meth:`prepare`, for layers in closed form without functions of their parameters and with trainable weights."""
        for name in self.layers:
            self.steps.require(name)
        self._called.update(self.layers)

    def _before_forward(self) -> None:
        """Drop the closed form of layers that were frozen or now use a function of their parameters."""
        self.require_attached()
        steps = self.steps
        self._tapped.clear()
        for name, layer in self.layers.items():
            plain = self.is_plain(name)
            if self.mismatch_of(name) is None:
                if plain and name not in self._tied and layer.weight.requires_grad:  # a frozen one keeps less in checkpoints
                    self._tapped.add(name)
                if steps.moved(name):
                    self.reasons.setdefault(name, MOVED)
                if plain and layer.weight.grad is None and self.plastic_of(name).grad is not None:
                    self._warn_of_stale_gradients(name)
            elif not plain:
                steps.open(name, FUNCTION)
            elif not layer.weight.requires_grad:
                steps.open(name, FROZEN)
            else:
                steps.require(name)
        steps.hear()
        self._one_matrix = not self.has_pathway()

    def _warn_of_stale_gradients(self, name: str) -> None:
        if not self._is_stale:
            self._is_stale = True
            warnings.warn(
                f"the gradient of the feedback of layer {name!r} was not cleared with that of its weight, so that gradients "
                "of several batches add up in it: call rule.zero_grad() or optimizer.zero_grad(), not model.zero_grad()",
                RuntimeWarning,
                stacklevel=2,
            )

    def has_pathway(self) -> bool:
        """Whether any layer may propagate the error other than by one feedback weight."""
        return True

    def tapped(self, name: str) -> bool:
        """Whether the gradient of R can be derived from that of the weight; otherwise R has a separate pathway."""
        return name in self._tapped

    def needs_gradient(self, name: str) -> bool:
        """Whether an explicit R gets its own gradient in this forward pass, not only W's change."""
        return not self.steps.sharing.spares(name) or name in self.alone

    def take_change(self, name: str, k: float, change: Tensor) -> None:
        """`R' = k R + B^T (W' - k W)`, where W has just moved by `change = W' - k W`."""
        plastic = self.plastic_of(name)
        plastic.mul_(k).add_(parted(self.from_weight(name, whole(change)), plastic))

    def plastic_of(self, name: str) -> nn.Parameter:
        """R of one layer; without elements in closed form."""
        return cast(nn.Parameter, self._plastics()._parameters[key(name)])

    def mismatch_of(self, name: str) -> Mismatch | None:
        """The mismatch of one layer; None where it is explicit."""
        mismatches = self._modules[self.MISMATCH]._modules  # type: ignore[union-attr]
        return mismatches.get(key(name)) if mismatches else None  # type: ignore[return-value]

    def is_built(self) -> bool:
        """Whether every layer has its feedback: not during construction, nor where that was interrupted."""
        held = self._mismatches()._modules if self.form == "closed" else self._plastics()._parameters
        return len(held) == len(self.layers)

    def hold(self, name: str, plastic: Tensor) -> None:
        """Start with R_0 = `plastic`, in the requested form."""
        if self.form == "closed" and name in self._tied:
            raise ConfigError(
                f"layer {name!r} shares its weight with another layer, whose gradients {type(self).__name__} in closed form "
                'cannot separate from its feedback: build the rule with form="auto"'
            )
        if self.form == "closed":
            weight = self.layers[name].weight.detach()
            self.close(name, Mismatch(self.to_weight(name, plastic).sub_(weight)), weight)
        else:
            self._plastics()[key(name)] = nn.Parameter(plastic)

    def replace(self, name: str, plastic: Tensor) -> None:
        """Set R to `plastic`, in any form; its momentum is kept."""
        if self.form == "closed":
            mismatch = cast(Mismatch, self.mismatch_of(name))
            mismatch.feedback.copy_(self.to_weight(name, plastic))
            mismatch.measure(self.layers[name].weight.detach())
        else:
            self.plastic_of(name).data.copy_(plastic)

    def reopen(self, name: str) -> None:
        """Make R explicit, and decide again at the next step; for callers that change B or R."""
        if name not in self.layers:
            raise ConfigError(f"no layer {name!r} holds feedback; there are {', '.join(map(repr, self.layers))}")
        if self.form == "auto" and self.mismatch_of(name) is not None:
            self.steps.open(name, "")
            del self.reasons[name]

    @property
    def steps(self) -> Steps:
        """The record of its optimiser; a copy of a rule gets a new one."""
        if self._steps is None:
            self._steps = Steps(self)
        return self._steps

    def detach(self) -> nn.Module:
        """Remove everything from the model and return it."""
        self.steps.remove()
        return super().detach()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to the tensors of this very object."""
        return {**super().__getstate__(), "_steps": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self.layers if self.form == "auto" else ():
            if self.mismatch_of(name) is not None:
                vacate(self.plastic_of(name), self, name)
                rest(cast(Held, self.plastic_of(name)), self.plastic_of(name).requires_grad)

    def _plastics(self) -> nn.ParameterDict:
        return cast(nn.ParameterDict, self._modules[self.PLASTIC])

    def _mismatches(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self._modules[self.MISMATCH])

    def forgets(self, name: str) -> str:
        """What R lacks when it leaves the closed form, as the end of a remark; empty if nothing."""
        return ""

    def settle(self, name: str) -> None:
        """Create what the closed form of one layer needs in addition to the mismatch; called when B is known."""

    def unsettle(self, name: str) -> None:
        """Discard this; the layer is explicit again."""

    def close(self, name: str, mismatch: Mismatch, weight: Tensor) -> None:
        """Switch to the closed form."""
        self.settle(name)
        mismatch.follow(weight)
        self._mismatches()[key(name)] = mismatch

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the form that each layer has in the state, before the children load their tensors."""
        for name in self.layers:
            if self.mismatch_of(name) is not None:
                self.steps.remember(name)
        for name in self.layers if self.form == "auto" else ():
            plastic, weight = self.plastic_of(name), weight_now(self.layers[name])
            if f"{prefix}{self.MISMATCH}.{key(name)}.initial" in state_dict:
                vacate(plastic, self, name)
                self.close(name, Mismatch(torch.zeros_like(weight)), weight)
            elif self.mismatch_of(name) is not None:
                fill(plastic, self.from_weight(name, weight))
                del self._mismatches()[key(name)]
        for name in self.layers:
            mismatch, velocity = self.mismatch_of(name), f"{prefix}{self.MISMATCH}.{key(name)}.velocity"
            if mismatch is not None:
                mismatch.velocity = torch.zeros_like(mismatch.initial) if velocity in state_dict else None
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_initial(initial: str, vectors: int) -> None:
    """Refuse invalid options of the initial feedback.

    Raises:
        ConfigError: names the option.
    """
    require_choice("initial", initial, ("random", "mirror"))
    require_count("mirror (noise vectors per input)", vectors)


def _measure(rule: nn.Module, *_: Any) -> None:
    """Measure weights that were moved from outside before the state is saved, so that the state is complete."""
    assert isinstance(rule, PlasticRule)
    for name, layer in rule.layers.items():
        mismatch = rule.mismatch_of(name)
        if mismatch is not None and not torch.equal(mismatch.matched(layer.weight.detach()), mismatch.feedback):
            mismatch.measure(layer.weight.detach())


@torch.inference_mode(False)
@torch.no_grad()
def _follow_again(rule: nn.Module, *_: Any) -> None:
    """Restore the feedback after a state was loaded."""
    assert isinstance(rule, PlasticRule)
    for name, layer in rule.layers.items():
        mismatch = rule.mismatch_of(name)
        if mismatch is not None:
            rule.settle(name)
            mismatch.follow(layer.weight.detach())
            if rule.form == "auto":
                vacate(rule.plastic_of(name), rule, name)  # another tensor, where the state was assigned
    rule.steps.forget()


class Decisions(nn.Module):
    """The layers that need the explicit form, and why: saved with the rule's state, so that the decision is kept.

    Args:
        reasons: sentence by layer; this dictionary object is filled on loading.
        layers: all of them.
    """

    def __init__(self, reasons: dict[str, str], layers: Sequence[str]) -> None:
        super().__init__()
        self.reasons, self.width = reasons, 2 + sum(300 + len(json.dumps(name)) for name in layers)

    def get_extra_state(self) -> Tensor:
        """JSON, as bytes in a tensor; of one size, which formats for several processes compare before they load."""
        return torch.tensor(list(json.dumps(self.reasons).encode().ljust(self.width)), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take the reasons from a state dict."""
        self.reasons.clear()
        self.reasons.update(json.loads(bytes(state.tolist())))
