"""The data of one seed: pictures with captions and questions to train on, held-out ones to be found and asked about,
and the texts alone that the small language model learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from papers.blip2.config import SPECIALS, VARIANTS, Blip2Config, with_tokenizer
from papers.blip2.recipe import OPEN, Blip2Recipe
from papers.blip2.text import clean_caption
from shared.data.dataset import DatasetBundle, make_dataset
from shared.data.seeded import SeededRandom
from shared.data.synthetic.captions import KINDS, ask, caption, number_of, with_article
from shared.data.synthetic.minimal_pairs import minimal_pairs
from shared.data.synthetic.packs import packs
from shared.data.synthetic.scenes import COLOURS, Scene, SceneOptions, render_many, sample_scene
from shared.data.synthetic.sprites import SpritePack
from shared.experiments.effects import once_a_seed
from shared.tokenizers.base import Tokenizer, trim
from shared.tokenizers.bert import BertTokenizer
from shared.tokenizers.small_bpe import SmallTokenizer

QUESTION = "Question: {} Answer:"  # as the paper puts it to OPT (Sec. 4.1)
LANGUAGE_SEED = 0  # the small language model's texts, which no seed of the claims changes


class Asked(NamedTuple):
    """A question about the picture in a row of its images."""

    picture: int
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class EvalSet:
    """Held-out pictures (I, 3, H, W) and right captions, text t belonging to picture owner[t]; further pictures
    (A, 3, H, W) with questions about them, and those of POPE, whose answers are yes and no equally often. None of these
    where the pictures are not generated."""

    images: Tensor
    texts: list[str]
    owner: Tensor  # (T,)
    asked_images: Tensor
    asked: list[Asked]
    pope: list[Asked]

    @property
    def references(self) -> list[list[str]]:
        """The texts of each picture."""
        found: list[list[str]] = [[] for _ in self.images]
        for text, picture in zip(self.texts, self.owner.tolist(), strict=True):
            found[picture].append(text)
        return found


@dataclass(frozen=True)
class ExperimentData:
    """texts: (picture, caption) of world.train; asked: questions about it; said: the texts that the small language
    model learns from; answers: every word that an open question can be answered with."""

    dataset: DatasetBundle
    tokenizer: Tokenizer
    config: Blip2Config
    texts: list[tuple[int, str]]
    asked: list[Asked]
    eval_set: EvalSet
    said: list[str]
    answers: list[str]

    @property
    def generated(self) -> bool:
        return bool(self.asked)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Texts as the Q-Former takes them, no wider than the longest. (T, L)"""
        return trim(self.tokenizer(list(texts), self.config.context), self.tokenizer.end)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Stage 1's pairs: rows of world.train's pictures (P,), and their tokens (P, L)."""
        return torch.tensor([row for row, _ in self.texts]), self.tokens([text for _, text in self.texts])

    @property
    def open_kinds(self) -> list[str]:
        """Of the questions that are asked, in the recipe's order."""
        return [kind for kind in dict.fromkeys(one.kind for one in self.asked) if kind in OPEN]

    def shown(self) -> list[list[str]]:
        """Of each training picture the answers to the open questions about it, as `open_kinds` has them."""
        found: list[list[str]] = [[] for _ in range(len(self.dataset.train.images))]
        for one in self.asked:
            if one.kind in OPEN:
                found[one.picture].append(one.answer)
        return found

    def has_captions(self, share: float) -> bool:
        """Whether any are among `learned` at this share of questions."""
        return share < 1 or not self.generated

    def learned(self, share: float, seed: int, kinds: Sequence[str] = KINDS) -> list[tuple[int, str, str]]:
        """Stage 2's texts: (picture, prompt, text behind it); `share` of them questions, of these kinds."""
        captions = [(row, "", text) for row, text in self.texts]
        asked = [one for one in self.asked if one.kind in kinds]
        questions = [(one.picture, QUESTION.format(one.question), one.answer) for one in asked]
        if not questions or not share:
            return captions
        if share == 1:
            return questions
        count = round(min(len(captions) / (1 - share), len(questions) / share))  # of both, each at most once
        draw = SeededRandom("stage 2", seed)
        return draw.shuffled(
            draw.sample(questions, min(len(questions), round(count * share)))
            + draw.sample(captions, min(len(captions), round(count * (1 - share))))
        )


def load(recipe: Blip2Recipe, seed: int) -> DatasetBundle:
    return make_dataset(
        recipe.data,
        root=recipe.data_root or None,
        pairs=recipe.pairs,
        test_pairs=recipe.test_pairs,
        image_size=recipe.image_size,
        seed=seed,
        classes=recipe.classes,
        objects=(1, recipe.objects),
        clutter=recipe.clutter,
        noise=recipe.noise,
        jitter=recipe.jitter,
        small=recipe.small,
        max_dropped=recipe.max_dropped,
    )


