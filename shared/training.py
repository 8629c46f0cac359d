"""One Lightning Trainer for all papers, what watches it (curves, finite numbers, checkpoints), and optimizer groups."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import nn

from shared.data.batches import Batches, StepLoader
from shared.errors import UserError
from shared.recipes import Recipe, of_one_arm
from shared.resume import Sealed, SealedCheckpoints, newest
from shared.strategies import strategy_of


def quiet() -> None:
    """Silence third-party chatter (not errors): Lightning's tips, worker hints, deprecations."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "mlflow", "alembic", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def device_for(recipe: Recipe) -> torch.device:
    """Where `fit` trains on one device; what is measured outside of it runs there too."""
    return torch.device("cuda" if recipe.accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only: not for gains, biases, scalars and single vectors (CLIP, Sec. 2.5)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw_with_cosine(module: nn.Module, recipe: Recipe) -> dict:
    """AdamW, linear warm-up, cosine decay to zero over the recipe's steps; in configure_optimizers' form."""
    optimizer = torch.optim.AdamW(
        decay_groups(module, recipe.weight_decay),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, recipe))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(step: int, recipe: Recipe) -> float:
    """The share of the peak learning rate at a step (0-based)."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def warmup_cosine_between(step: int, recipe: Recipe, first: float, last: float) -> float:
    """As `warmup_cosine`, but the warm-up begins at the learning rate `first` and the cosine ends at `last`."""
    lowest = (first if step < recipe.warmup_steps else last) / recipe.learning_rate
    return lowest + (1 - lowest) * warmup_cosine(step, recipe)


class Curves(Callback):
    """Keeps what the module logs as {name: [(samples seen, value)]} and reports every finished step to `progress`."""

    def __init__(self, batch: int, progress: Callable[[int], None] | None = None, every: int = 5):
        self.batch, self.progress, self.every = batch, progress, every
        self.values: dict[str, list[tuple[int, float]]] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        if self.progress and trainer.global_step:  # resumed: what was seen before counts
            self.progress(trainer.global_step * self.batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            for name, value in trainer.callback_metrics.items():
                self.values.setdefault(name, []).append((trainer.global_step * self.batch, float(value)))
        if self.progress:
            self.progress(self.batch)

    def state_dict(self) -> dict:
        return {"values": self.values}

    def load_state_dict(self, state: dict) -> None:
        self.values = {name: [tuple(point) for point in curve] for name, curve in state["values"].items()}


class At(Callback):
    """Keeps `measure()` as [(samples seen, value)] after the given steps, in eval mode and without gradients."""

    def __init__(self, steps: list[int], batch: int, measure: Callable[[], float]):
        self.steps, self.batch, self.measure = set(steps), batch, measure
        self.values: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step in self.steps and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            pl_module.eval()
            with torch.no_grad():
                self.values.append((trainer.global_step * self.batch, self.measure()))
            pl_module.train()

    def state_dict(self) -> dict:
        return {"values": self.values}

    def load_state_dict(self, state: dict) -> None:
        self.values = [tuple(point) for point in state["values"]]


class Finite(Callback):
    """Stops every rank before the optimizer's step where loss or gradient of any rank is not a finite number.

    The samples of the batch are named in the error and in not-finite.json. Gradients are not looked at under 16-mixed,
    whose loss scaler expects infinite ones and skips their step, nor under ZeRO, which keeps them in pieces.
    """

    def __init__(self, folder: Path):
        self.folder, self.losses = folder, []

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        losses, self.losses = self.losses, []
        fine = [torch.stack([torch.isfinite(loss).all() for loss in losses]).all()]
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients and getattr(trainer, "scaler", None) is None:
            fine.append(torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum()))
        mine = torch.stack([fine[0], torch.stack(fine).all()]).int()  # the loss, and all of it
        every = [mine]
        if trainer.world_size > 1:
            every = [torch.empty_like(mine) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(every, mine)
        flags = torch.stack(every)  # (ranks, 2)
        if not flags.all():
            # DDP has spread what one rank's gradient was by now: the loss tells whose it is, where it can
            column = 0 if not flags[:, 0].all() else 1
            bad = [rank for rank, fine in enumerate(flags[:, column].tolist()) if not fine]
            self.stop(trainer, bad, [float(loss) for loss in losses])

    def stop(self, trainer, bad: list[int], losses: list[float]) -> None:
        item = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        names = trainer.train_dataloader.names(item)
        found = {"step": trainer.global_step, "rank": trainer.global_rank, "ranks": bad, "loss": losses}
        path = self.folder / f"not-finite-{trainer.global_rank}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found | {"samples": names}, indent=1))
        except OSError:
            pass  # the error below says the same
        which = f"; samples {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""
        raise UserError(
            f"loss or gradient is not finite before step {trainer.global_step + 1} on rank "
            f"{', '.join(map(str, bad))} (loss {losses[-1]:g}{which}); all ranks stopped, nothing was updated, "
            f"the last checkpoint is good; all names: {path}; lower learning_rate, or look at these samples"
        )


class Loading(lightning.LightningDataModule):
    """The batches of this rank, made once Lightning knows which rank it is, from where `found` left them."""

    def __init__(self, batches: Batches | Callable[[int, int], Batches], workers: int, found: Sealed | None):
        super().__init__()
        self.make = batches if callable(batches) else lambda rank, ranks: batches
        self.workers, self.found = workers, found

    def train_dataloader(self) -> StepLoader:
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
    identity = identity | {"recipe": of_one_arm(recipe), "ranks": recipe.devices * recipe.nodes}
    conditions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    found = newest(checkpoints, identity, conditions)
    sealed = SealedCheckpoints(checkpoints, recipe.checkpoint_every, identity, conditions, found, keep_last)
    loading = Loading(batches, recipe.workers, found)
    trainer = make_trainer(recipe, folder, [Finite(folder), *callbacks, sealed])
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
