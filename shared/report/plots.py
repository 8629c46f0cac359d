"""The figures of a report, each returned as a `report.Figure` with a PNG: one style, colours safe for the colour-blind.
matplotlib and scikit-learn are imported when a figure is drawn; pyplot, with its global state, never is.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shared.core.errors import UserError
from shared.core.text import one_line
from shared.metrics.stats import PowerLaw
from shared.report.rows import Figure, Ranked, Sample

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from shared.data.dataset import RetrievalSet

# Okabe and Ito 2008, without the yellow that vanishes on white
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444"]
_RIGHT = {None: ("", "#1f2937"), True: ("✓ ", "#17663f"), False: ("✗ ", "#9d2a25")}  # mark and colour of a text
_MARKS = ["o", "s", "^", "D", "v", "P", "X"]
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": "#374151",
    "text.color": "#1f2937",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#9ca3af",
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


def curves(
    series: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    *,
    name: str = "Training curves",
    x_label: str = "step",
    y_label: str = "loss",
    caption: str | None = None,
) -> Figure:
    """{arm: one list of (x, y) a seed}: the mean over seeds as a line, the range from lowest to highest as a band."""
    import numpy as np

    with drawing(7, 4) as (figure, axes, png):
        for place, (arm, seeds) in enumerate(series.items()):
            seeds = [sorted(seed) for seed in seeds if len(seed)]
            if not seeds:
                raise UserError(f"figure {name!r}: arm {arm!r} has no points")
            colour, dash = _COLOURS[place % 7], ["-", "--", "-.", ":"][place // 7 % 4]
            # seeds may have logged at different steps: read all of them on the union, each within its own range only
            x = np.unique(np.concatenate([[point[0] for point in seed] for seed in seeds]).astype(float))
            lines = np.array([_read_at(x, np.array(seed, float)) for seed in seeds])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a step where every seed is NaN draws a gap
                mean, low, high = np.nanmean(lines, 0), np.nanmin(lines, 0), np.nanmax(lines, 0)
            mark = "o" if len(x) == 1 else None
            label = f"{arm} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
            axes.plot(x, mean, dash, color=colour, label=_plain(label), marker=mark)
            if len(seeds) > 1:
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        label_axes(axes, name, x_label, y_label)
        # many lines leave no free corner
        axes.legend(**({"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(series) > 4 else {}))
        figure.tight_layout()
    return Figure(
        name, caption or f"{name}. Line: mean over the seeds; band: from the lowest seed to the highest.", png()
    )


SPREAD = "Mean over seeds; the band spans the lowest and the highest seed."


def learning_curves(
    measured: Sequence[Mapping[str, Mapping]],
    metric: str,
    *,
    name: str,
    x_label: str = "pairs seen",
    y_label: str = "loss",
    caption: str = SPREAD,
    arms: Sequence[str] | None = None,
) -> list[Figure]:
    """The curves of a metric, a line an arm, of arms whose every training recorded it. -> one figure, or none.

    measured: {arm: what it measured, with {metric: [(x, y)]} as "curves"} of each seed; arms: these alone.
    """
    series = {}
    for arm in measured[0]:
        seeds = [outcome[arm]["curves"].get(metric) for outcome in measured if "curves" in outcome.get(arm, {})]
        if seeds and all(seeds) and (arms is None or arm in arms):
            series[arm] = seeds
    return [curves(series, name=name, x_label=x_label, y_label=y_label, caption=caption)] if series else []


def image_grid(
    cells: Sequence[tuple[Tensor | Image, Sequence[tuple[str, bool | None]]]],
    *,
    name: str,
    caption: str,
    columns: int = 4,
) -> Figure:
    """Pictures (3, H, W) uint8, each over its texts. True: ticked and green, False: crossed and red, None: neither.
    Below a picture are four lines, of which each text has its share; the rest of a longer one is left out."""
    rows = max(1, -(-len(cells) // columns))
    height = 2.9 * rows  # inches
    each = max(1, 4 // max((len(texts) for _, texts in cells), default=1))  # lines of a text
    with drawing(2.5 * columns, height, rows, columns) as (figure, axes, png):
        for place, panel in enumerate(axes.flat):
            panel.set_axis_off()
            if place >= len(cells):
                continue
            image, texts = cells[place]
            panel.imshow(
                image.permute(1, 2, 0).numpy() if hasattr(image, "permute") else image, interpolation="nearest"
            )
            for line, (text, right) in enumerate(texts):
                mark, colour = _RIGHT[right]
                written = _plain(_wrapped(mark + one_line(text), 38, each))
                y = -0.05 - 0.1 * each * line
                panel.text(
                    0.5, y, written, transform=panel.transAxes, ha="center", va="top", fontsize=7.5, color=colour
                )
        figure.subplots_adjust(left=0.02, right=0.98, top=0.98, bottom=0.9 / height, hspace=0.5, wspace=0.1)
    return Figure(name, caption, png())


def _wrapped(text: str, width: int, most: int) -> str:
    lines = textwrap.wrap(text, width) or [""]
    return "\n".join([*lines[: most - 1], lines[most - 1] + "…"] if len(lines) > most else lines)


def embedding_plane(
    image_features,
    text_features,
    labels,
    names: Sequence[str],
    *,
    name: str = "Pictures and words in one plane",
    most: int = 1000,
    seed: int = 0,
    caption: str | None = None,
) -> Figure:
    """t-SNE of pictures (N, D) and class words (C, D) together; `labels` (N,) index `names`; at most `most` pictures.

    Contrastive training leaves the two modalities in two separate cones; each is centred first, or the plane would
    only show that gap.
    """
    import numpy as np
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    images, words, labels = (_array(value) for value in (image_features, text_features, labels))
    if len(words) != len(names) or len(images) != len(labels):
        raise UserError(
            f"figure {name!r}: {len(images)} pictures, {len(labels)} labels, {len(words)} words, {len(names)} names: "
            "expected a label a picture and a name a word"
        )
    if len(images) > most:
        kept = np.sort(np.random.default_rng(seed).permutation(len(images))[:most])
        images, labels = images[kept], labels[kept]
    joint = np.concatenate([_centred(images), _centred(words)])
    perplexity = min(30.0, max(2.0, (len(joint) - 1) / 4))
    with threadpool_limits(
        1
    ):  # so few points gain nothing from threads, and on a busy machine they wait for each other
        plane = TSNE(perplexity=perplexity, init="pca", random_state=seed, metric="cosine").fit_transform(joint)

    with drawing(7.5, 6) as (figure, axes, png):
        from matplotlib.patheffects import withStroke

        for c in range(len(names)):
            colour, mark = _COLOURS[c % 7], _MARKS[c // 7 % 7]
            here = plane[: len(images)][labels == c]
            axes.scatter(*here.T, s=16, color=colour, marker=mark, alpha=0.55, linewidths=0)
            word = plane[len(images) + c]
            axes.scatter(*word, s=90, color=colour, marker=mark, edgecolors="black", linewidths=1.2, zorder=3)
            axes.annotate(
                _plain(names[c]),
                word,
                xytext=(6, 6),
                textcoords="offset points",
                fontsize=9 if len(names) <= 30 else 6,
                zorder=4,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        label_axes(axes, name, "", "")
        figure.tight_layout()
    default = (
        f"t-SNE of {len(images)} pictures (small) and {len(names)} words (outlined, named) in the joint space. Each "
        "modality is centred on its own mean and re-normalised first, which removes the constant gap between the two; "
        "distances are cosine, the axes have no unit."
    )
    return Figure(name, caption or default, png())


def confusion_matrix(
    matrix, names: Sequence[str], *, name: str = "Confusion matrix", caption: str | None = None
) -> Figure:
    """Counts (C, C), row = truth, column = answer; colour is the share of the row."""
    import numpy as np

    counts = _array(matrix).astype(float)
    if counts.shape != (len(names), len(names)):
        raise UserError(f"figure {name!r}: matrix is {counts.shape} for {len(names)} names")
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(9.0, max(4.5, 0.42 * len(names) + 2.2))
    with drawing(side + 0.8, side) as (figure, axes, png):
        drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        if len(names) <= 60:
            ticks = {"ticks": range(len(names)), "labels": [_plain(n) for n in names]}
            size = 9 if len(names) <= 20 else 5.5
            axes.set_xticks(**ticks, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
            axes.set_yticks(**ticks, fontsize=size)
        if len(names) <= 15:
            for i, j in np.argwhere(counts > 0):
                ink = "white" if share[i, j] > 0.55 else "#1f2937"
                axes.text(j, i, f"{counts[i, j]:g}", ha="center", va="center", fontsize=8, color=ink)
        figure.colorbar(drawn, ax=axes, label="share of the true class", fraction=0.046, pad=0.03).outline.set_visible(
            False
        )
        label_axes(axes, name, "answer", "truth")
        figure.tight_layout()
    default = f"{name}: {counts.sum():g} answers, row = truth, column = answer, coloured by the share of the row."
    return Figure(name, caption or default, png())


def log_log(
    x: Sequence[float],
    y: Sequence[float],
    fit: PowerLaw,
    *,
    name: str = "Scaling",
    x_label: str = "compute",
    y_label: str = "error",
    caption: str | None = None,
) -> Figure:
    """Points and their fitted power law (`stats.log_log_fit`) on logarithmic axes."""
    import numpy as np

    xs, ys = _array(x).astype(float), _array(y).astype(float)
    with drawing(6.5, 4.2) as (figure, axes, png):
        line = np.geomspace(xs.min(), xs.max(), 50)
        label = f"slope {fit.slope:.3f}, $R^2$ {fit.r2:.3f}"
        axes.plot(line, 10**fit.intercept * line**fit.slope, color=_COLOURS[1], label=label)
        axes.scatter(xs, ys, s=36, color=_COLOURS[0], zorder=3, label=f"measured ({len(xs)} points)")
        axes.set(xscale="log", yscale="log")
        label_axes(axes, name, x_label, y_label)
        axes.legend()
        figure.tight_layout()
    default = f"{name}: {y_label} against {x_label}, both logarithmic, with the least-squares power law."
    return Figure(name, caption or default, png())


def bars(
    effects: Mapping[str, tuple[float, float | None, float | None]],
    *,
    name: str = "Effects",
    x_label: str = "effect (treatment minus baseline)",
    caption: str | None = None,
) -> Figure:
    """{arm or claim: (mean, low, high)} as `stats.interval` gives it: a bar, its interval, the line of no effect."""
    if not effects:
        raise UserError(f"figure {name!r}: no effects to draw")
    with drawing(7, 1.4 + 0.45 * len(effects)) as (figure, axes, png):
        for place, (mean, low, high) in enumerate(effects.values()):
            axes.barh(place, mean, height=0.55, color=_COLOURS[0], alpha=0.75)
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color="#111827", linewidth=1.6)
                axes.plot([low, high], [place, place], "|", color="#111827", markersize=8)
        axes.axvline(0, color="#374151", linewidth=1)
        axes.set_yticks(range(len(effects)), [_plain(_short(label)) for label in effects])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        label_axes(axes, name, x_label, "")
        figure.tight_layout()
    return Figure(name, caption or f"{name}: mean over paired seeds with its 95 % interval; zero is no effect.", png())


@contextmanager
def drawing(width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[tuple]:
    """(figure, axes, png()) in the house style, axes an array where there are several; call `png` after the block."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script the font lacks
        figure = Canvas(figsize=(width, height), dpi=130)
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns), content.getvalue
        # transparent, so that the page chooses the ground; no software tag, so that equal data give equal files
        figure.savefig(content, format="png", transparent=True, metadata={"Software": None})


