"""BLIP's training step: pictures, token ids and the pictures' ids; ITC, ITM and LM, or some of them (Sec. 3.2, 3.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning
import torch
from torch import Tensor

from papers.blip.config import VARIANTS
from papers.blip.losses import blip_losses
from papers.blip.model import TEMPERATURES, BlipPretraining, Objectives
from papers.blip.recipe import BlipRecipe
from shared.core.errors import UserError
from shared.core.recipe import require_negatives
from shared.data.padding import noise_texts, trim_padding
from shared.nn.blocks import set_recompute
from shared.nn.distributed import world
from shared.training.callbacks import log_losses
from shared.training.optim import adamw, warmup_cosine
from shared.training.strategies import whole

PRETRAINING = Objectives()
CAPTIONER = Objectives(itc=False, itm=False)  # CapFilt's two fine-tunings
FILTER = Objectives(lm=False)


class BlipModule(lightning.LightningModule):
    """Trains on (images uint8 (B, 3, H, W), tokens (B, T), ids (B,)) batches.

    prompt: how many leading tokens of each text are given and not learned by LM.
    """

    model: BlipPretraining

    def __init__(
        self, model: BlipPretraining, recipe: BlipRecipe, objectives: Objectives = PRETRAINING, prompt: int = 0
    ):
        super().__init__()
        if objectives.itm and not objectives.itc:
            raise ValueError("ITM draws its negatives by ITC's similarities: train both")
        if objectives.itc:
            require_negatives(recipe)
        if recipe.strategy.startswith("zero3"):
            raise UserError("recipe: strategy zero3 cuts the weights that BLIP averages; take ddp, zero1 or zero2")
        if recipe.accumulate > 1:
            raise UserError("recipe: accumulate would move momentum copies and queue with each part; take more devices")
        self.model, self.recipe, self.objectives, self.prompt = model, recipe, objectives, prompt
        trained = model.trained_by(objectives)
        for parameter in (*model.blip.parameters(), model.temperature):
            parameter.requires_grad_(parameter in trained)
        set_recompute(model.blip, recipe.recompute)

    def configure_model(self) -> None:
        if self.recipe.compile:
            self.model.compile()

    def configure_optimizers(self) -> Any:
        """AdamW over all trained parameters alike: nothing is exempt from weight decay (official code, pretrain.py)."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return adamw(trained, self.recipe, lambda step: learning_rate_share(step, self.recipe))

    def on_train_batch_start(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        if self.objectives.itc:
            self.model.queue.check(len(batch[0]) * world()[1])

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        images, tokens, ids = batch
        self.clamp_temperature()
        if not self.recipe.compile:  # which wants one shape
            tokens = trim_padding(tokens, self.model.config.pad_token)
        partners, alpha = ids if self.recipe.by_picture else None, self.alpha(self.global_step)
        output = self.model(images, tokens, partners, alpha, self.objectives, self.prompt)
        losses = blip_losses(output, self.model.config.label_smoothing)
        beside = {"temperature": output.temperature} if self.objectives.itc else {}
        return log_losses(self, losses._asdict(), losses.total(), **beside)

    def alpha(self, step: int) -> float:
        """The teacher's share, ramped linearly from 0 (0-based step)."""
        ramp = self.recipe.alpha_ramp
        return self.recipe.alpha * (min(1.0, step / ramp) if ramp else 1.0)

    def clamp_temperature(self) -> None:
        """Before a step, not after, as the official code: what is saved may lie outside by one step."""
        with torch.no_grad(), whole(self.model.temperature) as (temperature,):
            temperature.clamp_(*TEMPERATURES)


def learning_rate_share(step: int, recipe: BlipRecipe) -> float:
    """The share of the peak learning rate at a step (0-based).

    Warm-up is linear, then the rate falls by epochs, or along a cosine where there is no decay; it never lies below
    min_learning_rate, from which the official warm-up starts too (utils.py, configs/pretrain.yaml).
    """
    if step < recipe.warmup_steps or not recipe.decay:
        share = warmup_cosine(step, recipe)
    else:
        share = recipe.decay ** (step * recipe.batch // recipe.pairs)
    return max(share, recipe.min_learning_rate / recipe.learning_rate)


def example(pictures: int) -> tuple[BlipModule, tuple[Tensor, ...]]:
    """A tiny module and a batch that fits it: what the contract tests run of every paper.

    Learned by heart in 60 steps, so without what forbids that: smoothed labels, a teacher that lags by 200 steps and
    its soft targets; and the queue is one batch long, since each further copy of a picture in it is one more partner.
    """
    config = replace(VARIANTS["blip-tiny"](), label_smoothing=0.0, momentum=0.5, queue=8, temperature=0.3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (pictures, 3, config.image_size, config.image_size), generator=generator).byte()
    ids = config.start_token, config.end_token, config.pad_token
    tokens = noise_texts(pictures, config.context, *ids, generator)
    recipe = BlipRecipe(
        model="blip-tiny", steps=60, learning_rate=1e-2, warmup_steps=10, alpha=0.0, by_picture=True
    )  # fmt: skip
    return BlipModule(BlipPretraining(config), recipe), (images, tokens, torch.arange(pictures))
