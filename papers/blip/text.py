"""How a text is cleaned before it is cut into tokens (salesforce/BLIP, data/utils.py): lower case, few signs, so many
words. Commas, apostrophes, hyphens, slashes and question marks stay, unlike in ALBEF."""

import re

_SIGNS = '.!"()*#:;~'
_TO_SPACES = str.maketrans(_SIGNS, " " * len(_SIGNS))
_AWAY = str.maketrans("", "", _SIGNS)


def clean_caption(text: str, max_words: int) -> str:
    """A caption or a statement, signs as spaces: `"A man's hat - two-tone, i.e. red."` -> `a man's hat - two-tone, i e
    red`. The release keeps 30 words, 40 for NLVR2 and video."""
    text = text.lower().translate(_TO_SPACES)
    return _first_words(re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int) -> str:
    """A question, signs removed: `"What's this, at 3:30?"` -> `what's this, at 330?`. Spaces are kept, and two in a row
    hold an empty word that counts. The release keeps 50 words."""
    return _first_words(text.lower().translate(_AWAY).rstrip(" "), max_words)


def _first_words(text: str, most: int) -> str:
    return " ".join(text.split(" ")[:most])
