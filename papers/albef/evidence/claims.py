"""The arms of ALBEF's claims: each pre-trains one model from (recipe, seed) and measures it; a claim compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from papers.albef.config import Objective
from papers.albef.data import EvalSet, ExperimentData, Pairs, data_of, load, more_pairs, pairs_of
from papers.albef.encode import encode_pictures, encode_texts, pools_score
from papers.albef.evidence.grounding import pointing
from papers.albef.evidence.transfer import transfer
from papers.albef.model import Albef, AlbefPretraining
from papers.albef.module import AlbefModule
from shared.core.device import device_for
from shared.core.paper_package import Claim, Context
from shared.data.loader import Batches
from shared.data.recipe import labelled_pictures
from shared.experiments.effects import difference, means, save_first_seed, stages_of, train_arm
from shared.training.simple import fit_classifier
from shared.weights.load import load_weights, save_weights

__all__ = ["ARMS", "CLAIMS", "load"]

WRONG = 0.25  # share of wrong captions in the arms with noise
LEVELS = (0.0, WRONG, 0.5)  # of the dose-response
MORE = 3.5  # times the pairs: 14M pictures over 4M

FUSED = Objective(itc=False, negatives="random", alpha_itc=0, alpha_mlm=0)
ALIGNED = Objective(negatives="random", alpha_itc=0, alpha_mlm=0)
HARD = Objective(alpha_itc=0, alpha_mlm=0)
DISTILLED_ITC = Objective(alpha_mlm=0)
DISTILLED = Objective()  # the whole of it


@dataclass(frozen=True)
class Arm:
    """What an arm trains by, on which captions; more: on MORE times the pairs, the added ones with wrong captions.

    every: rank all candidates by ITM too, since without ITC there is nothing to choose some by.
    """

    objective: Objective
    wrong: float = 0.0
    more: bool = False
    every: bool = False

    def __call__(self, context: Context) -> dict:
        data, recipe = data_of(context), context.recipe
        if self.more:
            pairs = more_pairs(data, recipe, context.seed, MORE, self.wrong)
        else:
            pairs = pairs_of(data, self.wrong, context.seed)
        model = new_model(context, data)
        trained = train(context, data, AlbefModule(AlbefPretraining(model), recipe, self.objective), pairs)
        measured = measure(model, data, data.test, recipe.candidates, self.every)
        if not self.objective.itc:
            measured = {name: value for name, value in measured.items() if name == "itm_all"}
        if context.first:
            measured |= pointing(model, data)
            if self == ARMS["distilled"]:
                measured |= transfer(model, data, recipe, context.seed)
        save_first_seed(context, model, data.tokenizer)
        return trained | measured | {"wrong_captions": pairs.wrong, "pairs": len(pairs.tokens)}


def new_model(context: Context, data: ExperimentData) -> Albef:
    """The same numbers for every arm of a seed, whatever was drawn before.

    The paper's image encoder comes from DeiT, trained to tell ImageNet's classes apart (Sec. 3.1); a classifier of
    further pictures of the same scenes stands for it, made once a seed.
    """
    torch.manual_seed(context.seed)
    model, recipe, dataset = Albef(data.config), context.recipe, data.dataset
    if not recipe.vision_steps or dataset.class_train is None:
        return model

    def make(folder: Path) -> None:
        start = Albef(data.config).to(device_for(recipe))
        labelled = labelled_pictures(recipe, dataset, context.seed)
        encoder = fit_classifier(start.vision_encoder, start.encode_image, labelled, recipe, warmup=0.05)
        save_weights(encoder, folder / "vision.safetensors")

    folder = stages_of(context, dataset.digest).get_or_build("vision", make)
    load_weights(model.vision_encoder, folder / "vision.safetensors")
    return model


def train(context: Context, data: ExperimentData, module: AlbefModule, pairs: Pairs) -> dict:
    """-> `curves` by pairs seen, `r1` on validation among them, and `waited`."""
    recipe, model = context.recipe, module.model.student
    candidates = recipe.candidates if module.objective.itc else recipe.pool

    def validated() -> float:
        return measure(model, data, data.val, candidates, False)["itm"]

    batches = Batches(pairs.tensors, recipe.batch, recipe.steps, context.seed, accumulate=recipe.accumulate)
    return train_arm(context, module, batches, {"data": data.dataset.digest}, evals={"r1": validated})


def measure(model: Albef, data: ExperimentData, eval_set: EvalSet, candidates: int, every: bool) -> dict:
    """`itc`, `itm`: R@1 in points before and after re-ranking the best `candidates`; `itm_all`: after ranking all."""
    pictures, texts = encode_pictures(model, eval_set.images), encode_texts(model, data.tokens(eval_set.captions))
    scores = pools_score(model, pictures, texts, eval_set.pools, candidates)
    measured = {"itc": scores.itc, "itm": scores.itm}
    if every:
        largest = max(map(len, eval_set.pools))
        measured["itm_all"] = pools_score(model, pictures, texts, eval_set.pools, largest).itm
    return measured


ARMS: dict[str, Callable[[Context], dict]] = {
    "fused": Arm(FUSED, every=True),
    "aligned": Arm(ALIGNED, every=True),
    "hard": Arm(HARD),
    "distilled": Arm(DISTILLED),
    "hard_wrong_25": Arm(HARD, WRONG),
    "distilled_itc_wrong_25": Arm(DISTILLED_ITC, WRONG),
    "distilled_wrong_25": Arm(DISTILLED, WRONG),
    "hard_wrong_50": Arm(HARD, LEVELS[2]),
    "distilled_wrong_50": Arm(DISTILLED, LEVELS[2]),
    "distilled_more": Arm(DISTILLED, WRONG, more=True),
}
DOSES = (("hard", "distilled"), ("hard_wrong_25", "distilled_wrong_25"), ("hard_wrong_50", "distilled_wrong_50"))


# ---- effects


def more_data(measured: dict[str, dict]) -> float | None:
    """None where the set does not hold so many more pairs."""
    few, more = measured["distilled"], measured["distilled_more"]
    return more["itm"] - few["itm"] if more["pairs"] >= 0.95 * MORE * few["pairs"] else None


def gains(measured: dict[str, dict]) -> list[tuple[float, float]]:
    """(share of wrong captions as drawn, points that distillation gains there), least noise first."""
    return [
        (measured[distilled]["wrong_captions"], measured[distilled]["itm"] - measured[plain]["itm"])
        for plain, distilled in DOSES
    ]


def gain_slope(measured: dict[str, dict]) -> float:
    """Least-squares slope of distillation's gain, in points per 10 % of wrong captions."""
    points = gains(measured)
    middle = sum(x for x, _ in points) / len(points)
    return sum((x - middle) * y for x, y in points) / sum((x - middle) ** 2 for x, _ in points) / 10


