"""The metrics rung: released weights on the paper's benchmarks, by the paper's protocol, in percent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papers.albef.config import VARIANTS
from papers.albef.encode import Pictures, device_of, encode_pictures, encode_texts, recall, reranked, tokens_of
from papers.albef.model import Albef, AlbefPretraining
from papers.albef.recipe import AlbefRecipe
from papers.albef.tasks import AlbefVqa, Distilled, heat_map
from papers.albef.text import clean_caption, clean_question
from papers.albef.weights import card_of, load_any
from shared.core.device import on_gpu_if_any
from shared.core.errors import UserError
from shared.core.paper_card import MetricRow
from shared.data.images import PictureError, fitted_image
from shared.data.readers import Record, karpathy_records
from shared.data.vqa import (
    VERDICTS,
    Box,
    answer_list,
    entailment_rows,
    nlvr2_pairs,
    referred_things,
    vqa_questions,
    write_vqa_results,
)
from shared.metrics import nlvr2 as nlvr2_scores
from shared.metrics import nlvr2_statement
from shared.tokenizers.bert import BertTokenizer
from shared.weights.fetch import cached
from shared.weights.load import check_card
from shared.weights.manifest import Entry, load_manifest

FOLDERS = {  # where each benchmark lies under data_root
    "MSCOCO": "coco",
    "Flickr30k": "flickr30k",
    "VQAv2": "vqav2",
    "NLVR2": "nlvr2",
    "SNLI-VE": "snli-ve",
    "RefCOCO+": "refcoco+",
}
KINDS = {  # the model that a task takes
    "retrieval": AlbefPretraining,
    "vqa": AlbefVqa,
    "nlvr2": Distilled,
    "entailment": Distilled,
    "grounding": AlbefPretraining,
}
CAPTION_WORDS, QUESTION_WORDS = 30, 50
KEPT_ANSWERS = 128  # ranked by all of their words, of the candidates (configs/VQA.yaml)
GRADCAM_LAYER = 2  # the third multimodal layer (Grounding.py, block_num 8 of the 12)
AREA_POWER = 0.5  # by which the heat in a proposal is divided (Grounding.py)
CHUNK = 32
LARGEST_DROPPED = 0.001
T = TypeVar("T")


def measure(row: MetricRow, recipe: AlbefRecipe) -> float:
    """The row's score in percent. UserError: what is lacking, and the command that would run it."""
    entries = load_manifest(recipe.manifest)
    if row.need.weights not in entries:
        raise UserError(f"an entry '{row.need.weights}' in {recipe.manifest}")
    entry, root = entries[row.need.weights], Path(recipe.data_root or "FOLDER")
    folder, place = root / FOLDERS[row.dataset], weights_of(row, entry, root)
    if recipe.scale != "paper" or not folder.exists() or not place.is_file():
        raise UserError(lacking(row, entry, root, folder, place))
    task, _, rest = row.metric.partition("/")
    weights = described(row, entry, place)
    measured: dict[str, Callable[[], float]] = {
        "retrieval": lambda: retrieval(weights, folder, rest.partition("@")[2])[row.metric],
        "vqa": lambda: answered_on_server(weights, row, folder),
        "nlvr2": lambda: pairs_right(weights, folder, row.split),
        "entailment": lambda: entailment_right(weights, folder, row.split),
        "grounding": lambda: grounded(weights, folder, row.split),
    }
    return 100 * measured[task]()


# ---- weights


@dataclass(frozen=True)
class Weights:
    """A file, and how its model reads: closed, whether texts end with [SEP], which the official code leaves out."""

    place: Path
    variant: str
    closed: bool

    def tokens(self, texts: Sequence[str], context: int) -> Tensor:
        return tokens_of(tokenizer_of(), texts, context, self.closed)


def described(row: MetricRow, entry: Entry, place: Path) -> Weights:
    """The file with its card, held against the model of the row's variant; sizes of pictures and texts may be those of
    pre-training, from which the model is carried to those of the benchmark."""
    config, closed = VARIANTS[row.variant](), entry.tokenizer.get("closed", True)
    card = card_of(
        replace(
            config,
            image_size=entry.preprocess.get("size", config.image_size),
            context=entry.tokenizer.get("context", config.context),
        )
    )
    check_card(entry, card | {"tokenizer": card["tokenizer"] | {"closed": closed}})
    return Weights(place, row.variant, closed)


def weights_of(row: MetricRow, entry: Entry, root: Path) -> Path:
    """Where the row's weights lie, or would: what was fetched, else root/weights by the name of their publication, or,
    where they have to be fine-tuned first, by one that says for what."""
    if tuned_for := fine_tuned_for(row):
        return root / "weights" / f"{entry.id}-{tuned_for}.safetensors"
    local = root / "weights" / entry.name
    return local if local.is_file() or entry.sha256 is None else cached(entry) or local


