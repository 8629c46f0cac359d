"""The Q-Former of BLIP-2 (Li et al. 2023, arXiv:2301.12597, Sec. 3.1): learned queries that look at a context and, by
shared self-attention, meet a text. Axes: B batch, Q queries, T text tokens, S context tokens, C their width, D width,
H heads, K head width, R texts, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.core.errors import UserError
from shared.nn.attention import Attention, KVCache, StructuredMask
from shared.nn.bert import EPS, INIT_STD, BertEmbeddings, TokenHead, initialise_bert, key_mask, positions_of
from shared.nn.blocks import MLP, Blocks


class Cache(Protocol):
    """What self-attention asks of a cache: to add keys and values (B, H, T, K) and give all so far."""

    length: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class QueryCache:
    """Keys and values of the queries in one layer: written once, with gradients; text that follows is not kept."""

    def __init__(self) -> None:
        self.length = 0
        self.keys = self.values = torch.empty(0, 0, 0, 0)  # (B, H, Q, K)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.length:
            self.keys, self.values, self.length = k, v, k.shape[2]
            return k, v
        return torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)


class CrossAttentionKV:
    """Keys and values of a context in one layer (B, H, S, K), with gradients, for the texts or queries of `rows` (R,):
    what Attention takes for a filled cache."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor | None = None):
        self.keys, self.values, self.rows, self.length = keys, values, rows, keys.shape[2]

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            return self.keys, self.values
        return self.keys.index_select(0, self.rows), self.values.index_select(0, self.rows)

    def of(self, rows: Tensor | None) -> CrossAttentionKV:
        """The same keys and values for others to look at."""
        return CrossAttentionKV(self.keys, self.values, rows)

    def behind(self, other: CrossAttentionKV) -> CrossAttentionKV:
        """These contexts after another's, rows not yet chosen."""
        return CrossAttentionKV(torch.cat([other.keys, self.keys]), torch.cat([other.values, self.values]))


class QFormerLayer(nn.Module):
    """BERT's layer with two feed-forward branches: one for queries, one for text (None without text).

    Self-attention is common to both; cross-attention, where `context_width` is given, is of the queries alone.
    """

    def __init__(
        self, width: int, heads: int, mlp_width: int, *, context_width: int | None, text: bool, dropout: float = 0.1
    ):
        super().__init__()
        self.attention = Attention(width, heads, dropout=dropout)
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.cross_attention: Attention | None = None
        self.cross_norm: nn.LayerNorm | None = None
        if context_width is not None:
            self.cross_attention = Attention(width, heads, context_width=context_width, dropout=dropout)
            self.cross_norm = nn.LayerNorm(width, eps=EPS)
        self.query_mlp = MLP(width, mlp_width)
        self.query_mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, mlp_width) if text else None
        self.mlp_norm = nn.LayerNorm(width, eps=EPS) if text else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        queries: int,
        *,
        mask: Tensor | StructuredMask | None = None,
        causal: bool = False,
        context: Tensor | CrossAttentionKV | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x (B, Q + T, D), whose first `queries` positions are queries; context (B, S, C) -> (B, Q + T, D)."""
        x = self.attention_norm(x + self.dropout(self.attention(x, mask=mask, causal=causal, cache=cache)))
        looking, text = x.split([queries, x.shape[1] - queries], dim=1)
        parts = []
        if queries:
            if self.cross_attention is not None and self.cross_norm is not None:
                seen = (None, context) if isinstance(context, CrossAttentionKV) else (context, None)
                looked = self.cross_attention(looking, seen[0], cache=seen[1])
                looking = self.cross_norm(looking + self.dropout(looked))
            parts.append(self.query_mlp_norm(looking + self.dropout(self.query_mlp(looking))))
        if text.shape[1]:
            assert self.mlp is not None and self.mlp_norm is not None, "a Q-Former without a vocabulary got a text"
            parts.append(self.mlp_norm(text + self.dropout(self.mlp(text))))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def look_at(self, context: Tensor) -> CrossAttentionKV | None:
        """Keys and values of a context (B, S, C); None where the layer has no cross-attention."""
        cross = self.cross_attention
        if cross is None:
            return None
        return CrossAttentionKV(*rearrange(cross.kv(context), "b s (two h k) -> two b h s k", two=2, h=cross.heads))


class QFormerLayers(Blocks):
    """A stack of QFormerLayer, of which every `cross_every`-th, from the first on, looks at the context."""

    @classmethod
    def make(
        cls, layers: int, width: int, heads: int, mlp_width: int, *, context_width: int, cross_every: int, text: bool,
        dropout: float,
    ) -> QFormerLayers:  # fmt: skip
        widths = [None if i % cross_every else context_width for i in range(layers)]
        return cls(QFormerLayer(width, heads, mlp_width, context_width=c, text=text, dropout=dropout) for c in widths)

    def forward(  # type: ignore[override]  # its layers take more than a Block does
        self,
        x: Tensor,
        queries: int,
        *,
        mask: Tensor | StructuredMask | None = None,
        causal: bool = False,
        context: Tensor | Sequence[CrossAttentionKV | None] | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """As QFormerLayer, through all layers; context (B, S, C), or what each layer saw of it. (B, Q + T, D)."""
        for index, layer in enumerate(self):
            seen = context if context is None or isinstance(context, Tensor) else context[index]
            options: dict[str, Any] = {"mask": mask, "causal": causal, "context": seen}
            if caches is None and self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, queries, **options, use_reentrant=False)
            else:
                x = layer(x, queries, **options, cache=caches[index] if caches else None)
        return x


class _QueryEmbeddings(nn.Module):
    """What is left of BertEmbeddings without text: queries have no word and no position of their own."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)


