"""What BLIP's report shows beside its rows: learning curves, the filter's decisions, captions, retrieval."""

from __future__ import annotations

import shutil
from pathlib import Path

from papers.blip.config import with_tokenizer
from papers.blip.data import ExperimentData, build_data
from papers.blip.encode import GenerationConfig, encoded, reranked, tokens_of, write
from papers.blip.evidence.capfilt_page import OUTCOMES, Decision, read_lines
from papers.blip.recipe import BlipRecipe
from papers.blip.weights import load_file
from shared.experiments.ablations import seeds_of
from shared.report import plots
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
    drawn = []
    for metric, name in LOSSES.items():
        arms = None if metric == "loss" else SHOWN
        drawn += plots.learning_curves(list(outcomes.values()), metric, name=name, arms=arms)
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


def decision_figure(decisions: list[Decision], data: ExperimentData) -> Figure:
    """Pictures with both texts, some of each outcome of the filter."""
    by_picture: dict[int, dict[str, Decision]] = {}
    for decision in decisions:
        by_picture.setdefault(decision.picture, {}).setdefault(decision.origin, decision)
    cells: dict[tuple[bool, bool], list] = {outcome: [] for outcome in OUTCOMES}
    for picture, texts in by_picture.items():
        if {"web", "written"} <= texts.keys():
            both = [(f"{origin}: {texts[origin].text}", texts[origin].kept) for origin in ("web", "written")]
            cells[texts["web"].kept, texts["written"].kept].append((data.dataset.train.images[picture], both))
    shown = [cell for several in cells.values() for cell in several[: EXAMPLES // 2]]
    caption = (
        "Web pictures with the web's text and the written one; ✓ was kept by the filter, ✗ was "
        "dropped. All of them, page by page: capfilt.html beside this report."
    )
    return plots.image_grid(shown, name="What CapFilt kept and dropped", caption=caption)


def caption_figure(weights: Path, data: ExperimentData, recipe: BlipRecipe) -> Figure:
    """Held-out pictures with what the captioner says of them, by beam search and sampled from the nucleus."""
    model = load_file(weights, with_tokenizer(data.config, data.tokenizer))
    every = max(1, len(data.eval_set.images) // (2 * EXAMPLES))
    images = data.eval_set.images[::every][: 2 * EXAMPLES]
    lengths = {"longest": recipe.longest, "shortest": recipe.shortest}
    beam = write(model, data.tokenizer, images, GenerationConfig(recipe.prompt, recipe.beams, **lengths))
    sampled = write(model, data.tokenizer, images, GenerationConfig(recipe.prompt, nucleus=recipe.top_p, **lengths))
    cells = [
        (image, [(f"beam: {best}", None), (f"nucleus: {drawn}", None)])
        for image, best, drawn in zip(images, beam, sampled, strict=True)
    ]
    caption = f"Held-out pictures and the captioner's words behind '{recipe.prompt}': beam search, and one sample."
    return plots.image_grid(cells, name="Captions", caption=caption)


def retrieval_examples(model, data: ExperimentData, recipe: BlipRecipe) -> list[Sample]:
    """Held-out pictures with the captions that the model ranks first, after matching."""
    eval_set = data.eval_set
    tokens = tokens_of(data.tokenizer, eval_set.texts, model.config)
    scores, _ = reranked(model, encoded(model, eval_set.images), tokens, recipe.candidates)  # (I, T)
    return plots.ranked_captions(scores, eval_set, min(RANKED, recipe.candidates))
