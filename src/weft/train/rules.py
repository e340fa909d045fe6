"""How each operation maps (x, ẋ) to (y, ẏ); `weft.train.pair` looks the rules up here.

Notation as in arXiv:2307.08122: W and ΔW are a weight and its tangent, a dot is a tangent, ⊙ a product by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.errors import UsageError
from weft.train.pair import RULES, Pair, rule, tangent, value


def total(*terms: Tensor | None) -> Tensor | None:
    """Sum of the tangents that there are."""
    found = [t for t in terms if t is not None]
    return sum(found[1:], found[0]) if found else None


def pair(x: Tensor, dx: Tensor | None) -> Any:
    """A pair; a plain tensor where nothing moves."""
    return x if dx is None else Pair(x, dx.expand(x.shape))


# -- linear in one argument: the same operation on both halves ------------------------------------------

T = torch.Tensor
_LINEAR = (
    T.reshape, T.view, T.flatten, T.unflatten, T.transpose, T.permute, T.contiguous, T.unsqueeze, T.squeeze,
    T.expand, T.repeat, T.chunk, T.split, T.sum, T.mean, T.clone, T.to, T.float, T.double, T.neg, T.__neg__,
    T.__getitem__, T.select, T.narrow, T.type_as, T.view_as, T.unbind, T.movedim, T.detach, T.roll, T.flip,
    torch.reshape, torch.flatten, torch.transpose, torch.permute, torch.unsqueeze, torch.squeeze, torch.chunk,
    torch.split, torch.sum, torch.mean, torch.neg, torch.unbind, torch.movedim, torch.narrow, torch.select,
    torch.roll, torch.flip, torch.repeat_interleave, T.repeat_interleave, torch.unflatten,
    F.pad, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_avg_pool1d, F.interpolate,
)  # fmt: skip


def _both_halves(operation: Callable[..., Any]) -> Callable[..., Any]:
    def linear(x: Any, *args: Any, **kwargs: Any) -> Any:
        y, dy = operation(value(x), *args, **kwargs), operation(tangent(x), *args, **kwargs)
        if isinstance(y, Tensor):
            return pair(y, dy)
        return type(y)(pair(a, b) for a, b in zip(y, dy, strict=True))

    return linear


RULES.update({operation: _both_halves(operation) for operation in _LINEAR})


@rule(F.dropout)
def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p:
        raise UsageError("dropout is not linear in the weights: put the module in evaluation mode")
    return x


def _joining(operation: Callable[..., Tensor]) -> Callable[..., Any]:
    def join(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        halves = [tangent(t) if isinstance(t, Pair) else torch.zeros_like(t) for t in tensors]
        return pair(
            operation([value(t) for t in tensors], *args, **kwargs), operation(halves, *args, **kwargs)
        )

    return join


RULES.update({operation: _joining(operation) for operation in (torch.cat, torch.stack)})

# -- sums and products ----------------------------------------------------------------------------------


@rule(T.add, T.__add__, T.__radd__, T.__iadd__, T.add_, torch.add)
def add(a: Any, b: Any, *, alpha: float = 1) -> Any:
    moved = tangent(b)
    return pair(value(a) + alpha * value(b), total(tangent(a), None if moved is None else alpha * moved))


@rule(T.sub, T.__sub__, torch.sub)
def sub(a: Any, b: Any) -> Any:
    moved = tangent(b)
    return pair(value(a) - value(b), total(tangent(a), None if moved is None else -moved))


@rule(T.__rsub__, torch.rsub)
def rsub(a: Any, b: Any) -> Any:
    return sub(b, a)


def _product(operation: Callable[..., Tensor]) -> Callable[..., Any]:
    """ẏ = ȧ∘b + a∘ḃ, for any bilinear operation."""

    def bilinear(a: Any, b: Any) -> Any:
        left, right = tangent(a), tangent(b)
        return pair(operation(value(a), value(b)), total(
            None if left is None else operation(left, value(b)),
            None if right is None else operation(value(a), right),
        ))  # fmt: skip

    return bilinear


mul, matmul = _product(torch.mul), _product(torch.matmul)
RULES.update(dict.fromkeys((T.mul, T.__mul__, T.__rmul__, torch.mul), mul))
RULES.update(dict.fromkeys((T.matmul, T.__matmul__, torch.matmul, torch.bmm, T.bmm, torch.mm, T.mm), matmul))


@rule(T.__rmatmul__)
def rmatmul(a: Any, b: Any) -> Any:
    return matmul(b, a)


@rule(T.div, T.__truediv__, torch.div)
def div(a: Any, b: Any) -> Any:
    """(a/b)˙ = (ȧ − (a/b) ḃ) / b"""
    y, left, right = value(a) / value(b), tangent(a), tangent(b)
    return pair(y, total(
        None if left is None else left / value(b), None if right is None else -y * right / value(b)
    ))  # fmt: skip


@rule(T.__rtruediv__)
def rdiv(a: Any, b: Any) -> Any:
    return div(torch.as_tensor(b, dtype=a.dtype), a)


@rule(torch.addmm, T.addmm)
def addmm(c: Any, a: Any, b: Any) -> Any:
    """transformers' Conv1D."""
    return add(matmul(a, b), c)


