"""ALBEF's weights in and out: the names of the official code, total and strict, both ways; released files, and what
pre-training starts from (Sec. 3.1: DeiT and BERT).

A published file numbers the 12 layers of one BERT through, where ours has two stacks, and writes a shared tensor once
for every place that uses it. Such copies have to be equal on the way in, and are written out again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

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
from shared.weights import formats as files
from shared.weights.fetch import fetch
from shared.weights.formats import (
    BERT_UNUSED,
    WeightFormat,
    bert_names,
    load_pretrained,
    map_bert_embeddings,
    map_bert_layer,
    map_token_head,
    map_vit,
    model_of,
    rows,
)
from shared.weights.load import card, check_card, text_card
from shared.weights.manifest import Entry
from shared.weights.safe_load import read_tensors
from shared.weights.weight_map import Rule, WeightMap, carried_to, to_ours

# ---- the names of the official code

TABLES = ("word", "position", "token_type")
PROJECTIONS = ("vision_proj", "text_proj")
CONTRAST = {  # what pre-training and retrieval keep beside the encoders
    **rows({"itm_head": "student.itm_head"}),
    "temp": "student.temperature",
    "image_queue": Rule("queue.images", transpose=True),
    "text_queue": Rule("queue.texts", transpose=True),
    "queue_ptr": Rule("queue.next", lead=1),
}


TIED = (  # the word head's matrix is the word table, and its bias stands there twice
    (r"(text_(?:en|de)coder(?:_m)?)\.bert\.embeddings\.word_embeddings\.weight", r"\1.cls.predictions.decoder.weight"),
    (r"(text_(?:en|de)coder(?:_m)?)\.cls\.predictions\.bias", r"\1.cls.predictions.decoder.bias"),
)


def _encoders(config: AlbefConfig, target: str, momentum: str = "", bert: str = "", pictures: int = 1) -> dict:
    """The encoders of one copy; momentum "_m" for the other, `bert` what stands before the names of BERT's modules.
    The first layers of the published BERT are our text encoder, those behind them our multimodal encoder."""
    source = f"text_encoder{momentum}.{bert}"
    table = map_vit(f"visual_encoder{momentum}.", f"{target}vision_encoder.")
    table |= map_bert_embeddings(f"{source}embeddings.", f"{target}text_encoder.embeddings.", TABLES)
    return table | _stacks(config, f"{source}encoder.layer.", target, pictures, cross=True)


def _stacks(config: AlbefConfig, source: str, target: str, pictures: int, cross: bool) -> dict:
    table: dict = {}
    for i in range(config.text_layers):
        table |= map_bert_layer(f"{source}{i}.", f"{target}text_encoder.layers.{i}.", cross=False)
    for i in range(config.fusion_layers * pictures):
        place = f"{source}{config.text_layers + i}."
        table |= map_bert_layer(place, f"{target}multimodal_encoder.{i}.", cross)
    return table


def _decoder(target: str, momentum: str) -> dict:
    bert = f"text_decoder{momentum}.bert."
    return {
        **map_bert_embeddings(f"{bert}embeddings.", f"{target}embeddings.", TABLES),
        **map_bert_layer(f"{bert}encoder.layer.{{}}.", f"{target}layers.{{}}.", cross=True),
        **map_token_head(f"text_decoder{momentum}.cls.predictions.", f"{target}head."),
    }


def formats(config: AlbefConfig, momentum: bool = True) -> dict[str, WeightFormat]:
    """The kinds of published files, of this configuration. momentum: whether one holds the average of what is trained
    too; those of pre-training and retrieval always do."""

    def both(part: Callable[[str, str], dict], always: bool = False) -> dict:
        """Of the trained copy and of its average."""
        table = part("student.", "")
        return table | part("teacher.", "_m") if momentum or always else table

    def projections(target: str, m: str) -> dict:
        return rows({f"{name}{m}": name for name in PROJECTIONS}, "", target)

    def head(target: str, m: str) -> dict:
        return rows({f"cls_head{m}.{place}": f"{target}head.{place}" for place in (0, 2)})

    def format(table: WeightMap, build: Callable[[AlbefConfig], nn.Module], *marks, optional=()) -> WeightFormat:
        return WeightFormat(table, build, ("visual_encoder.cls_token", *marks), TIED, optional, numbered=True)

    return {
        "pretraining": format(
            both(lambda target, m: {
                **_encoders(config, target, m, bert="bert."),
                **map_token_head(f"text_encoder{m}.cls.predictions.", f"{target}mlm_head."),
                **projections(target, m),
            }, always=True) | CONTRAST,
            lambda config: AlbefPretraining(Albef(config)),
            "text_encoder.bert.embeddings.word_embeddings.weight",
            optional=("queue.ids",),  # of the pictures in the queue: retrieval alone looks at them, and publishes them
        ),
        "retrieval": format(
            both(lambda target, m: {**_encoders(config, target, m), **projections(target, m)}, always=True)
            | CONTRAST | {"idx_queue": Rule("queue.ids", lead=1)},
            lambda config: AlbefRetrieval(Albef(config)),
            "idx_queue",
        ),
        "vqa": format(
            both(lambda target, m: {
                **_encoders(config, f"{target}encoder.", m), **_decoder(f"{target}text_decoder.", m)
            }),
            lambda config: AlbefVqa(QuestionAnswering(Albef(config)), config.momentum, momentum),
            "text_decoder.cls.predictions.bias",
        ),
        "entailment": format(
            both(lambda target, m: {**_encoders(config, f"{target}encoder.", m), **head(target, m)}),
            lambda config: Distilled(Entailment(Albef(config)), config.momentum, momentum),
            ("cls_head.2.weight", 3),
        ),
        "nlvr2": format(
            both(lambda target, m: {
                **_encoders(config, f"{target}pair.encoder.", m, pictures=2), **head(target, m)
            }),
            lambda config: Distilled(Nlvr2(PairEncoder(Albef(config))), config.momentum, momentum),
            ("cls_head.2.weight", 2),
        ),
        "text-assignment": format(
            {
                **_encoders(config, "pair.encoder.", pictures=2),
                **rows({"ta_head": "head"}),
                **rows(PROJECTIONS, "", "pair.encoder."),
                "temp": "pair.encoder.temperature",
            },
            lambda config: TextAssignment(PairEncoder(Albef(config))),
            "ta_head.weight",
        ),
    }  # fmt: skip


FORMATS = formats(VARIANTS["albef-base"]())

OUR_MARKS = {  # by what a file under our own names is told, the first that fits
    "vqa": "student.text_decoder.head.bias",
    "nlvr2": "student.pair.encoder.vision_encoder.positions.class_token",
    "entailment": "student.encoder.vision_encoder.positions.class_token",
    "text-assignment": "pair.encoder.vision_encoder.positions.class_token",
    "pretraining": "student.mlm_head.bias",
    "retrieval": "queue.images",
}


def kinds_of(tensors: Mapping[str, Tensor], config: AlbefConfig) -> tuple[dict[str, WeightFormat], AlbefConfig]:
    """All kinds of files, published or of ours, with or without a momentum copy as these tensors have it, and the
    configuration with their length of the queue."""
    if "image_queue" in tensors:
        config = replace(config, queue=tensors["image_queue"].shape[1])
    if "queue.images" in tensors:
        config = replace(config, queue=len(tensors["queue.images"]))
    published = formats(config, any(key.startswith(("visual_encoder_m.", "teacher.")) for key in tensors))
    ours = {f"ours: {kind}": WeightFormat(None, published[kind].build, (mark,)) for kind, mark in OUR_MARKS.items()}
    model = WeightFormat(None, Albef, ("multimodal_encoder.0.mlp.up.weight",))
    return {**published, **ours, "ours": model}, config


def _format_of(format: str, config: AlbefConfig, model: nn.Module) -> WeightFormat:
    return formats(config, momentum=getattr(model, "teacher", None) is not None)[format]


def ours_of(published: Mapping[str, Tensor], format: str, config: AlbefConfig, model: nn.Module) -> dict[str, Tensor]:
    """Published tensors under the names of `model`, of FORMATS[format] and this configuration."""
    return _format_of(format, config, model).to_ours(published, model.state_dict())


def published_of(state: Mapping[str, Tensor], format: str, config: AlbefConfig, model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model` under the published names, whole: copies and numbered positions too."""
    return _format_of(format, config, model).to_published(state)


