"""`python -m papers zeroshot`: a user's own pictures, classified by labels written on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from papers.clip.encode import classifier, image_features
from papers.clip.weights import load_model
from shared.core.errors import UserError
from shared.data.readers import Record, read_pictures
from shared.weights.manifest import MANIFEST

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
CHUNK = 64


def classify(
    pictures: Sequence[Path],
    variant: str,
    labels: Sequence[str],
    template: str,
    weights: Path | None = None,
    tokenizer: Path | None = None,
    manifest: Path = MANIFEST,
) -> Iterator[str]:
    """One line a picture: its path, the labels by falling probability. Folders are searched."""
    files = list(found(pictures))  # before the weights are fetched: a wrong path should cost nothing
    model, words = load_model(variant, weights, tokenizer, manifest)
    head = classifier(model, words, labels, [template])  # (labels, E)
    for start in range(0, len(files), CHUNK):
        records = [Record(str(path), path.read_bytes) for path in files[start : start + CHUNK]]
        kept, images, _ = read_pictures("pictures", records, model.config.image_size, max_dropped=0.0)
        with torch.no_grad():
            logits = model.logit_scale.exp() * image_features(model, torch.from_numpy(images)) @ head.T
        for record, row in zip(kept, logits.softmax(-1), strict=True):
            order = row.argsort(descending=True).tolist()
            yield f"{record.id}: " + ", ".join(f"{labels[i]} {100 * row[i]:.1f} %" for i in order)


def found(pictures: Sequence[Path]) -> Iterator[Path]:
    for path in pictures:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{path}: no pictures in this folder ({', '.join(sorted(SUFFIXES))})")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise UserError(f"{path}: no such file or folder; give pictures, or folders of them")
