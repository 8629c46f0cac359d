"""Sprites, the things that scenes are composed of: drawn shapes, and emoji artwork by two vendors.

`emoji` reads the npm packages emoji-datasource-google and emoji-datasource-twitter 16.0.0 (Noto Emoji and Twemoji).
Both packs come in two hands, so that a model trained on one artist can be tested on the other.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import acos, cos, pi, sin
from pathlib import Path
from typing import TYPE_CHECKING

from shared.core.archives import ArchiveError, Limits, SafeArchive
from shared.core.errors import UserError
from shared.core.files import atomic
from shared.core.text import shown

if TYPE_CHECKING:
    from numpy import ndarray

VENDORS = {"emoji": ("google", "twitter"), "shapes": ("filled", "outline")}


@dataclass(frozen=True, eq=False)
class Sprite:
    """One thing: its noun phrase without an article ('red apple'), its category, and its picture.

    rgba: (S, S, 4) uint8, straight alpha. Of a tinted pack the colours are grey levels that a colour multiplies.
    """

    name: str
    category: str
    rgba: ndarray


@dataclass(frozen=True, eq=False)
class SpritePack:
    """Sprites by one vendor. The same names, in the same order, whichever vendor drew them."""

    name: str
    vendor: str
    sprites: tuple[Sprite, ...]
    credits: tuple[str, ...]
    tinted: bool = False
    index: dict[str, int] = field(init=False, repr=False)
    stamps: dict = field(init=False, repr=False, default_factory=dict)  # scaled pictures, kept by the renderer

    def __post_init__(self):
        object.__setattr__(self, "index", {sprite.name: i for i, sprite in enumerate(self.sprites)})

    @property
    def names(self) -> list[str]:
        return [sprite.name for sprite in self.sprites]

    def subset(self, n: int) -> SpritePack:
        """n classes spread over the categories: one of each in turn, the pack's order within a category.

        A smaller subset is part of a larger one, and the choice depends on names and categories alone.
        """
        if not 1 <= n <= len(self.sprites):
            raise UserError(f"{self.name}: {n} classes asked for, choose 1 to {len(self.sprites)}")
        turn: dict[str, int] = {}
        ranked = []
        for position, sprite in enumerate(self.sprites):
            turn[sprite.category] = turn.get(sprite.category, -1) + 1
            ranked.append((turn[sprite.category], position))
        chosen = sorted(position for _, position in sorted(ranked)[:n])
        return replace(self, sprites=tuple(self.sprites[i] for i in chosen))


def load_pack(name: str, vendor: str | None = None, *, source: str | Path | None = None) -> SpritePack:
    """The pack `emoji` or `shapes` as one vendor draws it (the first of VENDORS unless told).

    source: for emoji the package's .tgz, or the folder it was unpacked to. `shapes` needs none.
    """
    if name not in VENDORS:
        raise UserError(f"no sprite pack {name!r}: there are {', '.join(VENDORS)}")
    vendor = vendor or VENDORS[name][0]
    if vendor not in VENDORS[name]:
        raise UserError(f"sprite pack {name!r} has no vendor {vendor!r}: there are {', '.join(VENDORS[name])}")
    if name == "shapes":
        return _shapes(vendor)
    if source is None:
        raise UserError(
            f"sprite pack 'emoji' needs the package emoji-datasource-{vendor}: give its .tgz or folder as source"
        )
    return _emoji(vendor, Path(source))


# --- emoji: which of them, and what they are called

CACHE_FORMAT = 1
CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
# Maps, houses of worship and oddments are hard to tell apart or to name in a picture of 48 pixels.
LEFT_OUT_SUBCATEGORIES = {"place-map", "place-religious", "other-object", "award-medal"}
# Variants of one drawing (phases, hours, denominations, viewing angles), whole landscapes, and abstract signs.
LEFT_OUT = re.compile(
    r"\b("
    r"with|without|behind|facing|on ground|oncoming|clock face|suit"
    r"|mahjong|cards?|symbol|sign|sunrise|sunset|cityscape|night|foggy|fog|camping|park|desert|fuji"
    r"|wedding|tokyo|statue|love|japanese|european|derelict|construction|milky way|departure|arriving|open"
    r"|closed|bookmark|label|trackball|hot springs|motorway|railway|cableway|tramway|light rail|station"
    r"|level slider|notes?|score|pistol|bikini|briefs|cooked|curry|pouring|wind|microbe|drop of blood|chart"
    r"|tray|low|minidisc|optical disc|receiver|rosette|right-pointing|metro|tram car|trolleybus|minibus|houses"
    r"|cut of meat|high-speed|performing|pine decoration|ceremony|sparkles|paw|nose|white medium|mate drink"
    r"|oden|herb|pager"
    r")\b"
)
# The few Unicode names that nobody says. Everything else is the Unicode name in lower case.
SAID = {
    "aubergine": "eggplant",
    "automobile": "car",
    "articulated lorry": "lorry",
    "beer mug": "mug of beer",
    "boar": "wild boar",
    "carpentry saw": "saw",
    "direct hit": "dartboard",
    "ear of maize": "ear of corn",
    "electric light bulb": "light bulb",
    "electric torch": "flashlight",
    "hocho": "kitchen knife",
    "izakaya lantern": "paper lantern",
    "lady beetle": "ladybug",
    "poultry leg": "chicken leg",
    "billiards": "billiard ball",
    "bowling": "bowling ball",
    "dna double helix": "dna helix",
    "hot beverage": "cup of coffee",
    "house building": "house",
    "left-pointing magnifying glass": "magnifying glass",
    "public address loudspeaker": "loudspeaker",
    "cheering megaphone": "megaphone",
    "meat on bone": "piece of meat",
    "firework sparkler": "sparkler",
    "folding hand fan": "hand fan",
    "jigsaw puzzle piece": "puzzle piece",
    "one-piece swimsuit": "swimsuit",
    "roasted sweet potato": "sweet potato",
    "videocassette": "video tape",
    "sauropod": "dinosaur",
    "headphone": "pair of headphones",
    "mantelpiece clock": "mantel clock",
    "personal computer": "laptop",
    "steaming bowl": "bowl of noodles",
    "wrapped present": "gift box",
}


def noun_of(unicode_name: str, subcategory: str) -> str:
    """A Unicode name as one says it: 'FOX FACE' -> 'fox', 'BLACK SCISSORS' -> 'scissors', 'MANS SHOE' -> man's shoe."""
    noun = unicode_name.lower().replace("’", "'")
    if noun in SAID:
        return SAID[noun]
    noun = re.sub(r"^(wo)?mans ", lambda found: found[0].replace("mans", "man's"), noun)
    if not subcategory.startswith(("animal", "plant", "food")):
        noun = re.sub(r"^(black|white) ", "", noun)  # typography, not the colour of the thing
    return re.sub(r" face$", "", noun)


