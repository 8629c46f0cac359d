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
from papers.blip2.text import PromptTokenizer, clean_caption
from shared.data.dataset import DatasetBundle, RetrievalSet, flat
from shared.data.recipe import load_dataset, scene_pack
from shared.data.seeded import SeededRandom
from shared.data.synthetic.captions import KINDS, ask, caption, number_of, with_article
from shared.data.synthetic.minimal_pairs import minimal_pairs
from shared.data.synthetic.scenes import COLOURS, Scene, render_many, sample_scene
from shared.data.synthetic.sprites import SpritePack
from shared.experiments.effects import once_a_seed
from shared.tokenizers.base import Tokenizer, trim
from shared.tokenizers.bert import BertTokenizer
from shared.tokenizers.small_bpe import SmallTokenizer

QUESTION = "Question: {} Answer:"  # as the paper puts it to OPT (Sec. 4.1)
LANGUAGE_SEED = 0  # the small language model's texts, which no seed of the claims changes


class Question(NamedTuple):
    """A question about the picture in a row of its images."""

    picture: int
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class EvalSet(RetrievalSet):
    """With further pictures (A, 3, H, W), questions about them, and those of POPE, whose answers are yes and no equally
    often. None of these where the pictures are not generated."""

    question_images: Tensor
    questions: list[Question]
    pope: list[Question]


