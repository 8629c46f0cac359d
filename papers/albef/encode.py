"""How ALBEF is measured by retrieval: ITC similarity picks the top k, the ITM logit ranks them (official Retrieval.py).

Axes: I pictures, T texts, N patches, L tokens, D width, E joint space, P pictures of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from papers.albef.model import Albef
from shared.core.device import device_of
from shared.core.errors import UserError
from shared.metrics import rerank_both, reranked_hits, retrieval_hits
from shared.tokenizers.base import Tokenizer, trim

BATCH = 256


class Pictures(NamedTuple):
    features: Tensor  # (I, E), L2-normalised
    tokens: Tensor  # (I, 1 + N, D)


class Texts(NamedTuple):
    features: Tensor  # (T, E), L2-normalised
    states: Tensor  # (T, L, D)
    attention_mask: Tensor  # (T, L) bool


def tokens_of(tokenizer: Tokenizer, texts: Sequence[str], context: int, closed: bool = True) -> Tensor:
    """Texts cut to the context, the end token kept, no wider than the longest. (T, L) UserError for an empty one.

    closed: with the end token, which the released tokenizer leaves out (models/tokenization_bert.py).
    """
    for place, text in enumerate(texts):
        if not text.strip():
            raise UserError(f"text {place + 1} of {len(texts)} is empty: give every picture a caption, or leave it out")
    if closed:
        return trim(tokenizer(list(texts), context), tokenizer.end)
    tokens = trim(tokenizer(list(texts), context + 1), tokenizer.end)
    return tokens.masked_fill(tokens == tokenizer.end, tokenizer.pad)[:, : max(1, tokens.shape[1] - 1)]


def longer_than(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> int:
    """How many of the texts lose their tail to the context."""
    return sum(len(tokenizer.encode(text)) + 2 > context for text in texts)


@torch.inference_mode()
def encode_pictures(model: Albef, images: Tensor, batch: int = BATCH) -> Pictures:
    """uint8 (I, 3, H, W) -> on the CPU."""
    device = device_of(model)
    parts = []
    for some in images.split(batch):
        tokens = model.encode_image(some.to(device))
        parts.append((model.image_features(tokens).cpu(), tokens.cpu()))
    return Pictures(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.inference_mode()
def encode_texts(model: Albef, tokens: Tensor, batch: int = BATCH) -> Texts:
    """(T, L) -> on the CPU."""
    device = device_of(model)
    parts = []
    for some in tokens.split(batch):
        some = some.to(device)
        states = model.encode_text(some)
        parts.append((model.text_features(states).cpu(), states.cpu(), model.attention_mask(some).cpu()))
    return Texts(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.inference_mode()
def matched(model: Albef, pictures: Pictures, texts: Texts, pairs: Tensor, batch: int = 2 * BATCH) -> Tensor:
    """ITM logits of pairs (picture, text) (M, 2) -> (M, 2), on the CPU; class 1 is a match."""
    device = device_of(model)
    logits = []
    for picture, text in (some.unbind(1) for some in pairs.split(batch)):
        states, attention_mask, tokens = texts.states[text], texts.attention_mask[text], pictures.tokens[picture]
        logits.append(model.match(states.to(device), attention_mask.to(device), tokens.to(device)).float().cpu())
    return torch.cat(logits)


class Reranked(NamedTuple):
    """Scores of one set of candidates; -100 where ITM was not asked."""

    itc: Tensor  # cosines (I, T)
    image_to_text: Tensor  # ITM logits (I, T)
    text_to_image: Tensor  # ITM logits (T, I)


def reranked(model: Albef, pictures: Pictures, texts: Texts, candidates: int) -> Reranked:
    """Every picture's best `candidates` texts by ITC, and every text's best pictures, ranked anew by ITM alone."""
    itc = pictures.features @ texts.features.T  # (I, T)
    chosen = best(itc, candidates) | best(itc.T, candidates).T
    pairs = chosen.nonzero()  # a pair that both sides chose is asked for once
    logits = torch.full_like(itc, float("nan"))
    logits[pairs[:, 0], pairs[:, 1]] = matched(model, pictures, texts, pairs)[:, 1]
    return Reranked(itc, *rerank_both(itc, lambda picture, text: logits[picture, text], candidates, "itm"))


def best(scores: Tensor, count: int) -> Tensor:
    """(N, M) bool: the `count` highest of each row."""
    chosen = scores.topk(min(count, scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


class PoolScore(NamedTuple):
    """R@1 in percent, the mean of both directions and of all pools, each by its size."""

    itc: float
    itm: float


def pools_score(model: Albef, pictures: Pictures, texts: Texts, pools: Sequence[Tensor], candidates: int) -> PoolScore:
    """Text i belongs to picture i; pools: the rows that are candidates for each other."""
    sums, rows = [0.0, 0.0], 0
    for pool in pools:
        own = torch.arange(len(pool))
        scores = reranked(model, Pictures(*(p[pool] for p in pictures)), Texts(*(t[pool] for t in texts)), candidates)
        by_itc = retrieval_hits(scores.itc, own, (1,), "itc")
        by_itm = reranked_hits(scores.image_to_text, scores.text_to_image, own, (1,), "itm")
        for place, hits in enumerate((by_itc, by_itm)):
            sums[place] += 50 * sum(hits.values()) * len(pool)
        rows += len(pool)
    return PoolScore(*(total / rows for total in sums))
