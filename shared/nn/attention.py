"""The one attention call of the house: three interchangeable backends, structured masks, a module and a KV cache.

Scaled dot-product attention as in Vaswani et al. 2017 (arXiv:1706.03762), section 3.2. Axes: B batch, T query tokens,
S key tokens, D width, H heads, G key/value heads (G divides H), K head width.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from shared.core.errors import UserError

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Rotation = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class StructuredMask:
    """A mask given as a rule, `mask_mod(b, h, q, k) -> bool`, as FlexAttention defines it: True = may attend.

    B and H may be 1: the rule then must not depend on that index. What is derived from the rule is computed once, so
    build one mask per batch and hand it to every layer.
    """

    def __init__(self, mask_mod: MaskMod, B: int, H: int, T: int, S: int) -> None:
        self.mask_mod, self.shape = mask_mod, (B, H, T, S)
        self._derived: dict[tuple, Any] = {}

    def dense(self, device: torch.device | str, *, causal: bool = False) -> Tensor:
        """The rule (and causality, where asked) as a bool tensor (B, H, T, S)."""
        return self._derive(create_mask, device, causal)

    def block_mask(self, device: torch.device | str, *, causal: bool = False) -> BlockMask:
        """The rule (and causality, where asked) as FlexAttention's sparse block mask."""
        return self._derive(create_block_mask, device, causal)

    def _derive(self, create: Callable, device: torch.device | str, causal: bool) -> Any:
        key = (create is create_mask, str(device), causal)
        if key not in self._derived:
            *_, T, S = self.shape
            mask_mod = _and(self.mask_mod, _causal_mod(S - T)) if causal else self.mask_mod
            # Validation under inference mode must not leave tensors behind that a later training step cannot save.
            with torch.inference_mode(False):
                self._derived[key] = create(mask_mod, *self.shape, device=device)
        return self._derived[key]


def _causal_mod(shift: int) -> MaskMod:
    return lambda b, h, q, k: k <= q + shift


def _and(first: MaskMod, second: MaskMod) -> MaskMod:
    return lambda b, h, q, k: first(b, h, q, k) & second(b, h, q, k)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | StructuredMask | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the allowed pairs -> (B, H, T, K).

    q (B, H, T, K); k, v (B, G, S, K); scale defaults to K^-0.5. mask: bool, broadcastable to (B, H, T, S), True = may
    attend, or a StructuredMask; it is combined with `causal`, which aligns the *ends* of queries and keys (query i sees
    keys up to i + S - T), as cached decoding needs. A query that may attend to nothing gives zeros and passes no
    gradient, on every backend. dropout acts on the attention weights: pass 0 outside training.

    Raises ValueError for tensors that do not fit, UserError for a backend that is unknown or cannot do what is asked.
    """
    B, H, T, K = q.shape
    S = k.shape[2]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != K or H % k.shape[1]:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise ValueError(f"attention: the mask is {mask.dtype}, expected bool with True = may attend (try mask.bool())")
    if mask is not None and not _broadcasts(mask.shape, (B, H, T, S)):
        raise ValueError(f"attention: mask {tuple(mask.shape)} does not broadcast to (B, H, T, S) = {(B, H, T, S)}")
    causal = causal and T > 1  # a single query stands at the end and sees every key
    return _BACKENDS[_known(backend or _default)](q, k, v, mask, causal, K**-0.5 if scale is None else scale, dropout)


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    aligned = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in aligned)


def _dense(mask: Tensor | StructuredMask | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """Mask and causality as one bool tensor, broadcastable to (B, H, T, S); None when everything may be seen."""
    if isinstance(mask, StructuredMask):
        return mask.dense(q.device, causal=causal)
    if not causal:
        return mask
    T, S = q.shape[2], k.shape[2]
    allowed = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # (T, S)
    return allowed if mask is None else mask & allowed


def _per_query_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return k, v
    return repeat(k, "b g s k -> b (g r) s k", r=group), repeat(v, "b g s k -> b (g r) s k", r=group)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask, causal: bool, scale: float, dropout: float) -> Tensor:
    T, S = q.shape[2], k.shape[2]
    if not dropout and _trains_in_bf16_on_a_cpu(q, k, v):
        return _BackwardByProducts.apply(q, *_per_query_head(q, k, v), mask, causal, scale)
    if mask is None and (not causal or T == S):
        # Flash and cuDNN share grouped keys for free, but only in half precision; elsewhere `enable_gqa` would fall
        # back to the kernel that writes the (T, S) scores to memory, which costs more than repeating the keys.
        grouped = q.shape[1] != k.shape[1] and q.dtype in (torch.float16, torch.bfloat16)
        if not grouped:
            k, v = _per_query_head(q, k, v)
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=grouped
        )
    # What a softmax over nothing gives is up to the kernel: let those queries see everything, then erase the answer.
    mask = _dense(mask, causal, q, k)
    sees = mask.any(-1, keepdim=True)  # (..., T, 1)
    k, v = _per_query_head(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~sees, scale=scale, dropout_p=dropout)
    return out.masked_fill(~sees, 0.0)  # (B, H, T, K)


def _trains_in_bf16_on_a_cpu(q: Tensor, k: Tensor, v: Tensor) -> bool:
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return trained and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] <= _SCORES_KEPT


_SCORES_KEPT = 2**20  # a head; beyond, its weights would take more than 2 MiB


class _BackwardByProducts(torch.autograd.Function):
    """SDPA forward, matrix products backward: on a CPU its own backward pass takes up to 5 times as long in bf16."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask, causal: bool, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.given = mask, causal, scale
        return _sdpa(q, k, v, mask, causal, scale, 0.0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        weights = _weights(q, k, *ctx.given)
        steps = torch._softmax_backward_data(gradient @ v.mT, weights, -1, weights.dtype)  # of scale q k^T
        scale = ctx.given[2]
        return scale * (steps @ k), scale * (steps.mT @ q), weights.mT @ gradient, None, None, None


def _flex(q: Tensor, k: Tensor, v: Tensor, mask, causal: bool, scale: float, dropout: float) -> Tensor:
    if dropout:
        raise UserError("attention: the flex backend has no dropout; set it to 0 or use_backend('sdpa')")
    run = flex_attention
    if q.is_cuda:
        run = _compiled_flex()
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise UserError("attention: the flex backend has no gradients outside CUDA; train with use_backend('sdpa')")
    else:
        q, k, v = q.detach(), k.detach(), v.detach()  # it looks at requires_grad even when no gradient is recorded
    (B, H, T, _), S = q.shape, k.shape[2]
    blocks: BlockMask | None
    if isinstance(mask, StructuredMask):
        blocks = mask.block_mask(q.device, causal=causal)
    elif mask is not None:
        table, sizes = mask.expand(B, H, T, S), (1,) * (4 - mask.ndim) + tuple(mask.shape)
        by_table = StructuredMask(lambda b, h, i, j: table[b, h, i, j], sizes[0], sizes[1], T, S)
        blocks = by_table.block_mask(q.device, causal=causal)
    else:
        blocks = _causal_blocks(T, S, str(q.device)) if causal else None
    return run(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])  # (B, H, T, K)


