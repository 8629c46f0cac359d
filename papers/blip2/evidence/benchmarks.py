"""The metrics rung: released weights on the benchmarks, by the paper's protocol. data_root holds a folder for each set
and `weights/` for what cannot be fetched: checkpoints, frozen image encoders, and a folder for each language model.

Axes: I pictures, S picture tokens, C their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from papers.blip2.config import SPECIALS, Blip2Config, LanguageConfig
from papers.blip2.encode import ANSWERING, CAPTIONING, Encoded, answer, caption, encoded, reranked
from papers.blip2.frozen import ENCODER_ENTRIES, load_encoder, load_language_model_bundle, speak_through
from papers.blip2.model import Blip2
from papers.blip2.recipe import Blip2Recipe
from papers.blip2.text import PromptTokenizer, clean_caption, clean_question
from papers.blip2.weights import config_of, holds_encoder, load_file
from shared.backbones.vision import Encoder
from shared.core.device import on_gpu_if_any
from shared.core.errors import UserError
from shared.core.paper_card import MetricRow
from shared.data.readers import Record
from shared.data.vqa import AskedPicture, gqa_questions, okvqa_questions, vqa_questions
from shared.experiments.benchmarks import (
    Benchmark,
    Need,
    Released,
    Run,
    Weights,
    answers_for_server,
    captioning,
    one_picture,
    released_file,
    retrieval,
    run_benchmark,
    trained_weights,
)
from shared.metrics import vqa_accuracy
from shared.metrics.vqa import normalise
from shared.tokenizers.bert import BertTokenizer
from shared.weights.manifest import Entry

QUESTIONS = {"VQAv2": vqa_questions, "OK-VQA": okvqa_questions, "GQA": gqa_questions}
PRETRAINED = ("blip2-vit-l", "blip2-vit-g")  # ids of weights that retrieval needs tuned, and no one has released so
CHUNK = 16
SPACY = "en_core_web_sm"
NOTHING = Need("", None, "here")  # what a row does without


def measure(row: MetricRow, recipe: Blip2Recipe) -> float:
    """The row's score in percent. UserError: what is lacking, and the command that would run it."""
    if row.metric.endswith("@generate-official"):
        raise UserError(
            "no weights fine-tuned for VQA were released, whose Q-Former reads the question too: nothing can be scored"
        )
    return run_benchmark(row, recipe, BENCHMARKS, needs, load)


# ---- what a row needs


def needs(row: MetricRow, entries: Mapping[str, Entry], root: Path) -> list[Need]:
    """Weights, frozen encoder, language model; then spaCy."""
    entry = entries[row.need.weights]
    if further := trained_for(row):
        how = f"trained further from {entry.file}, as none of this kind were released"
        weights = trained_weights(further, how, root)
    else:
        weights = released_file("weights", entry, root)
    encoder = entries[ENCODER_ENTRIES[config_of(entry.id).vision.kind]]
    whole = weights.state == "here" and holds_encoder_too(weights.place)
    return [
        weights,
        NOTHING if whole else released_file("image encoder", encoder, root),
        language_need(row, root),
        spacy_need(row),
    ]


def trained_for(row: MetricRow) -> str | None:
    """A name for weights that nobody released: tuned for retrieval, without a loss, or of a pair of frozen models."""
    if row.need.weights not in PRETRAINED:
        return None
    if row.metric.endswith("without-itg"):
        return f"{row.need.weights}-retrieval-coco-without-itg"
    return f"{row.need.weights}-retrieval-coco" if row.metric.startswith("retrieval/") else row.variant


@lru_cache(maxsize=8)
def holds_encoder_too(weights: Path) -> bool:
    """Asked once a file: a .pth has to be read for it."""
    return holds_encoder(weights)


def language_need(row: MetricRow, root: Path) -> Need:
    """A folder in transformers' form, by the name of config.py."""
    from shared.backbones.hf_lm import PUBLISHED

    language = variant_of(row).language
    if language is None:
        return NOTHING
    place = root / "weights" / language.name
    command = f"hf download {PUBLISHED[language.name].repo} --local-dir {place}"
    state = "here" if (place / "config.json").is_file() else "missing"
    return Need(f"language model {place} ({command})", place, state)


def variant_of(row: MetricRow) -> Blip2Config:
    """The configuration of the row's model at the size of its task's pictures."""
    pretrained, retrieves = row.need.weights in PRETRAINED, row.metric.startswith("retrieval/")
    if pretrained and retrieves:
        return config_of(f"{row.need.weights}-retrieval-coco")
    return config_of(row.variant if pretrained else row.need.weights)


