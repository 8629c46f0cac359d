"""Scores whose definition is part of their name: `task/metric@protocol`. Ties always count against the model."""

from shared.metrics.classification import (
    ZeroShotAccuracy,
    confusion,
    mean_per_class,
    topk_accuracy,
    zero_shot_classifier,
)
from shared.metrics.names import metric_name
from shared.metrics.probe import Probe, few_shot, linear_probe
from shared.metrics.retrieval import RetrievalHits, retrieval_hits, retrieval_hits_from_features

__all__ = [
    "Probe",
    "RetrievalHits",
    "ZeroShotAccuracy",
    "confusion",
    "few_shot",
    "linear_probe",
    "mean_per_class",
    "metric_name",
    "retrieval_hits",
    "retrieval_hits_from_features",
    "topk_accuracy",
    "zero_shot_classifier",
]
