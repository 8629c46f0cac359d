"""What `python -m papers caption` and `ask` need of BLIP: a model that writes of pictures, or answers about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from papers.blip.config import PROMPT
from papers.blip.encode import GenerationConfig, rank_answers, tokens_of, write, write_answers
from papers.blip.text import clean_question
from papers.blip.weights import load_model
from shared.core.device import on_gpu_if_any
from shared.core.errors import UserError
from shared.inference.predict import Task
from shared.weights.manifest import MANIFEST

LONGEST_QUESTION = 50  # words, as the release keeps
LONGEST_CAPTION = 16  # tokens behind the prompt: 20 with "[DEC] a picture of", as the release


def captioner(
    variant: str,
    weights: Path | None = None,
    tokenizer: Path | None = None,
    *,
    beams: int = 3,
    nucleus: float | None = None,
    seed: int = 0,
    prompt: str | None = None,
    manifest: Path = MANIFEST,
) -> Task:
    """Captions behind the prompt, by beam search or sampled from the nucleus."""
    model, words = load_model(variant, weights, tokenizer, manifest, "caption")
    model = on_gpu_if_any(model)
    how = GenerationConfig(PROMPT if prompt is None else prompt, beams, nucleus, seed=seed)
    given = len(how.prompt_tokens(words))
    how = replace(how, longest=min(given + LONGEST_CAPTION, model.config.positions))
    how.settings(words)  # what cannot be is told before a picture is read
    generator = torch.Generator().manual_seed(seed)

    def answer(images: Tensor) -> list[str]:
        return write(model, words, images, how, generator=generator)

    return Task(answer, model.config.image_size, whole=True)


def answerer(
    variant: str,
    question: str,
    weights: Path | None = None,
    tokenizer: Path | None = None,
    *,
    answers: Sequence[str] | None = None,
    beams: int = 3,
    manifest: Path = MANIFEST,
) -> Task:
    """Answers to one question about every picture: in the model's own words, or the likeliest of `answers`."""
    if not question.strip():
        raise UserError("the question is empty; ask something, in quotes")
    model, words = load_model(variant, weights, tokenizer, manifest, "ask")
    model = on_gpu_if_any(model)
    asked = clean_question(question, LONGEST_QUESTION)
    words([asked], model.config.context, truncate=False)  # a cut question is another question
    ranked = tokens_of(words, answers, model.config) if answers else None

    def answer(images: Tensor) -> list[str]:
        asks = [asked] * len(images)
        if ranked is None:
            return write_answers(model, words, images, asks, beams)
        return [answers[place] for place in rank_answers(model, words, images, asks, ranked)]

    return Task(answer, model.config.image_size, whole=True)
