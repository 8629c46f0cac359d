"""Scenes: small pictures with an exact graph (things, colours, sizes, places), and the renderer that draws them.

A scene depends on (seed, split, index) and the options alone: scene 7 is the same whether 8 or 80,000 are drawn.
Emoji stand on a coloured card; shapes carry the colour themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import shake_256
from typing import TYPE_CHECKING

from shared.core.errors import UserError
from shared.data.seeded import SeededRandom
from shared.data.synthetic.sprites import SpritePack

if TYPE_CHECKING:
    from numpy import ndarray

COLOURS = {
    "red": (214, 44, 46),
    "orange": (242, 140, 34),
    "yellow": (248, 216, 58),
    "green": (52, 158, 72),
    "blue": (44, 104, 216),
    "purple": (132, 66, 176),
    "pink": (246, 146, 184),
    "brown": (122, 80, 50),
}
# Neutral, so that a background is never taken for a card.
TONES = (
    (246, 246, 246), (226, 228, 232), (238, 230, 214), (204, 208, 214),
    (216, 224, 216), (178, 172, 166), (96, 102, 110), (50, 54, 62),
)  # fmt: skip
TEXTURES = ("plain", "top light", "left light", "checks", "stripes")


@dataclass(frozen=True, slots=True)
class SceneOptions:
    """What scenes are sampled from.

    objects: fewest and most things. clutter: 0 (none) to 1 (a dozen faint blobs behind the things). noise: standard
    deviation of the pixel noise, in grey levels. jitter: 0 (things sit at fixed places and sizes) to 1. small: share of
    small things. held_out: share of each thing's colours that training and ordinary test scenes never show.
    """

    objects: tuple[int, int] = (1, 2)
    clutter: float = 0.5
    noise: float = 10.0
    jitter: float = 1.0
    small: float = 0.4
    held_out: float = 0.125

    def __post_init__(self):
        low, high = self.objects
        if not 1 <= low <= high <= 9:
            raise UserError(f"scene option objects={self.objects}: give (fewest, most) within 1 and 9")
        for name, value, most in (("clutter", self.clutter, 1), ("noise", self.noise, 64), ("jitter", self.jitter, 1)):
            if not 0 <= value <= most:
                raise UserError(f"scene option {name}={value}: give 0 to {most}")
        for name, value in (("small", self.small), ("held_out", self.held_out)):
            if not 0 <= value <= 0.75:
                raise UserError(f"scene option {name}={value}: give a share of 0 to 0.75")


DEFAULTS = SceneOptions()


@dataclass(frozen=True, slots=True)
class Thing:
    """A sprite in a scene. x, y: its centre, and side: its width, as shares of the picture; cell: (row, column)."""

    name: str
    colour: str
    size: str
    cell: tuple[int, int]
    x: float
    y: float
    side: float
    shade: int = 1


@dataclass(frozen=True, slots=True)
class Scene:
    """The graph of one picture. grid: rows and columns of cells; cards: colours belong to cards behind the things."""

    id: str
    things: tuple[Thing, ...]
    grid: tuple[int, int]
    cards: bool
    background: tuple[int, int] = (0, 0)
    clutter: tuple[tuple[int, float, float, float, int], ...] = ()
    noise: float = 0.0
    grain: int = 0


@lru_cache(maxsize=65536)
def held_out_colours(name: str, seed: int = 0, share: float = 0.125) -> frozenset[str]:
    """The colours in which a thing is shown by composition tests alone."""
    return frozenset(SeededRandom("held out", seed, name).sample(list(COLOURS), round(share * len(COLOURS))))


@lru_cache(maxsize=65536)
def _shown_colours(name: str, seed: int, share: float) -> tuple[str, ...]:
    return tuple(colour for colour in COLOURS if colour not in held_out_colours(name, seed, share))


def scenes_apart(names: Sequence[str], seed: int, options: SceneOptions) -> int:
    """How many sets of things in colours the scenes of these options can show."""
    low, high = options.objects
    sets = [1] + [0] * high  # by number of things
    for name in names:
        for things in range(high, 0, -1):
            sets[things] += sets[things - 1] * len(_shown_colours(name, seed, options.held_out))
    return sum(sets[low:])


def sample_scene(
    pack: SpritePack,
    split: str,
    index: int,
    *,
    seed: int = 0,
    options: SceneOptions = DEFAULTS,
    first: str | None = None,
    colour: str | None = None,
    attempt: int = 0,
) -> Scene:
    """Scene `index` of a split. `first` and `colour` pin the first thing; `attempt` counts re-draws of one index."""
    draw = SeededRandom("scene", seed, split, index, attempt)
    low, high = options.objects
    count = low + draw.below(high - low + 1)
    if count > len(pack.sprites):
        raise UserError(
            f"scenes of {count} different things from {len(pack.sprites)} classes: raise classes or lower objects"
        )
    names: list[str] = []
    while len(names) < count:
        name = first if first and not names else draw.pick(pack.sprites).name
        if name not in names:
            names.append(name)
    small = [draw.chance(options.small) for _ in names]
    rows, cols = _grid(count, small[0], draw)
    cells = [(row, col) for row in range(rows) for col in range(cols)]
    things = []
    for i, (name, cell) in enumerate(zip(names, draw.sample(cells, count), strict=True)):
        shown = colour if colour and i == 0 else draw.pick(_shown_colours(name, seed, options.held_out))
        things.append(_place(name, shown, small[i], cell, (rows, cols), options.jitter, draw))
    return Scene(
        id=f"{split}-{index:06d}",
        things=tuple(things),
        grid=(rows, cols),
        cards=not pack.tinted,
        background=(draw.below(len(TONES)), draw.below(len(TEXTURES))),
        clutter=tuple(
            (draw.below(3), draw.unit(), draw.unit(), draw.between(0.06, 0.24), draw.below(len(CLUTTER_INKS)))
            for _ in range(round(12 * options.clutter * draw.unit()))
        ),
        noise=options.noise * draw.between(0.5, 1.0),
        grain=draw.below(GRAINS),
    )


def _grid(count: int, small: bool, draw: SeededRandom) -> tuple[int, int]:
    if count == 1:
        return (2, 2) if small else (1, 1)
    if count == 2:
        return draw.pick(((1, 2), (2, 1)))
    return (2, 2) if count <= 4 else (2, 3) if count <= 6 else (3, 3)


def _place(
    name: str, colour: str, small: bool, cell: tuple[int, int], grid: tuple[int, int], jitter: float, draw: SeededRandom
) -> Thing:
    rows, cols = grid
    high, wide = 1 / rows, 1 / cols
    room = min(high, wide)
    largest = 0.84 if room == 1 else 1.04 * room  # neighbours may touch, as in photographs
    side = largest * (1 + 0.1 * jitter * (draw.unit() - 0.5)) * (0.68 if small and room < 1 else 1)

    def centre(at: int, extent: float) -> float:
        spare = max(extent - side, 0.0)
        place = (at + 0.5) * extent + jitter * spare * (draw.unit() - 0.5)
        return min(max(place, side / 2), 1 - side / 2)

    y, x = centre(cell[0], high), centre(cell[1], wide)
    return Thing(name, colour, "small" if small else "large", cell, x, y, side, draw.below(4))


# --- rendering: integers throughout, so that pixels are the same on every machine

CARD = 0.80  # the sprite's share of its card's width
CLUTTER_INKS = (*COLOURS.values(), (20, 20, 20), (250, 250, 250), (128, 128, 128))
GRAINS = 1 << 16  # places where a picture's slice of the noise table may start
STAMP_BYTES = 128_000_000  # scaled sprites kept per pack


def render(scene: Scene, pack: SpritePack, size: int) -> ndarray:
    """The picture of a scene: (size, size, 3) uint8. Any vendor of the scene's pack can draw it."""
    import numpy as np

    canvas = _background(*scene.background, size).copy()  # (H, 3 W) uint16: long rows keep numpy's inner loops long
    for kind, x, y, side, ink in scene.clutter:
        _stamp(canvas, x, y, *_blob(kind, max(2, round(side * size)), ink))
    for thing in scene.things:
        pixels = max(4, round(thing.side * size))
        if pack.tinted:
            _stamp(canvas, thing.x, thing.y, *_sprite(pack, thing.name, pixels, (thing.colour, thing.shade)))
        else:
            _stamp(canvas, thing.x, thing.y, *_card(thing.colour, thing.shade, pixels))
            _stamp(canvas, thing.x, thing.y, *_sprite(pack, thing.name, max(3, round(CARD * pixels)), None))
    if scene.noise:
        noisy = canvas.view(np.int16)
        noisy += _grain(scene.noise, canvas.size + GRAINS)[scene.grain : scene.grain + canvas.size].reshape(
            canvas.shape
        )
        np.maximum(noisy, 0, out=noisy)
        np.minimum(noisy, 255, out=noisy)
    return canvas.astype(np.uint8).reshape(size, size, 3)


