"""What `python -m papers train blip2` trains: stage 1 or stage 2 of the recipe, on any number of devices. The encoder
runs each step on its rank, or once before the training where the recipe says `cached`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from papers.blip2.bundle import keep_frozen
from papers.blip2.config import LANGUAGES
from papers.blip2.data import ExperimentData, build_data
from papers.blip2.frozen import HALF, frozen_encoder, load_language_model_bundle
from papers.blip2.model import Blip2, Blip2Qformer
from papers.blip2.module import Stage1Module, Stage2Module
from papers.blip2.recipe import Blip2Recipe
from papers.blip2.weights import from_bert, read_bert
from shared.backbones.vision import Encoder
from shared.core.device import device_for
from shared.core.errors import UserError
from shared.core.paper_package import Trainable
from shared.data.loader import Batches, IndexedTensor
from shared.weights.load import load_weights


def prepare(recipe: Blip2Recipe, seed: int) -> Trainable:
    half = device_for(recipe).type == "cuda"
    encoder = frozen_encoder(recipe.encoder, recipe.layer, recipe.scale, recipe.manifest, half)
    bert = read_bert(Path(recipe.bert_weights)) if recipe.bert_weights and recipe.stage == 1 else None
    data = build_data(recipe, seed)  # last: of the paper's size it takes hours
    vision = replace(data.config.vision, width=encoder.width)
    config = replace(data.config, language=None, vision=vision)
    inputs, runs = features_or_images(recipe, data, encoder)
    torch.manual_seed(seed)
    if recipe.stage == 1:
        rows, tokens = data.stage1_pairs()
        qformer = Blip2Qformer(config)
        if bert is not None:
            from_bert(qformer, bert)
        module: Stage1Module | Stage2Module = Stage1Module(qformer, recipe, runs)
        tensors: tuple[Tensor | IndexedTensor, ...] = (IndexedTensor(inputs, rows), tokens, rows)
    else:
        if recipe.language_model == "small":
            raise UserError(
                "recipe: the small language model is one of the claims'; name another for stage 2 of training"
            )
        bundle = load_language_model_bundle(LANGUAGES[recipe.language_model], recipe.manifest)
        rows, texts = data.stage2_tensors(bundle.tokenizer, recipe.asked, seed, recipe.text_tokens, config.queries)
        qformer = Blip2Qformer(config)
        if recipe.stage1_weights:
            load_weights(qformer, Path(recipe.stage1_weights))
        model = Blip2.started_from(qformer, replace(config, language=bundle.config), bundle.model)
        module = Stage2Module(model, recipe, runs)
        tensors = (IndexedTensor(inputs, rows), *texts)
    ids = [data.dataset.train.ids[row] for row in rows.tolist()]

    def batches(rank: int, ranks: int) -> Batches:
        return Batches(tensors, recipe.batch, recipe.steps, seed, rank, ranks, recipe.accumulate, ids)

    def save_parts(path: Path) -> None:
        """The tokenizer and, in stage 2, what `python -m papers ask` needs beside the weights."""
        data.tokenizer.save(path)
        if recipe.stage == 2:
            keep_frozen(
                path.parent, module.model.config, recipe.model, encoder, recipe.encoder, recipe.layer, bundle.model,
                None, data.has_captions(recipe.asked),
            )  # fmt: skip

    return Trainable(module, batches, data.dataset.digest, save_parts)


def features_or_images(recipe: Blip2Recipe, data: ExperimentData, encoder: Encoder) -> tuple[Tensor, Encoder | None]:
    """What the batches hold, and the encoder that runs each step on it, if any."""
    if not recipe.cached:
        return data.dataset.train.images, encoder
    from shared.backbones.feature_cache import features_of
    from shared.core.files import cache_root

    folder = cache_root() / "features"
    dtype = HALF if encoder.dtype is not None else torch.float32
    return features_of(encoder, data.dataset.train.images, key="train", folder=folder, dtype=dtype), None
