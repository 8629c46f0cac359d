"""What one paper's run takes of another's, such as BLIP-2's frozen picture encoder: "clip:vision", made where missing.

Papers do not import each other. The other paper's parts.py is looked up by name: build(part, recipe, seed, folder)
trains and leaves files, load(folder, ...) reads them. An artifact follows from its recipe, seed, data and code, which
name its folder in the cache; what a run really used is told by the hash of the files, which the report lists.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.core.files import cache_root, locked, made, sha256, write_whole
from shared.core.paper_package import PaperPackage
from shared.core.provenance import code_digest
from shared.core.recipe import Recipe, digest, training_fields
from shared.experiments.stage_cache import StageCache
from shared.weights.manifest import load_manifest

SEAL = "artifact.json"


@dataclass(frozen=True)
class PretrainedPart:
    """name: paper and part; changes: of that paper's recipe; digest: sha256 over its files; seconds: what building it
    took; fresh: built just now."""

    name: str
    changes: tuple[str, ...]
    folder: Path
    digest: str
    seconds: float
    fresh: bool
    known: dict[str, Any]  # what its builder measured of it
    package: str = "papers"

    def load(self, **options: Any) -> Any:
        """What the other paper's load(folder, **options) gives: of clip:vision an encoder, layer="second-last"."""
        return PaperPackage(f"{self.package}.{self.name.partition(':')[0]}").parts.load(self.folder, **options)

    @property
    def title(self) -> str:
        """clip:vision (steps=400)."""
        return f"{self.name} ({' '.join(self.changes)})" if self.changes else self.name

    @property
    def line(self) -> str:
        """For the report."""
        known = "".join(f", {name} {value:g}" for name, value in self.known.items())
        made_how = f"built in {self.seconds:.0f} s" if self.fresh else "from the cache"
        return f"{self.title} {self.digest[:12]}, {made_how}{known}"


def pretrained_part(
    name: str,
    scale: str,
    overrides: Sequence[str] = (),
    seed: int = 0,
    *,
    package: str = "papers",
    cache: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> PretrainedPart:
    """The artifact `name` ("clip:vision") by the other paper's recipe of that scale and `overrides` ("steps=400").

    Made where the cache has it not; one that is damaged is made anew, with one warning. Processes that ask at once
    wait for the one that builds. UserError: no such paper, part, recipe or key.
    """
    paper, _, part = name.partition(":")
    if not part:
        raise UserError(f"artifact '{name}': name paper and part, such as clip:vision")
    catalog = Catalog(Path(importlib.import_module(package).__path__[0]), package)
    recipe = catalog.recipe(paper, scale, list(overrides))
    module = catalog.package(paper).parts
    if part not in module.PARTS:
        raise UserError(f"artifact '{name}': {paper} has no {part}; it has {', '.join(module.PARTS)}")
    parent = cache_root(cache) / "artifacts"
    stages = StageCache(parent, seed)
    stage = f"{paper}-{part}-{_identity(catalog, recipe, seed)}"
    final, fresh = parent / stage, []

    def make(folder: Path) -> None:
        (say or (lambda text: None))(f"{name}: not in the cache, it is being trained")
        clock = time.perf_counter()
        known = module.build(part, recipe, seed, folder)
        files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
        seconds = round(time.perf_counter() - clock, 1)
        write_whole(folder / SEAL, json.dumps({"files": files, "seconds": seconds, "known": known}, indent=1))
        fresh.append(True)

    if final.is_dir() and _sealed(final) is None:
        made(parent)
        with locked(parent / f"{stage}.repair"):
            if final.is_dir() and _sealed(final) is None:
                print(f"{final}: damaged; {name} is made anew", file=sys.stderr, flush=True)
                shutil.rmtree(final)
    folder = stages.get_or_build(stage, make, draws=name)  # the stage's own name changes with every line of code
    seal = _sealed(folder)
    if seal is None:
        raise UserError(f"{folder}: damaged while it was read; remove it and run again")
    found = hashlib.sha256(json.dumps(seal["files"], sort_keys=True).encode()).hexdigest()
    return PretrainedPart(name, tuple(overrides), folder, found, seal["seconds"], bool(fresh), seal["known"], package)


def _sealed(folder: Path) -> dict | None:
    """The seal of a folder whose files are as they were left; None otherwise."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        sound = all(sha256(folder / name) == wanted for name, wanted in seal["files"].items())
        return seal if sound and {"seconds", "known"} <= seal.keys() else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _identity(catalog: Catalog, recipe: Recipe, seed: int) -> str:
    """Sixteen hex digits over recipe, seed, data and the code that trains: shared, and the other paper's."""
    from shared.data.dataset import entries_of

    if recipe.data_root:
        data = catalog.package(recipe.paper).claims.load(recipe, seed).digest
    else:
        data = [load_manifest()[entry].sha256 for entry in entries_of(recipe.data)]
    code = code_digest(catalog.root, ("shared", f"{catalog.folder.name}/{recipe.paper}"))
    what = [digest(training_fields(recipe)), seed, data, code]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
