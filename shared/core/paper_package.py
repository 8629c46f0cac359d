"""What the runtime takes of a paper's folder, part by part: one typed contract, checked for every paper by
tests/contracts/test_paper_package.py. A part is a module; it is imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from shared.core.errors import UserError

if TYPE_CHECKING:
    import lightning
    from torch import Tensor

    from shared.core.paper_card import MetricRow
    from shared.core.recipe import Recipe


@dataclass(frozen=True)
class Claim:
    """effect(measurements of one seed, {arm: {name: number}}) -> the effect in the unit of paper.yaml's row.

    It may return None where the data has not what the claim needs; `need` then says what would have.
    """

    arms: tuple[str, ...]
    effect: Callable[[dict[str, dict]], float | None]
    need: str = ""
    shown: Callable[[list[dict[str, dict]]], str] | None = None  # what else the report should say of all seeds
    seeds: Callable[[Recipe], int] | None = None  # of how many seeds, the first; None: of all. Dear arms leave some out


@dataclass
class Context:
    """What an arm is given: everything follows from recipe and seed."""

    recipe: Recipe
    seed: int
    folder: Path  # of this arm and seed
    progress: Callable[[int], None]  # samples just seen
    first: bool  # the seed whose model and figures are kept
    arm: str = ""


@dataclass
class Trainable:
    """What a paper's train.prepare(recipe, seed) gives. batches: of (rank, ranks); digest: of the data."""

    module: lightning.LightningModule
    batches: Callable[[int, int], Any]
    digest: str
    save_tokenizer: Callable[[Path], None]


class Config(Protocol):
    """papers/<name>/config.py. VARIANTS: {name: a function that gives its frozen configuration}; one at least is
    called "<name>-tiny...", for the contract tests."""

    VARIANTS: Mapping[str, Callable[[], Any]]


class Module(Protocol):
    """papers/<name>/module.py."""

    def example(self, pictures: int) -> tuple[lightning.LightningModule, tuple[Tensor, ...]]:
        """A tiny module and a batch of so many pictures, one too: what the contract tests train. 60 steps bring its
        loss below a fifth (its own recipe may set learning rate and warm-up); in bf16 it stays within 3 %."""


class Weights(Protocol):
    """papers/<name>/weights.py. FORMATS: {published layout: a WeightFormat (weights/formats.py)}. What transformers has
    no class for, a paper need not export."""

    FORMATS: Mapping[str, Any]

    def convert(self, source: Path, target: Path, variant: str, to: str) -> None:
        """Rewrite a weights file under the names `to`, "ours" or a published format's."""

    def export(self, source: Path, target: Path, variant: str, to: str, tokenizer: Path | None, catalog: Any) -> None:
        """Write weights as a new folder that the library `to` loads, with its tokenizer and card."""


class Inference(Protocol):
    """papers/<name>/inference.py. USES: which verbs it serves: caption, ask, chat, zeroshot."""

    USES: Sequence[str]

    def load_for_inference(self, variant: str, weights: Path | None, tokenizer: Path | None, use: str) -> Any:
        """A VisionLanguageModel (inference/predict.py): a local file's with the tokenizer.json that it was trained
        with, or the manifest's released weights for that use."""


class Train(Protocol):
    """papers/<name>/train.py."""

    def prepare(self, recipe: Any, seed: int) -> Trainable:
        """Module and batches of `python -m papers train`."""


class Parts(Protocol):
    """papers/<name>/parts.py: pretrained parts for other papers' runs. PARTS: their names."""

    PARTS: Sequence[str]

    def build(self, part: str, recipe: Any, seed: int, folder: Path) -> dict[str, float]:
        """Train the part and leave its files in `folder`. -> what was measured of it."""

    def load(self, folder: Path, **options: Any) -> Any:
        """Read what `build` left."""


class Structure(Protocol):
    """papers/<name>/evidence/structure.py."""

    def measure(self, variant: str) -> dict[str, float]:
        """Counts of the full-size network on the meta device: {part of paper.yaml's structure rows: number}, "total"
        (parameters) among them, of every variant that a recipe names."""

    def forward_flops(self, variant: str) -> int:
        """FLOPs of a forward pass over one sample."""

    def step(self, variant: str) -> Any:
        """What `plan` counts of a training step: a Step (tools/footprint.py)."""


