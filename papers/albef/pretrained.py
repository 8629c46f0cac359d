"""Weights into our models: released ALBEF files, and what pre-training starts from (Sec. 3.1: DeiT and BERT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from papers.albef.config import VARIANTS, AlbefConfig
from papers.albef.converter import (
    bert_embeddings,
    bert_layer,
    detect_own,
    filled,
    refilled,
    vit,
    word_head,
)
from papers.albef.model import Albef, AlbefPretraining
from shared.core.errors import UserError
from shared.nn.positions import resample_square
from shared.weights.fetch import fetch
from shared.weights.load import check_card
from shared.weights.manifest import Entry
from shared.weights.safe_load import read_tensors
from shared.weights.weight_map import to_ours


def card_of(config: AlbefConfig) -> dict:
    """What a manifest entry states of preprocessing, tokenizer and architecture, as this configuration has it."""
    return {
        "preprocess": {
            "size": config.image_size,
            "resize": config.resize,
            "antialias": True,
            "mean": list(config.mean),
            "std": list(config.std),
        },
        "tokenizer": {"kind": config.tokenizer, "vocabulary": config.vocabulary, "context": config.context},
        "config": {"norm_eps": config.vision_eps},
    }


def load_released(variant: str, entry: Entry) -> nn.Module:
    """The published weights of a manifest entry: the model of their kind, in fp32, in eval mode, at the entry's picture
    size and text length. UserError where entry and model disagree."""
    size, context = entry.preprocess.get("size"), entry.tokenizer.get("context")
    config = VARIANTS[variant]()
    config = replace(config, image_size=size or config.image_size, context=context or config.context)
    check_card(entry, card_of(config))
    return load_any(fetch(entry), config)


def load_any(path: Path, config: AlbefConfig) -> nn.Module:
    """A weights file under published names of any kind, or under ours, as `convert` and training write them. In eval
    mode."""
    tensors = read_tensors(path)
    own = detect_own(tensors)
    try:
        return filled(tensors, config) if own is None else refilled(tensors, own, config)
    except (UserError, ValueError) as wrong:
        raise UserError(f"{path}: {wrong}") from None


def load_file(path: Path, config: AlbefConfig) -> Albef:
    """The model alone, of a pre-training or retrieval file (retrieval files have no word head)."""
    model = load_any(path, config)
    if isinstance(model, AlbefPretraining):
        model = model.student
    if not isinstance(model, Albef):
        raise UserError(f"{path}: fine-tuned for a task of its own; give pre-training or retrieval weights")
    return model


# ---- what pre-training starts from


def start(albef: Albef, vision: Path | None = None, text: Path | None = None) -> Albef:
    """In place: the ViT from DeiT's file, BERT's lower layers into the text encoder, its upper ones into the multimodal
    encoder. What BERT has not, cross-attention and the other heads, keeps its initialisation."""
    if vision is not None:
        from_deit(albef, read_tensors(vision))
    if text is not None:
        from_bert(albef, read_tensors(text))
    return albef


def from_deit(albef: Albef, published: Mapping[str, Tensor]) -> None:
    """timm's names (`deit_base_patch16_224`); positions are carried to the model's own picture size."""
    weight_map = vit("", "") | {f"head.{part}": None for part in ("weight", "bias")}
    expected, table = albef.vision_encoder.state_dict(), "positions.position"
    ours = to_ours(published, weight_map)
    ours[table] = resample_square(ours[table], expected[table], antialias=False)
    shapes = {key: tensor.shape for key, tensor in expected.items()}
    albef.vision_encoder.load_state_dict(to_ours(ours, {key: key for key in ours}, shapes), strict=True)


def from_bert(albef: Albef, published: Mapping[str, Tensor]) -> None:
    """transformers' names of BertForMaskedLM or BertForPreTraining (`bert-base-uncased`), old and new."""
    config = albef.config
    published = {_renamed(key): tensor for key, tensor in published.items()}
    weight_map = bert_embeddings("bert.embeddings.", "text_encoder.embeddings.")
    for index in range(config.text_layers + config.fusion_layers):
        above = index - config.text_layers
        ours = f"text_encoder.layers.{index}." if above < 0 else f"multimodal_encoder.{above}."
        weight_map |= bert_layer(f"bert.encoder.layer.{index}.", ours, cross=False)
    weight_map |= word_head("cls.predictions.", "mlm_head.")
    unused = ["bert.pooler.dense", "cls.seq_relationship", "cls.predictions.decoder"]
    weight_map |= {f"{name}.{part}": None for name in unused for part in ("weight", "bias")}

    own = albef.state_dict()
    inside = ("text_encoder.", "multimodal_encoder.", "mlm_head.")
    expected = {
        key: tensor.shape for key, tensor in own.items() if key.startswith(inside) and ".cross_" not in key
    }  # fmt: skip
    albef.load_state_dict(own | to_ours(published, weight_map, expected), strict=True)


def _renamed(key: str) -> str:
    """The oldest files write LayerNorm.gamma and LayerNorm.beta."""
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
