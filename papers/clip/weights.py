"""CLIP's weights in and out: OpenAI's and transformers' names, total and strict, both ways; released weights and those
trained here; folders that transformers or open_clip loads. Published keys stand on the left, ours on the right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from papers.clip.config import VARIANTS, ClipConfig
from papers.clip.model import Clip
from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.report.model_card import model_card
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.clip import ClipTokenizer
from shared.tokenizers.load import for_transformers, tokenizer_beside
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.weights import formats
from shared.weights.export import HfSpec, check_export, export_hf, preprocessor_config, whole_square
from shared.weights.fetch import fetch
from shared.weights.formats import (
    WeightFormat,
    fused,
    load_pretrained,
    map_openai_block,
    map_openai_vit,
    model_of,
    rows,
    words_in,
)
from shared.weights.load import card, check_card, text_card
from shared.weights.manifest import Entry, load_manifest
from shared.weights.weight_map import Rule

# ---- OpenAI's names, which open_clip has too

TEXT = {
    **map_openai_block("transformer.resblocks.{}.", "text_encoder.blocks.{}."),
    **rows({"ln_final": "text_encoder.output_norm"}),
    "token_embedding.weight": "text_encoder.token_embedding.weight",
    "positional_embedding": "text_encoder.position",
    "text_projection": Rule("text_proj.weight", transpose=True),
    "logit_scale": "logit_scale",
    **dict.fromkeys(("input_resolution", "context_length", "vocab_size")),  # integers in the TorchScript archives
}

OPENAI_VIT = {
    **TEXT,
    **map_openai_vit("visual.", "vision_encoder."),
    **rows({"visual.ln_post": "vision_encoder.output_norm"}),
    "visual.proj": Rule("vision_proj.weight", transpose=True),
}


def _convolution(source: str, source_norm: str, target: str, target_norm: str) -> dict:
    """A convolution without bias and the batch norm behind it."""
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norm = {f"{source_norm}.{part}": f"{target_norm}.{part}" for part in statistics}
    return {f"{source}.weight": f"{target}.weight"} | norm


def _resnet(source: str, target: str) -> dict:
    places = [(source, target)] + [(f"{source}layer{i + 1}.{{}}.", f"{target}stages.{i}.{{}}.") for i in range(4)]
    table: dict = {f"{source}attnpool.positional_embedding": f"{target}pool.position"}
    for theirs, ours in places:  # the stem, and the blocks of every stage
        for i in (1, 2, 3):
            table |= _convolution(f"{theirs}conv{i}", f"{theirs}bn{i}", f"{ours}conv{i}", f"{ours}bn{i}")
    for theirs, ours in places[1:]:
        down = f"{theirs}downsample."
        table |= _convolution(f"{down}0", f"{down}1", f"{ours}shortcut_conv", f"{ours}shortcut_bn")
    pool, attention = f"{source}attnpool.", f"{target}pool.attention."
    table |= rows({"q_proj": "q", "c_proj": "out"}, pool, attention)
    return table | fused((f"{pool}k_proj", f"{pool}v_proj"), f"{attention}kv")


OPENAI_RESNET = {**TEXT, **_resnet("visual.", "vision_encoder.")}

# ---- transformers' names


def _tower(source: str, target: str, input_norm: dict, output_norm: str) -> dict:
    layer, block = f"{source}encoder.layers.{{}}.", f"{target}blocks.{{}}."
    names = {
        "layer_norm1": "attention_norm",
        "self_attn.out_proj": "attention.out",
        "layer_norm2": "mlp_norm",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    }
    return {
        **rows(names, layer, block),
        **fused((f"{layer}self_attn.{name}_proj" for name in "qkv"), f"{block}attention.qkv"),
        **rows({**input_norm, output_norm: "output_norm"}, source, target),
        f"{source}embeddings.position_ids": None,
    }


TRANSFORMERS = {
    **_tower("vision_model.", "vision_encoder.", {"pre_layrnorm": "input_norm"}, "post_layernorm"),
    **_tower("text_model.", "text_encoder.", {}, "final_layer_norm"),
    "vision_model.embeddings.patch_embedding.weight": "vision_encoder.patch_embedding.weight",
    "vision_model.embeddings.class_embedding": "vision_encoder.positions.class_token",
    "vision_model.embeddings.position_embedding.weight": "vision_encoder.positions.position",
    "visual_projection.weight": "vision_proj.weight",
    "text_model.embeddings.token_embedding.weight": "text_encoder.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text_encoder.position",
    "text_projection.weight": "text_proj.weight",
    "logit_scale": "logit_scale",
}

FORMATS = {
    "openai-vit": WeightFormat(OPENAI_VIT, Clip, ("visual.class_embedding",)),
    "openai-resnet": WeightFormat(OPENAI_RESNET, Clip, ("visual.attnpool.positional_embedding",)),
    "transformers": WeightFormat(TRANSFORMERS, Clip, ("vision_model.embeddings.class_embedding",)),
}
OURS = {"ours": WeightFormat(None, Clip, ("text_encoder.position",))}

# What a configuration says that no tensor tells, and what it means where it is left out.
TRANSFORMERS_DEFAULTS = {
    "text_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 8},
    "vision_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12},
}
OPEN_CLIP_DEFAULTS = {"quick_gelu": False, "vision_cfg": {"head_width": 64}, "text_cfg": {"heads": 8}}

# ---- in


def card_of(config: ClipConfig) -> dict:
    """What a manifest entry states of preprocessing, tokenizer and architecture, as this configuration has it."""
    return card(config, text_card(config), {"activation": config.activation, "norm_eps": config.eps})


def load_released(variant: str, entry: Entry) -> Clip:
    """The published weights of a manifest entry, in fp32, in eval mode. UserError where entry and model disagree."""
    config = VARIANTS[variant]()
    check_card(entry, card_of(config))
    return load_file(fetch(entry), config)


def load_file(path: Path, config: ClipConfig) -> Clip:
    """A weights file under the names of any of FORMATS, or ours; in eval mode."""
    beside = {
        "config.json": (hf_config(config), TRANSFORMERS_DEFAULTS),
        "open_clip_config.json": ({"model_cfg": open_clip_config(config)}, {"model_cfg": OPEN_CLIP_DEFAULTS}),
    }
    return load_pretrained(path, lambda tensors: cast(Clip, model_of(tensors, FORMATS | OURS, config, "CLIP")), beside)


def load_model(variant: str, weights: Path | None, tokenizer: Path | None, manifest: Path) -> tuple[Clip, Tokenizer]:
    """What `zeroshot` asks: the manifest's weights, or a local file with the tokenizer that it was trained with."""
    config = VARIANTS[variant]()
    if weights is None:
        entries = load_manifest(manifest)
        if variant not in entries:
            raise UserError(f"{variant}: no released weights in {manifest.name}; give --weights and --tokenizer")
        return load_released(variant, entries[variant]), ClipTokenizer()
    if not weights.is_file():
        raise UserError(f"{weights}: no such file; --weights takes a safetensors file or a published .pt")
    if config.tokenizer == "clip-bpe":
        return load_file(weights, config), ClipTokenizer()
    small = tokenizer_beside(weights, tokenizer)
    return load_file(weights, replace(config, vocabulary=small.vocab_size, end_token=small.end)), small


