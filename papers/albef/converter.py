"""Published ALBEF weights <-> ours: the names of the official code, total and strict, both ways.

A published file numbers the 12 layers of one BERT through, where ours has two stacks, and writes a shared tensor once
for every place that uses it. Such copies have to be equal on the way in, and are written out again on the way back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from papers.albef.config import VARIANTS, AlbefConfig
from papers.albef.model import Albef, AlbefPretraining
from papers.albef.tasks import (
    AlbefRetrieval,
    AlbefVqa,
    Distilled,
    Entailment,
    Nlvr2,
    PairEncoder,
    QuestionAnswering,
    TextAssignment,
)
from shared.core.errors import UserError
from shared.weights.weight_map import Rule, WeightMap, carried_to, to_ours, to_published

PARTS = ("weight", "bias")


def _pairs(names: Mapping[str, str], theirs: str = "", ours: str = "") -> dict:
    """Weight and bias of every module."""
    return {f"{theirs}{a}.{part}": f"{ours}{b}.{part}" for a, b in names.items() for part in PARTS}


def vit(theirs: str, ours: str) -> dict:
    """timm's names of a ViT, which the official code has too."""
    names = {
        "norm1": "attention_norm",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.out",
        "norm2": "mlp_norm",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    }
    return {
        f"{theirs}cls_token": Rule(f"{ours}positions.class_token", lead=2),
        f"{theirs}pos_embed": Rule(f"{ours}positions.position", lead=1),
        **_pairs({"patch_embed.proj": "patch_embedding", "norm": "output_norm"}, theirs, ours),
        **_pairs(names, f"{theirs}blocks.{{}}.", f"{ours}blocks.{{}}."),
    }


def bert_embeddings(theirs: str, ours: str) -> dict:
    tables = {"word": "word", "position": "position", "token_type": "token_type"}
    return {
        **{f"{theirs}{a}_embeddings.weight": f"{ours}{b}.weight" for a, b in tables.items()},
        **_pairs({"LayerNorm": "norm"}, theirs, ours),
        f"{theirs}position_ids": None,  # 0, 1, 2, ...
    }


def bert_layer(theirs: str, ours: str, cross: bool) -> dict:
    names = {
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
        "output.LayerNorm": "mlp_norm",
    }
    fused = {"attention.qkv": [f"attention.self.{name}" for name in ("query", "key", "value")]}
    if cross:
        names |= {"crossattention.output.dense": "cross_attention.out", "crossattention.output.LayerNorm": "cross_norm"}
        names |= {"crossattention.self.query": "cross_attention.q"}
        fused["cross_attention.kv"] = [f"crossattention.self.{name}" for name in ("key", "value")]
    return _pairs(names, theirs, ours) | {
        tuple(f"{theirs}{source}.{part}" for source in sources): f"{ours}{target}.{part}"
        for target, sources in fused.items()
        for part in PARTS
    }


def word_head(theirs: str, ours: str) -> dict:
    return _pairs({"transform.dense": "dense", "transform.LayerNorm": "norm"}, theirs, ours) | {
        f"{theirs}bias": f"{ours}bias"
    }


def two_stacks(theirs: str, ours: str, text: int, fusion: int) -> dict:
    """One published BERT: the first `text` layers are our text encoder, the other `fusion` our multimodal encoder."""
    table = bert_embeddings(f"{theirs}embeddings.", f"{ours}text_encoder.embeddings.")
    for index in range(text):
        table |= bert_layer(f"{theirs}encoder.layer.{index}.", f"{ours}text_encoder.layers.{index}.", cross=False)
    for index in range(fusion):
        place = f"{theirs}encoder.layer.{text + index}."
        table |= bert_layer(place, f"{ours}multimodal_encoder.{index}.", cross=True)
    return table


def _encoders(config: AlbefConfig, ours: str, momentum: str = "", bert: str = "", pictures: int = 1) -> dict:
    """The encoders of one copy; momentum "_m" for the other, `bert` what stands before the names of BERT's modules."""
    layers = config.text_layers, config.fusion_layers * pictures
    return {
        **vit(f"visual_encoder{momentum}.", f"{ours}vision_encoder."),
        **two_stacks(f"text_encoder{momentum}.{bert}", ours, *layers),
    }


QUEUE_IDS = "queue.ids"  # of the pictures in the queue: retrieval alone looks at them, and publishes them
BOTH = (("", "student."), ("_m", "teacher."))  # the trained copy and its average


def pretraining(config: AlbefConfig) -> WeightMap:
    table: dict = {}
    for momentum, ours in BOTH:
        table |= _encoders(config, ours, momentum, bert="bert.")
        table |= word_head(f"text_encoder{momentum}.cls.predictions.", f"{ours}mlm_head.")
        table |= _pairs({f"{name}_proj{momentum}": f"{name}_proj" for name in ("vision", "text")}, "", ours)
    return table | _matching() | {"queue_ptr": Rule("queue.next", lead=1)}