# ---- in and out


def card_of(config: AlbefConfig) -> dict:
    """What a manifest entry states of preprocessing, tokenizer and architecture, as this configuration has it."""
    return card(config, text_card(config), {"norm_eps": config.vision_eps})


def load_released(variant: str, entry: Entry) -> nn.Module:
    """The published weights of a manifest entry: the model of their kind, in fp32, in eval mode, at the entry's picture
    size and text length. UserError where entry and model disagree."""
    size, context = entry.preprocess.get("size"), entry.tokenizer.get("context")
    config = VARIANTS[variant]()
    config = replace(config, image_size=size or config.image_size, context=context or config.context)
    check_card(entry, card_of(config))
    return load_any(fetch(entry), config)


def filled(tensors: Mapping[str, Tensor], config: AlbefConfig) -> nn.Module:
    """The model that the tensors of a file are of, with its weights, in eval mode. UserError for a stranger."""
    return model_of(tensors, *kinds_of(tensors, config), "ALBEF")


def load_any(path: Path, config: AlbefConfig) -> nn.Module:
    """A weights file under published names of any kind, or under ours, as `convert` and training write them. In eval
    mode."""
    return load_pretrained(path, lambda tensors: filled(tensors, config))


def load_file(path: Path, config: AlbefConfig) -> Albef:
    """The model alone, of a pre-training or retrieval file (retrieval files have no word head)."""
    model = load_any(path, config)
    if isinstance(model, AlbefPretraining):
        model = model.student
    if not isinstance(model, Albef):
        raise UserError(f"{path}: fine-tuned for a task of its own; give pre-training or retrieval weights")
    return model


