"""What the structure rung measures of a variant, on the meta device: parameters, sizes and FLOPs, no memory used."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from papers.clip.config import VARIANTS
from papers.clip.model import Clip


def measure(variant: str) -> dict[str, float]:
    """{part of paper.yaml's structure rows: number}. FLOPs of one picture and one text of full context."""
    config = VARIANTS[variant]()
    with torch.device("meta"):
        model = Clip(config).eval()
        image = torch.empty(1, 3, config.image_size, config.image_size)
        tokens = torch.empty(1, config.context, dtype=torch.long)
        flops_vision = flops(lambda: model.encode_image(image))
        flops_text = flops(lambda: model.encode_text(tokens))
        if not config.patch:
            flops_vision += unused_pooling_flops(model, image)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    measured = {
        **sizes,
        "total": sum(p.numel() for p in model.parameters()),
        "flops_vision": flops_vision,
        "flops_text": flops_text,
        "flops_total": flops_vision + flops_text,
        "image_size": config.image_size,
        "embed_width": model.encode_image(image).shape[-1],
        "context": model.text_encoder.position.shape[0],
        "vocabulary": model.text_encoder.token_embedding.num_embeddings,
        "text_width": model.text_encoder.token_embedding.embedding_dim,
        "text_layers": len(model.text_encoder.blocks),
        "text_heads": model.text_encoder.blocks[0].attention.heads,
    }
    vision = model.vision_encoder
    if config.patch:
        return measured | {
            "vision_tokens": vision.embed(image).shape[1],
            "vision_width": vision.embed(image).shape[2],
            "vision_layers": len(vision.blocks),
            "vision_heads": vision.blocks[0].attention.heads,
        }
    features = vision.feature_map(image)  # (1, C, H, W)
    return measured | {
        "vision_tokens": features.shape[2] * features.shape[3] + 1,
        "feature_width": features.shape[1],
        "vision_blocks": sum(len(stage) for stage in vision.stages),
        "vision_heads": vision.pool.attention.heads,
    }


def forward_flops(variant: str) -> int:
    """Of one picture and one text of full context."""
    return measure(variant)["flops_total"]


def flops(run) -> int:
    """Two for each multiply-add of convolutions, matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def unused_pooling_flops(model: Clip, image: torch.Tensor) -> int:
    """The published ResNet profiles let every token query in the attention pooling and keep one; ours asks for one."""
    pool = model.vision_encoder.pool
    tokens = pool.position[None]  # (1, 1 + N, C), only its shape counts
    return flops(lambda: pool.attention(tokens, tokens)) - flops(lambda: pool.attention(tokens[:, :1], tokens))
