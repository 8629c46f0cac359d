"""CLIP's text encoder: a causal transformer read at the end-of-text token (Radford et al. 2021, Sec. 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.nn.blocks import Block, Blocks


class CausalTextTransformer(nn.Module):
    """Token ids (B, T), T <= context, ended by `end_token` -> the feature at that token (B, D).

    What stands behind the end token can neither be seen by it nor change it, so only the batch's longest
    caption is computed: exact, and for captions of natural length most of the tower's work is saved.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        width: int,
        layers: int,
        heads: int,
        end_token: int,
        *,
        activation: str = "gelu",
        eps: float = 1e-5,
    ):
        super().__init__()
        self.context, self.end_token, self.width = context, end_token, width
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = Blocks(Block(width, heads, activation=activation, eps=eps) for _ in range(layers))
        self.output_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.context:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the context of {self.context}")
        end = (tokens == self.end_token).int().argmax(dim=1)  # (B,), the first end token
        tokens = tokens[:, : longest(end, tokens.shape[1])]
        x = self.token_embedding(tokens) + self.position[: tokens.shape[1]]  # (B, T, D)
        x = self.blocks(x, causal=True)
        x = x[torch.arange(len(x), device=x.device), end]  # (B, D)
        return self.output_norm(x)


def longest(end: Tensor, width: int) -> int:
    """Tokens to compute: up to the last end position; on a GPU rounded up to 8, for its tensor cores and few shapes."""
    if end.is_meta:
        return width  # a meta tensor has no values: count everything
    length = int(end.max()) + 1
    if end.is_cuda:
        length = -(-length // 8) * 8
    return min(length, width)
