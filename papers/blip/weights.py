"""BLIP's weights in and out: the authors' names and those of transformers, total and strict, both ways; released ones
and those trained here; folders that transformers loads.

A published file writes a shared tensor once for every place that uses it. Such copies have to be equal on the way in,
and are written out again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from papers.blip.config import SPECIALS, VARIANTS, BlipConfig, caption, nlvr, retrieval, vqa, with_tokenizer
from papers.blip.med import OWN_IN_DECODER
from papers.blip.model import Blip, BlipPretraining, copied
from papers.blip.tasks import BlipDialogue, BlipNlvr, BlipVqa
from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.report.model_card import model_card
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bert import BertTokenizer
from shared.tokenizers.load import bert_files, tokenizer_beside
from shared.weights import formats
from shared.weights.export import HfSpec, check_export, export_hf, preprocessor_config, whole_square
from shared.weights.fetch import fetch
from shared.weights.formats import (
    WeightFormat,
    load_pretrained,
    map_bert,
    map_bert_embeddings,
    map_bert_layer,
    map_cross_attention,
    map_token_head,
    map_transformers_vit,
    map_vit,
    model_of,
    rows,
    words_in,
)
from shared.weights.load import card, check_card, text_card
from shared.weights.manifest import Entry, load_manifest
from shared.weights.weight_map import Rule

# ---- the authors' names (models/vit.py, models/med.py)


def _nlvr_encoder(source: str, target: str) -> dict:
    layer, block = f"{source}encoder.layer.{{}}.", f"{target}layers.{{}}."
    cross, ours = f"{layer}crossattention.", f"{block}cross_attention."
    return {
        **map_bert_embeddings(f"{source}embeddings.", f"{target}embeddings."),
        **map_bert_layer(layer, block, cross=False),
        **map_cross_attention(f"{cross}self0", f"{cross}output.dense0", f"{ours}first"),
        **map_cross_attention(f"{cross}self1", f"{cross}output.dense1", f"{ours}second"),
        **rows({f"{cross}output.merge_layer": f"{ours}merge", f"{cross}output.LayerNorm": f"{block}cross_norm"}),
    }


HEADS = ("vision_proj", "text_proj", "itm_head")
VISION = map_vit("visual_encoder.", "vision_encoder.")
TEXT = map_bert("text_encoder.", "text_encoder.")
DECODER = {
    **map_bert("text_decoder.bert.", "text_decoder."),
    **map_token_head("text_decoder.cls.predictions.", "text_decoder.head."),
}

CONTRAST = {
    **map_vit("visual_encoder.", "blip.vision_encoder."),
    **map_bert("text_encoder.", "blip.text_encoder."),
    **rows(HEADS, "", "blip."),
    **map_vit("visual_encoder_m.", "momentum.vision_encoder."),
    **map_bert("text_encoder_m.", "momentum.text_encoder."),
    **rows({"vision_proj_m": "momentum.vision_proj", "text_proj_m": "momentum.text_proj"}),
    "temp": "temperature",
    "image_queue": Rule("queue.images", transpose=True),
    "text_queue": Rule("queue.texts", transpose=True),
}
PRETRAINING = {  # encoder and decoder have all in common but self-attention and the decoder's head
    **CONTRAST,
    **map_bert_layer("text_decoder.bert.encoder.layer.{}.", "blip.text_decoder.layers.{}.", cross=False, mlp=False),
    **map_token_head("text_decoder.cls.predictions.", "blip.text_decoder.head."),
    "queue_ptr": Rule("queue.next", lead=1),
}
RETRIEVAL = {**CONTRAST, "idx_queue": Rule("queue.ids", lead=1), "ptr_queue": Rule("queue.next", lead=1)}
NLVR = {
    **VISION,
    **_nlvr_encoder("text_encoder.", "text_encoder."),
    **rows({"cls_head.0": "classifier.0", "cls_head.2": "classifier.2"}),
}

# ---- transformers' names (modeling_blip.py): another image encoder, the same text

TRANSFORMERS_VISION = {
    **map_transformers_vit("vision_model.", "vision_encoder."),
    **rows({"vision_model.post_layernorm": "vision_encoder.output_norm"}),
}

# ---- what a file of each kind is

_BIAS = (r"text_decoder\.cls\.predictions\.bias", "text_decoder.cls.predictions.decoder.bias")
OUTPUT = (  # the head's matrix is the word table, and its bias stands there twice
    (r"text_decoder\.bert\.embeddings\.word_embeddings\.weight", "text_decoder.cls.predictions.decoder.weight"),
    _BIAS,
)
SHARED = (  # what encoder and decoder have in common when all but self-attention is shared
    (r"text_encoder\.(embeddings\..+)", r"text_decoder.bert.\1"),
    (r"text_encoder\.(encoder\.layer\.\d+\.(?:crossattention|intermediate|output)\..+)", r"text_decoder.bert.\1"),
    (r"text_encoder\.embeddings\.word_embeddings\.weight", "text_decoder.cls.predictions.decoder.weight"),
    _BIAS,
)


_captioner, _matcher = partial(Blip, encoder=False), partial(Blip, decoder=False)
_matcher_in_training = partial(BlipPretraining, decoder=False)


def _official(table: dict, build: Callable, mark: str, tied: tuple = (), optional: tuple = ()) -> WeightFormat:
    return WeightFormat(table, build, ("visual_encoder.cls_token", mark), tied, optional, numbered=True)


def _transformers(table: dict, build: Callable, mark: str, tied: tuple = ()) -> WeightFormat:
    marks = ("vision_model.embeddings.class_embedding", mark)
    return WeightFormat({**TRANSFORMERS_VISION, **table}, build, marks, tied)


WORDS, BIAS = "text_encoder.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.bias"
FORMATS: dict[str, WeightFormat] = {
    "pretraining": _official(PRETRAINING, BlipPretraining, "queue_ptr", SHARED, optional=("queue.ids",)),
    "retrieval": _official(RETRIEVAL, _matcher_in_training, "ptr_queue"),
    "nlvr": _official(NLVR, BlipNlvr, "cls_head.0.weight"),
    "vqa": _official({**VISION, **DECODER, **TEXT}, BlipVqa, WORDS, OUTPUT),
    "captioning": _official({**VISION, **DECODER}, _captioner, BIAS, OUTPUT),
    "transformers-retrieval": _transformers({**TEXT, **rows(HEADS)}, _matcher, "itm_head.weight"),
    "transformers-vqa": _transformers({**DECODER, **TEXT}, BlipVqa, WORDS, OUTPUT),
    "transformers-captioning": _transformers(DECODER, _captioner, BIAS, OUTPUT),
}
HEAD = "text_decoder.head.bias"
OURS = {  # files under our own names; the first that fits
    f"ours: {kind}": WeightFormat(None, build, marks)
    for kind, build, marks in (
        ("pre-training", BlipPretraining, (f"blip.{HEAD}",)),
        ("a matcher in training", _matcher_in_training, ("blip.vision_encoder.positions.position",)),
        ("nlvr", BlipNlvr, ("classifier.0.weight",)),
        ("all of it", Blip, ("vision_proj.weight", HEAD)),
        ("matcher", _matcher, ("vision_proj.weight",)),
        ("dialogue", BlipDialogue, ("itm_head.weight", "text_encoder.embeddings.word.weight")),
        ("vqa", BlipVqa, ("text_encoder.embeddings.word.weight", HEAD)),
        ("captioner", _captioner, (HEAD,)),
    )
}


# What a configuration says that no tensor tells, and what it means where it is left out. Not the epsilon of the image
# encoder: the published folders say 1e-5, where the code that the weights were trained with has 1e-6.
TRANSFORMERS_DEFAULTS = {
    "text_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_attention_heads": 8},
    "vision_config": {"hidden_act": "gelu", "num_attention_heads": 12},
}

# ---- in

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
    return card(config, text_card(config), {})


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
    """A weights file under the names of any of FORMATS, or our own: the model that it is of, with the picture size,
    queue and sharing that it has, in eval mode."""
    beside = {"config.json": (hf_config(config), TRANSFORMERS_DEFAULTS)}
    return load_pretrained(
        path, lambda tensors: model_of(tensors, FORMATS | OURS, as_in(tensors, config), "BLIP"), beside
    )


def as_in(tensors: Mapping[str, Tensor], config: BlipConfig) -> BlipConfig:
    """The configuration with what a file fixes beside its variant: picture size, queue, what MED shares."""
    fixed: dict[str, Any] = {}
    for key, table in tensors.items():
        if key.endswith(("visual_encoder.pos_embed", "position_embedding", "vision_encoder.positions.position")):
            fixed["image_size"] = isqrt(table.shape[-2] - 1) * config.patch
    if "image_queue" in tensors:
        fixed["queue"] = tensors["image_queue"].shape[1]
    if "queue.images" in tensors:
        fixed["queue"] = len(tensors["queue.images"])
    decoder = next((key.removesuffix("head.bias") for key in tensors if key.endswith(HEAD)), None)
    if decoder:
        own = {
            part for part in OWN_IN_DECODER["none"] if any(k.startswith(f"{decoder}layers.0.{part}.") for k in tensors)
        }
        # a file that lacks parts fits none; strict loading then says which
        modes = (name for name, parts in OWN_IN_DECODER.items() if own == set(parts))
        fixed["sharing"] = next(modes, config.sharing)
    elif "queue_ptr" in tensors:  # the authors' pre-trained files
        fixed["sharing"] = "all_but_sa"
    return replace(config, **fixed)


def load_model(
    variant: str, weights: Path | None, tokenizer: Path | None, manifest: Path, use: str
) -> tuple[Any, Tokenizer]:
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
    small = tokenizer_beside(weights, tokenizer)
    return useful(load_file(weights, with_tokenizer(config, small)), use, weights), small


def useful(model: nn.Module, use: str, place: object) -> Any:
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


# ---- out


def convert(source: Path, target: Path, variant: str, to: str) -> None:
    """Write `source` (any known names) as safetensors under our names (to="ours"), or under the published ones of a
    kind that the weights fit; strict both ways."""

    def read():
        config = VARIANTS[variant]()
        if config.tokenizer != "bert-wordpiece":
            words = words_in(source, "word_embeddings.weight", "word.weight")
            config = replace(config, vocabulary=words or config.vocabulary)
        state = load_file(source, config).state_dict()
        return state, lambda: FORMATS[to].to_published(state)

    formats.convert(source, target, variant, to, FORMATS, read)


class Kind(NamedTuple):
    """What an exported folder is for."""

    use: str  # what the weights have to be able to do
    architecture: str  # transformers' class
    task: str  # what a hub lists it under


KINDS = {
    "transformers-captioning": Kind("caption", "BlipForConditionalGeneration", "image-to-text"),
    "transformers-retrieval": Kind("retrieval", "BlipForImageTextRetrieval", "zero-shot-image-classification"),
    "transformers-vqa": Kind("ask", "BlipForQuestionAnswering", "visual-question-answering"),
}


def export(
    source: Path, folder: Path, variant: str, to: str, tokenizer: Path | None = None, catalog: Catalog | None = None
) -> None:
    """Write `source` (any known names) as a new folder of one of KINDS, cut out where it can do more.

    tokenizer: the tokenizer.json of weights that were trained here (default: the one beside `source`). The folder
    appears whole or not at all. UserError: an unknown kind, weights that cannot do it, a folder that is not empty.
    """
    catalog = catalog or Catalog(Path(__file__).resolve().parents[1], __package__.split(".")[0])
    check_export(source, folder, to, KINDS)
    model, own = load_model(variant, source, tokenizer, catalog.root / "checkpoints_manifest.yaml", KINDS[to].use)
    if to == "transformers-vqa" and model.config.vision_width != model.config.text_width:
        raise UserError(f"{variant}: transformers' VQA has pictures and texts of one width; only blip-base can be one")
    spec = hf_spec(model, own, to)
    export_hf(folder, spec, model_card(catalog, "blip", source, variant, spec))


def hf_spec(model: Blip | BlipVqa, tokenizer: Tokenizer, to: str) -> HfSpec:
    config, state = model.config, model.state_dict()
    if isinstance(model, Blip):  # one that was trained with all objectives can do more than one class has room for
        state = copied(model, FORMATS[to].build(config)).state_dict()
    processor = {"processor_class": "BlipProcessor"}
    # The first token of a mode is put there by whoever calls the model: transformers' generate does, match does not.
    special = {"[DEC]": tokenizer.decode_start, "[ENC]": tokenizer.encode_start}
    more = {
        "clean_up_tokenization_spaces": isinstance(tokenizer, BertTokenizer),
        "additional_special_tokens": ["[ENC]"],
    }
    files = {
        "config.json": {"architectures": [KINDS[to].architecture], **hf_config(config)},
        "preprocessor_config.json": preprocessor_config(
            "BlipImageProcessor", config, size=whole_square(config), **processor
        ),
        **bert_files(tokenizer, config.context, "BlipProcessor", special, **more),
    }
    loaded_by = f"transformers' `{KINDS[to].architecture}` loads it"
    return HfSpec(FORMATS[to].to_published(state), files, loaded_by, KINDS[to].task, "blip", USAGE[to])


def hf_config(config: BlipConfig) -> dict[str, Any]:
    """config.json of transformers' BLIP."""
    text = {
        "model_type": "blip_text_model",
        "vocab_size": config.vocabulary,
        "hidden_size": config.text_width,
        "encoder_hidden_size": config.vision_width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.positions,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "label_smoothing": config.label_smoothing,
        "pad_token_id": config.pad_token,
        "bos_token_id": config.decode_token,
        "eos_token_id": config.end_token,  # transformers calls what ends a text both
        "sep_token_id": config.end_token,
    }
    vision = {
        "model_type": "blip_vision_model",
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    return {
        "model_type": "blip",
        "dtype": "float32",
        "image_text_hidden_size": config.embed_width,
        "text_config": text,
        "vision_config": vision,
    }


USAGE = {
    "transformers-captioning": """
```python
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

model, processor = BlipForConditionalGeneration.from_pretrained(".").eval(), BlipProcessor.from_pretrained(".")
inputs = processor(images=Image.open("picture.jpg"), text="a picture of", return_tensors="pt")
print(processor.decode(model.generate(**inputs, num_beams=3, max_length=20)[0], skip_special_tokens=True))
```
""",
    "transformers-retrieval": """
```python
from PIL import Image
from transformers import BlipForImageTextRetrieval, BlipProcessor

model, processor = BlipForImageTextRetrieval.from_pretrained(".").eval(), BlipProcessor.from_pretrained(".")
inputs = processor(images=Image.open("picture.jpg"), text="a cat on a mat", return_tensors="pt")
print(model(**inputs, use_itm_head=False).itm_score)
inputs["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]")  # as in training
print(model(**inputs).itm_score.softmax(-1)[:, 1])
```
""",
    "transformers-vqa": """
```python
from PIL import Image
from transformers import BlipForQuestionAnswering, BlipProcessor

model, processor = BlipForQuestionAnswering.from_pretrained(".").eval(), BlipProcessor.from_pretrained(".")
inputs = processor(images=Image.open("picture.jpg"), text="what is on the mat?", return_tensors="pt")
inputs["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]")  # as in training
print(processor.decode(model.generate(**inputs, num_beams=3, max_length=10)[0], skip_special_tokens=True))
```

transformers (5.23) does not mask a question's padding from the answer: ask one question at a time.
""",
}
