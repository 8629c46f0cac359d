"""Collectives that carry gradients: what the contrastive losses of several papers need across ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _AllGather(torch.autograd.Function):
    """Concatenate equal shards along dim 0; the gradient of a shard is summed over the ranks that used it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rank, size = world()
        ctx.rank, ctx.rows = rank, x.shape[0]
        shards = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(shards, x.contiguous())
        return torch.cat(shards)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows]


def all_gather(x: Tensor) -> Tensor:
    """(B, ...) on each of R ranks -> (R·B, ...) on all, differentiable. The identity on one rank.

    Every rank must bring the same B. The gradient returned to a rank is the sum over all ranks' losses, so
    with data-parallel averaging (DDP divides by R) the mean of the ranks' losses is what gets optimised.
    """
    return x if world()[1] == 1 else _AllGather.apply(x)


def add_exponentials_over_ranks(maximum: Tensor, total: Tensor) -> None:
    """In place: of maximum and total = Σ exp(x - maximum) over each rank's own x, (N,) each, those over all ranks' x.

    Not differentiable. Does nothing on one rank.
    """
    if world()[1] == 1:
        return
    own = maximum.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    total.mul_((own - maximum).exp_())
    dist.all_reduce(total)
