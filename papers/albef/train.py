"""What `python -m papers train albef` trains: the whole objective on the recipe's pairs, on any number of devices."""

from __future__ import annotations

from papers.albef.data import build_data, pairs_of
from papers.albef.model import Albef, AlbefPretraining
from papers.albef.module import AlbefModule
from papers.albef.recipe import AlbefRecipe
from shared.core.paper_package import Trainable
from shared.training.train import from_memory


def prepare(recipe: AlbefRecipe, seed: int) -> Trainable:
    """The module, and its batches by rank."""
    data = build_data(recipe, seed)
    pairs = pairs_of(data, 0.0, seed)
    module = AlbefModule(AlbefPretraining(Albef(data.config)), recipe)
    return from_memory(module, pairs.tensors, pairs.ids, data.dataset, data.tokenizer, recipe, seed)
