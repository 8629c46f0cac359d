"""The metrics rung: released weights on the benchmarks, by the paper's protocol. data_root holds a folder for each set
and `weights/` for what cannot be fetched: checkpoints, frozen image encoders, and a folder for each language model.

Axes: I pictures, S picture tokens, C their width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from papers.blip2.config import Blip2Config
from papers.blip2.encode import ANSWERING, CAPTIONING, Encoded, answer, caption, encoded, reranked
from papers.blip2.frozen import ENCODER_ENTRIES, load_encoder
from papers.blip2.model import Blip2
from papers.blip2.recipe import Blip2Recipe
from papers.blip2.text import PromptTokenizer, clean_caption, clean_question, load_prompt_tokenizer
from papers.blip2.weights import config_of, holds_encoder, load_file
from shared.backbones.vision import Encoder
from shared.core.device import on_gpu_if_any
from shared.core.errors import UserError
from shared.core.files import write_whole
from shared.core.paper_card import MetricRow
from shared.data.benchmarks import nocaps_records
from shared.data.images import PictureError, fitted_image
from shared.data.readers import karpathy_records
from shared.data.vqa import AskedPicture, gqa_questions, okvqa_questions, vqa_questions, write_vqa_results
from shared.metrics import caption_scores, reranked_hits, vqa_accuracy
from shared.metrics.vqa import normalise
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bert import BertTokenizer
from shared.weights.fetch import cached
from shared.weights.manifest import Entry, load_manifest

FOLDERS = {  # where each benchmark lies under data_root
    "MSCOCO": "coco",
    "Flickr30k": "flickr30k",
    "NoCaps": "nocaps",
    "VQAv2": "vqav2",
    "OK-VQA": "okvqa",
    "GQA": "gqa",
}
QUESTIONS = {"VQAv2": vqa_questions, "OK-VQA": okvqa_questions, "GQA": gqa_questions}
PRETRAINED = ("blip2-vit-l", "blip2-vit-g")  # ids of weights that retrieval needs tuned, and no one has released so
CHUNK = 16
LARGEST_DROPPED = 0.001
SPACY = "en_core_web_sm"
T = TypeVar("T")


def measure(row: MetricRow, recipe: Blip2Recipe) -> float:
    """The row's score in percent. UserError: what is lacking, and the command that would run it."""
    task, _, rest = row.metric.partition("/")
    name, _, protocol = rest.partition("@")
    if name == "spice":
        raise UserError("SPICE needs Java and the Stanford parser, which are not used here; score captions elsewhere")
    if protocol == "generate-official":
        raise UserError(
            "no weights fine-tuned for VQA were released, whose Q-Former reads the question too: nothing can be scored"
        )
    entries = load_manifest(recipe.manifest)
    if row.need.weights not in entries:
        raise UserError(f"an entry '{row.need.weights}' in {recipe.manifest}")
    root = Path(recipe.data_root or "FOLDER")
    needs = needs_of(row, entries, root)
    if recipe.scale != "paper" or not all(need.there for need in needs):
        raise UserError(lacking(row, needs, root))
    places = Places(*(need.place for need in needs[:4]))
    if task == "retrieval":
        hits = retrieval_hits(places, row.need.weights, variant_of(row), protocol)
        found = hits[f"retrieval/{name}@{protocol}"]
    elif task == "caption":
        found = caption_score(places, row.need.weights, name, protocol)
    else:
        found = answer_score(places, row, protocol)
    return 100 * found


# ---- what a row needs


class Need(NamedTuple):
    """place: where it lies, or would; told: what it is and where it comes from."""

    place: Path | None
    told: str
    there: bool


class Places(NamedTuple):
    """encoder: None where the weights hold it. language: None where the row has none."""

    weights: Path
    encoder: Path | None
    language: Path | None
    data: Path


def needs_of(row: MetricRow, entries: dict[str, Entry], root: Path) -> list[Need]:
    """Weights, frozen encoder, language model and data, in the order of Places; then spaCy."""
    entry, folder = entries[row.need.weights], root / FOLDERS[row.dataset]
    config = config_of(entry.id)
    weights = weights_of(row, entry, root)
    return [
        Need(weights, told_weights(row, entry, weights), weights.exists()),
        encoder_need(weights, entries[ENCODER_ENTRIES[config.vision.kind]], root),
        language_need(row, root),
        Need(folder, f"data {folder} ({row.need.data})", folder.exists()),
        spacy_need(row),
    ]


