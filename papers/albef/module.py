"""ALBEF's training step: pictures, token ids and picture ids; model, three losses, momentum (Sec. 3.2, 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import lightning
import torch
from einops import repeat
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from papers.albef.config import VARIANTS, Objective
from papers.albef.losses import albef_losses
from papers.albef.model import LARGEST_TEMPERATURE, SMALLEST_TEMPERATURE, Albef, AlbefPretraining
from papers.albef.recipe import AlbefRecipe
from papers.albef.tasks import AlbefRetrieval, AlbefVqa, Distilled, TextAssignment
from shared.core.errors import UserError
from shared.core.recipe import require_negatives
from shared.nn.blocks import set_recompute
from shared.training.optim import optimizer_with_schedule
from shared.training.strategies import whole


class AlbefModule(lightning.LightningModule):
    """Pre-training on (images uint8 (B, 3, H, W), tokens (B, T), ids (B,)) batches; the ids are not looked at."""

    model: AlbefPretraining

    def __init__(self, model: AlbefPretraining, recipe: AlbefRecipe, objective: Objective | None = None):
        super().__init__()
        refuse_pieces(recipe)
        self.model, self.recipe, self.objective = model, recipe, objective or Objective()
        set_recompute(model.student, recipe.recompute)
        leave_untrained(model.student, self.objective)

    def configure_model(self) -> None:
        if self.recipe.compile:
            self.model.compile()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return adamw(self.model, self.recipe)

    def on_fit_start(self) -> None:
        if self.objective.itc:
            self.model.queue.check(self.recipe.batch)

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        images, tokens, _ = batch
        losses = albef_losses(self.model(images, tokens, self.objective), self.objective, self.ramp)
        for name, loss in zip(losses._fields, losses, strict=True):
            if loss is not None:
                self.log(f"loss_{name}", loss.detach())
        self.log("loss", losses.total.detach())
        self.log("temperature", self.model.student.temperature.detach())
        return losses.total

    @property
    def ramp(self) -> float:
        return ramp(self.global_step, self.recipe)

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        # The forward clamps too; ZeRO trains a copy that the forward does not reach.
        with whole(self.model.student.temperature) as (temperature,):
            temperature.clamp_(SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE)


class FinetuningModule(lightning.LightningModule):
    """A model of tasks.py: batches are what its `loss` takes before alpha."""

    def __init__(
        self, model: AlbefRetrieval | AlbefVqa | Distilled | TextAssignment, recipe: AlbefRecipe, alpha: float = 0.4
    ):
        super().__init__()
        refuse_pieces(recipe)
        # weights are loaded in eval mode, and Lightning leaves a module in the mode that it finds
        self.model, self.recipe, self.alpha = model.train(), recipe, alpha
        set_recompute(model, recipe.recompute)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return adamw(self.model, self.recipe)

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        loss_of: Callable[..., Tensor] = self.model.loss
        loss = loss_of(*batch, alpha=self.alpha * ramp(self.global_step, self.recipe))
        self.log("loss", loss.detach())
        return loss


def refuse_pieces(recipe: AlbefRecipe) -> None:
    """UserError where weights, or batches, come in pieces that the moving average cannot follow, or pairs alone."""
    require_negatives(recipe)
    if recipe.strategy.startswith("zero3"):
        raise UserError("recipe: strategy zero3 cuts the weights that ALBEF averages; take ddp, zero1 or zero2")
    if recipe.accumulate > 1:
        raise UserError("recipe: accumulate would move momentum copies and queue with each part; take more devices")


def ramp(step: int, recipe: AlbefRecipe) -> float:
    """How far distillation has grown: linearly, over the first epoch (Pretrain.py)."""
    return min(1.0, step / recipe.alpha_ramp_steps) if recipe.alpha_ramp_steps else 1.0


def leave_untrained(model: Albef, objective: Objective) -> None:
    """What no loss of the objective reaches gets no gradient, and no weight decay either."""
    if not objective.itc:
        for part in (model.vision_proj, model.text_proj):
            part.requires_grad_(False)
        model.temperature.requires_grad_(False)
    if not objective.mlm:
        model.mlm_head.requires_grad_(False)


def adamw(module: nn.Module, recipe: AlbefRecipe) -> OptimizerLRSchedulerConfig:
    """AdamW, linear warm-up to the peak, cosine to the last learning rate; configure_optimizers' form."""
    groups, last = slowed(decay_groups(module, recipe.weight_decay), module, recipe), recipe.last_learning_rate
    return optimizer_with_schedule(groups, recipe, recipe.first_learning_rate or last, last)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """No decay for biases and gains. Positions and class token decay, and so does the temperature, as in the official
    code (optim/optim_factory.py), whose class token has three axes."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    spared = [p for name, p in trained if p.ndim == 1 and not name.endswith("class_token")]
    ids = {id(p) for p in spared}
    return [
        {"params": [p for _, p in trained if id(p) not in ids], "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


def slowed(groups: list[dict], module: nn.Module, recipe: AlbefRecipe) -> list[dict]:
    """The groups, the temperature in one of its own where the recipe gives it another learning rate."""
    found = [p for name, p in module.named_parameters() if p.requires_grad and name.endswith("temperature")]
    if not found or recipe.temperature_rate == 1:
        return groups
    for group in groups:
        group["params"] = [p for p in group["params"] if p is not found[0]]
    rate = recipe.temperature_rate * recipe.learning_rate
    return [*groups, {"params": found, "weight_decay": recipe.weight_decay, "lr": rate}]


def example(pictures: int) -> tuple[AlbefModule, tuple[Tensor, ...]]:
    """A tiny module and a batch that fits it: what the contract tests run of every paper.

    Pictures of four colours, and texts that repeat a word of their own. The queue is short, because a batch that comes
    again meets itself there as a wrong answer; the teacher is quick, and many words are masked, so that little hangs on
    which ones.
    """
    config = replace(VARIANTS["albef-tiny"](), queue=8, temperature=0.4, momentum=0.5, mlm_probability=0.5)
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (pictures, 3, 2, 2), generator=generator, dtype=torch.uint8)
    images = colours.repeat_interleave(config.image_size // 2, 2).repeat_interleave(config.image_size // 2, 3)
    words = 1 + torch.randperm(config.mask - 1, generator=generator)[:pictures]
    lengths = torch.randint(config.context // 2, config.context + 1, (pictures,), generator=generator)
    tokens = repeat(words, "b -> b t", t=config.context).clone()
    tokens[:, 0] = config.start
    tokens[torch.arange(pictures), lengths - 1] = config.end
    tokens[torch.arange(config.context) >= lengths[:, None]] = config.pad
    recipe = AlbefRecipe(model="albef-tiny", batch=max(2, pictures), steps=60, learning_rate=5e-3, warmup_steps=5)
    return AlbefModule(AlbefPretraining(Albef(config)), recipe), (images, tokens, torch.arange(pictures))
