"""How BLIP-2 is measured and used: zero-shot VQA (Sec. 4.1), captions (Sec. 4.2), retrieval with re-ranking (Sec. 4.4),
the hallucination probe POPE, examples in context (Sec. 5). Pictures come as frozen features (B, S, C).

Axes: I pictures, T texts, Q queries, L tokens, D width, E joint space, W width of the language model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from papers.blip2.model import Blip2, Blip2Qformer
from papers.blip2.text import PromptTokenizer
from shared.core.device import device_of
from shared.metrics import exact_match, pope, rerank_both
from shared.nn.generation import RELEASED_BEAMS, GenerationSettings, generate

BATCH = 128
PROMPTS = {"causal": "Question: {} Answer:", "seq2seq": "Question: {} Short answer:"}  # Sec. 4.1
CAPTION = "a photo of"  # Sec. 4.2


# ---- retrieval


class Encoded(NamedTuple):
    """Pictures as contrast takes them and as matching does, on the CPU."""

    unit: Tensor  # (I, Q, E), L2-normalised
    features: Tensor  # (I, S, C), frozen


@torch.inference_mode()
def encoded(model: Blip2Qformer, features: Tensor, batch: int = BATCH) -> Encoded:
    device = device_of(model)
    unit = [model.image_features(some.to(device))[1].float().cpu() for some in features.split(batch)]
    return Encoded(torch.cat(unit), features)


@torch.inference_mode()
def text_features(model: Blip2Qformer, tokens: Tensor, batch: int = 2 * BATCH) -> Tensor:
    """(T, L) -> (T, E), L2-normalised, on the CPU."""
    device = device_of(model)
    return torch.cat([model.text_features(some.to(device)).float().cpu() for some in tokens.split(batch)])


def cosines(pictures: Encoded, texts: Tensor) -> Tensor:
    """The query that is nearest to each text counts (Sec. 3.2). (I, T)"""
    every = torch.einsum("i q e, t e -> i t q", pictures.unit, texts)
    return reduce(every, "i t q -> i t", "max")


@torch.inference_mode()
def reranked(model: Blip2Qformer, pictures: Encoded, tokens: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Scores (I, T) and (T, I): of each picture's and each text's best `candidates` by contrast the match logit, mean
    over the queries, plus the cosine; of the others none (LAVIS, compute_sim_matrix: 128 candidates)."""
    device = device_of(model)
    near = cosines(pictures, text_features(model, tokens))  # (I, T)

    def logits(picture: Tensor, text: Tensor) -> Tensor:
        return model.match(pictures.features[picture].to(device), tokens[text].to(device))[:, 1].float().cpu()

    return rerank_both(near, logits, candidates, "itm+itc")


# ---- answers and captions


@dataclass(frozen=True)
class GenerationConfig:
    """How texts are written behind a prompt. The lengths count new tokens; of a seq2seq model the shortest counts the
    decoder's start token too, as min_length does where the official code hands it on. Beams are scored and ended as by
    the transformers of LAVIS's BLIP-2 (4.25): a length penalty counts the prompt (the visual words not)."""

    beams: int = 5
    length_penalty: float = 1.0
    longest: int = 30
    shortest: int = 1

    def settings(self, stop: Sequence[int], kind: str = "causal") -> GenerationSettings:
        """kind: of the language model, "causal" or "seq2seq"."""
        shortest = self.shortest - (kind == "seq2seq" and self.shortest > 0)
        return GenerationSettings(
            tuple(stop),
            self.longest,
            shortest,
            beams=self.beams,
            length_penalty=self.length_penalty,
            **RELEASED_BEAMS,
        )


ANSWERING = GenerationConfig(length_penalty=-1.0, longest=10)  # Sec. 4.1
CAPTIONING = GenerationConfig(longest=30, shortest=8)  # LAVIS, caption_coco_opt2.7b_eval.yaml


@torch.inference_mode()
def write(
    model: Blip2,
    tokenizer: PromptTokenizer,
    features: Tensor | None,
    prompts: Sequence[str],
    config: GenerationConfig,
    batch: int = BATCH,
    before: Tensor | None = None,
) -> list[str]:
    """What the language model says of each picture behind its prompt; behind the prompt alone where features is None.
    before (1, L, W): what stands in front of every picture.

    Prompts of different lengths are padded on the left.
    """
    texts: list[str] = []
    settings = config.settings(tokenizer.stop, model.language_model.kind)
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        tokens, attention_mask = tokenizer.prompts(prompts[part], device_of(model))
        prefix = prefix_of(model, None if features is None else features[part], len(tokens))
        if before is not None:
            prefix = torch.cat([before.expand(len(prefix), -1, -1), prefix.float()], 1)
        texts += write_behind(model, tokenizer, prefix, tokens, attention_mask, settings)
    return texts


