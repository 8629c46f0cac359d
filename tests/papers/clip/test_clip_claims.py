"""The effects of CLIP's claims, on curves and measurements whose answer is known, and what the arms measure."""

import pytest
import torch

from papers.clip.data import build_data
from papers.clip.evidence import claims
from papers.clip.evidence.claims import (
    efficiency,
    minus_slope,
    probe_gain_does_not_move,
    samples_to_reach,
    smaller_drop,
)
from papers.clip.recipe import ClipRecipe
from shared.core.paper_package import Context


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


# ---- what is scored against what, with encoders that know the answers


SMALL = ClipRecipe(
    paper="clip", model="clip-tiny", data="shapes", pairs=48, test_pairs=24, classes=4, objects=1, batch=16,
    val_pictures=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return build_data(SMALL, 3)


def context(tmp_path, seed=3):
    return Context(SMALL, seed, tmp_path, print, False)


def measured_by(data, monkeypatch, tmp_path, pictures, texts=None):
    """measure_clip with `pictures(images)` and `texts(list)` in place of the encoders; classes are unit vectors."""
    prompts, said, width = [], [], len(data.dataset.classes)

    def classifier(model, tokenizer, names, templates):
        prompts.append((list(names), tuple(templates)))
        return torch.eye(width)

    def text_features(model, tokenizer, several):
        said.append(list(several))
        return texts(several) if texts else torch.eye(max(width, len(several)))[: len(several)]

    monkeypatch.setattr(claims, "image_features", lambda model, images: pictures(images))
    monkeypatch.setattr(claims, "text_features", text_features)
    monkeypatch.setattr(claims, "classifier", classifier)
    monkeypatch.setattr(claims, "measure_probes", lambda *_: {})
    return claims.measure_clip(None, data, context(tmp_path)), prompts, said


def knows(dataset, place_of):
    """Pictures' features: the unit vector of `place_of[part]` where the pictures are those of that part."""

    def pictures(images):
        part = next(
            name for name in ("test", "class_test", "shift", "compositions") if images is getattr(dataset, name).images
        )
        return torch.eye(max(256, len(images)))[place_of[part], : width_of(part)]

    def width_of(part):
        return {"test": len(dataset.test), "compositions": len(dataset.compositions.texts)}.get(
            part, len(dataset.classes)
        )

    return pictures


def test_a_model_that_knows_every_answer_scores_a_hundred_and_one_that_errs_abroad_does_so_abroad(
    data, monkeypatch, tmp_path
):
    dataset = data.dataset
    right = {
        "test": torch.arange(len(dataset.test)),
        "class_test": dataset.class_test.labels,
        "shift": dataset.shift.labels,
        "compositions": dataset.compositions.labels,
    }
    found, _, _ = measured_by(data, monkeypatch, tmp_path, knows(dataset, right))
    scores = {name: value for name, value in found.items() if name != "compositions_chance"}
    assert set(scores.values()) == {100.0} and found["compositions_chance"] == 25.0
    for wrong in ("shift", "compositions"):
        place = (
            dataset.compositions.choices[:, 1] if wrong == "compositions" else (right[wrong] + 1) % len(dataset.classes)
        )
        found, _, _ = measured_by(data, monkeypatch, tmp_path, knows(dataset, right | {wrong: place}))
        assert found[wrong] == 0.0 and found["zeroshot_ensemble"] == 100.0


def test_prompts_are_bare_names_then_one_template_then_several(data, monkeypatch, tmp_path):
    _, prompts, _ = measured_by(data, monkeypatch, tmp_path, lambda images: torch.eye(512)[: len(images), :4], blind)
    (bare, template, ensemble) = prompts
    assert bare == (data.dataset.classes, ("{}",))
    assert template == (data.phrases, ("a photo of {}",)) and all(
        name.startswith(("a ", "an ", "some ")) for name in data.phrases
    )
    assert ensemble[0] == data.phrases and "a photo of {}" in ensemble[1] and len(set(ensemble[1])) >= 5


def blind(texts):
    return torch.ones(len(texts), 4)


def test_retrieval_compares_captions_without_their_openings_with_prefixed_ones(data, monkeypatch, tmp_path):
    written = [["a picture of a red circle"], ["look, a cat"], *data.dataset.test.captions[2:]]
    monkeypatch.setattr(data.dataset.test, "captions", written)
    _, _, said = measured_by(data, monkeypatch, tmp_path, lambda images: torch.ones(len(images), 4), blind)
    as_written, raw, prefixed = said[:3]
    assert as_written == [one for (one,) in written]
    assert raw[:2] == ["a red circle", "a cat"] and prefixed[:2] == ["a photo of a red circle", "a photo of a cat"]


def test_a_classifiers_rows_are_the_classes_in_order_each_from_its_own_prompts(monkeypatch):
    from papers.clip import encode as evaluate

    directions = {"cat": torch.tensor([1.0, 0.0, 0.0]), "dog": torch.tensor([0.0, 1.0, 0.0])}
    tilt = torch.tensor([0.0, 0.0, 1.0])

    def features(model, tokenizer, texts):
        return torch.stack([directions[text.split()[-1]] + (tilt if "photo" in text else -tilt) for text in texts])

    monkeypatch.setattr(evaluate, "text_features", features)
    rows = evaluate.classifier(None, None, ["cat", "dog"], ["a photo of a {}", "one {}"])
    torch.testing.assert_close(rows, torch.eye(2, 3))
