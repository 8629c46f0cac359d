"""BERT's blocks with cross-attention into another modality: what ALBEF, BLIP and the Q-Former of BLIP-2 are made of.

Devlin et al. 2019 (arXiv:1810.04805); cross-attention between self-attention and feed-forward as in Li et al. 2021
(ALBEF, arXiv:2107.07651), Fig. 1. Axes: B batch, T text tokens, S context tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.core.errors import UserError
from shared.nn.attention import Attention, KVCache, attention
from shared.nn.blocks import MLP, Blocks

EPS = 1e-12  # BERT's LayerNorm
INIT_STD = 0.02


class BertEmbeddings(nn.Module):
    """Word, position and (where token_types > 0) token-type tables, summed, normalised. (B, T) -> (B, T, D)."""

    def __init__(
        self, vocabulary: int, width: int, positions: int = 512, *, token_types: int = 0, dropout: float = 0.1
    ):
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.token_type = nn.Embedding(token_types, width) if token_types else None
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """positions (B, T) or (T,): where each token stands; from 0 on where not given. Token type 0 throughout."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.word(tokens) + self.position(positions)
        if self.token_type is not None:
            x = x + self.token_type.weight[0]
        return self.dropout(self.norm(x))


class LayerCache(NamedTuple):
    """What one layer keeps while it decodes: keys and values of the tokens so far, and of its context."""

    tokens: KVCache
    context: KVCache


class BertLayer(nn.Module):
    """Self-attention, cross-attention where `context_width` is given, feed-forward; each added, then normalised."""

    def __init__(
        self, width: int, heads: int, mlp_width: int, *, context_width: int | None = None, dropout: float = 0.1
    ):
        super().__init__()
        self.attention = Attention(width, heads, dropout=dropout)
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.cross_attention: Attention | None = None
        self.cross_norm: nn.LayerNorm | None = None
        if context_width is not None:
            self.cross_attention = Attention(width, heads, context_width=context_width, dropout=dropout)
            self.cross_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, mlp_width)
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, T, D), context (B, S, C) -> (B, T, D). Without a context (and none cached) cross-attention is skipped.

        mask broadcasts to (B, H, T, T), context_mask to (B, H, T, S): True = may attend.
        """
        tokens, seen = cache or (None, None)
        x = self.attention_norm(x + self.dropout(self.attention(x, mask=mask, causal=causal, cache=tokens)))
        return self._after_attention(x, context, context_mask, seen)

    def first(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """`forward` at the first position alone. x (B, T, D) -> (B, 1, D)."""
        own, parts = self.attention, [x.shape[-1], 2 * x.shape[-1]]
        (q_weight, kv_weight), (q_bias, kv_bias) = own.qkv.weight.split(parts), own.qkv.bias.split(parts)
        mask = None if mask is None else mask[..., :1, :]
        q = rearrange(F.linear(x[:, :1], q_weight, q_bias), "b t (h k) -> b h t k", k=own.head_width)
        k, v = rearrange(F.linear(x, kv_weight, kv_bias), "b t (two h k) -> two b h t k", two=2, k=own.head_width)
        mixed = attention(q, k, v, mask=mask, dropout=own.dropout if self.training else 0.0)
        looked = own.out(rearrange(mixed, "b h t k -> b t (h k)"))
        return self._after_attention(self.attention_norm(x[:, :1] + self.dropout(looked)), context, context_mask)

    def _after_attention(
        self, x: Tensor, context: Tensor | None, context_mask: Tensor | None, seen: KVCache | None = None
    ) -> Tensor:
        cross, norm = self.cross_attention, self.cross_norm
        if cross is not None and norm is not None and (context is not None or (seen is not None and seen.length)):
            x = norm(x + self.dropout(cross(x, context, mask=context_mask, cache=seen)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class BertLayers(Blocks):
    """A stack of BertLayer; `cross` names the layers that have cross-attention (all, or none where no width)."""

    @classmethod
    def make(
        cls,
        layers: int,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        context_width: int | None = None,
        cross: Sequence[int] | None = None,
        dropout: float = 0.1,
    ) -> BertLayers:
        with_cross = range(layers) if cross is None else cross
        return cls(
            BertLayer(
                width, heads, mlp_width, context_width=context_width if i in with_cross else None, dropout=dropout
            )
            for i in range(layers)
        )

    def forward(  # type: ignore[override]  # its layers take more than a Block does
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """As BertLayer, through all layers. (B, T, D) -> (B, T, D)."""
        given = {"mask": mask, "causal": causal, "context": context, "context_mask": context_mask}
        for index, layer in enumerate(self):
            x = self._through(layer, x, given, caches[index] if caches else None)
        return x

    def first(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """`forward` at the first position, [CLS]: of the last layer nothing else is computed. (B, T, D) -> (B, D)."""
        *below, last = self
        given = {"mask": mask, "context": context, "context_mask": context_mask}
        for layer in below:
            x = self._through(layer, x, given)
        return last.first(x, **given)[:, 0]

    def _through(self, layer: BertLayer, x: Tensor, given: dict, cache: LayerCache | None = None) -> Tensor:
        if cache is None and self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(layer, x, **given, use_reentrant=False)
        return layer(x, **given, cache=cache)


class TokenHead(nn.Module):
    """BERT's head over the vocabulary: dense, GELU, norm, the word table itself and a bias. (..., D) -> (..., V)."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, x: Tensor, word_table: Tensor) -> Tensor:
        """x (..., D), word_table (V, D): the embeddings' weight, which the head shares."""
        return F.linear(self.norm(F.gelu(self.dense(x))), word_table, self.bias)


