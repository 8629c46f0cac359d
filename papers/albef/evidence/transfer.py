"""What pre-training is worth to other tasks, shown small (Sec. 5): a pre-trained model and one from scratch, tuned on
generated questions (VQA), hypotheses (SNLI-VE) and sentences about two pictures (NLVR2) alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from papers.albef.data import ExperimentData
from papers.albef.model import Albef
from papers.albef.module import decay_groups
from papers.albef.recipe import AlbefRecipe
from papers.albef.tasks import AlbefVqa, Distilled, Entailment, Nlvr2, PairEncoder, QuestionAnswering, TextAssignment
from shared.data.synthetic import tasks
from shared.data.vqa import VERDICTS

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
    found = {}
    with torch.random.fork_rng(devices=[]):
        for name, task in TASKS.items():
            train, test = task.make(data, recipe, seed)
            for ending, start in (("", model), ("_scratch", None)):
                torch.manual_seed(seed)
                begin = Albef(data.config) if start is None else deepcopy(start)
                tuned = task.tune(begin.to(model.temperature.device), train, data, recipe)
                found[name + ending] = 100 * float((tuned(test) == test.labels).float().mean())
            found[f"{name}_chance"] = 100 * float(torch.bincount(test.labels).max()) / len(test.labels)
    return found


@dataclass(frozen=True)
class Task:
    make: Callable[[ExperimentData, AlbefRecipe, int], tuple[Set, Set]]  # to tune on, to test on
    tune: Callable[[Albef, Set, ExperimentData, AlbefRecipe], Callable[[Set], Tensor]]  # -> what answers a set


# ---- the sets


def questions(data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[Set, Set]:
    """The answers are those of the questions that are tuned on; another one cannot be given."""
    parts = generated(tasks.question, data, recipe, seed)
    answers = sorted({one.answer for one in parts[0]})
    place = {answer: number for number, answer in enumerate(answers)}

    def made(part: list) -> Set:
        labels = torch.tensor([place.get(one.answer, len(answers)) for one in part])
        return Set(stacked([one.image for one in part]), [one.question for one in part], labels, answers)

    return made(parts[0]), made(parts[1])


def hypotheses(data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[Set, Set]:
    def made(part: list) -> Set:
        labels = torch.tensor([VERDICTS.index(one.verdict) for one in part])
        return Set(stacked([one.image for one in part]), [one.text for one in part], labels, [])

    train, test = generated(tasks.hypothesis, data, recipe, seed)
    return made(train), made(test)


def sentences(data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[Set, Set]:
    def made(part: list) -> Set:
        images = torch.stack([stacked([one.images[side] for one in part]) for side in (0, 1)], 1)
        return Set(images, [one.text for one in part], torch.tensor([int(one.label) for one in part]), [])

    train, test = generated(tasks.statement, data, recipe, seed)
    return made(train), made(test)


def generated(task: Callable, data: ExperimentData, recipe: AlbefRecipe, seed: int) -> tuple[list, list]:
    """Samples to tune on, of scenes that pre-training has not seen, and samples to test on."""
    given = {"size": recipe.image_size, "seed": seed, "options": data.options}
    counts = {"tune": recipe.pairs, "test": TESTED}
    return tuple([task(data.pack, split, i, **given) for i in range(count)] for split, count in counts.items())


def stacked(pictures: Sequence) -> Tensor:
    return torch.stack([torch.from_numpy(one).permute(2, 0, 1) for one in pictures])


# ---- the models


def tune_vqa(model: Albef, train: Set, data: ExperimentData, recipe: AlbefRecipe) -> Callable[[Set], Tensor]:
    tuned = AlbefVqa(QuestionAnswering(model), data.config.momentum)
    candidates = data.tokens(train.answers).to(device_of(model))
    asked, answers = data.tokens(train.texts), data.tokens([train.answers[label] for label in train.labels])

    def loss(rows: Tensor, alpha: float) -> Tensor:
        own = torch.arange(len(rows))
        batch = train.images[rows], asked[rows], answers[rows], torch.ones(len(rows)), own
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
    optimizer = torch.optim.AdamW(
        decay_groups(model, recipe.weight_decay), lr=recipe.learning_rate / 2, betas=(recipe.beta1, recipe.beta2)
    )
    steps, model = recipe.transfer_steps, model.train()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        value = loss(torch.randint(rows, (min(recipe.batch, rows),)), ALPHA * min(1.0, 2 * step / steps))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
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
