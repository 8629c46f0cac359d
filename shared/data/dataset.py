"""A world: all that a claim needs of its data (pairs to train on, retrieval, classification, shift, compositions),
made of scenes or read from a published set. The same arguments give the same bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from shared.core.errors import UserError
from shared.data.readers import Coverage, Record, folder_records, karpathy_records, parquet_records, read_pictures
from shared.data.seeded import SeededRandom, choose_by_hash, split_of
from shared.data.synthetic.captions import caption, class_prompt, phrase
from shared.data.synthetic.packs import packs
from shared.data.synthetic.scenes import (
    COLOURS,
    DEFAULTS,
    Scene,
    SceneOptions,
    Thing,
    held_out_colours,
    render_many,
    sample_scene,
    scenes_apart,
)
from shared.data.synthetic.sprites import VENDORS, SpritePack

if TYPE_CHECKING:
    from torch import Tensor

WORLDS = ("emoji", "shapes", "cifar10", "parquet", "imagefolder", "karpathy")
LABEL_CAPTIONS = (
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "there is {}",
    "a photo showing {}",
    "this is {}",
)
SMALLEST_CATEGORY = 50


@dataclass
class Split:
    """Pictures and what is said of them.

    images: (N, 3, H, W) uint8; captions: all of each picture's; labels: (N,) int64, -1 where a picture has no single
    class; noisy: (N,) bool, true where the captions are another picture's on purpose.
    """

    ids: list[str]
    images: Tensor
    captions: list[list[str]]
    labels: Tensor | None = None
    noisy: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)


def flat(captions: Sequence[Sequence[str]]) -> tuple[Tensor, list[str]]:
    """The captions of pictures, one after the other: of which row each is (T,), and its text."""
    import torch

    rows = [row for row, several in enumerate(captions) for _ in several]
    return torch.tensor(rows, dtype=torch.long), [text for several in captions for text in several]


@dataclass(frozen=True)
class RetrievalSet:
    """Held-out pictures (I, 3, H, W) and right captions; text t belongs to picture owner[t]."""

    images: Tensor
    texts: list[str]
    owner: Tensor  # (T,)

    @property
    def references(self) -> list[list[str]]:
        """The texts of each picture."""
        texts: list[list[str]] = [[] for _ in self.images]
        for text, picture in zip(self.texts, self.owner.tolist(), strict=True):
            texts[picture].append(text)
        return texts


@dataclass
class Composition:
    """Pictures of (thing, colour) pairs that training never showed, and the texts to choose among.

    images: (N, 3, H, W) uint8; texts: one per pair of a class and a colour; labels: (N,) the right text.
    choices: (N, 4) texts: the right one first, then the wrong colour, the wrong thing, both; training has each of the
    wrong pairs, so that what is familiar is never right.
    """

    ids: list[str]
    images: Tensor
    texts: list[str]
    labels: Tensor
    choices: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class DatasetBundle:
    """train, val, test: pairs (val and test for retrieval). class_*: pictures of one class each, with labels.

    class_train: those of train. shift: class_test's scenes by another artist. None: the data cannot serve it.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: list[str] | None = None
    class_train: Split | None = None
    class_val: Split | None = None
    class_test: Split | None = None
    shift: Split | None = None
    compositions: Composition | None = None
    credits: list[str] = field(default_factory=list)
    coverage: list[Coverage] = field(default_factory=list)
    note: str | None = None
    digest: str = ""

    def __post_init__(self):
        self.digest = self.digest or _digest(self)


