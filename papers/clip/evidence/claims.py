"""The arms of CLIP's claims: each trains one model from (recipe, seed) and measures it; a claim compares."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from papers.clip.config import ClipConfig
from papers.clip.data import ExperimentData, data_of, load
from papers.clip.encode import classifier, image_features, probe_features, text_features
from papers.clip.evidence.baselines import (
    BagOfWords,
    BagOfWordsClip,
    BagOfWordsModule,
    CaptionModule,
    CaptionPredictor,
    Supervised,
    SupervisedModule,
)
from papers.clip.model import Clip
from papers.clip.module import ClipModule, PretrainingModule
from papers.clip.recipe import ClipRecipe
from shared.core.paper_package import Claim, Context
from shared.data.dataset import LABEL_CAPTIONS
from shared.data.loader import Batches
from shared.data.synthetic.captions import FRAMES
from shared.experiments.effects import difference, means, save_first_seed, train_arm
from shared.metrics import few_shot, linear_probe, retrieval_hits_from_features, topk_accuracy
from shared.metrics.stats import log_log_fit
from shared.tools.footprint import count_flops

__all__ = ["ARMS", "CLAIMS", "load"]

# {} takes the class with its article ("a red panda", "some grapes"); the bare name goes without.
TEMPLATE = "a photo of {}"
ENSEMBLE = (
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a photo showing {}",
    "there is {}",
    "this is {}",
    "{} in the picture",
)
C, ENSEMBLE_KEY = "contrastive", "zeroshot_ensemble"
SHOTS = (1, 2, 4, 8, 16)
SHOT_DRAWS = 3
FEW_SHOT_STRENGTH = (0.1,)  # too few pictures to seek one
PROBE_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
PROBE_ROWS = 2_000, 40  # at most: in all, and a class where there are many


# ---- pictures against texts, whatever the model


Accuracy = Callable[[Any, ExperimentData, ClipRecipe], float]  # of a model, 0..1


def train(context: Context, module: PretrainingModule, accuracy: Accuracy | None, *tensors: Tensor) -> dict:
    """Train on the pairs, or on these (images, tokens, labels). -> `curves` by samples seen, `accuracy` among them
    where it is given, and `waited`."""
    data, recipe = data_of(context), context.recipe
    batches = Batches(tensors or data.pairs, recipe.batch, recipe.steps, context.seed, accumulate=recipe.accumulate)
    evals = {"accuracy": lambda: accuracy(module.model, data, recipe)} if accuracy else None
    return train_arm(context, module, batches, {"data": data.dataset.digest}, evals=evals)


def validation(data: ExperimentData, recipe: ClipRecipe) -> tuple[Tensor, list[str], Tensor]:
    """Pictures, the texts to choose among, and which is right: class names, or every picture's own caption."""
    dataset = data.dataset
    split = dataset.class_val if dataset.classes else dataset.val
    images = split.images[: recipe.val_pictures]
    if dataset.classes and split.labels is not None:
        return images, [TEMPLATE.format(phrase) for phrase in data.phrases], split.labels[: recipe.val_pictures]
    return images, [several[0] for several in split.captions[: recipe.val_pictures]], torch.arange(len(images))


def clip_accuracy(model: Clip, data: ExperimentData, recipe: ClipRecipe) -> float:
    images, texts, target = validation(data, recipe)
    scores = image_features(model, images) @ text_features(model, data.tokenizer, texts).T
    return topk_accuracy(scores, target)


def scored_accuracy(model: BagOfWords | CaptionPredictor, data: ExperimentData, recipe: ClipRecipe) -> float:
    images, texts, target = validation(data, recipe)
    device = next(model.parameters()).device
    tokens = data.tokenizer(texts, data.config.context).to(device)
    return topk_accuracy(model.score(images.to(device), tokens).cpu(), target)


# ---- the arms


def contrastive(context: Context) -> dict:
    """CLIP itself: the treatment of most claims. Measured in every way the data allows."""
    data = data_of(context)
    model = Clip(data.config)
    return fit_clip(context, model) | measure_clip(model, data, context)


def fit_clip(context: Context, model: Clip) -> dict:
    """As `train`, and `flops`, those of its configuration's training."""
    trained = train(context, ClipModule(model, context.recipe), clip_accuracy)
    return trained | {"flops": training_flops(model.config, context.recipe, data_of(context))}


