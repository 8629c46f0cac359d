"""Text from a causal model: greedy, beam search, and sampling from the most likely words.

Nucleus sampling: Holtzman et al. 2020 (arXiv:1904.09751), Sec. 3.1. Repetition penalty: Keskar et al. 2019 (CTRL,
arXiv:1909.05858), Sec. 4.1. Beam search scores and stops as transformers' `generate` does, which the published
captioning codes call; its rule changed over the years, and a release counts with the one of its version
(RELEASED_BEAMS). Axes: B prompts, T prompt tokens, R rows at work, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from shared.core.errors import UserError


class Decoding(Protocol):
    """A causal model at work on one batch of prompts, its keys and values kept; logits in fp32.

    Put the model into eval mode first, or its dropout speaks too. One that has `prefixed` = True stands behind a
    prefix of embeddings (shared/nn/causal_lm.py): its prompts may be empty, and penalties do not count the prefix. One
    whose prompts are read by an encoder says in `decoder_start` which token its texts begin behind: that alone counts.
    """

    def prefill(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Prompts (B, T), attention_mask (B, T) bool, False at padding on either side -> logits of the next token
        (B, V)."""

    def step(self, tokens: Tensor) -> Tensor:
        """One more token a row (R,) -> logits of the next (R, V)."""

    def select(self, rows: Tensor, contexts: Tensor | None = None) -> None:
        """Keep these of the present rows, in this order; they may repeat.

        contexts: which rows of what the text is about (pictures) stay; all where None. Always R = beams x contexts,
        the beams of one context in succession.
        """


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue a prompt. Lengths count new tokens only, the stop token included, padding and prompt never.

    transformers' max_length and min_length count the prompt too: max_new_tokens = max_length - prompt tokens (BLIP's
    captions: 20 - 4 = 16 after "[DEC] a picture of"), min_new_tokens = max(0, min_length - prompt tokens).

    stop                 any of these ends a text
    min_new_tokens       no stop token among the first so many
    beams                1: greedy, or sampling where `sample`; more: beam search, scored by
                         sum of log-probabilities / (length ** length_penalty)
    length_counts        what that length is: "new" tokens, the stop token among them (transformers since 4.36), or
                         "all" tokens of prompt and text without it (before)
    early_stopping       a beam search ends as soon as `beams` texts are complete; otherwise by `stopping`
    stopping             "unfinished": not before the best unfinished text, at its present length, scores no better than
                         the worst complete one; at the limit of tokens a text counts that is among the `beams` best.
                         "candidates" (transformers before 4.31): not before the best continuation, a complete one too,
                         over the length before it, scores no better; at the limit every unfinished text counts
    temperature, top_k, top_p   sampling: divide logits; keep the k likeliest (0: all; transformers' default, where a
                         code names none, is 50); then the fewest likeliest that hold this much probability
    repetition_penalty   of every token of prompt and text: a positive logit is divided, a negative one multiplied
                         (in beam search log-probabilities are, as transformers does)
    no_repeat_ngram      no n-gram of prompt and text occurs twice (0: free)
    """

    stop: tuple[int, ...]
    max_new_tokens: int
    min_new_tokens: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    length_counts: Literal["new", "all"] = "new"
    early_stopping: bool = False
    stopping: Literal["unfinished", "candidates"] = "unfinished"
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {getattr(self, name)}, must be {rule}"
            for name, holds, rule in (
                ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
                ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
                ("beams", self.beams >= 1, "at least 1"),
                ("length_counts", self.length_counts in ("new", "all"), "new or all"),
                ("stopping", self.stopping in ("unfinished", "candidates"), "unfinished or candidates"),
                ("sample", not (self.sample and self.beams > 1), "false with beams > 1"),
                ("temperature", self.temperature > 0, "above 0"),
                ("top_k", self.top_k >= 0, "0 or more"),
                ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
                ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
                ("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 or more"),
            )
            if not holds
        ]
        if wrong:
            raise UserError(f"generation: {'; '.join(wrong)}")


# The beam search of transformers before 4.31: what BLIP (4.15), ALBEF (4.8) and LAVIS at BLIP-2's release (4.25) call.
RELEASED_BEAMS: dict[str, Any] = {"length_counts": "all", "stopping": "candidates"}


class Generated(NamedTuple):
    """One entry a prompt, in their order."""

    tokens: list[list[int]]  # new tokens, without the stop token
    scores: list[float]
    """Beam search: as GenerationSettings says. Otherwise the log-probability of the new tokens, stop included, under
    the model itself: before temperature, penalties and filters."""
    stopped: list[bool]  # by a stop token, not by max_new_tokens


@torch.inference_mode()
def generate(
    decoding: Decoding,
    prompts: Tensor,
    settings: GenerationSettings,
    *,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Continue prompts (B, T), attention_mask (B, T) bool False at padding on either side (all present where None).

    A text that is complete leaves the batch at once. Sampling takes one seed a prompt from `generator` (a CPU one;
    torch's global one where None), in their order: what is sampled depends on no other prompt, and cutting a data set
    into larger or smaller batches changes nothing. Raises UserError for an empty prompt (but behind a prefix) or too
    small a vocabulary.
    """
    attention_mask = torch.ones_like(prompts, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    histories = [row[real].tolist() for row, real in zip(prompts.cpu(), attention_mask.cpu(), strict=True)]
    if [] in histories and not getattr(decoding, "prefixed", False):
        raise UserError(f"generation: prompt {histories.index([])} of the batch is empty; give at least a start token")
    if not histories:
        return Generated([], [], [])
    if hasattr(decoding, "decoder_start"):
        histories = [[decoding.decoder_start] for _ in histories]
    logits = decoding.prefill(prompts, attention_mask)
    if settings.beams > 1:
        return _beam_search(decoding, logits, histories, settings)
    return _one_by_one(decoding, logits, histories, settings, generator)


def _one_by_one(
    decoding: Decoding,
    logits: Tensor,
    histories: list[list[int]],
    settings: GenerationSettings,
    generator: torch.Generator | None,
) -> Generated:
    """Greedy or sampled: one row a prompt. logits (B, V) after the prompts."""
    found = Generated([[] for _ in histories], [0.0] * len(histories), [False] * len(histories))
    chance = chances(len(histories), settings, generator) if settings.sample else None  # (B, max_new_tokens)
    rows = list(range(len(histories)))  # which prompt each row continues
    for count in range(settings.max_new_tokens):
        scores = _adjusted(logits, [histories[row] + found.tokens[row] for row in rows], count, settings)
        chosen = (
            draw(filtered(scores, settings), chance[rows, count]) if chance is not None else scores.argmax(1)
        )  # (R,)
        gained = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1)  # (R,)
        going = []  # places in rows
        for place, (row, token, gain) in enumerate(zip(rows, chosen.tolist(), gained.tolist(), strict=True)):
            found.scores[row] += gain
            if token in settings.stop:
                found.stopped[row] = True
            else:
                found.tokens[row].append(token)
                going.append(place)
        if not going or count + 1 == settings.max_new_tokens:
            return found
        if len(going) < len(rows):
            kept = torch.tensor(going, device=logits.device)
            decoding.select(kept, kept)
            rows, chosen = [rows[place] for place in going], chosen[kept]
        logits = decoding.step(chosen)
    raise AssertionError("max_new_tokens is at least 1")


