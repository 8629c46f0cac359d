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


class CausalTexts(NamedTuple):
    """tokens (N, T), right-padded; attention_mask (N, T); prompt_length (N,): leading tokens of each that are given,
    not learned."""

    tokens: Tensor
    attention_mask: Tensor
    prompt_length: Tensor


class Seq2SeqTexts(NamedTuple):
    """tokens (N, T) for the decoder, prompts (N, A) for the encoder, with their masks. Both right-padded."""

    tokens: Tensor
    attention_mask: Tensor
    prompts: Tensor
    prompt_mask: Tensor


@dataclass(frozen=True)
class PromptTokenizer:
    """start: ids before every text; stop: ids that end one, of which the first is appended to what is learned; behind:
    ids after a prompt, which seq2seq models alone have (T5's encoder)."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    pad: int
    context: int
    behind: tuple[int, ...] = ()

    def begun(self, text: str) -> list[int]:
        return [*self.start, *self.encode(text)]

    def training_texts(
        self, texts: Sequence[tuple[str, str]], longest: int, queries: int = 0, seed: int = 0
    ) -> CausalTexts | Seq2SeqTexts:
        """(prompt, text behind it) -> tokens; the prompt may be empty. Cut to the `longest`, as the official code cuts
        to 32 (blip2_opt.py and blip2_t5.py, max_txt_len). UserError where they and the queries overflow the context.

        A start token is learned where the prompt is empty, and stands in front of one that is given (official code).
        seq2seq: prompt and text are cut each, and a text without a prompt is split at random, its first words the
        prompt and the others learned (Sec. 3.3), which the seed and its place decide.
        """
        encoded = self._seq2seq(texts, longest, seed) if self.behind else self._causal(texts, longest)
        width = (encoded.prompts if isinstance(encoded, Seq2SeqTexts) else encoded.tokens).shape[1]
        if queries + width > self.context:
            raise UserError(
                f"texts of {width} tokens behind {queries} queries, but the language model's context is "
                f"{self.context}: shorten the texts or take fewer queries"
            )
        return encoded

    def _causal(self, texts: Sequence[tuple[str, str]], longest: int) -> CausalTexts:
        rows, prompt_length = [], []
        for prompt, text in texts:
            before = self._prompt(prompt, longest)
            rows.append([*before, *self.encode(f" {text}" if prompt else text), self.stop[0]][:longest])
            prompt_length.append(len(before) if prompt else 0)
        return CausalTexts(*pad_rows(rows, self.pad), torch.tensor(prompt_length))

    def _seq2seq(self, texts: Sequence[tuple[str, str]], longest: int, seed: int) -> Seq2SeqTexts:
        prompts, targets = [], []
        for place, (prompt, text) in enumerate(texts):
            if prompt:
                before, behind = self._prompt(prompt, longest), text
            else:
                first_words, behind = split(text, SeededRandom("split", seed, place))
                before = [*self.start, *(self.encode(first_words) if first_words else [])]
            prompts.append([*before[: longest - len(self.behind)], *self.behind])
            targets.append([*self.encode(behind)[: longest - 1], self.stop[0]])
        return Seq2SeqTexts(*pad_rows(targets, self.pad), *pad_rows(prompts, self.pad))

    def _prompt(self, prompt: str, longest: int) -> list[int]:
        """The start and the prompt, if any. UserError where they leave no room for an answer."""
        tokens = [*self.start, *(self.encode(prompt) if prompt else [])]
        if prompt and len(tokens) >= longest:
            raise UserError(f"prompt '{prompt}' fills the {longest} tokens of a text: no room for an answer")
        return tokens

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
