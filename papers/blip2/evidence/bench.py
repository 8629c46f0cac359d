"""BLIP-2 against transformers and against its own way without what makes it quick: equal weights and equal data, in
turns, in one run. `python -m papers bench blip2`.

Weights are random, since no published ones are needed to measure time; dropout is off. What transformers lacks of stage
1 (objectives, negatives) its Q-Former borrows from ours. Axes: B pictures, S picture tokens, C their width, R texts,
T text tokens, Q queries, D width, W width of the language model.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from papers.blip2.config import CLIP_VIT_L, LANGUAGES, VARIANTS, Blip2Config, LanguageConfig, VisionConfig
from papers.blip2.formats import VISION, published_of, transformers_qformer, with_language
from papers.blip2.frozen import small_language_model
from papers.blip2.losses import stage1_losses, stage2_loss
from papers.blip2.model import Blip2, Blip2Qformer, Objectives, vision_encoder
from papers.blip2.module import trim_padding
from papers.blip2.weights import hf_config
from shared.backbones.hf_lm import CausalAdapter
from shared.backbones.vision import Encoder, vit_encoder
from shared.core.errors import UserError
from shared.losses.image_text import IGNORED, next_token_targets
from shared.nn.packed_linear import pack
from shared.tools.bench import pick
from shared.tools.bench_output import Job, Sweep
from shared.tools.bench_setup import Setup, beam_writers, longest, normaliser, pictures_and_texts, stepper
from shared.weights.weight_map import to_published

BEAMS, NEW_TOKENS = 5, 20
A_PHOTO_OF = (2, 102, 1345, 9)  # OPT's start token and some three words; their ids cost the same
VISUAL_TOKENS = (32, 1, 8, 64, 128, 257)  # the paper's queries first, last all tokens of its encoders
TEXT_TOKENS = 16

PUBLISHED = "blip2-vit-g-opt-2.7b"  # what a GPU is given
OPT_125M = LanguageConfig("opt-125m", "opt", 768, 50_272, layers=12, heads=12, mlp_width=3072, context=2048)
# To OPT-125m what ViT-g is to OPT-2.7B: 37 % of its parameters, and as many picture tokens.
EVA_SMALL = VisionConfig("eva", 224, 14, width=512, layers=14, heads=8, mlp_ratio=4.3637)


OPT_TINY = Blip2Config(  # for tests: everything small, and no two sizes alike
    VisionConfig("eva", 28, 7, width=40, layers=2, heads=5, mlp_ratio=3.5),
    LanguageConfig("opt-tiny", "opt", 36, 117, layers=2, heads=3, mlp_width=68, context=320),
    queries=6, width=48, layers=3, heads=4, mlp_width=72, embed_width=28, vocabulary=101, positions=33, context=19,
    start_token=98, end_token=99, decode_token=100, tokenizer="small-bpe",
)  # fmt: skip
CONFIGS: dict[str, Callable[[], Blip2Config]] = {
    "opt-tiny": lambda: OPT_TINY,
    "opt-125m": lambda: Blip2Config(EVA_SMALL, OPT_125M),  # what two cores can bear around the paper's Q-Former
    "vit-l-smollm2-135m": lambda: Blip2Config(CLIP_VIT_L, LANGUAGES["smollm2-135m"]),  # of the offline chain
    **{name: make for name, make in VARIANTS.items() if make().language is not None and make().language.family != "t5"},
}


def config_of(variant: str) -> Blip2Config:
    """The variant, without dropout."""
    return replace(pick(variant, CONFIGS), dropout=0.0)


# ---- the contestants


def frozen_encoder(config: VisionConfig) -> Encoder:
    return vit_encoder(vision_encoder(config), "last")


def their_config(config: Blip2Config) -> Any:
    """transformers' configuration of these sizes."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    language = config.language
    text = {
        "model_type": "opt",
        "vocab_size": language.vocabulary,
        "hidden_size": language.width,
        "word_embed_proj_dim": language.width,
        "ffn_dim": language.mlp_width,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "max_position_embeddings": language.context,
        "dropout": 0.0,
    }
    more = {"text_config": text, "image_token_index": language.vocabulary - 1}
    return transformers.Blip2Config.from_dict(hf_config(config) | more)


