"""BLIP-2's configurations: the frozen models of Table 2 around one Q-Former (Sec. 3.1, 3.4), and this house's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from shared.core.errors import UserError

if TYPE_CHECKING:
    from shared.tokenizers.base import Tokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, official code lavis/processors/blip_processors.py
STD = (0.26862954, 0.26130258, 0.27577711)
SPECIALS = ("decode_start",)  # what a tokenizer has to have for the Q-Former: [DEC], but no [ENC] as in BLIP
VISION_KINDS = ("clip", "eva", "efficientnet")
FAMILIES = ("opt", "t5", "llama", "small")


@dataclass(frozen=True)
class VisionConfig:
    """A frozen image encoder as it is built: the last block and the final norm are absent (Sec. 3.4)."""

    kind: str  # one of VISION_KINDS
    image_size: int
    patch: int  # efficientnet: pixels a step of the map that is read
    width: int
    layers: int  # blocks that are there
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    eps: float = 1e-6
    input_norm: bool = False  # CLIP's, before the first block
    patch_bias: bool = True
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    resize: str = "bicubic"

    def __post_init__(self) -> None:
        if self.kind not in VISION_KINDS:
            raise ValueError(f"kind is one of {', '.join(VISION_KINDS)}, not {self.kind!r}")

    @property
    def tokens(self) -> int:
        """How many vectors stand for a picture: those of its patches and, in a ViT, the class token."""
        return (self.image_size // self.patch) ** 2 + (self.kind != "efficientnet")


@dataclass(frozen=True)
class LanguageConfig:
    """The sizes of a frozen language model, as its own configuration publishes them."""

    name: str
    family: str  # one of FAMILIES: how it is wired
    width: int
    vocabulary: int
    layers: int  # t5: of the encoder, and as many of the decoder
    heads: int
    mlp_width: int  # of the feed-forward layers
    context: int  # positions, those of the queries included; t5: what it was trained with
    kv_heads: int | None = None  # llama: key/value heads, as many as heads where None
    head_width: int | None = None  # t5: width / heads where None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family is one of {', '.join(FAMILIES)}, not {self.family!r}")

    @property
    def kind(self) -> str:
        """ "causal": the queries stand before the text; "seq2seq": they and a prompt enter the encoder (Fig. 3)."""
        return "seq2seq" if self.family == "t5" else "causal"


@dataclass(frozen=True)
class Blip2Config:
    """The Q-Former, the frozen encoder that it looks at and, in stage 2, the frozen model that it speaks to."""

    vision: VisionConfig
    language: LanguageConfig | None = None  # None: stage 1
    queries: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    cross_every: int = 2  # cross-attention in layers 0, 2, 4, ...
    embed_width: int = 256  # of the joint space of ITC
    vocabulary: int = 30_523  # BERT's and [DEC]
    positions: int = 512
    context: int = 32  # tokens a text is padded or cut to, its first and last among them
    dropout: float = 0.1
    temperature: float = 0.07  # where the learned one starts; it divides and is not clamped
    label_smoothing: float = 0.1  # of ITC and ITG
    tokenizer: str = "bert-wordpiece"
    pad_token: int = 0
    start_token: int = 101  # [CLS]: text alone, and matching
    end_token: int = 102  # [SEP]
    decode_token: int = 30_522  # [DEC]: image-grounded generation

    @property
    def language_of_stage2(self) -> LanguageConfig:
        """`language`, of a model of stage 2."""
        if self.language is None:
            raise UserError(
                "these are weights of stage 2, but the variant has no language model: give that of a row of Table 2"
            )
        return self.language


def with_tokenizer(config: Blip2Config, tokenizer: Tokenizer) -> Blip2Config:
    """The configuration with the vocabulary and the ids of a tokenizer that was made with SPECIALS."""
    return replace(config, **tokenizer.config_fields(SPECIALS))


# ---- frozen models

# Official code lavis/models/eva_vit.py and clip_vit.py: 39 of 40 and 23 of 24 blocks.
EVA_VIT_G = VisionConfig("eva", 224, 14, width=1408, layers=39, heads=16, mlp_ratio=4.3637)
CLIP_VIT_L = VisionConfig(
    "clip", 224, 14, width=1024, layers=23, heads=16, activation="quick_gelu", eps=1e-5, input_norm=True,
    patch_bias=False,
)  # fmt: skip

LANGUAGES: dict[str, LanguageConfig] = {
    language.name: language
    for language in (
        LanguageConfig("opt-2.7b", "opt", 2560, 50_272, layers=32, heads=32, mlp_width=10_240, context=2048),
        LanguageConfig("opt-6.7b", "opt", 4096, 50_272, layers=32, heads=32, mlp_width=16_384, context=2048),
        LanguageConfig(
            "flan-t5-xl", "t5", 2048, 32_128, layers=24, heads=32, mlp_width=5120, context=512, head_width=64
        ),
        LanguageConfig("flan-t5-xxl", "t5", 4096, 32_128, layers=24, heads=64, mlp_width=10_240, context=512),
        LanguageConfig(
            "smollm2-135m", "llama", 576, 49_152, layers=30, heads=9, mlp_width=1536, context=8192, kv_heads=3
        ),
        LanguageConfig("small", "small", 64, 1_024, layers=2, heads=2, mlp_width=256, context=96),
    )
}


# ---- the published models


PUBLISHED = {  # stage 1 at 224 px, and the rows of Table 2
    "blip2-vit-l": Blip2Config(CLIP_VIT_L),
    "blip2-vit-g": Blip2Config(EVA_VIT_G),
    "blip2-vit-l-opt-2.7b": Blip2Config(CLIP_VIT_L, LANGUAGES["opt-2.7b"]),
    "blip2-vit-g-opt-2.7b": Blip2Config(EVA_VIT_G, LANGUAGES["opt-2.7b"]),
    "blip2-vit-g-opt-6.7b": Blip2Config(EVA_VIT_G, LANGUAGES["opt-6.7b"]),
    "blip2-vit-l-flan-t5-xl": Blip2Config(CLIP_VIT_L, LANGUAGES["flan-t5-xl"]),
    "blip2-vit-g-flan-t5-xl": Blip2Config(EVA_VIT_G, LANGUAGES["flan-t5-xl"]),
    "blip2-vit-g-flan-t5-xxl": Blip2Config(EVA_VIT_G, LANGUAGES["flan-t5-xxl"]),
}


def at(size: int, config: Blip2Config, context: int | None = None) -> Blip2Config:
    """A size of pictures, and of texts, that a task fine-tunes with: captions and retrieval 364 px, VQA 490 px."""
    vision = replace(config.vision, image_size=size)
    return replace(config, vision=vision, context=context or config.context)


# ---- this house's


def _small(vision: VisionConfig, queries: int, width: int, layers: int, heads: int, vocabulary: int, context: int):
    """Unlike the published size without dropout, and the joint space as wide as the Q-Former."""
    return Blip2Config(
        vision=vision,
        queries=queries,
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=4 * width,
        vocabulary=vocabulary,
        positions=max(64, context),
        context=context,
        embed_width=width,
        dropout=0.0,
        tokenizer="small-bpe",
        start_token=vocabulary - 3,
        end_token=vocabulary - 2,
        decode_token=vocabulary - 1,
    )


def _seen(image_size: int, width: int, layers: int, heads: int) -> VisionConfig:
    """A CLIP of this house without its last block."""
    return VisionConfig(
        "clip", image_size, 8, width, layers, heads, activation="quick_gelu", eps=1e-5, input_norm=True,
        patch_bias=False,
    )  # fmt: skip


def tiny() -> Blip2Config:
    """For tests and the smallest scales: the paper's wiring, none of its size."""
    config = _small(_seen(32, 64, 2, 2), 4, 32, 3, 2, 300, 16)
    return replace(config, embed_width=24)


