"""`DRY=1`: what a reproduction would run, download and cost, printed before anything starts."""

from __future__ import annotations

import os

from shared.catalogue import Catalogue
from shared.recipes import Recipe, to_yaml

# Sustained rates seen on a bf16-capable server core with small models (fp32), and on one H100-class GPU (bf16).
# An estimate, good to a factor of two; what a run really took stands in its report.
CORE_FLOPS, GPU_FLOPS = 2.0e10, 2.0e14


def dry_run(catalogue: Catalogue, recipe: Recipe) -> str:
    """Resolved recipe, parameters, downloads with size and hash, claims, and an estimate of time and memory."""
    from shared.data.world import entries_of
    from shared.fetch import cached, load_manifest

    card = catalogue.card(recipe.paper)
    measured = catalogue.module(recipe.paper, "structure").measure(recipe.model)
    lines = [f"{recipe.paper} at scale {recipe.scale}: {card.paper.title}", "", "recipe (resolved)"]
    lines += [f"  {line}" for line in to_yaml(recipe).splitlines()]
    lines += ["", f"model {recipe.model}: {measured['total']:,} parameters"]

    lines += ["", "would be downloaded"]
    manifest = load_manifest(catalogue.root / "checkpoints_manifest.yaml")
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
        claims = catalogue.module(recipe.paper, "claims")
        wanted = [row for row in card.claims if not recipe.claims or row.id in recipe.claims]
        arms = list(dict.fromkeys(arm for row in wanted for arm in claims.CLAIMS[row.id].arms))
        lines += ["", f"claims that would be tested ({recipe.seeds} paired seeds, {len(arms)} arms: {', '.join(arms)})"]
        lines += [f"  {row.id}: {row.statement}" for row in wanted]
        lines += ["", estimate(recipe, measured, len(arms))]
    return "\n".join(lines)


def estimate(recipe: Recipe, measured: dict[str, float], arms: int) -> str:
    samples = arms * recipe.seeds * recipe.steps * recipe.batch
    flops = 3.0 * measured["flops_total"] * samples  # one forward, two for the backward
    rate = GPU_FLOPS if recipe.scale in ("gpu", "paper") else CORE_FLOPS * (os.cpu_count() or 1)
    pixels = recipe.pairs * 3 * recipe.image_size**2
    state = 16 * measured["total"]  # fp32 weights, gradients, two Adam moments
    jobs = recipe.jobs or (1 if recipe.scale in ("gpu", "paper") else os.cpu_count() or 1)
    memory = jobs * (1.2e9 + 2 * pixels + 2 * state)  # 1.2 GB a process: the libraries
    return (
        f"estimate, to a factor of two: {samples:,} samples, {flops:.2g} FLOPs, {flops / rate / 60:.1f} minutes of "
        f"training at {rate:.0e} FLOP/s, {memory / 1e9:.1f} GB of memory in {jobs} process(es)"
    )