@torch.inference_mode()
def write_behind(
    model: Blip2,
    tokenizer: PromptTokenizer,
    prefix: Tensor,
    tokens: Tensor,
    attention_mask: Tensor,
    settings: GenerationSettings,
    generator: torch.Generator | None = None,
) -> list[str]:
    """As `write`, behind visual words (B, Q, W) and prompts (B, T), attention_mask (B, T) False at padding."""
    decoding = model.language_model.decoding(prefix)
    texts = generate(decoding, tokens, settings, attention_mask=attention_mask, generator=generator)
    return [tokenizer.decode(ids) for ids in texts.tokens]


def prefix_of(model: Blip2, features: Tensor | None, rows: int) -> Tensor:
    """Features (B, S, C) -> the visual words (B, Q, W); none (rows, 0, W) for a blind language model."""
    if features is None:
        return torch.zeros(rows, 0, model.language_model.width, device=device_of(model))
    return model.prefix(features.to(device_of(model)))


def prompts_of(model: Blip2, questions: Sequence[str]) -> list[str]:
    """The questions as the paper puts them to this kind of language model."""
    return [PROMPTS[model.language_model.kind].format(question) for question in questions]


def answer(
    model: Blip2,
    tokenizer: PromptTokenizer,
    features: Tensor | None,
    questions: Sequence[str],
    config: GenerationConfig = ANSWERING,
) -> list[str]:
    """Zero-shot VQA: an answer in the language model's own words, its first line without the final period."""
    return list(map(tidy, write(model, tokenizer, features, prompts_of(model, questions), config)))


def tidy(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].strip().rstrip(".").strip() if lines else ""


def caption(
    model: Blip2,
    tokenizer: PromptTokenizer,
    features: Tensor,
    config: GenerationConfig = CAPTIONING,
    prompt: str = CAPTION,
) -> list[str]:
    """A caption of each picture, without the prompt."""
    return list(map(tidy, write(model, tokenizer, features, [prompt] * len(features), config)))


@torch.inference_mode()
def chosen(
    model: Blip2, tokenizer: PromptTokenizer, features: Tensor | None, questions: Sequence[str], answers: Sequence[str]
) -> list[str]:
    """Of the answers the one whose first token is likeliest: what a model that cannot know the form of the answers is
    scored by, so that a blind one is not called wrong for its manners alone."""
    first = [tokenizer.encode(f" {text}")[0] for text in answers]
    tokens, attention_mask = tokenizer.prompts(prompts_of(model, questions), device_of(model))
    decoding = model.language_model.decoding(prefix_of(model, features, len(tokens)))
    logits = decoding.prefill(tokens, attention_mask)[:, torch.tensor(first, device=tokens.device)]  # (B, A)
    return [answers[place] for place in logits.argmax(1).tolist()]


@torch.inference_mode()
def answer_in_context(
    model: Blip2,
    tokenizer: PromptTokenizer,
    features: Tensor,
    questions: Sequence[str],
    examples: Sequence[tuple[Tensor, str, str]],
    config: GenerationConfig = ANSWERING,
) -> list[str]:
    """The same questions behind answered ones (features (S, C), question, answer), each with its own picture before it:
    [picture, question, answer] ..., picture, question (Sec. 5). The examples are the same for all questions."""
    shown = []
    for seen, question, text in examples:
        ids = tokenizer.begun(f"{prompts_of(model, [question])[0]} {text}")
        tokens = torch.tensor([ids], device=device_of(model))
        shown += [prefix_of(model, seen[None], 1), model.language_model.embed(tokens)]
    before = torch.cat([part.float() for part in shown], 1)  # (1, L, W)
    prompts = prompts_of(model, questions)
    return list(map(tidy, write(model, tokenizer, features, prompts, config, before=before)))


# ---- scores


def accuracy(predictions: Sequence[str], right: Sequence[str]) -> float:
    """Exact match in percent."""
    [scored] = exact_match(predictions, [[text] for text in right]).values()
    return 100 * scored.score


def pope_scores(predictions: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """POPE by the strict reader in percent: accuracy, F1, and beside them always the shares of yes and of replies that
    cannot be read."""
    scores = pope(predictions, right, "strict")
    names = ("acc", "f1", "yes_ratio", "parse_failures")
    return {f"pope_{name}": 100 * scores[f"pope/{name}@strict"] for name in names}
