"""The metrics rung: released weights on the paper's benchmarks, by the paper's protocol, in percent.

Where the authors released pre-trained weights alone, a row takes fine-tuned ones from data_root/weights/.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from papers.blip.config import SPECIALS, VARIANTS, BlipConfig, at, caption, nlvr, retrieval, vqa
from papers.blip.encode import (
    Encoded,
    GenerationConfig,
    encoded,
    encoded_video,
    judge_pairs,
    rank_answers,
    reranked,
    score_candidates,
    tokens_of,
    write,
    write_answers,
)
from papers.blip.model import BlipPretraining
from papers.blip.recipe import BlipRecipe
from papers.blip.tasks import BlipDialogue, frame_indices
from papers.blip.text import clean_caption, clean_question
from papers.blip.weights import load_file
from shared.core.device import on_gpu_if_any
from shared.core.errors import UserError
from shared.core.files import write_whole
from shared.core.paper_card import MetricRow
from shared.data.benchmarks import Clip, msrvtt_clips, msrvtt_questions, nocaps_records, visdial_talks
from shared.data.images import PictureError, fitted_image
from shared.data.readers import Record, karpathy_records
from shared.data.vqa import answer_list, nlvr2_pairs, vqa_questions, write_vqa_results
from shared.metrics import caption_scores, dialogue_ranking, exact_match, reranked_hits
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bert import BertTokenizer
from shared.weights.fetch import cached
from shared.weights.manifest import Entry, load_manifest

FOLDERS = {  # where each benchmark lies under data_root
    "MSCOCO": "coco",
    "Flickr30k": "flickr30k",
    "NoCaps": "nocaps",
    "VQAv2": "vqav2",
    "NLVR2": "nlvr2",
    "VisDial v1.0": "visdial",
    "MSR-VTT": "msrvtt",
    "MSRVTT-QA": "msrvtt",
}
SIZES = {  # a task's pictures and texts, as the paper fine-tunes (App. A); video by configs/retrieval_msrvtt.yaml
    "retrieval": retrieval,
    "caption": caption,
    "vqa": vqa,
    "nlvr2": nlvr,
    "dialog": lambda config: at(384, config, config.positions),
    "video-retrieval": retrieval,
    "video-qa": vqa,
}
PRETRAINED = ("blip-base-14m", "blip-base-129m", "blip-base-capfilt-l")  # ids of weights that no task has tuned
WORDS, LONG_WORDS, QUESTION_WORDS = 30, 40, 50  # of a text are kept; long: NLVR2 and videos
CHUNK = 32
LARGEST_DROPPED = 0.001
T = TypeVar("T")


def measure(row: MetricRow, recipe: BlipRecipe) -> float:
    """The row's score in percent. UserError: what is lacking, and the command that would run it."""
    task, _, rest = row.metric.partition("/")
    name, _, protocol = rest.partition("@")
    if name == "spice":
        raise UserError("SPICE needs Java and the Stanford parser, which are not used here; score captions elsewhere")
    entries = load_manifest(recipe.manifest)
    if row.need.weights not in entries:
        raise UserError(f"an entry '{row.need.weights}' in {recipe.manifest}")
    entry, root = entries[row.need.weights], Path(recipe.data_root or "FOLDER")
    folder, place = root / FOLDERS[row.dataset], weights_of(row, entry, root)
    if recipe.scale != "paper" or not folder.exists() or not place.is_file():
        raise UserError(lacking(row, entry, root, folder, place))
    measured = {
        "retrieval": lambda: retrieval_hits(place, task, folder, protocol)[row.metric],
        "caption": lambda: caption_score(place, folder, name, protocol),
        "vqa": lambda: answer_on_server(place, folder, row),
        "nlvr2": lambda: pair_accuracy(place, folder, row.split),
        "dialog": lambda: dialogue_scores(place, folder)[f"visdial/{name}@rank-pessimistic"],
        "video-retrieval": lambda: video_hits(place, folder, protocol)[f"retrieval/t2i_{name[4:]}@{protocol}"],
        "video-qa": lambda: clip_answers(place, folder, protocol),
    }
    return 100 * measured[task]()


