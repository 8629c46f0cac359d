"""What a run would take, before it starts: `DRY=1` for a reproduction on this machine, `plan` for machines on paper.

A plan's FLOPs and bytes are counted (footprint.py), its rates are those of data sheets (hardware.py), and
one number is an assumption that it states: the share of the peak that the GPUs reach.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from shared.core.catalog import Catalog
from shared.core.console import Console
from shared.core.device import cores
from shared.core.errors import UserError
from shared.core.recipe import Recipe, to_yaml
from shared.tools.hardware import Gpu, find_gpu

if TYPE_CHECKING:  # torch comes late
    from shared.core.paper_package import Structure
    from shared.tools.footprint import Encoders, Objective

# Sustained rates seen on a bf16-capable server core with small models (fp32), and on one H100-class GPU (bf16).
# An estimate, good to a factor of two; what a run really took stands in its report.
CORE_FLOPS, GPU_FLOPS = 2.0e10, 2.0e14

# Executed FLOPs, recomputed ones too, over the peak. CLIP (Sec. 2.5) trained ViT-L/14 in 12 days on 256 V100 and
# RN50x64 in 18 days on 592, with gradient checkpointing: 0.25 and 0.24 by the FLOPs counted here, if all is recomputed.
EFFICIENCY = 0.25
WHY_EFFICIENCY = "CLIP's printed 12 days on 256 V100 for ViT-L/14 come to that (--efficiency)"
USABLE = 0.9  # of a GPU's memory: CUDA's context, NCCL's and ZeRO's buckets and the allocator's gaps have the rest
LIVE = 1e9  # parameters that ZeRO-3 keeps gathered at once: DeepSpeed's stage3_max_live_parameters by default
STAGES = (0, 1, 2, 3)


# ---- DRY=1


def dry_run(catalog: Catalog, recipe: Recipe) -> str:
    """Resolved recipe, parameters, downloads with size and hash, claims, and an estimate of time and memory."""
    from shared.data.dataset import entries_of
    from shared.weights.fetch import cached
    from shared.weights.manifest import load_manifest

    card = catalog.card(recipe.paper)
    structure = catalog.package(recipe.paper).structure
    measured = structure.measure(recipe.model)
    if "total" not in measured:
        raise UserError(
            f"papers/{recipe.paper}/evidence/structure.py: measure({recipe.model!r}) gives no 'total' (gives: "
            f"{', '.join(measured)})"
        )
    lines = [f"{recipe.paper} at scale {recipe.scale}: {card.paper.title}", "", "recipe (resolved)"]
    lines += [f"  {line}" for line in to_yaml(recipe).splitlines()]
    lines += ["", f"model {recipe.model}: {measured['total']:,} parameters"]

    lines += ["", "would be downloaded"]
    manifest = load_manifest(catalog.root / "checkpoints_manifest.yaml")
    entries = entries_of(recipe.data) if "claims" in recipe.rungs else []
    if "metrics" in recipe.rungs and recipe.scale == "paper":
        entries = [*entries, *dict.fromkeys(row.need.weights for row in card.metrics)]
    for id in entries:
        entry = manifest[id]
        size = f"{entry.size / 1e6:.0f} MB" if entry.size else "size unknown"
        state = "in the cache" if cached(entry) else "to download"
        lines.append(f"  {id}: {entry.origin}, {size}, sha256 {entry.sha256}, {state}")
    if not entries:
        lines.append("  nothing")

    if "claims" in recipe.rungs:
        wanted, arms = claims_and_arms(catalog, recipe)
        lines += ["", f"claims that would be tested ({recipe.seeds} paired seeds, {len(arms)} arms: {', '.join(arms)})"]
        lines += [f"  {row.id}: {row.statement}" for row in wanted]
        found = estimate(recipe, measured["total"], structure.forward_flops(recipe.model), len(arms))
        lines += ["", f"estimate, to a factor of two, if every arm trains in full: {found}"]
    return "\n".join(lines)


def claims_and_arms(catalog: Catalog, recipe: Recipe) -> tuple[list, list[str]]:
    """The claim rows that the recipe tests, and the arms that they need, each once."""
    claims = catalog.package(recipe.paper).claims.CLAIMS
    wanted = [row for row in catalog.card(recipe.paper).claims if not recipe.claims or row.id in recipe.claims]
    return wanted, list(dict.fromkeys(arm for row in wanted for arm in claims[row.id].arms))


@dataclass(frozen=True)
class Estimate:
    """Of the claims rung, to a factor of two."""

    samples: int
    flops: float
    rate: float  # FLOP/s
    memory: float  # bytes
    processes: int

    @property
    def seconds(self) -> float:
        return self.flops / self.rate

    def __str__(self) -> str:
        return (
            f"{self.samples:,} samples, {self.flops:.2g} FLOPs, {self.seconds / 60:.1f} minutes of training at "
            f"{self.rate:.0e} FLOP/s, {self.memory / 1e9:.1f} GB of memory in {self.processes} process(es)"
        )


def estimate(recipe: Recipe, parameters: float, forward: int, arms: int) -> Estimate:
    """parameters: of the recipe's model; forward: FLOPs of its forward pass of one sample."""
    on_gpu = recipe.accelerator == "cuda"
    samples = arms * recipe.seeds * recipe.steps * recipe.batch
    flops = 3.0 * forward * samples  # one forward, two for the backward
    pixels = recipe.pairs * 3 * recipe.image_size**2
    state = 16 * parameters  # fp32 weights, gradients, two Adam moments
    processes = recipe.jobs or (1 if on_gpu else cores())
    memory = processes * (1.2e9 + 2 * pixels + 2 * state)  # 1.2 GB a process: the libraries
    return Estimate(samples, flops, GPU_FLOPS if on_gpu else CORE_FLOPS * cores(), memory, processes)