def choose(table: list[dict]) -> list[dict]:
    """The emoji that both vendors draw, concrete and distinct, each with its `noun`; the oldest (best known) first."""
    found: dict[str, dict] = {}
    for entry in sorted(table, key=lambda entry: (float(entry["added_in"]), entry["sort_order"])):
        name = entry["name"].lower()
        if (
            entry["category"] not in CATEGORIES
            or entry["subcategory"] in LEFT_OUT_SUBCATEGORIES
            or not (entry["has_img_google"] and entry["has_img_twitter"])
            or LEFT_OUT.search(name)
        ):
            continue
        noun = noun_of(entry["name"], entry["subcategory"])
        known = found.get(noun)
        # 'CAT' and 'CAT FACE' are one noun: the whole animal wins.
        if len(noun.split()) <= 3 and (known is None or known["name"].endswith(" FACE")):
            found[noun] = {**entry, "noun": noun}
    kept = []
    for noun, entry in found.items():
        # A 'guide dog' is a dog too: where a subcategory has the plain noun, its varieties would be wrong answers.
        tails = {noun.split(" ", i)[-1] for i in range(1, noun.count(" ") + 1)}
        if not any(tail in found and found[tail]["subcategory"] == entry["subcategory"] for tail in tails):
            kept.append(entry)
    return kept


