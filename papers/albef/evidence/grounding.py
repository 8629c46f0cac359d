"""Where words look (Sec. 6.4), measured on scenes whose things have known boxes: does the hottest place lie inside?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from papers.albef.data import ExperimentData
from papers.albef.model import Albef
from papers.albef.tasks import word_maps
from shared.data.synthetic.scenes import Thing

MOST = 128  # pictures looked at


@dataclass(frozen=True)
class Located:
    """A word for a thing, its name or its colour, in caption `row` of the test pictures: tokens first to last, which is
    not counted in."""

    row: int
    word: str
    first: int
    last: int
    thing: Thing


def middle_layer(model: Albef) -> int:
    """The third of the paper's six multimodal layers, or what corresponds to it."""
    return (len(model.multimodal_encoder) - 1) // 2


def located(data: ExperimentData) -> Iterator[Located]:
    """Names and colours of the things that do not fill their picture; words that stand there once."""
    for row, scene in enumerate(data.test.scenes):
        caption = data.test.captions[row]
        for thing in scene.things if scene.grid != (1, 1) else ():
            for word in (thing.name, thing.colour):
                before, match, after = caption.partition(word)
                first = 1 + len(data.tokenizer.encode(before))  # behind the start token
                last = 1 + len(data.tokenizer.encode(before + match))
                if match and word not in after and first < last < data.config.context:
                    yield Located(row, word, first, last, thing)


def pointing(model: Albef, data: ExperimentData) -> dict:
    """`pointing`: points of words whose hottest patch has its centre in the thing's box, of `pointed` words;
    `pointing_chance`: of a patch at random. Nothing where no picture has known things."""
    words = [word for word in located(data) if word.row < MOST]
    if not words:
        return {}
    device, rows = model.temperature.device, sorted({word.row for word in words})
    tokens = data.tokens([data.test.captions[row] for row in rows])
    maps = word_maps(model, data.test.images[rows].to(device), tokens.to(device), middle_layer(model)).cpu()
    high, wide = maps.shape[2:]
    hits, shares = 0, 0.0
    for word in words:
        heat = maps[rows.index(word.row), word.first : word.last].mean(0)  # (rows, columns)
        inside = torch.tensor(
            [[covers(word.thing, (x + 0.5) / wide, (y + 0.5) / high) for x in range(wide)] for y in range(high)]
        )
        hits += bool(inside.flatten()[heat.flatten().argmax()])
        shares += float(inside.float().mean())
    return {
        "pointing": 100 * hits / len(words),
        "pointed": len(words),
        "pointing_chance": 100 * shares / len(words),
    }


def covers(thing: Thing, x: float, y: float) -> bool:
    return max(abs(thing.x - x), abs(thing.y - y)) <= thing.side / 2
