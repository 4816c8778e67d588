"""Attention computed from its parts, and how much of its backward pass a rule keeps.

One head, X (T x d), s = 1 / sqrt(d_h):

    Q = X Wq^T, K = X Wk^T, V = X Wv^T;   S = s Q K^T + mask;   A = softmax(S);   Y = A V;   O = Y Wo^T
    dV = A^T dY,   dA = dY V^T,   dS = A * (dA - rowsum(A * dA)),   dQ = s dS K,   dK = s dS^T Q

A comes from activities, and nothing of it is stored; but `A^T dY` and `dS^T Q` bring credit to other positions than that of
the error, at the strength with which these were read.

    "exact"    all of it
    "fixed"    A is a constant: no dS; values and output projection learn
    "present"  K is a constant, and dV_t = A_tt dY_t: credit for the present position alone

These two options are ours. The four projections go through a function that rules may replace, to give each its own
feedback: the packed weight of `nn.MultiheadAttention` is passed to it as three blocks of rows.
"""

import math
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apical.core.calls import traceable
from apical.core.checkpointing import is_checkpointed, refuse_hidden
from apical.core.credit import Attention, Credit, CreditRule
from apical.core.outside_use import PRODUCTS
from apical.errors import ConfigError, UnsupportedModelError

Linear = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]
"""`linear(name, input, weight, bias)` for one of the projections "q", "k", "v", "out"."""


def plain(name: str, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply the projection itself."""
    return F.linear(inputs, weight, bias)


class _Linked(torch.autograd.Function):
    """`y`; zero error for the others, so that a rule does not take them for unused modules."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return (dy, *(torch.zeros_like(other) for other in ctx.saved_tensors))


class _Present(torch.autograd.Function):
    """`Y`; the value of a position receives the error at that position, scaled by the diagonal."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, v: Tensor, diagonal: Tensor) -> Tensor:
        ctx.save_for_backward(diagonal)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (diagonal,) = ctx.saved_tensors
        return dy, diagonal.to(dy.dtype) * dy, None


def weights(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """Return `A = softmax(s Q K^T + mask)`, (..., queries, keys); zero for a query whose keys are all masked.

    Args:
        q: (..., queries, head width).
        k: (..., keys, head width).
        mask: added to the scores; broadcast to (..., queries, keys).
        dropout: fraction of A that is dropped.
        scale: s.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    if mask is None:
        return F.dropout(scores.softmax(-1), dropout)
    blind = mask.isneginf().all(-1, keepdim=True)
    scores = (scores + mask).masked_fill(blind, 0.0)
    return F.dropout(scores.softmax(-1).masked_fill(blind, 0.0), dropout)


def mixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    attention: Attention = "exact",
    extra: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return `Y = A V` and A, with the backward pass selected by `attention`.

    Args:
        q, k, v: (..., positions, head width).
        mask: added to the scores.
        dropout: fraction of A that is dropped.
        scale: s; 1 / sqrt(head width) by default.
        attention: how much of the backward pass is kept.
        extra: number of trailing keys that belong to no position, such as a learned bias; they keep their exact derivative.

    Raises:
        UnsupportedModelError: "present" if keys and queries have different positions.

    >>> q = k = v = torch.eye(2, requires_grad=True)
    >>> y, a = mixed(q, k, v, attention="fixed")
    >>> torch.autograd.grad(y[0].sum(), v)[0][:, 0].allclose(a[0])
    True
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if attention == "exact":
        a = weights(q, k, mask, dropout, scale)
        return a @ v, a
    if attention == "fixed":
        a = weights(q.detach(), k.detach(), mask, dropout, scale).detach()
        return _linked(a.to(v.dtype) @ v, q, k), a
    own = k.shape[-2] - extra
    if q.shape[-2] != own:
        raise UnsupportedModelError(
            f"attention='present' needs keys at the positions of the queries, but {q.shape[-2]} queries attend to {own} "
            "keys; use it with self-attention, or pass attention='exact' or 'fixed'"
        )
    fixed_k, fixed_v = _past(k, own), _past(v, own)
    a = weights(q, fixed_k, mask, dropout, scale)
    y = a @ fixed_v
    diagonal = a.detach()[..., :own].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    y = cast(Tensor, cast(Any, _Present).apply(y, v[..., :own, :], diagonal))
    return _linked(y, k[..., :own, :]), a


def _linked(y: Tensor, *others: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, _Linked).apply(y, *others))


def _past(rows: Tensor, own: int) -> Tensor:
    """Return rows that belong to positions as constants, and the others unchanged."""
    return rows.detach() if own == rows.shape[-2] else torch.cat([rows[..., :own, :].detach(), rows[..., own:, :]], -2)