def _emoji(vendor: str, source: Path) -> SpritePack:
    import numpy as np

    if not source.exists():
        raise UserError(f"emoji: no {source} (looked for the package emoji-datasource-{vendor}, a .tgz or its folder)")
    stamp = source if source.is_file() else _inside(source) / "emoji.json"
    if not stamp.exists():
        raise UserError(f"emoji: {source} has no emoji.json: is it the package emoji-datasource-{vendor}, unpacked?")
    state = stamp.stat()
    key = [CACHE_FORMAT, vendor, state.st_size, state.st_mtime_ns, _rules_digest()]
    cache = (
        stamp.with_name(f"{source.name}.{vendor}.npz") if source.is_file() else stamp.with_name(f"sprites.{vendor}.npz")
    )
    cached = _read_cache(cache, key)
    if cached is None:
        chosen, pictures = _read_package(vendor, source)
        cached = [(entry["noun"], entry["subcategory"]) for entry in chosen], pictures
        _write_cache(cache, key, *cached)
    table, pictures = cached
    sprites = tuple(
        Sprite(noun, category, rgba) for (noun, category), rgba in zip(table, np.asarray(pictures), strict=True)
    )
    return SpritePack("emoji", vendor, sprites, EMOJI_CREDITS[vendor])


EMOJI_CREDITS = {  # as the packages' own README, LICENSE and package.json state it
    "google": (
        "Noto Emoji v2.048 artwork: Apache License 2.0, https://github.com/googlefonts/noto-emoji",
        "emoji-datasource-google 16.0.0: MIT License, Copyright (c) 2013 Cal Henderson",
    ),
    "twitter": (
        "Twemoji (fork) v16.0.1 graphics: Creative Commons Attribution 4.0, Copyright Twitter, Inc and other "
        "contributors, https://github.com/jdecked/twemoji",
        "emoji-datasource-twitter 16.0.0: MIT License, Copyright (c) 2013 Cal Henderson",
    ),
}


def _inside(folder: Path) -> Path:
    return folder / "package" if (folder / "package" / "emoji.json").exists() else folder


def _rules_digest() -> str:
    from hashlib import sha256

    rules = [CATEGORIES, sorted(LEFT_OUT_SUBCATEGORIES), LEFT_OUT.pattern, sorted(SAID.items())]
    return sha256(repr(rules).encode()).hexdigest()


