"""What test_bench runs in a process of its own: apart, so that the child imports no more than torch."""

import torch

from shared.tools.bench_timing import MemoryMeter


def held_and_freed(mebibytes: int) -> list[int]:
    """Peaks in bytes: while that much is held, after a reset without it, and when half of it is held."""
    torch.ones(8 * 2**18)  # torch's first allocation brings its own
    meter = MemoryMeter("cpu")
    peaks = []
    for size in (mebibytes, 0, mebibytes // 2):
        meter.reset()
        block = torch.ones(size * 2**18)
        del block
        peaks.append(meter.peak())
    return peaks
