"""What can truly be said about a scene: captions, questions and statements, from its exact graph.

Every sentence is drawn from a small grammar, with articles and plurals as English has them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from shared.data.seeded import SeededRandom
from shared.data.synthetic.scenes import COLOURS, Scene, Thing

KINDS = ("what", "colour", "count", "where", "yes/no")


class Asked(NamedTuple):
    """A question with its one right answer; `choices` holds it too, in random order. kind: one of KINDS."""

    kind: str
    question: str
    answer: str
    choices: tuple[str, ...]


# --- words

SINGULAR_IN_S = re.compile(r"(ss|us|is)$")
MASS = {
    "bacon", "bread", "broccoli", "butter", "candy", "coral", "custard", "dango", "fire", "flatbread", "food", "garlic",
    "leafy green", "luggage", "popcorn", "salad", "shaved ice", "spaghetti", "sushi", "wood",
}  # fmt: skip


@lru_cache(maxsize=8192)
def number_of(noun: str) -> str:
    """'one' (a cat), 'many' (some grapes) or 'mass' (some bread)."""
    head = noun.split(" of ")[0].split(" and ")[0].split()[-1]
    if noun in MASS or head in MASS:
        return "mass"
    return "many" if head.endswith("s") and not SINGULAR_IN_S.search(head) else "one"


def article(phrase: str) -> str:
    """'a' or 'an' by sound: a unicorn, an hourglass, an x-ray."""
    if re.match(r"(uni(?!n)|use|ute|eu|ewe|one\b|one-|once)", phrase):
        return "a"
    return "an" if re.match(r"([aeiou]|hour|heir|honest|x-)", phrase) else "a"


def with_article(phrase: str, number: str = "one") -> str:
    return f"{article(phrase)} {phrase}" if number == "one" else f"some {phrase}"


def be(thing: Thing) -> str:
    return "are" if number_of(thing.name) == "many" else "is"


def phrase(
    thing: Thing, cards: bool, *, colour: bool = False, size: bool = False, determiner: str | None = None
) -> str:
    """A thing as a noun phrase: 'a small cat on a red card', 'a small red circle', 'the cat'."""
    words = [thing.size] if size else []
    words += [thing.colour] if colour and not cards else []
    noun = " ".join([*words, thing.name])
    named = with_article(noun, number_of(thing.name)) if determiner is None else f"{determiner} {noun}"
    return f"{named} on {with_article(thing.colour + ' card')}" if colour and cards else named


def place(cell: tuple[int, int], grid: tuple[int, int]) -> str:
    """A cell's name: 'middle', 'left', 'top', 'top left', ..."""
    rows = {1: ("",), 2: ("top", "bottom"), 3: ("top", "", "bottom")}[grid[0]]
    cols = {1: ("",), 2: ("left", "right"), 3: ("left", "", "right")}[grid[1]]
    return f"{rows[cell[0]]} {cols[cell[1]]}".strip() or "middle"


def at(name: str) -> str:
    """'in the top left', 'on the left', 'at the top', 'in the middle'."""
    preposition = {"left": "on", "right": "on", "top": "at", "bottom": "at"}.get(name, "in")
    return f"{preposition} the {name}"


def relations(a: Thing, b: Thing) -> list[str]:
    """What holds of the cells of a and b: 'to the left of', 'above', ..."""
    (row, col), (other_row, other_col) = a.cell, b.cell
    sideways = ["to the left of"] * (col < other_col) + ["to the right of"] * (col > other_col)
    return sideways + ["above"] * (row < other_row) + ["below"] * (row > other_row)


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def class_prompt(noun: str, template: str = "a photo of {}") -> str:
    """A class name in a prompt, with its article: 'a photo of a cat', 'a photo of an ant', 'a photo of some grapes'."""
    return template.format(with_article(noun, number_of(noun)))


# --- captions

FRAMES = (
    "a photo of {x}", "a picture of {x}", "an image of {x}", "a picture showing {x}", "there {is_} {x}",
    "there {is_} {x} in the picture", "here you can see {x}", "this is a picture of {x}", "a close look at {x}",
    "we can see {x}", "someone took a photo of {x}", "an image with {x}", "{x} in the picture", "look, {x}",
)  # fmt: skip
TWO = (
    "{x} {rel} {y}",
    "{x} {rel} {y}",
    "{x} and {y}",
    "{x} next to {y}",
    "{x} and, close by, {y}",
    "{x} together with {y}",
)


def caption(scene: Scene, draw: SeededRandom, *, full: bool = False) -> str:
    """One caption of a scene. It names some of what is there; `full` names every thing with its colour and size."""
    cards = scene.cards
    things = draw.shuffled(scene.things)
    if not full and len(things) > 1 and draw.chance(0.15):
        things = things[: 1 + draw.below(len(things) - 1)]
    colour = [full or draw.chance(0.6) for _ in things]
    size = [full or draw.chance(0.25) for _ in things]
    said = [phrase(t, cards, colour=c, size=s) for t, c, s in zip(things, colour, size, strict=True)]
    if len(things) == 2:
        form = draw.pick(TWO[:2] if full else TWO)
        x = form.format(x=said[0], y=said[1], rel=draw.pick(relations(*things)))
    else:
        x = listed(said)
    detailed = any(colour) or any(size) or len(things) > 1
    if len(things) == 1 and scene.grid != (1, 1) and (full or draw.chance(0.3)):
        x, detailed = f"{x} {at(place(things[0].cell, scene.grid))}", True
    # The web hardly ever captions a picture with its bare label: without a detail there is always a frame.
    if detailed and draw.chance(0.25):
        return x
    return draw.pick(FRAMES).format(x=x, is_=be(things[0]))


# --- questions


