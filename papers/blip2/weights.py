"""BLIP-2's weights in and out: files of either stage, BERT as a start, folders that transformers loads. The names of
all kinds of files: formats.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from papers.blip2.config import SPECIALS, VARIANTS, Blip2Config, at
from papers.blip2.formats import (
    FORMATS,
    OURS,
    POSITIONS,
    VISION,
    holds_vision,
    ours_of,
    published_of,
    with_language,
    without_language,
)
from papers.blip2.frozen import Silent, encoder_beside, encoder_with, load_encoder, transformers_language
from papers.blip2.model import Blip2, Blip2Qformer, vision_encoder
from shared.backbones.vision import Encoder
from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.report.model_card import model_card
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bert import BertTokenizer
from shared.tokenizers.load import bert_files, tokenizer_beside
from shared.weights import formats
from shared.weights.export import HfSpec, check_export, export_hf, preprocessor_config, whole_square
from shared.weights.formats import (
    BERT_UNUSED,
    bert_names,
    detect,
    load_pretrained,
    map_bert_layer,
    map_bert_tables,
    map_token_head,
    rows,
)
from shared.weights.load import card, check_card, text_card
from shared.weights.manifest import Entry
from shared.weights.safe_load import read_header, read_tensors
from shared.weights.weight_map import WeightMap, to_ours

# What a configuration says that no tensor tells, and what it means where it is left out.
TRANSFORMERS_DEFAULTS = {
    "vision_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "num_attention_heads": 16},
    "qformer_config": {
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_attention_heads": 12, "cross_attention_frequency": 2,
    },
}  # fmt: skip

# ---- in


TASKS = {"-retrieval-coco": (364, 35), "-caption-coco": (364, None)}  # an entry's ending -> picture size, text tokens


class Loaded(NamedTuple):
    """A model of either stage in eval mode, and the image encoder where the file held it."""

    model: Blip2Qformer | Blip2
    encoder: Encoder | None


def card_of(config: Blip2Config) -> dict:
    """What a manifest entry states of preprocessing, tokenizer and encoder, as this configuration has it."""
    vision, language = config.vision, config.language
    tokenizer = text_card(config)
    if language is not None:
        tokenizer = {"kind": language.family, "vocabulary": language.vocabulary}
    return card(vision, tokenizer, {"activation": vision.activation, "norm_eps": vision.eps})


def config_of(id: str) -> Blip2Config:
    """The configuration of a manifest entry's weights."""
    ending = next((ending for ending in TASKS if id.endswith(ending)), "")
    config = VARIANTS[id.removesuffix(ending)]()
    return at(TASKS[ending][0], config, TASKS[ending][1]) if ending else config


def check_entry(entry: Entry) -> None:
    """UserError where an entry of the manifest and the model that it becomes disagree."""
    check_card(entry, card_of(config_of(entry.id)))


def holds_encoder(path: Path) -> bool:
    """Whether a weights file or folder has the image encoder too."""
    return path.is_dir() or holds_vision(read_header(path))  # a folder is transformers' form


def as_in(tensors: Mapping[str, Tensor], config: Blip2Config) -> Blip2Config:
    """The configuration with what a file fixes beside its variant: picture size, number of queries, vocabulary."""
    for key, table in tensors.items():
        if key.endswith(POSITIONS):
            side = isqrt(table.shape[-2] - 1) * config.vision.patch
            config = replace(config, vision=replace(config.vision, image_size=side))
        if key in ("query_tokens", "qformer.query_tokens"):
            config = replace(config, queries=table.shape[-2])
        if key == "qformer.embeddings.word.weight" and config.tokenizer != "bert-wordpiece":
            config = replace(config, vocabulary=len(table))  # a small tokenizer has as many words as its texts gave
    return config


