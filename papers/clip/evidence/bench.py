"""Ours against transformers and open_clip: equal weights and equal bytes, in turns, in one run. `make bench`.

Each is run as its own training scripts and documentation run it: open_clip and transformers get texts padded to the
full context, ours stops at the longest by itself; a contestant with `, trimmed` in its name is given trimmed ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from papers.clip.config import VARIANTS, ClipConfig
from papers.clip.evidence.structure import flops
from papers.clip.losses import clip_loss
from papers.clip.model import Clip
from papers.clip.weights import OPENAI_VIT, TRANSFORMERS
from shared.core.console import quiet
from shared.core.errors import UserError
from shared.tools.bench import (
    Plan,
    compiled,
    longest,
    normaliser,
    one_of,
    pictures_and_texts,
    run_plan,
    stepper,
    without_gradients,
)
from shared.tools.bench_timing import DTYPES, NATURAL, Job, MemoryMeter, Sweep, in_child, memory_rows
from shared.training.optim import decay_groups
from shared.weights.weight_map import to_ours, to_published

SWEEPS = ("step", "inference", "memory", "resolution", "text", "core")
NAMES = ("ours", "open_clip", "transformers")
TRIMMED = "transformers, trimmed"


def run(root: Path, overrides: list[str]) -> None:
    """Print a table a sweep; write it, with its figure, into results/bench/."""
    run_plan(root, overrides, ClipPlan, SWEEPS, _known)


def _known(variant: str) -> None:
    one_of(variant, VARIANTS)
    if not VARIANTS[variant]().patch:
        raise UserError(f"bench: transformers has no {variant}; choose a variant with patches, such as clip-vit-b-32")


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

        vision = {
            "image_size": config.image_size,
            "patch_size": config.patch,
            "width": config.vision_width,
            "layers": config.vision_layers,
            "head_width": config.vision_width // config.vision_heads,
        }
        text = {
            "context_length": config.context,
            "vocab_size": config.vocabulary,
            "width": config.text_width,
            "layers": config.text_layers,
            "heads": config.text_heads,
        }
        return open_clip.model.CLIP(config.embed_width, vision, text, quick_gelu=config.activation == "quick_gelu")
    from transformers import CLIPConfig, CLIPModel

    def tower(width: int, layers: int, heads: int) -> dict:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "projection_dim": config.embed_width,
            "hidden_act": config.activation,
            "layer_norm_eps": config.eps,
        }

    text = tower(config.text_width, config.text_layers, config.text_heads) | {
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "bos_token_id": config.end_token - 1,
        "eos_token_id": config.end_token,
        "pad_token_id": 0,
    }
    vision = tower(config.vision_width, config.vision_layers, config.vision_heads) | {
        "image_size": config.image_size,
        "patch_size": config.patch,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.embed_width))


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


def clip_stepper(one: Contestant, precision: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of pictures and tokens that takes one optimizer step and returns the loss before it."""
    return stepper(one.model, one.loss, decay_groups(one.model, 0.2), precision)


def bytes_and_tokens(
    config: ClipConfig, batch: int, device: str, lengths: tuple[int, ...] = NATURAL
) -> tuple[Tensor, Tensor]:
    """Pictures of noise (B, 3, H, W) uint8, and token ids (B, context) whose texts have `lengths` in turn."""
    start, end = config.end_token - 1, config.end_token
    pixels, tokens = pictures_and_texts(
        batch, config.image_size, config.context, start=start, end=end, words=(1, start), lengths=lengths
    )
    return pixels.to(device), tokens.to(device)


@functools.cache
def work(config: ClipConfig, tokens: int, train: bool, towers: str = "both") -> int:
    """FLOPs for one picture and one text of `tokens`: what ours computes, so that nobody's waste counts as work."""
    with torch.device("meta"):
        model = Clip(config)
        pixels = torch.empty(1, 3, config.image_size, config.image_size, dtype=torch.uint8)
        ids = torch.empty(1, tokens, dtype=torch.long)

    def call() -> None:
        features = ([model.encode_image(pixels)] if towers != "texts" else []) + (
            [model.encode_text(ids)] if towers != "images" else []
        )
        if train:
            sum(f.sum() for f in features).backward()

    return flops(call)