# ---- plan


@dataclass(frozen=True)
class States:
    """Bytes on one GPU that do not depend on the batch."""

    weights: float
    gradients: float
    optimizer: float  # two moments, and under ZeRO the fp32 master weights

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def states(parameters: int, trained: int, precision: str, stage: int, gpus: int) -> States:
    """AdamW's. Stage 0 is DDP: fp32 throughout, autocast makes 16-bit copies as it goes. ZeRO under a mixed precision
    keeps 16-bit weights and gradients, and master weights and moments in fp32 (Rajbhandari et al. 2020, Sec. 3.1),
    split over the GPUs: from stage 1 the optimizer's, from 2 gradients, from 3 weights."""
    if stage == 0:
        return States(4 * parameters, 4 * trained, 8 * trained)
    width = 4 if precision == "32-true" else 2
    gathered = width * min(parameters, LIVE) * (1 - 1 / gpus) if stage == 3 else 0
    return States(
        width * parameters / (gpus if stage == 3 else 1) + gathered,
        width * trained / (gpus if stage >= 2 else 1),
        12 * trained / gpus,
    )


def sent(parameters: int, trained: int, precision: str, stage: int, gpus: int, parts: int, features: float) -> float:
    """Bytes that one GPU sends in a step of `parts` accumulated micro-batches, by rings (ZeRO: Sec. 7).

    An all-reduce is a reduce-scatter and an all-gather of (N-1)/N each. Accumulated gradients travel once, but from
    stage 2 on with every part, and from 3 on weights travel twice a part. features: bytes of all GPUs' features, of
    which a copy is gathered, and the gradient all-reduced.
    """
    width = 4 if stage == 0 or precision == "32-true" else 2
    gradients, weights = width * trained, width * parameters
    moved = {
        0: 2 * gradients,
        1: gradients + width * trained,
        2: parts * gradients + width * trained,
        3: parts * (gradients + 2 * weights),
    }[stage]
    return (moved + 3 * features) * (gpus - 1) / gpus


