"""Published weights in, ours out, and back: weight maps as data, total and strict. Files are read without running any
code of theirs: safetensors, torch archives with weights_only, and TorchScript archives (the form of OpenAI's CLIP)."""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.archives import Limits, SafeArchive, shown
from shared.errors import UserError
from shared.fetch import Entry, atomic
from shared.positions import resample_square


@dataclass(frozen=True)
class Rule:
    """Our key, and what happens on the way, in both directions: `transpose` swaps the two dimensions of a matrix;
    the published tensor has `lead` axes of size one before ours."""

    key: str
    transpose: bool = False
    lead: int = 0


# published key, or a tuple of them (concatenated along dim 0) -> our key | Rule | None (dropped where present).
# `{}` stands for a layer number, the same numbers in the same order on both sides.
WeightMap = Mapping["str | tuple[str, ...]", "str | Rule | None"]


def to_ours(
    published: Mapping[str, Tensor],
    weight_map: WeightMap,
    expected: Mapping[str, Iterable[int]] | None = None,
) -> dict[str, Tensor]:
    """Published tensors under our names.

    `expected` is {our key: shape}; without it every row of the map has to be used. Every published key that no row
    names, every key that is missing on either side, and every other shape is listed in one UserError.
    """
    used: set[str] = set()
    ours: dict[str, Tensor] = {}
    missing: list[str] = []
    for sources, rule in _rows(weight_map):
        matches = [_matches(source, published) for source in sources]
        for numbers in sorted({n for found in matches for n in found}):
            keys = [found.get(numbers) for found in matches]
            for key in filter(None, keys):
                if key in used:
                    raise UserError(f"weight map: two rows name '{key}'; keep one")
                used.add(key)
            if rule is None:
                continue
            if None in keys:
                missing += [_fill(s, numbers) for s, key in zip(sources, keys, strict=True) if key is None]
                continue
            target = _fill(rule.key, numbers)
            if target in ours:
                raise UserError(f"weight map: two rows give '{target}'; keep one")
            parts = [_transposed(_without_lead(published[key], rule, key), rule, key) for key in keys]
            ours[target] = parts[0] if len(parts) == 1 else torch.cat(parts)
        if rule is not None and expected is None and not any(matches):
            missing += sources
    problems = [("published keys without a row in the map", [k for k in published if k not in used])]
    problems.append(("published keys missing", missing))
    if expected is not None:
        problems += _differences(ours, expected)
    _refuse("weights do not fit the map", problems)
    return ours


