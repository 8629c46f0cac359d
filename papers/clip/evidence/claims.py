"""The arms of CLIP's claims: each trains one model from (recipe, seed) and measures it; a claim compares."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from papers.clip.config import VARIANTS, ClipConfig
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
from shared.core.errors import UserError
from shared.core.paper_package import Claim, Context
from shared.data.dataset import LABEL_CAPTIONS, DatasetBundle, Split, load_dataset
from shared.data.loader import Batches
from shared.data.synthetic.captions import FRAMES, class_prompt
from shared.experiments.ablations import once_a_seed
from shared.metrics import few_shot, linear_probe, retrieval_hits_from_features, topk_accuracy
from shared.metrics.stats import log_log_fit
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.tools.footprint import count_flops
from shared.training.callbacks import EvalAtSteps, MetricRecorder
from shared.training.trainer import fit

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
SHOTS = (1, 2, 4, 8, 16)
SHOT_DRAWS = 3
FEW_SHOT_STRENGTH = (0.1,)  # too few pictures to seek one
PROBE_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
PROBE_ROWS = 2_000, 40  # at most: in all, and a class where there are many


# ---- what every arm starts from


@dataclass(frozen=True)
class ExperimentData:
    """The data of one seed, the tokenizer trained on its captions, and the model's configuration."""

    dataset: DatasetBundle
    tokenizer: SmallTokenizer
    config: ClipConfig
    images: Tensor  # (pairs, 3, H, W) uint8, one row a caption
    tokens: Tensor  # (pairs, T)
    labels: Tensor  # (pairs,), -1 where a picture has no single class

    @property
    def phrases(self) -> list[str]:
        """The classes with their articles, as templates take them."""
        return [class_prompt(name, "{}") for name in self.dataset.classes]

    @property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.images, self.tokens, self.labels


def build_data(recipe: ClipRecipe, seed: int) -> ExperimentData:
    dataset = load(recipe, seed)
    base = VARIANTS[recipe.model]()
    if not base.patch:
        raise UserError(f"model={recipe.model}: the claims are trained with a ViT; choose a ViT variant")
    captions = [caption for several in dataset.train.captions for caption in several]
    rows = torch.tensor([row for row, several in enumerate(dataset.train.captions) for _ in several])
    tokenizer = SmallTokenizer.train(captions, base.vocabulary)
    config = replace(base, image_size=recipe.image_size, vocabulary=tokenizer.vocab_size, end_token=tokenizer.end)
    labels = torch.full((len(rows),), -1) if dataset.train.labels is None else dataset.train.labels[rows]
    tokens = tokenizer(captions, config.context)
    return ExperimentData(dataset, tokenizer, config, dataset.train.images[rows], tokens, labels)


data_of = once_a_seed(build_data)


def load(recipe: ClipRecipe, seed: int) -> DatasetBundle:
    return load_dataset(
        recipe.data,
        root=recipe.data_root or None,
        pairs=recipe.pairs,
        test_pairs=recipe.test_pairs,
        image_size=recipe.image_size,
        seed=seed,
        classes=recipe.classes,
        objects=(1, recipe.objects),
        clutter=recipe.clutter,
        noise=recipe.noise,
        jitter=recipe.jitter,
        small=recipe.small,
        captions=recipe.captions,
    )


def train(
    context: Context,
    module: PretrainingModule,
    tensors: tuple[Tensor, ...],
    measure: Callable[[], float] | None = None,
) -> dict:
    """Train on (images, tokens, labels). -> `curves` by samples seen, `accuracy` among them where `measure` is given,
    and `waited`."""
    recipe, dataset = context.recipe, data_of(context).dataset
    curves = MetricRecorder(recipe.batch, context.progress)
    steps = sorted({max(1, round(recipe.steps * (i + 1) / recipe.measure_at)) for i in range(recipe.measure_at)})
    accuracy = EvalAtSteps(steps, recipe.batch, measure) if measure else None
    batches = Batches(tensors, recipe.batch, recipe.steps, context.seed, accumulate=recipe.accumulate)
    identity = {"arm": context.arm, "seed": context.seed, "data": dataset.digest}
    waited = fit(module, batches, recipe, context.folder, [curves, *([accuracy] if accuracy else [])], identity)
    return {"curves": curves.values | ({"accuracy": accuracy.values} if accuracy else {}), "waited": round(waited, 5)}


