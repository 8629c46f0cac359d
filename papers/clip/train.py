"""What `python -m papers train clip` trains: CLIP itself, on the recipe's pairs, on any number of devices."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from papers.clip.config import VARIANTS
from papers.clip.data import build_data
from papers.clip.model import Clip
from papers.clip.module import ClipModule
from papers.clip.recipe import ClipRecipe
from shared.core.paper_package import Trainable
from shared.data.dataset import flat
from shared.data.webdataset import Shards
from shared.tokenizers.clip import ClipTokenizer
from shared.training.train import from_memory


def prepare(recipe: ClipRecipe, seed: int) -> Trainable:
    """The module, and its batches by rank: from memory, or streamed from shards where data=shards."""
    if recipe.accumulate > 1:
        part = recipe.batch // recipe.accumulate
        print(f"accumulate={recipe.accumulate}: negatives come from the {part} pairs of a part", file=sys.stderr)
    if recipe.data == "shards":
        return streamed(recipe, seed)
    data = build_data(recipe, seed)
    rows, _ = flat(data.dataset.train.captions)
    return from_memory(
        ClipModule(Clip(data.config), recipe), data.pairs, rows, data.dataset, data.tokenizer, recipe, seed
    )  # fmt: skip


def streamed(recipe: ClipRecipe, seed: int) -> Trainable:
    """Pairs of WebDataset shards, with CLIP's own tokenizer."""
    config = replace(VARIANTS[recipe.model](), image_size=recipe.image_size)
    tokenizer = ClipTokenizer()
    config = replace(config, vocabulary=tokenizer.vocab_size, end_token=tokenizer.end)

    def encode(image: Tensor, caption: str) -> tuple[Tensor, Tensor, Tensor]:
        """(3, H, W) uint8 and its caption -> what a batch holds of them."""
        return image, tokenizer([caption], config.context)[0], torch.tensor(-1)

    def batches(rank: int, ranks: int) -> Shards:
        return Shards(
            Path(recipe.data_root), recipe.image_size, encode, recipe.batch, recipe.steps, seed, rank, ranks,
            recipe.accumulate,
        )  # fmt: skip

    return Trainable(ClipModule(Clip(config), recipe), batches, batches(0, 1).digest, tokenizer.save)
