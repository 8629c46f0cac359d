"""BERT's WordPiece tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shared.core.archives import SafeArchive
from shared.core.errors import UserError
from shared.tokenizers.base import SPECIALS, Tokenizer, _known_specials
from shared.weights.fetch import fetch
from shared.weights.manifest import load_manifest


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
        self._added = [name for name in _known_specials(specials) if SPECIALS[name] not in known]
        names = [SPECIALS[name] for name in self._added]
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

    def decode(self, ids: Iterable[int]) -> str:
        """Pieces joined, without any special token, and no space before a sign or an ending that belongs to a word, as
        transformers does with clean_up_tokenization_spaces (the default when ALBEF and BLIP were released)."""
        text = self._pieces.decode(self._body(ids), skip_special_tokens=True)
        for apart, joined in _ENDINGS:
            text = text.replace(apart, joined)
        return text

    def _saved(self) -> dict[str, Any]:
        known = self._pieces.get_vocab(with_added_tokens=False)
        return {"specials": self._added, "vocabulary": sorted(known, key=known.__getitem__)}


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
