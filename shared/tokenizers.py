"""Text to ids and back: CLIP's byte-pair encoding (Radford et al. 2021, Sec. 2.4) exactly as released, and a small
trained one for the small scales; also the ImageNet class names and templates of the zero-shot protocol (Sec. 3.1.4)."""

from __future__ import annotations

import ast
import gzip
import hashlib
import html
import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.archives import shown
from shared.errors import UserError
from shared.fetch import atomic

if TYPE_CHECKING:
    import tokenizers
    from torch import Tensor


class Tokenizer(ABC):
    """Texts to a padded batch of ids: `start`, the text's ids, `end`, then `pad`."""

    kind: str  # as in the manifest's card
    vocab_size: int
    start: int
    end: int
    pad: int
    digest: str  # sha256 of what fixes the ids; part of every cache key

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of one text, without start and end."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first `end`; `start` is skipped."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write what `load_tokenizer` needs, as JSON."""

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

        self._bpe = _clip_bpe()
        self._pattern = regex.compile(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )
        self._words: dict[str, list[int]] = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}

    def encode(self, text: str) -> list[int]:
        words = self._words
        if len(words) > 1 << 18:  # a corpus of noise must not fill the memory
            words = self._words = dict(list(words.items())[:2])
        ids: list[int] = []
        for word in self._pattern.findall(_clean(text)):
            found = words.get(word)
            if found is None:
                found = self._bpe.encode(word).ids
                if len(word) <= _LONGEST_WORD:
                    words[word] = found
            ids += found
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        letters = "".join(self._bpe.id_to_token(token) for token in self._body(ids))
        data = bytes(_BYTE_OF[letter] for letter in letters)
        return data.decode("utf-8", errors="replace").replace("</w>", " ").strip()

    def save(self, path: str | Path) -> None:
        _write(path, {"kind": self.kind, "digest": self.digest})


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

# Byte-level alphabets print every byte: the printable ones stand for themselves, the others for U+0100 and up.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}


@lru_cache(maxsize=1)
def _clip_bpe() -> tokenizers.Tokenizer:
    """Ids in the released order: 256 bytes, 256 bytes that end a word, 48,894 merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = _open_clip_file("bpe_simple_vocab_16e6.txt.gz")
    packed = path.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != ClipTokenizer.digest:
        raise UserError(
            f"{path}: not CLIP's merges: expected sha256 {ClipTokenizer.digest}, found {found}; reinstall it"
        )
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]  # behind the header; the rest is unused
    tokens = [*_BYTE_OF, *(letter + "</w>" for letter in _BYTE_OF), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return bpe


class SmallTokenizer(Tokenizer):
    """A byte-level BPE trained on a small corpus: any text can be written, case is kept, white space is collapsed.
    `pad` is 0, `start` and `end` are the two largest ids."""

    kind = "small-bpe"
    pad = 0
    smallest = 1 + 256 + 2  # pad, the bytes, start and end

    def __init__(self, model: str) -> None:
        """`model`: the JSON of a trained `tokenizers` model whose id 0 is the padding."""
        import tokenizers

        self._bpe = tokenizers.Tokenizer.from_str(model)
        size = self._bpe.get_vocab_size()
        self.start, self.end, self.vocab_size = size, size + 1, size + 2
        learnt = json.loads(self._bpe.to_str())["model"]
        fixed = json.dumps([sorted(learnt["vocab"].items()), learnt["merges"]])  # the rest varies with the library
        self.digest = hashlib.sha256(fixed.encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> SmallTokenizer:
        """Learn at most `vocab_size` ids (fewer where the corpus has no more pairs). The same texts, in any order, give
        the same tokenizer."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocab_size < cls.smallest:
            raise UserError(f"a vocabulary of {vocab_size} is too small: bytes and specials alone take {cls.smallest}")
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            min_frequency=2,
            show_progress=False,
            special_tokens=["<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train_from_iterator(map(_in_pieces, texts), trainer)
        # as a plain entry: the padding's name in a text must not turn into padding
        model = json.loads(bpe.to_str())
        model["added_tokens"] = []
        return cls(json.dumps(model))

    def encode(self, text: str) -> list[int]:
        text = _plain(text)
        return self._bpe.encode(text).ids if text else []

    def decode(self, ids: Iterable[int]) -> str:
        return self._bpe.decode([i for i in self._body(ids) if i != self.pad], skip_special_tokens=False).strip()

    def save(self, path: str | Path) -> None:
        _write(path, {"kind": self.kind, "digest": self.digest, "model": json.loads(self._bpe.to_str())})


def _plain(text: str) -> str:
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())  # a lone surrogate becomes '?'


def _in_pieces(text: str) -> str:
    """A merge costs as much as a word is long, and a stranger's word may be a megabyte."""
    return re.sub(rf"(\S{{{_LONGEST_WORD}}})(?=\S)", r"\1 ", _plain(text))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        kind, digest = saved["kind"], saved["digest"]
        tokenizer: Tokenizer = ClipTokenizer() if kind == "clip-bpe" else SmallTokenizer(json.dumps(saved["model"]))
    except UserError:
        raise
    except Exception as error:  # absent, cut, or not a tokenizer at all: the tokenizers library raises bare Exception
        raise UserError(f"{path}: not a saved tokenizer ({type(error).__name__}); save or train it again") from None
    if tokenizer.digest != digest:
        raise UserError(f"{path}: digest differs: expected {digest}, found {tokenizer.digest}; train it again")
    return tokenizer


def _write(path: str | Path, content: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@lru_cache(maxsize=1)
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 class names that CLIP's authors edited by hand, in ImageNet's order (worth 1.5 points on B/32)."""
    return tuple(ast.literal_eval(_metadata("IMAGENET_CLASSNAMES")))


@lru_cache(maxsize=1)
def imagenet_templates() -> tuple[str, ...]:
    """The 80 prompts of CLIP's ImageNet ensemble, with `{}` where the class name goes."""
    templates = []
    for function in _metadata("OPENAI_IMAGENET_TEMPLATES").elts:  # lambda c: f'a photo of a {c}.'
        parts = function.body.values
        templates.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts))
    return tuple(templates)


def _metadata(name: str) -> Any:
    """The syntax tree of a constant in open_clip's zero_shot_metadata.py: read, since importing the package is slow."""
    path = _open_clip_file("zero_shot_metadata.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == name for target in node.targets):
            return node.value
    raise UserError(f"{path}: has no {name}; install the tested open_clip_torch (constraints.txt)")


def _open_clip_file(name: str) -> Path:
    """A data file of the installed package open_clip_torch, found without importing it."""
    spec = importlib.util.find_spec("open_clip")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / name).is_file():
            return path
    raise UserError(f"open_clip's {name} is not installed: python -m pip install open_clip_torch")
