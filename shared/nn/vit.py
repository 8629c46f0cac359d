"""Image encoders: the ViT (Dosovitskiy et al. 2021), EVA's too (Fang et al. 2023), and CLIP's modified ResNet (Radford
et al. 2021, Sec. 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shared.nn.blocks import Block, Blocks
from shared.nn.patch_embedding import ClassTokenAndPositions, PatchEmbedding


class QueryValueBias(nn.Linear):
    """The fused projection to [q; k; v] without a bias on the keys. weight (3 D, D); bias (2 D,): of q, then of v.

    Attention would not see a key's bias anyway: it adds the same to all scores of a query.
    """

    def __init__(self, width: int):
        super().__init__(width, 3 * width)
        self.bias = nn.Parameter(torch.zeros(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        of_q, of_v = self.bias.chunk(2)
        return nn.functional.linear(x, self.weight, torch.cat([of_q, torch.zeros_like(of_q), of_v]))


class VisionTransformer(nn.Module):
    """A ViT over uint8 pixels (B, 3, H, W), or floating-point pictures that are normalised already.

    input_norm is CLIP's extra LayerNorm before the first block; norm "pre" or "post" is the blocks' own. drop_path is
    the last block's stochastic depth, which rises from 0 at the first. EVA has a bias on queries and values alone
    (key_bias=False). output_norm=False: an encoder that is read through `tokens` and has no norm of its own there.
    """

    def __init__(
        self,
        image_size: int,
        patch: int,
        width: int,
        layers: int,
        heads: int,
        *,
        activation: str = "gelu",
        eps: float = 1e-6,
        mlp_ratio: float = 4.0,
        norm: str = "pre",
        input_norm: bool = False,
        output_norm: bool = True,
        patch_bias: bool = True,
        key_bias: bool = True,
        drop_path: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        if image_size % patch:
            raise ValueError(f"a picture of {image_size} px does not divide into patches of {patch} px")
        self.width = width
        self.patch_embedding = PatchEmbedding(patch, width, bias=patch_bias, mean=mean, std=std)
        self.positions = ClassTokenAndPositions(width, (image_size // patch, image_size // patch))
        self.input_norm = nn.LayerNorm(width, eps=eps) if input_norm else nn.Identity()
        drops = [drop_path * i / max(1, layers - 1) for i in range(layers)]
        self.blocks = Blocks(
            Block(width, heads, mlp_ratio=mlp_ratio, activation=activation, eps=eps, norm=norm, drop_path=drop)
            for drop in drops
        )
        if not key_bias:
            for block in self.blocks:
                block.attention.qkv = QueryValueBias(width)
        self.output_norm = nn.LayerNorm(width, eps=eps) if output_norm else nn.Identity()

    def embed(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) -> tokens that enter the first block (B, 1 + N, D)."""
        patch = self.patch_embedding.patch
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        return self.input_norm(self.positions(self.patch_embedding(images), grid))

    def tokens(self, images: Tensor, *, skip_last_blocks: int = 0) -> Tensor:
        """All tokens after the blocks but the last `skip_last_blocks`, without the output norm. (B, 1 + N, D)."""
        blocks = self.blocks[: len(self.blocks) - skip_last_blocks]
        blocks.recompute = self.blocks.recompute  # a slice is a new stack
        return blocks(self.embed(images))

    def forward(self, images: Tensor) -> Tensor:
        """The class token after the output norm. (B, D)."""
        x = self.blocks(self.embed(images))  # (B, 1 + N, D)
        return self.output_norm(x[:, 0])  # (B, D)
