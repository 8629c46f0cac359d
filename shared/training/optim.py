"""Optimizer groups and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from shared.core.recipe import Recipe


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: not for gains, biases, scalars and single vectors (CLIP, Sec. 2.5)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw_with_cosine(module: nn.Module, recipe: Recipe) -> dict:
    """AdamW, linear warm-up, cosine decay to zero over the recipe's steps; in configure_optimizers' form."""
    optimizer = torch.optim.AdamW(
        decay_groups(module, recipe.weight_decay),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, recipe))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(step: int, recipe: Recipe) -> float:
    """The share of the peak learning rate at a step (0-based)."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def warmup_cosine_between(step: int, recipe: Recipe, first: float, last: float) -> float:
    """As `warmup_cosine`, but the warm-up begins at the learning rate `first` and the cosine ends at `last`."""
    lowest = (first if step < recipe.warmup_steps else last) / recipe.learning_rate
    return lowest + (1 - lowest) * warmup_cosine(step, recipe)
