"""A trained bridge as a run leaves it for its users, and what of either kind, kept here or released, they talk to.

Beside model.safetensors stand bridge.json, which says between which frozen parts it was trained, and those parts that
were trained here too: vision.safetensors, language_model.safetensors with tokenizer.json. Others come by name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from papers.blip2.config import PUBLISHED, VARIANTS, Blip2Config, LanguageConfig, VisionConfig
from papers.blip2.frozen import (
    HALF,
    LanguageModelBundle,
    encoder_beside,
    encoder_with,
    frozen_encoder,
    load_encoder,
    load_language_model_bundle,
    small_language_model,
    speak_through,
)
from papers.blip2.model import Blip2
from papers.blip2.text import prompt_tokenizer_of
from papers.blip2.weights import check_entry, config_of, load_file
from shared.backbones.vision import Encoder
from shared.core.device import on_gpu_if_any
from shared.core.errors import UserError
from shared.core.files import sha256, write_whole
from shared.nn.blocks import ACTIVATIONS
from shared.nn.frozen import Frozen
from shared.nn.packed_linear import pack
from shared.tokenizers.load import load_tokenizer
from shared.weights.fetch import fetch
from shared.weights.load import load_weights, save_weights
from shared.weights.manifest import load_manifest
from shared.weights.safe_load import read_tensors

CARD, VISION, LANGUAGE, TOKENIZER = "bridge.json", "vision.safetensors", "language_model.safetensors", "tokenizer.json"
SIZES = ("queries", "width", "layers", "heads", "mlp_width", "cross_every", "embed_width", "context")


@dataclass(frozen=True)
class InferenceModel:
    """All that answers about a picture. trained_here: on scenes and the prompts of this repository."""

    model: Blip2
    encoder: Encoder
    language: LanguageModelBundle
    trained_here: bool


# ---- writing


def keep_frozen(
    folder: Path,
    config: Blip2Config,
    variant: str,
    encoder: Encoder,
    encoder_name: str,
    layer: str,
    language_model: nn.Module,
    tokenizer: Any,
    captions: bool,
) -> None:
    """Write what model.safetensors, of this configuration and in this folder, needs beside it.

    encoder_name, layer: as in the recipe. tokenizer: of a small language model; None for one by name. captions: whether
    it learned any, beside answers.
    """
    seals, vision = {}, config.vision
    if ":" in encoder_name:  # an artifact of another paper; others come by name
        vision = vision_of(encoder)
        save_weights(encoder.module, folder / VISION)
        seals[VISION] = sha256(folder / VISION)
    if config.language_of_stage2.family == "small":
        save_weights(getattr(language_model, "module", language_model), folder / LANGUAGE)
        tokenizer.save(folder / TOKENIZER)
        seals |= {name: sha256(folder / name) for name in (LANGUAGE, TOKENIZER)}
    card = {
        "variant": variant,
        "encoder": encoder_name,
        "layer": layer,
        "half": encoder.dtype is not None,
        "sizes": {name: getattr(config, name) for name in SIZES},
        "vision": asdict(vision),
        "language": asdict(config.language_of_stage2),
        "sha256": seals,
        "captions": captions,
    }
    write_whole(folder / CARD, json.dumps(card, indent=1) + "\n")


def vision_of(encoder: Encoder) -> VisionConfig:
    """The sizes of an encoder that is a ViT of this repository's CLIP, as far as it is read."""
    vit = encoder.module
    embedding, block = vit.patch_embedding, vit.blocks[0]
    activation = next(name for name, make in ACTIVATIONS.items() if type(block.mlp.activation) is make)
    return VisionConfig(
        "clip",
        image_size=vit.positions.grid[0] * embedding.patch,
        patch=embedding.patch,
        width=encoder.width,
        layers=len(vit.blocks),
        heads=block.attention.heads,
        mlp_ratio=block.mlp.up.out_features / encoder.width,
        activation=activation,
        eps=block.attention_norm.eps,
        input_norm=isinstance(vit.input_norm, nn.LayerNorm),
        patch_bias=embedding.bias is not None,
        mean=tuple(embedding.mean),
        std=tuple(embedding.std),
    )


# ---- reading


def load_inference_model(
    variant: str, weights: Path | None, tokenizer: Path | None, manifest: str | Path, use: str = "ask"
) -> InferenceModel:
    """weights: a file that a run of this repository or somebody else has trained; None: the manifest's for that use
    (ask | caption). UserError, before anything large is read, where a part is missing or of another model."""
    if VARIANTS[variant]().language is None:
        speaking = ", ".join(name for name, make in VARIANTS.items() if make().language is not None)
        raise UserError(f"{variant}: stage 1 speaks through no language model; choose one of {speaking}")
    if weights is None:
        return _released(variant, manifest, use)
    if not weights.exists():
        raise UserError(f"{weights}: no such file; --weights takes a safetensors file or a published .pth")
    card = weights.with_name(CARD)
    if card.is_file():
        about = read_card(card)
        if use == "caption" and not about.get("captions", True):
            raise UserError(f"{weights}: learned answers to questions and no captions: ask it, or give other weights")
        return _kept(variant, weights, tokenizer, about, manifest)
    if (weights / CARD).is_file():
        raise UserError(f"{weights}: a folder; give the model.safetensors in it")
    if variant not in PUBLISHED:
        raise UserError(f"{card}: no such file; runs write it beside their weights, it says what they stand between")
    return _of_file(weights, VARIANTS[variant](), manifest)


