"""What `python -m papers plan` counts of BLIP's pre-training step: image encoder, MED in its three modes, the momentum
copies, and the contrast with the queue."""

from __future__ import annotations

import torch
from torch import Tensor

from papers.blip.config import VARIANTS
from papers.blip.model import BlipPretraining, again, cross_attention_kv, starting_with
from shared.losses.image_text import (
    Negatives,
    Similarities,
    contrastive_to_targets,
    distilled_targets,
    language_loss,
    matching_loss,
    own_pair_targets,
    similarities,
)
from shared.tools.footprint import Workload


def workload(variant: str) -> Workload:
    """A variant with batches of black pictures and texts of full context."""
    config = VARIANTS[variant]()
    model = BlipPretraining(config)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        pixels = torch.zeros(size, 3, config.image_size, config.image_size, dtype=torch.uint8)
        return pixels, torch.ones(size, config.context, dtype=torch.long)

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Features of both encoders and of their momentum copies (B, E), and all other losses in one number."""
        blip = model.blip
        image_tokens = blip.encode_image(images)
        features = blip.features_of(image_tokens), blip.text_features(tokens)
        with torch.no_grad():
            slow_images = model.momentum.image_features(images)
            slow_texts = model.momentum.text_features(
                starting_with(config.start_token, tokens), blip.attention_mask(tokens)
            )
        neighbours = torch.arange(len(tokens)).roll(1)  # which negatives are drawn makes no difference
        yes, no, seen = model.matching(tokens, image_tokens, Negatives(neighbours, neighbours))
        text = starting_with(config.decode_token, tokens)
        seen = again(seen, None) if seen else cross_attention_kv(blip.text_decoder.layers, image_tokens)
        states = blip.text_decoder.states(text, None, seen=seen)[:, :-1]  # every position has a next token
        told = language_loss(blip.text_decoder.logits(states).flatten(0, 1), text[:, 1:].flatten())
        return *features, slow_images, slow_texts, matching_loss(yes, no) + told

    def contrast(images: Tensor, texts: Tensor, slow_images: Tensor, slow_texts: Tensor, others: Tensor) -> Tensor:
        image_keys = torch.cat([slow_images.detach(), model.queue.images])
        text_keys = torch.cat([slow_texts.detach(), model.queue.texts])
        with torch.no_grad():
            teacher = similarities(slow_images, slow_texts, image_keys, text_keys, config.temperature)
            targets = distilled_targets(own_pair_targets(len(images), len(image_keys), images.device), teacher, 0.4)
        student: Similarities = similarities(images, texts, image_keys, text_keys, config.temperature)
        return contrastive_to_targets(student, targets) + others

    return Workload(model, batch, encode, {"momentum": contrast}, gathered=2 * 4 * config.embed_width)