def measure_clip(model: Clip, data: ExperimentData, context: Context) -> dict:
    """Everything that one trained CLIP says about the claims. Accuracies in points."""
    dataset, measured = data.dataset, {}
    images, texts = image_features(model, dataset.test.images), [c[0] for c in dataset.test.captions]
    raw = [without_prefix(text) for text in texts]
    for name, several in (("as_written", texts), ("raw", raw), ("prefixed", [f"a photo of {t}" for t in raw])):
        hits = retrieval_hits_from_features(
            images, text_features(model, data.tokenizer, several), torch.arange(len(several)), ks=(1,)
        )
        measured[f"retrieval_{name}"] = 50 * sum(hits.values())  # mean of both directions
    if dataset.classes:
        measured |= measure_classes(model, data, context)
    pairs = dataset.compositions
    if pairs is not None:
        scores = image_features(model, pairs.images) @ text_features(model, data.tokenizer, pairs.texts).T
        offered = scores.gather(1, pairs.choices)  # (N, 4): right, wrong colour, wrong thing, both wrong
        measured["compositions"] = 100 * topk_accuracy(offered, torch.zeros(len(offered), dtype=torch.long))
        measured["compositions_chance"] = 100 / offered.shape[1]
    save_first_seed(context, model, data.tokenizer)
    return measured


def measure_classes(model: Clip, data: ExperimentData, context: Context) -> dict:
    dataset, labels = data.dataset, data.dataset.class_test.labels
    features = image_features(model, dataset.class_test.images)
    measured = {}
    arms = {
        "bare": (dataset.classes, ("{}",)),
        "template": (data.phrases, (TEMPLATE,)),
        "ensemble": (data.phrases, ENSEMBLE),
    }
    for name, (names, templates) in arms.items():
        weights = classifier(model, data.tokenizer, names, templates)
        measured[f"zeroshot_{name}"] = 100 * topk_accuracy(features @ weights.T, labels)
    measured |= measure_probes(model, data, context)
    if dataset.shift is not None:
        shifted = image_features(model, dataset.shift.images)
        measured["shift"] = 100 * topk_accuracy(shifted @ weights.T, dataset.shift.labels)
    return measured


def measure_probes(model: Clip, data: ExperimentData, context: Context) -> dict:
    """Linear probes on the features before the projection: few shots, and all of a few thousand labelled pictures."""
    dataset, measured = data.dataset, {}
    rows = max(PROBE_ROWS[0], PROBE_ROWS[1] * len(dataset.classes))
    train_x, train_y = probe_features(model, dataset.class_train.images[:rows]), dataset.class_train.labels[:rows]
    labels = dataset.class_test.labels
    tested = [probe_features(model, dataset.class_test.images)]
    if dataset.shift is not None:  # the same pictures by another artist, in the same order
        tested.append(probe_features(model, dataset.shift.images))
    test_x, test_y = torch.cat(tested), torch.cat([labels] * len(tested))

    def accuracies(rows: Tensor, strengths: tuple[float, ...]) -> list[float]:
        """In points, on class_test and, where there is one, on the shift."""
        probe = linear_probe(train_x[rows], train_y[rows], test_x, test_y, strengths=strengths, max_iter=200)
        right = (probe.predictions == test_y).double().view(len(tested), -1)
        return (100 * right.mean(1)).tolist()

    for shots in SHOTS:
        if int(torch.bincount(train_y).min()) >= shots:
            draws = [few_shot(train_y, shots, context.seed * 100 + draw) for draw in range(SHOT_DRAWS)]
            points = [accuracies(rows, FEW_SHOT_STRENGTH)[0] for rows in draws]
            measured[f"probe_{shots}"] = sum(points) / len(points)
    if int(torch.bincount(train_y).min()) >= 2:  # one to fit, one to choose the strength by
        measured |= dict(
            zip(("probe", "probe_shift"), accuracies(torch.arange(len(train_y)), PROBE_STRENGTHS), strict=False)
        )
    return measured


def without_prefix(text: str) -> str:
    """A caption without the frame it was written in ('look, ...', 'a photo of ...'): a prefix needs a bare caption."""
    for frame in sorted((*FRAMES, *LABEL_CAPTIONS), key=len, reverse=True):
        pattern = re.escape(frame).replace(r"\{x\}", "(.+)").replace(r"\{\}", "(.+)").replace(r"\{is_\}", "(?:is|are)")
        if match := re.fullmatch(pattern, text):
            return match.group(1)
    return text


def another_objective(
    new_model: Callable[[ClipConfig], nn.Module], new_module: type[PretrainingModule], accuracy: Accuracy
) -> Callable[[Context], dict]:
    """One of Fig. 2's arms beside CLIP itself: how soon does it tell what is in a picture?"""

    def arm(context: Context) -> dict:
        return train(context, new_module(new_model(data_of(context).config), context.recipe), accuracy)

    return arm