@functools.cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=64)
def _causal_blocks(T: int, S: int, device: str) -> BlockMask:
    return StructuredMask(_causal_mod(S - T), 1, 1, T, S).block_mask(device)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask, causal: bool, scale: float, dropout: float) -> Tensor:
    k, v = _per_query_head(q, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        weights = _weights(q.to(wide), k.to(wide), mask, causal, scale)
        return (F.dropout(weights, dropout) @ v.to(wide)).to(q.dtype)  # (B, H, T, K)


def _weights(q: Tensor, k: Tensor, mask, causal: bool, scale: float) -> Tensor:
    """softmax(scale q k^T) over the allowed pairs, zeros for a query without any. (B, H, T, S)"""
    mask = _dense(mask, causal, q, k)
    scores = scale * q @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return weights if mask is None else weights.masked_fill(~mask, 0.0)


_BACKENDS = {"sdpa": _sdpa, "flex": _flex, "reference": _reference}
_default = "sdpa"


def _known(name: str) -> str:
    if name not in _BACKENDS:
        raise UserError(f"attention: unknown backend '{name}', expected one of {', '.join(_BACKENDS)}")
    return name


def set_default_backend(name: str) -> None:
    """Choose the backend of every call that names none: "sdpa", "flex" or "reference"."""
    global _default
    _default = _known(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_default_backend` for the length of a with block."""
    before = _default
    set_default_backend(name)
    try:
        yield
    finally:
        set_default_backend(before)


class KVCache:
    """Keys and values of one layer while it decodes; for cross-attention, those of its context, computed once.

    Memory is taken at the first append: `max_length` positions where given, else what is needed, doubled when full.
    Write to it without gradients.
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self.length = 0
        self._keys: Tensor = torch.empty(0, 0, 0, 0)  # (B, G, capacity, K)
        self._values: Tensor = self._keys

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v (B, G, T, K); return views of all so far, (B, G, length, K). ValueError beyond max_length."""
        start, end = self.length, self.length + k.shape[2]
        if self.max_length is not None and end > self.max_length:
            raise ValueError(f"KVCache: {end} positions asked, max_length is {self.max_length}")
        capacity = self._keys.shape[2]
        if end > capacity:
            capacity = self.max_length or max(end, 2 * capacity)
            self._keys = self._moved(self._keys, k, capacity)
            self._values = self._moved(self._values, v, capacity)
        self._keys[:, :, start:end] = k
        self._values[:, :, start:end] = v
        self.length = end
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Views of everything appended so far, (B, G, length, K) each."""
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def reorder(self, indices: Tensor, since: int = 0) -> None:
        """Keep the batch rows `indices`, in this order; rows may repeat or vanish, as beams do.

        since: the first so many positions are equal in all rows that change places, and as many rows stay as there
        are; then only what follows is moved, in place.
        """
        if not self.length:
            return
        if since:
            for cached in (self._keys, self._values):
                cached[:, :, since : self.length] = cached[:, :, since : self.length].index_select(0, indices)
        else:
            self._keys, self._values = self._keys.index_select(0, indices), self._values.index_select(0, indices)

    def _moved(self, old: Tensor, like: Tensor, capacity: int) -> Tensor:
        new = like.new_empty(*like.shape[:2], capacity, like.shape[3])
        if self.length:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new


class Attention(nn.Module):
    """Multi-head self-attention, or cross-attention into a context of another width (`context_width`).

    Projections are fused: `qkv` with rows [q; k; v] (torch.nn.MultiheadAttention's in_proj), or `q` and `kv` with rows
    [k; v]; `out` projects back. kv_heads < heads shares each key/value head among several query heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        context_width: int | None = None,
        bias: bool = True,
        out_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dropout = heads, kv_heads or heads, dropout
        if width % heads or heads % self.kv_heads:
            raise UserError(f"Attention: width {width}, {heads} heads and {self.kv_heads} kv_heads must divide in turn")
        self.head_width = width // heads
        kv_width = self.kv_heads * self.head_width
        self.is_cross = context_width is not None
        if context_width is not None:
            self.q = nn.Linear(width, width, bias=bias)
            self.kv = nn.Linear(context_width, 2 * kv_width, bias=bias)
        else:
            self.qkv = nn.Linear(width, width + 2 * kv_width, bias=bias)
        self.out = nn.Linear(width, out_width or width, bias=bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | StructuredMask | None = None,
        causal: bool = False,
        rotary: Rotation | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x (B, T, D), context (B, S, C) -> (B, T, out_width); mask and causal as in `attention`.

        With a cache, x holds the new tokens only, S counts the cached ones too, and a context is read the first time
        only (it may be None afterwards). rotary(q, k, offset) turns q and k of self-attention before they are cached.
        R rows of x in succession (beams) may share one context: x (B·R, T, D) with context (B, S, C); the mask then is
        one of keys, (B or 1, H or 1, 1, S), and nothing is causal.
        """
        if self.is_cross:
            q, k, v = self._cross_projections(x, context, cache, rotary)
        else:
            q, k, v = self._self_projections(x, context, cache, rotary)
        dropout = self.dropout if self.training else 0.0
        rows = len(q) // max(1, len(k))
        if self.is_cross and rows > 1 and len(q) == rows * len(k) and not causal:
            q = rearrange(q, "(b r) h t k -> b h (r t) k", r=rows)
            mixed = attention(q, k, v, mask=mask, dropout=dropout)
            mixed = rearrange(mixed, "b h (r t) k -> (b r) h t k", r=rows)
        else:
            mixed = attention(q, k, v, mask=mask, causal=causal, dropout=dropout)  # (B, H, T, K)
        return self.out(rearrange(mixed, "b h t k -> b t (h k)"))

    def _self_projections(self, x: Tensor, context: Tensor | None, cache: KVCache | None, rotary: Rotation | None):
        if context is not None:
            raise ValueError("Attention: self-attention got a context; give context_width to attend to one")
        q, k, v = self._heads(self.qkv(x)).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if rotary is not None:
            q, k = rotary(q, k, 0 if cache is None else cache.length)
        return (q, k, v) if cache is None else (q, *cache.append(k, v))

    def _cross_projections(self, x: Tensor, context: Tensor | None, cache: KVCache | None, rotary: Rotation | None):
        if rotary is not None:
            raise ValueError("Attention: rotary positions have no meaning between x and a context")
        q = self._heads(self.q(x))  # (B, H, T, K)
        if cache is not None and cache.length:
            return q, *cache.keys_and_values()
        if context is None:
            raise ValueError("Attention: cross-attention needs its context")
        k, v = self._heads(self.kv(context)).split(self.kv_heads, dim=1)  # (B, G, S, K)
        return (q, k, v) if cache is None else (q, *cache.append(k, v))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h k) -> b h t k", k=self.head_width)
