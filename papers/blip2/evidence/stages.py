"""The two stages that BLIP-2's arms stand on, each trained once a seed: Q-Formers after stage 1, bridges from them to a
language model after stage 2; between them frozen features, and small language models that are trained here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.blip2.config import LANGUAGES, Blip2Config, LanguageConfig
from papers.blip2.data import LANGUAGE_SEED, ExperimentData, data_of
from papers.blip2.frozen import HALF, LanguageModelBundle, frozen_encoder, frozen_language_model, small_language_model
from papers.blip2.model import Blip2, Blip2Qformer, Objectives
from papers.blip2.module import EVERYTHING, BridgeModule, FrozenWatch, Stage1Module, Stage2Module, unwrapped
from papers.blip2.recipe import Blip2Recipe
from papers.blip2.text import prompt_tokenizer_of
from shared.backbones.vision import Encoder
from shared.core.device import device_for
from shared.core.paper_package import Context
from shared.core.recipe import digest, training_fields
from shared.data.loader import Batches, IndexedTensor
from shared.data.padding import pad_rows
from shared.data.synthetic.captions import KINDS
from shared.experiments.effects import of_stage, stages_of, train_arm
from shared.experiments.stage_cache import StageCache
from shared.nn.bert import INIT_STD, init_std
from shared.nn.causal_lm import SmallLanguageModel
from shared.nn.frozen import Frozen
from shared.nn.packed_linear import pack
from shared.training.simple import fit_simple


@dataclass(frozen=True)
class VisionEncoderSpec:
    """Through which frozen encoder an arm sees: `encoder`, `weak_encoder` or `other_encoder` of the recipe, up to which
    layer (empty: the recipe's), and whether in 16 bit, as the small language model then is too."""

    encoder: str = "encoder"
    layer: str = ""
    half: bool = False

    @property
    def name(self) -> str:
        return "-".join([self.encoder, self.layer or "layer", "16" if self.half else "32"])


@dataclass(frozen=True)
class StagePipeline:
    """The stages of one seed, for whichever arm asks first, behind one frozen encoder and with so many queries. Every
    model that is given out lies on `device`, in eval mode."""

    context: Context
    data: ExperimentData
    encoder_spec: VisionEncoderSpec
    queries: int
    stages: StageCache
    common: StageCache  # what no seed changes

    @classmethod
    def of(
        cls, context: Context, encoder_spec: VisionEncoderSpec = VisionEncoderSpec(), queries: int = 0
    ) -> StagePipeline:
        """queries: as configured where 0."""
        data = data_of(context)
        stages = stages_of(context, data.dataset.digest)
        texts = digest({"texts": data.documents})  # of a published set these are a seed's own
        common = stages.folder.with_name(f"common-{digest(training_fields(context.recipe))}-{texts}")
        queries = queries or data.config.queries
        return cls(context, data, encoder_spec, queries, stages, StageCache(common, LANGUAGE_SEED))

    @property
    def recipe(self) -> Blip2Recipe:
        return self.context.recipe

    @property
    def device(self) -> torch.device:
        return device_for(self.recipe)

    # ---- stage 1: vision-language representation learning

    def new_qformer(self) -> Blip2Qformer:
        """As every arm of a seed begins: the same numbers, whatever was drawn before."""
        torch.manual_seed(self.context.seed)
        return Blip2Qformer(self.config())

    def stage1(self, objectives: Objectives = EVERYTHING) -> tuple[Blip2Qformer, dict]:
        """A Q-Former that learned what text needs of a picture, and the stats of its training. From features in 32 bit
        always, so that arms which differ in that alone begin stage 2 alike."""
        work = replace(self, encoder_spec=replace(self.encoder_spec, half=False))

        def train(folder: Path) -> tuple[Blip2Qformer, dict]:
            model, features = work.new_qformer(), work.features("train")
            rows, tokens = self.data.stage1_pairs()
            module = Stage1Module(model, of_stage(self.recipe, self.recipe.steps), objectives=objectives)
            return model, self.fit(module, (self.indexed(features, rows), tokens, rows), folder, "stage1")

        losses = "".join(name for name, on in objectives._asdict().items() if on)
        name = f"stage1-{work.encoder_spec.name}-{self.queries}-{losses}"
        model, stats = self.stages.model(name, lambda: Blip2Qformer(work.config()), train)
        return model.to(self.device), stats

    # ---- stage 2: vision-to-language generative learning

    def new_bridge(self, bundle: LanguageModelBundle, fresh: bool = False) -> Blip2:
        """What stage 2 begins with: stage 1's Q-Former or, where `fresh`, an untrained one, and a new projector."""
        return self.bridge_from(self.new_qformer() if fresh else self.stage1()[0], bundle)

    def bridge_from(self, qformer: Blip2Qformer | Mapping[str, Tensor], bundle: LanguageModelBundle) -> Blip2:
        torch.manual_seed(self.context.seed)
        return Blip2.started_from(qformer, replace(self.config(), language=bundle.config), bundle.model)

    def stage2(self, name: str, bundle: LanguageModelBundle, fresh: bool = False) -> tuple[Blip2, dict]:
        """A bridge that speaks to the bundle's language model, and the stats of its training."""
        recipe = self.recipe
        return self.stage2_from(
            name, lambda: self.new_bridge(bundle, fresh), bundle, stage2_recipe(recipe), recipe.asked, KINDS
        )  # fmt: skip

    def stage2_from(
        self,
        name: str,
        begin: Callable[[], Blip2],
        bundle: LanguageModelBundle,
        recipe: Blip2Recipe,
        share: float,
        kinds: Sequence[str],
    ) -> tuple[Blip2, dict]:
        """The same from a bridge of any beginning, by this recipe. share: of questions among its texts, of these
        kinds."""

        def train(folder: Path) -> tuple[Blip2, dict]:
            model, features = begin(), self.features("train")
            rows, texts = self.stage2_texts(bundle, share, kinds)
            tensors = (self.indexed(features, rows), *texts)
            return model, self.fit(Stage2Module(model, recipe), tensors, folder, "stage2", [bundle.model])

        model, stats = self.stages.model(f"stage2-{name}", begin, train)
        return model.to(self.device), stats

    def stage2_texts(
        self, bundle: LanguageModelBundle, share: float, kinds: Sequence[str] = KINDS
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows of the pictures (N,), and the texts about them as Stage2Module takes them."""
        longest, seed = self.recipe.text_tokens, self.context.seed
        return self.data.stage2_tensors(bundle.tokenizer, share, seed, longest, self.queries, kinds)

    # ---- any training

    def fit(
        self,
        module: BridgeModule,
        tensors: tuple[Tensor | IndexedTensor, ...],
        folder: Path,
        name: str,
        frozen: Sequence[nn.Module] = (),
    ) -> dict:
        """Train by the module's recipe. -> `curves` by samples seen, `waited`, and what trained and frozen parts
        cost."""
        recipe, watch = module.recipe, FrozenWatch(frozen)
        batches = Batches(tensors, recipe.batch, recipe.steps, self.context.seed)
        identity = {"arm": f"{self.context.arm} {name}", "data": self.data.dataset.digest}
        stats = train_arm(self.context, module.train(), batches, identity, recipe, folder, callbacks=[watch])
        stats["trained_parameters"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return stats | (watch.measured if frozen else {})

    def indexed(self, images: Tensor, rows: Tensor) -> IndexedTensor:
        """Features or pictures of the samples, held where they are trained on; the loader's processes want the CPU."""
        return IndexedTensor(images if self.recipe.workers else images.to(self.device), rows)

    # ---- the frozen image encoder

    def encoder(self) -> Encoder:
        recipe, spec = self.recipe, self.encoder_spec
        name, layer = getattr(recipe, spec.encoder), spec.layer or recipe.layer
        return frozen_encoder(name, layer, recipe.scale, recipe.manifest, spec.half).to(self.device)

    def config(self) -> Blip2Config:
        """Stage 1's, with the width of the encoder at hand."""
        vision = replace(self.data.config.vision, width=self.encoder().width)
        return replace(self.data.config, language=None, vision=vision, queries=self.queries)

    def features(self, split: str, dtype: torch.dtype | None = None) -> Tensor:
        """(I, S, C) on the CPU, computed once a seed, of the pictures that are trained on (`train`), searched (`held`)
        or asked about (`asked`). dtype: what they are kept in, as the encoder gives them where None."""
        from shared.backbones.feature_cache import features_of

        dataset, eval_set = self.data.dataset, self.data.eval_set
        images = {"train": dataset.train.images, "held": eval_set.images, "asked": eval_set.question_images}
        key, folder = f"{dataset.digest[:16]}-{split}", self.stages.folder / "features"
        dtype = dtype or (HALF if self.encoder_spec.half else torch.float32)
        return features_of(self.encoder(), images[split], key=key, folder=folder, dtype=dtype)

    # ---- the frozen language model

    def bundle(self, which: str = "small") -> LanguageModelBundle:
        """`small` and `larger`: trained here; `headline`: as the recipe names it."""
        recipe = self.recipe
        name = (which == "headline" and recipe.headline_model) or recipe.language_model
        if name == "small":
            return self.small_language_model(larger=which == "larger")
        bundle = frozen_language_model(LANGUAGES[name], recipe.manifest)
        bundle.model.to(self.device)
        pack(unwrapped(bundle.model), through=True)  # on a CPU alone
        return bundle

    def small_language_model(self, larger: bool = False) -> LanguageModelBundle:
        recipe, tokenizer = self.recipe, self.data.tokenizer
        width = recipe.larger_width if larger else recipe.small_width
        config = replace(
            LANGUAGES["small"],
            vocabulary=tokenizer.vocab_size,
            context=recipe.lm_context,
            width=width,
            layers=recipe.larger_layers if larger else recipe.small_layers,
            heads=max(LANGUAGES["small"].heads, width // 64),
            mlp_width=4 * width,
        )
        prompts = prompt_tokenizer_of(tokenizer, config.context)

        def train(folder: Path) -> tuple[SmallLanguageModel, dict]:
            rows = [prompts.begun(text)[: prompts.context] for text in self.data.documents]
            model = new_language_model(config)
            return model, train_language_model(model, *pad_rows(rows, prompts.pad), recipe)

        name = "language-larger" if larger else "language"
        model, _ = self.common.model(name, lambda: new_language_model(config), train)
        frozen = Frozen(model, HALF if self.encoder_spec.half else None, through=True)
        return LanguageModelBundle(frozen.to(self.device), prompts, config)


def new_language_model(config: LanguageConfig) -> SmallLanguageModel:
    """Begun with larger numbers than its published cousins: so narrow a model learns to look back sooner."""
    torch.manual_seed(LANGUAGE_SEED)
    model = small_language_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(init_std(config.width) / INIT_STD)
    return model


def train_language_model(
    model: SmallLanguageModel, tokens: Tensor, attention_mask: Tensor, recipe: Blip2Recipe
) -> dict:
    """On texts alone, right-padded (N, T). -> its loss, mean over the last tenth of the steps."""
    device = device_for(recipe)
    generator = torch.Generator().manual_seed(LANGUAGE_SEED)
    model.to(device).train()

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(tokens), (recipe.lm_batch,), generator=generator)
        longest = int(attention_mask[rows].sum(1).max())
        batch, mask = tokens[rows, :longest].to(device), attention_mask[rows, :longest].to(device)
        states = model.states(model.embed(batch[:, :-1]), mask[:, :-1])[mask[:, 1:]]
        return F.cross_entropy(model.logits(states), batch[:, 1:][mask[:, 1:]])

    steps, decay = recipe.lm_steps, recipe.weight_decay
    losses = fit_simple(loss, model.parameters(), steps, recipe.lm_rate, betas=(0.9, 0.98), weight_decay=decay)
    model.cpu().eval()
    last = losses[-max(1, steps // 10) :]
    return {"loss": sum(last) / len(last)}


def stage2_recipe(recipe: Blip2Recipe, headline: bool = False) -> Blip2Recipe:
    """Stage 2's steps, batch and rate in the place of stage 1's."""
    kind = "headline" if headline else "stage2"
    steps, batch, rate = (getattr(recipe, f"{kind}_{name}") for name in ("steps", "batch", "rate"))
    end = recipe.stage2_min_rate
    return of_stage(recipe, steps, batch=batch, learning_rate=rate, min_learning_rate=end)