def state_of(tensors: Mapping[str, Tensor], config: Blip2Config) -> dict[str, Tensor]:
    """Tensors under any names that are known -> our state dict, with the image encoder's behind VISION where it is
    there; every name and shape is held against the configuration. A language model in the file is left out."""
    tensors, _ = without_language(tensors)
    name = detect(tensors, FORMATS | OURS, "BLIP-2")
    wanted = {"lavis-opt": "causal", "lavis-t5": "seq2seq"}.get(name)
    if config.language is not None and wanted and config.language.kind != wanted:
        raise UserError(f"a {name} file, but {config.language.name} is {config.language.kind}: another variant's")
    format, held = (FORMATS | OURS)[name], holds_vision(tensors)
    with torch.device("meta"):
        expected = dict(format.build(config).state_dict())
        if held:
            vision = vision_encoder(config.vision).state_dict()
            expected |= {f"{VISION}{key}": tensor for key, tensor in vision.items()}
    expected = {key: tensor for key, tensor in expected.items() if not key.startswith(format.optional)}
    return ours_of(tensors, name, config.vision.kind, expected)


def load_file(path: Path, config: Blip2Config, language_model: nn.Module | None = None) -> Loaded:
    """A weights file or folder under the names of any of FORMATS, or our own: the model that it is of, in eval mode,
    with the picture size and the queries that it has. Without a language model a model of stage 2 can give its prefix
    alone."""

    def fill(tensors: Mapping[str, Tensor]) -> Loaded:
        own_config = as_in(tensors, config)
        state = state_of(tensors, own_config)
        own = {key: tensor for key, tensor in state.items() if not key.startswith(VISION)}
        if "projector.weight" in own:
            model: Any = Blip2(own_config, language_model or Silent(own_config))
            if model.projector.out_features != len(own["projector.weight"]):
                raise UserError(
                    f"its projector gives {len(own['projector.weight'])} numbers, but the language model reads "
                    f"{model.projector.out_features}: another variant's"
                )
        else:
            model = Blip2Qformer(own_config)
            if "temperature" not in own:  # a file of transformers cannot write texts, nor be trained on
                model.head = None
                own["temperature"] = model.temperature.detach()
        model.load_state_dict(own, strict=True)
        seen = {key.removeprefix(VISION): tensor for key, tensor in state.items() if key.startswith(VISION)}
        return Loaded(model.eval(), encoder_with(seen, own_config.vision) if seen else None)

    return load_pretrained(path, fill, {"config.json": (hf_config(config), TRANSFORMERS_DEFAULTS)})


def read_bert(path: Path) -> dict[str, Tensor]:
    """A file of bert-base-uncased, which stage 1 starts from; UserError says how to get it."""
    if not path.is_file():
        command = f"hf download google-bert/bert-base-uncased {path.name} --local-dir {path.parent}"
        raise UserError(f"{path}: no such file; the Q-Former starts from BERT-base: {command}")
    return read_tensors(path)


BERT: WeightMap = {  # BertForMaskedLM or BertForPreTraining
    **map_bert_tables("bert.embeddings.", "qformer.embeddings."),
    **rows({"bert.embeddings.LayerNorm": "qformer.embeddings.norm"}),
    **map_bert_layer("bert.encoder.layer.{}.", "qformer.layers.{}.", cross=False),
    **map_token_head("cls.predictions.", "head."),
    **BERT_UNUSED,
    **dict.fromkeys(("bert.embeddings.token_type_embeddings.weight", "bert.embeddings.position_ids")),
}


def from_bert(model: Blip2Qformer, published: Mapping[str, Tensor]) -> None:
    """In place: BERT into self-attention, text and word head of the Q-Former, its feed-forward layers into those of the
    queries too (Sec. 3.1). Queries, cross-attention, [DEC] and the other heads keep their initialisation.

    published: transformers' names of BertForMaskedLM or BertForPreTraining, old and new. Strict and total.
    """
    config, own = model.config, model.state_dict()
    inside = ("qformer.embeddings.", "qformer.layers.", "head.")
    shapes = {
        key: tensor.shape
        for key, tensor in own.items()
        if key.startswith(inside) and ".cross_" not in key and ".query_" not in key
    }
    longer = ("qformer.embeddings.word.weight", "head.bias")  # by [DEC], which stands behind BERT's words
    for key in longer:
        shapes[key] = (config.decode_token, *shapes[key][1:])
    ours = to_ours(bert_names(published), BERT, shapes)
    for key in longer:
        ours[key] = torch.cat([ours[key], own[key][config.decode_token :]])
    model.load_state_dict(own | ours, strict=True)
    model.qformer.copy_text_branch()