def pair(config: Blip2Config, device: str) -> tuple[Encoder, Blip2, nn.Module]:
    """Our image encoder and bridge, and transformers' model with the same weights."""
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws weights in no time
        vit = vision_encoder(config.vision)
        theirs = their_model(config)
        ours = Blip2(config, CausalAdapter(copy.deepcopy(theirs.language_model)))
    state = {**ours.state_dict(), **{f"{VISION}{key}": tensor for key, tensor in vit.state_dict().items()}}
    published = published_of(state, "transformers-generation", config.vision.kind)
    theirs.load_state_dict(with_language(published, theirs.language_model.state_dict()))
    return vit_encoder(vit, "last"), ours.eval(), theirs.eval()


def their_model(config: Blip2Config) -> nn.Module:
    import transformers

    return transformers.Blip2ForConditionalGeneration(their_config(config))


class TheirQFormer(nn.Module):
    """transformers' Q-Former with the weights of ours, and with those of its methods that ITC and ITM call."""

    def __init__(self, ours: Blip2Qformer):
        super().__init__()
        import transformers

        config = replace(ours.config, language=OPT_125M)
        sizes = their_config(config).qformer_config
        sizes.use_qformer_text_input = True
        self.query_tokens = nn.Parameter(ours.qformer.query_tokens.detach().clone())
        self.word = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.positions, config.width)
        self.theirs = transformers.Blip2QFormerModel(sizes)
        kept = {
            key: tensor
            for key, tensor in ours.qformer.state_dict().items()
            if key != "query_tokens" and not key.startswith(("embeddings.word", "embeddings.position"))
        }
        self.theirs.load_state_dict(to_published(kept, transformers_qformer(text=True, theirs="", ours="")))
        self.word.load_state_dict(ours.qformer.embeddings.word.state_dict())
        self.position.load_state_dict(ours.qformer.embeddings.position.state_dict())

    def look_at(self, context: Tensor) -> Tensor:
        return context

    def encode_queries(self, context: Tensor, *, caches: None = None) -> Tensor:
        return self.theirs(self._queries(len(context)), encoder_hidden_states=context).last_hidden_state

    def encode_text(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return self.theirs(self._words(tokens), query_length=0, attention_mask=attention_mask.long()).last_hidden_state

    def match(self, tokens: Tensor, attention_mask: Tensor, context: Tensor) -> Tensor:
        queries = self._queries(len(tokens))
        mask = torch.cat([attention_mask.new_ones(queries.shape[:2]), attention_mask], dim=1).long()
        return self.theirs(
            torch.cat([queries, self._words(tokens)], dim=1),
            query_length=queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=context,
        ).last_hidden_state

    def _queries(self, rows: int) -> Tensor:
        return self.query_tokens.expand(rows, -1, -1)

    def _words(self, tokens: Tensor) -> Tensor:
        return self.word(tokens) + self.position.weight[: tokens.shape[1]]


class Repeated(Blip2Qformer):
    """Stage 1 without what is shared among its passes: every pair looks at its picture anew, generation runs the
    queries once more, and words are scored at padding too."""

    def matching(self, context, seen, tokens, negatives) -> tuple[Tensor, Tensor]:
        own = torch.arange(len(tokens), device=tokens.device)
        pictures, texts = torch.cat([own, negatives.images, own]), torch.cat([own, own, negatives.texts])
        logits = self._match(context[pictures], tokens[texts])
        return logits[: len(own)], logits[len(own) :]

    def forward(self, features, tokens, ids=None, objectives=Objectives()):  # noqa: B008 (immutable)
        output = super().forward(features, tokens, ids, objectives._replace(itg=False))
        if not objectives.itg:
            return output
        tokens = self.with_start(tokens)
        attention_mask = self.attention_mask(tokens)
        states = self.qformer.joint_causal(tokens, attention_mask, self.vision_norm(features))[:, self.config.queries :]
        targets = next_token_targets(tokens, attention_mask)
        learned = targets != IGNORED
        return output._replace(logits=self._logits(states)[learned], next_tokens=targets[learned])


def stage1_models(config: Blip2Config, kind: str, device: str = "cpu") -> dict[str, Blip2Qformer]:
    """Ours, and with equal weights `transformers` or `repeated`."""
    torch.manual_seed(0)
    with torch.device(device):
        ours = Blip2Qformer(config)
        other = Repeated(config)
        other.load_state_dict(ours.state_dict())
        if kind == "transformers":
            other.qformer = TheirQFormer(ours)
    return {"ours": ours, kind: other}


# ---- what they do


def writers(config: Blip2Config, device: str, dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Functions of pictures and a prompt (B, P) that give new tokens (B, NEW_TOKENS), by beam search. Frozen parts are
    of `dtype`; the Q-Former stays in fp32 on both sides, as published."""
    encoder, ours, theirs = pair(config, device)
    encoder.to(dtype)
    ours.language_model.to(dtype)
    for part in (encoder.module, ours, ours.language_model.module):
        pack(part)
    for part in (theirs.vision_model, theirs.language_projection, theirs.language_model):
        part.to(dtype)
    image_token = theirs.config.image_token_index

    def behind_picture(prompts: Tensor) -> Tensor:
        return torch.cat([prompts.new_full((len(prompts), config.queries), image_token), prompts], dim=1)

    return beam_writers(
        lambda pixels: ours.decoding(encoder(pixels)),
        theirs,
        normaliser(theirs.vision_model, config.vision.mean, config.vision.std),
        behind_picture,
        2,
        BEAMS,
        NEW_TOKENS,
    )


def stage2_steps(config: Blip2Config, setup: Setup, batch: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Stage 2's step on features of pictures that were computed before, and with the encoder run in it: functions of
    tokens (B, T) and attention_mask (B, T) that give the loss before it."""
    pixels, _ = inputs(config, batch, setup.device)
    torch.manual_seed(0)
    half = setup.precision == "bf16"
    with torch.device(setup.device):
        encoder, lm = frozen_encoder(config.vision), small_language_model(config.language)
    for parameter in lm.parameters():  # a new one says anything of anything: its loss would compare nothing
        if parameter.ndim == 2:
            parameter.data.mul_(5)
    if half:
        encoder, lm = encoder.to(torch.bfloat16), lm.to(torch.bfloat16)
    with torch.device(setup.device):
        first, second = Blip2(config, lm), Blip2(config, lm)
    second.load_state_dict(first.state_dict())
    with torch.autocast(setup.device, torch.bfloat16, enabled=half):  # as in a step
        cached = encoder(pixels)

    def step(model: Blip2, features: Callable[[], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return stepper(model, lambda *texts: stage2_loss(model(features(), *texts)), setup.precision)

    return {
        "cached features": step(first, lambda: cached),
        "encoder in each step": step(second, lambda: encoder(pixels)),
    }


def stage1_steps(
    config: Blip2Config, device: str, precision: str, kind: str, objectives: Objectives
) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """Stage 1's step: functions of features (B, S, C) and texts (B, T) that give the losses before it. Both draw their
    hard negatives by equal seeds."""

    def losses(model: Blip2Qformer, features: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        parts = stage1_losses(model(features, tokens, None, objectives), config.label_smoothing)
        return tuple(loss for loss in (parts.itc, parts.itm, parts.itg) if loss is not None)

    models = stage1_models(config, kind, device)
    return {name: stepper(model, partial(losses, model), precision) for name, model in models.items()}


# ---- what they are given


def inputs(config: Blip2Config, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Pictures of noise (B, 3, H, W) uint8, and texts (B, T) of natural lengths, padded to the longest."""
    start, end = config.start_token, config.end_token
    words = (1, min(start, config.vocabulary))
    pixels, tokens = pictures_and_texts(
        batch, config.vision.image_size, config.context, start=start, end=end, words=words
    )
    return pixels.to(device), trim_padding(tokens, config.pad_token).to(device)


def language_inputs(config: Blip2Config, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """The language model's texts (B, T) of natural lengths, and where they are (B, T)."""
    context, words = longest(batch, config.context), (3, config.language.vocabulary - 1)
    _, tokens = pictures_and_texts(batch, 1, context, start=2, end=2, words=words)
    return tokens.to(device), (tokens != 0).to(device)


def prompts(config: Blip2Config, batch: int, device: str) -> Tensor:
    """(B, 4)."""
    return torch.tensor([[word % config.language.vocabulary for word in A_PHOTO_OF]] * batch, device=device)


def pictures_and_prompts(config: Blip2Config, batch: int, device: str) -> tuple[Tensor, Tensor]:
    return inputs(config, batch, device)[0], prompts(config, batch, device)


def features_and_texts(config: Blip2Config, batch: int, device: str) -> tuple[Tensor, Tensor]:
    shape = (batch, config.vision.tokens, config.vision.width)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return features.to(device), inputs(config, batch, device)[1]


# ---- the sweeps


def generate_sweep(setup: Setup) -> list[Sweep]:
    name = setup.variant or setup.on("opt-125m", PUBLISHED)
    config = config_of(name)
    if config.language.family != "opt" or config.vision.kind != "eva":
        raise UserError(f"bench: transformers' side writes by OPT of what EVA sees, {name} has other parts")
    models = functools.lru_cache(maxsize=1)(partial(writers, config, setup.device))
    jobs = [
        of_precision.writing_race(
            f"{of_precision.precision}, batch {batch}",
            partial(models, of_precision.dtype),
            partial(pictures_and_prompts, config, batch, setup.device),
            items=batch, unit="texts/s", precision=of_precision.precision, batch=batch, new_tokens=NEW_TOKENS,
        )
        for of_precision in [replace(setup, precision=peak["precision"]) for peak in setup.peaks]
        for batch in setup.sizes((1, 8), (1, 64))
    ]  # fmt: skip
    what = f"GENERATION, beam {BEAMS}, {config.queries} queries, {NEW_TOKENS} new tokens: {name}"
    return [Sweep("blip2-generate", what, jobs)]


def step_sweep(setup: Setup) -> list[Sweep]:
    sizes = {"vit-l-smollm2-135m": 2, "opt-125m": 2, "blip2-mini": 32}  # batches that two cores can bear
    variants = [setup.variant] if setup.variant else setup.on(list(sizes), [PUBLISHED])
    jobs = [
        setup.race(
            f"{variant}, batch {batch}",
            partial(stage2_steps, config, setup, batch),
            partial(language_inputs, config, batch, setup.device),
            items=batch, unit="pictures/s", training=True, at_least=setup.on(0.05, 0.1), variant=variant, batch=batch,
        )
        for variant, config in zip(variants, map(config_of, variants), strict=True)
        for batch in setup.sizes((sizes.get(variant, 2),), (64,))
    ]  # fmt: skip
    return [Sweep("blip2-step", f"STAGE 2, a training step, {setup.precision}", jobs)]


def stage1_sweep(setup: Setup) -> list[Sweep]:
    config = replace(config_of(setup.variant or setup.on("vit-l-smollm2-135m", PUBLISHED)), language=None)
    kinds = {
        "transformers": ("ITC and ITM", Objectives(itg=False)),
        "repeated": ("ITC, ITM and ITG", Objectives()),
    }
    jobs = [
        setup.race(
            f"{what}, batch {batch}",
            partial(stage1_steps, config, setup.device, setup.precision, kind, objectives),
            partial(features_and_texts, config, batch, setup.device),
            items=batch, unit="pictures/s", training=True, objectives=what, batch=batch,
            tokens=longest(batch, config.context),
        )
        for kind, (what, objectives) in kinds.items()
        for batch in setup.sizes((3,), (64,))
    ]  # fmt: skip
    name = setup.variant or setup.on("vit-l", PUBLISHED)
    return [Sweep("blip2-stage1", f"STAGE 1, a training step, cached features, {setup.precision}: {name}", jobs)]


def tokens_sweep(setup: Setup) -> list[Sweep]:
    """The language model's pass as it grows with what stands for a picture: O((m + n)^2) at the worst."""
    languages = [config_of(setup.variant).language] if setup.variant else [LANGUAGES["smollm2-135m"], OPT_125M]

    def models(language: LanguageConfig, batch: int) -> dict[str, Callable[[], Tensor]]:
        torch.manual_seed(0)
        model = small_language_model(replace(language, context=512)).to(setup.device, setup.dtype).eval()
        embeddings = model.embed(torch.ones(batch, TEXT_TOKENS, dtype=torch.long, device=setup.device)).detach()

        def call(visual: int) -> Tensor:
            model.states(torch.cat([embeddings.new_ones(batch, visual, model.width), embeddings], dim=1), None)
            return torch.zeros(())

        return {f"{visual} visual tokens": partial(call, visual) for visual in VISUAL_TOKENS}

    def job(language: LanguageConfig, batch: int) -> Job:
        race = setup.race(
            f"{language.name}, batch {batch}", partial(models, language, batch), tuple, items=batch, unit="pictures/s",
            share=False, at_least=setup.on(0.02, 0.05), language_model=language.name, batch=batch, text=TEXT_TOKENS,
        )  # fmt: skip
        return replace(
            race, run=lambda: [{"visual": v, **row} for v, row in zip(VISUAL_TOKENS, race.run(), strict=True)]
        )

    jobs = [job(language, batch) for language in languages for batch in setup.sizes((1,), (16,))]
    title = f"LANGUAGE MODEL over visual and {TEXT_TOKENS} text tokens, forward, {setup.precision}"
    return [Sweep("blip2-tokens", title, jobs)]


SWEEPS = {"generate": generate_sweep, "step": step_sweep, "stage1": stage1_sweep, "tokens": tokens_sweep}
