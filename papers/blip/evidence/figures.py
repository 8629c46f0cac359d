"""What BLIP's report shows beside its rows: learning curves, the filter's decisions, captions, retrieval."""

from __future__ import annotations

import io
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor

from papers.blip.config import with_tokenizer
from papers.blip.data import ExperimentData, build_data
from papers.blip.encode import GenerationConfig, encoded, reranked, tokens_of, write
from papers.blip.evidence.capfilt_page import Decision, read_lines
from papers.blip.recipe import BlipRecipe
from papers.blip.weights import load_file
from shared.core.text import one_line
from shared.experiments.ablations import seeds_of
from shared.report import plots as figures
from shared.report.rows import Figure, Sample

EXAMPLES, RANKED = 6, 5
LOSSES = {
    "loss": "Training loss",
    "loss_itc": "Contrast (ITC)",
    "loss_itm": "Matching (ITM)",
    "loss_lm": "Captions (LM)",
}
SHOWN = ("noisy", "filter_only", "captioner_only", "both")  # of the loss in parts


def draw(recipe: BlipRecipe, outcomes: dict[int, dict[str, dict]], folder: Path) -> tuple[list[Figure], list[Sample]]:
    """All figures that this run's arms allow; models and decisions shown are those of the first seed."""
    drawn = curves(list(outcomes.values()))
    seed = seeds_of(recipe)[0]
    data = build_data(recipe, seed)
    arms = folder / "arms"
    decisions = arms / f"both-{seed}" / "capfilt.jsonl"
    if decisions.is_file():
        for name in ("capfilt.html", "capfilt.jsonl"):
            shutil.copyfile(decisions.with_name(name), folder / name)
        drawn.append(decision_figure(read_lines(decisions), data))
    if (weights := arms / f"captioner-{seed}" / "model.safetensors").is_file():
        drawn.append(caption_figure(weights, data, recipe))
    samples = []
    if (weights := arms / f"both-{seed}" / "model.safetensors").is_file():
        samples = retrieval_examples(load_file(weights, with_tokenizer(data.config, data.tokenizer)), data, recipe)
    return drawn, samples


def curves(measured: list[dict[str, dict]]) -> list[Figure]:
    drawn = []
    for name, title in LOSSES.items():
        series = {}
        for arm in measured[0]:
            of_seeds = [one[arm]["curves"].get(name) for one in measured if "curves" in one.get(arm, {})]
            if of_seeds and all(of_seeds) and (name == "loss" or arm in SHOWN):
                series[arm] = of_seeds
        if series:
            caption = "Mean over seeds; the band spans the lowest and the highest seed."
            drawn.append(figures.curves(series, name=title, caption=caption, x_label="pairs seen", y_label="loss"))
    return drawn


def decision_figure(decisions: list[Decision], data: ExperimentData) -> Figure:
    """Pictures with both texts, some of each outcome of the filter."""
    by_picture: dict[int, dict[str, Decision]] = {}
    for one in decisions:
        by_picture.setdefault(one.picture, {}).setdefault(one.origin, one)
    outcomes: dict[tuple, list[int]] = {}
    for picture, texts in by_picture.items():
        if {"web", "written"} <= texts.keys():
            outcomes.setdefault((texts["web"].kept, texts["written"].kept), []).append(picture)
    chosen = [picture for outcome in ((False, True), (True, True), (True, False), (False, False))
              for picture in outcomes.get(outcome, [])[: EXAMPLES // 2]]  # fmt: skip
    lines = {
        picture: [
            (f"{origin}: {by_picture[picture][origin].text}", by_picture[picture][origin].kept)
            for origin in ("web", "written")
        ]
        for picture in chosen
    }
    caption = (
        "Web pictures with the web's text and the written one; ✓ was kept by the filter, ✗ was "
        "dropped. All of them, page by page: capfilt.html beside this report."
    )
    return pictures(data.dataset.train.images, lines, "What CapFilt kept and dropped", caption)


def caption_figure(weights: Path, data: ExperimentData, recipe: BlipRecipe) -> Figure:
    """Held-out pictures with what the captioner says of them, by beam search and sampled from the nucleus."""
    model = load_file(weights, with_tokenizer(data.config, data.tokenizer))
    rows = list(range(0, len(data.eval_set.images), max(1, len(data.eval_set.images) // (2 * EXAMPLES))))[
        : 2 * EXAMPLES
    ]
    images = data.eval_set.images[torch.tensor(rows)]
    lengths = {"longest": recipe.longest, "shortest": recipe.shortest}
    beam = write(model, data.tokenizer, images, GenerationConfig(recipe.prompt, recipe.beams, **lengths))
    sampled = write(model, data.tokenizer, images, GenerationConfig(recipe.prompt, nucleus=recipe.top_p, **lengths))
    lines = {
        row: [(f"beam: {one}", None), (f"nucleus: {other}", None)]
        for row, one, other in zip(rows, beam, sampled, strict=True)
    }
    caption = f"Held-out pictures and the captioner's words behind '{recipe.prompt}': beam search, and one sample."
    return pictures(data.eval_set.images, lines, "Captions", caption)


def pictures(images: Tensor, lines: dict[int, list[tuple[str, bool | None]]], name: str, caption: str) -> Figure:
    """A grid of pictures, each over its lines; True: kept, False: dropped, None: neither."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    columns = 4
    rows = max(1, -(-len(lines) // columns))
    height = 2.7 * rows  # inches
    figure = Canvas(figsize=(10, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    for place, (row, texts) in enumerate(lines.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(images[row].permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_axis_off()
        for line, (text, kept) in enumerate(texts):
            colour = {None: "#1f2937", True: "#17663f", False: "#9d2a25"}[kept]
            mark = {None: "", True: "✓ ", False: "✗ "}[kept]
            shown = wrapped(mark + one_line(text)).replace("$", r"\$")
            axes.text(0.5, -0.05 - 0.2 * line, shown, transform=axes.transAxes, ha="center", va="top", fontsize=7.5,
                      color=colour)  # fmt: skip
    figure.subplots_adjust(left=0.02, right=0.98, top=0.98, bottom=0.8 / height, hspace=0.45, wspace=0.1)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a captioner may write in any script
        figure.savefig(content, format="png", metadata={"Software": None})
    return Figure(name, caption, content.getvalue())


def wrapped(text: str, width: int = 38, most: int = 2) -> str:
    import textwrap

    lines = textwrap.wrap(text, width) or [""]
    return "\n".join([*lines[: most - 1], lines[most - 1] + "…"] if len(lines) > most else lines)


def retrieval_examples(model, data: ExperimentData, recipe: BlipRecipe) -> list[Sample]:
    """Held-out pictures with the captions that the model ranks first, after matching."""
    eval_set = data.eval_set
    seen = encoded(model, eval_set.images)
    scores, _ = reranked(
        model, seen, tokens_of(data.tokenizer, eval_set.texts, model.config), recipe.candidates
    )  # (I, T)
    queries, owner = [several[0] for several in eval_set.references], eval_set.owner.tolist()
    return figures.retrieval_examples(
        scores,
        eval_set.images,
        queries,
        eval_set.texts,
        lambda row, i: owner[i] == row,
        most=min(RANKED, recipe.candidates),
    )
