"""CLIP (Radford et al. 2021): two encoders that meet in one dot product. Reads beside Fig. 3 and Sec. 2.4."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papers.clip.config import ClipConfig
from shared.nn.resnet import Bottleneck, ModifiedResNet
from shared.nn.text_transformer import CausalTextTransformer
from shared.nn.vit import VisionTransformer

LARGEST_LOGIT_SCALE = math.log(100)  # Sec. 2.5: logits are never scaled by more than 100


class ClipOutput(NamedTuple):
    image_features: Tensor  # (B, E), L2-normalised
    text_features: Tensor  # (B, E), L2-normalised
    logit_scale: Tensor  # scalar, exponentiated: multiplies cosines


class Clip(nn.Module):
    """A picture encoder and a text encoder, projected into one space of width E."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        layers = config.vision_layers
        self.vision_encoder: VisionTransformer | ModifiedResNet
        self.vision_proj: nn.Module
        if config.patch and isinstance(layers, int):
            self.vision_encoder = VisionTransformer(
                config.image_size,
                config.patch,
                config.vision_width,
                layers,
                config.vision_heads,
                activation=config.activation,
                eps=config.eps,
                input_norm=True,
                patch_bias=False,
                mean=config.mean,
                std=config.std,
            )
            self.vision_proj = _projection(config.vision_width, config)
        else:  # the ResNet's attention pooling projects by itself
            assert not isinstance(layers, int)
            self.vision_encoder = ModifiedResNet(
                config.image_size,
                layers,
                config.vision_width,
                config.vision_heads,
                config.embed_width,
                mean=config.mean,
                std=config.std,
            )
            self.vision_proj = nn.Identity()
        self.text_encoder = CausalTextTransformer(
            config.vocabulary,
            config.context,
            config.text_width,
            config.text_layers,
            config.text_heads,
            config.end_token,
            activation=config.activation,
            eps=config.eps,
        )
        self.text_proj = _projection(config.text_width, config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        initialise(self)

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 pixels, or normalised floats, (B, 3, H, W) -> (B, E), not normalised (as the official code)."""
        return self.vision_proj(self.vision_encoder(images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T), each row closed by the end token -> (B, E), not normalised (as the official code)."""
        return self.text_proj(self.text_encoder(tokens))

    def forward(self, images: Tensor, tokens: Tensor) -> ClipOutput:
        image_features = F.normalize(self.encode_image(images).float(), dim=-1)  # (B, E)
        text_features = F.normalize(self.encode_text(tokens).float(), dim=-1)  # (B, E)
        return ClipOutput(image_features, text_features, self.logit_scale.exp())

    def parts(self) -> dict[str, nn.Module]:
        """The modules that published parameter counts are split into."""
        return {
            "vision": nn.ModuleList([self.vision_encoder, self.vision_proj]),
            "text": nn.ModuleList([self.text_encoder, self.text_proj]),
        }


def _projection(width: int, config: ClipConfig) -> nn.Module:
    """Sec. 2.3: linear, without bias; the non-linear head exists to be compared with."""
    if config.projection == "linear":
        return nn.Linear(width, config.embed_width, bias=False)
    if config.projection == "mlp":
        return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.embed_width, bias=False))
    raise ValueError(f"projection is 'linear' or 'mlp', not {config.projection!r}")


def initialise(model: Clip) -> None:
    """The official scheme (clip/model.py): scaled normals in the text tower, torch's own in the ViT's blocks."""
    text, vision = model.text_encoder, model.vision_encoder
    nn.init.normal_(text.token_embedding.weight, std=0.02)
    nn.init.normal_(text.position, std=0.01)
    width, layers = text.width, max(1, len(text.blocks))
    for block in text.blocks:
        nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.attention.out.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(block.mlp.up.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.down.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.zeros_(block.attention.qkv.bias)  # nn.MultiheadAttention's default, not nn.Linear's
        nn.init.zeros_(block.attention.out.bias)
    for head in (model.text_proj, model.vision_proj):  # a non-linear head in the same manner as the linear one
        for linear in head.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
    if isinstance(vision, ModifiedResNet):
        attention = vision.pool.attention
        for linear in (attention.q, attention.kv, attention.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for block in vision.stages.modules():
            if isinstance(block, Bottleneck):
                nn.init.zeros_(block.bn3.weight)
        return
    for table in vision.positions.parameters():
        nn.init.normal_(table, std=vision.width**-0.5)
    for block in vision.blocks:  # nn.MultiheadAttention's defaults, which are not nn.Linear's
        nn.init.xavier_uniform_(block.attention.qkv.weight)
        nn.init.zeros_(block.attention.qkv.bias)
        nn.init.zeros_(block.attention.out.bias)