def added(mask: Tensor | None, dtype: torch.dtype, masked: bool) -> Tensor | None:
    """Return a mask to add to the scores: -inf where a boolean mask equals `masked`."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == masked, -math.inf)


def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    attention: Attention = "exact",
) -> Tensor:
    """Compute `F.scaled_dot_product_attention` with the backward pass selected by `attention`; same arguments as PyTorch's.

    >>> x = torch.randn(1, 2, 4, 3)
    >>> y = scaled_dot_product(x, x, x, is_causal=True)
    >>> torch.allclose(y, F.scaled_dot_product_attention(x, x, x, is_causal=True), atol=1e-6)
    True
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    mask = causal(query.shape[-2], key.shape[-2], query) if is_causal else added(attn_mask, query.dtype, False)
    return mixed(query, key, value, mask, dropout_p, scale, attention)[0]


def causal(queries: int, keys: int, like: Tensor) -> Tensor:
    """Return the additive mask (queries, keys) that hides keys after a query's own position."""
    full = torch.full((queries, keys), -math.inf, dtype=like.dtype, device=like.device)
    return full.triu(1)


def multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    attention: Attention = "exact",
    linear: Linear = plain,
) -> tuple[Tensor, Tensor | None]:
    """Compute `F.multi_head_attention_forward` from its parts; same arguments as PyTorch's; positions are the first axis.

    Args:
        attention: how much of the backward pass is kept.
        linear: applies the projections.

    Raises:
        UnsupportedModelError: static keys or values; "present" with keys at other positions.
        ConfigError: `is_causal` without its mask, as in PyTorch.
    """
    if static_k is not None or static_v is not None:
        raise UnsupportedModelError("static keys or values of attention are not supported; pass them as key and value")
    if is_causal and attn_mask is None:
        raise ConfigError("attention with is_causal=True needs the causal mask too, as attn_mask")
    if attention == "present" and query is not key:
        raise UnsupportedModelError(
            "attention='present' needs self-attention, with one tensor as query and key; use attention='exact' or 'fixed'"
        )
    is_batched = query.dim() == 3
    if not is_batched:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, samples, width = query.shape
    if width != embed_dim_to_check:
        raise ConfigError(f"attention of width {embed_dim_to_check} was given queries of width {width}")
    if use_separate_proj_weight:
        matrices = [cast(Tensor, matrix) for matrix in (q_proj_weight, k_proj_weight, v_proj_weight)]
    else:
        matrices = list(cast(Tensor, in_proj_weight).chunk(3))
    biases: list[Any] = [None, None, None] if in_proj_bias is None else list(in_proj_bias.chunk(3))
    if linear is plain and in_proj_weight is not None and query is key and key is value:
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        given = zip(("q", "k", "v"), (query, key, value), matrices, biases, strict=True)
        q, k, v = (linear(*projection) for projection in given)
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, bias.expand(1, samples, width).to(x.dtype)]) for x, bias in ((k, bias_k), (v, bias_v)))
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], -2) for x in (k, v))
    extra = k.shape[-2] - key.shape[0]
    mask = _merged(attn_mask, key_padding_mask, samples, num_heads, extra, q.dtype)
    dropout = dropout_p if training else 0.0
    a: Tensor | None = None
    if attention == "exact" and not need_weights:
        hint = is_causal and key_padding_mask is None
        y = F.scaled_dot_product_attention(q, k, v, None if hint else mask, dropout, hint)
    else:
        y, a = mixed(q, k, v, mask, dropout, None, attention, extra)
    output = linear("out", y.permute(2, 0, 1, 3).reshape(length, samples, width), out_proj_weight, out_proj_bias)
    a = a if need_weights else None
    if a is not None and average_attn_weights:
        a = a.mean(1)
    return (output, a) if is_batched else (output.squeeze(1), None if a is None else a.squeeze(0))


def _merged(
    mask: Tensor | None, padding: Tensor | None, samples: int, heads: int, extra: int, dtype: torch.dtype
) -> Tensor | None:
    """Return both masks of multi-head attention as one additive mask for scores (samples, heads, queries, keys)."""
    parts = []
    if mask is not None:
        mask = cast(Tensor, added(mask, dtype, True))
        parts.append(mask if mask.dim() == 2 else mask.view(samples, heads, *mask.shape[1:]))
    if padding is not None:
        parts.append(cast(Tensor, added(padding, dtype, True)).view(samples, 1, 1, -1))
    parts = [F.pad(part, (0, extra)) for part in parts] if extra else parts
    return parts[0] + parts[1] if len(parts) > 1 else next(iter(parts), None)


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    attention: Attention = "exact",
    linear: Linear = plain,
) -> tuple[Tensor, Tensor | None]:
    """Compute the forward pass of `nn.MultiheadAttention` from its parts; same arguments as the module's.

    Args:
        attention: how much of the backward pass is kept.
        linear: applies the projections, given blocks of the packed weight.

    >>> module = nn.MultiheadAttention(4, 2, batch_first=True)
    >>> x = torch.randn(3, 5, 4)
    >>> torch.allclose(attend(module, x, x, x)[0], module(x, x, x)[0], atol=1e-6)
    True
    """
    turned = module.batch_first and query.dim() == 3
    if turned:
        rows = {id(tensor): tensor.transpose(0, 1) for tensor in (query, key, value)}  # one tensor stays one tensor
        query, key, value = (rows[id(tensor)] for tensor in (query, key, value))
    separate = not module._qkv_same_embed_dim
    output, a = multi_head(
        *(query, key, value, module.embed_dim, module.num_heads, module.in_proj_weight, module.in_proj_bias),
        *(module.bias_k, module.bias_v, module.add_zero_attn, module.dropout, module.out_proj.weight, module.out_proj.bias),
        training=module.training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        use_separate_proj_weight=separate,
        q_proj_weight=module.q_proj_weight,
        k_proj_weight=module.k_proj_weight,
        v_proj_weight=module.v_proj_weight,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
        attention=attention,
        linear=linear,
    )
    return output.transpose(0, 1) if turned else output, a


