"""The recipe keys of generated scenes, and the data of one (recipe, seed): what every paper's data.py begins with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shared.core.recipe import Recipe
from shared.data.dataset import DatasetBundle, make_dataset
from shared.data.synthetic.packs import packs
from shared.data.synthetic.scenes import COLOURS, SceneOptions, render_many, sample_scene
from shared.data.synthetic.sprites import SpritePack

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class SceneRecipe(Recipe):
    """A recipe whose pictures may be scenes that are made here, and how hard these are to see
    (data/synthetic/scenes.py)."""

    classes: int = 32
    objects: int = 2  # things in a picture at most
    clutter: float = 0.5
    noise: float = 10.0  # of the pixels
    jitter: float = 1.0
    small: float = 0.4
    max_dropped: float = 0.001  # share of pictures that cannot be read, or have no caption, which is put up with

    @property
    def scene_options(self) -> SceneOptions:
        return SceneOptions((1, self.objects), self.clutter, self.noise, self.jitter, self.small)


@dataclass
class EasySceneRecipe(SceneRecipe):
    """Scenes of one thing that is large and stands free."""

    classes: int = 16
    objects: int = 1
    clutter: float = 0.0
    noise: float = 4.0
    jitter: float = 0.5
    small: float = 0.0


def load_dataset(recipe: SceneRecipe, seed: int, pairs: int = 0, **options: Any) -> DatasetBundle:
    """The recipe's data. pairs: others than the recipe's; options: what else `make_dataset` takes."""
    return make_dataset(
        recipe.data,
        root=recipe.data_root or None,
        pairs=pairs or recipe.pairs,
        test_pairs=recipe.test_pairs,
        image_size=recipe.image_size,
        seed=seed,
        classes=recipe.classes,
        options=recipe.scene_options,
        max_dropped=recipe.max_dropped,
        **options,
    )


def scene_pack(recipe: SceneRecipe, dataset: DatasetBundle) -> SpritePack | None:
    """What the dataset's scenes are made of; None where it is a published set."""
    if dataset.train.noisy is None or dataset.classes is None:
        return None
    return packs(recipe.data, recipe.data_root or None)[0].subset(len(dataset.classes))


def labelled_pictures(recipe: SceneRecipe, dataset: DatasetBundle, seed: int) -> tuple[Tensor, Tensor]:
    """What stands for ImageNet, of a dataset with `class_train`: pictures (N, 3, H, W) uint8 and labels (N, kinds).

    Of scenes further ones of one thing each, as many as the recipe's pairs, labelled with thing and colour; of a
    published set its training pictures with their classes.
    """
    import torch

    pack = scene_pack(recipe, dataset)
    if pack is None:
        pictures = dataset.class_train
        assert pictures is not None and pictures.labels is not None, "of a dataset with class_train"
        return pictures.images, pictures.labels[:, None]
    options, names, colours = replace(recipe.scene_options, objects=(1, 1)), pack.names, list(COLOURS)
    scenes = [
        sample_scene(pack, "labelled", index, seed=seed, options=options, first=names[index % len(names)])
        for index in range(recipe.pairs)
    ]
    things = [scene.things[0] for scene in scenes]
    labels = [[names.index(thing.name), colours.index(thing.colour)] for thing in things]
    return torch.from_numpy(render_many(scenes, pack, recipe.image_size)), torch.tensor(labels)
