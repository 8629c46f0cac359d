"""The stages that BLIP-2's arms stand on, each made once a seed: frozen features, small language models (once for all
seeds), Q-Formers after stage 1, and what bridges them to a language model in stage 2."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.blip2.config import LANGUAGES, Blip2Config, with_language
from papers.blip2.data import LANGUAGE_SEED, ExperimentData, data_of
from papers.blip2.frozen import HALF, LanguageModelBundle, frozen_encoder, load_language_model_bundle
from papers.blip2.model import Blip2, Blip2Qformer, Objectives, init_std
from papers.blip2.module import (
    EVERYTHING,
    BridgeModule,
    FrozenWatch,
    Stage1Module,
    Stage2Module,
    WordsModule,
    unwrapped,
)
from papers.blip2.recipe import OPEN, Blip2Recipe
from papers.blip2.text import PromptTokenizer, prompt_tokenizer_of
from shared.backbones.vision import Encoder
from shared.core.device import device_for
from shared.core.files import write_whole
from shared.core.paper_package import Context
from shared.core.recipe import digest, training_fields
from shared.data.loader import Batches, IndexedTensor
from shared.data.padding import pad_rows
from shared.data.synthetic.captions import KINDS
from shared.experiments.stage_cache import StageCache
from shared.nn.bert import INIT_STD
from shared.nn.causal_lm import SmallLanguageModel
from shared.nn.frozen import Frozen
from shared.nn.packed_linear import pack
from shared.training.callbacks import MetricRecorder
from shared.training.trainer import fit
from shared.weights.load import load_weights, save_weights


@dataclass(frozen=True)
class VisionEncoderSpec:
    """Through which frozen encoder an arm sees: `encoder`, `weak_encoder` or `other_encoder` of the recipe, up to which
    layer (empty: the recipe's), and whether in 16 bit."""

    encoder: str = "encoder"
    layer: str = ""
    half: bool = False

    @property
    def name(self) -> str:
        return "-".join([self.encoder, self.layer or "layer", "16" if self.half else "32"])


PLAIN = VisionEncoderSpec()


@dataclass(frozen=True)
class StagePipeline:
    """The stages of one seed, for whichever arm asks first."""

    context: Context
    data: ExperimentData
    stages: StageCache
    common: StageCache  # what no seed changes

    @classmethod
    def of(cls, context: Context) -> StagePipeline:
        data, recipe = data_of(context), digest(training_fields(context.recipe))
        folder = context.folder.parent / "stages"
        own = StageCache(folder / f"{context.seed}-{recipe}-{data.dataset.digest[:12]}", context.seed)
        said = digest({"texts": data.said})  # of a published set these are a seed's own
        return cls(context, data, own, StageCache(folder / f"common-{recipe}-{said}", LANGUAGE_SEED))

    @property
    def recipe(self) -> Blip2Recipe:
        return self.context.recipe

    @property
    def device(self) -> torch.device:
        """Where every model lies that is given out here, so that what is measured runs there."""
        return device_for(self.recipe)

    # ---- frozen parts

    def encoder(self, encoder_spec: VisionEncoderSpec = PLAIN) -> Encoder:
        recipe = self.recipe
        found = frozen_encoder(
            getattr(recipe, encoder_spec.encoder),
            encoder_spec.layer or recipe.layer,
            recipe.scale,
            recipe.manifest,
            encoder_spec.half,
        )
        return found.to(self.device)

    def config(self, encoder_spec: VisionEncoderSpec = PLAIN, queries: int = 0) -> Blip2Config:
        """Stage 1's, with the widths of the encoder at hand."""
        config, encoder = self.data.config, self.encoder(encoder_spec)
        vision = replace(config.vision, width=encoder.width)
        return replace(with_language(config, None), vision=vision, queries=queries or config.queries)

    def features(
        self, encoder_spec: VisionEncoderSpec, images: Tensor, name: str, dtype: torch.dtype | None = None
    ) -> Tensor:
        """(I, 3, H, W) -> (I, S, C) on the CPU, computed once a seed. dtype: what they are kept in, as the encoder
        gives them where None."""
        from shared.backbones.feature_cache import features_of

        encoder = self.encoder(encoder_spec)
        return features_of(
            encoder, images, key=f"{self.data.dataset.digest[:16]}-{name}", folder=self.stages.folder / "features",
            dtype=dtype or (HALF if encoder_spec.half else torch.float32),
        )  # fmt: skip

    def train_features(self, encoder_spec: VisionEncoderSpec = PLAIN) -> Tensor:
        return self.features(encoder_spec, self.data.dataset.train.images, "train")

    def held_features(self, encoder_spec: VisionEncoderSpec = PLAIN) -> Tensor:
        return self.features(encoder_spec, self.data.eval_set.images, "held")

    def asked_features(self, encoder_spec: VisionEncoderSpec = PLAIN) -> Tensor:
        """Of the pictures that are asked about."""
        return self.features(encoder_spec, self.data.eval_set.asked_images, "asked")

    def bundle(self, which: str = "small", half: bool = False) -> LanguageModelBundle:
        """`small` and `larger`: trained here; `headline`: as the recipe names it."""
        recipe = self.recipe
        name = {"headline": recipe.headline_model or recipe.language_model}.get(which, recipe.language_model)
        if name != "small":
            bundle = load_language_model_bundle(name, recipe.manifest)
            bundle.model.to(self.device)
            pack(unwrapped(bundle.model), through=True)  # on a CPU alone
            return bundle
        return self.small_speaker(larger=which == "larger", half=half)

    def small_speaker(self, larger: bool = False, half: bool = False) -> LanguageModelBundle:
        recipe, tokenizer, language = self.recipe, self.data.tokenizer, LANGUAGES["small"]
        kind = "larger" if larger else "small"
        width, layers = (getattr(recipe, f"{kind}_{name}") for name in ("width", "layers"))
        language = replace(
            language, width=width, layers=layers, mlp_width=4 * width, heads=max(language.heads, width // 64),
            vocabulary=tokenizer.vocab_size, context=recipe.lm_context,
        )  # fmt: skip

        def make(folder: Path) -> None:
            told = train_language_model(model := new_language_model(language), self.data, words, recipe)
            leave(folder, model, told)

        words = prompt_tokenizer_of(tokenizer, language.context)
        folder = self.common.get_or_build("language-larger" if larger else "language", make)
        model = new_language_model(language)
        load_weights(model, folder / "weights.safetensors")
        return LanguageModelBundle(Frozen(model, HALF if half else None, through=True).to(self.device), words, language)

    # ---- stage 1

    def new_qformer(self, encoder_spec: VisionEncoderSpec = PLAIN, queries: int = 0) -> Blip2Qformer:
        """As every arm of a seed begins: the same numbers, whatever was drawn before."""
        torch.manual_seed(self.context.seed)
        return Blip2Qformer(self.config(encoder_spec, queries))

    def stage1(
        self, encoder_spec: VisionEncoderSpec = PLAIN, queries: int = 0, objectives: Objectives = EVERYTHING
    ) -> tuple[Blip2Qformer, dict]:
        """A Q-Former that learned what text needs of a picture, and how its training went. From features in 32 bit
        always, so that arms which differ in that alone begin stage 2 alike."""
        encoder_spec = replace(encoder_spec, half=False)
        parts = "".join(name for name, on in objectives._asdict().items() if on)

        def make(folder: Path) -> None:
            model = self.new_qformer(encoder_spec, queries)
            told = self.train_stage1(model, self.train_features(encoder_spec), folder, objectives)
            leave(folder, model, told)

        name = f"stage1-{encoder_spec.name}-{queries or self.data.config.queries}-{parts}"
        folder = self.stages.get_or_build(name, make)
        model = Blip2Qformer(self.config(encoder_spec, queries))
        load_weights(model, folder / "weights.safetensors")
        return model.to(self.device).eval(), json.loads((folder / "training.json").read_text())

    def train_stage1(self, model: Blip2Qformer, features: Tensor, folder: Path, objectives: Objectives) -> dict:
        rows, tokens = self.data.pairs()
        recipe = warmed(self.recipe, self.recipe.steps)
        module = Stage1Module(model, recipe, objectives=objectives).train()
        return self.fitted(module, (self.rows(features, rows), tokens, rows), recipe, folder, "stage1", [])

    # ---- stage 2

    def stage2(
        self,
        name: str,
        encoder_spec: VisionEncoderSpec = PLAIN,
        queries: int = 0,
        bundle: LanguageModelBundle | None = None,
        fresh: bool = False,
        headline: bool = False,
    ) -> tuple[Blip2, LanguageModelBundle, dict]:
        """The bridge to a language model (the small one where None), from stage 1 or, where `fresh`, without it."""
        bundle = bundle or self.bundle(half=encoder_spec.half)
        recipe = second(self.recipe, headline)

        def new() -> Blip2:
            return self.headline_start(bundle) if headline else self.new_bridge(bundle, encoder_spec, queries, fresh)

        def make(folder: Path) -> None:
            model = new()
            told = self.train_stage2(model, bundle, self.train_features(encoder_spec), recipe, folder, headline)
            leave(folder, model, told)

        folder = self.stages.get_or_build(f"stage2-{name}", make)
        model = new()
        load_weights(model, folder / "weights.safetensors")
        return model.to(self.device).eval(), bundle, json.loads((folder / "training.json").read_text())

    def headline_start(self, bundle: LanguageModelBundle) -> Blip2:
        """What the headline's stage 2 begins from: the plain arm's bridge, with a new projector. One that speaks to one
        language model learns another's words from far fewer samples (Zhang et al. 2023, VPGTrans, arXiv:2305.01278).

        Where the recipe has `headline_word_steps`, the visual words are fitted to words first: the queries say the
        answers to the open questions about a picture in turn, as the language model's table has them. The projector
        begins as the linear map that does so best; then the whole bridge trains for these steps. No language model
        runs, so a step takes milliseconds. It stays as it was where no questions are at hand.
        """
        if self.recipe.language_model == "small" and bundle.config.family != "small":
            model = self.bridge_from(without_projector(self.stage2("base")[0]), bundle)
        else:
            model = self.new_bridge(bundle)
        steps = self.recipe.headline_word_steps
        if not steps or not self.data.generated:
            return model

        def make(folder: Path) -> None:
            features, recipe = self.train_features(), warmed(second(self.recipe), steps)
            targets = word_targets(bundle, self.data.shown(), model.config.queries)
            rows = torch.arange(len(features))
            fit_projector(model.to(self.device), features, targets)
            module = WordsModule(model, recipe, float(targets.var())).train()
            told = self.fitted(
                module, (self.rows(features, rows), self.rows(targets, rows)), recipe, folder, "words", [bundle.model]
            )
            leave(folder, model, told)

        load_weights(model, self.stages.get_or_build("headline-words", make) / "weights.safetensors")
        return model

    def new_bridge(
        self,
        bundle: LanguageModelBundle,
        encoder_spec: VisionEncoderSpec = PLAIN,
        queries: int = 0,
        fresh: bool = False,
    ) -> Blip2:
        start = self.new_qformer(encoder_spec, queries) if fresh else self.stage1(encoder_spec, queries)[0]
        return self.bridge_from(start, bundle, encoder_spec, queries)

    def bridge_from(
        self,
        start: Blip2Qformer | Mapping[str, Tensor],
        bundle: LanguageModelBundle,
        encoder_spec: VisionEncoderSpec = PLAIN,
        queries: int = 0,
    ) -> Blip2:
        torch.manual_seed(self.context.seed)
        config = with_language(self.config(encoder_spec, queries), bundle.config)
        return Blip2.started_from(start, config, bundle.model)

    def train_stage2(
        self,
        model: Blip2,
        bundle: LanguageModelBundle,
        features: Tensor,
        recipe: Blip2Recipe,
        folder: Path,
        headline: bool,
    ) -> dict:
        rows, texts = self.learned(bundle, headline, model.config.queries)
        module = Stage2Module(model, recipe).train()
        return self.fitted(module, (self.rows(features, rows), *texts), recipe, folder, "stage2", [bundle.model])

    def train_all(
        self, model: Blip2, bundle: LanguageModelBundle, encoder: Encoder, recipe: Blip2Recipe, folder: Path
    ) -> dict:
        """Encoder and language model too, end to end."""
        rows, texts = self.learned(bundle)
        parts = [unwrapped(encoder), unwrapped(bundle.model)]
        for part in parts:
            part.requires_grad_(True).train()
        module = Stage2Module(model, recipe, encoder=parts[0], beside=parts).train()
        images = self.rows(self.data.dataset.train.images, rows)
        told = self.fitted(module, (images, *texts), recipe, folder, "all", [])
        told["trained_parameters"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
        for part in parts:
            part.requires_grad_(False).eval()
        return told

    def learned(
        self, bundle: LanguageModelBundle, headline: bool = False, queries: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows of the pictures, and stage 2's texts as Stage2Module takes them. queries: as configured where 0."""
        recipe = self.recipe
        share, kinds = (recipe.headline_asked, OPEN) if headline else (recipe.asked, KINDS)
        told = self.data.learned(share, self.context.seed, kinds)
        texts = bundle.words.learned(
            [(prompt, text) for _, prompt, text in told],
            recipe.text_tokens,
            queries or self.data.config.queries,
            self.context.seed,
        )
        return torch.tensor([row for row, _, _ in told]), tuple(texts)

    def rows(self, seen: Tensor, rows: Tensor) -> IndexedTensor:
        """Features or pictures of the samples, held where they are trained on; the loader's processes want the CPU."""
        return IndexedTensor(seen if self.recipe.workers else seen.to(self.device), rows)

    def fitted(
        self,
        module: BridgeModule,
        tensors: tuple[Tensor | IndexedTensor, ...],
        recipe: Blip2Recipe,
        folder: Path,
        name: str,
        frozen: Sequence[nn.Module],
    ) -> dict:
        """-> `curves` by samples seen, `waited`, and what frozen parts cost."""
        batches = Batches(tensors, recipe.batch, recipe.steps, self.context.seed)
        curves, watch = MetricRecorder(recipe.batch, self.context.progress), FrozenWatch(frozen)
        identity = {"arm": f"{self.context.arm} {name}", "seed": self.context.seed, "data": self.data.dataset.digest}
        waited = fit(module, batches, recipe, folder, [curves, watch], identity)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        told = {"curves": curves.values, "waited": round(waited, 5), "trained_parameters": trained}
        return told | (watch.measured if frozen else {})


@torch.no_grad()
def word_targets(bundle: LanguageModelBundle, shown: Sequence[Sequence[str]], queries: int) -> Tensor:
    """Words of each picture -> what its queries are to say, the words in turn: embeddings (I, Q, W) in fp32 on the CPU,
    of a word of several tokens their mean."""
    language, encode = bundle.model, bundle.words.encode
    device = next(unwrapped(language).parameters()).device
    embedding = {
        word: language.embed(torch.tensor(encode(f" {word}"), device=device)).float().mean(0).cpu()
        for word in dict.fromkeys(word for words in shown for word in words)
    }
    return torch.stack(
        [torch.stack([embedding[words[query % len(words)]] for query in range(queries)]) for words in shown]
    )


@torch.no_grad()
def nearest_words(model: Blip2, bundle: LanguageModelBundle, features: Tensor, names: Sequence[str]) -> list[list[str]]:
    """Features of pictures (I, S, C) -> which of these words each query (Q) of each says, by Euclidean distance."""
    table = word_targets(bundle, [[name] for name in names], 1)[:, 0]  # (A, W)
    said = model.prefix(features.to(model.projector.weight.device)).float().cpu()  # (I, Q, W)
    return [[names[place] for place in row] for row in torch.cdist(said, table).argmin(-1).tolist()]


@torch.no_grad()
def fit_projector(model: Blip2, features: Tensor, targets: Tensor, ridge: float = 1e-5) -> None:
    """Set the projector to the least squares from the queries' states (I, Q, D), of features (I, S, C), to targets
    (I, Q, W). ridge: times the mean square of a channel, added so that a constant channel leaves it solvable."""
    model.eval()
    device, width = model.projector.weight.device, model.projector.in_features
    inner = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    across = torch.zeros(width + 1, targets.shape[-1], dtype=torch.float64)
    for some, wanted in zip(features.split(128), targets.split(128), strict=True):
        states = model.qformer.encode_queries(model.vision_norm(some.to(device))).double().cpu().flatten(0, 1)
        x = F.pad(states, (0, 1), value=1.0)  # (128 Q, D + 1)
        inner += x.T @ x
        across += x.T @ wanted.double().flatten(0, 1)
    inner += ridge * inner.diagonal()[:-1].mean() * torch.eye(width + 1, dtype=inner.dtype)
    found = torch.linalg.solve(inner, across)  # (D + 1, W)
    model.projector.weight.copy_(found[:-1].T)
    model.projector.bias.copy_(found[-1])


def leave(folder: Path, model: nn.Module, told: Mapping[str, Any]) -> None:
    """What a stage is: a model's weights, and how its training went."""
    save_weights(model, folder / "weights.safetensors")
    write_whole(folder / "training.json", json.dumps(told))


def without_projector(model: Blip2) -> dict[str, Tensor]:
    """The weights of a bridge that do not depend on whom it speaks to."""
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("projector.")}


def warmed(recipe: Blip2Recipe, steps: int) -> Blip2Recipe:
    """The warm-up no longer than a fifth of the steps."""
    return replace(recipe, steps=steps, warmup_steps=min(recipe.warmup_steps, max(1, steps // 5)))


def second(recipe: Blip2Recipe, headline: bool = False) -> Blip2Recipe:
    """Stage 2's steps, batch and rate in the place of stage 1's."""
    kind = "headline" if headline else "stage2"
    steps, batch, rate = (getattr(recipe, f"{kind}_{name}") for name in ("steps", "batch", "rate"))
    return warmed(
        replace(recipe, batch=batch, learning_rate=rate, min_learning_rate=recipe.stage2_min_rate), steps
    )  # fmt: skip


# ---- the small language model


def new_language_model(language: Any) -> SmallLanguageModel:
    """Begun with larger numbers than its published cousins: so narrow a model learns to look back sooner."""
    torch.manual_seed(LANGUAGE_SEED)
    model = SmallLanguageModel(language.vocabulary, language.context, language.width, language.layers, language.heads)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(init_std(language.width) / INIT_STD)
    return model


def train_language_model(
    model: SmallLanguageModel, data: ExperimentData, words: PromptTokenizer, recipe: Blip2Recipe
) -> dict:
    """On the texts of scenes alone. -> its loss, mean over the last tenth of the steps."""
    device = device_for(recipe)
    tokens, attention_mask = pad_rows([words.begun(text)[: words.context] for text in data.said], words.pad)
    generator = torch.Generator().manual_seed(LANGUAGE_SEED)
    model.to(device).train()
    steps, rate = recipe.lm_steps, recipe.lm_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(tokens), (recipe.lm_batch,), generator=generator)
        longest = int(attention_mask[rows].sum(1).max())
        some, there = tokens[rows, :longest].to(device), attention_mask[rows, :longest].to(device)
        learned = there[:, 1:]
        states = model.states(model.embed(some[:, :-1]), there[:, :-1])[learned]
        loss = F.cross_entropy(model.logits(states), some[:, 1:][learned])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.cpu().eval()
    last = losses[-max(1, steps // 10) :]
    return {"loss": sum(last) / len(last)}
