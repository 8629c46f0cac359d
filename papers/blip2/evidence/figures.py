"""What BLIP-2's report shows beside its rows: learning curves, tokens against time and accuracy, answers, retrieval."""

from __future__ import annotations

import statistics
from pathlib import Path

from papers.blip2.encode import answer, caption, encoded, reranked
from papers.blip2.evidence.headline import first_pairs, headline_stage2, other_pictures
from papers.blip2.evidence.measuring import answering, rows_of
from papers.blip2.evidence.stages import StagePipeline
from papers.blip2.recipe import Blip2Recipe
from shared.core.paper_package import Context
from shared.experiments.ablations import seeds_of
from shared.report import plots
from shared.report.rows import Figure, Sample

EXAMPLES, RANKED = 6, 5
LOSSES = {
    "loss": "Stage 2: loss of the text",
    "loss_stage1": "Stage 1: training loss",
    "loss_itc_stage1": "Stage 1: contrast (ITC)",
    "loss_itm_stage1": "Stage 1: matching (ITM)",
    "loss_itg_stage1": "Stage 1: captions (ITG)",
}
QUERIES = ("queries_one", "no_stage1", "queries_many")


def draw(recipe: Blip2Recipe, outcomes: dict[int, dict[str, dict]], folder: Path) -> tuple[list[Figure], list[Sample]]:
    """All figures that this run's arms allow; what is answered and found is the first seed's."""
    measured, seed = list(outcomes.values()), seeds_of(recipe)[0]
    drawn = []
    for metric, name in LOSSES.items():
        drawn += plots.learning_curves(measured, metric, name=name)
    if (tokens := tokens_figure(measured)) is not None:
        drawn.append(tokens)
    arms = outcomes.get(seed, {})
    samples = []
    if {"base", "headline"} & arms.keys():
        arm = "headline" if "headline" in arms else "base"
        work = StagePipeline.of(
            Context(recipe, seed, folder / "arms" / f"{arm}-{seed}", lambda samples: None, False, arm)
        )
        drawn.append(answers_figure(work, recipe, arm))
        samples = retrieval_examples(work, recipe)
    return drawn, samples


def tokens_figure(measured: list[dict[str, dict]]) -> Figure | None:
    """Visual tokens before the language model: what a pass over them takes, and how well it answers behind them."""
    times = [dict(seed["visual_tokens"]["curves"]["milliseconds"]) for seed in measured if "visual_tokens" in seed]
    if not times:
        return None
    counts = sorted(times[0])
    cost = [statistics.median(seed[count] for seed in times) for count in counts]
    arms = [arm for arm in QUERIES if all("accuracy" in seed.get(arm, {}) for seed in measured)]
    with plots.drawing(9.5, 3.8, columns=2) as (figure, (left, right), png):
        left.plot(counts, cost, "o-", color="#0072B2")
        plots.label_axes(
            left, "Cost of a pass over m + n tokens", "visual tokens m (and 16 of text, n)", "milliseconds a pass"
        )
        if arms:
            queries = [measured[0][arm]["queries"] for arm in arms]
            values = [[seed[arm]["accuracy"] for seed in measured] for arm in arms]
            right.plot(queries, [statistics.fmean(v) for v in values], "o-", color="#D55E00")
            right.fill_between(queries, [min(v) for v in values], [max(v) for v in values], color="#D55E00", alpha=0.18)
            right.set_xscale("log", base=2)
            right.set_xticks(queries, [str(count) for count in queries])
        plots.label_axes(right, "Quality", "queries, each a visual token", "right answers, %")
        figure.tight_layout()
    note = (
        "Left: the headline's language model over m visual tokens and 16 of text, median of passes and seeds; 32 is "
        "the paper's number of queries, 257 that of its encoders' patches; attention grows as (m + n)², the layers "
        "around it as m + n. Right: held-out accuracy by the number of queries, from a second stage without a first, "
        "mean over seeds; the band spans the lowest and the highest."
    )
    return Figure("Visual tokens: cost and quality", note, png())


def answers_figure(work: StagePipeline, recipe: Blip2Recipe, arm: str) -> Figure:
    """Held-out pictures with questions and what the language model answers: seeing the picture, another one, nothing;
    of pictures without questions its captions."""
    data, headline = work.data, arm == "headline"
    bundle = work.bundle("headline" if headline else "small")
    model, _ = headline_stage2(work, bundle) if headline else work.stage2(arm, bundle)
    features = work.features("asked") if data.generated else work.features("held")
    if not data.generated:
        every = max(1, len(features) // (2 * EXAMPLES))
        texts = caption(model, bundle.tokenizer, features[::every][: 2 * EXAMPLES])
        images = data.eval_set.images[: len(features) : every]
        cells = [(image, [(text, None)]) for image, text in zip(images, texts, strict=False)]
        note = "Held-out pictures and the language model's captions of them."
        return plots.image_grid(cells, name="Answers", caption=note)
    samples = first_pairs(data.eval_set.questions, 4 * EXAMPLES)[::3]
    seen = {
        "picture": features[rows_of(samples)],
        "another picture": features[other_pictures(samples, len(features))],
        "blind": None,
    }
    questions, generation = [sample.question for sample in samples], answering(recipe)
    answers = {name: answer(model, bundle.tokenizer, prefix, questions, generation) for name, prefix in seen.items()}
    by_picture: dict[int, list[tuple[str, bool | None]]] = {}  # the first question of each
    for place, sample in enumerate(samples):
        texts = [(f"{name}: {of[place]}", of[place].lower() == sample.answer) for name, of in answers.items()]
        by_picture.setdefault(sample.picture, [(sample.question, None), *texts])
    cells = [(data.eval_set.question_images[picture], texts) for picture, texts in by_picture.items()]
    note = "Held-out pictures, a question each, and the answers of the language model; ✓ is right."
    return plots.image_grid(cells, name="Answers", caption=note)


def retrieval_examples(work: StagePipeline, recipe: Blip2Recipe) -> list[Sample]:
    """Held-out pictures with the captions that stage 1's model ranks first, after matching."""
    data, (model, _) = work.data, work.stage1()
    eval_set = data.eval_set
    scores, _ = reranked(model, encoded(model, work.features("held")), data.tokens(eval_set.texts), recipe.candidates)
    return plots.ranked_captions(scores, eval_set, min(RANKED, recipe.candidates))
