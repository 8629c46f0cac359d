"""Text to ids and back: CLIP's byte-pair encoding (Radford et al. 2021, Sec. 2.4) and BERT's uncased WordPiece (Devlin
et al. 2019, Sec. 3) exactly as released, and a small trained one for the small scales; also the ImageNet class names
and templates of the zero-shot protocol (Radford et al., Sec. 3.1.4)."""

from __future__ import annotations

import ast
import gzip
import hashlib
import html
import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.archives import SafeArchive, shown
from shared.errors import UserError
from shared.fetch import atomic, fetch, load_manifest

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


class BertTokenizer(Tokenizer):
    """BERT's WordPiece over lower-cased text without accents; each word is cut into the longest pieces of a vocabulary.

    `[CLS]` starts, `[SEP]` ends, `[PAD]` pads, and `[MASK]` is there. As in the release, these names in a text stand
    for the special ids; a word of more than 100 characters, and one that the vocabulary cannot write, is `[UNK]`.
    """

    kind = "bert-wordpiece"
    released = (
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"  # sha256 of bert-base-uncased's vocab.txt
    )

    def __init__(self, vocabulary: Sequence[str], specials: Sequence[str] = ()) -> None:
        """`vocabulary`: the pieces in the order of their ids. `specials`: those of SPECIALS that it lacks, whose ids
        then follow; BLIP's ("decode_start", "encode_start") are 30,522 and 30,523."""
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

        known = {piece: i for i, piece in enumerate(vocabulary)}
        if len(known) != len(vocabulary):
            raise UserError(f"{len(vocabulary) - len(known)} pieces of the vocabulary stand there twice")
        if lacking := [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name not in known]:
            raise UserError(f"the vocabulary lacks {', '.join(lacking)}: no BERT vocabulary")
        self._asked = [name for name in _known_specials(specials) if SPECIALS[name] not in known]
        names = [SPECIALS[name] for name in self._asked]
        self._pieces = Tokenizer(models.WordPiece(known, unk_token="[UNK]", max_input_chars_per_word=100))
        self._pieces.normalizer = normalizers.BertNormalizer()  # uncased
        self._pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._pieces.decoder = decoders.WordPiece()
        self._pieces.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *names])
        self.pad, self.start, self.end = known["[PAD]"], known["[CLS]"], known["[SEP]"]
        self.vocab_size = self._pieces.get_vocab_size()
        ids = {name: self._pieces.token_to_id(written) for name, written in SPECIALS.items()}
        self.specials = {name: i for name, i in ids.items() if i is not None}
        lines = "".join(f"{piece}\n" for piece in [*vocabulary, *names])
        self.digest = hashlib.sha256(lines.encode()).hexdigest()

    @classmethod
    def uncased(cls, path: str | Path | None = None, specials: Sequence[str] = ()) -> BertTokenizer:
        """bert-base-uncased: 30,522 ids. `path`: its vocab.txt, a tokenizer.json that holds it, or a zip archive with
        either; by default what the manifest calls `bert-vocabulary`. Any other vocabulary is a UserError."""
        path = Path(path or fetch(load_manifest()["bert-vocabulary"]))
        vocabulary = _read_vocabulary(path)
        if (found := cls(vocabulary).digest) != cls.released:
            raise UserError(
                f"{path}: not the vocabulary of bert-base-uncased: expected sha256 {cls.released}, found {found}"
            )
        return cls(vocabulary, specials)

    def encode(self, text: str) -> list[int]:
        return self._pieces.encode(_valid(text), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Pieces joined, without any special token, and no space before a sign or an ending that belongs to a word, as
        transformers does with clean_up_tokenization_spaces (the default when ALBEF and BLIP were released)."""
        text = self._pieces.decode(self._body(ids), skip_special_tokens=True)
        for apart, joined in _ENDINGS:
            text = text.replace(apart, joined)
        return text

    def save(self, path: str | Path) -> None:
        known = self._pieces.get_vocab(with_added_tokens=False)
        vocabulary = sorted(known, key=known.__getitem__)
        _write(path, {"kind": self.kind, "digest": self.digest, "specials": self._asked, "vocabulary": vocabulary})


_ENDINGS = [(f" {sign}", sign) for sign in ".?!,"] + [(" ' ", "'")]
_ENDINGS += [(f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")]


def _read_vocabulary(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        if data[:2] == b"PK":
            with SafeArchive(path) as archive:
                name = next(
                    name for name in archive.members() if name.split("/")[-1] in ("vocab.txt", "tokenizer.json")
                )
                data = archive.read(name)
        if data[:1] == b"{":
            known = json.loads(data)["model"]["vocab"]
            return sorted(known, key=known.__getitem__)
        return data.decode("utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of BERT's vocab.txt") from None
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
        raise UserError(f"{path}: no vocabulary in it; give BERT's vocab.txt or a tokenizer.json") from None


def _known_specials(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in SPECIALS:
            raise UserError(f"special token '{name}' is none of {', '.join(SPECIALS)}")
    return list(dict.fromkeys(names))


class SmallTokenizer(Tokenizer):
    """A byte-level BPE trained on a small corpus: any text can be written, case is kept, white space is collapsed.
    `pad` is 0, `start` and `end` are the two largest ids; `specials` come behind them, in the order asked for."""

    kind = "small-bpe"
    pad = 0
    smallest = 1 + 256 + 2  # pad, the bytes, start and end

    def __init__(self, model: str, specials: Sequence[str] = ()) -> None:
        """`model`: the JSON of a trained `tokenizers` model whose id 0 is the padding; `specials`: some of SPECIALS."""
        import tokenizers

        self._bpe = tokenizers.Tokenizer.from_str(model)
        size = self._bpe.get_vocab_size()
        self.start, self.end = size, size + 1
        self.specials = {name: size + 2 + i for i, name in enumerate(_known_specials(specials))}
        self.vocab_size = size + 2 + len(self.specials)
        learnt = json.loads(self._bpe.to_str())["model"]
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

    def encode(self, text: str) -> list[int]:
        text = _plain(text)
        return self._bpe.encode(text).ids if text else []

    def decode(self, ids: Iterable[int]) -> str:
        written = [i for i in self._body(ids) if i != self.pad and i < self.start]
        return self._bpe.decode(written, skip_special_tokens=False).strip()

    def save(self, path: str | Path) -> None:
        specials = {"specials": list(self.specials)} if self.specials else {}
        model = json.loads(self._bpe.to_str())
        _write(path, {"kind": self.kind, "digest": self.digest, **specials, "model": model})


def _plain(text: str) -> str:
    return " ".join(_valid(text).split())


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate becomes '?'


def _in_pieces(text: str) -> str:
    """A merge costs as much as a word is long, and a stranger's word may be a megabyte."""
    return re.sub(rf"(\S{{{_LONGEST_WORD}}})(?=\S)", r"\1 ", _plain(text))


def for_transformers(
    words: BertTokenizer | SmallTokenizer, ids: Mapping[str, int], ends: tuple[str, str] = ("[CLS]", "[SEP]")
) -> dict[str, Any]:
    """The tokenizer.json from which transformers builds a tokenizer that gives our ids, between the two `ends`.

    ids: of the special tokens, by the names that they have there.
    """
    if isinstance(words, BertTokenizer):
        learnt = json.loads(words._pieces.to_str())
    else:  # it keeps its special tokens outside its model
        learnt = json.loads(words._bpe.to_str())
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        learnt["added_tokens"] = [{"id": id, "content": name} | special for name, id in ids.items()]
        white = r"[\s\x1c-\x1f\x85]+"  # what str.split takes for white space
        learnt["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"Regex": white}, "content": " "},
                {"type": "Strip", "strip_left": True, "strip_right": True},
            ],
        }
    start, end = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ends)
    one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    learnt["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, one, end],
        "pair": [start, one, end, other, end],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in ends},
    }
    return learnt


_LOADERS: dict[str, Callable[[Mapping[str, Any]], Tokenizer]] = {
    ClipTokenizer.kind: lambda saved: ClipTokenizer(),
    BertTokenizer.kind: lambda saved: BertTokenizer(saved["vocabulary"], saved["specials"]),
    SmallTokenizer.kind: lambda saved: SmallTokenizer(json.dumps(saved["model"]), saved.get("specials", ())),
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        tokenizer, digest = _LOADERS[saved["kind"]](saved), saved["digest"]
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
