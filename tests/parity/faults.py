"""Faults that a comparison has to tell: tables {name: fault(plant, model)}, each planted for the length of a block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def planting() -> Iterator[Callable]:
    """plant(owner, name, change): until the end of the block, owner.name(...) is change(what it was, ...)."""
    with pytest.MonkeyPatch.context() as patch:

        def plant(owner, name, change):
            real = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, **given: change(real, *args, **given))

        yield plant


def in_each(parts, change):
    """The fault that does `change` to each of parts(model)."""

    def fault(plant, model):
        for part in parts(model):
            change(part)

    return fault


def exchanged(module, one, other):
    """Two parts of a module change places; where one is missing, the identity stands in for it."""
    parts = [getattr(module, name) or torch.nn.Identity() for name in (other, one)]
    module.__setattr__(one, parts[0])
    module.__setattr__(other, parts[1])


def rolled(tensor, shift):
    """The rows of a parameter move on by `shift`: positions by one, keys to where values stood."""
    tensor.data.copy_(tensor.data.roll(shift, 0))


def wrong_eps(plant, model):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-3


def patches_in_column_order(plant, model):
    positions = model.vision_encoder.positions.position
    side = int((len(positions) - 1) ** 0.5)
    grid = positions.data[1:].view(side, side, -1).transpose(0, 1).flatten(0, 1)
    positions.data = torch.cat([positions.data[:1], grid])


def layers_in_reverse(stack):
    stack._modules = {str(i): layer for i, layer in enumerate(reversed(stack))}


def largest(ours, theirs) -> float:
    """The largest difference of pairs of tensors; inf where their shapes differ, which is told too."""
    pairs = list(zip(ours, theirs, strict=True))
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    return max(float((one - other).detach().abs().max()) for one, other in pairs)
