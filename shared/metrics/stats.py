"""Intervals and verdicts over paired seeds, and the fits that a claim leans on.
A verdict is a rule declared before the run (paper.yaml), applied to a 97.5 % interval; it never sees a p-value.
Reports print the usual 95 % interval. Verdicts taken from that one erred in 5.6 % of A/A runs (calibration.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from shared.core.errors import UserError

SHOWN, DECIDES = 0.95, 0.975  # levels of the interval that is printed, and of the one that a verdict is taken from


@dataclass(frozen=True)
class Rule:
    """What a claim says of its effect (treatment minus baseline, in the metric's own unit).

    `greater`: the effect exceeds `margin`. `equal`: the effect lies within +-`margin`, which must then be positive.
    """

    kind: Literal["greater", "equal"] = "greater"
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("greater", "equal"):
            raise UserError(f"verdict rule: unknown kind {self.kind!r}, use 'greater' or 'equal'")
        if not math.isfinite(self.margin):
            raise UserError(f"verdict rule {self.kind!r}: margin is {self.margin}, use a finite number")
        if self.kind == "equal" and self.margin <= 0:
            raise UserError(
                f"verdict rule 'equal': margin is {self.margin}, use a positive one (nothing equals exactly)"
            )

    def __str__(self) -> str:
        return f"effect > {self.margin:g}" if self.kind == "greater" else f"|effect| < {self.margin:g}"


class Verdict(NamedTuple):
    """`word` is reproduced | inconclusive | contradicted; `note` flags doubts.

    low, high: the interval that is shown, not the one that decides; None with a single seed.
    `smallest_effect`: see the function of that name; None with a single seed or without any spread over the seeds.
    """

    word: str
    mean: float
    low: float | None
    high: float | None
    smallest_effect: float | None
    note: str = ""


class PowerLaw(NamedTuple):
    """y = 10**intercept * x**slope; `r2` is the explained share of the variance of log10 y."""

    slope: float
    intercept: float
    r2: float


def interval(effects: Sequence[float], level: float = SHOWN) -> tuple[float, float | None, float | None]:
    """(mean, low, high): Student-t interval of the mean over paired seeds; (mean, None, None) with one seed."""
    values = _finite(effects, "effect")
    if not 0 < level < 1:
        raise UserError(f"interval: level is {level}, use a share between 0 and 1 such as 0.95")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None, None
    half = _quantile(level, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


@cache
def _quantile(level: float, freedom: int) -> float:
    """Student's t that the middle `level` of the distribution lies within, either side."""
    from scipy.stats import t  # a second to import: only runs pay for it

    return float(t.ppf(0.5 + level / 2, freedom))


def smallest_effect(effects: Sequence[float], level: float = DECIDES) -> float | None:
    """Half the interval's width: the effect this run could tell from none with even odds; None with one seed.

    Its power is one half, whatever the number of seeds: the interval of a run whose true effect is of just this size
    excludes zero as often as not. calibration.py measures what effects of 1.5 and 2 times the size are found.
    """
    mean, _, high = interval(effects, level)
    return None if high is None else high - mean


def verdict(effects: Sequence[float], rule: Rule, level: float = DECIDES) -> Verdict:
    """Apply `rule` to the interval of `effects`, one value a seed (paired: treatment minus baseline of that seed).

    Effects that all agree have no spread to draw an interval from. A metric with two equally likely outcomes agrees
    over n seeds by chance in 2^(1-n) of the runs, so agreement alone decides only where that is within 1 - level:
    from seven seeds on at 97.5 %.
    """
    mean, low, high = interval(effects)
    if low is None or high is None:
        return Verdict("inconclusive", mean, None, None, None, "one seed: no interval, no verdict")
    _, lowest, highest = interval(effects, level)
    assert lowest is not None and highest is not None, "there were two seeds for the interval above"
    word, note = _decided(rule, lowest, highest), ""
    smallest: float | None = highest - mean
    if word == "inconclusive" and _decided(rule, low, high) != word:
        note = f"the {SHOWN:.0%} interval would decide, the {level:.1%} interval that verdicts are taken from does not"
    # differences of percentages agree up to rounding only: 60.2 - 60 is not 40.2 - 40
    if math.isclose(min(effects), max(effects), rel_tol=1e-9, abs_tol=1e-9):
        smallest, note = None, "every seed gave the same effect: saturated metric, or a seed that changes nothing"
        if 2.0 ** (1 - len(effects)) > 1 - level:
            word, note = "inconclusive", f"{note}; {len(effects)} seeds without spread decide nothing"
    return Verdict(word, mean, low, high, smallest, note)


def verdict_of_interval(mean: float, low: float, high: float, seeds: int, rule: Rule, level: float = DECIDES) -> str:
    """The word that `verdict` finds for effects whose shown interval is (low, high): kept evidence stores no effects.

    Effects without spread decide as there.
    """
    if high - low <= 1e-9 * max(1.0, abs(mean)):
        return "inconclusive" if 2.0 ** (1 - seeds) > 1 - level else _decided(rule, low, high)
    half = (high - low) / 2 * _quantile(level, seeds - 1) / _quantile(SHOWN, seeds - 1)
    return _decided(rule, mean - half, mean + half)


def _decided(rule: Rule, low: float, high: float) -> str:
    if rule.kind == "greater":
        holds, fails = low > rule.margin, high < rule.margin
    else:
        holds, fails = -rule.margin < low and high < rule.margin, low > rule.margin or high < -rule.margin
    return "reproduced" if holds else "contradicted" if fails else "inconclusive"


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (low, high) of a proportion; unlike the normal one it holds at 0, at n and for small n."""
    if n < 1 or not 0 <= successes <= n:
        raise UserError(f"wilson: {successes} of {n} is no proportion, use 0 <= successes <= n and n >= 1")
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    share, shrink = successes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / shrink
    # at the ends one bound is exact, and rounding must not move it off
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def log_log_fit(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares through (log10 x, log10 y), as the scaling figures do; everything must be positive."""
    xs, ys = _finite(x, "x"), _finite(y, "y")
    if len(xs) != len(ys) or len(set(xs)) < 2:
        raise UserError(f"log-log fit: {len(xs)} x and {len(ys)} y, use equally many and at least two different x")
    for name, values in (("x", xs), ("y", ys)):
        if min(values) <= 0:
            raise UserError(f"log-log fit: {name} holds {min(values):g}, use positive values only")
    log_x, log_y = [math.log10(v) for v in xs], [math.log10(v) for v in ys]
    slope, intercept = statistics.linear_regression(log_x, log_y)
    middle = statistics.fmean(log_y)
    spread = sum((v - middle) ** 2 for v in log_y)
    left = sum((v - intercept - slope * u) ** 2 for u, v in zip(log_x, log_y, strict=True))
    return PowerLaw(slope, intercept, 1 - left / spread if spread > 0 else 0.0)


def _finite(values: Sequence[float], name: str) -> list[float]:
    numbers = [float(v) for v in values]
    if not numbers:
        raise UserError(f"no {name} values given: at least one is needed")
    for place, value in enumerate(numbers):
        if not math.isfinite(value):
            raise UserError(f"{name} {place + 1} of {len(numbers)} is {value}: that run diverged, look at its curves")
    return numbers