def tiny_small() -> Blip2Config:
    """`tiny` in stage 2."""
    language = LanguageConfig("small", "small", 40, 300, layers=2, heads=2, mlp_width=160, context=48)
    return replace(tiny(), language=language)


def mini() -> Blip2Config:
    """The model of the mini scale: 32 px pictures seen by the CLIP of that scale, seconds on one core."""
    return replace(_small(_seen(32, 64, 2, 2), 8, 64, 2, 2, 1_024, 24), language=LANGUAGES["small"])


def mini_smollm2() -> Blip2Config:
    """The same Q-Former, speaking to a language model that was trained on the web."""
    return replace(mini(), language=LANGUAGES["smollm2-135m"])


def small() -> Blip2Config:
    """The model of the gpu and field scales, whose recipes set picture size, queries and dropout."""
    config = _small(_seen(96, 384, 7, 6), 32, 256, 6, 4, 4_096, 32)
    return replace(config, dropout=0.1, language=LANGUAGES["smollm2-135m"])


VARIANTS: dict[str, Callable[[], Blip2Config]] = {
    **{name: partial(replace, config) for name, config in PUBLISHED.items()},
    "blip2-tiny": tiny,
    "blip2-tiny-small": tiny_small,
    "blip2-mini": mini,
    "blip2-mini-smollm2": mini_smollm2,
    "blip2-small": small,
}
