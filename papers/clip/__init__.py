"""CLIP: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021."""

from papers.clip.config import VARIANTS, ClipConfig
from papers.clip.losses import clip_loss
from papers.clip.model import Clip, ClipOutput
from papers.clip.recipe import ClipRecipe

__all__ = ["VARIANTS", "Clip", "ClipConfig", "ClipOutput", "ClipRecipe", "clip_loss"]
