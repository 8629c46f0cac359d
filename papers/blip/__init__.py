"""BLIP: Li et al., Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation,
ICML 2022."""

from papers.blip.config import VARIANTS, BlipConfig, with_tokenizer
from papers.blip.losses import BlipLosses, blip_losses
from papers.blip.model import Blip, BlipPretraining, Objectives, PretrainingOutput
from papers.blip.recipe import BlipRecipe

__all__ = [
    "VARIANTS",
    "Blip",
    "BlipConfig",
    "BlipLosses",
    "BlipPretraining",
    "BlipRecipe",
    "Objectives",
    "PretrainingOutput",
    "blip_losses",
    "with_tokenizer",
]
