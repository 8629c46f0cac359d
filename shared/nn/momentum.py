"""Momentum encoders and feature queues (He et al. 2020, MoCo, arXiv:1911.05722), as ALBEF and BLIP use them."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.core.errors import UserError
from shared.nn.distributed import all_gather

M = TypeVar("M", bound=nn.Module)


def momentum_copy(module: M) -> M:
    """A copy of `module` that is trained by no gradient, only by `follow`."""
    own: dict[int, Tensor] = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in module.parameters()}
    own |= {id(b): b.detach().clone() for b in module.buffers()}
    return copy.deepcopy(module, own)  # given the copies, since tensors without values cannot be copied deeply


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum · teacher + (1 - momentum) · student, for every parameter of the teacher.

    The student must have them under the same names, and may have more.
    """
    ours = dict(student.named_parameters())
    names = [name for name, _ in teacher.named_parameters()]
    torch._foreach_lerp_(list(teacher.parameters()), [ours[name].detach() for name in names], 1 - momentum)


class FeatureQueue(nn.Module):
    """The last `size` features of pictures and of texts (Q, E), with the pictures' ids where training needs them.

    Part of the checkpoint. Starts as normalised noise, the same everywhere, its ids as -1. Under several ranks all push
    the same: every rank's features, in the order of ranks; each must bring as many.
    """

    images: Tensor
    texts: Tensor
    ids: Tensor
    next: Tensor

    def __init__(self, size: int, width: int):
        super().__init__()
        self.size = size
        generator = torch.Generator().manual_seed(0)
        noise = F.normalize(torch.randn(2, size, width, generator=generator, device="cpu"), dim=-1)
        images, texts = noise.to(torch.empty(0).device)
        self.register_buffer("images", images.clone())
        self.register_buffer("texts", texts.clone())
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.long))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    def check(self, batch: int) -> None:
        """UserError where batches of this global size do not fill the queue evenly."""
        if self.size % batch:
            raise UserError(f"queue of {self.size}: must be a multiple of the batch of {batch}; change batch or queue")

    @torch.no_grad()
    def push(self, images: Tensor, texts: Tensor, ids: Tensor | None = None) -> None:
        """images, texts (B, E), ids (B,) of this rank take the oldest places."""
        images, texts = all_gather(images.detach()), all_gather(texts.detach())
        if len(images) > self.size:
            raise UserError(f"queue of {self.size}: smaller than the batch of {len(images)}")
        places = (self.next + torch.arange(len(images), device=self.next.device)) % self.size
        self.images[places] = images.to(self.images.dtype)
        self.texts[places] = texts.to(self.texts.dtype)
        self.ids[places] = -1 if ids is None else all_gather(ids)
        self.next.copy_((self.next + len(images)) % self.size)
