"""The tokenizer of a language model: prompts, answers, chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.core.errors import UserError

if TYPE_CHECKING:
    import tokenizers

# ---- tokenizers


class LanguageTokenizer:
    """A language model's own tokenizer. Special tokens written out in a text stand for their ids, as published.

    start         before every text (OPT, SmolLM2), None where the model knows no such token (T5)
    end           behind every answer
    pad           fills up a batch; `attention_mask` says where, so that no model reads it
    prompt_end    behind every prompt: what T5's encoder expects, otherwise None
    stops         ids that end a generated text
    """

    kind = "language-model"

    def __init__(
        self,
        pieces: tokenizers.Tokenizer,
        *,
        end: int,
        start: int | None = None,
        pad: int | None = None,
        prompt_end: int | None = None,
        template: str | None = None,
    ):
        """template: how a conversation is written out, in Jinja, as published with the model."""
        self.pieces, self.template = pieces, template
        self.start, self.end, self.prompt_end, self.stops = start, end, prompt_end, (end,)
        self._pad = pad
        self.vocab_size = pieces.get_vocab_size()
        self.digest = hashlib.sha256(pieces.to_str().encode()).hexdigest()

    @property
    def pad(self) -> int:
        if self._pad is None:
            raise UserError(f"this tokenizer has no pad token: set one first, as in tokenizer.pad = {self.end}")
        return self._pad

    @pad.setter
    def pad(self, token: int) -> None:
        self._pad = token

    def encode(self, text: str) -> list[int]:
        """The ids of one text, with nothing before or behind it."""
        return self.pieces.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without special tokens and without white space at its ends."""
        return self.pieces.decode([int(token) for token in ids], skip_special_tokens=True).strip()

    def prompts(self, texts: Sequence[str] | str, context: int, side: str = "left") -> tuple[Tensor, Tensor]:
        """What is to be gone on with: tokens (B, T) and attention_mask (B, T), padded on the `side`. A prompt of more
        than `context` tokens is a UserError: cut, it would ask something else."""
        return self._batch(texts, context, side, self.prompt_end, cut=False)

    def answers(self, texts: Sequence[str] | str, context: int, *, starts: bool = True) -> tuple[Tensor, Tensor]:
        """What is to be learned, `end` behind it: tokens (B, T) and attention_mask (B, T), padded on the right. One of
        more than `context` tokens loses its tail and keeps its end. starts: behind no prompt that has a
        `start` already."""
        return self._batch(texts, context, "right", self.end, cut=True, starts=starts)

    def _batch(
        self, texts: Sequence[str] | str, context: int, side: str, end: int | None, cut: bool, starts: bool = True
    ) -> tuple[Tensor, Tensor]:
        if side not in ("left", "right"):
            raise ValueError(f"side is 'left' or 'right', not {side!r}")
        before = [] if self.start is None or not starts else [self.start]
        behind = [] if end is None else [end]
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            row = [*before, *self.encode(text), *behind]
            if len(row) > context:
                if not cut:
                    raise UserError(f"a prompt of {len(row)} tokens, the context has room for {context}: shorten it")
                row = [*row[: context - 1], self.end]
            rows.append(row)
        longest = max(map(len, rows), default=0)
        ragged = any(len(row) < longest for row in rows)
        tokens = torch.full((len(rows), longest), self.pad if ragged else 0)
        attention_mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), None) if side == "left" else slice(len(row))
            tokens[index, place], attention_mask[index, place] = torch.tensor(row, dtype=torch.long), True
        return tokens, attention_mask

    def chat(self, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
        """A conversation [{"role": "user", "content": ...}, ...] written out by the model's template, ready for
        `encode`; reply: up to where the assistant's next words begin."""
        if self.template is None:
            raise UserError("this language model was published without a chat template: ask it by a plain prompt")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # the template comes out of a file

        # trimmed as transformers does, for which templates are written
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            return environment.from_string(self.template).render(messages=messages, add_generation_prompt=reply)
        except TemplateError as error:
            raise UserError(f"the chat template does not fit these messages: {error}") from None