# ---- scoring pictures against texts, whatever the model


def candidates(data: ExperimentData, split: Split, pictures: int) -> tuple[Tensor, list[str], Tensor]:
    """Pictures, the texts to choose among, and which is right: class names, or every picture's own caption."""
    images = split.images[:pictures]
    if data.dataset.classes and split.labels is not None:
        return images, [TEMPLATE.format(phrase) for phrase in data.phrases], split.labels[:pictures]
    return images, [several[0] for several in split.captions[:pictures]], torch.arange(len(images))


def validation(data: ExperimentData, recipe: ClipRecipe) -> tuple[Tensor, list[str], Tensor]:
    split = data.dataset.class_val if data.dataset.classes else data.dataset.val
    return candidates(data, split, recipe.val_pictures)


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
    trained = fit_clip(context, model)
    flops = training_flops(data.config, context.recipe, data)
    return trained | {"flops": flops} | measure_clip(model, data, context)


def fit_clip(context: Context, model: Clip) -> dict:
    data, recipe = data_of(context), context.recipe
    return train(context, ClipModule(model, recipe), data.pairs, lambda: clip_accuracy(model, data, recipe))


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
    if context.first:
        keep(model, data, context)
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
            found = [accuracies(rows, FEW_SHOT_STRENGTH)[0] for rows in draws]
            measured[f"probe_{shots}"] = sum(found) / len(found)
    if int(torch.bincount(train_y).min()) >= 2:  # one to fit, one to choose the strength by
        measured |= dict(
            zip(("probe", "probe_shift"), accuracies(torch.arange(len(train_y)), PROBE_STRENGTHS), strict=False)
        )
    return measured


def without_prefix(text: str) -> str:
    """A caption without the frame it was written in ('look, ...', 'a photo of ...'): a prefix needs a bare caption."""
    for frame in sorted((*FRAMES, *LABEL_CAPTIONS), key=len, reverse=True):
        pattern = re.escape(frame).replace(r"\{x\}", "(.+)").replace(r"\{\}", "(.+)").replace(r"\{is_\}", "(?:is|are)")
        if found := re.fullmatch(pattern, text):
            return found.group(1)
    return text


def keep(model: Clip, data: ExperimentData, context: Context) -> None:
    """The first seed's model and tokenizer stay with the run: figures are drawn from them, users can load them."""
    from shared.weights.load import save_weights

    save_weights(model, context.folder / "model.safetensors", {"variant": context.recipe.model})
    data.tokenizer.save(context.folder / "tokenizer.json")


def bag_of_words_contrastive(context: Context) -> dict:
    """Fig. 2's last arm: the contrastive objective over a text encoder that sees no order."""
    return fit_clip(context, BagOfWordsClip(data_of(context).config))


def bag_of_words_prediction(context: Context) -> dict:
    data, recipe = data_of(context), context.recipe
    model = BagOfWords(data.config)
    module = BagOfWordsModule(model, recipe)
    return train(context, module, data.pairs, lambda: scored_accuracy(model, data, recipe))


def caption_prediction(context: Context) -> dict:
    data, recipe = data_of(context), context.recipe
    model = CaptionPredictor(data.config)
    module = CaptionModule(model, recipe)
    return train(context, module, data.pairs, lambda: scored_accuracy(model, data, recipe))


def supervised(context: Context) -> dict:
    """A classifier on labelled pictures of the same artist, tested on both artists."""
    data = data_of(context)
    dataset = data.dataset
    if not dataset.classes or dataset.shift is None:
        return {}
    model = Supervised(data.config, len(dataset.classes))
    shown = dataset.class_train
    trained = train(
        context, SupervisedModule(model, context.recipe), (shown.images, shown.labels[:, None], shown.labels)
    )
    device = next(model.parameters()).device
    scored = {}
    with torch.no_grad():
        for name, split in (("supervised", dataset.class_test), ("supervised_shift", dataset.shift)):
            logits = torch.cat([model(batch.to(device)) for batch in split.images.split(256)]).cpu()
            scored[name] = 100 * topk_accuracy(logits, split.labels)
    return trained | scored


def nonlinear_projection(context: Context) -> dict:
    return contrastive_only(context, replace(data_of(context).config, projection="mlp"))


