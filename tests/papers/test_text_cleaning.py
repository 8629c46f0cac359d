"""How ALBEF and BLIP clean their texts: what each keeps, worked out by hand from the released rules."""

import pytest

from papers.albef import text as albef
from papers.blip import text as blip

CAPTIONS = [  # text, ALBEF's, BLIP's
    ("A Dog.", "a dog", "a dog"),
    ("a red, big dog", "a red big dog", "a red, big dog"),
    ("the man's t-shirt", "the mans t shirt", "the man's t-shirt"),
    ("black/white cat?", "black white cat", "black/white cat?"),
    ("i.e. this", "ie this", "i e this"),
    ('say "hello" (twice)!', "say hello twice", "say hello twice"),
    ("at 3:30; #1 * ~", "at 330 1", "at 3 30 1"),
    ("photo of <person>, smiling", "photo of person smiling", "photo of <person>, smiling"),
    ("  many    spaces  ", "many spaces", "many spaces"),
    ("two lines\n\nhere \n", "two lines here", "two lines here"),
    ("one\nbreak\tstays\n", "one\nbreak\tstays", "one\nbreak\tstays"),
    ("a - b", "a b", "a - b"),
    ("Çà & İ", "çà & i̇", "çà & i̇"),
    ("...", "", ""),
    ("", "", ""),
]
QUESTIONS = [
    ("What's this, exactly?", "whats this exactly", "what's this, exactly?"),
    ("Is it 3:30 p.m.?  ", "is it 330 pm", "is it 330 pm?"),
    ("Is it on/off-line", "is it on off line", "is it on/off-line"),
    (" what  is it?", " what  is it", " what  is it?"),
    ("who is <person>?", "who is <person>", "who is <person>?"),
    ("?", "", "?"),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "in_albef", "in_blip"), CAPTIONS)
def test_captions(text, in_albef, in_blip):
    assert (albef.clean_caption(text, 30), blip.clean_caption(text, 30)) == (in_albef, in_blip)


@pytest.mark.parametrize(("text", "in_albef", "in_blip"), QUESTIONS)
def test_questions(text, in_albef, in_blip):
    assert (albef.clean_question(text, 30), blip.clean_question(text, 30)) == (in_albef, in_blip)


@pytest.mark.parametrize("paper", [albef, blip])
def test_words_beyond_the_most_are_cut_off(paper):
    assert paper.clean_caption("one two  three four", 3) == "one two three"
    assert paper.clean_caption("one two three", 3) == "one two three"
    assert paper.clean_question("one two  three four", 3) == "one two "  # the empty word between two spaces counts
    assert paper.clean_question("one two three four", 3) == "one two three"


def test_words_are_counted_after_the_signs_have_gone():
    assert albef.clean_caption("a-b-c d", 3) == "a b c"
    assert blip.clean_caption("a-b-c d", 3) == "a-b-c d"
    assert blip.clean_caption("a.b.c d", 3) == "a b c"
