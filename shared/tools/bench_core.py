"""What the core's own sweeps time: attention backends, patch embedding, and the contrastive loss in tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from shared.tools.bench_output import Job, Sweep
from shared.tools.bench_setup import Setup
from shared.tools.bench_timing import MemoryMeter, in_child, memory_rows, race

GIB = 2**30
WIDTH = 512  # of the features that the loss compares
SCALE = 1 / 0.07  # CLIP's scale at the start of training (Sec. 2.5)
MATRICES = 4  # B x B floats that the plain loss holds at its peak: two directions, each with its gradient


# ---- the contrastive loss


def loss(setup: Setup) -> list[Sweep]:
    """Time and peak memory of the chunked loss against the plain one: two tables of the same measurement."""
    measured = functools.cache(functools.partial(_time_and_memory, setup))
    sizes = setup.on((8_192, 32_768), (65_536, 32_768, 8_192))

    def jobs(table: int) -> list[Job]:
        def run(batch: int) -> list[dict]:
            return [{"batch": batch, **row} for row in measured(batch)[table]]

        return [Job(f"batch {batch:,}, width {WIDTH}", functools.partial(run, batch)) for batch in sizes]

    title = "CONTRASTIVE LOSS in tiles, forward and backward, fp32"
    return [
        Sweep("loss-time", title, jobs(0)),
        Sweep("loss-memory", f"{title}: peak memory", jobs(1), verb="needs"),
    ]


def _time_and_memory(setup: Setup, batch: int) -> tuple[list[dict], list[dict]]:
    """Rows of both tables; the first row says which variants did not run for want of memory."""
    from shared.losses.contrastive import CHUNK

    larger = setup.on((), (4 * CHUNK, 16 * CHUNK))
    variants = {"chunked": CHUNK} | {f"chunk {chunk:,}": chunk for chunk in larger if chunk <= batch} | {"plain": None}
    measure = setup.on(functools.partial(in_child, loss_memory), loss_memory)
    peaks, not_run = {}, {}
    for name, chunk in variants.items():
        why = too_large(batch) if setup.device == "cpu" and chunk is None else None
        try:
            if why is None:
                peaks[name] = measure(setup.device, batch, chunk)
        except torch.OutOfMemoryError:
            why = f"out of the GPU's {torch.cuda.mem_get_info()[1] / GIB:.0f} GiB of memory"
        if why:
            not_run[name] = why
        setup.on(lambda: None, torch.cuda.empty_cache)()
    calls = {name: loss_step(setup.device, batch, variants[name]) for name in peaks}
    times = race(calls, min(3, setup.repeats), device=setup.device, tolerance=1e-3, unit="losses/s")
    memory = memory_rows(peaks)
    if not_run:
        times[0]["not_run"] = memory[0]["not_run"] = not_run
    return times, memory


def too_large(batch: int) -> str | None:
    """Why the plain loss of so many pairs does not run on this machine's CPU."""
    from shared.tools.doctor import available_memory

    needed, free = MATRICES * 4 * batch * batch + GIB, available_memory()
    if free is None or needed <= free:
        return None
    return f"the plain loss of {batch} pairs needs about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"


