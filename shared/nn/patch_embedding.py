"""Pictures to tokens: patch embedding as one matrix product over raw pixels, class token and learned positions.

Dosovitskiy et al. 2021 (arXiv:2010.11929), section 3.1, equation 1. Axes: B batch, C channels, N patches, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from shared.core.errors import UserError
from shared.nn.positions import resample_grid


class PatchEmbedding(nn.Module):
    """The patch convolution of a ViT, as a matrix product that takes uint8 pixels and normalises them in its weight.

    `weight` (D, C, p, p), or (D, C, t, p, p) where tubelet t > 1, is exactly the published convolution's, and so are
    its gradients: with y = (x - 128)/128, W (x/255 - mean)/std + b is computed as
    (128 W/(255 std)) y + b + sum W (128/255 - mean)/std. The (tiny) weight is folded in float32 at each forward; pixels
    stay uint8 until they are patches, and y is exact in bfloat16 and float16, so no normalised picture is ever written
    to memory or rounded.
    """

    def __init__(
        self,
        patch: int,
        width: int,
        *,
        channels: int = 3,
        tubelet: int = 1,
        bias: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != channels:
                raise UserError(f"PatchEmbedding: {name} has {len(values)} values for {channels} channels")
        self.patch, self.tubelet, self.channels = patch, tubelet, channels
        kernel = (patch, patch) if tubelet == 1 else (tubelet, patch, patch)
        bound = (channels * tubelet * patch * patch) ** -0.5  # torch.nn.Conv2d's own initialisation
        self.weight = nn.Parameter(torch.empty(width, channels, *kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound)) if bias else None
        # Python numbers, not buffers: `.bfloat16()` would round those and the meta device lose them.
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), or (B, C, F, H, W) with tubelets -> (B, N, D), patches in row-major order.

        uint8: raw pixels 0..255. Floating point: normalised already. UserError where the picture does not divide into
        patches or has other channels, ValueError for another dtype or rank, or for uint8 without mean and std.
        """
        patches = self._patches(images)  # (B, N, C*p*p), still uint8
        kind = images.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on meta
        dtype = torch.get_autocast_dtype(kind) if autocast else self.weight.dtype
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if images.dtype == torch.uint8:
            weight, bias = self._folded()
            patches = torch.add(patches.new_full((), -1, dtype=dtype), patches, alpha=1 / 128)
        return F.linear(patches.to(dtype), weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype))

    def _folded(self) -> tuple[Tensor, Tensor]:
        if self.mean is None or self.std is None:
            raise ValueError("PatchEmbedding: uint8 pixels need mean and std, given when it is built")
        # Products and sums rather than a matrix product: autocast would run that one in half precision.
        kernels = self.weight.float().unbind(1)  # C times (D, p, p)
        scaled = [w * (128 / (255 * std)) for w, std in zip(kernels, self.std, strict=True)]
        shifts = [
            w.flatten(1).sum(1) * ((128 / 255 - mean) / std)
            for w, mean, std in zip(kernels, self.mean, self.std, strict=True)
        ]
        start = torch.zeros_like(shifts[0]) if self.bias is None else self.bias.float()
        return torch.stack(scaled, dim=1), sum(shifts, start=start)  # (D, C, p, p), (D,)

    def _patches(self, images: Tensor) -> Tensor:
        p, t = self.patch, self.tubelet
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"PatchEmbedding: images are {images.dtype}, expected uint8 pixels or normalised floats")
        if images.ndim != self.weight.ndim:
            axes = "(B, C, H, W)" if t == 1 else "(B, C, F, H, W)"
            raise ValueError(f"PatchEmbedding: images of shape {tuple(images.shape)}, expected {axes}")
        if images.shape[1] != self.channels:
            raise UserError(f"PatchEmbedding: pictures have {images.shape[1]} channels, expected {self.channels}")
        height, width = images.shape[-2:]
        if height % p or width % p:
            raise UserError(f"PatchEmbedding: a {height} x {width} picture does not divide into {p} x {p} patches")
        if t == 1:
            return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        if images.shape[2] % t:
            raise UserError(f"PatchEmbedding: {images.shape[2]} frames do not divide into tubelets of {t}")
        return rearrange(images, "b c (f t) (h p) (w q) -> b (f h w) (c t p q)", t=t, p=p, q=p)


class ClassTokenAndPositions(nn.Module):
    """Put the class token in front of the patches and add a learned position to each.

    Parameters: `class_token` (D,) (None where class_token=False), `position` (P + N, D) for a (rows, columns) `grid`.
    """

    def __init__(self, width: int, grid: tuple[int, int], *, class_token: bool = True) -> None:
        super().__init__()
        self.grid, self.prefix = (grid[0], grid[1]), int(class_token)
        self.class_token = nn.Parameter(0.02 * torch.randn(width)) if class_token else None
        self.position = nn.Parameter(0.02 * torch.randn(self.prefix + grid[0] * grid[1], width))

    def forward(self, patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """patches (B, N, D) in row-major order -> (B, P + N, D); `grid` where theirs is not the one of the table."""
        grid = grid or self.grid
        if patches.shape[1] != grid[0] * grid[1]:
            raise UserError(f"positions: {patches.shape[1]} patches on a {grid[0]} x {grid[1]} grid; pass their grid")
        tokens = patches
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(patches), 1, -1), patches], dim=1)  # (B, P + N, D)
        return tokens + resample_grid(self.position, self.grid, grid, self.prefix)
