"""Published BLIP-2 weights <-> ours: LAVIS's names and those of transformers, total and strict, both ways.

A file of ours has the names of Blip2Qformer (stage 1) or Blip2 (stage 2), and those of the image encoder behind
"vision_encoder." where it holds that too: LAVIS's files do after fine-tuning, those of transformers always. A language
model stands in no file of ours; transformers' files have it behind "language_model.", and `without_language` and
`with_language` take it out and put it in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from papers.blip2.config import Blip2Config
from shared.core.errors import UserError
from shared.weights.weight_map import Rule, WeightMap, to_ours, to_published

PARTS = ("weight", "bias")
VISION = "vision_encoder."
LANGUAGE = "language_model."


def _pairs(names: Mapping[str, str], theirs: str = "", ours: str = "") -> dict:
    """Weight and bias of every module."""
    return {f"{theirs}{a}.{part}": f"{ours}{b}.{part}" for a, b in names.items() for part in PARTS}


# ---- the Q-Former (lavis/models/blip2_models/Qformer.py; transformers, modeling_blip_2.py)


def _layers(theirs: str, inner: str, ours: str, text: bool) -> dict:
    """`inner` is what either code calls the projections inside an attention."""
    layer, block = f"{theirs}encoder.layer.{{}}.", f"{ours}layers.{{}}."
    own, cross = f"{layer}attention.{inner}.", f"{layer}crossattention.{inner}."
    fused = {
        tuple(f"{at}{name}.{part}" for name in names): f"{block}{target}.{part}"
        for at, names, target in (
            (own, ("query", "key", "value"), "attention.qkv"),
            (cross, ("key", "value"), "cross_attention.kv"),
        )
        for part in PARTS
    }
    names = {
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "attention_norm",
        f"crossattention.{inner}.query": "cross_attention.q",
        "crossattention.output.dense": "cross_attention.out",
        "crossattention.output.LayerNorm": "cross_norm",
        "intermediate_query.dense": "query_mlp.up",
        "output_query.dense": "query_mlp.down",
        "output_query.LayerNorm": "query_mlp_norm",
    }
    if text:
        names |= {"intermediate.dense": "mlp.up", "output.dense": "mlp.down", "output.LayerNorm": "mlp_norm"}
    return fused | _pairs(names, layer, block)


def _tables(theirs: str) -> dict:
    """The word and position embeddings of the text branch."""
    return {f"{theirs}{name}_embeddings.weight": f"qformer.embeddings.{name}.weight" for name in ("word", "position")}


QUERIES = {"query_tokens": Rule("qformer.query_tokens", lead=1)}


def lavis_qformer(text: bool) -> dict:
    return {
        **QUERIES,
        **_pairs({"ln_vision": "vision_norm"}),
        **_pairs({"LayerNorm": "norm"}, "Qformer.bert.embeddings.", "qformer.embeddings."),
        "Qformer.bert.embeddings.position_ids": None,  # 0, 1, 2, ...
        **_layers("Qformer.bert.", "self", "qformer.", text),
    }


def bert() -> dict:
    """BertForMaskedLM or BertForPreTraining; token types, pooler and next-sentence head have no place here."""
    unused = ("bert.pooler.dense", "cls.seq_relationship", "cls.predictions.decoder")  # the decoder is the word table
    head = {"transform.dense": "dense", "transform.LayerNorm": "norm"}
    return {
        **_tables("bert.embeddings."),
        **_pairs({"LayerNorm": "norm"}, "bert.embeddings.", "qformer.embeddings."),
        **_layers("bert.", "self", "qformer.", text=True),
        **_pairs(head, "cls.predictions.", "head."),
        "cls.predictions.bias": "head.bias",
        **{f"{name}.{part}": None for name in unused for part in PARTS},
        "bert.embeddings.token_type_embeddings.weight": None,
        "bert.embeddings.position_ids": None,
    }


def transformers_qformer(text: bool, theirs: str = "qformer.", ours: str = "qformer.") -> dict:
    """Blip2QFormerModel's own tensors; its queries and tables belong to the models around it."""
    return {
        **_pairs({"layernorm": "embeddings.norm"}, theirs, ours),
        **_layers(theirs, "attention", ours, text),
    }


# ---- the image encoders


