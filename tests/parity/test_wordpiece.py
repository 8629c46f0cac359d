"""BERT's WordPiece against transformers' tokenizer on the same vocabulary: id by id, and back to text.

The released vocabulary is a download, so a made one stands in for it here; the released one is tested where
`python -m papers fetch bert-vocabulary` has brought it."""

import random
import string
from itertools import product

import pytest
import torch

from shared.tokenizers.bert import BertTokenizer
from shared.weights.fetch import cached
from shared.weights.manifest import load_manifest

transformers = pytest.importorskip("transformers")

NASTY = [
    "",
    " ",
    "\t\n\r\x0b ",
    "a photo of a cat.",
    "A Photo, Of A DOG!? (it's John's; they'll 'RE' we've don't can't n't)",
    "ünïcödé ÀÉÎ straße İstanbul ſharp ﬁne e\u0301 a\u0308\u0323 Å",
    "日本語のキャプション 한국어 中文。 a中b文c 㐀 \U00020000 豈",
    "العربية हिन्दी עברית ไทย",
    "zero\u200bwidth\ufeffbom\u00adsoft\u2060 nul\x00 bell\x07 esc\x1b[0m del\x7f c1\x85 bad\ufffd private\ue000",
    "no\u00a0break\u2003em\u3000wide\u2028line\u2029paragraph\x1cfile",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 a 🐶 emoji✨ ½ ² № ™ €5 £3 $2 3.14 1,000",
    "x" * 100,
    "x" * 101,
    "cat" * 40,
    "-".join(["cat"] * 60),
    "##ing # #ing ##",
    "[CLS] a [SEP] b [PAD] c [MASK] d [UNK]",
    "[mask] [MASK][MASK] x[SEP]y [ SEP ] [DEC] [ENC] a[ENC]",
    "a `tick` “curly” ‘quotes’ — dash… _under_ ~ ^ | \\ / < > = + @ #tag {x}",
]
LETTERS = string.ascii_lowercase + string.digits + string.punctuation + "日本中文"


@pytest.fixture(scope="module")
def vocabulary():
    """Specials at the released ids, letters, their continuations, and a few words and endings."""
    pieces = [f"[unused{i}]" for i in range(99)]
    pieces = ["[PAD]", *pieces, "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return [*pieces, "cat", "photo", "dog", "##og", "##ing", "##at", "the", "don", "##cat", "of", "istanbul", "strasse"]


def both(vocabulary, specials=()):
    """Ours and theirs; BLIP adds [DEC] and then [ENC] to theirs."""
    theirs = transformers.BertTokenizerFast(vocab={piece: i for i, piece in enumerate(vocabulary)})
    if specials:
        theirs.add_special_tokens({"bos_token": "[DEC]"})
        theirs.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return BertTokenizer(vocabulary, specials), theirs


def noise(count):
    rng = random.Random(0)
    ranges = [(32, 127)] * 4 + [(0, 32), (0x7F, 0x250), (0x300, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F700)]
    for _ in range(count):
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


@pytest.mark.parametrize("specials", [(), ("decode_start", "encode_start")])
def test_a_made_vocabulary_gives_the_ids_and_texts_of_transformers(vocabulary, specials):
    agree_on(*both(vocabulary, specials), [*NASTY, *noise(2000)])


@pytest.mark.parametrize("specials", [(), ("decode_start", "encode_start")])
def test_the_released_vocabulary_gives_the_ids_and_texts_of_transformers(specials):
    path = cached(load_manifest()["bert-vocabulary"])
    if path is None:
        pytest.skip("the vocabulary is not in the cache: python -m papers fetch bert-vocabulary")
    released = BertTokenizer.uncased(path)
    known = released._pieces.get_vocab()
    ours, theirs = both(sorted(known, key=known.get), specials)
    assert (released.vocab_size, ours.vocab_size) == (30522, 30522 + len(specials))
    assert (ours.pad, ours.start, ours.end, ours.mask) == (0, 101, 102, 103)
    if specials:
        assert (ours.decode_start, ours.encode_start) == (30522, 30523)
        assert (theirs.bos_token_id, theirs.convert_tokens_to_ids("[ENC]")) == (30522, 30523)
    agree_on(ours, theirs, [*NASTY, *noise(2000)])
    known_ids = [101, 1037, 6302, 1997, 1037, 4937, 2006, 1037, 13523, 1012, 102]  # as BERT's users have seen them
    assert ours(["A photo of a cat on a mat."], 11).tolist() == [known_ids]


def agree_on(ours, theirs, texts):
    for text in texts:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
    for context in (30, 9):
        batch = theirs(texts, padding="max_length", truncation=True, max_length=context, return_tensors="pt")
        tokens = ours(texts, context)
        assert torch.equal(tokens, batch["input_ids"])
        assert torch.equal((tokens != ours.pad)[:8].long(), batch["attention_mask"][:8])  # no [PAD] written in these
    rng = random.Random(1)
    plain = [i for i in range(ours.vocab_size) if i != ours.end]
    for ids in [ours.encode(text) for text in texts] + [rng.choices(plain, k=12) for _ in range(2000)]:
        ids = ids[: ids.index(ours.end)] if ours.end in ids else ids  # ours ends there
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)


def test_signs_and_endings_are_joined_as_transformers_joins_them(vocabulary):
    pieces = [*vocabulary, "n", "'", "s", "m", "ve", "re", "t", "'s", "n't"]
    ours, theirs = both(list(dict.fromkeys(pieces)))
    parts = ["cat", ".", "?", "!", ",", "'", "s", "m", "n", "t", "##s", "[UNK]", "-"]
    for written in product(parts, repeat=3):
        ids = [ours._pieces.token_to_id(part) for part in written]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
