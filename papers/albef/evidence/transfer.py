"""What pre-training is worth to other tasks, shown small (Sec. 5): a pre-trained model and one from scratch, tuned on
generated questions (VQA), hypotheses (SNLI-VE) and sentences about two pictures (NLVR2) alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from papers.albef.data import ExperimentData
from papers.albef.model import Albef
from papers.albef.module import decay_groups
from papers.albef.recipe import AlbefRecipe
from papers.albef.tasks import AlbefVqa, Distilled, Entailment, Nlvr2, PairEncoder, QuestionAnswering, TextAssignment
from shared.data.synthetic import tasks
from shared.data.synthetic.samples import Question
from shared.data.vqa import VERDICTS
from shared.training.simple import fit_simple

TESTED = 256
ALPHA = 0.4  # the teacher's share in fine-tuning, too (configs/*.yaml)


@dataclass(frozen=True)
class Set:
    """Samples of one task. answers: only where they are texts."""

    images: Tensor  # (N, 3, H, W) uint8, or (N, 2, 3, H, W)
    texts: list[str]
    labels: Tensor  # (N,)
    answers: list[str]


def transfer(model: Albef, data: ExperimentData, recipe: AlbefRecipe, seed: int) -> dict:
    """{`vqa`, `entailment`, `nlvr2`: points right; the same with `_scratch`; with `_chance`: the most frequent answer}.

    `model` itself stays as it is. Nothing where the pictures are not generated, or where no step is asked for.
    """
    if data.pack is None or not recipe.transfer_steps:
        return {}
    points = {}
    with torch.random.fork_rng(devices=[]):
        for name, task in TASKS.items():
            train, test = task.make(data, recipe, seed)
            for ending, start in (("", model), ("_scratch", None)):
                torch.manual_seed(seed)
                begin = Albef(data.config) if start is None else deepcopy(start)
                tuned = task.tune(begin.to(model.temperature.device), train, data, recipe)
                points[name + ending] = 100 * float((tuned(test) == test.labels).float().mean())
            points[f"{name}_chance"] = 100 * float(torch.bincount(test.labels).max()) / len(test.labels)
    return points


@dataclass(frozen=True)
class Task:
    make: Callable[[ExperimentData, AlbefRecipe, int], tuple[Set, Set]]  # to tune on, to test on
    tune: Callable[[Albef, Set, ExperimentData, AlbefRecipe], Callable[[Set], Tensor]]  # -> what answers a set


# ---- the sets


def questions(data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[Set, Set]:
    """The answers are those of the questions that are tuned on; another one cannot be given."""
    train, test = generated(tasks.question, data, recipe, seed)
    answers = sorted({sample.answer for sample in train})
    number = {answer: place for place, answer in enumerate(answers)}

    def read(sample: Question) -> tuple[np.ndarray, str, int]:
        return sample.image, sample.question, number.get(sample.answer, len(answers))

    return as_set(train, read, answers), as_set(test, read, answers)


def hypotheses(data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[Set, Set]:
    parts = generated(tasks.hypothesis, data, recipe, seed)
    return tuple(as_set(part, lambda sample: (sample.image, sample.text, VERDICTS.index(sample.verdict)))
                 for part in parts)  # fmt: skip


def sentences(data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[Set, Set]:
    parts = generated(tasks.statement, data, recipe, seed)
    return tuple(as_set(part, lambda sample: (np.stack(sample.images), sample.text, int(sample.label)))
                 for part in parts)  # fmt: skip


def generated(task: Callable, data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[list, list]:
    """Samples to tune on, of scenes that pre-training has not seen, and samples to test on."""
    scenes = {"size": recipe.image_size, "seed": seed, "options": recipe.scene_options}
    counts = {"tune": recipe.pairs, "test": TESTED}
    return tuple([task(data.pack, split, i, **scenes) for i in range(count)] for split, count in counts.items())


def as_set(samples: Sequence, read: Callable, answers: Sequence[str] = ()) -> Set:
    """read: of a sample its pictures (..., H, W, 3), text and label."""
    images, texts, labels = zip(*map(read, samples), strict=True)
    images = torch.stack([torch.from_numpy(image).movedim(-1, -3) for image in images])
    return Set(images, list(texts), torch.tensor(labels), list(answers))


# ---- the models


def tune_vqa(model: Albef, train: Set, data: ExperimentData, recipe: AlbefRecipe) -> Callable[[Set], Tensor]:
    tuned = AlbefVqa(QuestionAnswering(model), data.config.momentum)
    candidates = data.tokens(train.answers).to(device_of(model))
    questions, answers = data.tokens(train.texts), data.tokens([train.answers[label] for label in train.labels])

    def loss(rows: Tensor, alpha: float) -> Tensor:
        own = torch.arange(len(rows))
        batch = train.images[rows], questions[rows], answers[rows], torch.ones(len(rows)), own
        return tuned.loss(*(part.to(candidates.device) for part in batch), alpha)

    step_by_step(tuned, loss, len(train.texts), recipe)
    return lambda test: in_parts(lambda *batch: tuned.predict(*batch, candidates, 16), test, data, candidates.device)


def tune_entailment(model: Albef, train: Set, data: ExperimentData, recipe: AlbefRecipe) -> Callable[[Set], Tensor]:
    return tune_classifier(Distilled(Entailment(model), data.config.momentum), train, data, recipe)


def tune_nlvr2(model: Albef, train: Set, data: ExperimentData, recipe: AlbefRecipe) -> Callable[[Set], Tensor]:
    """Text assignment first, on the pictures and captions of pre-training."""
    pair = PairEncoder(model)
    assignment, device = TextAssignment(pair), device_of(model)
    captions = data.tokens([several[0] for several in data.dataset.train.captions])
    pictures = data.dataset.train.images

    def loss(rows: Tensor, alpha: float) -> Tensor:
        return assignment.loss(pictures[rows].to(device), captions[rows].to(device), alpha)

    step_by_step(assignment, loss, len(captions), recipe)
    return tune_classifier(Distilled(Nlvr2(pair), data.config.momentum), train, data, recipe)


def tune_classifier(tuned: Distilled, train: Set, data: ExperimentData, recipe: AlbefRecipe) -> Callable[[Set], Tensor]:
    device, tokens = device_of(tuned), data.tokens(train.texts)
    tuned.to(device)

    def loss(rows: Tensor, alpha: float) -> Tensor:
        batch = train.images[rows], tokens[rows], train.labels[rows]
        return tuned.loss(*(part.to(device) for part in batch), alpha)

    step_by_step(tuned, loss, len(train.texts), recipe)
    return lambda test: in_parts(tuned.predict, test, data, device)


def step_by_step(model: nn.Module, loss: Callable[[Tensor, float], Tensor], rows: int, recipe: AlbefRecipe) -> None:
    """AdamW at half the pre-training rate, falling to nothing; the teacher's share grows over the first half."""
    steps = recipe.transfer_steps

    def next_loss(step: int) -> Tensor:
        return loss(torch.randint(rows, (min(recipe.batch, rows),)), ALPHA * min(1.0, 2 * step / steps))

    model.train()
    fit_simple(
        next_loss, decay_groups(model, recipe.weight_decay), steps, recipe.learning_rate / 2,
        betas=(recipe.beta1, recipe.beta2), share=lambda step: 1 - step / steps,
    )  # fmt: skip
    model.eval()


def in_parts(
    predict: Callable[[Tensor, Tensor], Tensor], test: Set, data: ExperimentData, device: torch.device
) -> Tensor:
    tokens = data.tokens(test.texts)
    parts = zip(test.images.split(64), tokens.split(64), strict=True)
    return torch.cat([predict(images.to(device), words.to(device)).cpu() for images, words in parts])


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


TASKS = {
    "vqa": Task(questions, tune_vqa),
    "entailment": Task(hypotheses, tune_entailment),
    "nlvr2": Task(sentences, tune_nlvr2),
}
