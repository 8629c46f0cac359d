"""What BLIP-2's report shows beside its rows: learning curves, tokens against time and accuracy, answers, retrieval."""

from __future__ import annotations

import io
import statistics
import warnings
from pathlib import Path

import torch
from torch import Tensor

from papers.blip2.data import ExperimentData
from papers.blip2.encode import answer, caption, encoded, reranked
from papers.blip2.evidence.headline import first_pairs, headline_stage2, other_pictures
from papers.blip2.evidence.measuring import answering, rows_of
from papers.blip2.evidence.stages import StagePipeline
from papers.blip2.recipe import Blip2Recipe
from shared.core.paper_package import Context
from shared.core.text import one_line
from shared.experiments.ablations import seeds_of
from shared.report import plots as figures
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
    drawn = curves(measured)
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


def curves(measured: list[dict[str, dict]]) -> list[Figure]:
    drawn = []
    for name, title in LOSSES.items():
        series = {}
        for arm in measured[0]:
            of_seeds = [one[arm]["curves"].get(name) for one in measured if "curves" in one.get(arm, {})]
            if of_seeds and all(of_seeds):
                series[arm] = of_seeds
        if series:
            caption_ = "Mean over seeds; the band spans the lowest and the highest seed."
            drawn.append(figures.curves(series, name=title, caption=caption_, x_label="pairs seen", y_label="loss"))
    return drawn


def tokens_figure(measured: list[dict[str, dict]]) -> Figure | None:
    """Visual tokens before the language model: what a pass over them takes, and how well it answers behind them."""
    times = [dict(one["visual_tokens"]["curves"]["milliseconds"]) for one in measured if "visual_tokens" in one]
    if not times:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    counts = sorted(times[0])
    cost = [statistics.median(one[count] for one in times) for count in counts]
    arms = [arm for arm in QUERIES if all("accuracy" in one.get(arm, {}) for one in measured)]
    figure = Canvas(figsize=(9.5, 3.8), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(counts, cost, "o-", color="#0072B2")
    left.set(xlabel="visual tokens m (and 16 of text, n)", ylabel="milliseconds a pass")
    left.set_title("Cost of a pass over m + n tokens", loc="left", fontsize=10, fontweight="bold")
    if arms:
        queries = [measured[0][arm]["queries"] for arm in arms]
        values = [[one[arm]["accuracy"] for one in measured] for arm in arms]
        right.plot(queries, [statistics.fmean(v) for v in values], "o-", color="#D55E00")
        right.fill_between(queries, [min(v) for v in values], [max(v) for v in values], color="#D55E00", alpha=0.18)
        right.set_xscale("log", base=2)
        right.set_xticks(queries, [str(count) for count in queries])
    right.set(xlabel="queries, each a visual token", ylabel="right answers, %")
    right.set_title("Quality", loc="left", fontsize=10, fontweight="bold")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    said = (
        "Left: the headline's language model over m visual tokens and 16 of text, median of passes and seeds; 32 is "
        "the paper's number of queries, 257 that of its encoders' patches; attention grows as (m + n)², the layers "
        "around it as m + n. Right: held-out accuracy by the number of queries, from a second stage without a first, "
        "mean over seeds; the band spans the lowest and the highest."
    )
    return Figure("Visual tokens: cost and quality", said, content.getvalue())


def answers_figure(work: StagePipeline, recipe: Blip2Recipe, arm: str) -> Figure:
    """Held-out pictures with questions and what the language model answers: seeing the picture, another one, nothing;
    of pictures without questions its captions."""
    data = work.data
    headline = arm == "headline"
    bundle = work.bundle("headline" if headline else "small")
    model, _ = headline_stage2(work, bundle) if headline else work.stage2(arm, bundle)
    features = work.features("asked") if data.generated else work.features("held")
    lines: dict[int, list[tuple[str, bool | None]]] = {}
    if data.generated:
        how, asked = answering(recipe), first_pairs(data.eval_set.questions, 4 * EXAMPLES)[::3]
        questions = [one.question for one in asked]
        seen, strange = rows_of(asked), other_pictures(asked, len(features))
        ways: list[tuple[str, Tensor | None]] = [
            ("picture", features[seen]), ("another picture", features[strange]), ("blind", None)
        ]  # fmt: skip
        said = {name: answer(model, bundle.tokenizer, some, questions, how) for name, some in ways}
        for place, one in enumerate(asked):
            told = [(f"{name}: {texts[place]}", texts[place].lower() == one.answer) for name, texts in said.items()]
            lines.setdefault(one.picture, [(one.question, None), *told])
        note = "Held-out pictures, a question each, and the answers of the language model; ✓ is right."
    else:
        rows = list(range(0, len(features), max(1, len(features) // (2 * EXAMPLES))))[: 2 * EXAMPLES]
        said_of = caption(model, bundle.tokenizer, features[torch.tensor(rows)])
        lines = {row: [(text, None)] for row, text in zip(rows, said_of, strict=True)}
        note = "Held-out pictures and the language model's captions of them."
    images = data.eval_set.question_images if data.generated else data.eval_set.images
    return pictures(images, lines, "Answers", note)


def pictures(images: Tensor, lines: dict[int, list[tuple[str, bool | None]]], name: str, note: str) -> Figure:
    """A grid of pictures, each over its lines; True: right, False: wrong, None: neither."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    columns = 4
    rows = max(1, -(-len(lines) // columns))
    height = 3.1 * rows  # inches
    figure = Canvas(figsize=(10, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    for place, (row, texts) in enumerate(lines.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(images[row].permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_axis_off()
        for line, (text, right) in enumerate(texts):
            colour = {None: "#1f2937", True: "#17663f", False: "#9d2a25"}[right]
            mark = {None: "", True: "✓ ", False: "✗ "}[right]
            shown = (mark + one_line(text))[:44].replace("$", r"\$")
            axes.text(0.5, -0.05 - 0.12 * line, shown, transform=axes.transAxes, ha="center", va="top", fontsize=7.5,
                      color=colour)  # fmt: skip
    figure.subplots_adjust(left=0.02, right=0.98, top=0.98, bottom=1.0 / height, hspace=0.6, wspace=0.1)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a language model may write in any script
        figure.savefig(content, format="png", metadata={"Software": None})
    return Figure(name, note, content.getvalue())


def retrieval_examples(work: StagePipeline, recipe: Blip2Recipe) -> list[Sample]:
    """Held-out pictures with the captions that stage 1's model ranks first, after matching."""
    data: ExperimentData = work.data
    eval_set, (model, _) = data.eval_set, work.stage1()
    scores, _ = reranked(model, encoded(model, work.features("held")), data.tokens(eval_set.texts), recipe.candidates)
    queries, owner = [several[0] for several in eval_set.references], eval_set.owner.tolist()
    return figures.retrieval_examples(
        scores,
        eval_set.images,
        queries,
        eval_set.texts,
        lambda row, i: owner[i] == row,
        most=min(RANKED, recipe.candidates),
    )
