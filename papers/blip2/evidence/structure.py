"""What the structure rung measures of a variant, on the meta device: parameters and sizes, no memory used."""

from __future__ import annotations

import torch
from torch import nn

from papers.blip2.config import VARIANTS, Blip2Config, LanguageConfig
from papers.blip2.evidence.cost import stage1_flops
from papers.blip2.model import Blip2, Blip2Qformer, vision_encoder

NAMED_SIZES = {"opt-2.7b": 2.7e9, "opt-6.7b": 6.7e9, "flan-t5-xl": 3e9, "flan-t5-xxl": 11e9}  # as they are called


def measure(variant: str) -> dict[str, float]:
    """{part of paper.yaml's structure rows: number}.

    Parameters: qformer_stage1 (with text branch and head of words; no projections), qformer_stage2 (without text),
    trained_stage1 and trained_stage2 (all that is trained: Table 1 and 2), vision, language, total (of the variant's
    own stage). Of stage-2 variants alone: trained_stage2, language, share_trained (of the total), total_by_name (the
    language model as large as it is called, which is how Table 2 adds), and what fine-tuning trains: captioner (image
    encoder too) and vqa (and the Q-Former's text branch). Sizes: queries, query_width, layers, heads, hidden,
    cross_attention_layers, embed_width, vocabulary, context, image_tokens, image_width, vision_layers, output_tokens
    (what stage 2 hands over), output_values and image_values (numbers that stand for a picture behind and before the
    Q-Former).
    """
    config = VARIANTS[variant]()
    with torch.device("meta"):
        stage1 = Blip2Qformer(config)
        vision = count(vision_encoder(config.vision))
    qformer = stage1.qformer
    counts = {
        "qformer_stage1": count(qformer) + count(stage1.head),
        "trained_stage1": count(stage1),
        "vision": vision,
        "total": vision + count(stage1),
    }
    if config.language is not None:
        counts |= stage2_counts(config, vision)
    width, seen = qformer.query_tokens.shape[1], config.vision
    sizes = {
        "queries": len(qformer.query_tokens),
        "query_width": width,
        "layers": len(qformer.layers),
        "heads": qformer.layers[0].attention.heads,
        "hidden": qformer.layers[0].query_mlp.up.out_features,
        "cross_attention_layers": sum(layer.cross_attention is not None for layer in qformer.layers),
        "embed_width": stage1.vision_proj.out_features,
        "vocabulary": qformer.embeddings.word.num_embeddings,
        "context": config.context,
        "image_tokens": seen.tokens,
        "image_width": qformer.layers[0].cross_attention.kv.in_features,
        "vision_layers": seen.layers,
        "output_tokens": len(qformer.query_tokens),
        "output_values": qformer.query_tokens.numel(),
        "image_values": seen.tokens * seen.width,
    }
    return counts | sizes


def forward_flops(variant: str) -> int:
    """Of stage 1's forward pass for one picture's features and one text of full context."""
    config = VARIANTS[variant]()
    return stage1_flops(config, config.context)


def stage2_counts(config: Blip2Config, vision: int) -> dict[str, float]:
    """Of a model with a language model, which itself is counted from its configuration."""
    with torch.device("meta"):
        stage2, asked = (Blip2(config, _OfWidth(config.language.width), question=one) for one in (False, True))
    language = language_parameters(config.language)
    trained = count(stage2)
    total = vision + trained + language
    return {
        "qformer_stage2": count(stage2.qformer),
        "trained_stage2": trained,
        "language": language,
        "total": total,
        "total_by_name": vision + trained + NAMED_SIZES.get(config.language.name, language),
        "share_trained": trained / total,
        "captioner": vision + trained,
        "vqa": vision + count(asked),
    }


class _OfWidth(nn.Module):
    """All that the trained part depends on of a language model."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width


def language_parameters(config: LanguageConfig) -> int:
    """Parameters of a language model of this family and size (transformers' modules, shared tensors once)."""
    W, V, L, H = config.width, config.vocabulary, config.layers, config.mlp_width
    inner = config.heads * (config.head_width or W // config.heads)
    if config.family == "opt":  # positions two more than its context; every projection and norm with a bias
        layer = 4 * (W * W + W) + 2 * W * H + H + W + 2 * 2 * W
        return V * W + (config.context + 2) * W + L * layer + 2 * W
    if config.family == "t5":  # gated feed-forward, no biases; word table and output matrix apart; 32 distances a head
        encoder = 4 * W * inner + 3 * W * H + 2 * W
        decoder = 8 * W * inner + 3 * W * H + 3 * W
        return 2 * V * W + L * (encoder + decoder) + 2 * W + 2 * 32 * config.heads
    # llama, small: gated feed-forward, no biases, rotary positions, word table and output matrix in one
    kv = (config.kv_heads or config.heads) * (inner // config.heads)
    return V * W + L * (2 * W * inner + 2 * W * kv + 3 * W * H + 2 * W) + W


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in module.parameters())