@rule(F.linear)
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """ẏ = ẋWᵀ + xΔWᵀ + Δb"""
    y = _product(F.linear)(x, weight)
    return y if bias is None else add(y, bias)


@rule(F.conv1d, F.conv2d, torch.conv1d, torch.conv2d)
def convolution(x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    operation = F.conv1d if value(weight).dim() == 3 else F.conv2d
    y = _product(lambda a, w: operation(a, w, None, *args, **kwargs))(x, weight)
    if bias is None:
        return y
    return add(y, RULES[T.reshape](bias, (-1, *[1] * (weight.dim() - 2))) if isinstance(bias, Pair)
               else bias.reshape(-1, *[1] * (weight.dim() - 2)))  # fmt: skip


@rule(F.embedding)
def embedding(index: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Any:
    return pair(
        F.embedding(index, value(weight), *args, **kwargs),
        F.embedding(index, tangent(weight), *args, **kwargs),  # type: ignore[arg-type]
    )


# -- element by element ---------------------------------------------------------------------------------


def _gelu_slope(x: Tensor, approximate: str = "none") -> Tensor:
    """Φ(x) + xφ(x), or the derivative of the tanh form."""
    if approximate == "none":
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (x + k * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * k * x * x)


def _silu_slope(x: Tensor, inplace: bool = False) -> Tensor:
    s = torch.sigmoid(x)
    return s + x * s * (1 - s)


def _power_slope(x: Tensor, exponent: float) -> Tensor:
    return exponent * x ** (exponent - 1)


_SLOPES: tuple[tuple[tuple[Any, ...], Callable[..., Tensor]], ...] = (
    ((F.gelu,), _gelu_slope),
    ((F.silu,), _silu_slope),
    ((F.relu, torch.relu, T.relu), lambda x, inplace=False: (x > 0).to(x.dtype)),
    ((torch.tanh, T.tanh, F.tanh), lambda x: 1 - torch.tanh(x) ** 2),
    ((torch.sigmoid, T.sigmoid, F.sigmoid), lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x))),
    ((torch.exp, T.exp), torch.exp),
    ((torch.rsqrt, T.rsqrt), lambda x: -0.5 * torch.rsqrt(x) / x),
    ((torch.sqrt, T.sqrt), lambda x: 0.5 * torch.rsqrt(x)),
    ((torch.pow, T.pow, T.__pow__), _power_slope),
)


def _pointwise(operation: Callable[..., Tensor], slope: Callable[..., Tensor]) -> Callable[..., Any]:
    """ẏ = σ'(x) ⊙ ẋ"""

    def elementwise(x: Any, *args: Any, **kwargs: Any) -> Any:
        return Pair(operation(x.x, *args, **kwargs), slope(x.x, *args, **kwargs) * x.dx)

    return elementwise


for _operations, _slope in _SLOPES:
    RULES.update({operation: _pointwise(operation, _slope) for operation in _operations})

# -- what a transformer has beside ----------------------------------------------------------------------


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    """x̂ = (x − μ)/σ;  x̂˙ = (ẋ − mean ẋ − x̂ mean(x̂ ⊙ ẋ))/σ;  ẏ = γ ⊙ x̂˙ + Δγ ⊙ x̂ + Δβ"""
    v, moved = value(x), tangent(x)
    dims = tuple(range(-len(shape), 0))
    centred = v - v.mean(dims, keepdim=True)
    inverse = torch.rsqrt((centred**2).mean(dims, keepdim=True) + eps)
    unit = centred * inverse
    y = pair(unit, None if moved is None else inverse * (
        moved - moved.mean(dims, keepdim=True) - unit * (unit * moved).mean(dims, keepdim=True)
    ))  # fmt: skip
    y = y if weight is None else mul(y, weight)
    return y if bias is None else add(y, bias)


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """x̂ = x/ρ, ρ² = mean x² + ε;  x̂˙ = (ẋ − x̂ mean(x̂ ⊙ ẋ))/ρ"""
    v, moved = value(x), tangent(x)
    dims = tuple(range(-len(shape), 0))
    inverse = torch.rsqrt(
        (v**2).mean(dims, keepdim=True) + (torch.finfo(v.dtype).eps if eps is None else eps)
    )
    unit = v * inverse
    y = pair(
        unit, None if moved is None else inverse * (moved - unit * (unit * moved).mean(dims, keepdim=True))
    )
    return y if weight is None else mul(y, weight)