def _matching() -> dict:
    return {
        **_pairs({"itm_head": "student.itm_head"}),
        "temp": "student.temperature",
        "image_queue": Rule("queue.images", transpose=True),
        "text_queue": Rule("queue.texts", transpose=True),
    }


def retrieval(config: AlbefConfig) -> WeightMap:
    table: dict = {}
    for momentum, ours in BOTH:
        table |= _encoders(config, ours, momentum)
        table |= _pairs({f"{name}_proj{momentum}": f"{name}_proj" for name in ("vision", "text")}, "", ours)
    return table | _matching() | {"queue_ptr": Rule("queue.next", lead=1), "idx_queue": Rule("queue.ids", lead=1)}


def entailment(config: AlbefConfig) -> WeightMap:
    table: dict = {}
    for momentum, ours in BOTH:
        table |= _encoders(config, f"{ours}encoder.", momentum)
        table |= _pairs({f"cls_head{momentum}.{place}": f"head.{place}" for place in (0, 2)}, "", ours)
    return table


def nlvr2(config: AlbefConfig) -> WeightMap:
    table: dict = {}
    for momentum, ours in BOTH:
        table |= _encoders(config, f"{ours}pair.encoder.", momentum, pictures=2)
        table |= _pairs({f"cls_head{momentum}.{place}": f"head.{place}" for place in (0, 2)}, "", ours)
    return table


def text_assignment(config: AlbefConfig) -> WeightMap:
    return {
        **_encoders(config, "pair.encoder.", pictures=2),
        **_pairs({"ta_head": "head"}),
        **_pairs({f"{name}_proj": f"pair.encoder.{name}_proj" for name in ("vision", "text")}),
        "temp": "pair.encoder.temperature",
    }


def vqa(config: AlbefConfig) -> WeightMap:
    table: dict = {}
    for momentum, ours in BOTH:
        theirs, decoder = f"text_decoder{momentum}.bert.", f"{ours}text_decoder."
        table |= _encoders(config, f"{ours}encoder.", momentum)
        table |= bert_embeddings(f"{theirs}embeddings.", f"{decoder}embeddings.")
        table |= bert_layer(f"{theirs}encoder.layer.{{}}.", f"{decoder}layers.{{}}.", cross=True)
        table |= word_head(f"text_decoder{momentum}.cls.predictions.", f"{decoder}head.")
    return table


@dataclass(frozen=True)
class Format:
    """A kind of published file: its map, and the model that it fills (config, with a momentum copy or without)."""

    weight_map: Callable[[AlbefConfig], WeightMap]
    make: Callable[[AlbefConfig, bool], nn.Module]


FORMATS: dict[str, Format] = {
    "pretraining": Format(pretraining, lambda config, _: AlbefPretraining(Albef(config))),
    "retrieval": Format(retrieval, lambda config, _: AlbefRetrieval(Albef(config))),
    "vqa": Format(vqa, lambda config, distil: AlbefVqa(QuestionAnswering(Albef(config)), config.momentum, distil)),
    "entailment": Format(
        entailment, lambda config, distil: Distilled(Entailment(Albef(config)), config.momentum, distil)
    ),
    "nlvr2": Format(
        nlvr2, lambda config, distil: Distilled(Nlvr2(PairEncoder(Albef(config))), config.momentum, distil)
    ),
    "text-assignment": Format(text_assignment, lambda config, _: TextAssignment(PairEncoder(Albef(config)))),
}
WEIGHT_MAPS = {name: format.weight_map(VARIANTS["albef-base"]()) for name, format in FORMATS.items()}

# The word head's matrix is the word table, and its bias stands there twice.
_COPIES = (
    (r"(text_(?:en|de)coder(?:_m)?)\.bert\.embeddings\.word_embeddings\.weight", r"\1.cls.predictions.decoder.weight"),
    (r"(text_(?:en|de)coder(?:_m)?)\.cls\.predictions\.bias", r"\1.cls.predictions.decoder.bias"),
)


def detect(published: Mapping[str, Tensor]) -> str:
    """Which of FORMATS tensors with published names belong to; ValueError for a stranger."""
    if "visual_encoder.cls_token" in published:
        marks = {
            "text_decoder.cls.predictions.bias": "vqa",
            "ta_head.weight": "text-assignment",
            "idx_queue": "retrieval",
            "text_encoder.bert.embeddings.word_embeddings.weight": "pretraining",
        }
        for mark, format in marks.items():
            if mark in published:
                return format
        if "cls_head.2.weight" in published:
            return "entailment" if len(published["cls_head.2.weight"]) == 3 else "nlvr2"
    raise ValueError("these are not ALBEF weights: none of the known names is among their keys")


