"""What a training step takes, counted before anybody has the memory for it: FLOPs, and the bytes alive at every moment.

The step runs on fake tensors: shapes without values, but of the device they stand for. Torch's plain meta device would
choose the attention kernel that keeps all T x T scores, and knows no autocast; a fake CPU makes the choices of a real
one, so that the count equals what a real step allocates, to the byte (tests/shared/tools/test_plan.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from shared.nn.blocks import set_recompute

SIZES = (4, 8)  # batches that are counted of the encoders: every moment is affine in the batch, so two give all
PAIRED = (2048, 4096, 6144)  # of an objective, which is quadratic; multiples of the tiles of a chunked loss
ATEN = torch.ops.aten
FORMULAS = flop_registry | {ATEN.addmm_: flop_registry[ATEN.addmm], ATEN.baddbmm_: flop_registry[ATEN.baddbmm]}


@dataclass(frozen=True)
class Step:
    """A training step of a variant, ready to be counted: what `step(variant)` of a paper's structure.py builds.

    encode(*batch(B)) gives the tensors that enter the objective. What compares every sample with every other, as a
    contrastive loss does, belongs into the objective; `objectives` begins with the one that training uses.
    """

    model: nn.Module
    batch: Callable[[int], tuple[Tensor, ...]]
    encode: Callable[..., tuple[Tensor, ...]]
    objectives: dict[str, Callable[..., Tensor]]
    gathered: int = 0  # bytes a sample that its rank sends to all others, for the objective
    reads: int = 0  # stands for a number that the forward takes from the batch's values, which shapes do not tell


def full_batch(image_size: int, context: int, last: int = 1) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of black pictures (B, 3, H, H) uint8 and of texts of full context (B, T), whose last token is `last`."""

    def batch(size: int) -> tuple[Tensor, Tensor]:
        tokens = torch.ones(size, context, dtype=torch.long)
        tokens[:, -1] = last
        return torch.zeros(size, 3, image_size, image_size, dtype=torch.uint8), tokens

    return batch


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_flops(call: Callable[[], Any]) -> int:
    """Two for each multiply-add of convolutions, matrix products and attention. For tensors on the meta device, where
    every kernel of attention is known."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class Counter(TorchDispatchMode):
    """Counts FLOPs of all operations, and bytes of the storages that they made and that are still alive.

    `standing` tensors (weights, the batch) are left out. trace: bytes alive after each new storage, in order.
    For real and fake tensors alike.
    """

    def __init__(self, standing: Iterable[Tensor], reads: int = 0):
        super().__init__()
        self.flops, self.alive, self.trace, self.reads = 0, 0, [0], reads
        self._standing = [tensor.untyped_storage() for tensor in standing]  # held, lest an address be used again
        self._known = {storage._cdata for storage in self._standing}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # most calls: fake tensors are asked for their device
            return func(*args)
        try:
            out = func(*args, **kwargs)
        except DataDependentOutputException:
            out = self.reads
        if count := FORMULAS.get(getattr(func, "_overloadpacket", None)):
            self.flops += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._made(tensor.untyped_storage())
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.alive += size
            self.trace.append(self.alive)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: FLOPs, bytes kept between the two, bytes alive all along; weights not counted."""

    forward: int
    backward: int
    kept: int
    trace: list[int] = field(repr=False)

    @property
    def peak(self) -> int:
        return max(self.trace)


def run_pass(
    standing: Iterable[Tensor],
    forward: Callable[[], tuple[Tensor, ...]],
    *,
    half: torch.dtype | None = None,
    backward: bool = True,
    reads: int = 0,
) -> Pass:
    """Run `forward`, under autocast to `half` where given, and its backward, on the CPU or a fake one."""
    with Counter(standing, reads) as counter:
        with torch.autocast("cpu", dtype=half) if half else nullcontext():
            outputs = [tensor for tensor in forward() if tensor.requires_grad]
        kept, flops = counter.alive, counter.flops
        if backward:
            torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
    return Pass(flops, counter.flops - flops, kept, counter.trace)


