"""Linear layers that are not trained, on a CPU, with their weights laid out once as oneDNN wants them.

Torch hands a product in fp32 to MKL, and lays out weights in bf16 anew at each call. Neither suits the few rows of a
beam search, where reading the weights is all the work: five rows through OPT-125M take 0.4 to 0.6 times as long packed.
Training through a frozen model multiplies by the same weights step after step, both ways: packed it takes 0.9 times as
long with SmolLM2 and 144 rows.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 8  # which the layout is made for; it serves others too


ROWS_TRAINED_THROUGH = 128


class PackedLinear(nn.Module):
    """x W^T + b of a Linear that will not be trained, moved or saved any more.

    through: gradients pass to x, never to the weights; these stay beside their two layouts, for whoever counts them.
    """

    def __init__(self, linear: nn.Linear, through: bool = False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, bias = linear.weight.detach(), linear.bias
        rows = ROWS_TRAINED_THROUGH if through else ROWS
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.offset = None if bias is None else bias.detach()
        if through:
            self.turned = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous(), rows)
            self.weight, self.bias = linear.weight, bias
        else:
            self.turned, self.weight = None, weight.new_empty(0)  # for code that asks it for its precision

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.turned is not None and torch.is_grad_enabled() and x.requires_grad:
            return _Through.apply(x, self)
        return _product(x, self.packed, self.offset)


def _product(x: Tensor, packed: Tensor, offset: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, offset, "none", [], "")


class _Through(torch.autograd.Function):
    """A packed layer, and the gradient of its input: that of its output times W."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.turned = layer.turned
        return _product(x, layer.packed, layer.offset)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _product(gradient, ctx.turned, None), None


@torch.no_grad()
def pack(module: nn.Module, through: bool = False) -> None:
    """Replace every Linear below `module` where that is possible: on a CPU, in a precision that oneDNN has there. A
    matrix that somebody else holds too, as an embedding does its head's, is in memory twice from then on.

    through: for a frozen module that others train through; its matrices are in memory three times. Layers that are
    trained stay as they are.
    """
    _pack(module, through, {})


def _pack(module: nn.Module, through: bool, done: dict[int, PackedLinear]) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            trained = through and any(p.requires_grad for p in child.parameters())
            if not trained and child.weight.device.type == "cpu" and can_pack(child.weight.dtype):
                if id(child) not in done:
                    done[id(child)] = PackedLinear(child, through)
                setattr(module, name, done[id(child)])
        else:
            _pack(child, through, done)


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """The two operations are those that torch.compile makes of a Linear; no version of torch promises them."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        linear = nn.Linear(24, 40).to(dtype)
        x = torch.linspace(-1, 1, 2 * 3 * 24).view(2, 3, 24).to(dtype)
        with torch.no_grad():
            gap = (PackedLinear(linear)(x).float() - F.linear(x, linear.weight, linear.bias).float()).abs().max()
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
    return float(gap) < (1e-5 if dtype == torch.float32 else 2e-2)
