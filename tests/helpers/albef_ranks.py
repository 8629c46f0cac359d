"""What each of two ranks runs for test_albef_model.py; light, because a fresh process imports it."""

from dataclasses import replace

import torch

from papers.albef.config import VARIANTS
from papers.albef.model import Albef, AlbefPretraining

ROWS, STEPS = 4, 3
CONFIG = replace(VARIANTS["albef-tiny"](), queue=16)


def training():
    torch.manual_seed(0)
    return AlbefPretraining(Albef(CONFIG))


def step(model, index, rows=slice(None), seed=0):
    """One step on these rows of the whole batch -> similarities of the pictures (B, M)."""
    generator = torch.Generator().manual_seed(index)
    size = CONFIG.image_size
    images = torch.randint(0, 256, (2 * ROWS, 3, size, size), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, CONFIG.start, (2 * ROWS, 9), generator=generator)
    torch.manual_seed(seed)
    return model(images[rows], tokens[rows]).similarities.image_to_text.detach()


def on_rank(rank):
    """Of each step: this rank's similarities, then its queue."""
    model, found = training(), []
    for index in range(STEPS):
        similar = step(model, index, slice(rank * ROWS, (rank + 1) * ROWS), seed=10 * rank + index)
        found.append([x.tolist() for x in (similar, *model.queue.buffers())])
    return found
