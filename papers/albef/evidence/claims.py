"""The arms of ALBEF's claims: each pre-trains one model from (recipe, seed) and measures it; a claim compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from papers.albef.config import Objective
from papers.albef.data import EvalSet, ExperimentData, Pairs, data_of, load, more_pairs, pairs_of
from papers.albef.encode import encode_pictures, encode_texts, pools_score
from papers.albef.evidence.grounding import pointing
from papers.albef.evidence.start import new_model
from papers.albef.evidence.transfer import transfer
from papers.albef.model import Albef, AlbefPretraining
from papers.albef.module import AlbefModule
from shared.core.paper_package import Claim, Context
from shared.data.loader import Batches
from shared.training.callbacks import EvalAtSteps, MetricRecorder
from shared.training.trainer import fit

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
            keep(model, data, context)
        return trained | measured | {"wrong_captions": pairs.wrong, "pairs": len(pairs.tokens)}


def train(context: Context, data: ExperimentData, module: AlbefModule, pairs: Pairs) -> dict:
    """-> `curves` by pairs seen, `r1` on validation among them, and `waited`."""
    recipe, model = context.recipe, module.model.student
    every = recipe.pool if not module.objective.itc else recipe.candidates

    def validated() -> float:
        return measure(model, data, data.val, every, False)["itm"]

    curves = MetricRecorder(recipe.batch, context.progress)
    steps = sorted({max(1, round(recipe.steps * (i + 1) / recipe.measure_at)) for i in range(recipe.measure_at)})
    scored = EvalAtSteps(steps, recipe.batch, validated)
    batches = Batches(pairs.tensors, recipe.batch, recipe.steps, context.seed, accumulate=recipe.accumulate)
    identity = {"arm": context.arm, "seed": context.seed, "data": data.dataset.digest}
    waited = fit(module, batches, recipe, context.folder, [curves, scored], identity)
    return {"curves": curves.values | {"r1": scored.values}, "waited": round(waited, 5)}


def measure(model: Albef, data: ExperimentData, eval_set: EvalSet, candidates: int, every: bool) -> dict:
    """`itc`, `itm`: R@1 in points before and after re-ranking the best `candidates`; `itm_all`: after ranking all."""
    pictures, texts = encode_pictures(model, eval_set.images), encode_texts(model, data.tokens(eval_set.captions))
    found = pools_score(model, pictures, texts, eval_set.pools, candidates)
    measured = {"itc": found.itc, "itm": found.itm}
    if every:
        largest = max(map(len, eval_set.pools))
        measured["itm_all"] = pools_score(model, pictures, texts, eval_set.pools, largest).itm
    return measured


def keep(model: Albef, data: ExperimentData, context: Context) -> None:
    """The first seed's models and tokenizer stay with the run: figures are drawn from them, users can load them."""
    from shared.weights.load import save_weights

    save_weights(model, context.folder / "model.safetensors", {"variant": context.recipe.model})
    data.tokenizer.save(context.folder / "tokenizer.json")


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


def difference(treatment: str, baseline: str, name: str = "itm") -> Callable[[dict], float]:
    def effect(measured: dict[str, dict]) -> float:
        return measured[treatment][name] - measured[baseline][name]

    return effect


def more_data(measured: dict[str, dict]) -> float | None:
    """None where the set does not hold so many more pairs."""
    few, more = measured["distilled"], measured["distilled_more"]
    return more["itm"] - few["itm"] if more["pairs"] >= 0.95 * MORE * few["pairs"] else None


def gains(measured: dict[str, dict]) -> list[tuple[float, float]]:
    """(share of wrong captions as drawn, points that distillation gains there), least noise first."""
    return [
        (measured[taught]["wrong_captions"], measured[taught]["itm"] - measured[plain]["itm"])
        for plain, taught in DOSES
    ]


def gain_slope(measured: dict[str, dict]) -> float:
    """Least-squares slope of distillation's gain, in points per 10 % of wrong captions."""
    points = gains(measured)
    middle = sum(x for x, _ in points) / len(points)
    return sum((x - middle) * y for x, y in points) / sum((x - middle) ** 2 for x, _ in points) / 10


def means(*wanted: tuple[str, str]) -> Callable[[list[dict]], str]:
    """'arm 12.3, ...' averaged over seeds: what stands beside an effect. wanted: (arm, name of the number)."""

    def shown(seeds: list[dict[str, dict]]) -> str:
        parts = []
        for arm, name in wanted:
            values = [one[arm][name] for one in seeds]
            parts.append(f"{arm} {name.replace('_', ' ')} {sum(values) / len(values):.1f}")
        return ", ".join(parts)

    return shown


def gains_shown(seeds: list[dict[str, dict]]) -> str:
    parts = []
    for points in zip(*map(gains, seeds), strict=True):
        wrong, gain = (sum(values) / len(values) for values in zip(*points, strict=True))
        parts.append(f"{100 * wrong:.0f} % wrong {gain:+.1f}")
    return f"gain at {', '.join(parts)}"


CLAIMS: dict[str, Claim] = {
    "albef.itc": Claim(
        ("fused", "aligned"),
        difference("aligned", "fused", "itm_all"),
        shown=means(("fused", "itm_all"), ("aligned", "itm_all")),
    ),
    "albef.hard_negatives": Claim(
        ("aligned", "hard"), difference("hard", "aligned"), shown=means(("aligned", "itm"), ("hard", "itm"))
    ),
    "albef.mod_itc": Claim(
        ("hard_wrong_25", "distilled_itc_wrong_25"),
        difference("distilled_itc_wrong_25", "hard_wrong_25"),
        shown=means(("hard_wrong_25", "itm"), ("distilled_itc_wrong_25", "itm")),
    ),
    "albef.mod_mlm": Claim(
        ("distilled_itc_wrong_25", "distilled_wrong_25"),
        difference("distilled_wrong_25", "distilled_itc_wrong_25"),
        shown=means(("distilled_itc_wrong_25", "itm"), ("distilled_wrong_25", "itm")),
    ),
    "albef.noise": Claim(tuple(arm for pair in DOSES for arm in pair), gain_slope, shown=gains_shown),
    "albef.itm_rerank": Claim(
        ("hard",), lambda measured: measured["hard"]["itm"] - measured["hard"]["itc"],
        shown=means(("hard", "itc"), ("hard", "itm")),
    ),
    "albef.data_4m_14m": Claim(
        ("distilled", "distilled_more"),
        more_data,
        f"{MORE} times the recipe's pairs (lower pairs)",
        means(("distilled", "itm"), ("distilled_more", "itm")),
    ),
}  # fmt: skip