class Attending(TorchFunctionMode):
    """Mode under which attention uses the backward pass selected by `attention`; attention that cannot do so is refused.

    Args:
        attention: "fixed" or "present".
        model: used to name modules.
        looks: whether to look for hand-written attention as well.

    Attributes:
        seen: number of calls of attention.
    """

    def __init__(self, attention: Attention, model: nn.Module, looks: bool) -> None:
        super().__init__()
        self.attention, self.model, self.looks = attention, model, looks
        self.seen = 0
        self._maps: dict[int, Tensor] = {}
        self._own: tuple[str, str] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the result of the call, or of its substitute."""
        kwargs = kwargs or {}
        ours = _SUBSTITUTES.get(func)
        if ours is not None:
            self.seen += 1
            if not torch.is_grad_enabled():
                refuse_hidden(self._where())
            elif is_checkpointed():
                raise UnsupportedModelError(
                    f"attention={self.attention!r} does not work inside torch.utils.checkpoint, which repeats the forward "
                    f"pass of {self._where()!r} without the rule; remove the checkpoint"
                )
            else:
                return ours(*args, **kwargs, attention=self.attention)
        result = traceable(func)(*args, **kwargs)
        if self.looks:
            self._look(func, args, kwargs, result)
        return result

    def _look(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Follow the result of a softmax over positions until it is multiplied with activities."""
        name = getattr(func, "__name__", "")
        if not isinstance(result, Tensor) or not result.requires_grad:
            return
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        comes = any(id(value) in self._maps for value in given)
        others = [value for value in given if id(value) not in self._maps]
        if comes and name in PRODUCTS and (name == "einsum" or any(other.requires_grad for other in others)):
            self._own = self._own or (self._where(), name)
        if (comes and name not in PRODUCTS) or (name == "softmax" and result.dim() > 2):
            self._maps[id(result)] = result

    def _where(self) -> str:
        """Return the name of the module whose forward pass makes the call."""
        if torch.compiler.is_compiling():
            return "the model"
        names = {id(module): name for name, module in self.model.named_modules()}
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            name = names.get(id(module), "") if isinstance(module, nn.Module) else ""
            if name:
                return name
            frame = frame.f_back  # type: ignore[assignment]
        return type(self.model).__name__

    def report(self) -> None:
        """Refuse hand-written attention, and a model without attention.

        Called after the pass: an operator would treat an error raised inside it as its own.

        Raises:
            UnsupportedModelError: names the module and the function, or the model.
        """
        self._maps.clear()
        if self._own is not None:
            module, function = self._own
            raise UnsupportedModelError(
                f"{module!r} computes attention itself, by {function} after a softmax, and that backward pass cannot be "
                f"changed: attention={self.attention!r} needs nn.MultiheadAttention or F.scaled_dot_product_attention; "
                "use one of them there, or pass attention='exact'"
            )
        if not self.seen:
            raise UnsupportedModelError(
                f"attention={self.attention!r} changes nothing in {type(self.model).__name__}, which calls neither "
                "nn.MultiheadAttention nor F.scaled_dot_product_attention; pass attention='exact'"
            )


_SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product,
    F.multi_head_attention_forward: multi_head,
}


def attended(rule: CreditRule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Credit:
    """Compute the credit for one batch with the backward pass of attention set by the rule's option.

    Raises:
        UnsupportedModelError: the model is compiled before it was run eagerly once; or see :meth:`Attending.report`.
    """
    compiling, looks = torch.compiler.is_compiling(), torch.is_grad_enabled() and not rule._has_attended
    if compiling and not rule._has_attended:
        raise UnsupportedModelError(
            f"attention={rule.attention!r} must see the model run before torch.compile: call the rule once on a batch "
            "without compilation"
        )
    attending = Attending(rule.attention, rule.model, looks=looks)
    with attending:
        credit = rule._credited(*args, **kwargs)
    if looks:
        attending.report()
        rule._has_attended = True
    return credit
