"""GPUs as their makers' data sheets describe them, for plans past the machines at hand; the GPU of this one, and how
quick bf16 is here."""

from __future__ import annotations

import time
from dataclasses import dataclass

from shared.core.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    """One GPU and the node it is sold in. Rates are dense (data sheets print twice as much "with sparsity")."""

    name: str
    fp16: float  # FLOP/s of tensor cores
    bf16: float | None
    fp32: float  # FLOP/s without TF32, torch's default
    memory: float  # bytes
    bandwidth: float  # bytes/s of that memory
    link: float  # bytes/s in each direction to the GPUs of its node: half of the printed sum of both directions
    network: float  # bytes/s in each direction of the whole node: a ring over many nodes uses all its adapters at once
    node: int  # GPUs

    def peak(self, precision: str) -> float:
        """FLOP/s in a recipe's precision; UserError where this GPU has none."""
        rate = {"32": self.fp32, "16": self.fp16, "bf16": self.bf16}[precision.split("-")[0]]
        if rate is None:
            raise UserError(f"{self.name} has no {precision.split('-')[0]} arithmetic; use precision=16-mixed")
        return rate

    def between(self, gpus: int) -> float:
        """Bytes/s in each direction at the narrowest place of a ring over `gpus`."""
        return self.link if gpus <= self.node else min(self.link, self.network)


T, G = 1e12, 1e9
GPUS = {
    # NVIDIA V100 data sheet (January 2020), SXM2; network: DGX-1 data sheet, 4 x 100 Gb/s
    "v100": Gpu("NVIDIA V100 SXM2 32 GB", 125 * T, None, 15.7 * T, 32 * G, 900 * G, 150 * G, 50 * G, 8),
    # NVIDIA A100 data sheet (June 2021), SXM; network: DGX A100 data sheet, 8 x 200 Gb/s
    "a100-40gb": Gpu("NVIDIA A100 SXM 40 GB", 312 * T, 312 * T, 19.5 * T, 40 * G, 1555 * G, 300 * G, 200 * G, 8),
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 312 * T, 312 * T, 19.5 * T, 80 * G, 2039 * G, 300 * G, 200 * G, 8),
    # NVIDIA H100 data sheet, SXM (1,979 with sparsity); network: DGX H100 data sheet, 8 x 400 Gb/s
    "h100": Gpu("NVIDIA H100 SXM 80 GB", 989.4 * T, 989.4 * T, 67 * T, 80 * G, 3350 * G, 450 * G, 400 * G, 8),
    # NVIDIA H200 data sheet, SXM; network: DGX H200 data sheet, 8 x 400 Gb/s
    "h200": Gpu("NVIDIA H200 SXM 141 GB", 989.4 * T, 989.4 * T, 67 * T, 141 * G, 4800 * G, 450 * G, 400 * G, 8),
    # NVIDIA DGX B200 and HGX B200 data sheets, an eighth of the system; network: 8 x 400 Gb/s
    "b200": Gpu("NVIDIA B200 180 GB", 2250 * T, 2250 * T, 75 * T, 180 * G, 8000 * G, 900 * G, 400 * G, 8),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name in GPUS; UserError with the nearest one."""
    if name.lower() not in GPUS:
        raise UserError(f"no GPU '{name}'; {nearest(name.lower(), GPUS)}")
    return GPUS[name.lower()]


def bf16_slowdown(device: str) -> float:
    """Time of a small matrix product in bf16 over that in fp32: a hundred where a CPU has no instructions for it."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a, b = (torch.randn(256, 256, device=device).to(dtype) for _ in range(2))
        times = []
        for _ in range(5):
            started = time.perf_counter()
            float((a @ b).sum())
            times.append(time.perf_counter() - started)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would be what is measured
    try:
        return seconds(torch.bfloat16) / seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)