def make_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    pairs: int,
    test_pairs: int,
    image_size: int,
    seed: int = 0,
    classes: int | None = None,
    options: SceneOptions = DEFAULTS,
    caption_noise: float = 0.0,
    captions: int = 1,
    full: bool = False,
    max_dropped: float = 0.001,
) -> DatasetBundle:
    """The world `emoji`, `shapes`, `cifar10`, `parquet`, `imagefolder` or `karpathy`; 'karpathy/openclipart' is that
    kind in the folder openclipart of root.

    root: where a published set lies. Emoji are fetched by the manifest unless root is a folder with both packages.
    pairs: pictures to train on at most, test_pairs: in every other split at most. What follows `seed` counts for scenes
    alone (classes: how many of the pack's things; caption_noise: share of the training pictures with another picture's
    caption; captions: how many a training picture has; full: whether these name every thing with its colour and size),
    and max_dropped, the share of broken files that is put up with, for published sets alone.
    """
    if pairs < 1 or test_pairs < 1 or image_size < 8:
        raise UserError(f"pairs={pairs}, test_pairs={test_pairs}, image_size={image_size}: give at least 1, 1 and 8")
    kind, _, inner = name.partition("/")
    if kind not in WORLDS:
        raise UserError(f"no data {name!r}: choose {', '.join(WORLDS)}")
    if kind in VENDORS:
        if not 0 <= caption_noise <= 1 or captions < 1:
            raise UserError(
                f"caption_noise={caption_noise}, captions={captions}: give a share of 0 to 1 and at least 1"
            )
        ours, other = packs(kind, root)
        count = classes or min(len(ours.sprites), 100)
        ours, other = ours.subset(count), other.subset(count)
        made = _SceneDataset(ours, other, image_size, seed, options, caption_noise, captions, full)
        return made.dataset(pairs, test_pairs)
    if root is None:
        raise UserError(f"data {name!r} lies on your disk: set data_root to its folder ({LOOKS[kind]})")
    folder = Path(root) / inner if inner else Path(root)
    if kind == "cifar10":
        folder = folder / "cifar10" if (folder / "cifar10").is_dir() else folder
    if not folder.exists():
        raise UserError(f"data {name!r}: no {folder}: set data_root to its folder ({LOOKS[kind]})")
    published = _PublishedDataset(name, folder, pairs, test_pairs, image_size, seed, max_dropped)
    return published.karpathy() if kind == "karpathy" else published.labelled(kind)


def entries_of(name: str) -> list[str]:
    """The manifest entries that this data is fetched from, where no root is given."""
    return [f"emoji-{vendor}" for vendor in VENDORS["emoji"]] if name == "emoji" else []


def fetch_dataset(name: str, report: Callable[[str, int, int | None], None] | None = None) -> None:
    """Bring what `make_dataset` will read, so that its processes find it in the cache."""
    from shared.weights.fetch import fetch
    from shared.weights.manifest import load_manifest

    manifest = load_manifest()
    for id in entries_of(name):
        fetch(manifest[id], report=report)


LOOKS = {
    "cifar10": "train.parquet and test.parquet with columns image, label",
    "parquet": "train.parquet and test.parquet with columns image, label",
    "imagefolder": "train/CLASS/PICTURE.jpg, and val/ or test/ alike",
    "karpathy": "dataset.json and images.tar, or the pictures as files",
}


# --- scenes


