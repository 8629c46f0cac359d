"""Every hostile thing by name: how it is made, which public function of the tree it is given to, and what must happen.

Nothing is committed: each is built where and when a test asks. Run as a program it reads bombs in a fresh process and
prints how much memory each took (`peaks` in test_corpus.py).
"""

import gzip
import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Case:
    """make(folder) -> the path that `read` is given. refused: words of its one line, a regular expression; or gives:
    its result. bomb: it must be refused, or read, without the memory that it promises to fill."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    refused: str = ""
    gives: object = None
    bomb: bool = False


class Runs:
    """Unpickled by a loader that does what it is told, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def mark(folder):
    return folder / "it-ran"


CASES: dict[str, Case] = {}
SOUND: dict[str, Case] = {}  # a good file for every reader, which must pass


def written(content, name="file"):
    def make(folder):
        path = folder / name
        path.write_bytes(content(folder) if callable(content) else content)
        return path

    return make


# --- readers: public functions, and what of their result is looked at


def picture(path):
    """(height, width), first pixel."""
    from shared.data.images import decode_image

    pixels = decode_image(path.read_bytes())
    return pixels.shape[:2], tuple(pixels[0, 0].tolist())


def archive(path):
    """({name: length} of what is read, {name: why not})."""
    from shared.core.archives import SafeArchive

    with SafeArchive(path) as opened:
        names = list(opened.members())
        return {name: len(opened.read(name)) for name in names}, opened.refused


def small_archive(path):
    from shared.core.archives import Limits, SafeArchive

    with SafeArchive(path, Limits(members=10)) as opened:
        return list(opened.members())


def weights(path):
    from shared.weights.safe_load import read_tensors

    return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}


def into_a_model(path):
    from torch import nn

    from shared.weights.load import load_weights

    load_weights(nn.Linear(3, 2), path)


def document(path):
    from shared.core.strict_yaml import read_yaml

    return read_yaml(path, "document")


def recipe(path):
    from shared.core.recipe import Recipe, load_recipe

    return load_recipe(path, Recipe).data_root


def card(path):
    from shared.core.paper_card import load_paper

    return load_paper(path)


def manifest(path):
    from shared.weights.manifest import load_manifest

    return {name: entry.name for name, entry in load_manifest(path).items()}


def from_cache(path):
    """The file of the one entry of a manifest, with the cache beside it and without network."""
    from shared.weights.fetch import fetch
    from shared.weights.manifest import load_manifest

    (entry,) = load_manifest(path).values()
    return fetch(entry, cache=path.parent / "cache", offline=True, verify=True).name


def folder_set(path):
    """[first pixel] of the pictures of an image folder's train part, {id: why dropped}."""
    from shared.data.readers import folder_records, read_pictures

    _, images, coverage = read_pictures("set", folder_records(path, "train"), 8, max_dropped=1.0)
    return [tuple(image[:, 0, 0].tolist()) for image in images], dict(coverage.dropped)


def karpathy_set(path):
    """The ids of the captioned pictures that could be read, {id: why dropped}."""
    from shared.data.readers import karpathy_records, read_pictures

    kept, _, coverage = read_pictures("set", karpathy_records(path)["train"], 8, max_dropped=1.0)
    return [record.id for record in kept], dict(coverage.dropped)


def parquet_set(path):
    from shared.data.readers import parquet_records

    return len(parquet_records(path))


def sprites(path):
    from shared.data.synthetic.sprites import load_pack

    return load_pack("emoji", "google", source=path).names


# --- pictures


def drawn(colour=(200, 30, 30), size=(20, 16), form="JPEG", mode="RGB", **options):
    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, form, **options)
    return file.getvalue()


def noise(form="JPEG", **options):
    import numpy as np
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)).save(file, form, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows, depth=8, colour=2, before=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def gif(width, height, frame_width, frame_height):
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, frame_width, frame_height, 0) + b"\x02\x02\x44\x01\x00\x3b"


def jpeg_of_size(width, height):
    whole = drawn()
    frame = whole.index(b"\xff\xc0") + 5
    return whole[:frame] + struct.pack(">HH", height, width) + whole[frame + 4 :]


def bmp_of_size(width, height):
    return drawn(form="BMP")[:18] + struct.pack("<ii", width, height) + drawn(form="BMP")[26:]


def tiff_of_size(width, height):
    whole = drawn(form="TIFF")
    for tag, old, new in ((256, 20, width), (257, 16, height)):
        entry = whole.index(struct.pack("<HHI", tag, 4 if struct.pack("<HHI", tag, 4, 1) in whole else 3, 1))
        assert struct.unpack_from("<H", whole, entry + 8)[0] == old
        whole = whole[:entry] + struct.pack("<HHII", tag, 4, 1, new) + whole[entry + 12 :]
    return whole


def webp_of_size(width, height):
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides


