"""What `python -m papers zeroshot` needs of CLIP: a user's own pictures, scored against labels (Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from papers.clip.encode import classifier, image_features
from papers.clip.model import Clip
from papers.clip.weights import load_model
from shared.core.errors import UserError
from shared.core.text import shown
from shared.tokenizers.base import Tokenizer
from shared.weights.manifest import MANIFEST

USES = ("zeroshot",)


def load_for_inference(
    variant: str,
    weights: Path | None = None,
    tokenizer: Path | None = None,
    use: str = "zeroshot",
    manifest: Path = MANIFEST,
) -> ZeroShot:
    return ZeroShot(*load_model(variant, weights, tokenizer, manifest))


class ZeroShot:
    def __init__(self, model: Clip, tokenizer: Tokenizer):
        self.model, self.image_size = model, model.config.image_size

        @lru_cache(maxsize=1)
        def head(labels: tuple[str, ...], template: str) -> Tensor:  # (A, E)
            rows = tokenizer([template.replace("{}", label) for label in labels], model.config.context).tolist()
            first: dict[tuple[int, ...], str] = {}
            for label, row in zip(labels, rows, strict=True):
                if (other := first.setdefault(tuple(row), label)) != label:
                    raise UserError(
                        f"labels {shown(other, 40)!r} and {shown(label, 40)!r} are one to the model, which reads "
                        f"{model.config.context} tokens: shorten them, or the template"
                    )
            return classifier(model, tokenizer, labels, [template])

        self.head = head

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, E)."""
        return image_features(self.model, images)

    @torch.no_grad()
    def score(self, prefix: Tensor, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """The logit of each label in the prompt, which has one {} for it and is the same for all pictures. (B, A)"""
        return self.model.logit_scale.exp() * prefix @ self.head(tuple(answers), prompts[0]).T
