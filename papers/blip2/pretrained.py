"""Published or own BLIP-2 weights into our models: read from a file or a sharded folder, loaded strictly, joined with
the frozen image encoder and the frozen language model that they were trained between."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from papers.blip2.config import CLIP_VIT_L, EVA_VIT_G, VARIANTS, Blip2Config, VisionConfig, at
from papers.blip2.converter import (
    FORMATS,
    VISION,
    bert,
    detect,
    encoder_of,
    holds_vision,
    ours_of,
    without_language,
)
from papers.blip2.model import Blip2, Blip2Qformer, vision_encoder
from shared.backbones.vision import Encoder, vit_encoder
from shared.core.errors import UserError
from shared.weights.fetch import cached
from shared.weights.load import check_card
from shared.weights.manifest import Entry, load_manifest
from shared.weights.safe_load import read_header, read_tensors
from shared.weights.weight_map import to_ours

if TYPE_CHECKING:
    from shared.nn.causal_lm import LanguageModel

TASKS = {"-retrieval-coco": (364, 35), "-caption-coco": (364, None)}  # an entry's ending -> picture size, text tokens
ENCODER_ENTRIES = {"eva": "blip2-eva-vit-g", "clip": "blip2-clip-vit-l"}  # of the published variants' frozen encoders
PUBLISHED_ENCODERS = {"eva-vit-g": EVA_VIT_G, "clip-vit-l": CLIP_VIT_L}  # as recipes name them
INDEX = "model.safetensors.index.json"


class Loaded(NamedTuple):
    """A model of either stage in eval mode, and the image encoder where the file held it."""

    model: Blip2Qformer | Blip2
    encoder: Encoder | None


def card_of(config: Blip2Config) -> dict:
    """What a manifest entry states of preprocessing, tokenizer and encoder, as this configuration has it."""
    vision = config.vision
    preprocess = {
        "size": vision.image_size,
        "resize": vision.resize,
        "antialias": True,
        "mean": list(vision.mean),
        "std": list(vision.std),
    }
    tokenizer = {"kind": config.tokenizer, "vocabulary": config.vocabulary, "context": config.context}
    if config.language is not None:
        tokenizer = {"kind": config.language.family, "vocabulary": config.language.vocabulary}
    encoder = {"activation": vision.activation, "norm_eps": vision.eps}
    return {"preprocess": preprocess, "tokenizer": tokenizer, "config": encoder}


def config_of(id: str) -> Blip2Config:
    """The configuration of a manifest entry's weights."""
    ending = next((one for one in TASKS if id.endswith(one)), "")
    config = VARIANTS[id.removesuffix(ending)]()
    return at(TASKS[ending][0], config, TASKS[ending][1]) if ending else config


