"""What a paper's bench.py is made of: pictures and texts, steps, and the races of a Setup."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.nn.generation import Decoding, GenerationSettings, generate
from shared.tools.bench_output import Job
from shared.tools.bench_timing import DTYPES, race

# Tokens of a caption with both end marks. Of the kind that COCO's captions have: about 13 on average, few beyond 20.
NATURAL = (11, 16, 13, 10, 12, 22, 14, 11, 9, 13, 15, 12, 10, 17, 12, 14)

# ---- what contestants are made of and given


def pictures_and_texts(
    batch: int,
    size: int,
    context: int,
    *,
    start: int,
    end: int,
    words: tuple[int, int],
    lengths: Sequence[int] = NATURAL,
) -> tuple[Tensor, Tensor]:
    """Pictures of noise (B, 3, size, size) uint8; token ids (B, context), whose texts have `lengths` in turn: `start`,
    any from words[0] to below words[1], `end`, then zeros."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(*words, (batch, context), generator=generator)
    ends = torch.tensor([min(lengths[row % len(lengths)], context) - 1 for row in range(batch)])[:, None]
    place = torch.arange(context)
    tokens = torch.where(place < ends, tokens, torch.where(place == ends, end, 0))
    tokens[:, 0] = start
    return pixels, tokens


def longest(batch: int, context: int, lengths: Sequence[int] = NATURAL) -> int:
    """Tokens of the longest text of such a batch."""
    return min(context, max(lengths[:batch]))


def normaliser(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """From bytes to what a library's model takes, in its weights' precision."""
    weight = next(model.parameters())

    @functools.cache
    def parts(device: torch.device) -> list[Tensor]:
        return [torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std)]

    def normalised(pixels: Tensor) -> Tensor:
        shift, scale = parts(pixels.device)
        return pixels.float().div_(255).sub_(shift).div_(scale).to(weight.dtype)

    return normalised


def stepper(
    model: nn.Module, loss: Callable[..., Tensor | tuple[Tensor, ...]], precision: str
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """A function of the loss's arguments that takes one optimizer step on what is trained, and returns the loss, or the
    several losses whose sum is trained on, before it. Whatever a step draws, it draws by its number."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    seeds = itertools.count()

    def step(*data: Tensor) -> Tensor | tuple[Tensor, ...]:
        torch.manual_seed(next(seeds))
        with torch.autocast(data[0].device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            losses = loss(*data)
        parts = losses if isinstance(losses, tuple) else (losses,)
        torch.stack(parts).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return tuple(part.detach() for part in parts) if isinstance(losses, tuple) else losses.detach()

    return step


def beam_writers(
    decoding: Callable[[Tensor], Decoding],
    theirs: Any,
    normalised: Callable[[Tensor], Tensor],
    ids: Callable[[Tensor], Tensor],
    stop: int,
    beams: int,
    new_tokens: int,
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Functions of pictures and a prompt (B, P) that give new tokens (B, new_tokens), by beam search: of ours, by what
    `decoding` makes of pictures, and of a model of transformers, to which `ids` turns the prompt."""
    settings = GenerationSettings((stop,), new_tokens, new_tokens, beams=beams)

    def our_texts(pixels: Tensor, prompts: Tensor) -> Tensor:
        return torch.tensor(generate(decoding(pixels), prompts, settings).tokens)

    def their_texts(pixels: Tensor, prompts: Tensor) -> Tensor:
        given = ids(prompts)
        lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        picture = {"pixel_values": normalised(pixels), "attention_mask": torch.ones_like(given)}
        tokens = theirs.generate(input_ids=given, **picture, num_beams=beams, do_sample=False, **lengths)
        return tokens[:, -new_tokens:].cpu()

    return {"ours": our_texts, "transformers": their_texts}


def compiled(model: nn.Module) -> nn.Module:
    """The model with every layer of its stacks compiled by itself: what torch advises where layers are alike, since a
    stack is then compiled once and not once a layer. Anybody's model: it asks for no more than an nn.ModuleList."""
    # all layers are compiled through one function of torch, whose limit of variants is meant for one layer
    torch._dynamo.config.recompile_limit = 64
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for layer in stack:
                layer.compile(dynamic=False)
    return model


# ---- races


@dataclass(frozen=True)
class Setup:
    """What a run measures, and on what; `variant` and `batches` empty: what suits the device."""

    device: str
    precision: str
    repeats: int
    seconds: float
    peaks: list[dict]
    variant: str = ""
    batches: tuple[int, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def on(self, cpu: Any, cuda: Any) -> Any:
        return cuda if self.device == "cuda" else cpu

    def sizes(self, cpu: tuple[int, ...], cuda: tuple[int, ...]) -> tuple[int, ...]:
        """Batches."""
        return self.batches or self.on(cpu, cuda)

    def rows(self, calls: Mapping[str, Callable[[], Any]], *, training: bool = False, **options) -> list[dict]:
        """Of one race, run now. Looser where weights move: a rounding error in a gradient that is zero becomes a whole
        step of Adam."""
        tolerance = 5e-2 if self.precision == "bf16" else 1e-3 if training else 1e-4
        return race(calls, self.repeats, device=self.device, tolerance=tolerance, seconds=self.seconds, **options)

    def race(
        self,
        setting: str,
        contestants: Callable[[], Mapping[str, Callable]],
        inputs: Callable[[], tuple[Tensor, ...]],
        *,
        items: int,
        unit: str,
        training: bool = False,
        share: bool = True,
        at_least: float = 0.0,
        **facts: Any,
    ) -> Job:
        """A line of a table: every contestant gets the same inputs, without gradients where none trains. Both are made
        when its turn comes.

        items: what is counted of `unit`s, of one call. share: count the first one's FLOPs, for its share of the peak.
        facts: what every row says of the setting.
        """

        def run() -> list[dict]:
            data = inputs()

            def call(function: Callable) -> Any:
                with torch.inference_mode(not training):
                    return function(*data)

            calls = {name: functools.partial(call, function) for name, function in contestants().items()}
            peak = next(peak["flops_per_second"] for peak in self.peaks if peak["precision"] == self.precision)
            rows = self.rows(
                calls, training=training, items=items, unit=unit, at_least=at_least, peak=peak if share else None
            )
            return [{**facts, **row} for row in rows]

        return Job(setting, run)

    def writing_race(
        self,
        setting: str,
        writers: Callable[[], Mapping[str, Callable]],
        inputs: Callable[[], tuple[Tensor, ...]],
        **options: Any,
    ) -> Job:
        """Of contestants that give new tokens (B, T), ours first; each row says how many of them are equal."""
        tokens: dict[str, Tensor] = {}

        def recorded(name: str, write: Callable, *data: Tensor) -> Tensor:
            tokens[name] = write(*data)
            # rounding to bf16 makes ties among words, which two implementations break differently
            return tokens[name] if self.precision == "fp32" else torch.tensor(tokens[name].shape)

        def contestants() -> dict[str, Callable]:
            return {name: functools.partial(recorded, name, write) for name, write in writers().items()}

        job = self.race(setting, contestants, inputs, share=False, at_least=self.on(0.2, 0.1), **options)

        def run() -> list[dict]:
            rows = job.run()
            ours, *others = tokens.values()
            return [{"equal_tokens": float((ours == others[0]).double().mean()), **row} for row in rows]

        return Job(setting, run)
