"""Frozen parts: neither trained, nor saved, nor switched to training mode (BLIP-2, Sec. 3: image encoder and language
model stay as they are)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Frozen(nn.Module):
    """A module held beside the tree of modules rather than in it: whoever owns this sees none of its parameters.

    So they reach no optimizer, no state dict, no gradient bucket and no count of what is trained, and train() does not
    reach its dropout. Moves between devices do reach it. It computes under no_grad unless `through`: then gradients
    pass through it to its input, never into its weights. dtype: what its weights are cast to, for good; floating-point
    inputs of a call follow. matrices: those of linear layers and convolutions alone are, and multiply under autocast;
    positions, norms and so the residual stream stay in fp32, as the official code has its image encoders
    (lavis/models/eva_vit.py, convert_weights_to_fp16). Attributes that this has not are the module's own:
    `frozen.embed(tokens)`.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype | None = None, *, through: bool = False, matrices: bool = False
    ):
        super().__init__()
        module.requires_grad_(False).eval()
        self.dtype, self.through, self.matrices = dtype, through, matrices and dtype is not None
        self.__dict__["module"] = module  # past nn.Module's registration
        self._cast()

    def _cast(self) -> None:
        if not self.matrices:
            if self.dtype is not None:
                self.module.to(self.dtype)
            return
        self.module.float()
        for part in self.module.modules():
            if isinstance(part, MATRICES):
                part.to(self.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.matrices:
            device = next(self.module.parameters()).device.type
            with nullcontext() if self.through else torch.no_grad(), torch.autocast(device, self.dtype):
                return self.module(*args, **kwargs)
        if self.dtype is not None:
            args = tuple(x.to(self.dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in args)
        with nullcontext() if self.through else torch.no_grad():
            return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__:  # before __init__ is through: asking for it would ask here again
                raise
            return getattr(self.module, name)

    def _apply(self, fn, recurse: bool = True) -> Frozen:
        """Devices as told; a change of precision that is meant for the trained parts does not stay."""
        super()._apply(fn, recurse)
        self.module._apply(fn)
        self._cast()
        return self

    def extra_repr(self) -> str:
        count = sum(p.numel() for p in self.module.parameters())
        return f"{type(self.module).__name__}, {count:,} parameters, dtype={self.dtype}, through={self.through}"


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is to be given: the parameters that take a gradient."""
    return [p for p in module.parameters() if p.requires_grad]


def assert_only_trained(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """ValueError where the optimizer has a frozen or a foreign parameter, has one twice, or lacks a trained one."""
    names = {id(p): name for name, p in module.named_parameters()}
    wanted = {id(p) for p in trainable(module)}
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    faults = {
        "frozen": [names[i] for i in given if i in names and i not in wanted],
        "of another module": ["one of shape " + str(tuple(p.shape)) for p in _given(optimizer) if id(p) not in names],
        "given twice": [names[i] for i in set(given) if given.count(i) > 1 and i in names],
        "left out": [names[i] for i in wanted - set(given)],
    }
    told = "; ".join(f"{what}: {', '.join(sorted(found)[:8])}" for what, found in faults.items() if found)
    if told:
        raise ValueError(f"the optimizer does not train what is to be trained: {told}")


def _given(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])


def weights_digest(module: nn.Module, *settings: object) -> str:
    """sha256 over every weight and buffer (names, dtypes, shapes, bytes) and over the settings' text."""
    found = hashlib.sha256(repr(settings).encode())
    held = module.module if isinstance(module, Frozen) else module
    for name, tensor in sorted([*held.named_parameters(), *held.named_buffers()], key=lambda pair: pair[0]):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
