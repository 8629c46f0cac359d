"""BLIP's objective (Sec. 3.2): contrast, matching and language modelling, added with equal weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from papers.blip.model import PretrainingOutput
from shared.losses.image_text import contrastive_to_targets, language_loss, matching_loss, total_of


class BlipLosses(NamedTuple):
    """Scalars; None where the objective is off."""

    itc: Tensor | None
    itm: Tensor | None
    lm: Tensor | None

    def total(self) -> Tensor:
        """Scalar."""
        return total_of(self)


def blip_losses(output: PretrainingOutput, label_smoothing: float) -> BlipLosses:
    """The losses whose objectives were computed (Sec. 3.2); label_smoothing is LM's (0.1 in the official code)."""
    itc = itm = lm = None
    if output.student is not None and output.targets is not None:
        itc = contrastive_to_targets(output.student, output.targets)
    if output.matches is not None and output.mismatches is not None:
        itm = matching_loss(output.matches, output.mismatches)
    if output.logits is not None and output.next_tokens is not None:
        lm = language_loss(output.logits, output.next_tokens, label_smoothing)
    return BlipLosses(itc, itm, lm)