class QFormer(nn.Module):
    """Learned queries and a text in one BERT whose layers 0, `cross_every`, ... let the queries look at a context.

    Without a vocabulary there is no text: no tables and no text feed-forward, as in BLIP-2's second stage. A context is
    (B, S, C), or what `look_at` gives. attention_mask (B, T) is False at padding.
    """

    def __init__(
        self,
        queries: int,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int,
        context_width: int,
        *,
        vocabulary: int | None,
        positions: int = 512,
        cross_every: int = 2,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(queries, width))
        self.embeddings: Any = (
            _QueryEmbeddings(width, dropout)
            if vocabulary is None
            else BertEmbeddings(vocabulary, width, positions, dropout=dropout)
        )
        self.layers = QFormerLayers.make(
            layers, width, heads, mlp_width, context_width=context_width, cross_every=cross_every,
            text=vocabulary is not None, dropout=dropout,
        )  # fmt: skip
        self.initialise()

    def initialise(self, std: float = INIT_STD) -> None:
        """BERT's scheme; queries normal, and their feed-forward branch begins as the text's (official code)."""
        initialise_bert(self, std)
        nn.init.normal_(self.query_tokens, std=std)
        self.copy_text_branch()

    @torch.no_grad()
    def copy_text_branch(self) -> None:
        """Start the queries' feed-forward branch from the text's: to be called after BERT's weights were loaded."""
        for layer in self.layers:
            if layer.mlp is not None:
                layer.query_mlp.load_state_dict(layer.mlp.state_dict())
                layer.query_mlp_norm.load_state_dict(layer.mlp_norm.state_dict())

    # ---- what attends to what

    def look_at(self, context: Tensor) -> list[CrossAttentionKV | None]:
        """Keys and values of a context (B, S, C), computed once however often it is looked at."""
        return [layer.look_at(context) for layer in self.layers]

    def encode_queries(
        self, context: Tensor | Sequence[CrossAttentionKV | None], *, caches: Sequence[Cache] | None = None
    ) -> Tensor:
        """The queries alone. context (B, S, C) -> (B, Q, D); caches, one a layer, are filled where given."""
        return self.layers(self._queries(_rows(context)), len(self.query_tokens), context=context, caches=caches)

    def encode_text(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """The text alone, in both directions. tokens (B, T), attention_mask (B, T) -> (B, T, D)."""
        return self.layers(self.embeddings(tokens), 0, mask=key_mask(attention_mask))

    def match(
        self, tokens: Tensor, attention_mask: Tensor, context: Tensor | Sequence[CrossAttentionKV | None]
    ) -> Tensor:
        """Queries and text see each other, in both directions. tokens (R, T), attention_mask (R, T) -> (R, Q + T, D).

        R is a multiple of the context's rows: texts in succession share one.
        """
        x = torch.cat([self._queries(len(tokens)), self.embeddings(tokens)], dim=1)
        return self.layers(x, len(self.query_tokens), mask=key_mask(self._behind(attention_mask)), context=context)

    def decode_text(self, tokens: Tensor, attention_mask: Tensor, caches: Sequence[Cache]) -> Tensor:
        """The text behind queries that `encode_queries` cached: it sees them all and the text so far.
        (B, T) -> (B, T, D).

        Positions begin at 0, padding is on the right. Gradients flow through the cache into the queries' pass.
        """
        mask = key_mask(self._behind(attention_mask))
        return self.layers(self.embeddings(tokens), 0, mask=mask, causal=True, caches=caches)

    def joint_causal(
        self, tokens: Tensor, attention_mask: Tensor, context: Tensor | Sequence[CrossAttentionKV | None]
    ) -> Tensor:
        """`encode_queries` and `decode_text` in one pass under the multimodal causal mask (Fig. 2).
        (B, T) -> (B, Q + T, D)."""
        x = torch.cat([self._queries(len(tokens)), self.embeddings(tokens)], dim=1)
        mask = multimodal_causal_mask(len(self.query_tokens), self._behind(attention_mask))
        return self.layers(x, len(self.query_tokens), mask=mask, context=context)

    def caches(self) -> list[QueryCache]:
        """Empty, for `encode_queries` to fill and `decode_text` to read."""
        return [QueryCache() for _ in self.layers]

    def decoding(self, head: TokenHead, context: Tensor) -> QFormerDecoding:
        """context (B, S, C) -> what shared/nn/generation.py drives."""
        return QFormerDecoding(self, head, context)

    def _queries(self, rows: int) -> Tensor:
        queries = self.embeddings.norm(self.query_tokens)
        return self.embeddings.dropout(queries.expand(rows, -1, -1))  # (B, Q, D)

    def _behind(self, attention_mask: Tensor) -> Tensor:
        """attention_mask (B, T) with the queries, which always are, in front. (B, Q + T)"""
        return F.pad(attention_mask, (len(self.query_tokens), 0), value=True)


def multimodal_causal_mask(queries: int, attention_mask: Tensor) -> StructuredMask:
    """Queries see queries, text sees them and the text so far. attention_mask (B, Q + T) bool, False at padding."""
    rows, length = attention_mask.shape

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k < queries) | ((q >= queries) & (k <= q))) & attention_mask[b, k]

    return StructuredMask(allowed, rows, 1, length, length)


