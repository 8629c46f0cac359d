"""BLIP-2 against transformers and against its own way without what makes it quick: equal weights and equal data, in
turns, in one run. `python -m papers bench blip2`.

Weights are random, since no published ones are needed to measure time; dropout is off. What transformers lacks of stage
1 (objectives, negatives) its Q-Former borrows from ours. Axes: B pictures, S picture tokens, C their width, R texts,
T text tokens, Q queries, D width, W width of the language model.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from papers.blip2.config import CLIP_VIT_L, LANGUAGES, VARIANTS, Blip2Config, LanguageConfig, VisionConfig
from papers.blip2.evidence.cost import stage1_flops
from papers.blip2.formats import VISION, published_of, transformers_qformer, with_language
from papers.blip2.losses import stage1_losses, stage2_loss
from papers.blip2.model import Blip2, Blip2Qformer, Objectives, vision_encoder
from papers.blip2.module import trim_padding
from shared.backbones.hf_lm import CausalAdapter
from shared.backbones.vision import Encoder, vit_encoder
from shared.core.errors import UserError
from shared.losses.image_text import IGNORED, next_token_targets
from shared.nn.causal_lm import SmallLanguageModel
from shared.nn.generation import GenerationSettings, generate
from shared.nn.packed_linear import pack
from shared.tools.bench import (
    Plan,
    longest,
    normaliser,
    one_of,
    pictures_and_texts,
    run_plan,
    stepper,
    without_gradients,
)
from shared.tools.bench_timing import DTYPES, NATURAL, Job, Sweep
from shared.tools.footprint import shapes_only
from shared.weights.weight_map import to_published

SWEEPS = ("generate", "step", "stage1", "tokens")
BEAMS, NEW_TOKENS = 5, 20
A_PHOTO_OF = (2, 102, 1345, 9)  # OPT's start token and some three words; their ids cost the same
VISUAL_TOKENS = (32, 1, 8, 64, 128, 257)  # the paper's queries first, last all tokens of its encoders
TEXT_TOKENS = 16

PUBLISHED = "blip2-vit-g-opt-2.7b"  # what a GPU is given
OPT_125M = LanguageConfig("opt-125m", "opt", 768, 50_272, layers=12, heads=12, mlp_width=3072, context=2048)
# To OPT-125m what ViT-g is to OPT-2.7B: 37 % of its parameters, and as many picture tokens.
EVA_SMALL = VisionConfig("eva", 224, 14, width=512, layers=14, heads=8, mlp_ratio=4.3637)


def opt_125m() -> Blip2Config:
    """The paper's Q-Former between an encoder and a language model that two cores can bear."""
    return Blip2Config(vision=EVA_SMALL, language=OPT_125M)


def vit_l_smollm2() -> Blip2Config:
    """The paper's smaller encoder and the language model of the offline chain."""
    return Blip2Config(vision=CLIP_VIT_L, language=LANGUAGES["smollm2-135m"])


def opt_tiny() -> Blip2Config:
    """For tests: everything small, and no two sizes alike."""
    vision = VisionConfig("eva", 28, 7, width=40, layers=2, heads=5, mlp_ratio=3.5)
    language = LanguageConfig("opt-tiny", "opt", 36, 117, layers=2, heads=3, mlp_width=68, context=320)
    return Blip2Config(
        vision=vision, language=language, queries=6, width=48, layers=3, heads=4, mlp_width=72, embed_width=28,
        vocabulary=101, positions=33, context=19, start_token=98, end_token=99, decode_token=100, tokenizer="small-bpe",
    )  # fmt: skip


CONFIGS: dict[str, Callable[[], Blip2Config]] = {
    "opt-tiny": opt_tiny,
    "opt-125m": opt_125m,
    "vit-l-smollm2-135m": vit_l_smollm2,
    **{name: make for name, make in VARIANTS.items() if make().language is not None and make().language.family != "t5"},
}


def run(root: Path, overrides: list[str]) -> None:
    """Print a table a sweep; write it, with its figure, into results/bench/."""
    run_plan(root, overrides, Blip2Plan, SWEEPS, lambda variant: one_of(variant, CONFIGS))


# ---- the contestants


def language_model(config: LanguageConfig) -> nn.Module:
    """One of these sizes in this repository's own layers."""
    return SmallLanguageModel(
        config.vocabulary, config.context, config.width, config.layers, config.heads, kv_heads=config.kv_heads,
        mlp_width=config.mlp_width,
    )  # fmt: skip


