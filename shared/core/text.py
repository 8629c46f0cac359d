"""Text on its way to a terminal or into a file name: what a terminal would obey is written out."""

from __future__ import annotations


def shown(text: object, most: int = 200) -> str:
    """What a stranger wrote, fit for a message: one line, printable, not endless."""
    name, text = type(text).__name__, str(text)
    more = f"... ({len(text):,} characters)" if len(text) > most else ""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most]) + more or name


def one_line(text: str) -> str:
    """What a terminal would obey or break a line at (control characters, marks of direction) is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