def large_patches(context: Context) -> dict:
    config = data_of(context).config
    return contrastive_only(context, replace(config, patch=2 * config.patch))


def contrastive_only(context: Context, config: ClipConfig) -> dict:
    """A CLIP of another configuration: only the numbers that its claims compare."""
    data = data_of(context)
    model = Clip(config)
    measured = fit_clip(context, model) | {"flops": training_flops(config, context.recipe, data)}
    if data.dataset.classes:
        weights = classifier(model, data.tokenizer, data.phrases, ENSEMBLE)
        scores = image_features(model, data.dataset.class_test.images) @ weights.T
        measured["zeroshot_ensemble"] = 100 * topk_accuracy(scores, data.dataset.class_test.labels)
    return measured


def training_flops(config: ClipConfig, recipe: ClipRecipe, data: ExperimentData) -> float:
    """Three forward passes' worth (one forward, two for the backward) over all samples; texts at their mean length."""
    ends = (data.tokens == config.end_token).int().argmax(1).float()
    with torch.device("meta"):
        model = Clip(config)
        image = torch.empty(1, 3, config.image_size, config.image_size)
        tokens = torch.empty(1, round(float(ends.mean())) + 1, dtype=torch.long)
        one = count_flops(lambda: (model.encode_image(image), model.encode_text(tokens)))
    return 3.0 * one * recipe.batch * recipe.steps


