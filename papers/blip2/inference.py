"""What `python -m papers caption`, `ask` and `chat` need of BLIP-2: a frozen language model that is shown pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from papers.blip2.bundle import InferenceModel, load_inference_model
from papers.blip2.encode import ANSWERING, CAPTION, CAPTIONING, PROMPTS, GenerationConfig, device_of, tidy, write_behind
from shared.core.errors import UserError
from shared.data.padding import pad_rows
from shared.inference.predict import GenerationOptions
from shared.weights.manifest import MANIFEST

USES = ("caption", "ask", "chat")
TURN = "Question: {} Answer: {}."  # an answered question, before the next one (LAVIS, blip2_instructed_generation)
TALKING = GenerationConfig(longest=30)  # as LAVIS generates where nothing else is said
WRITTEN_OUT = re.compile(r"\s*question:.*answer:\s*", re.IGNORECASE | re.DOTALL)


def load_for_inference(
    variant: str,
    weights: Path | None = None,
    tokenizer: Path | None = None,
    use: str = "ask",
    manifest: Path = MANIFEST,
) -> Blip2Inference:
    kind = "caption" if use == "caption" else "ask"
    return Blip2Inference(load_inference_model(variant, weights, tokenizer, manifest, kind), use)


class Blip2Inference:
    """Captions, by beam search or sampled from the nucleus; answers in the language model's own words, or the likeliest
    of a list; a dialogue, written out by the language model's own template where the weights are released ones and it
    has one, else as the paper asks. Weights trained here learned captions behind no prompt, and short answers."""

    def __init__(self, parts: InferenceModel, use: str):
        self.parts, self.use = parts, use
        self.language, self.image_size = parts.model.language_model, parts.model.config.vision.image_size
        self.template = parts.language.chat if use == "chat" else None
        self.config = {
            "caption": replace(CAPTIONING, shortest=1) if parts.trained_here else CAPTIONING,
            "ask": ANSWERING,
            "chat": ANSWERING if parts.trained_here else TALKING,
        }[use]

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 -> the visual words (B, Q, W)."""
        features = self.parts.encoder(images.to(self.parts.encoder.device))
        return self.parts.model.prefix(features.to(device_of(self.parts.model)))

    # ---- prompts

    def prompt(self, text: str | None) -> str:
        """What a caption begins with; a question in the paper's prompt, unless it is written out as one: "Question: ...
        Answer:". UserError where it is too long."""
        if self.use == "caption":
            prompt = text if text is not None else "" if self.parts.trained_here else CAPTION
        else:
            prompt = (text or "").strip()
            prompt = prompt if WRITTEN_OUT.fullmatch(prompt) else PROMPTS[self.language.kind].format(prompt)
        self._check_room(self.tokens(prompt))
        return prompt

    def dialogue(self, turns: Sequence[tuple[str, str]], question: str) -> str:
        """Answered questions and the one that is asked."""
        if self.template is None:
            before = [TURN.format(bare(asked), answer) for asked, answer in turns]
            return " ".join([*before, PROMPTS["causal"].format(bare(question))])
        messages = []
        for asked, answer in turns:
            messages += [{"role": "user", "content": bare(asked)}, {"role": "assistant", "content": answer}]
        return self.template([*messages, {"role": "user", "content": bare(question)}])

    def tokens(self, prompt: str) -> list[int]:
        """A template writes out what stands before and behind a prompt itself."""
        tokenizer = self.parts.language.tokenizer
        return tokenizer.encode(prompt) if self.template else [*tokenizer.begun(prompt), *tokenizer.behind]

    @property
    def room(self) -> int:
        """Tokens that a prompt may have: of a causal model's context, what the queries and the answer leave."""
        answer = self.config.longest if self.language.kind == "causal" else 0
        return self.language.context - self.parts.model.config.queries - answer

    def fits(self, prompt: str) -> bool:
        return len(self.tokens(prompt)) <= self.room

    def _check_room(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self.room:
            raise UserError(
                f"a prompt of {len(tokens)} tokens: beside the picture and an answer the language model's context has "
                f"room for {self.room}: shorten it"
            )

    # ---- what the model says

    def generate(self, prefix: Tensor, prompts: Sequence[str], options: GenerationOptions) -> list[str]:
        """What follows each prompt behind its prefix (B, Q, W). UserError where one is too long."""
        rows = [self.tokens(prompt) for prompt in prompts]
        self._check_room(max(rows, key=len))
        config = replace(self.config, beams=options.beams or self.config.beams)
        settings = config.settings(self.parts.language.tokenizer.stop, self.language.kind)
        if options.nucleus is not None:
            settings = replace(settings, beams=1, sample=True, top_p=options.nucleus)
        tokens, mask = (part.to(prefix.device) for part in pad_rows(rows, self.parts.language.tokenizer.pad, left=True))
        texts = write_behind(
            self.parts.model, self.parts.language.tokenizer, prefix, tokens, mask, settings, options.generator
        )
        if self.use == "chat" and self.parts.trained_here:
            # it never saw an answer behind another, as TURN writes them: the first is its own
            texts = [text.split(". ")[0] for text in texts]
        return [tidy(text) for text in texts]

    @torch.inference_mode()
    def score(self, prefix: Tensor, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """The log-probability of each answer behind the prompt, its end token included. prefix (B, Q, W) -> (B, A)."""
        language, tokenizer, device = self.language, self.parts.language.tokenizer, prefix.device
        causal = language.kind == "causal"
        rows = [[*tokenizer.encode(f" {text}" if causal else text), tokenizer.stop[0]] for text in answers]
        targets, mask = (part.to(device) for part in pad_rows(rows, tokenizer.stop[0]))  # (A, U)
        scores = []
        for image, text in zip(prefix, prompts, strict=True):
            prompt = torch.tensor([self.tokens(text)] * len(rows), dtype=torch.long, device=device)  # (A, T)
            seen = torch.ones(len(rows), len(image) + prompt.shape[1], dtype=torch.bool, device=device)
            x = torch.cat([image.expand(len(rows), -1, -1), language.embed(prompt).to(image.dtype)], dim=1)
            if causal:  # the slot before says each token of the answer
                longer = torch.cat([x, language.embed(targets[:, :-1]).to(image.dtype)], dim=1)
                states = language.states(longer, torch.cat([seen, mask[:, :-1]], dim=1))[:, x.shape[1] - 1 :]
            else:
                states = language.states(x, seen, targets)
            logits = language.logits(states[mask])  # (P, V)
            log_probabilities = logits.gather(1, targets[mask][:, None])[:, 0] - logits.logsumexp(1)
            every = torch.zeros(targets.shape, device=device).masked_scatter(mask, log_probabilities)
            scores.append(every.sum(1))
        return torch.stack(scores)


def bare(question: str) -> str:
    """A question without the paper's prompt around it."""
    match = re.fullmatch(r"\s*question:(.*?)(?:short )?answer:\s*", question, re.IGNORECASE | re.DOTALL)
    return (match[1] if match else question).strip()
