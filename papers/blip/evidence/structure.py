"""What the structure rung measures of a variant, on the meta device: parameters and sizes, no memory used; and the
training step that `python -m papers plan` counts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from papers.blip.config import SHARINGS, VARIANTS, BlipConfig, caption, nlvr, retrieval, vqa
from papers.blip.model import Blip, BlipPretraining, again, cross_attention_kv, starting_with
from papers.blip.tasks import BlipNlvr, BlipVqa
from shared.losses.image_text import (
    Negatives,
    contrastive_to_targets,
    distilled_targets,
    language_loss,
    matching_loss,
    own_pair_targets,
    similarities,
)
from shared.tools.footprint import Step, count_flops, count_parameters, full_batch


def measure(variant: str) -> dict[str, float]:
    """{part of paper.yaml's structure rows: number}."""
    config = VARIANTS[variant]()
    with torch.device("meta"):
        shared = {f"share_{sharing}": med(replace(config, sharing=sharing)) for sharing in SHARINGS}
        retriever = BlipPretraining(retrieval(config), decoder=False)
        answerer = BlipVqa(vqa(config))
        counts = {
            "captioner": count_parameters(Blip(caption(config), encoder=False)),
            "vqa": count_parameters(answerer),
            "retrieval": count_parameters(retriever),
            "nlvr": count_parameters(BlipNlvr(nlvr(config))),
            # BLIP-2 counts trained parameters, and its VQA figure has the word table again as the output matrix
            "retrieval_blip2": count_parameters(retriever.blip),
            "vqa_blip2": count_parameters(answerer) + answerer.text_decoder.embeddings.word.weight.numel(),
        }
        whole = BlipPretraining(config)
    blip = retriever.blip
    sizes = {
        "total": count_parameters(whole.blip),
        "embed_width": retriever.queue.images.shape[1],
        "queue": retriever.queue.images.shape[0],
        "vocabulary": blip.text_encoder.embeddings.word.num_embeddings,
        "cross_attention_layers": sum(layer.cross_attention is not None for layer in blip.text_encoder.layers),
        "vision_layers": len(blip.vision_encoder.blocks),
        "vision_width": blip.vision_encoder.width,
    }
    return shared | counts | sizes


def forward_flops(variant: str) -> int:
    """Of the forward pass of one picture with one text of full context, and one false picture and text for it: two for
    each multiply-add of matrix products and attention; the momentum copies are not counted."""
    config = VARIANTS[variant]()
    with torch.device("meta"):
        blip = Blip(config)
        images, tokens = full_batch(config.image_size, config.context)(1)

    def forward() -> None:
        image_tokens = blip.encode_image(images)
        blip.text_features(tokens)
        blip.match(tokens.expand(3, -1), image_tokens)
        blip.caption_logits(tokens, image_tokens)

    return count_flops(forward)


def med(config: BlipConfig) -> int:
    """Image encoder, text encoder and text decoder with its head (Table 3); what is shared is the encoder's alone."""
    model = Blip(config)
    return sum(count_parameters(part) for part in (model.vision_encoder, model.text_encoder, model.text_decoder))


def step(variant: str) -> Step:
    """The image encoder, MED in its three modes, the momentum copies, and the contrast with the queue."""
    config = VARIANTS[variant]()
    model = BlipPretraining(config)

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
        language = language_loss(blip.text_decoder.logits(states).flatten(0, 1), text[:, 1:].flatten())
        return *features, slow_images, slow_texts, matching_loss(yes, no) + language

    def contrast(images: Tensor, texts: Tensor, slow_images: Tensor, slow_texts: Tensor, others: Tensor) -> Tensor:
        image_keys = torch.cat([slow_images.detach(), model.queue.images])
        text_keys = torch.cat([slow_texts.detach(), model.queue.texts])
        with torch.no_grad():
            teacher = similarities(slow_images, slow_texts, image_keys, text_keys, config.temperature)
            targets = distilled_targets(own_pair_targets(len(images), len(image_keys), images.device), teacher, 0.4)
        student = similarities(images, texts, image_keys, text_keys, config.temperature)
        return contrastive_to_targets(student, targets) + others

    return Step(
        model,
        full_batch(config.image_size, config.context),
        encode,
        {"momentum": contrast},
        gathered=2 * 4 * config.embed_width,
    )
