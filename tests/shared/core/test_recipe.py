"""A recipe is typed: what is wrong is named with its key, its place and the nearest valid one."""

import pytest

from papers.clip.recipe import ClipRecipe
from shared.core.errors import UserError
from shared.core.recipe import digest, load_recipe, to_yaml

GOOD = "paper: clip\nscale: smoke\nmodel: clip-tiny\nbatch: 8\npairs: 64\n"


def write(tmp_path, text):
    path = tmp_path / "smoke.yaml"
    path.write_text(text)
    return path


def test_a_recipe_takes_defaults_and_overrides(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ClipRecipe, ["batch=16", "data_root=a folder", "ladder=[1,2,3]"])
    assert (recipe.batch, recipe.pairs, recipe.data_root, recipe.ladder) == (16, 64, "a folder", [1, 2, 3])


def test_what_is_saved_reads_back_as_the_same_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ClipRecipe)
    again = load_recipe(write(tmp_path, to_yaml(recipe)), ClipRecipe)
    assert again == recipe and digest(again) == digest(recipe)


def test_the_digest_changes_with_any_value(tmp_path):
    path = write(tmp_path, GOOD)
    assert digest(load_recipe(path, ClipRecipe)) != digest(load_recipe(path, ClipRecipe, ["seeds=2"]))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            GOOD + "lerning_rate: 1.0\n",
            [],
            r"smoke.yaml: unknown key 'lerning_rate' \(did you mean 'learning_rate'\?\)",
        ),
        (GOOD + "learning_rate: fast\n", [], r"smoke.yaml: learning_rate: .*'fast'"),
        (GOOD + "precision: fp8\n", [], r"smoke.yaml: precision: .*fp8"),
        (GOOD, ["stepz=3"], r"ARGS 'stepz=3': unknown key 'stepz' \(did you mean 'steps'\?\)"),
        (GOOD, ["steps=many"], r"ARGS 'steps=many': steps: .*many"),
        (GOOD, ["steps"], "ARGS: 'steps' is not of the form key=value"),
        (GOOD, ["model=???"], "without a value"),
        (GOOD, ["steps=0"], "steps is 0, but must be at least 1"),
        (GOOD, ["batch=100"], "a batch of 100 needs at least as many pairs, not 64"),
        (GOOD, ["rungs=[structure,metric]"], "rungs are structure, parity, claims, metrics"),
        ("scale: smoke\n", [], "no value for model, paper"),
        (GOOD + "batch: 9\n", [], "not valid YAML"),
        ("- a\n- b\n", [], "a recipe is a mapping"),
        ("a: [\n", [], "not valid YAML"),
        ("a: &x [1]\nb: *y\n", [], "not valid YAML"),
    ],
)
def test_every_fault_is_one_line_that_names_it(tmp_path, text, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(tmp_path, text), ClipRecipe, overrides)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_names_those_there_are(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"tiny.yaml: no such recipe; there are: smoke"):
        load_recipe(tmp_path / "tiny.yaml", ClipRecipe)
