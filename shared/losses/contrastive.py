"""Objectives that several papers share, composed by each paper as it needs them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.core.errors import UserError
from shared.nn.distributed import add_exponentials_over_ranks, all_gather, world

# Rows and columns of one tile of logits; measured by shared/tools/bench_core.py.
CHUNK = 1024


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over the N x N similarity matrix (CLIP, Fig. 3; InfoNCE, van den Oord et al. 2018).

    image_features, text_features (B, D), L2-normalised; logit_scale multiplies cosines (already exponentiated).
    Under R ranks each computes its own B rows and B columns of the (R·B) x (R·B) matrix (CLIP, Sec. 2.5); the
    mean over ranks is the loss of the whole batch. Computed in fp32 (fp64 where the features are). Returns a scalar.
    """
    image_features, text_features, logit_scale = _in_full_precision(image_features, text_features, logit_scale)
    all_images, all_texts = all_gather(image_features), all_gather(text_features)
    rank, _ = world()
    rows = image_features.shape[0]
    target = torch.arange(rows, device=image_features.device) + rank * rows
    with torch.autocast(image_features.device.type, enabled=False):  # it would round logits near 100 to 0.25
        image_to_text = logit_scale * image_features @ all_texts.T  # (B, R·B)
        text_to_image = logit_scale * text_features @ all_images.T  # (B, R·B)
    return (F.cross_entropy(image_to_text, target) + F.cross_entropy(text_to_image, target)) / 2


def chunked_contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, chunk: int = CHUNK
) -> Tensor:
    """`contrastive_loss`, value and gradients, in tiles of chunk x chunk logits: memory O(B·D + chunk²), not O(B²).

    One product serves both directions. Forward visits every tile once and keeps a running maximum and sum of
    exponentials a row and a column; backward computes each tile again and adds its share to both gradients: four
    products of B x D x B in all, where the plain loss needs six. Under R ranks each holds its own B rows against all
    R·B texts; only texts and the statistics of columns travel. The value on each rank and the gradients of the
    features are those of `contrastive_loss`; logit_scale's gradient is so after averaging over ranks, as data-parallel
    training does (a rank's share counts its rows only). A second derivative is refused. A GPU wants larger tiles: of
    65,536 pairs an H200 takes in tiles of 4,096 a third of the time, about the plain loss's
    (results/bench/loss-time-cuda-bf16.json).
    """
    if chunk < 1:
        raise UserError(f"chunked_contrastive_loss: chunk is {chunk}, but a tile has at least one row")
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        raise UserError(f"chunked_contrastive_loss: features are {shapes}, but both must be the same (B, D)")
    image_features, text_features, logit_scale = _in_full_precision(image_features, text_features, logit_scale)
    return _ChunkedContrastive.apply(image_features, all_gather(text_features), logit_scale, chunk)


def _in_full_precision(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    return [x.to(dtype) for x in (image_features, text_features, logit_scale)]


class _ChunkedContrastive(torch.autograd.Function):
    """images (B, D) of this rank, texts (R·B, D) of all; with l = scale · images @ textsᵀ and d its diagonal,

    loss = mean over own i of (log Σ_j exp l_ij + log Σ_k exp l_ki - 2 d_i) / 2
    """

    @staticmethod
    def forward(ctx, images: Tensor, texts: Tensor, scale: Tensor, chunk: int) -> Tensor:
        own = _own_columns(images)
        # A maximum and a sum apart: their logarithm alone would round away the last digits of logits near 100.
        row_max, column_max = (x.new_full((len(x),), -torch.inf) for x in (images, texts))
        row_sum, column_sum = torch.zeros_like(row_max), torch.zeros_like(column_max)
        target = torch.empty_like(row_max)
        for rows, columns, logits in _tiles(images, texts, scale, chunk):
            if columns.start == own.start + rows.start:
                target[rows] = logits.diagonal()
            _add_exponentials(row_max[rows], row_sum[rows], logits, dim=1)
            _add_exponentials(column_max[columns], column_sum[columns], logits, dim=0)
        add_exponentials_over_ranks(column_max, column_sum)
        ctx.save_for_backward(images, texts, scale, row_max, row_sum, column_max, column_sum)
        ctx.chunk = chunk
        by_row = row_max - target + row_sum.log()
        by_column = column_max[own] - target + column_sum[own].log()
        return (by_row.mean() + by_column.mean()) / 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would drop that derivative in silence
            raise UserError("chunked_contrastive_loss: it has no second derivative; take contrastive_loss for that")
        images, texts, scale, row_max, row_sum, column_max, column_sum = ctx.saved_tensors
        to_images, to_texts, to_scale, _ = ctx.needs_input_grad
        own, batch = _own_columns(images), len(images)
        # The loss of another rank reaches these rows through its columns, weighted by that rank's own gradient.
        row_weight = gradient / (2 * batch * row_sum)  # (B,)
        column_weight = all_gather(gradient.reshape(1)).repeat_interleave(batch) / (2 * batch * column_sum)  # (R·B,)
        d_images = torch.zeros_like(images) if to_images or not to_texts else None
        d_texts = torch.zeros_like(texts) if to_texts else None
        for rows, columns, logits in _tiles(images, texts, scale, ctx.chunk):
            d_logits = (logits - row_max[rows, None]).exp_().mul_(row_weight[rows, None])
            d_logits.addcmul_(logits.sub_(column_max[columns]).exp_(), column_weight[columns])
            if columns.start == own.start + rows.start:
                d_logits.diagonal().sub_(gradient / batch)
            if d_images is not None:
                d_images[rows].addmm_(d_logits, texts[columns])
            if d_texts is not None:
                d_texts[columns].addmm_(d_logits.T, images[rows])
        # Σ d_logits · cosines, without the cosines
        d_scale = (d_texts * texts if d_images is None else d_images * images).sum().reshape(scale.shape)
        return (
            d_images.mul_(scale) if to_images and d_images is not None else None,
            None if d_texts is None else d_texts.mul_(scale),
            d_scale if to_scale else None,
            None,
        )


def _own_columns(images: Tensor) -> slice:
    start = world()[0] * len(images)
    return slice(start, start + len(images))


def _tiles(images: Tensor, texts: Tensor, scale: Tensor, chunk: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, their logits) over the whole of images (B, D) by texts (R·B, D).

    Columns are cut rank by rank, so that the diagonal runs through the corners of tiles whatever chunk is.
    """
    batch = len(images)
    for top in range(0, batch, chunk):
        rows = slice(top, min(top + chunk, batch))
        for shard in range(0, len(texts), batch):
            for left in range(0, batch, chunk):
                columns = slice(shard + left, shard + min(left + chunk, batch))
                with torch.autocast(images.device.type, enabled=False):
                    cosines = images[rows] @ texts[columns].T
                # Scaled after the product: images rounded with their scale would shift a whole row against its columns.
                yield rows, columns, cosines.mul_(scale)


def _add_exponentials(maximum: Tensor, total: Tensor, logits: Tensor, dim: int) -> None:
    """In place: total · exp(maximum) grows by the sum of exp(logits) over dim; maximum becomes the greatest so far."""
    higher = torch.maximum(maximum, logits.amax(dim))
    total.mul_((maximum - higher).exp_()).add_((logits - higher.unsqueeze(dim)).exp_().sum(dim))
    maximum.copy_(higher)
