"""Weights into a model and out of it, strictly, with a card that says what they are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shared.core.errors import UserError
from shared.core.files import atomic
from shared.weights.manifest import Entry
from shared.weights.safe_load import _head, read_header, read_tensors
from shared.weights.weight_map import WeightMap, _differences, _refuse, to_ours


def load_weights(model: nn.Module, path: str | Path, weight_map: WeightMap | None = None) -> None:
    """Read a file into a model, strictly: every parameter and buffer of its state dict, no key more, same shapes, and
    numbers of the same kind; the model keeps its dtypes. Without a map the file holds our own names. What a safetensors
    header promises is held against the model before any tensor is read."""
    if _head(Path(path))[8:] == b"{":
        _fitted(path, read_header(path), model, weight_map)
    model.load_state_dict(_fitted(path, read_tensors(path), model, weight_map), strict=True)


def _fitted(
    path: str | Path, tensors: dict[str, Tensor], model: nn.Module, weight_map: WeightMap | None
) -> dict[str, Tensor]:
    own = model.state_dict()
    expected = {key: tensor.shape for key, tensor in own.items()}
    try:
        if weight_map is None:
            _refuse("weights do not fit the model", _differences(tensors, expected))
        else:
            tensors = to_ours(tensors, weight_map, expected)
        other_kinds(tensors, own)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return tensors


def other_kinds(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """UserError for tensors whose numbers are of another kind (floating-point, or an integer type) than the model's."""

    def kind(tensor: Tensor) -> Any:
        return "floating-point" if tensor.is_floating_point() else tensor.dtype

    others = [f"{key} {t.dtype} for {own[key].dtype}" for key, t in tensors.items() if kind(t) != kind(own[key])]
    _refuse("weights do not fit the model", [("other kinds of numbers", others)])


INDEX = "model.safetensors.index.json"


def read_weights(path: Path) -> dict[str, Tensor]:
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


def save_weights(
    model_or_dict: nn.Module | Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file, whole or not at all. Metadata is stored as text (JSON where it is not a string)."""
    from safetensors.torch import save_file

    tensors = model_or_dict.state_dict() if isinstance(model_or_dict, nn.Module) else model_or_dict
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:  # tied weights and views are written out
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        ready[key] = tensor
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    try:
        with atomic(path) as temporary:
            save_file(ready, temporary, metadata={"format": "pt", **text})
            _sort_header(temporary)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write it ({error.strerror or error}); free space or name another place"
        ) from None


def _sort_header(path: Path) -> None:
    """safetensors writes its metadata in any order; equal weights are to be equal bytes, for hashes to name them."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # it was padded with spaces to a multiple of eight
            file.seek(8)
            file.write(text.ljust(size))


def card(pictures: Any, tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a manifest entry states of a model. pictures: a configuration with image_size, resize, mean and std."""
    preprocess = {
        "size": pictures.image_size,
        "resize": pictures.resize,
        "antialias": True,
        "mean": list(pictures.mean),
        "std": list(pictures.std),
    }
    return {"preprocess": preprocess, "tokenizer": dict(tokenizer), "config": dict(config)}


def text_card(config: Any) -> dict[str, Any]:
    """The tokenizer of a configuration, as a manifest entry states it."""
    return {"kind": config.tokenizer, "vocabulary": config.vocabulary, "context": config.context}


def check_card(entry: Entry, config: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold a manifest entry's card against the model's: weights load silently under the wrong resize, tokenizer,
    activation or norm, and only the score tells.

    `config` has the manifest's shape: {"preprocess": {size, resize, antialias, mean, std}, "tokenizer": {kind,
    vocabulary, context}, "config": {activation, norm_eps}}. Whatever the entry states (null states nothing), the model
    has to state alike.
    """
    for block in ("preprocess", "tokenizer", "config"):
        for name, published in getattr(entry, block).items():
            ours = config.get(block, {}).get(name)
            if published is not None and not alike(published, ours):
                raise UserError(f"{entry.id}: {block}.{name} is {published} in the manifest but {ours} in the model")


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    numbers = (int, float)
    if isinstance(a, numbers) and isinstance(b, numbers) and not isinstance(a, bool) and not isinstance(b, bool):
        return math.isclose(a, b, rel_tol=1e-6)
    return type(a) is type(b) and a == b
