"""The arms of BLIP-2's claims: each trains what it is about from (recipe, seed) and measures it; a claim compares."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from papers.blip2.data import data_of
from papers.blip2.encode import answer_in_context
from papers.blip2.evidence.headline import headline
from papers.blip2.evidence.measuring import (
    answering,
    answers,
    by_kind,
    language_parameters,
    question_answering,
    retrieval,
    rows_of,
    save_first_seed,
)
from papers.blip2.evidence.stages import StagePipeline, VisionEncoderSpec, stage2_recipe
from papers.blip2.frozen import HALF, LanguageModelBundle, pretrained_part_of
from papers.blip2.model import Blip2
from papers.blip2.module import WITHOUT_ITG, FrozenWatch, Stage2Module, unwrapped
from papers.blip2.recipe import Blip2Recipe
from shared.backbones.vision import Encoder
from shared.core.paper_package import Claim, Context
from shared.data.loader import Batches
from shared.data.recipe import load_dataset as load
from shared.experiments.effects import difference, means
from shared.experiments.pretrained_parts import PretrainedPart

__all__ = ["ARMS", "CLAIMS", "load", "pretrained_parts"]

VISUAL_TOKENS = (4, 8, 16, 32, 64, 128, 257)  # of a picture, before the language model: 32 queries, or all patches
TEXT_TOKENS = 16


def pretrained_parts(recipe: Blip2Recipe) -> list[PretrainedPart]:
    """What the arms take of other papers, made where it is lacking."""
    names = dict.fromkeys((recipe.encoder, recipe.weak_encoder, recipe.other_encoder))
    parts = [pretrained_part_of(name, recipe.scale) for name in names]
    return [part for part in parts if part is not None]


# ---- arms through both stages, or one of them


def two_stages(
    encoder_spec: VisionEncoderSpec = VisionEncoderSpec(),  # noqa: B008 (immutable)
    queries: Callable[[Context], int] = lambda context: 0,
    language_model: str = "small",
    fresh: bool = False,
) -> Callable[[Context], dict]:
    """Stage 1, unless `fresh`, and stage 2 with a small language model; retrieval after the one, answers after the
    other."""

    def arm(context: Context) -> dict:
        work = StagePipeline.of(context, encoder_spec, queries(context))
        if not fresh:
            work.stage1()  # first, as another process may be at work on the language model
        bundle = work.bundle(language_model)
        model, stats = work.stage2(context.arm, bundle, fresh)
        stats |= question_answering(work, model, bundle)
        stats |= {"queries": model.config.queries, "language_parameters": language_parameters(bundle)}
        if not fresh:
            qformer, stage1_stats = work.stage1()
            stats |= retrieval(work, qformer)
            stats["curves"] |= of_stage1(stage1_stats["curves"])
        save_first_seed(work, model, bundle, context.recipe.asked)
        return stats

    return arm


def many_queries(context: Context) -> int:
    return data_of(context).config.queries * context.recipe.more


def no_itg(context: Context) -> dict:
    """Stage 1 with contrast and matching alone (Table 6)."""
    work = StagePipeline.of(context)
    model, stats = work.stage1(objectives=WITHOUT_ITG)
    return stats | {"curves": of_stage1(stats["curves"])} | retrieval(work, model)


def of_stage1(curves: dict) -> dict:
    """Curves under the names that figures have for the first stage."""
    return {f"{name}_stage1": curve for name, curve in curves.items()}


def few_shot(context: Context) -> dict:
    """The plain arm's bridge, asked behind answered questions (Sec. 5), examples of the very kind that is asked."""
    work = StagePipeline.of(context)
    data, bundle = work.data, work.bundle()
    model, _ = work.stage2("base", bundle)
    if not data.generated:
        return {}
    shown, features = work.features("train"), work.features("asked")
    predictions, answered = [], []
    for kind in dict.fromkeys(question.kind for question in data.eval_set.questions):
        shots = [question for question in data.questions if question.kind == kind][: context.recipe.shots]
        examples = [(shown[shot.picture], shot.question, shot.answer) for shot in shots]
        questions = [question for question in data.eval_set.questions if question.kind == kind]
        predictions += answer_in_context(
            model, bundle.tokenizer, features[rows_of(questions)], [question.question for question in questions],
            examples, answering(context.recipe),
        )  # fmt: skip
        answered += questions
    return by_kind(predictions, answered)


