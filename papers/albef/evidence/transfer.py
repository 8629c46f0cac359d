"""What pre-training is worth to other tasks, shown small (Sec. 5): a pre-trained model and one from scratch, tuned on
generated questions (VQA), hypotheses (SNLI-VE) and sentences about two pictures (NLVR2) alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papers.albef.data import ExperimentData
from papers.albef.model import Albef
from papers.albef.module import decay_groups
from papers.albef.recipe import AlbefRecipe
from papers.albef.tasks import AlbefVqa, Distilled, Entailment, Nlvr2, PairEncoder, QuestionAnswering, TextAssignment
from shared.core.device import device_for
from shared.data.synthetic import tasks
from shared.data.vqa import VERDICTS
from shared.training.simple import fit_simple

TESTED = 256
ALPHA = 0.4  # the teacher's share in fine-tuning, too (configs/*.yaml)


@dataclass(frozen=True)
class Set:
    """Samples of one task. answers: only where they are texts."""

    images: Tensor  # (N, 3, H, W) uint8, or (N, 2, 3, H, W)
    tokens: Tensor  # (N, T)
    labels: Tensor  # (N,)
    answers: Sequence[str] = ()


Predict = Callable[[Tensor, Tensor], Tensor]  # images, tokens -> labels


def transfer(model: Albef, data: ExperimentData, recipe: AlbefRecipe, seed: int) -> dict:
    """{`vqa`, `entailment`, `nlvr2`: points right; the same with `_scratch`; with `_chance`: the most frequent answer}.

    `model` itself stays as it is. Nothing where the pictures are not generated, or where no step is asked for.
    """
    if data.pack is None or not recipe.transfer_steps:
        return {}
    points, device = {}, device_for(recipe)
    with torch.random.fork_rng(devices=[]):
        for name, (make, tune) in TASKS.items():
            train, test = make(data, recipe, seed)
            for ending, start in (("", model), ("_scratch", None)):
                torch.manual_seed(seed)
                begin = Albef(data.config) if start is None else deepcopy(start)
                predict = tune(begin.to(device), train, data, recipe)
                batches = zip(test.images.split(64), test.tokens.split(64), strict=True)
                labels = torch.cat([predict(images.to(device), tokens.to(device)).cpu() for images, tokens in batches])
                points[name + ending] = 100 * float((labels == test.labels).float().mean())
            points[f"{name}_chance"] = 100 * float(torch.bincount(test.labels).max()) / len(test.labels)
    return points


# ---- the sets: to tune on, and to test on


def questions(data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[Set, Set]:
    """The answers are those of the questions that are tuned on; another one cannot be given."""
    parts = generated(tasks.question, data, recipe, seed)
    answers = sorted({sample.answer for sample in parts[0]})
    number = {answer: place for place, answer in enumerate(answers)}
    return sets(
        data, parts, lambda sample: (sample.image, sample.question, number.get(sample.answer, len(answers))), answers
    )


def hypotheses(data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[Set, Set]:
    parts = generated(tasks.hypothesis, data, recipe, seed)
    return sets(data, parts, lambda sample: (sample.image, sample.text, VERDICTS.index(sample.verdict)))


def sentences(data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[Set, Set]:
    parts = generated(tasks.statement, data, recipe, seed)
    return sets(data, parts, lambda sample: (np.stack(sample.images), sample.text, int(sample.label)))


def generated(task: Callable, data: ExperimentData, recipe: AlbefRecipe, seed: int) -> list[list]:
    """Samples to tune on, of scenes that pre-training has not seen, and samples to test on."""
    scenes = {"size": recipe.image_size, "seed": seed, "options": recipe.scene_options}
    counts = {"tune": recipe.pairs, "test": TESTED}
    return [[task(data.pack, split, i, **scenes) for i in range(count)] for split, count in counts.items()]


def sets(
    data: ExperimentData, parts: list[list], of: Callable[[Any], tuple[np.ndarray, str, int]], answers: Sequence = ()
) -> tuple[Set, Set]:
    """of(sample) -> its picture, or two in one array, its text and its label."""

    def made(samples: list) -> Set:
        pictures, texts, labels = zip(*map(of, samples), strict=True)
        images = torch.stack([torch.from_numpy(picture).movedim(-1, -3) for picture in pictures])
        return Set(images, data.tokens(texts), torch.tensor(labels), answers)

    tune, test = map(made, parts)
    return tune, test


# ---- the models


def tune_vqa(model: Albef, train: Set, data: ExperimentData, recipe: AlbefRecipe) -> Predict:
    tuned = AlbefVqa(QuestionAnswering(model), data.config.momentum)
    answers = data.tokens([train.answers[label] for label in train.labels])
    candidates = data.tokens(train.answers).to(device_for(recipe))

    def loss(images: Tensor, questions: Tensor, answers: Tensor, alpha: float) -> Tensor:
        weights, owner = torch.ones(len(images)).to(images.device), torch.arange(len(images)).to(images.device)
        return tuned.loss(images, questions, answers, weights, owner, alpha)

    step_by_step(tuned, loss, (train.images, train.tokens, answers), recipe)
    return lambda images, questions: tuned.predict(images, questions, candidates, 16)


def tune_entailment(model: Albef, train: Set, data: ExperimentData, recipe: AlbefRecipe) -> Predict:
    return tune_classifier(Entailment(model), train, data, recipe)


def tune_nlvr2(model: Albef, train: Set, data: ExperimentData, recipe: AlbefRecipe) -> Predict:
    """Text assignment first, on the pictures and captions of pre-training."""
    pair = PairEncoder(model)
    assignment, pictures = TextAssignment(pair), data.dataset.train
    captions = data.tokens([several[0] for several in pictures.captions])
    step_by_step(assignment, assignment.loss, (pictures.images, captions), recipe)
    return tune_classifier(Nlvr2(pair), train, data, recipe)


def tune_classifier(student: nn.Module, train: Set, data: ExperimentData, recipe: AlbefRecipe) -> Predict:
    tuned = Distilled(student, data.config.momentum)
    step_by_step(tuned, tuned.loss, (train.images, train.tokens, train.labels), recipe)
    return tuned.predict


def step_by_step(model: nn.Module, loss: Callable[..., Tensor], tensors: tuple[Tensor, ...], recipe: AlbefRecipe):
    """AdamW at half the pre-training rate, falling to nothing; the teacher's share, which `loss` takes behind some rows
    of all tensors, grows over the first half."""
    steps, count, device = recipe.transfer_steps, len(tensors[0]), device_for(recipe)

    def next_loss(step: int) -> Tensor:
        rows = torch.randint(count, (min(recipe.batch, count),))
        return loss(*(tensor[rows].to(device) for tensor in tensors), ALPHA * min(1.0, 2 * step / steps))

    model.to(device).train()
    fit_simple(
        next_loss, decay_groups(model, recipe.weight_decay), steps, recipe.learning_rate / 2,
        betas=(recipe.beta1, recipe.beta2), share=lambda step: 1 - step / steps,
    )  # fmt: skip
    model.eval()


TASKS = {
    "vqa": (questions, tune_vqa),
    "entailment": (hypotheses, tune_entailment),
    "nlvr2": (sentences, tune_nlvr2),
}