@contextmanager
def shapes_only(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Tensors made inside have shapes and no values; those of floating point are of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


def free_gradients(model: nn.Module) -> None:
    """Let go of each gradient as soon as it is complete: where gradients are kept is another account (plan.States)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


@dataclass(frozen=True)
class Encoders:
    """All that comes before the objective, as functions of the batch of one GPU."""

    small: Pass  # of SIZES
    large: Pass

    def kept(self, batch: int) -> int:
        """Bytes between forward and backward."""
        return _affine(batch, self.small.kept, self.large.kept)

    def peak(self, batch: int) -> int:
        """The most bytes at once. Every moment is affine in the batch, their maximum is not: each goes by itself."""
        return max(_affine(batch, *pair) for pair in zip(self.small.trace, self.large.trace, strict=True))

    def forward(self, batch: int) -> int:
        """FLOPs."""
        return _affine(batch, self.small.forward, self.large.forward)

    def backward(self, batch: int) -> int:
        """FLOPs, with what is recomputed."""
        return _affine(batch, self.small.backward, self.large.backward)


def _affine(batch: int, small: int, large: int) -> int:
    return small + (large - small) * (batch - SIZES[0]) // (SIZES[1] - SIZES[0])


def count_encoders(
    build: Callable[[], Step],
    *,
    weights: torch.dtype = torch.float32,
    half: torch.dtype | None = None,
    recompute: bool = False,
    backward: bool = True,
) -> Encoders:
    """weights: their own dtype; half: that of autocast. Without `backward` only `kept` and `forward` are sound."""
    passes = []
    for size in SIZES:
        with shapes_only(weights):
            work = build()
            work.model.train()
            set_recompute(work.model, recompute)
            free_gradients(work.model)
            batch = work.batch(size)
            standing = [*work.model.parameters(), *work.model.buffers(), *batch]
            passes.append(
                run_pass(standing, partial(work.encode, *batch), half=half, backward=backward, reads=work.reads)
            )
    return Encoders(*passes)


@dataclass(frozen=True)
class Objective:
    """FLOPs and most bytes at once as (p, q, r): p + q·own + r·own·all, samples of one GPU and of all."""

    flops_: tuple[float, float, float]
    peak_: tuple[float, float, float]

    @property
    def compares(self) -> bool:
        """Whether samples meet other samples in it."""
        return self.flops_[2] > 0

    def flops(self, own: float, all: float) -> float:
        return self.flops_[0] + self.flops_[1] * own + self.flops_[2] * own * all

    def peak(self, own: float, all: float) -> float:
        return self.peak_[0] + self.peak_[1] * own + self.peak_[2] * own * all


def count_objectives(build: Callable[[], Step]) -> dict[str, Objective]:
    """Every objective of the step, forward and backward, without what is gathered over ranks."""
    found = {}
    with shapes_only():
        work = build()
        with torch.no_grad(), Counter([], work.reads):
            samples = work.encode(*work.batch(SIZES[0]))
        for name, objective in work.objectives.items():
            passes = []
            for size in PAIRED:
                # a row a sample, or one value for all
                inputs = [x.new_empty(size, *x.shape[1:]) if x.ndim else torch.empty_like(x) for x in samples]
                inputs = [x.requires_grad_() for x in inputs]
                passes.append(run_pass(inputs, partial(_alone, objective, *inputs), reads=work.reads))
            flops = _quadratic([p.forward + p.backward for p in passes])
            found[name] = Objective(flops, _quadratic([p.peak for p in passes]))
    return found


def _alone(objective: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor]:
    return (objective(*inputs),)


def _quadratic(values: list[int]) -> tuple[float, float, float]:
    """(p, q, r) of the parabola through `values` at PAIRED, which are evenly spaced."""
    first, step = PAIRED[0], PAIRED[1] - PAIRED[0]
    slope, bend = values[1] - values[0], (values[2] - 2 * values[1] + values[0]) / 2
    r = bend / step**2
    q = (slope - bend) / step - 2 * r * first
    return values[0] - q * first - r * first**2, q, r
