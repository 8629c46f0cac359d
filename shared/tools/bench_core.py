"""What the core's own sweeps time: losses, attention, patch embedding."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from shared.tools.bench_timing import DTYPES, Job, MemoryMeter, Sweep, memory_rows, race, rows_of

# ---- what needs no paper


CORE = {
    "attention": lambda plan: [_attention(plan.device, plan.precision, plan.repeats)],
    "patches": lambda plan: [_patches(plan.device, plan.precision, plan.repeats)],
    "loss": lambda plan: _loss(plan.device, plan.repeats),
}


def _loss(device: str, repeats: int) -> list[Sweep]:
    """Time and peak memory of the chunked loss against the plain one: two tables of the same measurement."""
    width = 512
    measured = functools.cache(_loss_on_gpu if device == "cuda" else _loss_on_cpu)
    sizes = (65_536, 32_768, 8_192) if device == "cuda" else (8_192, 32_768)

    def jobs(which: int, seconds: float) -> list[Job]:
        def run(batch: int) -> list[dict]:
            return [{"batch": batch, **row} for row in measured(batch, width, repeats)[which]]

        return [
            Job(f"batch {batch:,}, width {width}", seconds * (batch / 8_192) ** 2, functools.partial(run, batch))
            for batch in sizes
        ]

    title = "CONTRASTIVE LOSS in tiles, forward and backward, fp32"
    return [
        Sweep("loss-time", title, jobs(0, 0.3 if device == "cuda" else 20)),
        Sweep("loss-memory", f"{title}: peak memory", jobs(1, 0), verb="needs"),
    ]


def _loss_on_cpu(batch: int, width: int, repeats: int) -> tuple[list[dict], list[dict]]:
    from shared.tools.bench_loss import measure

    found = {
        "plain" if row["chunk"] is None else "chunked": row
        for row in measure(batch, width, rounds=min(3, repeats))["rows"]
    }
    names = [name for name in ("chunked", "plain") if name in found]
    return (
        rows_of({name: found[name]["seconds"] for name in names}, unit="losses/s"),
        memory_rows({name: int(statistics.median(found[name]["bytes"])) for name in names}),
    )


def _loss_on_gpu(batch: int, width: int, repeats: int) -> tuple[list[dict], list[dict]]:
    from shared.losses.contrastive import CHUNK, chunked_contrastive_loss, contrastive_loss

    torch.manual_seed(0)
    features = [torch.nn.functional.normalize(torch.randn(batch, width, device="cuda"), dim=-1) for _ in range(2)]
    inputs = [x.requires_grad_() for x in (*features, torch.tensor(14.3, device="cuda"))]

    def call(loss: Callable) -> tuple[Tensor, ...]:
        value = loss(*inputs)
        return (value, *torch.autograd.grad(value, inputs[:2]))

    losses = {
        ("chunked" if chunk == CHUNK else f"chunk {chunk:,}"): functools.partial(chunked_contrastive_loss, chunk=chunk)
        for chunk in (CHUNK, 4 * CHUNK, 16 * CHUNK)
        if chunk <= batch
    } | {"plain": contrastive_loss}
    calls = {name: functools.partial(call, loss) for name, loss in losses.items()}
    peaks, not_run = {}, {}
    for name, step in list(calls.items()):
        meter = MemoryMeter("cuda")
        try:
            step()
            peaks[name] = meter.peak()
        except torch.OutOfMemoryError:
            del calls[name]
            not_run[name] = f"out of the GPU's {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB of memory"
        torch.cuda.empty_cache()
    times = race(calls, min(3, repeats), device="cuda", tolerance=1e-3, unit="losses/s")
    memory = memory_rows(peaks)
    if not_run:
        times[0]["not_run"] = memory[0]["not_run"] = not_run
    return times, memory


def _attention(device: str, precision: str, repeats: int) -> Sweep:
    from shared.nn.attention import StructuredMask, attention

    def documents(tokens: int, length: int) -> StructuredMask:
        return StructuredMask(lambda b, h, q, k: q // length == k // length, 1, 1, tokens, tokens)

    more = 64 if device == "cuda" else 1
    # (what, B, H, T, K, causal, mask)
    shapes = [
        ("pictures, ViT-B/32, 50 tokens", 8, 12, 50, 64, False, None),
        ("pictures, ViT-L/14 at 336 px, 577 tokens", 1, 16, 577, 64, False, None),
        ("texts, causal, 77 tokens", 8, 8, 77, 64, True, None),
        ("packed, causal, 4 documents of 256 tokens", 1, 8, 1024, 64, True, 256),
    ]

    def run(B: int, H: int, T: int, K: int, causal: bool, length: int | None, train: bool) -> list[dict]:
        generator = torch.Generator().manual_seed(0)
        q, k, v, gradient = (
            torch.randn(B, H, T, K, generator=generator).to(device, DTYPES[precision]) for _ in range(4)
        )
        for tensor in (q, k, v):
            tensor.requires_grad_(train)
        mask = documents(T, length) if length else None

        def call(backend: str):
            with torch.set_grad_enabled(train):
                out = attention(q, k, v, mask=mask, causal=causal, backend=backend)
            return (out, *torch.autograd.grad(out, (q, k, v), gradient)) if train else out

        backends = ["sdpa", "reference"] + (["flex"] if device == "cuda" or not train else [])
        rows = race(
            {name: functools.partial(call, name) for name in backends},
            repeats,
            device=device,
            tolerance=1e-4 if precision == "fp32" else 5e-2,
            at_least=0.02,
            items=B,
            unit="rows/s",
        )
        return [{"tokens": T, "batch": B, **row} for row in rows]

    jobs = []
    for train in (False, True):
        for what, B, H, *rest in shapes:
            setting = f"{'forward and backward' if train else 'forward'}: {what}, batch {B * more}"
            jobs.append(Job(setting, 1.5, functools.partial(run, B * more, H, *rest, train)))
    return Sweep("attention", "ATTENTION, the backends of one call", jobs)


def _patches(device: str, precision: str, repeats: int) -> Sweep:
    from shared.nn.patch_embedding import PatchEmbedding

    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    batch = 256 if device == "cuda" else 16

    def run(patch: int, width: int, train: bool) -> list[dict]:
        torch.manual_seed(0)
        ours = PatchEmbedding(patch, width, mean=mean, std=std).to(device)
        pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=device)
        shift = torch.tensor(mean, device=device).view(3, 1, 1)
        scale = torch.tensor(std, device=device).view(3, 1, 1)

        def convolution() -> Tensor:
            normalised = pixels.float().div_(255).sub_(shift).div_(scale)
            return torch.conv2d(normalised, ours.weight, stride=patch).flatten(2).transpose(1, 2)  # (B, N, D)

        def call(embed: Callable[[], Tensor]):
            with torch.set_grad_enabled(train), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                out = embed()
            return torch.autograd.grad(out, ours.weight, torch.ones_like(out))[0] if train else out

        rows = race(
            {"product": lambda: call(lambda: ours(pixels)), "convolution": lambda: call(convolution)},
            repeats,
            device=device,
            tolerance=1e-4 if precision == "fp32" else 5e-2,
            at_least=0.02,
            items=batch,
            unit="pictures/s",
        )
        return [{"patch": patch, "batch": batch, **row} for row in rows]

    jobs = []
    for train in (False, True):
        for patch, width in ((32, 768), (16, 768), (14, 1024)):
            setting = f"{'forward and backward' if train else 'forward'}: 224 px, patch {patch}, batch {batch}"
            jobs.append(Job(setting, 2.5, functools.partial(run, patch, width, train)))
    return Sweep("patches", "PATCHES, from bytes to tokens: one matrix product, or normalise and convolve", jobs)
