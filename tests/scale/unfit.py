"""One rank of a training in which a single rank meets a number that is not finite."""

import os
from dataclasses import dataclass
from pathlib import Path

POISONED_STEP, POISONED_RANK = 6, 1  # optimizer steps are counted from 0


@dataclass(frozen=True)
class Task:
    strategy: str
    what: str  # the loss, or only the gradient
    ranks: int
    folder: Path


def run(task: Task, rank: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(task.ranks), TORCHELASTIC_RUN_ID="test",
        LOCAL_WORLD_SIZE=str(task.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    import lightning
    import torch

    from papers.clip.module import ClipModule, example
    from papers.clip.recipe import ClipRecipe
    from shared.core.console import quiet
    from shared.core.errors import UserError
    from shared.data.loader import Batches
    from shared.training.trainer import fit

    class Poisoned(ClipModule):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            if index != POISONED_STEP or rank != POISONED_RANK:
                return loss
            # the square root's slope is infinite at zero: a finite loss whose gradient is not
            return loss * float("nan") if task.what == "loss" else loss + (self.model.logit_scale * 0).sqrt()

    quiet()
    torch.manual_seed(0)
    module, rows = example(32)
    recipe = ClipRecipe(
        model="clip-tiny", steps=10, batch=8, pairs=32, accelerator="cpu", strategy=task.strategy, devices=task.ranks,
        checkpoint_every=4,
    )  # fmt: skip
    module = Poisoned(module.model, recipe)
    batches = Batches(rows, 8, 10, 0, rank, task.ranks, ids=[f"picture {i}" for i in range(32)])

    class Keep(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, index):
            self.step, self.weights = index, {k: v.clone() for k, v in module.model.state_dict().items()}

    keep = Keep()
    try:
        fit(module, batches, recipe, task.folder, [keep], {"seed": 0})
    except UserError as error:
        same = all(torch.equal(value, keep.weights[key]) for key, value in module.model.state_dict().items())
        (task.folder / f"stopped-{rank}").write_text(f"{keep.step} {same} {error}")
