"""One small training loop for what needs no Trainer: a stand-in for a pre-trained part, or a task that is tuned on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
