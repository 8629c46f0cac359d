"""One small training loop for what needs no Trainer: a stand-in for a pre-trained part, or a task that is tuned on."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.core.device import device_for
from shared.training.optim import Params


def fit_simple(
    loss: Callable[[int], Tensor],
    params: Params,
    steps: int,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    share: Callable[[int], float] | None = None,
) -> list[float]:
    """AdamW on loss(step), 0-based, which draws its own samples. -> the loss of every step.

    The learning rate rises to `lr` over the first `warmup` of the steps and falls to nothing (OneCycleLR); share: or it
    is this share of `lr` at a step. Modes and devices are the caller's.
    """
    optimizer = torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay)
    schedulers = torch.optim.lr_scheduler
    schedule: schedulers.LRScheduler
    if share is None:
        schedule = schedulers.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=warmup)
    else:
        schedule = schedulers.LambdaLR(optimizer, share)
    losses = []
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.detach())
    return torch.stack(losses).tolist() if losses else []


def fit_classifier(
    encoder: Any,
    encode: Callable[[Tensor], Tensor],
    labelled: tuple[Tensor, Tensor],
    recipe: Any,
    generator: torch.Generator | None = None,
    **options: Any,
) -> nn.Module:
    """Train an image encoder (a module with a `width`) to tell pictures (N, 3, H, W) by their labels (N, kinds), -1
    where there is none: one linear head a kind of label. -> the encoder, on the CPU; the heads are dropped.

    encode: uint8 pictures (B, 3, H, W) -> states (B, S, width) by that encoder, which lies on the recipe's device; the
    first is read. generator: draws the pictures. options: of `fit_simple`. Steps and learning rate are the recipe's
    `vision_steps` and `vision_rate`.
    """
    images, labels = labelled
    device = device_for(recipe)
    heads = nn.ModuleList(nn.Linear(encoder.width, int(kind.max()) + 1) for kind in labels.T).to(device)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(images), (2 * recipe.batch,), generator=generator)
        states = encode(images[rows].to(device))[:, 0]
        kinds = labels[rows].to(device).T
        several = zip(heads, kinds, strict=True)
        return reduce(add, (F.cross_entropy(head(states), kind, ignore_index=-1) for head, kind in several))

    params = [*encoder.parameters(), *heads.parameters()]
    fit_simple(loss, params, recipe.vision_steps, recipe.vision_rate, weight_decay=recipe.weight_decay, **options)
    return encoder.cpu()
