"""One Lightning Trainer for all papers, what watches it (curves, finite numbers, checkpoints), and optimizer groups."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from shared.core.recipe import Recipe, training_fields
from shared.data.loader import Batches, StepLoader
from shared.training.callbacks import NonFiniteGuard
from shared.training.checkpointing import Sealed, SealedCheckpoints, newest
from shared.training.strategies import strategy_of


class Loading(lightning.LightningDataModule):
    """The batches of this rank, made once Lightning knows which rank it is, from where `found` left them."""

    def __init__(self, batches: Batches | Callable[[int, int], Batches], workers: int, found: Sealed | None):
        super().__init__()
        self.make = batches if callable(batches) else lambda rank, ranks: batches
        self.workers, self.found = workers, found

    def train_dataloader(self) -> StepLoader:
        assert self.trainer is not None, "Lightning has attached it"
        rank = self.trainer.global_rank
        self.loader = self.make(rank, self.trainer.world_size).loader(self.workers)
        if self.found:
            self.loader.seek(self.found.of_rank(rank)["data"])
        return self.loader


def fit(
    module: lightning.LightningModule,
    batches: Batches | Callable[[int, int], Batches],
    recipe: Recipe,
    folder: Path,
    callbacks: list[Callback],
    identity: dict,
    keep_last: bool = False,
) -> float:
    """Train `module` on `batches` by the recipe, from the newest sealed checkpoint in folder/checkpoints if any.

    batches: the batches, or what makes them of (rank, ranks). identity: what tells this training from another (arm,
    seed, data digest); the recipe is added here. The module is in eval mode and on the training device afterwards.
    Returns the share of the time that was spent waiting for data.
    """
    checkpoints = folder / "checkpoints"
    if world_rank() == 0:
        for stale in checkpoints.glob("*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
    identity = identity | {"recipe": training_fields(recipe), "ranks": recipe.devices * recipe.nodes}
    conditions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    found = newest(checkpoints, identity, conditions)
    sealed = SealedCheckpoints(checkpoints, recipe.checkpoint_every, identity, conditions, found, keep_last)
    loading = Loading(batches, recipe.workers, found)
    trainer = make_trainer(recipe, folder, [NonFiniteGuard(folder), *callbacks, sealed])
    clock = time.perf_counter()
    state = str(found.state) if found else None
    # DeepSpeed's own files hold more than weights_only lets through; the seal has told that they are ours
    only = None if found is None or found.state.is_dir() else True
    trainer.fit(module, datamodule=loading, ckpt_path=state, weights_only=only)
    seconds = time.perf_counter() - clock
    if trainer.world_size == 1:
        module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    module.eval()
    return loading.loader.waited / seconds


def world_rank() -> int:
    """This process's rank before the process group stands, as torchrun and SLURM tell it."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK") or 0)


def make_trainer(recipe: Recipe, folder: Path, callbacks: list[Callback]) -> lightning.Trainer:
    """The Trainer of every paper: steps rather than epochs, precision and devices from the recipe, nothing printed."""
    return lightning.Trainer(
        accelerator="gpu" if recipe.accelerator == "cuda" else recipe.accelerator,
        devices=recipe.devices,
        num_nodes=recipe.nodes,
        strategy=strategy_of(recipe),
        precision=recipe.precision,
        max_steps=recipe.steps,
        accumulate_grad_batches=recipe.accumulate,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
        default_root_dir=folder,
        log_every_n_steps=2**31 - 1,
    )