def loss_step(device: str, batch: int, chunk: int | None, width: int = WIDTH) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the loss of a batch of random pairs and its gradients of both features (B, D); None: plain."""
    from shared.losses.contrastive import chunked_contrastive_loss, contrastive_loss

    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(batch, width, generator=generator).to(device) for _ in range(2)]
    features = [torch.nn.functional.normalize(part, dim=-1).requires_grad_() for part in features]
    scale = torch.tensor(SCALE, device=device, requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        images, texts = features
        if chunk is None:
            value = contrastive_loss(images, texts, scale)
        else:
            value = chunked_contrastive_loss(images, texts, scale, chunk)
        return (value, *torch.autograd.grad(value, features))

    return call


def loss_memory(device: str, batch: int, chunk: int | None, width: int = WIDTH) -> int:
    """Bytes at the peak of one such call, without its features; on a CPU to be called in a process of its own."""
    if device == "cpu" and (score := Path("/proc/self/oom_score_adj")).exists():
        score.write_text("1000")  # if memory runs out, this process ends and no other
    loss_step(device, min(batch, 512), chunk, width)()  # loads what is loaded late
    call = loss_step(device, batch, chunk, width)
    meter = MemoryMeter(device)
    call()
    return meter.peak()


# ---- attention


def attention(setup: Setup) -> list[Sweep]:
    from shared.nn.attention import StructuredMask, attention

    def documents(tokens: int, length: int) -> StructuredMask:
        return StructuredMask(lambda b, h, q, k: q // length == k // length, 1, 1, tokens, tokens)

    more = setup.on(1, 64)
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
            torch.randn(B, H, T, K, generator=generator).to(setup.device, setup.dtype) for _ in range(4)
        )
        for tensor in (q, k, v):
            tensor.requires_grad_(train)
        mask = documents(T, length) if length else None

        def call(backend: str):
            with torch.set_grad_enabled(train):
                out = attention(q, k, v, mask=mask, causal=causal, backend=backend)
            return (out, *torch.autograd.grad(out, (q, k, v), gradient)) if train else out

        backends = ["sdpa", "reference"] + (["flex"] if setup.device == "cuda" or not train else [])
        calls = {name: functools.partial(call, name) for name in backends}
        return [{"tokens": T, "batch": B, **row} for row in setup.rows(calls, at_least=0.02, items=B, unit="rows/s")]

    jobs = []
    for train in (False, True):
        for what, B, H, T, K, causal, length in shapes:
            setting = f"{'forward and backward' if train else 'forward'}: {what}, batch {B * more}"
            jobs.append(Job(setting, functools.partial(run, B * more, H, T, K, causal, length, train)))
    return [Sweep("attention", "ATTENTION, the backends of one call", jobs)]


# ---- patches


def patches(setup: Setup) -> list[Sweep]:
    from shared.nn.patch_embedding import PatchEmbedding

    mean, std, device = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), setup.device
    batch = setup.on(16, 256)

    def run(patch: int, width: int, train: bool) -> list[dict]:
        torch.manual_seed(0)
        ours = PatchEmbedding(patch, width, mean=mean, std=std).to(device)
        pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=device)
        shift, scale = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))

        def convolution(pixels: Tensor) -> Tensor:
            normalised = pixels.float().div_(255).sub_(shift).div_(scale)
            return torch.conv2d(normalised, ours.weight, stride=patch).flatten(2).transpose(1, 2)  # (B, N, D)

        def call(embed: Callable[[Tensor], Tensor]):
            with (
                torch.set_grad_enabled(train),
                torch.autocast(device, torch.bfloat16, enabled=setup.precision == "bf16"),
            ):
                out = embed(pixels)
            return torch.autograd.grad(out, ours.weight, torch.ones_like(out))[0] if train else out

        calls = {"product": functools.partial(call, ours), "convolution": functools.partial(call, convolution)}
        rows = setup.rows(calls, at_least=0.02, items=batch, unit="pictures/s")
        return [{"patch": patch, "batch": batch, **row} for row in rows]

    jobs = []
    for train in (False, True):
        for patch, width in ((32, 768), (16, 768), (14, 1024)):
            setting = f"{'forward and backward' if train else 'forward'}: 224 px, patch {patch}, batch {batch}"
            jobs.append(Job(setting, functools.partial(run, patch, width, train)))
    return [Sweep("patches", "PATCHES, from bytes to tokens: one matrix product, or normalise and convolve", jobs)]


CORE = {"attention": attention, "patches": patches, "loss": loss}


def core(setup: Setup) -> list[Sweep]:
    return [sweep for make in CORE.values() for sweep in make(setup)]