def convert(source: Path, target: Path, variant: str, to: str) -> None:
    """Write `source` (any known names) as safetensors under our names (to="ours") or the published ones of a kind that
    the weights fit; strict both ways."""

    def read():
        config = VARIANTS[variant]()
        model = load_any(source, config)
        state = model.state_dict()
        return state, lambda: published_of(state, to, getattr(model, "config", config), model)

    files.convert(source, target, variant, to, FORMATS, read)


# ---- what pre-training starts from


def start(albef: Albef, vision: Path | None = None, text: Path | None = None) -> Albef:
    """In place: the ViT from DeiT's file, BERT's lower layers into the text encoder, its upper ones into the multimodal
    encoder. What BERT has not, cross-attention and the other heads, keeps its initialisation."""
    if vision is not None:
        from_deit(albef, read_tensors(vision))
    if text is not None:
        from_bert(albef, read_tensors(text))
    return albef


def from_deit(albef: Albef, published: Mapping[str, Tensor]) -> None:
    """timm's names (`deit_base_patch16_224`); positions are carried to the model's own picture size."""
    ours = to_ours(published, map_vit("", "") | dict.fromkeys(("head.weight", "head.bias")))
    albef.vision_encoder.load_state_dict(carried_to(albef.vision_encoder.state_dict(), ours), strict=True)


def from_bert(albef: Albef, published: Mapping[str, Tensor]) -> None:
    """transformers' names of BertForMaskedLM or BertForPreTraining (`bert-base-uncased`), old and new."""
    weight_map = {
        **map_bert_embeddings("bert.embeddings.", "text_encoder.embeddings.", TABLES),
        **_stacks(albef.config, "bert.encoder.layer.", "", pictures=1, cross=False),
        **map_token_head("cls.predictions.", "mlm_head."),
        **BERT_UNUSED,
    }
    own = albef.state_dict()
    inside = ("text_encoder.", "multimodal_encoder.", "mlm_head.")
    expected = {k: tensor.shape for k, tensor in own.items() if k.startswith(inside) and ".cross_" not in k}
    albef.load_state_dict(own | to_ours(bert_names(published), weight_map, expected), strict=True)
