"""Ours against transformers and open_clip: equal weights and equal bytes, in turns, in one run. `make bench`.

Each is run as its own training scripts and documentation run it: open_clip and transformers get texts padded to the
full context, ours stops at the longest by itself; a contestant with `, trimmed` in its name is given trimmed ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from papers.clip.config import VARIANTS, ClipConfig
from papers.clip.losses import clip_loss
from papers.clip.model import Clip
from papers.clip.weights import OPENAI_VIT, TRANSFORMERS, hf_config, open_clip_config
from shared.core.console import quiet
from shared.core.errors import UserError
from shared.tools.bench import pick
from shared.tools.bench_core import core
from shared.tools.bench_output import Job, Sweep
from shared.tools.bench_setup import NATURAL, Setup, compiled, longest, normaliser, pictures_and_texts, stepper
from shared.tools.bench_timing import MemoryMeter, in_child, memory_rows
from shared.weights.weight_map import to_ours, to_published

NAMES = ("ours", "open_clip", "transformers")
TRIMMED = "transformers, trimmed"


def config_of(variant: str) -> ClipConfig:
    config = pick(variant, VARIANTS)
    if not config.patch:
        raise UserError(f"bench: transformers has no {variant}; choose a variant with patches, such as clip-vit-b-32")
    return config


# ---- the contestants


@dataclass(frozen=True)
class Contestant:
    """One implementation; every function starts from the same bytes, so normalising them belongs to its time."""

    model: nn.Module
    images: Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) -> features (B, E)
    texts: Callable[[Tensor], Tensor]  # token ids (B, T) -> features (B, E)
    loss: Callable[[Tensor, Tensor], Tensor]  # both -> scalar


def contestants(config: ClipConfig, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Contestant]:
    """All three with equal weights, in eval mode."""
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws weights in no time
        models = {name: build(name, config) for name in NAMES}
    published = {k: v for k, v in models["open_clip"].state_dict().items() if k != "attn_mask"}
    models["ours"].load_state_dict(to_ours(published, OPENAI_VIT))
    models["transformers"].load_state_dict(to_published(models["ours"].state_dict(), TRANSFORMERS))
    return {name: contestant(name, model.to(device, dtype).eval(), config) for name, model in models.items()}


def build(name: str, config: ClipConfig) -> nn.Module:
    """One of NAMES, with its own initial weights."""
    if name == "ours":
        return Clip(config)
    if name == "open_clip":
        import open_clip.model

        return open_clip.model.CLIP(**open_clip_config(config))
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig.from_dict(hf_config(config)))


def contestant(name: str, model: nn.Module, config: ClipConfig) -> Contestant:
    if name == "ours":
        return Contestant(
            model, model.encode_image, model.encode_text, lambda pixels, tokens: clip_loss(model(pixels, tokens))
        )
    normalised = normaliser(model, config.mean, config.std)
    if name == "open_clip":
        from open_clip.loss import ClipLoss

        loss = ClipLoss()
        return Contestant(
            model,
            lambda pixels: model.encode_image(normalised(pixels)),
            model.encode_text,
            lambda pixels, tokens: loss(*model(normalised(pixels), tokens)),
        )
    return Contestant(
        model,
        lambda pixels: model.get_image_features(pixel_values=normalised(pixels)).pooler_output,
        lambda tokens: model.get_text_features(input_ids=tokens).pooler_output,
        lambda pixels, tokens: model(pixel_values=normalised(pixels), input_ids=tokens, return_loss=True).loss,
    )


def inputs(config: ClipConfig, batch: int, device: str, lengths: tuple[int, ...] = NATURAL) -> tuple[Tensor, Tensor]:
    """Pictures of noise (B, 3, H, W) uint8, and token ids (B, context) whose texts have `lengths` in turn."""
    start, end = config.end_token - 1, config.end_token
    pixels, tokens = pictures_and_texts(
        batch, config.image_size, config.context, start=start, end=end, words=(1, start), lengths=lengths
    )
    return pixels.to(device), tokens.to(device)


# ---- the sweeps


def short(variant: str) -> str:
    return variant.removeprefix("clip-")


def step(setup: Setup) -> list[Sweep]:
    variant, config = variant_of(setup)
    sizes = setup.sizes((4, 16), (256,))

    @functools.cache
    def steps(by_layer: bool) -> dict[str, Callable]:
        models = contestants(config, setup.device)
        if by_layer:
            for entry in models.values():
                compiled(entry.model)
        return {name: stepper(entry.model, entry.loss, setup.precision) for name, entry in models.items()}

    def job(batch: int, lengths: tuple[int, ...] = NATURAL, by_layer: bool = False) -> Job:
        tokens = longest(batch, config.context, lengths)
        texts = f"captions of up to {tokens} tokens" if lengths is NATURAL else f"full texts, {tokens} tokens"
        return setup.race(
            f"batch {batch}, {texts}{', all compiled' if by_layer else ''}",
            lambda: steps(by_layer),
            lambda: inputs(config, batch, setup.device, lengths),
            items=batch, unit="pictures/s", training=True, batch=batch, tokens=tokens, compiled=by_layer,
        )  # fmt: skip

    jobs = [*(job(batch) for batch in sizes), job(sizes[-1], (config.context,))]
    if setup.device == "cuda":  # two cores would compile for minutes
        jobs.append(job(sizes[-1], by_layer=True))
    return [Sweep("clip-step", f"TRAINING STEP: {short(variant)}, {setup.precision}", jobs)]


def inference(setup: Setup) -> list[Sweep]:
    pairs = setup.on(
        [("clip-vit-b-32", 1), ("clip-vit-b-32", 8), ("clip-vit-b-16", 4), ("clip-vit-l-14", 2)],
        [("clip-vit-b-32", 256), ("clip-vit-b-16", 1), ("clip-vit-b-16", 256), ("clip-vit-l-14", 128)],
    )
    if setup.variant or setup.batches:
        variants = [setup.variant] if setup.variant else list(dict.fromkeys(variant for variant, _ in pairs))
        pairs = [(variant, batch) for variant in variants for batch in setup.sizes((1, 8), (1, 256))]
    jobs = [pictures_to_features(setup, variant, config_of(variant), batch) for variant, batch in pairs]
    return [Sweep("clip-inference", f"PICTURES TO FEATURES, {setup.precision}", jobs)]


def resolution(setup: Setup) -> list[Sweep]:
    variant, config = variant_of(setup)
    batch = setup.sizes((4,), (64,))[-1]
    grid = config.image_size // config.patch
    sizes = [config.patch * max(1, round(grid * times)) for times in (0.7, 1, 1.5, 2)]
    jobs = [pictures_to_features(setup, variant, replace(config, image_size=size), batch) for size in sizes]
    title = f"RESOLUTION: {short(variant)}, pictures to features, batch {batch}, {setup.precision}"
    return [Sweep("clip-resolution", title, jobs, x="resolution", x_label="side of the picture, px")]


def pictures_to_features(setup: Setup, variant: str, config: ClipConfig, batch: int) -> Job:
    config = replace(config, text_layers=1, vocabulary=512, end_token=511)  # that tower is not measured here
    return setup.race(
        f"{short(variant)}, {config.image_size} px, batch {batch}",
        lambda: {name: entry.images for name, entry in contestants(config, setup.device, setup.dtype).items()},
        lambda: inputs(config, batch, setup.device)[:1],
        items=batch, unit="pictures/s", at_least=setup.on(0.2, 0.1),
        variant=variant, batch=batch, resolution=config.image_size,
    )  # fmt: skip


def text(setup: Setup) -> list[Sweep]:
    variant, config = variant_of(setup)
    config = replace(config, vision_layers=1)  # that tower is not measured here
    batch = setup.sizes((8,), (256,))[-1]
    models = functools.cache(lambda: contestants(config, setup.device, setup.dtype))

    def job(length: int) -> Job:
        def calls() -> dict[str, Callable[[Tensor], Tensor]]:
            texts = {name: entry.texts for name, entry in models().items()}
            return {**texts, TRIMMED: lambda tokens: texts["transformers"](tokens[:, :length])}

        return setup.race(
            f"{length} tokens",
            calls,
            lambda: inputs(config, batch, setup.device, (length,))[1:],
            items=batch, unit="texts/s", at_least=setup.on(0.2, 0.1), batch=batch, tokens=length,
        )  # fmt: skip

    jobs = [job(length) for length in sorted({8, 16, 32, config.context}) if length <= config.context]
    title = f"TEXTS: {short(variant)}, texts to features, batch {batch}, {setup.precision}"
    return [Sweep("clip-text", title, jobs, x="tokens", x_label="tokens of the longest text")]


def memory(setup: Setup) -> list[Sweep]:
    variant, config = variant_of(setup)
    sizes = tuple(sorted(setup.sizes((4, 16), (64, 256))))

    def run() -> list[dict]:
        # a GPU tells what was allocated; a process's own memory is told apart by a process of its own
        measured = setup.on(functools.partial(in_child, peaks_of_a_step), peaks_of_a_step)
        peaks = {name: measured(name, variant, sizes, setup.device, setup.precision) for name in NAMES}
        return [
            {
                "setting": f"batch {batch}, captions of up to {longest(batch, config.context)} tokens",
                "batch": batch,
                **row,
            }
            for place, batch in enumerate(sizes)
            for row in memory_rows({name: peaks[name][place] for name in NAMES})
        ]

    what = "PEAK MEMORY of a training step, weights and optimizer included"
    jobs = [Job(f"batches {', '.join(map(str, sizes))}", run)]
    return [Sweep("clip-memory", f"{what}: {short(variant)}, {setup.precision}", jobs, verb="needs")]


def peaks_of_a_step(name: str, variant: str, batches: tuple[int, ...], device: str, precision: str) -> list[int]:
    """Bytes at the peak of a training step at each of the rising `batches`; to be called in a process of its own."""
    quiet()
    config = VARIANTS[variant]()
    build(name, replace(config, vision_layers=1, text_layers=1))  # imports what it needs, which is nobody's memory
    meter = MemoryMeter(device)
    with torch.device(device):
        entry = contestant(name, build(name, config), config)
    take_step = stepper(entry.model, entry.loss, precision)
    take_step(*inputs(config, batches[0], device))  # makes the optimizer's state
    peaks = []
    for batch in batches:
        data = inputs(config, batch, device)
        meter.reset()
        take_step(*data)
        peaks.append(meter.peak())
    return peaks


def variant_of(setup: Setup) -> tuple[str, ClipConfig]:
    variant = setup.variant or setup.on("clip-vit-b-32", "clip-vit-b-16")
    return variant, config_of(variant)


SWEEPS = {
    "step": step,
    "inference": inference,
    "memory": memory,
    "resolution": resolution,
    "text": text,
    "core": core,
}