@dataclass
class _SceneDataset:
    pack: SpritePack
    other: SpritePack
    size: int
    seed: int
    options: SceneOptions
    caption_noise: float
    captions: int
    full: bool

    def dataset(self, pairs: int, test_pairs: int) -> DatasetBundle:
        names = self.pack.names
        # The first thing goes round the classes: every class is in training equally often.
        scenes = [self.scene("train", i, first=names[i % len(names)]) for i in range(pairs)]
        train = self.training(scenes)
        alone = [i for i, scene in enumerate(scenes) if len(scene.things) == 1]
        class_train = _part(train, alone) if alone else self.single("class_train", pairs)[0]
        class_test, test_scenes = self.single("class_test", test_pairs)
        return DatasetBundle(
            name=self.pack.name,
            train=train,
            val=self.retrieval("val", test_pairs),
            test=self.retrieval("test", test_pairs),
            classes=names,
            class_train=class_train,
            class_val=self.single("class_val", test_pairs)[0],
            class_test=class_test,
            shift=self.split(test_scenes, class_test.captions, self.other),
            compositions=self.compositions(test_pairs),
            credits=list(dict.fromkeys((*self.pack.credits, *self.other.credits))),
        )

    def scene(self, split: str, index: int, options: SceneOptions | None = None, **pinned) -> Scene:
        return sample_scene(self.pack, split, index, seed=self.seed, options=options or self.options, **pinned)

    def split(self, scenes: Sequence[Scene], captions: list[list[str]], pack: SpritePack | None = None) -> Split:
        import torch

        labels = [self.pack.index[s.things[0].name] if len(s.things) == 1 else -1 for s in scenes]
        images = torch.from_numpy(render_many(scenes, pack or self.pack, self.size))
        return Split([scene.id for scene in scenes], images, captions, torch.tensor(labels))

    def training(self, scenes: Sequence[Scene]) -> Split:
        """Captions as people write them, and of the noisy share those of scenes that show other things."""
        import torch

        said, noisy = [], []
        for i, scene in enumerate(scenes):
            draw = SeededRandom("caption", self.seed, "train", i)
            noisy.append(SeededRandom("noisy", self.seed, i).chance(self.caption_noise))
            described = self.stranger(scene, i) if noisy[-1] else scene
            said.append([caption(described, draw, full=self.full) for _ in range(self.captions)])
        split = self.split(scenes, said)
        split.noisy = torch.tensor(noisy)
        return split

    def stranger(self, scene: Scene, index: int) -> Scene:
        shown = {thing.name for thing in scene.things}
        for attempt in range(1000):
            other = self.scene("stranger", index, attempt=attempt)
            if not shown & {thing.name for thing in other.things}:
                return other
        raise UserError(
            f"caption_noise needs scenes without a thing in common: raise classes ({len(self.pack.sprites)})"
        )

    def retrieval(self, split: str, count: int) -> Split:
        """Scenes no two of which show the same things in the same colours, where there are enough; full captions."""
        seen: set[frozenset] = set()
        scenes, different = [], scenes_apart(self.pack.names, self.seed, self.options)
        for i in range(count):
            for attempt in range(64) if len(seen) < different else (63,):  # the last try of those that find none
                scene = self.scene(split, i, attempt=attempt)
                graph = frozenset((thing.name, thing.colour) for thing in scene.things)
                if graph not in seen:
                    break
            seen.add(graph)
            scenes.append(scene)
        said = [[caption(s, SeededRandom("caption", self.seed, split, i), full=True)] for i, s in enumerate(scenes)]
        return self.split(scenes, said)

    def single(self, split: str, count: int) -> tuple[Split, list[Scene]]:
        """Pictures of one thing each, the classes in turn."""
        names, alone = self.pack.names, self.alone
        scenes = [self.scene(split, i, alone, first=names[i % len(names)]) for i in range(count)]
        said = [[caption(scene, SeededRandom("caption", self.seed, split, i))] for i, scene in enumerate(scenes)]
        return self.split(scenes, said), scenes

    @property
    def alone(self) -> SceneOptions:
        return replace(self.options, objects=(1, 1))

    def compositions(self, count: int) -> Composition | None:
        import torch

        names, colours, share = self.pack.names, list(COLOURS), self.options.held_out
        if not round(share * len(colours)) or len(names) < 2:
            return None
        scenes, choices = [], []
        for i in range(count):
            draw = SeededRandom("composition", self.seed, i)
            name = names[i % len(names)]
            hidden = held_out_colours(name, self.seed, share)
            colour = draw.pick(sorted(hidden))
            scenes.append(self.scene("composition", i, self.alone, first=name, colour=colour))
            # A thing and a colour such that all three wrong pairs were seen in training.
            wrong = draw.pick([c for c in colours if c not in hidden])
            others = [n for n in names if n != name and not {colour, wrong} & held_out_colours(n, self.seed, share)]
            other = draw.pick(others or [n for n in names if n != name])
            right = [(name, colour), (name, wrong), (other, colour), (other, wrong)]
            choices.append([names.index(n) * len(colours) + colours.index(c) for n, c in right])
        pairs = [Thing(name, colour, "large", (0, 0), 0.5, 0.5, 0.8) for name in names for colour in colours]
        texts = [f"a photo of {phrase(thing, not self.pack.tinted, colour=True)}" for thing in pairs]
        table = torch.tensor(choices)
        images = torch.from_numpy(render_many(scenes, self.pack, self.size))
        return Composition([scene.id for scene in scenes], images, texts, table[:, 0].clone(), table)


def _part(split: Split, rows: Sequence[int]) -> Split:
    import torch

    index = torch.tensor(rows, dtype=torch.long)
    return Split(
        [split.ids[i] for i in rows],
        split.images[index],
        [split.captions[i] for i in rows],
        None if split.labels is None else split.labels[index],
        None if split.noisy is None else split.noisy[index],
    )


# --- published sets


