"""The metrics rung: released weights on published benchmarks. What a row needs and lacks, pictures a part at a time,
predictions, scores.

A paper has a table {task of a row's metric: Benchmark}, says what its rows need beside the data, and loads that.
Axes: N samples, P pictures of a sample, I pictures, T texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from shared.core.errors import UserError
from shared.core.files import write_whole
from shared.core.paper_card import MetricRow
from shared.core.recipe import Recipe
from shared.data.benchmarks import nocaps_records
from shared.data.images import PictureError, fitted_image
from shared.data.readers import Record, karpathy_records
from shared.data.vqa import write_vqa_results
from shared.metrics import caption_scores, reranked_hits
from shared.weights.fetch import cached
from shared.weights.manifest import Entry, load_manifest

FOLDERS = {  # where each benchmark lies under data_root
    "CIFAR-10": "cifar10",
    "CIFAR-100": "cifar100",
    "ImageNet": "imagenet",
    "MSCOCO": "coco",
    "Flickr30k": "flickr30k",
    "NoCaps": "nocaps",
    "VQAv2": "vqav2",
    "OK-VQA": "okvqa",
    "GQA": "gqa",
    "NLVR2": "nlvr2",
    "SNLI-VE": "snli-ve",
    "RefCOCO+": "refcoco+",
    "VisDial v1.0": "visdial",
    "MSR-VTT": "msrvtt",
    "MSRVTT-QA": "msrvtt",
}
LARGEST_DROPPED = 0.001  # of a set's samples, for pictures that cannot be read
T = TypeVar("T")


class Need(NamedTuple):
    """Something that a row cannot be measured without."""

    text: str  # what it is, where it lies or would, and where it comes from; "": the row does without
    place: Path | None
    state: Literal["here", "missing", "to fetch"]


class Released(NamedTuple):
    """Weights as benchmarks take them: on their device, in eval mode."""

    model: Any
    tokenizer: Any
    image_size: int
    encoder: Any = None  # of pictures, where the weights have it not


@dataclass(frozen=True)
class Weights:
    """Which weights a row takes, and for what task; `row` is the first of those that take them."""

    id: str  # the manifest's
    variant: str
    task: str  # of the metric task/measure@protocol
    places: tuple[Path | None, ...]  # of the needs beside the data: the weights first
    row: MetricRow = field(compare=False)
    entry: Entry = field(compare=False)

    @property
    def file(self) -> Path:
        """Of the weights."""
        assert self.places[0] is not None, f"{self.id} is fetched, and lies nowhere yet"
        return self.places[0]


@dataclass(frozen=True)
class Run:
    """One pass over a data set, which rows that differ in nothing but the measure share."""

    weights: Weights
    dataset: str
    split: str  # without the domain that NoCaps's rows name
    protocol: str
    data: Path

    def predictions(self) -> Path:
        """The file for what only a server scores."""
        folder = Path("runs") / self.weights.row.id.partition(".")[0] / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.dataset}-{self.split}-{self.weights.file.stem}.json".lower()


@dataclass(frozen=True)
class Benchmark:
    """How one kind of row is measured.

    samples(run) -> all; pictures(run, sample) -> its P records; predict(run, released, samples, images) -> N
    predictions, of images uint8 (N, P, 3, S, S); score(run, released, samples, predictions) -> {measure: share}, or,
    where a server alone has the answers, a message that names the file for it.
    """

    samples: Callable[[Run], Sequence[Any]]
    pictures: Callable[[Run, Any], Sequence[Record]]
    predict: Callable[[Run, Released, Sequence[Any], Tensor], Sequence[Any]]
    score: Callable[[Run, Released, Sequence[Any], Sequence[Any]], Mapping[str, float] | str]
    chunk: int = 32  # samples whose pictures are in memory at once
    whole: bool = True  # pictures are squeezed into the square, not cropped


def run_benchmark(
    row: MetricRow,
    recipe: Recipe,
    benchmarks: Mapping[str, Benchmark],
    needs: Callable[[MetricRow, Mapping[str, Entry], Path], Sequence[Need]],
    load: Callable[[Weights], Released],
) -> float:
    """The row's score in percent. UserError: what is lacking, and the command that would run it.

    needs(row, manifest, data_root): what the row needs beside the data, the weights first.
    """
    task, _, rest = row.metric.partition("/")
    measure, _, protocol = rest.partition("@")
    if measure == "spice":
        raise UserError("SPICE needs Java and the Stanford parser, which are not used here; score captions elsewhere")
    entries = load_manifest(recipe.manifest)
    if row.need.weights not in entries:
        raise UserError(f"an entry '{row.need.weights}' in {recipe.manifest}")
    root = Path(recipe.data_root or "FOLDER")
    folder = root / FOLDERS[row.dataset]
    beside = needs(row, entries, root)
    every = [need_of(f"data {folder} ({row.need.data})", folder), *beside]
    if recipe.scale != "paper" or any(need.state == "missing" for need in every):
        command = f'make reproduce PAPER={recipe.paper} SCALE=paper ARGS="data_root={root}"'
        raise UserError(f"{command} with {'; '.join(f'{need.text}: {need.state}' for need in every if need.text)}")
    places = tuple(need.place for need in beside)
    weights = Weights(row.need.weights, row.variant, task, places, row, entries[row.need.weights])
    run = Run(weights, row.dataset, row.split.split()[0], protocol, folder)
    scores = scores_of(run, benchmarks[task], load)
    if isinstance(scores, str):
        raise UserError(scores)
    return 100 * scores[measure]


@cache
def scores_of(run: Run, benchmark: Benchmark, load: Callable[[Weights], Released]) -> Mapping[str, float] | str:
    released = released_of(run.weights, load)
    return benchmark.score(run, released, *predicted(run, released, benchmark, benchmark.samples(run)))


@lru_cache(maxsize=1)
def released_of(weights: Weights, load: Callable[[Weights], Released]) -> Released:
    return load(weights)


def predicted(run: Run, released: Released, benchmark: Benchmark, samples: Sequence[T]) -> tuple[list[T], list[Any]]:
    """The samples whose pictures could be read, and what is predicted of each."""
    read: list[T] = []
    predictions: list[Any] = []
    pictures = partial(benchmark.pictures, run)
    size, chunk, whole = released.image_size, benchmark.chunk, benchmark.whole
    for some, images in in_chunks(run.data.name, samples, pictures, size, chunk, whole):
        predictions.extend(benchmark.predict(run, released, some, images))
        read += some
    return read, predictions


def in_chunks(
    name: str, samples: Sequence[T], pictures: Callable[[T], Sequence[Record]], size: int, chunk: int, whole: bool
) -> Iterator[tuple[list[T], Tensor]]:
    """(samples, their pictures uint8 (N, P, 3, size, size)). Samples with a broken picture are dropped, up to a
    thousandth of all; beyond that a UserError names them."""
    dropped: list[str] = []
    for start in range(0, len(samples), chunk):
        read, images = [], []
        for sample in samples[start : start + chunk]:
            own = []
            try:
                for record in pictures(sample):
                    own.append(torch.from_numpy(fitted_image(record.read(), size, whole=whole, released=True).copy()))
            except (PictureError, OSError) as wrong:
                dropped.append(f"{record.id} ({getattr(wrong, 'strerror', None) or wrong})")
                continue
            read.append(sample)
            images.append(torch.stack(own))
        if len(dropped) > LARGEST_DROPPED * len(samples):
            first = ", ".join(dropped[:3])
            raise UserError(f"{name}: {len(dropped)} broken pictures of {len(samples)}: {first}; get the set anew")
        if read:
            yield read, torch.stack(images)


# ---- what rows need


def need_of(text: str, place: Path) -> Need:
    return Need(text, place, "here" if place.exists() else "missing")


def released_file(what: str, entry: Entry, root: Path) -> Need:
    """A file of the manifest that is not fetched unasked: under root/weights by the name that it was published under,
    else what was fetched before."""
    local = root / "weights" / entry.name
    place = local if local.exists() or entry.sha256 is None else cached(entry) or local
    known = f"sha256 {entry.sha256[:12]}..." if entry.sha256 else "no sha256 was published"
    return need_of(f"{what} {place} ({entry.origin}; {known})", place)


def trained_weights(name: str, how: str, root: Path) -> Need:
    """Weights that nobody released; how: what they are trained from, for the message."""
    place = root / "weights" / f"{name}.safetensors"
    return need_of(f"weights {place}, {how}", place)


# ---- kinds of rows that several papers have


def one_picture(run: Run, sample: Any) -> list[Record]:
    return [sample.picture]


def itself(run: Run, record: Record) -> list[Record]:
    return [record]


def both_pictures(run: Run, pair: Any) -> Sequence[Record]:
    return pair.pictures


def of_split(read: Callable[[Path, str], Sequence[Any]]) -> Callable[[Run], Sequence[Any]]:
    """`samples` of a reader that takes folder and split."""
    return lambda run: read(run.data, run.split)


def karpathy_test(run: Run) -> list[Record]:
    return karpathy_records(run.data)["test"]


def captions_of(samples: Sequence[T], captions: Callable[[T], Sequence[str]]) -> tuple[list[str], Tensor]:
    """All captions, and of each the row of its picture (T,)."""
    of_each = [captions(sample) for sample in samples]
    owner = [row for row, texts in enumerate(of_each) for _ in texts]
    return [text for texts in of_each for text in texts], torch.tensor(owner)


def by_measure(scores: Mapping[str, float]) -> dict[str, float]:
    """{task/measure@protocol: share} -> {measure: share}."""
    return {name.partition("/")[2].partition("@")[0]: share for name, share in scores.items()}


def candidates_of(protocol: str) -> int:
    """'zeroshot-itc-top128-itm' -> 128."""
    return int(next(part for part in protocol.split("-") if part.startswith("top")).removeprefix("top"))


def retrieval(
    encode: Callable[[Released, Tensor], Sequence[Tensor]],
    rank: Callable[[Released, Sequence[Tensor], list[str], int], tuple[Tensor, Tensor]],
    captions: Callable[[Any], Sequence[str]],
    samples: Callable[[Run], Sequence[Any]] = karpathy_test,
    pictures: Callable[[Run, Any], Sequence[Record]] = itself,
    chunk: int = 32,
) -> Benchmark:
    """Both directions, R@1, 5, 10, re-ranked, with all captions(sample) of each picture.

    encode(released, images (I, P, 3, S, S)) -> tensors (I, ...) that a ranking takes; rank(released, these of all
    pictures, texts, candidates) -> scores (I, T) and (T, I).
    """

    def predict(run: Run, released: Released, records: Sequence[Any], images: Tensor) -> list[tuple[Tensor, ...]]:
        return list(zip(*encode(released, images), strict=True))

    def score(run: Run, released: Released, records: Sequence[Any], encoded: Sequence) -> dict[str, float]:
        texts, owner = captions_of(records, captions)
        tensors = [torch.stack(part) for part in zip(*encoded, strict=True)]
        i2t, t2i = rank(released, tensors, texts, candidates_of(run.protocol))
        return by_measure(reranked_hits(i2t, t2i, owner, protocol=run.protocol))

    return Benchmark(samples, pictures, predict, score, chunk)


def captioning(write: Callable, chunk: int = 32) -> Benchmark:
    """Captions of MSCOCO's Karpathy test split, scored here, and of NoCaps, which its server alone scores."""
    return Benchmark(_captioned, itself, write, _score_captions, chunk)


