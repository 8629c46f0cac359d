"""One Lightning Trainer for all papers, the optimizer groups they agree on, and the curves of a run."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from shared.recipes import Recipe


def quiet() -> None:
    """Silence third-party chatter (not errors): Lightning's tips, worker hints, deprecations."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "mlflow", "alembic", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


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


class Curves(Callback):
    """Keeps what the module logs as {name: [(samples seen, value)]} and reports every finished step to `progress`."""

    def __init__(self, batch: int, progress: Callable[[int], None] | None = None, every: int = 5):
        self.batch, self.progress, self.every = batch, progress, every
        self.values: dict[str, list[tuple[int, float]]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            for name, value in trainer.logged_metrics.items():
                self.values.setdefault(name, []).append((trainer.global_step * self.batch, float(value)))
        if self.progress:
            self.progress(self.batch)


class At(Callback):
    """Calls `measure(samples seen)` after the given steps, in eval mode and without gradients."""

    def __init__(self, steps: list[int], batch: int, measure: Callable[[int], None]):
        self.steps, self.batch, self.measure = set(steps), batch, measure

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step in self.steps:
            pl_module.eval()
            with torch.no_grad():
                self.measure(trainer.global_step * self.batch)
            pl_module.train()


def make_trainer(recipe: Recipe, folder: Path, callbacks: list[Callback]) -> lightning.Trainer:
    """The Trainer of every paper: steps rather than epochs, precision and devices from the recipe, nothing printed."""
    return lightning.Trainer(
        accelerator="gpu" if recipe.accelerator == "cuda" else recipe.accelerator,
        devices=recipe.devices,
        strategy=recipe.strategy,
        precision=recipe.precision,
        max_steps=recipe.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
        default_root_dir=folder,
        log_every_n_steps=1,
    )
