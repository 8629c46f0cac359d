"""The metrics rung: released weights on the paper's benchmarks, by the paper's protocol, in percent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from papers.clip.encode import classifier, image_features, probe_features, text_features
from papers.clip.model import Clip
from papers.clip.recipe import ClipRecipe
from papers.clip.weights import load_released, prompts
from shared.core.device import on_gpu_if_any
from shared.core.errors import UserError
from shared.core.paper_card import MetricRow
from shared.data.readers import Record, folder_records, karpathy_records, parquet_records, read_pictures
from shared.metrics import linear_probe, retrieval_hits_from_features, topk_accuracy
from shared.tokenizers.clip import ClipTokenizer
from shared.tokenizers.load import imagenet_classes, imagenet_templates
from shared.weights.fetch import cached
from shared.weights.manifest import load_manifest

# Where each benchmark lies under data_root.
FOLDERS = {
    "CIFAR-10": "cifar10",
    "CIFAR-100": "cifar100",
    "ImageNet": "imagenet",
    "Flickr30k": "flickr30k",
    "MSCOCO": "coco",
}
CHUNK = 256
LARGEST_DROPPED = 0.001


def measure(row: MetricRow, recipe: ClipRecipe) -> float:
    """The row's score in percent. UserError: what is lacking, and the command that would run it."""
    entries = load_manifest(recipe.manifest)
    if row.need.weights not in entries:
        raise UserError(f"an entry '{row.need.weights}' in {recipe.manifest}")
    entry = entries[row.need.weights]
    folder = Path(recipe.data_root) / FOLDERS[row.dataset] if recipe.data_root else None
    if recipe.scale != "paper" or folder is None or not folder.exists():
        size = f"{entry.size / 1e6:.0f} MB, " if entry.size else ""
        place = folder or Path("FOLDER") / FOLDERS[row.dataset]
        command = f'make reproduce PAPER=clip SCALE=paper ARGS="data_root={recipe.data_root or "FOLDER"}"'
        weights = f"{entry.file} ({size}sha256 {entry.sha256[:12]}..., {'here' if cached(entry) else 'to fetch'})"
        raise UserError(f"{command} with {place}: {row.need.data}; weights {weights}")
    task, _, protocol = row.metric.partition("@")
    if task == "probe/top1":
        return 100 * probe_score(row.variant, row.need.weights, recipe.manifest, folder)
    if task.startswith("zeroshot/"):
        scores, labels = class_scores(row.variant, row.need.weights, recipe.manifest, folder, row.dataset, protocol)
        return 100 * topk_accuracy(scores, labels, int(task.removeprefix("zeroshot/top")))
    hits = retrieval(row.variant, row.need.weights, recipe.manifest, folder)
    return 100 * hits[row.metric]


@lru_cache(maxsize=1)
def model_of(variant: str, weights: str, manifest: str) -> Clip:
    model = load_released(variant, load_manifest(manifest)[weights])
    return on_gpu_if_any(model)


@lru_cache(maxsize=2)
def class_scores(
    variant: str, weights: str, manifest: str, folder: Path, dataset: str, protocol: str
) -> tuple[Tensor, Tensor]:
    """Cosines (N, C) and labels (N,) of a classification set."""
    model = model_of(variant, weights, manifest)
    names, templates = class_prompts(dataset, protocol)
    head = classifier(model, ClipTokenizer(), names, templates)
    records = classification_records(folder, dataset)
    number = label_numbers(records, names, dataset)
    scores, labels = [], []
    for kept, images in batches(dataset, records, model.config.image_size):
        scores.append(image_features(model, images) @ head.T)
        labels += [number[record.label] for record in kept]
    return torch.cat(scores), torch.tensor(labels)


def class_prompts(dataset: str, protocol: str) -> tuple[list[str], list[str]]:
    """Class names and templates that a protocol's name stands for."""
    if dataset == "ImageNet":
        return imagenet_classes(), imagenet_templates()
    published = prompts()
    return published["class_sets"][FOLDERS[dataset]]["names"], published["template_sets"][protocol]["templates"]


def classification_records(folder: Path, dataset: str, split: str = "test") -> list[Record]:
    return folder_records(folder, "val") if dataset == "ImageNet" else parquet_records(folder / f"{split}.parquet")


def label_numbers(records: Sequence[Record], names: Sequence[str], dataset: str) -> dict[str, int]:
    """Label in the files -> row of the classifier. ImageNet's folders are its 1,000 synset ids, in sorted order."""
    labels = sorted({record.label for record in records})
    if dataset == "ImageNet":
        if len(labels) != len(names):
            raise UserError(f"ImageNet: {len(labels)} class folders in val, but there are {len(names)} classes")
        return {label: index for index, label in enumerate(labels)}
    by_name = {name.replace("_", " "): index for index, name in enumerate(names)}
    unknown = [label for label in labels if label.replace("_", " ") not in by_name]
    if unknown:
        raise UserError(f"{dataset}: labels that are no class of it: {', '.join(unknown[:5])}")
    return {label: by_name[label.replace("_", " ")] for label in labels}


def batches(name: str, records: Sequence[Record], size: int) -> Iterator[tuple[list[Record], Tensor]]:
    """(records, pictures uint8 (N, 3, size, size)) in chunks; broken pictures are dropped up to a thousandth of all."""
    dropped: dict[str, str] = {}
    for start in range(0, len(records), CHUNK):
        kept, images, coverage = read_pictures(name, records[start : start + CHUNK], size, max_dropped=1.0)
        dropped |= coverage.dropped
        if len(dropped) > LARGEST_DROPPED * len(records):
            first = ", ".join(f"{id} ({why})" for id, why in list(dropped.items())[:3])
            raise UserError(f"{name}: {len(dropped)} broken pictures of {len(records)}: {first}; get the set anew")
        if kept:
            yield kept, torch.from_numpy(images)


@lru_cache(maxsize=2)
def retrieval(variant: str, weights: str, manifest: str, folder: Path) -> dict[str, float]:
    """Both directions, R@1, 5, 10; five captions a picture, each behind 'a photo of' (App. E.1)."""
    model = model_of(variant, weights, manifest)
    features, texts, owner, pictures = [], [], [], 0
    for kept, images in batches(folder.name, karpathy_records(folder)["test"], model.config.image_size):
        features.append(image_features(model, images))
        for record in kept:
            captions = record.captions[:5]
            texts += [f"a photo of {caption}" for caption in captions]
            owner += [pictures] * len(captions)
            pictures += 1
    words = text_features(model, ClipTokenizer(), texts)
    return retrieval_hits_from_features(torch.cat(features), words, torch.tensor(owner))


@lru_cache(maxsize=2)
def probe_score(variant: str, weights: str, manifest: str, folder: Path) -> float:
    """Linear probe on the features before the projection (App. A.3)."""
    model = model_of(variant, weights, manifest)
    splits = {}
    for split in ("train", "test"):
        records = parquet_records(folder / f"{split}.parquet")
        number = {label: i for i, label in enumerate(sorted({record.label for record in records}))}
        features, labels = [], []
        for kept, images in batches(folder.name, records, model.config.image_size):
            features.append(probe_features(model, images))
            labels += [number[record.label] for record in kept]
        splits[split] = torch.cat(features), torch.tensor(labels)
    return linear_probe(*splits["train"], *splits["test"]).accuracy
