"""Weight files as data: what a kind of file is recognised by, its map to our names and what it writes more than once;
the rows of layouts that papers share (image encoders of timm, transformers, OpenAI; BERT); loading and converting."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shared.core.errors import UserError
from shared.weights.load import alike, other_kinds, read_weights, save_weights
from shared.weights.safe_load import read_header
from shared.weights.weight_map import Rule, WeightMap, carried_to, resample_plainly, to_ours, to_published

Model = TypeVar("Model")
PARTS = ("weight", "bias")


@dataclass(frozen=True)
class WeightFormat:
    """A kind of weight file.

    map: its names to ours; None: they are ours. build: configuration -> the empty model that it fills.
    marks: keys that such a file has, all of them; (key, rows) where a number of rows tells it from its like.
    tied: a published name as a pattern, and what re.sub makes of it: the name under which its tensor stands once more.
    optional: beginnings of our names for which it has no place; they stay as they are in the model that is filled.
    numbered: whether the numbers 0, 1, 2, ... stand beside each position table.
    """

    map: WeightMap | None
    build: Callable[[Any], nn.Module]
    marks: tuple[str | tuple[str, int], ...]
    tied: tuple[tuple[str, str], ...] = ()
    optional: tuple[str, ...] = ()
    numbered: bool = False

    def to_ours(
        self,
        published: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
        resample: Callable[[Tensor, Tensor], Tensor] = resample_plainly,
    ) -> dict[str, Tensor]:
        """The tensors of such a file under our names, shapes as in `expected`, a state dict; positions for another
        picture size are carried over by `resample`. UserError lists what is missing, left over or of another shape, and
        names copies of one tensor that differ."""
        tensors = dict(published)
        for copy, original in self.copies(tensors).items():
            if copy in tensors and not torch.equal(tensors.pop(copy), tensors[original]):
                raise UserError(f"{copy} differs from {original}, but the model has one tensor for both")
        ours = tensors if self.map is None else to_ours(tensors, self.map)
        kept = {key: tensor for key, tensor in expected.items() if key.startswith(self.optional)}
        return carried_to(expected, kept | ours, resample)

    def to_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict as such a file has it, whole: copies and numbered positions too. What is optional is cut."""
        state = {key: tensor for key, tensor in state.items() if not key.startswith(self.optional)}
        if self.map is None:
            return state
        published = to_published(state, self.map)
        if self.numbered:
            table = ".position_embeddings.weight"
            for key in [key for key in published if key.endswith(table)]:
                published[f"{key.removesuffix(table)}.position_ids"] = torch.arange(len(published[key]))[None]
        return published | {copy: published[original] for copy, original in self.copies(published).items()}

    def copies(self, names: Iterable[str]) -> dict[str, str]:
        """{the name of a copy: the name of its tensor} of published names."""
        return {
            re.sub(pattern, copy, name): name
            for name in names
            for pattern, copy in self.tied
            if re.fullmatch(pattern, name)
        }


# ---- from files into models, and from one file into another


def detect(tensors: Mapping[str, Tensor], formats: Mapping[str, WeightFormat], title: str) -> str:
    """The first of the formats all of whose marks are there; UserError for a stranger."""

    def has(mark: str | tuple[str, int]) -> bool:
        key, rows = (mark, None) if isinstance(mark, str) else mark
        return key in tensors and (rows is None or len(tensors[key]) == rows)

    for name, format in formats.items():
        if all(map(has, format.marks)):
            return name
    raise UserError(f"these are not {title} weights: none of the known names is among their keys")


