"""Batches whose content follows from (seed, step) alone, so that the position in the data is the step number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Batches(Dataset):
    """Item i is the whole batch of step i: a tuple of rows of every given tensor, in order, shuffled anew every epoch.

    tensors: equal first dimension, held in memory. batch is global; under R ranks each rank gets its equal share.
    """

    def __init__(self, tensors: tuple[Tensor, ...], batch: int, steps: int, seed: int, rank: int = 0, ranks: int = 1):
        if batch % ranks:
            raise ValueError(f"a global batch of {batch} does not divide by {ranks} ranks")
        self.tensors, self.batch, self.steps, self.seed = tensors, batch, steps, seed
        self.rank, self.ranks = rank, ranks
        self.per_epoch = len(tensors[0]) // batch
        if not self.per_epoch:
            raise ValueError(f"{len(tensors[0])} samples do not fill one batch of {batch}")
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.steps

    def rows(self, step: int) -> Tensor:
        """Which samples the whole batch of this step is made of. (batch,)"""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order, self._epoch = torch.randperm(len(self.tensors[0]), generator=generator), epoch
        return self._order[position * self.batch : (position + 1) * self.batch]

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        rows = self.rows(step)[self.rank :: self.ranks]
        return tuple(tensor[rows] for tensor in self.tensors)

    def loader(self, workers: int = 0) -> DataLoader:
        return DataLoader(self, batch_size=None, shuffle=False, num_workers=workers)
