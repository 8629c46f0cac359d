"""The arms of BLIP-2's claims: each trains what it is about from (recipe, seed) and measures it; a claim compares."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from papers.blip2.data import Asked, ExperimentData, load
from papers.blip2.encode import (
    CAPTIONING,
    GenerationConfig,
    accuracy,
    answer,
    answer_in_context,
    caption,
    chosen,
    cosines,
    encoded,
    pope_scores,
    reranked,
    text_features,
)
from papers.blip2.evidence.stages import PLAIN, StagePipeline, VisionEncoderSpec, nearest_words, second
from papers.blip2.frozen import HALF, LanguageModelBundle, pretrained_part_of
from papers.blip2.model import Blip2, Blip2Qformer
from papers.blip2.module import WITHOUT_ITG, FrozenWatch, Stage2Module
from papers.blip2.recipe import Blip2Recipe
from shared.core.device import device_for
from shared.core.paper_package import Claim, Context
from shared.core.recipe import SEED_BASE
from shared.data.loader import Batches
from shared.experiments.pretrained_parts import PretrainedPart
from shared.metrics import caption_scores, reranked_hits, retrieval_hits

__all__ = ["ARMS", "CLAIMS", "load", "pretrained_parts"]

VISUAL_TOKENS = (4, 8, 16, 32, 64, 128, 257)  # of a picture, before the language model: 32 queries, or all patches
TEXT_TOKENS = 16


def pretrained_parts(recipe: Blip2Recipe) -> list[PretrainedPart]:
    """What the arms take of other papers, made where it is lacking."""
    names = dict.fromkeys((recipe.encoder, recipe.weak_encoder, recipe.other_encoder))
    return [found for found in (pretrained_part_of(name, recipe.scale) for name in names) if found is not None]


# ---- measuring


def retrieval(model: Blip2Qformer, features: Tensor, data: ExperimentData, recipe: Blip2Recipe) -> dict:
    """R@1 on held-out pictures in points, mean of both directions: `r1` after re-ranking, `itc_r1` without."""
    eval_set, device = data.eval_set, device_for(recipe)
    tokens = data.tokens(eval_set.texts).to(device)
    pictures = encoded(model.eval(), features.to(device))  # re-ranking takes them up often
    i2t, t2i = reranked(model, pictures, tokens, recipe.candidates)
    protocol = f"itc-top{recipe.candidates}-itm+itc"
    hits = reranked_hits(i2t, t2i, eval_set.owner, ks=(1,), protocol=protocol)
    plain = retrieval_hits(cosines(pictures, text_features(model, tokens)), eval_set.owner, ks=(1,))
    return {
        "r1": 50 * sum(hits.values()),
        "itc_r1": 50 * sum(plain.values()),
        "i2t_r1": 100 * hits[f"retrieval/i2t_r1@{protocol}"],
        "t2i_r1": 100 * hits[f"retrieval/t2i_r1@{protocol}"],
    }


def answering(recipe: Blip2Recipe) -> GenerationConfig:
    return GenerationConfig(recipe.beams, recipe.length_penalty, recipe.longest)


def answers(
    work: StagePipeline, model: Blip2, bundle: LanguageModelBundle, encoder_spec: VisionEncoderSpec = PLAIN
) -> dict:
    """Exact-match accuracy in points on all held-out questions, `accuracy`, and on each kind of them; on a published
    set, which has no questions, CIDEr-D of captions."""
    eval_set, recipe = work.data.eval_set, work.recipe
    if not eval_set.asked:
        said = caption(model, bundle.words, work.held_features(encoder_spec), CAPTIONING)
        return {"cider": 100 * caption_scores(said, eval_set.references)["caption/cider_d@treebank"].score}
    features = work.asked_features(encoder_spec)
    said = answer(
        model, bundle.words, features[rows_of(eval_set.asked)], questions_of(eval_set.asked), answering(recipe)
    )
    return by_kind(said, eval_set.asked)


def by_kind(said: Sequence[str], asked: Sequence[Asked]) -> dict:
    found = {"accuracy": accuracy(said, [one.answer for one in asked])}
    for kind in dict.fromkeys(one.kind for one in asked):
        chosen_ = [(text, one.answer) for text, one in zip(said, asked, strict=True) if one.kind == kind]
        found[f"accuracy_{kind}"] = accuracy(*zip(*chosen_, strict=True))
    return found


def rows_of(asked: Sequence[Asked]) -> Tensor:
    return torch.tensor([one.picture for one in asked])


def questions_of(asked: Sequence[Asked]) -> list[str]:
    return [one.question for one in asked]


# ---- the arms


def bridged(
    encoder_spec: VisionEncoderSpec = PLAIN,
    queries: Callable[[StagePipeline], int] = lambda work: 0,
    which: str = "small",
    fresh: bool = False,
) -> Callable[[Context], dict]:
    """Stage 1, unless `fresh`, and stage 2 with a small language model; retrieval after the one, answers after the
    other."""

    def arm(context: Context) -> dict:
        work = StagePipeline.of(context)
        recipe, data, count = context.recipe, work.data, queries(work)
        if not fresh:
            work.stage1(encoder_spec, count)  # first, as another process may be at work on the language model
        bundle = work.bundle(which, encoder_spec.half)
        model, bundle, told = work.stage2(context.arm, encoder_spec, count, bundle, fresh)
        told |= answers(work, model, bundle, encoder_spec)
        told |= {"queries": model.config.queries, "language_parameters": size_of(bundle)}
        if not fresh:
            stage1, before = work.stage1(encoder_spec, count)
            told |= retrieval(stage1, work.held_features(encoder_spec), data, recipe)
            told["curves"] |= of_stage1(before["curves"])
        if context.first:
            keep_model(work, model, bundle, recipe.asked, encoder_spec)
        return told

    return arm


def size_of(bundle: LanguageModelBundle) -> int:
    return sum(p.numel() for p in bundle.model.module.parameters())


def no_itg(context: Context) -> dict:
    """Stage 1 with contrast and matching alone (Table 6)."""
    work = StagePipeline.of(context)
    model, told = work.stage1(objectives=WITHOUT_ITG)
    told["curves"] = of_stage1(told["curves"])
    return told | retrieval(model, work.held_features(), work.data, context.recipe)


def of_stage1(curves: dict) -> dict:
    """Curves under the names that figures have for the first stage."""
    return {f"{name}_stage1": curve for name, curve in curves.items()}


def few_shot(context: Context) -> dict:
    """The plain arm's bridge, asked behind answered questions (Sec. 5)."""
    work = StagePipeline.of(context)
    data, recipe = work.data, context.recipe
    model, bundle, _ = work.stage2("base")
    if not data.generated:
        return {}
    features, asked = work.train_features(), data.eval_set.asked
    said = list(asked)
    for kind in dict.fromkeys(one.kind for one in asked):  # examples of the very kind that is asked
        shots = [one for one in data.asked if one.kind == kind][: recipe.shots]
        examples = [(features[one.picture], one.question, one.answer) for one in shots]
        places = [place for place, one in enumerate(asked) if one.kind == kind]
        mine = [asked[place] for place in places]
        found = answer_in_context(
            model, bundle.words, work.asked_features()[rows_of(mine)], questions_of(mine), examples, answering(recipe)
        )
        for place, text in zip(places, found, strict=True):
            said[place] = text
    return by_kind(said, asked)


