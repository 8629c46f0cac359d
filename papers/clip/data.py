"""The data of one seed: pictures with captions, and the tokenizer that learned from these."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from papers.clip.config import VARIANTS, ClipConfig
from papers.clip.recipe import ClipRecipe
from shared.core.errors import UserError
from shared.data.dataset import DatasetBundle, flat
from shared.data.recipe import load_dataset
from shared.data.synthetic.captions import class_prompt
from shared.experiments.effects import once_a_seed
from shared.tokenizers.small_bpe import SmallTokenizer


@dataclass(frozen=True)
class ExperimentData:
    """The data of one seed, the tokenizer trained on its captions, and the model's configuration."""

    dataset: DatasetBundle
    tokenizer: SmallTokenizer
    config: ClipConfig
    images: Tensor  # (pairs, 3, H, W) uint8, one row a caption
    tokens: Tensor  # (pairs, T)
    labels: Tensor  # (pairs,), -1 where a picture has no single class

    @property
    def phrases(self) -> list[str]:
        """The classes with their articles, as templates take them."""
        return [class_prompt(name, "{}") for name in self.dataset.classes or ()]

    @property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.images, self.tokens, self.labels


def load(recipe: ClipRecipe, seed: int) -> DatasetBundle:
    return load_dataset(recipe, seed, captions=recipe.captions)


def build_data(recipe: ClipRecipe, seed: int) -> ExperimentData:
    dataset = load(recipe, seed)
    base = VARIANTS[recipe.model]()
    if not base.patch:
        raise UserError(f"model={recipe.model}: the claims are trained with a ViT; choose a ViT variant")
    train = dataset.train
    rows, captions = flat(train.captions)
    tokenizer = SmallTokenizer.train(captions, base.vocabulary)
    config = replace(base, image_size=recipe.image_size, vocabulary=tokenizer.vocab_size, end_token=tokenizer.end)
    labels = torch.full((len(rows),), -1) if train.labels is None else train.labels[rows]
    return ExperimentData(
        dataset, tokenizer, config, train.images[rows], tokenizer(captions, config.context), labels
    )  # fmt: skip


data_of = once_a_seed(build_data)
