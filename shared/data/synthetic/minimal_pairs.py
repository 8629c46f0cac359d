"""Retrieval that a model cannot solve by the gist: groups of scenes that differ in one detail (colour, thing, place,
count), each with its picture and its full caption, so that every caption is a near-miss for the rest of its group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from shared.core.errors import UserError
from shared.data.seeded import SeededRandom
from shared.data.synthetic.captions import caption
from shared.data.synthetic.scenes import (
    COLOURS,
    DEFAULTS,
    Scene,
    SceneOptions,
    Thing,
    held_out_colours,
    render_many,
    sample_scene,
)
from shared.data.synthetic.sprites import SpritePack

if TYPE_CHECKING:
    from torch import Tensor

DETAILS = ("colour", "thing", "place", "count")
ATTEMPTS = 64


@dataclass
class MinimalPairs:
    """N pictures and their captions, group by group: caption i is true of picture i and nearly true of its group.

    images: (N, 3, H, W) uint8; groups: (N,) int64, rising; details: what tells a picture from the first of its group,
    "" for the first itself.
    """

    ids: list[str]
    images: Tensor
    captions: list[str]
    groups: Tensor
    details: list[str]
    scenes: list[Scene] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def near(self, row: int) -> list[int]:
        """The other rows of a row's group."""
        rows = (self.groups == self.groups[row]).nonzero().squeeze(1).tolist()
        return [other for other in rows if other != row]


def minimal_pairs(
    pack: SpritePack,
    split: str,
    count: int,
    *,
    size: int,
    seed: int = 0,
    options: SceneOptions = DEFAULTS,
    details: Sequence[str] = DETAILS,
) -> MinimalPairs:
    """`count` pictures in groups. No two show the same: same things, colours, sizes and places.

    What does not apply to a scene is left out of its group: a thing that fills the picture has no other place, and the
    count stays where `options` fix it. The words of a caption, but for the detail, are those of its group.
    """
    import torch

    scenes: list[Scene] = []
    groups, changes, captions = [], [], []
    seen: set[tuple] = set()
    for group in range(ATTEMPTS * count + 1):
        if len(scenes) == count:
            break
        name = pack.names[group % len(pack.names)]
        bases = (
            sample_scene(pack, split, group, seed=seed, options=options, first=name, attempt=attempt)
            for attempt in range(ATTEMPTS)
        )
        base = next((scene for scene in bases if graph(scene) not in seen), None)
        if base is None:
            continue
        draw = SeededRandom("distractors", seed, split, group)
        for detail in ("", *details):
            scene = changed(base, detail, pack, draw, seed, options) if detail else base
            if scene is None or graph(scene) in seen or len(scenes) == count:
                continue
            seen.add(graph(scene))
            scenes.append(replace(scene, id=f"{split}-{group:06d}{f'-{detail}' if detail else ''}"))
            captions.append(caption(scene, SeededRandom("caption", seed, split, group), full=True))
            groups.append(group)
            changes.append(detail)
    if len(scenes) < count:
        raise UserError(f"{count} scenes that all differ: {len(pack.names)} classes do not give so many; raise classes")
    images = torch.from_numpy(render_many(scenes, pack, size))
    return MinimalPairs([scene.id for scene in scenes], images, captions, torch.tensor(groups), changes, scenes)


def graph(scene: Scene) -> tuple:
    """What a full caption tells of a scene, in an order of its own: of more than two things not their places."""
    told = len(scene.things) <= 2
    things = [(t.name, t.colour, t.size, t.cell if told else None) for t in scene.things]
    return scene.grid if told else None, tuple(sorted(things))


def changed(
    scene: Scene, detail: str, pack: SpritePack, draw: SeededRandom, seed: int, options: SceneOptions
) -> Scene | None:
    """The scene with one detail changed, never to a colour that training holds out; None where it does not apply."""
    place = draw.below(len(scene.things))
    thing = scene.things[place]
    if detail == "colour":
        hidden = held_out_colours(thing.name, seed, options.held_out)
        others = [colour for colour in COLOURS if colour != thing.colour and colour not in hidden]
        return with_thing(scene, place, replace(thing, colour=draw.pick(others))) if others else None
    if detail == "thing":
        present = {one.name for one in scene.things}
        others = [
            name
            for name in pack.names
            if name not in present and thing.colour not in held_out_colours(name, seed, options.held_out)
        ]
        return with_thing(scene, place, replace(thing, name=draw.pick(others))) if others else None
    if detail == "place":
        return mirrored(scene)
    return recounted(scene, pack, seed, options)


def with_thing(scene: Scene, place: int, thing: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:place], thing, *scene.things[place + 1 :]))


def mirrored(scene: Scene) -> Scene | None:
    """Left for right, or top for bottom where all things stand above each other. Captions of more than two things do
    not tell places."""
    rows, cols = scene.grid
    if len(scene.things) > 2 or (rows, cols) == (1, 1):
        return None
    if cols > 1:
        flipped = [replace(t, x=1 - t.x, cell=(t.cell[0], cols - 1 - t.cell[1])) for t in scene.things]
    else:
        flipped = [replace(t, y=1 - t.y, cell=(rows - 1 - t.cell[0], t.cell[1])) for t in scene.things]
    return replace(scene, things=tuple(flipped))


def recounted(scene: Scene, pack: SpritePack, seed: int, options: SceneOptions) -> Scene | None:
    """The first thing in company of one more, or of one fewer where there are as many as may be; laid out anew."""
    low, high = options.objects
    count = len(scene.things) + (1 if len(scene.things) < high else -1)
    if not low <= count <= len(pack.sprites) or count < 1:
        return None
    first = scene.things[0]
    other = sample_scene(
        pack, f"{scene.id} recounted", 0, seed=seed, options=replace(options, objects=(count, count)),
        first=first.name, colour=first.colour,
    )  # fmt: skip
    return replace(other, background=scene.background, clutter=scene.clutter, noise=scene.noise, grain=scene.grain)
