"""What a frozen encoder says of a set of pictures, computed once and kept on disk (BLIP-2 reads it for many epochs).

A file is named by a hash of the encoder's weights and settings, of the pictures' bytes and of the precision, so that it
is found again by whoever has the same; it is sealed by the hash of its numbers, which is checked whenever it is read.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from shared.backbones.vision import Encoder
from shared.core.errors import UserError
from shared.core.files import locked, made
from shared.weights.load import save_weights

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def features_of(
    encoder: Encoder,
    images: Tensor,
    *,
    key: str,
    folder: Path,
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] | None = None,
) -> Tensor:
    """encoder(images), images uint8 (N, 3, H, W) -> (N, S, C) of `dtype` on the CPU, mapped from the file in `folder`.

    key: what the pictures are, for the file's name and for messages; it identifies nothing. A file that is damaged or
    holds something else is made anew, with one warning. Processes that ask at once wait for the one that computes.
    say: told of a hit or a miss, with its seconds.
    """
    if dtype not in PRECISIONS:
        raise UserError(f"features of {key}: no precision {dtype}; choose {', '.join(map(str, PRECISIONS))}")
    say = say or (lambda text: None)
    path = Path(folder) / f"{key}-{_identity(encoder, images, dtype)}.safetensors"
    shape = (len(images), encoder.tokens, encoder.width)
    clock = time.perf_counter()
    if (found := _read(path, shape, dtype)) is None:
        made(path.parent)
        with locked(path.with_suffix(".lock")):
            if (found := _read(path, shape, dtype)) is None:  # another process may have made it while this one waited
                if path.exists():
                    print(f"{path}: damaged or not what its name says; computed anew", file=sys.stderr, flush=True)
                features = _compute(encoder, images, batch, shape, dtype)
                save_weights({"features": features}, path, {"sha256": _digest(features)})
                say(f"features of {key}: computed in {time.perf_counter() - clock:.2f} s")
                return features
    say(f"features of {key}: from the cache in {time.perf_counter() - clock:.2f} s")
    return found


def _compute(encoder: Encoder, images: Tensor, batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    features = torch.empty(shape, dtype=dtype)
    with torch.no_grad():
        for start in range(0, len(images), batch):
            part = encoder(images[start : start + batch].to(encoder.device))
            features[start : start + batch] = part  # (B, S, C)
    return features


def _read(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The file's features, mapped rather than copied; None where there is no such file or it is not sound."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            seal, features = (file.metadata() or {}).get("sha256"), file.get_tensor("features")
    except (OSError, SafetensorError):
        return None
    sound = tuple(features.shape) == shape and features.dtype == dtype and _digest(features) == seal
    return features if sound else None


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _identity(encoder: Encoder, images: Tensor, dtype: torch.dtype) -> str:
    what = f"{encoder.digest} {tuple(images.shape)} {_digest(images)} {dtype}"
    return hashlib.sha256(what.encode()).hexdigest()[:16]