def train_all(context: Context) -> dict:
    """Image encoder and language model are trained with the bridge, from where the plain arm's stage 2 begins."""
    work = StagePipeline.of(context)
    bundle, encoder = work.small_speaker(), copy.deepcopy(work.encoder())
    model = work.new_bridge(bundle)
    told = work.train_all(model, bundle, encoder, second(context.recipe), context.folder)
    if not work.data.generated:
        return told
    asked = work.data.eval_set.asked
    with torch.inference_mode():
        device = encoder.device
        seen = torch.cat([encoder(some.to(device)).cpu() for some in work.data.eval_set.asked_images.split(128)])
    said = answer(model, bundle.words, seen[rows_of(asked)], questions_of(asked), answering(context.recipe))
    return told | by_kind(said, asked)


def each_step(context: Context) -> dict:
    """The same steps of stage 2 from features that were computed once and kept in 16 bit, and with the encoder run in
    each: their losses, and the times."""
    work, encoder_spec = StagePipeline.of(context), VisionEncoderSpec("other_encoder")
    recipe, images = second(context.recipe), work.data.dataset.train.images
    bundle, encoder = work.bundle(), work.encoder(encoder_spec)
    rows, texts = work.learned(bundle)
    steps = context.recipe.compared_steps
    kept = work.features(encoder_spec, images, "train", HALF)
    start = work.new_qformer(encoder_spec)  # what it has learned makes no difference
    found = {}
    for name, seen, runs in (("cached", kept, None), ("each_step", images, encoder)):
        module = Stage2Module(work.bridge_from(start, bundle, encoder_spec), replace(recipe, steps=steps), runs).train()
        batches = Batches((work.rows(seen, rows), *texts), recipe.batch, steps, context.seed)
        losses, seconds = stepped(module.to(work.device), batches, FrozenWatch([bundle.model, encoder]), work.device)
        found |= {name: losses[-1], f"{name}_ms": 1000 * statistics.median(seconds)}
        found.setdefault("curves", {})[f"loss_{name}"] = [
            (recipe.batch * (step + 1), loss) for step, loss in enumerate(losses)
        ]
    found["furthest"] = max(abs(a[1] - b[1]) for a, b in zip(*found["curves"].values(), strict=True))
    return found