def rung_of_ladder(index: int) -> Callable[[Context], dict]:
    """A CLIP of the ladder's width: clip.scaling compares error over compute."""

    def arm(context: Context) -> dict:
        width = context.recipe.ladder[index]
        config = data_of(context).config
        heads = max(1, width // 32)
        changed = replace(config, vision_width=width, text_width=width, vision_heads=heads, text_heads=heads)
        return contrastive_only(context, changed)

    return arm


ARMS: dict[str, Callable[[Context], dict]] = {
    "contrastive": contrastive,
    "bow_contrastive": bag_of_words_contrastive,
    "bow_prediction": bag_of_words_prediction,
    "caption_prediction": caption_prediction,
    "supervised": supervised,
    "nonlinear_projection": nonlinear_projection,
    "large_patches": large_patches,
    "ladder_0": rung_of_ladder(0),
    "ladder_1": rung_of_ladder(1),
    "ladder_2": rung_of_ladder(2),
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
        effects = [efficiency(treatment, baseline)(one) for one in seeds]
        return f"a factor of {2 ** (sum(effects) / len(effects)):.1f}"

    return shown


def difference(treatment: tuple[str, str], baseline: tuple[str, str]) -> Callable[[dict], float | None]:
    """Measurement minus measurement, each named (arm, name); None where the data did not allow one of them."""

    def effect(measured: dict[str, dict]) -> float | None:
        ours, theirs = (measured[arm].get(name) for arm, name in (treatment, baseline))
        return None if ours is None or theirs is None else ours - theirs

    return effect


def smaller_drop(measured: dict[str, dict]) -> float | None:
    """What the supervised model loses under another artist, minus what zero-shot loses."""
    zero_shot, labelled = measured["contrastive"], measured["supervised"]
    if "shift" not in zero_shot or "supervised_shift" not in labelled:
        return None
    lost = labelled["supervised"] - labelled["supervised_shift"]
    return lost - (zero_shot["zeroshot_ensemble"] - zero_shot["shift"])


def probe_gain_does_not_move(measured: dict[str, dict]) -> float | None:
    """Above zero only if both halves hold: the probe gains where it was fitted, and loses under another artist."""
    found = measured["contrastive"]
    if "probe_shift" not in found:
        return None
    return min(found["probe"] - found["zeroshot_ensemble"], found["shift"] - found["probe_shift"])


def minus_slope(measured: dict[str, dict]) -> float | None:
    points = ladder_points(measured)
    return None if points is None else -log_log_fit(*points).slope


def ladder_points(measured: dict[str, dict]) -> tuple[list[float], list[float]] | None:
    """(training FLOPs, zero-shot error in 0..1) of every size, smallest first."""
    found = [measured[arm] for arm in LADDER]
    if any("zeroshot_ensemble" not in one for one in found):
        return None
    return [one["flops"] for one in found], [max(1e-3, 1 - one["zeroshot_ensemble"] / 100) for one in found]


def mean_of(arm: str, *names: str) -> Callable[[list[dict]], str]:
    """'name 12.3, ...' averaged over seeds: what stands beside an effect."""

    def shown(seeds: list[dict[str, dict]]) -> str:
        parts = []
        for name in names:
            values = [one[arm][name] for one in seeds if name in one[arm]]
            if values:
                parts.append(f"{name} {sum(values) / len(values):.1f}")
        return ", ".join(parts)

    return shown


def ladder_shown(seeds: list[dict[str, dict]]) -> str:
    fits = [log_log_fit(*points) for points in map(ladder_points, seeds) if points]
    return f"R2 of the fit {sum(f.r2 for f in fits) / len(fits):.2f}, {len(LADDER)} sizes" if fits else ""


CLASSES = "data with class names, such as data=emoji or data=cifar10"
OTHER_ARTIST = "data drawn by two artists: data=emoji or data=shapes"
C = "contrastive"
CLAIMS: dict[str, Claim] = {
    "clip.efficiency.contrastive_vs_bow": Claim(
        ("bow_contrastive", "bow_prediction"),
        efficiency("bow_contrastive", "bow_prediction"),
        shown=factor("bow_contrastive", "bow_prediction"),
    ),
    "clip.efficiency.bow_vs_caption_lm": Claim(
        ("bow_prediction", "caption_prediction"),
        efficiency("bow_prediction", "caption_prediction"),
        shown=factor("bow_prediction", "caption_prediction"),
    ),
    "clip.efficiency.contrastive_vs_caption_lm": Claim(
        ("bow_contrastive", "caption_prediction"),
        efficiency("bow_contrastive", "caption_prediction"),
        shown=factor("bow_contrastive", "caption_prediction"),
    ),
    "clip.prompt.single_template": Claim(
        (C,),
        difference((C, "zeroshot_template"), (C, "zeroshot_bare")),
        CLASSES,
        mean_of(C, "zeroshot_bare", "zeroshot_template"),
    ),
    "clip.prompt.ensemble": Claim(
        (C,),
        difference((C, "zeroshot_ensemble"), (C, "zeroshot_template")),
        CLASSES,
        mean_of(C, "zeroshot_template", "zeroshot_ensemble"),
    ),
    "clip.retrieval.prompt": Claim(
        (C,),
        difference((C, "retrieval_prefixed"), (C, "retrieval_raw")),
        shown=mean_of(C, "retrieval_raw", "retrieval_prefixed", "retrieval_as_written"),
    ),
    "clip.zeroshot.vs_fewshot": Claim(
        (C,),
        difference((C, "zeroshot_ensemble"), (C, "probe_4")),
        CLASSES,
        mean_of(C, "zeroshot_ensemble", *(f"probe_{shots}" for shots in SHOTS)),
    ),
    "clip.scaling.loglog": Claim(LADDER, minus_slope, CLASSES, ladder_shown),
    "clip.scale.patch": Claim(
        (C, "large_patches"),
        difference((C, "zeroshot_ensemble"), ("large_patches", "zeroshot_ensemble")),
        CLASSES,
        mean_of("large_patches", "zeroshot_ensemble"),
    ),
    "clip.robust.zeroshot_gap": Claim(
        (C, "supervised"),
        smaller_drop,
        OTHER_ARTIST,
        lambda seeds: ", ".join(
            [
                mean_of(C, "zeroshot_ensemble", "shift")(seeds),
                mean_of("supervised", "supervised", "supervised_shift")(seeds),
            ]
        ),
    ),
    "clip.robust.probe_erodes": Claim(
        (C,),
        probe_gain_does_not_move,
        OTHER_ARTIST,
        mean_of(C, "zeroshot_ensemble", "probe", "shift", "probe_shift"),
    ),
    "clip.projection.linear": Claim(
        (C, "nonlinear_projection"),
        difference((C, "zeroshot_ensemble"), ("nonlinear_projection", "zeroshot_ensemble")),
        CLASSES,
        mean_of("nonlinear_projection", "zeroshot_ensemble"),
    ),
    "clip.compositions": Claim(
        (C,),
        difference((C, "compositions"), (C, "compositions_chance")),
        "data with held-out compositions: data=emoji or data=shapes",
        mean_of(C, "compositions", "compositions_chance"),
    ),
}