@dataclass(frozen=True)
class Row:
    """One ZeRO stage of a plan. Bytes are of one GPU, seconds of one step."""

    stage: int
    states: States
    working: float  # bytes beyond the states, at `micro`
    largest: int  # micro-batch that fits; 0: not even one sample does
    micro: int  # samples that a GPU computes at once: as many as fit, in parts of equal size
    parts: int  # of a step, one after the other
    flops: float
    sent: float
    compute: float
    communication: float
    update: float

    @property
    def step(self) -> float:
        """Seconds with nothing hidden behind anything."""
        return self.compute + self.communication + self.update


@dataclass(frozen=True)
class Plan:
    """A variant, counted, on so many GPUs; `rows` are its ZeRO stages."""

    variant: str
    recipe: Recipe
    gpu: Gpu
    gpus: int
    efficiency: float
    parameters: int
    trained: int
    gathered: int  # bytes a sample
    encoders: dict[tuple[bool, bool], Encoders]  # {(ZeRO, recompute): ...}; of the recompute not asked for `kept` alone
    objectives: dict[str, Objective]  # training uses the first
    stages: tuple[int, ...]

    @property
    def objective(self) -> Objective:
        """The one that training uses."""
        return next(iter(self.objectives.values()))

    @property
    def rows(self) -> list[Row]:
        return [self.row(stage) for stage in self.stages]

    def working(self, stage: int, micro: int) -> float:
        """Most bytes beyond the states in a forward and backward pass of `micro` samples on each GPU."""
        encoders = self.encoders[stage > 0, self.recipe.recompute]
        gathered = 2 * self.gathered * micro * self.gpus if self.gpus > 1 else 0  # a copy, and its gradient
        objective = self.objective.peak(micro, micro * self.gpus)
        return max(encoders.peak(micro), encoders.kept(micro) + objective + gathered)

    def largest(self, stage: int) -> int:
        """The largest micro-batch that fits; 0 where none does."""
        room = USABLE * self.gpu.memory - self.states(stage).total
        fits, fails = 0, 1
        while self.working(stage, fails) <= room:
            fits, fails = fails, 2 * fails
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self.working(stage, middle) <= room else (fits, middle)
        return fits

    def states(self, stage: int) -> States:
        return states(self.parameters, self.trained, self.recipe.precision, stage, self.gpus)

    def row(self, stage: int) -> Row:
        recipe, gpus = self.recipe, self.gpus
        own, largest = recipe.batch / gpus, self.largest(stage)
        parts = max(recipe.accumulate, math.ceil(math.ceil(own) / max(1, largest)))
        micro = math.ceil(own / parts)
        encoders = self.encoders[stage > 0, recipe.recompute]
        flops = own * (encoders.forward(1) + encoders.backward(1))
        flops += parts * self.objective.flops(own / parts, recipe.batch / parts)
        moved = sent(self.parameters, self.trained, recipe.precision, stage, gpus, parts, self.gathered * recipe.batch)
        # AdamW reads weight, gradient and two moments, and writes all but the gradient; ZeRO a 16-bit weight too
        width = 28 if stage == 0 else 24 + 2 * (4 if recipe.precision == "32-true" else 2)
        return Row(
            stage,
            self.states(stage),
            self.working(stage, micro),
            largest,
            micro,
            parts,
            flops,
            moved,
            flops / (self.gpu.peak(recipe.precision) * self.efficiency),
            moved / self.gpu.between(gpus),
            width * self.trained / (gpus if stage else 1) / self.gpu.bandwidth,
        )