def key_mask(attention_mask: Tensor | None) -> Tensor | None:
    """attention_mask (B, S) bool, False at padding -> a mask over keys (B, 1, 1, S)."""
    return None if attention_mask is None else rearrange(attention_mask, "b s -> b 1 1 s")


def _unless_all(attention_mask: Tensor | None) -> Tensor | None:
    """None where nothing is padding, so that attention runs without a mask."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


def positions_of(attention_mask: Tensor) -> Tensor:
    """Where each token of (B, T) stands, padding on either side not counted. (B, T)"""
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)


def init_std(width: int) -> float:
    """The standard deviation of initial weights: 0.02, as published, from 768 on; more where a sum has fewer terms."""
    return INIT_STD * max(1.0, 768 / width) ** 0.5


def initialise_bert(module: nn.Module, std: float = INIT_STD) -> None:
    """BERT's scheme: normals of 0.02, zero biases, unit norms."""
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Embedding)):
            nn.init.normal_(child.weight, std=std)
            if isinstance(child, nn.Linear) and child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)


class BertDecoding:
    """A causal BERT stack at work on one batch: prompts first, then token by token, keys and values kept.

    R rows of tokens in succession (beams) may share one row of the context; its keys and values are computed once.
    Answers shared/nn/generation.py's protocol: `prefill`, `step`, `select`.
    """

    def __init__(
        self,
        embeddings: BertEmbeddings,
        layers: BertLayers,
        head: TokenHead,
        context: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
    ):
        """context (B, S, C), context_attention_mask (B, S) bool."""
        self.embeddings, self.layers, self.head = embeddings, layers, head
        self.context, self.context_mask = context, key_mask(_unless_all(context_attention_mask))
        self.caches = [LayerCache(KVCache(), KVCache()) for _ in layers]
        self.attention_mask: Tensor | None = None  # (R, T) where any prompt is padded
        self.length = 0  # tokens of the longest prompt and of what followed

    def prefill(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Prompts (B, T), attention_mask (B, T) False at padding, left or right -> logits of the next token (B, V)."""
        self.attention_mask = _unless_all(attention_mask)
        self._lengthen(int(attention_mask.sum(1).max()))
        x = self.embeddings(tokens, None if self.attention_mask is None else positions_of(attention_mask))
        x = self.layers(
            x, mask=key_mask(self.attention_mask), causal=True, context=self.context, context_mask=self.context_mask,
            caches=self.caches,
        )  # fmt: skip
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = torch.where(attention_mask, places, -1).argmax(1)  # (B,)
        return self._logits(x[torch.arange(len(x), device=x.device), last])

    def step(self, tokens: Tensor) -> Tensor:
        """One more token a row (R,) -> logits of the next (R, V)."""
        self._lengthen(1)
        if self.attention_mask is None:
            position = torch.full_like(tokens[:1], self.length - 1)  # (1,)
        else:
            position = self.attention_mask.sum(1, keepdim=True)  # (R, 1)
            self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.attention_mask[:, :1])], dim=1)
        x = self.embeddings(tokens[:, None], position)
        x = self.layers(x, mask=key_mask(self.attention_mask), context_mask=self.context_mask, caches=self.caches)
        return self._logits(x[:, 0])

    def select(self, rows: Tensor, contexts: Tensor | None = None) -> None:
        """Keep these rows, in this order (they may repeat); contexts: which rows of the context, all where None."""
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[rows]
        for cache in self.caches:
            cache.tokens.reorder(rows)
            if contexts is not None:
                cache.context.reorder(contexts)
        if contexts is not None and self.context_mask is not None:
            self.context_mask = self.context_mask[contexts]

    def _lengthen(self, tokens: int) -> None:
        self.length += tokens
        positions = self.embeddings.position.num_embeddings
        if self.length > positions:
            raise UserError(
                f"BERT decoder: a text of {self.length} tokens, but it has {positions} positions; "
                "shorten the prompt or max_new_tokens"
            )

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(x, self.embeddings.word.weight).float()
