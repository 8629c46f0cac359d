"""The metrics rung: released weights on the paper's benchmarks, by the paper's protocol, in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from papers.albef.config import VARIANTS
from papers.albef.encode import Pictures, encode_pictures, encode_texts, reranked, tokens_of
from papers.albef.model import Albef, AlbefPretraining
from papers.albef.recipe import AlbefRecipe
from papers.albef.tasks import AlbefVqa, Distilled, heat_map
from papers.albef.text import clean_caption, clean_question
from papers.albef.weights import card_of, load_any
from shared.core.device import device_of, on_gpu_if_any
from shared.core.errors import UserError
from shared.core.paper_card import MetricRow
from shared.data.vqa import (
    VERDICTS,
    AskedPicture,
    Box,
    JudgedPicture,
    Referred,
    answer_list,
    entailment_rows,
    nlvr2_pairs,
    referred_things,
    vqa_questions,
)
from shared.experiments.benchmarks import (
    FOLDERS,
    Benchmark,
    Need,
    Released,
    Run,
    Weights,
    accuracy,
    answers_for_server,
    both_pictures,
    of_split,
    one_picture,
    released_file,
    retrieval,
    run_benchmark,
    trained_weights,
)
from shared.tokenizers.bert import BertTokenizer
from shared.weights.load import check_card
from shared.weights.manifest import Entry

KINDS = {  # the model that a task takes
    "retrieval": Albef,
    "vqa": AlbefVqa,
    "nlvr2": Distilled,
    "entailment": Distilled,
    "grounding": Albef,
}
CAPTION_WORDS, QUESTION_WORDS = 30, 50
KEPT_ANSWERS = 128  # ranked by all of their words, of the candidates (configs/VQA.yaml)
GRADCAM_LAYER = 2  # the third multimodal layer (Grounding.py, block_num 8 of the 12)
AREA_POWER = 0.5  # by which the heat in a proposal is divided (Grounding.py)

cleaned = partial(clean_caption, max_words=CAPTION_WORDS)


def measure(row: MetricRow, recipe: AlbefRecipe) -> float:
    """The row's score in percent. UserError: what is lacking, and the command that would run it."""
    return run_benchmark(row, recipe, BENCHMARKS, needs, load)


# ---- weights


def needs(row: MetricRow, entries: Mapping[str, Entry], root: Path) -> list[Need]:
    entry = entries[row.need.weights]
    if task := fine_tuned_for(row):
        how = f"fine-tuned for {task} from {entry.name} ({entry.origin}), released pre-trained only"
        return [trained_weights(f"{entry.id}-{task}", how, root)]
    return [released_file("weights", entry, root)]


def fine_tuned_for(row: MetricRow) -> str:
    """What pre-trained weights have to be tuned on before the row can be measured; '' where they are used as they are.

    Zero-shot retrieval on Flickr30k takes the model that was tuned on MSCOCO, that on MSCOCO the pre-trained one."""
    if row.need.weights not in ("albef-4m", "albef-14m"):
        return ""
    task = row.metric.partition("/")[0]
    if "@zeroshot" in row.metric:
        return "" if row.dataset == "MSCOCO" else "retrieval-coco"
    return f"retrieval-{FOLDERS[row.dataset]}" if task == "retrieval" else FOLDERS[row.dataset]


