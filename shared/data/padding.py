"""Rows of token ids of different lengths as one tensor, and no wider than its rows need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_rows(rows: Sequence[Sequence[int]], pad: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens (N, T), padded on the right or the `left`, and their attention_mask (N, T), False at padding."""
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), pad)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        tokens[place, where] = torch.tensor(row)
        attention_mask[place, where] = True
    return tokens, attention_mask


def trim_padding(tokens: Tensor, pad: int) -> Tensor:
    """Right-padded (B, T) without the columns that are padding in every row: nobody sees them, and they cost as much as
    words."""
    return trim_masked(tokens, tokens != pad)[0]


def trim_masked(tokens: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the attention_mask (B, T), which is cut too."""
    longest = int(attention_mask.sum(1).max())
    return tokens[:, :longest], attention_mask[:, :longest]


def noise_texts(count: int, context: int, start: int, end: int, pad: int, generator: torch.Generator) -> Tensor:
    """`start`, any ids below it, `end`, padding on the right (N, context): texts of many lengths that say nothing."""
    tokens = torch.randint(1, start, (count, context), generator=generator)
    tokens[:, 0] = start
    ends = torch.randint(2, context, (count,), generator=generator)
    tokens[torch.arange(count), ends] = end
    tokens[torch.arange(context) > ends[:, None]] = pad
    return tokens
