"""What watches a training: curves, measurements at given steps, finite numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from shared.core.errors import UserError


class MetricRecorder(Callback):
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


class EvalAtSteps(Callback):
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


class NonFiniteGuard(Callback):
    """Stops every rank before the optimizer's step where loss or gradient of any rank is not a finite number.

    The samples of the batch are named in the error and in not-finite.json. Gradients are not looked at under 16-mixed,
    whose loss scaler expects infinite ones and skips their step, nor under ZeRO, which keeps them in pieces.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.losses: list[Tensor] = []

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


def log_losses(
    module: lightning.LightningModule, losses: Mapping[str, Tensor | None], total: Tensor, **beside: Tensor
) -> Tensor:
    """Log `loss_<name>` of the losses that were computed, what stands beside them, and their total as `loss`, which is
    returned."""
    for name, loss in losses.items():
        if loss is not None:
            module.log(f"loss_{name}", loss.detach())
    for name, value in beside.items():
        module.log(name, value.detach())
    module.log("loss", total.detach())
    return total
