"""WebDataset shards as batches: split over ranks and workers, the same order for the same seed, seekable to any batch.

A shard is a tar of samples; a sample is the files of one key, here a picture (.jpg, .png, .webp) and its caption (.txt,
or .json with `caption`). The order within a shard and of the shards is drawn anew every epoch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shared.core.archives import SafeArchive
from shared.core.errors import UserError
from shared.core.text import shown
from shared.data.images import PictureError, fitted_image
from shared.data.loader import StepLoader

PICTURES = ("jpg", "jpeg", "png", "webp")
HOPELESS = 1_000  # samples dropped on the way to one batch after which a reader gives up: there may be no good one


@dataclass
class Item:
    """A batch on its way from a reader: what it holds, and where its reader stands behind it.

    Without tensors where the reader gave up.
    """

    tensors: tuple[Tensor, ...]
    ids: list[str]
    reader: int
    consumed: int  # samples of its reader so far, the dropped ones included
    dropped: list[tuple[str, str]] = field(default_factory=list)  # (id, why)


class Shards(IterableDataset):
    """Item i is this rank's share of the i-th batch, as `Batches` has it, streamed from `folder`/*.tar.

    encode(picture (3, S, S) uint8, caption) -> what a batch holds of one sample. Every one of the ranks x workers
    readers takes its own shards, so there must be as many. Samples without picture or caption, or with a broken one,
    are dropped, counted and named; above `max_dropped` of what was read the run stops, and so it does after HOPELESS of
    them without a batch.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        encode: Callable[[Tensor, str], tuple[Tensor, ...]],
        batch: int,
        steps: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        max_dropped: float = 0.001,
    ):
        if batch % (ranks * accumulate):
            raise ValueError(f"a global batch of {batch} does not divide by {ranks} ranks x {accumulate} parts")
        self.folder, self.size, self.encode, self.seed = Path(folder), size, encode, seed
        self.rank, self.ranks, self.max_dropped = rank, ranks, max_dropped
        self.each, self.steps = batch // (ranks * accumulate), steps * accumulate
        self.samples = shard_sizes(self.folder)
        self.first = 0  # the item to begin with
        self.starts: dict[int, int] = {}  # samples that each reader of this rank passes over for that

    def __len__(self) -> int:
        return self.steps

    @property
    def digest(self) -> str:
        """SHA-256 over names, bytes and samples of the shards (their content is too much to hash at every start)."""
        listed = [[name, (self.folder / name).stat().st_size, samples] for name, samples in self.samples.items()]
        return sha256(json.dumps(listed).encode()).hexdigest()

    def loader(self, workers: int = 0) -> ShardLoader:
        readers = self.ranks * max(1, workers)
        if len(self.samples) < readers:
            raise UserError(
                f"{self.folder}: {len(self.samples)} shards do not feed {readers} readers ({self.ranks} ranks x "
                f"{max(1, workers)} workers); write smaller shards, or take fewer workers"
            )
        return ShardLoader(self, workers)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        # items are collected from worker 0 on in turn: the worker that comes first reads for the first item's reader
        reader, readers = ((worker.id + self.first) % worker.num_workers, worker.num_workers) if worker else (0, 1)
        consumed = self.starts.get(reader, 0)
        rows, ids, dropped = [], [], []
        for key, sample in self.stream(self.rank * readers + reader, self.ranks * readers, consumed):
            consumed += 1
            try:
                rows.append(self.encode(*decoded(sample, self.size)))
                ids.append(key)
            except PictureError as wrong:
                dropped.append((key, str(wrong)))
            full = len(rows) == self.each
            if full or len(dropped) == HOPELESS:
                tensors = tuple(torch.stack(part) for part in zip(*rows, strict=True)) if full else ()
                yield Item(tensors, ids, reader, consumed, dropped)
                rows, ids, dropped = [], [], []

    def stream(self, reader: int, readers: int, skip: int) -> Iterator[tuple[str, dict]]:
        """Endless (id, raw sample) of one reader of `readers`, from its `skip`-th on; shards before it stay closed."""
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.samples), generator=generator).tolist()
            names = list(self.samples)
            for number in order[reader::readers]:
                name, count = names[number], self.samples[names[number]]
                if skip >= count:
                    skip -= count
                    continue
                samples = read_shard(self.folder / name, count)
                inside = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 1_000_003 + number)
                within = torch.randperm(count, generator=inside).tolist()
                for row in within[skip:]:
                    yield f"{name}/{samples[row]['__key__']}", samples[row]
                skip = 0
            epoch += 1