def fine_tuned_for(row: MetricRow) -> str:
    """What pre-trained weights have to be tuned on before the row can be measured; '' where they are used as they are.

    Zero-shot retrieval on Flickr30k takes the model that was tuned on MSCOCO, that on MSCOCO the pre-trained one."""
    if row.need.weights not in ("albef-4m", "albef-14m"):
        return ""
    task = row.metric.partition("/")[0]
    if "@zeroshot" in row.metric:
        return "" if row.dataset == "MSCOCO" else "retrieval-coco"
    return f"retrieval-{FOLDERS[row.dataset]}" if task == "retrieval" else FOLDERS[row.dataset]


def lacking(row: MetricRow, entry: Entry, root: Path, folder: Path, place: Path) -> str:
    command = f'make reproduce PAPER=albef SCALE=paper ARGS="data_root={root}"'
    known = f"sha256 {entry.sha256[:12]}..." if entry.sha256 else "its publisher names no sha256"
    weights = f"{place} ({entry.origin}; {known})"
    if tuned_for := fine_tuned_for(row):
        weights = f"{place}, fine-tuned for {tuned_for} from {entry.name} ({entry.origin}), released pre-trained only"
    have = [
        f"{what} {'here' if there else 'missing'}"
        for what, there in (("data", folder.exists()), ("weights", place.is_file()))
    ]
    return f"{command} with {folder}: {row.need.data}; weights {weights}; {', '.join(have)}"


@lru_cache(maxsize=1)
def model_of(weights: Weights, task: str) -> nn.Module:
    """The model of a weights file, in eval mode. UserError where it is none of the task's."""
    model = load_any(weights.place, VARIANTS[weights.variant]())
    if isinstance(model, AlbefPretraining):  # retrieval's, too
        model = model.student
    kind = Albef if KINDS[task] is AlbefPretraining else KINDS[task]
    if not isinstance(model, kind):
        raise UserError(
            f"{weights.place}: holds {type(model).__name__}, but {task} takes {kind.__name__}; give its weights"
        )
    return on_gpu_if_any(model)


@lru_cache(maxsize=1)
def tokenizer_of() -> BertTokenizer:
    return BertTokenizer.uncased()


# ---- pictures


def in_chunks(
    name: str, samples: Sequence[T], pictures: Callable[[T], Sequence[Record]], size: int
) -> Iterator[tuple[list[T], Tensor]]:
    """(samples, their pictures uint8 (N, P, 3, size, size)), each squeezed into the square. Samples with a broken
    picture are dropped, up to a thousandth of all."""
    dropped: dict[str, str] = {}
    for start in range(0, len(samples), CHUNK):
        kept, images = [], []
        for sample in samples[start : start + CHUNK]:
            try:
                read = [fitted_image(one.read(), size, whole=True) for one in pictures(sample)]
            except (PictureError, OSError) as wrong:
                dropped[str(sample.id)] = getattr(wrong, "strerror", None) or str(wrong)
                continue
            kept.append(sample)
            images.append(torch.stack([torch.from_numpy(one.copy()) for one in read]))
        if len(dropped) > LARGEST_DROPPED * len(samples):
            first = ", ".join(f"{id} ({why})" for id, why in list(dropped.items())[:3])
            raise UserError(f"{name}: {len(dropped)} broken pictures of {len(samples)}: {first}; get the set anew")
        if kept:
            yield kept, torch.stack(images)


# ---- the tasks (Sec. 5)


@lru_cache(maxsize=1)
def retrieval(weights: Weights, folder: Path, protocol: str) -> dict[str, float]:
    """Both directions, R@1, 5, 10, on the Karpathy test split, all captions of each picture."""
    model = model_of(weights, "retrieval")
    parts, texts, owner, pictures = [], [], [], 0
    records = karpathy_records(folder)["test"]
    for kept, images in in_chunks(folder.name, records, lambda record: [record], model.config.image_size):
        parts.append(encode_pictures(model, images[:, 0]))
        for record in kept:
            captions = [clean_caption(text, CAPTION_WORDS) for text in record.captions]
            texts += captions
            owner += [pictures] * len(captions)
            pictures += 1
    seen = Pictures(*(torch.cat(part) for part in zip(*parts, strict=True)))
    words = encode_texts(model, weights.tokens(texts, model.config.context))
    return recall(reranked(model, seen, words, candidates_of(protocol)), torch.tensor(owner), protocol)


def candidates_of(protocol: str) -> int:
    """'zeroshot-itc-top128-itm' -> 128."""
    return int(next(part for part in protocol.split("-") if part.startswith("top")).removeprefix("top"))