def _released(variant: str, manifest: str | Path, use: str) -> InferenceModel:
    entries = load_manifest(manifest)
    captions = f"{variant}-caption-coco"
    id = captions if use == "caption" and captions in entries else variant
    if id not in entries:
        known = ", ".join(name for name in VARIANTS if name in entries and VARIANTS[name]().language is not None)
        raise UserError(f"{variant}: no released weights to {use} with; choose {known}, or give --weights")
    check_entry(entries[id])
    return _of_file(fetch(entries[id]), config_of(id), manifest)


def _of_file(weights: Path, config: Blip2Config, manifest: str | Path) -> InferenceModel:
    """A published file or folder, the frozen encoder in it, beside it or in the cache."""
    model, encoder = load_bridge(weights, config)
    if encoder is None:
        vision, half = model.config.vision, torch.float16 if torch.cuda.is_available() else HALF
        encoder = load_encoder(encoder_beside(weights, config, manifest), vision, half)
    return joined(model, encoder, load_language_model_bundle(config.language_of_stage2, manifest), False)


def _kept(variant: str, weights: Path, tokenizer: Path | None, card: dict, manifest: str | Path) -> InferenceModel:
    if card["variant"] != variant:
        raise UserError(f"{weights}: weights of {card['variant']}, not of {variant}; give --model {card['variant']}")
    for name, seal in card["sha256"].items():
        _check_seal(weights.with_name(name), seal)
    vision, language = card["vision"], card["language"]
    config = replace(VARIANTS[variant](), **card["sizes"], vision=vision, language=language)
    model, _ = load_bridge(weights, config)
    if language.family == "small":
        prompts = prompt_tokenizer_of(load_tokenizer(tokenizer or weights.with_name(TOKENIZER)), language.context)
        small = small_language_model(language)
        load_weights(small, weights.with_name(LANGUAGE))
        bundle = LanguageModelBundle(Frozen(small, through=True), prompts, language)
    else:  # it learned the paper's prompts, and no conversation
        bundle = replace(load_language_model_bundle(language, manifest), chat=None)
    dtype = HALF if card["half"] else None
    if VISION in card["sha256"]:
        encoder = encoder_with(read_tensors(weights.with_name(VISION)), vision, dtype)
    else:
        encoder = frozen_encoder(card["encoder"], card["layer"], "mini", str(manifest), card["half"])
    return joined(model, encoder, bundle, True)


def load_bridge(weights: Path, config: Blip2Config) -> tuple[Blip2, Encoder | None]:
    model, encoder = load_file(weights, config)
    if not isinstance(model, Blip2):
        raise UserError(f"{weights}: weights of stage 1, which speak through no language model; give those of stage 2")
    return model, encoder


def joined(model: Blip2, encoder: Encoder, language: LanguageModelBundle, trained_here: bool) -> InferenceModel:
    """On a GPU where there is one; on a CPU with weights laid out for few rows, as beams are."""
    speak_through(model, language.model)
    model, encoder = on_gpu_if_any(model), on_gpu_if_any(encoder)
    if not torch.cuda.is_available():
        for part in (model, encoder.module, language.model.module):
            pack(part)
    return InferenceModel(model.eval(), encoder, language, trained_here)


def read_card(path: Path) -> dict:
    """bridge.json with its configurations made; UserError for anything else under that name."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        for part in (card["language"], card["sizes"]):
            if "hidden" in part:  # its name until the end of 2026
                part["mlp_width"] = part.pop("hidden")
        for key in ("mean", "std"):
            card["vision"][key] = tuple(card["vision"][key])
        card["vision"], card["language"] = VisionConfig(**card["vision"]), LanguageConfig(**card["language"])
        known = all(isinstance(card["sizes"][name], int) for name in SIZES) and len(card["sizes"]) == len(SIZES)
        named = set(card["sha256"]) <= {VISION, LANGUAGE, TOKENIZER}
        if not known or not named or card["variant"] not in VARIANTS:
            raise ValueError("unknown sizes, files or variant")
        card["encoder"], card["layer"], card["half"]
    except (OSError, ValueError, KeyError, TypeError) as wrong:
        raise UserError(f"{path}: does not describe a bridge ({type(wrong).__name__}: {wrong}); train anew") from None
    return card


def _check_seal(path: Path, seal: str) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it was written beside the weights, take it from there")
    if (digest := sha256(path)) != seal:
        raise UserError(f"{path}: sha256 {digest[:12]}..., the weights beside it were trained with {seal[:12]}...")
