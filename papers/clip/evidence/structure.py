"""What the structure rung measures of a variant, on the meta device: parameters, sizes and FLOPs, no memory used; and
the training step that `python -m papers plan` counts."""

from __future__ import annotations

import torch

from papers.clip.config import VARIANTS
from papers.clip.model import Clip
from shared.losses.contrastive import chunked_contrastive_loss, contrastive_loss
from shared.tools.footprint import Step, count_flops, count_parameters, full_batch


def measure(variant: str) -> dict[str, float]:
    """{part of paper.yaml's structure rows: number}. FLOPs of one picture and one text of full context."""
    config = VARIANTS[variant]()
    with torch.device("meta"):
        model = Clip(config).eval()
        image = torch.empty(1, 3, config.image_size, config.image_size)
        tokens = torch.empty(1, config.context, dtype=torch.long)
        flops_vision = count_flops(lambda: model.encode_image(image))
        flops_text = count_flops(lambda: model.encode_text(tokens))
        if not config.patch:
            flops_vision += unused_pooling_flops(model, image)
    sizes = {name: count_parameters(part) for name, part in model.parts().items()}
    measured = {
        **sizes,
        "total": count_parameters(model),
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


def step(variant: str) -> Step:
    """Both towers, the contrastive loss, what ranks send each other."""
    config = VARIANTS[variant]()
    model = Clip(config)
    return Step(
        model,
        full_batch(config.image_size, config.context, config.end_token),
        model,
        {"plain": contrastive_loss, "chunked": chunked_contrastive_loss},  # clip_loss is the first
        gathered=2 * 4 * config.embed_width,  # a picture's and a text's features, fp32
        reads=config.context - 1,  # where the last text ends
    )


def unused_pooling_flops(model: Clip, image: torch.Tensor) -> int:
    """The published ResNet profiles let every token query in the attention pooling and keep one; ours asks for one."""
    pool = model.vision_encoder.pool
    tokens = pool.position[None]  # (1, 1 + N, C), only its shape counts
    return count_flops(lambda: pool.attention(tokens, tokens)) - count_flops(
        lambda: pool.attention(tokens[:, :1], tokens)
    )
