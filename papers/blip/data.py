"""The data of one seed as CapFilt takes it (Sec. 3.3): a small set of right captions, which stands for COCO, a larger
one from the web, whose captions are partly wrong, and held-out pictures with right captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from papers.blip.config import SPECIALS, VARIANTS, BlipConfig, with_tokenizer
from papers.blip.recipe import BlipRecipe
from shared.core.errors import UserError
from shared.data.dataset import DatasetBundle, RetrievalSet, Split, flat
from shared.data.recipe import load_dataset, scene_pack
from shared.data.synthetic.minimal_pairs import minimal_pairs
from shared.experiments.effects import once_a_seed
from shared.tokenizers.base import Tokenizer, trim
from shared.tokenizers.small_bpe import SmallTokenizer

PLAIN = re.compile(r"[^\W\d_][^\W\d_' -]*(?:[' -][^\W\d_' -]*)*")  # letters, blanks, hyphens, apostrophes
LONGEST_PLAIN = 8  # words


class Text(NamedTuple):
    """One caption of one training picture. true: whether it belongs there, None where nobody knows."""

    picture: int  # row of dataset.train
    text: str
    true: bool | None = None


@dataclass(frozen=True)
class ExperimentData:
    dataset: DatasetBundle
    tokenizer: Tokenizer
    config: BlipConfig
    clean: list[Text]
    web: list[Text]
    eval_set: RetrievalSet

    @property
    def web_pictures(self) -> list[int]:
        return sorted({text.picture for text in self.web})

    def tensors(self, texts: Sequence[Text], prompt: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """What a batch is made of: pictures (P, 3, H, W), tokens (P, L) of the texts behind the prompt, picture ids."""
        rows = torch.tensor([text.picture for text in texts])
        captions = [f"{prompt} {text.text}" if prompt else text.text for text in texts]
        tokens = trim(self.tokenizer(captions, self.config.context), self.tokenizer.end)
        return self.dataset.train.images[rows], tokens, rows


def load(recipe: BlipRecipe, seed: int) -> DatasetBundle:
    if not recipe.clean < recipe.pairs:
        raise UserError(f"clean={recipe.clean} of {recipe.pairs} pairs leaves none to the web; lower it")
    noise = recipe.caption_noise * (recipe.pairs - recipe.clean) / recipe.pairs  # none of it is clean
    return load_dataset(recipe, seed, caption_noise=noise)


def build_data(recipe: BlipRecipe, seed: int) -> ExperimentData:
    dataset = load(recipe, seed)
    base = VARIANTS[recipe.model]()
    if base.tokenizer != "small-bpe":
        raise UserError(f"model={recipe.model}: it has BERT's vocabulary; the claims train blip-tiny, -mini or -small")
    tokenizer = SmallTokenizer.train(flat(dataset.train.captions)[1], base.vocabulary, SPECIALS)
    config = replace(
        with_tokenizer(base, tokenizer),
        image_size=recipe.image_size,
        queue=recipe.queue or base.queue,
        momentum=recipe.momentum or base.momentum,
        temperature=recipe.temperature or base.temperature,
    )
    generated = dataset.train.noisy is not None
    clean, web = scenes_parted(dataset.train, recipe.clean) if generated else parted(dataset, recipe)
    if min(len(clean), len(web)) < recipe.batch:
        raise UserError(
            f"data {recipe.data}: {len(clean)} clean and {len(web)} web texts do not fill a batch of {recipe.batch}; "
            "lower batch, or change clean"
        )
    return ExperimentData(dataset, tokenizer, config, clean, web, eval_set_of(dataset, recipe, seed))


data_of = once_a_seed(build_data)


def scenes_parted(train: Split, count: int) -> tuple[list[Text], list[Text]]:
    """The first `count` pictures with captions of their own are the clean ones, all others the web."""
    assert train.noisy is not None, "scenes say it of every picture"
    clean: list[Text] = []
    web: list[Text] = []
    for row, (several, wrong) in enumerate(zip(train.captions, train.noisy.tolist(), strict=True)):
        part = clean if not wrong and len(clean) < count else web
        part += [Text(row, text, not wrong) for text in several]
    return clean, web


def parted(dataset: DatasetBundle, recipe: BlipRecipe) -> tuple[list[Text], list[Text]]:
    """Of a published set as `clean_by` says: clean, with all their captions, are its first pictures, or those whose ids
    a file names; by "titles" those with a plain title of their own, with these titles alone. All captions of the others
    are the web."""
    plain, named = None, None
    if recipe.clean_by == "titles":
        splits = (dataset.train, dataset.val, dataset.test)
        plain = plain_titles([several for part in splits for several in part.captions])
    elif recipe.clean_by != "first":
        named = ids_in(Path(recipe.clean_by))
    clean: list[Text] = []
    web: list[Text] = []
    for row, (id, several) in enumerate(zip(dataset.train.ids, dataset.train.captions, strict=True)):
        right = [text for text in several if (plain is None or text in plain) and (named is None or id in named)]
        if right and len(clean) < recipe.clean:
            clean += [Text(row, text) for text in right]
        else:
            web += [Text(row, text) for text in several]
    return clean, web


def ids_in(path: Path) -> set[str]:
    """The lines of a file; UserError where it cannot be read."""
    try:
        return set(filter(None, path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, ValueError) as wrong:
        raise UserError(
            f"clean_by={path}: cannot be read ({getattr(wrong, 'strerror', None) or 'not UTF-8'}); give first, titles, "
            "or a file with the id of a clean picture a line"
        ) from None


def plain_titles(captions: Sequence[Sequence[str]]) -> set[str]:
    """Titles that only one picture bears, of one to eight words without a digit, an address or other signs.

    A rule on the words alone, fixed before any training: what hundreds of pictures share (the name of a collection, of
    its author, of a theme) describes none of them, and file names, addresses and dates hold digits and signs.
    """
    bearers = Counter(text.casefold() for several in captions for text in {text.casefold(): text for text in several})
    return {
        text
        for several in captions
        for text in several
        if bearers[text.casefold()] == 1 and PLAIN.fullmatch(text) and len(text.split()) <= LONGEST_PLAIN
    }


def eval_set_of(dataset: DatasetBundle, recipe: BlipRecipe, seed: int) -> RetrievalSet:
    """Of scenes groups that differ in one detail, each caption a near miss for its group (minimal_pairs.py);
    of a published set its test pictures, by "titles" those with plain ones, and these alone."""
    if pack := scene_pack(recipe, dataset):
        near = minimal_pairs(
            pack, "test", recipe.test_pairs, size=recipe.image_size, seed=seed, options=recipe.scene_options
        )
        return RetrievalSet(near.images, near.captions, torch.arange(len(near)))
    test = dataset.test
    titles = [list(several) for several in test.captions]
    if recipe.clean_by == "titles":
        plain = plain_titles([several for part in (dataset.train, dataset.val, test) for several in part.captions])
        titles = [[text for text in several if text in plain] for several in titles]
    rows = [row for row, several in enumerate(titles) if several]
    owner, texts = flat([titles[row] for row in rows])
    return RetrievalSet(test.images[torch.tensor(rows)], texts, owner)