def train_all(context: Context) -> dict:
    """Image encoder and language model are trained with the bridge, from where the plain arm's stage 2 begins."""
    work = StagePipeline.of(context)
    bundle, encoder = work.small_language_model(), copy.deepcopy(work.encoder())
    model = work.new_bridge(bundle)
    stats = train_end_to_end(work, model, bundle, encoder)
    if not work.data.generated:
        return stats
    eval_set = work.data.eval_set
    with torch.inference_mode():
        parts = eval_set.question_images.split(128)
        features = torch.cat([encoder(images.to(encoder.device)).cpu() for images in parts])
    return stats | by_kind(answers(model, bundle, features, eval_set.questions, context.recipe), eval_set.questions)


def train_end_to_end(work: StagePipeline, model: Blip2, bundle: LanguageModelBundle, encoder: Encoder) -> dict:
    rows, texts = work.stage2_texts(bundle, work.recipe.asked)
    parts = [unwrapped(encoder), unwrapped(bundle.model)]
    for part in parts:
        part.requires_grad_(True).train()
    module = Stage2Module(model, stage2_recipe(work.recipe), encoder=parts[0], beside=parts)
    images = work.indexed(work.data.dataset.train.images, rows)
    stats = work.fit(module, (images, *texts), work.context.folder, "all")
    for part in parts:
        part.requires_grad_(False).eval()
    return stats


# ---- arms that take the clock


def each_step(context: Context) -> dict:
    """The same steps of stage 2 from features that were computed once and kept in 16 bit, and with the encoder run in
    each: their losses, and the times."""
    work = StagePipeline.of(context, VisionEncoderSpec("other_encoder"))
    recipe = replace(stage2_recipe(context.recipe), steps=context.recipe.compared_steps)
    images, bundle, encoder = work.data.dataset.train.images, work.bundle(), work.encoder()
    rows, texts = work.stage2_texts(bundle, recipe.asked)
    features = work.features("train", HALF)
    qformer = work.new_qformer()  # what it has learned makes no difference
    watch, stats, curves = FrozenWatch([bundle.model, encoder]), {}, {}
    for name, inputs, runs in (("cached", features, None), ("each_step", images, encoder)):
        module = Stage2Module(work.bridge_from(qformer, bundle), recipe, runs).train()
        batches = Batches((work.indexed(inputs, rows), *texts), recipe.batch, recipe.steps, context.seed)
        losses, seconds = timed_steps(module.to(work.device), batches, watch, work.device)
        stats |= {name: losses[-1], f"{name}_ms": 1000 * statistics.median(seconds)}
        curves[f"loss_{name}"] = [(recipe.batch * (step + 1), loss) for step, loss in enumerate(losses)]
    furthest = max(abs(cached[1] - run[1]) for cached, run in zip(*curves.values(), strict=True))
    return stats | {"curves": curves, "furthest": furthest}


def timed_steps(
    module: Stage2Module, batches: Batches, watch: FrozenWatch, device: torch.device
) -> tuple[list[float], list[float]]:
    """Losses and seconds of plain steps in fp32, without a Trainer around them."""
    module.log = lambda *args, **more: None
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    losses, seconds = [], []
    for step in range(len(batches)):
        started = time.perf_counter()
        loss = module.training_step(tuple(part.to(device) for part in batches[step]), step)
        loss.backward()
        watch.on_before_optimizer_step(None, module, optimizer)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))  # waits for the whole step on a GPU
        seconds.append(time.perf_counter() - started)
    return losses, seconds


def visual_tokens(context: Context) -> dict:
    """Milliseconds of the headline's language model over so many visual and 16 text tokens, of recipe.timed_rows
    pictures at once: the median of several passes, in turn, so that a busy moment of the machine meets all alike. On a
    GPU a pass of each before them loads its kernels."""
    work, recipe = StagePipeline.of(context), context.recipe
    language, device, rows = work.bundle("headline").model, work.device, recipe.timed_rows
    tokens = torch.zeros(rows, TEXT_TOKENS, dtype=torch.long, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[int, list[float]] = {count: [] for count in VISUAL_TOKENS}
    with torch.inference_mode():
        for turn in range(-1 if device.type == "cuda" else 0, recipe.timed_passes):
            for count in VISUAL_TOKENS:
                text: Tensor = language.embed(tokens)
                embeddings = torch.cat([text.new_zeros(rows, count, language.width), text], 1)
                attention_mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=device)
                wait()
                started = time.perf_counter()
                language.states(embeddings, attention_mask)
                wait()
                if turn >= 0:
                    times[count].append(1000 * (time.perf_counter() - started))
    milliseconds = [(count, statistics.median(several)) for count, several in times.items()]
    median = dict(milliseconds)
    saved = 100 * (1 - median[32] / median[VISUAL_TOKENS[-1]])
    return {"saved": saved, "curves": {"milliseconds": milliseconds}}