def half(content):
    return content[: len(content) // 2]


def turned():
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return drawn(GREY, exif=exif)


GREY = (77, 77, 77)  # a JPEG keeps it to the bit
TINY = b"".join(b"\0" + bytes([9] * 4) for _ in range(4))  # the rows of a grey PNG, 4 x 4
LARGE = "^too large: "
CUT = "^cut short: "
NONE = "^no picture: "
for name, content, refused in [
    ("PNG bomb, 60,000 x 60,000", lambda _: png(60_000, 60_000, bytes(999)), LARGE),
    ("PNG bomb that Pillow would only warn of", lambda _: png(9_000, 9_000, bytes(9_000 * 1_126), 1, 0), LARGE),
    ("GIF bomb", gif(65_535, 65_535, 65_535, 65_535), LARGE),
    ("GIF bomb, its frame larger than its screen", gif(1, 1, 30_000, 30_000), LARGE),
    ("JPEG bomb", lambda _: jpeg_of_size(65_000, 65_000), LARGE),
    ("BMP bomb", lambda _: bmp_of_size(65_000, 65_000), LARGE),
    ("TIFF bomb", lambda _: tiff_of_size(65_000, 65_000), LARGE),
    ("WebP bomb", webp_of_size(16_383, 16_383), LARGE),
    (
        "PNG text that unpacks to 64 MB",
        lambda _: png(4, 4, TINY, 8, 0, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(64 * MEGABYTE)))),
        "^broken: .*too large",
    ),
    (
        "PNG colour profile that unpacks to 64 MB",
        lambda _: png(4, 4, TINY, 8, 0, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(64 * MEGABYTE)))),
        "^broken: .*too large",
    ),
]:
    CASES[name] = Case(written(content), picture, refused, bomb=True)