# ---- reading


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file, or of a folder with one safetensors file or its shards."""
    if path.is_file():
        return read_tensors(path)
    if (path / "model.safetensors").is_file():
        return read_tensors(path / "model.safetensors")
    if not (path / INDEX).is_file():
        raise UserError(f"{path}: no such file, nor a folder with model.safetensors or {INDEX}")
    try:
        places = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
        strange = [name for name in shards if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise UserError(f"{path / INDEX}: no index of shards ({type(wrong).__name__}); fetch the folder anew") from None
    missing = [name for name in shards if not (path / name).is_file()]
    if strange or missing:
        raise UserError(f"{path}: shards missing: {', '.join((strange + missing)[:4])}; fetch the folder anew")
    tensors = {key: tensor for name in shards for key, tensor in read_tensors(path / name).items()}
    if lost := sorted(set(places) - set(tensors)):
        raise UserError(
            f"{path}: its index promises {', '.join(lost[:4])}, which no shard holds; fetch the folder anew"
        )
    return tensors


def holds_encoder(path: Path) -> bool:
    """Whether a weights file or folder has the image encoder too."""
    if path.is_dir():
        return True  # transformers' form
    return holds_vision(read_header(path))


def as_in(tensors: Mapping[str, Tensor], config: Blip2Config) -> Blip2Config:
    """The configuration with what a file fixes beside its variant: picture size, number of queries, vocabulary."""
    for key, table in tensors.items():
        if key.endswith(("positions.position", "pos_embed", "positional_embedding", "embeddings.position_embedding")):
            side = isqrt(table.shape[-2] - 1) * config.vision.patch
            config = replace(config, vision=replace(config.vision, image_size=side))
        if key in ("query_tokens", "qformer.query_tokens"):
            config = replace(config, queries=table.shape[-2])
        if key == "qformer.embeddings.word.weight" and config.tokenizer != "bert-wordpiece":
            config = replace(config, vocabulary=len(table))  # a small tokenizer has as many words as its texts gave
    return config


def state_of(tensors: Mapping[str, Tensor], config: Blip2Config, place: object) -> dict[str, Tensor]:
    """Tensors under any names that are known -> our state dict, with the image encoder's behind VISION where it is
    there; every name and shape is held against the configuration. A language model in the file is left out."""
    tensors, _ = without_language(tensors)
    try:
        format = detect(set(tensors))
    except ValueError as stranger:
        if "qformer.query_tokens" not in tensors:
            raise UserError(f"{place}: {stranger}") from None
        format = "ours"
    expected = expected_of(config, _stage(tensors, format), holds_vision(tensors))
    try:
        if format != "ours":
            _check_speaker(tensors, format, config)
            return ours_of(tensors, format, config.vision.kind, expected)
        lacks = FORMATS["transformers-retrieval"].lacks
        if "projector.weight" not in tensors and not any(key.startswith(lacks) for key in tensors):
            expected = {key: value for key, value in expected.items() if not key.startswith(lacks)}
        shapes = {key: tensor.shape for key, tensor in expected.items()}
        return to_ours(tensors, {key: key for key in tensors}, shapes)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _stage(tensors: Mapping[str, Tensor], format: str) -> int:
    if format != "ours":
        return FORMATS[format].stage
    return 2 if "projector.weight" in tensors else 1


def _check_speaker(tensors: Mapping[str, Tensor], format: str, config: Blip2Config) -> None:
    """UserError for a file whose language model is of another kind than the variant's."""
    wanted = {"lavis-opt": "causal", "lavis-t5": "seq2seq"}.get(format)
    if config.language is not None and wanted and config.language.kind != wanted:
        raise UserError(f"a {format} file, but {config.language.name} is {config.language.kind}: another variant's")


def expected_of(config: Blip2Config, stage: int, vision: bool) -> dict[str, Tensor]:
    """Names and shapes of our state dict, on the meta device."""
    with torch.device("meta"):
        model = Blip2Qformer(config) if stage == 1 else Blip2(config, Silent(config))
        state = dict(model.state_dict())
        if vision:
            state |= {f"{VISION}{key}": tensor for key, tensor in vision_encoder(config.vision).state_dict().items()}
    return state


class Silent(nn.Module):
    """What stands for a language model where only its sizes count."""

    def __init__(self, config: Blip2Config):
        super().__init__()
        if config.language is None:
            raise UserError(
                "these are weights of stage 2, but the variant has no language model: give that of a row of Table 2"
            )
        self.kind, self.width = config.language.kind, config.language.width
        self.vocabulary, self.context = config.language.vocabulary, config.language.context


# ---- models


