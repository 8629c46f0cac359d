"""How BLIP is measured and used: retrieval with re-ranking (Sec. 5.1), captions by beam search and nucleus sampling
(Sec. 4.3, 5.2), matching (Sec. 3.3), VQA (Sec. 5.3), dialogue (Sec. 5.5), videos (Sec. 5.6).

Axes: I pictures, T texts, N patches, L tokens, D width, E joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from papers.blip.config import PROMPT, BlipConfig
from papers.blip.model import Blip
from papers.blip.tasks import BlipDialogue, BlipNlvr, BlipVqa
from shared.core.device import device_of
from shared.core.errors import UserError
from shared.metrics import rerank_both
from shared.nn.generation import RELEASED_BEAMS, GenerationSettings, generate
from shared.tokenizers.base import Tokenizer, trim

REPETITION_PENALTY = 1.1  # of nucleus sampling (official code models/blip.py, generate)
TOP_K = 50  # before the nucleus: what the transformers version that the official code pins adds of its own accord
BATCH = 128


def tokens_of(tokenizer: Tokenizer, texts: Sequence[str], config: BlipConfig) -> Tensor:
    """Texts cut to the model's context, as in training, and no wider than the longest. (T, L)"""
    return trim(tokenizer(list(texts), config.context), tokenizer.end)


# ---- retrieval


class Encoded(NamedTuple):
    """Pictures (or videos) as both kinds of comparison take them, on the CPU."""

    features: Tensor  # (I, E), L2-normalised
    tokens: Tensor  # (I, 1 + N, D)


@torch.inference_mode()
def encoded(model: Blip, images: Tensor, batch: int = BATCH) -> Encoded:
    """uint8 (I, 3, H, W)."""
    tokens = [model.encode_image(some.to(device_of(model))) for some in images.split(batch)]
    return Encoded(torch.cat([model.features_of(some).cpu() for some in tokens]), torch.cat([s.cpu() for s in tokens]))


@torch.inference_mode()
def encoded_video(model: Blip, frames: Tensor) -> Encoded:
    """Frames uint8 (I, F, 3, H, W): their tokens in a row, their features the mean over frames, normalised (official
    code eval_retrieval_video.py)."""
    videos = []
    for video in frames:
        tokens = model.encode_image(video.to(device_of(model)))  # (F, 1 + N, D)
        feature = F.normalize(model.vision_proj(tokens[:, 0]).float().mean(0), dim=-1)
        videos.append((feature.cpu(), rearrange(tokens, "f n d -> (f n) d").cpu()))
    return Encoded(*(torch.stack(part) for part in zip(*videos, strict=True)))


@torch.inference_mode()
def text_features(model: Blip, tokens: Tensor, batch: int = 2 * BATCH) -> Tensor:
    """(T, L) -> (T, E), L2-normalised, on the CPU."""
    return torch.cat([model.text_features(some.to(device_of(model))).cpu() for some in tokens.split(batch)])


