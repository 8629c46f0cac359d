"""How CLIP is measured: zero-shot classification (Sec. 3.1), retrieval (App. E.1), linear probe (App. A.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from papers.clip.model import Clip
from shared.metrics import zero_shot_classifier


@torch.no_grad()
def image_features(model: Clip, images: Tensor, batch: int = 256) -> Tensor:
    """L2-normalised picture embeddings (N, E), on the CPU, of uint8 pictures (N, 3, H, W)."""
    device = model.logit_scale.device
    return torch.cat([F.normalize(model.encode_image(b.to(device)).float(), dim=-1).cpu() for b in images.split(batch)])


@torch.no_grad()
def text_features(model: Clip, tokenizer: Callable, texts: Sequence[str], batch: int = 512) -> Tensor:
    """L2-normalised text embeddings (M, E), on the CPU."""
    tokens = tokenizer(list(texts), model.config.context)
    device = model.logit_scale.device
    return torch.cat([F.normalize(model.encode_text(b.to(device)).float(), dim=-1).cpu() for b in tokens.split(batch)])


def classifier(model: Clip, tokenizer: Callable, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One weight a class (C, E): templates, whose {} is the class, embedded, normalised, averaged, normalised again."""
    texts = [template.replace("{}", name) for name in classes for template in templates]
    features = text_features(model, tokenizer, texts)
    return zero_shot_classifier(features.view(len(classes), len(templates), -1))


def prompts() -> dict:
    """prompts.yaml: the published template sets and class names."""
    return yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))


@torch.no_grad()
def probe_features(model: Clip, images: Tensor, batch: int = 256) -> Tensor:
    """What a linear probe reads: the picture encoder's output before the projection (N, D)."""
    device = model.logit_scale.device
    return torch.cat([model.vision_encoder(b.to(device)).float().cpu() for b in images.split(batch)])
