"""Reported against reproduced: the rows of one reproduction, written as JSON, Markdown and one offline HTML page.
A row stands on one rung of the evidence ladder, and no table here ever mixes two. Nothing not run is ever filled in.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# rung -> (its question, what a good row proves, what it leaves open)
RUNGS = {
    "structure": (
        "Is it the same network?",
        "A match proves that the full-size model has the parameters, token counts and FLOPs that the paper prints",
        "it does not prove that the parts are wired as in the paper.",
    ),
    "parity": (
        "Does it compute the same function?",
        "A match proves that outputs, loss and gradients equal an independent implementation's on random weights",
        "it says nothing of training, of data or of released weights.",
    ),
    "claims": (
        "Does the paper's argument hold?",
        "A verdict tests the direction of the paper's own ablation, re-run small with equal budgets and paired seeds",
        "it does not reproduce the paper's numbers, which took far more data and compute.",
    ),
    "metrics": (
        "Do the released weights score what was printed?",
        "A match proves that the released weights reach the printed number under the paper's protocol, in this code",
        "it does not prove that training them again would lead there.",
    ),
}
VERDICTS = {
    "structure": ("match", "mismatch", "not run"),
    "parity": ("match", "mismatch", "not run"),
    "claims": ("reproduced", "inconclusive", "contradicted", "not run"),
    "metrics": ("match", "mismatch", "not run"),
}
LONGEST = 4000  # characters of one text that are shown


@dataclass(frozen=True)
class Row:
    """One line of evidence. None means: does not apply. `need` is the exact command and files a `not run` row asks for.

    `reproduced` of a claim is the effect, with its interval `low`, `high`; `tolerance` is the bound, or the rule in
    words; `seeds` is how many, or which.
    """

    rung: str
    id: str
    what: str
    reported: float | str | None = None
    reproduced: float | str | None = None
    low: float | None = None
    high: float | None = None
    tolerance: float | str | None = None
    seeds: int | list[int] | None = None
    verdict: str = "not run"
    source: str = ""
    need: str = ""

    def __post_init__(self) -> None:
        if self.rung not in RUNGS:
            raise ValueError(f"row {self.id!r}: unknown rung {self.rung!r}, use one of {', '.join(RUNGS)}")
        if self.verdict not in VERDICTS[self.rung]:
            allowed = ", ".join(VERDICTS[self.rung])
            raise ValueError(f"row {self.id!r}: verdict {self.verdict!r} on rung {self.rung}, use one of {allowed}")
        if self.verdict == "not run":
            if not self.need:
                raise ValueError(f"row {self.id!r} was not run, but does not say what it needs")
            if any(value is not None for value in (self.reproduced, self.low, self.high)):
                raise ValueError(f"row {self.id!r} was not run, but carries a reproduced value")
        elif self.reproduced is None:
            raise ValueError(f"row {self.id!r}: verdict {self.verdict!r} without a reproduced value")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"row {self.id!r}: an interval needs both low and high")


@dataclass(frozen=True)
class Figure:
    """`image` is a PNG, as bytes or as the path of one."""

    name: str
    caption: str
    image: bytes | Path


@dataclass(frozen=True)
class Ranked:
    text: str
    score: float
    correct: bool


@dataclass(frozen=True)
class Sample:
    """A retrieval example: a PNG, what was asked, and the texts best first."""

    image: bytes
    query: str
    ranked: list[Ranked]


@dataclass
class Report:
    """`data` holds name, digest, coverage, artifacts (of other papers), credits, note, run (how it went); `started` is
    ISO 8601; `seconds` the whole run's duration."""

    paper: str
    title: str
    scale: str
    commit: str | None
    dirty: bool | None
    data: dict[str, Any]
    machine: dict[str, Any]
    seconds: float
    started: str
    rows: list[Row]
    figures: list[Figure] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    command: str = ""
    recipe: str = ""
    environment: str = ""

    def __post_init__(self) -> None:
        if self.scale == "smoke":
            for row in self.rows:
                if row.rung in ("claims", "metrics") and row.verdict != "not run":
                    raise ValueError(f"row {row.id!r}: scale smoke proves that the pipeline runs and yields no verdict")

    def of(self, rung: str) -> list[Row]:
        return [row for row in self.rows if row.rung == rung]

    def counts(self, rung: str) -> dict[str, int]:
        """{verdict: how many}, in the rung's order, only those that occur."""
        seen = Counter(row.verdict for row in self.of(rung))
        return {verdict: seen[verdict] for verdict in VERDICTS[rung] if seen[verdict]}


def _figure_file(figure: Figure, place: int) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", figure.name.lower()).strip("-") or "figure"
    return f"{place + 1:02d}-{slug[:60]}.png"


def _clean(text: str) -> str:
    """One line without control characters, and not endless: a caption may carry terminal escapes, or be a megabyte."""
    text = str(text)
    more = f" ... ({len(text):,} characters)" if len(text) > LONGEST else ""
    return "".join(c if c.isprintable() else " " for c in text[:LONGEST]) + more


def _png(figure: Figure) -> bytes:
    return figure.image if isinstance(figure.image, bytes) else Path(figure.image).read_bytes()
