"""What CLIP's report shows beside its rows: learning curves, scaling, the joint space, confusions, retrieval."""

from __future__ import annotations

from pathlib import Path

from papers.clip.data import ExperimentData, build_data
from papers.clip.encode import classifier, image_features, text_features
from papers.clip.evidence.claims import LADDER, TEMPLATE, ladder_points
from papers.clip.recipe import ClipRecipe
from papers.clip.weights import load_file
from shared.experiments.ablations import seeds_of
from shared.metrics import confusion
from shared.metrics.stats import log_log_fit
from shared.report import plots as figures
from shared.report.rows import Figure, Sample


def draw(recipe: ClipRecipe, outcomes: dict[int, dict[str, dict]], folder: Path) -> tuple[list[Figure], list[Sample]]:
    """All figures that this run's arms and data allow; the model shown is the contrastive arm of the first seed."""
    drawn = []
    measured = list(outcomes.values())
    for name, y_label in (("accuracy", "zero-shot top-1"), ("loss", "training loss")):
        series = {}
        for arm in measured[0]:
            curves = [one[arm]["curves"].get(name) for one in measured if "curves" in one[arm]]
            if curves and all(curves) and (name == "accuracy" or arm == "contrastive"):
                series[arm] = curves
        if series:
            caption = "Mean over seeds; the band spans the lowest and the highest seed."
            title = "Learning curves" if name == "accuracy" else "Contrastive loss"
            drawn.append(figures.curves(series, name=title, caption=caption, x_label="pictures seen", y_label=y_label))
    if all(arm in measured[0] for arm in LADDER):
        points = [points for one in measured if (points := ladder_points(one))]
        if points:
            x = [value for compute, _ in points for value in compute]
            y = [value for _, error in points for value in error]
            drawn.append(
                figures.log_log(
                    x, y, log_log_fit(x, y), name="Error over compute", x_label="training FLOPs", y_label="top-1 error"
                )
            )
    weights = folder / "arms" / f"contrastive-{seeds_of(recipe)[0]}" / "model.safetensors"
    if not weights.is_file():
        return drawn, []
    data = build_data(recipe, seeds_of(recipe)[0])
    model = load_file(weights, data.config)
    split = data.dataset.class_test if data.dataset.classes else None
    if split is not None:
        features = image_features(model, split.images)
        names = text_features(model, data.tokenizer, [TEMPLATE.format(phrase) for phrase in data.phrases])
        drawn.append(
            figures.embedding_plane(features, names, split.labels, data.dataset.classes, name="The joint space (t-SNE)")
        )
        head = classifier(model, data.tokenizer, data.phrases, [TEMPLATE])
        table = confusion(features @ head.T, split.labels)
        drawn.append(figures.confusion_matrix(table, data.dataset.classes, name="Zero-shot confusion"))
    return drawn, retrieval_examples(model, data)


def retrieval_examples(model, data: ExperimentData) -> list[Sample]:
    """Test pictures with the captions that the model ranks first among all test captions, each wording once."""
    test = data.dataset.test
    captions = [several[0] for several in test.captions]
    texts = list(dict.fromkeys(captions))  # of labelled pictures many are worded alike
    scores = image_features(model, test.images) @ text_features(model, data.tokenizer, texts).T  # (I, T)
    return figures.retrieval_examples(scores, test.images, captions, texts, lambda row, i: texts[i] == captions[row])
