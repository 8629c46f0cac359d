"""ALBEF (Li et al. 2021): align two encoders, then fuse them, taught by their own average. Beside Fig. 1 and Sec. 3.

Axes: B pairs, N patches, T text tokens, D width, E width of the joint space, M keys (batch, then queue), V vocabulary,
P masked positions of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papers.albef.config import AlbefConfig, Objective
from shared.losses.image_text import (
    IGNORED,
    Masked,
    Negatives,
    Similarities,
    hard_negatives,
    mask_tokens,
    random_negatives,
    similarities,
)
from shared.nn.bert import BertEmbeddings, BertLayers, TokenHead, initialise_bert, key_mask
from shared.nn.momentum import FeatureQueue, follow, momentum_copy
from shared.nn.vit import VisionTransformer

SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 0.001, 0.5  # in pre-training alone (models/model_pretrain.py)


class TextEncoder(nn.Module):
    """The lower half of BERT: embeddings and layers without cross-attention. Tokens (B, T), and which are no padding
    (B, T) bool -> (B, T, D)."""

    def __init__(self, config: AlbefConfig):
        super().__init__()
        self.embeddings = BertEmbeddings(
            config.vocabulary, config.text_width, config.positions, token_types=2, dropout=config.dropout
        )
        self.layers = BertLayers.make(
            config.text_layers, config.text_width, config.text_heads, config.mlp_width, dropout=config.dropout
        )

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layers(self.embeddings(tokens), mask=key_mask(attention_mask))


class Albef(nn.Module):
    """A picture encoder, a text encoder and a multimodal encoder on top of both (Sec. 3.1)."""

    def __init__(self, config: AlbefConfig):
        super().__init__()
        self.config = config
        self.vision_encoder = VisionTransformer(
            config.image_size,
            config.patch,
            config.vision_width,
            config.vision_layers,
            config.vision_heads,
            eps=config.vision_eps,
            mean=config.mean,
            std=config.std,
        )
        self.text_encoder = TextEncoder(config)
        self.multimodal_encoder = BertLayers.make(
            config.fusion_layers,
            config.text_width,
            config.text_heads,
            config.mlp_width,
            context_width=config.vision_width,
            dropout=config.dropout,
        )
        self.vision_proj = nn.Linear(config.vision_width, config.embed_width)
        self.text_proj = nn.Linear(config.text_width, config.embed_width)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))  # divides
        self.itm_head = nn.Linear(config.text_width, 2)
        self.mlm_head = TokenHead(config.text_width, config.vocabulary)
        initialise(self)

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 pixels, or normalised floats, (B, 3, H, W) -> all tokens after the output norm (B, 1 + N, D)."""
        vision = self.vision_encoder
        return vision.output_norm(vision.blocks(vision.embed(images)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, T), [CLS] first, padded -> (B, T, D)."""
        return self.text_encoder(tokens, self.attention_mask(tokens))

    def attention_mask(self, tokens: Tensor) -> Tensor:
        """Which tokens are no padding. (B, T) bool."""
        return tokens != self.config.pad

    def image_features(self, image_tokens: Tensor) -> Tensor:
        """(B, 1 + N, D) -> (B, E), L2-normalised, from the class token."""
        return F.normalize(self.vision_proj(image_tokens[:, 0]).float(), dim=-1)

    def text_features(self, text_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, E), L2-normalised, from [CLS]."""
        return F.normalize(self.text_proj(text_states[:, 0]).float(), dim=-1)

    def fuse(self, text_states: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Encoded texts (B, T, D), attention_mask (B, T), pictures (B, 1 + N, D) -> (B, T, D).

        R texts in succession may share one picture: (B·R, T, D) with (B, 1 + N, D).
        """
        return self.multimodal_encoder(text_states, mask=key_mask(attention_mask), context=image_tokens)

    def match(self, text_states: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Takes what `fuse` takes -> ITM logits (B, 2); class 1 is a match."""
        fused = self.multimodal_encoder.first(text_states, mask=key_mask(attention_mask), context=image_tokens)
        return self.itm_head(fused)  # (B, 2)

    def words(self, tokens: Tensor, attention_mask: Tensor, image_tokens: Tensor, wanted: Tensor) -> Tensor:
        """Texts with masked words (B, T) are encoded anew, by all layers. wanted (B, T) bool -> MLM logits (P, V).

        attention_mask (B, T) is that of the whole text: a word may have been replaced by what stands for padding.
        """
        fused = self.fuse(self.text_encoder(tokens, attention_mask), attention_mask, image_tokens)
        return self.mlm_head(fused[wanted], self.text_encoder.embeddings.word.weight)

    def parts(self) -> dict[str, nn.Module]:
        """The modules that published parameter counts are split into."""
        return {
            "vision": self.vision_encoder,
            "text_and_fusion": nn.ModuleList([self.text_encoder, self.multimodal_encoder, self.mlm_head]),
        }


def initialise(model: Albef) -> None:
    """The official scheme: timm's in the ViT (which truncates at 2, a hundred deviations away), BERT's in the text
    layers, torch's own in the projections."""
    std = model.config.init_std
    for part in (model.text_encoder, model.multimodal_encoder, model.mlm_head):
        initialise_bert(part, std)
    vision = model.vision_encoder
    for table in vision.positions.parameters():
        nn.init.normal_(table, std=std)
    for module in vision.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)


class PretrainingOutput(NamedTuple):
    """What the three losses take. A part that the objective leaves out is None."""

    similarities: Similarities | None  # student queries against momentum keys, (B, M) each
    teacher_similarities: Similarities | None  # momentum queries against the same keys, (B, M) each
    positives: Tensor  # ITM logits of true pairs (B, 2)
    negatives: Tensor  # of a wrong picture for each text, then of a wrong text for each picture (2B, 2)
    words: Tensor | None  # MLM logits (P, V)
    teacher_words: Tensor | None  # (P, V)
    labels: Tensor | None  # (P,): what stood there


class Taught(NamedTuple):
    """What the momentum model says of a batch, without gradient."""

    image_tokens: Tensor  # (B, 1 + N, D)
    image_features: Tensor  # (B, E)
    text_features: Tensor  # (B, E)


class AlbefPretraining(nn.Module):
    """The model, its momentum copy and the queue of momentum features: all that training keeps (Sec. 3.2, 3.3).

    The copy has no ITM head and shares the student's temperature.
    """

    def __init__(self, student: Albef):
        super().__init__()
        config = student.config
        self.config, self.student = config, student
        self.teacher = momentum_copy(student)
        without(self.teacher, "itm_head", "temperature")
        self.queue = FeatureQueue(config.queue, config.embed_width)

    def forward(self, images: Tensor, tokens: Tensor, objective: Objective | None = None) -> PretrainingOutput:
        """images uint8 (B, 3, H, W), tokens (B, T). Moves the momentum copy and the queue on by one step."""
        objective = objective or Objective()
        student = self.student
        with torch.no_grad():
            student.temperature.clamp_(SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE)
        image_tokens, text_states = student.encode_image(images), student.encode_text(tokens)

        similar = teacher_similar = None
        taught = self.teach(images, tokens) if objective.teacher else None
        if taught is not None and objective.itc:
            features = student.image_features(image_tokens), student.text_features(text_states)
            similar, teacher_similar = self.contrast(*features, taught)
            self.queue.push(taught.image_features, taught.text_features)

        if similar is not None and objective.negatives == "hard":
            negatives = hard_negatives(of_the_batch(similar, len(images)))
        else:
            negatives = random_negatives(len(images), images.device)
        attention_mask = student.attention_mask(tokens)
        positive, negative = match_with_negatives(student, text_states, attention_mask, image_tokens, negatives)

        words = teacher_words = labels = None
        if objective.mlm:
            masked = self.mask(tokens)
            wanted = masked.labels != IGNORED
            labels = masked.labels[wanted]
            words = student.words(masked.tokens, attention_mask, image_tokens, wanted)
            if taught is not None and objective.teaches_words:
                with torch.no_grad():
                    teacher_words = self.teacher.words(masked.tokens, attention_mask, taught.image_tokens, wanted)
        return PretrainingOutput(similar, teacher_similar, positive, negative, words, teacher_words, labels)

    @torch.no_grad()
    def teach(self, images: Tensor, tokens: Tensor) -> Taught:
        """The momentum copy takes its step, so that it holds some of the present student, and is asked after it."""
        teacher = self.teacher
        follow(teacher, self.student, self.config.momentum)
        image_tokens, text_states = teacher.encode_image(images), teacher.encode_text(tokens)
        return Taught(image_tokens, teacher.image_features(image_tokens), teacher.text_features(text_states))

    def keys(self, taught: Taught) -> tuple[Tensor, Tensor]:
        """Momentum features of the batch, then of the queue: image and text keys (M, E); the diagonal are own pairs."""
        queue = self.queue
        return torch.cat([taught.image_features, queue.images]), torch.cat([taught.text_features, queue.texts])

    def contrast(
        self, image_features: Tensor, text_features: Tensor, taught: Taught
    ) -> tuple[Similarities, Similarities]:
        """Student features (B, E), and momentum features without gradient, against the momentum keys: (B, M) each."""
        keys, temperature = self.keys(taught), self.student.temperature
        similar = similarities(image_features, text_features, *keys, temperature)
        with torch.no_grad():
            return similar, similarities(taught.image_features, taught.text_features, *keys, temperature)

    def mask(self, tokens: Tensor) -> Masked:
        """BERT's corruption of (B, T); only [CLS] and padding are spared (official mask)."""
        config = self.config
        return mask_tokens(
            tokens,
            probability=config.mlm_probability,
            mask=config.mask,
            vocabulary=config.vocabulary,
            never=(config.start, config.pad),
        )


def without(model: Albef, *parts: str) -> Albef:
    """The model, in place, None where these parts were."""
    for part in parts:
        setattr(model, part, None)
    return model


def of_the_batch(similar: Similarities, size: int) -> Similarities:
    """(B, M) -> (B, B): the columns of this rank's own pairs, without gradient."""
    return Similarities(*(side[:, :size].detach() for side in similar))


def match_with_negatives(
    model: Albef, text_states: Tensor, attention_mask: Tensor, image_tokens: Tensor, negatives: Negatives
) -> tuple[Tensor, Tensor]:
    """ITM logits of the true pairs (B, 2), then of every text with a wrong picture and vice versa (2B, 2)."""
    wrong = negatives.texts
    texts = torch.stack([text_states, text_states[wrong]], 1).flatten(0, 1)  # (2B, T, D), two a picture: right, wrong
    presents = torch.stack([attention_mask, attention_mask[wrong]], 1).flatten(0, 1)
    right, wrong_texts = model.match(texts, presents, image_tokens).unflatten(0, (-1, 2)).unbind(1)  # (B, 2) each
    wrong_images = model.match(text_states, attention_mask, image_tokens[negatives.images])
    return right, torch.cat([wrong_images, wrong_texts])
