"""The metrics rung: released weights on the paper's benchmarks, by the paper's protocol, in percent."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from papers.clip.encode import classifier, image_features, probe_features, prompts, text_features
from papers.clip.recipe import ClipRecipe
from papers.clip.weights import load_released
from shared.core.device import on_gpu_if_any
from shared.core.errors import UserError
from shared.core.paper_card import MetricRow
from shared.core.text import shown
from shared.data.readers import Record, folder_records, parquet_records
from shared.experiments.benchmarks import (
    FOLDERS,
    Benchmark,
    Need,
    Released,
    Run,
    Weights,
    by_measure,
    captions_of,
    itself,
    karpathy_test,
    predicted,
    run_benchmark,
)
from shared.metrics import linear_probe, retrieval_hits_from_features, topk_accuracy
from shared.tokenizers.clip import ClipTokenizer
from shared.tokenizers.load import imagenet_classes, imagenet_templates
from shared.weights.fetch import cached
from shared.weights.manifest import Entry

CHUNK = 256


def measure(row: MetricRow, recipe: ClipRecipe) -> float:
    """The row's score in percent. UserError: what is lacking, and the command that would run it."""
    return run_benchmark(row, recipe, BENCHMARKS, needs, load)


def needs(row: MetricRow, entries: Mapping[str, Entry], root: Path) -> list[Need]:
    """The weights, which are fetched where they are not here."""
    entry = entries[row.need.weights]
    size = f"{entry.size / 1e6:.0f} MB, " if entry.size else ""
    weights = f"weights {entry.file} ({size}sha256 {entry.sha256[:12]}...)"
    return [Need(weights, None, "here" if cached(entry) else "to fetch")]


def load(weights: Weights) -> Released:
    model = on_gpu_if_any(load_released(weights.variant, weights.entry))
    return Released(model, ClipTokenizer(), model.config.image_size)


def numbered(records: Sequence[Record], number: Mapping[str, int]) -> list[Record]:
    """The records, each with its class's number for a label."""
    return [replace(record, label=str(number[record.label])) for record in records]


def labels_of(records: Sequence[Record]) -> Tensor:
    return torch.tensor([int(record.label) for record in records])


def joint_features(run: Run, released: Released, records: Sequence[Record], images: Tensor) -> Tensor:
    return image_features(released.model, images[:, 0])


def encoder_features(run: Run, released: Released, records: Sequence[Record], images: Tensor) -> Tensor:
    return probe_features(released.model, images[:, 0])


# ---- zero-shot classification (Sec. 3.1)


def classified(run: Run) -> list[Record]:
    """The test pictures, numbered by the rows of the classifier."""
    imagenet = run.dataset == "ImageNet"
    records = folder_records(run.data, "val") if imagenet else parquet_records(run.data / "test.parquet")
    names, _ = class_prompts(run.dataset, run.protocol)
    return numbered(records, label_numbers(records, names, run.dataset))


def class_prompts(dataset: str, protocol: str) -> tuple[list[str], list[str]]:
    """Class names and templates that a protocol's name stands for."""
    if dataset == "ImageNet":
        return imagenet_classes(), imagenet_templates()
    published = prompts()
    return published["class_sets"][FOLDERS[dataset]]["names"], published["template_sets"][protocol]["templates"]


def label_numbers(records: Sequence[Record], names: Sequence[str], dataset: str) -> dict[str, int]:
    """Label in the files -> row of the classifier."""
    labels = sorted({record.label for record in records if record.label})
    if dataset == "ImageNet":
        return imagenet_numbers(labels)
    by_name = {name.replace("_", " "): index for index, name in enumerate(names)}
    unknown = [label for label in labels if label.replace("_", " ") not in by_name]
    if unknown:
        raise UserError(f"{dataset}: labels that are no class of it: {', '.join(unknown[:5])}")
    return {label: by_name[label.replace("_", " ")] for label in labels}


def imagenet_numbers(labels: Sequence[str]) -> dict[str, int]:
    """Class folder -> row of the classifier, by what the folders are called: the 1,000 synset ids, whose sorted order
    is that of the classifier, or numbers from 0 or from 1 in that order, which is said.

    UserError for anything else: sorted as they come, 12 of 1,000 numbers and 2 of 1,000 names would be right, and by
    the list of names two classes are called missile and two sunglasses.
    """
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo("imagenet-1k").label_names()
    if sorted(labels) == synsets:
        return {label: index for index, label in enumerate(synsets)}
    numbers = {int(label): label for label in labels if label.isdecimal()}
    for first in (0, 1):
        if len(labels) == len(synsets) and sorted(numbers) == list(range(first, first + len(synsets))):
            print(f"ImageNet: class folder {numbers[first]} is read as the first synset, {synsets[0]}", file=sys.stderr)
            return {label: number - first for number, label in numbers.items()}
    strange = next((f", among them {shown(label)}" for label in labels if label not in set(synsets)), "")
    raise UserError(
        f"ImageNet: {len(labels)} class folders in val{strange}: they must be the 1,000 synset ids ({synsets[0]}, "
        "...), or numbers in the order of these"
    )


def class_accuracy(run: Run, released: Released, records: Sequence[Record], features: Sequence[Tensor]) -> dict:
    head = classifier(released.model, released.tokenizer, *class_prompts(run.dataset, run.protocol))
    scores = torch.cat([part @ head.T for part in torch.stack(features).split(CHUNK)])
    return {f"top{k}": topk_accuracy(scores, labels_of(records), k) for k in (1, 5)}


# ---- retrieval (App. E.1), and a linear probe on the features before the projection (App. A.3)


def hits(run: Run, released: Released, records: Sequence[Record], features: Sequence[Tensor]) -> dict[str, float]:
    """Both directions, R@1, 5, 10; five captions a picture, each behind 'a photo of'."""
    texts, owner = captions_of(records, lambda record: [f"a photo of {text}" for text in record.captions[:5]])
    captions = text_features(released.model, released.tokenizer, texts)
    return by_measure(retrieval_hits_from_features(torch.stack(features), captions, owner))


def split_records(run: Run, split: str) -> list[Record]:
    records = parquet_records(run.data / f"{split}.parquet")
    return numbered(records, {label: n for n, label in enumerate(sorted({record.label for record in records}))})


def probe_accuracy(run: Run, released: Released, records: Sequence[Record], features: Sequence[Tensor]) -> dict:
    train, train_features = predicted(run, released, BENCHMARKS["probe"], split_records(run, "train"))
    probe = linear_probe(torch.stack(train_features), labels_of(train), torch.stack(features), labels_of(records))
    return {"top1": probe.accuracy}


CROPPED = {"chunk": CHUNK, "whole": False}
BENCHMARKS = {
    "zeroshot": Benchmark(classified, itself, joint_features, class_accuracy, **CROPPED),
    "retrieval": Benchmark(karpathy_test, itself, joint_features, hits, **CROPPED),
    "probe": Benchmark(lambda run: split_records(run, "test"), itself, encoder_features, probe_accuracy, **CROPPED),
}