def _captioned(run: Run) -> list[Record]:
    if run.dataset == "NoCaps":
        return [record for record, _ in nocaps_records(run.data, run.split)]
    return karpathy_test(run)


def _score_captions(
    run: Run, released: Released, records: Sequence[Record], captions: Sequence[str]
) -> dict[str, float] | str:
    """BLEU-4 and CIDEr-D by the Treebank tokens of shared/metrics/captioning.py, whose scores on MSCOCO's captions are
    those of the official tokenizer to the second decimal."""
    if run.protocol == "nocaps-server":
        numbers = [int(record.id) if record.id.isdigit() else record.id for record in records]
        rows = [{"image_id": number, "caption": text} for number, text in zip(numbers, captions, strict=True)]
        write_whole(run.predictions(), json.dumps(rows))
        return f"the captions are written to {run.predictions()}; the server of NoCaps scores them"
    scores = caption_scores(captions, [list(record.captions) for record in records])
    return {"bleu4": scores["caption/bleu4@treebank"].score, "cider": scores["caption/cider_d@treebank"].score}


def answers_for_server(run: Run, released: Released, questions: Sequence[Any], answers: Sequence[str]) -> str:
    """VQA's test questions: the official server alone has the right answers."""
    rows = {question.id: answer for question, answer in zip(questions, answers, strict=True)}
    write_vqa_results(run.predictions(), rows)
    return f"the answers to {run.split} are written to {run.predictions()}; the official server scores them"


def accuracy(label: Callable[[Any], Any]) -> Callable[..., dict[str, float]]:
    """A `score`: how many predictions are the sample's label."""

    def score(run: Run, released: Released, samples: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        right = sum(prediction == label(sample) for sample, prediction in zip(samples, predictions, strict=True))
        return {"accuracy": right / len(samples)}

    return score
