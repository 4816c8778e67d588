"""Product feedback alignment (Ji-An & Benna, arXiv 2405.20594).

An extra population r of lambda n_out neurons transmits the error from a layer's output to its input:

    r = B^T delta,   error at the input = R^T r = (B R)^T delta
    dW = delta h^T,   dR = r h^T = B^T dW,   B fixed and random

R gets the same learning rate, momentum and weight decay as W. The decay removes the initial mismatch; the product
B R then points along W, at arctan(1/sqrt(lambda)), while no single matrix resembles W. Local: W needs (delta, h), R needs
(r, h).

Exact forms of the same mathematics (M = B B^T; E_0 = R_0 - B^T W_0):

    literal   as written above
    fused     K = B R formed once per batch and dR = B^T dW from the weight gradient: any optimiser. If R follows W's change,
              it has no gradient after the first step, and K follows by M times the change
    closed    B R_t = M (W_t + c_t M^-1 B E_0) without R (:mod:`.mismatch`): while the optimiser moves W and R
              alike, no sparse masks

Under SGD a step of R with its own gradient is `B^T` times W's step. Under Adam it is not: element-wise scales do not commute
with B^T. There R changes by `B^T` times W's change (update="shared"), or by its own step (update="own"), which trains worse.

Departures from the released code: a grouped convolution gets a block-diagonal B; R of the first layer is optional.
"""

import math
from collections import defaultdict
from collections.abc import Collection
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from apical.core.batch import require_memory
from apical.core.credit import Attention, Loss
from apical.core.edge import Feedback, Pathway, stored
from apical.core.effective import weight_now
from apical.core.packed import Part, row_blocks, xavier_
from apical.core.processes import is_parted, whole
from apical.core.stepping import direction, fingerprint
from apical.core.tap import weight_tap
from apical.core.transport import Geometry, as_matrix, from_matrix, transport, weight_gradient
from apical.core.units import key
from apical.errors import ConfigError, require_choice
from apical.rules.plastic_feedback.plastic_rule import Form, Initial, PlasticRule, check_initial

RENEWAL = 64  # steps until a product is recomputed, so that rounding errors do not add up
WORTH_A_PATHWAY = 1_000_000  # multiply-adds that cost more than an edge's bookkeeping

Mark = tuple[int, int, Tensor]
"""Address, version and fingerprint of a tensor."""


def product(shape: Geometry | None, expansion: Tensor, weight: Tensor) -> Tensor:
    """`B R` as a weight of the layer: mixes the output channels of `weight` by the matrix `expansion`."""
    return from_matrix(shape, expansion @ as_matrix(shape, weight), weight)


def literal_feedback(
    shape: Geometry | None,
    delta: Tensor,
    template: Tensor | None,
    inputs: Tensor,
    expansion: Tensor,
    plastic: Tensor,
    *mask: Tensor,
) -> tuple[Tensor | None, ...]:
    """`r = B^T delta`, `R^T r`, and `dR = r h^T`."""
    channels = -1 if shape is None else -1 - len(shape.stride)
    r = (delta.movedim(channels, -1) @ expansion.to(delta.dtype)).movedim(-1, channels)
    below = None if template is None else transport(shape, r, plastic, template)
    gradient = weight_gradient(shape, r, inputs, plastic).to(plastic.dtype)
    return below, None, None, (gradient * mask[0] if mask else gradient), *(None for _ in mask)


def mixed_first(
    shape: Geometry | None, delta: Tensor, template: Tensor | None, mixing: Tensor, feedback: Tensor
) -> tuple[Tensor | None, ...]:
    """`F^T (M delta)`: the cheaper order where the batch is smaller than the layer is wide."""
    if template is None:
        return None, None, None
    return transport(shape, delta @ mixing.to(delta.dtype), feedback, template), None, None


