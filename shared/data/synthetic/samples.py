"""The samples that tasks are made of: an image-text pair, a question, a statement, an episode, a dialogue, a puzzle.

Every `image` is an array (H, W, 3) uint8; every sample has an `id` that is stable across runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class Pair:
    """A picture and one caption of it."""

    id: str
    image: ndarray
    caption: str


@dataclass(frozen=True, eq=False)
class Question:
    """A question about a picture (VQA); `choices` holds the answer and its distractors.

    rationale: the sentence from which the answer follows, where the task has one (chain of thought).
    """

    id: str
    image: ndarray
    question: str
    answer: str
    choices: tuple[str, ...]
    rationale: str = ""


@dataclass(frozen=True, eq=False)
class Statement:
    """A sentence that is true or false of one picture or of two (NLVR2: left, right)."""

    id: str
    images: tuple[ndarray, ...]
    text: str
    label: bool


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A sentence about a picture (visual entailment); `verdict` is entailment, neutral or contradiction."""

    id: str
    image: ndarray
    text: str
    verdict: str


@dataclass(frozen=True, eq=False)
class Episode:
    """Few-shot learning in context: `shots` are (image, text); the answer completes `query_text`."""

    id: str
    shots: tuple[tuple[ndarray, str], ...]
    query_image: ndarray
    query_text: str
    answer: str


@dataclass(frozen=True, eq=False)
class Dialogue:
    """A conversation about a picture: `turns` are (question, answer)."""

    id: str
    image: ndarray
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Puzzle:
    """A matrix puzzle in the manner of Raven: eight panels row by row, six candidates for the ninth."""

    id: str
    panels: tuple[ndarray, ...]
    candidates: tuple[ndarray, ...]
    answer: int
    rules: tuple[str, ...]