def gains_shown(seeds: list[dict[str, dict]]) -> str:
    parts = []
    for points in zip(*map(gains, seeds), strict=True):
        wrong, gain = (sum(values) / len(values) for values in zip(*points, strict=True))
        parts.append(f"{100 * wrong:.0f} % wrong {gain:+.1f}")
    return f"gain at {', '.join(parts)}"


def better(treatment: str, baseline: str, key: str = "itm") -> Claim:
    note = means(f"{{arm}} {key.replace('_', ' ')}", **{baseline: (key,), treatment: (key,)})
    return Claim((baseline, treatment), difference(treatment, baseline, key), shown=note)


CLAIMS: dict[str, Claim] = {
    "albef.itc": better("aligned", "fused", "itm_all"),
    "albef.hard_negatives": better("hard", "aligned"),
    "albef.mod_itc": better("distilled_itc_wrong_25", "hard_wrong_25"),
    "albef.mod_mlm": better("distilled_wrong_25", "distilled_itc_wrong_25"),
    "albef.noise": Claim(tuple(arm for pair in DOSES for arm in pair), gain_slope, shown=gains_shown),
    "albef.itm_rerank": Claim(("hard",), difference("hard", "hard", "itm", "itc"), shown=means(hard=("itc", "itm"))),
    "albef.data_4m_14m": Claim(
        ("distilled", "distilled_more"),
        more_data,
        f"{MORE} times the recipe's pairs (lower pairs)",
        means(distilled=("itm",), distilled_more=("itm",)),
    ),
}
