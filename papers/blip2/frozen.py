"""BLIP-2's frozen parts by name: image encoders, published (Table 2) or of another paper, and language models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from papers.blip2.config import CLIP_VIT_L, EVA_VIT_G, Blip2Config, LanguageConfig, VisionConfig
from papers.blip2.model import Blip2, vision_encoder
from papers.blip2.text import PromptTokenizer, load_prompt_tokenizer
from shared.backbones.vision import Encoder, efficientnet_encoder, vit_encoder
from shared.core.errors import UserError
from shared.core.files import cache_root
from shared.experiments.pretrained_parts import PretrainedPart, pretrained_part
from shared.nn.causal_lm import SmallLanguageModel
from shared.nn.frozen import Frozen
from shared.weights.fetch import cached
from shared.weights.formats import load_pretrained, map_openai_vit, map_vit
from shared.weights.manifest import MANIFEST, load_manifest
from shared.weights.weight_map import WeightMap, carried_to, resample_plainly, to_ours

HALF = torch.bfloat16  # of frozen encoders on a CPU
ENCODER_ENTRIES = {"eva": "blip2-eva-vit-g", "clip": "blip2-clip-vit-l"}  # of the published variants' frozen encoders
PUBLISHED_ENCODERS = {"eva-vit-g": EVA_VIT_G, "clip-vit-l": CLIP_VIT_L}  # as recipes name them

# ---- published image encoders


def map_eva(source: str, target: str) -> dict:
    """lavis/models/eva_vit.py: timm's ViT without a norm behind it, and a bias on queries and values alone."""
    table = map_vit(source, target, output_norm=False)
    attention = f"{source}blocks.{{}}.attn."
    bias = table.pop(f"{attention}qkv.bias")
    return table | {(f"{attention}q_bias", f"{attention}v_bias"): bias}


# lavis/models/eva_vit.py and clip_vit.py: eva_vit_g.pth and clip_vit_L.pth, whose norm and head are not used
ENCODERS: dict[str, WeightMap] = {
    "eva": map_eva("", "") | dict.fromkeys(("norm.weight", "norm.bias", "head.weight", "head.bias", "mask_token")),
    "clip": map_openai_vit("", "") | dict.fromkeys(("ln_post.weight", "ln_post.bias", "proj")),
}


def resample_to_corners(table: Tensor, like: Tensor) -> Tensor:
    """Positions (1 + N, C) on the square grid of another table, corners on corners: interpolate_pos_embed of
    clip_vit.py."""
    if len(table) == len(like):
        return table
    old, new = (math.isqrt(len(positions) - 1) for positions in (table, like))
    picture = rearrange(table[1:].float(), "(h w) c -> 1 c h w", h=old)
    resized = F.interpolate(picture, (new, new), mode="bicubic", align_corners=True)
    return torch.cat([table[:1], rearrange(resized, "1 c h w -> (h w) c").to(table.dtype)])


def resampling(kind: str) -> Any:
    """How the official code of an encoder's kind carries its positions to another size of pictures."""
    return resample_to_corners if kind == "clip" else resample_plainly