# ---- weights


def weights_of(row: MetricRow, entry: Entry, root: Path) -> Path:
    """Where the row's weights lie, or would: under root/weights, by the name that they were published under, or where
    they have to be fine-tuned first, by one that says for what; else what was fetched."""
    if entry.id in PRETRAINED:
        learned = "MSCOCO" if row.dataset == "NoCaps" or "zeroshot" in row.metric else row.dataset
        return root / "weights" / f"{entry.id}-{row.metric.partition('/')[0]}-{slug(learned)}.safetensors"
    local = root / "weights" / entry.file
    return local if local.is_file() or entry.sha256 is None else cached(entry) or local


def lacking(row: MetricRow, entry: Entry, root: Path, folder: Path, place: Path) -> str:
    command = f'make reproduce PAPER=blip SCALE=paper ARGS="data_root={root}"'
    if entry.id in PRETRAINED:
        weights = f"{place}, fine-tuned from {entry.file}, which the authors released pre-trained only"
    else:
        known = f"sha256 {entry.sha256[:12]}..." if entry.sha256 else "no sha256 was published"
        weights = f"{place} ({entry.origin}; {known})"
    have = [
        f"{what} {'here' if there else 'missing'}"
        for what, there in (("data", folder.exists()), ("weights", place.is_file()))
    ]
    return f"{command} with {folder}: {row.need.data}; weights {weights}; {', '.join(have)}"


def slug(dataset: str) -> str:
    return "".join(c for c in dataset.lower() if c.isalnum())


@lru_cache(maxsize=1)
def model_of(place: Path, task: str) -> tuple[nn.Module, Tokenizer]:
    """The network of a task with the weights of a file, and BERT's tokenizer."""
    size = VARIANTS["blip-large" if "large" in place.name else "blip-base"]()
    model = load_file(place, SIZES[task](size))
    if isinstance(model, BlipPretraining):
        model = model.blip
    if task == "dialog" and not isinstance(model, BlipDialogue):
        model = BlipDialogue.started_from(model)
    return on_gpu_if_any(model), tokenizer_of(model.config)


def tokenizer_of(config: BlipConfig) -> Tokenizer:
    return BertTokenizer.uncased(specials=SPECIALS)


# ---- pictures


def in_chunks(
    name: str, samples: Sequence[T], pictures, size: int, chunk: int = CHUNK
) -> Iterator[tuple[list[T], Tensor]]:
    """(samples, their pictures (N, P, 3, size, size) uint8): `pictures(sample)` gives the P records or files of each.

    Samples with a broken picture are dropped, up to a thousandth of all.
    """
    dropped: dict[str, str] = {}
    for start in range(0, len(samples), chunk):
        kept, images = [], []
        for sample in samples[start : start + chunk]:
            try:
                read = [fitted_image(one.read(), size, whole=True) for one in pictures(sample)]
            except (PictureError, OSError) as wrong:
                dropped[str(getattr(sample, "id", start))] = getattr(wrong, "strerror", None) or str(wrong)
                continue
            kept.append(sample)
            images.append(torch.stack([torch.from_numpy(one.copy()) for one in read]))
        if len(dropped) > LARGEST_DROPPED * len(samples):
            first = ", ".join(f"{id} ({why})" for id, why in list(dropped.items())[:3])
            raise UserError(f"{name}: {len(dropped)} broken pictures of {len(samples)}: {first}; get the set anew")
        if kept:
            yield kept, torch.stack(images)


# ---- retrieval (Sec. 5.1)


def candidates_of(protocol: str) -> int:
    """'itc-top256-itm+itc' -> 256."""
    return int(next(part for part in protocol.split("-") if part.startswith("top")).removeprefix("top"))


