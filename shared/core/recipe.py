"""Recipes: one flat YAML file per paper and scale, typed by a dataclass; a wrong key or value is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from shared.core.errors import UserError, nearest
from shared.core.strict_yaml import read_yaml

SCALES = ("smoke", "mini", "field", "gpu", "paper")  # field: real, noisy data on disk; not every paper has it
SEED_BASE = 1_000


@dataclass
class Recipe:
    """What every paper's recipe has; a paper extends it in its recipe.py. Sizes in samples, tokens and pixels."""

    paper: str = "???"
    scale: Literal["smoke", "mini", "field", "gpu", "paper"] = "smoke"
    model: str = "???"  # a variant of the paper's config.py
    seeds: int = 1  # paired seeds of every claim
    rungs: list[str] = field(default_factory=lambda: ["structure", "parity", "claims", "metrics"])
    claims: list[str] = field(default_factory=list)  # ids of paper.yaml; empty: all

    data: str = "emoji"  # emoji | shapes | cifar10 | imagefolder | karpathy
    data_root: str = ""  # where data that is not generated or fetched lies
    pairs: int = 1_000
    test_pairs: int = 200
    image_size: int = 32
    manifest: str = "checkpoints_manifest.yaml"  # of released weights

    batch: int = 64  # the global batch
    steps: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    warmup_steps: int = 10

    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1  # processes a node
    nodes: int = 1
    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3", "zero3_offload"] = "auto"
    accumulate: int = 1  # parts of a batch that are computed one after the other
    checkpoint_every: int = 100  # steps; 0: never
    compile: bool = False
    recompute: bool = False  # activation checkpointing
    jobs: int = 0  # arms trained at once; 0: one a core on CPU, one on a GPU
    workers: int = 0  # data-loader processes


R = TypeVar("R", bound=Recipe)


def require_negatives(recipe: Recipe) -> None:
    """UserError where a part of a batch has one pair: contrast without negatives has loss 0 and learns nothing."""
    if recipe.batch // recipe.accumulate < 2:
        raise UserError(
            f"recipe: batch={recipe.batch} with accumulate={recipe.accumulate} leaves a pair alone, without negatives: "
            "raise batch, or lower accumulate"
        )


def load_recipe(path: Path, schema: type[R], overrides: list[str] | None = None) -> R:
    """Read a recipe strictly and apply `key=value` overrides. UserError names the key, the place and what is near."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError(f"{path}: no such recipe; there are: {', '.join(there) or 'none'}")
    given = read_yaml(path, "recipe")
    if not isinstance(given, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    layers: list[tuple[str, Any]] = [(str(path), given)]
    for override in overrides or []:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise UserError(f"ARGS: '{override}' is not of the form key=value")
        try:
            layers.append((f"ARGS '{override}'", OmegaConf.to_container(OmegaConf.from_dotlist([override]))))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise UserError(f"ARGS: '{override}': {_one_line(error)}") from None
        if value == "???":
            raise UserError(f"ARGS: '{override}' would leave {key} without a value")
    names = [f.name for f in dataclasses.fields(schema)]
    merged = OmegaConf.structured(schema)
    for place, layer in layers:
        if "${" in str(layer):  # OmegaConf would put a variable of the environment in its place, a secret too
            raise UserError(f"{place}: ${{...}} is not taken in a recipe: write the value out")
        for key, value in layer.items():
            if key not in names:
                raise UserError(f"{place}: unknown key '{key}' ({nearest(str(key), names)})")
            try:
                merged = OmegaConf.merge(merged, {key: value})
            except OmegaConfBaseException as error:
                raise UserError(f"{place}: {key}: {_one_line(error)}") from None
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise UserError(f"{path}: no value for {', '.join(missing)}")
    recipe = OmegaConf.to_object(merged)
    assert isinstance(recipe, schema)
    _check(recipe, path)
    return recipe


def _check(recipe: Recipe, path: Path) -> None:
    # `rungs` may be empty only by mistake; sizes below one would fail far from here
    for name in ("seeds", "pairs", "test_pairs", "image_size", "batch", "steps", "devices", "nodes", "accumulate"):
        if getattr(recipe, name) < 1:
            raise UserError(f"{path}: {name} is {getattr(recipe, name)}, but must be at least 1")
    parts = recipe.devices * recipe.nodes * recipe.accumulate
    if recipe.batch % parts:
        raise UserError(f"{path}: batch {recipe.batch} does not divide by devices x nodes x accumulate = {parts}")
    unknown = set(recipe.rungs) - {"structure", "parity", "claims", "metrics"}
    if unknown or not recipe.rungs:
        raise UserError(f"{path}: rungs are structure, parity, claims, metrics; not {sorted(unknown) or 'none at all'}")
    if recipe.batch > recipe.pairs:
        raise UserError(f"{path}: a batch of {recipe.batch} needs at least as many pairs, not {recipe.pairs}")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every key, as YAML."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, width=120)


def digest(recipe: Recipe | dict) -> str:
    """Sixteen hex digits that change with any value of the recipe."""
    values = recipe if isinstance(recipe, dict) else dataclasses.asdict(recipe)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def training_fields(recipe: Recipe) -> dict:
    """The values that decide what one arm computes: not how many arms there are, nor how they are spread."""
    others = ("seeds", "rungs", "claims", "jobs", "workers", "checkpoint_every", "data_root")  # the digest tells data
    return {key: value for key, value in dataclasses.asdict(recipe).items() if key not in others}


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
