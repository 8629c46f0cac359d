"""Published BLIP weights <-> ours: the authors' names and those of transformers, total and strict, both ways.

A published file writes a shared tensor once for every place that uses it. Such copies have to be equal on the way in,
and are written out again on the way back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from papers.blip.config import BlipConfig
from papers.blip.model import Blip, BlipPretraining
from papers.blip.tasks import BlipNlvr, BlipVqa
from shared.core.errors import UserError
from shared.weights.weight_map import Rule, WeightMap, carried_to, to_ours, to_published

PARTS = ("weight", "bias")


def _pairs(names: Mapping[str, str], theirs: str, ours: str) -> dict:
    """Weight and bias of every module."""
    return {f"{theirs}{a}.{part}": f"{ours}{b}.{part}" for a, b in names.items() for part in PARTS}


# ---- the authors' names (models/vit.py, models/med.py)


def _official_vision(theirs: str = "visual_encoder.", ours: str = "vision_encoder.") -> dict:
    names = {"norm1": "attention_norm", "attn.qkv": "attention.qkv", "attn.proj": "attention.out"}
    names |= {"norm2": "mlp_norm", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
    return {
        f"{theirs}cls_token": Rule(f"{ours}positions.class_token", lead=2),
        f"{theirs}pos_embed": Rule(f"{ours}positions.position", lead=1),
        **_pairs({"patch_embed.proj": "patch_embedding", "norm": "output_norm"}, theirs, ours),
        **_pairs(names, f"{theirs}blocks.{{}}.", f"{ours}blocks.{{}}."),
    }


def _bert_embeddings(theirs: str, ours: str) -> dict:
    return {
        f"{theirs}embeddings.word_embeddings.weight": f"{ours}embeddings.word.weight",
        f"{theirs}embeddings.position_embeddings.weight": f"{ours}embeddings.position.weight",
        **_pairs({"embeddings.LayerNorm": "embeddings.norm"}, theirs, ours),
        f"{theirs}embeddings.position_ids": None,  # 0, 1, 2, ...
    }


def _self_attention(theirs: str, ours: str) -> dict:
    layer, block = f"{theirs}encoder.layer.{{}}.attention.", f"{ours}layers.{{}}."
    fused = {
        tuple(f"{layer}self.{name}.{part}" for name in ("query", "key", "value")): f"{block}attention.qkv.{part}"
        for part in PARTS
    }
    return fused | _pairs({"output.dense": "attention.out", "output.LayerNorm": "attention_norm"}, layer, block)


def _look(theirs: str, dense: str, ours: str) -> dict:
    """One cross-attention: its projections, and the dense layer behind it."""
    fused = {tuple(f"{theirs}.{name}.{part}" for name in ("key", "value")): f"{ours}.kv.{part}" for part in PARTS}
    return fused | {
        f"{a}.{part}": f"{ours}.{b}.{part}" for a, b in ((f"{theirs}.query", "q"), (dense, "out")) for part in PARTS
    }


def _cross_attention(theirs: str, ours: str) -> dict:
    layer, block = f"{theirs}encoder.layer.{{}}.crossattention.", f"{ours}layers.{{}}."
    look = _look(f"{layer}self", f"{layer}output.dense", f"{block}cross_attention")
    return look | _pairs({"output.LayerNorm": "cross_norm"}, layer, block)


def _feed_forward(theirs: str, ours: str) -> dict:
    names = {"intermediate.dense": "mlp.up", "output.dense": "mlp.down", "output.LayerNorm": "mlp_norm"}
    return _pairs(names, f"{theirs}encoder.layer.{{}}.", f"{ours}layers.{{}}.")


def _bert(theirs: str, ours: str) -> dict:
    return {
        **_bert_embeddings(theirs, ours),
        **_self_attention(theirs, ours),
        **_cross_attention(theirs, ours),
        **_feed_forward(theirs, ours),
    }


def _head(theirs: str = "text_decoder.cls.predictions.", ours: str = "text_decoder.head.") -> dict:
    names = {"transform.dense": "dense", "transform.LayerNorm": "norm"}
    return _pairs(names, theirs, ours) | {f"{theirs}bias": f"{ours}bias"}


def _nlvr_encoder() -> dict:
    theirs, ours = "text_encoder.", "text_encoder."
    layer, block = f"{theirs}encoder.layer.{{}}.crossattention.", f"{ours}layers.{{}}."
    return {
        **_bert_embeddings(theirs, ours),
        **_self_attention(theirs, ours),
        **_feed_forward(theirs, ours),
        **_look(f"{layer}self0", f"{layer}output.dense0", f"{block}cross_attention.first"),
        **_look(f"{layer}self1", f"{layer}output.dense1", f"{block}cross_attention.second"),
        **_pairs({"output.merge_layer": "cross_attention.merge", "output.LayerNorm": "cross_norm"}, layer, block),
    }


HEADS = {name: f"blip.{name}" for name in ("vision_proj", "text_proj", "itm_head")}
MOMENTUM = {"vision_proj_m": "momentum.vision_proj", "text_proj_m": "momentum.text_proj"}

RETRIEVAL = {
    **_official_vision(ours="blip.vision_encoder."),
    **_bert("text_encoder.", "blip.text_encoder."),
    **_pairs(HEADS, "", ""),
    **_official_vision("visual_encoder_m.", "momentum.vision_encoder."),
    **_bert("text_encoder_m.", "momentum.text_encoder."),
    **_pairs(MOMENTUM, "", ""),
    "temp": "temperature",
    "image_queue": Rule("queue.images", transpose=True),
    "text_queue": Rule("queue.texts", transpose=True),
    "idx_queue": Rule("queue.ids", lead=1),
    "ptr_queue": Rule("queue.next", lead=1),
}

PRETRAINING = {
    **{key: rule for key, rule in RETRIEVAL.items() if key not in ("idx_queue", "ptr_queue")},
    **_self_attention("text_decoder.bert.", "blip.text_decoder."),
    **_head(ours="blip.text_decoder.head."),
    "queue_ptr": Rule("queue.next", lead=1),
}

CAPTIONING = {**_official_vision(), **_bert("text_decoder.bert.", "text_decoder."), **_head()}
VQA = {**CAPTIONING, **_bert("text_encoder.", "text_encoder.")}
NLVR = {
    **_official_vision(),
    **_nlvr_encoder(),
    **_pairs({"cls_head.0": "classifier.0", "cls_head.2": "classifier.2"}, "", ""),
}

# ---- transformers' names (modeling_blip.py): another image encoder, the same text


def _transformers_vision() -> dict:
    theirs, ours = "vision_model.", "vision_encoder."
    names = {"layer_norm1": "attention_norm", "self_attn.qkv": "attention.qkv", "self_attn.projection": "attention.out"}
    names |= {"layer_norm2": "mlp_norm", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
    return {
        f"{theirs}embeddings.class_embedding": Rule(f"{ours}positions.class_token", lead=2),
        f"{theirs}embeddings.position_embedding": Rule(f"{ours}positions.position", lead=1),
        **_pairs({"embeddings.patch_embedding": "patch_embedding", "post_layernorm": "output_norm"}, theirs, ours),
        **_pairs(names, f"{theirs}encoder.layers.{{}}.", f"{ours}blocks.{{}}."),
    }


TRANSFORMERS_CAPTIONING = {**_transformers_vision(), **_bert("text_decoder.bert.", "text_decoder."), **_head()}
TRANSFORMERS_VQA = {**TRANSFORMERS_CAPTIONING, **_bert("text_encoder.", "text_encoder.")}
TRANSFORMERS_RETRIEVAL = {
    **_transformers_vision(),
    **_bert("text_encoder.", "text_encoder."),
    **_pairs({name: name for name in HEADS}, "", ""),
}

# ---- what a file of each kind is


@dataclass(frozen=True)
class Format:
    """A kind of published file: its map, the model it fills, and tensors that it writes more than once.

    copies: (a published name, the name of its copy), as a pattern and what re.sub puts in its place.
    """

    weight_map: WeightMap
    make: Callable[[BlipConfig], nn.Module]
    copies: tuple[tuple[str, str], ...] = ()
    position_ids: bool = True  # whether it keeps the numbers 0, 1, 2, ... beside each position table
    ids: bool = True  # whether a queue has the ids of its pictures; without, they are unknown (-1)


_OUTPUT = (  # the head's matrix is the word table, and its bias stands there twice
    (r"text_decoder\.bert\.embeddings\.word_embeddings\.weight", "text_decoder.cls.predictions.decoder.weight"),
    (r"text_decoder\.cls\.predictions\.bias", "text_decoder.cls.predictions.decoder.bias"),
)
_SHARED = (  # what encoder and decoder have in common when all but self-attention is shared
    (r"text_encoder\.(embeddings\..+)", r"text_decoder.bert.\1"),
    (r"text_encoder\.(encoder\.layer\.\d+\.(?:crossattention|intermediate|output)\..+)", r"text_decoder.bert.\1"),
    (r"text_encoder\.embeddings\.word_embeddings\.weight", "text_decoder.cls.predictions.decoder.weight"),
    _OUTPUT[1],
)


def _captioner(config: BlipConfig) -> Blip:
    return Blip(config, encoder=False)


def _matcher(config: BlipConfig) -> Blip:
    return Blip(config, decoder=False)


def _retrieval(config: BlipConfig) -> BlipPretraining:
    return BlipPretraining(config, decoder=False)


FORMATS: dict[str, Format] = {
    "pretraining": Format(PRETRAINING, BlipPretraining, _SHARED, ids=False),
    "retrieval": Format(RETRIEVAL, _retrieval),
    "captioning": Format(CAPTIONING, _captioner, _OUTPUT),
    "vqa": Format(VQA, BlipVqa, _OUTPUT),
    "nlvr": Format(NLVR, BlipNlvr),
    "transformers-captioning": Format(TRANSFORMERS_CAPTIONING, _captioner, _OUTPUT, position_ids=False),
    "transformers-retrieval": Format(TRANSFORMERS_RETRIEVAL, _matcher, position_ids=False),
    "transformers-vqa": Format(TRANSFORMERS_VQA, BlipVqa, _OUTPUT, position_ids=False),
}
WEIGHT_MAPS = {name: format.weight_map for name, format in FORMATS.items()}


def detect(keys: set[str]) -> str:
    """Which of FORMATS published keys belong to; ValueError for a stranger."""
    theirs = {
        "visual_encoder.cls_token": {
            "queue_ptr": "pretraining",
            "ptr_queue": "retrieval",
            "cls_head.0.weight": "nlvr",
            "text_encoder.embeddings.word_embeddings.weight": "vqa",
            "text_decoder.cls.predictions.bias": "captioning",
        },
        "vision_model.embeddings.class_embedding": {
            "itm_head.weight": "transformers-retrieval",
            "text_encoder.embeddings.word_embeddings.weight": "transformers-vqa",
            "text_decoder.cls.predictions.bias": "transformers-captioning",
        },
    }
    for mark, formats in theirs.items():
        if mark in keys:
            for key, name in formats.items():
                if key in keys:
                    return name
    raise ValueError("these are not BLIP weights: none of the known names is among their keys")


def ours_of(published: Mapping[str, Tensor], format: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under our names, shapes as in `expected` (a state dict); positions for another picture size are
    interpolated as the official code does. UserError lists what is missing, left over or of another shape, and copies
    of one tensor that differ."""
    tensors, kind = dict(published), FORMATS[format]
    for copy, original in _copies(tensors, kind).items():
        if copy in tensors:
            if not torch.equal(tensors[copy], tensors[original]):
                raise UserError(f"{copy} differs from {original}, but a {format} model has one tensor for both")
            del tensors[copy]
    ours = to_ours(tensors, kind.weight_map)
    if not kind.ids:
        ours["queue.ids"] = torch.full((len(ours["queue.images"]),), -1)
    return carried_to(expected, ours)