@lru_cache(maxsize=2)
def retrieval_hits(place: Path, task: str, folder: Path, protocol: str) -> dict[str, float]:
    """Both directions, R@1, 5, 10, of the Karpathy test split, all captions of each picture."""
    model, tokenizer = model_of(place, task)
    parts, texts, owner = [], [], []
    records = karpathy_records(folder)["test"]
    for kept, images in in_chunks(folder.name, records, lambda record: [record], model.config.image_size):
        parts.append(encoded(model, images[:, 0]))
        for record in kept:
            texts += [clean_caption(text, WORDS) for text in record.captions]
            owner += [sum(len(part.features) for part in parts[:-1]) + kept.index(record)] * len(record.captions)
    return hits_of(model, tokenizer, joined(parts), texts, owner, protocol)


def joined(parts: Sequence[Encoded]) -> Encoded:
    return Encoded(*(torch.cat(part) for part in zip(*parts, strict=True)))


def hits_of(model, tokenizer, seen: Encoded, texts: Sequence[str], owner: Sequence[int], protocol: str) -> dict:
    tokens = tokens_of(tokenizer, texts, model.config)
    i2t, t2i = reranked(model, seen, tokens, candidates_of(protocol))
    return reranked_hits(i2t, t2i, torch.tensor(owner), protocol=protocol)


# ---- captions (Sec. 5.2)


def caption_score(place: Path, folder: Path, name: str, protocol: str) -> float:
    """BLEU-4 or CIDEr-D by the Treebank tokens of shared/metrics/captioning.py, whose scores on MSCOCO's captions are
    those of the official tokenizer to the second decimal. NoCaps is scored by its server alone."""
    if protocol == "nocaps-server":
        path = captions_for_server(place, folder)
        raise UserError(f"the captions are written to {path}; the server of NoCaps scores them")
    found = coco_captions(place, folder)
    return found[{"bleu4": "caption/bleu4@treebank", "cider": "caption/cider_d@treebank"}[name]]


@lru_cache(maxsize=2)
def coco_captions(place: Path, folder: Path) -> dict[str, float]:
    model, tokenizer = model_of(place, "caption")
    said, references = [], []
    records = karpathy_records(folder)["test"]
    for kept, images in in_chunks(folder.name, records, lambda record: [record], model.config.image_size):
        said += write(model, tokenizer, images[:, 0], GenerationConfig())
        references += [list(record.captions) for record in kept]
    return {name: scored.score for name, scored in caption_scores(said, references).items()}


@lru_cache(maxsize=2)
def captions_for_server(place: Path, folder: Path) -> Path:
    model, tokenizer = model_of(place, "caption")
    rows = []
    pairs = nocaps_records(folder)
    for kept, images in in_chunks("NoCaps", pairs, lambda pair: [pair[0]], model.config.image_size):
        said = write(model, tokenizer, images[:, 0], GenerationConfig())
        rows += [
            {"image_id": int(record.id) if record.id.isdigit() else record.id, "caption": text}
            for (record, _), text in zip(kept, said, strict=True)
        ]
    return predictions(f"nocaps-{place.stem}.json", json.dumps(rows))


def predictions(name: str, text: str) -> Path:
    path = Path("runs") / "blip" / "predictions" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


# ---- VQA (Sec. 5.3), NLVR2 (Sec. 5.4), VisDial (Sec. 5.5)


def answer_on_server(place: Path, folder: Path, row: MetricRow) -> float:
    path = Path("runs") / "blip" / "predictions" / f"vqa-{slug(row.split)}-{place.stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_vqa_results(path, ranked_answers(place, folder, row.split))
    raise UserError(f"the answers to {row.split} are written to {path}; the official server scores them")