def supervised(context: Context) -> dict:
    """A classifier on labelled pictures of the same artist, tested on both artists."""
    data = data_of(context)
    dataset = data.dataset
    if not dataset.classes or dataset.shift is None:
        return {}
    model, shown = Supervised(data.config, len(dataset.classes)), dataset.class_train
    tensors = shown.images, shown.labels[:, None], shown.labels
    trained = train(context, SupervisedModule(model, context.recipe), None, *tensors)
    device = next(model.parameters()).device
    scored = {}
    with torch.no_grad():
        for name, split in (("supervised", dataset.class_test), ("supervised_shift", dataset.shift)):
            logits = torch.cat([model(batch.to(device)) for batch in split.images.split(256)]).cpu()
            scored[name] = 100 * topk_accuracy(logits, split.labels)
    return trained | scored


def variant(change: Callable[[ClipConfig, ClipRecipe], dict]) -> Callable[[Context], dict]:
    """A CLIP of another configuration: only the numbers that its claims compare."""

    def arm(context: Context) -> dict:
        data = data_of(context)
        model = Clip(replace(data.config, **change(data.config, context.recipe)))
        measured = fit_clip(context, model)
        if data.dataset.classes:
            weights = classifier(model, data.tokenizer, data.phrases, ENSEMBLE)
            scores = image_features(model, data.dataset.class_test.images) @ weights.T
            measured[ENSEMBLE_KEY] = 100 * topk_accuracy(scores, data.dataset.class_test.labels)
        return measured

    return arm


