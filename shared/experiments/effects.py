"""What every paper's claims are written with: data shared by the arms of a seed, one training of an arm, what the first
seed leaves, and the effects and notes that are made of measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shared.core.paper_package import Context
from shared.core.recipe import Recipe, digest, training_fields
from shared.experiments.ablations import seeds_of
from shared.experiments.stage_cache import StageCache
from shared.training.callbacks import EvalAtSteps, MetricRecorder
from shared.training.trainer import fit
from shared.weights.load import save_weights

if TYPE_CHECKING:
    import lightning
    from lightning.pytorch.callbacks import Callback
    from torch import nn

    from shared.data.loader import Batches
    from shared.tokenizers.base import Tokenizer

T = TypeVar("T")
R = TypeVar("R", bound=Recipe)


def once_a_seed(make: Callable[[Any, int], T]) -> Callable[[Context], T]:
    """What arms share of one recipe and seed, made by the first that asks; the last is kept: jobs come seed by seed."""
    latest: dict[tuple[str, int], T] = {}

    def of(context: Context) -> T:
        key = (digest(context.recipe), context.seed)
        if key not in latest:
            latest.clear()
            latest[key] = make(context.recipe, context.seed)
        return latest[key]

    return of


# ---- the arms


def stages_of(context: Context, data_digest: str) -> StageCache:
    """What the arms of this recipe, seed and data make once."""
    name = f"{context.seed}-{digest(training_fields(context.recipe))}-{data_digest[:12]}"
    return StageCache(context.folder.parent / "stages" / name, context.seed)


def of_stage(recipe: R, steps: int, **changes: Any) -> R:
    """The recipe of one of an arm's trainings: so many steps, the warm-up no longer than a fifth of them."""
    return replace(recipe, steps=steps, warmup_steps=min(recipe.warmup_steps, max(1, steps // 5)), **changes)


def train_arm(
    context: Context,
    module: lightning.LightningModule,
    batches: Batches,
    identity: Mapping[str, str],
    recipe: Any = None,
    folder: Path | None = None,
    evals: Mapping[str, Callable[[], float]] | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict:
    """Train in the folder by the recipe, the context's where None. -> `curves` by samples seen, and `waited`.

    identity: tells this training from the seed's others, the digest of its data among it. evals: measured at the
    recipe's `measure_at` steps, each a curve of its name. callbacks: what else watches the training.
    """
    recipe, folder = recipe or context.recipe, folder or context.folder
    recorder = MetricRecorder(recipe.batch, context.progress)
    measured = {}
    if evals:
        steps = sorted({max(1, round(recipe.steps * (i + 1) / recipe.measure_at)) for i in range(recipe.measure_at)})
        measured = {name: EvalAtSteps(steps, recipe.batch, measure) for name, measure in evals.items()}
    of_arm = {"arm": context.arm, "seed": context.seed, **identity}
    waited = fit(module, batches, recipe, folder, [recorder, *measured.values(), *callbacks], of_arm)
    curves = recorder.values | {name: callback.values for name, callback in measured.items()}
    return {"curves": curves, "waited": round(waited, 5)}


def save_first_seed(context: Context, model: nn.Module, tokenizer: Tokenizer) -> None:
    """The first seed's model and tokenizer stay with the run: figures are drawn from them, users can load them."""
    if context.first:
        save_weights(model, context.folder / "model.safetensors", {"variant": context.recipe.model})
        tokenizer.save(context.folder / "tokenizer.json")


def first_seed_model(recipe: Recipe, folder: Path, *arms: str) -> tuple[str, Path] | None:
    """Of the arms the first whose model `save_first_seed` left in the folder of a run, and its file."""
    files = {arm: folder / "arms" / f"{arm}-{seeds_of(recipe)[0]}" / "model.safetensors" for arm in arms}
    return next(((arm, file) for arm, file in files.items() if file.is_file()), None)


# ---- effects, and what stands beside them


def difference(
    treatment: str, baseline: str, key: str, baseline_key: str = ""
) -> Callable[[dict[str, dict]], float | None]:
    """Treatment's `key` minus the baseline's (its `baseline_key` where given); None where the data allows no such
    measurement."""

    def effect(measured: dict[str, dict]) -> float | None:
        ours, theirs = measured[treatment].get(key), measured[baseline].get(baseline_key or key)
        return None if ours is None or theirs is None else ours - theirs

    return effect


def means(
    label: str = "{arm} {key}", digits: Mapping[str, int] | None = None, **keys: Sequence[str]
) -> Callable[[list[dict[str, dict]]], str]:
    """arm=(key, ...) -> 'arm key 12.3, ...', each averaged over the seeds that measured it.

    Counts (of parameters, of bytes) are whole numbers with thousands separated; digits: of other keys that want more
    or fewer than one behind the point.
    """

    def shown(seeds: list[dict[str, dict]]) -> str:
        parts = []
        for arm, wanted in keys.items():
            for key in wanted:
                values = [measured[arm][key] for measured in seeds if key in measured.get(arm, {})]
                if values:
                    mean = sum(values) / len(values)
                    places = (digits or {}).get(key, 0 if key.endswith(("parameters", "bytes")) else 1)
                    parts.append(f"{label.format(arm=arm, key=key)} {mean:{',' if not places else ''}.{places}f}")
        return ", ".join(parts)

    return shown
