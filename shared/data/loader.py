"""Batches whose content follows from (seed, step) alone, so that the position in the data is the step number."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


class IndexedTensor:
    """tensor[rows], gathered as it is asked for: what many samples share, such as a picture of several texts, is held
    once, on the tensor's device."""

    def __init__(self, tensor: Tensor, rows: Tensor):
        self.tensor, self.rows = tensor, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: Tensor) -> Tensor:
        return self.tensor[self.rows[some]]


class Batches(Dataset):
    """Item i is the i-th batch: a tuple of rows of every given tensor, in order, shuffled anew every epoch.

    tensors: equal first dimension, held in memory. batch is global; under R ranks each rank gets its equal share.
    With `accumulate` A an optimizer step is made of A items of batch / A samples each. ids: names of the rows, for
    messages.
    """

    def __init__(
        self,
        tensors: tuple[Tensor | IndexedTensor, ...],
        batch: int,
        steps: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        ids: Sequence[str] | None = None,
    ):
        if batch % (ranks * accumulate):
            raise ValueError(f"a global batch of {batch} does not divide by {ranks} ranks x {accumulate} parts")
        self.tensors, self.batch, self.steps, self.seed = tensors, batch // accumulate, steps * accumulate, seed
        self.rank, self.ranks, self.ids = rank, ranks, ids
        self.per_epoch = len(tensors[0]) // batch * accumulate
        if not self.per_epoch:
            raise ValueError(f"{len(tensors[0])} samples do not fill one batch of {batch}")
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.steps

    def rows(self, item: int) -> Tensor:
        """Which samples the whole batch of this item is made of. (batch / accumulate,)"""
        epoch, position = divmod(item, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order, self._epoch = torch.randperm(len(self.tensors[0]), generator=generator), epoch
        return self._order[position * self.batch : (position + 1) * self.batch]

    def names(self, item: int) -> list[str]:
        """What this rank's samples of an item are called: their ids, else `row 17`."""
        rows = self.rows(item)[self.rank :: self.ranks].tolist()
        return [self.ids[row] if self.ids else f"row {row}" for row in rows]

    def __getitem__(self, item: int) -> tuple[Tensor, ...]:
        if not 0 <= item < self.steps:
            raise IndexError(item)
        rows = self.rows(item)[self.rank :: self.ranks]
        return tuple(tensor[rows] for tensor in self.tensors)

    def loader(self, workers: int = 0) -> StepLoader:
        return StepLoader(self, workers)


class StepLoader(DataLoader):
    """Reads a dataset of whole batches in order, from any position; knows how long its reader had to wait."""

    dataset: Any  # Batches or Shards
    sampler: Any

    def __init__(self, dataset: Any, workers: int = 0):
        super().__init__(dataset, batch_size=None, sampler=_From(len(dataset)), num_workers=workers)
        self.waited = 0.0  # seconds

    def position(self, items: int) -> dict:
        """What `seek` needs to go on behind the first `items` items: a prefetching reader is further than those."""
        return {"items": items}

    def seek(self, position: dict) -> None:
        self.sampler.start = position["items"]

    def names(self, item: int) -> list[str]:
        return self.dataset.names(item)

    def __iter__(self) -> Any:  # an iterator of tuples of tensors
        return self.timed(super().__iter__())

    def timed(self, batches: Iterator) -> Iterator:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch


class _From(Sampler):
    """start, start + 1, ...; its length is the whole run's, as Lightning counts."""

    def __init__(self, items: int):
        self.items, self.start = items, 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.items))

    def __len__(self) -> int:
        return self.items
