"""CLIP's configurations: one function per variant, named after the rows of Tables 19 and 20, and a tiny one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MEAN = (0.48145466, 0.4578275, 0.40821073)  # official code, clip/clip.py
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of both towers. `patch` None means the modified ResNet, whose `vision_layers` are blocks a stage."""

    image_size: int
    vision_width: int  # ResNet: the stem's width
    vision_layers: int | tuple[int, ...]
    vision_heads: int
    patch: int | None
    embed_width: int  # of the joint space
    text_width: int
    text_layers: int = 12
    text_heads: int = 8
    context: int = 77
    vocabulary: int = 49_408
    end_token: int = 49_407
    activation: str = "quick_gelu"
    eps: float = 1e-5
    projection: str = "linear"  # "mlp" is the arm that Sec. 2.3 compares with
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    resize: str = "bicubic"
    tokenizer: str = "clip-bpe"


def _vit(image_size: int, patch: int, width: int, layers: int, embed_width: int, text_width: int) -> ClipConfig:
    return ClipConfig(
        image_size=image_size,
        vision_width=width,
        vision_layers=layers,
        vision_heads=width // 64,
        patch=patch,
        embed_width=embed_width,
        text_width=text_width,
        text_heads=text_width // 64,
    )


def _resnet(image_size: int, blocks: tuple[int, ...], width: int, embed_width: int, text_width: int) -> ClipConfig:
    return ClipConfig(
        image_size=image_size,
        vision_width=width // 32,  # Table 19 prints the width after the last stage
        vision_layers=blocks,
        vision_heads=width // 64,
        patch=None,
        embed_width=embed_width,
        text_width=text_width,
        text_heads=text_width // 64,
    )


def rn50() -> ClipConfig:
    return _resnet(224, (3, 4, 6, 3), 2048, 1024, 512)


def rn101() -> ClipConfig:
    return _resnet(224, (3, 4, 23, 3), 2048, 512, 512)


def rn50x4() -> ClipConfig:
    return _resnet(288, (4, 6, 10, 6), 2560, 640, 640)


def rn50x16() -> ClipConfig:
    return _resnet(384, (6, 8, 18, 8), 3072, 768, 768)


def rn50x64() -> ClipConfig:
    return _resnet(448, (3, 15, 36, 10), 4096, 1024, 1024)


def vit_b_32() -> ClipConfig:
    return _vit(224, 32, 768, 12, 512, 512)


def vit_b_16() -> ClipConfig:
    return _vit(224, 16, 768, 12, 512, 512)


def vit_l_14() -> ClipConfig:
    return _vit(224, 14, 1024, 24, 768, 768)


def vit_l_14_336() -> ClipConfig:
    return _vit(336, 14, 1024, 24, 768, 768)


def tiny() -> ClipConfig:
    """A ViT pair for tests and the smallest scales: the paper's wiring, none of its size."""
    return ClipConfig(
        image_size=32,
        vision_width=64,
        vision_layers=3,
        vision_heads=2,
        patch=8,
        embed_width=48,
        text_width=64,
        text_layers=2,
        text_heads=2,
        context=24,
        vocabulary=512,
        end_token=511,
        tokenizer="small",
    )


def mini() -> ClipConfig:
    """The model of the mini scale: 32 px pictures, seconds on one core."""
    return ClipConfig(
        image_size=32,
        vision_width=64,
        vision_layers=3,
        vision_heads=2,
        patch=8,
        embed_width=64,
        text_width=64,
        text_layers=1,
        text_heads=2,
        context=24,
        vocabulary=1_024,
        end_token=1_023,
        tokenizer="small",
    )


def small() -> ClipConfig:
    """The model of the gpu scale: minutes on one GPU."""
    return ClipConfig(
        image_size=96,
        vision_width=384,
        vision_layers=8,
        vision_heads=6,
        patch=8,
        embed_width=256,
        text_width=256,
        text_layers=6,
        text_heads=4,
        context=32,
        vocabulary=4_096,
        end_token=4_095,
        tokenizer="small",
    )


VARIANTS: dict[str, Callable[[], ClipConfig]] = {
    "clip-rn50": rn50,
    "clip-rn101": rn101,
    "clip-rn50x4": rn50x4,
    "clip-rn50x16": rn50x16,
    "clip-rn50x64": rn50x64,
    "clip-vit-b-32": vit_b_32,
    "clip-vit-b-16": vit_b_16,
    "clip-vit-l-14": vit_l_14,
    "clip-vit-l-14-336": vit_l_14_336,
    "clip-tiny": tiny,
    "clip-mini": mini,
    "clip-small": small,
}
