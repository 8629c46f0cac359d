"""Optimizer groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.core.recipe import Recipe

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: not for gains, biases, scalars and single vectors (CLIP, Sec. 2.5)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def optimizer_with_schedule(
    params: Params, recipe: Recipe, warmup_from: float = 0.0, end_at: float = 0.0
) -> OptimizerLRSchedulerConfig:
    """AdamW on parameters or groups of them (`decay_groups`), in configure_optimizers' form. The learning rate rises
    linearly from `warmup_from` to the recipe's and falls along a cosine to `end_at`, which the recipe's last step
    reaches. Groups without a weight decay of their own have the recipe's."""
    return adamw(params, recipe, lambda step: warmup_cosine_between(step, recipe, warmup_from, end_at))


def adamw(params: Params, recipe: Recipe, share: Callable[[int], float]) -> OptimizerLRSchedulerConfig:
    """As `optimizer_with_schedule`, along another curve. share: of the recipe's learning rate, at a step (0-based)."""
    optimizer = torch.optim.AdamW(
        params,
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(step: int, recipe: Recipe) -> float:
    """The share of the peak learning rate at a step (0-based)."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def warmup_cosine_between(step: int, recipe: Recipe, first: float, last: float) -> float:
    """As `warmup_cosine`, but the warm-up begins at the learning rate `first` and the cosine ends at `last`."""
    limit = first if step < recipe.warmup_steps else last
    lowest = limit / recipe.learning_rate if limit else 0.0
    return lowest + (1 - lowest) * warmup_cosine(step, recipe)