class ShardLoader(StepLoader):
    """A StepLoader whose position is that of every reader: how many samples it has consumed."""

    def __init__(self, dataset: Shards, workers: int):
        DataLoader.__init__(self, dataset, batch_size=None, num_workers=workers)
        self.waited = 0.0
        self.read = 0  # of what was trained
        self.dropped: Counter[str] = Counter()
        self._behind: dict[int, Item] = {}  # item number -> where its reader stood, of what is not trained yet
        self._consumed: dict[int, int] = {}

    def position(self, items: int) -> dict:
        for number in [n for n in self._behind if n < items]:
            item = self._behind.pop(number)
            self._consumed[item.reader] = item.consumed
            self.read += len(item.ids) + len(item.dropped)
            self.dropped.update(why for _, why in item.dropped)
        read = {"read": self.read, "dropped": dict(self.dropped)}
        return {"items": items, "consumed": dict(self._consumed), "workers": self.num_workers} | read

    def seek(self, position: dict) -> None:
        if position["workers"] != self.num_workers:
            raise UserError(f"workers was {position['workers']} when this run began, now it is {self.num_workers}")
        self._consumed = dict(position["consumed"])
        self.read, self.dropped = position["read"], Counter(position["dropped"])
        self.dataset.first, self.dataset.starts = position["items"], dict(position["consumed"])

    def names(self, item: int) -> list[str]:
        return self._behind[item].ids if item in self._behind else []

    def __iter__(self) -> Any:  # an iterator of tuples of tensors
        for number, item in enumerate(self.timed(DataLoader.__iter__(self)), start=self.dataset.first):
            self._behind[number] = item
            self.refuse_too_many()
            yield item.tensors

    def refuse_too_many(self) -> None:
        """UserError where more than max_dropped of the samples read (of at least a thousand) could not be used, or a
        reader gave up."""
        ahead = self._behind.values()
        lost = sum(self.dropped.values()) + sum(len(item.dropped) for item in ahead)
        read = self.read + sum(len(item.ids) + len(item.dropped) for item in ahead)
        limit = self.dataset.max_dropped
        too_many = f"more than {100 * limit:g} %" if lost > limit * max(read, 1000) else ""
        hopeless = f"{HOPELESS} of them on the way to one batch" if any(not item.tensors for item in ahead) else ""
        if too_many or hopeless:
            first = [shown(f"{id}: {why}") for item in ahead for id, why in item.dropped][:3]
            raise UserError(
                f"{self.dataset.folder}: {lost} of {read} samples cannot be used, {too_many or hopeless} "
                f"({'; '.join(first)}): mend the shards"
            )


def decoded(sample: dict, size: int) -> tuple[Tensor, str]:
    """A raw sample -> its picture (3, S, S) uint8 and its caption. Raises PictureError where either is missing."""
    picture = next((sample[suffix] for suffix in PICTURES if suffix in sample), None)
    if picture is None:
        raise PictureError("no picture")
    try:
        caption = sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])["caption"]
    except (KeyError, TypeError, ValueError, RecursionError):  # the last: JSON nested without end
        raise PictureError("no caption") from None
    if not isinstance(caption, str) or not caption.strip():
        raise PictureError("no caption")
    return torch.from_numpy(fitted_image(picture, size).copy()), caption


def read_shard(path: Path, expected: int) -> list[dict]:
    """The raw samples of one shard, {"__key__": ..., suffix: bytes}. UserError where it is cut short or has changed.

    Its files are grouped by the webdataset library, but not opened by it: it knows no limits, and would read a shard
    whose name begins with `pipe:` by running it.
    """
    from webdataset.tariterators import group_by_keys  # seconds to import

    try:
        with SafeArchive(path) as archive:
            files = ({"fname": n, "data": archive.read(n), "__url__": str(path)} for n in archive.members())
            samples = list(group_by_keys(files))
    except ValueError as wrong:  # ArchiveError, and two files of one key and suffix
        raise UserError(f"{path}: {shown(wrong.args[0])}; get the shard again") from None
    if len(samples) != expected:
        raise UserError(f"{path}: holds {len(samples)} samples, not {expected} as counted before; get the shard again")
    return samples


def shard_sizes(folder: Path) -> dict[str, int]:
    """{name of the shard: samples in it}, by name; from sizes.json of the folder where it fits, else counted."""
    shards = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not shards:
        raise UserError(f"{folder}: no shards (*.tar) there; set data_root to the folder that holds them")
    try:
        known = json.loads((folder / "sizes.json").read_text())
        sizes = {path.name: int(known[path.name]) for path in shards}
        if known.keys() == sizes.keys() and min(sizes.values()) > 0:
            return sizes
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        pass
    return {path.name: count_samples(path) for path in shards}


def count_samples(path: Path) -> int:
    """Samples of one shard, counted by their headers alone. UserError where it is no tar, empty or cut short."""
    from webdataset.tariterators import base_plus_ext

    with SafeArchive(path) as archive:
        keys = {base_plus_ext(name)[0] for name in archive.members()} - {None}
    if not keys:
        raise UserError(f"{path}: holds no samples; remove it")
    return len(keys)