def build_data(recipe: Blip2Recipe, seed: int) -> ExperimentData:
    dataset = load(recipe, seed)
    base = VARIANTS[recipe.model]()
    texts = [(row, text) for row, several in enumerate(dataset.train.captions) for text in several]
    pack = pack_of(recipe, dataset)
    if pack is None:
        texts = [(row, clean_caption(text)) for row, text in texts]  # in both stages (LAVIS, blip_caption)
        said, asked, answers = [text for _, text in texts], [], []
        eval_set = published(dataset)
    else:
        said = documents(pack, recipe)
        asked = questions(pack, recipe, seed)
        answers = [*pack.names, *COLOURS]
        eval_set = eval_set_of(pack, recipe, seed)
    # One vocabulary for all seeds where the texts are generated: the small language model is common to them.
    small = base.tokenizer == SmallTokenizer.kind
    tokenizer = (
        SmallTokenizer.train(said, base.vocabulary, SPECIALS) if small else BertTokenizer.uncased(None, SPECIALS)
    )
    config = with_tokenizer(base, tokenizer)
    vision = replace(config.vision, image_size=recipe.image_size)
    dropout = config.dropout if recipe.dropout < 0 else recipe.dropout
    config = replace(config, vision=vision, queries=recipe.queries or config.queries, dropout=dropout)
    return ExperimentData(dataset, tokenizer, config, texts, asked, eval_set, said, answers)


data_of = once_a_seed(build_data)


def pack_of(recipe: Blip2Recipe, dataset: DatasetBundle) -> SpritePack | None:
    """What scenes are made of; None for a published set."""
    if dataset.train.noisy is None:
        return None
    return packs(recipe.data, root=recipe.data_root or None)[0].subset(recipe.classes)


def options_of(recipe: Blip2Recipe) -> SceneOptions:
    return SceneOptions((1, recipe.objects), recipe.clutter, recipe.noise, recipe.jitter, recipe.small)


# ---- questions


def questions(pack: SpritePack, recipe: Blip2Recipe, seed: int) -> list[Asked]:
    """One of each kind about every training picture, whose scenes are those of the world."""
    options, names = options_of(recipe), pack.names
    found = []
    for row in range(recipe.pairs):
        scene = sample_scene(pack, "train", row, seed=seed, options=options, first=names[row % len(names)])
        found += [about(scene, row, kind, names, ("question", seed, "train", row, kind)) for kind in recipe.kinds]
    return found


def about(scene: Scene, row: int, kind: str, names: Sequence[str], key: tuple) -> Asked:
    draw = SeededRandom(*key)
    if kind == "yes/no" and draw.chance(0.5):  # what POPE asks: is it there at all?
        return there(scene, row, names, draw, draw.chance(0.5))
    one = ask(scene, names, draw, kind)
    return Asked(row, one.question, one.answer, kind)


def there(scene: Scene, row: int, names: Sequence[str], draw: SeededRandom, truth: bool) -> Asked:
    """Is a thing in the picture? Where it is not, any other of the world (POPE's `random`, Li et al. 2023)."""
    shown = [thing.name for thing in scene.things]
    name = draw.pick(shown if truth else [name for name in names if name not in shown])
    number = number_of(name)
    verb = "are" if number == "many" else "is"
    what = with_article(name) if number == "one" else f"any {name}"
    return Asked(row, f"{verb} there {what}?", "yes" if truth else "no", "yes/no")


def eval_set_of(pack: SpritePack, recipe: Blip2Recipe, seed: int) -> EvalSet:
    """Groups of scenes that differ in one detail, each caption a near miss for its group; open questions about them."""
    near = minimal_pairs(
        pack, "test", recipe.test_pairs, size=recipe.image_size, seed=seed, options=options_of(recipe)
    )  # fmt: skip
    kinds = [kind for kind in OPEN if kind in recipe.kinds] or recipe.kinds
    names, asked, pope, options = pack.names, [], [], options_of(recipe)
    scenes = [
        sample_scene(pack, "asked", row, seed=seed, options=options, first=names[row % len(names)])
        for row in range(recipe.asked_pictures)
    ]
    for row, scene in enumerate(scenes):
        asked += [about(scene, row, kind, names, ("question", seed, "asked", row, kind)) for kind in kinds]
        pope.append(there(scene, row, names, SeededRandom("pope", seed, row), row % 2 == 0))
    images = torch.from_numpy(render_many(scenes, pack, recipe.image_size))
    return EvalSet(near.images, near.captions, torch.arange(len(near)), images, asked, pope)


def published(dataset: DatasetBundle) -> EvalSet:
    owner = [row for row, several in enumerate(dataset.test.captions) for _ in several]
    texts = [clean_caption(text) for several in dataset.test.captions for text in several]
    return EvalSet(dataset.test.images, texts, torch.tensor(owner), dataset.test.images[:0], [], [])


# ---- texts alone


def documents(pack: SpritePack, recipe: Blip2Recipe) -> list[str]:
    """What a language model of this world has read: of each scene a full caption, then a question with its answer, each
    closed by a period. They follow from the recipe alone; every colour of every thing is among them, as in language at
    large."""
    options = replace(options_of(recipe), held_out=0.0)
    return [document(pack, recipe, index, options) for index in range(recipe.lm_texts)]


def document(pack: SpritePack, recipe: Blip2Recipe, index: int, options: SceneOptions) -> str:
    scene = sample_scene(pack, "language", index, seed=LANGUAGE_SEED, options=options)
    draw = SeededRandom("document", LANGUAGE_SEED, index)
    one = about(scene, index, draw.pick(recipe.kinds), pack.names, ("document", LANGUAGE_SEED, index))
    return f"{caption(scene, draw, full=True)}. {QUESTION.format(one.question)} {one.answer}."
