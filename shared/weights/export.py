"""A model of ours as a folder that another library loads by itself: its configuration, weights, tokenizer and card."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shared.core.errors import UserError
from shared.core.files import whole_folder
from shared.weights.load import save_weights

COMPACT = ("tokenizer.json", "vocab.json")  # long lists that nobody reads


@dataclass(frozen=True)
class HfSpec:
    """What stands in an exported folder, and what its card says (report/model_card.py).

    weights: under the library's names. files: {name: content, as JSON, or a text}. loaded_by: ends the card's first
    sentence. task: what a hub lists it under. usage: Markdown. notes: on the origin, one line each.
    """

    weights: Mapping[str, Tensor]
    files: Mapping[str, Mapping[str, Any] | str]
    loaded_by: str
    task: str
    tag: str
    usage: str
    library: str = "transformers"
    notes: tuple[str, ...] = ()
    licensed: bool = True  # False: it also holds parts under licences of their own
    weights_file: str = "model.safetensors"
    save_tokenizer: Callable[[Path], Any] | None = None  # of a tokenizer that writes its own files


def check_export(source: Path, folder: Path, to: str, kinds: Iterable[str]) -> None:
    """UserError, before anything large is read, where the folder cannot be written."""
    if not source.exists():
        raise UserError(f"{source}: no such file")
    if to not in kinds or folder.suffix in (".pt", ".pth", ".bin"):
        raise UserError(
            f"{folder}: --to {to} is written as *.safetensors; a folder of another name is for {', '.join(kinds)}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a new folder")


def export_hf(folder: Path, spec: HfSpec, card: str) -> None:
    """Write the folder, whole or not at all. card: its README.md."""
    with whole_folder(folder) as beside:
        save_weights(spec.weights, beside / spec.weights_file)
        for name, content in spec.files.items():
            write_file(beside / name, content)
        if spec.save_tokenizer is not None:
            spec.save_tokenizer(beside)
        write_file(beside / "README.md", card)


def write_file(path: Path, content: Mapping[str, Any] | str) -> None:
    if not isinstance(content, str):
        indent = None if path.name in COMPACT else 2
        content = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    path.write_text(content, encoding="utf-8")


def preprocessor_config(kind: str, pictures: Any, **more: Any) -> dict[str, Any]:
    """preprocessor_config.json of transformers' image processor `kind`. pictures: a configuration with mean and std.
    more: size and cropping."""
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # Pillow's bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": pictures.mean,
        "image_std": pictures.std,
        **more,
    }


def whole_square(pictures: Any) -> dict[str, int]:
    """The size of pictures that are resized to a square, whatever their form."""
    return {"height": pictures.image_size, "width": pictures.image_size}
