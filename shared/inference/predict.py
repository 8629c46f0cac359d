"""A user's own pictures, shown to a model that answers in words: files in batches, a line a picture, bad ones named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from shared.core.console import Console
from shared.core.errors import UserError
from shared.core.text import shown
from shared.data.images import SUFFIXES, PictureError, fitted_image

if TYPE_CHECKING:
    from torch import Tensor
from shared.core.text import one_line


class Reply(NamedTuple):
    """dropped: how many of the oldest turns had to be forgotten for it."""

    text: str
    dropped: int


class Talk(NamedTuple):
    """What a paper's inference.py gives for a dialogue. begin: a picture (1, 3, size, size) uint8 -> a function of each
    question, which raises UserError for one that cannot be asked and goes on as before."""

    begin: Callable[[Tensor], Callable[[str], Reply]]
    size: int
    whole: bool


class Task(NamedTuple):
    """What a paper's inference.py gives. answer: pictures (B, 3, size, size) uint8 -> one text each."""

    answer: Callable[[Tensor], Sequence[str]]
    size: int  # pixels a side
    whole: bool  # pictures are squeezed into the square, not cut to it


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and what folders hold, in the order of their names. UserError where a path is neither."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise UserError(f"{path}: no pictures in this folder ({', '.join(SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{shown(path)}: no such file or folder; give pictures, or folders of them")
    return found


def look(files: Sequence[Path], task: Task, batch: int, console: Console) -> int:
    """Print `path: text` for every picture once its batch is done. -> exit code: 1 where pictures were skipped."""
    skipped: list[str] = []
    with console.progress(len(files), "pictures", "pictures") as bar:
        for start in range(0, len(files), batch):
            some = files[start : start + batch]
            for path, text in answered(some, task, skipped):
                if console.live:
                    bar.tqdm.clear()
                print(f"{one_line(str(path))}: {one_line(text)}", flush=True)
            bar.advance(len(some))
    for line in skipped:
        print(line, file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} of {len(files)} pictures were skipped", file=sys.stderr)
    return 1 if skipped else 0


def answered(files: Sequence[Path], task: Task, skipped: list[str]) -> Iterator[tuple[Path, str]]:
    import numpy as np
    import torch

    kept, images = [], []
    for path in files:
        try:
            images.append(fitted_image(path.read_bytes(), task.size, whole=task.whole))
            kept.append(path)
        except (PictureError, OSError) as wrong:
            reason = (wrong.strerror or str(wrong)) if isinstance(wrong, OSError) else str(wrong)
            skipped.append(f"{one_line(str(path))}: skipped, {reason}")
    if kept:
        yield from zip(kept, task.answer(torch.from_numpy(np.stack(images))), strict=True)


def talk(path: Path, task: Talk, lines: TextIO) -> int:
    """Answer question after question about a picture, a line each, until an empty line or the end of what comes.
    -> exit code: 1 where a question could not be asked. UserError where the picture cannot be read."""
    import numpy as np
    import torch

    try:
        image = fitted_image(path.read_bytes(), task.size, whole=task.whole)
    except (PictureError, OSError) as wrong:
        raise UserError(f"{one_line(str(path))}: {getattr(wrong, 'strerror', None) or wrong}") from None
    reply = task.begin(torch.from_numpy(np.stack([image])))
    failed = told = False
    for question in questions(lines):
        try:
            text, dropped = reply(question)
        except UserError as error:
            failed = True
            print(one_line(str(error)), file=sys.stderr, flush=True)
            continue
        if dropped and not told:
            told = True
            print("the context is full: from here on the oldest turns are forgotten", file=sys.stderr, flush=True)
        print(one_line(text), flush=True)
    return 1 if failed else 0


def questions(lines: TextIO) -> Iterator[str]:
    """Lines up to the first empty one; on a terminal behind a sign that it is one's turn."""
    live = lines.isatty()
    if hasattr(lines, "reconfigure"):
        lines.reconfigure(errors="replace")
    while True:
        if live:
            print("? ", end="", file=sys.stderr, flush=True)
        line = lines.readline()
        if not line.strip():
            if live and not line:  # Ctrl-D leaves the cursor behind the sign
                print(file=sys.stderr)
            return
        yield line.strip()