def make_plan(
    catalog: Catalog,
    variant: str,
    gpus: int = 1,
    gpu: str = "h100",
    efficiency: float | None = None,
    batch: int | None = None,
    zero: int | None = None,
    overrides: list[str] | None = None,
    console: Console | None = None,
) -> Plan:
    """Count a variant, and lay out its paper's recipe at scale `paper` on `gpus` GPUs. zero: one stage, None: all."""
    paper = variant.split("-")[0]
    catalog.variant(paper, variant)
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}, but must be at least 1")
    efficiency = EFFICIENCY if efficiency is None else efficiency
    if not 0 < efficiency <= 1:
        raise UserError(f"--efficiency is {efficiency:g}, but is a share of the peak: above 0, at most 1")
    if zero is not None and zero not in STAGES:
        raise UserError(f"--zero is {zero}, but there are the stages {', '.join(map(str, STAGES))} (0 is DDP)")
    asked = [f"model={variant}", *([] if batch is None else [f"batch={batch}"]), *(overrides or [])]
    recipe, stages = catalog.recipe(paper, "paper", asked), STAGES if zero is None else (zero,)
    if recipe.batch < gpus:
        raise UserError(f"a batch of {recipe.batch} is less than a sample for each of {gpus} GPUs; use fewer GPUs")
    found = find_gpu(gpu)
    found.peak(recipe.precision)
    with console.waiting(f"counting {variant}, on shapes alone") if console else nullcontext():
        counted = count(catalog.package(paper).structure, variant, recipe, stages)
    return Plan(variant, recipe, found, gpus, efficiency, **counted, stages=stages)


def count(structure: Structure, variant: str, recipe: Recipe, stages: tuple[int, ...]) -> dict:
    """What Plan holds of a variant: parameters, encoders and objectives."""
    import torch

    from shared.tools.footprint import count_encoders, count_objectives, shapes_only

    def build():
        return structure.step(variant)

    with shapes_only():
        work = build()
    parameters = list(work.model.parameters())
    half = {"32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}[recipe.precision]

    @cache
    def counted(weights: torch.dtype, half: torch.dtype | None, recompute: bool) -> Encoders:
        whole = recompute == recipe.recompute
        return count_encoders(build, weights=weights, half=half, recompute=recompute, backward=whole)

    encoders = {}
    for recompute in (False, True):
        for stage in stages:  # ZeRO casts the weights, plain training the operands
            dtypes = (half or torch.float32, None) if stage else (torch.float32, half)
            encoders[stage > 0, recompute] = counted(*dtypes, recompute)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "gathered": work.gathered,
        "encoders": encoders,
        "objectives": count_objectives(build),
    }


# ---- its text


def text(plan: Plan, price: float | None = None) -> str:
    """The plan as tables. price: of a GPU-hour, in whatever money; without it no cost is said."""
    rows, own = plan.rows, plan.recipe.batch / plan.gpus
    lines = [f"plan: {plan.variant} on {plan.gpus} x {plan.gpu.name}", "", *header(plan, rows[0]), ""]
    lines += _table([_memory_head(plan), *(_memory(row) for row in rows)])
    lines += ["", *_table([_time_head(price), *(_time(row, plan, price) for row in rows)]), ""]
    why = WHY_EFFICIENCY if plan.efficiency == EFFICIENCY else "as given"
    lines += [
        f"assumed: {plan.efficiency:g} of the peak, over executed FLOPs: {why};",
        "  links at their printed rate, nothing hidden behind computation (what is hidden comes off `together`);",
        f"  {1 - USABLE:.0%} of the memory left to CUDA, NCCL and gaps"
        + ("; no price: --price PER_GPU_HOUR" if price is None else f"; {price:g} a GPU-hour"),
        "counted: FLOPs, and bytes alive in a real step, on shapes alone",
        "left out: reading data, evaluation, checkpoints, failures",
    ]
    if any(row.stage == 3 for row in rows):
        lines.append(
            f"ZeRO-3: up to {LIVE:.0e} weights stay gathered (DeepSpeed's default); fewer save memory, for traffic"
        )
    if any(row.parts > 1 for row in rows) and plan.objective.compares:
        lines.append("accumulate: each part is compared with itself alone, a smaller objective than the whole batch's")
    if any(plan.recipe.batch % (plan.gpus * row.parts) for row in rows):
        lines.append(f"the batch does not divide: memory is that of the largest share, time that of {own:,.6g} samples")
    return "\n".join(lines)


