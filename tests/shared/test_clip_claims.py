"""The effects of CLIP's claims, on curves and measurements whose answer is known."""

import pytest

from papers.clip import claims
from papers.clip.claims import efficiency, minus_slope, probe_gain_does_not_move, samples_to_reach, smaller_drop


def curve(*values):
    return {"curves": {"accuracy": [(100 * (i + 1), v) for i, v in enumerate(values)]}}


def test_samples_to_reach_interpolates_between_measurements():
    points = [(100, 0.2), (200, 0.4), (300, 0.4)]
    assert samples_to_reach(points, 0.3) == pytest.approx(150)
    assert samples_to_reach(points, 0.1) == pytest.approx(50)
    with pytest.raises(ValueError, match="never reaches"):
        samples_to_reach(points, 0.5)


def test_twice_as_many_samples_for_the_same_accuracy_is_one_power_of_two():
    effect = efficiency("fast", "slow")
    measured = {"fast": curve(0.2, 0.4, 0.6, 0.8), "slow": curve(0.1, 0.2, 0.3, 0.4)}
    assert effect(measured) == pytest.approx(1.0)
    assert efficiency("slow", "fast")(measured) == pytest.approx(-1.0)


def test_the_smaller_drop_is_the_supervised_loss_minus_the_zero_shot_loss():
    measured = {
        "contrastive": {"zeroshot_ensemble": 80.0, "shift": 70.0},
        "supervised": {"supervised": 95.0, "supervised_shift": 60.0},
    }
    assert smaller_drop(measured) == pytest.approx(35.0 - 10.0)
    assert smaller_drop({"contrastive": {"zeroshot_ensemble": 80.0}, "supervised": {}}) is None


def test_the_probes_gain_is_compared_at_home_and_away():
    found = {"contrastive": {"zeroshot_ensemble": 70.0, "probe": 90.0, "shift": 50.0, "probe_shift": 45.0}}
    assert probe_gain_does_not_move(found) == pytest.approx(5.0), "gains 20 at home, loses 5 away"
    found["contrastive"]["probe_shift"] = 58.0
    assert probe_gain_does_not_move(found) == pytest.approx(-8.0), "a gain away contradicts the claim"


def test_a_power_law_over_the_ladder_gives_its_exponent():
    measured = {
        arm: {"flops": 10.0**power, "zeroshot_ensemble": 100 * (1 - 0.8 * 10 ** (-0.25 * power))}
        for power, arm in enumerate(claims.LADDER)
    }
    assert minus_slope(measured) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ("a photo of a red panda", "a red panda"),
        ("an image of some grapes", "some grapes"),
        ("this is a picture of a cat", "a cat"),
        ("a photograph album", "a photograph album"),
        ("look, a cat", "a cat"),
        ("there are some grapes in the picture", "some grapes"),
        ("a cat on a red card", "a cat on a red card"),
    ],
)
def test_only_a_leading_prefix_is_taken_away(caption, left):
    assert claims.without_prefix(caption) == left
