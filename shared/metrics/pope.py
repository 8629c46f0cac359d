"""POPE (Li et al. 2023): is this object in the picture, yes or no. How a reply is read decides the score.

`official`  AoiDragon/POPE's evaluate.py, LLaVA's too: up to the first period, without commas, a reply with the word
            No, no or not is a no, and whatever else, even nothing, is a yes;
`strict`    the reply must begin with yes or no; any other counts as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from shared.core.errors import UserError
from shared.metrics.names import Scored, check_paired, metric_name

PROTOCOLS = ("official", "strict")


def read_official(reply: str) -> str:
    """`yes` or `no`: there is nothing that the official scorer cannot read."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def read_strict(reply: str) -> str | None:
    """`yes` or `no` where that is the first word, in any case, and the other is not offered beside it; or None."""
    first = re.match(r"[\W_]*(yes|no)(?!['’]?[^\W_])", reply.lower())
    if first is None:
        return None
    beside = re.match(r"[\W_]*(?:(?:or|and)\b[\W_]*)?(yes|no)(?![^\W_])", reply.lower()[first.end() :])
    return None if beside and beside[1] != first[1] else first[1]


def pope(replies: Sequence[str], labels: Sequence[str], protocol: str = "official") -> dict[str, float]:
    """Named `pope/acc@<protocol>`, likewise `precision`, `recall`, `f1`, `yes_ratio` and `parse_failures`, in 0..1.

    Labels are `yes` (the positive class) or `no`. `parse_failures` is the share that the strict reader cannot read,
    under both protocols: the official one calls them yes. Precision without a yes among the replies, recall without
    one among the labels, and the F1 of two zeros are 0.
    """
    _check(replies, labels, protocol)
    read = [_READERS[protocol](reply) for reply in replies]
    hits = sum(answer == label == "yes" for answer, label in zip(read, labels, strict=True))
    said, true = read.count("yes"), list(labels).count("yes")
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    found = {
        "acc": sum(answer == label for answer, label in zip(read, labels, strict=True)) / len(replies),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": said / len(replies),
        "parse_failures": sum(read_strict(reply) is None for reply in replies) / len(replies),
    }
    return {metric_name("pope", metric, protocol): value for metric, value in found.items()}


def pope_accuracy(replies: Sequence[str], labels: Sequence[str], protocol: str = "official") -> Scored:
    """`pope/acc@<protocol>` with each reply's own 0 or 1."""
    _check(replies, labels, protocol)
    samples = [float(_READERS[protocol](reply) == label) for reply, label in zip(replies, labels, strict=True)]
    return Scored(sum(samples) / len(samples), samples)


_READERS = {"official": read_official, "strict": read_strict}


def _check(replies: Sequence[str], labels: Sequence[str], protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise UserError(f"POPE protocol is {protocol!r}, use one of {', '.join(PROTOCOLS)}")
    check_paired("POPE", replies, labels)  # the official script pairs by position and drops what is left over
    for place, label in enumerate(labels):
        if label not in ("yes", "no"):
            raise UserError(f"POPE: label {place} is {label!r}, use yes or no")
