"""Scores whose definition is part of their name: `task/metric@protocol`. Ties always count against the model."""

from shared.metrics.captioning import caption_scores
from shared.metrics.classification import (
    ZeroShotAccuracy,
    confusion,
    mean_per_class,
    topk_accuracy,
    zero_shot_classifier,
)
from shared.metrics.names import Scored, metric_name
from shared.metrics.pairs import (
    dialogue_ranking,
    nlvr2,
    nlvr2_statement,
    rerank,
    rerank_both,
    reranked_hits,
    reranked_points,
)
from shared.metrics.pope import pope
from shared.metrics.probe import Probe, few_shot, linear_probe
from shared.metrics.retrieval import RetrievalHits, retrieval_hits, retrieval_hits_from_features
from shared.metrics.vqa import exact_match, vqa_accuracy

__all__ = [
    "Probe",
    "RetrievalHits",
    "Scored",
    "ZeroShotAccuracy",
    "caption_scores",
    "confusion",
    "dialogue_ranking",
    "exact_match",
    "few_shot",
    "linear_probe",
    "mean_per_class",
    "metric_name",
    "nlvr2",
    "nlvr2_statement",
    "pope",
    "rerank",
    "rerank_both",
    "reranked_hits",
    "reranked_points",
    "retrieval_hits",
    "retrieval_hits_from_features",
    "topk_accuracy",
    "vqa_accuracy",
    "zero_shot_classifier",
]
