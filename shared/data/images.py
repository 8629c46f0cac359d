"""Picture files to RGB arrays: hostile and broken files are refused by name."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shared.core.text import shown

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image as Picture

MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LARGEST_FILE = 512_000_000  # bytes of one encoded picture


def pictures_in(folder: Path) -> list[Path]:
    """The picture files in a folder and in those below it, linked ones too, in the order of their paths. What systems
    leave beside them (.DS_Store, ._a.jpg, .ipynb_checkpoints, __MACOSX) is passed over."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.is_file())


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


def fitted_image(
    content: bytes, size: int, max_pixels: int = MAX_PIXELS, *, whole: bool = False, released: bool = False
) -> ndarray:
    """Encoded bytes -> (3, size, size) uint8, as every model here takes it: the middle cut out (CLIP), or the `whole`
    squeezed in (ALBEF, BLIP). Raises PictureError.

    released: decoded as by the codes that published scores come from, which call convert("RGB") and no more: EXIF is
    not turned, transparency dropped, sixteen bits cut off above 255. ALBEF, BLIP and LAVIS do so first; CLIP has
    resized before (its clip.py, _transform), which for palettes and bilevel pictures means by the nearest pixel.
    """
    import numpy as np

    image = open_image(content, max_pixels)
    try:
        image = (image.convert("RGB") if whole else image) if released else _rgb(image)
        image = squeezed(image, size) if whole else square(image, size, max_pixels)
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except PictureError:
        raise
    except Exception as wrong:  # of a mode that Pillow neither resizes nor converts
        raise PictureError(f"broken: {type(wrong).__name__}, {shown(wrong)}") from None