def encoder_of(published: Mapping[str, Tensor], kind: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A frozen image encoder's own file, under our names. Blocks beyond those that are built are left out."""
    layers = sum(key.endswith("attention.qkv.weight") for key in expected)
    tensors = {key: tensor for key, tensor in published.items() if _block(key) < layers}
    return carried_to(expected, to_ours(tensors, ENCODERS[kind]), resampling(kind))


def _block(key: str) -> int:
    number = re.search(r"(?:^|\.)(?:blocks|resblocks)\.(\d+)\.", key)
    return int(number[1]) if number else -1


def encoder_with(
    state: Mapping[str, Tensor], vision: VisionConfig, dtype: torch.dtype | None = None, matrices: bool = False
) -> Encoder:
    """A frozen encoder with these weights, read after its last block: the one that was left out came behind it.
    matrices: dtype is theirs alone (shared/nn/frozen.py)."""
    vit = vision_encoder(vision)
    vit.load_state_dict(dict(state), strict=True)
    return vit_encoder(vit, "last", dtype, matrices)


def load_encoder(path: Path, vision: VisionConfig, dtype: torch.dtype | None = None) -> Encoder:
    """A frozen encoder's own published file (eva_vit_g.pth, clip_vit_L.pth), positions carried to the picture size.

    dtype: in float16 the matrices alone, with the residual stream in fp32, as the official code runs it; in bfloat16,
    which is for CPUs, all of it.
    """
    with torch.device("meta"):
        expected = vision_encoder(vision).state_dict()
    state = load_pretrained(path, lambda published: encoder_of(published, vision.kind, expected))
    return encoder_with(state, vision, dtype, matrices=dtype == torch.float16)


def published_encoder(named: str, layer: str, manifest: str | Path, half: bool) -> Encoder:
    """A frozen encoder as a recipe names it: `eva-vit-g`, `clip-vit-l 364 weights/clip_vit_L.pth`, the size of pictures
    and the file where they are not 224 and the cache's. half: as load_encoder has it, float16 where there is a GPU.

    Its second-last layer is the last that was published.
    """
    name, *options = named.split()
    vision = PUBLISHED_ENCODERS[name]
    if layer != "second-last":
        raise UserError(f"{name}: published without its last block, so there is no layer '{layer}': take second-last")
    for size in filter(str.isdigit, options):
        vision = replace(vision, image_size=int(size))
    files = [option for option in options if not option.isdigit()]
    entry = load_manifest(manifest)[ENCODER_ENTRIES[vision.kind]]
    place = Path(files[0]).expanduser() if files else entry.sha256 and cached(entry)
    if not place or not place.is_file():
        raise UserError(
            f"{place or entry.file}: no such file; the frozen image encoder is {entry.what} ({entry.origin}): get it, "
            f"and give encoder='{name} PATH'"
        )
    dtype = torch.float16 if torch.cuda.is_available() else HALF
    return load_encoder(place, vision, dtype if half else None)


def encoder_beside(weights: Path, config: Blip2Config, manifest: str | Path) -> Path:
    """Where the frozen encoder of a published variant lies: beside the weights, else in the cache. UserError: where it
    would have to."""
    entry = load_manifest(manifest)[ENCODER_ENTRIES[config.vision.kind]]
    beside = weights.with_name(entry.file)
    place = beside if beside.is_file() or entry.sha256 is None else cached(entry)
    if place is None or not place.is_file():
        raise UserError(f"{beside}: no such file; the frozen image encoder is {entry.what} ({entry.origin})")
    return place


# ---- as a recipe names them


def pretrained_part_of(name: str, scale: str) -> PretrainedPart | None:
    """`clip:vision steps=400`: what another paper's recipe of this scale, changed so, leaves; built where it is
    lacking. None where the name is no artifact's."""
    name, *options = name.split()
    return pretrained_part(name, scale, options) if ":" in name else None


@lru_cache(maxsize=8)
def frozen_encoder(name: str, layer: str, scale: str, manifest: str, half: bool) -> Encoder:
    """An artifact, or of the manifest at some size of pictures: `efficientnet-lite0 64`, `eva-vit-g 364`."""
    dtype, part = HALF if half else None, pretrained_part_of(name, scale)
    if part is not None:
        return part.load(layer=layer, dtype=dtype)
    if name.split()[0] in PUBLISHED_ENCODERS:
        return published_encoder(name, layer, manifest, half)
    name, *size = name.split()
    return efficientnet_encoder(name, layer, int(size[0]) if size else 0, manifest, dtype)


# ---- language models


@dataclass(frozen=True)
class LanguageModelBundle:
    """A frozen language model, its tokenizer, its sizes, and its way to write out a conversation, where it has one."""

    model: Frozen
    tokenizer: PromptTokenizer
    config: LanguageConfig
    chat: Callable[[Sequence[Mapping[str, str]]], str] | None = None


def small_language_model(config: LanguageConfig) -> SmallLanguageModel:
    """A new one of these sizes, in this repository's own layers."""
    return SmallLanguageModel(
        config.vocabulary, config.context, config.width, config.layers, config.heads, kv_heads=config.kv_heads,
        mlp_width=config.mlp_width,
    )  # fmt: skip


def load_language_model_bundle(
    config: LanguageConfig,
    manifest: str | Path = MANIFEST,
    folder: Path | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModelBundle:
    """A language model by name. folder: where it lies, in the cache where None; dtype: that which it is kept in."""
    from shared.backbones.hf_lm import half_of
    from shared.backbones.lm import load_language_model

    name = config.name
    model, tokenizer = load_language_model(name, manifest=manifest, folder=folder, dtype=dtype or half_of(name))
    if model.width != config.width:
        raise UserError(f"{name}: a language model of width {model.width}, expected {config.width}")
    try:
        prompts = load_prompt_tokenizer(tokenizer, model.context)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    frozen = Frozen(cast(nn.Module, model), through=True)
    return LanguageModelBundle(frozen, prompts, config, tokenizer.chat if tokenizer.template else None)


frozen_language_model = lru_cache(maxsize=1)(load_language_model_bundle)  # for arms, which ask one after the other


def speak_through(model: Blip2, language_model: Frozen) -> None:
    """Give a bridge its language model; UserError where its projector is of another width."""
    if model.projector.out_features != language_model.width:
        raise UserError(
            f"these weights speak to a language model of width {model.projector.out_features}, this one's is "
            f"{language_model.width}: another variant's"
        )
    model.language_model = language_model


class Silent(nn.Module):
    """What stands for a language model where only its sizes count."""

    def __init__(self, config: Blip2Config):
        super().__init__()
        language = config.language_of_stage2
        self.name, self.kind, self.width = language.name, language.kind, language.width
        self.vocabulary, self.context = language.vocabulary, language.context


def transformers_language(weights: Path, model: Blip2, folder: Path | None) -> tuple[Any, Any]:
    """transformers' language model that a bridge speaks to, in the precision of its folder (default: of its name beside
    the weights, else in the cache), and its tokenizer."""
    from shared.backbones.hf_lm import PUBLISHED, Published, read_folder

    name = model.language_model.name
    places = [folder] if folder else [weights.with_name(name), cache_root() / name]
    place = next((place for place in places if (place / "config.json").is_file()), None)
    published = PUBLISHED.get(name, Published(name))
    if place is None:
        raise UserError(
            f"{name}: {places[0]} has no config.json; get it with: hf download {published.repo} --local-dir {places[0]}"
        )
    adapter, tokenizer = read_folder(place, "auto", published)
    if adapter.width != model.projector.out_features:
        raise UserError(
            f"{place}: a language model of width {adapter.width}, but the weights speak to one of "
            f"{model.projector.out_features}"
        )
    return adapter.theirs, tokenizer