def render_many(scenes: Sequence[Scene], pack: SpritePack, size: int) -> ndarray:
    """Pictures as a training loop takes them: (N, 3, size, size) uint8."""
    import numpy as np

    images = np.empty((len(scenes), 3, size, size), dtype=np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = render(scene, pack, size).transpose(2, 0, 1)
    return images


def _stamp(canvas: ndarray, x: float, y: float, paint: ndarray, keep: ndarray) -> None:
    """canvas = paint + canvas * keep / 256 around the centre (x, y); paint is premultiplied by its alpha."""
    size, high, wide = canvas.shape[0], paint.shape[0], paint.shape[1] // 3
    top, left = round(y * size - high / 2), round(x * size - wide / 2)
    if top < 0 or left < 0 or top + high > size or left + wide > size:  # clutter may stick out
        rows = slice(max(-top, 0), min(size - top, high))
        cols = slice(3 * max(-left, 0), 3 * min(size - left, wide))
        paint, keep, top, left = paint[rows, cols], keep[rows, cols], max(top, 0), max(left, 0)
    region = canvas[top : top + paint.shape[0], 3 * left : 3 * left + paint.shape[1]]
    region *= keep
    region >>= 8
    region += paint


def _ready(premultiplied: ndarray) -> tuple[ndarray, ndarray]:
    """(S, S, 4) premultiplied uint8 -> what is added, and the share of 256 that stays: both (S, 3 S) uint16."""
    import numpy as np

    colours = premultiplied[..., :3].astype(np.uint16)
    alpha = np.repeat(premultiplied[..., 3:].astype(np.uint16), 3, axis=2)
    flat = (len(premultiplied), -1)
    # The bicubic filter overshoots: paint above its alpha would wrap around. 255 must leave 0, and 0 leave 256.
    return np.minimum(colours, alpha).reshape(flat), (256 - alpha - (alpha >> 7)).reshape(flat)


def _sprite(pack: SpritePack, name: str, side: int, tint: tuple[str, int] | None) -> tuple[ndarray, ndarray]:
    import numpy as np

    key = (name, side, tint)
    if (found := pack.stamps.get(key)) is not None:
        return found
    scaled = _scaled(pack, name, side)
    if tint is not None:
        ink = np.array([*_shaded(*tint), 255], dtype=np.uint32)
        scaled = (scaled * ink // 255).astype(np.uint8)
    if len(pack.stamps) * side * side * 12 > STAMP_BYTES:
        pack.stamps.clear()
    pack.stamps[key] = _ready(scaled)
    return pack.stamps[key]


def _scaled(pack: SpritePack, name: str, side: int) -> ndarray:
    """(side, side, 4) uint8, premultiplied: scaled once, tinted often."""
    import numpy as np
    from PIL import Image

    key = (name, side)
    if (found := pack.stamps.get(key)) is None:
        if (index := pack.index.get(name)) is None:
            raise UserError(
                f"sprite pack {pack.name!r} by {pack.vendor!r} has no {name!r}: draw scenes with their own pack"
            )
        image = Image.fromarray(pack.sprites[index].rgba, "RGBA").convert("RGBa")
        found = pack.stamps[key] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    return found


def _shaded(colour: str, shade: int) -> list[int]:
    return [min(255, channel * (232 + 10 * shade) // 250) for channel in COLOURS[colour]]


@lru_cache(maxsize=8192)
def _card(colour: str, shade: int, side: int) -> tuple[ndarray, ndarray]:
    return _flat(_rounded(side, 0.16), _shaded(colour, shade), 255)


@lru_cache(maxsize=4096)
def _blob(kind: int, side: int, ink: int) -> tuple[ndarray, ndarray]:
    """Faint clutter: a disc, a square or a bar."""
    mask = _rounded(side, (0.5, 0.0, 0.1)[kind])
    return _flat(mask[: max(1, side // 3)] if kind == 2 and side > 3 else mask, CLUTTER_INKS[ink], 110)


def _flat(mask: ndarray, ink: Iterable[int], opacity: int) -> tuple[ndarray, ndarray]:
    import numpy as np

    alpha = mask.astype(np.uint32) * opacity // 255
    paint = alpha[..., None] * np.array(list(ink), dtype=np.uint32) // 255
    return _ready(np.dstack([paint, alpha]).astype(np.uint8))


@lru_cache(maxsize=1024)
def _rounded(side: int, radius: float) -> ndarray:
    import numpy as np
    from PIL import Image, ImageDraw

    large = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(large).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), radius=4 * side * radius, fill=255)
    return np.asarray(large.resize((side, side), Image.Resampling.BOX))


@lru_cache(maxsize=256)
def _background(tone: int, texture: int, size: int) -> ndarray:
    import numpy as np

    y, x = np.mgrid[:size, :size]
    cell = max(size // 8, 1)
    relief = {
        "plain": np.zeros((size, size), dtype=int),
        "top light": 24 - 48 * y // size,
        "left light": 24 - 48 * x // size,
        "checks": 14 * ((x // cell + y // cell) % 2) - 7,
        "stripes": 14 * ((x + y) // cell % 2) - 7,
    }[TEXTURES[texture]]
    return np.clip(np.array(TONES[tone]) + relief[..., None], 0, 255).astype(np.uint16).reshape(size, 3 * size)


@lru_cache(maxsize=4)
def _unit_grain(count: int) -> ndarray:
    """Bell-shaped noise, four bytes of SHAKE-256 summed. A table, since a picture takes a slice."""
    import numpy as np

    table = np.frombuffer(shake_256(b"grain").digest(count * 4), dtype=np.uint8).reshape(count, 4)
    return table.sum(axis=1, dtype=np.int32) - 510  # mean 510, standard deviation 147.8


@lru_cache(maxsize=128)
def _grain_level(level: int, count: int) -> ndarray:
    import numpy as np

    return ((_unit_grain(count) * (level * 443) + (1 << 17)) >> 18).astype(np.int16)  # 443 / 2**18 = 1 / (4 * 147.9)


def _grain(deviation: float, count: int) -> ndarray:
    return _grain_level(round(deviation * 4), count)
