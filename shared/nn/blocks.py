"""Transformer blocks: attention and MLP with residual connections, normalised before (pre) or after (post).

Vaswani et al. 2017 (post-norm), Wang et al. 2019 / Radford et al. 2019 (pre-norm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.nn.attention import Attention, KVCache, StructuredMask


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with (not interchangeable)."""

    def forward(self, x: Tensor) -> Tensor:
        return _quick_gelu(x)


class _QuickGELU(torch.autograd.Function):
    """Keeps only its input for the backward pass; the plain product would keep three tensors of its size."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return nn.functional.silu(x * 1.702).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, x * 1.702)


def _quick_gelu(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # keeps no more by itself; and torch 2.11 loses the function's gradient there
        return x * torch.sigmoid(1.702 * x)
    return _QuickGELU.apply(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class MLP(nn.Module):
    """Linear, activation, linear. (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, mlp_width: int, activation: str = "gelu"):
        super().__init__()
        self.up = nn.Linear(width, mlp_width)
        self.activation = ACTIVATIONS[activation]()
        self.down = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """One transformer layer. (B, T, D) -> (B, T, D).

    norm "pre": x + f(norm(x)); "post": norm(x + f(x)), as in BERT.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        eps: float = 1e-5,
        norm: str = "pre",
        drop_path: float = 0.0,
    ):
        """drop_path: how often, in training, a sample passes by attention, and by the MLP (stochastic depth)."""
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm is 'pre' or 'post', not {norm!r}")
        self.pre = norm == "pre"
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, int(width * mlp_ratio), activation)
        self.drop_path = drop_path

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | StructuredMask | None = None,
        causal: bool = False,
        rotary: Callable | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        def attend(y: Tensor) -> Tensor:
            return self.kept(self.attention(y, mask=mask, causal=causal, rotary=rotary, cache=cache))

        if self.pre:
            x = x + attend(self.attention_norm(x))
            return x + self.kept(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + attend(x))
        return self.mlp_norm(x + self.kept(self.mlp(x)))

    def kept(self, y: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016) as timm has it: whole samples to zero, the others scaled up."""
        if not (self.drop_path and self.training):
            return y
        keep = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path
        return y * keep / (1 - self.drop_path)


class Blocks(nn.ModuleList):
    """A stack of equal blocks; with `recompute`, activations inside a block are recomputed in the backward pass."""

    recompute: bool = False

    if TYPE_CHECKING:  # nn.ModuleList promises nothing of what it holds

        def __iter__(self) -> Iterator[Any]: ...
        def __getitem__(self, index: int | slice) -> Any: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | StructuredMask | None = None,
        causal: bool = False,
        rotary: Callable | None = None,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        for index, block in enumerate(self):
            cache = caches[index] if caches else None
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, mask=mask, causal=causal, rotary=rotary, use_reentrant=False)
            else:
                x = block(x, mask=mask, causal=causal, rotary=rotary, cache=cache)
        return x


def set_recompute(module: nn.Module, on: bool) -> None:
    """Switch activation checkpointing for every stack of blocks inside `module`."""
    for child in module.modules():
        if isinstance(child, Blocks):
            child.recompute = on