# ---- out


def convert(source: Path, target: Path, variant: str, to: str) -> None:
    """Write `source` (any known names) as safetensors under our names, or a published format's; strict both ways."""

    def read():
        config = VARIANTS[variant]()
        if config.tokenizer != "clip-bpe" and (words := words_in(source, "token_embedding.weight")):
            config = replace(config, vocabulary=words, end_token=min(config.end_token, words - 1))
        state = load_file(source, config).state_dict()
        return state, lambda: FORMATS[to].to_published(state)

    formats.convert(source, target, variant, to, FORMATS, read)


def export(
    source: Path, folder: Path, variant: str, to: str, tokenizer: Path | None = None, catalog: Catalog | None = None
) -> None:
    """Write `source` (any known names) as a new folder of the library `to`: transformers | open_clip.

    tokenizer: the tokenizer.json of weights that were trained here (default: the one beside `source`). The folder
    appears whole or not at all. UserError: an unknown library, a ResNet for transformers, a folder that is not empty.
    """
    catalog = catalog or Catalog(Path(__file__).resolve().parents[1], __package__.split(".")[0])
    check_export(source, folder, to, SPECS)
    spec = SPECS[to](*load_model(variant, source, tokenizer, catalog.root / "checkpoints_manifest.yaml"))
    export_hf(folder, spec, model_card(catalog, "clip", source, variant, spec))


