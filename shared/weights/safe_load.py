"""Weight files read without running any code of theirs: safetensors, torch archives, TorchScript archives.

The last by a reader of ours, because OpenAI published CLIP in that form alone: the manifest pins those very files, and
torch.jit.load would take their code with the weights."""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.core.archives import Limits, SafeArchive
from shared.core.errors import UserError
from shared.core.text import shown
from shared.weights.weight_map import _listed


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
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument is not None and argument > len(program):
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
