"""What each of two ranks runs for test_blip2_model.py; light, because a fresh process imports it."""

from dataclasses import replace

import torch
import torch.distributed as dist

from papers.blip2 import model as blip2
from papers.blip2.config import VARIANTS
from papers.blip2.losses import stage1_losses
from shared.losses.image_text import Negatives

ROWS = 3
CONFIG = replace(VARIANTS["blip2-tiny"](), context=9)
LENGTH = 7  # of every text, and so the mean over a rank's tokens is the mean over all


def stage1():
    torch.manual_seed(0)
    model = blip2.Blip2Qformer(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def batch(width=LENGTH, seed=1):
    """Features, texts with padding up to `width`, and ids: the first picture of one rank is also one of the other's."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2 * ROWS, CONFIG.vision.tokens, CONFIG.vision.width, generator=generator)
    tokens = torch.randint(1, CONFIG.start_token, (2 * ROWS, LENGTH), generator=generator)
    tokens[:, 0] = CONFIG.start_token
    tokens = torch.nn.functional.pad(tokens, (0, width - LENGTH), value=CONFIG.pad_token)
    return features, tokens, torch.tensor([0, 1, 2, 3, 0, 5])


def choose(offset, seen):
    """Negatives that do not hang on chance: of pair i of all ranks, picture i + 2 and text i + 4."""

    def hard_negatives(similar, same):
        seen.append(same.tolist())
        own = torch.arange(len(same)) + offset
        return Negatives(images=(own + 2) % (2 * ROWS), texts=(own + 4) % (2 * ROWS))

    return hard_negatives


def step(offset, rows, with_ids, width=LENGTH):
    """Losses, similarities, targets and gradients of these rows of the whole batch."""
    model, seen = stage1(), []
    chosen, blip2.hard_negatives = blip2.hard_negatives, choose(offset, seen)
    features, tokens, ids = batch(width)
    output = model(features[rows], tokens[rows], ids[rows] if with_ids else None)
    blip2.hard_negatives = chosen
    losses = stage1_losses(output)
    losses.total().backward()
    return {
        "losses": torch.stack(losses).tolist(),
        "similar": [side.tolist() for side in output.similarities],
        "targets": output.targets.tolist(),
        "same": seen[0],
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters()},
    }


def on_rank(rank):
    """[a step without ids, a step with them]"""
    steps = []
    for with_ids in (False, True):
        found = step(rank * ROWS, slice(rank * ROWS, (rank + 1) * ROWS), with_ids, width=LENGTH + rank)
        for gradient in found["gradients"].values():  # as data-parallel training averages them
            dist.all_reduce(gradient)
            gradient /= 2
        found["gradients"] = {name: gradient.tolist() for name, gradient in found["gradients"].items()}
        steps.append(found)
    return steps