def load_file(path: Path, config: Blip2Config, language_model: LanguageModel | None = None) -> Loaded:
    """A weights file or folder under any of the names that converter.py knows, or our own: the model that it is of, in
    eval mode, with the picture size and the queries that it has. Without a language model a model of stage 2 can give
    its prefix alone."""
    tensors = read(path)
    config = as_in(tensors, config)
    state = state_of(tensors, config, path)
    own = {key: tensor for key, tensor in state.items() if not key.startswith(VISION)}
    if "projector.weight" in own:
        model = Blip2(config, language_model or Silent(config))
        if model.projector.out_features != len(own["projector.weight"]):
            raise UserError(
                f"{path}: its projector gives {len(own['projector.weight'])} numbers, but the language model reads "
                f"{model.projector.out_features}: another variant's"
            )
    else:
        model = Blip2Qformer(config)
        if "temperature" not in own:  # a file of transformers cannot write texts, nor be trained on
            model.head = None
            own["temperature"] = model.temperature.detach()
    model.load_state_dict(own, strict=True)
    seen = {key.removeprefix(VISION): tensor for key, tensor in state.items() if key.startswith(VISION)}
    return Loaded(model.eval(), encoder_with(seen, config.vision) if seen else None)


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
    try:
        found = encoder_of(read(path), vision.kind, expected)
        return encoder_with(found, vision, dtype, matrices=dtype == torch.float16)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def published_encoder(named: str, layer: str, manifest: str | Path, half: bool) -> Encoder:
    """A frozen encoder as a recipe names it: `eva-vit-g`, `clip-vit-l 364 weights/clip_vit_L.pth`, the size of pictures
    and the file where they are not 224 and the cache's. half: as load_encoder has it, float16 where there is a GPU.

    Its second-last layer is the last that was published.
    """
    name, *given = named.split()
    vision = PUBLISHED_ENCODERS[name]
    if layer != "second-last":
        raise UserError(f"{name}: published without its last block, so there is no layer '{layer}': take second-last")
    for one in given:
        if one.isdigit():
            vision = replace(vision, image_size=int(one))
    files = [one for one in given if not one.isdigit()]
    entry = load_manifest(manifest)[ENCODER_ENTRIES[vision.kind]]
    place = Path(files[0]).expanduser() if files else entry.sha256 and cached(entry)
    if not place or not place.is_file():
        wanted = place or entry.file
        raise UserError(
            f"{wanted}: no such file; the frozen image encoder is {entry.what} ({entry.origin}): get it, and give "
            f"encoder='{name} PATH'"
        )
    dtype = torch.float16 if torch.cuda.is_available() else torch.bfloat16
    return load_encoder(place, vision, dtype if half else None)


# ---- what stage 1 starts from


def read_bert(path: Path) -> dict[str, Tensor]:
    """A file of bert-base-uncased; UserError says how to get it."""
    if not path.is_file():
        command = f"hf download google-bert/bert-base-uncased {path.name} --local-dir {path.parent}"
        raise UserError(f"{path}: no such file; the Q-Former starts from BERT-base: {command}")
    return read_tensors(path)


def from_bert(model: Blip2Qformer, published: Mapping[str, Tensor]) -> None:
    """In place: BERT into self-attention, text and word head of the Q-Former, its feed-forward layers into those of the
    queries too (Sec. 3.1). Queries, cross-attention, [DEC] and the other heads keep their initialisation.

    published: transformers' names of BertForMaskedLM or BertForPreTraining, old and new. Strict and total.
    """
    config, own = model.config, model.state_dict()
    apart = (".cross_", ".query_")
    shapes = {
        key: tensor.shape
        for key, tensor in own.items()
        if key.startswith(("qformer.embeddings.", "qformer.layers.", "head.")) and not any(one in key for one in apart)
    }
    longer = ("qformer.embeddings.word.weight", "head.bias")  # by [DEC], which stands behind BERT's words
    for key in longer:
        shapes[key] = (config.decode_token, *shapes[key][1:])
    ours = to_ours({_renamed(key): tensor for key, tensor in published.items()}, bert(), shapes)
    for key in longer:
        ours[key] = torch.cat([ours[key], own[key][config.decode_token :]])
    model.load_state_dict(own | ours, strict=True)
    model.qformer.copy_text_branch()


def _renamed(key: str) -> str:
    """The oldest files write LayerNorm.gamma and LayerNorm.beta."""
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def encoder_beside(weights: Path, config: Blip2Config, manifest: Path) -> Path:
    """Where the frozen encoder of a published variant lies: beside the weights, else in the cache. UserError: where it
    would have to."""
    entry = load_manifest(manifest)[ENCODER_ENTRIES[config.vision.kind]]
    beside = weights.with_name(entry.file)
    place = beside if beside.is_file() or entry.sha256 is None else cached(entry)
    if place is None or not place.is_file():
        raise UserError(f"{beside}: no such file; the frozen image encoder is {entry.what} ({entry.origin})")
    return place


def check_entry(entry: Entry) -> None:
    """UserError where an entry of the manifest and the model that it becomes disagree."""
    check_card(entry, card_of(config_of(entry.id)))
