"""The names of BLIP-2's weight files: LAVIS's and those of transformers, total and strict, both ways.

A file of ours has the names of Blip2Qformer (stage 1) or Blip2 (stage 2), and those of the image encoder behind
"vision_encoder." where it holds that too: LAVIS's files do after fine-tuning, those of transformers always. A language
model stands in no file of ours; transformers' files have it behind "language_model.", and `without_language` and
`with_language` take it out and put it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from papers.blip2.config import Blip2Config
from papers.blip2.frozen import Silent, map_eva, resampling
from papers.blip2.model import Blip2, Blip2Qformer
from shared.core.errors import UserError
from shared.weights.formats import (
    WeightFormat,
    map_bert_layer,
    map_bert_tables,
    map_openai_vit,
    map_token_head,
    map_transformers_vit,
    rows,
)
from shared.weights.weight_map import Rule, WeightMap

VISION = "vision_encoder."
LANGUAGE = "language_model."
POSITIONS = ("positions.position", "pos_embed", "positional_embedding", "embeddings.position_embedding")

# ---- names (lavis/models/blip2_models/Qformer.py; transformers, modeling_blip_2.py)

QUERIES = {"query_tokens": Rule("qformer.query_tokens", lead=1)}
HEADS = ("vision_proj", "text_proj", "itm_head")
_PREDICTIONS = "Qformer.cls.predictions."
_EMBEDDINGS = "Qformer.bert.embeddings."


def _layers(source: str, inner: str, target: str, text: bool) -> dict:
    """`inner` is what either code calls the projections inside an attention."""
    layer, block = f"{source}encoder.layer.{{}}.", f"{target}layers.{{}}."
    own = {
        "intermediate_query.dense": "query_mlp.up",
        "output_query.dense": "query_mlp.down",
        "output_query.LayerNorm": "query_mlp_norm",
    }
    return map_bert_layer(layer, block, cross=True, mlp=text, inner=inner) | rows(own, layer, block)


def lavis_qformer(text: bool) -> dict:
    return {
        **QUERIES,
        **rows({"ln_vision": "vision_norm", f"{_EMBEDDINGS}LayerNorm": "qformer.embeddings.norm"}),
        f"{_EMBEDDINGS}position_ids": None,  # 0, 1, 2, ...
        **_layers("Qformer.bert.", "self", "qformer.", text),
    }


def transformers_qformer(text: bool, theirs: str = "qformer.", ours: str = "qformer.") -> dict:
    """Blip2QFormerModel's own tensors; its queries and tables belong to the models around it."""
    return {**rows({"layernorm": "embeddings.norm"}, theirs, ours), **_layers(theirs, "attention", ours, text)}


def _transformers(text: bool) -> dict:
    norm = rows({"vision_model.post_layernorm": "vision_norm"})
    return {**QUERIES, **norm, **transformers_qformer(text)}


def _transformers_vision() -> dict:
    """The bias of queries, keys and values in one; EVA has none on the keys."""
    table = map_transformers_vit("vision_model.", VISION)
    bias = "vision_model.encoder.layers.{}.self_attn.qkv.bias"
    return table | {bias: Rule(table[bias], without_keys=True)}


# what a frozen language model leaves in LAVIS's files: names of tensors that are tied, which its filter does not know
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
LAVIS_STAGE1 = {
    **lavis_qformer(text=True),
    **map_bert_tables(_EMBEDDINGS, "qformer.embeddings."),
    **map_token_head(_PREDICTIONS, "head."),
    **rows(HEADS),
    "temp": "temperature",
}
LAVIS_OPT = {**lavis_qformer(text=False), **rows({"opt_proj": "projector"}), **_LEFT_OVER}
LAVIS_T5 = {**lavis_qformer(text=False), **rows({"t5_proj": "projector"}), **_LEFT_OVER}
TRANSFORMERS_RETRIEVAL = {
    **_transformers(text=True),
    **map_bert_tables("embeddings.", "qformer.embeddings."),
    **rows({"vision_projection": "vision_proj", "text_projection": "text_proj", "itm_head": "itm_head"}),
}
TRANSFORMERS_GENERATION = {**_transformers(text=False), **rows({"language_projection": "projector"})}
TIED = (  # the head's matrix is the word table, and its bias stands there twice
    (r"Qformer\.bert\.embeddings\.word_embeddings\.weight", f"{_PREDICTIONS}decoder.weight"),
    (r"Qformer\.cls\.predictions\.bias", f"{_PREDICTIONS}decoder.bias"),
)
WRITING = ("head.", "temperature")  # what is not there where no text is written and nothing trained on


def stage2(config: Blip2Config) -> Blip2:
    """The model of stage 2 with nobody to speak to."""
    return Blip2(config, Silent(config))


FORMATS: dict[str, WeightFormat] = {  # without the rows of the image encoder: with_vision
    "lavis-stage1": WeightFormat(LAVIS_STAGE1, Blip2Qformer, ("query_tokens", f"{_PREDICTIONS}bias"), TIED),
    "lavis-opt": WeightFormat(LAVIS_OPT, stage2, ("query_tokens", "opt_proj.weight")),
    "lavis-t5": WeightFormat(LAVIS_T5, stage2, ("query_tokens", "t5_proj.weight")),
    "transformers-retrieval": WeightFormat(
        TRANSFORMERS_RETRIEVAL, Blip2Qformer, ("query_tokens", "vision_projection.weight"), optional=WRITING
    ),
    "transformers-generation": WeightFormat(
        TRANSFORMERS_GENERATION, stage2, ("query_tokens", "language_projection.weight")
    ),
}
OURS = {
    "ours: stage 2": WeightFormat(None, stage2, ("projector.weight",)),
    "ours: stage 1": WeightFormat(None, Blip2Qformer, ("qformer.query_tokens", "temperature")),
    "ours: heads": WeightFormat(None, Blip2Qformer, ("qformer.query_tokens",), optional=WRITING),
}
LAVIS_VISION = {"eva": map_eva("visual_encoder.", VISION), "clip": map_openai_vit("visual_encoder.", VISION)}
TRANSFORMERS_VISION = {"eva": _transformers_vision()}


def with_vision(name: str, kind: str, held: bool) -> WeightFormat:
    """A format with the rows of an image encoder of this kind, where the file holds one; transformers' always do."""
    format = (FORMATS | OURS)[name]
    theirs = name.startswith("transformers")
    if format.map is None or not (held or theirs):
        return format
    vision: Mapping[str, WeightMap] = TRANSFORMERS_VISION if theirs else LAVIS_VISION
    if kind not in vision:
        raise UserError(f"{name}: this kind of file has no place for an image encoder of kind {kind}")
    return replace(format, map={**format.map, **vision[kind]})


def holds_vision(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file, of ours or published, has an image encoder beside the trained part."""
    return any(key.endswith(POSITIONS) for key in tensors)


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
    model and, where the file holds the image encoder, its own behind VISION. vision: the encoder's kind."""
    held = holds_vision(published)
    return with_vision(format, vision, held).to_ours(published, expected, resampling(vision))


def published_of(state: Mapping[str, Tensor], format: str, vision: str) -> dict[str, Tensor]:
    """Our state dict (and the image encoder's, behind VISION) under the published names, copies too; without a
    language model. What the kind has no place for is cut."""
    return with_vision(format, vision, holds_vision(state)).to_published(state)
