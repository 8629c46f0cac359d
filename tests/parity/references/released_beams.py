"""The beam search of transformers before 4.31 (BLIP's release pins 4.15, ALBEF's 4.8), one prompt at a time and without
any cache: written from what its code computes, for tests alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def released_beams(
    next_scores: Callable[[list[int]], Tensor],
    prompt: Sequence[int],
    stop: int,
    beams: int,
    longest: int,
    shortest: int,
    penalty: float = 1.0,
) -> list[int]:
    """The text behind the prompt, without the stop token. next_scores: tokens -> log-probabilities of the next (V,);
    longest, shortest: tokens, with the prompt."""
    live, heap, done = [(0.0, list(prompt))], [], False  # heap: (score, tokens), at most `beams`, the worst first
    while not done and len(live[0][1]) < longest:
        length, offers = len(live[0][1]), []
        for total, tokens in live:
            scores = next_scores(tokens).clone()
            if length < shortest:
                scores[stop] = float("-inf")
            offers += [(total + score, tokens, token) for token, score in enumerate(scores.tolist())]
        offers = sorted(offers, key=lambda offer: -offer[0])[: 2 * beams]
        for total, tokens, token in offers[:beams]:
            if token == stop:
                heap = sorted([*heap, (total / length**penalty, tokens)], key=lambda text: text[0])[-beams:]
        live = [(total, [*tokens, token]) for total, tokens, token in offers if token != stop][:beams]
        done = len(heap) == beams and heap[0][0] >= offers[0][0] / length**penalty
    if not done:
        heap += [(total / len(tokens) ** penalty, tokens) for total, tokens in live]
    return max(heap, key=lambda text: text[0])[1][len(prompt) :]
