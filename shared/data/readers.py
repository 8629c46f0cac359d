"""Published formats -> pictures in memory: parquet and image-folder classification, and Karpathy's caption JSON.

Every picture is fully decoded. What cannot be is dropped, counted and named; too much of it is an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from shared.core.archives import ArchiveError, Limits, SafeArchive, leads_out
from shared.core.errors import UserError
from shared.core.text import shown
from shared.data.images import LARGEST_FILE, MAX_PIXELS, SUFFIXES, PictureError, fitted_image, pictures_in

if TYPE_CHECKING:
    from numpy import ndarray

# --- many pictures


@dataclass(frozen=True)
class Record:
    """A sample of a published set before its picture is read. label: a class name, or None."""

    id: str
    read: Callable[[], bytes]
    captions: tuple[str, ...] = ()
    label: str | None = None


@dataclass(frozen=True)
class Coverage:
    """What share of a set was really read. dropped: id -> reason.

    digest: SHA-256 over the ids, labels, captions and bytes that were read, in whatever order they came.
    """

    name: str
    expected: int
    read: int
    dropped: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""

    @property
    def share(self) -> float:
        return self.read / self.expected if self.expected else 0.0

    @property
    def reasons(self) -> dict[str, int]:
        """How many were dropped for each kind of reason, the most frequent first."""
        return dict(Counter(reason.split(":")[0] for reason in self.dropped.values()).most_common())

    def told(self, first: int = 3) -> str:
        """'3 of 500 pictures cannot be read (2 cut short, 1 no picture; a.jpg: cut short, ...; ...)', one line."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.reasons.items())
        names = "; ".join(f"{shown(id, 80)}: {reason}" for id, reason in list(self.dropped.items())[:first])
        return f"{len(self.dropped)} of {self.expected} pictures cannot be read ({counts}; {names})"


def read_pictures(
    name: str, records: Sequence[Record], size: int, *, max_dropped: float = 0.001, max_pixels: int = MAX_PIXELS
) -> tuple[list[Record], ndarray, Coverage]:
    """The records that could be read and their pictures (N, 3, size, size) uint8, and the account of it.

    More than the share `max_dropped` of broken pictures raises UserError.
    """
    import numpy as np

    if not records:
        raise UserError(f"{name}: there are no pictures to read")
    images = np.empty((len(records), 3, size, size), dtype=np.uint8)
    kept: list[Record] = []
    dropped: dict[str, str] = {}
    lines: list[str] = []
    for record in records:
        try:
            content = record.read()
            picture = fitted_image(content, size, max_pixels)
        except PictureError as wrong:
            dropped[record.id] = str(wrong)
            continue
        except OSError as wrong:
            dropped[record.id] = f"unreadable: {wrong.strerror or type(wrong).__name__}"
            continue
        images[len(kept)] = picture
        kept.append(record)
        lines.append(json.dumps([record.id, record.label, record.captions, sha256(content).hexdigest()]))
    digest = sha256("\n".join(sorted(lines)).encode()).hexdigest()
    coverage = Coverage(name, len(records), len(kept), dropped, digest)
    if not kept:
        raise UserError(f"{name}: {coverage.told()}: get the files again")
    if len(dropped) > max_dropped * len(records):
        raise UserError(
            f"{name}: {coverage.told()}, more than {max_dropped:.1%}: get the files again, or allow it with "
            f"max_dropped={_up(len(dropped), len(records))}"
        )
    return kept, images[: len(kept)], coverage


