"""A language model's texts as tokens: what stage 2 learns from, and what is asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shared.core.errors import UserError
from shared.data.padding import pad_rows
from shared.data.seeded import SeededRandom
from shared.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from shared.tokenizers.lm import LanguageTokenizer

LONGEST = 50  # words of a text or question, as the release keeps


class Texts(NamedTuple):
    """tokens (N, T), right-padded; attention_mask (N, T); given (N,): leading tokens of each that are asked, not
    learned."""

    tokens: Tensor
    attention_mask: Tensor
    given: Tensor


class Answers(NamedTuple):
    """Of a seq2seq model: tokens (N, T) for its decoder, asked (N, A) for its encoder; where either is, as bool. Both
    right-padded."""

    tokens: Tensor
    attention_mask: Tensor
    asked: Tensor
    question_mask: Tensor


@dataclass(frozen=True)
class PromptTokenizer:
    """start: ids before every text; stop: ids that end one, of which the first is appended to what is learned; behind:
    ids after what is asked, which seq2seq models alone have (T5's encoder)."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    pad: int
    context: int
    behind: tuple[int, ...] = ()

    def begun(self, text: str) -> list[int]:
        return [*self.start, *self.encode(text)]

    @property
    def seq2seq(self) -> bool:
        """Whether what is asked goes to an encoder, and what is learned to a decoder."""
        return bool(self.behind)

    def learned(
        self, texts: Sequence[tuple[str, str]], longest: int, queries: int = 0, seed: int = 0
    ) -> Texts | Answers:
        """(prompt, text behind it) -> tokens; the prompt may be empty. Cut to the `longest`, as the official code cuts
        to 32 (blip2_opt.py and blip2_t5.py, max_txt_len). UserError where they and the queries overflow the context.

        A start token is learned where the prompt is empty, and stands in front of one that is given (official code).
        seq2seq: prompt and text are cut each, and a text without a prompt is split at random, its first words asked and
        the others learned (Sec. 3.3), which the seed and its place decide.
        """
        if self.seq2seq:
            return self._answers(texts, longest, queries, seed)
        rows, given = [], []
        for prompt, text in texts:
            before = [*self.start, *(self.encode(prompt) if prompt else [])]
            behind = self.encode(f" {text}" if prompt else text)
            rows.append([*before, *behind, self.stop[0]][:longest])
            given.append(len(before) if prompt else 0)
            self._check_prompt(prompt, len(before), longest)
        tokens, attention_mask = pad_rows(rows, self.pad)
        self._check_room(tokens.shape[1], queries)
        return Texts(tokens, attention_mask, torch.tensor(given))

    def _answers(self, texts: Sequence[tuple[str, str]], longest: int, queries: int, seed: int) -> Answers:
        asked, said = [], []
        for place, (prompt, text) in enumerate(texts):
            before, behind = (prompt, text) if prompt else split(text, SeededRandom("split", seed, place))
            ids = [*self.begun(before)] if before else list(self.start)
            if prompt:
                self._check_prompt(prompt, len(ids), longest)
            asked.append([*ids[: longest - len(self.behind)], *self.behind])
            said.append([*self.encode(behind)[: longest - 1], self.stop[0]])
        answers = Answers(*pad_rows(said, self.pad), *pad_rows(asked, self.pad))
        self._check_room(answers.asked.shape[1], queries)
        return answers

    def _check_prompt(self, prompt: str, tokens: int, longest: int) -> None:
        if tokens >= longest:
            raise UserError(f"prompt '{prompt}' fills the {longest} tokens of a text: no room for an answer")

    def _check_room(self, tokens: int, queries: int) -> None:
        if queries + tokens > self.context:
            raise UserError(
                f"texts of {tokens} tokens behind {queries} queries, but the language model's context is "
                f"{self.context}: shorten the texts or take fewer queries"
            )

    def prompts(self, texts: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Tokens (N, T) padded on the left, and where they are (N, T)."""
        tokens, attention_mask = pad_rows([[*self.begun(text), *self.behind] for text in texts], self.pad, left=True)
        return tokens.to(device), attention_mask.to(device)


def split(text: str, draw: SeededRandom) -> tuple[str, str]:
    """A text in two parts of at least a word each; one word alone is all learned."""
    words = text.split()
    if len(words) < 2:
        return "", text
    at = 1 + draw.below(len(words) - 1)
    return " ".join(words[:at]), " ".join(words[at:])


# ---- texts of published sets, as lavis/processors/blip_processors.py cleans them

_SIGNS = re.compile(r"[.!\"()*#:;~]")


def clean_caption(text: str) -> str:
    """`"A man (left): two-tone hats!"` -> `a man left two-tone hats`."""
    words = _SIGNS.sub(" ", text.lower()).split()
    return " ".join(words[:LONGEST])


def clean_question(text: str) -> str:
    words = _SIGNS.sub("", text.lower()).rstrip().split(" ")
    return " ".join(words[:LONGEST])


# ---- of either kind of language model


def prompt_tokenizer_of(tokenizer: Tokenizer, context: int) -> PromptTokenizer:
    """Of the small language models, whose texts are sentences: a period ends one, as a newline does with OPT."""
    return PromptTokenizer(
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        start=(tokenizer.start,),
        stop=(tokenizer.encode("a.")[-1], tokenizer.end),
        pad=tokenizer.pad,
        context=context,
    )


def load_prompt_tokenizer(tokenizer: LanguageTokenizer, context: int) -> PromptTokenizer:
    """Of a published language model."""
    return PromptTokenizer(
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        start=() if tokenizer.start is None else (tokenizer.start,),
        stop=tuple(tokenizer.stops),
        pad=tokenizer.pad,
        context=context,
        behind=() if tokenizer.prompt_end is None else (tokenizer.prompt_end,),
    )
