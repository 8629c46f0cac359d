"""What calibration counts: on measurements of known distribution, and with intervals that are too sure on purpose."""

import json
import math
import random
import statistics
from dataclasses import replace

import pytest
from tests_common import CATALOG

from shared.core.catalog import Catalog
from shared.core.console import Console
from shared.core.errors import UserError
from shared.core.paper_card import ClaimRow
from shared.core.paper_package import Claim
from shared.experiments import calibration
from shared.experiments.ablations import Outcome, seeds_of
from shared.experiments.calibration import Quantity, busiest_arm, calibrate, cheap_recipe, line, quantities_of
from shared.metrics import stats
from shared.metrics.stats import Rule

DIFFERENCE = Quantity("score", Rule(), lambda baseline, treatment: treatment["score"] - baseline["score"])


def bells(count, seed=0):
    """Seeds of an arm that scores 50 with a standard deviation of 3."""
    draw = random.Random(seed)
    return [{"score": draw.gauss(50, 3)} for _ in range(count)]


@pytest.fixture(scope="module")
def sound():
    return calibrate([DIFFERENCE], bells(400), pairs=5, resampled=2000)


def test_of_equal_arms_one_verdict_in_forty_is_false(sound):
    (found,) = sound["quantities"]
    assert 0.015 < found["resampled"] < 0.035
    assert found["runs"] == sound["runs"] == 40 and found["low"] < 0.025 < found["high"]


def test_intervals_that_are_too_narrow_are_seen(monkeypatch):
    def normal(effects, level=stats.SHOWN):
        mean = statistics.fmean(effects)
        quantile = statistics.NormalDist().inv_cdf(0.5 + level / 2)
        half = quantile * statistics.stdev(effects) / math.sqrt(len(effects))
        return mean, mean - half, mean + half

    monkeypatch.setattr(stats, "interval", normal)
    found = calibrate([DIFFERENCE], bells(400), pairs=5, resampled=2000)
    assert found["pooled"]["resampled"] > 0.07, "a normal quantile with five seeds errs in 9 % of the runs"


def test_the_smallest_effect_that_a_run_states_is_found_by_half_of_the_runs_and_twice_it_by_nearly_all(sound):
    (found,) = sound["quantities"]
    shares = {one["times"]: one["resampled"] for one in found["planted"]}
    # exactly, for five normal seeds and the median of what they state: 49 %, 84 %, 97 %
    assert shares[1.0] == pytest.approx(0.49, abs=0.05)
    assert shares[1.5] == pytest.approx(0.84, abs=0.05)
    assert shares[2.0] == pytest.approx(0.97, abs=0.03)
    # five pairs of differences with a standard deviation of 3 times the root of two; their median one is 8 % smaller
    assert found["smallest_effect"] == pytest.approx(0.916 * 3.495 * 3 * math.sqrt(2 / 5), rel=0.15)
    assert [one["effect"] for one in found["planted"]] == [t * found["smallest_effect"] for t in (1.0, 1.5, 2.0)]


def test_runs_share_no_seed():
    seen = []
    spy = replace(DIFFERENCE, effect=lambda a, b: seen.append((a["id"], b["id"])) or b["score"] - a["score"])
    measured = [one | {"id": i} for i, one in enumerate(bells(43))]
    found = calibrate([spy], measured, pairs=5, resampled=1)
    apart = seen[:20]
    assert apart == [(2 * i, 2 * i + 1) for i in range(20)] and found["runs"] == 4, "three seeds are left over"
    assert len({seed for pair in seen[20:] for seed in pair}) == 10, "nor does a run that is drawn at random"


def test_an_equality_errs_by_contradicting_what_is_equal_and_by_missing_a_difference_of_its_margin():
    equal = replace(DIFFERENCE, rule=Rule("equal", 8.0))
    (found,) = calibrate([equal], bells(400), pairs=5, resampled=2000)["quantities"]
    assert found["resampled"] < 0.01, "equal arms are called equal or nothing"
    assert 0 < found["resampled_at_margin"] < 0.025, "one side of a 97.5 % interval: at most 1.3 %"
    (wide,) = calibrate([replace(DIFFERENCE, rule=Rule("equal", 100.0))], bells(40), 5, 10)["quantities"]
    assert wide["false"] == 0 and wide["runs"] == 4


def test_the_pooled_share_is_judged_over_runs_because_quantities_of_one_run_go_together():
    twins = [replace(DIFFERENCE, name=f"score {i}") for i in range(6)]
    alone, together = (calibrate(several, bells(400), 5, 50)["pooled"] for several in (twins[:1], twins))
    assert together["verdicts"] == 6 * alone["verdicts"] and together["false"] == 6 * alone["false"]
    assert (together["share"], together["low"], together["high"]) == (alone["share"], alone["low"], alone["high"])


def row(id, direction="greater", margin=None):
    return ClaimRow(
        id=id, statement="s", reported=None, reported_as=None, unit="points", direction=direction, margin=margin,
        metric="a/b@c", treatment="t", baseline="b", protocol_small="p", scale_caveat="c", source="Table 1",
    )  # fmt: skip


