"""CLIP's modified ResNet with attention pooling (CLIP, Sec. 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from shared.nn.attention import Attention


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; strides are average pools, so that they do not alias (Zhang 2019)."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int = 1):
        super().__init__()
        channels_out = channels * self.expansion
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut_pool: nn.Module = nn.Identity()
        self.shortcut_conv: nn.Module = nn.Identity()
        self.shortcut_bn: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels_out:
            self.shortcut_pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
            self.shortcut_conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.bn1(self.conv1(x)))
        y = torch.relu_(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.pool(y)))
        return torch.relu_(y + self.shortcut_bn(self.shortcut_conv(self.shortcut_pool(x))))


class AttentionPool(nn.Module):
    """One attention layer whose query is the mean of the feature map (CLIP, Sec. 2.4). (B, C, H, W) -> (B, E)."""

    def __init__(self, grid: int, width: int, heads: int, out_width: int):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1 + grid * grid, width) / width**0.5)
        self.attention = Attention(width, heads, context_width=width, out_width=out_width)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b c h w -> b (h w) c")
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.position.to(x.dtype)  # (B, 1 + N, C)
        return self.attention(x[:, :1], x).squeeze(1)  # (B, E)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, anti-aliased strides, attention pooling instead of averaging.

    uint8 (B, 3, H, W), or floating point, then taken as normalised already -> (B, out_width).
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        image_size: int,
        blocks: Sequence[int],
        stem_width: int,
        heads: int,
        out_width: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        if image_size % 32:
            raise ValueError(f"a picture of {image_size} px does not divide by the ResNet's stride of 32")
        half = stem_width // 2
        self.register_buffer("scale", 1 / (255 * torch.tensor(std)).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", -(torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, stem_width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(stem_width)
        channels_in, stages = stem_width, []
        for index, count in enumerate(blocks):
            channels = stem_width * 2**index
            stage = [Bottleneck(channels_in, channels, stride=1 if index == 0 else 2)]
            channels_in = channels * Bottleneck.expansion
            stage += [Bottleneck(channels_in, channels) for _ in range(count - 1)]
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)
        self.width = channels_in
        self.pool = AttentionPool(image_size // 32, channels_in, heads, out_width)

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 32, W / 32)."""
        # The stem pads with zeros after normalisation, so the normalisation cannot be folded into its weights exactly.
        x = images if images.is_floating_point() else images * self.scale + self.shift
        x = torch.relu_(self.bn1(self.conv1(x)))
        x = torch.relu_(self.bn2(self.conv2(x)))
        x = torch.relu_(self.bn3(self.conv3(x)))
        x = nn.functional.avg_pool2d(x, 2)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.feature_map(images))
