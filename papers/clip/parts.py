"""What other papers' runs take of CLIP: a picture encoder, trained by our recipe (experiments/pretrained_parts.py)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from papers.clip.config import ClipConfig
from papers.clip.data import build_data
from papers.clip.evidence.claims import clip_accuracy
from papers.clip.model import Clip
from papers.clip.module import ClipModule
from papers.clip.recipe import ClipRecipe
from shared.backbones.vision import Encoder, vit_encoder
from shared.core.errors import UserError
from shared.data.loader import Batches
from shared.nn.vit import VisionTransformer
from shared.training.trainer import fit
from shared.weights.load import load_weights, save_weights

PARTS = ("vision",)


def build(part: str, recipe: ClipRecipe, seed: int, folder: Path) -> dict[str, float]:
    """Train CLIP and leave vision.safetensors in the folder, its configuration inside. -> what is known of it."""
    if part not in PARTS:
        raise UserError(f"clip has no artifact '{part}': choose {', '.join(PARTS)}")
    data = build_data(recipe, seed)
    model = Clip(data.config)
    batches = Batches(data.pairs, recipe.batch, recipe.steps, seed, accumulate=recipe.accumulate)
    fit(ClipModule(model, recipe), batches, recipe, folder, [], {"artifact": part, "data": data.dataset.digest})
    save_weights(model.vision_encoder, folder / "vision.safetensors", {"config": asdict(data.config)})
    return {"zero-shot accuracy": round(100 * clip_accuracy(model, data, recipe), 1)}


def load(folder: Path, layer: str = "second-last", dtype: torch.dtype | None = None) -> Encoder:
    """The encoder that `build` left, read after its last block or the one before."""
    path = folder / "vision.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    sizes: dict[str, Any] = {key: tuple(size) if isinstance(size, list) else size for key, size in config.items()}
    vit = Clip(ClipConfig(**sizes)).vision_encoder
    load_weights(vit, path)
    assert isinstance(vit, VisionTransformer)
    return vit_encoder(vit, layer, dtype)