def shared_gradient(gradient: Tensor, shape: Geometry | None, expansion: Tensor, plastic: Tensor, *mask: Tensor) -> Tensor:
    """`dR = B^T dW` from the weight gradient dW, on R's mask where R is sparse."""
    result = from_matrix(shape, expansion.T.to(gradient.dtype) @ as_matrix(shape, gradient), plastic)
    return result * mask[0] if mask else result


def expansion_matrix(n_out: int, m: int, groups: int, density: float, like: Tensor) -> Tensor:
    """B (n_out, m), block-diagonal over groups: uniform entries of variance 1/m per block, so that E[B B^T] = I."""
    rows, columns = n_out // groups, m // groups
    bound = math.sqrt(3.0 / (max(columns, 1) * density))
    blocks = [torch.empty(rows, columns, dtype=like.dtype, device=like.device) for _ in range(groups)]
    for block in blocks:
        block.uniform_(-bound, bound)
        if density < 1.0:
            block.mul_(torch.rand_like(block) < density)
    result: Tensor = torch.block_diag(*blocks)
    return result


def orthogonal_matrix(n_out: int, groups: int, like: Tensor) -> Tensor:
    """Random orthogonal B (n_out, n_out), block-diagonal over groups."""
    size = n_out // groups
    blocks = [nn.init.orthogonal_(torch.empty(size, size, device=like.device)) for _ in range(groups)]
    exact = [torch.linalg.qr(block.double())[0] for block in blocks]  # orthogonal to the last bit of like's dtype
    result: Tensor = torch.block_diag(*exact)
    return result.to(like.dtype)


def mixing_matrix(b: Tensor) -> Tensor | None:
    """`M = B B^T` (n_out, n_out); None where it is the identity."""
    exact = b.double()
    square = exact @ exact.T
    distance = float((square - torch.eye(len(b), dtype=square.dtype, device=b.device)).abs().max())
    return None if distance < 100 * torch.finfo(b.dtype).eps else square.to(b.dtype)


class Held:
    """The product K = B R, cached while B and R are unchanged.

    Each is identified by its address, its version, and its product with a fixed vector, which any write to `.data` changes.

    Args:
        shape: of the layer, None where it is dense.
        b, plastic: the present B and R.
    """

    def __init__(self, shape: Geometry | None, b: Tensor, plastic: Tensor) -> None:
        self.value, self.mixing, self.steps = product(shape, b, plastic), mixing_matrix(b), 0
        self._fixed = [direction(factor) for factor in (b, plastic)]
        self._b = self._mark(b, 0)

    def follow(self, plastic: Tensor) -> None:
        """Record R after a step; B does not change."""
        self.steps += 1
        self._plastic = self._mark(plastic, 1)

    def is_of(self, b: Tensor, plastic: Tensor) -> bool:
        """Whether K is still the product of both."""
        return self.is_with(plastic) and _same(self._mark(b, 0), self._b)

    def is_with(self, plastic: Tensor) -> bool:
        """Whether R is unchanged since the last step."""
        return _same(self._mark(plastic, 1), self._plastic)

    def _mark(self, factor: Tensor, number: int) -> Mark:
        return factor.data_ptr(), factor._version, fingerprint(factor, self._fixed[number])


def _same(now: Mark, before: Mark) -> bool:
    return now[:2] == before[:2] and torch.equal(now[2], before[2])


