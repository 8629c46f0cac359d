"""What the structure rung measures of a variant, on the meta device: parameters and sizes, no memory used; and the
training step that `python -m papers plan` counts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from papers.albef.config import VARIANTS, Objective
from papers.albef.losses import albef_losses
from papers.albef.model import Albef, AlbefPretraining, PretrainingOutput, Taught, match_with_negatives
from papers.albef.tasks import QuestionAnswering
from shared.losses.image_text import Negatives, distilled_token_loss, matching_loss
from shared.tools.footprint import Step, count_flops, count_parameters, full_batch

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
        answering = count_parameters(QuestionAnswering(large))
        encoded = model.encode_image(image)
    sizes = {name: count_parameters(part) for name, part in model.parts().items()}
    table = model.text_encoder.embeddings.word.weight.numel()
    return {
        **sizes,
        "total": count_parameters(model),
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


def forward_flops(variant: str) -> int:
    """Of the student's forward pass of one pair with a text of full context, without the word head: two for each
    multiply-add of matrix products and attention."""
    config = VARIANTS[variant]()
    with torch.device("meta"):
        model = Albef(config).eval()
        images, tokens = full_batch(config.image_size, config.context)(1)

    def forward() -> None:
        image_tokens, attention_mask = model.encode_image(images), torch.ones_like(tokens, dtype=torch.bool)
        states = model.encode_text(tokens)
        for _ in range(3):  # a true pair and two false ones
            model.match(states, attention_mask, image_tokens)
        model.fuse(model.encode_text(tokens), attention_mask, image_tokens)  # with masked words

    return count_flops(forward)


def step(variant: str) -> Step:
    """Three encoders, ITM and MLM, the momentum copy, and the contrast with the queue."""
    config, objective = VARIANTS[variant](), Objective()
    model = AlbefPretraining(Albef(config))
    masked = max(1, round(config.mlm_probability * config.context))  # words of a text, on average

    def word_logits(albef: Albef, tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """MLM logits as `Albef.words` gives them, at places that do not follow from values."""
        fused = albef.fuse(albef.encode_text(tokens), albef.attention_mask(tokens), image_tokens)
        return albef.mlm_head(fused[:, :masked].flatten(0, 1), albef.text_encoder.embeddings.word.weight)

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Features of both towers and of their momentum copies (B, E), and ITM and MLM in one number."""
        student = model.student
        image_tokens, text_states = student.encode_image(images), student.encode_text(tokens)
        teacher_outputs = model.teach(images, tokens)
        features = student.image_features(image_tokens), student.text_features(text_states)
        neighbours = torch.arange(len(tokens)).roll(1)  # which negatives are drawn makes no difference
        pairs = match_with_negatives(
            student, text_states, student.attention_mask(tokens), image_tokens, Negatives(neighbours, neighbours)
        )
        words = word_logits(student, tokens, image_tokens)
        with torch.no_grad():
            teacher_words = word_logits(model.teacher, tokens, teacher_outputs.image_tokens)
        word_loss = distilled_token_loss(words, tokens[:, :masked].flatten(), teacher_words, objective.alpha_mlm)
        return (
            *features,
            teacher_outputs.image_features,
            teacher_outputs.text_features,
            matching_loss(*pairs) + word_loss,
        )

    def contrast(images: Tensor, texts: Tensor, slow_images: Tensor, slow_texts: Tensor, others: Tensor) -> Tensor:
        slow_images, slow_texts = slow_images.detach(), slow_texts.detach()
        student, teacher = model.contrast(images, texts, Taught(slow_images, slow_images, slow_texts))
        itm = torch.zeros(len(images), 2)  # what ITM takes is in `others`
        output = PretrainingOutput(student, teacher, itm, itm, None, None, None)
        return albef_losses(output, Objective(mlm=False)).itc + others

    return Step(
        model,
        full_batch(config.image_size, config.context),
        encode,
        {"momentum": contrast},
        gathered=2 * 4 * config.embed_width,
    )