def to_published(ours: Mapping[str, Tensor], weight_map: WeightMap) -> dict[str, Tensor]:
    """Our tensors under the published names: the reverse of `to_ours`, as total and as strict (rows of None are not
    produced). A fused tensor is split into equal parts along dim 0."""
    used: set[str] = set()
    published: dict[str, Tensor] = {}
    missing: list[str] = []
    for sources, rule in _rows(weight_map):
        if rule is None:
            continue
        found = _matches(rule.key, ours)
        missing += [] if found else [rule.key]
        for numbers, key in found.items():
            if key in used:
                raise UserError(f"weight map: two rows take '{key}'; keep one")
            used.add(key)
            rows, count = ours[key].shape[0] if ours[key].ndim else 0, len(sources)
            if count > 1 and (rows == 0 or rows % count):
                raise UserError(f"{key}: {tuple(ours[key].shape)} does not split into {count} equal parts along dim 0")
            parts = ours[key].split(rows // count) if count > 1 else [ours[key]]
            for source, part in zip(sources, parts, strict=True):
                published[_fill(source, numbers)] = _transposed(part, rule, key)[(None,) * rule.lead]
    problems = [
        ("our keys without a row in the map", [k for k in ours if k not in used]),
        ("our keys missing", missing),
    ]
    _refuse("weights do not fit the map", problems)
    return published


def carried_to(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names that fit `expected`, a state dict: positions for another picture size are interpolated,
    without anti-aliasing, as the official code of ALBEF and BLIP does (models/vit.py). UserError: other names or
    shapes."""
    fitting = dict(tensors)
    for key, table in tensors.items():
        if key.endswith("positions.position") and key in expected:
            fitting[key] = resample_square(table, expected[key], antialias=False)
    return to_ours(fitting, {key: key for key in fitting}, {key: tensor.shape for key, tensor in expected.items()})


def _rows(weight_map: WeightMap) -> list[tuple[tuple[str, ...], Rule | None]]:
    """The map in one form. A row whose sides disagree on their layer numbers could not be reversed."""
    rows = []
    for sources, rule in weight_map.items():
        sources = (sources,) if isinstance(sources, str) else tuple(sources)
        rule = Rule(rule) if isinstance(rule, str) else rule
        counts = {key.count("{}") for key in (*sources, *([rule.key] if rule else []))}
        if len(counts) != 1:
            raise UserError(f"weight map: {sources} and '{rule.key if rule else None}' differ in their number of {{}}")
        rows.append((sources, rule))
    return rows


def _matches(pattern: str, keys: Iterable[str]) -> dict[tuple[int, ...], str]:
    """{layer numbers: key} of all keys that the pattern names."""
    if "{}" not in pattern:
        return {(): pattern} if pattern in keys else {}
    compiled = re.compile("(0|[1-9][0-9]*)".join(map(re.escape, pattern.split("{}"))))
    hits = ((compiled.fullmatch(key), key) for key in keys)
    return {tuple(map(int, hit.groups())): key for hit, key in hits if hit}


def _fill(pattern: str, numbers: tuple[int, ...]) -> str:
    return pattern.format(*numbers)


def _transposed(tensor: Tensor, rule: Rule, key: str) -> Tensor:
    if not rule.transpose:
        return tensor
    if tensor.ndim != 2:
        raise UserError(f"{key}: transpose is for matrices, this has shape {tuple(tensor.shape)}; correct the map")
    return tensor.T.contiguous()


def _without_lead(tensor: Tensor, rule: Rule, key: str) -> Tensor:
    if set(tensor.shape[: rule.lead]) - {1} or tensor.ndim < rule.lead:
        raise UserError(
            f"{key}: {tuple(tensor.shape)} does not begin with {rule.lead} axes of size one; correct the map"
        )
    return tensor.reshape(tensor.shape[rule.lead :])


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Iterable[int]]) -> list[tuple[str, list[str]]]:
    shapes = {key: tuple(shape) for key, shape in expected.items()}
    other = [
        f"{key} {tuple(tensor.shape)} for {shapes[key]}"
        for key, tensor in found.items()
        if key in shapes and tuple(tensor.shape) != shapes[key]
    ]
    return [
        ("keys that the model lacks", [k for k in found if k not in shapes]),
        ("keys of the model without a weight", [k for k in shapes if k not in found]),
        ("other shapes", other),
    ]


def _refuse(what: str, problems: list[tuple[str, list[str]]]) -> None:
    told = "; ".join(f"{name}: {_listed(keys)}" for name, keys in problems if keys)
    if told:
        raise UserError(f"{what}: {told}")


def _listed(keys: list[str], show: int = 8) -> str:
    more = f", ... ({len(keys)} in all)" if len(keys) > show else ""
    return ", ".join(shown(key) for key in keys[:show]) + more


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
        kinds = [f"{key} {t.dtype} for {own[key].dtype}" for key, t in tensors.items() if _kind(t) != _kind(own[key])]
        _refuse("weights do not fit the model", [("other kinds of numbers", kinds)])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return tensors


def _kind(tensor: Tensor) -> Any:
    return "floating-point" if tensor.is_floating_point() else tensor.dtype


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


def read_header(path: str | Path) -> dict[str, Tensor]:
    """The names, shapes and dtypes of a weight file as tensors on the meta device. Of a safetensors file the header
    alone is read; a file of another kind is read as a whole."""
    path = Path(path)
    if _head(path)[8:] != b"{":
        return {key: tensor.to("meta") for key, tensor in read_tensors(path).items()}
    try:
        return _safetensors_header(path)
    except UserError:
        raise
    except Exception as error:
        raise _refused(path, error) from None


def _safetensors_header(path: Path) -> dict[str, Tensor]:
    """safetensors itself holds offsets, shapes and dtypes against each other and against the file's length, but takes
    the last of two equal keys; and its limit of 100 MB would be a gigabyte of Python objects."""
    from safetensors import safe_open

    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _LARGEST_HEADER:
            raise ValueError(f"header too large, {length:,} bytes")
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            promised = {key: (tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()}
        json.loads(stream.read(length), object_pairs_hook=_unique)
    if unknown := {dtype for _, dtype in promised.values()} - set(_DTYPES):
        raise ValueError(f"numbers of a type that no weights here have, {', '.join(sorted(unknown))}")
    return {key: torch.empty(shape, dtype=_DTYPES[dtype], device="meta") for key, (shape, dtype) in promised.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise ValueError(f"key '{twice[0]}' is given twice")
    return dict(pairs)


_LARGEST_HEADER = 1 << 24  # bytes
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weight file, on the CPU, by its content: safetensors, a torch archive (weights_only: tensors and
    plain containers), or a TorchScript archive (its parameters and buffers; its code is not run)."""
    path = Path(path)
    head = _head(path)
    try:
        if head[8:] == b"{":
            from safetensors.torch import load_file

            _safetensors_header(path)
            return load_file(path)
        if head[:4] == b"PK\x03\x04":
            with SafeArchive(path, _STORED) as archive:
                names = list(archive.members())
                if any(name.endswith("/constants.pkl") for name in names):  # as torch.load tells them
                    return _read_torchscript(archive, names)
            return _only_tensors(path, torch.load(path, map_location="cpu", weights_only=True))
        if head[:1] == b"\x80":  # a bare pickle, as torch wrote before 1.6
            return _only_tensors(path, torch.load(path, map_location="cpu", weights_only=True))
    except UserError:
        raise
    except Exception as error:  # parsers of hostile or cut files fail in many ways
        raise _refused(path, error) from error
    raise UserError(f"{path}: neither safetensors nor a torch archive; convert it to safetensors")


_STORED = Limits(ratio=1.0, member=1 << 40)  # torch packs the code of TorchScript alone


def _head(path: Path) -> bytes:
    """The first nine bytes, which tell the kinds of weight files apart."""
    try:
        with open(path, "rb") as stream:
            return stream.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror}); fetch it or correct the path") from None


