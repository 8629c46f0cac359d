"""How often a verdict errs: one arm compared with itself (A/A), and effects of known size planted into it.

Many seeds of the arm that most claims lean on are trained once, cheaply. Seeds 2i and 2i + 1 stand for baseline and
treatment of one pair, as many pairs as the mini recipe has seeds make a run, and no seed is used twice: the runs are
independent. What the verdicts say of them is counted, for everything that the arm measures. Because that is few runs,
the same is done with pairs drawn at random from the same seeds, many times: a smaller error of counting, no new data.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.core.catalog import Catalog
from shared.core.console import Console
from shared.core.errors import UserError
from shared.core.files import write_whole
from shared.core.paper_card import ClaimRow
from shared.core.paper_package import Claim
from shared.core.provenance import code_digest
from shared.core.recipe import Recipe
from shared.experiments.ablations import run_arms
from shared.metrics.stats import Rule, interval, verdict, wilson

# Seconds a seed, well away from chance. A recipe that lacks a key goes without it.
CHEAP = {
    "data": "shapes", "seeds": 400, "pairs": 240, "test_pairs": 100, "classes": 4, "batch": 16, "steps": 80,
    "warmup_steps": 8, "measure_at": 4, "checkpoint_every": 0,
}  # fmt: skip
RESAMPLED = 4_000  # runs
PLANTED = (1.0, 1.5, 2.0)  # times the smallest effect that such runs state, their median
ABOUT_THE_MACHINE = ("waited",)  # measured, but not of the model

Measured = dict[str, Any]  # what an arm returns for one seed


@dataclass(frozen=True)
class Quantity:
    """What is compared: `effect(baseline, treatment)` of two seeds of the arm, judged by `rule`; the claims it serves.

    The true effect is zero. Rule "greater" 0 then errs with either verdict, "equal" with `contradicted` alone.
    """

    name: str
    rule: Rule
    effect: Callable[[Measured, Measured], float]
    claims: tuple[str, ...] = ()

    @property
    def false_words(self) -> tuple[str, ...]:
        return ("reproduced", "contradicted") if self.rule.kind == "greater" else ("contradicted",)


def run(catalog: Catalog, name: str, overrides: list[str], console: Console) -> Path:
    """Train, count and write results/calibration/<paper>.json, or with overrides runs/<paper>/calibration/result.json.

    Seeds that the same code has trained already, in runs/<paper>/calibration/, are taken as they are. -> the file
    """
    from shared.core.provenance import commit_and_dirty, machine_description

    started, clock = time.strftime("%Y-%m-%dT%H:%M:%S"), time.perf_counter()
    commit, dirty = commit_and_dirty(catalog.root)
    recipe, pairs = cheap_recipe(catalog, name, overrides), catalog.recipe(name, "mini", []).seeds
    groups = recipe.seeds // (2 * pairs)
    if groups < 2:
        raise UserError(
            f"seeds={recipe.seeds}: a run of {pairs} pairs takes {2 * pairs} seeds, so give {4 * pairs} or more"
        )
    claims, card = catalog.package(name).claims.CLAIMS, catalog.card(name)
    arm = busiest_arm(claims)
    folder = catalog.root / "runs" / name / "calibration"
    arms, samples = folder / code_digest(catalog.root), recipe.seeds * recipe.steps * recipe.batch
    trained: dict[int, Measured] = {}
    with console.progress(samples, f"{arm} x {recipe.seeds} seeds", "samples") as bar:
        for outcome in run_arms(catalog.package(name).name, recipe, [arm], arms, bar.advance):
            trained[outcome.seed] = outcome.measured
            bar.note(f"{len(trained)}/{recipe.seeds} trained")
    measured = [trained[seed] for seed in sorted(trained)]
    quantities = quantities_of(measured, claims, card.claims)
    if not quantities:
        raise UserError(f"{name}: all seeds of {arm} measured the same, so there is nothing to count; train longer")
    with console.waiting("counting verdicts"):
        found = calibrate(quantities, measured, pairs, RESAMPLED)
    result = {
        "paper": name,
        "arm": arm,
        "seeds": recipe.seeds,
        "pairs": pairs,
        **found,
        "recipe": dataclasses.asdict(recipe),
        "machine": machine_description(),
        "commit": commit,
        "dirty": dirty,
        "started": started,
        "seconds": round(time.perf_counter() - clock, 1),
    }
    path = folder / "result.json" if overrides else catalog.root / "results" / "calibration" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=1) + "\n")
    return path


def cheap_recipe(catalog: Catalog, name: str, overrides: Sequence[str]) -> Recipe:
    """The mini recipe with CHEAP over it, and the overrides over both."""
    keys = {field.name for field in dataclasses.fields(catalog.package(name).recipe_type)}
    cheap = [f"{key}={value}" for key, value in CHEAP.items() if key in keys]
    return catalog.recipe(name, "mini", [*cheap, *overrides])


def busiest_arm(claims: Mapping[str, Claim]) -> str:
    """The arm that most claims compare; of equals the first."""
    return Counter(arm for claim in claims.values() for arm in claim.arms).most_common(1)[0][0]


# ---- what is compared


def quantities_of(
    measured: Sequence[Measured], claims: Mapping[str, Claim], rows: Sequence[ClaimRow]
) -> list[Quantity]:
    """Every number that the arm measures, as treatment minus baseline, and every claim of two arms whose effect can be
    computed with this arm in both places. Equal ones under equal rules count once; constants are left out."""
    numbers = [name for name, value in measured[0].items() if isinstance(value, (int, float))]
    several = [Quantity(name, Rule(), _difference(name)) for name in numbers if name not in ABOUT_THE_MACHINE]
    for row in rows:
        if len(claims[row.id].arms) == 2:
            rule = Rule(row.direction, row.margin or 0.0)
            several.append(Quantity(row.id, rule, _between(claims[row.id]), (row.id,)))
    kept: dict[tuple, Quantity] = {}
    for one in several:
        try:
            effects = [one.effect(*pair) for pair in zip(measured[::2], measured[1::2], strict=False)]
        except (KeyError, TypeError):  # this arm does not measure what the claim compares
            continue
        if len({round(effect, 9) for effect in effects}) == 1:
            continue
        # the sign tells nothing: a claim may name the baseline first
        key = (one.rule, tuple(round(abs(effect), 9) for effect in effects))
        kept[key] = dataclasses.replace(kept[key], claims=kept[key].claims + one.claims) if key in kept else one
    return list(kept.values())


def _difference(name: str) -> Callable[[Measured, Measured], float]:
    return lambda baseline, treatment: treatment[name] - baseline[name]


def _between(claim: Claim) -> Callable[[Measured, Measured], float]:
    first, second = claim.arms

    def effect(baseline: Measured, treatment: Measured) -> float:
        found = claim.effect({first: treatment, second: baseline})
        if found is None:
            raise KeyError(f"what {claim.arms} compare")
        return found

    return effect


# ---- counting


def calibrate(quantities: Sequence[Quantity], measured: Sequence[Measured], pairs: int, resampled: int) -> dict:
    """False verdicts and found effects per quantity, over independent runs and over random ones, and pooled."""
    several = [_counted(one, measured, pairs, resampled) for one in quantities]
    runs = several[0]["runs"]
    # quantities of one run lean on the same models: the unit is the run, and its share of false verdicts the value
    shares = [statistics.fmean(one["false_in_run"][i] for one in several) for i in range(runs)]
    share, low, high = interval(shares)
    for one in several:
        del one["false_in_run"]
    planted = list(zip(*(one["planted"] for one in several if "planted" in one), strict=True))  # size by size
    return {
        "runs": runs,
        "resampled_runs": resampled,
        "pooled": {
            "verdicts": runs * len(several),
            "false": sum(one["false"] for one in several),
            "share": share,
            "low": max(0.0, low or 0.0),
            "high": high,
            "resampled": statistics.fmean(one["resampled"] for one in several),
            "planted": [
                {
                    "times": times,
                    "of": sum(one["of"] for one in size),
                    "found": sum(one["found"] for one in size),
                    "resampled": statistics.fmean(one["resampled"] for one in size),
                }
                for times, size in zip(PLANTED, planted, strict=False)
            ],
        },
        "quantities": several,
    }


def _counted(one: Quantity, measured: Sequence[Measured], pairs: int, resampled: int) -> dict:
    size = 2 * pairs
    apart = [_effects(one, measured, range(start, start + size)) for start in range(0, len(measured) - size + 1, size)]
    draw = random.Random(f"calibration {one.name}")
    mixed = [_effects(one, measured, draw.sample(range(len(measured)), size)) for _ in range(resampled)]

    def judged(runs: list[list[float]], words: tuple[str, ...], shift: float = 0.0) -> list[bool]:
        return [verdict([effect + shift for effect in run], one.rule).word in words for run in runs]

    false = judged(apart, one.false_words)
    low, high = wilson(sum(false), len(false))
    counted = {
        "name": one.name,
        "claims": list(one.claims),
        "rule": str(one.rule),
        "runs": len(apart),
        "false": sum(false),
        "low": low,
        "high": high,
        "resampled": statistics.fmean(judged(mixed, one.false_words)),
        "false_in_run": false,
    }
    if one.rule.kind == "equal":
        # as large as what no longer counts as equal: calling it equal is the costlier error of this rule
        at_margin = judged(apart, ("reproduced",), one.rule.margin)
        mixed_at_margin = judged(mixed, ("reproduced",), one.rule.margin)
        return counted | {"equal_at_margin": sum(at_margin), "resampled_at_margin": statistics.fmean(mixed_at_margin)}
    stated = [verdict(run, one.rule).smallest_effect for run in mixed]
    smallest = statistics.median(effect for effect in stated if effect is not None)
    planted = []
    for times in PLANTED:
        found = judged(apart, ("reproduced",), times * smallest)
        low, high = wilson(sum(found), len(found))
        share = statistics.fmean(judged(mixed, ("reproduced",), times * smallest))
        one_size = {"times": times, "effect": times * smallest, "found": sum(found), "of": len(found)}
        planted.append(one_size | {"low": low, "high": high, "resampled": share})
    return counted | {"smallest_effect": smallest, "planted": planted}


def _effects(one: Quantity, measured: Sequence[Measured], places: Sequence[int]) -> list[float]:
    return [one.effect(measured[a], measured[b]) for a, b in zip(places[::2], places[1::2], strict=True)]


# ---- telling


def line(path: Path) -> str:
    """The figures of a result for the README, in one paragraph."""
    found = json.loads(path.read_text(encoding="utf-8"))
    pooled, planted = found["pooled"], {one["times"]: one for one in found["pooled"]["planted"]}
    return (
        f"A/A: {found['runs']} independent runs of {found['pairs']} pairs (arm `{found['arm']}` against itself, "
        f"{found['seeds']} trainings, {len(found['quantities'])} quantities) gave {pooled['false']} false verdicts of "
        f"{pooled['verdicts']}: {pooled['share']:.1%}, 95 % interval {pooled['low']:.1%} to {pooled['high']:.1%} over "
        f"runs; {found['resampled_runs']:,} random regroupings a quantity: {pooled['resampled']:.1%}. "
        f"A planted effect of the size that a report calls the smallest it could have seen was found in "
        f"{_share(planted[1.0])} of the runs, one of 1.5 times that size in {_share(planted[1.5])}, "
        f"of twice in {_share(planted[2.0])}."
    )


def _share(planted: dict) -> str:
    return f"{planted['found'] / planted['of']:.0%}"
