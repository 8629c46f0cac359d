"""Objectives of models that align and then fuse (ALBEF, Li et al. 2021; BLIP, Li et al. 2022; BLIP-2, Li et al. 2023).

Contrast with a momentum teacher's soft targets, matching against hard negatives, masked and causal language modelling.
Axes: B batch, M keys to compare with, E width of the joint space, T text tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.core.errors import UserError

IGNORED = -100


class Similarities(NamedTuple):
    """Similarities over temperature, or distributions over the same entries."""

    image_to_text: Tensor  # (B, M)
    text_to_image: Tensor  # (B, M)


def similarities(
    images: Tensor, texts: Tensor, image_keys: Tensor, text_keys: Tensor, temperature: Tensor | float
) -> Similarities:
    """Features (B, E) against keys (M, E), all L2-normalised, divided by the temperature; in fp32."""
    with torch.autocast(images.device.type, enabled=False):
        return Similarities(
            images.float() @ text_keys.float().T / temperature, texts.float() @ image_keys.float().T / temperature
        )


def own_pair_targets(queries: int, keys: int, device: torch.device) -> Tensor:
    """One-hot (B, M): the i-th key belongs to the i-th query."""
    return torch.eye(queries, keys, device=device)


def same_picture_targets(ids: Tensor, key_ids: Tensor) -> Tensor:
    """(B, M), each row spread evenly over all keys of the same picture (ALBEF's retrieval fine-tuning)."""
    same = (ids[:, None] == key_ids[None]).float()
    return same / same.sum(1, keepdim=True)


@torch.no_grad()
def distilled_targets(targets: Tensor, teacher: Similarities, alpha: float) -> Similarities:
    """(1 - alpha) · targets + alpha · the teacher's softmax, both ways (ALBEF, Eq. 6). Constants: no gradient."""
    return Similarities(*((1 - alpha) * targets + alpha * side.softmax(1) for side in teacher))


def contrastive_to_targets(student: Similarities, targets: Similarities) -> Tensor:
    """Cross-entropy of the student's similarities to soft targets, mean of both directions. Scalar."""
    to_text, to_image = (
        -(wanted * side.log_softmax(1)).sum(1).mean() for side, wanted in zip(student, targets, strict=True)
    )
    return (to_text + to_image) / 2


def total_of(losses: Iterable[Tensor | None]) -> Tensor:
    """The sum of the scalars that were computed, each with weight 1; at least one was."""
    first, *others = (loss for loss in losses if loss is not None)
    return sum(others, start=first)


class Negatives(NamedTuple):
    images: Tensor  # (B,): for each text, another picture of the batch (of all ranks' where compared with those)
    texts: Tensor  # (B,): for each picture, another text


@torch.no_grad()
def hard_negatives(batch: Similarities, same: Tensor | None = None, floor: float = 0.0) -> Negatives:
    """Drawn in proportion to the softmax of the batch's own similarities (B, M), never a pair's own partner.

    same (B, M): the pairs that belong together, in either direction, and are no negatives; by default the diagonal of
    M = B. floor is added after the softmax (BLIP: 1e-4). A row all of whose partners belong gets one of them.
    UserError for a batch of one pair, which has no negatives.
    """
    if batch.image_to_text.shape[1] < 2:
        raise UserError("matching: a batch of one pair has no negatives; raise batch")
    if same is None:
        same = torch.eye(len(batch.image_to_text), dtype=torch.bool, device=batch.image_to_text.device)

    def draw(similarity: Tensor) -> Tensor:
        similarity = similarity.float()
        if floor:
            weights = (similarity.softmax(1) + floor).masked_fill(same, 0)
        else:  # the same ratios, and none lost where the pair's own similarity saturates the softmax
            weights = similarity.masked_fill(same, -torch.inf).softmax(1)
        alone = same.all(1, keepdim=True)
        return torch.where(alone, same.float(), weights).multinomial(1)[:, 0]

    return Negatives(images=draw(batch.text_to_image), texts=draw(batch.image_to_text))


@torch.no_grad()
def random_negatives(batch: int, device: torch.device) -> Negatives:
    """Drawn evenly from the others: what hard negatives are compared with."""
    even = torch.zeros(batch, batch, device=device)
    return hard_negatives(Similarities(even, even))


def matching_loss(positives: Tensor, negatives: Tensor) -> Tensor:
    """Cross-entropy of ITM logits (B, 2) of true pairs and (2B, 2) of false ones; class 1 is a match. Scalar."""
    logits = torch.cat([positives, negatives]).float()
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[: len(positives)] = 1
    return F.cross_entropy(logits, labels)


class Masked(NamedTuple):
    tokens: Tensor  # (B, T), corrupted
    labels: Tensor  # (B, T): what stood there, IGNORED where nothing is to be predicted


def mask_tokens(
    tokens: Tensor, *, probability: float, mask: int, vocabulary: int, never: tuple[int, ...], hidden: float = 0.8,
    replaced: float = 0.1,
) -> Masked:  # fmt: skip
    """BERT's corruption: each token with `probability`, except the ids `never` ([CLS], padding): 80 % become `mask`,
    10 % any word of the vocabulary, 10 % stay. Draws from torch's global generator."""
    chosen = torch.rand(tokens.shape, device=tokens.device) < probability
    for token in never:
        chosen &= tokens != token
    kind = torch.rand(tokens.shape, device=tokens.device)
    words = torch.randint(vocabulary, tokens.shape, device=tokens.device)
    corrupted = torch.where(chosen & (kind < hidden), mask, tokens)
    corrupted = torch.where(chosen & (kind >= hidden) & (kind < hidden + replaced), words, corrupted)
    return Masked(corrupted, tokens.masked_fill(~chosen, IGNORED))


def distilled_token_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """(1 - alpha) · cross-entropy + alpha · cross-entropy to the teacher's softmax (ALBEF, Eq. 7). Scalar.

    logits, teacher (P, V) at the positions to predict, labels (P,). Without any position the loss is zero.
    """
    if not len(labels):
        return logits.sum() * 0.0
    log_probabilities = logits.float().log_softmax(1)
    hard = F.nll_loss(log_probabilities, labels)
    if teacher is None or not alpha:
        return hard
    soft = -(teacher.detach().float().softmax(1) * log_probabilities).sum(1).mean()
    return (1 - alpha) * hard + alpha * soft


def next_token_targets(tokens: Tensor, present: Tensor, prompt: int = 0) -> Tensor:
    """What each position of (B, T) has to predict: the next token, IGNORED at padding and inside the prompt.

    prompt: how many leading columns are given and not learned; texts then are padded on the right.
    """
    targets = torch.full_like(tokens, IGNORED)
    targets[:, :-1] = tokens[:, 1:].masked_fill(~(present[:, 1:] & present[:, :-1]), IGNORED)
    if prompt > 1:
        targets[:, : prompt - 1] = IGNORED
    return targets


def language_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.1) -> Tensor:
    """Next-token cross-entropy with label smoothing, mean over the targets that are not IGNORED, zero without any.

    logits (P, V), targets (P,). Scalar.
    """
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
    return total / (targets != IGNORED).sum().clamp_min(1)