class ProductFeedbackAlignment(PlasticRule):
    """The error travels back through a fixed expansion matrix B and a plastic matrix R.

    Pass `rule.parameters()` to the optimiser with one weight decay for all, large during the first epoch(s): the mismatch
    falls as `exp(-lr decay steps / (1 - momentum))`, and the paper's settings make that exponent about 2.5.

    Args:
        model: network of Linear, convolution, attention and recurrent layers; other modules keep their exact derivative.
        loss: maps (output, targets) to a scalar batch mean.
        expansion: lambda >= 1, the size of r over the layer's output; ignored unless feedback is "random".
        feedback: "random" B; "orthogonal" B with lambda = 1 (PFA-o); "identity", which makes the rule Kolen-Pollack.
        density: fraction of non-zero entries in B and R; B is scaled up by 1/sqrt(density), R is not (as in the paper).
        form: "explicit" holds R as a parameter, and takes "literal" or "fused" by layer, whichever costs less; these two can
            be forced; "closed" never holds R, and refuses what it cannot follow exactly; "auto" takes for each layer the
            closed form from the first step on where it is exact, and lists the others in `rule.remarks`.
        exact: names of modules or parameters that keep their exact derivative.
        first_layer: also hold feedback for the first layer (read-outs only).
        update: under optimisers other than SGD, "shared": R changes by `B^T` times W's change, in any form, if their
            decay is separate from the gradient step (AdamW, Muon, Adam without decay), else by its own step, and
            `rule.remarks` says so; "own": the optimiser's own step of R's own gradient.
        initial: "random", as in the paper; or "mirror": before the first step noise copies the weights into R
            (:meth:`mirror`), as the decay of AdamW and similar is too small for that. The rule is built before it knows the
            optimiser, so that you must choose.
        mirror: noise vectors per input of a layer, for initial="mirror".
        sites, through_time: see :class:`apical.core.edge.EdgeRule`.
        attention: which parts of attention's backward pass are kept: "exact", "fixed" or "present"; see
            :mod:`apical.core.attention`.

    Raises:
        ConfigError: an option out of range; or, while training, an optimiser without R, or what the closed form cannot
            follow.

    >>> model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 3))
    >>> rule = ProductFeedbackAlignment(model, expansion=10)
    >>> optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    >>> for _ in range(250):
    ...     optimizer.zero_grad()
    ...     x = torch.randn(32, 4)
    ...     rule(x, x[:, :3].argmax(dim=1)).backward()
    ...     optimizer.step()
    >>> path = rule.feedback_weights()["2"]
    >>> degrees = F.cosine_similarity(path.flatten(), model[2].weight.flatten(), dim=0).acos().rad2deg()
    >>> bool(degrees < 45)  # from 90 at the start towards arctan(1/sqrt(10)) = 17.5
    True
    """

    PLASTIC, MISMATCH = "plastic", "mismatch"

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        expansion: float = 10.0,
        feedback: Literal["random", "orthogonal", "identity"] = "random",
        density: float = 1.0,
        form: Form = "auto",
        exact: Collection[str] = (),
        first_layer: bool = False,
        update: Literal["shared", "own"] = "shared",
        initial: Initial = "random",
        mirror: int = 40,
        sites: Collection[str] = (),
        through_time: bool = True,
        attention: Attention = "exact",
    ) -> None:
        _check_options(expansion, feedback, density, form, update)
        check_initial(initial, mirror)
        sparse = density < 1.0 and form == "auto"
        super().__init__(model, loss, exact, first_layer, form, sparse, sites, through_time)
        self.attention = attention
        self.feedback, self.density, self.update = feedback, density, update
        self._rows, self._rows_per_sample = 0, dict.fromkeys(self.layers, 1.0)
        self._seen: dict[str, float] = {}
        self._products: dict[str, Held] = {}
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
        self._embedding = {
            n for n, layer in self.layers.items() if id(getattr(layer, "_parameters", {}).get("weight")) in tables
        }
        self.register_state_dict_pre_hook(_form_anew)  # type: ignore[no-untyped-call]
        self.expansion, self.mixing, self.mask = nn.Module(), nn.Module(), nn.Module()
        for name, layer in self.layers.items():
            self._draw(name, weight_now(layer), expansion, feedback)
        if initial == "mirror":
            self.mirror(mirror)

    @property
    def remarks(self) -> list[str]:
        """Also remark what a synapse of R cannot compute, and where the literal form is not possible."""
        remarks = super().remarks
        if self.form == "literal" and (fused := [repr(name) for name in self.layers if self._is_fused_only(name)]):
            remarks.append(
                f"the error passes through the precomputed product B R in {', '.join(fused)}: only one matrix can replace "
                "the weight there. The credit is the same"
            )
        if self.moved_by:
            remarks.append(
                f"R changes by B^T times W's change. Under {self.moved_by} that is not a product of r and h: a synapse of "
                "R cannot compute it"
            )
        layers = defaultdict(list)
        for name, reason in self.alone.items():
            layers[reason].append(repr(name))
        return remarks + [
            f"R of {', '.join(names)} moves by the optimiser's state, not by B^T times W's change, from which it drifts "
            f"apart: {reason}"
            for reason, names in layers.items()
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Drop cached products, so that a copy and the rule continue with the same bits."""
        self._products.clear()
        return super().__getstate__()

    def _draw(self, name: str, weight: Tensor, expansion: float, feedback: str) -> None:
        """Draw B and R_0 of one layer and store what the form needs."""
        shape = self.geometries[name]
        groups = row_blocks(self.layers[name]) if shape is None else shape.groups
        n_out = len(as_matrix(shape, weight))
        m = groups * round(expansion * n_out / groups) if feedback == "random" else n_out
        drawn = 24 * n_out**2 if feedback == "orthogonal" else 0  # QR in double precision
        smaller = "reduce expansion, or " if feedback == "random" else ""
        require_memory(
            f"B ({n_out}, {m}) and R of layer {name!r}",
            (n_out * m + weight.numel() // max(n_out, 1) * m) * weight.element_size() + drawn,
            weight,
            f"{smaller}pass exact=[{name!r}] to keep the layer's exact derivative",
        )
        if feedback == "random":
            b = expansion_matrix(n_out, m, groups, self.density, weight)
        elif feedback == "orthogonal":
            b = orthogonal_matrix(n_out, groups, weight)
        else:
            b = torch.eye(n_out, dtype=weight.dtype, device=weight.device)
        size = list(weight.shape)
        size[1 if shape is not None and shape.transposed else 0] = (
            m // groups if shape is not None and shape.transposed else m
        )
        r = xavier_(torch.empty(size, dtype=weight.dtype, device=weight.device), self.layers[name])
        if self.density < 1.0:
            mask = (torch.rand_like(r) < self.density).to(r.dtype)
            self.mask.register_buffer(key(name), mask)
            r *= mask
        self._begin(name, b, r)

    def _begin(self, name: str, b: Tensor, r: Tensor) -> None:
        """Store B and R, or their closed form: M and the mismatch."""
        self.expansion.register_buffer(key(name), b)
        if self.form != "closed":
            self.hold(name, r)
        elif self.mismatch_of(name) is None:
            self.hold(name, r)
            self.expansion.register_buffer(key(name), mixing_matrix(b))
        else:
            self.replace(name, r)
            self.expansion.register_buffer(key(name), mixing_matrix(b))

    def prepare(self, inputs: Any) -> None:
        """Determine the form in which each layer learns, for this number of samples."""
        self._rows = next((len(part) for part in tree_leaves(inputs) if isinstance(part, Tensor) and part.dim()), 0)
        self._rows_per_sample |= self._seen
        super().prepare(inputs)

    def set_feedback(self, name: str, B: Tensor | None = None, R: Tensor | None = None) -> None:
        """Replace B, R or both of one layer; R's momentum in the optimiser stays.

        Args:
            name: the layer.
            B: (n_out, m).
            R: the layer's weight with m output channels.

        Raises:
            ConfigError: unknown layer, a wrong shape, or one matrix alone in closed form, which holds neither.
        """
        self.reopen(name)
        closed = self.form == "closed"
        if closed and (B is None or R is None):
            raise ConfigError(f'in closed form B and R of layer {name!r} are set together; form="auto" keeps them apart')
        if closed and self.steps.moving(name):
            raise ConfigError(f'the feedback of layer {name!r} has a momentum, so form="closed" allows only one B')
        like = weight_now(self.layers[name])
        b = (self.expansion.get_buffer(key(name)) if B is None else B).to(like)
        r = (self.plastic_of(name).detach() if R is None else R).to(like)
        shape, n_out = self.geometries[name], len(as_matrix(self.geometries[name], like))
        if b.dim() != 2 or len(b) != n_out:
            raise ConfigError(f"B of layer {name!r} must have {n_out} rows, one per output channel, not {tuple(b.shape)}")
        wanted = from_matrix(shape, b.T @ as_matrix(shape, like), like).shape
        if r.shape != wanted or (not closed and r.shape != self.plastic_of(name).shape):
            raise ConfigError(f"R of layer {name!r} has shape {tuple(wanted)} with this B, not {tuple(r.shape)}")
        if closed:
            self._begin(name, b, r)
        else:
            self.expansion.register_buffer(key(name), b.clone())
            self.replace(name, r)

    def literal(self, name: str) -> bool:
        """Whether this layer takes the literal form: by choice, or where rows (tokens) are fewer than its outputs."""
        if self.mismatch_of(name) is not None or self._is_fused_only(name):
            return False
        if self.form == "literal" or not self.tapped(name):
            return True
        if self.form == "fused" or (self.form == "auto" and name not in self.reasons):
            return False
        return self.geometries[name] is None and self._rows * self._rows_per_sample[name] <= len(self.layers[name].weight)

    def _is_fused_only(self, name: str) -> bool:
        """Whether only one matrix can replace the weight: its module applies it internally, or an embedding shares it."""
        hidden = isinstance(self.layers[name], Part) or name in self._embedding
        return hidden or (self.tapped(name) and not self.takes_pathway(name))

    def feedback_of(self, name: str) -> Feedback:
        """B R of this layer, as `M F` in closed form."""
        mismatch = self.mismatch_of(name)
        if mismatch is None:
            b, plastic = self.expansion.get_buffer(key(name)), whole(self.plastic_of(name).detach())
            held = None if torch.compiler.is_compiling() else self._products.get(name)
            if held is not None and held.is_of(b, plastic):
                return stored, (held.value,)
            return product, (b, plastic)
        mixing = self._mixing(name)
        return (stored, (mismatch.feedback,)) if mixing is None else (product, (mixing, mismatch.feedback))

    def take_change(self, name: str, k: float, change: Tensor) -> None:
        """R in place, and with it `K = B R`: `K' = k K + M (W' - k W)` costs lambda times less than a new product."""
        b, plastic, shape = self.expansion.get_buffer(key(name)), self.plastic_of(name), self.geometries[name]
        held = self._products.pop(name, None)
        if self.density < 1.0 or self.literal(name) or is_parted(plastic):
            super().take_change(name, k, change)
            return
        if held is None or held.steps >= RENEWAL or not held.is_with(plastic):
            held = Held(shape, b, plastic.detach())
        if shape is None:
            plastic.addmm_(b.T, change, beta=k)
        else:
            super().take_change(name, k, change)
        held.value.mul_(k).add_(change if held.mixing is None else product(shape, held.mixing, change))
        held.follow(plastic)
        self._products[name] = held

    def pathway(self, name: str, inputs: Tensor) -> Pathway | None:
        """The literal form, and for dense layers the cheaper order of the closed one."""
        if self._rows and self.geometries[name] is None and not torch.compiler.is_compiling():
            self._seen[name] = inputs.numel() / (inputs.shape[-1] * self._rows)
        if self.literal(name):
            tensors = (inputs.detach(), self.expansion.get_buffer(key(name)), self.plastic_of(name), *self._mask(name))
            return literal_feedback, tensors
        mismatch, mixing = self.mismatch_of(name), self._mixing(name)
        if mismatch is None or self.geometries[name] is not None or not (inputs.requires_grad and self.takes_pathway(name)):
            return None
        if not _is_mixed_first(mixing, mismatch.feedback, inputs.numel() // inputs.shape[-1]):
            return None
        return mixed_first, (cast(Tensor, mixing), mismatch.feedback)

    def send(self, name: str, delta: Tensor, error: Tensor) -> Tensor:
        """In the cheaper order too."""
        mismatch, mixing = self.mismatch_of(name), self._mixing(name)
        if mismatch is None or not _is_mixed_first(mixing, mismatch.feedback, len(delta)):
            return super().send(name, delta, error)
        return cast(Tensor, mixed_first(None, delta, delta, cast(Tensor, mixing), mismatch.feedback)[0])

    def substitutes(self) -> dict[str, Tensor]:
        """In the fused form, weights whose gradient also makes R's."""
        taps = self.steps.taps()
        for name, layer in self.layers.items():
            if self.mismatch_of(name) is None and not self.literal(name) and self.needs_gradient(name):
                b, plastic, shape = self.expansion.get_buffer(key(name)), self.plastic_of(name), self.geometries[name]
                tensors = (b, plastic.detach(), *self._mask(name))
                taps[self.weight_name(name)] = weight_tap(layer.weight, plastic, shared_gradient, shape, *tensors)
        return taps

    def to_weight(self, name: str, plastic: Tensor) -> Tensor:
        """`M^-1 B R`."""
        b, shape = self.expansion.get_buffer(key(name)), self.geometries[name]
        target = product(shape, b, plastic)
        if mixing_matrix(b) is None:
            return target
        exact = b.double()
        return product(shape, torch.linalg.inv(exact @ exact.T), target.double()).to(plastic.dtype)

    def from_weight(self, name: str, weight: Tensor) -> Tensor:
        """`B^T W`, on R's mask where R is sparse."""
        b = self.expansion.get_buffer(key(name))
        return shared_gradient(weight, self.geometries[name], b, weight, *self._mask(name))

    def forgets(self, name: str) -> str:
        """R's part in the null space of B."""
        b = self.expansion.get_buffer(key(name))
        return "; R starts again as a product of B, without the part that B ignores" if b.shape[1] > len(b) else ""

    def settle(self, name: str) -> None:
        """M of a layer in closed form."""
        if self.form == "auto":
            mixing = mixing_matrix(self.expansion.get_buffer(key(name)))
            self.mixing.register_buffer(key(name), mixing, persistent=False)

    def unsettle(self, name: str) -> None:
        """No M."""
        self.mixing._buffers.pop(key(name), None)

    def _mixing(self, name: str) -> Tensor | None:
        """M of a layer in closed form; None where it is the identity."""
        return (self.expansion if self.form == "closed" else self.mixing)._buffers.get(key(name))

    def _mask(self, name: str) -> tuple[Tensor, ...]:
        return (self.mask.get_buffer(key(name)),) if self.density < 1.0 else ()


def _is_mixed_first(mixing: Tensor | None, feedback: Tensor, rows: int) -> bool:
    """Whether `F^T (M delta)` costs less than `(M F)^T delta` for this number of error rows at a dense layer."""
    return mixing is not None and mixing.numel() * (feedback.shape[1] - rows) > WORTH_A_PATHWAY


def _form_anew(rule: nn.Module, *_: Any) -> None:
    """Recompute products of B and R when the state is saved, as after loading, so that both continue with the same bits."""
    assert isinstance(rule, ProductFeedbackAlignment)
    rule._products.clear()


def _check_options(expansion: float, feedback: str, density: float, form: str, update: str) -> None:
    if not expansion >= 1.0 or not math.isfinite(expansion):
        raise ConfigError(f"expansion must be a number >= 1, not {expansion}")
    require_choice("feedback", feedback, ("random", "orthogonal", "identity"))
    require_choice("update", update, ("shared", "own"))
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"density must lie in (0, 1], not {density}")
    require_choice("form", form, ("auto", "closed", "explicit", "literal", "fused"))
    if density < 1.0 and feedback != "random":
        raise ConfigError(f'density below 1 needs feedback="random", not {feedback!r}')
    if density < 1.0 and form == "closed":
        raise ConfigError('sparse feedback (density < 1) has no closed form; pass form="explicit" or "auto"')
