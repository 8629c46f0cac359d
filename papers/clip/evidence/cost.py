"""What `python -m papers plan` counts of CLIP: both towers, the contrastive loss, what its ranks send each other."""

from __future__ import annotations

import torch
from torch import Tensor

from papers.clip.config import VARIANTS
from papers.clip.model import Clip
from shared.losses.contrastive import chunked_contrastive_loss, contrastive_loss
from shared.tools.footprint import Workload


def workload(variant: str) -> Workload:
    """A variant with batches of black pictures and texts of full context."""
    config = VARIANTS[variant]()
    model = Clip(config)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        pixels = torch.zeros(size, 3, config.image_size, config.image_size, dtype=torch.uint8)
        tokens = torch.zeros(size, config.context, dtype=torch.long)
        tokens[:, -1] = config.end_token
        return pixels, tokens

    return Workload(
        model,
        batch,
        model,
        {"plain": contrastive_loss, "chunked": chunked_contrastive_loss},  # clip_loss is the first
        gathered=2 * 4 * config.embed_width,  # a picture's and a text's features, fp32
        reads=config.context - 1,  # where the last text ends
    )