def spacy_need(row: MetricRow) -> Need:
    if not row.metric.endswith("-lemmas"):
        return NOTHING
    from importlib.util import find_spec

    there = find_spec("spacy") is not None and find_spec(SPACY) is not None
    text = f"spaCy and its model {SPACY} (pip install spacy; python -m spacy download {SPACY})"
    return Need(text, None, "here" if there else "missing")


# ---- models


def load(weights: Weights) -> Released:
    """The tokenizer is of stage 2 the language model's, else the Q-Former's. In half precision, as far as it is frozen,
    on a GPU: of the image encoder the matrices (load_encoder)."""
    path, encoder_path, folder, _ = weights.places
    variant = variant_of(weights.row)
    half = torch.float16 if torch.cuda.is_available() else None
    model, encoder = load_file(path, variant)
    if encoder is None:
        encoder = load_encoder(encoder_path, model.config.vision, half)
    if isinstance(model, Blip2) != (variant.language is not None):
        raise UserError(f"{path}: weights of another stage than {weights.id}'s")
    if variant.language is None:
        tokenizer = BertTokenizer.uncased(specials=SPECIALS)
    else:
        tokenizer = speaking(model, folder, variant.language)
    size = model.config.vision.image_size
    return Released(on_gpu_if_any(model).eval(), tokenizer, size, on_gpu_if_any(encoder))


def speaking(model: Blip2, folder: Path, language: LanguageConfig) -> PromptTokenizer:
    """Give the model its language model; FlanT5 in bfloat16, OPT in float16, as released, both in fp32 on a CPU."""
    half = torch.bfloat16 if language.kind == "seq2seq" else torch.float16
    dtype = half if torch.cuda.is_available() else torch.float32
    bundle = load_language_model_bundle(language, folder=folder, dtype=dtype)
    speak_through(model, bundle.model)
    return bundle.tokenizer


@torch.inference_mode()
def features_of(encoder: Encoder, images: Tensor) -> Tensor:
    """(I, 1, 3, H, W) uint8 -> (I, S, C) on the CPU."""
    return encoder(images[:, 0].to(encoder.device)).cpu()


# ---- retrieval (Sec. 4.4), captions (Sec. 4.2)


def encode(released: Released, images: Tensor) -> tuple[Tensor, Tensor]:
    features = features_of(released.encoder, images)
    unit = encoded(released.model, features).unit
    return unit, features.half() if released.encoder.dtype else features


def rank(
    released: Released, pictures: Sequence[Tensor], texts: Sequence[str], candidates: int
) -> tuple[Tensor, Tensor]:
    tokens = released.tokenizer(texts, released.model.config.context)
    return reranked(released.model, Encoded(*pictures), tokens, candidates)


def captions(run: Run, released: Released, records: Sequence[Record], images: Tensor) -> list[str]:
    """Behind "a photo of", 5 beams, 8 to 30 tokens; no penalty for repetition or length, of which the paper says
    nothing (LAVIS's later defaults are 1.15 and 0)."""
    return caption(released.model, released.tokenizer, features_of(released.encoder, images), CAPTIONING)


# ---- zero-shot VQA (Sec. 4.1)


def answers(run: Run, released: Released, questions: Sequence[AskedPicture], images: Tensor) -> list[str]:
    """Behind the prompt of the language model's kind, 5 beams, length penalty -1, at most 10 tokens."""
    texts = [clean_question(question.question) for question in questions]
    return answer(released.model, released.tokenizer, features_of(released.encoder, images), texts, ANSWERING)


def answer_scores(
    run: Run, released: Released, questions: Sequence[AskedPicture], texts: Sequence[str]
) -> dict[str, float] | str:
    if run.protocol.endswith("-lemmas"):
        texts = lemmas(texts)
    if run.protocol.endswith("-exact"):  # GQA, as LAVIS: both sides by VQA's clean-up, then equal or not
        right = [
            normalise(question.answers[0]) == normalise(text) for question, text in zip(questions, texts, strict=True)
        ]
        return {"accuracy": sum(right) / len(right)}
    if not questions[0].answers:
        return answers_for_server(run, released, questions, texts)
    scores = vqa_accuracy(texts, [question.answers for question in questions], "official")
    return {"accuracy": scores["vqa/acc@official"].score}


def lemmas(texts: Sequence[str]) -> list[str]:
    """Nouns and verbs by their lemma, other words as they are (LAVIS's _lemmatize, for OK-VQA)."""
    import spacy

    read = spacy.load(SPACY)
    return [
        " ".join(token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in read(text))
        for text in texts
    ]


BENCHMARKS = {
    "retrieval": retrieval(encode, rank, lambda record: list(map(clean_caption, record.captions)), chunk=CHUNK),
    "caption": captioning(captions, CHUNK),
    "vqa": Benchmark(
        lambda run: QUESTIONS[run.dataset](run.data, run.split), one_picture, answers, answer_scores, CHUNK
    ),
}
