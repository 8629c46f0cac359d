"""The networks that BLIP becomes beyond captioning and retrieval (Fig. 5): visual question answering (Sec. 5.3),
reasoning over two pictures (Sec. 5.4), visual dialogue (Sec. 5.5); and the frames of a video (Sec. 5.6).
Axes: B pictures or questions, N patches, T text tokens, S context tokens, D width, Q questions, A answers,
C candidates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.blip.config import BlipConfig
from papers.blip.model import (
    Blip,
    TextDecoder,
    TextEncoder,
    copied,
    picture_tokens,
    starting_with,
    vision_encoder,
)
from shared.core.errors import UserError
from shared.nn.attention import Attention
from shared.nn.bert import BertDecoding, init_std, initialise_bert

ANSWERS_RANKED = 128  # by their first token, before whole answers are compared (official code, configs/vqa.yaml)


class BlipVqa(nn.Module):
    """Question answering: the question, grounded in the picture, is what the answer's decoder looks at (Fig. 5a).

    Encoder and decoder share nothing. Questions and answers (·, T) are what the tokenizer gives, [CLS] text [SEP].
    """

    def __init__(self, config: BlipConfig):
        super().__init__()
        self.config = config
        self.vision_encoder = vision_encoder(config)
        self.text_encoder = TextEncoder(config, config.vision_width)
        self.text_decoder = TextDecoder(config, config.text_width)
        initialise_bert(self.text_encoder, init_std(config.text_width))
        initialise_bert(self.text_decoder, init_std(config.text_width))

    @classmethod
    def started_from(cls, blip: Blip, config: BlipConfig | None = None) -> BlipVqa:
        """With pre-trained weights; config: where pictures and texts are of another size, as config.vqa makes them.

        Where pictures and texts differ in width, the decoder's keys and values start anew: they looked at pictures and
        now look at questions.
        """
        model = cls(config or blip.config)
        for name in ("vision_encoder", "text_encoder"):
            copied(getattr(blip, name), getattr(model, name))
        decoder = model.text_decoder
        if blip.config.vision_width == blip.config.text_width:
            copied(blip.text_decoder, decoder)
            return model
        for name in ("embeddings", "head"):
            copied(getattr(blip.text_decoder, name), getattr(decoder, name))
        for theirs, ours in zip(blip.text_decoder.layers, decoder.layers, strict=True):
            for name in ("attention", "attention_norm", "cross_norm", "mlp", "mlp_norm"):
                copied(getattr(theirs, name), getattr(ours, name))
            for name in ("q", "out"):
                copied(getattr(theirs.cross_attention, name), getattr(ours.cross_attention, name))
        return model

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + N, D)."""
        return picture_tokens(self.vision_encoder, images)

    def attention_mask(self, tokens: Tensor) -> Tensor:
        """(·, T) -> bool (·, T), False at padding."""
        return tokens != self.config.pad_token

    def ask(self, questions: Tensor, image_tokens: Tensor) -> Tensor:
        """Questions (B, T) about pictures (B, S, D) -> states (B, T, D)."""
        tokens = starting_with(self.config.encode_token, questions)
        return self.text_encoder(tokens, self.attention_mask(questions), image_tokens)

    def answer_losses(self, states: Tensor, questions: Tensor, answers: Tensor) -> Tensor:
        """Answers (A, T) to questions (Q, T), whose states are (Q, T, D) -> summed smoothed losses (A,).

        A is a multiple of Q: answers in succession share one question.
        """
        answers = starting_with(self.config.decode_token, answers)
        return self.text_decoder.loss(answers, states, self.attention_mask(questions))

    def forward(
        self, images: Tensor, questions: Tensor, answers: Tensor, asked: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The loss of answers (A, T), of which answer a, with a weight, belongs to question asked[a]. Scalar.

        Summed over answers and divided by the number of pictures (official code models/blip_vqa.py).
        """
        states = self.ask(questions, self.encode_image(images))
        losses = self.answer_losses(states[asked], questions[asked], answers)
        return (losses if weights is None else losses * weights).sum() / len(images)

    def decoding(self, states: Tensor, questions: Tensor) -> BertDecoding:
        """States (B, T, D) of questions (B, T) -> what shared/nn/generation.py drives; prompts are [DEC] alone.

        The official code lets a written answer look at a question's padding too (models/blip_vqa.py; it masks it where
        it ranks), so that it depends on the other questions of its batch. Here padding is masked in both.
        """
        return self.text_decoder.decoding(states, self.attention_mask(questions))

    @torch.no_grad()
    def rank(self, states: Tensor, questions: Tensor, answers: Tensor, candidates: int = ANSWERS_RANKED) -> Tensor:
        """Which of the answers (A, T) is the likeliest to each question (B,). The best by their first token are
        compared as wholes, by the sum over their tokens of the smoothed loss, undivided: as the official code does."""
        if not len(answers):
            raise UserError("VQA: the list of answers is empty; give at least one, or generate answers")
        start = torch.full_like(questions[:, :1], self.config.decode_token)
        first = self.text_decoder.states(start, states, self.attention_mask(questions))  # (B, 1, D)
        likely = self.text_decoder.logits(first[:, 0]).float().log_softmax(1)[:, answers[:, 1]]  # (B, A)
        best = likely.topk(min(candidates, len(answers)), dim=1).indices  # (B, C)
        losses = [
            self.answer_losses(state[None], question[None], answers[chosen])
            for state, question, chosen in zip(states, questions, best, strict=True)
        ]
        return best.gather(1, torch.stack(losses).argmin(1, keepdim=True))[:, 0]


class PairAttention(nn.Module):
    """Looks at two pictures with weights of their own, and averages or merges what it saw (Fig. 5b)."""

    def __init__(self, width: int, heads: int, context_width: int, dropout: float, merged: bool):
        super().__init__()
        self.first = Attention(width, heads, context_width=context_width, dropout=dropout)
        self.second = Attention(width, heads, context_width=context_width, dropout=dropout)
        self.merge = nn.Linear(2 * width, width) if merged else None

    def forward(self, x: Tensor, context: Tensor, *, mask: None = None, cache: None = None) -> Tensor:
        """x (B, T, D), context (B, 2, S, D) of pictures, which are never padded -> (B, T, D)."""
        first, second = self.first(x, context[:, 0]), self.second(x, context[:, 1])
        return (first + second) / 2 if self.merge is None else self.merge(torch.cat([first, second], dim=-1))


class BlipNlvr(nn.Module):
    """Is a statement about two pictures true? Average in the first half of the layers, a linear merge in the second."""

    def __init__(self, config: BlipConfig):
        super().__init__()
        self.config = config
        self.vision_encoder = vision_encoder(config)
        self.text_encoder = TextEncoder(config, config.vision_width)
        for index, layer in enumerate(self.text_encoder.layers):
            layer.cross_attention = PairAttention(
                config.text_width,
                config.text_heads,
                config.vision_width,
                config.dropout,
                merged=index >= config.text_layers // 2,
            )
        self.classifier = nn.Sequential(
            nn.Linear(config.text_width, config.text_width), nn.ReLU(), nn.Linear(config.text_width, 2)
        )
        initialise_bert(self.text_encoder, init_std(config.text_width))
        initialise_bert(self.classifier, init_std(config.text_width))

    @classmethod
    def started_from(cls, blip: Blip, config: BlipConfig | None = None) -> BlipNlvr:
        """With pre-trained weights, the cross-attention twice; merge layers and classifier are new. config: where
        pictures and texts are of another size, as config.nlvr makes them."""
        model = cls(config or blip.config)
        copied(blip.vision_encoder, model.vision_encoder)
        copied(blip.text_encoder.embeddings, model.text_encoder.embeddings)
        for theirs, ours in zip(blip.text_encoder.layers, model.text_encoder.layers, strict=True):
            for name in ("attention", "attention_norm", "cross_norm", "mlp", "mlp_norm"):
                copied(getattr(theirs, name), getattr(ours, name))
            copied(theirs.cross_attention, ours.cross_attention.first)
            copied(theirs.cross_attention, ours.cross_attention.second)
        return model

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Two pictures each (B, 2, 3, H, W), statements (B, T) -> logits (B, 2); class 1 is true."""
        image_tokens = picture_tokens(self.vision_encoder, images.flatten(0, 1))
        context = image_tokens.unflatten(0, (-1, 2))  # (B, 2, S, D)
        attention_mask = tokens != self.config.pad_token
        states = self.text_encoder(starting_with(self.config.encode_token, tokens), attention_mask, context)
        return self.classifier(states[:, 0])

    def loss(self, images: Tensor, tokens: Tensor, true: Tensor) -> Tensor:
        """true (B,) bool or 0/1. Scalar."""
        return F.cross_entropy(self(images, tokens).float(), true.long())