# ---- out


def convert(source: Path, target: Path, variant: str, to: str) -> None:
    """Write `source` (any known names; a language model in it stays out) as safetensors under our names (to="ours"), or
    under the published ones of a kind that the weights fit; strict both ways."""
    if to == "transformers-generation":
        raise UserError(f"{target}: --to {to} holds a language model too: name a folder, not a file")
    config = VARIANTS[variant]()

    def read():
        beside = {"config.json": (hf_config(config), TRANSFORMERS_DEFAULTS)}
        state = load_pretrained(source, lambda tensors: state_of(tensors, as_in(tensors, config)), beside)
        return state, lambda: published_of(state, to, config.vision.kind)

    formats.convert(source, target, variant, to, FORMATS, read)


class Kind(NamedTuple):
    """What an exported folder is for."""

    stage: int
    architecture: str  # transformers' class
    task: str  # what a hub lists it under


KINDS = {
    "transformers-retrieval": Kind(1, "Blip2ForImageTextRetrieval", "zero-shot-image-classification"),
    "transformers-generation": Kind(2, "Blip2ForConditionalGeneration", "image-to-text"),
}
IMAGE_TOKEN = "<image>"


class Parts(NamedTuple):
    """model: of the stage of its kind. encoder: the image encoder's state dict. language: transformers' language model
    and its tokenizer, for generation. tokenizer: the Q-Former's, for retrieval."""

    model: Blip2Qformer | Blip2
    encoder: dict[str, Tensor]
    language: tuple[Any, Any] | None
    tokenizer: Tokenizer | None


def export(
    source: Path,
    folder: Path,
    variant: str,
    to: str,
    tokenizer: Path | None = None,
    catalog: Catalog | None = None,
    language: Path | None = None,
) -> None:
    """Write `source` (any known names) as a new folder of one of KINDS. transformers keeps image encoder, Q-Former and
    (for generation) language model in one, so all of them have to be at hand.

    tokenizer: the Q-Former's tokenizer.json of weights that were trained here (default: the one beside `source`).
    language: the language model's folder in transformers' form, for generation (default: the variant's name beside
    `source`, else in the cache). The image encoder is taken from `source`, else from beside it or the cache. The folder
    appears whole or not at all. UserError: an unknown kind, a part that is missing, a folder that is not empty.
    """
    catalog = catalog or Catalog(Path(__file__).resolve().parents[1], __package__.split(".")[0])
    check_export(source, folder, to, KINDS)
    manifest = catalog.root / "checkpoints_manifest.yaml"
    spec = hf_spec(gathered(source, VARIANTS[variant](), to, tokenizer, manifest, language), to)
    export_hf(folder, spec, model_card(catalog, "blip2", source, variant, spec))


def gathered(
    source: Path, config: Blip2Config, to: str, tokenizer: Path | None, manifest: Path, language: Path | None
) -> Parts:
    """Everything that the folder has to hold; UserError for what is missing or cannot stand in it."""
    kind = KINDS[to]
    if config.vision.kind != "eva":
        raise UserError(
            f"transformers' BLIP-2 has EVA's image encoder alone, this variant one of kind {config.vision.kind}: it "
            "cannot be exported"
        )
    model, encoder = load_file(source, config)
    if isinstance(model, Blip2) != (kind.stage == 2):
        raise UserError(f"{source}: weights of another stage than {to} needs, which is stage {kind.stage}")
    if encoder is None:
        encoder = load_encoder(encoder_beside(source, config, manifest), model.config.vision)
    seen = encoder.module.state_dict()
    if isinstance(model, Blip2):
        return Parts(model, seen, transformers_language(source, model, language), None)
    if config.tokenizer == "bert-wordpiece":
        return Parts(model, seen, None, BertTokenizer.uncased(specials=SPECIALS))
    return Parts(model, seen, None, tokenizer_beside(source, tokenizer))


