"""A language model's texts as tokens: what stage 2 learns from, and what is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shared.errors import UserError
from shared.tokenizers import Tokenizer

if TYPE_CHECKING:
    from shared.language_adapters import LanguageTokenizer


class Texts(NamedTuple):
    """tokens (N, T), right-padded; present (N, T); given (N,): leading tokens of each that are asked, not learned."""

    tokens: Tensor
    present: Tensor
    given: Tensor


@dataclass(frozen=True)
class Words:
    """start: ids before every text; stop: ids that end one, of which the first is appended to what is learned; behind:
    ids after what is asked (T5's encoder)."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    pad: int
    context: int
    behind: tuple[int, ...] = ()

    def begun(self, text: str) -> list[int]:
        return [*self.start, *self.encode(text)]

    def learned(self, texts: Sequence[tuple[str, str]]) -> Texts:
        """(prompt, text behind it) -> tokens; the prompt may be empty. Cut to the context."""
        rows, given = [], []
        for prompt, text in texts:
            before = [*self.start, *(self.encode(prompt) if prompt else [])]
            behind = self.encode(f" {text}" if prompt else text)
            rows.append([*before, *behind, self.stop[0]][: self.context])
            given.append(len(before))
            if len(before) >= self.context:
                raise UserError(f"prompt '{prompt}' fills the context of {self.context} tokens: no room for an answer")
        tokens, present = padded(rows, self.pad)
        return Texts(tokens, present, torch.tensor(given))

    def prompts(self, texts: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Tokens (N, T) padded on the left, and where they are (N, T)."""
        tokens, present = padded([[*self.begun(text), *self.behind] for text in texts], self.pad, left=True)
        return tokens.to(device), present.to(device)


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool = False) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), pad)
    present = torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        tokens[place, where] = torch.tensor(row)
        present[place, where] = True
    return tokens, present


def words_of(tokenizer: Tokenizer, context: int) -> Words:
    """Of the small language models, whose texts are sentences: a period ends one, as a newline does with OPT."""
    return Words(
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        start=(tokenizer.start,),
        stop=(tokenizer.encode("a.")[-1], tokenizer.end),
        pad=tokenizer.pad,
        context=context,
    )


def named_words(tokenizer: LanguageTokenizer, context: int) -> Words:
    """Of a published language model."""
    return Words(
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        start=() if tokenizer.start is None else (tokenizer.start,),
        stop=tuple(tokenizer.stops),
        pad=tokenizer.pad,
        context=context,
        behind=() if tokenizer.prompt_end is None else (tokenizer.prompt_end,),
    )