def _up(part: int, whole: int) -> float:
    """part / whole, rounded up to three digits so that it can be given as a limit."""
    return -(-part * 1000 // whole) / 1000


# --- formats


def parquet_records(path: str | Path) -> list[Record]:
    """Classification rows of one parquet file: `image` (bytes, or a struct with `bytes`), `label` (name or number), and
    `key` where it has one. Numbers become names by the file's Hugging Face metadata, where it holds them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"parquet: no file {path}: set data_root to the folder that holds train.parquet and test.parquet"
        )
    try:
        with pq.ParquetFile(path) as file:
            columns, parts = file.schema_arrow.names, range(file.metadata.num_row_groups)
            unpacked, limits = sum(file.metadata.row_group(i).total_byte_size for i in parts), Limits()
            if unpacked > limits.floor + limits.ratio * path.stat().st_size:
                raise UserError(f"{path}: unpacks to {unpacked:,} bytes, which its size does not explain: not read")
            table = file.read(columns=[name for name in ("image", "label", "key") if name in columns])
    except (pa.ArrowException, OSError) as wrong:
        raise UserError(f"{path}: no readable parquet file ({shown(wrong)})") from None
    for column in ("image", "label"):
        if column not in columns:
            raise UserError(f"{path}: no column {column!r} (it has {shown(', '.join(columns))}): rename the columns")
    names = _class_names(table.schema.metadata or {})
    images, labels = table["image"], table["label"].to_pylist()
    keys = table["key"].to_pylist() if "key" in table.column_names else [f"{row:06d}" for row in range(len(labels))]

    def reader(row: int) -> Callable[[], bytes]:
        def read() -> bytes:
            cell = images[row].as_py()
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(content, bytes):
                raise PictureError("no bytes in the row")
            _check_length(len(content))
            return content

        return read

    records, stem = [], path.stem
    for row, (key, label) in enumerate(zip(keys, labels, strict=True)):
        if isinstance(label, int) and names:
            if not 0 <= label < len(names):
                raise UserError(f"{path}: row {row} has label {label}, but the file names {len(names)} classes")
            label = names[label]
        label = None if label is None else _words(str(label))
        if not label:
            raise UserError(f"{path}: row {row} has no label: remove the row, or put its label in")
        records.append(Record(f"{stem}/{key}", reader(row), label=label))
    _check_unique(path, records)
    return records


def _words(name: str) -> str:
    """A class's name as one says it: 'ice_cream' -> 'ice cream'."""
    return " ".join(name.replace("_", " ").split())


def _class_names(metadata: Mapping[bytes, bytes]) -> list[str]:
    try:
        return [str(name) for name in json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def _check_unique(path: Path, records: Sequence[Record]) -> None:
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise UserError(f"{path}: the id '{shown(record.id)}' occurs twice: ids must be unique")
        seen.add(record.id)


def folder_records(root: str | Path, split: str) -> list[Record]:
    """Classification pictures root/split/class/file, or deeper in the class's folder, in the order of their paths."""
    folder = Path(root) / split
    if not folder.is_dir():
        raise UserError(
            f"imagefolder: no folder {folder}: set data_root to the folder that holds {split}/CLASS/PICTURE.jpg"
        )
    inside = ((path.relative_to(folder), path) for path in pictures_in(folder))
    paths = [(place, path) for place, path in inside if len(place.parts) > 1]
    if not paths:
        raise UserError(f"imagefolder: no picture in {folder} (looked for CLASS/PICTURE with {', '.join(SUFFIXES)})")
    if nameless := next((place.parts[0] for place, _ in paths if not _words(place.parts[0])), None):
        raise UserError(f"imagefolder: '{shown(folder / nameless)}' is no name of a class: rename the folder")
    return [Record(f"{split}/{place.as_posix()}", _reader(path), label=_words(place.parts[0])) for place, path in paths]


def _reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            _check_length(path.stat().st_size)
            return path.read_bytes()
        except FileNotFoundError:
            raise PictureError("the file is missing") from None
        except UnicodeError:
            raise PictureError("unreadable: a name that no file system takes") from None

    return read


def _check_length(length: int) -> None:
    if length > LARGEST_FILE:
        raise PictureError(f"too large: {length:,} bytes")


def karpathy_records(root: str | Path) -> dict[str, list[Record]]:
    """The splits of a Karpathy JSON: {'train': [...], 'val': [...], 'test': [...]}; 'restval' counts as train.

    root: a folder with one dataset*.json, or the JSON itself; the pictures in images.tar beside it, or in files under
    root, root/images or root/NAME-images (Flickr30k), at `filepath`/`filename` (COCO) or `filename`.
    """
    root = Path(root)
    path = root if root.is_file() else _only_json(root)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        images, name = content["images"], str(content.get("dataset", "dataset"))
        rows = [
            (
                (f"{image['filepath']}/" if image.get("filepath") else "") + image["filename"],
                str(image["split"]),
                tuple(text for text in (" ".join(s["raw"].split()) for s in image["sentences"]) if text),
                image.get("category"),
            )
            for image in images
        ]
    except OSError as wrong:
        raise UserError(f"{path}: cannot be read ({wrong.strerror}): name a file that can") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as wrong:
        raise UserError(
            f"{path}: not in Karpathy's form ({type(wrong).__name__}: {shown(wrong)}): it needs images[] with "
            "filename, split and sentences[].raw"
        ) from None
    if not rows:
        raise UserError(f"{path}: it lists no images")
    source = _picture_source(path.parent, name, [row[0] for row in rows])
    splits: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    for file, split, captions, category in rows:
        where = "train" if split == "restval" else split
        if where not in splits:
            told = f"{shown(file)} is in split '{shown(split)}'"
            raise UserError(f"{path}: {told}: it may be train, restval, val or test")
        label = None if category is None else _words(str(category)) or None  # a class may be called 0
        splits[where].append(Record(file, source(file, captions), captions, label))
    _check_unique(path, [record for records in splits.values() for record in records])
    return splits


def _only_json(root: Path) -> Path:
    found = sorted(root.glob("dataset*.json"))
    if len(found) != 1:
        seen = "no dataset*.json" if not found else f"{len(found)} of them ({', '.join(p.name for p in found)})"
        raise UserError(
            f"karpathy: {seen} in {root}: set data_root to the folder of one dataset.json, or to the file itself"
        )
    return found[0]


def _picture_source(folder: Path, name: str, files: list[str]) -> Callable[[str, tuple], Callable[[], bytes]]:
    """Where the pictures lie -> (file, captions) -> a reader of its bytes."""
    packed = folder / "images.tar"
    archive = SafeArchive(packed, Limits(member=LARGEST_FILE)) if packed.is_file() else None
    for _ in archive.members() if archive else ():
        pass
    bases = [folder, folder / "images", *([] if "/" in name or leads_out(name) else [folder / f"{name}-images"])]
    base = next((base for base in bases if _is_in(base, files[0])), None)
    base = base or next((base for base in bases if any(_is_in(base, file) for file in files)), None)
    if archive is None and base is None:
        looked = ", ".join(shown(base / files[0]) for base in bases)
        raise UserError(f"karpathy: no pictures (looked for {packed}, {looked}): put images.tar beside the JSON")

    def reader(file: str, captions: tuple) -> Callable[[], bytes]:
        def read() -> bytes:
            if not captions:
                raise PictureError("it has no caption")
            if leads_out(file):  # a path of the JSON is data
                raise PictureError("its path leads out of the folder")
            if archive is None:
                assert base is not None, "one of the two was found"
                return _reader(base / file)()
            try:
                return archive.read(file)
            except ArchiveError as wrong:
                raise PictureError(str(wrong)) from None

        return read

    return reader


def _is_in(base: Path, file: str) -> bool:
    try:
        return not leads_out(file) and (base / file).is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False