class BlipDialogue(nn.Module):
    """Visual dialogue, discriminative: each candidate answer behind the dialogue so far is matched, by the ITM head,
    with the picture's and its caption's tokens (Fig. 5c).

    The paper names no network for the caption; here it is the text encoder in its mode without a picture. No code was
    released for this task.
    """

    def __init__(self, config: BlipConfig):
        super().__init__()
        if config.vision_width != config.text_width:
            raise UserError(
                f"visual dialogue: pictures are {config.vision_width} wide and captions {config.text_width}, but one "
                "cross-attention looks at both; choose a variant with equal widths (blip-base)"
            )
        self.config = config
        self.vision_encoder = vision_encoder(config)
        self.text_encoder = TextEncoder(config, config.vision_width)
        self.itm_head = nn.Linear(config.text_width, 2)
        initialise_bert(self.text_encoder, init_std(config.text_width))
        initialise_bert(self.itm_head, init_std(config.text_width))

    @classmethod
    def started_from(cls, blip: Blip) -> BlipDialogue:
        return copied(blip, cls(blip.config))

    def forward(self, images: Tensor, captions: Tensor, dialogues: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), captions (B, T), dialogues that end in a candidate (B, C, T) -> logits (B, C, 2)."""
        image_tokens = picture_tokens(self.vision_encoder, images)
        caption_mask = captions != self.config.pad_token
        caption_states = self.text_encoder(starting_with(self.config.start_token, captions), caption_mask)
        context = torch.cat([image_tokens, caption_states], dim=1)  # (B, S, D)
        there = torch.cat([torch.ones_like(image_tokens[:, :, 0], dtype=torch.bool), caption_mask], dim=1)
        rows = dialogues.flatten(0, 1)
        tokens = starting_with(self.config.encode_token, rows)
        states = self.text_encoder(tokens, rows != self.config.pad_token, context, there)
        return self.itm_head(states[:, 0]).unflatten(0, dialogues.shape[:2])

    def loss(self, images: Tensor, captions: Tensor, dialogues: Tensor, right: Tensor) -> Tensor:
        """right (B, C) bool or 0/1: which candidates answer the question. Scalar."""
        return F.cross_entropy(self(images, captions, dialogues).float().flatten(0, 1), right.long().flatten())

    @torch.no_grad()
    def scores(self, images: Tensor, captions: Tensor, dialogues: Tensor) -> Tensor:
        """How likely each candidate is right (B, C): what they are ranked by."""
        return self(images, captions, dialogues).float().softmax(-1)[..., 1]


def frame_indices(length: int, frames: int) -> list[int]:
    """Frames at equal steps over a video of `length` frames, from its first on (official code, data/video_dataset.py).

    There numpy rounds the step down: up to `frames` - 1 frames at the end are never reached, and a video that has fewer
    than `frames` gives its first one every time.
    """
    if length < 1 or frames < 1:
        raise UserError(f"video: {frames} frames of {length} cannot be taken; it needs at least one of each")
    return [index * (length // frames) for index in range(frames)]