def ranked_answers(place: Path, folder: Path, split: str) -> dict[int, str]:
    """{question: the likeliest of answer_list.json in the folder (3,128 answers, published by the authors)}."""
    answers = answer_list(folder / "answer_list.json")
    model, tokenizer = model_of(place, "vqa")
    listed = tokens_of(tokenizer, answers, model.config)
    found = {}
    questions = vqa_questions(folder, split)
    for kept, images in in_chunks("VQAv2", questions, lambda one: [one.picture], model.config.image_size):
        asked = [clean_question(one.question, QUESTION_WORDS) for one in kept]
        places = rank_answers(model, tokenizer, images[:, 0], asked, listed)
        found |= {one.id: answers[place] for one, place in zip(kept, places, strict=True)}
    return found


@lru_cache(maxsize=2)
def pair_accuracy(place: Path, folder: Path, split: str) -> float:
    model, tokenizer = model_of(place, "nlvr2")
    right = count = 0
    pairs = nlvr2_pairs(folder, split)
    for kept, images in in_chunks("NLVR2", pairs, lambda pair: pair.pictures, model.config.image_size):
        sentences = [clean_caption(pair.sentence, LONG_WORDS) for pair in kept]
        judged = judge_pairs(model, tokenizer, images, sentences)
        right += sum(one == pair.label for one, pair in zip(judged, kept, strict=True))
        count += len(kept)
    return right / count


@lru_cache(maxsize=2)
def dialogue_scores(place: Path, folder: Path) -> dict[str, float]:
    model, tokenizer = model_of(place, "dialog")
    scores, right = [], []
    talks = visdial_talks(folder)
    for kept, images in in_chunks("VisDial", talks, lambda talk: [talk.picture], model.config.image_size):
        for talk, image in zip(kept, images[:, 0], strict=True):
            told = ""
            for one in talk.rounds:
                told = f"{told} {clean_question(one.question, QUESTION_WORDS)}".strip()
                said = [clean_caption(text, WORDS) for text in one.candidates]
                scores.append(score_candidates(model, tokenizer, image, clean_caption(talk.caption, WORDS), told, said))
                right.append(one.right)
                told = f"{told} {said[one.right]}"
    return dialogue_ranking(torch.stack(scores), torch.tensor(right))


# ---- videos (Sec. 5.6)


def frames_of(protocol: str) -> int:
    """'zeroshot-8frames-itc-top128-itm+itc' -> 8."""
    return int(next(part for part in protocol.split("-") if part.endswith("frames")).removesuffix("frames"))


def frame_records(clip: Clip, count: int) -> list[Record]:
    chosen = [clip.frames[place] for place in frame_indices(len(clip.frames), count)]
    return [Record(f"{clip.id}/{path.name}", path.read_bytes) for path in chosen]


@lru_cache(maxsize=2)
def video_hits(place: Path, folder: Path, protocol: str) -> dict[str, float]:
    model, tokenizer = model_of(place, "video-retrieval")
    count = frames_of(protocol)
    parts, texts = [], []
    clips = msrvtt_clips(folder)
    for kept, frames in in_chunks(
        "MSR-VTT", clips, lambda clip: frame_records(clip, count), model.config.image_size, CHUNK // 8
    ):
        parts.append(encoded_video(model, frames))
        texts += [clean_caption(clip.caption, LONG_WORDS) for clip in kept]
    return hits_of(model, tokenizer, joined(parts), texts, range(len(texts)), protocol)


@lru_cache(maxsize=2)
def clip_answers(place: Path, folder: Path, protocol: str) -> float:
    """Share of the questions whose written answer is the annotated one."""
    model, tokenizer = model_of(place, "video-qa")
    count = frames_of(protocol)
    said, right = [], []
    asked = msrvtt_questions(folder)
    for kept, frames in in_chunks(
        "MSRVTT-QA", asked, lambda one: frame_records(one.clip, count), model.config.image_size, CHUNK // 16
    ):
        said += write_answers(model, tokenizer, frames, [clean_question(one.question, QUESTION_WORDS) for one in kept])
        right += [[one.answer] for one in kept]
    return exact_match(said, right)["vqa/acc@exact"].score
