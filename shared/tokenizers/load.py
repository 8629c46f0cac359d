"""Tokenizers by name or file, for transformers, and the ImageNet names that ship with open_clip."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from shared.core.errors import UserError
from shared.tokenizers.base import Tokenizer, _open_clip_file
from shared.tokenizers.bert import BertTokenizer
from shared.tokenizers.clip import ClipTokenizer
from shared.tokenizers.small_bpe import SmallTokenizer


def for_transformers(
    tokenizer: Tokenizer, ids: Mapping[str, int], ends: tuple[str, str] = ("[CLS]", "[SEP]")
) -> dict[str, Any]:
    """The tokenizer.json from which transformers builds a tokenizer that gives our ids, between the two `ends`.

    ids: of the special tokens, by the names that they have there.
    """
    learnt = json.loads(tokenizer._pieces.to_str())
    if isinstance(tokenizer, SmallTokenizer):  # it keeps its special tokens outside its model
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        learnt["added_tokens"] = [{"id": id, "content": name} | special for name, id in ids.items()]
        white = r"[\s\x1c-\x1f\x85]+"  # what str.split takes for white space
        learnt["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"Regex": white}, "content": " "},
                {"type": "Strip", "strip_left": True, "strip_right": True},
            ],
        }
    start, end = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ends)
    one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    learnt["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, one, end],
        "pair": [start, one, end, other, end],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in ends},
    }
    return learnt


def bert_files(
    tokenizer: Tokenizer, context: int, processor: str, special: Mapping[str, int], **more: Any
) -> dict[str, Any]:
    """{file: content} from which transformers builds a tokenizer that gives our ids, [CLS] text [SEP] and padding.

    special: the ids of other special tokens by their names, [DEC] among them. processor: transformers' class. more:
    other settings.
    """
    ids = {"[CLS]": tokenizer.start, "[SEP]": tokenizer.end, **special}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "processor_class": processor,
        "pad_token": "[PAD]" if isinstance(tokenizer, BertTokenizer) else "<|pad|>",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "bos_token": "[DEC]",
        **more,
    }
    return {"tokenizer.json": for_transformers(tokenizer, ids), "tokenizer_config.json": settings}


_LOADERS: dict[str, Callable[[Mapping[str, Any]], Tokenizer]] = {
    ClipTokenizer.kind: lambda saved: ClipTokenizer(),
    BertTokenizer.kind: lambda saved: BertTokenizer(saved["vocabulary"], saved["specials"]),
    SmallTokenizer.kind: lambda saved: SmallTokenizer(json.dumps(saved["model"]), saved.get("specials", ())),
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        tokenizer, digest = _LOADERS[saved["kind"]](saved), saved["digest"]
    except UserError:
        raise
    except Exception as error:  # absent, cut, or not a tokenizer at all: the tokenizers library raises bare Exception
        raise UserError(f"{path}: not a saved tokenizer ({type(error).__name__}); save or train it again") from None
    if tokenizer.digest != digest:
        raise UserError(f"{path}: digest differs: expected {digest}, found {tokenizer.digest}; train it again")
    return tokenizer


def tokenizer_beside(weights: Path, given: Path | None) -> Tokenizer:
    """The tokenizer of weights that were trained here: the given file, or the tokenizer.json beside them."""
    place = given or weights.with_name("tokenizer.json")
    if not place.is_file():
        raise UserError(f"{place}: no such file; --tokenizer takes the tokenizer.json written beside the weights")
    return load_tokenizer(place)


@lru_cache(maxsize=1)
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 class names that CLIP's authors edited by hand, in ImageNet's order (worth 1.5 points on B/32)."""
    return tuple(ast.literal_eval(_metadata("IMAGENET_CLASSNAMES")))


@lru_cache(maxsize=1)
def imagenet_templates() -> tuple[str, ...]:
    """The 80 prompts of CLIP's ImageNet ensemble, with `{}` where the class name goes."""
    templates = []
    for function in _metadata("OPENAI_IMAGENET_TEMPLATES").elts:  # lambda c: f'a photo of a {c}.'
        parts = function.body.values
        templates.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts))
    return tuple(templates)


def _metadata(name: str) -> Any:
    """The syntax tree of a constant in open_clip's zero_shot_metadata.py: read, since importing the package is slow."""
    path = _open_clip_file("zero_shot_metadata.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == name for target in node.targets):
            return node.value
    raise UserError(f"{path}: has no {name}; install the tested open_clip_torch (constraints.txt)")