def load(weights: Weights) -> Released:
    """The model, held against its card; sizes of pictures and texts may be those of pre-training, from which it is
    carried to those of the benchmark. Texts end with [SEP], unless the card says that the official code leaves it out.
    UserError where the weights are none of the task's."""
    entry, path, config = weights.entry, weights.file, VARIANTS[weights.variant]()
    size, context = entry.preprocess.get("size", config.image_size), entry.tokenizer.get("context", config.context)
    closed = entry.tokenizer.get("closed", True)
    card = card_of(replace(config, image_size=size, context=context))
    check_card(entry, card | {"tokenizer": card["tokenizer"] | {"closed": closed}})
    model, kind = load_any(path, config), KINDS[weights.task]
    if isinstance(model, AlbefPretraining):  # retrieval's, too
        model = model.student
    if not isinstance(model, kind):
        given = type(model).__name__
        raise UserError(f"{path}: holds {given}, but {weights.task} takes {kind.__name__}; give its weights")
    longest = config.context if weights.task == "retrieval" else config.positions
    return Released(
        on_gpu_if_any(model), partial(tokens_of, tokenizer_of(), context=longest, closed=closed), config.image_size
    )


@lru_cache(maxsize=1)
def tokenizer_of() -> BertTokenizer:
    return BertTokenizer.uncased()


# ---- the tasks (Sec. 5)


def rank(
    released: Released, pictures: Sequence[Tensor], captions: Sequence[str], candidates: int
) -> tuple[Tensor, Tensor]:
    texts = encode_texts(released.model, released.tokenizer(captions))
    scores = reranked(released.model, Pictures(*pictures), texts, candidates)
    return scores.image_to_text, scores.text_to_image


@lru_cache(maxsize=1)
def candidates(folder: Path, positions: int) -> tuple[list[str], Tensor]:
    """The answers that questions are answered with, of answer_list.json in the folder, and their tokens (A, L)."""
    answers = answer_list(folder / "answer_list.json")
    return answers, tokens_of(tokenizer_of(), answers, positions)  # [SEP] ends an answer everywhere


def ranked_answers(run: Run, released: Released, questions: Sequence[AskedPicture], images: Tensor) -> list[str]:
    model, device = released.model, device_of(released.model)
    answers, listed = candidates(run.data, model.student.encoder.config.positions)
    tokens = released.tokenizer([clean_question(question.question, QUESTION_WORDS) for question in questions])
    best = model.predict(images[:, 0].to(device), tokens.to(device), listed.to(device), KEPT_ANSWERS)
    return [answers[place] for place in best.tolist()]


def verdicts(run: Run, released: Released, rows: Sequence[JudgedPicture], images: Tensor) -> list[str]:
    return [VERDICTS[number] for number in judge(released, images[:, 0], [row.hypothesis for row in rows])]


def judge(released: Released, images: Tensor, sentences: Sequence[str]) -> list[int]:
    device, tokens = device_of(released.model), released.tokenizer(list(map(cleaned, sentences)))
    return released.model.predict(images.to(device), tokens.to(device)).tolist()


def grounded(run: Run, released: Released, things: Sequence[Referred], images: Tensor) -> list[bool]:
    """Whether each expression's best proposal overlaps the right box by half (Sec. 6.4)."""
    device, tokens = device_of(released.model), released.tokenizer([cleaned(thing.expression) for thing in things])
    maps = heat_map(released.model, images[:, 0].to(device), tokens.to(device), GRADCAM_LAYER).cpu()
    return [
        overlap(best_proposal(heat, thing.proposals, thing.size), thing.box) >= 0.5
        for thing, heat in zip(things, maps, strict=True)
    ]


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


BENCHMARKS = {
    "retrieval": retrieval(
        lambda released, images: encode_pictures(released.model, images[:, 0]),
        rank,
        lambda record: list(map(cleaned, record.captions)),
    ),
    "vqa": Benchmark(of_split(vqa_questions), one_picture, ranked_answers, answers_for_server),
    "nlvr2": Benchmark(
        of_split(nlvr2_pairs),
        both_pictures,
        lambda run, released, pairs, images: judge(released, images, [pair.sentence for pair in pairs]),
        accuracy(lambda pair: pair.label),
    ),
    "entailment": Benchmark(of_split(entailment_rows), one_picture, verdicts, accuracy(lambda row: row.label)),
    "grounding": Benchmark(of_split(referred_things), one_picture, grounded, accuracy(lambda thing: True)),
}
