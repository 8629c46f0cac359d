"""Verbs of the command line in this process."""

import pytest

from shared.cli import main


def run(place, *words):
    """(exit code) of a verb in this process, as `python -m papers` would give it."""
    with pytest.raises(SystemExit) as ended:
        main(place / "papers", "papers", list(words))
    return ended.value.code
