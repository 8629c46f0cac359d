"""CLIP's training step: a batch of pictures and token ids, model, contrastive loss, clamp (Sec. 2.3 to 2.5)."""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from papers.clip.config import VARIANTS
from papers.clip.losses import clip_loss
from papers.clip.model import LARGEST_LOGIT_SCALE, Clip
from papers.clip.recipe import ClipRecipe
from shared.core.recipe import Recipe, require_negatives
from shared.nn.blocks import set_recompute
from shared.training.optim import decay_groups, optimizer_with_schedule
from shared.training.strategies import whole


class PretrainingModule(lightning.LightningModule):
    """Any model trained on (images uint8 (B, 3, H, W), tokens (B, T), labels (B,)) batches; `loss` is what differs."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        super().__init__()
        self.model, self.recipe = model, recipe
        set_recompute(model, recipe.recompute)

    def configure_model(self) -> None:
        if self.recipe.compile:
            self.model.compile()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return optimizer_with_schedule(decay_groups(self.model, self.recipe.weight_decay), self.recipe)

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        loss = self.loss(*batch)
        self.log("loss", loss.detach())
        return loss

    def loss(self, images: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class ClipModule(PretrainingModule):
    """The paper's own objective."""

    model: Clip

    def __init__(self, model: nn.Module, recipe: Recipe):
        require_negatives(recipe)
        super().__init__(model, recipe)

    def loss(self, images: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        output = self.model(images, tokens)
        self.log("logit_scale", output.logit_scale.detach())
        return clip_loss(output)

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        with whole(self.model.logit_scale) as (logit_scale,):  # ZeRO keeps the trained copy elsewhere
            logit_scale.clamp_(0, LARGEST_LOGIT_SCALE)


def example(pictures: int) -> tuple[ClipModule, tuple[Tensor, ...]]:
    """A tiny module and a batch that fits it: what the contract tests run of every paper."""
    config = VARIANTS["clip-tiny"]()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (pictures, 3, config.image_size, config.image_size), generator=generator).byte()
    tokens = torch.randint(1, config.end_token - 1, (pictures, config.context), generator=generator)
    ends = torch.randint(2, config.context, (pictures,), generator=generator)
    tokens[torch.arange(pictures), ends] = config.end_token
    recipe = ClipRecipe(model="clip-tiny", steps=60, learning_rate=2e-3, warmup_steps=5)
    return ClipModule(Clip(config), recipe), (images, tokens, torch.full((pictures,), -1))
