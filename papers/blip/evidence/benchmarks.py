"""The metrics rung: released weights on the paper's benchmarks, by the paper's protocol, in percent.

Where the authors released pre-trained weights alone, a row takes fine-tuned ones from data_root/weights/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papers.blip import config as configs
from papers.blip.config import SPECIALS, VARIANTS, BlipConfig
from papers.blip.encode import (
    Encoded,
    GenerationConfig,
    encoded,
    encoded_video,
    judge_pairs,
    rank_answers,
    reranked,
    score_candidates,
    see,
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
from shared.core.paper_card import MetricRow
from shared.data.benchmarks import AskedClip, Clip, Talk, msrvtt_clips, msrvtt_questions, visdial_talks
from shared.data.readers import Record
from shared.data.vqa import AskedPicture, JudgedPair, answer_list, nlvr2_pairs, vqa_questions
from shared.experiments.benchmarks import (
    Benchmark,
    Need,
    Released,
    Run,
    Weights,
    accuracy,
    answers_for_server,
    both_pictures,
    by_measure,
    captioning,
    of_split,
    one_picture,
    released_file,
    retrieval,
    run_benchmark,
    trained_weights,
)
from shared.metrics import dialogue_ranking, exact_match
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bert import BertTokenizer
from shared.weights.manifest import Entry

SIZES = {  # a task's pictures and texts, as the paper fine-tunes (App. A); video by configs/retrieval_msrvtt.yaml
    "retrieval": configs.retrieval,
    "caption": configs.caption,
    "vqa": configs.vqa,
    "nlvr2": configs.nlvr,
    "dialog": lambda config: configs.at(384, config, config.positions),
    "video-retrieval": configs.retrieval,
    "video-qa": configs.vqa,
}
PRETRAINED = ("blip-base-14m", "blip-base-129m", "blip-base-capfilt-l")  # ids of weights that no task has tuned
WORDS, LONG_WORDS, QUESTION_WORDS = 30, 40, 50  # of a text are kept; long: NLVR2 and videos

cleaned = partial(clean_caption, max_words=WORDS)


def measure(row: MetricRow, recipe: BlipRecipe) -> float:
    """The row's score in percent. UserError: what is lacking, and the command that would run it."""
    return run_benchmark(row, recipe, BENCHMARKS, needs, load)


# ---- weights


def needs(row: MetricRow, entries: Mapping[str, Entry], root: Path) -> list[Need]:
    entry = entries[row.need.weights]
    if entry.id in PRETRAINED:
        learned = "MSCOCO" if row.dataset == "NoCaps" or "zeroshot" in row.metric else row.dataset
        name = f"{entry.id}-{row.metric.partition('/')[0]}-{slug(learned)}"
        how = f"fine-tuned from {entry.file}, which the authors released pre-trained only"
        return [trained_weights(name, how, root)]
    return [released_file("weights", entry, root)]


def slug(dataset: str) -> str:
    return "".join(c for c in dataset.lower() if c.isalnum())


def load(weights: Weights) -> Released:
    """The network of a task, and BERT's tokenizer."""
    size = VARIANTS["blip-large" if weights.id.startswith("blip-large") else "blip-base"]()
    model = load_file(weights.places[0], SIZES[weights.task](size))
    if isinstance(model, BlipPretraining):
        model = model.blip
    if weights.task == "dialog" and not isinstance(model, BlipDialogue):
        model = BlipDialogue.started_from(model)
    return Released(on_gpu_if_any(model), tokenizer_of(model.config), model.config.image_size)


def tokenizer_of(config: BlipConfig) -> Tokenizer:
    return BertTokenizer.uncased(specials=SPECIALS)


# ---- retrieval (Sec. 5.1), captions (Sec. 5.2)


def rank(
    released: Released, pictures: Sequence[Tensor], texts: Sequence[str], candidates: int
) -> tuple[Tensor, Tensor]:
    tokens = tokens_of(released.tokenizer, texts, released.model.config)
    return reranked(released.model, Encoded(*pictures), tokens, candidates)


# ---- VQA (Sec. 5.3), NLVR2 (Sec. 5.4), VisDial (Sec. 5.5)


@lru_cache(maxsize=1)
def candidates(folder: Path, tokenizer: Tokenizer, config: BlipConfig) -> tuple[list[str], Tensor]:
    """The answers of answer_list.json in the folder (3,128, published by the authors), and their tokens (A, L)."""
    answers = answer_list(folder / "answer_list.json")
    return answers, tokens_of(tokenizer, answers, config)


