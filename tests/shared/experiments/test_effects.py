"""Effects and notes of claims, on measurements whose answer is known; what a training of an arm is told and leaves."""

import pytest
from torch import nn

from shared.core.paper_package import Context
from shared.core.recipe import Recipe
from shared.experiments import effects
from shared.experiments.effects import difference, means, once_a_seed, save_first_seed, train_arm

RECIPE = Recipe(paper="toy", model="toy-tiny", steps=10, batch=4)
RECIPE.measure_at = 4  # a key of the papers that draw learning curves


def context(tmp_path, seed=3, first=True):
    return Context(RECIPE, seed, tmp_path, print, first, "arm")


def test_the_arms_of_a_seed_share_its_data_and_another_seed_draws_its_own(tmp_path):
    made = []
    data_of = once_a_seed(lambda recipe, seed: made.append(seed) or ("data", seed))
    assert [data_of(context(tmp_path, seed))[1] for seed in (3, 3, 4)] == [3, 3, 4]
    assert made == [3, 4], "made once a seed"


def test_a_difference_is_treatment_minus_baseline_and_none_where_one_is_missing():
    measured = {"ours": {"r1": 5.0, "other": 9.0}, "theirs": {"r1": 3.0}}
    assert difference("ours", "theirs", "r1")(measured) == 2.0
    assert difference("ours", "ours", "r1", "other")(measured) == -4.0
    assert difference("ours", "theirs", "other")(measured) is None
    assert difference("theirs", "ours", "other")(measured) is None


@pytest.mark.parametrize(
    ("note", "text"),
    [
        (means(ours=("r1", "missing"), theirs=("parameters", "state_bytes")),
         "ours r1 1.5, theirs parameters 1,234, theirs state_bytes 2,000"),
        (means("{key}", ours=("r1",)), "r1 1.5"),
        (means(digits={"r1": 3}, absent=("r1",), ours=("r1",)), "ours r1 1.500"),
    ],
)  # fmt: skip
def test_what_is_shown_beside_an_effect_is_the_mean_over_seeds(note, text):
    theirs = {"parameters": 1234, "state_bytes": 2000}
    assert note([{"ours": {"r1": 1.0}, "theirs": theirs}, {"ours": {"r1": 2.0}, "theirs": theirs}]) == text


def test_a_training_is_told_apart_by_arm_seed_and_data_and_measured_at_the_recipes_steps(tmp_path, monkeypatch):
    seen = {}

    def fit(module, batches, recipe, folder, callbacks, identity):
        seen.update(identity, folder=folder, steps=sorted(callbacks[1].steps))
        callbacks[0].values["loss"] = [(8, 0.5)]
        callbacks[1].values.append((8, callbacks[1].measure()))
        return 0.1234567

    monkeypatch.setattr(effects, "fit", fit)
    trained = train_arm(context(tmp_path), None, None, {"data": "abc"}, evals={"r1": lambda: 7.0})
    assert trained == {"curves": {"loss": [(8, 0.5)], "r1": [(8, 7.0)]}, "waited": 0.12346}
    assert seen == {"arm": "arm", "seed": 3, "data": "abc", "folder": tmp_path, "steps": [2, 5, 8, 10]}


def test_the_first_seed_alone_leaves_its_model_and_tokenizer(tmp_path):
    class Tokenizer:
        def save(self, path):
            path.write_text("{}")

    save_first_seed(context(tmp_path, first=False), nn.Linear(1, 1), Tokenizer())
    assert not list(tmp_path.iterdir())
    save_first_seed(context(tmp_path), nn.Linear(1, 1), Tokenizer())
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "tokenizer.json"}
