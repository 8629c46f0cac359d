"""The keys of CLIP's recipes (recipes/clip/*.yaml)."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.core.errors import UserError
from shared.data.recipe import SceneRecipe


@dataclass
class ClipRecipe(SceneRecipe):
    """What CLIP's recipes have beside every paper's."""

    captions: int = 1  # a training picture has
    measure_at: int = 8  # points of the learning curves
    val_pictures: int = 256  # read at each of them
    ladder: list[int] = field(default_factory=lambda: [24, 40, 96])  # widths beside the model's own (clip.scaling)

    def __post_init__(self) -> None:
        if self.measure_at < 1 or len(self.ladder) != 3 or min(self.ladder) < 1:
            raise UserError("recipe: measure_at must be at least 1, and ladder must name three widths")
