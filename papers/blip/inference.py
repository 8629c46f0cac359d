"""What `python -m papers caption` and `ask` need of BLIP: a model that writes of pictures, or answers about them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from papers.blip.config import PROMPT
from papers.blip.encode import GenerationConfig, device_of, tokens_of
from papers.blip.model import Blip
from papers.blip.tasks import BlipVqa
from papers.blip.text import clean_question
from papers.blip.weights import load_model
from shared.core.device import on_gpu_if_any
from shared.inference.predict import GenerationOptions
from shared.nn.generation import GenerationSettings, generate
from shared.tokenizers.base import Tokenizer
from shared.weights.manifest import MANIFEST

USES = ("caption", "ask")
LONGEST_QUESTION = 50  # words, as the release keeps
LONGEST_CAPTION = 16  # tokens behind the prompt: 20 with "[DEC] a picture of", as the release
LONGEST_ANSWER = 9  # tokens: 10 with [DEC], as the official code counts (models/blip_vqa.py)
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
        start = torch.tensor(config.prompt_tokens(self.tokenizer), device=prefix.device).expand(len(prefix), -1)
        with torch.inference_mode():
            decoding = self.model.decoding(prefix)
        settings = config.settings(self.tokenizer)
        texts = generate(decoding, start, settings, generator=options.generator).tokens
        return [self.tokenizer.decode(tokens) for tokens in texts]

    def _config(self, prompt: str, beams: int | None = None, nucleus: float | None = None) -> GenerationConfig:
        prompt_length = len(GenerationConfig(prompt).prompt_tokens(self.tokenizer))
        longest = min(prompt_length + LONGEST_CAPTION, self.model.config.positions)
        return GenerationConfig(prompt, beams or BEAMS, nucleus, longest=longest)


class Answerer:
    """Answers to one question about every picture: in the model's own words, or the likeliest of a list."""

    def __init__(self, model: BlipVqa, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.image_size = model, tokenizer, model.config.image_size
        self.answer_tokens = lru_cache(maxsize=1)(lambda answers: tokens_of(tokenizer, answers, model.config))  # (A, L)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, 1 + N, D)."""
        return self.model.encode_image(images.to(device_of(self.model)))

    def prompt(self, text: str | None) -> str:
        question = clean_question(text or "", LONGEST_QUESTION)
        self.tokenizer([question], self.model.config.context, truncate=False)  # a cut question is another question
        return question

    @torch.inference_mode()
    def generate(self, prefix: Tensor, prompts: Sequence[str], options: GenerationOptions) -> list[str]:
        questions = self._questions(prefix, prompts)
        decoding = self.model.decoding(self.model.ask(questions, prefix), questions)
        start = torch.full_like(questions[:, :1], self.tokenizer.decode_start)
        settings = GenerationSettings((self.tokenizer.end,), LONGEST_ANSWER, beams=options.beams or BEAMS)
        return [self.tokenizer.decode(tokens) for tokens in generate(decoding, start, settings).tokens]

    @torch.inference_mode()
    def score(self, prefix: Tensor, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """1 for the likeliest answer and 0 for the others (B, A): the ranking compares only a few of them as wholes."""
        questions = self._questions(prefix, prompts)
        ranked = self.answer_tokens(tuple(answers)).to(prefix.device)
        best = self.model.rank(self.model.ask(questions, prefix), questions, ranked)
        return F.one_hot(best, len(answers))

    def _questions(self, prefix: Tensor, prompts: Sequence[str]) -> Tensor:
        return tokens_of(self.tokenizer, prompts, self.model.config).to(prefix.device)
