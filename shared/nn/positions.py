"""Where a token stands: rotary and xPos turns, fixed sine tables, and learned tables carried to another grid.

Rotary: Su et al. 2021 (arXiv:2104.09864), section 3.2.2. xPos: Sun et al. 2022 (arXiv:2212.10554), section 3.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from shared.core.errors import UserError


@dataclass(frozen=True)
class Rotary:
    """Turn each neighbouring pair of channels (2i, 2i+1) of q and k by angle position * base^(-2i/K).

    A score then depends on the distance of its two tokens alone. With `xpos_scale` (512 in the paper) q grows and k
    shrinks by zeta_i^(position / xpos_scale), zeta_i = (2i/K + 0.4) / 1.4, so that far tokens fade. Positions count
    from 0, not from the middle of the sequence: scores are the same and turned keys can be cached. In exchange keys
    grow by up to 3.5^(position / 512): 150 at 2048, beyond float16 towards 4500.

    It holds no tensors, so neither `.half()` nor the meta device can spoil its angles.
    """

    head_width: int
    base: float = 10_000.0
    xpos_scale: float | None = None

    def __post_init__(self) -> None:
        if self.head_width % 2:
            raise UserError(f"Rotary: head width {self.head_width} is odd, but channels are turned in pairs")

    def __call__(self, q: Tensor, k: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """q (B, H, T, K), k (B, G, T, K) at positions offset, offset + 1, ... -> the same shapes and dtypes."""
        # (T, K/2) tables in float32, whatever q's dtype: bfloat16 cannot count beyond 256.
        position = torch.arange(offset, offset + q.shape[2], device=q.device, dtype=torch.float32)[:, None]
        pair = torch.arange(0, self.head_width, 2, device=q.device, dtype=torch.float32) / self.head_width
        angle = position * self.base**-pair
        cos, sin = angle.cos(), angle.sin()
        if self.xpos_scale is None:
            return _turn(q, cos, sin), _turn(k, cos, sin)
        growth = ((pair + 0.4) / 1.4) ** (position / self.xpos_scale)
        return _turn(q, cos * growth, sin * growth), _turn(k, cos / growth, sin / growth)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = rearrange(x.float(), "b h t (k pair) -> pair b h t k", pair=2)  # (B, H, T, K/2) each
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin))
    return rearrange(turned, "pair b h t k -> b h t (k pair)").to(x.dtype)


def resample_grid(
    table: Tensor, grid_from: tuple[int, int], grid_to: tuple[int, int], prefix: int = 1, *, antialias: bool = True
) -> Tensor:
    """Carry a learned position table (P + N, D) from one patch grid (rows, columns) to another, bicubically.

    The first `prefix` rows (class tokens) have no place on the grid and are kept. The same grid returns the table
    itself. Computed in float32, returned in the table's dtype, with gradients.

    antialias=True is timm's way. Code from before it (ALBEF, BLIP) interpolates without: the cubic is then another one
    (a = -0.75 instead of -0.5), so the tables differ when growing too, not only when shrinking.
    """
    rows, columns = grid_from
    if len(table) != prefix + rows * columns:
        raise UserError(f"position table: {len(table)} rows, but {prefix} + {rows} x {columns} expected")
    if tuple(grid_from) == tuple(grid_to):
        return table
    kept, patches = table[:prefix], table[prefix:].float()
    picture = rearrange(patches, "(h w) d -> 1 d h w", h=rows)
    resized = F.interpolate(picture, size=grid_to, mode="bicubic", antialias=antialias, align_corners=False)
    return torch.cat([kept, rearrange(resized, "1 d h w -> (h w) d").to(table.dtype)])  # (P + N', D)


def resample_square(table: Tensor, like: Tensor, *, antialias: bool) -> Tensor:
    """`resample_grid` from a square grid behind one class token (1 + N, D) to the square grid of another such table."""
    if len(table) == len(like):
        return table
    before, after = math.isqrt(len(table) - 1), math.isqrt(len(like) - 1)
    return resample_grid(table, (before, before), (after, after), antialias=antialias)


def sincos_1d(width: int, positions: int | Tensor) -> Tensor:
    """Fixed sine table (N, D) for positions 0..N-1, or for the given ones (N,): all sines first, then all cosines.

    Frequencies 10000^(-2i/D) as in Vaswani et al. 2017, section 3.5, which interleaves sines and cosines instead.
    """
    if width % 2:
        raise UserError(f"sincos_1d: width {width} is odd, but every sine has its cosine")
    position = torch.arange(positions) if isinstance(positions, int) else positions
    frequency = 10_000.0 ** -(torch.arange(0, width, 2, device=position.device, dtype=torch.float64) / width)
    angle = position.double()[:, None] * frequency  # (N, D/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sincos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed table (N, D) for a (rows, columns) grid, row-major: first half of D says the column, second half the row.

    The order of MoCo v3 (arXiv:2104.02057) and MAE (arXiv:2111.06377).
    """
    if width % 4:
        raise UserError(f"sincos_2d: width {width} does not split into sine and cosine of rows and columns")
    rows, columns = grid
    by_column = repeat(sincos_1d(width // 2, columns), "w d -> (h w) d", h=rows)
    by_row = repeat(sincos_1d(width // 2, rows), "h d -> (h w) d", w=columns)
    return torch.cat([by_column, by_row], dim=1)  # (N, D)
