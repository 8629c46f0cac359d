"""How BLIP-2's arms are measured: retrieval after stage 1, answers to questions after stage 2; and what the first seed
leaves with its run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from papers.blip2.bundle import keep_frozen
from papers.blip2.data import Question
from papers.blip2.encode import (
    CAPTIONING,
    GenerationConfig,
    accuracy,
    answer,
    caption,
    cosines,
    encoded,
    reranked,
    text_features,
)
from papers.blip2.evidence.stages import StagePipeline
from papers.blip2.frozen import LanguageModelBundle
from papers.blip2.model import Blip2, Blip2Qformer
from papers.blip2.recipe import Blip2Recipe
from shared.metrics import caption_scores, reranked_points, retrieval_hits
from shared.weights.load import save_weights


def retrieval(work: StagePipeline, model: Blip2Qformer) -> dict:
    """R@1 on held-out pictures in points, mean of both directions: `r1` after re-ranking, `itc_r1` without."""
    eval_set, candidates = work.data.eval_set, work.recipe.candidates
    tokens = work.data.tokens(eval_set.texts).to(work.device)
    pictures = encoded(model.eval(), work.features("held").to(work.device))  # re-ranking reads them often
    itc = retrieval_hits(cosines(pictures, text_features(model, tokens)), eval_set.owner, ks=(1,))
    return reranked_points(*reranked(model, pictures, tokens, candidates), itc, eval_set.owner, candidates)


def question_answering(work: StagePipeline, model: Blip2, bundle: LanguageModelBundle) -> dict:
    """Exact-match accuracy in points on all held-out questions, `accuracy`, and on each kind of them; on a published
    set, which has no questions, CIDEr-D of captions."""
    eval_set = work.data.eval_set
    if not eval_set.questions:
        captions = caption(model, bundle.tokenizer, work.features("held"), CAPTIONING)
        return {"cider": 100 * caption_scores(captions, eval_set.references)["caption/cider_d@treebank"].score}
    features = work.features("asked")
    return by_kind(answers(model, bundle, features, eval_set.questions, work.recipe), eval_set.questions)


def answers(
    model: Blip2,
    bundle: LanguageModelBundle,
    features: Tensor | None,
    questions: Sequence[Question],
    recipe: Blip2Recipe,
    rows: Tensor | None = None,
) -> list[str]:
    """What the model says to each question. features (I, S, C): of the questions' pictures, None for a blind model;
    rows (N,): or of these."""
    if features is not None:
        features = features[rows_of(questions) if rows is None else rows]
    return answer(model, bundle.tokenizer, features, [q.question for q in questions], answering(recipe))


def answering(recipe: Blip2Recipe) -> GenerationConfig:
    return GenerationConfig(recipe.beams, recipe.length_penalty, recipe.longest)


def rows_of(questions: Sequence[Question]) -> Tensor:
    return torch.tensor([question.picture for question in questions])


def right(predictions: Sequence[str], questions: Sequence[Question]) -> float:
    """Exact match in points."""
    return accuracy(predictions, [question.answer for question in questions])


def by_kind(predictions: Sequence[str], questions: Sequence[Question]) -> dict:
    """{`accuracy`, `accuracy_<kind>`: exact match in points}"""
    scores = {"accuracy": right(predictions, questions)}
    for kind in dict.fromkeys(question.kind for question in questions):
        pairs = [(text, q) for text, q in zip(predictions, questions, strict=True) if q.kind == kind]
        scores[f"accuracy_{kind}"] = right(*zip(*pairs, strict=True))
    return scores


def language_parameters(bundle: LanguageModelBundle) -> int:
    return sum(p.numel() for p in bundle.model.module.parameters())


def save_first_seed(work: StagePipeline, model: Blip2, bundle: LanguageModelBundle, share: float) -> None:
    """The first seed's bridge stays with the run, and what it needs beside it: figures are drawn from it, and
    `python -m papers ask` and `chat` load it. share: of questions among the texts that it learned."""
    if not work.context.first:
        return
    recipe, folder, spec, tokenizer = work.recipe, work.context.folder, work.encoder_spec, work.data.tokenizer
    save_weights(model, folder / "model.safetensors", {"variant": recipe.model})
    tokenizer.save(folder / "tokenizer.json")
    keep_frozen(
        folder, model.config, recipe.model, work.encoder(), getattr(recipe, spec.encoder), spec.layer or recipe.layer,
        bundle.model, tokenizer, work.data.has_captions(share),
    )  # fmt: skip