# ---- the sweeps


class ClipPlan(Plan):
    """CLIP's sweeps."""

    def _head(self, what: str, variant: str) -> str:
        return f"{what}: {variant.removeprefix('clip-')}, {self.precision}"

    def _step(self) -> Sweep:
        variant = self.variant or self.on("clip-vit-b-32", "clip-vit-b-16")
        config = VARIANTS[variant]()
        sizes = self.batches or self.on((4, 16), (256,))

        @functools.cache
        def steps(by_layer: bool) -> dict[str, Callable]:
            models = contestants(config, self.device)
            for one in models.values():
                if by_layer:
                    compiled(one.model)
            return {name: clip_stepper(one, self.precision) for name, one in models.items()}

        def job(batch: int, lengths: tuple[int, ...], by_layer: bool = False) -> Job:
            tokens = longest(batch, config.context, lengths)
            texts = f"captions of up to {tokens} tokens" if lengths is NATURAL else f"full texts, {tokens} tokens"
            texts += ", all compiled" if by_layer else ""
            ours = batch * work(config, tokens, True)

            def run() -> list[dict]:
                data = bytes_and_tokens(config, batch, self.device, lengths)
                calls = {name: functools.partial(step, *data) for name, step in steps(by_layer).items()}
                rows = self.race(calls, items=batch, unit="pictures/s", flops=ours, training=True)
                return [{"batch": batch, "tokens": tokens, "compiled": by_layer, **row} for row in rows]

            full = batch * work(config, config.context, True)
            compiling = 45 if by_layer else 0
            return Job(f"batch {batch}, {texts}", compiling + self.expected(ours + 2 * full), run)

        jobs = [job(batch, NATURAL) for batch in sizes] + [job(sizes[-1], (config.context,))]
        if self.device == "cuda":  # two cores would compile for minutes
            jobs.append(job(sizes[-1], NATURAL, by_layer=True))
        return Sweep("clip-step", self._head("TRAINING STEP", variant), jobs)

    def _inference(self) -> Sweep:
        pairs = self.on(
            [("clip-vit-b-32", 1), ("clip-vit-b-32", 8), ("clip-vit-b-16", 4), ("clip-vit-l-14", 2)],
            [("clip-vit-b-32", 256), ("clip-vit-b-16", 1), ("clip-vit-b-16", 256), ("clip-vit-l-14", 128)],
        )
        if self.variant or self.batches:
            variants = [self.variant] if self.variant else list(dict.fromkeys(variant for variant, _ in pairs))
            pairs = [(variant, batch) for variant in variants for batch in self.batches or self.on((1, 8), (1, 256))]
        jobs = [self._pictures(variant, VARIANTS[variant](), batch) for variant, batch in pairs]
        return Sweep("clip-inference", f"PICTURES TO FEATURES, {self.precision}", jobs)

    def _resolution(self) -> Sweep:
        variant = self.variant or self.on("clip-vit-b-32", "clip-vit-b-16")
        config = VARIANTS[variant]()
        batch = self.batches[-1] if self.batches else self.on(4, 64)
        grid = config.image_size // config.patch
        sizes = [config.patch * max(1, round(grid * times)) for times in (0.7, 1, 1.5, 2)]
        jobs = [self._pictures(variant, replace(config, image_size=size), batch) for size in sizes]
        title = f"RESOLUTION: {variant.removeprefix('clip-')}, pictures to features, batch {batch}, {self.precision}"
        return Sweep("clip-resolution", title, jobs, x="resolution", x_label="side of the picture, px")

    def _pictures(self, variant: str, config: ClipConfig, batch: int) -> Job:
        config = replace(config, text_layers=1, vocabulary=512, end_token=511)  # that tower is not measured here
        total = batch * work(config, config.context, False, "images")

        def run() -> list[dict]:
            pixels, _ = bytes_and_tokens(config, batch, self.device)
            models = contestants(config, self.device, DTYPES[self.precision])
            calls = {name: without_gradients(one.images, pixels) for name, one in models.items()}
            rows = self.race(calls, items=batch, unit="pictures/s", flops=total, at_least=self.on(0.2, 0.1))
            facts = {"variant": variant, "batch": batch, "resolution": config.image_size}
            return [{**facts, **row} for row in rows]

        setting = f"{variant.removeprefix('clip-')}, {config.image_size} px, batch {batch}"
        return Job(setting, 4 + self.expected(3 * total) + 3 * total / self.peak, run)

    def _text(self) -> Sweep:
        variant = self.variant or self.on("clip-vit-b-32", "clip-vit-b-16")
        config = VARIANTS[variant]()
        config = replace(config, vision_layers=1)  # that tower is not measured here
        batch = self.batches[-1] if self.batches else self.on(8, 256)
        models = functools.cache(lambda: contestants(config, self.device, DTYPES[self.precision]))

        def job(length: int) -> Job:
            ours, full = (batch * work(config, tokens, False, "texts") for tokens in (length, config.context))

            def run() -> list[dict]:
                _, tokens = bytes_and_tokens(config, batch, self.device, (length,))
                calls = {name: without_gradients(one.texts, tokens) for name, one in models().items()}
                calls[TRIMMED] = without_gradients(models()["transformers"].texts, tokens[:, :length])
                rows = self.race(calls, items=batch, unit="texts/s", flops=ours, at_least=self.on(0.2, 0.1))
                return [{"batch": batch, "tokens": length, **row} for row in rows]

            return Job(f"{length} tokens", 2 + 1.5 * self.expected(2 * ours + 2 * full), run)

        jobs = [job(length) for length in sorted({8, 16, 32, config.context}) if length <= config.context]
        title = f"TEXTS: {variant.removeprefix('clip-')}, texts to features, batch {batch}, {self.precision}"
        return Sweep("clip-text", title, jobs, x="tokens", x_label="tokens of the longest text")

    def _memory(self) -> Sweep:
        variant = self.variant or self.on("clip-vit-b-32", "clip-vit-b-16")
        config = VARIANTS[variant]()
        sizes = tuple(sorted(self.batches or self.on((4, 16), (64, 256))))

        def run() -> list[dict]:
            # a GPU tells what was allocated; a process's own memory is told apart by a process of its own
            measured = self.on(functools.partial(in_child, memory), memory)
            peaks = {name: measured(name, variant, sizes, self.device, self.precision) for name in NAMES}
            return [
                {
                    "setting": f"batch {batch}, captions of up to {longest(batch, config.context)} tokens",
                    "batch": batch,
                    **row,
                }
                for place, batch in enumerate(sizes)
                for row in memory_rows({name: peaks[name][place] for name in NAMES})
            ]

        full = (sum(sizes) + sizes[0]) * work(config, config.context, True)
        job = Job(f"batches {', '.join(map(str, sizes))}", 45 + self.expected(3 * full, 0), run)
        title = self._head("PEAK MEMORY of a training step, weights and optimizer included", variant)
        return Sweep("clip-memory", title, [job], verb="needs")


def memory(name: str, variant: str, batches: tuple[int, ...], device: str, precision: str) -> list[int]:
    """Bytes at the peak of a training step at each of the rising `batches`; to be called in a process of its own."""
    quiet()
    config = VARIANTS[variant]()
    build(name, replace(config, vision_layers=1, text_layers=1))  # imports what it needs, which is nobody's memory
    meter = MemoryMeter(device)
    with torch.device(device):
        model = build(name, config)
    step = clip_stepper(contestant(name, model, config), precision)
    step(*bytes_and_tokens(config, batches[0], device))  # makes the optimizer's state
    peaks = []
    for batch in batches:
        data = bytes_and_tokens(config, batch, device)
        meter.reset()
        step(*data)
        peaks.append(meter.peak())
    return peaks
