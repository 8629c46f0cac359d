"""What `python -m papers train blip` trains: the model of the recipe on all its pairs, on any number of devices; and
the image encoder that it starts from, which stands for the paper's from DeiT."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from papers.blip.data import ExperimentData, build_data
from papers.blip.model import BlipPretraining, picture_tokens, vision_encoder
from papers.blip.module import BlipModule
from papers.blip.recipe import BlipRecipe
from shared.core.device import device_for
from shared.core.paper_package import Trainable
from shared.data.recipe import labelled_pictures
from shared.training.simple import fit_classifier
from shared.training.train import from_memory


def prepare(recipe: BlipRecipe, seed: int) -> Trainable:
    """Pre-training on web and clean pairs together, by rank."""
    data = build_data(recipe, seed)
    model = BlipPretraining(data.config)
    if recipe.vision_steps and data.dataset.class_train is not None:
        start_from(model, classifying_encoder(data, recipe, seed).state_dict())
    texts = [*data.web, *data.clean]
    tensors = data.tensors(texts)
    by_texts = replace(recipe, pairs=len(texts))  # an epoch is all texts, of which a picture may have several
    module = BlipModule(model, by_texts)
    return from_memory(module, tensors, tensors[2], data.dataset, data.tokenizer, recipe, seed)


def classifying_encoder(data: ExperimentData, recipe: BlipRecipe, seed: int) -> nn.Module:
    """An image encoder that learned to tell labelled pictures apart."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = vision_encoder(data.config).to(device_for(recipe))
    labelled = labelled_pictures(recipe, data.dataset, seed)
    return fit_classifier(
        encoder, lambda images: picture_tokens(encoder, images), labelled, recipe, generator,
        betas=(recipe.beta1, recipe.beta2),
    )  # fmt: skip


def start_from(model: BlipPretraining, vision: dict[str, Tensor]) -> None:
    """Put a trained image encoder into a new model, and into its momentum copy."""
    model.blip.vision_encoder.load_state_dict(vision, strict=True)
    model.momentum.vision_encoder.load_state_dict(vision, strict=True)