def filled(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The model with these weights, in eval mode. UserError: other names or kinds of numbers, or a parameter that two
    layers share and that stands there twice, unlike."""
    own = model.state_dict()
    other_kinds(state, own)
    first: dict[int, str] = {}
    for key, tensor in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(tensor), key)
        if other != key and key in state and other in state and not torch.equal(state[key], state[other]):
            raise UserError(f"{key} differs from {other}, but the two layers share one tensor")
    model.load_state_dict(dict(state), strict=True)
    return model.eval()


def model_of(tensors: Mapping[str, Tensor], formats: Mapping[str, WeightFormat], config: Any, title: str) -> nn.Module:
    """The model of this configuration whose weights these are, in eval mode; UserError for what fits none."""
    format = formats[detect(tensors, formats, title)]
    model = format.build(config)
    return filled(model, format.to_ours(tensors, model.state_dict()))


# {a configuration file's name: (what it would say of our configuration, a library's defaults of what no tensor tells)}
Beside = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]


def check_beside(path: Path, beside: Beside) -> None:
    """UserError where a configuration in the folder of published weights is of another model than ours. Compared is
    what the library's defaults name: heads, activations, epsilons; of all else the tensors' shapes tell."""
    for name, (ours, defaults) in beside.items():
        file = (path if path.is_dir() else path.parent) / name
        if not file.is_file():
            continue
        try:
            theirs = dict(json.loads(file.read_text(encoding="utf-8-sig")))
        except (OSError, ValueError, TypeError, RecursionError) as wrong:
            raise UserError(f"{file}: no configuration ({type(wrong).__name__}); fetch the folder anew") from None
        if theirs.get("model_type") == ours.get("model_type") and (found := _different(theirs, ours, defaults)):
            raise UserError(f"{file}: another model than this variant: {'; '.join(found)}")


def _different(theirs: Any, ours: Mapping[str, Any], defaults: Mapping[str, Any], place: str = "") -> list[str]:
    found = []
    for key, default in defaults.items():
        there = theirs.get(key, {} if isinstance(default, Mapping) else default) if isinstance(theirs, Mapping) else {}
        if isinstance(default, Mapping):
            found += _different(there, ours[key], default, f"{place}{key}.")
        elif not alike(there, ours[key]):
            found.append(f"{place}{key} is {there}, ours {ours[key]}")
    return found


WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile and a LightningModule


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers put before every name."""
    while prefix := next((w for w in WRAPPERS if tensors and all(key.startswith(w) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def words_in(path: Path, *endings: str) -> int | None:
    """Rows of the token table, whose name has one of these endings, in a weights file: a small tokenizer has as many
    words as its texts gave. None where there is no such table."""
    header = read_header(path / "model.safetensors" if path.is_dir() else path)
    return next((len(table) for key, table in header.items() if key.endswith(endings)), None)


def load_pretrained(
    path: Path, fill: Callable[[dict[str, Tensor]], Model], beside: Beside = MappingProxyType({})
) -> Model:
    """fill(all tensors of a weights file or folder); UserError names the file and what is wrong. beside: see
    `check_beside`, which is done before."""
    check_beside(path, beside)
    tensors = unwrapped(read_weights(path))
    try:
        return fill(tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def convert(
    source: Path,
    target: Path,
    variant: str,
    to: str,
    formats: Iterable[str],
    read: Callable[[], tuple[Mapping[str, Tensor], Callable[[], Mapping[str, Tensor]]]],
) -> None:
    """Write `source` as safetensors under our names (to="ours") or a published format's, strict both ways.

    read() -> (our state dict, a function that gives it under the names `to`). UserError: an unknown format, one that
    the weights do not fit.
    """
    if to not in ("ours", *formats):
        raise UserError(f"--to {to}: choose ours, {', '.join(formats)}")
    if not source.exists():
        raise UserError(f"{source}: no such file")
    state, published = read()
    try:
        save_weights(state if to == "ours" else published(), target, {"variant": variant})
    except UserError as error:
        raise UserError(f"{source} as {to}: {error}") from None


# ---- rows of maps


def rows(names: Mapping[str, str] | Iterable[str], source: str = "", target: str = "") -> dict:
    """Weight and bias of every module: {its published name: ours}; of names that are the same, a list."""
    names = names if isinstance(names, Mapping) else {name: name for name in names}
    return {f"{source}{theirs}.{part}": f"{target}{ours}.{part}" for theirs, ours in names.items() for part in PARTS}


def fused(sources: Iterable[str], target: str) -> dict:
    """Weights and biases of several published modules in one of ours."""
    sources = tuple(sources)
    return {tuple(f"{source}.{part}" for source in sources): f"{target}.{part}" for part in PARTS}


_TIMM = {
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
_TRANSFORMERS = {
    "layer_norm1": "attention_norm",
    "self_attn.qkv": "attention.qkv",
    "self_attn.projection": "attention.out",
    "layer_norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
_OPENAI = {
    "ln_1": "attention_norm",
    "attn.out_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


def map_vit(source: str, target: str, output_norm: bool = True) -> dict:
    """timm's ViT, which the official code of ALBEF and BLIP has too."""
    return {
        f"{source}cls_token": Rule(f"{target}positions.class_token", lead=2),
        f"{source}pos_embed": Rule(f"{target}positions.position", lead=1),
        **rows({"patch_embed.proj": "patch_embedding"}, source, target),
        **(rows({"norm": "output_norm"}, source, target) if output_norm else {}),
        **rows(_TIMM, f"{source}blocks.{{}}.", f"{target}blocks.{{}}."),
    }


def map_transformers_vit(source: str, target: str) -> dict:
    """The image encoder of transformers' BLIP and BLIP-2, without the norm behind it."""
    return {
        f"{source}embeddings.class_embedding": Rule(f"{target}positions.class_token", lead=2),
        f"{source}embeddings.position_embedding": Rule(f"{target}positions.position", lead=1),
        **rows({"embeddings.patch_embedding": "patch_embedding"}, source, target),
        **rows(_TRANSFORMERS, f"{source}encoder.layers.{{}}.", f"{target}blocks.{{}}."),
    }


def map_openai_block(source: str, target: str) -> dict:
    """A transformer block of OpenAI's CLIP, of pictures or of texts."""
    qkv = {f"{source}attn.in_proj_{part}": f"{target}attention.qkv.{part}" for part in PARTS}
    return qkv | rows(_OPENAI, source, target)


def map_openai_vit(source: str, target: str) -> dict:
    """The image encoder of OpenAI's CLIP, without the norm and the projection behind it."""
    return {
        f"{source}class_embedding": f"{target}positions.class_token",
        f"{source}positional_embedding": f"{target}positions.position",
        f"{source}conv1.weight": f"{target}patch_embedding.weight",
        **rows({"ln_pre": "input_norm"}, source, target),
        **map_openai_block(f"{source}transformer.resblocks.{{}}.", f"{target}blocks.{{}}."),
    }


def map_bert_tables(source: str, target: str, tables: Iterable[str] = ("word", "position")) -> dict:
    """The embedding tables of a BERT."""
    return {f"{source}{table}_embeddings.weight": f"{target}{table}.weight" for table in tables}


def map_bert_embeddings(source: str, target: str, tables: Iterable[str] = ("word", "position")) -> dict:
    """A BERT's embeddings: their tables, norm, and the numbers 0, 1, 2, ... that are dropped."""
    return {
        **map_bert_tables(source, target, tables),
        **rows({"LayerNorm": "norm"}, source, target),
        f"{source}position_ids": None,
    }


def map_cross_attention(attention: str, dense: str, target: str) -> dict:
    """One cross-attention: its projections, and the dense layer behind it."""
    return {
        **rows({f"{attention}.query": f"{target}.q", dense: f"{target}.out"}),
        **fused((f"{attention}.key", f"{attention}.value"), f"{target}.kv"),
    }


def map_bert_layer(source: str, target: str, cross: bool, mlp: bool = True, inner: str = "self") -> dict:
    """A layer of a BERT, with or without cross-attention and feed-forward. inner: the name of an attention's own
    module."""
    names = {"attention.output.dense": "attention.out", "attention.output.LayerNorm": "attention_norm"}
    if mlp:
        names |= {"intermediate.dense": "mlp.up", "output.dense": "mlp.down", "output.LayerNorm": "mlp_norm"}
    if cross:
        names |= {"crossattention.output.LayerNorm": "cross_norm"}
    table = rows(names, source, target)
    table |= fused(
        [f"{source}attention.{inner}.{part}" for part in ("query", "key", "value")], f"{target}attention.qkv"
    )
    if cross:
        at = f"{source}crossattention."
        table |= map_cross_attention(f"{at}{inner}", f"{at}output.dense", f"{target}cross_attention")
    return table


def map_bert(source: str, target: str, cross: bool = True) -> dict:
    """Embeddings and all layers of a BERT."""
    layers = map_bert_layer(f"{source}encoder.layer.{{}}.", f"{target}layers.{{}}.", cross)
    return {**map_bert_embeddings(f"{source}embeddings.", f"{target}embeddings."), **layers}


def map_token_head(source: str, target: str) -> dict:
    """BERT's word head; its matrix is the word table."""
    names = {"transform.dense": "dense", "transform.LayerNorm": "norm"}
    return rows(names, source, target) | {f"{source}bias": f"{target}bias"}


# BertForMaskedLM and BertForPreTraining: what no paper takes; the decoder is the word table
BERT_UNUSED: WeightMap = {
    f"{name}.{part}": None
    for name in ("bert.pooler.dense", "cls.seq_relationship", "cls.predictions.decoder")
    for part in PARTS
}


def bert_names(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of today: the oldest files write LayerNorm.gamma and LayerNorm.beta."""
    new = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    return {re.sub("|".join(map(re.escape, new)), lambda hit: new[hit[0]], k): v for k, v in published.items()}