def frozen_encoder(config: VisionConfig) -> Encoder:
    return vit_encoder(vision_encoder(config), "last")


def their_config(config: Blip2Config) -> Any:
    """transformers' configuration of these sizes."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    vision, language = config.vision, config.language
    sizes = {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "cross_attention_frequency": config.cross_every,
        "encoder_hidden_size": vision.width,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.positions,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
    }
    seen = {
        "hidden_size": vision.width,
        "intermediate_size": int(vision.width * vision.mlp_ratio),
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch,
        "layer_norm_eps": vision.eps,
    }
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
    return transformers.Blip2Config(
        vision_config=seen, qformer_config=sizes, text_config=text, num_query_tokens=config.queries,
        image_text_hidden_size=config.embed_width, image_token_index=language.vocabulary - 1,
    )  # fmt: skip


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
    normalised = normaliser(theirs.vision_model, config.vision.mean, config.vision.std)
    settings = GenerationSettings((2,), NEW_TOKENS, NEW_TOKENS, beams=BEAMS)
    image_token = theirs.config.image_token_index

    def our_words(pixels: Tensor, prompts: Tensor) -> Tensor:
        written = generate(ours.decoding(encoder(pixels)), prompts, settings)
        return torch.tensor(written.tokens)

    def their_words(pixels: Tensor, prompts: Tensor) -> Tensor:
        asked = torch.cat([prompts.new_full((len(prompts), config.queries), image_token), prompts], dim=1)
        tokens = theirs.generate(
            pixel_values=normalised(pixels),
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            num_beams=BEAMS,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )
        return tokens[:, -NEW_TOKENS:].cpu()

    return {"ours": our_words, "transformers": their_words}


def stage2_steps(
    config: Blip2Config, device: str, precision: str, pixels: Tensor
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Stage 2's step on the features of `pixels`, computed before, and with the encoder run in it: functions of tokens
    (B, T) and attention_mask (B, T) that give the loss before it."""
    torch.manual_seed(0)
    with torch.device(device):
        encoder, lm = frozen_encoder(config.vision), language_model(config.language)
    for parameter in lm.parameters():  # a new one says anything of anything: its loss would compare nothing
        if parameter.ndim == 2:
            parameter.data.mul_(5)
    if precision == "bf16":
        encoder, lm = encoder.to(torch.bfloat16), lm.to(torch.bfloat16)
    with torch.device(device):
        first, second = Blip2(config, lm), Blip2(config, lm)
    second.load_state_dict(first.state_dict())
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):  # as in a step
        cached = encoder(pixels)

    def step(model: Blip2, features: Callable[[], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(tokens: Tensor, attention_mask: Tensor) -> Tensor:
            return stage2_loss(model(features(), tokens, attention_mask))

        return stepper(model, loss, model.parameters(), precision)

    return {
        "cached features": step(first, lambda: cached),
        "encoder in each step": step(second, lambda: encoder(pixels)),
    }


def stage1_steps(
    config: Blip2Config, device: str, precision: str, kind: str, objectives: Objectives
) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """Stage 1's step: functions of features (B, S, C) and texts (B, T) that give the losses before it. Both draw their
    hard negatives by equal seeds."""

    def step(model: Blip2Qformer) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        seeds = itertools.count()

        def losses(features: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            torch.manual_seed(next(seeds))
            output = model(features, tokens, None, objectives)
            found = stage1_losses(output, config.label_smoothing)
            return tuple(loss for loss in (found.itc, found.itm, found.itg) if loss is not None)

        trained = [p for p in model.parameters() if p.requires_grad]
        return stepper(model, losses, trained, precision)

    return {name: step(model) for name, model in stage1_models(config, kind, device).items()}


# ---- what they are given


def given(config: Blip2Config, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Pictures of noise (B, 3, H, W) uint8, and texts (B, T) of natural lengths, padded to the longest."""
    pixels, tokens = pictures_and_texts(
        batch,
        config.vision.image_size,
        config.context,
        start=config.start_token,
        end=config.end_token,
        words=(1, min(config.start_token, config.vocabulary)),
        lengths=NATURAL,
    )
    return pixels.to(device), trim_padding(tokens, config.pad_token).to(device)


def spoken(config: Blip2Config, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """A language model's texts (B, T) of natural lengths, and where they are (B, T)."""
    generator = torch.Generator().manual_seed(0)
    width = longest(batch, config.context)
    tokens = torch.randint(3, config.language.vocabulary - 1, (batch, width), generator=generator)
    ends = torch.tensor([min(NATURAL[row % len(NATURAL)], width) for row in range(batch)])
    attention_mask = torch.arange(width) < ends[:, None]
    return tokens.to(device), attention_mask.to(device)


def prompts_of(config: Blip2Config, batch: int, device: str) -> Tensor:
    """(B, 4)."""
    return torch.tensor([[word % config.language.vocabulary for word in A_PHOTO_OF]] * batch, device=device)


@functools.cache
def work(config: Blip2Config, tokens: int) -> dict[str, int]:
    """FLOPs of one picture's forward pass: `encoder`, `bridge` (Q-Former and projector) and `language` (over queries
    and so many tokens, scored at each)."""
    with shapes_only():
        vit = vision_encoder(config.vision)
        pixels = torch.empty(1, 3, config.vision.image_size, config.vision.image_size, dtype=torch.uint8)
        found = {}

        def counted(name: str, call: Callable[[], Any]) -> Any:
            with FlopCounterMode(display=False) as counter:
                out = call()
            found[name] = counter.get_total_flops()
            return out

        features = counted("encoder", lambda: vit.tokens(pixels))
        model = Blip2(config, language_model(config.language))
        prefix = counted("bridge", lambda: model.prefix(features))
        lm = model.language_model
        x = torch.cat([prefix, torch.empty(1, tokens, lm.width)], dim=1)
        counted("language", lambda: lm.logits(lm.states(x, None)[:, config.queries :]))
    return found


# ---- the sweeps


class Blip2Plan(Plan):
    """BLIP-2's sweeps."""

    def _generate(self) -> Sweep:
        config = self._config(self.on("opt-125m", PUBLISHED))
        if config.language.family != "opt" or config.vision.kind != "eva":
            raise UserError(f"bench: transformers' side writes by OPT of what EVA sees, {self.variant} has other parts")
        models = functools.lru_cache(maxsize=1)(lambda name: writers(config, self.device, DTYPES[name]))

        def job(precision: str, batch: int) -> Job:
            def run() -> list[dict]:
                pixels, _ = given(config, batch, self.device)
                prompts = prompts_of(config, batch, self.device)
                written: dict[str, Tensor] = {}

                def call(name: str) -> Tensor:
                    written[name] = without_gradients(models(precision)[name], pixels, prompts)()
                    # rounding to bf16 makes ties among words, which two implementations break differently
                    return written[name] if precision == "fp32" else torch.tensor(written[name].shape)

                calls = {name: functools.partial(call, name) for name in models(precision)}
                rows = self.race(calls, items=batch, unit="texts/s", at_least=self.on(0.2, 0.1))
                same = float((written["ours"] == written["transformers"]).double().mean())
                facts = {"precision": precision, "batch": batch, "new_tokens": NEW_TOKENS, "equal_tokens": same}
                return [{**facts, **row} for row in rows]

            each = work(config, len(A_PHOTO_OF))
            read = batch * (2 * each["encoder"] + 2 * each["bridge"] + (1 + BEAMS) * each["language"])
            reading = NEW_TOKENS * self.on(0.06, 0.02)  # a token reads all weights from memory
            return Job(f"{precision}, batch {batch}", 5 + self.expected(read) + 2.5 * (self.repeats + 1) * reading, run)

        name = self._name(self.on("opt-125m", PUBLISHED))
        what = f"GENERATION, beam {BEAMS}, {config.queries} queries, {NEW_TOKENS} new tokens: {name}"
        precisions = [peak["precision"] for peak in self.peaks]
        jobs = [job(name, batch) for name in precisions for batch in self._batches((1, 8), (1, 64))]
        return Sweep("blip2-generate", what, jobs)

    def _step(self) -> Sweep:
        sizes = {"vit-l-smollm2-135m": 2, "opt-125m": 2, "blip2-mini": 32}  # batches that two cores can bear
        names = [self.variant] if self.variant else self.on(list(sizes), [PUBLISHED])

        def job(name: str, batch: int) -> Job:
            config = self._config(name)
            each = work(config, longest(batch, config.context))
            step = batch * (3 * each["bridge"] + 2 * each["language"])  # frozen: no gradients of weights

            def run() -> list[dict]:
                pixels, _ = given(config, batch, self.device)
                data = spoken(config, batch, self.device)
                steps = stage2_steps(config, self.device, self.precision, pixels)
                # called `name`, it would take the outer one away from below: a fault of Python 3.12 and 3.13
                calls = {side: functools.partial(step, *data) for side, step in steps.items()}
                at_least = self.on(0.05, 0.1)
                rows = self.race(calls, items=batch, unit="pictures/s", flops=step, training=True, at_least=at_least)
                return [{"variant": name, "batch": batch, **row} for row in rows]

            total = 2 * step + batch * each["encoder"]
            return Job(f"{name}, batch {batch}", 8 + self.expected(total), run)

        jobs = [job(name, batch) for name in names for batch in self._batches((sizes.get(name, 2),), (64,))]
        return Sweep("blip2-step", f"STAGE 2, a training step, {self.precision}", jobs)

    def _stage1(self) -> Sweep:
        name = self.on("vit-l-smollm2-135m", PUBLISHED)
        config = replace(self._config(name), language=None)
        kinds = {
            "transformers": ("ITC and ITM", Objectives(itg=False)),
            "repeated": ("ITC, ITM and ITG", Objectives()),
        }

        def job(kind: str, batch: int) -> Job:
            tokens = longest(batch, config.context)
            total = 3 * batch * stage1_flops(config, tokens)
            what, objectives = kinds[kind]

            def run() -> list[dict]:
                _, texts = given(config, batch, self.device)
                generator = torch.Generator().manual_seed(0)
                shape = (batch, config.vision.tokens, config.vision.width)
                features = torch.randn(shape, generator=generator).to(self.device)
                steps = stage1_steps(config, self.device, self.precision, kind, objectives)
                calls = {name: functools.partial(step, features, texts) for name, step in steps.items()}
                rows = self.race(calls, items=batch, unit="pictures/s", training=True)
                return [{"objectives": what, "batch": batch, "tokens": tokens, **row} for row in rows]

            return Job(f"{what}, batch {batch}", 15 + self.expected(2.5 * total), run)

        jobs = [job(kind, batch) for kind in kinds for batch in self._batches((3,), (64,))]
        title = f"STAGE 1, a training step, cached features, {self.precision}: {self._name(self.on('vit-l', name))}"
        return Sweep("blip2-stage1", title, jobs)

    def _tokens(self) -> Sweep:
        """The language model's pass as it grows with what stands for a picture: O((m + n)^2) at the worst."""
        languages = [self._config(self.variant).language] if self.variant else [LANGUAGES["smollm2-135m"], OPT_125M]

        def job(language: LanguageConfig, batch: int) -> Job:
            def run() -> list[dict]:
                torch.manual_seed(0)
                model = language_model(replace(language, context=512)).to(self.device, DTYPES[self.precision]).eval()
                words = model.embed(torch.ones(batch, TEXT_TOKENS, dtype=torch.long, device=self.device)).detach()

                def call(visual: int) -> Tensor:
                    model.states(torch.cat([words.new_ones(batch, visual, model.width), words], dim=1), None)
                    return torch.zeros(())

                calls = {
                    f"{visual} visual tokens": without_gradients(functools.partial(call, visual))
                    for visual in VISUAL_TOKENS
                }
                rows = self.race(calls, items=batch, unit="pictures/s", at_least=self.on(0.02, 0.05))
                facts = {"language_model": language.name, "batch": batch, "text": TEXT_TOKENS}
                return [{**facts, "visual": v, **row} for v, row in zip(VISUAL_TOKENS, rows, strict=True)]

            slots = sum(VISUAL_TOKENS) + len(VISUAL_TOKENS) * TEXT_TOKENS
            size = sum(p.numel() for p in _on_meta(language).parameters())
            return Job(f"{language.name}, batch {batch}", 3 + self.expected(2 * batch * slots * size), run)

        jobs = [job(language, batch) for language in languages for batch in self._batches((1,), (16,))]
        title = f"LANGUAGE MODEL over visual and {TEXT_TOKENS} text tokens, forward, {self.precision}"
        return Sweep("blip2-tokens", title, jobs)

    def _name(self, name: str) -> str:
        return self.variant or name

    def _config(self, name: str) -> Blip2Config:
        """The variant, without dropout."""
        return replace(CONFIGS[self._name(name)](), dropout=0.0)

    def _batches(self, cpu: tuple[int, ...], cuda: tuple[int, ...]) -> tuple[int, ...]:
        return self.batches or self.on(cpu, cuda)


def _on_meta(language: LanguageConfig) -> nn.Module:
    with torch.device("meta"):
        return language_model(language)
