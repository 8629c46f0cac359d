"""BLIP-2: Li et al., Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models,
ICML 2023."""

from papers.blip2.config import VARIANTS, Blip2Config, LanguageConfig, VisionConfig, with_tokenizer
from papers.blip2.losses import Stage1Losses, stage1_losses, stage2_loss
from papers.blip2.model import Blip2, Blip2Qformer, Objectives, Prompt, Stage1Output, Stage2Output

__all__ = [
    "VARIANTS",
    "Blip2",
    "Blip2Config",
    "Blip2Qformer",
    "LanguageConfig",
    "Objectives",
    "Prompt",
    "Stage1Losses",
    "Stage1Output",
    "Stage2Output",
    "VisionConfig",
    "stage1_losses",
    "stage2_loss",
    "with_tokenizer",
]
