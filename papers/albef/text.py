"""How a text is cleaned before it is cut into tokens (salesforce/ALBEF, dataset/utils.py): lower case, few signs, so
many words. BLIP cleans differently, so its tokens of the same caption are others."""

import re

_SIGNS = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")  # a hyphen and a slash become spaces, the last ones vanish


def clean_caption(text: str, max_words: int) -> str:
    """A caption or a statement: `"A man's hat - two-tone, by <person>."` -> `a mans hat two tone by person`. The
    release keeps 30 words."""
    text = text.lower().translate(_SIGNS).replace("<person>", "person")
    return _first_words(re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int) -> str:
    """A question: `"What's this, exactly?"` -> `whats this exactly`. Spaces are kept, and two in a row hold an empty
    word that counts. The release keeps 30 words in training and 50 in evaluation."""
    return _first_words(text.lower().translate(_SIGNS).rstrip(" "), max_words)


def _first_words(text: str, most: int) -> str:
    return " ".join(text.split(" ")[:most])