def ranked_answers(run: Run, released: Released, questions: Sequence[AskedPicture], images: Tensor) -> list[str]:
    answers, listed = candidates(run.data, released.tokenizer, released.model.config)
    texts = [clean_question(question.question, QUESTION_WORDS) for question in questions]
    places = rank_answers(released.model, released.tokenizer, see(released.model, images[:, 0]), texts, listed)
    return [answers[place] for place in places.tolist()]


def judged(run: Run, released: Released, pairs: Sequence[JudgedPair], images: Tensor) -> list[bool]:
    sentences = [clean_caption(pair.sentence, LONG_WORDS) for pair in pairs]
    return judge_pairs(released.model, released.tokenizer, images, sentences)


def candidate_scores(run: Run, released: Released, talks: Sequence[Talk], images: Tensor) -> list[Tensor]:
    """Of each dialogue how likely the candidates are in its rounds (R, C), behind what was truly said before."""
    return [scores_of_rounds(released, talk, image) for talk, image in zip(talks, images[:, 0], strict=True)]


def scores_of_rounds(released: Released, talk: Talk, image: Tensor) -> Tensor:
    scores, dialogue = [], ""
    for turn in talk.rounds:
        dialogue = f"{dialogue} {clean_question(turn.question, QUESTION_WORDS)}".strip()
        answers = list(map(cleaned, turn.candidates))
        scores.append(
            score_candidates(released.model, released.tokenizer, image, cleaned(talk.caption), dialogue, answers)
        )
        dialogue = f"{dialogue} {answers[turn.right]}"
    return torch.stack(scores)


def dialogue_scores(run: Run, released: Released, talks: Sequence[Talk], scores: Sequence[Tensor]) -> dict[str, float]:
    right = torch.tensor([turn.right for talk in talks for turn in talk.rounds])
    return by_measure(dialogue_ranking(torch.cat(list(scores)), right))


# ---- videos (Sec. 5.6)


def frames(run: Run, sample: Clip | AskedClip) -> list[Record]:
    """As many frames as the protocol says: 'zeroshot-8frames-itc-top128-itm+itc' -> 8."""
    count = int(next(part for part in run.protocol.split("-") if part.endswith("frames")).removesuffix("frames"))
    clip = sample.clip if isinstance(sample, AskedClip) else sample
    chosen = [clip.frames[place] for place in frame_indices(len(clip.frames), count)]
    return [Record(f"{clip.id}/{path.name}", path.read_bytes) for path in chosen]


def video_hits(*given: Any) -> dict[str, float]:
    return {name.replace("t2i", "t2v"): share for name, share in VIDEOS.score(*given).items()}


def video_answers(run: Run, released: Released, questions: Sequence[AskedClip], images: Tensor) -> list[str]:
    texts = [clean_question(question.question, QUESTION_WORDS) for question in questions]
    return write_answers(released.model, released.tokenizer, see(released.model, images), texts)


def exact_answers(run: Run, released: Released, questions: Sequence[AskedClip], answers: Sequence[str]) -> dict:
    """Share of the questions whose written answer is the annotated one."""
    return {"top1": exact_match(answers, [[question.answer] for question in questions])["vqa/acc@exact"].score}


VIDEOS = retrieval(
    lambda released, frames: encoded_video(released.model, frames),
    rank,
    lambda clip: [clean_caption(clip.caption, LONG_WORDS)],
    lambda run: msrvtt_clips(run.data),
    frames,
    chunk=4,
)
BENCHMARKS = {
    "retrieval": retrieval(
        lambda released, images: encoded(released.model, images[:, 0]),
        rank,
        lambda record: list(map(cleaned, record.captions)),
    ),
    "caption": captioning(
        lambda run, released, records, images: write(
            released.model, released.tokenizer, images[:, 0], GenerationConfig()
        )
    ),
    "vqa": Benchmark(of_split(vqa_questions), one_picture, ranked_answers, answers_for_server),
    "nlvr2": Benchmark(of_split(nlvr2_pairs), both_pictures, judged, accuracy(lambda pair: pair.label)),
    "dialog": Benchmark(of_split(visdial_talks), one_picture, candidate_scores, dialogue_scores),
    "video-retrieval": replace(VIDEOS, score=video_hits),
    "video-qa": Benchmark(lambda run: msrvtt_questions(run.data), frames, video_answers, exact_answers, chunk=2),
}
