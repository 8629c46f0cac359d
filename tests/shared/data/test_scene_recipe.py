"""The data of one (recipe, seed): a recipe's keys are the dataset's arguments; labelled pictures say what they show."""

from dataclasses import replace

import pytest
import torch

from shared.data.dataset import DatasetBundle, Split, flat, make_dataset
from shared.data.recipe import SceneRecipe, labelled_pictures, load_dataset, scene_pack
from shared.data.synthetic.scenes import COLOURS, SceneOptions

RECIPE = SceneRecipe(
    paper="toy", model="toy-tiny", data="shapes", pairs=12, test_pairs=4, image_size=16, classes=5, objects=1,
    clutter=0.0, noise=2.0, jitter=0.5, small=0.0, batch=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(RECIPE, 3)


def test_every_key_of_the_scenes_reaches_the_dataset(dataset):
    options = SceneOptions(clutter=0.0, noise=2.0, jitter=0.5, small=0.0, objects=(1, 1))
    sizes = {"pairs": 12, "test_pairs": 4, "image_size": 16}
    assert dataset.digest == make_dataset("shapes", **sizes, classes=5, options=options, seed=3).digest
    for changed in ({"objects": 2}, {"clutter": 1.0}, {"noise": 20.0}, {"jitter": 1.0}, {"small": 0.7}, {"classes": 4}):
        assert load_dataset(replace(RECIPE, **changed), 3).digest != dataset.digest, changed
    more = load_dataset(RECIPE, 3, 24, captions=2)
    assert len(more.train) == 24 and all(len(several) == 2 for several in more.train.captions)


def test_a_pack_is_that_of_the_scenes_and_a_published_set_has_none(dataset):
    assert scene_pack(RECIPE, dataset).names == dataset.classes
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    split = Split(["a", "b"], images, [["a cat"], ["a dog"]], torch.tensor([1, 0]))
    published = DatasetBundle("toy", split, split, split, ["dog", "cat"], class_train=split)
    assert scene_pack(RECIPE, published) is None
    shown, labels = labelled_pictures(RECIPE, published, 3)
    assert shown is images and labels.tolist() == [[1], [0]]


def test_labelled_pictures_are_further_ones_of_every_thing_with_thing_and_colour(dataset):
    images, labels = labelled_pictures(RECIPE, dataset, 3)
    assert images.shape == (12, 3, 16, 16) and labels[:, 0].tolist() == [i % 5 for i in range(12)]
    assert labels[:, 1].min() >= 0 and labels[:, 1].max() < len(COLOURS)
    assert not any(torch.equal(image, other) for image in images for other in dataset.train.images)


def test_captions_one_after_the_other_know_their_picture():
    rows, texts = flat([["a", "b"], [], ["c"]])
    assert (rows.tolist(), texts) == ([0, 0, 2], ["a", "b", "c"])
    assert flat([])[0].dtype == torch.long
