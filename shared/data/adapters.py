"""Published formats -> pictures in memory: parquet and image-folder classification, and Karpathy's caption JSON.

Every picture is fully decoded. What cannot be is dropped, counted and named; too much of it is an error.
"""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from shared.archives import ArchiveError, Limits, SafeArchive, leads_out, shown
from shared.errors import UserError

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image as Picture

MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LARGEST_FILE = 512_000_000  # bytes of one encoded picture


class PictureError(ValueError):
    """A picture that cannot be used, and why: 'kind' or 'kind: details', so that kinds can be counted."""


# --- one picture


def open_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """The fully decoded picture as it is stored. The header is checked before a pixel is decoded; a cut file raises."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, where the limit here is strict, and of noise in EXIF
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise PictureError(f"too large: {width} x {height} pixels are more than {max_pixels:,}")
            image.load()
        whole = _CHECKS.get(image.format, lambda *_: True)(image, content)
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(f"too large: more than {max_pixels:,} pixels") from None
    except UnidentifiedImageError:
        raise PictureError(f"no picture: none of {', '.join(FORMATS)} by its content") from None
    except Exception as wrong:  # Pillow's decoders raise nearly anything at broken bytes
        kind = "cut short" if "truncated" in str(wrong).lower() else "broken"
        raise PictureError(f"{kind}: {type(wrong).__name__}, {shown(wrong)}") from None
    if not whole:
        raise PictureError("cut short: fewer pixels than its header promises")
    return image


def _jpeg_is_whole(image: Picture, content: bytes) -> bool:
    """libjpeg fills what is missing with grey and only warns, which Pillow does not pass on.

    So where a picture ends in that grey, junk is put before its end marker: a decoder that still waits for data takes
    it in, one that has all of them skips it. (A progressive one that lacks its last scans is coarse, and passes.)
    """
    from PIL import Image

    end = content.rfind(b"\xff\xd9")
    if end < content.rfind(b"\xff\xda"):  # no end behind the last scan: a download that was never filled
        return False
    last = image.getpixel((image.width - 1, image.height - 1))
    if not {127, 128}.issuperset(last if isinstance(last, tuple) else (last,)):
        return True
    longer = Image.open(io.BytesIO(content[:end] + bytes(range(1, 65)) + content[end:]), formats=FORMATS)
    return longer.tobytes() == image.tobytes()


def _png_is_whole(image: Picture, content: bytes) -> bool:
    """Pillow leaves rows at zero that a complete but short stream does not hold. Where the last row is zero, or the
    rows are interlaced, the unpacked bytes are counted."""
    width, height, depth, colour, interlaced = struct.unpack_from(">IIBB2xB", content, 16)
    if not interlaced and image.crop((0, height - 1, width, height)).tobytes().strip(b"\0"):
        return True
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    steps = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // right), -(-(height - y) // down)) for x, y, right, down in steps]
    missing = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
    inflate, place, piece = zlib.decompressobj(), 8, 1 << 20
    while missing > 0 and place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        packed, got = content[place + 8 : place + 8 + length] if kind == b"IDAT" else b"", piece
        while got == piece:
            got = len(inflate.decompress(packed, piece))
            packed, missing = inflate.unconsumed_tail, missing - got
        place += 12 + length
    return missing <= 0


_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_CHECKS: Mapping[str | None, Callable[[Picture, bytes], bool]] = {
    "JPEG": _jpeg_is_whole,
    "MPO": _jpeg_is_whole,  # a JPEG with a second one behind it
    "PNG": _png_is_whole,
}


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS) -> ndarray:
    """Encoded bytes -> (H, W, 3) uint8: upright by EXIF, RGB, transparency over white, the first frame of several.

    Raises PictureError for what is too large, cut or no picture.
    """
    import numpy as np

    return np.asarray(_rgb(open_image(content, max_pixels)))


def _rgb(image: Picture) -> Picture:
    from PIL import Image, ImageOps

    kind, form = "broken EXIF", image.format
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = ImageOps.exif_transpose(image)
        kind = "broken"
        if image.mode.startswith("I"):
            image = _eight_bits(image, form)
        if image.mode == "F":
            raise PictureError("unknown range: pixels are floating-point numbers")
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except PictureError:
        raise
    except Exception as wrong:  # as above: a palette's index out of range, a profile of no length, ...
        raise PictureError(f"{kind}: {type(wrong).__name__}, {shown(wrong)}") from None


def _eight_bits(image: Picture, form: str | None) -> Picture:
    """Sixteen bits a pixel ('I;16' and its byte orders; 'I' for a PNG in older Pillow) -> eight."""
    import numpy as np
    from PIL import Image

    if image.mode == "I" and form != "PNG":
        raise PictureError("unknown range: pixels are 32-bit numbers")
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def square(image: Picture, size: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """Short side to `size` by Pillow's bicubic filter, then the centre; rounds as torchvision does."""
    from PIL import Image

    width, height = image.size
    if min(width, height) != size:
        short = min(width, height)
        width, height = size * width // short, size * height // short
        if width * height > max_pixels:
            raise PictureError(f"sides too unequal: {image.size[0]} : {image.size[1]}")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size)) if (width, height) != (size, size) else image


def squeezed(image: Picture, size: int) -> Picture:
    """All of the picture in a square of `size`, whatever its sides were, by Pillow's bicubic filter."""
    from PIL import Image

    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def fitted_image(content: bytes, size: int, max_pixels: int = MAX_PIXELS, *, whole: bool = False) -> ndarray:
    """Encoded bytes -> (3, size, size) uint8, as every model here takes it: the middle cut out (CLIP), or the `whole`
    squeezed in (ALBEF, BLIP). Raises PictureError."""
    import numpy as np

    image = _rgb(open_image(content, max_pixels))
    image = squeezed(image, size) if whole else square(image, size, max_pixels)
    return np.asarray(image).transpose(2, 0, 1)


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
    name: str, records: Sequence[Record], size: int, *, max_dropped: float = 0.001, max_pixels: int = MAX_PIXELS,
    whole: bool = False,
) -> tuple[list[Record], ndarray, Coverage]:  # fmt: skip
    """The records that could be read and their pictures (N, 3, size, size) uint8, and the account of it. whole: as in
    fitted_image.

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
            picture = fitted_image(content, size, max_pixels, whole=whole)
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
    """Classification pictures root/split/class/file, in the order of their paths."""
    folder = Path(root) / split
    if not folder.is_dir():
        raise UserError(
            f"imagefolder: no folder {folder}: set data_root to the folder that holds {split}/CLASS/PICTURE.jpg"
        )
    paths = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"imagefolder: no picture in {folder} (looked for CLASS/PICTURE with {', '.join(SUFFIXES)})")
    if nameless := next((path.parent for path in paths if not _words(path.parent.name)), None):
        raise UserError(f"imagefolder: '{shown(nameless)}' is no name of a class: rename the folder")
    return [
        Record(f"{split}/{path.parent.name}/{path.name}", _reader(path), label=_words(path.parent.name))
        for path in paths
    ]


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
        content = json.loads(path.read_text(encoding="utf-8"))
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
        label = _words(str(category)) or None if category else None
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
