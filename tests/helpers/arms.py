"""Arms of a paper's claims, run in a folder as `make reproduce` runs them."""

from pathlib import Path

import torch

from shared.core.paper_package import Context


def context(folder: Path, arm: str, recipe, seed: int = 3) -> Context:
    """Of an arm that is not the first seed's."""
    place = folder / "arms" / f"{arm}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    return Context(recipe, seed, place, lambda samples: None, False, arm)


def measured(claims, recipe, folder: Path, *arms: str) -> dict[str, dict]:
    """{arm: what it measured}, in this order."""
    found = {}
    for arm in arms:
        torch.manual_seed(3)
        found[arm] = claims.ARMS[arm](context(folder, arm, recipe))
    return found