def stepped(
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
    words = torch.zeros(rows, TEXT_TOKENS, dtype=torch.long, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[int, list[float]] = {count: [] for count in VISUAL_TOKENS}
    with torch.inference_mode():
        for turn in range(-1 if device.type == "cuda" else 0, recipe.timed_passes):
            for count in VISUAL_TOKENS:
                text = language.embed(words)
                embeddings = torch.cat([text.new_zeros(rows, count, language.width), text], 1)
                attention_mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=device)
                wait()
                started = time.perf_counter()
                language.states(embeddings, attention_mask)
                wait()
                if turn >= 0:
                    times[count].append(1000 * (time.perf_counter() - started))
    median = {count: statistics.median(several) for count, several in times.items()}
    saved = 100 * (1 - median[32] / median[VISUAL_TOKENS[-1]])
    return {"saved": saved, "curves": {"milliseconds": [(count, value) for count, value in median.items()]}}


def headline(context: Context) -> dict:
    """A real language model, frozen in 16 bit: held-out questions with the picture, with another picture, and blind;
    and POPE. Nothing of seeds that the recipe leaves out."""
    if context.seed - SEED_BASE >= context.recipe.headline_seeds:
        return {}
    work = StagePipeline.of(context)
    data, recipe = work.data, context.recipe
    work.stage1()  # first, as another process may be at work on the language model
    bundle = work.bundle("headline")
    model, bundle, told = work.stage2("headline", bundle=bundle, headline=True)
    words, how = bundle.words, answering(recipe)
    told |= {"language_parameters": size_of(bundle), "language_model": recipe.headline_model or "small"}
    if not data.generated:
        return told | answers(work, model, bundle)
    features, asked = work.asked_features(), first(data.eval_set.asked, recipe.headline_questions)
    rows, questions = rows_of(asked), questions_of(asked)
    right = [one.answer for one in asked]
    strangers = other_pictures(asked, len(features))
    said = answer(model, words, features[rows], questions, how)
    told |= by_kind(said, asked)
    if recipe.headline_word_steps:  # what stage 2 begins with: what the words say, and what the model makes of them
        start = work.headline_start(bundle).to(work.device).eval()
        said = nearest_words(start, bundle, features, data.answers)  # (A, Q)
        told["words_right"] = accuracy([said[one.picture][data.open_kinds.index(one.kind)] for one in asked], right)
        told["before_stage2"] = accuracy(chosen(start, words, features[rows], questions, data.answers), right)
    told["other_picture"] = accuracy(answer(model, words, features[strangers], questions, how), right)
    distinct = list(dict.fromkeys(questions))  # a blind model answers alike what is asked alike
    blind = dict(zip(distinct, answer(model, words, None, distinct, how), strict=True))
    told["blind_writing"] = accuracy([blind[question] for question in questions], right)
    fewer = first(asked, len(asked) // 2)  # every answer of the world is weighed for each
    told["blind_choosing"] = accuracy(
        chosen(model, words, None, questions_of(fewer), data.answers), [one.answer for one in fewer]
    )
    told["blind"] = max(told["blind_writing"], told["blind_choosing"])
    pope = first(data.eval_set.pope, recipe.headline_questions // 2)
    told |= pope_scores(
        answer(model, words, features[rows_of(pope)], questions_of(pope), how), [p.answer for p in pope]
    )
    if context.first:
        keep_model(work, model, bundle, recipe.headline_asked)
    return told


def first(asked: Sequence[Asked], count: int) -> list[Asked]:
    """So many from the list's begin on, a whole number of pairs: things come there in turn, so that all are asked
    about, and kinds and answers stay balanced."""
    return list(asked[: max(2, count - count % 2)])


def other_pictures(asked: Sequence[Asked], pictures: int) -> Tensor:
    """For each question any of the set's pictures but its own. (N,)"""
    generator = torch.Generator().manual_seed(0)
    return (rows_of(asked) + torch.randint(1, pictures, (len(asked),), generator=generator)) % pictures


def keep_model(
    work: StagePipeline,
    model: Blip2,
    bundle: LanguageModelBundle,
    asked: float,
    encoder_spec: VisionEncoderSpec = PLAIN,
) -> None:
    """The first seed's bridge stays with the run, and what it needs beside it: figures are drawn from it, and
    `python -m papers ask` and `chat` load it. asked: the share of questions among the texts that it learned."""
    from papers.blip2.bundle import keep_frozen
    from shared.weights.load import save_weights

    recipe, folder, tokenizer = work.recipe, work.context.folder, work.data.tokenizer
    save_weights(model, folder / "model.safetensors", {"variant": recipe.model})
    tokenizer.save(folder / "tokenizer.json")
    encoder, layer = work.encoder(encoder_spec), encoder_spec.layer or recipe.layer
    named = getattr(recipe, encoder_spec.encoder)
    captions = work.data.has_captions(asked)
    keep_frozen(folder, model.config, recipe.model, encoder, named, layer, bundle.model, tokenizer, captions)


def many(work: StagePipeline) -> int:
    return work.data.config.queries * work.recipe.more


def one(work: StagePipeline) -> int:
    return 1


# The first two train a first stage, while a third makes the language model; from "base" on they take the headline's
# first stage.
ARMS: dict[str, Callable[[Context], dict]] = {
    "headline": headline,
    "no_itg": no_itg,
    "no_stage1": bridged(fresh=True),
    "weak_encoder": bridged(VisionEncoderSpec("weak_encoder")),
    "queries_many": bridged(queries=many, fresh=True),
    "queries_one": bridged(queries=one, fresh=True),
    "last_layer": bridged(VisionEncoderSpec(layer="last"), fresh=True),
    "other_encoder": bridged(VisionEncoderSpec("other_encoder"), fresh=True),
    "each_step": each_step,
    "visual_tokens": visual_tokens,
    "base": bridged(),
    "larger_language_model": bridged(which="larger"),
    "train_all": train_all,
    "half": bridged(VisionEncoderSpec(half=True)),
    "few_shot": few_shot,
}


# ---- effects


def difference(
    treatment: str, baseline: str, name: str = "accuracy", of_baseline: str = ""
) -> Callable[[dict], float | None]:
    """Treatment minus baseline; None where the data has no such measure."""

    def effect(measured: dict[str, dict]) -> float | None:
        ours, theirs = measured[treatment].get(name), measured[baseline].get(of_baseline or name)
        return None if ours is None or theirs is None else ours - theirs

    return effect


def means(**names: Sequence[str]) -> Callable[[list[dict]], str]:
    """arm=(what, ...) -> 'arm what 12.3, ...' averaged over seeds: what stands beside an effect."""

    def shown(seeds: list[dict[str, dict]]) -> str:
        parts = []
        for arm, several in names.items():
            for name in several:
                values = [one[arm][name] for one in seeds if name in one.get(arm, {})]
                if values:
                    mean = sum(values) / len(values)
                    digits = ",.0f" if "parameters" in name or "bytes" in name else ".3f" if name in LOSSES else ".1f"
                    parts.append(f"{arm} {name} {mean:{digits}}")
        return ", ".join(parts)

    return shown


def few_seeds(recipe: Blip2Recipe) -> int:
    return recipe.headline_seeds


LOSSES = ("cached", "each_step", "furthest")
BOTH = ("accuracy", "r1")
QUESTIONS = "scenes: data=emoji or data=shapes, whose questions have known answers"
CLAIMS: dict[str, Claim] = {
    "blip2.answers.vs_blind": Claim(
        ("headline",),
        difference("headline", "headline", of_baseline="blind"),
        QUESTIONS,
        means(
            headline=(
                "accuracy",
                "accuracy_what",
                "accuracy_colour",
                "words_right",
                "before_stage2",
                "blind_writing",
                "blind_choosing",
                "other_picture",
                "pope_acc",
                "pope_yes_ratio",
                "pope_parse_failures",
                "trained_parameters",
                "language_parameters",
                "frozen_gradient_bytes",
                "frozen_state_bytes",
            )
        ),
        seeds=few_seeds,
    ),
    "blip2.answers.vs_other_picture": Claim(
        ("headline",),
        difference("headline", "headline", of_baseline="other_picture"),
        QUESTIONS,
        means(headline=("accuracy", "other_picture")),
        seeds=few_seeds,
    ),
    "blip2.stage1_needed.opt": Claim(
        ("base", "no_stage1"),
        difference("base", "no_stage1"),
        QUESTIONS,
        means(base=("accuracy", "accuracy_what", "accuracy_colour"), no_stage1=("accuracy",)),
    ),
    "blip2.itg_helps_retrieval": Claim(
        ("base", "no_itg"),
        difference("base", "no_itg", "r1"),
        shown=means(base=("r1", "itc_r1"), no_itg=("r1", "itc_r1")),
    ),
    "blip2.encoder.vitg_vs_vitl_opt": Claim(
        ("base", "weak_encoder", "no_stage1", "other_encoder"),
        difference("base", "weak_encoder"),
        QUESTIONS,
        means(base=BOTH, weak_encoder=BOTH, no_stage1=("accuracy",), other_encoder=("accuracy",)),
    ),
    "blip2.encoder.retrieval": Claim(
        ("base", "weak_encoder"),
        difference("base", "weak_encoder", "r1"),
        shown=means(base=("r1", "itc_r1"), weak_encoder=("r1", "itc_r1")),
    ),
    "blip2.llm.size_opt": Claim(
        ("larger_language_model", "base"),
        difference("larger_language_model", "base"),
        QUESTIONS,
        means(larger_language_model=("accuracy", "language_parameters"), base=("accuracy", "language_parameters")),
    ),
    "blip2.penultimate_layer": Claim(
        ("no_stage1", "last_layer"),
        difference("no_stage1", "last_layer"),
        QUESTIONS,
        means(no_stage1=("accuracy",), last_layer=("accuracy",)),
    ),
    "blip2.half_precision_frozen": Claim(
        ("half", "base"), difference("half", "base"), QUESTIONS, means(half=BOTH, base=BOTH)
    ),
    "blip2.no_icl": Claim(
        ("base", "few_shot"),
        difference("base", "few_shot"),
        QUESTIONS,
        means(base=("accuracy",), few_shot=("accuracy",)),
    ),
    "blip2.bridge_alone": Claim(
        ("base", "train_all"),
        difference("base", "train_all"),
        QUESTIONS,
        means(base=("accuracy", "trained_parameters"), train_all=("accuracy", "trained_parameters")),
    ),
    "blip2.queries.quality": Claim(
        ("no_stage1", "queries_many", "queries_one"),
        difference("no_stage1", "queries_many"),
        QUESTIONS,
        means(
            queries_one=("queries", "accuracy"), no_stage1=("queries", "accuracy"), queries_many=("queries", "accuracy")
        ),
    ),
    "blip2.queries.cost": Claim(
        ("visual_tokens",), lambda measured: measured["visual_tokens"]["saved"], shown=means(visual_tokens=("saved",))
    ),
    "blip2.cached_features": Claim(
        ("each_step",),
        difference("each_step", "each_step", "cached", "each_step"),
        shown=means(each_step=("cached", "each_step", "furthest", "cached_ms", "each_step_ms")),
    ),
}
# fmt: skip