@torch.inference_mode()
def reranked(model: Blip, pictures: Encoded, tokens: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Scores (I, T) and (T, I): of each picture's and each text's best `candidates` by ITC the match logit plus the
    cosine, of the others none."""
    device = device_of(model)
    texts = text_features(model, tokens)
    cosines = pictures.features @ texts.T  # (I, T)

    def logits(picture: Tensor, text: Tensor) -> Tensor:
        image_tokens = pictures.tokens[picture.unique_consecutive()]  # a picture with many texts is looked at once
        return model.match(tokens[text].to(device), image_tokens.to(device))[:, 1].float().cpu()

    return rerank_both(cosines, logits, candidates, "itm+itc")


@torch.inference_mode()
def match_probability(model: Blip, tokens: Tensor, images: Tensor, batch: int = BATCH) -> Tensor:
    """How likely text i (T, L) matches picture i (T, 3, H, W), by the ITM head. (T,) on the CPU."""
    device = device_of(model)
    probabilities = [
        model.match(some.to(device), model.encode_image(seen.to(device))).float().softmax(1)[:, 1].cpu()
        for some, seen in zip(tokens.split(batch), images.split(batch), strict=True)
    ]
    return torch.cat(probabilities)


# ---- captions


@dataclass(frozen=True)
class GenerationConfig:
    """How captions are written. longest, shortest: tokens, with [DEC] and the prompt, as the official code counts.

    nucleus: sample from the fewest words that hold this much probability (0.9 in CapFilt); None: beam search, with the
    length and the end of transformers 4.15, which the official code pins.
    """

    prompt: str = PROMPT
    beams: int = 3
    nucleus: float | None = None
    longest: int = 20
    shortest: int = 5
    seed: int = 0

    def prompt_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """[DEC] and the prompt, without [SEP]."""
        return [tokenizer.decode_start, *tokenizer.encode(self.prompt.strip())]

    def settings(self, tokenizer: Tokenizer) -> GenerationSettings:
        given = len(self.prompt_tokens(tokenizer))
        if given >= self.longest:
            raise UserError(f"prompt '{self.prompt}' takes {given} of {self.longest} tokens: no room for a caption")
        longest, shortest = self.longest - given, max(0, self.shortest - given)
        if self.nucleus is None:
            return GenerationSettings((tokenizer.end,), longest, shortest, beams=self.beams, **RELEASED_BEAMS)
        return GenerationSettings(
            (tokenizer.end,), longest, shortest, sample=True, top_k=TOP_K, top_p=self.nucleus,
            repetition_penalty=REPETITION_PENALTY,
        )  # fmt: skip


def write(
    model: Blip,
    tokenizer: Tokenizer,
    images: Tensor,
    config: GenerationConfig,
    batch: int = BATCH,
    generator: torch.Generator | None = None,
) -> list[str]:
    """One caption a picture (I, 3, H, W), without the prompt. The same pictures, seed and order give the same texts,
    in calls of any size where they share a generator; without one each call begins with the seed."""
    generator = generator or torch.Generator().manual_seed(config.seed)
    texts = []
    for some in images.split(batch):
        with torch.inference_mode():
            image_tokens = model.encode_image(some.to(device_of(model)))
        texts += write_captions(model, tokenizer, image_tokens, config, generator)
    return texts


@torch.inference_mode()
def write_captions(
    model: Blip,
    tokenizer: Tokenizer,
    image_tokens: Tensor,
    config: GenerationConfig,
    generator: torch.Generator | None = None,
) -> list[str]:
    """As `write`, of pictures that are encoded (I, 1 + N, D)."""
    start = torch.tensor(config.prompt_tokens(tokenizer), device=image_tokens.device).expand(len(image_tokens), -1)
    decoding = model.decoding(image_tokens)
    captions = generate(decoding, start, config.settings(tokenizer), generator=generator)
    return [tokenizer.decode(tokens) for tokens in captions.tokens]


# ---- answers


@torch.inference_mode()
def see(model: BlipVqa, images: Tensor) -> Tensor:
    """Pictures (I, 3, H, W) -> (I, S, D); a video (I, F, 3, H, W) is seen as the tokens of its frames in a row."""
    if images.ndim == 4:
        return model.encode_image(images.to(device_of(model)))
    tokens = model.encode_image(rearrange(images, "i f c h w -> (i f) c h w").to(device_of(model)))
    return rearrange(tokens, "(i f) n d -> i (f n) d", f=images.shape[1])


@torch.inference_mode()
def write_answers(
    model: BlipVqa, tokenizer: Tokenizer, seen: Tensor, questions: Sequence[str], beams: int = 3, longest: int = 10
) -> list[str]:
    """An answer in the model's own words to each picture's question. seen (I, S, D); longest: tokens with [DEC], as the
    official code counts (models/blip_vqa.py)."""
    asked = tokens_of(tokenizer, questions, model.config).to(seen.device)
    decoding = model.decoding(model.ask(asked, seen), asked)
    start = torch.full_like(asked[:, :1], tokenizer.decode_start)
    settings = GenerationSettings((tokenizer.end,), longest - 1, beams=beams, **RELEASED_BEAMS)
    return [tokenizer.decode(tokens) for tokens in generate(decoding, start, settings).tokens]


@torch.inference_mode()
def rank_answers(
    model: BlipVqa, tokenizer: Tokenizer, seen: Tensor, questions: Sequence[str], answers: Tensor
) -> Tensor:
    """Which of the answers (A, L) each question is answered with. seen (I, S, D) -> (I,)"""
    asked = tokens_of(tokenizer, questions, model.config).to(seen.device)
    return model.rank(model.ask(asked, seen), asked, answers.to(seen.device))


@torch.inference_mode()
def judge_pairs(model: BlipNlvr, tokenizer: Tokenizer, images: Tensor, sentences: Sequence[str]) -> list[bool]:
    """Whether each sentence is true of its two pictures (I, 2, 3, H, W)."""
    tokens = tokens_of(tokenizer, sentences, model.config)
    return (model(images.to(device_of(model)), tokens.to(device_of(model))).argmax(1) == 1).tolist()


@torch.inference_mode()
def score_candidates(
    model: BlipDialogue, tokenizer: Tokenizer, image: Tensor, caption: str, dialogue: str, candidates: Sequence[str]
) -> Tensor:
    """How likely each candidate goes on with a dialogue so far about a picture (3, H, W). (C,), on the CPU."""
    device, context = device_of(model), model.config.context
    texts = [ending(tokenizer, f"{dialogue} {candidate}".strip(), context) for candidate in candidates]
    dialogues = trim(torch.stack(texts), tokenizer.end).to(device)
    captions = tokens_of(tokenizer, [caption], model.config).to(device)
    return model.scores(image[None].to(device), captions, dialogues[None])[0].float().cpu()


def ending(tokenizer: Tokenizer, text: str, context: int) -> Tensor:
    """Tokens of the text's end where it is too long: what a dialogue leads to counts. (context,)"""
    ids = tokenizer.encode(text)[-(context - 2) :]
    row = torch.full((context,), tokenizer.pad)
    row[: len(ids) + 2] = torch.tensor([tokenizer.start, *ids, tokenizer.end])
    return row
