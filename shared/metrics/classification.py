"""Zero-shot classification (CLIP Sec. 3.1.4: an ensemble of prompts per class) and its scores.
A class tied with the true one counts as ahead of it, and so does a NaN. Legend: N images, C classes, P prompts,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from shared.metrics.names import metric_name


def zero_shot_classifier(text_features: Tensor) -> Tensor:
    """(C, P, D) prompt embeddings -> (C, D) unit class weights: normalise, mean over the prompts, normalise again."""
    if text_features.ndim != 3:
        raise ValueError(f"text_features has shape {tuple(text_features.shape)}, expected (classes, prompts, width)")
    return F.normalize(F.normalize(text_features, dim=-1).mean(dim=1), dim=-1)  # (C, D)


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share in 0..1 of the rows of `scores` (N, C) whose true class is among the best `k`, ties lost."""
    return (_ahead(scores, labels) < k).double().mean().item()


def mean_per_class(scores: Tensor, labels: Tensor) -> float:
    """Top-1 recall averaged over the classes that occur: CLIP's metric for unbalanced sets (App. A.1)."""
    hit = (_ahead(scores, labels) < 1).double()
    count = torch.bincount(labels, minlength=scores.shape[1])
    hits = torch.bincount(labels, weights=hit, minlength=scores.shape[1])
    return (hits[count > 0] / count[count > 0]).mean().item()


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """(N, C) scores -> (C, C) counts, row = truth, column = answer; the diagonal's sum over N is the top-1 accuracy."""
    classes = scores.shape[1]
    hit = _ahead(scores, labels) < 1
    # where the truth is tied, the answer is one of the others, as in topk_accuracy; the clamp keeps -inf above the mask
    others = scores.double().clamp(min=torch.finfo(torch.double).min)
    wrong = others.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)  # (N,)
    answer = torch.where(hit, labels, wrong)
    return torch.bincount(labels * classes + answer, minlength=classes * classes).view(classes, classes)


class ZeroShotAccuracy(Metric):
    """Top-k and mean-per-class accuracy over batches and ranks.

    `update(scores (B, C), labels (B,))`; `compute()` -> {"zeroshot/top1@<protocol>": 0-d tensor in 0..1, ...}.
    """

    higher_is_better = True
    full_state_update = False
    hits: Tensor  # (len(ks),)
    class_hits: Tensor  # (C,)
    class_count: Tensor  # (C,)

    def __init__(self, classes: int, protocol: str, ks: Sequence[int] = (1, 5)) -> None:
        super().__init__()
        self.ks, self.protocol = tuple(ks), protocol
        self.add_state("hits", torch.zeros(len(self.ks), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("class_hits", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("class_count", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        classes = len(self.class_count)
        if scores.shape[-1] != classes:
            raise ValueError(f"scores has shape {tuple(scores.shape)}, expected (batch, {classes})")
        ahead = _ahead(scores, labels)
        self.hits += torch.stack([(ahead < k).sum() for k in self.ks])
        self.class_hits += torch.bincount(labels[ahead < 1], minlength=classes)
        self.class_count += torch.bincount(labels, minlength=classes)

    def compute(self) -> dict[str, Tensor]:
        seen = self.class_count > 0
        result = {
            metric_name("zeroshot", f"top{k}", self.protocol): hits.double() / self.class_count.sum()
            for k, hits in zip(self.ks, self.hits, strict=True)
        }
        per_class = self.class_hits[seen].double() / self.class_count[seen]
        return result | {metric_name("zeroshot", "mean_per_class", self.protocol): per_class.mean()}


def _ahead(scores: Tensor, labels: Tensor) -> Tensor:
    """(N,) how many wrong classes score at least as much as the true one; `not <` puts NaN ahead as well."""
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)} {labels.dtype}: expected (N, C) and N integers"
        )
    if len(labels) == 0:
        raise ValueError("no rows to score: scores and labels are empty")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(f"labels run {labels.min()}..{labels.max()}, but scores has {scores.shape[1]} classes")
    true = scores.gather(1, labels[:, None])  # (N, 1)
    return (~(scores < true)).sum(dim=1) - 1  # the true class is never below itself
