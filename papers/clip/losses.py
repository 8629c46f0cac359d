"""CLIP's objective (Fig. 3): predict which text of the batch belongs to which picture, both ways."""

from __future__ import annotations

from torch import Tensor

from papers.clip.model import ClipOutput
from shared.losses.contrastive import contrastive_loss


def clip_loss(output: ClipOutput) -> Tensor:
    """Mean of image-to-text and text-to-image cross-entropy over the (global) batch. Scalar."""
    return contrastive_loss(output.image_features, output.text_features, output.logit_scale)