def answered_on_server(weights: Weights, row: MetricRow, folder: Path) -> float:
    """The answers to the test questions as the official server takes them: it alone has the right ones."""
    path = Path("runs") / "albef" / "predictions" / f"{row.id}.json"
    answers = ranked_answers(weights, folder, row.split)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_vqa_results(path, answers)
    raise UserError(f"the answers to {row.split} are written to {path}; the official server scores them")


@lru_cache(maxsize=1)
def ranked_answers(weights: Weights, folder: Path, split: str) -> dict[int, str]:
    """{question: the best answer of answer_list.json in the folder}."""
    answers, questions = answer_list(folder / "answer_list.json"), vqa_questions(folder, split)
    model = model_of(weights, "vqa")
    config, device = model.student.encoder.config, device_of(model)
    candidates = tokens_of(tokenizer_of(), answers, config.positions).to(device)  # [SEP] ends an answer everywhere
    found = {}
    for kept, images in in_chunks("VQAv2", questions, lambda one: [one.picture], config.image_size):
        asked = [clean_question(one.question, QUESTION_WORDS) for one in kept]
        tokens = weights.tokens(asked, config.positions).to(device)
        best = model.predict(images[:, 0].to(device), tokens, candidates, KEPT_ANSWERS)
        found |= {one.id: answers[place] for one, place in zip(kept, best.tolist(), strict=True)}
    return found


@lru_cache(maxsize=2)
def pairs_right(weights: Weights, folder: Path, split: str) -> float:
    model, pairs = model_of(weights, "nlvr2"), nlvr2_pairs(folder, split)
    said, right, ids = [], [], []
    config = model.student.pair.encoder.config
    for kept, images in in_chunks("NLVR2", pairs, lambda pair: pair.pictures, config.image_size):
        said += predicted(model, weights, images, [pair.sentence for pair in kept], config.positions)
        right += [int(pair.label) for pair in kept]
        ids += [nlvr2_statement(pair.id) for pair in kept]
    return nlvr2_scores(said, right, ids)["nlvr2/acc@example"]


@lru_cache(maxsize=2)
def entailment_right(weights: Weights, folder: Path, split: str) -> float:
    model, rows = model_of(weights, "entailment"), entailment_rows(folder, split)
    config, right, read = model.student.encoder.config, 0, 0
    for kept, images in in_chunks("SNLI-VE", rows, lambda row: [row.picture], config.image_size):
        said = predicted(model, weights, images[:, 0], [row.hypothesis for row in kept], config.positions)
        right += sum(VERDICTS[one] == row.label for one, row in zip(said, kept, strict=True))
        read += len(kept)
    return right / read


def predicted(
    model: Distilled, weights: Weights, images: Tensor, sentences: Sequence[str], positions: int
) -> list[int]:
    device = device_of(model)
    cleaned = [clean_caption(sentence, CAPTION_WORDS) for sentence in sentences]
    tokens = weights.tokens(cleaned, positions)
    return model.predict(images.to(device), tokens.to(device)).tolist()


@lru_cache(maxsize=3)
def grounded(weights: Weights, folder: Path, split: str) -> float:
    """Share of the expressions whose best proposal overlaps the right box by half (Sec. 6.4)."""
    model, things = model_of(weights, "grounding"), referred_things(folder, split)
    device, right, read = device_of(model), 0, 0
    for kept, images in in_chunks("RefCOCO+", things, lambda thing: [thing.picture], model.config.image_size):
        said = [clean_caption(thing.expression, CAPTION_WORDS) for thing in kept]
        tokens = weights.tokens(said, model.config.positions)
        maps = heat_map(model, images[:, 0].to(device), tokens.to(device), GRADCAM_LAYER).cpu()
        for thing, heat in zip(kept, maps, strict=True):
            right += overlap(best_proposal(heat, thing.proposals, thing.size), thing.box) >= 0.5
        read += len(kept)
    return right / read


def best_proposal(heat: Tensor, proposals: Sequence[Box], size: tuple[int, int]) -> Box:
    """The box with the most heat (rows, columns), over the square root of its area; size: the picture's, in pixels."""
    width, height = size
    full = F.interpolate(heat[None, None], size=(height, width), mode="bicubic")[0, 0]

    def score(box: Box) -> float:
        left, top, wide, high = box
        inside = full[int(top) : int(top + high), int(left) : int(left + wide)]
        return float(inside.sum()) / max(wide * high, 1.0) ** AREA_POWER

    return max(proposals, key=score)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union, the last pixel counted as the official computeIoU does."""
    wide, high = (
        min(one[axis] + one[axis + 2], other[axis] + other[axis + 2]) - max(one[axis], other[axis]) for axis in (0, 1)
    )
    shared = wide * high if wide > 1 and high > 1 else 0.0
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)
