"""What the structure rung measures of a variant, on the meta device: parameters and sizes, no memory used; and the
training steps that `python -m papers plan` counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from papers.blip2.config import VARIANTS, Blip2Config, LanguageConfig
from papers.blip2.model import Blip2, Blip2Qformer, vision_encoder
from shared.losses.image_text import (
    Negatives,
    Similarities,
    contrastive_to_targets,
    language_loss,
    matching_loss,
    own_pair_targets,
)
from shared.nn.causal_lm import SmallLanguageModel
from shared.tools.footprint import Step, count_flops, count_parameters, full_batch, shapes_only

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
        vision = count_parameters(vision_encoder(config.vision))
    qformer = stage1.qformer
    counts = {
        "qformer_stage1": count_parameters(qformer) + count_parameters(stage1.head),
        "trained_stage1": count_parameters(stage1),
        "vision": vision,
        "total": vision + count_parameters(stage1),
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
    """Of stage 1's forward pass for the features of one picture with one text of full context, and one false picture
    and text for it. The encoder is not in it."""
    config = VARIANTS[variant]()
    with shapes_only():
        features = torch.zeros(1, config.vision.tokens, config.vision.width)
        texts = torch.ones(1, config.context, dtype=torch.long)
        return count_flops(lambda: _three_passes(Blip2Qformer(config), features, texts))


def stage2_counts(config: Blip2Config, vision: int) -> dict[str, float]:
    """Of a model with a language model, which itself is counted from its configuration."""
    with torch.device("meta"):
        stage2, asked = (
            Blip2(config, _OfWidth(config.language.width), question=question) for question in (False, True)
        )
    language = language_parameters(config.language)
    trained = count_parameters(stage2)
    total = vision + trained + language
    return {
        "qformer_stage2": count_parameters(stage2.qformer),
        "trained_stage2": trained,
        "language": language,
        "total": total,
        "total_by_name": vision + trained + NAMED_SIZES.get(config.language.name, language),
        "share_trained": trained / total,
        "captioner": vision + trained,
        "vqa": vision + count_parameters(asked),
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


def step(variant: str) -> Step:
    """Of a stage-1 variant the frozen encoder and the Q-Former in its three modes, of a stage-2 variant the frozen
    encoder, the Q-Former's queries and the language model.

    The language model is a stand-in of its sizes (width, layers, heads, vocabulary; a feed-forward layer of four times
    the width): to a few percent the FLOPs of OPT; of FlanT5's two stacks it has one.
    """
    config = VARIANTS[variant]()
    return _stage1(config) if config.language is None else _stage2(config)


def _stage1(config: Blip2Config) -> Step:
    model, encoder = Blip2Qformer(config), vision_encoder(config.vision).requires_grad_(False)

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            features = encoder.tokens(images)
        return _three_passes(model, features, tokens)

    def contrast(images: Tensor, texts: Tensor, others: Tensor) -> Tensor:
        targets = own_pair_targets(len(images), len(images), images.device)
        return contrastive_to_targets(model.contrast(images, texts), Similarities(targets, targets)) + others

    batch, parts = full_batch(config.vision.image_size, config.context), nn.ModuleList([encoder, model])
    gathered = 4 * config.embed_width * (config.queries + 1)
    return Step(parts, batch, encode, {"contrast": contrast}, gathered)


def _three_passes(model: Blip2Qformer, features: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """Vectors of the queries (B, Q, E) and of the texts (B, E), and ITM and ITG in one number; what training computes
    once for several of them is computed once."""
    context = model.vision_norm(features)
    seen, caches = model.qformer.look_at(context), model.qformer.caches()
    vectors = model.image_vectors(model.qformer.encode_queries(seen, caches=caches))
    neighbours = torch.arange(len(tokens)).roll(1)  # which negatives are drawn makes no difference
    yes, no = model.matching(context, seen, tokens, Negatives(neighbours, neighbours))
    begun = model.with_start(tokens)
    states = model.qformer.decode_text(begun, model.attention_mask(begun), caches)
    states = states[:, :-1]  # every position has a next token
    logits = model.head(states, model.qformer.embeddings.word.weight)
    itg = language_loss(logits.flatten(0, 1), begun[:, 1:].flatten())
    return vectors, model.text_features(tokens), matching_loss(yes, no) + itg


def _stage2(config: Blip2Config) -> Step:
    language, encoder = config.language, vision_encoder(config.vision).requires_grad_(False)
    length = config.queries + config.context
    lm = SmallLanguageModel(language.vocabulary, length, language.width, language.layers, language.heads)
    model = Blip2(config, lm)

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """The loss, at every token of the text."""
        with torch.no_grad():
            features = encoder.tokens(images)
        prefix = model.prefix(features)
        embeddings = torch.cat([prefix, lm.embed(tokens[:, :-1])], dim=1)
        attention_mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=tokens.device)
        states = lm.states(embeddings, attention_mask)[:, config.queries - 1 :]
        return (language_loss(lm.logits(states).flatten(0, 1), tokens.flatten(), smoothing=0.0),)

    batch, parts = full_batch(config.vision.image_size, config.context), nn.ModuleList([encoder, model, lm])
    return Step(parts, batch, encode, {"language": lambda loss: loss})
