"""Tasks made of scenes: sample `index` of a split, as the papers' training and test sets have them.

Every function takes (pack, split, index) and is determined by them, the seed and the options alone. Every `image` is an
array (H, W, 3) uint8; every sample has an `id` that is stable across runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shared.core.errors import UserError
from shared.data.seeded import SeededRandom
from shared.data.synthetic.captions import ask, be, claim, claim_of_two, phrase, with_article
from shared.data.synthetic.scenes import COLOURS, DEFAULTS, Scene, SceneOptions, render, sample_scene
from shared.data.synthetic.sprites import SpritePack

if TYPE_CHECKING:
    from numpy import ndarray

EPISODES = ("name", "colour", "nonce")
# Made-up words of one or two syllables, as in the fast-binding test of Frozen (Tsimpoukelli et al. 2021).
NONCE = ("dax", "blicket", "wug", "zup", "fep", "tulver", "kiki", "gazzer", "toma", "modi", "perp", "lorp")


@dataclass(frozen=True, eq=False)
class Question:
    """A question about a picture (VQA); `choices` holds the answer and its distractors."""

    id: str
    image: ndarray
    question: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Statement:
    """A sentence that is true or false of one picture or of two (NLVR2: left, right)."""

    id: str
    images: tuple[ndarray, ...]
    text: str
    label: bool


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A sentence about a picture (visual entailment); `verdict` is entailment, neutral or contradiction."""

    id: str
    image: ndarray
    text: str
    verdict: str


@dataclass(frozen=True, eq=False)
class Episode:
    """Few-shot learning in context: `shots` are (image, text); the answer completes `query_text`."""

    id: str
    shots: tuple[tuple[ndarray, str], ...]
    query_image: ndarray
    query_text: str
    answer: str


def question(
    pack: SpritePack,
    split: str,
    index: int,
    *,
    size: int,
    seed: int = 0,
    options: SceneOptions = DEFAULTS,
    kind: str | None = None,
) -> Question:
    """A question of one kind (wording.KINDS), or of any; yes and no are equally likely."""
    scene = sample_scene(pack, split, index, seed=seed, options=options)
    asked = ask(scene, pack.names, SeededRandom("question", seed, split, index, kind), kind)
    return Question(scene.id, render(scene, pack, size), asked.question, asked.answer, asked.choices)


def statement(
    pack: SpritePack,
    split: str,
    index: int,
    *,
    size: int,
    seed: int = 0,
    options: SceneOptions = DEFAULTS,
    pictures: int = 2,
) -> Statement:
    """A statement about one picture or two (NLVR2). Truth is drawn before the sentence's form, so that the words alone
    do not give it away."""
    draw = SeededRandom("statement", seed, split, index, pictures)
    truth = draw.chance(0.5)
    left = sample_scene(pack, split, index, seed=seed, options=options)
    if pictures == 1:
        text = claim(left, pack.names, draw, truth).statement
        return Statement(left.id, (render(left, pack, size),), text, truth)
    kind = draw.pick(("each", "both", "count"))
    for attempt in range(1, 50):
        name = draw.pick(left.things).name if kind == "both" and truth else None
        right = sample_scene(pack, split, index, seed=seed, options=options, first=name, attempt=attempt)
        shared = {t.name for t in left.things} & {t.name for t in right.things}
        if kind == "each" or (kind == "both" and truth == bool(shared)):
            break
        if kind == "count" and len(left.things) != len(right.things):
            break
    else:
        kind = "each"  # scenes of a fixed number of things cannot differ in it
    text = claim_of_two(left, right, pack.names, draw, truth, kind)
    return Statement(left.id, (render(left, pack, size), render(right, pack, size)), text, truth)


def hypothesis(
    pack: SpritePack, split: str, index: int, *, size: int, seed: int = 0, options: SceneOptions = DEFAULTS
) -> Hypothesis:
    """What colour a thing has, as SNLI-VE asks: entailed by the picture, contradicted by it, or left open, because it
    does not show the thing. The verdict is drawn first, so that the words alone do not give it away."""
    scene = sample_scene(pack, split, index, seed=seed, options=options)
    shown = {thing.name for thing in scene.things}
    absent = [name for name in pack.names if name not in shown]
    if not absent:
        raise UserError(f"hypotheses need a thing that the picture does not show: raise classes ({len(pack.names)})")
    draw = SeededRandom("hypothesis", seed, split, index)
    verdict = draw.pick(("entailment", "neutral", "contradiction"))
    thing = draw.pick(scene.things)
    other = draw.pick([colour for colour in COLOURS if colour != thing.colour])
    colour = {"entailment": thing.colour, "contradiction": other}.get(verdict) or draw.pick((thing.colour, other))
    named = replace(thing, name=draw.pick(absent)) if verdict == "neutral" else thing
    what = f"on {with_article(f'{colour} card')}" if scene.cards else colour
    text = f"{phrase(named, scene.cards, determiner='the')} {be(named)} {what}"
    return Hypothesis(scene.id, render(scene, pack, size), text, verdict)


def episode(
    pack: SpritePack,
    split: str,
    index: int,
    *,
    size: int,
    shots: int = 4,
    kind: str = "name",
    seed: int = 0,
    options: SceneOptions = DEFAULTS,
) -> Episode:
    """Few-shot learning in context. kind `name`: the query's class is in no shot, so that copying cannot help;
    `colour`; `nonce`: two made-up words that the shots bind to two things, and that nothing else can tell."""
    if kind not in EPISODES:
        raise UserError(f"episode kind {kind!r}: choose {', '.join(EPISODES)}")
    if kind == "name" and shots + 1 > len(pack.sprites):
        raise UserError(f"episodes of {shots} shots need {shots + 1} classes, there are {len(pack.sprites)}")
    draw = SeededRandom("episode", seed, split, index, shots, kind)
    alone = replace(options, objects=(1, 1))
    words: dict[str, str] = {}
    if kind == "nonce":
        words = dict(zip(draw.sample(pack.names, 2), draw.sample(NONCE, 2), strict=True))
        # Both words occur equally often in the shots; which of them is asked for is a coin's throw.
        bound = list(words)
        names = [*draw.shuffled([bound[i % 2] for i in range(shots)]), draw.pick(bound)]
    elif kind == "name":
        names = draw.sample(pack.names, shots + 1)
    else:
        names = [draw.pick(pack.names) for _ in range(shots + 1)]
    scenes = [
        sample_scene(pack, split, index, seed=seed, options=alone, first=name, attempt=i + 1)
        for i, name in enumerate(names)
    ]
    prompts = {
        "name": "question: what is this? answer:",
        "colour": f"question: what colour is the {'card' if not pack.tinted else 'shape'}? answer:",
        "nonce": "this is a",
    }

    def answer(scene: Scene) -> str:
        thing = scene.things[0]
        return {"name": thing.name, "colour": thing.colour}.get(kind) or words[thing.name]

    pictures = [render(scene, pack, size) for scene in scenes]
    texts = [f"{prompts[kind]} {answer(scene)}" for scene in scenes[:-1]]
    return Episode(
        f"{split}-{index:06d}",
        tuple(zip(pictures, texts, strict=False)),
        pictures[-1],
        prompts[kind],
        answer(scenes[-1]),
    )
