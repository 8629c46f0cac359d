"""What every arm of a seed begins from. The paper's image encoder comes from DeiT, trained to tell ImageNet's classes
apart (Sec. 3.1); here a classifier of further pictures of the same world stands for it, made once a seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.albef.data import ExperimentData
from papers.albef.model import Albef
from papers.albef.recipe import AlbefRecipe
from shared.core.device import device_for
from shared.core.paper_package import Context
from shared.core.recipe import digest, training_fields
from shared.data.synthetic.scenes import COLOURS, render_many, sample_scene
from shared.experiments.stage_cache import StageCache
from shared.weights.load import load_weights, save_weights


def new_model(context: Context, data: ExperimentData) -> Albef:
    """The same numbers for every arm of a seed, whatever was drawn before."""
    torch.manual_seed(context.seed)
    model = Albef(data.config)
    labelled = labelled_pictures(data, context.recipe, context.seed) if context.recipe.vision_steps else None
    if labelled is None:
        return model

    def make(folder: Path) -> None:
        save_weights(classifying_encoder(data, context.recipe, *labelled), folder / "vision.safetensors")

    key = f"{context.seed}-{digest(training_fields(context.recipe))}-{data.dataset.digest[:12]}"
    stages = StageCache(context.folder.parent / "stages" / key, context.seed)
    load_weights(model.vision_encoder, stages.get_or_build("vision", make) / "vision.safetensors")
    return model


def labelled_pictures(data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[Tensor, Tensor] | None:
    """Pictures (N, 3, H, W) and labels (N, kinds): of scenes further ones of one thing, with thing and colour; of a
    published set its own with their classes; None where it has none."""
    if data.pack is None:
        part = data.dataset.class_train
        return None if part is None else (part.images, part.labels[:, None])
    alone, names = replace(data.options, objects=(1, 1)), data.pack.names
    scenes = [
        sample_scene(data.pack, "labelled", i, seed=seed, options=alone, first=names[i % len(names)])
        for i in range(recipe.pairs)
    ]
    shown = [scene.things[0] for scene in scenes]
    labels = [[names.index(thing.name), list(COLOURS).index(thing.colour)] for thing in shown]
    return torch.from_numpy(render_many(scenes, data.pack, recipe.image_size)), torch.tensor(labels)


def classifying_encoder(data: ExperimentData, recipe: AlbefRecipe, images: Tensor, labels: Tensor) -> nn.Module:
    """An image encoder that learned to tell labelled pictures apart, one linear head a kind of label."""
    device = device_for(recipe)
    model = Albef(data.config).to(device)
    kinds = [int(kind.max()) + 1 for kind in labels.T]
    heads = nn.ModuleList(nn.Linear(data.config.vision_width, kind) for kind in kinds).to(device)
    steps, rate = recipe.vision_steps, recipe.vision_rate
    optimizer = torch.optim.AdamW(
        [*model.vision_encoder.parameters(), *heads.parameters()], lr=rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    for _ in range(steps):
        rows = torch.randint(len(images), (2 * recipe.batch,))
        seen = model.encode_image(images[rows].to(device))[:, 0]
        wanted = labels[rows].to(device).T
        loss = sum(F.cross_entropy(head(seen), kind) for head, kind in zip(heads, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.vision_encoder.cpu()