def weights_of(row: MetricRow, entry: Entry, root: Path) -> Path:
    """Where the row's weights lie, or would: under root/weights, by the name that they were published under, or where
    they have to be trained further first, by one that says what for; else what was fetched."""
    if further := trained_for(row):
        return root / "weights" / f"{further}.safetensors"
    local = root / "weights" / entry.file
    return local if local.exists() or entry.sha256 is None else cached(entry) or local


def trained_for(row: MetricRow) -> str | None:
    """A name for weights that nobody released: tuned for retrieval, without a loss, or of a pair of frozen models."""
    if row.need.weights not in PRETRAINED:
        return None
    if row.metric.endswith("without-itg"):
        return f"{row.need.weights}-retrieval-coco-without-itg"
    return f"{row.need.weights}-retrieval-coco" if row.metric.startswith("retrieval/") else row.variant


def told_weights(row: MetricRow, entry: Entry, place: Path) -> str:
    if trained_for(row):
        return f"weights {place}, trained further from {entry.file}, as none of this kind were released"
    known = f"sha256 {entry.sha256[:12]}..." if entry.sha256 else "no sha256 was published"
    return f"weights {place} ({entry.origin}; {known})"


def encoder_need(weights: Path, entry: Entry, root: Path) -> Need:
    if weights.exists() and whole(weights):
        return Need(None, "the image encoder is in the weights", True)
    local = root / "weights" / entry.file
    place = local if local.is_file() or entry.sha256 is None else cached(entry) or local
    return Need(place, f"image encoder {place} ({entry.origin})", place.is_file())


@lru_cache(maxsize=8)
def whole(weights: Path) -> bool:
    """Asked once a file: a .pth has to be read for it."""
    return holds_encoder(weights)


def language_need(row: MetricRow, root: Path) -> Need:
    """A folder in transformers' form, by the name of config.py."""
    from shared.backbones.hf_lm import PUBLISHED

    language = variant_of(row).language
    if language is None:
        return Need(None, "no language model is needed", True)
    place = root / "weights" / language.name
    command = f"hf download {PUBLISHED[language.name].repo} --local-dir {place}"
    return Need(place, f"language model {place} ({command})", (place / "config.json").is_file())


def variant_of(row: MetricRow) -> Blip2Config:
    """The configuration of the row's model at the size of its task's pictures."""
    further = row.need.weights in PRETRAINED and not row.metric.startswith("retrieval/")
    id = row.variant if further else row.need.weights
    tuned = row.metric.startswith("retrieval/") and row.need.weights in PRETRAINED
    return config_of(f"{id}-retrieval-coco" if tuned else id)


def spacy_need(row: MetricRow) -> Need:
    if not row.metric.endswith("-lemmas"):
        return Need(None, "no lemmas are needed", True)
    from importlib.util import find_spec

    there = find_spec("spacy") is not None and find_spec(SPACY) is not None
    return Need(None, f"spaCy and its model {SPACY} (pip install spacy; python -m spacy download {SPACY})", there)


def lacking(row: MetricRow, needs: Sequence[Need], root: Path) -> str:
    command = f'make reproduce PAPER=blip2 SCALE=paper ARGS="data_root={root}"'
    told = [f"{need.told}: {'here' if need.there else 'missing'}" for need in needs if need.place or not need.there]
    return f"{command} with {'; '.join(told)}"


# ---- models


class Seeing(NamedTuple):
    """A model of either stage and its image encoder. words: in stage 2 the language model's, else the Q-Former's."""

    model: Any
    encoder: Encoder
    words: PromptTokenizer | Tokenizer