# The first two train a first stage, while a third makes the language model; from "base" on they take the headline's
# first stage.
ARMS: dict[str, Callable[[Context], dict]] = {
    "headline": headline,
    "no_itg": no_itg,
    "no_stage1": two_stages(fresh=True),
    "weak_encoder": two_stages(VisionEncoderSpec("weak_encoder")),
    "queries_many": two_stages(queries=many_queries, fresh=True),
    "queries_one": two_stages(queries=lambda context: 1, fresh=True),
    "last_layer": two_stages(VisionEncoderSpec(layer="last"), fresh=True),
    "other_encoder": two_stages(VisionEncoderSpec("other_encoder"), fresh=True),
    "each_step": each_step,
    "visual_tokens": visual_tokens,
    "base": two_stages(),
    "larger_language_model": two_stages(language_model="larger"),
    "train_all": train_all,
    "half": two_stages(VisionEncoderSpec(half=True)),
    "few_shot": few_shot,
}


# ---- the claims

LOSSES = {"cached": 3, "each_step": 3, "furthest": 3}  # digits behind the point
ACCURACY, RETRIEVAL, BOTH = ("accuracy",), ("r1", "itc_r1"), ("accuracy", "r1")
KINDS = ("accuracy", "accuracy_what", "accuracy_colour")
NEEDS_QUESTIONS = "scenes: data=emoji or data=shapes, whose questions have known answers"


def compared(treatment: str, baseline: str, key: str = "accuracy", **shown: Sequence[str]) -> Claim:
    """By how much the treatment's `key` is above the baseline's. shown: measurements of arms beside it."""
    arms = tuple(dict.fromkeys((treatment, baseline, *shown)))
    need = NEEDS_QUESTIONS if key == "accuracy" else ""
    return Claim(arms, difference(treatment, baseline, key), need, means(**shown))


def of_headline(baseline_key: str, *shown: str) -> Claim:
    """By how much the headline's accuracy is above one of its control arms'."""
    return Claim(
        ("headline",),
        difference("headline", "headline", "accuracy", baseline_key),
        NEEDS_QUESTIONS,
        means(headline=("accuracy", *shown)),
        seeds=lambda recipe: recipe.headline_seeds,
    )


CLAIMS: dict[str, Claim] = {
    "blip2.answers.vs_blind": of_headline(
        "blind", "accuracy_what", "accuracy_colour", "words_right", "before_stage2", "blind_writing", "blind_choosing",
        "other_picture", "pope_acc", "pope_yes_ratio", "pope_parse_failures", "trained_parameters",
        "language_parameters", "frozen_gradient_bytes", "frozen_state_bytes",
    ),
    "blip2.answers.vs_other_picture": of_headline("other_picture", "other_picture"),
    "blip2.stage1_needed.opt": compared("base", "no_stage1", base=KINDS, no_stage1=ACCURACY),
    "blip2.itg_helps_retrieval": compared("base", "no_itg", "r1", base=RETRIEVAL, no_itg=RETRIEVAL),
    "blip2.encoder.vitg_vs_vitl_opt": compared(
        "base", "weak_encoder", base=BOTH, weak_encoder=BOTH, no_stage1=ACCURACY, other_encoder=ACCURACY
    ),
    "blip2.encoder.retrieval": compared("base", "weak_encoder", "r1", base=RETRIEVAL, weak_encoder=RETRIEVAL),
    "blip2.llm.size_opt": compared(
        "larger_language_model", "base",
        larger_language_model=("accuracy", "language_parameters"), base=("accuracy", "language_parameters"),
    ),
    "blip2.penultimate_layer": compared("no_stage1", "last_layer", no_stage1=ACCURACY, last_layer=ACCURACY),
    "blip2.half_precision_frozen": compared("half", "base", half=BOTH, base=BOTH),
    "blip2.no_icl": compared("base", "few_shot", base=ACCURACY, few_shot=ACCURACY),
    "blip2.bridge_alone": compared(
        "base", "train_all", base=("accuracy", "trained_parameters"), train_all=("accuracy", "trained_parameters")
    ),
    "blip2.queries.quality": compared(
        "no_stage1", "queries_many", queries_one=("queries", "accuracy"), no_stage1=("queries", "accuracy"),
        queries_many=("queries", "accuracy"),
    ),
    "blip2.queries.cost": Claim(
        ("visual_tokens",), lambda measured: measured["visual_tokens"]["saved"], shown=means(visual_tokens=("saved",))
    ),
    "blip2.cached_features": Claim(
        ("each_step",),
        difference("each_step", "each_step", "cached", "each_step"),
        shown=means(digits=LOSSES, each_step=("cached", "each_step", "furthest", "cached_ms", "each_step_ms")),
    ),
}  # fmt: skip
