"""Published or own BLIP weights into our models: fetched by the manifest, held against its card, loaded strictly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path

from torch import Tensor, nn

from papers.blip.config import SPECIALS, VARIANTS, BlipConfig, caption, nlvr, retrieval, vqa, with_tokenizer
from papers.blip.converter import FORMATS, detect, ours_of
from papers.blip.model import OWN_IN_DECODER, Blip, BlipPretraining
from papers.blip.tasks import BlipDialogue, BlipNlvr, BlipVqa
from shared.core.errors import UserError
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bert import BertTokenizer
from shared.tokenizers.load import load_tokenizer
from shared.weights.fetch import fetch
from shared.weights.load import check_card
from shared.weights.manifest import Entry, load_manifest
from shared.weights.safe_load import read_tensors
from shared.weights.weight_map import to_ours

TASKS: dict[str, Callable[[BlipConfig], BlipConfig]] = {  # what a manifest entry's name ends in -> its sizes
    "-caption-coco": caption,
    "-retrieval-coco": retrieval,
    "-retrieval-flickr30k": retrieval,
    "-vqa": vqa,
    "-nlvr2": nlvr,
}
RELEASED = {  # the weights that a use of a variant takes
    ("blip-base", "caption"): "blip-base-capfilt-l-caption-coco",
    ("blip-base-capfilt-l", "caption"): "blip-base-capfilt-l-caption-coco",
    ("blip-large", "caption"): "blip-large-caption-coco",
    ("blip-base", "ask"): "blip-base-capfilt-l-vqa",
    ("blip-base-capfilt-l", "ask"): "blip-base-capfilt-l-vqa",
    ("blip-base-129m", "ask"): "blip-base-129m-vqa",
    ("blip-base", "retrieval"): "blip-base-129m-retrieval-coco",
    ("blip-base-129m", "retrieval"): "blip-base-129m-retrieval-coco",
    ("blip-large", "retrieval"): "blip-large-retrieval-coco",
}


def card_of(config: BlipConfig) -> dict:
    """What a manifest entry states of preprocessing and tokenizer, as this configuration has it."""
    return {
        "preprocess": {
            "size": config.image_size,
            "resize": config.resize,
            "antialias": True,
            "mean": list(config.mean),
            "std": list(config.std),
        },
        "tokenizer": {"kind": config.tokenizer, "vocabulary": config.vocabulary, "context": config.context},
    }


def config_of(id: str) -> BlipConfig:
    """The configuration of a manifest entry's weights."""
    size = VARIANTS["blip-large" if id.startswith("blip-large") else "blip-base"]()
    return next((task(size) for ending, task in TASKS.items() if id.endswith(ending)), size)


def load_released(entry: Entry) -> nn.Module:
    """The published weights of a manifest entry, in fp32, in eval mode: the model of their task. UserError where entry
    and model disagree."""
    config = config_of(entry.id)
    check_card(entry, card_of(config))
    return load_file(fetch(entry), config)


def load_file(path: Path, config: BlipConfig) -> nn.Module:
    """A weights file under any of the names that converter.py knows, or our own: the model that it is of, with the
    picture size, queue and sharing that it has, in eval mode."""
    tensors = read_tensors(path)
    try:
        format = detect(set(tensors))
    except ValueError as stranger:
        if not any(key.endswith("vision_encoder.positions.position") for key in tensors):
            raise UserError(f"{path}: {stranger}") from None
        format = "ours"
    try:
        model = _own(tensors, config) if format == "ours" else FORMATS[format].make(as_in(tensors, config))
        if format == "ours":
            shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
            state = to_ours(tensors, {key: key for key in tensors}, shapes)
        else:
            state = ours_of(tensors, format, model.state_dict())
        model.load_state_dict(state, strict=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return model.eval()


def as_in(tensors: Mapping[str, Tensor], config: BlipConfig) -> BlipConfig:
    """The configuration with what a file fixes beside its variant: picture size, queue, what MED shares."""
    found = {}
    for key, table in tensors.items():
        if key.endswith(("visual_encoder.pos_embed", "position_embedding", "vision_encoder.positions.position")):
            found["image_size"] = isqrt(table.shape[-2] - 1) * config.patch
    if "image_queue" in tensors:
        found["queue"] = tensors["image_queue"].shape[1]
    if "queue.images" in tensors:
        found["queue"] = len(tensors["queue.images"])
    decoder = next((key.removesuffix("head.bias") for key in tensors if key.endswith("text_decoder.head.bias")), None)
    if decoder:
        own = {
            part for part in OWN_IN_DECODER["none"] if any(k.startswith(f"{decoder}layers.0.{part}.") for k in tensors)
        }
        # a file that lacks parts fits none; strict loading then says which
        modes = (name for name, parts in OWN_IN_DECODER.items() if own == set(parts))
        found["sharing"] = next(modes, config.sharing)
    elif "queue_ptr" in tensors:  # the authors' pre-trained files
        found["sharing"] = "all_but_sa"
    return replace(config, **found)


def _own(tensors: Mapping[str, Tensor], config: BlipConfig) -> nn.Module:
    """An empty model for a file of ours."""
    config = as_in(tensors, config)

    def has(part: str) -> bool:
        return any(key.startswith(part) for key in tensors)

    if has("blip."):
        return BlipPretraining(config, decoder=has("blip.text_decoder."))
    if has("classifier."):
        return BlipNlvr(config)
    if has("vision_proj.") or not has("text_encoder."):
        return Blip(config, encoder=has("text_encoder."), decoder=has("text_decoder."))
    return BlipDialogue(config) if has("itm_head.") else BlipVqa(config)


def load_model(
    variant: str, weights: Path | None, tokenizer: Path | None, manifest: Path, use: str
) -> tuple[nn.Module, Tokenizer]:
    """A model for a use (caption | ask | retrieval) and its tokenizer: the manifest's weights, or a local file with the
    tokenizer.json that it was trained with. A training's file gives its Blip; whether that can do what is asked, it
    says itself."""
    if weights is None:
        id = RELEASED.get((variant, use))
        if id is None:
            known = ", ".join(name for name, of in RELEASED if of == use)
            raise UserError(f"{variant}: no released weights to {use} with; choose {known}, or give --weights")
        entry = load_manifest(manifest)[id]
        return useful(load_released(entry), use, id), BertTokenizer.uncased(specials=SPECIALS)
    if not weights.is_file():
        raise UserError(f"{weights}: no such file; --weights takes a safetensors file or a published .pth")
    config = VARIANTS[variant]()
    if config.tokenizer == "bert-wordpiece":
        return useful(load_file(weights, config), use, weights), BertTokenizer.uncased(specials=SPECIALS)
    tokenizer = tokenizer or weights.with_name("tokenizer.json")
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer}: no such file; --tokenizer takes the tokenizer.json written beside the weights")
    words = load_tokenizer(tokenizer)
    return useful(load_file(weights, with_tokenizer(config, words)), use, weights), words


def useful(model: nn.Module, use: str, place: object) -> nn.Module:
    """The model itself, without what only training needs; UserError where it cannot do what is asked."""
    model = model.blip if isinstance(model, BlipPretraining) else model
    able = {
        "caption": isinstance(model, Blip) and model.text_decoder is not None,
        "retrieval": isinstance(model, Blip) and model.text_encoder is not None,
        "ask": isinstance(model, BlipVqa),
    }
    if not able[use]:
        can = ", ".join(name for name, does in able.items() if does) or "none of caption, retrieval, ask"
        raise UserError(f"{place}: these weights cannot {use}, they are for: {can}; give others by --weights")
    return model
