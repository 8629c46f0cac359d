"""BLIP-2's headline, small: questions about held-out pictures through a real language model, frozen in 16 bit, against
the same model with another picture and with none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from papers.blip2.data import Question
from papers.blip2.encode import chosen, pope_scores
from papers.blip2.evidence.measuring import (
    answers,
    by_kind,
    language_parameters,
    question_answering,
    right,
    rows_of,
    save_first_seed,
)
from papers.blip2.evidence.stages import StagePipeline, stage2_recipe
from papers.blip2.frozen import LanguageModelBundle
from papers.blip2.model import Blip2
from papers.blip2.module import WordsModule, unwrapped
from papers.blip2.recipe import OPEN
from shared.core.paper_package import Context
from shared.core.recipe import SEED_BASE
from shared.experiments.effects import of_stage


def headline(context: Context) -> dict:
    """Stage 1; visual words that begin as words; stage 2; then questions, and control arms that must not answer them.
    Nothing of seeds that the recipe leaves out."""
    recipe = context.recipe
    if context.seed - SEED_BASE >= recipe.headline_seeds:
        return {}
    work = StagePipeline.of(context)
    work.stage1()  # first, as another process may be at work on the language model
    bundle = work.bundle("headline")
    model, stats = headline_stage2(work, bundle)
    stats |= {
        "language_parameters": language_parameters(bundle),
        "language_model": recipe.headline_model or "small",
    }
    if not work.data.generated:
        return stats | question_answering(work, model, bundle)
    features = work.features("asked")
    questions = first_pairs(work.data.eval_set.questions, recipe.headline_questions)
    stats |= by_kind(answers(model, bundle, features, questions, recipe), questions)
    if recipe.headline_word_steps:
        stats |= before_stage2(work, bundle, features, questions)
    strangers = other_pictures(questions, len(features))
    stats["other_picture"] = right(answers(model, bundle, features, questions, recipe, strangers), questions)
    stats |= blind(work, model, bundle, questions)
    pope = first_pairs(work.data.eval_set.pope, recipe.headline_questions // 2)
    stats |= pope_scores(answers(model, bundle, features, pope, recipe), [question.answer for question in pope])
    save_first_seed(work, model, bundle, recipe.headline_asked)
    return stats


def headline_stage2(work: StagePipeline, bundle: LanguageModelBundle) -> tuple[Blip2, dict]:
    recipe = work.recipe
    return work.stage2_from(
        "headline", lambda: headline_start(work, bundle), bundle, stage2_recipe(recipe, headline=True),
        recipe.headline_asked, OPEN,
    )  # fmt: skip


# ---- before stage 2: visual words are fitted to words


def headline_start(work: StagePipeline, bundle: LanguageModelBundle) -> Blip2:
    """What the headline's stage 2 begins from: the plain arm's bridge, with a new projector. One that speaks to one
    language model learns another's words from far fewer samples (Zhang et al. 2023, VPGTrans, arXiv:2305.01278).

    Where the recipe has `headline_word_steps`, the visual words are fitted to words first: the queries say the answers
    to the open questions about a picture in turn, as the language model's table has them. The projector begins as the
    linear map that does so best; then the whole bridge trains for these steps. No language model runs, so a step takes
    milliseconds. It stays as it was where no questions are at hand.
    """
    recipe = work.recipe
    if recipe.language_model == "small" and bundle.config.family != "small":
        model = work.bridge_from(without_projector(work.stage2("base", work.bundle())[0]), bundle)
    else:
        model = work.new_bridge(bundle)
    if not recipe.headline_word_steps or not work.data.generated:
        return model

    def train(folder: Path) -> tuple[Blip2, dict]:
        features, word_recipe = work.features("train"), of_stage(stage2_recipe(recipe), recipe.headline_word_steps)
        targets = word_targets(bundle, work.data.open_answers(), model.config.queries)
        rows = torch.arange(len(features))
        fit_projector(model.to(work.device), features, targets)
        module = WordsModule(model, word_recipe, float(targets.var()))
        tensors = work.indexed(features, rows), work.indexed(targets, rows)
        return model, work.fit(module, tensors, folder, "words", [bundle.model])

    return work.stages.model("headline-words", lambda: model, train)[0]


def without_projector(model: Blip2) -> dict[str, Tensor]:
    """The weights of a bridge that do not depend on whom it speaks to."""
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("projector.")}


@torch.no_grad()
def word_targets(bundle: LanguageModelBundle, words: Sequence[Sequence[str]], queries: int) -> Tensor:
    """Words of each picture -> what its queries are to say, the words in turn: embeddings (I, Q, W) in fp32 on the CPU,
    of a word of several tokens their mean."""
    language, encode = bundle.model, bundle.tokenizer.encode
    device = next(unwrapped(language).parameters()).device
    embedding = {
        word: language.embed(torch.tensor(encode(f" {word}"), device=device)).float().mean(0).cpu()
        for word in dict.fromkeys(word for of_picture in words for word in of_picture)
    }
    return torch.stack(
        [torch.stack([embedding[several[query % len(several)]] for query in range(queries)]) for several in words]
    )


@torch.no_grad()
def fit_projector(model: Blip2, features: Tensor, targets: Tensor, ridge: float = 1e-5) -> None:
    """Set the projector to the least squares from the queries' states (I, Q, D), of features (I, S, C), to targets
    (I, Q, W). ridge: times the mean square of a channel, added so that a constant channel leaves it solvable."""
    model.eval()
    device, width = model.projector.weight.device, model.projector.in_features
    inner = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    across = torch.zeros(width + 1, targets.shape[-1], dtype=torch.float64)
    for some, wanted in zip(features.split(128), targets.split(128), strict=True):
        states = model.qformer.encode_queries(model.vision_norm(some.to(device))).double().cpu().flatten(0, 1)
        x = F.pad(states, (0, 1), value=1.0)  # (128 Q, D + 1)
        inner += x.T @ x
        across += x.T @ wanted.double().flatten(0, 1)
    inner += ridge * inner.diagonal()[:-1].mean() * torch.eye(width + 1, dtype=inner.dtype)
    solution = torch.linalg.solve(inner, across)  # (D + 1, W)
    model.projector.weight.copy_(solution[:-1].T)
    model.projector.bias.copy_(solution[-1])


def before_stage2(
    work: StagePipeline, bundle: LanguageModelBundle, features: Tensor, questions: Sequence[Question]
) -> dict:
    """`words_right`: what the visual words say; `before_stage2`: what the language model makes of them."""
    data, model = work.data, headline_start(work, bundle).to(work.device).eval()
    words = nearest_words(model, bundle, features, data.answers)  # (A, Q)
    spoken = [words[q.picture][data.open_kinds.index(q.kind)] for q in questions]
    texts = [q.question for q in questions]
    picked = chosen(model, bundle.tokenizer, features[rows_of(questions)], texts, data.answers)
    return {"words_right": right(spoken, questions), "before_stage2": right(picked, questions)}


@torch.no_grad()
def nearest_words(model: Blip2, bundle: LanguageModelBundle, features: Tensor, names: Sequence[str]) -> list[list[str]]:
    """Features of pictures (I, S, C) -> which of these words each query (Q) of each says, by Euclidean distance."""
    table = word_targets(bundle, [[name] for name in names], 1)[:, 0]  # (A, W)
    prefix = model.prefix(features.to(model.projector.weight.device)).float().cpu()  # (I, Q, W)
    return [[names[place] for place in row] for row in torch.cdist(prefix, table).argmin(-1).tolist()]


# ---- control arms


def blind(
    work: StagePipeline, model: Blip2, bundle: LanguageModelBundle, questions: Sequence[Question]
) -> dict[str, float]:
    """Without a picture: `blind_writing` in its own words, `blind_choosing` among all answers, `blind` the better."""
    distinct = list({q.question: q for q in questions}.values())  # a blind model answers alike what is asked alike
    predictions = answers(model, bundle, None, distinct, work.recipe)
    prediction = {q.question: text for q, text in zip(distinct, predictions, strict=True)}
    writing = right([prediction[q.question] for q in questions], questions)
    fewer = first_pairs(questions, len(questions) // 2)  # every answer is weighed for each
    choices = chosen(model, bundle.tokenizer, None, [q.question for q in fewer], work.data.answers)
    choosing = right(choices, fewer)
    return {"blind_writing": writing, "blind_choosing": choosing, "blind": max(writing, choosing)}


def other_pictures(questions: Sequence[Question], pictures: int) -> Tensor:
    """For each question any of the set's pictures but its own. (N,)"""
    generator = torch.Generator().manual_seed(0)
    return (rows_of(questions) + torch.randint(1, pictures, (len(questions),), generator=generator)) % pictures


def first_pairs(questions: Sequence[Question], count: int) -> list[Question]:
    """So many from the list's begin on, a whole number of pairs: things come there in turn, so that all are asked
    about, and kinds and answers stay balanced."""
    return list(questions[: max(2, count - count % 2)])