@rule(F.batch_norm, torch.batch_norm)
def batch_norm(
    x: Any, mean: Tensor, variance: Tensor, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """With the running statistics: an affine map by channel."""
    if training:
        raise UsageError("statistics of the batch are not linear in the weights: use evaluation mode")
    lift = (slice(None), *[None] * (x.dim() - 2))
    y = mul(sub(x, mean[lift]), torch.rsqrt(variance + eps)[lift])
    y = y if weight is None else mul(y, weight[lift])
    return y if bias is None else add(y, bias[lift])


@rule(F.softmax, torch.softmax, T.softmax)
def softmax(x: Any, dim: int = -1, dtype: Any = None, **_: Any) -> Any:
    """A = softmax(S);  Ȧ = A ⊙ (Ṡ − rowsum(A ⊙ Ṡ))"""
    a = torch.softmax(x.x, dim, dtype)
    moved = x.dx.to(a.dtype)
    return Pair(a, a * (moved - (a * moved).sum(dim, keepdim=True)))


@rule(F.scaled_dot_product_attention)
def attention(
    q: Any, k: Any, v: Any, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """S = s qkᵀ + M, Ṡ = s (q̇kᵀ + qk̇ᵀ);  out = Av, out˙ = Ȧv + Av̇. A query that may see nothing gets 0."""
    if dropout_p:
        raise UsageError("dropout is not linear in the weights: put the module in evaluation mode")
    if enable_gqa:
        k, v = (_repeated(t, q.shape[-3] // t.shape[-3]) for t in (k, v))
    turned = RULES[T.transpose](k, -2, -1) if isinstance(k, Pair) else k.transpose(-2, -1)
    s = mul(matmul(q, turned), 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    plain = value(s)
    if is_causal:
        causal = torch.ones(plain.shape[-2:], dtype=torch.bool, device=plain.device).tril()
        attn_mask = causal if attn_mask is None else attn_mask
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        plain = plain.masked_fill(~attn_mask, -math.inf) if hidden else plain + attn_mask
    moved = tangent(s)
    a = torch.softmax(plain, -1).masked_fill((plain == -math.inf).all(-1, keepdim=True), 0.0)
    if moved is None:
        return matmul(a, v)
    return matmul(Pair(a, a * (moved - (a * moved).sum(-1, keepdim=True))), v)


def _repeated(x: Any, times: int) -> Any:
    if isinstance(x, Pair):
        return RULES[T.repeat_interleave](x, times, -3)
    return x.repeat_interleave(times, -3)


@rule(F.multi_head_attention_forward)
def multi_head_attention(
    query: Any, key: Any, val: Any, embed_dim: int, heads: int, in_weight: Any, in_bias: Any, *args: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """nn.MultiheadAttention: projections, attention by head, and the output's projection. [L, N, E] → [L, N, E]"""
    given = dict(zip(_MHA_REST, args, strict=False)) | kwargs
    odd = [n for n in ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v") if _given(given.get(n))]
    if odd or query.dim() != 3:
        raise UsageError(
            f"attention with {', '.join(odd) or 'inputs without a batch'} has no closed form here"
        )
    if given.get("use_separate_proj_weight"):
        weights: Any = [given[f"{n}_proj_weight"] for n in "qkv"]
    else:
        weights = _chunks(in_weight)
    biases = [None] * 3 if in_bias is None else _chunks(in_bias)
    q, k, v = (
        _split_heads(linear(x, w, b), heads)
        for x, w, b in zip((query, key, val), weights, biases, strict=True)
    )
    mask = _mask(given, q, k, heads)
    made = attention(q, k, v, mask, given.get("dropout_p", 0.0) if given.get("training") else 0.0)
    n, length = q.shape[0], q.shape[2]
    flat = made.permute(2, 0, 1, 3).reshape(length, n, embed_dim)
    return linear(flat, given["out_proj_weight"], given["out_proj_bias"]), None


_MHA_REST = ("bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training",
             "key_padding_mask", "need_weights", "attn_mask")  # fmt: skip


def _given(x: Any) -> bool:
    return x is not None and x is not False


def _chunks(x: Any) -> Any:
    return RULES[T.chunk](x, 3) if isinstance(x, Pair) else x.chunk(3)


def _split_heads(x: Any, heads: int) -> Any:
    """[L, N, E] → [N, heads, L, E/heads]"""
    length, n, width = x.shape
    return x.reshape(length, n, heads, width // heads).permute(1, 2, 0, 3)


def _mask(given: dict[str, Any], q: Any, k: Any, heads: int) -> Tensor | None:
    """attn_mask and key_padding_mask, in which True hides, as one mask that is added."""
    made, n = None, q.shape[0]
    for mask, lift in ((given.get("attn_mask"), False), (given.get("key_padding_mask"), True)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill(mask, -math.inf)
        mask = (
            mask[:, None, None]
            if lift
            else mask.reshape(n, heads, *mask.shape[1:])
            if mask.dim() == 3
            else mask
        )
        made = mask if made is None else made + mask
    return made
