"""BLIP's configurations: the two sizes of Sec. 4.1 at the resolutions of Sec. 4 and 5, and small ones of this house."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.tokenizers.base import Tokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, official code data/__init__.py
STD = (0.26862954, 0.26130258, 0.27577711)
SHARINGS = ("all", "all_but_sa", "all_but_ca", "none")  # Table 3
PROMPT = "a picture of "
SPECIALS = ("decode_start", "encode_start")  # what a tokenizer has to have for BLIP


@dataclass(frozen=True)
class BlipConfig:
    """Sizes of the image encoder and of the mixture of encoder and decoder (MED), and the ids its texts begin with."""

    image_size: int
    patch: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_heads: int
    mlp_width: int  # of the text's feed-forward layers
    text_layers: int = 12
    vocabulary: int = 30_524
    positions: int = 512
    context: int = 30  # tokens a caption is padded or cut to, its first and last among them
    embed_width: int = 256  # of the joint space of ITC
    sharing: str = "all_but_sa"  # what the text encoder and decoder have in common, one of SHARINGS
    queue: int = 57_600
    momentum: float = 0.995
    temperature: float = 0.07  # where the learned one starts; it divides
    label_smoothing: float = 0.1
    dropout: float = 0.1  # of the text layers
    drop_path: float = 0.0  # stochastic depth of the image encoder's last block, rising from 0 at the first
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    resize: str = "bicubic"
    tokenizer: str = "bert-wordpiece"
    pad_token: int = 0
    start_token: int = 101  # [CLS]: text alone
    end_token: int = 102  # [SEP]
    decode_token: int = 30_522  # [DEC]: image-grounded decoder
    encode_token: int = 30_523  # [ENC]: image-grounded encoder

    def __post_init__(self) -> None:
        if self.sharing not in SHARINGS:
            raise ValueError(f"sharing is one of {', '.join(SHARINGS)}, not {self.sharing!r}")


def with_tokenizer(config: BlipConfig, tokenizer: Tokenizer) -> BlipConfig:
    """The configuration with the vocabulary and the ids of a tokenizer that was made with SPECIALS."""
    return replace(config, **tokenizer.config_fields(SPECIALS))


def base() -> BlipConfig:
    """ViT-B/16 at 224 px, as pre-trained."""
    return BlipConfig(
        image_size=224,
        patch=16,
        vision_width=768,
        vision_layers=12,
        vision_heads=12,
        text_width=768,
        text_heads=12,
        mlp_width=3072,
    )


def large() -> BlipConfig:
    """ViT-L/16 at 224 px, as pre-trained."""
    return replace(base(), vision_width=1024, vision_layers=24, vision_heads=16, drop_path=0.1)


def at(size: int, config: BlipConfig, context: int) -> BlipConfig:
    """A size of pictures and texts that a task fine-tunes with."""
    return replace(config, image_size=size, context=context)


def caption(config: BlipConfig) -> BlipConfig:
    """Captioning: 384 px, texts of 40 tokens (official code models/blip.py, configs/caption_coco.yaml)."""
    return at(384, config, 40)


def retrieval(config: BlipConfig) -> BlipConfig:
    """Retrieval: 384 px, texts of 35 tokens (official code models/blip_retrieval.py, configs/retrieval_coco.yaml)."""
    return at(384, config, 35)


def vqa(config: BlipConfig) -> BlipConfig:
    """VQA: 480 px, questions of 35 tokens, nothing shared, stochastic depth 0.1 (official code models/blip_vqa.py)."""
    return replace(at(480, config, 35), sharing="none", drop_path=0.1)


def nlvr(config: BlipConfig) -> BlipConfig:
    """NLVR2: 384 px, statements of any length, stochastic depth 0.1 (official code models/blip_nlvr.py)."""
    return replace(at(384, config, config.positions), drop_path=0.1)


def _small(image_size: int, width: int, layers: int, heads: int, vocabulary: int, context: int, queue: int):
    """Both towers equally deep and wide, the joint space as wide, and unlike the published sizes no dropout."""
    return BlipConfig(
        image_size=image_size,
        patch=8,
        vision_width=width,
        vision_layers=layers,
        vision_heads=heads,
        text_width=width,
        text_layers=layers,
        text_heads=heads,
        mlp_width=4 * width,
        vocabulary=vocabulary,
        positions=max(64, context),
        context=context,
        embed_width=width,
        queue=queue,
        dropout=0.0,
        tokenizer="small-bpe",
        start_token=vocabulary - 4,
        end_token=vocabulary - 3,
        decode_token=vocabulary - 2,
        encode_token=vocabulary - 1,
    )


def tiny() -> BlipConfig:
    """For tests and the smallest scales: the paper's wiring, none of its size."""
    return replace(_small(32, 32, 2, 2, 300, 16, 64), embed_width=24)


def mini() -> BlipConfig:
    """The model of the mini scale: 32 px pictures, minutes on one core."""
    return _small(32, 64, 2, 2, 1_024, 24, 1_024)


def small() -> BlipConfig:
    """The model of the gpu scale: 96 px pictures, minutes on one GPU."""
    return replace(_small(96, 256, 6, 4, 4_096, 32, 8_192), dropout=0.1)


VARIANTS: dict[str, Callable[[], BlipConfig]] = {
    "blip-base": base,
    "blip-base-14m": base,  # the same network, pre-trained on 14M pictures,
    "blip-base-129m": base,  # on 129M,
    "blip-base-capfilt-l": base,  # and on 129M bootstrapped by the large model's captioner and filter
    "blip-large": large,
    "blip-tiny": tiny,
    "blip-mini": mini,
    "blip-small": small,
}
