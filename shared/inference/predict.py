"""A user's own pictures, shown to a model: captions, answers, a dialogue, labels; a line a picture, bad ones named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TextIO

from shared.core.console import Console
from shared.core.errors import UserError
from shared.core.text import one_line, shown
from shared.data.images import SUFFIXES, PictureError, fitted_image, pictures_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 64  # pictures that `zeroshot` reads at once


@dataclass(frozen=True)
class GenerationOptions:
    """What a user wants of how texts are written; None: as the model's paper has it. nucleus: sample from the likeliest
    words that hold this share, by the generator."""

    beams: int | None = None
    nucleus: float | None = None
    generator: torch.Generator | None = None


class VisionLanguageModel(Protocol):
    """What a paper's inference.py loads for a use; it has the methods that the use needs.

    encode: uint8 (B, 3, image_size, image_size) -> what the others take as prefix, a row a picture. prompt: what a user
    wrote, or None, in the paper's words; UserError where it leaves no room. generate: a text behind each prefix and
    prompt. score: (B, A), higher for likelier answers, or labels. dialogue: answered questions and the next one as a
    prompt, which `fits` the model's context or not.
    """

    image_size: int

    def encode(self, images: Tensor) -> Tensor: ...

    def prompt(self, text: str | None) -> str: ...

    def generate(self, prefix: Tensor, prompts: Sequence[str], options: GenerationOptions) -> list[str]: ...

    def score(self, prefix: Tensor, prompts: Sequence[str], answers: Sequence[str]) -> Tensor: ...

    def dialogue(self, turns: Sequence[tuple[str, str]], question: str) -> str: ...

    def fits(self, prompt: str) -> bool: ...


class Reply(NamedTuple):
    """dropped: how many of the oldest turns had to be forgotten for it."""

    text: str
    dropped: int


class Talk(NamedTuple):
    """A dialogue about a picture. begin: a picture (1, 3, size, size) uint8 -> a function of each
    question, which raises UserError for one that cannot be asked and goes on as before."""

    begin: Callable[[Tensor], Callable[[str], Reply]]
    size: int


class Task(NamedTuple):
    """What is done with pictures. answer: (B, 3, size, size) uint8 -> a text each. whole: squeezed into the square, not
    cropped to it."""

    answer: Callable[[Tensor], Sequence[str]]
    size: int  # pixels a side
    whole: bool = True


# ---- what a model is used for


def caption_task(
    model: VisionLanguageModel, prompt: str | None, beams: int | None, nucleus: float | None, seed: int
) -> Task:
    """Captions behind the prompt, None: the paper's, by beam search or sampled from the nucleus."""
    import torch

    prompt = model.prompt(prompt)
    options = GenerationOptions(beams, nucleus, torch.Generator().manual_seed(seed))

    def answer(images: Tensor) -> list[str]:
        return model.generate(model.encode(images), [prompt] * len(images), options)

    return Task(answer, model.image_size)


def ask_task(model: VisionLanguageModel, question: str, answers: Sequence[str] | None, beams: int | None) -> Task:
    """Answers to one question about every picture: in the model's own words, or the likeliest of `answers`."""
    prompt = model.prompt(question)

    def answer(images: Tensor) -> list[str]:
        prefix, prompts = model.encode(images), [prompt] * len(images)
        if answers is None:
            return model.generate(prefix, prompts, GenerationOptions(beams))
        return [answers[place] for place in model.score(prefix, prompts, answers).argmax(1).tolist()]

    return Task(answer, model.image_size)


def chat_task(model: VisionLanguageModel, beams: int | None) -> Talk:
    """A dialogue about one picture. What was said stands before each question; its oldest turns go where the context is
    full."""

    def begin(image: Tensor) -> Callable[[str], Reply]:
        prefix = model.encode(image)
        history: list[tuple[str, str]] = []

        def reply(question: str) -> Reply:
            turns = list(history)
            while turns and not model.fits(model.dialogue(turns, question)):
                turns.pop(0)
            # a question that is too long by itself ends nothing
            [text] = model.generate(prefix, [model.dialogue(turns, question)], GenerationOptions(beams))
            dropped = len(history) - len(turns)
            history[:] = [*turns, (question, text)]
            return Reply(text, dropped)

        return reply

    return Talk(begin, model.image_size)


def zeroshot_task(model: VisionLanguageModel, labels: Sequence[str], template: str) -> Task:
    """The labels by falling probability, each put into the template's {}."""

    def answer(images: Tensor) -> list[str]:
        logits = model.score(model.encode(images), [template] * len(images), labels)
        return [
            ", ".join(f"{labels[i]} {100 * row[i]:.1f} %" for i in row.argsort(descending=True).tolist())
            for row in logits.softmax(-1)
        ]

    return Task(answer, model.image_size, whole=False)


# ---- pictures and questions


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and what folders hold, in the order of their names. UserError where a path is neither."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = pictures_in(path)
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
        image = fitted_image(path.read_bytes(), task.size, whole=True)
    except (PictureError, OSError) as wrong:
        raise UserError(f"{one_line(str(path))}: {getattr(wrong, 'strerror', None) or wrong}") from None
    reply = task.begin(torch.from_numpy(np.stack([image])))
    failed = warned = False
    for question in questions(lines):
        try:
            text, dropped = reply(question)
        except UserError as error:
            failed = True
            print(one_line(str(error)), file=sys.stderr, flush=True)
            continue
        if dropped and not warned:
            warned = True
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
