"""The keys of ALBEF's recipes (recipes/albef/*.yaml)."""

from __future__ import annotations

from dataclasses import dataclass

from shared.core.errors import UserError
from shared.data.recipe import SceneRecipe


@dataclass
class AlbefRecipe(SceneRecipe):
    """What ALBEF's recipes have beside every paper's."""

    weight_decay: float = 0.02
    beta2: float = 0.999
    eps: float = 1e-8
    last_learning_rate: float = 0.0  # where the cosine ends
    first_learning_rate: float = 0.0  # where the warm-up begins; 0: there, too
    temperature_rate: float = 1.0  # the temperature's learning rate, as a share of the others'
    alpha_ramp_steps: int = 0  # over which distillation grows from nothing: the first epoch's; 0: at once

    captions: int = 1  # a training picture has
    full: bool = False  # whether these name every thing with its colour and size

    vision_steps: int = 0  # of a classifier whose image encoder all arms start from, as the paper's from DeiT; 0: none
    vision_rate: float = 2e-3  # its learning rate
    pool: int = 64  # test pictures, and captions, that are compared with each other
    candidates: int = 16  # the best by ITC, which ITM ranks anew
    measure_at: int = 4  # points of the learning curves
    transfer_steps: int = 0  # of fine-tuning on VQA, entailment and NLVR2, each, once a run; 0: none

    def __post_init__(self) -> None:
        ends = self.first_learning_rate, self.last_learning_rate
        if self.alpha_ramp_steps < 0 or not 0 <= min(ends) <= max(ends) <= self.learning_rate:
            raise UserError(
                "recipe: alpha_ramp_steps must not be negative, first_ and last_learning_rate lie between 0 and "
                "learning_rate"
            )
        if not 0 <= self.temperature_rate <= 1:
            raise UserError(f"recipe: temperature_rate is {self.temperature_rate}, it must lie in 0..1")
        if (
            self.pool < 2
            or min(self.candidates, self.measure_at) < 1
            or min(self.transfer_steps, self.vision_steps) < 0
        ):
            raise UserError(
                "recipe: pool must be at least 2, candidates and measure_at at least 1, other steps not negative"
            )