class _Beam(NamedTuple):
    score: float  # sum of log-probabilities while it runs, divided by the length once complete
    tokens: list[int]
    stopped: bool = False


def _beam_search(
    decoding: Decoding, logits: Tensor, histories: list[list[int]], settings: GenerationSettings
) -> Generated:
    """Beam search on every prompt, `beams` rows each after the first token. logits (B, V) after the prompts."""
    beams = settings.beams
    # Enough candidates that `beams` of them go on even if every beam may also stop, in each way.
    width = max(2, 1 + len(settings.stop)) * beams
    if width > logits.shape[1]:
        raise UserError(f"generation: {beams} beams choose among {width} words, the vocabulary has {logits.shape[1]}")
    complete: list[list[_Beam]] = [[] for _ in histories]
    running = {index: [_Beam(0.0, [])] for index in range(len(histories))}  # of each unfinished prompt
    for count in range(settings.max_new_tokens):
        rows = [(index, beam) for index, those in running.items() for beam in those]
        texts = [histories[index] + beam.tokens for index, beam in rows]
        past = torch.tensor([beam.score for _, beam in rows], device=logits.device)
        candidates = _candidates(logits, past, len(running), width, texts, count, settings)
        last = count + 1 == settings.max_new_tokens
        went, parents, kept = {}, [], []  # parents: rows to go on from; kept: places of prompts that go on
        for place, (index, those) in enumerate(running.items()):
            before = count + (len(histories[index]) if settings.length_counts == "all" else 0)
            ranked = candidates[place][:beams] if last and settings.stopping == "unfinished" else candidates[place]
            going: list[tuple[int, _Beam]] = []  # (row, beam), best first
            for rank, (score, parent, token) in enumerate(ranked):
                tokens = those[parent].tokens
                if token not in settings.stop:
                    going.append((place * len(those) + parent, _Beam(score, [*tokens, token])))
                elif rank < beams:  # what stops further down only made room for what goes on
                    length = before + (settings.length_counts == "new")
                    complete[index].append(_Beam(score / length**settings.length_penalty, tokens, stopped=True))
            complete[index], going = _best(complete[index], beams), going[:beams]
            if settings.stopping == "candidates":
                reach = ranked[0][0] / max(1, before) ** settings.length_penalty
            else:
                reach = going[0][1].score / (before + 1) ** settings.length_penalty if going else -torch.inf
            done = len(complete[index]) == beams and (settings.early_stopping or reach <= complete[index][-1].score)
            if last and (settings.stopping == "unfinished" or not done):
                cut = [_Beam(beam.score / (before + 1) ** settings.length_penalty, beam.tokens) for _, beam in going]
                complete[index] = _best(complete[index] + cut, beams)
            elif not last and not done:
                went[index] = [beam for _, beam in going]
                parents += [row for row, _ in going]
                kept.append(place)
        if not went:
            break
        if parents != list(range(len(rows))):
            contexts = torch.tensor(kept, device=logits.device) if len(kept) < len(running) else None
            decoding.select(torch.tensor(parents, device=logits.device), contexts)
        running = went
        words = [beam.tokens[-1] for those in running.values() for beam in those]
        logits = decoding.step(torch.tensor(words, device=logits.device))
    best = [those[0] for those in complete]
    return Generated([b.tokens for b in best], [b.score for b in best], [b.stopped for b in best])


