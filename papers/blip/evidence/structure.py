"""What the structure rung measures of a variant, on the meta device: parameters and sizes, no memory used."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from papers.blip.config import SHARINGS, VARIANTS, BlipConfig, caption, nlvr, retrieval, vqa
from papers.blip.model import Blip, BlipPretraining
from papers.blip.tasks import BlipNlvr, BlipVqa


def measure(variant: str) -> dict[str, float]:
    """{part of paper.yaml's structure rows: number}."""
    config = VARIANTS[variant]()
    with torch.device("meta"):
        shared = {f"share_{sharing}": med(replace(config, sharing=sharing)) for sharing in SHARINGS}
        retriever = BlipPretraining(retrieval(config), decoder=False)
        answerer = BlipVqa(vqa(config))
        counts = {
            "captioner": count(Blip(caption(config), encoder=False)),
            "vqa": count(answerer),
            "retrieval": count(retriever),
            "nlvr": count(BlipNlvr(nlvr(config))),
            # BLIP-2 counts trained parameters, and its VQA figure has the word table again as the output matrix
            "retrieval_blip2": count(retriever.blip),
            "vqa_blip2": count(answerer) + answerer.text_decoder.embeddings.word.weight.numel(),
        }
        whole = BlipPretraining(config)
    blip = retriever.blip
    sizes = {
        "total": count(whole.blip),
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
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        blip = Blip(config)
        pixels = torch.zeros(1, 3, config.image_size, config.image_size)
        tokens = torch.zeros(1, config.context, dtype=torch.long)
        image_tokens = blip.encode_image(pixels)
        blip.text_features(tokens)
        blip.match(tokens.expand(3, -1), image_tokens)
        blip.caption_logits(tokens, image_tokens)
    return counter.get_total_flops()


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in module.parameters())


def med(config: BlipConfig) -> int:
    """Image encoder, text encoder and text decoder with its head (Table 3); what is shared is the encoder's alone."""
    model = Blip(config)
    return sum(count(part) for part in (model.vision_encoder, model.text_encoder, model.text_decoder))
