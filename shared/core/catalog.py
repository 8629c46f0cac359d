"""Finds papers by listing their folder: no registry. What a paper offers: paper_package.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.core.errors import UserError, nearest
from shared.core.paper_card import PaperCard, load_paper
from shared.core.paper_package import PaperPackage
from shared.core.recipe import SCALES, Recipe, load_recipe


@dataclass(frozen=True)
class Catalog:
    """`folder` holds one folder a paper, importable as `import_name`; recipes and results stand beside it."""

    folder: Path
    import_name: str

    @property
    def root(self) -> Path:
        return self.folder.parent

    def names(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("*/paper.yaml"))

    def known(self, name: str) -> str:
        """The name itself, or a UserError with the nearest one."""
        names = self.names()
        if name not in names:
            raise UserError(f"no paper '{name}'; {nearest(name, names)}")
        return name

    def card(self, name: str) -> PaperCard:
        return load_paper(self.folder / self.known(name) / "paper.yaml")

    def package(self, name: str) -> PaperPackage:
        """What the paper's folder offers; its parts may import torch."""
        return PaperPackage(f"{self.import_name}.{self.known(name)}")

    def variants(self, name: str) -> Mapping[str, Any]:
        return self.package(name).config.VARIANTS

    def recipe_path(self, name: str, scale: str) -> Path:
        if scale not in SCALES:
            raise UserError(f"no scale '{scale}'; {nearest(scale, SCALES)}")
        return self.root / "recipes" / self.known(name) / f"{scale}.yaml"

    def recipe(self, name: str, scale: str, overrides: list[str]) -> Recipe:
        path = self.recipe_path(name, scale)
        recipe = load_recipe(path, self.package(name).recipe_type, overrides)
        for key, value in (("paper", name), ("scale", scale)):
            if getattr(recipe, key) != value:
                raise UserError(f"{path}: {key} is '{getattr(recipe, key)}', but the file's place says '{value}'")
        self.variant(name, recipe.model)
        known = {row.id for row in self.card(name).claims}
        for claim in recipe.claims:
            if claim not in known:
                raise UserError(f"{path}: no claim '{claim}'; {nearest(claim, sorted(known))}")
        return recipe

    def paper_that_answers(self, variant: str) -> str:
        """The paper of a variant that writes captions, or a UserError with the nearest variant."""
        names = [name for name in self.names() if "caption" in self.package(name).uses()]
        paper_of = {known: name for name in names for known in self.variants(name)}
        if variant not in paper_of:
            raise UserError(f"no model '{variant}' that speaks of pictures; {nearest(variant, paper_of)}")
        return paper_of[variant]

    def variant(self, name: str, variant: str) -> str:
        variants = self.variants(name)
        if variant not in variants:
            raise UserError(f"{name}: no variant '{variant}'; {nearest(variant, variants)}")
        return variant
