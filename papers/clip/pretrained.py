"""Released CLIP weights into our model: fetched by the manifest, held against its card, loaded strictly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from papers.clip.config import VARIANTS, ClipConfig
from papers.clip.converter import WEIGHT_MAPS, detect
from papers.clip.model import Clip
from shared.core.errors import UserError
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.clip import ClipTokenizer
from shared.tokenizers.load import load_tokenizer
from shared.weights.fetch import fetch
from shared.weights.load import check_card, load_weights
from shared.weights.manifest import Entry, load_manifest
from shared.weights.safe_load import read_tensors


def card_of(config: ClipConfig) -> dict:
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
        "config": {"activation": config.activation, "norm_eps": config.eps},
    }


def load_released(variant: str, entry: Entry) -> Clip:
    """The published weights of a manifest entry, in fp32, in eval mode. UserError where entry and model disagree."""
    config = VARIANTS[variant]()
    check_card(entry, card_of(config))
    return load_file(fetch(entry), config)


def load_file(path: Path, config: ClipConfig) -> Clip:
    """A weights file under any of the names that converter.py knows."""
    model = Clip(config)
    weight_map = WEIGHT_MAPS.get(names_in(path))
    load_weights(model, path, weight_map)
    return model.eval()


def names_in(path: Path) -> str:
    try:
        return detect(set(read_tensors(path)))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


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
    tokenizer = tokenizer or weights.with_name("tokenizer.json")
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer}: no such file; --tokenizer takes the tokenizer.json written beside the weights")
    words = load_tokenizer(tokenizer)
    return load_file(weights, replace(config, vocabulary=words.vocab_size, end_token=words.end)), words


def prompts() -> dict:
    """prompts.yaml: the published template sets and class names."""
    import yaml

    return yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))
