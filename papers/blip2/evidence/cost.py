"""What `python -m papers plan` counts of BLIP-2's training steps: of a stage-1 variant the frozen encoder and the
Q-Former in its three modes, of a stage-2 variant the frozen encoder, the Q-Former's queries and the language model."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from papers.blip2.config import VARIANTS, Blip2Config
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
from shared.tools.footprint import Workload, shapes_only


def workload(variant: str) -> Workload:
    """A variant with batches of black pictures and texts of full context.

    The language model is a stand-in of its sizes (width, layers, heads, vocabulary; a feed-forward layer of four times
    the width): to a few percent the FLOPs of OPT; of FlanT5's two stacks it has one.
    """
    config = VARIANTS[variant]()
    return _stage1(config) if config.language is None else _stage2(config)


def _batch(config: Blip2Config, size: int) -> tuple[Tensor, Tensor]:
    side = config.vision.image_size
    return torch.zeros(size, 3, side, side, dtype=torch.uint8), torch.ones(size, config.context, dtype=torch.long)


def _stage1(config: Blip2Config) -> Workload:
    model, encoder = Blip2Qformer(config), vision_encoder(config.vision).requires_grad_(False)

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            features = encoder.tokens(images)
        return _three_passes(model, features, tokens)

    def contrast(images: Tensor, texts: Tensor, others: Tensor) -> Tensor:
        targets = own_pair_targets(len(images), len(images), images.device)
        return contrastive_to_targets(model.contrast(images, texts), Similarities(targets, targets)) + others

    return Workload(
        nn.ModuleList([encoder, model]), lambda size: _batch(config, size), encode, {"contrast": contrast},
        gathered=4 * config.embed_width * (config.queries + 1),
    )  # fmt: skip


def _three_passes(model: Blip2Qformer, features: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """Vectors of the queries (B, Q, E) and of the texts (B, E), and ITM and ITG in one number; what training computes
    once for several of them is computed once."""
    context = model.vision_norm(features)
    seen, caches = model.qformer.look_at(context), model.qformer.caches()
    vectors = model.image_vectors(model.qformer.encode_queries(seen, caches=caches))
    neighbours = torch.arange(len(tokens)).roll(1)  # which negatives are drawn makes no difference
    yes, no = model.matching(context, seen, tokens, Negatives(neighbours, neighbours))
    begun = model.with_start(tokens)
    states = model.qformer.decode_text(begun, model.attention_mask(begun), caches)[
        :, :-1
    ]  # every position has a next token
    logits = model.head(states, model.qformer.embeddings.word.weight)
    told = language_loss(logits.flatten(0, 1), begun[:, 1:].flatten())
    return vectors, model.text_features(tokens), matching_loss(yes, no) + told


@functools.cache
def stage1_flops(config: Blip2Config, tokens: int) -> int:
    """Of stage 1's forward pass for the features of one picture with one text of so many tokens, and one false picture
    and text for it: two for each multiply-add of matrix products and attention. The encoder is not in it."""
    with shapes_only(), FlopCounterMode(display=False) as counter:
        features = torch.zeros(1, config.vision.tokens, config.vision.width)
        _three_passes(Blip2Qformer(config), features, torch.ones(1, tokens, dtype=torch.long))
    return counter.get_total_flops()


def _stage2(config: Blip2Config) -> Workload:
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

    return Workload(
        nn.ModuleList([encoder, model, lm]), lambda size: _batch(config, size), encode, {"language": lambda x: x}
    )  # fmt: skip
