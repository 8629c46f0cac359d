"""What CLIP's report shows beside its rows: learning curves, scaling, the joint space, confusions, retrieval."""

from __future__ import annotations

from pathlib import Path

from papers.clip.data import ExperimentData, build_data
from papers.clip.encode import classifier, image_features, text_features
from papers.clip.evidence.claims import LADDER, TEMPLATE, ladder_points
from papers.clip.recipe import ClipRecipe
from papers.clip.weights import load_file
from shared.experiments.ablations import seeds_of
from shared.experiments.effects import first_seed_model
from shared.metrics import confusion
from shared.metrics.stats import log_log_fit
from shared.report import plots
from shared.report.rows import Figure, Sample


def draw(recipe: ClipRecipe, outcomes: dict[int, dict[str, dict]], folder: Path) -> tuple[list[Figure], list[Sample]]:
    """All figures that this run's arms and data allow; the model shown is the contrastive arm of the first seed."""
    measured, axis = list(outcomes.values()), "pictures seen"
    drawn = plots.learning_curves(
        measured, "accuracy", name="Learning curves", x_label=axis, y_label="zero-shot top-1"
    ) + plots.learning_curves(
        measured, "loss", name="Contrastive loss", x_label=axis, y_label="training loss", arms=["contrastive"]
    )
    if all(arm in measured[0] for arm in LADDER):
        drawn += scaling(measured)
    left = first_seed_model(recipe, folder, "contrastive")
    if left is None:
        return drawn, []
    data = build_data(recipe, seeds_of(recipe)[0])
    model = load_file(left[1], data.config)
    split, classes = data.dataset.class_test, data.dataset.classes
    if classes and split is not None:
        features = image_features(model, split.images)
        names = text_features(model, data.tokenizer, [TEMPLATE.format(phrase) for phrase in data.phrases])
        drawn.append(plots.embedding_plane(features, names, split.labels, classes, name="The joint space (t-SNE)"))
        head = classifier(model, data.tokenizer, data.phrases, [TEMPLATE])
        table = confusion(features @ head.T, split.labels)
        drawn.append(plots.confusion_matrix(table, classes, name="Zero-shot confusion"))
    return drawn, retrieval_examples(model, data)


def scaling(measured: list[dict[str, dict]]) -> list[Figure]:
    points = [points for outcome in measured if (points := ladder_points(outcome))]
    x = [value for compute, _ in points for value in compute]
    y = [value for _, error in points for value in error]
    labels = {"name": "Error over compute", "x_label": "training FLOPs", "y_label": "top-1 error"}
    return [plots.log_log(x, y, log_log_fit(x, y), **labels)] if points else []


def retrieval_examples(model, data: ExperimentData) -> list[Sample]:
    """Test pictures with the captions that the model ranks first among all test captions, each wording once."""
    test = data.dataset.test
    captions = [several[0] for several in test.captions]
    texts = list(dict.fromkeys(captions))  # of labelled pictures many are worded alike
    scores = image_features(model, test.images) @ text_features(model, data.tokenizer, texts).T  # (I, T)
    return plots.retrieval_examples(scores, test.images, captions, texts, lambda row, i: texts[i] == captions[row])
