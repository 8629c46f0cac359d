"""One spelling for metric names: no bare metric, the protocol is part of the name; and what a scorer returns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shared.core.errors import UserError


@dataclass(frozen=True)
class Scored:
    """`score` of the whole set and of each sample, in the order given; the one need not be the mean of the others."""

    score: float
    samples: list[float]


def metric_name(task: str, metric: str, protocol: str) -> str:
    """`metric_name("zeroshot", "top1", "openai-ensemble")` -> `zeroshot/top1@openai-ensemble`."""
    for part, value in (("task", task), ("metric", metric), ("protocol", protocol)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", value):
            raise UserError(
                f"metric name: {part} is {value!r}, use letters, digits and _ . + - only, and never nothing"
            )
    return f"{task}/{metric}@{protocol}"


def check_paired(task: str, predictions: Sequence, references: Sequence) -> None:
    """UserError where predictions and what they are scored against are not equally many, or none."""
    if len(predictions) != len(references):
        raise UserError(f"{task}: {len(predictions)} predictions, but references for {len(references)}: give as many")
    if not len(predictions):
        raise UserError(f"{task}: nothing to score, both lists are empty")
