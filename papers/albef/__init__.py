"""ALBEF: Li et al., Align before Fuse: Vision and Language Representation Learning with Momentum Distillation, 2021."""

from papers.albef.config import VARIANTS, AlbefConfig, Objective
from papers.albef.losses import AlbefLosses, albef_losses
from papers.albef.model import Albef, AlbefPretraining, PretrainingOutput
from papers.albef.recipe import AlbefRecipe

__all__ = [
    "VARIANTS",
    "Albef",
    "AlbefConfig",
    "AlbefLosses",
    "AlbefPretraining",
    "AlbefRecipe",
    "Objective",
    "PretrainingOutput",
    "albef_losses",
]