def _candidates(
    logits: Tensor,
    past: Tensor,
    prompts: int,
    width: int,
    texts: list[list[int]],
    count: int,
    settings: GenerationSettings,
) -> list[list[tuple[float, int, int]]]:
    """For each prompt its `width` best continuations: (score, which of its beams, token), best first.

    logits (R, V), past (R,) the scores so far, R = prompts x beams.
    """
    total = logits.logsumexp(1, keepdim=True)
    if _plain(count, settings):  # the normaliser is one number a row: subtract it from the few that matter
        best, tokens = logits.topk(width)  # (R, width)
        best = best - total
    else:
        best, tokens = _adjusted(logits - total, texts, count, settings).topk(width)
    best = (best + past[:, None]).view(prompts, -1)
    scores, places = best.topk(width)  # (prompts, width)
    tokens = tokens.view(prompts, -1).gather(1, places)
    columns = (scores.tolist(), (places // width).tolist(), tokens.tolist())
    return [list(zip(*column, strict=True)) for column in zip(*columns, strict=True)]


def _best(beams: list[_Beam], most: int) -> list[_Beam]:
    return sorted(beams, key=lambda beam: -beam.score)[:most]


def _plain(count: int, settings: GenerationSettings) -> bool:
    """Whether the model's scores stand as they are for the token after `count` new ones."""
    penalised = settings.repetition_penalty != 1 or settings.no_repeat_ngram
    return not penalised and count >= settings.min_new_tokens


def _adjusted(scores: Tensor, texts: list[list[int]], count: int, settings: GenerationSettings) -> Tensor:
    """Scores (R, V) after penalties and bans; texts: each row's tokens so far, prompt included."""
    if _plain(count, settings):
        return scores
    scores = scores.clone()
    if settings.repetition_penalty != 1:
        _penalise(scores, texts, settings.repetition_penalty)
    if settings.no_repeat_ngram:
        for row, text in enumerate(texts):
            scores[row, _repeating(text, settings.no_repeat_ngram)] = -torch.inf
    if count < settings.min_new_tokens:
        scores[:, list(settings.stop)] = -torch.inf
    return scores


def _penalise(scores: Tensor, texts: list[list[int]], penalty: float) -> None:
    longest = max(map(len, texts))
    if [] in texts:  # behind a prefix: at the first token of empty prompts
        for row, text in enumerate(texts):
            if text:
                _penalise(scores[row : row + 1], [text], penalty)
        return
    # Short texts are filled up with their own first token: penalised once all the same.
    used = torch.tensor([text + text[:1] * (longest - len(text)) for text in texts], device=scores.device)
    values = scores.gather(1, used)
    scores.scatter_(1, used, torch.where(values < 0, values * penalty, values / penalty))


def _repeating(text: list[int], n: int) -> list[int]:
    """The tokens that would complete an n-gram which the text already has."""
    start = text[len(text) - n + 1 :]
    return [text[i + n - 1] for i in range(len(text) - n + 1) if text[i : i + n - 1] == start]


def filtered(scores: Tensor, settings: GenerationSettings) -> Tensor:
    """Scores (R, V) over temperature, -inf outside the top_k and the top_p. Words that tie with the last kept stay."""
    scores = scores / settings.temperature
    if 0 < settings.top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(settings.top_k).values[:, -1:], -torch.inf)
    if settings.top_p < 1:
        ordered = scores.sort(descending=True).values
        weights = ordered.double().softmax(1)
        above = weights.cumsum(1) - weights  # of everything likelier
        kept = (above < settings.top_p).sum(1, keepdim=True)  # at least 1
        scores = scores.masked_fill(scores < ordered.gather(1, kept - 1), -torch.inf)
    return scores


def draw(scores: Tensor, chance: Tensor) -> Tensor:
    """One word a row of softmax(scores) (R, V), by chance (R,) in [0, 1). (R,)

    Inverts the distribution function in the order of the vocabulary, so that rounding moves an outcome by no more than
    its own size; sorted by likelihood, two words that nearly tie would swap.
    """
    heights = scores.double().softmax(1).cumsum(1)  # (R, V)
    at = torch.searchsorted(heights, chance.to(heights)[:, None] * heights[:, -1:], right=True)[:, 0]
    return at.clamp_max(scores.shape[1] - 1)


def chances(prompts: int, settings: GenerationSettings, generator: torch.Generator | None) -> Tensor:
    """Numbers in [0, 1), a stream of its own for every prompt (B, max_new_tokens)."""
    seeds = [int(torch.randint(2**62, (), generator=generator)) for _ in range(prompts)]
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(settings.max_new_tokens, generator=s, dtype=torch.float64) for s in streams])
