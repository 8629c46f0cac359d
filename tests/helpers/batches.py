"""Token ids as models of BERT's kind are given them."""

import torch
from torch import Tensor


def texts(size: int, config, length: int | None = None, seed: int = 1) -> Tensor:
    """[CLS] words [SEP] padding (size, length or the configuration's context), of different lengths, padding 0."""
    length = length or config.context
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(size, length, dtype=torch.long)
    for row in range(size):
        used = 5 + (row * 3) % (length - 4)
        tokens[row, :used] = torch.randint(1, config.start_token, (used,), generator=generator)
        tokens[row, 0], tokens[row, used - 1] = config.start_token, config.end_token
    return tokens
