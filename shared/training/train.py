"""`train`: one paper's model on one recipe, on one device or many, from its newest checkpoint on; no claims."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import lightning
from torch import Tensor

from shared.core.catalog import Catalog
from shared.core.console import Console
from shared.core.errors import UserError
from shared.core.paper_package import Trainable
from shared.core.recipe import SEED_BASE, Recipe, to_yaml
from shared.data.dataset import DatasetBundle
from shared.data.loader import Batches
from shared.tokenizers.base import Tokenizer


def from_memory(
    module: lightning.LightningModule,
    tensors: tuple[Tensor, ...],
    rows: Tensor,
    dataset: DatasetBundle,
    tokenizer: Tokenizer,
    recipe: Recipe,
    seed: int,
) -> Trainable:
    """The module, and by rank its batches of these tensors. rows (N,): each sample's picture in dataset.train."""
    ids = [dataset.train.ids[row] for row in rows.tolist()]

    def batches(rank: int, ranks: int) -> Batches:
        return Batches(tensors, recipe.batch, recipe.steps, seed, rank, ranks, recipe.accumulate, ids)

    return Trainable(module, batches, dataset.digest, tokenizer.save)


def train(catalog: Catalog, recipe: Recipe, folder: Path | None, console: Console) -> Path:
    """Train, or go on with what the same command began. -> the folder with model.safetensors.

    folder: default runs/<paper>/train-<scale>. On several ranks every one calls this, and the first one writes.
    UserError where the paper has no train.py, the folder cannot be written, or what it holds is of other settings.
    """
    from lightning.pytorch.callbacks import LambdaCallback

    from shared.core.files import write_whole
    from shared.training.callbacks import MetricRecorder
    from shared.training.tracking import Tracker
    from shared.training.trainer import fit, world_rank
    from shared.weights.consolidate import consolidate_to, refuse_outside

    package = catalog.package(recipe.paper)
    if not package.offers("train", "prepare"):
        raise UserError(f"papers/{recipe.paper} has no train.py, so it trains in its claims alone: make reproduce")
    folder = folder or catalog.root / "runs" / recipe.paper / f"train-{recipe.scale}"
    first = world_rank() == 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another by --out") from None
    lightning.seed_everything(SEED_BASE, verbose=False)
    with console.waiting("reading the data"):
        trainable = package.train.prepare(recipe, SEED_BASE)
    refuse_outside(trainable.module.state_dict(), f"papers/{recipe.paper}")

    def keep(*_) -> None:
        """What goes with the weights; written once fit has found that the checkpoints are of this very recipe."""
        if first:
            write_whole(folder / "recipe.yaml", to_yaml(recipe))
            trainable.save_tokenizer(folder / "tokenizer.json")

    identity = {"seed": SEED_BASE, "data": trainable.digest}
    devices = recipe.devices * recipe.nodes
    title = f"{recipe.model} on {devices} device{'s' if devices > 1 else ''}"
    with console.progress(recipe.steps * recipe.batch, title, "samples") as bar:
        curves = MetricRecorder(recipe.batch, bar.advance if first else None)
        callbacks = [curves, LambdaCallback(on_train_start=keep)]
        waited = fit(trainable.module, trainable.batches, recipe, folder, callbacks, identity, keep_last=True)
    if first:
        consolidate_to(folder / "checkpoints" / f"step-{recipe.steps:08d}", folder / "model.safetensors")
        name = f"train {recipe.model} {recipe.scale}"
        tracker = Tracker(
            folder, catalog.root, experiment=recipe.paper, name=name,
            about=catalog.card(recipe.paper).paper.title, data_digest=trainable.digest,
            tags={"scale": recipe.scale, "data": recipe.data}, params=asdict(recipe),
            curves=curves.values | {"waited": [(recipe.steps, waited)]},
        )  # fmt: skip
        tracker.finish()
        console.say(f"waited for data {100 * waited:.2g} % of the time")
    return folder