def of_width(index: int) -> Callable[[Context], dict]:
    """A CLIP of the ladder's width: clip.scaling compares error over compute."""

    def change(config: ClipConfig, recipe: ClipRecipe) -> dict:
        width = recipe.ladder[index]
        heads = max(1, width // 32)
        return {"vision_width": width, "text_width": width, "vision_heads": heads, "text_heads": heads}

    return variant(change)


def training_flops(config: ClipConfig, recipe: ClipRecipe, data: ExperimentData) -> float:
    """Three forward passes' worth (one forward, two for the backward) over all samples; texts at their mean length."""
    ends = (data.tokens == config.end_token).int().argmax(1).float()
    with torch.device("meta"):
        model = Clip(config)
        image = torch.empty(1, 3, config.image_size, config.image_size)
        tokens = torch.empty(1, round(float(ends.mean())) + 1, dtype=torch.long)
        forward = count_flops(lambda: (model.encode_image(image), model.encode_text(tokens)))
    return 3.0 * forward * recipe.batch * recipe.steps


ARMS: dict[str, Callable[[Context], dict]] = {
    "contrastive": contrastive,
    "bow_contrastive": another_objective(BagOfWordsClip, ClipModule, clip_accuracy),
    "bow_prediction": another_objective(BagOfWords, BagOfWordsModule, scored_accuracy),
    "caption_prediction": another_objective(CaptionPredictor, CaptionModule, scored_accuracy),
    "supervised": supervised,
    "nonlinear_projection": variant(lambda config, recipe: {"projection": "mlp"}),
    "large_patches": variant(lambda config, recipe: {"patch": 2 * config.patch}),
    "ladder_0": of_width(0),
    "ladder_1": of_width(1),
    "ladder_2": of_width(2),
}
LADDER = ("ladder_0", "ladder_1", "contrastive", "ladder_2")


# ---- effects


def efficiency(treatment: str, baseline: str) -> Callable[[dict], float]:
    """log2 of how many times more samples the baseline needs for the accuracy that the weaker arm ends at."""

    def effect(measured: dict[str, dict]) -> float:
        ours, theirs = (measured[arm]["curves"]["accuracy"] for arm in (treatment, baseline))
        level = min(max(value for _, value in curve) for curve in (ours, theirs))
        return math.log2(samples_to_reach(theirs, level) / samples_to_reach(ours, level))

    return effect


def samples_to_reach(curve: Sequence[tuple[int, float]], level: float) -> float:
    """Samples seen when the curve first reaches the level, linear between its points; before the first, from zero."""
    before = (0.0, 0.0)
    for samples, value in curve:
        if value >= level:
            rise = value - before[1]
            share = (level - before[1]) / rise if rise > 0 else 1.0
            return max(1.0, before[0] + share * (samples - before[0]))
        before = (samples, value)
    raise ValueError(f"the curve never reaches {level}")


def factor(treatment: str, baseline: str) -> Callable[[list[dict]], str]:
    """The mean effect as the paper prints it: a factor of pictures processed."""

    def shown(seeds: list[dict[str, dict]]) -> str:
        effects = [efficiency(treatment, baseline)(measured) for measured in seeds]
        return f"a factor of {2 ** (sum(effects) / len(effects)):.1f}"

    return shown


def smaller_drop(measured: dict[str, dict]) -> float | None:
    """What the supervised model loses under another artist, minus what zero-shot loses."""
    zero_shot, labelled = measured["contrastive"], measured["supervised"]
    if "shift" not in zero_shot or "supervised_shift" not in labelled:
        return None
    lost = labelled["supervised"] - labelled["supervised_shift"]
    return lost - (zero_shot["zeroshot_ensemble"] - zero_shot["shift"])


def probe_gain_does_not_move(measured: dict[str, dict]) -> float | None:
    """Above zero only if both halves hold: the probe gains where it was fitted, and loses under another artist."""
    points = measured["contrastive"]
    if "probe_shift" not in points:
        return None
    return min(points["probe"] - points["zeroshot_ensemble"], points["shift"] - points["probe_shift"])


def minus_slope(measured: dict[str, dict]) -> float | None:
    points = ladder_points(measured)
    return None if points is None else -log_log_fit(*points).slope


def ladder_points(measured: dict[str, dict]) -> tuple[list[float], list[float]] | None:
    """(training FLOPs, zero-shot error in 0..1) of every size, smallest first."""
    sizes = [measured[arm] for arm in LADDER]
    if any("zeroshot_ensemble" not in size for size in sizes):
        return None
    return [size["flops"] for size in sizes], [max(1e-3, 1 - size["zeroshot_ensemble"] / 100) for size in sizes]


def of_contrastive(*keys: str) -> Callable[[list[dict]], str]:
    return means("{key}", contrastive=keys)


def ladder_shown(seeds: list[dict[str, dict]]) -> str:
    fits = [log_log_fit(*points) for points in map(ladder_points, seeds) if points]
    return f"R2 of the fit {sum(f.r2 for f in fits) / len(fits):.2f}, {len(LADDER)} sizes" if fits else ""


def faster(treatment: str, baseline: str) -> Claim:
    return Claim((treatment, baseline), efficiency(treatment, baseline), shown=factor(treatment, baseline))


def better_than(arm: str) -> Claim:
    """CLIP as it is against another configuration, zero-shot."""
    note = means("{key}", **{arm: (ENSEMBLE_KEY,)})
    return Claim((C, arm), difference(C, arm, ENSEMBLE_KEY), CLASSES, note)


def within(better: str, baseline: str, need: str = "", beside: Sequence[str] = ()) -> Claim:
    """Two measurements of CLIP itself; beside: those shown with the effect, by default both."""
    return Claim((C,), difference(C, C, better, baseline), need, of_contrastive(*(beside or (baseline, better))))


CLASSES = "data with class names, such as data=emoji or data=cifar10"
OTHER_ARTIST = "data drawn by two artists: data=emoji or data=shapes"
CLAIMS: dict[str, Claim] = {
    "clip.efficiency.contrastive_vs_bow": faster("bow_contrastive", "bow_prediction"),
    "clip.efficiency.bow_vs_caption_lm": faster("bow_prediction", "caption_prediction"),
    "clip.efficiency.contrastive_vs_caption_lm": faster("bow_contrastive", "caption_prediction"),
    "clip.prompt.single_template": within("zeroshot_template", "zeroshot_bare", CLASSES),
    "clip.prompt.ensemble": within(ENSEMBLE_KEY, "zeroshot_template", CLASSES),
    "clip.retrieval.prompt": within(
        "retrieval_prefixed",
        "retrieval_raw",
        beside=("retrieval_raw", "retrieval_prefixed", "retrieval_as_written"),
    ),
    "clip.zeroshot.vs_fewshot": within(
        ENSEMBLE_KEY, "probe_4", CLASSES, (ENSEMBLE_KEY, *(f"probe_{shots}" for shots in SHOTS))
    ),
    "clip.scaling.loglog": Claim(LADDER, minus_slope, CLASSES, ladder_shown),
    "clip.scale.patch": better_than("large_patches"),
    "clip.robust.zeroshot_gap": Claim(
        (C, "supervised"),
        smaller_drop,
        OTHER_ARTIST,
        means("{key}", contrastive=(ENSEMBLE_KEY, "shift"), supervised=("supervised", "supervised_shift")),
    ),
    "clip.robust.probe_erodes": Claim(
        (C,), probe_gain_does_not_move, OTHER_ARTIST, of_contrastive(ENSEMBLE_KEY, "probe", "shift", "probe_shift")
    ),
    "clip.projection.linear": better_than("nonlinear_projection"),
    "clip.compositions": within(
        "compositions",
        "compositions_chance",
        "data with held-out compositions: data=emoji or data=shapes",
        ("compositions", "compositions_chance"),
    ),
}
