"""BLIP's text transformer (MED, Sec. 3.1): an encoder, an image-grounded encoder and an image-grounded decoder, which
share what config.sharing says. Axes as in model.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from papers.blip.config import BlipConfig
from shared.losses.image_text import IGNORED, next_token_targets
from shared.nn.bert import BertDecoding, BertEmbeddings, BertLayers, LayerCache, TokenHead, key_mask
from shared.nn.qformer import CrossAttentionKV

OWN_IN_DECODER = {  # the parts of a layer that the decoder does not share with the encoder (Table 3)
    "all": (),
    "all_but_sa": ("attention", "attention_norm"),
    "all_but_ca": ("cross_attention", "cross_norm"),
    "none": ("attention", "attention_norm", "cross_attention", "cross_norm", "mlp", "mlp_norm"),
}


class TextEncoder(nn.Module):
    """Bidirectional, over text alone or grounded in a context by cross-attention in every layer."""

    def __init__(self, config: BlipConfig, context_width: int):
        super().__init__()
        self.embeddings = _embeddings(config)
        self.layers = _layers(config, context_width)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        context: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        seen: list[LayerCache] | None = None,
    ) -> Tensor:
        """tokens (R, T), attention_mask (R, T) False at padding, context (B, S, C), or `seen`, its
        `cross_attention_kv` -> (R, T, D).

        R is a multiple of B: texts in succession share one row of the context. Without a context no layer looks.
        """
        picture = {"context": context, "context_mask": key_mask(context_attention_mask), "caches": seen}
        return self.layers(self.embeddings(tokens), mask=key_mask(attention_mask), **picture)


class TextDecoder(nn.Module):
    """Causal, grounded in a context; what it has in common with an encoder are the encoder's own modules."""

    def __init__(self, config: BlipConfig, context_width: int, encoder: TextEncoder | None = None):
        """encoder: whom to share with, as config.sharing says; nobody where None."""
        super().__init__()
        self.pad, self.smoothing = config.pad_token, config.label_smoothing
        self.embeddings = _embeddings(config)
        self.layers = _layers(config, context_width)
        self.head = TokenHead(config.text_width, config.vocabulary)
        if encoder is not None and config.sharing != "none":
            borrow(self, "embeddings", encoder.embeddings)
            for ours, theirs in zip(self.layers, encoder.layers, strict=True):
                for part in (*OWN_IN_DECODER["none"], "dropout"):
                    if part not in OWN_IN_DECODER[config.sharing]:
                        borrow(ours, part, getattr(theirs, part))

    def states(
        self,
        tokens: Tensor,
        context: Tensor | None,
        context_attention_mask: Tensor | None = None,
        seen: list[LayerCache] | None = None,
    ) -> Tensor:
        """tokens (R, T) that begin with [DEC], context (B, S, C) or `seen` as in TextEncoder -> (R, T, D)."""
        picture = {"context": context, "context_mask": key_mask(context_attention_mask), "caches": seen}
        return self.layers(self.embeddings(tokens), mask=key_mask(tokens != self.pad), causal=True, **picture)

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.head(states, self.embeddings.word.weight)

    def loss(self, tokens: Tensor, context: Tensor, context_attention_mask: Tensor | None = None) -> Tensor:
        """Smoothed next-token losses, summed over each text (official code models/med.py, reduction "none"). (R,)"""
        targets = next_token_targets(tokens, tokens != self.pad)
        logits = self.logits(self.states(tokens, context, context_attention_mask)).float()
        losses = F.cross_entropy(
            logits.mT, targets, ignore_index=IGNORED, label_smoothing=self.smoothing, reduction="none"
        )
        return losses.sum(1)

    def decoding(self, context: Tensor, context_attention_mask: Tensor | None = None) -> BertDecoding:
        """context (B, S, C), context_attention_mask (B, S) -> for nn/generation.py; prompts begin with [DEC]."""
        return BertDecoding(self.embeddings, self.layers, self.head, context, context_attention_mask)

    def whole(self) -> Iterator[nn.Parameter]:
        """Its parameters, those among them that the encoder owns."""
        for module in (self.embeddings, self.head):
            yield from module.parameters()
        for layer in self.layers:
            for part in OWN_IN_DECODER["none"]:
                yield from getattr(layer, part).parameters()


def borrow(module: nn.Module, name: str, owned: nn.Module) -> None:
    """module.name is another module's from now on, who alone has it in its parameters and state dict."""
    del module._modules[name]
    module.__dict__[name] = owned


def _embeddings(config: BlipConfig) -> BertEmbeddings:
    return BertEmbeddings(config.vocabulary, config.text_width, config.positions, dropout=config.dropout)


def _layers(config: BlipConfig, context_width: int) -> BertLayers:
    return BertLayers.make(
        config.text_layers,
        config.text_width,
        config.text_heads,
        config.mlp_width,
        context_width=context_width,
        dropout=config.dropout,
    )


def starting_with(token: int, tokens: Tensor) -> Tensor:
    """A copy of (R, T) whose first token is another: what tells the text transformer its mode."""
    tokens = tokens.clone()
    tokens[:, 0] = token
    return tokens


# ---- pictures that several texts look at


def cross_attention_kv(layers: BertLayers, context: Tensor, rows: Tensor | None = None) -> list[LayerCache]:
    """Keys and values of a context (B, S, C), computed once though text r looks at its row rows[r] (all in turn: None).

    With gradients; most of the cost of image-grounded layers, whose texts are short and whose pictures are not.
    """
    filled = []
    for layer in layers:
        attention = layer.cross_attention
        keys, values = rearrange(attention.kv(context), "b s (two h k) -> two b h s k", two=2, h=attention.heads)
        filled.append(_of_picture(CrossAttentionKV(keys, values, rows)))
    return filled


def again(seen: list[LayerCache], rows: Tensor | None) -> list[LayerCache]:
    """The same keys and values for other rows."""
    return [_of_picture(cast(CrossAttentionKV, cache.context).of(rows)) for cache in seen]


def _of_picture(kv: CrossAttentionKV) -> LayerCache:
    """What a layer sees of a picture; no text stands before."""
    return LayerCache(None, kv)  # type: ignore[arg-type]  # neither is appended to