class Claims(Protocol):
    """papers/<name>/evidence/claims.py. ARMS: {arm: its training}, those first that make what others wait for."""

    ARMS: Mapping[str, Callable[[Context], dict]]
    CLAIMS: Mapping[str, Claim]

    def load(self, recipe: Any, seed: int) -> Any:
        """The data of a seed, as every arm of that seed has it: a DatasetBundle (data/dataset.py)."""

    pretrained_parts: Callable[[Any], Sequence[Any]]  # what arms take of other papers; may be missing


class Figures(Protocol):
    """papers/<name>/evidence/figures.py."""

    def draw(self, recipe: Any, outcomes: dict[int, dict[str, dict]], folder: Path) -> tuple[list[Any], list[Any]]:
        """Figures and Samples (report/rows.py), from what all arms measured and what the first seed left."""


class Benchmarks(Protocol):
    """papers/<name>/evidence/benchmarks.py. BENCHMARKS: {task of a metrics row: a Benchmark of
    experiments/benchmarks.py}, empty where the card has no such row."""

    BENCHMARKS: Mapping[str, Any]

    def measure(self, row: MetricRow, recipe: Any) -> float:
        """The released weights' score of one row, in percent; UserError says what is missing."""


class Bench(Protocol):
    """papers/<name>/evidence/bench.py. SWEEPS: {name: its races on a Setup (tools/bench_setup.py)}."""

    SWEEPS: Mapping[str, Callable[[Any], Sequence[Any]]]

    def config_of(self, variant: str) -> Any:
        """The configuration that is raced under this name; UserError for an unknown one."""

    def inputs(self, config: Any, batch: int, device: str) -> tuple[Tensor, ...]:
        """The same pictures and texts for all contestants."""


@dataclass(frozen=True)
class PaperPackage:
    """A paper by its import name, such as "papers.clip"."""

    name: str

    @property
    def config(self) -> Config:
        return cast(Config, self._part("config"))

    @property
    def recipe_type(self) -> type[Recipe]:
        """The one Recipe that the paper's recipe.py defines."""
        from shared.core.recipe import Recipe

        module = self._part("recipe")
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        kinds = [kind for kind in own if issubclass(kind, Recipe)]
        if len(kinds) != 1:
            raise UserError(f"{self.name.replace('.', '/')}/recipe.py defines {len(kinds)} kinds of Recipe, not one")
        return kinds[0]

    @property
    def module(self) -> Module:
        return cast(Module, self._part("module"))

    @property
    def weights(self) -> Weights:
        return cast(Weights, self._part("weights"))

    @property
    def inference(self) -> Inference:
        return cast(Inference, self._part("inference"))

    @property
    def train(self) -> Train:
        return cast(Train, self._part("train"))

    @property
    def parts(self) -> Parts:
        return cast(Parts, self._part("parts"))

    @property
    def structure(self) -> Structure:
        return cast(Structure, self._part("evidence.structure"))

    @property
    def claims(self) -> Claims:
        return cast(Claims, self._part("evidence.claims"))

    @property
    def figures(self) -> Figures:
        return cast(Figures, self._part("evidence.figures"))

    @property
    def benchmarks(self) -> Benchmarks:
        return cast(Benchmarks, self._part("evidence.benchmarks"))

    @property
    def bench(self) -> Bench:
        return cast(Bench, self._part("evidence.bench"))

    def uses(self) -> Sequence[str]:
        """The verbs that its inference.py serves, none where it has none."""
        return self.inference.USES if self.offers("inference", "USES") else ()

    def offers(self, part: str, function: str) -> bool:
        """Whether the paper has that part, and the part that function."""
        try:
            return hasattr(self._part(part), function)
        except UserError:
            return False

    def _part(self, place: str) -> Any:
        name = f"{self.name}.{place}"
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the part is there; what it imports is not
            raise UserError(f"{self.name.replace('.', '/')} has no {place.replace('.', '/')}.py") from None