@lru_cache(maxsize=1)
def seeing(places: Places, id: str, variant: Blip2Config) -> Seeing:
    """id: the manifest's, for messages alone. In half precision, as far as it is frozen, on a GPU: of the image encoder
    the matrices (load_encoder)."""
    half = torch.float16 if torch.cuda.is_available() else None
    loaded = load_file(places.weights, variant)
    model, encoder = loaded
    if encoder is None:
        encoder = load_encoder(places.encoder, model.config.vision, half)
    if isinstance(model, Blip2) != (variant.language is not None):
        raise UserError(f"{places.weights}: weights of another stage than {id}'s")
    words = tokenizer_of(model.config) if variant.language is None else speaking(model, places.language, variant)
    return Seeing(on_gpu_if_any(model).eval(), on_gpu_if_any(encoder), words)


def speaking(model: Blip2, folder: Path, variant: Blip2Config) -> PromptTokenizer:
    """Give the model its language model; FlanT5 in bfloat16, OPT in float16, as released, both in fp32 on a CPU."""
    from shared.backbones.lm import load_language_model
    from shared.nn.frozen import Frozen

    half = torch.bfloat16 if variant.language.kind == "seq2seq" else torch.float16
    dtype = half if torch.cuda.is_available() else torch.float32
    language, tokenizer = load_language_model(variant.language.name, folder=folder, dtype=dtype)
    if language.width != model.projector.out_features:
        raise UserError(
            f"{folder}: a language model of width {language.width}, but the weights speak to one of "
            f"{model.projector.out_features}"
        )
    model.language_model = Frozen(language, through=True)
    return load_prompt_tokenizer(tokenizer, language.context)


def tokenizer_of(config: Blip2Config) -> Tokenizer:
    return BertTokenizer.uncased(specials=("decode_start",))


@torch.inference_mode()
def features_of(encoder: Encoder, images: Tensor) -> Tensor:
    """(I, 3, H, W) uint8 -> (I, S, C) on the CPU."""
    return encoder(images.to(encoder.device)).cpu()


def in_chunks(name: str, samples: Sequence[T], record, size: int) -> Iterator[tuple[list[T], Tensor]]:
    """(samples, their pictures (I, 3, size, size) uint8); `record(sample)` is what the picture is read from.

    Samples with a broken picture are dropped, up to a thousandth of all.
    """
    dropped: dict[str, str] = {}
    for start in range(0, len(samples), CHUNK):
        kept, images = [], []
        for place, sample in enumerate(samples[start : start + CHUNK], start):
            try:
                images.append(torch.from_numpy(fitted_image(record(sample).read(), size, whole=True).copy()))
                kept.append(sample)
            except (PictureError, OSError) as wrong:
                dropped[str(getattr(record(sample), "id", place))] = getattr(wrong, "strerror", None) or str(wrong)
        if len(dropped) > LARGEST_DROPPED * len(samples):
            first = ", ".join(f"{id} ({why})" for id, why in list(dropped.items())[:3])
            raise UserError(f"{name}: {len(dropped)} broken pictures of {len(samples)}: {first}; get the set anew")
        if kept:
            yield kept, torch.stack(images)


# ---- retrieval (Sec. 4.4)


def candidates_of(protocol: str) -> int:
    """'itc-top128-itm+itc' -> 128."""
    return int(next(part for part in protocol.split("-") if part.startswith("top")).removeprefix("top"))


@lru_cache(maxsize=2)
def retrieval_hits(places: Places, id: str, variant: Blip2Config, protocol: str) -> dict[str, float]:
    """Both directions, R@1, 5, 10, of the Karpathy test split, all captions of each picture."""
    model, encoder, tokenizer = seeing(places, id, variant)
    parts, texts, owner = [], [], []
    records = karpathy_records(places.data)["test"]
    for kept, images in in_chunks(places.data.name, records, lambda one: one, model.config.vision.image_size):
        pictures = sum(len(part.features) for part in parts)
        features = features_of(encoder, images)
        parts.append(Encoded(encoded(model, features).unit, features.half() if encoder.dtype else features))
        for place, record in enumerate(kept, pictures):
            texts += [clean_caption(text) for text in record.captions]
            owner += [place] * len(record.captions)
    seen = Encoded(*(torch.cat(part) for part in zip(*parts, strict=True)))
    tokens = tokenizer(texts, model.config.context)
    i2t, t2i = reranked(model, seen, tokens, min(candidates_of(protocol), len(seen.features), len(texts)))
    return reranked_hits(i2t, t2i, torch.tensor(owner), protocol=protocol)


