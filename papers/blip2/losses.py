"""BLIP-2's objectives: contrast, matching and generation with equal weight (Sec. 3.2); then the language model's own
(Sec. 3.3)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from papers.blip2.model import Stage1Output, Stage2Output
from shared.losses.image_text import Similarities, contrastive_to_targets, language_loss, matching_loss, total_of


class Stage1Losses(NamedTuple):
    """Scalars; None where the objective is off."""

    itc: Tensor | None
    itm: Tensor | None
    itg: Tensor | None

    def total(self) -> Tensor:
        """Scalar."""
        return total_of(self)


def stage1_losses(output: Stage1Output, smoothing: float = 0.1) -> Stage1Losses:
    """The losses whose objectives were computed. smoothing is that of ITC and ITG; ITM has none (official code)."""
    itc = itm = itg = None
    if output.similarities is not None and output.targets is not None:
        targets = (1 - smoothing) * output.targets + smoothing / output.targets.shape[1]
        itc = contrastive_to_targets(output.similarities, Similarities(targets, targets))
    if output.matches is not None and output.mismatches is not None:
        itm = matching_loss(output.matches, output.mismatches)
    if output.logits is not None and output.next_tokens is not None:
        itg = language_loss(output.logits, output.next_tokens, smoothing)
    return Stage1Losses(itc, itm, itg)


def stage2_loss(output: Stage2Output) -> Tensor:
    """Next-token cross-entropy, mean over the learned tokens, zero without any. Scalar."""
    return language_loss(output.logits, output.next_tokens, smoothing=0.0)
