"""CLIP's tokenizer against the one of open_clip, id by id, and the small trained one against its promises."""

import gzip
import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared import tokenizers
from shared.errors import UserError
from shared.tokenizers import (
    ClipTokenizer,
    SmallTokenizer,
    imagenet_classes,
    imagenet_templates,
    load_tokenizer,
    trim,
)

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
    assert clip._bpe.get_vocab_size() == clip.start == clip.vocab_size - 2
    assert all(clip._bpe.id_to_token(i) == theirs.decoder[i] for i in range(clip.start))
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
    monkeypatch.setattr(tokenizers, "_open_clip_file", lambda name: tmp_path / name)
    tokenizers._clip_bpe.cache_clear()
    with pytest.raises(UserError, match="not CLIP's merges: expected sha256 924691ac"):
        ClipTokenizer()


def test_a_missing_open_clip_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="python -m pip install open_clip_torch"):
        tokenizers._open_clip_file("zero_shot_metadata.py")


def test_the_vocabulary_is_found_without_importing_open_clip_or_torch():
    code = (
        "import sys; from shared.tokenizers import *; ClipTokenizer().encode('x'); imagenet_classes();"
        "imagenet_templates(); sys.exit('open_clip' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


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
        "from shared.tokenizers import SmallTokenizer as S;"
        "t=[f'a {c} {t} left of two {t}s' for t in ('umbrella','cat','dog') for c in ('green','blue','red')];"
        "print(S.train(t, 320).digest)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
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
