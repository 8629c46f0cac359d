"""BLIP's objective (Sec. 3.2): contrast, matching and language modelling, added with equal weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from papers.blip.model import PretrainingOutput
from shared.losses.image_text import contrastive_to_targets, language_loss, matching_loss


class BlipLosses(NamedTuple):
    """Scalars; None where the objective is off."""

    itc: Tensor | None
    itm: Tensor | None
    lm: Tensor | None

    def total(self) -> Tensor:
        """Scalar."""
        return sum(loss for loss in self if loss is not None)


def blip_losses(output: PretrainingOutput, label_smoothing: float) -> BlipLosses:
    """The losses whose objectives were computed (Sec. 3.2); label_smoothing is LM's (0.1 in the official code)."""
    return BlipLosses(
        itc=None if output.student is None else contrastive_to_targets(output.student, output.targets),
        itm=None if output.matches is None else matching_loss(output.matches, output.mismatches),
        lm=None if output.logits is None else language_loss(output.logits, output.next_tokens, label_smoothing),
    )
