"""What ALBEF's report shows beside its rows: learning curves, distillation over noise, where words look, retrieval."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from papers.albef.data import ExperimentData, build_data
from papers.albef.encode import encode_pictures, encode_texts, matched, reranked
from papers.albef.evidence.claims import DOSES, gains
from papers.albef.evidence.grounding import Located, located, middle_layer
from papers.albef.evidence.transfer import TASKS, TESTED
from papers.albef.model import Albef
from papers.albef.recipe import AlbefRecipe
from papers.albef.tasks import word_maps
from papers.albef.weights import load_file
from shared.experiments.ablations import seeds_of
from shared.experiments.effects import first_seed_model
from shared.metrics.stats import wilson
from shared.report import plots
from shared.report.rows import Figure, Ranked, Sample

EXAMPLES, RANKED = 6, 5
SHOWN = "distilled", "hard"  # arms whose model is shown, the first that was trained
LOSSES = {"loss_itc": "ITC loss", "loss_itm": "ITM loss", "loss_mlm": "MLM loss"}


def draw(recipe: AlbefRecipe, outcomes: dict[int, dict[str, dict]], folder: Path) -> tuple[list[Figure], list[Sample]]:
    """All figures that this run's arms and data allow; the model shown is the first seed's."""
    measured = list(outcomes.values())
    drawn = learning_curves(measured)
    if all(arm in measured[0] for pair in DOSES for arm in pair):
        drawn += doses(measured)
    left = first_seed_model(recipe, folder, *SHOWN)
    if left is None:
        return drawn, []
    arm, weights = left
    if "vqa" in measured[0][arm]:
        drawn.append(transfer_bars(measured[0][arm]))
    data = build_data(recipe, seeds_of(recipe)[0])
    model = load_file(weights, data.config)
    if data.test.scenes:
        drawn.append(grounding(model, data, measured[0][arm]))
    return drawn, retrieval_examples(model, data, recipe)


def learning_curves(measured: list[dict[str, dict]]) -> list[Figure]:
    label = "R@1 after re-ranking, %"
    caption = f"On one pool of validation pictures with near-misses among their captions. {plots.SPREAD}"
    drawn = plots.learning_curves(measured, "r1", name="Learning curves", y_label=label, caption=caption)
    for metric, name in LOSSES.items():
        drawn += plots.learning_curves(measured, metric, name=name, y_label=name)
    return drawn


def doses(measured: list[dict[str, dict]]) -> list[Figure]:
    """R@1 with and without distillation over the share of wrong captions, and the gain."""
    arms = dict(zip(("without distillation", "with distillation"), zip(*DOSES, strict=True), strict=True))
    series = {
        label: [[(100 * seed[arm]["wrong_captions"], seed[arm]["itm"]) for arm in several] for seed in measured]
        for label, several in arms.items()
    }
    gained = {"gain": [[(100 * wrong, gain) for wrong, gain in gains(seed)] for seed in measured]}
    x_label = "wrong training captions, %"
    return [
        plots.curves(series, name="R@1 over wrong captions", x_label=x_label, y_label="R@1 after re-ranking, %"),
        plots.curves(gained, name="What distillation gains", x_label=x_label, y_label="points of R@1"),
    ]


def transfer_bars(metrics: dict) -> Figure:
    bars = {}
    for task in TASKS:
        for ending, start in {"": "pre-trained", "_scratch": "from scratch"}.items():
            points = metrics[task + ending]
            low, high = wilson(round(points / 100 * TESTED), TESTED)
            bars[f"{task}, {start}"] = points, 100 * low, 100 * high
    chance = ", ".join(f"{task} {metrics[f'{task}_chance']:.0f} %" for task in TASKS)
    caption = (
        f"Fine-tuned alike on generated questions, hypotheses and sentences about two pictures, one seed, {TESTED} "
        f"test samples each, 95 % intervals of a share. The most frequent answer alone would be right in: {chance}."
    )
    return plots.bars(bars, name="Transfer", x_label="right answers, %", caption=caption)


def grounding(model: Albef, data: ExperimentData, metrics: dict) -> Figure:
    """Test pictures whose things do not fill them, and beside each the heat maps of two of its words."""
    words: dict[int, list[Located]] = {}
    for word in located(data):
        words.setdefault(word.row, []).append(word)
    cells = []
    for row in [row for row, several in words.items() if len(several) > 1][:EXAMPLES]:
        image, caption = data.test.images[row], data.test.captions[row]
        maps = word_maps(model, image[None], data.tokens([caption]), middle_layer(model))
        cells.append((image, [(caption, None)]))
        for word in words[row][:2]:
            heat = maps[0, word.first : word.last].mean(0)
            cells.append((heated(image, heat), [(f"\u201c{word.word}\u201d", None)]))
    note = (
        "Grad-CAM on the cross-attention of the middle multimodal layer: where the matching logit of picture and "
        "caption hangs on what a word looks at (Sec. 6.4); the hottest place is red."
    )
    if "pointing" in metrics:
        note += (
            f" The hottest patch lies inside the named thing's box in {metrics['pointing']:.0f} % of "
            f"{metrics['pointed']} cases, a patch at random in {metrics['pointing_chance']:.0f} %."
        )
    return plots.image_grid(cells, name="Where words look", caption=note, columns=3)


def heated(image: Tensor, heat: Tensor):
    """The picture under its heat map (rows, columns): cold places darkened, the hottest red."""
    from PIL import Image

    side = (160, 160)  # pixels
    share = (heat / heat.max().clamp_min(1e-12)).clamp(0, 1)
    mask = Image.fromarray((255 * share).byte().numpy(), "L").resize(side, Image.Resampling.BICUBIC)
    seen = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize(side, Image.Resampling.NEAREST)
    dark = Image.blend(seen, Image.new("RGB", side, "black"), 0.45)
    red = Image.blend(seen, Image.new("RGB", side, (255, 32, 0)), 0.5)
    return Image.composite(red, dark, mask)


def retrieval_examples(model: Albef, data: ExperimentData, recipe: AlbefRecipe) -> list[Sample]:
    """Test pictures with the captions of their pool that ITM ranks first, its probability of a match beside each."""
    test, samples = data.test, []
    for pool in test.pools[:EXAMPLES]:
        captions = [test.captions[i] for i in pool.tolist()]
        pictures, texts = encode_pictures(model, test.images[pool]), encode_texts(model, data.tokens(captions))
        scores = reranked(model, pictures, texts, recipe.candidates).image_to_text[0]
        best = scores.topk(min(RANKED, recipe.candidates, len(pool)))
        pairs = torch.stack([torch.zeros_like(best.indices), best.indices], 1)
        chances = matched(model, pictures, texts, pairs).softmax(1)[:, 1].tolist()
        ranked = [
            Ranked(test.captions[int(pool[i])], round(chance, 3), i == 0)
            for i, chance in zip(best.indices.tolist(), chances, strict=True)
        ]
        samples.append(Sample(plots.png(test.images[pool[0]]), test.captions[int(pool[0])], ranked))
    return samples
