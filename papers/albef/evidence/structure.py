"""What the structure rung measures of a variant, on the meta device: parameters and sizes, no memory used."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from papers.albef.config import VARIANTS
from papers.albef.model import Albef, AlbefPretraining
from papers.albef.tasks import QuestionAnswering

PRINTED_SIZE = 384  # pixels, of everything after pre-training (Sec. 3.5)


def measure(variant: str) -> dict[str, float]:
    """{part of paper.yaml's structure rows: number}.

    `vision` and `vision_tokens` are at the variant's own picture size; `image_tokens` and `trained_vqa` at that of
    fine-tuning, 384 pixels, where the variant is the paper's. The two `trained_` counts are made as BLIP-2 makes them:
    the output matrix of the word head is counted beside the word table that it is.
    """
    config = VARIANTS[variant]()
    fine = replace(config, image_size=max(config.image_size, PRINTED_SIZE)) if config.patch == 16 else config
    with torch.device("meta"):
        model = Albef(config).eval()
        training = AlbefPretraining(model)
        image = torch.empty(1, 3, config.image_size, config.image_size)
        large = Albef(fine)
        image_tokens = large.encode_image(torch.empty(1, 3, fine.image_size, fine.image_size)).shape[1]
        answering = count(QuestionAnswering(large))
        encoded = model.encode_image(image)
    sizes = {name: count(part) for name, part in model.parts().items()}
    table = model.text_encoder.embeddings.word.weight.numel()
    return {
        **sizes,
        "total": count(model),
        "trained_retrieval": sum(p.numel() for p in training.parameters() if p.requires_grad) + table,
        "trained_vqa": answering + table,
        "kept": sum(t.numel() for t in training.state_dict().values()),
        "image_size": config.image_size,
        "vision_tokens": encoded.shape[1],
        "image_tokens": image_tokens,
        "vision_width": encoded.shape[2],
        "vision_layers": len(model.vision_encoder.blocks),
        "vision_heads": model.vision_encoder.blocks[0].attention.heads,
        "text_layers": len(model.text_encoder.layers),
        "fusion_layers": len(model.multimodal_encoder),
        "cross_attention_layers": sum(
            layer.cross_attention is not None for layer in [*model.text_encoder.layers, *model.multimodal_encoder]
        ),
        "text_width": model.text_proj.in_features,
        "text_heads": model.text_encoder.layers[0].attention.heads,
        "embed_width": model.vision_proj.out_features,
        "queue": training.queue.images.shape[0],
        "vocabulary": model.text_encoder.embeddings.word.num_embeddings,
        "context": config.context,
    }


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def forward_flops(variant: str) -> int:
    """Of the student's forward pass of one pair with a text of full context, without the word head: two for each
    multiply-add of matrix products and attention."""
    config = VARIANTS[variant]()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Albef(config).eval()
        image_tokens = model.encode_image(torch.empty(1, 3, config.image_size, config.image_size))
        tokens = torch.zeros(1, config.context, dtype=torch.long)
        attention_mask = torch.ones_like(tokens, dtype=torch.bool)
        states = model.encode_text(tokens)
        for _ in range(3):  # a true pair and two false ones
            model.match(states, attention_mask, image_tokens)
        model.fuse(model.encode_text(tokens), attention_mask, image_tokens)  # with masked words
    return counter.get_total_flops()