@dataclass(frozen=True)
class ExperimentData:
    """captions: (picture, caption) of dataset.train; questions: about its pictures; documents: the texts that the small
    language model learns from; answers: every word that an open question can be answered with."""

    dataset: DatasetBundle
    tokenizer: Tokenizer
    config: Blip2Config
    captions: list[tuple[int, str]]
    questions: list[Question]
    eval_set: EvalSet
    documents: list[str]
    answers: list[str]

    @property
    def generated(self) -> bool:
        return bool(self.questions)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Texts as the Q-Former takes them, no wider than the longest. (T, L)"""
        return trim(self.tokenizer(list(texts), self.config.context), self.tokenizer.end)

    def stage1_pairs(self) -> tuple[Tensor, Tensor]:
        """Rows of dataset.train's pictures (P,), and the tokens of their captions (P, L)."""
        return torch.tensor([row for row, _ in self.captions]), self.tokens([text for _, text in self.captions])

    def stage2_texts(self, share: float, seed: int, kinds: Sequence[str] = KINDS) -> list[tuple[int, str, str]]:
        """(picture, prompt, text behind it); `share` of them questions, of these kinds."""
        captions = [(row, "", text) for row, text in self.captions]
        questions = [(q.picture, QUESTION.format(q.question), q.answer) for q in self.questions if q.kind in kinds]
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

    def stage2_tensors(
        self,
        tokenizer: PromptTokenizer,
        share: float,
        seed: int,
        longest: int,
        queries: int,
        kinds: Sequence[str] = KINDS,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows of the pictures (N,), and `stage2_texts` as Stage2Module takes them. UserError where they and the
        queries overflow the language model's context."""
        samples = self.stage2_texts(share, seed, kinds)
        texts = [(prompt, text) for _, prompt, text in samples]
        return torch.tensor([row for row, _, _ in samples]), tokenizer.training_texts(texts, longest, queries, seed)

    def has_captions(self, share: float) -> bool:
        """Whether any are among `stage2_texts` at this share of questions."""
        return share < 1 or not self.generated

    @property
    def open_kinds(self) -> list[str]:
        """Of the questions that are asked, in the recipe's order."""
        return [kind for kind in dict.fromkeys(q.kind for q in self.questions) if kind in OPEN]

    def open_answers(self) -> list[list[str]]:
        """Of each training picture the answers to the open questions about it, as `open_kinds` has them."""
        answers: list[list[str]] = [[] for _ in range(len(self.dataset.train.images))]
        for question in self.questions:
            if question.kind in OPEN:
                answers[question.picture].append(question.answer)
        return answers


def build_data(recipe: Blip2Recipe, seed: int) -> ExperimentData:
    dataset = load_dataset(recipe, seed)
    captions = [(row, text) for row, several in enumerate(dataset.train.captions) for text in several]
    if pack := scene_pack(recipe, dataset):
        questions, answers = train_questions(pack, recipe, seed), [*pack.names, *COLOURS]
        documents, eval_set = documents_of(pack, recipe), generated_eval_set(pack, recipe, seed)
    else:
        captions = [(row, clean_caption(text)) for row, text in captions]  # in both stages (LAVIS, blip_caption)
        questions, answers = [], []
        documents, eval_set = [text for _, text in captions], published_eval_set(dataset)
    base = VARIANTS[recipe.model]()
    # One vocabulary for all seeds where the texts are generated: the small language model is common to them.
    if base.tokenizer == SmallTokenizer.kind:
        tokenizer: Tokenizer = SmallTokenizer.train(documents, base.vocabulary, SPECIALS)
    else:
        tokenizer = BertTokenizer.uncased(None, SPECIALS)
    config = replace(
        with_tokenizer(base, tokenizer),
        vision=replace(base.vision, image_size=recipe.image_size),
        queries=recipe.queries or base.queries,
        dropout=base.dropout if recipe.dropout < 0 else recipe.dropout,
    )
    return ExperimentData(dataset, tokenizer, config, captions, questions, eval_set, documents, answers)


data_of = once_a_seed(build_data)


# ---- questions


def train_questions(pack: SpritePack, recipe: Blip2Recipe, seed: int) -> list[Question]:
    """One of each kind about every training picture, whose scenes are those of the dataset."""
    questions = []
    for row, scene in enumerate(scenes(pack, recipe, "train", seed, recipe.pairs)):
        for kind in recipe.kinds:
            questions.append(question_about(scene, row, kind, pack.names, ("question", seed, "train", row, kind)))
    return questions


def scenes(pack: SpritePack, recipe: Blip2Recipe, split: str, seed: int, count: int) -> list[Scene]:
    """The things that come first go round the pack's."""
    options, names = recipe.scene_options, pack.names
    return [
        sample_scene(pack, split, row, seed=seed, options=options, first=names[row % len(names)])
        for row in range(count)
    ]  # fmt: skip


def question_about(scene: Scene, row: int, kind: str, names: Sequence[str], key: tuple) -> Question:
    draw = SeededRandom(*key)
    if kind == "yes/no" and draw.chance(0.5):  # what POPE asks: is it there at all?
        return is_there(scene, row, names, draw, draw.chance(0.5))
    sample = ask(scene, names, draw, kind)
    return Question(row, sample.question, sample.answer, kind)


def is_there(scene: Scene, row: int, names: Sequence[str], draw: SeededRandom, truth: bool) -> Question:
    """Is a thing in the picture? Where it is not, any other of the pack (POPE's `random`, Li et al. 2023)."""
    shown = [thing.name for thing in scene.things]
    name = draw.pick(shown if truth else [name for name in names if name not in shown])
    number = number_of(name)
    verb = "are" if number == "many" else "is"
    what = with_article(name) if number == "one" else f"any {name}"
    return Question(row, f"{verb} there {what}?", "yes" if truth else "no", "yes/no")


# ---- what is tested on


def generated_eval_set(pack: SpritePack, recipe: Blip2Recipe, seed: int) -> EvalSet:
    """Groups of scenes that differ in one detail, each caption a near miss for its group; open questions about others,
    and POPE's."""
    names, size = pack.names, recipe.image_size
    near = minimal_pairs(pack, "test", recipe.test_pairs, size=size, seed=seed, options=recipe.scene_options)
    kinds = [kind for kind in OPEN if kind in recipe.kinds] or recipe.kinds
    asked_about, questions, pope = scenes(pack, recipe, "asked", seed, recipe.asked_pictures), [], []
    for row, scene in enumerate(asked_about):
        questions += [question_about(scene, row, kind, names, ("question", seed, "asked", row, kind)) for kind in kinds]
        pope.append(is_there(scene, row, names, SeededRandom("pope", seed, row), row % 2 == 0))
    question_images = torch.from_numpy(render_many(asked_about, pack, size))
    return EvalSet(near.images, near.captions, torch.arange(len(near)), question_images, questions, pope)


def published_eval_set(dataset: DatasetBundle) -> EvalSet:
    test = dataset.test
    owner, texts = flat(test.captions)
    return EvalSet(test.images, [clean_caption(text) for text in texts], owner, test.images[:0], [], [])


# ---- texts alone


def documents_of(pack: SpritePack, recipe: Blip2Recipe) -> list[str]:
    """What a language model of these scenes has read: of each a full caption, then a question with its answer, each
    closed by a period. They follow from the recipe alone; every colour of every thing is among them, as in language at
    large."""
    options = replace(recipe.scene_options, held_out=0.0)
    documents = []
    for index in range(recipe.lm_texts):
        scene = sample_scene(pack, "language", index, seed=LANGUAGE_SEED, options=options)
        key = ("document", LANGUAGE_SEED, index)
        draw = SeededRandom(*key)
        question = question_about(scene, index, draw.pick(recipe.kinds), pack.names, key)
        text = caption(scene, draw, full=True)
        documents.append(f"{text}. {QUESTION.format(question.question)} {question.answer}.")
    return documents
