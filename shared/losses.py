"""Objectives that several papers share, composed by each paper as it needs them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.distributed import all_gather, world


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over the N x N similarity matrix (CLIP, Fig. 3; InfoNCE, van den Oord et al. 2018).

    image_features, text_features (B, D), L2-normalised; logit_scale multiplies cosines (already exponentiated).
    Under R ranks each computes its own B rows and B columns of the (R·B) x (R·B) matrix (CLIP, Sec. 2.5); the
    mean over ranks is the loss of the whole batch. Computed in fp32. Returns a scalar.
    """
    image_features, text_features = image_features.float(), text_features.float()
    all_images, all_texts = all_gather(image_features), all_gather(text_features)
    rank, _ = world()
    rows = image_features.shape[0]
    target = torch.arange(rows, device=image_features.device) + rank * rows
    with torch.autocast(image_features.device.type, enabled=False):  # it would round logits near 100 to 0.25
        image_to_text = logit_scale.float() * image_features @ all_texts.T  # (B, R·B)
        text_to_image = logit_scale.float() * text_features @ all_images.T  # (B, R·B)
    return (F.cross_entropy(image_to_text, target) + F.cross_entropy(text_to_image, target)) / 2
