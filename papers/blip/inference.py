"""What `python -m papers caption` and `ask` need of BLIP: a model that writes of pictures, or answers about them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from papers.blip.config import PROMPT
from papers.blip.encode import GenerationConfig, device_of, rank_answers, see, tokens_of, write_answers, write_captions
from papers.blip.model import Blip
from papers.blip.tasks import BlipVqa
from papers.blip.text import clean_question
from papers.blip.weights import load_model
from shared.core.device import on_gpu_if_any
from shared.inference.predict import GenerationOptions
from shared.tokenizers.base import Tokenizer
from shared.weights.manifest import MANIFEST

USES = ("caption", "ask")
LONGEST_QUESTION = 50  # words, as the release keeps
LONGEST_CAPTION = 16  # tokens behind the prompt: 20 with "[DEC] a picture of", as the release
BEAMS = 3


def load_for_inference(
    variant: str, weights: Path | None, tokenizer: Path | None, use: str, manifest: Path = MANIFEST
) -> Captioner | Answerer:
    model, pieces = load_model(variant, weights, tokenizer, manifest, use)
    return (Captioner if use == "caption" else Answerer)(on_gpu_if_any(model), pieces)


class Captioner:
    """Captions behind the prompt, by beam search or sampled from the nucleus."""

    def __init__(self, model: Blip, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.image_size = model, tokenizer, model.config.image_size

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, 1 + N, D)."""
        return self.model.encode_image(images.to(device_of(self.model)))

    def prompt(self, text: str | None) -> str:
        text = PROMPT if text is None else text
        self._config(text).settings(self.tokenizer)  # what cannot be is told before a picture is read
        return text

    def generate(self, prefix: Tensor, prompts: Sequence[str], options: GenerationOptions) -> list[str]:
        """The prompt is the same for all pictures."""
        config = self._config(prompts[0], options.beams, options.nucleus)
        return write_captions(self.model, self.tokenizer, prefix, config, options.generator)

    def _config(self, prompt: str, beams: int | None = None, nucleus: float | None = None) -> GenerationConfig:
        prompt_length = len(GenerationConfig(prompt).prompt_tokens(self.tokenizer))
        longest = min(prompt_length + LONGEST_CAPTION, self.model.config.positions)
        return GenerationConfig(prompt, beams or BEAMS, nucleus, longest=longest)


class Answerer:
    """Answers to one question about every picture: in the model's own words, or the likeliest of a list."""

    def __init__(self, model: BlipVqa, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.image_size = model, tokenizer, model.config.image_size
        self.answer_tokens = lru_cache(maxsize=1)(lambda answers: tokens_of(tokenizer, answers, model.config))  # (A, L)

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, 1 + N, D)."""
        return see(self.model, images)

    def prompt(self, text: str | None) -> str:
        question = clean_question(text or "", LONGEST_QUESTION)
        self.tokenizer([question], self.model.config.context, truncate=False)  # a cut question is another question
        return question

    def generate(self, prefix: Tensor, prompts: Sequence[str], options: GenerationOptions) -> list[str]:
        return write_answers(self.model, self.tokenizer, prefix, prompts, options.beams or BEAMS)

    def score(self, prefix: Tensor, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """1 for the likeliest answer and 0 for the others (B, A): the ranking compares only a few of them as wholes."""
        listed = self.answer_tokens(tuple(answers))
        return F.one_hot(rank_answers(self.model, self.tokenizer, prefix, prompts, listed), len(answers))
