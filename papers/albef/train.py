"""What `python -m papers train albef` trains: the whole objective on the recipe's pairs, on any number of devices."""

from __future__ import annotations

from papers.albef.data import build_data, pairs_of
from papers.albef.model import Albef, AlbefPretraining
from papers.albef.module import AlbefModule
from papers.albef.recipe import AlbefRecipe
from shared.core.paper_package import Trainable
from shared.data.loader import Batches


def prepare(recipe: AlbefRecipe, seed: int) -> Trainable:
    """The module, and its batches by rank."""
    data = build_data(recipe, seed)
    pairs = pairs_of(data, 0.0, seed)
    ids = [data.dataset.train.ids[row] for row in pairs.ids.tolist()]

    def batches(rank: int, ranks: int) -> Batches:
        return Batches(pairs.tensors, recipe.batch, recipe.steps, seed, rank, ranks, recipe.accumulate, ids)

    module = AlbefModule(AlbefPretraining(Albef(data.config)), recipe)
    return Trainable(module, batches, data.dataset.digest, data.tokenizer.save)
