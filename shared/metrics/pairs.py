"""Scores over pairs and lists of candidates: NLVR2, retrieval re-ranked by image-text matching, visual dialogue.
Legend: N queries, M candidates, I images, T texts, k re-ranked candidates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from shared.metrics.classification import _ahead
from shared.metrics.names import metric_name
from shared.metrics.retrieval import retrieval_hits

RULES = ("itm", "itm+itc")
_UNSCORED = -100.0


def nlvr2(predictions: Sequence[bool], labels: Sequence[bool], statements: Sequence[Hashable]) -> dict[str, float]:
    """`nlvr2/acc@example` and `nlvr2/consistency@statement`, in 0..1: examples right, and statements of which every
    example (the same sentence over other image pairs) is right (Suhr et al. 2019, Sec. 5).

    `statements` tells which examples share a sentence: `nlvr2_statement` of their identifiers.
    """
    if not len(predictions) == len(labels) == len(statements):
        raise ValueError(
            f"{len(predictions)} predictions, {len(labels)} labels, {len(statements)} statements: expected as many each"
        )
    if not len(predictions):
        raise ValueError("no examples to score: predictions, labels and statements are empty")
    right = [bool(a) == bool(b) for a, b in zip(predictions, labels, strict=True)]
    together = defaultdict(list)
    for statement, hit in zip(statements, right, strict=True):
        together[statement].append(hit)
    return {
        metric_name("nlvr2", "acc", "example"): sum(right) / len(right),
        metric_name("nlvr2", "consistency", "statement"): sum(map(all, together.values())) / len(together),
    }


def nlvr2_statement(identifier: str) -> str:
    """`dev-850-0-1`, that is split-set-pair-sentence, -> `dev-850-1`: the same for all pairs of one sentence."""
    parts = identifier.split("-")
    if len(parts) != 4:
        raise ValueError(f"NLVR2 identifier is {identifier!r}, expected split-set-pair-sentence as in dev-850-0-1")
    return "-".join(parts[:2] + parts[3:])


def rerank(itc: Tensor, itm: Callable[[Tensor, Tensor], Tensor], k: int, rule: str) -> Tensor:
    """Re-score the `k` best candidates of every query (N, M) by image-text matching; the others get -100.

    `itc` is the cosine of the unit features, not divided by a temperature. `itm(queries (k,), candidates (k,))` gives
    the logit (k,) of "these two match". `itm`: that logit alone (ALBEF, released evaluation); `itm+itc`: the logit plus
    the cosine (BLIP's). k beyond M re-scores all. Returns (N, M), like `itc` in device, fp32.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, use one of {', '.join(RULES)}")
    if itc.ndim != 2 or itc.numel() == 0 or k < 1:
        raise ValueError(f"itc has shape {tuple(itc.shape)} and k is {k}, expected (queries, candidates) and k >= 1")
    if not itc.isfinite().all():
        raise ValueError(f"{int((~itc.isfinite()).sum())} of the similarities are not finite: no k best among them")
    scores = torch.full(itc.shape, _UNSCORED, device=itc.device)
    for query, row in enumerate(itc):
        similarity, chosen = row.topk(min(k, len(row)))
        score = itm(torch.full_like(chosen, query), chosen)
        if score.shape != chosen.shape:
            raise ValueError(f"itm gave shape {tuple(score.shape)} for {len(chosen)} pairs, expected one logit a pair")
        score = score.to(scores) + similarity.float() if rule == "itm+itc" else score.to(scores)
        if not (score > _UNSCORED).all():  # nor NaN
            raise ValueError(f"itm gave {score.min():.1f}, at or below the {_UNSCORED:.0f} of candidates never scored")
        scores[query, chosen] = score
    return scores


def rerank_both(itc: Tensor, itm: Callable[[Tensor, Tensor], Tensor], k: int, rule: str) -> tuple[Tensor, Tensor]:
    """`rerank` in both directions: itc (I, T), itm(images (k,), texts (k,)) -> scores (I, T) and (T, I)."""
    forth = rerank(itc, itm, k, rule)
    return forth, rerank(itc.T, lambda texts, images: itm(images, texts), k, rule)


def reranked_hits(
    i2t: Tensor, t2i: Tensor, text_to_image: Tensor, ks: Sequence[int] = (1, 5, 10), protocol: str = "itm"
) -> dict[str, float]:
    """`retrieval_hits` where each direction was re-ranked on its own: `i2t` (I, T), `t2i` (T, I).

    `protocol` should name rule and k, as `itm-k128`: both change the score.
    """
    if i2t.shape != t2i.T.shape:
        raise ValueError(f"i2t has shape {tuple(i2t.shape)}, t2i {tuple(t2i.shape)}: expected (I, T) and (T, I)")
    forth, back = (retrieval_hits(scores, text_to_image, ks, protocol) for scores in (i2t, t2i.T))
    return {name: (forth if name.startswith("retrieval/i2t_") else back)[name] for name in forth}


def reranked_points(
    i2t: Tensor, t2i: Tensor, itc: Mapping[str, float], text_to_image: Tensor, candidates: int
) -> dict[str, float]:
    """R@1 in points where the best `candidates` by contrast were re-ranked: `r1`, the mean of both directions, of which
    contrast alone gives `itc_r1`; `i2t_r1` and `t2i_r1`. itc: `retrieval_hits` at 1 of contrast alone."""
    protocol = f"itc-top{candidates}-itm+itc"
    hits = reranked_hits(i2t, t2i, text_to_image, ks=(1,), protocol=protocol)
    return {
        "r1": 50 * sum(hits.values()),
        "itc_r1": 50 * sum(itc.values()),
        "i2t_r1": 100 * hits[f"retrieval/i2t_r1@{protocol}"],
        "t2i_r1": 100 * hits[f"retrieval/t2i_r1@{protocol}"],
    }


def dialogue_ranking(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Rank of the human answer among the candidates of each round (Das et al. 2017, Sec. 4.3); ties rank ahead of it.

    `scores` (N, M), `labels` (N,): the answer's column. `visdial/mrr@rank-pessimistic` and `r1`, `r5`, `r10` in 0..1,
    `mean_rank` from 1 to M.
    """
    rank = 1 + _ahead(scores, labels)  # (N,)
    found = {"mrr": (1 / rank.double()).mean().item(), "mean_rank": rank.double().mean().item()}
    found |= {f"r{k}": (rank <= k).double().mean().item() for k in ks}
    return {metric_name("visdial", metric, "rank-pessimistic"): value for metric, value in found.items()}