def _eva(theirs: str, ours: str = VISION) -> dict:
    """lavis/models/eva_vit.py; a bias on queries and values alone."""
    block = f"{theirs}blocks.{{}}."
    names = {"norm1": "attention_norm", "attn.proj": "attention.out"}
    names |= {"norm2": "mlp_norm", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
    return {
        f"{theirs}cls_token": Rule(f"{ours}positions.class_token", lead=2),
        f"{theirs}pos_embed": Rule(f"{ours}positions.position", lead=1),
        **_pairs({"patch_embed.proj": "patch_embedding"}, theirs, ours),
        f"{block}attn.qkv.weight": f"{ours}blocks.{{}}.attention.qkv.weight",
        (f"{block}attn.q_bias", f"{block}attn.v_bias"): f"{ours}blocks.{{}}.attention.qkv.bias",
        **_pairs(names, block, f"{ours}blocks.{{}}."),
    }


def _clip(theirs: str, ours: str = VISION) -> dict:
    """lavis/models/clip_vit.py."""
    block = f"{theirs}transformer.resblocks.{{}}."
    names = {"ln_1": "attention_norm", "attn.out_proj": "attention.out"}
    names |= {"ln_2": "mlp_norm", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    return {
        f"{theirs}class_embedding": f"{ours}positions.class_token",
        f"{theirs}positional_embedding": f"{ours}positions.position",
        f"{theirs}conv1.weight": f"{ours}patch_embedding.weight",
        **_pairs({"ln_pre": "input_norm"}, theirs, ours),
        **{f"{block}attn.in_proj_{part}": f"{ours}blocks.{{}}.attention.qkv.{part}" for part in PARTS},
        **_pairs(names, block, f"{ours}blocks.{{}}."),
    }


def _transformers_vision(theirs: str = "vision_model.", ours: str = VISION) -> dict:
    """The bias of queries, keys and values in one; `_query_value_bias` takes the keys' out before."""
    names = {"layer_norm1": "attention_norm", "self_attn.qkv": "attention.qkv", "self_attn.projection": "attention.out"}
    names |= {"layer_norm2": "mlp_norm", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
    return {
        f"{theirs}embeddings.class_embedding": Rule(f"{ours}positions.class_token", lead=2),
        f"{theirs}embeddings.position_embedding": Rule(f"{ours}positions.position", lead=1),
        **_pairs({"embeddings.patch_embedding": "patch_embedding"}, theirs, ours),
        **_pairs(names, f"{theirs}encoder.layers.{{}}.", f"{ours}blocks.{{}}."),
    }


# ---- what a file of each kind is

# What a frozen language model leaves in LAVIS's files: names of tensors that are tied, which its filter does not know.
_LEFT_OVER = dict.fromkeys(
    (
        "opt_model.lm_head.weight",
        "opt_model.model.decoder.embed_tokens.weight",
        "t5_model.shared.weight",
        "t5_model.encoder.embed_tokens.weight",
        "t5_model.decoder.embed_tokens.weight",
        "t5_model.lm_head.weight",
    )
)
_HEAD = {
    **_pairs({"transform.dense": "dense", "transform.LayerNorm": "norm"}, "Qformer.cls.predictions.", "head."),
    "Qformer.cls.predictions.bias": "head.bias",
}


_FINAL = dict.fromkeys(
    ("norm.weight", "norm.bias", "head.weight", "head.bias", "mask_token")
)  # not used: no norm, no head
ENCODERS: dict[str, WeightMap] = {  # the frozen image encoders' own files (eva_vit_g.pth, clip_vit_L.pth)
    "eva": {**_eva("", ""), **_FINAL},
    "clip": {**_clip("", ""), **dict.fromkeys(("ln_post.weight", "ln_post.bias", "proj"))},
}


@dataclass(frozen=True)
class Format:
    """A kind of published file.

    weight_map: of what is ours without the image encoder. vision: the encoder's map, by its kind; in every such file
    where `whole`, in some of them else. lacks: beginnings of our names for which it has no place. copies: a published
    name, and that under which its tensor stands once more.
    """

    stage: int
    weight_map: WeightMap
    vision: Mapping[str, WeightMap]
    whole: bool = False
    lacks: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()


_LAVIS_VISION = {"eva": _eva("visual_encoder."), "clip": _clip("visual_encoder.")}
_TRANSFORMERS_VISION = {"eva": _transformers_vision()}
_PREDICTIONS = "Qformer.cls.predictions."


def _lavis_stage2(projector: str) -> Format:
    weight_map = {**lavis_qformer(text=False), **_pairs({projector: "projector"}), **_LEFT_OVER}
    return Format(2, weight_map, _LAVIS_VISION)


FORMATS: dict[str, Format] = {
    "lavis-stage1": Format(
        1,
        {
            **lavis_qformer(text=True),
            **_tables("Qformer.bert.embeddings."),
            **_HEAD,
            **_pairs({name: name for name in ("vision_proj", "text_proj", "itm_head")}),
            "temp": "temperature",
        },
        _LAVIS_VISION,
        copies=(  # the head's matrix is the word table, and its bias stands there twice
            ("Qformer.bert.embeddings.word_embeddings.weight", f"{_PREDICTIONS}decoder.weight"),
            (f"{_PREDICTIONS}bias", f"{_PREDICTIONS}decoder.bias"),
        ),
    ),
    "lavis-opt": _lavis_stage2("opt_proj"),
    "lavis-t5": _lavis_stage2("t5_proj"),
    "transformers-retrieval": Format(
        1,
        {
            **QUERIES,
            **_pairs({"vision_model.post_layernorm": "vision_norm"}),
            **transformers_qformer(text=True),
            **_tables("embeddings."),
            **_pairs({"vision_projection": "vision_proj", "text_projection": "text_proj", "itm_head": "itm_head"}),
        },
        _TRANSFORMERS_VISION,
        whole=True,
        lacks=("head.", "temperature"),  # it writes no text and is not trained on
    ),
    "transformers-generation": Format(
        2,
        {
            **QUERIES,
            **_pairs({"vision_model.post_layernorm": "vision_norm"}),
            **transformers_qformer(text=False),
            **_pairs({"language_projection": "projector"}),
        },
        _TRANSFORMERS_VISION,
        whole=True,
    ),
}
WEIGHT_MAPS = {name: format.weight_map for name, format in FORMATS.items()}


def detect(keys: set[str]) -> str:
    """Which of FORMATS published keys belong to; ValueError for a stranger."""
    marks = {
        "opt_proj.weight": "lavis-opt",
        "t5_proj.weight": "lavis-t5",
        "Qformer.cls.predictions.bias": "lavis-stage1",
        "language_projection.weight": "transformers-generation",
        "vision_projection.weight": "transformers-retrieval",
    }
    if "query_tokens" in keys:
        for mark, name in marks.items():
            if mark in keys:
                return name
    raise ValueError("these are not BLIP-2 weights: none of the known names is among their keys")


def holds_vision(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file, of ours or published, has an image encoder beside the trained part."""
    ends = ("positions.position", "pos_embed", "positional_embedding", "embeddings.position_embedding")
    return any(key.endswith(ends) for key in tensors)


def without_language(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file of transformers -> (what is not the language model's, the language model's under its own names)."""
    language = {k.removeprefix(LANGUAGE): v for k, v in tensors.items() if k.startswith(LANGUAGE)}
    return {k: v for k, v in tensors.items() if not k.startswith(LANGUAGE)}, language


def with_language(published: Mapping[str, Tensor], language: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `without_language`."""
    return {**published, **{f"{LANGUAGE}{key}": tensor for key, tensor in language.items()}}


def ours_of(
    published: Mapping[str, Tensor], format: str, vision: str, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Published tensors, without a language model, under our names, shapes as in `expected`: the state dict of the
    model and, where the file holds the image encoder, its own behind VISION. vision: the encoder's kind.

    UserError lists what is missing, left over or of another shape, and copies of one tensor that differ.
    """
    tensors, kind = dict(published), FORMATS[format]
    for original, copy in kind.copies:
        if copy in tensors:
            if original not in tensors or not torch.equal(tensors[copy], tensors[original]):
                raise UserError(f"{copy} differs from {original}, but a {format} model has one tensor for both")
            del tensors[copy]
    if format.startswith("transformers"):
        tensors = {key: _query_value_bias(key, tensor) for key, tensor in tensors.items()}
    weight_map = {**kind.weight_map, **_vision_map(kind, format, vision, kind.whole or holds_vision(tensors))}
    wanted = {k: v for k, v in expected.items() if not k.startswith(kind.lacks)} if kind.lacks else expected
    return _fitting(to_ours(tensors, weight_map), vision, wanted)


def published_of(state: Mapping[str, Tensor], format: str, vision: str) -> dict[str, Tensor]:
    """Our state dict (and the image encoder's, behind VISION) under the published names, copies too; without a
    language model. What the kind has no place for is cut."""
    kind = FORMATS[format]
    kept = {k: v for k, v in state.items() if not k.startswith(kind.lacks)} if kind.lacks else dict(state)
    weight_map = {**kind.weight_map, **_vision_map(kind, format, vision, kind.whole or holds_vision(kept))}
    published = to_published(kept, weight_map)
    if format.startswith("transformers"):
        published = {key: _with_key_bias(key, tensor) for key, tensor in published.items()}
    return published | {copy: published[original] for original, copy in kind.copies}


def encoder_of(published: Mapping[str, Tensor], vision: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A frozen image encoder's own file, under our names. Blocks beyond those that are built are left out."""
    layers = sum(key.endswith("attention.qkv.weight") for key in expected)
    tensors = {k: v for k, v in published.items() if _block(k) < layers}
    return _fitting(to_ours(tensors, ENCODERS[vision], None), vision, expected)


def encoder_published(state: Mapping[str, Tensor], vision: str) -> dict[str, Tensor]:
    return to_published(state, ENCODERS[vision])


def _block(key: str) -> int:
    found = re.search(r"(?:^|\.)(?:blocks|resblocks)\.(\d+)\.", key)
    return int(found[1]) if found else -1


def _vision_map(kind: Format, format: str, vision: str, there: bool) -> WeightMap:
    if not there:
        return {}
    if vision not in kind.vision:
        raise UserError(f"{format}: this kind of file has no place for an image encoder of kind {vision}")
    return kind.vision[vision]


def _fitting(ours: dict[str, Tensor], vision: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positions carried to the expected size of pictures, then every name and shape held against the expected."""
    for key, table in ours.items():
        if key.endswith("positions.position") and key in expected and len(table) != len(expected[key]):
            ours[key] = resampled(table, math.isqrt(len(expected[key]) - 1), align_corners=vision == "clip")
    return to_ours(ours, {key: key for key in ours}, {key: tensor.shape for key, tensor in expected.items()})


def resampled(table: Tensor, side: int, align_corners: bool) -> Tensor:
    """Positions (1 + N, C) on a grid of another side, as the official code carries them: bicubic without antialias,
    corners on corners for CLIP and not for EVA (interpolate_pos_embed of clip_vit.py and eva_vit.py)."""
    old = math.isqrt(len(table) - 1)
    picture = rearrange(table[1:].float(), "(h w) c -> 1 c h w", h=old)
    resized = F.interpolate(picture, (side, side), mode="bicubic", align_corners=align_corners)
    return torch.cat([table[:1], rearrange(resized, "1 c h w -> (h w) c").to(table.dtype)])


_QKV_BIAS = re.compile(r"vision_model\.encoder\.layers\.\d+\.self_attn\.qkv\.bias")


def _query_value_bias(key: str, tensor: Tensor) -> Tensor:
    """[q; k; v] -> [q; v]: EVA has none on the keys, where transformers keeps zeros, and one would change nothing."""
    if not _QKV_BIAS.fullmatch(key) or len(tensor) % 3:
        return tensor
    of_q, _, of_v = tensor.chunk(3)
    return torch.cat([of_q, of_v])


def _with_key_bias(key: str, tensor: Tensor) -> Tensor:
    if not _QKV_BIAS.fullmatch(key):
        return tensor
    of_q, of_v = tensor.chunk(2)
    return torch.cat([of_q, torch.zeros_like(of_q), of_v])


def convert(source: Path, target: Path, variant: str, to: str) -> None:
    """Write `source` (any known names; a language model in it stays out) as safetensors under our names (to="ours"), or
    under the published ones of a kind that the weights fit; strict both ways."""
    from papers.blip2.config import VARIANTS
    from papers.blip2.pretrained import as_in, read, state_of
    from shared.weights.load import save_weights

    if to != "ours" and to not in FORMATS:
        raise UserError(f"--to {to}: choose ours, {', '.join(FORMATS)}")
    if to == "transformers-generation":
        raise UserError(f"{target}: --to {to} holds a language model too: name a folder, not a file")
    tensors = read(source)
    config: Blip2Config = as_in(tensors, VARIANTS[variant]())
    state = state_of(tensors, config, source)
    try:
        state = state if to == "ours" else published_of(state, to, config.vision.kind)
        save_weights(state, target, {"variant": variant})
    except UserError as error:
        raise UserError(f"{source} as {to}: {error}") from None
