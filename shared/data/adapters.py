"""Published formats -> pictures in memory: parquet and image-folder classification, and Karpathy's caption JSON.

Every picture is fully decoded. What cannot be is dropped, counted and named; too much of it is an error.
"""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from shared.errors import UserError

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image as Picture

MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LARGEST_FILE = 512_000_000  # bytes of one encoded picture


class PictureError(ValueError):
    """A picture that cannot be used, and why."""


# --- one picture


def open_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """The fully decoded picture as it is stored. The header is checked before a pixel is decoded; a cut file raises."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours and strict
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise PictureError(f"{width} x {height} pixels are more than {max_pixels:,}")
        image.load()
    except Image.DecompressionBombError:
        raise PictureError(f"more than {max_pixels:,} pixels") from None
    except PictureError:
        raise
    except Exception as wrong:  # Pillow's decoders raise nearly anything at broken bytes
        raise PictureError(f"{type(wrong).__name__}: {wrong}") from None
    return image


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS) -> ndarray:
    """Encoded bytes -> (H, W, 3) uint8: upright by EXIF, RGB, transparency over white, the first frame of several.

    Raises PictureError for what is too large, cut or no picture.
    """
    import numpy as np

    return np.asarray(_rgb(open_image(content, max_pixels)))


def _rgb(image: Picture) -> Picture:
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(image)
    except Exception as wrong:
        raise PictureError(f"EXIF: {wrong}") from None
    if image.mode.startswith("I;16"):
        image = image.point(lambda level: level / 256, "L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: Picture, size: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """Short side to `size` by Pillow's bicubic filter, then the centre; rounds as torchvision does."""
    from PIL import Image

    width, height = image.size
    if min(width, height) != size:
        short = min(width, height)
        width, height = size * width // short, size * height // short
        if width * height > max_pixels:
            raise PictureError(f"sides {image.size[0]} : {image.size[1]} are too unequal")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size)) if (width, height) != (size, size) else image


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

    digest: SHA-256 over the ids and bytes that were read.
    """

    name: str
    expected: int
    read: int
    dropped: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""

    @property
    def share(self) -> float:
        return self.read / self.expected if self.expected else 0.0


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
    digest = sha256()
    for record in records:
        try:
            content = record.read()
            picture = square(_rgb(open_image(content, max_pixels)), size, max_pixels)
        except PictureError as wrong:
            dropped[record.id] = str(wrong)
            continue
        images[len(kept)] = np.asarray(picture).transpose(2, 0, 1)
        kept.append(record)
        digest.update(f"{record.id}\n{sha256(content).hexdigest()}\n".encode())
    if len(dropped) > max_dropped * len(records) or not kept:
        first = "; ".join(f"{id}: {reason}" for id, reason in list(dropped.items())[:3])
        raise UserError(
            f"{name}: {len(dropped)} of {len(records)} pictures cannot be read ({first}), more than {max_dropped:.1%}: "
            f"get the files again, or allow it with max_dropped={_up(len(dropped), len(records))}"
        )
    return kept, images[: len(kept)], Coverage(name, len(records), len(kept), dropped, digest.hexdigest())


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
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as wrong:
        raise UserError(f"{path}: no readable parquet file ({wrong})") from None
    for column in ("image", "label"):
        if column not in table.column_names:
            raise UserError(
                f"{path}: no column {column!r} (it has {', '.join(table.column_names)}): rename the columns"
            )
    names = _class_names(table.schema.metadata or {})
    images, labels = table["image"], table["label"].to_pylist()
    keys = table["key"].to_pylist() if "key" in table.column_names else [f"{row:06d}" for row in range(len(labels))]

    def reader(row: int) -> Callable[[], bytes]:
        def read() -> bytes:
            cell = images[row].as_py()
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(content, bytes):
                raise PictureError("no bytes in the row")
            return content

        return read

    records, stem = [], path.stem
    for row, (key, label) in enumerate(zip(keys, labels, strict=True)):
        if isinstance(label, int) and names:
            if not 0 <= label < len(names):
                raise UserError(f"{path}: row {row} has label {label}, but the file names {len(names)} classes")
            label = names[label]
        records.append(Record(f"{stem}/{key}", reader(row), label=str(label).replace("_", " ")))
    _check_unique(path, records)
    return records


def _class_names(metadata: Mapping[bytes, bytes]) -> list[str]:
    try:
        return list(json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def _check_unique(path: Path, records: Sequence[Record]) -> None:
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise UserError(f"{path}: the id {record.id!r} occurs twice: ids must be unique")
        seen.add(record.id)


def folder_records(root: str | Path, split: str) -> list[Record]:
    """Classification pictures root/split/class/file, in the order of their paths."""
    folder = Path(root) / split
    if not folder.is_dir():
        raise UserError(
            f"imagefolder: no folder {folder}: set data_root to the folder that holds {split}/CLASS/PICTURE.jpg"
        )
    paths = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"imagefolder: no picture in {folder} (looked for CLASS/PICTURE with {', '.join(SUFFIXES)})")
    return [
        Record(f"{split}/{path.parent.name}/{path.name}", path.read_bytes, label=path.parent.name.replace("_", " "))
        for path in paths
    ]


def karpathy_records(root: str | Path) -> dict[str, list[Record]]:
    """The splits of a Karpathy JSON: {'train': [...], 'val': [...], 'test': [...]}; 'restval' counts as train.

    root: a folder with one dataset*.json, or the JSON itself; the pictures in images.tar beside it, or in files under
    root, root/images or root/NAME-images (Flickr30k), at `filepath`/`filename` (COCO) or `filename`.
    """
    root = Path(root)
    path = root if root.is_file() else _only_json(root)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images, name = content["images"], str(content.get("dataset", "dataset"))
        rows = [
            (
                (f"{image['filepath']}/" if image.get("filepath") else "") + image["filename"],
                image["split"],
                tuple(text for text in (" ".join(s["raw"].split()) for s in image["sentences"]) if text),
                image.get("category"),
            )
            for image in images
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise UserError(
            f"{path}: not in Karpathy's form ({type(wrong).__name__}: {wrong}): it needs images[] with filename, split "
            "and sentences[].raw"
        ) from None
    if not rows:
        raise UserError(f"{path}: it lists no images")
    source = _picture_source(path.parent, name, [row[0] for row in rows])
    splits: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    for file, split, captions, category in rows:
        where = "train" if split == "restval" else split
        if where not in splits:
            raise UserError(f"{path}: {file} is in split {split!r}: it may be train, restval, val or test")
        label = str(category).replace("_", " ") if category else None
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
    archive = folder / "images.tar"
    tar = TarFiles(archive) if archive.is_file() else None
    bases = [folder, folder / "images", folder / f"{name}-images"]
    base = next((base for base in bases if (base / files[0]).is_file()), None)
    base = base or next((base for base in bases if any((base / file).is_file() for file in files)), None)
    if tar is None and base is None:
        looked = ", ".join(str(base / files[0]) for base in bases)
        raise UserError(f"karpathy: no pictures (looked for {archive}, {looked}): put images.tar beside the JSON")

    def reader(file: str, captions: tuple) -> Callable[[], bytes]:
        def read() -> bytes:
            if not captions:
                raise PictureError("it has no caption")
            if tar is not None:
                return tar.read(file)
            # A path of the JSON is data: it may not lead out of the folder.
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file:
                raise PictureError("its path leads out of the folder")
            try:
                return (base / file).read_bytes()
            except OSError:
                raise PictureError("the file is missing") from None

        return read

    return reader


class TarFiles:
    """The regular files of a tar archive, read by name; nothing is unpacked, links and devices are not followed."""

    def __init__(self, path: Path):
        try:
            self.archive = tarfile.open(path, "r:*")  # noqa: SIM115 (read on demand, closed with the object)
            self.members = {_plain(m.name): m for m in self.archive.getmembers() if m.isreg()}
        except (tarfile.TarError, OSError, EOFError) as wrong:
            raise UserError(f"{path}: no readable tar archive ({wrong}): get the file again") from None

    def read(self, name: str) -> bytes:
        member = self.members.get(_plain(name))
        if member is None:
            raise PictureError("the archive has no such file")
        if member.size > LARGEST_FILE:
            raise PictureError(f"{member.size:,} bytes")
        try:
            content = self.archive.extractfile(member)
            data = content.read() if content else b""
        except (tarfile.TarError, OSError, EOFError) as wrong:
            raise PictureError(f"the archive is damaged: {wrong}") from None
        if len(data) != member.size:
            raise PictureError("the archive is cut short")
        return data


def _plain(name: str) -> str:
    return name.removeprefix("./")