def _read_package(vendor: str, source: Path) -> tuple[list[dict], ndarray]:
    import numpy as np

    wanted = re.compile(rf"(?:package/)?(emoji\.json|img/{vendor}/64/[0-9a-f-]+\.png)")
    files = dict(_members(source, wanted))
    try:
        chosen = choose(json.loads(files["emoji.json"]))
        pictures = [_picture(files[f"img/{vendor}/64/{entry['image']}"]) for entry in chosen]
    except KeyError as missing:
        raise UserError(
            f"emoji: {source} lacks {missing}: is it the package emoji-datasource-{vendor} 16.0.0?"
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as wrong:
        raise UserError(f"emoji: {source} cannot be read ({shown(wrong)}): fetch it again") from None
    if not chosen:
        raise UserError(f"emoji: {source} names no emoji that both vendors draw")
    return chosen, np.stack(pictures)


def _members(source: Path, wanted: re.Pattern) -> Iterator[tuple[str, bytes]]:
    """(group 1 of `wanted`, content) of the files of a .tgz or of its unpacked folder; nothing is written to disk."""
    if source.is_dir():
        folder = _inside(source)
        for path in [folder / "emoji.json", *sorted(folder.glob("img/*/64/*.png"))]:
            if found := wanted.fullmatch(path.relative_to(folder).as_posix()):
                yield found[1], path.read_bytes()
        return
    try:
        with SafeArchive(source, Limits(member=16_000_000)) as archive:
            for name in archive.members():
                if found := wanted.fullmatch(name):
                    yield found[1], archive.read(name)
    except UserError as wrong:
        raise UserError(f"emoji: no readable .tgz: {wrong}") from None
    except ArchiveError as wrong:
        raise UserError(f"emoji: no readable .tgz: {source}: {wrong}: fetch it again") from None


def _picture(content: bytes) -> ndarray:
    """A PNG as (64, 64, 4) uint8, centred in its square where the drawing is not square."""
    import numpy as np
    from PIL import Image

    from shared.data.images import open_image

    image = open_image(content, max_pixels=1_000_000).convert("RGBA")
    if image.size != (64, 64):
        side = max(image.size)
        square = Image.new("RGBA", (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square.resize((64, 64), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _read_cache(path: Path, key: list) -> tuple[list, ndarray] | None:
    import numpy as np

    try:
        with SafeArchive(path, Limits(ratio=1)) as archive:  # np.savez packs nothing
            parts = {name: np.load(io.BytesIO(archive.read(name)), allow_pickle=False) for name in archive.members()}
        header, rgba = json.loads(str(parts["header.npy"])), parts["rgba.npy"]
        sound = header["key"] == key and rgba.shape == (len(header["table"]), 64, 64, 4) and rgba.dtype == np.uint8
        return (header["table"], rgba) if sound else None
    except (UserError, ValueError, KeyError, TypeError, EOFError, MemoryError):
        return None


def _write_cache(path: Path, key: list, table: list, pictures: ndarray) -> None:
    """Beside the source, whole or not at all; a folder that cannot be written to goes without."""
    import numpy as np

    with suppress(OSError), atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, header=np.array(json.dumps({"key": key, "table": table})), rgba=pictures)


# --- shapes: drawn here, in a square from -1 to 1 with y pointing down


def _ngon(corners: int, turn: float = 0.0, radius: float = 0.95) -> list[tuple[float, float]]:
    angles = [2 * pi * i / corners + turn - pi / 2 for i in range(corners)]
    return [(radius * cos(a), radius * sin(a)) for a in angles]


def _spikes(points: int, inner: float) -> list[tuple[float, float]]:
    angles = [pi * i / points - pi / 2 for i in range(2 * points)]
    return [((0.98, inner)[i % 2] * cos(a), (0.98, inner)[i % 2] * sin(a)) for i, a in enumerate(angles)]


def _curve(x, y, steps: int = 96) -> list[tuple[float, float]]:
    return [(x(2 * pi * i / steps), y(2 * pi * i / steps)) for i in range(steps)]


def _heart() -> list[tuple[float, float]]:
    return _curve(
        lambda t: 0.92 * sin(t) ** 3,
        lambda t: -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 17.5 - 0.08,
    )


def _flower() -> list[tuple[float, float]]:
    return _curve(lambda t: (0.72 + 0.24 * cos(5 * t)) * sin(t), lambda t: -(0.72 + 0.24 * cos(5 * t)) * cos(t))


def _crescent() -> list[tuple[float, float]]:
    # Two circles that cut each other at +-horn, seen from the outer (radius 0.9) and the inner (0.72) centre.
    apart, outer, inner = 0.4, 0.9, 0.72
    along = (apart**2 + outer**2 - inner**2) / (2 * apart)
    horn, mouth = acos(along / outer), acos((along - apart) / inner)
    back = [horn + (2 * pi - 2 * horn) * i / 48 for i in range(49)]
    front = [2 * pi - mouth - (2 * pi - 2 * mouth) * i / 48 for i in range(49)]
    return [(0.2 + outer * cos(a), outer * sin(a)) for a in back] + [
        (0.2 + apart + inner * cos(a), inner * sin(a)) for a in front
    ]


def _box(half: float) -> list[tuple[float, float]]:
    return [(-half, -half), (half, -half), (half, half), (-half, half)]


def _oval(wide: float, high: float) -> list[tuple[float, float]]:
    return _curve(lambda t: wide * cos(t), lambda t: high * sin(t))


OUTLINES: dict[str, tuple[str, list[list[tuple[float, float]]]]] = {  # name: (category, rings; a second ring is a hole)
    "circle": ("round", [_oval(0.92, 0.92)]),
    "square": ("polygon", [_box(0.82)]),
    "star": ("pointed", [_spikes(5, 0.42)]),
    "heart": ("curved", [_heart()]),
    "ring": ("round", [_oval(0.92, 0.92), _oval(0.5, 0.5)]),
    "triangle": ("polygon", [[(0, -0.9), (0.95, 0.78), (-0.95, 0.78)]]),
    "arrow": ("pointed", [[(-0.92, -0.28), (0.1, -0.28), (0.1, -0.75), (0.95, 0), (0.1, 0.75), (0.1, 0.28),
                           (-0.92, 0.28)]]),
    "crescent": ("curved", [_crescent()]),
    "oval": ("round", [_oval(0.95, 0.58)]),
    "diamond": ("polygon", [[(0, -0.97), (0.66, 0), (0, 0.97), (-0.66, 0)]]),
    "cross": ("pointed", [[(-0.3, -0.92), (0.3, -0.92), (0.3, -0.3), (0.92, -0.3), (0.92, 0.3), (0.3, 0.3), (0.3, 0.92),
                           (-0.3, 0.92), (-0.3, 0.3), (-0.92, 0.3), (-0.92, -0.3), (-0.3, -0.3)]]),
    "drop": ("curved", [[(0, -0.97), *((0.64 * cos(a / 10), 0.3 + 0.64 * sin(a / 10)) for a in range(-4, 36))]]),
    "half circle": ("round", [[(0.95 * cos(pi * i / 48), 0.42 - 0.95 * sin(pi * i / 48)) for i in range(49)]]),
    "frame": ("polygon", [_box(0.85), _box(0.48)]),
    "bolt": ("pointed", [[(0.25, -0.97), (-0.62, 0.15), (-0.08, 0.15), (-0.28, 0.97), (0.62, -0.2), (0.08, -0.2)]]),
    "flower": ("curved", [_flower()]),
    "hexagon": ("polygon", [_ngon(6)]),
    "chevron": ("pointed", [[(-0.7, -0.9), (0.05, -0.9), (0.8, 0), (0.05, 0.9), (-0.7, 0.9), (0.05, 0)]]),
    "trapezoid": ("polygon", [[(-0.5, -0.68), (0.5, -0.68), (0.95, 0.68), (-0.95, 0.68)]]),
    "sun": ("pointed", [_spikes(12, 0.66)]),
    "pentagon": ("polygon", [_ngon(5)]),
    "octagon": ("polygon", [_ngon(8, pi / 8)]),
}  # fmt: skip


@lru_cache(maxsize=2)
def _shapes(vendor: str, side: int = 128) -> SpritePack:
    """`filled`: flat with a darker rim. `outline`: a thick stroke with round joints over a pale body."""
    sprites = tuple(Sprite(name, category, _drawn(rings, vendor, side)) for name, (category, rings) in OUTLINES.items())
    return SpritePack("shapes", vendor, sprites, ("shapes: drawn by this repository",), tinted=True)


def _drawn(rings: list[list[tuple[float, float]]], vendor: str, side: int) -> ndarray:
    import numpy as np
    from PIL import Image, ImageDraw

    large = 4 * side  # drawn four times as large and reduced: the edges are anti-aliased
    body, stroke = Image.new("L", (large, large)), Image.new("L", (large, large))
    width = large // (8 if vendor == "outline" else 24)
    for level, ring in zip((255, 0), rings, strict=False):
        corners = [((x * 0.92 + 1) * large / 2, (y * 0.92 + 1) * large / 2) for x, y in ring]
        ImageDraw.Draw(body).polygon(corners, fill=level)
        pen = ImageDraw.Draw(stroke)
        pen.line([*corners, corners[0]], fill=255, width=width)
        for x, y in corners:
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    inside, line = (
        np.asarray(layer.resize((side, side), Image.Resampling.BOX), dtype=np.uint16) for layer in (body, stroke)
    )
    if vendor == "outline":
        grey, alpha = np.full_like(line, 255), np.maximum(line, inside // 4)
    else:
        grey, alpha = 255 - line // 3, np.maximum(line, inside)
    return np.dstack([grey, grey, grey, alpha]).astype(np.uint8)