def detect_own(names: Container[str]) -> str | None:
    """Which of FORMATS tensors under our own names belong to, 'model' for the model alone, None for other names."""
    kinds = {
        "student.text_decoder.head.bias": "vqa",
        "student.pair.encoder.vision_encoder.positions.class_token": "nlvr2",
        "student.encoder.vision_encoder.positions.class_token": "entailment",
        "pair.encoder.vision_encoder.positions.class_token": "text-assignment",
        "student.mlm_head.bias": "pretraining",
        "queue.images": "retrieval",
        "multimodal_encoder.0.mlp.up.weight": "model",
    }
    return next((kind for mark, kind in kinds.items() if mark in names), None)


def ours_of(published: Mapping[str, Tensor], format: str, config: AlbefConfig, model: nn.Module) -> dict[str, Tensor]:
    """Published tensors under the names of `model`, of FORMATS[format] and this configuration.

    Positions for another picture size are interpolated as the official code does, in both copies. UserError lists what
    is missing, left over or of another shape, and copies of one tensor that differ.
    """
    tensors = dict(published)
    for copy, original in _copies(tensors).items():
        if copy in tensors:
            if not torch.equal(tensors[copy], tensors[original]):
                raise UserError(f"{copy} differs from {original}, but the model has one tensor for both")
            del tensors[copy]
    ours = to_ours(tensors, _present(FORMATS[format].weight_map(config), model))
    if format == "pretraining":
        ours[QUEUE_IDS] = torch.full_like(model.state_dict()[QUEUE_IDS], -1)
    _refuse_untied(ours, model)
    return carried_to(model.state_dict(), ours)


def published_of(state: Mapping[str, Tensor], format: str, config: AlbefConfig, model: nn.Module) -> dict[str, Tensor]:
    """Our state dict under the published names, whole: copies and numbered positions too."""
    if format == "pretraining":
        state = {key: tensor for key, tensor in state.items() if key != QUEUE_IDS}
    published = to_published(state, _present(FORMATS[format].weight_map(config), model))
    tables = [key for key in published if key.endswith(".position_embeddings.weight")]
    for key in tables:
        numbers = torch.arange(len(published[key]))[None]
        published[key.replace("position_embeddings.weight", "position_ids")] = numbers
    return published | {copy: published[original] for copy, original in _copies(published).items()}


def _present(weight_map: WeightMap, model: nn.Module) -> WeightMap:
    """Without the rows of a momentum copy that the model was made without."""
    if getattr(model, "teacher", True) is not None:
        return weight_map
    return {key: rule for key, rule in weight_map.items() if not any("_m." in name for name in _names(key))}


def _names(key: str | tuple[str, ...]) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def _copies(names: Mapping[str, Tensor]) -> dict[str, str]:
    """{copy: original}."""
    return {
        re.sub(pattern, copy, name): name for name in names for pattern, copy in _COPIES if re.fullmatch(pattern, name)
    }


def _refuse_untied(ours: Mapping[str, Tensor], model: nn.Module) -> None:
    """Keys and values that two layers share stand there twice, and have to be equal."""
    first: dict[int, str] = {}
    for key, tensor in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(tensor), key)
        if other != key and key in ours and other in ours and not torch.equal(ours[key], ours[other]):
            raise UserError(f"{key} differs from {other}, but the two layers share one tensor")


def filled(published: Mapping[str, Tensor], config: AlbefConfig) -> nn.Module:
    """The model that a published file is of, with its weights, in eval mode. ValueError for a stranger."""
    format = detect(published)
    if "image_queue" in published:
        config = replace(config, queue=published["image_queue"].shape[1])
    model = FORMATS[format].make(config, any(key.startswith("visual_encoder_m.") for key in published))
    model.load_state_dict(ours_of(published, format, config, model), strict=True)
    return model.eval()


def refilled(tensors: Mapping[str, Tensor], kind: str, config: AlbefConfig) -> nn.Module:
    """The model of a file under our own names, of a kind that `detect_own` gives, with its weights, in eval mode."""
    if "queue.images" in tensors:
        config = replace(config, queue=len(tensors["queue.images"]))
    if kind == "model":
        model: nn.Module = Albef(config)
    else:
        model = FORMATS[kind].make(config, any(key.startswith("teacher.") for key in tensors))
    state = carried_to(model.state_dict(), tensors)
    _refuse_untied(state, model)
    model.load_state_dict(state, strict=True)
    return model.eval()


def convert(source: Path, target: Path, variant: str, to: str) -> None:
    """Write `source` (any known names) as safetensors under our names (to="ours") or the published ones of a kind that
    the weights fit; strict both ways."""
    from papers.albef.pretrained import load_any
    from shared.weights.load import save_weights

    if to != "ours" and to not in FORMATS:
        raise UserError(f"--to {to}: choose ours, {', '.join(FORMATS)}")
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    config = VARIANTS[variant]()
    model = load_any(source, config)
    state = model.state_dict()
    config = getattr(model, "config", config)
    save_weights(state if to == "ours" else published_of(state, to, config, model), target, {"variant": variant})
