"""What `python -m papers train albef` trains: the whole objective on the recipe's pairs, on any number of devices."""

from __future__ import annotations

from papers.albef.data import lab_of, pairs_of
from papers.albef.model import Albef, AlbefPretraining
from papers.albef.module import AlbefModule
from papers.albef.recipe import AlbefRecipe
from shared.data.loader import Batches
from shared.training.train import Trainable


def prepare(recipe: AlbefRecipe, seed: int) -> Trainable:
    """The module, and its batches by rank."""
    lab = lab_of(recipe, seed)
    pairs = pairs_of(lab, 0.0, seed)
    ids = [lab.world.train.ids[row] for row in pairs.ids.tolist()]

    def batches(rank: int, ranks: int) -> Batches:
        return Batches(pairs.tensors, recipe.batch, recipe.steps, seed, rank, ranks, recipe.accumulate, ids)

    module = AlbefModule(AlbefPretraining(Albef(lab.config)), recipe)
    return Trainable(module, batches, lab.world.digest, lab.tokenizer.save)
