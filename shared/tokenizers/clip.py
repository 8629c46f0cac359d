"""CLIP's byte-pair tokenizer (CLIP, Sec. 2.4)."""

from __future__ import annotations

import gzip
import hashlib
import html
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from shared.core.errors import UserError
from shared.tokenizers.base import Tokenizer, _open_clip_file

if TYPE_CHECKING:
    import tokenizers


class ClipTokenizer(Tokenizer):
    """CLIP's tokenizer: 49,408 ids over lower-cased text. Its merges come with the package open_clip_torch.

    Cleaning is the released one: ftfy, HTML unescaped twice, white space collapsed, lower case. `<|startoftext|>` and
    `<|endoftext|>` in a text stand for the two special ids, as in the release.
    """

    kind = "clip-bpe"
    vocab_size, start, end, pad = 49408, 49406, 49407, 0
    digest = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"  # sha256 of the merges file

    def __init__(self) -> None:
        import regex

        self._pieces = _clip_bpe()
        # not by the tokenizers library, whose letters are not those of `regex`: they differ from U+0345 on
        self._pattern = regex.compile(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._pattern.findall(_clean(text)):
            ids += _ids_of(word) if len(word) <= _LONGEST_WORD else _ids_of.__wrapped__(word)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._pieces.decode(self._body(ids), skip_special_tokens=False).replace("</w>", " ").strip()

    def _saved(self) -> dict[str, Any]:
        return {}


def _clean(text: str) -> str:
    # ftfy and html leave printable ASCII without '&' as it is (tested), and ftfy is most of the cost
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = _unescape(_unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _unescape(text: str) -> str:
    # Python refuses to read a number of 5,000 digits; no character has one of 1,000
    return html.unescape(re.sub("&#[0-9]{1000,};?", "\ufffd", text))


_LONGEST_WORD = 100  # characters: longer ones are neither remembered nor learnt from whole


@lru_cache(maxsize=1 << 18)  # a corpus of noise must not fill the memory
def _ids_of(word: str) -> list[int]:
    return _clip_bpe().encode(word, add_special_tokens=False).ids


@lru_cache(maxsize=1)
def _clip_bpe() -> tokenizers.Tokenizer:
    """Ids in the released order: 256 bytes, 256 bytes that end a word, 48,894 merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = _open_clip_file("bpe_simple_vocab_16e6.txt.gz")
    packed = path.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != ClipTokenizer.digest:
        raise UserError(
            f"{path}: not CLIP's merges: expected sha256 {ClipTokenizer.digest}, found {found}; reinstall it"
        )
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    pairs = map(str.split, lines[1 : 49152 - 256 - 2 + 1])  # behind the header; the rest is unused
    merges = [(left, right) for left, right in pairs]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # a byte each: the printable ones, then those from U+0100
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return bpe