@dataclass
class _PublishedDataset:
    name: str
    folder: Path
    pairs: int
    test_pairs: int
    size: int
    seed: int
    max_dropped: float

    def labelled(self, kind: str) -> DatasetBundle:
        """A classification set: captions from a few templates over the class's name."""
        name, folder, suffix = self.name, self.folder, "" if kind == "imagefolder" else ".parquet"

        def records(split: str) -> list[Record]:
            return parquet_records(folder / f"{split}{suffix}") if suffix else folder_records(folder, split)

        def labels(*several: Record) -> list[str]:
            return sorted({record.label for record in several if record.label is not None})

        there = [split for split in ("val", "validation", "test") if (folder / f"{split}{suffix}").exists()]
        if not there:
            raise UserError(f"data {name!r}: {folder} has no test or val part: it needs {LOOKS[kind]}")
        train, test, note = records("train"), records(there[-1]), None
        classes = labels(*train)
        if len(there) > 1:
            val = records(there[0])
        else:  # as ImageNet and CIFAR are published: no third part
            note = f"{name}: val is the tenth of train that the ids' hash chooses; test is {there[-1]}{suffix}"
            places = [split_of(record.id, {"train": 0.9, "val": 0.1}) for record in train]
            val = [record for record, place in zip(train, places, strict=True) if place == "val"]
            train = [record for record, place in zip(train, places, strict=True) if place == "train"]
        if unknown := [label for label in labels(*val, *test) if label not in classes]:
            raise UserError(f"data {name!r}: classes in val or test that train has not: {', '.join(unknown[:5])}")

        def captions(record: Record) -> list[str]:
            template = SeededRandom("label caption", self.seed, record.id).pick(LABEL_CAPTIONS)
            return [class_prompt(str(record.label), template)]

        return self.bundle({"train": train, "val": val, "test": test}, captions, classes, note)

    def karpathy(self) -> DatasetBundle:
        """A captioned set. Where it has categories, those with fifty pictures or more are its classes."""
        splits = karpathy_records(self.folder)
        if empty := [split for split, records in splits.items() if not records]:
            raise UserError(f"data {self.name!r}: {self.folder} has no picture in split {empty[0]!r}")
        counts = Counter(record.label for records in splits.values() for record in records if record.label)
        classes = sorted(label for label, count in counts.items() if count >= SMALLEST_CATEGORY)
        return self.bundle(splits, lambda record: list(record.captions), classes)

    def bundle(
        self,
        splits: Mapping[str, list[Record]],
        captions: Callable[[Record], list[str]],
        classes: list[str],
        note: str | None = None,
    ) -> DatasetBundle:
        import torch

        parts, classed, coverage = {}, {}, []
        number = {label: i for i, label in enumerate(classes)}
        for split, records in splits.items():
            most = self.pairs if split == "train" else self.test_pairs
            chosen = [records[i] for i in choose_by_hash([record.id for record in records], most, self.seed)]
            kept, images, account = read_pictures(
                f"{self.name} {split}", chosen, self.size, max_dropped=self.max_dropped
            )
            texts = [captions(record) for record in kept]
            parts[split] = Split([record.id for record in kept], torch.from_numpy(images), texts)
            if classes:
                parts[split].labels = labels = torch.tensor([number.get(record.label or "", -1) for record in kept])
                rows = (labels >= 0).nonzero().flatten().tolist()
                classed[split] = parts[split] if len(rows) == len(kept) else _part(parts[split], rows)
            coverage.append(account)
        train, val, test = (parts[split] for split in ("train", "val", "test"))
        return DatasetBundle(
            name=self.name,
            train=train,
            val=val,
            test=test,
            classes=classes or None,
            class_train=classed.get("train"),
            class_val=classed.get("val"),
            class_test=classed.get("test"),
            coverage=coverage,
            note=note,
        )


def _digest(dataset: DatasetBundle) -> str:
    """SHA-256 over everything a model or a metric can see: ids, captions, labels, pixels."""
    digest = sha256()
    for part in ("train", "val", "test", "class_train", "class_val", "class_test", "shift", "compositions"):
        split = getattr(dataset, part)
        if split is None:
            continue
        said = split.texts if isinstance(split, Composition) else split.captions
        labels = None if split.labels is None else split.labels.tolist()
        digest.update(json.dumps([part, list(split.images.shape), split.ids, said, labels]).encode())
        digest.update(split.images.numpy().tobytes())
    return digest.hexdigest()
