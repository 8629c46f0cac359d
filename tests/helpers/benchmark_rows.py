"""What the tests of the papers' metrics rung share: tiny sets in their published layouts, and rows of a card."""

import json
from pathlib import Path

import torch
from published import encoded

from shared.core.paper_card import MetricRow, Need
from shared.data.images import fitted_image
from shared.experiments import benchmarks


def forget_scores():
    """A run measures a set once; a test changes what lies there."""
    benchmarks.scores_of.cache_clear()
    benchmarks.released_of.cache_clear()


def row_of(card, metric, **more):
    """The first row of the card with this metric and these fields."""
    return next(
        row for row in card.metrics
        if row.metric == metric and all(getattr(row, name) == value for name, value in more.items())
    )  # fmt: skip


def made_row(paper, dataset, split, metric, weights, variant):
    """A row of no card."""
    return MetricRow(
        id=f"{paper}.metrics.x", variant=variant, dataset=dataset, split=split, metric=metric, reported=50.0,
        remeasured=None, tolerance=1.0, source="Table 2", need=Need(weights=weights, data="as published"),
    )  # fmt: skip


def manifest_entry(config, file, source, seal=None, **tokenizer):
    """What a manifest says of a checkpoint of this configuration."""
    preprocess = {"size": config.image_size, "resize": "bicubic", "antialias": True}
    return {
        "what": "tiny weights", "kind": "checkpoint", "source": source, "file": file, "sha256": seal, "licence": "none",
        "preprocess": preprocess | {"mean": list(config.mean), "std": list(config.std)},
        "tokenizer": {"kind": config.tokenizer, "vocabulary": config.vocabulary, **tokenizer},
    }  # fmt: skip


def picture(path, index):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded((60 * index % 250, 90, 40 * index % 250), (30 + index, 24)))


def karpathy(folder, captions, split="test"):
    rows = []
    for index, several in enumerate(captions):
        picture(folder / f"{index}.jpg", index)
        rows.append({"filename": f"{index}.jpg", "split": split, "sentences": [{"raw": text} for text in several]})
    (folder / "dataset_toy.json").write_text(json.dumps({"dataset": "toy", "images": rows}))


def nocaps(folder, count=2):
    """Pictures 7, 8, ... of the validation split."""
    for index in range(count):
        picture(folder / "val" / f"{index}.jpg", index)
    images = [{"id": 7 + i, "file_name": f"{i}.jpg", "domain": "near-domain"} for i in range(count)]
    (folder / "nocaps_val.json").write_text(json.dumps({"images": images}))


def read_files(paths, size=32):
    return read_pictures([path.read_bytes() for path in paths], size)


def read_pictures(contents, size=32):
    """Bytes of picture files as the models take them, (I, 3, size, size)."""
    return torch.stack([torch.from_numpy(fitted_image(content, size, whole=True).copy()) for content in contents])


def written(message):
    """What the file holds that an error says was written."""
    return json.loads(Path(str(message.value).split("written to ")[1].split(";")[0]).read_text())