def _refused(path: Path, error: Exception) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return UserError(f"{path}: refused as a weight file ({shown(reason)}); fetch it again or convert it")


def _only_tensors(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The state dict of a loaded file, which training code often wraps as {"model": ...} or {"state_dict": ...}."""
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    others = (
        [k for k, v in loaded.items() if not isinstance(v, Tensor)] if isinstance(loaded, Mapping) else ["the whole"]
    )
    if others:
        raise UserError(f"{path}: not a state dict, these are no tensors: {_listed(others)}; save the state dict alone")
    for key, tensor in loaded.items():  # a view may repeat one number to any size, and a copy of it would be that size
        if tensor.layout != torch.strided or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"'{key}' {tuple(tensor.shape)} is not stored in full")
    return dict(loaded)


class _Module:
    """The shell of a TorchScript module: a name and attributes, no behaviour."""

    qualified = ""


class _ArchiveUnpickler(pickle.Unpickler):
    """Builds tensors, plain containers and empty shells out of a TorchScript data.pkl, and refuses every other name, so
    that nothing in the file can be called."""

    def __init__(self, archive: SafeArchive, root: str):
        program = archive.read(f"{root}/data.pkl")
        for opcode, argument, _ in pickletools.genops(program):  # one number makes the C unpickler's memo that long
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(program):
                raise ValueError(f"a memo of {argument:,} places")
        super().__init__(io.BytesIO(program))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}
        self.allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("collections", "OrderedDict"): OrderedDict,
            # TorchScript's typed lists
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (_Module,), {"qualified": f"{module}.{name}"})
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        raise UserError(
            f"{self.archive.path}: asks for {shown(f'{module}.{name}')}, which weights do not need; not loaded"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        """('storage', dtype, key, device, elements): the device that it was saved from is ignored."""
        kind, dtype, key, _device, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown persistent object {kind!r}")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        storage = self.storages[key]
        if storage.dtype != dtype or storage.numel() != count:
            raise ValueError(f"storage {key} holds {storage.numel()} x {storage.dtype}, not {count} x {dtype}")
        return storage


_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_grad_and_hooks: Any) -> Tensor:
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if math.prod(size) else 0
    sound = all(n >= 0 for n in (offset, *size, *stride)) and math.prod(size) <= storage.numel()
    if not sound or (math.prod(size) and last >= storage.numel()):
        raise ValueError(f"a tensor {tuple(size)} does not fit its storage of {storage.numel()}")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _read_torchscript(archive: SafeArchive, names: list[str]) -> dict[str, Tensor]:
    """What jit_module.state_dict() would give: the tensors that the code's class headers name as parameters or buffers.
    The code is read as text."""
    root = next(name for name in names if name.endswith("/constants.pkl")).rsplit("/", 1)[0]
    byteorder = f"{root}/byteorder"
    if byteorder in names and archive.read(byteorder) != b"little":
        raise UserError(f"{archive.path}: written on a big-endian machine; convert it to safetensors there")
    headers: dict[str, set[str] | None] = {}  # None: written before 1.6, which named no buffers; take every tensor
    for name in names:
        if name.startswith(f"{root}/code/") and name.endswith(".py"):
            module = name[len(f"{root}/code/") : -len(".py")].replace("/", ".")
            for found in _HEADER.finditer(archive.read(name).decode()):
                listed = None if found[3] is None else set(re.findall(r'"([^"]+)"', found[2] + found[3]))
                headers[f"{module}.{found[1]}"] = listed

    tensors: dict[str, Tensor] = {}

    def walk(module: _Module, prefix: str, above: tuple[int, ...]) -> None:
        if id(module) in above:
            raise ValueError(f"module {prefix} contains itself")
        qualified = type(module).qualified
        if qualified not in headers:
            raise ValueError(f"no code describes {qualified}")
        named = headers[qualified]
        for name, value in vars(module).items():
            if isinstance(value, _Module):
                walk(value, f"{prefix}{name}.", (*above, id(module)))
            elif isinstance(value, Tensor) and (named is None or name in named):
                tensors[f"{prefix}{name}"] = value

    walk(_ArchiveUnpickler(archive, root).load(), "", ())
    return tensors


_HEADER = re.compile(r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?", re.M)


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
            if published is not None and not _alike(published, ours):
                raise UserError(f"{entry.id}: {block}.{name} is {published} in the manifest but {ours} in the model")


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    numbers = (int, float)
    if isinstance(a, numbers) and isinstance(b, numbers) and not isinstance(a, bool) and not isinstance(b, bool):
        return math.isclose(a, b, rel_tol=1e-6)
    return type(a) is type(b) and a == b
