"""Decisions by hash: which split an id belongs to, and streams of choices that a key alone determines.

BLAKE2b and `random.Random.random` give the same numbers on every platform and in every Python version.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import TypeVar

from shared.core.errors import UserError

T = TypeVar("T")


def stable_hash(*key: object) -> int:
    """64 bits of BLAKE2b over the key's parts; the parts' boundaries count, so ("ab", "c") is not ("a", "bc")."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def split_of(id: str, shares: Mapping[str, float]) -> str:
    """The split of an id, by hash: `split_of("cat-7", {"train": .9, "val": .1})`. The shares must sum to one."""
    if not shares or any(share < 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-9:
        raise UserError(f"split shares {dict(shares)}: they must be positive and sum to 1")
    place = stable_hash("split", id) / 2**64
    last = ""
    for name, share in shares.items():
        if share == 0:
            continue
        last = name
        if place < share:
            return name
        place -= share
    return last


def choose_by_hash(ids: Sequence[str], count: int | None, seed: int = 0) -> list[int]:
    """Positions of `count` ids chosen by hash, in their old order; a smaller choice is part of a larger one."""
    if count is None or count >= len(ids):
        return list(range(len(ids)))
    order = sorted(range(len(ids)), key=lambda i: (stable_hash("choice", seed, ids[i]), ids[i]))
    return sorted(order[:count])


class SeededRandom:
    """A stream of choices determined by its key: `Draw("scene", seed, split, index)`."""

    def __init__(self, *key: object):
        # Only `random()` is promised to stay the same across Python versions; the rest is built on it.
        self.unit = random.Random(stable_hash(*key)).random

    def below(self, n: int) -> int:
        """A whole number in 0 .. n - 1."""
        return int(self.unit() * n)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.unit() * len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items, in random order."""
        pool = list(items)
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.sample(items, len(items))