def hf_config(config: ClipConfig) -> dict[str, Any]:
    """config.json of transformers' CLIPModel."""

    def tower(width: int, layers: Any, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": config.activation,
            "layer_norm_eps": config.eps,
            "projection_dim": config.embed_width,
        }

    text = {
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "bos_token_id": config.end_token - 1,
        "eos_token_id": config.end_token,
        "pad_token_id": config.end_token,
    }
    vision = {"model_type": "clip_vision_model", "image_size": config.image_size, "patch_size": config.patch}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": config.embed_width,
        "text_config": text | tower(config.text_width, config.text_layers, config.text_heads),
        "vision_config": vision | tower(config.vision_width, config.vision_layers, config.vision_heads),
    }


def open_clip_config(config: ClipConfig) -> dict[str, Any]:
    """The model_cfg of open_clip's CLIP."""
    width = config.vision_width if config.patch else 32 * config.vision_width  # of the ResNet's last stage
    return {
        "embed_dim": config.embed_width,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": config.image_size,
            "layers": config.vision_layers,
            "width": config.vision_width,
            **({"patch_size": config.patch} if config.patch else {}),
            "head_width": width // config.vision_heads,
        },
        "text_cfg": {
            "context_length": config.context,
            "vocab_size": config.vocabulary,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
        },
    }


def _transformers(model: Clip, tokenizer: Tokenizer) -> HfSpec:
    config = model.config
    if config.patch is None:
        raise UserError("transformers' CLIPModel has no ResNet; use --to open_clip")
    files = {
        "config.json": hf_config(config),
        "preprocessor_config.json": preprocessor_config(
            "CLIPImageProcessor", config, processor_class="CLIPProcessor", size={"shortest_edge": config.image_size},
            do_center_crop=True, crop_size=whole_square(config),
        ),
        **tokenizer_files(tokenizer, config),
    }  # fmt: skip
    return HfSpec(
        FORMATS["transformers"].to_published(model.state_dict()), files, "transformers loads it by its own means", TASK,
        "clip", USAGE["transformers"],
    )  # fmt: skip


def _open_clip(model: Clip, tokenizer: Tokenizer) -> HfSpec:
    config, files = model.config, dict[str, Any]()
    model_cfg = open_clip_config(config)
    if not isinstance(tokenizer, ClipTokenizer):
        # whatever the name, open_clip reads the files of this folder
        model_cfg["text_cfg"]["hf_tokenizer_name"] = "tokenizer.json"
        files = tokenizer_files(tokenizer, config)
    preprocess = {
        "mean": config.mean, "std": config.std, "interpolation": config.resize, "resize_mode": "shortest"
    }  # fmt: skip
    files["open_clip_config.json"] = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    format = FORMATS["openai-vit" if config.patch else "openai-resnet"]
    return HfSpec(
        format.to_published(model.state_dict()), files, "open_clip loads it by its own means", TASK, "clip",
        USAGE["open_clip"], library="open_clip", weights_file="open_clip_model.safetensors",
    )  # fmt: skip


SPECS = {"transformers": _transformers, "open_clip": _open_clip}
TASK = "zero-shot-image-classification"
START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer_files(tokenizer: Tokenizer, config: ClipConfig) -> dict[str, Any]:
    """The files from which transformers builds a tokenizer that gives our ids up to the end token, and the end token
    behind it: our padding, id 0, is an ordinary word there ("!" in the release), and what stands behind is not read."""
    settings = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }
    ids = {START: tokenizer.start, END: tokenizer.end}
    if isinstance(tokenizer, ClipTokenizer):
        learnt = json.loads(tokenizer._pieces.to_str())["model"]
        merges = "\n".join(["#version: 0.2", *map(" ".join, learnt["merges"])]) + "\n"
        files: dict[str, Any] = {"vocab.json": learnt["vocab"] | ids, "merges.txt": merges}
        settings |= {"tokenizer_class": "CLIPTokenizer"}
    else:
        files = {"tokenizer.json": for_transformers(cast(SmallTokenizer, tokenizer), ids, (START, END))}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    return files | {"tokenizer_config.json": settings}


USAGE = {
    "transformers": """
```python
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained(".").eval(), CLIPProcessor.from_pretrained(".")
texts = ["a photo of a cat.", "a photo of a dog."]
inputs = processor(text=texts, images=Image.open("picture.jpg"), padding=True, truncation=True, return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(-1))
```

transformers does not repair broken characters or HTML entities in a text, as the released code does: such texts get
other tokens.
""",
    "open_clip": """
```python
import open_clip
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("local-dir:.")
tokens = open_clip.get_tokenizer("local-dir:.")(["a photo of a cat.", "a photo of a dog."])
image_features, text_features, scale = model.eval()(preprocess(Image.open("picture.jpg"))[None], tokens)
print((scale * image_features @ text_features.T).softmax(-1))
```
""",
}
