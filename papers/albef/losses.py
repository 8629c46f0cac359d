"""ALBEF's objective (Eq. 1 to 7): ITC with a teacher's soft targets, ITM with negatives of the batch, distilled MLM."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from papers.albef.config import Objective
from papers.albef.model import PretrainingOutput
from shared.losses.image_text import (
    contrastive_to_targets,
    distilled_targets,
    distilled_token_loss,
    matching_loss,
    own_pair_targets,
    total_of,
)


class AlbefLosses(NamedTuple):
    """Scalars; a part that the objective leaves out is None."""

    itc: Tensor | None
    itm: Tensor
    mlm: Tensor | None

    @property
    def total(self) -> Tensor:
        """Eq. 5: the sum, each with weight 1."""
        return total_of(self)


def albef_losses(output: PretrainingOutput, objective: Objective, ramp: float = 1.0) -> AlbefLosses:
    """ramp (0 to 1): how far distillation has grown in the first epoch; it scales both alphas."""
    itc = mlm = None
    if objective.itc:
        assert output.similarities is not None and output.teacher_similarities is not None, "forward had no ITC"
        rows, columns = output.similarities.image_to_text.shape
        own = own_pair_targets(rows, columns, output.positives.device)
        targets = distilled_targets(own, output.teacher_similarities, ramp * objective.alpha_itc)
        itc = contrastive_to_targets(output.similarities, targets)
    if objective.mlm:
        assert output.words is not None and output.labels is not None, "forward had no MLM"
        mlm = distilled_token_loss(output.words, output.labels, output.teacher_words, ramp * objective.alpha_mlm)
    return AlbefLosses(itc, matching_loss(output.positives, output.negatives), mlm)
