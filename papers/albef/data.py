"""The data of one seed: pairs, some of them with wrong captions, and what is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from papers.albef.config import VARIANTS, AlbefConfig, with_tokenizer
from papers.albef.encode import longer_than, tokens_of
from papers.albef.recipe import AlbefRecipe
from shared.core.errors import UserError
from shared.data.dataset import DatasetBundle, Split, flat
from shared.data.recipe import load_dataset, scene_pack
from shared.data.seeded import SeededRandom
from shared.data.synthetic.captions import class_prompt
from shared.data.synthetic.minimal_pairs import minimal_pairs
from shared.data.synthetic.scenes import Scene
from shared.data.synthetic.sprites import SpritePack
from shared.experiments.effects import once_a_seed
from shared.tokenizers.small_bpe import SmallTokenizer

ATTEMPTS = 1_000


@dataclass(frozen=True)
class EvalSet:
    """Picture i and caption i belong together; the rows of a pool are candidates for each other, all worded apart."""

    images: Tensor  # (I, 3, H, W) uint8
    captions: list[str]
    pools: list[Tensor]
    scenes: list[Scene]  # none where the pictures are not generated
    details: list[str]  # by what a caption is a near-miss for its neighbours; none where that is unknown


@dataclass(frozen=True)
class ExperimentData:
    dataset: DatasetBundle
    tokenizer: SmallTokenizer
    config: AlbefConfig
    val: EvalSet
    test: EvalSet
    pack: SpritePack | None  # what scenes are made of

    def tokens(self, captions: Sequence[str]) -> Tensor:
        return tokens_of(self.tokenizer, captions, self.config.context)


def build_data(recipe: AlbefRecipe, seed: int) -> ExperimentData:
    dataset, tokenizer = read(recipe, seed)
    config = with_tokenizer(replace(VARIANTS[recipe.model](), image_size=recipe.image_size), tokenizer)
    pack = scene_pack(recipe, dataset)
    if pack is None:
        by_label = recipe.data.partition("/")[0] != "karpathy"
        val, test = (eval_set_of(dataset, split, recipe.pool, by_label) for split in ("val", "test"))
    else:
        val, test = (near_misses(pack, split, recipe, seed) for split in ("val", "test"))
    return ExperimentData(dataset, tokenizer, config, first_pool(val), test, pack)


data_of = once_a_seed(build_data)


def load(recipe: AlbefRecipe, seed: int) -> DatasetBundle:
    return read(recipe, seed)[0]


def read(recipe: AlbefRecipe, seed: int, times: float = 1.0) -> tuple[DatasetBundle, SmallTokenizer]:
    """The dataset, its note telling what captions lose to the context, and the tokenizer trained on them.

    times: so many times the recipe's pairs, where the set has them. UserError where a caption is empty.
    """
    dataset = load_dataset(
        recipe, seed, round(times * recipe.pairs), captions=recipe.captions, full=recipe.full
    )  # fmt: skip
    _, texts = flat(dataset.train.captions)
    if len(texts) < recipe.batch:
        raise UserError(
            f"data {dataset.name}: {len(texts)} captions do not fill a batch of {recipe.batch}; lower batch"
        )
    for id, several in zip(dataset.train.ids, dataset.train.captions, strict=True):
        if not several or not all(caption.strip() for caption in several):
            raise UserError(
                f"data {dataset.name}: picture {id} has an empty caption: write one, or leave the picture out"
            )
    config = VARIANTS[recipe.model]()
    tokenizer = SmallTokenizer.train(texts, config.vocabulary, specials=("mask",))
    cut = longer_than(tokenizer, texts, config.context)
    if cut:
        note = f"{cut} of {len(texts)} training captions are longer than {config.context} tokens and lose their tail"
        dataset.note = f"{dataset.note}; {note}" if dataset.note else note
    return dataset, tokenizer


# ---- what is trained on


@dataclass(frozen=True)
class Pairs:
    images: Tensor  # (pairs, 3, H, W) uint8, one row a caption
    tokens: Tensor  # (pairs, L)
    ids: Tensor  # (pairs,): which picture
    wrong: float  # share of the pictures with another's captions

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.images, self.tokens, self.ids


def pairs_of(data: ExperimentData, wrong: float, seed: int) -> Pairs:
    """The training pairs, a share of the pictures with the captions of another one."""
    return paired(data, data.dataset.train, exchanged(data.dataset.train, wrong, seed))


def more_pairs(data: ExperimentData, recipe: AlbefRecipe, seed: int, times: float, wrong: float) -> Pairs:
    """`times` as many pairs where the set has them: these with their own captions, the share among the others."""
    train, own = read(recipe, seed, times)[0].train, set(data.dataset.train.ids)
    captions = exchanged(train, wrong, seed)
    captions = [right if id in own else new for id, right, new in zip(train.ids, train.captions, captions, strict=True)]
    return paired(data, train, captions)


def paired(data: ExperimentData, split: Split, captions: list[list[str]]) -> Pairs:
    rows, texts = flat(captions)
    changed = sum(new != right for new, right in zip(captions, split.captions, strict=True))
    return Pairs(split.images[rows], data.tokens(texts), rows, changed / len(captions))


def exchanged(split: Split, share: float, seed: int) -> list[list[str]]:
    """The captions, those of `share` of the pictures replaced by another picture's, worded otherwise and, where classes
    are known, of another class. What a smaller share exchanges, a larger one exchanges alike."""
    captions = list(split.captions)
    labels = [-1] * len(split) if split.labels is None else split.labels.tolist()
    for row, id in enumerate(split.ids):
        draw = SeededRandom("wrong caption", seed, id)
        if not draw.chance(share):
            continue
        for _ in range(ATTEMPTS):
            other = draw.below(len(split))
            apart = labels[other] < 0 or labels[other] != labels[row]
            if apart and split.captions[other] != split.captions[row]:
                captions[row] = split.captions[other]
                break
        else:
            raise UserError(f"picture {id}: no other picture has other captions, so none can stand in for its own")
    return captions


# ---- what is tested on


def near_misses(pack: SpritePack, split: str, recipe: AlbefRecipe, seed: int) -> EvalSet:
    """Held-out scenes in groups that differ in one detail; no group is cut by the border of a pool."""
    near = minimal_pairs(
        pack, split, recipe.test_pairs, size=recipe.image_size, seed=seed, options=recipe.scene_options
    )
    starts = [0, *[row for row in range(1, len(near)) if near.groups[row] != near.groups[row - 1]], len(near)]
    pools, begin = [], 0
    for start, end in pairwise(starts):
        if end - begin > recipe.pool and start > begin:
            pools.append(torch.arange(begin, start))
            begin = start
    pools.append(torch.arange(begin, len(near)))
    return EvalSet(near.images, near.captions, pools, near.scenes, near.details)


def eval_set_of(dataset: DatasetBundle, part: str, size: int, by_label: bool) -> EvalSet:
    """A published set's pictures and first captions, each wording once; `by_label`, where captions say the class alone,
    pools of one picture a class."""
    if by_label:
        return by_class(getattr(dataset, f"class_{part}"), dataset.classes or [])
    split: Split = getattr(dataset, part)
    first: dict[str, int] = {}
    for row, several in enumerate(split.captions):
        first.setdefault(several[0], row)
    rows = sorted(first.values())
    captions = [split.captions[row][0] for row in rows]
    pools = list(torch.arange(len(rows)).split(size))
    return EvalSet(split.images[rows], captions, [pool for pool in pools if len(pool) > 1] or pools, [], [])


def by_class(split: Split, classes: Sequence[str]) -> EvalSet:
    assert split.labels is not None
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(split.labels.tolist()):
        rows.setdefault(label, []).append(row)
    depth = min(map(len, rows.values()))
    order = [several[level] for level in range(depth) for several in rows.values()]
    captions = [class_prompt(classes[label]) for _ in range(depth) for label in rows]
    return EvalSet(split.images[order], captions, list(torch.arange(len(order)).split(len(rows))), [], [])


def first_pool(eval_set: EvalSet) -> EvalSet:
    """Enough for a learning curve."""
    rows = eval_set.pools[0]
    return replace(eval_set, images=eval_set.images[rows], captions=[eval_set.captions[i] for i in rows], pools=[rows])
