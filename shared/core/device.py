"""The device and the cores that a run may use."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import nn

from shared.core.recipe import Recipe

_M = TypeVar("_M", bound=nn.Module)


def device_for(recipe: Recipe) -> torch.device:
    """Where `fit` trains on one device; what is measured outside of it runs there too."""
    return torch.device("cuda" if recipe.accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def device_of(module: nn.Module) -> torch.device:
    """Where its first parameter lies."""
    return next(module.parameters()).device


def on_gpu_if_any(module: _M) -> _M:
    """On the GPU where there is one, else as it is. For what has no recipe, which may say otherwise (device_for)."""
    return module.cuda() if torch.cuda.is_available() else module


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
