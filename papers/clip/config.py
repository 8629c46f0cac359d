"""CLIP's configurations: the rows of Tables 19 and 20, and what the smaller scales train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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


def _published(
    image_size: int, patch: int | None, layers: int | tuple[int, ...], width: int, embed_width: int, text_width: int
) -> ClipConfig:
    """A row of Tables 19 and 20, whose heads are 64 wide. A ResNet's width is printed as it is after the last stage."""
    return ClipConfig(
        image_size=image_size,
        vision_width=width if patch else width // 32,
        vision_layers=layers,
        vision_heads=width // 64,
        patch=patch,
        embed_width=embed_width,
        text_width=text_width,
        text_heads=text_width // 64,
    )


def _ours(
    image_size: int,
    vision: tuple[int, int, int],
    embed_width: int,
    text: tuple[int, int, int],
    context: int,
    vocabulary: int,
) -> ClipConfig:
    """A ViT pair of the paper's wiring and none of its size; of both towers (width, layers, heads)."""
    return ClipConfig(
        image_size,
        *vision,
        patch=8,
        embed_width=embed_width,
        text_width=text[0],
        text_layers=text[1],
        text_heads=text[2],
        context=context,
        vocabulary=vocabulary,
        end_token=vocabulary - 1,
        tokenizer="small",
    )


VARIANTS: dict[str, Callable[[], ClipConfig]] = {
    # picture, patch, layers or blocks a stage, width, joint width, text width
    "clip-rn50": partial(_published, 224, None, (3, 4, 6, 3), 2048, 1024, 512),
    "clip-rn101": partial(_published, 224, None, (3, 4, 23, 3), 2048, 512, 512),
    "clip-rn50x4": partial(_published, 288, None, (4, 6, 10, 6), 2560, 640, 640),
    "clip-rn50x16": partial(_published, 384, None, (6, 8, 18, 8), 3072, 768, 768),
    "clip-rn50x64": partial(_published, 448, None, (3, 15, 36, 10), 4096, 1024, 1024),
    "clip-vit-b-32": partial(_published, 224, 32, 12, 768, 512, 512),
    "clip-vit-b-16": partial(_published, 224, 16, 12, 768, 512, 512),
    "clip-vit-l-14": partial(_published, 224, 14, 24, 1024, 768, 768),
    "clip-vit-l-14-336": partial(_published, 336, 14, 24, 1024, 768, 768),
    # picture, image encoder, joint width, text encoder, context, vocabulary
    "clip-tiny": partial(_ours, 32, (64, 3, 2), 48, (64, 2, 2), 24, 512),  # for tests and the smallest scales
    "clip-mini": partial(_ours, 32, (64, 3, 2), 64, (64, 1, 2), 24, 1_024),  # seconds on one core
    "clip-small": partial(_ours, 96, (384, 8, 6), 256, (256, 6, 4), 32, 4_096),  # minutes on one GPU
}
