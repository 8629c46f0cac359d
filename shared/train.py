"""`train`: one paper's model on one recipe, on one device or many, from its newest checkpoint on; no claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning

from shared.catalogue import Catalogue
from shared.console import Console
from shared.data.batches import Batches
from shared.recipes import SEED_BASE, Recipe, to_yaml


@dataclass
class Trainable:
    """What a paper's training.prepare(recipe, seed) gives. batches: of (rank, ranks); digest: of the data."""

    module: lightning.LightningModule
    batches: Callable[[int, int], Batches]
    digest: str
    save_tokenizer: Callable[[Path], None]


def train(catalogue: Catalogue, recipe: Recipe, folder: Path | None, console: Console) -> Path:
    """Train, or go on with what the same command began. -> the folder with model.safetensors."""
    from shared.consolidate import consolidate_to
    from shared.runs import write_whole
    from shared.tracking import Tracker
    from shared.training import Curves, fit, world_rank

    folder = folder or catalogue.root / "runs" / recipe.paper / f"train-{recipe.scale}"
    weights, first = folder / "model.safetensors", world_rank() == 0
    lightning.seed_everything(SEED_BASE, verbose=False)
    with console.waiting("reading the data"):
        trainable = catalogue.module(recipe.paper, "training").prepare(recipe, SEED_BASE)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "recipe.yaml", to_yaml(recipe))
        trainable.save_tokenizer(folder / "tokenizer.json")
    identity = {"seed": SEED_BASE, "data": trainable.digest}
    title = (
        f"{recipe.model} on {recipe.devices * recipe.nodes} device{'s' if recipe.devices * recipe.nodes > 1 else ''}"
    )
    with console.progress(recipe.steps * recipe.batch, title, "samples") as bar:
        curves = Curves(recipe.batch, bar.advance if first else None)
        waited = fit(trainable.module, trainable.batches, recipe, folder, [curves], identity, keep_last=True)
    if first:
        newest = max((folder / "checkpoints").glob("step-*"))
        consolidate_to(newest, weights)
        name = f"train {recipe.model} {recipe.scale}"
        tracker = Tracker(
            experiment=recipe.paper, name=name, folder=catalogue.root, root=catalogue.root,
            data_digest=trainable.digest, tags={"scale": recipe.scale, "data": recipe.data}, params=asdict(recipe),
        )  # fmt: skip
        with tracker:
            tracker.log_curves(curves.values)
            tracker.log_metrics({"waited": waited}, step=recipe.steps)
        console.say(f"waited for data {100 * waited:.2g} % of the time")
    return folder
