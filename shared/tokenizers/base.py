"""Text to ids and back: CLIP's byte-pair encoding (Radford et al. 2021, Sec. 2.4) and BERT's uncased WordPiece (Devlin
et al. 2019, Sec. 3) exactly as released, and a small trained one for the small scales; also the ImageNet class names
and templates of the zero-shot protocol (Radford et al., Sec. 3.1.4)."""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.core.errors import UserError
from shared.core.files import atomic
from shared.core.text import shown

if TYPE_CHECKING:
    import tokenizers
    from torch import Tensor

SPECIALS = {"mask": "[MASK]", "decode_start": "[DEC]", "encode_start": "[ENC]"}  # what they are for, and BLIP's names


class Tokenizer(ABC):
    """Texts to a padded batch of ids: `start`, the text's ids, `end`, then `pad`.

    A model that needs more than these asks for some of SPECIALS when the tokenizer is made: `mask` (masked language
    modelling), `decode_start` and `encode_start` (the first token of BLIP's decoder and of its image-grounded encoder).
    """

    kind: str  # as in the manifest's card
    vocab_size: int
    start: int
    end: int
    pad: int
    digest: str  # sha256 of what fixes the ids; part of every cache key
    specials: Mapping[str, int] = {}  # the ids of those SPECIALS that it has
    _pieces: tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without start and end."""
        text = self._clean(text)
        return self._pieces.encode(text, add_special_tokens=False).ids if text else []

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first `end`; `start` is skipped."""

    @abstractmethod
    def _saved(self) -> dict[str, Any]:
        """What `load_tokenizer` needs beside kind and digest, in JSON's types."""

    def save(self, path: str | Path) -> None:
        content = {"kind": self.kind, "digest": self.digest} | self._saved()
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    def _clean(self, text: str) -> str:
        return valid(text)

    def __call__(self, texts: Sequence[str] | str, context: int, truncate: bool = True) -> Tensor:
        """Ids (B, context), int64. A text that is too long loses its tail and keeps `end` in the last slot; with
        truncate=False it is a UserError. No more than 100 characters a slot are read: what takes seconds in a
        megabyte has no place in the ids."""
        import torch

        if isinstance(texts, str):
            texts = [texts]
        batch = torch.full((len(texts), context), self.pad, dtype=torch.long)  # (B, context)
        for row, text in enumerate(texts):
            ids = [self.start, *self.encode(text[: 100 * context] if truncate else text), self.end]
            if len(ids) > context:
                if not truncate:
                    raise UserError(
                        f"'{shown(text, 60)}' takes {len(ids)} tokens, the context is {context}: shorten the text"
                    )
                ids = [*ids[: context - 1], self.end]
            batch[row, : len(ids)] = torch.tensor(ids)
        return batch

    def config_fields(self, specials: Sequence[str]) -> dict[str, Any]:
        """What BLIP's and BLIP-2's configurations take of a tokenizer: its kind, vocabulary and ids, those of specials
        among them. UserError for a special that it was made without."""
        ids = {"pad": self.pad, "start": self.start, "end": self.end}
        ids |= {name.removesuffix("_start"): self._special(name) for name in specials}
        fields = {f"{name}_token": id for name, id in ids.items()}
        return {"tokenizer": self.kind, "vocabulary": self.vocab_size, **fields}

    @property
    def mask(self) -> int:
        return self._special("mask")

    @property
    def decode_start(self) -> int:
        return self._special("decode_start")

    @property
    def encode_start(self) -> int:
        return self._special("encode_start")

    def _special(self, name: str) -> int:
        if name not in self.specials:
            raise UserError(f"the {self.kind} tokenizer was made without the token '{name}': give specials=('{name}',)")
        return self.specials[name]

    def _body(self, ids: Iterable[int]) -> list[int]:
        """The ids between start and the first end."""
        body = []
        for token in map(int, ids):
            if token == self.end:
                break
            if token != self.start:
                body.append(token)
        return body


def trim(tokens: Tensor, end: int) -> Tensor:
    """Cut a batch (B, T) behind its last `end`: exact under a causal mask, since nothing read lies behind it. Rows
    without `end` keep the whole width. Call it before the batch goes to a GPU, it reads a value back."""
    found = tokens == end
    if tokens.numel() == 0 or not bool(found.any(dim=1).all()):
        return tokens
    return tokens[:, : int(found.int().argmax(dim=1).max()) + 1]


def _known_specials(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in SPECIALS:
            raise UserError(f"special token '{name}' is none of {', '.join(SPECIALS)}")
    return list(dict.fromkeys(names))


def valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate becomes '?'


def _open_clip_file(name: str) -> Path:
    """A data file of the installed package open_clip_torch, found without importing it."""
    spec = importlib.util.find_spec("open_clip")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / name).is_file():
            return path
    raise UserError(f"open_clip's {name} is not installed: python -m pip install open_clip_torch")