def ask(scene: Scene, names: Sequence[str], draw: SeededRandom, kind: str | None = None) -> Asked:
    """A question about a scene. names: all nouns of its world, from which wrong answers are taken."""
    kind = kind or draw.pick(KINDS)
    if kind == "where" and scene.grid == (1, 1):
        kind = "colour"  # a picture-filling thing is nowhere in particular
    thing = draw.pick(scene.things)
    alone = len(scene.things) == 1
    if kind == "what":
        unique = sum(t.colour == thing.colour for t in scene.things) == 1
        if alone:
            question = draw.pick(("what is in the picture?", "what is shown here?", "what does the picture show?"))
        elif unique and draw.chance(0.5):
            question = f"what is on the {thing.colour} card?" if scene.cards else f"which shape is {thing.colour}?"
        else:
            question = f"what is {at(place(thing.cell, scene.grid))}?"
        present = {t.name for t in scene.things}
        # The other things of the picture are the best distractors; the rest come from the world.
        others = [t.name for t in scene.things if t.name != thing.name][:3]
        strangers = [n for n in draw.sample(names, min(len(names), 3 + len(present))) if n not in present]
        return _asked(kind, question, thing.name, [*others, *strangers][:3], draw)
    if kind == "colour":
        the = phrase(thing, scene.cards, determiner="the")
        question = f"what colour is the card behind {the}?" if scene.cards else f"what colour is {the}?"
        return _asked(kind, question, thing.colour, [c for c in COLOURS if c != thing.colour], draw)
    if kind == "count":
        colour = draw.pick((None, thing.colour, draw.pick(list(COLOURS))))
        noun = "cards" if scene.cards else "shapes"
        count = sum(colour in (None, t.colour) for t in scene.things)
        question = f"how many {colour + ' ' if colour else ''}{noun} are there?"
        wrong = [str(n) for n in range(max(4, len(scene.things) + 1)) if n != count]
        return _asked(kind, question, str(count), wrong, draw)
    if kind == "where":
        rows, cols = scene.grid
        answer = place(thing.cell, scene.grid)
        wrong = [place((r, c), scene.grid) for r in range(rows) for c in range(cols)]
        question = f"where {be(thing)} {phrase(thing, scene.cards, determiner='the')}?"
        return _asked(kind, question, answer, [w for w in wrong if w != answer], draw)
    truth = draw.chance(0.5)
    return Asked(kind, claim(scene, names, draw, truth).question, "yes" if truth else "no", ("yes", "no"))


def _asked(kind: str, question: str, answer: str, wrong: Sequence[str], draw: SeededRandom) -> Asked:
    return Asked(kind, question, answer, tuple(draw.shuffled([answer, *wrong])))


# --- statements


class Claim(NamedTuple):
    """One proposition about a scene as a statement and as a yes/no question."""

    statement: str
    question: str


def claim(scene: Scene, names: Sequence[str], draw: SeededRandom, truth: bool) -> Claim:
    """A proposition that is true or false of the scene, as `truth` asks for."""
    thing = draw.pick(scene.things)
    the, is_ = phrase(thing, scene.cards, determiner="the"), be(thing)
    kind = draw.pick(["there", "colour", "size"] + ["relation"] * 2 * (len(scene.things) > 1))
    absent = [name for name in names if name not in {t.name for t in scene.things}]
    if kind == "there" and (truth or absent):
        name = thing.name if truth else draw.pick(absent)
        number = number_of(name)
        verb = "are" if number == "many" else "is"
        return Claim(
            f"there {verb} {with_article(name, number)}",
            f"{verb} there {with_article(name) if number == 'one' else f'any {name}'}?",
        )
    if kind in ("there", "colour"):
        colour = thing.colour if truth else draw.pick([c for c in COLOURS if c != thing.colour])
        what = f"on {with_article(colour + ' card')}" if scene.cards else colour
        return Claim(f"{the} {is_} {what}", f"{is_} {the} {what}?")
    if kind == "size":
        size = thing.size if truth else {"small": "large", "large": "small"}[thing.size]
        return Claim(f"{the} {is_} {size}", f"{is_} {the} {size}?")
    other = draw.pick([t for t in scene.things if t is not thing])
    relation = draw.pick(relations(thing, other) if truth else relations(other, thing))
    end = f"{relation} {phrase(other, scene.cards, determiner='the')}"
    return Claim(f"{the} {is_} {end}", f"{is_} {the} {end}?")


def claim_of_two(left: Scene, right: Scene, names: Sequence[str], draw: SeededRandom, truth: bool, kind: str) -> str:
    """A sentence about two pictures (NLVR2). kind: 'each', 'both' (true needs a shared thing, false none) or 'count'
    (needs unequal counts)."""
    if kind == "both":
        shared = [t.name for t in left.things if t.name in {t.name for t in right.things}]
        name = draw.pick(shared if truth else [t.name for t in (*left.things, *right.things)])
        return f"both pictures show {with_article(name, number_of(name))}"
    if kind == "count":
        more = (len(left.things) > len(right.things)) == truth
        sides = ("left", "right") if more else ("right", "left")
        noun = "cards" if left.cards else "shapes"
        return f"there are more {noun} in the {sides[0]} picture than in the {sides[1]} one"
    here, there = draw.pick(left.things), draw.pick(right.things)
    if not truth:
        absent = [name for name in names if name not in {t.name for t in right.things}]
        if absent and draw.chance(0.5):
            there = replace(there, name=draw.pick(absent))
        else:
            taken = {t.colour for t in right.things if t.name == there.name}
            there = replace(there, colour=draw.pick([c for c in COLOURS if c not in taken]))
    here_said, there_said = phrase(here, left.cards, colour=True), phrase(there, right.cards, colour=True)
    return f"the left picture shows {here_said} and the right one shows {there_said}"
