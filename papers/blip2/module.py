"""BLIP-2's training steps: ITC, ITM and ITG on the Q-Former (Sec. 3.2), then language modelling through the projector
(Sec. 3.3). Frozen parts run beside the module and have neither gradient nor optimizer state, which is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from papers.blip2.config import VARIANTS
from papers.blip2.losses import stage1_losses, stage2_loss
from papers.blip2.model import Blip2, Blip2Qformer, Objectives, Prompt
from papers.blip2.recipe import Blip2Recipe
from shared.core.errors import UserError
from shared.core.recipe import require_negatives
from shared.data.padding import noise_texts, trim_masked, trim_padding
from shared.nn.blocks import set_recompute
from shared.nn.frozen import assert_only_trained
from shared.training.callbacks import log_losses
from shared.training.optim import decay_groups, optimizer_with_schedule

EVERYTHING = Objectives()
WITHOUT_ITG = Objectives(itg=False)


class BridgeModule(lightning.LightningModule):
    """What both stages have in common.

    encoder: runs on the pictures of each batch; None: the batches hold its features. beside: parts that are trained
    too, where the whole is trained instead of the bridge alone.
    """

    def __init__(
        self,
        model: Blip2Qformer | Blip2,
        recipe: Blip2Recipe,
        encoder: nn.Module | None = None,
        beside: Sequence[nn.Module] = (),
    ):
        super().__init__()
        self.model, self.recipe = model, recipe
        self.encoder = encoder
        self.beside = nn.ModuleList(beside)
        set_recompute(model.qformer, recipe.recompute)

    def configure_model(self) -> None:
        if self.recipe.compile:
            self.model.compile()

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained; matrices and queries decay, vectors do not (LAVIS, Blip2Base.get_optimizer_params).
        Linear warm-up, then a cosine that ends at min_learning_rate (Sec. 3.4).

        Unlike there the temperature, a number without an axis, does not decay either: it would be drawn towards
        dividing by nothing.
        """
        groups = decay_groups(self, self.recipe.weight_decay)
        configured = optimizer_with_schedule(groups, self.recipe, end_at=self.recipe.min_learning_rate)
        assert_only_trained(configured["optimizer"], self)
        return configured

    def features(self, seen: Tensor) -> Tensor:
        """Frozen features as they come, or of the pictures (B, 3, H, W)."""
        return seen if self.encoder is None else self.encoder(seen)


class Stage1Module(BridgeModule):
    """Trains on (features (B, S, C) or pictures uint8 (B, 3, H, W), tokens (B, T), ids (B,)) batches."""

    model: Blip2Qformer

    def __init__(
        self,
        model: Blip2Qformer,
        recipe: Blip2Recipe,
        encoder: nn.Module | None = None,
        objectives: Objectives = EVERYTHING,
    ):
        super().__init__(model, recipe, encoder)
        if objectives.itm and not objectives.itc:
            raise ValueError("ITM draws its negatives by ITC's similarities: train both")
        require_negatives(recipe)
        if recipe.accumulate > 1:
            raise UserError("recipe: accumulate would leave ITC the fewer negatives of a part; take more devices")
        self.objectives = objectives
        trained = model.trained_by(objectives)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        seen, tokens, ids = batch
        if not self.recipe.compile:  # which wants one shape
            tokens = trim_padding(tokens, self.model.config.pad_token)
        output = self.model(self.features(seen), tokens, ids if self.recipe.by_picture else None, self.objectives)
        losses = stage1_losses(output, self.model.config.label_smoothing)
        beside = {"temperature": output.temperature} if self.objectives.itc else {}
        return log_losses(self, losses._asdict(), losses.total(), **beside)


class Stage2Module(BridgeModule):
    """Trains on (features or pictures, tokens (B, T), attention_mask (B, T), prompt_length (B,)) batches, texts as
    PromptTokenizer encodes them; with a seq2seq model, in the place of prompt_length, the prompts (B, A) that its
    encoder reads, and their mask (B, A)."""

    model: Blip2

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        seen, tokens, attention_mask, *given = batch
        if not self.recipe.compile:
            tokens, attention_mask = trim_masked(tokens, attention_mask)
        prompt: Tensor | Prompt = given[0]
        if self.model.language_model.kind == "seq2seq":
            prompt = Prompt(*(given if self.recipe.compile else trim_masked(*given)))
        loss = stage2_loss(self.model(self.features(seen), tokens, attention_mask, prompt))
        self.log("loss", loss.detach())
        return loss


class WordsModule(BridgeModule):
    """Trains on (features (B, S, C), targets (B, Q, W)) batches: the visual words become those of the targets, which
    the language model's own table of embeddings holds. Mean squared error over the targets' variance."""

    model: Blip2

    def __init__(self, model: Blip2, recipe: Blip2Recipe, variance: float):
        super().__init__(model, recipe)
        self.variance = variance

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        seen, targets = batch
        loss = (self.model.prefix(seen).float() - targets).square().mean() / self.variance
        self.log("loss", loss.detach())
        return loss


class FrozenWatch(Callback):
    """Counts what frozen parts cost beside their weights, after every backward pass: bytes of gradients and of
    optimizer state. ValueError where it is not nothing."""

    def __init__(self, frozen: Sequence[nn.Module]):
        self.parameters = [p for part in frozen for p in unwrapped(part).parameters()]
        self.measured = {"frozen_parameters": sum(p.numel() for p in self.parameters)}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        gradients = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
        states = sum(
            value.nbytes
            for p in self.parameters
            for value in optimizer.state.get(p, {}).values()
            if torch.is_tensor(value)
        )
        self.measured |= {"frozen_gradient_bytes": gradients, "frozen_state_bytes": states}
        asks = sum(p.requires_grad for p in self.parameters)
        if gradients or states or asks:
            raise ValueError(f"frozen parts: {gradients} B of gradients, {states} B of state, {asks} ask for gradients")


def unwrapped(part: nn.Module) -> nn.Module:
    """What a `Frozen` keeps out of sight."""
    return part.__dict__.get("module", part)


def example(pictures: int) -> tuple[Stage1Module, tuple[Tensor, ...]]:
    """A tiny module of stage 1 and a batch that fits it: what the contract tests run of every paper.

    Learned by heart in 60 steps, so without what forbids that: smoothed labels.
    """
    config = replace(VARIANTS["blip2-tiny"](), label_smoothing=0.0)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(pictures, config.vision.tokens, config.vision.width, generator=generator)
    ids = config.start_token, config.end_token, config.pad_token
    tokens = noise_texts(pictures, config.context, *ids, generator)
    recipe = Blip2Recipe(paper="blip2", model="blip2-tiny", steps=60, learning_rate=5e-3, warmup_steps=10)
    return Stage1Module(Blip2Qformer(config), recipe), (features, tokens, torch.arange(pictures))