def test_numbers_and_claims_of_two_arms_are_compared_constants_and_repetitions_are_not():
    measured = [
        {"score": s, "chance": 25.0, "waited": s, "curves": {"x": []}, "twice": 2 * s} for s in (1.0, 5.0, 2.0, 9.0)
    ]
    claims = {
        "p.same": Claim(("a", "b"), lambda m: m["a"]["score"] - m["b"]["score"]),
        "p.equal": Claim(("a", "b"), lambda m: m["a"]["score"] - m["b"]["score"]),
        "p.reversed": Claim(("b", "a"), lambda m: m["a"]["twice"] - m["b"]["twice"]),
        "p.alone": Claim(("a",), lambda m: m["a"]["score"]),
        "p.lacks": Claim(("a", "b"), lambda m: m["a"]["other"] - m["b"]["other"]),
        "p.cannot": Claim(("a", "b"), lambda m: None),
    }
    rows = [row(id, "equal", 3.0) if id == "p.equal" else row(id) for id in claims]
    found = quantities_of(measured, claims, rows)
    assert {(one.name, str(one.rule), one.claims) for one in found} == {
        ("score", "effect > 0", ("p.same",)),
        ("twice", "effect > 0", ("p.reversed",)),
        ("p.equal", "|effect| < 3", ("p.equal",)),
    }
    assert [one.effect(measured[0], measured[1]) for one in found] == [4.0, 8.0, 4.0]


def test_the_arm_that_most_claims_lean_on_is_the_one_that_is_trained():
    claims = {str(i): Claim(arms, lambda m: 0.0) for i, arms in enumerate([("x", "y"), ("z", "y"), ("y",), ("x",)])}
    assert busiest_arm(claims) == "y"


# ---- the whole of it, with trainings that cost nothing


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A catalog whose runs/ and results/ lie elsewhere, and arms that are drawn instead of trained."""
    (tmp_path / "papers").symlink_to(CATALOG.folder)
    (tmp_path / "recipes").symlink_to(CATALOG.root / "recipes")

    def drawn(package, recipe, arms, folder, progress):
        assert arms == ["contrastive"] and recipe.data == "shapes"
        for seed in reversed(seeds_of(recipe)):
            score = 60 + 5 * random.Random(seed).random()
            curve = [(100, score / 300), (200, score / 200)]
            yield Outcome("contrastive", seed, 0.1, {"zeroshot_ensemble": score, "curves": {"accuracy": curve}})

    monkeypatch.setattr(calibration, "run_arms", drawn)
    monkeypatch.setattr(calibration, "RESAMPLED", 20)
    return Catalog(tmp_path / "papers", "papers")


def test_a_calibration_with_the_default_settings_is_evidence_and_any_other_is_not(place):
    kept = calibration.run(place, "clip", [], Console())
    assert kept == place.root / "results" / "calibration" / "clip.json"
    before = kept.read_bytes()
    other = calibration.run(place, "clip", ["seeds=40"], Console())
    assert other == place.root / "runs" / "clip" / "calibration" / "result.json" and kept.read_bytes() == before
    found = json.loads(before)
    assert (found["paper"], found["arm"], found["seeds"], found["pairs"], found["runs"]) == (
        "clip", "contrastive", 400, 5, 40,
    )  # fmt: skip
    assert {"machine", "commit", "dirty", "started", "seconds", "recipe"} <= found.keys()
    names = {one["name"]: one["claims"] for one in found["quantities"]}
    assert names["zeroshot_ensemble"] == ["clip.scale.patch"] and "clip.projection.linear" in names
    assert "clip.efficiency.bow_vs_caption_lm" in names["clip.efficiency.contrastive_vs_bow"], "one effect, one count"


def test_the_line_for_the_readme_states_what_was_counted(place):
    path = calibration.run(place, "clip", ["seeds=40"], Console())
    found = json.loads(path.read_text())
    found["pooled"] |= {"false": 9, "verdicts": 12, "share": 0.75, "low": 0.1, "high": 1.0}
    found["pooled"]["planted"][0] |= {"found": 3, "of": 8}
    path.write_text(json.dumps(found))
    told = line(path)
    assert "4 independent runs of 5 pairs" in told and "9 false verdicts of 12" in told and "75.0%" in told
    assert "found in 38% of the runs" in told and "\n" not in told


def test_too_few_seeds_for_two_runs_are_refused_before_anything_is_trained(place):
    with pytest.raises(UserError, match="seeds=19: a run of 5 pairs takes 10 seeds, so give 20 or more"):
        calibration.run(place, "clip", ["seeds=19"], Console())


def test_the_cheap_settings_lie_under_the_users():
    recipe = cheap_recipe(CATALOG, "clip", ["steps=7"])
    assert (recipe.data, recipe.steps, recipe.classes, recipe.model) == ("shapes", 7, 4, "clip-mini")