for name, content, refused in [
    ("JPEG cut in half", lambda _: half(noise()), CUT),
    ("JPEG cut in half, with an end put on it", lambda _: half(noise()) + b"\xff\xd9", CUT),
    ("JPEG whose second half was never written", lambda _: half(noise()) + bytes(len(noise()) // 2), CUT),
    ("JPEG cut in half, progressive", lambda _: half(noise(progressive=True)), CUT),
    ("JPEG that promises more rows than it has", lambda _: jpeg_of_size(20, 160), CUT),
    ("PNG cut in half", lambda _: half(noise("PNG")), CUT),
    ("PNG with half its rows", png(10, 10, (b"\0" + bytes([200] * 30)) * 5), CUT),
    ("GIF cut in half", lambda _: half(noise("GIF")), CUT),
    ("BMP cut in half", lambda _: half(noise("BMP")), CUT),
    ("TIFF cut in half", lambda _: half(noise("TIFF")), CUT),
    ("WebP cut in half", lambda _: half(noise("WEBP")), "^broken: "),
    ("no bytes at all", b"", NONE),
    ("web page called a picture", b"<html><body>404 Not Found</body></html>", NONE),
    ("PostScript, which Pillow would have Ghostscript run", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NONE),
    ("SVG with a script", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", NONE),
    ("floating-point picture", lambda _: drawn(0.5, form="TIFF", mode="F"), "^unknown range: "),
    (
        "palette with more transparency than colours",
        png(4, 4, b"\0\1\1\1\1" * 4, 8, 3, chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", bytes(300))),
        "^broken: .*palette index out of range",
    ),
]:
    CASES[name] = Case(written(content), picture, refused)
for name, content, gives in [
    ("CMYK JPEG", lambda _: drawn((0, 255, 255, 0), mode="CMYK"), ((16, 20), (255, 0, 0))),
    ("CMYK TIFF", lambda _: drawn((0, 255, 255, 0), form="TIFF", mode="CMYK"), ((16, 20), (255, 0, 0))),
    ("grey PNG of 16 bits", lambda _: drawn(77 * 256, form="PNG", mode="I;16"), ((16, 20), (77, 77, 77))),
    (
        "grey TIFF of 16 bits, high byte first",
        lambda _: drawn(77 * 256, form="TIFF", mode="I;16B"),
        ((16, 20), (77,) * 3),
    ),
    (
        "coloured PNG of 16 bits",
        png(2, 1, b"\0" + struct.pack(">6H", *(256 * v for v in (200, 30, 40, 1, 2, 3))), 16),
        ((1, 2), (200, 30, 40)),
    ),
    (
        "palette PNG, transparent where it is seen",
        png(4, 4, b"\0\1\1\1\1" * 4, 8, 3, chunk(b"PLTE", b"\0\0\0\xff\0\0") + chunk(b"tRNS", b"\xff\0")),
        ((4, 4), (255, 255, 255)),
    ),
    ("one-bit PNG", lambda _: drawn(1, form="PNG", mode="1"), ((16, 20), (255, 255, 255))),
    ("EXIF says it lies on its side", lambda _: turned(), ((20, 16), GREY)),
    ("EXIF that is noise", lambda _: drawn(GREY, exif=b"Exif\0\0MM\0*" + b"\xff" * 40), ((16, 20), GREY)),
    ("JPEG with a stranger's bytes behind its end", lambda _: drawn(GREY) + b"<?php ?>" * 50, ((16, 20), GREY)),
    ("JPEG that truly ends in grey", lambda _: drawn((128, 128, 128)), ((16, 20), (128, 128, 128))),
    ("PNG that is truly black", png(3, 2, bytes(20)), ((2, 3), (0, 0, 0))),
]:
    CASES[name] = Case(written(content), picture, gives=gives)
SOUND["a JPEG"] = Case(written(lambda _: drawn(GREY)), picture, gives=((16, 20), GREY))
SOUND["a PNG"] = Case(written(lambda _: drawn(form="PNG")), picture, gives=((16, 20), (200, 30, 30)))
SOUND["a WebP"] = Case(written(lambda _: drawn(form="WEBP", lossless=True)), picture, gives=((16, 20), (200, 30, 30)))
SOUND["a TIFF"] = Case(written(lambda _: drawn(form="TIFF")), picture, gives=((16, 20), (200, 30, 30)))


# --- archives


def tar_member(name, content=b"x", kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, link
    return member, content


def tar(*members, packed=False):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz" if packed else "w") as opened:
        for member, content in members:
            opened.addfile(member, io.BytesIO(content))
    return file.getvalue()


def forged_tar_header(kind, size_field, at=124):
    """A header whose size field (or, `at` another place, another) says what tarfile would never write."""
    header = bytearray(tarfile.TarInfo("forged").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = kind
    header[at : at + len(size_field)] = size_field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def zeros_behind(header, megabytes=128):
    """A gzip of `header` and of that many zeros: the same packed megabyte again and again."""
    return written(gzip.compress(header) + gzip.compress(bytes(MEGABYTE)) * megabytes, "file.tgz")


def large_header(kind, size=128 * MEGABYTE):
    member = tarfile.TarInfo("large")
    member.type, member.size = kind, size
    return member.tobuf()


def zipped(*members, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two files of one name
        for name, content in members:
            opened.writestr(name, content)
    return file.getvalue()


@cache
def zip_bomb():
    return zipped(("zeros", bytes(128 * MEGABYTE)))


def changed_zip(content, at, new):
    """With some bytes of the first entry of its table of contents put otherwise."""
    place = content.index(b"PK\1\2") + at
    return content[:place] + new + content[place + len(new) :]


def overlapping_zip(_):
    """Twenty names for one packed stream of ten megabytes: each alone looks harmless, and together they are small."""
    content = zipped(("a", bytes(10 * MEGABYTE)))
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    entry, tail = content[start:end], content[end:]
    entries = b"".join(entry[:-1] + bytes([97 + i]) for i in range(20))
    return content[:start] + entries + tail[:8] + struct.pack("<HHI", 20, 20, len(entries)) + tail[16:]


def zip_link(name, target):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info, target


GOOD = tar_member("good.txt", b"good")
OUT, LINK, DEVICE = "a name that leads out of it", "a link", "a device"
for name, content, refused in [
    ("tar: ..", tar(tar_member("../evil"), GOOD), {"../evil": OUT}),
    ("tar: .. in the middle", tar(tar_member("a/../../evil"), GOOD), {"a/../../evil": OUT}),
    ("tar: absolute path", tar(tar_member("/evil"), GOOD), {"/evil": OUT}),
    ("tar: drive", tar(tar_member("C:evil"), GOOD), {"C:evil": OUT}),
    ("tar: backslashes", tar(tar_member("..\\evil"), GOOD), {"..\\evil": OUT}),
    ("tar: symbolic link", tar(tar_member("l", b"", tarfile.SYMTYPE, "/etc/passwd"), GOOD), {"l": LINK}),
    ("tar: hard link", tar(tar_member("l", b"", tarfile.LNKTYPE, "/etc/passwd"), GOOD), {"l": LINK}),
    ("tar: device", tar(tar_member("d", b"", tarfile.CHRTYPE), GOOD), {"d": DEVICE}),
    ("tar: pipe that would never answer", tar(tar_member("p", b"", tarfile.FIFOTYPE), GOOD), {"p": DEVICE}),
    ("zip: ..", zipped(("../evil", "x"), ("good.txt", "good")), {"../evil": OUT}),
    ("zip: absolute path", zipped(("/evil", "x"), ("good.txt", "good")), {"/evil": OUT}),
    ("zip: drive", zipped(("C:/evil", "x"), ("good.txt", "good")), {"C:/evil": OUT}),
    ("zip: backslashes", zipped(("..\\evil", "x"), ("good.txt", "good")), {"..\\evil": OUT}),
    ("zip: symbolic link", zipped(zip_link("l", "/etc/passwd"), ("good.txt", "good")), {"l": LINK}),
    (
        "zip: encrypted",
        changed_zip(zipped(("e", "x"), ("good.txt", "good")), 8, b"\1\0"),
        {"e": "an encrypted file"},
    ),
    (
        "zip: packed by a method of 1989",
        changed_zip(zipped(("e", "x"), ("good.txt", "good")), 10, b"\6\0"),
        {"e": "a file packed by method 6"},
    ),
]:
    CASES[name] = Case(written(content), archive, gives=({"good.txt": 4}, refused))
ENDLESS = "unpacks to more than the .* bytes that its size allows$"
BROKEN = "no readable tar or zip archive"
SPARSE = forged_tar_header(tarfile.GNUTYPE_SPARSE, b"77777777777\0", at=483)
NEGATIVE = b"\xff" * 10 + b"\xfe\x00"  # -512
BACK = b"\xff" * 10 + b"\xfc\x00"  # -1,024
for name, make, refused in [
    ("tar: gzip bomb of 128 MB", zeros_behind(large_header(tarfile.REGTYPE)), ENDLESS),
    ("tar: header of 128 MB, extended attributes", zeros_behind(large_header(tarfile.XHDTYPE)), ENDLESS),
    ("tar: header of 128 MB, a long name", zeros_behind(large_header(tarfile.GNUTYPE_LONGNAME)), ENDLESS),
    ("tar: 128 MB behind its end", zeros_behind(b""), ENDLESS),
    ("tar: sparse file of 8 GB", written(SPARSE + bytes(1024)), ENDLESS),
    (
        "tar: negative size that leads back to the start, without end",
        written(tar(GOOD)[:1024] + forged_tar_header(b"0", b"\xff" * 10 + b"\xfa\x00") + bytes(1024)),
        f"{BROKEN} .a size of -1,536 bytes",
    ),
    (
        "tar: size of -1, which leads nowhere else",
        written(tar(GOOD)[:1024] + forged_tar_header(b"0", b"\xff" * 12) + bytes(1024)),
        f"{BROKEN} .a size of -1 bytes",
    ),
    (
        "tar: negative size that leads into a file, where another header stands",
        written(
            tar(tar_member("first", large_header(b"0", 1024)))[:1024] + forged_tar_header(b"0", BACK) + bytes(1024)
        ),
        f"{BROKEN} .a size of -1,024 bytes",
    ),
    ("tar: negative size of a header", written(forged_tar_header(b"x", NEGATIVE) + bytes(1024)), ENDLESS),
    ("tar: 3,000 headers inside each other", written((large_header(b"L", 1) + bytes(512)) * 3000), BROKEN),
    ("zip: bomb of 128 MB", written(lambda _: zip_bomb()), ENDLESS),
    (
        "zip: bomb of 128 MB that says 100 bytes",
        written(lambda _: changed_zip(zip_bomb(), 24, struct.pack("<I", 100))),
        r"damaged \(Bad CRC-32",
    ),
    ("zip: twenty names for the same 10 MB", written(overlapping_zip), ENDLESS),
]:
    CASES[name] = Case(make, archive, refused, bomb=True)
WHOLE = tar(tar_member("a", bytes(range(256)) * 9), tar_member("b", b"y" * 3000))
PACKED = tar(tar_member("a", bytes(range(256)) * 9), packed=True)
for name, content, refused in [
    ("tar: cut within a file", WHOLE[:5000], f"{BROKEN} .unexpected end of data"),
    ("tar: cut within a header", WHOLE[:3300], f"{BROKEN} .no end mark"),
    ("tar: broken header in the middle", WHOLE[:3072] + b"?" + WHOLE[3073:], f"{BROKEN} .no end mark"),
    ("tar: gzip cut in half", half(PACKED), f"{BROKEN} .Compressed file ended"),
    (
        "tar: gzip with a flipped bit",
        PACKED[:-6] + bytes([PACKED[-6] ^ 1]) + PACKED[-5:],
        f"{BROKEN} .CRC check failed",
    ),
    ("tar: two files of one name", tar(tar_member("a", b"1"), tar_member("./a", b"2")), "two members are called a"),
    ("tar: a link and a file of one name", tar(tar_member("a", b"", b"2", "/b"), tar_member("a")), "two members"),
    ("tar: no tar at all", b"junk" * 300, BROKEN),
    ("zip: two files of one name", zipped(("a", "1"), ("a", "2")), "two members are called a"),
    ("zip: flipped bit", zipped(("a", "x" * 99), method=0).replace(b"xxx", b"xyx", 1), r"damaged \(Bad CRC-32"),
    ("zip: says it is empty", changed_zip(zipped(("a", "x" * 99)), 24, bytes(4)), r"damaged \(Bad CRC-32"),
    (
        "zip: says it is empty, and is not packed",
        changed_zip(zipped(("a", "x" * 99), method=0), 24, bytes(4)),
        "Bad CRC",
    ),
    ("zip: says it is shorter", changed_zip(zipped(("a", "x" * 99), method=0), 24, b"\x32"), r"damaged \(Bad CRC-32"),
    ("zip: says it is longer", changed_zip(zipped(("a", "x" * 99), method=0), 24, b"\xff"), "cut short|damaged"),
    ("zip: no zip at all", b"PK\3\4 and nothing more", BROKEN),
]:
    CASES[name] = Case(written(content), archive, refused)
CASES["tar: more members than allowed"] = Case(
    written(tar(*(tar_member(str(i)) for i in range(11)))), small_archive, "more than 10 members: not read$"
)
CASES["zip: more members than allowed"] = Case(
    written(zipped(*((str(i), "") for i in range(11)))), small_archive, "more than 10 members: not read$"
)
CASES["zip called .tar"] = Case(written(zipped(("a", "12")), "images.tar"), archive, gives=({"a": 2}, {}))
CASES["sprite package: gzip bomb"] = Case(
    zeros_behind(large_header(tarfile.REGTYPE)), sprites, "^emoji: no readable .tgz: .*unpacks to more", bomb=True
)


NOUNS = ["cat", "owl", "fox"]


def emoji_package(_):
    rows, pictures = [], []
    for place, noun in enumerate(NOUNS):
        row = {"name": noun.upper(), "category": "Animals & Nature", "subcategory": "animal", "sort_order": place}
        rows.append(row | {"added_in": "1", "image": f"{place}.png", "has_img_google": True, "has_img_twitter": True})
        pictures.append(tar_member(f"package/img/google/64/{place}.png", drawn((place, 9, 9), (64, 64), "PNG")))
    return tar(tar_member("package/emoji.json", json.dumps(rows).encode()), *pictures, packed=True)


def poisoned_cache(poison):
    """A sprite package, and beside it a cache of its pictures that fits but for what `poison` does to it."""

    def make(folder):
        import numpy as np

        path = written(emoji_package, "google.tgz")(folder)
        sprites(path)
        (cached,) = folder.glob("*.npz")
        parts = dict(np.load(cached))
        poison(cached, parts, folder)
        return path

    return make


def resaved(change):
    def poison(cached, parts, folder):
        import numpy as np

        np.savez(cached, **(parts | change(np, parts, folder)))

    return poison


def repacked(cached, parts, _):
    import numpy as np

    np.savez_compressed(cached, **(parts | {"rgba": np.zeros((8 * MEGABYTE, 10), np.uint8)}))


for name, poison in [
    ("a pickle that would execute", resaved(lambda np, _, folder: {"rgba": np.array([Runs(mark(folder))], object)})),
    ("pictures of another size", resaved(lambda np, parts, _: {"rgba": parts["rgba"][:, :32, :32]})),
    ("fewer pictures than names", resaved(lambda np, parts, _: {"rgba": parts["rgba"][:2]})),
    ("80 MB of nothing", repacked),
    ("nothing", lambda cached, *_: cached.write_bytes(b"")),
]:
    CASES[f"sprite cache: {name}"] = Case(poisoned_cache(poison), sprites, gives=NOUNS, bomb=True)
SOUND["a sprite package"] = Case(written(emoji_package, "google.tgz"), sprites, gives=NOUNS)
SOUND["a tar"] = Case(written(tar(GOOD)), archive, gives=({"good.txt": 4}, {}))
SOUND["a packed tar"] = Case(written(tar(GOOD, packed=True)), archive, gives=({"good.txt": 4}, {}))
SOUND["a zip"] = Case(written(zipped(("good.txt", "good"))), archive, gives=({"good.txt": 4}, {}))


# --- weights


def safetensors(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


TWO = json.dumps({"a": tensor(0, 8)})[1:-1]
NOT_WEIGHTS = r"refused as a weight file \(.*{}.*\); fetch it again or convert it$"
for name, content, refused in [
    ("a tensor beyond the file", safetensors({"a": tensor(0, 1 << 50, (1 << 48,))}, bytes(8)), "not fully covered"),
    ("tensors that overlap", safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "invalid offset"),
    ("two tensors in one place", safetensors({"a": tensor(0, 8), "b": tensor(0, 8)}, bytes(8)), "invalid offset"),
    ("a hole between tensors", safetensors({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)), "invalid offset"),
    ("bytes that no tensor owns", safetensors({"a": tensor(0, 8)}, bytes(80)), "not fully covered"),
    ("a header of an exabyte", safetensors({"a": tensor(0, 8)}, bytes(8), 1 << 60), "header too large"),
    ("a header longer than the file", safetensors({"a": tensor(0, 8)}, bytes(8), 1000), "invalid header length"),
    ("a dtype of the wrong size", safetensors({"a": tensor(0, 8, dtype="F16")}, bytes(8)), "invalid shape, data type"),
    ("a dtype that nobody knows", safetensors({"a": tensor(0, 8, dtype="Q4")}, bytes(8)), "unknown variant"),
    ("numbers that would need a scale", safetensors({"a": tensor(0, 2, dtype="F8_E4M3")}, b"ab"), "F8_E4M3"),
    ("a key given twice", safetensors(f"{{{TWO},{TWO}}}".encode(), bytes(8)), "key 'a' is given twice"),
    ("a header that is no JSON", safetensors(b"{nonsense}", bytes(8)), "invalid JSON"),
    ("a header nested 5,000 deep", safetensors(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "recursion limit"),
    ("a negative offset", safetensors({"a": tensor(-8, 0)}, bytes(8)), "invalid JSON"),
    ("offsets the wrong way round", safetensors({"a": tensor(8, 0)}, bytes(8)), "invalid offset"),
    ("a shape that overflows", safetensors({"a": tensor(0, 8, (1 << 62, 8))}, bytes(8)), "overflow"),
    ("a name with terminal codes", safetensors({"\x1b[31m\n": tensor(0, 9)}, bytes(9)), "invalid shape"),
]:
    CASES[f"safetensors: {name}"] = Case(
        written(content, "w.safetensors"), weights, NOT_WEIGHTS.format(refused), bomb=True
    )
CASES["safetensors: another model's names and shapes"] = Case(
    written(safetensors({"weight": tensor(0, 24, (3, 2)), "more": tensor(24, 32)}, bytes(32)), "w.safetensors"),
    into_a_model,
    r"w\.safetensors: weights do not fit the model: keys .* lacks: more; .*weight: bias; other shapes: weight \(3, 2\)",
)
CASES["safetensors: whole numbers where the model has fractions"] = Case(
    written(
        safetensors({"weight": tensor(0, 48, (2, 3), "I64"), "bias": tensor(48, 64, (2,), "I64")}, bytes(64)),
        "w.safetensors",
    ),
    into_a_model,
    r"other kinds of numbers: .*weight torch\.int64 for torch\.float32",
)


def torch_saved(make_value, zipped=True):
    def content(folder):
        import torch

        file = io.BytesIO()
        torch.save(make_value(folder), file, _use_new_zipfile_serialization=zipped)
        return file.getvalue()

    return written(content, "w.pt")


def torchscript(program, data=None):
    """The parts of a TorchScript archive that a reader of its weights looks at."""

    def content(folder):
        made = program(folder) if callable(program) else program
        return zipped(("m/constants.pkl", b"\x80\x02)."), ("m/data.pkl", made), *(data or ()), method=0)

    return written(content, "w.pt")


def packed_torch(folder):
    import torch

    source, path = io.BytesIO(), folder / "w.pt"
    torch.save({"w": torch.zeros(20 * MEGABYTE)}, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return path


def repeated(_):
    import torch

    return {"w": torch.ones(1).expand(1 << 40)}


MEMO = {"binary": b"Nr\xff\xff\xff\x7f.", "text": b"Np2147483647\n."}  # nothing, at place 2,147,483,647 of the memo
CASES |= {
    "pickle that would execute, bare": Case(
        written(lambda folder: pickle.dumps({"w": Runs(mark(folder))}, 2), "w.pt"), weights, NOT_WEIGHTS.format("")
    ),
    "pickle that would execute, in a torch archive": Case(
        torch_saved(lambda folder: {"w": Runs(mark(folder))}), weights, NOT_WEIGHTS.format("")
    ),
    "pickle that would execute, as torch wrote before 1.6": Case(
        torch_saved(lambda folder: {"w": Runs(mark(folder))}, zipped=False), weights, NOT_WEIGHTS.format("")
    ),
    "pickle that would execute, in a TorchScript archive": Case(
        torchscript(lambda folder: pickle.dumps(Runs(mark(folder)), 2)),
        weights,
        r"w\.pt: asks for (posix|nt)\.system, which weights do not need; not loaded$",
    ),
    **{
        f"pickle that asks for 34 GB by one number, in {form}": Case(
            torchscript(memo), weights, NOT_WEIGHTS.format("a memo of 2,147,483,647 places"), bomb=True
        )
        for form, memo in MEMO.items()
    },
    "torch archive that unpacks to 80 MB": Case(packed_torch, weights, ENDLESS, bomb=True),
    "tensor that repeats one number 10^12 times": Case(
        torch_saved(repeated), weights, NOT_WEIGHTS.format("is not stored in full"), bomb=True
    ),
}
SOUND["safetensors"] = Case(
    written(safetensors({"a": tensor(0, 8)}, bytes(8)), "w.safetensors"), weights, gives={"a": (2,)}
)


# --- YAML

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
NO_ANCHORS = r"line \d+: not valid YAML: anchors and aliases \(&a, \*a\) are not taken: write the value out$"
RECIPE = "paper: clip\nmodel: tiny\n"
for name, content, read, refused in [
    ("a billion laughs", LAUGHS, document, NO_ANCHORS),
    ("a billion laughs in a recipe", RECIPE + LAUGHS, recipe, NO_ANCHORS),
    ("a billion laughs in a paper card", LAUGHS, card, NO_ANCHORS),
    ("a billion laughs in the manifest", LAUGHS, manifest, NO_ANCHORS),
    ("a list that holds itself", "&a [*a]", document, NO_ANCHORS),
    ("an object to be made", "!!python/object/apply:os.system ['touch it-ran']", document, "tags .* are not taken"),
    ("nested 100,000 deep", "[" * 100_000, document, "nested more than 50 deep"),
    ("a number of a million digits", "a: " + "9" * 1_000_000, document, "a number of 1,000,000 characters"),
    ("a number to base sixty", "a: 1" + ":1" * 400_000, document, "a number of 800,001 characters"),
    ("a key given twice", "a: 1\nb: 2\na: 3\n", document, "line 3: not valid YAML: key 'a' is given twice"),
    ("two documents", "a: 1\n---\nb: 2\n", document, "line 2: not valid YAML"),
    ("a date that does not exist", "a: 2026-02-31", document, "not valid YAML: day"),
    ("terminal codes", "a: \x1b[31mred", document, "not valid YAML: unacceptable character #x001b"),
    ("not UTF-8", b"a: \xff\xfe", document, "not valid YAML: 'utf-8' codec"),
    ("two megabytes of comment", "#" * (2 * MEGABYTE), document, "larger than 1,048,576 bytes"),
    (
        "a variable of the environment",
        RECIPE + "data_root: ${oc.env:HOME}\n",
        recipe,
        r"\${...} is not taken in a recipe",
    ),
    (
        "a recipe that asks for itself",
        RECIPE + "data_root: ${data_root}\n",
        recipe,
        r"\${...} is not taken in a recipe",
    ),
]:
    content = content if isinstance(content, bytes) else content.encode()
    CASES[f"YAML: {name}"] = Case(written(content, "file.yaml"), read, refused, bomb=True)
SOUND["YAML"] = Case(written(b"a: 1\nb: [x, 'y']\n"), document, gives={"a": 1, "b": ["x", "y"]})
SOUND["a recipe"] = Case(written(RECIPE.encode() + b"data_root: here\n"), recipe, gives="here")


# --- the manifest and the cache

ENTRY = {
    "what": "a thing",
    "kind": "data",
    "source": {"type": "url", "urls": ["https://example.org/thing"]},
    "file": "thing.bin",
    "sha256": "ab" * 32,
    "licence": "MIT",
}


def listed(id="thing", **changes):
    return written(yaml.safe_dump({id: ENTRY | changes}).encode(), "manifest.yaml")


for file in (
    "../thing",
    "/etc/passwd",
    "a/../../thing",
    "..",
    ".",
    "a/.",
    "..\\thing",
    "C:thing",
    "thing\0",
    ".hidden",
):
    CASES[f"manifest: file {file!r}"] = Case(
        listed(file=file), manifest, r"manifest\.yaml: thing: file '.*' is not a plain relative path$"
    )
for id in ("../thing", "/thing", "a/b", "..", "Thing", "thing\n"):
    CASES[f"manifest: id {id!r}"] = Case(listed(id), manifest, "an id is lower-case letters, digits, '.', '_' and '-'$")
CASES["manifest: a link without encryption"] = Case(
    listed(source={"type": "url", "urls": ["http://example.org/thing"]}), manifest, "https only"
)
CASES["manifest: a branch that can move"] = Case(
    listed(source={"type": "hub", "repo": "a/b"}, revision="main"), manifest, "a branch or a tag can move$"
)
SOUND["a manifest"] = Case(listed(), manifest, gives={"thing": "thing.bin"})
DATA = bytes(range(256)) * 64


def pinned(data, source=None):
    """A manifest that knows DATA's sha256, and a cache (or a local file) that holds `data`."""

    def make(folder):
        from hashlib import sha256

        place = folder / "cache" / "thing" / "thing.bin"
        place.parent.mkdir(parents=True)
        place.write_bytes(data)
        path = {"type": "path", "path": str(place)} if source == "path" else ENTRY["source"]
        return listed(sha256=sha256(DATA).hexdigest(), size=len(DATA), source=path)(folder)

    return make


FLIPPED = DATA[:9000] + bytes([DATA[9000] ^ 1]) + DATA[9001:]
for name, data, refused in [
    ("one bit flipped, same size", FLIPPED, "sha256 differs: expected [0-9a-f]{64}, found [0-9a-f]{64}"),
    ("one byte missing", DATA[:-1], "size differs: expected 16,384 bytes, found 16,383"),
]:
    CASES[f"cached weights: {name}"] = Case(pinned(data), from_cache, f"thing: corrupted in the cache .{refused}")
    CASES[f"local weights: {name}"] = Case(pinned(data, "path"), from_cache, f"thing: .*thing.bin: {refused}")
SOUND["cached weights"] = Case(pinned(DATA), from_cache, gives="thing.bin")


# --- published sets


def in_class(*files):
    """An image folder with one class; each of `files` is (name, content)."""

    def make(folder):
        (folder / "set" / "train" / "cat").mkdir(parents=True)
        for name, content in files:
            (folder / "set" / "train" / "cat" / name).write_bytes(content() if callable(content) else content)
        return folder / "set"

    return make


def captioned(*names, dataset="toy", extra=None, **changes):
    """A Karpathy set whose first picture is sound; `names` are those of the other rows."""

    def make(folder):
        root = folder / "set"
        (root / "images").mkdir(parents=True)
        (root / "images" / "good.jpg").write_bytes(drawn())
        (folder / "secret.jpg").write_bytes(drawn())
        rows = [{"filename": name, "split": "train", "sentences": [{"raw": "a cat"}]} for name in ("good.jpg", *names)]
        rows[-1] |= changes
        (root / "dataset.json").write_text(json.dumps({"dataset": dataset, "images": rows}))
        if extra:
            extra(root)
        return root

    return make


def packed_pictures(*members):
    def extra(root):
        (root / "images.tar").write_bytes(tar(tar_member("good.jpg", drawn()), *members))

    return extra


def parquet_bomb(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "train.parquet"
    table = pa.table({"image": [bytes(MEGABYTE)] * 90, "label": ["a"] * 90})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    return path


def parquet_row(image, label):
    def make(folder):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"image": [image], "label": pa.array([label], pa.string())}), folder / "train.parquet")
        return folder / "train.parquet"

    return make


PNG_COLOUR = (200, 30, 30)
LEADS_OUT = "its path leads out of the folder"
CASES |= {
    "folder: PNG called .jpg": Case(
        in_class(("a.jpg", lambda: drawn(form="PNG"))), folder_set, gives=([PNG_COLOUR], {})
    ),
    "folder: a name with terminal codes": Case(
        in_class(("a.png", lambda: drawn(form="PNG")), ("\x1b[31m.jpg", b"")),
        folder_set,
        gives=(
            [PNG_COLOUR],
            {"train/cat/\x1b[31m.jpg": f"{NONE[1:]}none of JPEG, PNG, WEBP, GIF, BMP, TIFF by its content"},
        ),
    ),
    "folder: a name that is no text": Case(
        in_class(("a.png", lambda: drawn(form="PNG")), (os.fsdecode(b"\xff.png"), lambda: drawn(form="PNG"))),
        folder_set,
        gives=([PNG_COLOUR] * 2, {}),
    ),
    "folder: nothing but faults": Case(
        in_class(("\x1b[31m\n.jpg", b""), ("b.jpg", b"<html>")),
        folder_set,
        r"set: 2 of 2 .* \(2 no picture; train/cat/\\x1b\[31m\\n\.jpg: no picture: .*get the files again$",
    ),
    "captions: paths that climb out": Case(
        captioned("../secret.jpg", "images/../../secret.jpg", "/etc/passwd", "C:secret.jpg", "..\\secret.jpg"),
        karpathy_set,
        gives=(
            ["good.jpg"],
            dict.fromkeys(
                ["../secret.jpg", "images/../../secret.jpg", "/etc/passwd", "C:secret.jpg", "..\\secret.jpg"], LEADS_OUT
            ),
        ),
    ),
    "captions: a filepath that climbs out": Case(
        captioned("secret.jpg", filepath="../.."), karpathy_set, gives=(["good.jpg"], {"../../secret.jpg": LEADS_OUT})
    ),
    "captions: the set's own name climbs out": Case(
        captioned(dataset="../..", extra=lambda root: (root / "images").rename(root.parent / "..-images")),
        karpathy_set,
        "no pictures .looked for",
    ),
    "captions: a name that no file system takes": Case(
        captioned("x" * 5000, "a\0b"),
        karpathy_set,
        gives=(["good.jpg"], {"x" * 5000: "unreadable: File name too long", "a\0b": LEADS_OUT}),
    ),
    "captions: half a character in a name": Case(
        captioned("\ud800.jpg"),
        karpathy_set,
        gives=(["good.jpg"], {"\ud800.jpg": "unreadable: a name that no file system takes"}),
    ),
    "captions: links and devices in images.tar": Case(
        captioned(
            "link.jpg",
            "pipe.jpg",
            "../evil.jpg",
            extra=packed_pictures(
                tar_member("link.jpg", b"", tarfile.SYMTYPE, "../secret.jpg"),
                tar_member("pipe.jpg", b"", tarfile.FIFOTYPE),
                tar_member("../evil.jpg"),
            ),
        ),
        karpathy_set,
        gives=(
            ["good.jpg"],
            {
                "link.jpg": "the archive holds it as a link",
                "pipe.jpg": "the archive holds it as a device",
                "../evil.jpg": LEADS_OUT,
            },
        ),
    ),
    "captions: JSON nested 100,000 deep": Case(
        written(b'{"images": ' + b"[" * 100_000, "dataset.json"), karpathy_set, "not in Karpathy's form"
    ),
    "captions: a split that is a list": Case(
        captioned(split=["train"]), karpathy_set, "good.jpg is in split '..train..': it may be train"
    ),
    "captions: a split of a megabyte": Case(
        captioned(split="\x1b" * MEGABYTE), karpathy_set, r"\\x1b\.\.\. \(1,048,576 characters\)': it may be train"
    ),
    "captions: a file name that is a number": Case(captioned(filename=7), karpathy_set, "not in Karpathy's form"),
    "parquet: bomb of 90 MB": Case(
        parquet_bomb, parquet_set, "unpacks to .* bytes, which its size does not explain", bomb=True
    ),
    "parquet: no label": Case(parquet_row(b"", None), parquet_set, "row 0 has no label"),
    "parquet: a label of blanks and line breaks": Case(
        parquet_row(b"", " \u2028_\x85"), parquet_set, "row 0 has no label"
    ),
    "parquet: no parquet": Case(written(b"PAR1" * 9, "train.parquet"), parquet_set, "no readable parquet file"),
}
SOUND["a parquet file"] = Case(parquet_row(b"", "cat"), parquet_set, gives=1)
SOUND["a captioned set"] = Case(captioned(), karpathy_set, gives=(["good.jpg"], {}))


# --- texts, which nobody refuses: they are learnt from, tokenised and shown

BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # everything that str.splitlines takes for the end of a line
TEXTS = {
    "markup": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "markup out of an attribute": '"\' onmouseover=alert(1) x="><b>',
    "markup already escaped": "&lt;script&gt; &amp;lt; &#60;script&#62;",
    "Markdown": "[x](javascript:alert(1)) ![y](//z) `code` **b** # h | cell",
    "a cell of a table": "a | b || c \\| d",
    "a fence and a comment": "``` ~~~ <!-- --> ]]> --- ===",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9b",
    "terminal codes": "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J",
    "right-to-left marks": "a\u202egpj.exe \u2066a\u2067b\u2068c\u2069 \u200e\u200f\u061c\u202a\u202b\u202c\u202d",
    "right-to-left letters": "שלום 63.2 | مرحبا 4x",
    "every Unicode line break": "".join(f"{i}{c}" for i, c in enumerate(BREAKS)),
    "nothing to see": "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f",
    "half a character": "a \ud800 b \udfff",
    "no characters": "\ufffe\uffff\U0010ffff\ue000",
    "a zero byte": "a\0b",
    "piled accents": "a" + "\u0301" * 5000,
    "special tokens": "<|endoftext|> <|startoftext|> <|pad|> [SEP] </s>",
    "a format string": "{} {0.__class__} %s %n ${HOME}",
    "a number of 5,000 digits": "&#" + "9" * 5000 + "; &amp;#" + "9" * 5000 + ";",
    "1 MB of words": "cat dog " * (MEGABYTE // 8),
    "1 MB in one word": "a" * MEGABYTE,
    "1 MB of blanks": " " * MEGABYTE + "cat",
    "1 MB of lines": "a\n" * (MEGABYTE // 2),
    "1 MB of Chinese": "猫" * (MEGABYTE // 3),
    "1 MB of markup": "<b>" * (MEGABYTE // 3),
    "1 MB of accents": "\u0301" * (MEGABYTE // 2),
}


if __name__ == "__main__":  # {name: path} on stdin, the sound files first -> {name: megabytes} on stdout

    def memory(kind):
        """Megabytes, by /proc: VmRSS is what is held, VmHWM the most that was, since clear_refs was written to."""
        return int(re.search(rf"{kind}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    grown = {}
    for name, path in json.load(sys.stdin).items():
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        try:
            (SOUND | CASES)[name].read(Path(path))
        except Exception as error:  # what it says is another test's matter
            del error
        grown[name] = memory("VmHWM") - before
    print(json.dumps(grown))
