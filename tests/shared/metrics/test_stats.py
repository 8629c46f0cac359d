"""Intervals against scipy and hand-computed numbers, and every verdict a rule can reach."""

import itertools
import math

import pytest
from scipy import stats as scipy_stats

from shared.core.errors import UserError
from shared.metrics.stats import DECIDES, Rule, interval, log_log_fit, smallest_effect, verdict, wilson


def test_the_interval_agrees_with_scipy_and_with_a_table_of_t():
    effects = [0.031, 0.052, 0.047, 0.018, 0.040]
    _, low, high = interval(effects)
    reference = scipy_stats.ttest_1samp(effects, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    # three seeds 1, 2, 3: deviation 1, t = 4.3027 (printed tables, two degrees of freedom)
    assert interval([1, 2, 3]) == pytest.approx((2.0, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)


def test_a_wider_level_gives_a_wider_interval():
    narrow, wide = interval([1, 2, 4], level=0.9), interval([1, 2, 4], level=0.99)
    assert wide[1] < narrow[1] < narrow[2] < wide[2]


def test_one_seed_has_a_mean_but_no_interval_and_no_verdict():
    assert interval([0.4]) == (0.4, None, None)
    assert smallest_effect([0.4]) is None
    for rule in (Rule("greater"), Rule("equal", 10.0)):
        word, mean, low, high, smallest, note = verdict([0.4], rule)
        assert (word, mean, low, high, smallest) == ("inconclusive", 0.4, None, None, None)
        assert "one seed" in note


@pytest.mark.parametrize(
    ("effects", "rule", "word"),
    [
        ([1.0, 1.1, 0.9], Rule("greater"), "reproduced"),
        ([1.0, 1.1, 0.9], Rule("greater", 0.5), "reproduced"),
        ([1.0, 1.1, 0.9], Rule("greater", 1.1), "inconclusive"),
        ([1.0, 1.1, 0.9], Rule("greater", 2.0), "contradicted"),
        ([-1.0, -1.1, -0.9], Rule("greater"), "contradicted"),
        ([1.0, -1.0, 0.5], Rule("greater"), "inconclusive"),
        ([0.0, 0.1, -0.1], Rule("equal", 0.5), "reproduced"),
        ([0.0, 0.1, -0.1], Rule("equal", 0.2), "inconclusive"),
        ([1.0, 1.1, 0.9], Rule("equal", 0.5), "contradicted"),
        ([-1.0, -1.1, -0.9], Rule("equal", 0.5), "contradicted"),
        ([0.4, 0.5, 0.6], Rule("equal", 0.5), "inconclusive"),
    ],
)
def test_a_verdict_follows_its_rule(effects, rule, word):
    found = verdict(effects, rule)
    assert found.word == word
    _, lowest, highest = interval(effects, DECIDES)
    assert found.smallest_effect == pytest.approx((highest - lowest) / 2)
    assert found[2:4] == interval(effects)[1:] and lowest < found.low < found.high < highest
    assert found.note == ""


def test_an_effect_that_only_the_shown_interval_would_decide_is_inconclusive_and_says_so():
    effects = [1.0, 2.0, 3.0, 4.0]  # deviation 1.291: t = 3.182 at 95 %, 4.177 at 97.5 % (printed tables)
    shown, deciding = 2.5 - 3.182 * 1.291 / 2, 2.5 - 4.177 * 1.291 / 2
    between = (shown + deciding) / 2
    found = verdict(effects, Rule("greater", between))
    assert (found.word, found.low) == ("inconclusive", pytest.approx(shown, abs=1e-3))
    assert "97.5% interval" in found.note
    assert verdict(effects, Rule("greater", deciding - 0.01)).word == "reproduced"
    assert verdict(effects, Rule("greater", shown + 0.01)).note == ""


def test_an_interval_that_touches_the_margin_is_inconclusive():
    _, low, high = interval([1.0, 2.0, 3.0], DECIDES)
    assert verdict([1.0, 2.0, 3.0], Rule("greater", low)).word == "inconclusive"
    assert verdict([1.0, 2.0, 3.0], Rule("greater", high)).word == "inconclusive"


def test_seeds_that_all_agree_decide_only_where_chance_would_hardly_let_them():
    # two equally likely outcomes agree over n seeds in 2^(1-n) of the runs: 3.1 % with six, 1.6 % with seven
    for rule, word in (
        (Rule("greater"), "reproduced"),
        (Rule("greater", 1.0), "contradicted"),
        (Rule("equal", 1), "reproduced"),
    ):
        for seeds in (2, 3, 5, 6):
            found = verdict([0.25] * seeds, rule)
            assert (found.word, found.low, found.high, found.smallest_effect) == ("inconclusive", 0.25, 0.25, None)
            assert "same effect" in found.note and f"{seeds} seeds" in found.note
        assert verdict([0.25] * 7, rule).word == word
        assert "same effect" in verdict([0.25] * 7, rule).note
    assert verdict([0.25] * 7, Rule("greater"), level=0.99).word == "inconclusive"
    assert verdict([0.0] * 7, Rule("greater")).word == "inconclusive"


def test_effects_that_agree_up_to_rounding_are_the_same_effect():
    effects = [60.2 - 60, 40.2 - 40, 20.2 - 20, 10.2 - 10, 80.2 - 80]
    assert len(set(effects)) > 1 and verdict(effects, Rule("greater")).word == "inconclusive"
    assert "same effect" in verdict(effects, Rule("greater")).note
    assert verdict([*effects[:4], 0.3], Rule("greater")).note == ""


def test_a_fair_coin_gives_a_false_verdict_in_at_most_five_percent_of_the_runs():
    """A metric that moves by one answer or none, the same in both arms: the hardest null for so few seeds."""
    for seeds in (2, 3, 4, 5):
        runs = list(itertools.product((-0.2, 0.2), repeat=seeds))
        false = sum(verdict(run, Rule("greater")).word != "inconclusive" for run in runs)
        assert false / len(runs) <= 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named(bad):
    with pytest.raises(UserError, match=f"effect 2 of 3 is {bad}"):
        interval([1.0, bad, 2.0])
    with pytest.raises(UserError, match=f"y 1 of 2 is {bad}"):
        log_log_fit([1.0, 2.0], [bad, 1.0])


def test_no_seed_at_all_is_an_error():
    with pytest.raises(UserError, match="no effect values"):
        verdict([], Rule())


@pytest.mark.parametrize(("kind", "margin"), [("equal", 0.0), ("equal", -1.0), ("less", 0.0), ("greater", math.nan)])
def test_a_rule_that_could_never_be_decided_is_refused(kind, margin):
    with pytest.raises(UserError):
        Rule(kind, margin)


def test_a_rule_reads_as_a_sentence():
    assert str(Rule("greater", 0.5)) == "effect > 0.5"
    assert str(Rule("equal", 0.02)) == "|effect| < 0.02"


def test_wilson_gives_the_intervals_of_the_fifty_raven_items():
    # Kosmos-1 prints 22 % and 26 % of 50 items; chance, 16.7 %, lies in both
    assert wilson(11, 50) == pytest.approx((0.128, 0.352), abs=5e-4)
    assert wilson(13, 50) == pytest.approx((0.159, 0.396), abs=5e-4)


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 7), (7, 7), (0, 1), (5000, 5000)])
def test_wilson_agrees_with_scipy_and_stays_within_zero_and_one(successes, n):
    low, high = wilson(successes, n)
    reference = scipy_stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert 0 <= low <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(UserError, match="no proportion"):
        wilson(successes, n)


def test_a_power_law_is_found_exactly_and_noise_lowers_r2():
    x = [1e3, 1e4, 1e5, 1e6]
    fit = log_log_fit(x, [5 * v**-0.3 for v in x])
    assert fit == pytest.approx((-0.3, math.log10(5), 1.0))
    noisy = [5 * v**-0.3 * factor for v, factor in zip(x, (1.3, 0.7, 1.2, 0.9), strict=True)]
    reference = scipy_stats.linregress([math.log10(v) for v in x], [math.log10(v) for v in noisy])
    assert log_log_fit(x, noisy) == pytest.approx((reference.slope, reference.intercept, reference.rvalue**2))


def test_a_constant_is_explained_by_nothing():
    assert log_log_fit([1, 10, 100], [3, 3, 3]).r2 == 0.0


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2], [1, 0]), ([-1, 2], [1, 1]), ([2, 2], [1, 3]), ([1, 2, 3], [1, 2]), ([], [])]
)
def test_points_without_a_power_law_are_refused(x, y):
    with pytest.raises(UserError):
        log_log_fit(x, y)