def header(plan: Plan, row: Row) -> list[str]:
    """Model, recipe, machine, and what was counted."""
    recipe, gpu, gpus = plan.recipe, plan.gpu, plan.gpus
    encoders = plan.encoders[row.stage > 0, recipe.recompute]
    pairs = f"{row.micro:,} x {row.micro * gpus:,} samples"
    peaks = [f"{name} {o.peak(row.micro, row.micro * gpus) / 1e6:,.0f} MB" for name, o in plan.objectives.items()]
    flops = [f"{name} {o.flops(1, row.micro * gpus) / 1e9:,.3g} G" for name, o in plan.objectives.items()]
    return [
        f"model        {plan.parameters:,} parameters, {plan.trained:,} of them trained",
        f"recipe       recipes/{recipe.paper}/paper.yaml: batch {recipe.batch:,}, {recipe.steps:,} steps "
        f"({recipe.batch * recipe.steps / 1e9:.4g} G samples), {recipe.precision}, recompute "
        f"{'on' if recipe.recompute else 'off'}",
        f"a GPU        {gpu.peak(recipe.precision) / 1e12:,.4g} TFLOP/s, {gpu.memory / 1e9:.0f} GB at "
        f"{gpu.bandwidth / 1e9:,.0f} GB/s, {gpu.between(gpus) / 1e9:.0f} GB/s to the others",
        f"FLOPs        a sample: {encoders.forward(1) / 1e9:,.4g} G forward, {encoders.backward(1) / 1e9:,.4g} G "
        f"backward{', recomputation included' if recipe.recompute else ''}",
        *(_activations(plan, zero) for zero in dict.fromkeys(stage > 0 for stage in plan.stages)),
        f"objective    {pairs}, at most: {', '.join(peaks)}"
        + (f"; features of all {plan.gathered * row.micro * gpus / 1e6:,.0f} MB" if gpus > 1 else ""),
        f"             FLOPs a sample: {', '.join(flops)}",
    ]


def _activations(plan: Plan, zero: bool) -> str:
    off, on = (plan.encoders[zero, flag].kept(2) - plan.encoders[zero, flag].kept(1) for flag in (False, True))
    name = "ZeRO" if zero else "DDP"
    return f"activations  {name}: {off / 1e6:,.1f} MB a sample until the backward pass, recomputed {on / 1e6:,.1f} MB"


def _memory_head(plan: Plan) -> list[str]:
    usable = f"of {USABLE * plan.gpu.memory / 1e9:.1f}"
    heads = ["GB a GPU", "weights", "gradients", "optimizer", "working", "together", usable]
    return [*heads, "micro-batch", "accumulate", "largest"]


def _memory(row: Row) -> list[str]:
    held = row.states
    parts = (held.weights, held.gradients, held.optimizer, row.working, held.total + row.working)
    cells = [_stage(row.stage), *(f"{part / 1e9:.2f}" for part in parts)]
    return [*cells, "fits" if row.largest else "too much", f"{row.micro:,}", str(row.parts), f"{row.largest:,}"]


def _time_head(price: float | None) -> list[str]:
    heads = ["a step", "TFLOP", "compute", "sent", "communication", "update", "together", "all steps", "GPU-hours"]
    return heads if price is None else [*heads, "cost"]


def _time(row: Row, plan: Plan, price: float | None) -> list[str]:
    if not row.largest:
        return [_stage(row.stage), "does not fit", *[""] * (len(_time_head(price)) - 2)]
    seconds = row.step * plan.recipe.steps
    hours = seconds * plan.gpus / 3600
    cells = [_stage(row.stage), f"{row.flops / 1e12:,.1f}", span(row.compute), f"{row.sent / 1e9:.2f} GB"]
    cells += [span(row.communication), span(row.update), span(row.step), span(seconds), f"{hours:,.0f}"]
    return cells if price is None else [*cells, f"{hours * price:,.0f}"]


def _stage(stage: int) -> str:
    return f"ZeRO-{stage}" if stage else "DDP"


def span(seconds: float) -> str:
    """A duration in the unit that suits it, three digits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