def _rows(context: Tensor | Sequence[CrossAttentionKV | None]) -> int:
    if isinstance(context, Tensor):
        return len(context)
    first = context[0]
    assert first is not None, "layer 0 always looks"
    return len(first.keys) if first.rows is None else len(first.rows)


class QFormerDecoding:
    """The text of one batch of contexts as it is written: queries first, then prompts, then token by token.

    The queries look once a context. Answers shared/nn/generation.py's protocol: `prefill`, `step`, `select`.
    """

    @torch.no_grad()
    def __init__(self, qformer: QFormer, head: TokenHead, context: Tensor):
        """context (B, S, C)."""
        self.qformer, self.head = qformer, head
        self.caches = [KVCache() for _ in qformer.layers]
        qformer.encode_queries(context, caches=self.caches)
        self.attention_mask = torch.empty(0, 0, dtype=torch.bool)  # (R, T), from `prefill` on
        self.length = 0  # tokens of the longest prompt and of what followed

    @torch.no_grad()
    def prefill(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Prompts (B, T), attention_mask (B, T) False at padding, left or right -> logits of the next token (B, V)."""
        self._lengthen(int(attention_mask.sum(1).max()))
        self.attention_mask = attention_mask
        x = self._written(tokens, positions_of(attention_mask))
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = torch.where(attention_mask, places, -1).argmax(1)  # (B,)
        return self._logits(x[torch.arange(len(x), device=x.device), last])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """One more token a row (R,) -> logits of the next (R, V)."""
        self._lengthen(1)
        position = self.attention_mask.sum(1, keepdim=True)  # (R, 1)
        self.attention_mask = F.pad(self.attention_mask, (0, 1), value=True)
        return self._logits(self._written(tokens[:, None], position)[:, 0])

    def select(self, rows: Tensor, contexts: Tensor | None = None) -> None:
        """Keep these rows, in this order (they may repeat); the contexts were looked at already."""
        self.attention_mask = self.attention_mask[rows]
        for cache in self.caches:
            cache.reorder(rows)

    def _written(self, tokens: Tensor, positions: Tensor) -> Tensor:
        mask = key_mask(self.qformer._behind(self.attention_mask))
        return self.qformer.layers(
            self.qformer.embeddings(tokens, positions), 0, mask=mask, causal=True, caches=self.caches
        )

    def _lengthen(self, tokens: int) -> None:
        self.length += tokens
        positions = self.qformer.embeddings.position.num_embeddings
        if self.length > positions:
            raise UserError(
                f"Q-Former: a text of {self.length} tokens, but it has {positions} positions; "
                "shorten the prompt or max_new_tokens"
            )

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(x, self.qformer.embeddings.word.weight).float()
