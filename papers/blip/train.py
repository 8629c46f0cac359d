"""What `python -m papers train blip` trains: the model of the recipe on all its pairs, on any number of devices."""

from __future__ import annotations

from dataclasses import replace

from papers.blip.data import build_data
from papers.blip.evidence.capfilt import classifying_encoder, start_from
from papers.blip.model import BlipPretraining
from papers.blip.module import BlipModule
from papers.blip.recipe import BlipRecipe
from shared.core.paper_package import Trainable
from shared.data.loader import Batches


def prepare(recipe: BlipRecipe, seed: int) -> Trainable:
    """Pre-training on web and clean pairs together, by rank."""
    data = build_data(recipe, seed)
    model = BlipPretraining(data.config)
    if recipe.vision_steps and data.labelled:
        start_from(model, classifying_encoder(data, recipe, seed).state_dict())
    texts = [*data.web, *data.clean]
    tensors = data.tensors(texts)
    ids = [data.dataset.train.ids[text.picture] for text in texts]

    def batches(rank: int, ranks: int) -> Batches:
        return Batches(tensors, recipe.batch, recipe.steps, seed, rank, ranks, recipe.accumulate, ids)

    by_texts = replace(recipe, pairs=len(texts))  # an epoch is all texts, of which a picture may have several
    return Trainable(BlipModule(model, by_texts), batches, data.dataset.digest, data.tokenizer.save)