# ---- captions (Sec. 4.2)


def caption_score(places: Places, id: str, name: str, protocol: str) -> float:
    """BLEU-4 or CIDEr-D by the Treebank tokens of shared/metrics/captioning.py, whose scores on MSCOCO's captions are
    those of the official tokenizer to the second decimal. NoCaps is scored by its server alone."""
    if protocol == "nocaps-server":
        path = captions_for_server(places, id)
        raise UserError(f"the captions are written to {path}; the server of NoCaps scores them")
    return coco_captions(places, id)[{"bleu4": "caption/bleu4@treebank", "cider": "caption/cider_d@treebank"}[name]]


@lru_cache(maxsize=2)
def coco_captions(places: Places, id: str) -> dict[str, float]:
    records = karpathy_records(places.data)["test"]
    said, kept = captions(places, id, records, lambda one: one)
    return {name: scored.score for name, scored in caption_scores(said, [list(one.captions) for one in kept]).items()}


@lru_cache(maxsize=2)
def captions_for_server(places: Places, id: str) -> Path:
    said, kept = captions(places, id, nocaps_records(places.data), lambda pair: pair[0])
    numbers = [int(record.id) if record.id.isdigit() else record.id for record, _ in kept]
    rows = [{"image_id": number, "caption": text} for number, text in zip(numbers, said, strict=True)]
    return predictions(f"nocaps-{places.weights.stem}.json", json.dumps(rows))


def captions(places: Places, id: str, samples: Sequence[T], record) -> tuple[list[str], list[T]]:
    """Behind "a photo of", 5 beams, 8 to 30 tokens; no penalty for repetition or length, of which the paper says
    nothing (LAVIS's later defaults are 1.15 and 0)."""
    model, encoder, words = seeing(places, id, config_of(id))
    said, all_kept = [], []
    for kept, images in in_chunks(places.data.name, samples, record, model.config.vision.image_size):
        said += caption(model, words, features_of(encoder, images), CAPTIONING)
        all_kept += kept
    return said, all_kept


def predictions(name: str, text: str) -> Path:
    path = Path("runs") / "blip2" / "predictions" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


# ---- zero-shot VQA (Sec. 4.1)


def answer_score(places: Places, row: MetricRow, protocol: str) -> float:
    asked, said = answers(places, row.need.weights, variant_of(row), row.dataset, row.split)
    if protocol.endswith("-lemmas"):
        said = lemmas(said)
    if protocol.endswith("-exact"):  # GQA, as LAVIS: both sides by VQA's clean-up, then equal or not
        right = [normalise(one.answers[0]) == normalise(text) for one, text in zip(asked, said, strict=True)]
        return sum(right) / len(right)
    if not asked[0].answers:
        path = Path("runs") / "blip2" / "predictions" / f"vqa-{row.split}-{places.weights.stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_vqa_results(path, {one.id: text for one, text in zip(asked, said, strict=True)})
        raise UserError(f"the answers to {row.split} are written to {path}; the official server scores them")
    scored = vqa_accuracy(said, [one.answers for one in asked], "official")
    return scored["vqa/acc@official"].score


@lru_cache(maxsize=2)
def answers(
    places: Places, id: str, variant: Blip2Config, dataset: str, split: str
) -> tuple[list[AskedPicture], list[str]]:
    """The questions whose pictures could be read, and what was answered: the prompt of the language model's kind, 5
    beams, length penalty -1, at most 10 tokens."""
    model, encoder, words = seeing(places, id, variant)
    asked, said = [], []
    size = model.config.vision.image_size
    for kept, images in in_chunks(dataset, QUESTIONS[dataset](places.data, split), lambda one: one.picture, size):
        questions = [clean_question(one.question) for one in kept]
        said += answer(model, words, features_of(encoder, images), questions, ANSWERING)
        asked += kept
    return asked, said


def lemmas(texts: Sequence[str]) -> list[str]:
    """Nouns and verbs by their lemma, other words as they are (LAVIS's _lemmatize, for OK-VQA)."""
    import spacy

    read = spacy.load(SPACY)
    return [
        " ".join(token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in read(text))
        for text in texts
    ]
