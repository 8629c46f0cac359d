"""One spelling for metric names: no bare metric, the protocol is part of the name."""

from __future__ import annotations

import re

from shared.errors import UserError


def metric_name(task: str, metric: str, protocol: str) -> str:
    """`metric_name("zeroshot", "top1", "openai-ensemble")` -> `zeroshot/top1@openai-ensemble`."""
    for part, value in (("task", task), ("metric", metric), ("protocol", protocol)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", value):
            raise UserError(
                f"metric name: {part} is {value!r}, use letters, digits and _ . + - only, and never nothing"
            )
    return f"{task}/{metric}@{protocol}"