def label_axes(axes, name: str, x_label: str, y_label: str) -> None:
    axes.set_title(_plain(name), pad=10)
    axes.set_xlabel(_plain(x_label))
    axes.set_ylabel(_plain(y_label))


def _read_at(x, points):
    """The line through the points (N, 2) at every x within its range, NaN beyond."""
    import numpy as np

    return np.interp(x, points[:, 0], points[:, 1], left=np.nan, right=np.nan)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar would open mathematics


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _centred(x):
    import numpy as np

    def unit(v):
        return v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)

    x = unit(x.astype(float))
    return unit(x - x.mean(0, keepdims=True))


def _array(value):
    import numpy as np

    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def retrieval_examples(
    scores: Tensor,
    images: Tensor,
    queries: Sequence[str],
    texts: Sequence[str],
    right: Callable[[int, int], bool],
    *,
    examples: int = 6,
    most: int = 5,
) -> list[Sample]:
    """Some of the pictures (I, 3, H, W), evenly spread, with the texts (T) that their rows of scores (I, T) rank first.

    queries: what each picture shows; right: whether picture i and text t belong together; most: texts of a picture.
    """
    samples = []
    for row in range(0, len(images), max(1, len(images) // examples))[:examples]:
        best = scores[row].topk(min(most, scores.shape[1]))
        ranked = [
            Ranked(texts[i], round(float(score), 3), right(row, i))
            for score, i in zip(best.values, best.indices.tolist(), strict=True)
        ]
        samples.append(Sample(png(images[row]), queries[row], ranked))
    return samples


def ranked_captions(scores: Tensor, eval_set: RetrievalSet, most: int) -> list[Sample]:
    """`retrieval_examples` of a set; right are a picture's own texts."""
    queries, owner = [texts[0] for texts in eval_set.references], eval_set.owner.tolist()
    right = lambda row, text: owner[text] == row  # noqa: E731
    return retrieval_examples(scores, eval_set.images, queries, eval_set.texts, right, most=most)


def png(image: Tensor, size: int = 96) -> bytes:
    """uint8 (3, H, W) -> PNG bytes, enlarged without smoothing."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((size, size), Image.Resampling.NEAREST).save(
        buffer, "PNG"
    )
    return buffer.getvalue()
