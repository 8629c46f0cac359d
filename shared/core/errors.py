"""The one exception for mistakes a user can make and mend: the command line prints its message and exits with 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What is wrong, where, and the way out, in one line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What an error about an unknown name ends with: the nearest known one, else all there are."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(names)}"
