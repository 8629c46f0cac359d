"""A small byte-pair vocabulary, learned from the captions of a run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from shared.core.errors import UserError
from shared.tokenizers.base import Tokenizer, _known_specials, valid
from shared.tokenizers.clip import _LONGEST_WORD


class SmallTokenizer(Tokenizer):
    """A byte-level BPE trained on a small corpus: any text can be written, case is kept, white space is collapsed.
    `pad` is 0, `start` and `end` are the two largest ids; `specials` come behind them, in the order asked for."""

    kind = "small-bpe"
    pad = 0
    smallest = 1 + 256 + 2  # pad, the bytes, start and end

    def __init__(self, model: str, specials: Sequence[str] = ()) -> None:
        """`model`: the JSON of a trained `tokenizers` model whose id 0 is the padding; `specials`: some of SPECIALS."""
        import tokenizers

        self._pieces = tokenizers.Tokenizer.from_str(model)
        size = self._pieces.get_vocab_size()
        self.start, self.end = size, size + 1
        self.specials = {name: size + 2 + i for i, name in enumerate(_known_specials(specials))}
        self.vocab_size = size + 2 + len(self.specials)
        learnt = json.loads(self._pieces.to_str())["model"]
        fixed = [sorted(learnt["vocab"].items()), learnt["merges"]]  # the rest varies with the library
        if self.specials:
            fixed.append(list(self.specials))
        self.digest = hashlib.sha256(json.dumps(fixed).encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str] = ()) -> SmallTokenizer:
        """Learn at most `vocab_size` ids, `specials` among them (fewer where the corpus has no more pairs). The same
        texts, in any order, give the same tokenizer."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        others = 2 + len(_known_specials(specials))
        if vocab_size < (smallest := cls.smallest + others - 2):
            raise UserError(f"a vocabulary of {vocab_size} is too small: bytes and specials alone take {smallest}")
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - others,
            min_frequency=2,
            show_progress=False,
            special_tokens=["<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train_from_iterator(map(_in_pieces, texts), trainer)
        # as a plain entry: the padding's name in a text must not turn into padding
        model = json.loads(bpe.to_str())
        model["added_tokens"] = []
        return cls(json.dumps(model), specials)

    def decode(self, ids: Iterable[int]) -> str:
        written = [i for i in self._body(ids) if i != self.pad and i < self.start]
        return self._pieces.decode(written, skip_special_tokens=False).strip()

    def _saved(self) -> dict[str, Any]:
        specials = {"specials": list(self.specials)} if self.specials else {}
        return specials | {"model": json.loads(self._pieces.to_str())}

    def _clean(self, text: str) -> str:
        return _plain(text)


def _plain(text: str) -> str:
    return " ".join(valid(text).split())


def _in_pieces(text: str) -> str:
    """A merge costs as much as a word is long, and a stranger's word may be a megabyte."""
    return re.sub(rf"(\S{{{_LONGEST_WORD}}})(?=\S)", r"\1 ", _plain(text))
