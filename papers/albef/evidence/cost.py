"""What `python -m papers plan` counts of ALBEF's pre-training step: three encoders, ITM and MLM, the momentum copy, and
the contrast with the queue."""

from __future__ import annotations

import torch
from torch import Tensor

from papers.albef.config import VARIANTS, Objective
from papers.albef.losses import albef_losses
from papers.albef.model import Albef, AlbefPretraining, PretrainingOutput, Taught, match_with_negatives
from shared.losses.image_text import Negatives, distilled_token_loss, matching_loss, similarities
from shared.tools.footprint import Workload


def workload(variant: str) -> Workload:
    """A variant with batches of black pictures and texts of full context."""
    config, objective = VARIANTS[variant](), Objective()
    model = AlbefPretraining(Albef(config))
    masked = max(1, round(config.mlm_probability * config.context))  # words of a text, on average

    def batch(size: int) -> tuple[Tensor, Tensor]:
        pixels = torch.zeros(size, 3, config.image_size, config.image_size, dtype=torch.uint8)
        return pixels, torch.ones(size, config.context, dtype=torch.long)

    def spelled(one: Albef, tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """MLM logits as `Albef.words` gives them, at places that do not follow from values."""
        fused = one.fuse(one.encode_text(tokens), one.attention_mask(tokens), image_tokens)
        return one.mlm_head(fused[:, :masked].flatten(0, 1), one.text_encoder.embeddings.word.weight)

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Features of both towers and of their momentum copies (B, E), and ITM and MLM in one number."""
        student = model.student
        image_tokens, text_states = student.encode_image(images), student.encode_text(tokens)
        taught = model.teach(images, tokens)
        features = student.image_features(image_tokens), student.text_features(text_states)
        neighbours = torch.arange(len(tokens)).roll(1)  # which negatives are drawn makes no difference
        pairs = match_with_negatives(
            student, text_states, student.attention_mask(tokens), image_tokens, Negatives(neighbours, neighbours)
        )
        words = spelled(student, tokens, image_tokens)
        with torch.no_grad():
            teacher_words = spelled(model.teacher, tokens, taught.image_tokens)
        told = distilled_token_loss(words, tokens[:, :masked].flatten(), teacher_words, objective.alpha_mlm)
        return *features, taught.image_features, taught.text_features, matching_loss(*pairs) + told

    def contrast(images: Tensor, texts: Tensor, slow_images: Tensor, slow_texts: Tensor, others: Tensor) -> Tensor:
        slow_images, slow_texts = slow_images.detach(), slow_texts.detach()
        keys = model.keys(Taught(slow_images, slow_images, slow_texts))
        temperature = model.student.temperature
        student = similarities(images, texts, *keys, temperature)
        with torch.no_grad():
            teacher = similarities(slow_images, slow_texts, *keys, temperature)
        itm = torch.zeros(len(images), 2)  # what ITM takes is in `others`
        output = PretrainingOutput(student, teacher, itm, itm, None, None, None)
        return albef_losses(output, Objective(mlm=False)).itc + others

    return Workload(model, batch, encode, {"momentum": contrast}, gathered=2 * 4 * config.embed_width)
