"""What ALBEF's report shows beside its rows: learning curves, distillation over noise, where words look, retrieval."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from papers.albef.data import ExperimentData, build_data
from papers.albef.encode import Pictures, Texts, encode_pictures, encode_texts, matched, reranked
from papers.albef.evidence.claims import DOSES, gains
from papers.albef.evidence.grounding import located, middle_layer
from papers.albef.evidence.transfer import TASKS, TESTED
from papers.albef.model import Albef
from papers.albef.recipe import AlbefRecipe
from papers.albef.tasks import word_maps
from papers.albef.weights import load_file
from shared.experiments.ablations import seeds_of
from shared.metrics.stats import wilson
from shared.report import plots as figures
from shared.report.rows import Figure, Ranked, Sample

EXAMPLES, RANKED = 6, 5
SHOWN = "distilled", "hard"  # arms whose model is shown, the first that was trained
LOSSES = {"loss_itc": "ITC loss", "loss_itm": "ITM loss", "loss_mlm": "MLM loss"}
SIDE = 160  # pixels of a picture in the grounding figure


def draw(recipe: AlbefRecipe, outcomes: dict[int, dict[str, dict]], folder: Path) -> tuple[list[Figure], list[Sample]]:
    """All figures that this run's arms and data allow; the model shown is the first seed's."""
    measured = list(outcomes.values())
    drawn = learning_curves(measured)
    if all(arm in measured[0] for pair in DOSES for arm in pair):
        drawn += doses(measured)
    seed = seeds_of(recipe)[0]
    arm = next((arm for arm in SHOWN if (folder / "arms" / f"{arm}-{seed}" / "model.safetensors").is_file()), None)
    if arm is None:
        return drawn, []
    if "vqa" in measured[0][arm]:
        drawn.append(transfer_bars(measured[0][arm]))
    data = build_data(recipe, seed)
    model = load_file(folder / "arms" / f"{arm}-{seed}" / "model.safetensors", data.config)
    if data.test.scenes:
        drawn.append(grounding(model, data, measured[0][arm]))
    return drawn, retrieval_examples(model, data, recipe)


def learning_curves(measured: list[dict[str, dict]]) -> list[Figure]:
    drawn = []
    for name, label in ({"r1": "R@1 after re-ranking, %"} | LOSSES).items():
        series = {}
        for arm in measured[0]:
            curves = [one[arm]["curves"].get(name) for one in measured]
            if all(curves):
                series[arm] = curves
        if series:
            title = "Learning curves" if name == "r1" else label
            caption = "Mean over seeds; the band spans the lowest and the highest seed."
            if name == "r1":
                caption = f"On one pool of validation pictures with near-misses among their captions. {caption}"
            drawn.append(figures.curves(series, name=title, caption=caption, x_label="pairs seen", y_label=label))
    return drawn


def doses(measured: list[dict[str, dict]]) -> list[Figure]:
    """R@1 with and without distillation over the share of wrong captions, and the gain."""
    arms = dict(zip(("without distillation", "with distillation"), zip(*DOSES, strict=True), strict=True))
    series = {
        label: [[(100 * one[arm]["wrong_captions"], one[arm]["itm"]) for arm in several] for one in measured]
        for label, several in arms.items()
    }
    gained = {"gain": [[(100 * wrong, gain) for wrong, gain in gains(one)] for one in measured]}
    x_label = "wrong training captions, %"
    return [
        figures.curves(series, name="R@1 over wrong captions", x_label=x_label, y_label="R@1 after re-ranking, %"),
        figures.curves(gained, name="What distillation gains", x_label=x_label, y_label="points of R@1"),
    ]


def transfer_bars(found: dict) -> Figure:
    names = {"": "pre-trained", "_scratch": "from scratch"}
    bars = {}
    for task in TASKS:
        for ending, told in names.items():
            points = found[task + ending]
            low, high = wilson(round(points / 100 * TESTED), TESTED)
            bars[f"{task}, {told}"] = points, 100 * low, 100 * high
    chance = ", ".join(f"{task} {found[f'{task}_chance']:.0f} %" for task in TASKS)
    caption = (
        f"Fine-tuned alike on generated questions, hypotheses and sentences about two pictures, one seed, {TESTED} "
        f"test samples each, 95 % intervals of a share. The most frequent answer alone would be right in: {chance}."
    )
    return figures.bars(bars, name="Transfer", x_label="right answers, %", caption=caption)


# ---- where words look


def grounding(model: Albef, data: ExperimentData, found: dict) -> Figure:
    """Test pictures whose things do not fill them, and over each the heat maps of two of its words."""
    words = {}
    for one in located(data):
        words.setdefault(one.row, []).append(one)
    rows = [row for row, several in words.items() if len(several) > 1][:EXAMPLES]
    lines = []
    for row in rows:
        maps = word_maps(
            model, data.test.images[row : row + 1], data.tokens([data.test.captions[row]]), middle_layer(model)
        )
        cells = [(shown(data.test.images[row]), data.test.captions[row])]
        for one in words[row][:2]:
            heat = maps[0, one.first : one.last].mean(0)
            cells.append((heated(data.test.images[row], heat), f"\u201c{one.word}\u201d"))
        lines.append(cells)
    caption = (
        "Grad-CAM on the cross-attention of the middle multimodal layer: where the matching logit of picture and "
        "caption hangs on what a word looks at (Sec. 6.4); the hottest place is red."
    )
    if "pointing" in found:
        caption += (
            f" The hottest patch lies inside the named thing's box in {found['pointing']:.0f} % of "
            f"{found['pointed']} cases, a patch at random in {found['pointing_chance']:.0f} %."
        )
    return Figure("Where words look", caption, sheet(lines))


def shown(image: Tensor):
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def heated(image: Tensor, heat: Tensor):
    """The picture under its heat map (rows, columns): cold places darkened, the hottest red."""
    from PIL import Image

    share = (heat / heat.max().clamp_min(1e-12)).clamp(0, 1)
    mask = Image.fromarray((255 * share).byte().numpy(), "L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    dark = Image.blend(shown(image), Image.new("RGB", (SIDE, SIDE), "black"), 0.45)
    red = Image.blend(shown(image), Image.new("RGB", (SIDE, SIDE), (255, 32, 0)), 0.5)
    return Image.composite(red, dark, mask)


def sheet(lines: list[list[tuple]]) -> bytes:
    """Rows of (picture, words under it) as a PNG."""
    import textwrap

    from PIL import Image, ImageDraw

    wide, text_lines, gap = 3, 4, 12
    high = SIDE + 14 * text_lines + gap
    canvas = Image.new("RGB", (wide * (SIDE + gap) + gap, len(lines) * high + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for row, cells in enumerate(lines):
        for column, (picture, words) in enumerate(cells):
            left, top = gap + column * (SIDE + gap), gap + row * high
            canvas.paste(picture, (left, top))
            for line, text in enumerate(textwrap.wrap(words, 26)[:text_lines]):
                pen.text((left, top + SIDE + 3 + 14 * line), text, fill="#1f2937")
    content = io.BytesIO()
    canvas.save(content, "PNG")
    return content.getvalue()


# ---- retrieval


def retrieval_examples(model: Albef, data: ExperimentData, recipe: AlbefRecipe) -> list[Sample]:
    """Test pictures with the captions of their pool that ITM ranks first, its probability of a match beside each."""
    test, samples = data.test, []
    for pool in test.pools[:EXAMPLES]:
        captions = [test.captions[i] for i in pool.tolist()]
        pictures, texts = encode_pictures(model, test.images[pool]), encode_texts(model, data.tokens(captions))
        scores = reranked(model, pictures, texts, recipe.candidates).image_to_text[0]
        best = scores.topk(min(RANKED, recipe.candidates, len(pool)))
        chances = match_probabilities(model, pictures, texts, best.indices)
        ranked = [
            Ranked(test.captions[int(pool[i])], round(chance, 3), i == 0)
            for i, chance in zip(best.indices.tolist(), chances, strict=True)
        ]
        samples.append(Sample(png(test.images[pool[0]]), test.captions[int(pool[0])], ranked))
    return samples


def match_probabilities(model: Albef, pictures: Pictures, texts: Texts, chosen: Tensor) -> list[float]:
    pairs = torch.stack([torch.zeros_like(chosen), chosen], 1)
    return matched(model, pictures, texts, pairs).softmax(1)[:, 1].tolist()


def png(image: Tensor) -> bytes:
    content = io.BytesIO()
    shown(image).resize((96, 96)).save(content, "PNG")
    return content.getvalue()