def hf_spec(parts: Parts, to: str) -> HfSpec:
    model, config, kind = parts.model, parts.model.config, KINDS[to]
    state = {**model.state_dict(), **{f"{VISION}{key}": tensor for key, tensor in parts.encoder.items()}}
    weights, save_tokenizer = published_of(state, to, config.vision.kind), None
    made = {
        "architectures": [kind.architecture],
        **hf_config(config if parts.language else replace(config, language=None)),
    }
    processor = {"processor_class": "Blip2Processor"}
    if parts.tokenizer is not None:
        special, stand = {"[DEC]": parts.tokenizer.decode_start}, ", which stands"
        files = bert_files(parts.tokenizer, config.context, "Blip2Processor", special)
    elif parts.language is not None:
        theirs, tokenizer = parts.language
        image_token = len(tokenizer)
        if image_token >= theirs.get_input_embeddings().num_embeddings:  # a row for the token that pictures stand for
            theirs.resize_token_embeddings(image_token + 1, mean_resizing=False)
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        made["text_config"] = theirs.config.to_dict()
        made["image_token_index"] = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        weights = with_language(weights, tied_once(theirs))
        files, save_tokenizer, stand = {}, tokenizer.save_pretrained, " and the language model, which stand"
    pictures = preprocessor_config("BlipImageProcessor", config.vision, size=whole_square(config.vision), **processor)
    files |= {
        "config.json": made,
        "processor_config.json": {**processor, "num_query_tokens": config.queries if parts.language else None},
        "preprocessor_config.json": pictures,
    }
    return HfSpec(
        weights,
        files,
        f"transformers' `{kind.architecture}` loads it",
        kind.task,
        "blip-2",
        USAGE[to],
        notes=(f"The image encoder{stand} in this folder too, kept their own licences.",),
        licensed=parts.language is None,
        save_tokenizer=save_tokenizer,
    )


def tied_once(language: Any) -> dict[str, Tensor]:
    """A language model's weights, a shared one under its first name, as transformers writes and reads it."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in language.state_dict().items():
        first.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(first.values())


def hf_config(config: Blip2Config) -> dict[str, Any]:
    """config.json of transformers' BLIP-2, without its text_config. It has one epsilon for the image encoder's norms
    and for the one over its features, where the authors have 1e-6 and 1e-5."""
    vision = config.vision
    return {
        "model_type": "blip-2",
        "dtype": "float32",
        "num_query_tokens": config.queries,
        "image_text_hidden_size": config.embed_width,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch,
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.eps,
            "qkv_bias": True,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "vocab_size": config.vocabulary,
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "max_position_embeddings": config.positions,
            "cross_attention_frequency": config.cross_every,
            "encoder_hidden_size": vision.width,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.dropout,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": config.pad_token,
            "use_qformer_text_input": config.language is None,
        },
    }


USAGE = {
    "transformers-retrieval": """
```python
from PIL import Image
from transformers import AutoTokenizer, Blip2ForImageTextRetrieval, BlipImageProcessor

model = Blip2ForImageTextRetrieval.from_pretrained(".").eval()
pictures, texts = BlipImageProcessor.from_pretrained("."), AutoTokenizer.from_pretrained(".")
inputs = {**pictures(Image.open("picture.jpg"), return_tensors="pt"), **texts("a cat on a mat", return_tensors="pt")}
print(model(**inputs, use_image_text_matching_head=False).logits_per_image)
print(model(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(-1)[:, 1])
```
""",
    "transformers-generation": """
```python
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

model, processor = Blip2ForConditionalGeneration.from_pretrained(".").eval(), Blip2Processor.from_pretrained(".")
inputs = processor(images=Image.open("picture.jpg"), text="Question: what is on the mat? Answer:", return_tensors="pt")
tokens = model.generate(**inputs, num_beams=5, max_new_tokens=10, length_penalty=-1)
print(processor.decode(tokens[0], skip_special_tokens=True))
```
""",
}
