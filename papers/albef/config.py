"""ALBEF's configurations: the paper's, and what the smaller scales train; and the switches of Table 1's ablation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, although the ViT starts from DeiT (dataset/__init__.py)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class AlbefConfig:
    """Sizes of the three encoders (Sec. 3.1) and what pre-training keeps (Sec. 3.2, 3.3, 3.5).

    The defaults are the only size of the paper, as it is pre-trained.
    """

    image_size: int = 256
    patch: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 768
    text_heads: int = 12
    mlp_width: int = 3_072  # of the text layers' feed-forward
    vocabulary: int = 30_522
    text_layers: int = 6
    fusion_layers: int = 6
    positions: int = 512
    context: int = 25  # tokens of a text in pre-training; 30 in retrieval
    embed_width: int = 256  # of the space that ITC compares in
    queue: int = 65_536
    momentum: float = 0.995
    temperature: float = 0.07  # where it starts
    mlm_probability: float = 0.15
    dropout: float = 0.1  # of the text layers; the ViT has none
    vision_eps: float = 1e-6
    init_std: float = 0.02  # of what does not start from published weights; suits a width of 768
    pad: int = 0
    start: int = 101  # [CLS]
    end: int = 102  # [SEP]
    mask: int = 103
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    resize: str = "bicubic"
    tokenizer: str = "bert-wordpiece"


@dataclass(frozen=True)
class Objective:
    """What is trained, for the ablation of Table 1. The default is the whole of it; ITM is in every arm."""

    itc: bool = True
    mlm: bool = True
    negatives: Literal["hard", "random"] = "hard"
    alpha_itc: float = 0.4  # share of the teacher in ITC's targets, after its ramp
    alpha_mlm: float = 0.4

    def __post_init__(self) -> None:
        if self.negatives not in ("hard", "random"):
            raise ValueError(f"negatives are 'hard' or 'random', not {self.negatives!r}")
        if self.negatives == "hard" and not self.itc:
            raise ValueError("hard negatives are drawn by ITC's similarities: with itc=False take negatives='random'")

    @property
    def teacher(self) -> bool:
        """Whether anything of the momentum model is asked for."""
        return self.itc or self.teaches_words

    @property
    def teaches_words(self) -> bool:
        return self.mlm and self.alpha_mlm > 0


class TokenizerInfo(Protocol):
    """What a configuration takes from a tokenizer (shared/tokenizers/base.py)."""

    vocab_size: int
    pad: int
    start: int
    end: int
    specials: Mapping[str, int]


def with_tokenizer(config: AlbefConfig, words: TokenizerInfo) -> AlbefConfig:
    """The configuration with a tokenizer's ids. A tokenizer without a mask id gets one more word, its last."""
    mask = words.specials.get("mask")
    vocabulary = words.vocab_size + (mask is None)
    mask = words.vocab_size if mask is None else mask
    return replace(config, vocabulary=vocabulary, pad=words.pad, start=words.start, end=words.end, mask=mask)


def tiny() -> AlbefConfig:
    """For tests and the smallest scales: the paper's wiring, none of its size."""
    return AlbefConfig(
        image_size=32,
        patch=8,
        vision_width=48,
        vision_layers=2,
        vision_heads=3,
        text_width=64,
        text_layers=2,
        fusion_layers=2,
        text_heads=2,
        mlp_width=128,
        vocabulary=1_024,
        positions=64,
        context=24,
        embed_width=32,
        queue=16,
        dropout=0.0,
        init_std=0.07,  # 0.02 · sqrt(768 / width)
        start=1_021,
        end=1_022,
        mask=1_023,
        tokenizer="small",
    )


def mini() -> AlbefConfig:
    """The model of the mini scale: seconds on one core."""
    return replace(
        tiny(),
        vision_width=64,
        vision_heads=2,
        text_layers=1,
        mlp_width=256,
        context=32,
        embed_width=64,
        queue=24,  # with more, most of what it holds is older than what the encoders have learned since
        momentum=0.98,  # a run has hundreds of steps, not hundreds of thousands: the teacher must follow sooner
        temperature=0.1,  # at 0.07 the hard negatives are too hard for an ITM head that begins from nothing
        mlm_probability=0.3,
    )


def small() -> AlbefConfig:
    """The model of the gpu scale: minutes on one GPU."""
    return replace(
        tiny(),
        image_size=96,
        vision_width=384,
        vision_layers=8,
        vision_heads=6,
        text_width=256,
        text_layers=3,
        fusion_layers=3,
        text_heads=4,
        mlp_width=1_024,
        vocabulary=4_096,
        positions=128,
        context=32,
        embed_width=256,
        queue=8_192,
        init_std=0.03,
        start=4_093,
        end=4_094,
        mask=4_095,
    )


RELEASED = partial(AlbefConfig, image_size=384, context=30)  # as both released models are evaluated
VARIANTS: dict[str, Callable[[], AlbefConfig]] = {
    "albef-base": AlbefConfig,
    "albef-4m": RELEASED,
    "albef-14m": RELEASED,
    "albef-tiny": tiny,
    "albef-mini": mini,
    "albef-small": small,
}