def published_of(state: Mapping[str, Tensor], format: str) -> dict[str, Tensor]:
    """Our state dict under the published names, whole: copies and numbered positions too."""
    kind = FORMATS[format]
    published = to_published({k: v for k, v in state.items() if kind.ids or k != "queue.ids"}, kind.weight_map)
    if kind.position_ids:
        tables = [key for key in published if key.endswith(".position_embeddings.weight")]
        for key in tables:
            numbers = torch.arange(len(published[key]))[None]
            published[key.replace("position_embeddings.weight", "position_ids")] = numbers
    return published | {copy: published[original] for copy, original in _copies(published, kind).items()}


def _copies(names: Mapping[str, Tensor], kind: Format) -> dict[str, str]:
    """{copy: original}."""
    return {
        re.sub(pattern, copy, name): name
        for name in names
        for pattern, copy in kind.copies
        if re.fullmatch(pattern, name)
    }


def convert(source: Path, target: Path, variant: str, to: str) -> None:
    """Write `source` (any known names) as safetensors under our names (to="ours"), or under the published ones of a
    kind that the weights fit; strict both ways."""
    from papers.blip.config import VARIANTS
    from papers.blip.pretrained import load_file
    from shared.weights.load import save_weights
    from shared.weights.safe_load import read_header

    if to != "ours" and to not in FORMATS:
        raise UserError(f"--to {to}: choose ours, {', '.join(FORMATS)}")
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    config = VARIANTS[variant]()
    if config.tokenizer != "bert-wordpiece":  # a small one has as many words as its texts gave
        tables = [v for k, v in read_header(source).items() if k.endswith(("word_embeddings.weight", "word.weight"))]
        config = replace(config, vocabulary=len(tables[0])) if tables else config
    state = load_file(source, config).state_dict()
    try:
        save_weights(state if to == "ours" else published_of(state, to), target, {"variant": variant})
    except UserError as error:
        raise UserError(f"{source} as {to}: {error}") from None
