"""What one rank does: trains the tiny CLIP by the very `fit` of the arms, and leaves what it saw in files."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

ROWS, BATCH, STEPS = 64, 16, 20
CHECKPOINT, KILLED = 10, 15  # steps
CAP = 2.65  # of logit_scale, which starts at 2.659: the cap acts, and has to act on ZeRO's master copy too


@dataclass(frozen=True)
class Task:
    """A training by one strategy. kill: end with -9 in the middle of it. resume: from a Trainer's own checkpoint."""

    strategy: str
    ranks: int
    folder: Path
    accumulate: int = 1
    kill: bool = False
    resume: Path | None = None


def run(task: Task, rank: int, port: int) -> None:
    """The body of rank `rank`, started as torchrun would. A UserError's line is left in error-<rank>."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(task.ranks), TORCHELASTIC_RUN_ID="test",
        LOCAL_WORLD_SIZE=str(task.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    from shared.core.errors import UserError

    try:
        train(task, rank)
    except UserError as error:
        (task.folder / f"error-{rank}").write_text(str(error))


def train(task: Task, rank: int) -> None:
    import lightning
    import torch

    import papers.clip.model
    import papers.clip.module
    from papers.clip.module import example
    from papers.clip.recipe import ClipRecipe
    from shared.core.console import quiet
    from shared.data.loader import Batches
    from shared.training.strategies import whole
    from shared.training.trainer import fit, make_trainer

    quiet()
    for place in (papers.clip.model, papers.clip.module):
        if hasattr(place, "LARGEST_LOGIT_SCALE"):
            place.LARGEST_LOGIT_SCALE = CAP
    torch.manual_seed(0)
    module, rows = example(ROWS)
    # Adam's eps is large on purpose: steps then follow the size of the gradients, not only their signs, so that a
    # gradient summed instead of averaged shows, and rounding does not.
    module.recipe = recipe = ClipRecipe(
        model="clip-tiny", steps=STEPS, batch=BATCH, pairs=ROWS, learning_rate=5e-4, warmup_steps=5, eps=1e-3,
        accelerator="cpu", strategy=task.strategy, devices=task.ranks, accumulate=task.accumulate,
        checkpoint_every=CHECKPOINT,
    )  # fmt: skip
    frozen = module.model.vision_encoder.positions.position.requires_grad_(False)
    batches = Batches(rows, BATCH, STEPS, 0, rank, task.ranks, task.accumulate)

    class Watch(lightning.Callback):
        """Every step's loss, as exact text, and the whole gradients of the first step."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 0 and (trainer.fit_loop.batch_idx + 1) % task.accumulate == 0:
                gradients = {name: gradient_of(p) for name, p in module.model.named_parameters() if p.requires_grad}
                torch.save(gradients, task.folder / f"gradients-{rank}.pt")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with (task.folder / f"trace-{rank}.jsonl").open("a") as file:
                print(json.dumps([trainer.global_step, float(outputs["loss"]).hex()]), file=file)
            with whole(frozen) as (value,):  # as a momentum encoder moves
                value.mul_(0.99)
            if task.kill and trainer.global_step == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)

    if task.resume:
        trainer = make_trainer(recipe, task.folder, [])
        trainer.fit(module, batches.loader(), ckpt_path=str(task.resume))
    else:
        fit(module, batches, recipe, task.folder, [Watch()], {"seed": 0}, keep_last=True)


def gradient_of(parameter):
    if parameter.grad is not None:
        return parameter.grad.clone()
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def consolidated(task: Task, rank: int, port: int) -> None:
    """`task.resume`, a checkpoint, as task.folder/model.safetensors; or the refusal's line in error-0."""
    from shared.core.errors import UserError
    from shared.weights.consolidate import consolidate_to

    try:
        consolidate_to(task.resume, task.folder / "model.safetensors")
    except UserError as error:
        (task.folder / "error-0").write_text(str(error))
