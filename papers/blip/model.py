"""BLIP (Li et al. 2022): an image encoder and one text transformer that is encoder, image-grounded encoder and
image-grounded decoder (MED, med.py). Reads beside Fig. 2, Sec. 3.1 and 3.2. Axes: B batch, N patches, T text tokens,
S context tokens, C their width, D width, E joint space, V vocabulary, R texts, P positions with a target, M keys of
ITC."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.blip.config import BlipConfig
from papers.blip.med import TextDecoder, TextEncoder, again, cross_attention_kv, starting_with
from shared.losses.image_text import (
    IGNORED,
    Negatives,
    Similarities,
    distilled_targets,
    hard_negatives,
    language_loss,
    next_token_targets,
    own_pair_targets,
    same_picture_targets,
    similarities,
)
from shared.nn.bert import BertDecoding, LayerCache, init_std, initialise_bert
from shared.nn.momentum import FeatureQueue, follow
from shared.nn.positions import resample_square
from shared.nn.vit import VisionTransformer

M = TypeVar("M", bound=nn.Module)
TEMPERATURES = 0.001, 0.5  # what the learned one is kept within (official code, models/blip_pretrain.py)
NEGATIVE_FLOOR = 1e-4  # added to the probability of every hard negative (ibid.)


def vision_encoder(config: BlipConfig) -> VisionTransformer:
    """The ViT as models/vit.py begins it, but for `init_std`."""
    encoder = VisionTransformer(
        config.image_size,
        config.patch,
        config.vision_width,
        config.vision_layers,
        config.vision_heads,
        drop_path=config.drop_path,
        mean=config.mean,
        std=config.std,
    )
    for child in encoder.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=init_std(config.vision_width))
            nn.init.zeros_(child.bias)
    for table in encoder.positions.parameters():
        nn.init.normal_(table, std=init_std(config.vision_width))
    return encoder


def picture_tokens(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """uint8 pixels, or normalised floats, (B, 3, H, W) -> (B, 1 + N, D)."""
    return encoder.output_norm(encoder.tokens(images))


# ---- the model


class Blip(nn.Module):
    """The image encoder and MED with its heads; `encoder=False` a captioner alone, `decoder=False` a matcher alone.

    Tokens (R, T) are what the tokenizer gives, [CLS] text [SEP] padding; each mode puts its own first token on a copy.
    """

    text_encoder: Any  # a TextEncoder; None in a captioner
    text_decoder: Any  # a TextDecoder; None in a matcher

    def __init__(self, config: BlipConfig, *, encoder: bool = True, decoder: bool = True):
        super().__init__()
        self.config = config
        self.vision_encoder = vision_encoder(config)
        self.text_encoder = self.text_decoder = None
        if encoder:
            self.text_encoder = TextEncoder(config, config.vision_width)
            self.vision_proj = nn.Linear(config.vision_width, config.embed_width)
            self.text_proj = nn.Linear(config.text_width, config.embed_width)
            self.itm_head = nn.Linear(config.text_width, 2)
        if decoder:
            self.text_decoder = TextDecoder(config, config.vision_width, self.text_encoder)
        for name, module in self.named_children():
            if name != "vision_encoder":
                initialise_bert(module, init_std(config.text_width))

    def attention_mask(self, tokens: Tensor) -> Tensor:
        """(R, T) -> bool (R, T), False at padding."""
        return tokens != self.config.pad_token

    # unimodal

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 pixels, or normalised floats, (B, 3, H, W) -> (B, 1 + N, D)."""
        return picture_tokens(self.vision_encoder, images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(R, T) -> (R, T, D), no picture seen."""
        return self.text_encoder(starting_with(self.config.start_token, tokens), self.attention_mask(tokens))

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E), L2-normalised."""
        return self.features_of(self.encode_image(images))

    def features_of(self, image_tokens: Tensor) -> Tensor:
        """What encode_image gave (B, 1 + N, D) -> (B, E), L2-normalised."""
        return F.normalize(self.vision_proj(image_tokens[:, 0]).float(), dim=-1)

    def text_features(self, tokens: Tensor) -> Tensor:
        """(R, T) -> (R, E), L2-normalised."""
        return F.normalize(self.text_proj(self.encode_text(tokens)[:, 0]).float(), dim=-1)

    # image-grounded encoder

    def ground(self, tokens: Tensor, image_tokens: Tensor, seen: list[LayerCache] | None = None) -> Tensor:
        """Texts (R, T) that look at pictures (B, S, D), R a multiple of B: texts in succession share one. (R, T, D).

        With `seen` (`cross_attention_kv`) each text looks at the row that was chosen there; image_tokens is not read.
        """
        tokens = starting_with(self.config.encode_token, tokens)
        return self.text_encoder(tokens, self.attention_mask(tokens), None if seen else image_tokens, seen=seen)

    def match(self, tokens: Tensor, image_tokens: Tensor, seen: list[LayerCache] | None = None) -> Tensor:
        """As `ground` -> ITM logits (R, 2); class 1 is a match."""
        return self.itm_head(self.ground(tokens, image_tokens, seen)[:, 0])

    # image-grounded decoder

    def caption_logits(self, tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Texts (R, T) of pictures (B, S, D) -> logits of each next token (R, T, V)."""
        tokens = starting_with(self.config.decode_token, tokens)
        return self.text_decoder.logits(self.text_decoder.states(tokens, image_tokens))

    def caption_targets(
        self, tokens: Tensor, image_tokens: Tensor, prompt: int = 0, seen: list[LayerCache] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (P, V) and targets (P,), at the positions alone that have something to predict.

        prompt: how many leading tokens, [DEC] among them, are given and not learned.
        """
        tokens = starting_with(self.config.decode_token, tokens)
        states = self.text_decoder.states(tokens, None if seen else image_tokens, seen=seen)
        targets = next_token_targets(tokens, self.attention_mask(tokens), prompt)
        learned = targets != IGNORED
        return self.text_decoder.logits(states[learned]), targets[learned]

    def caption_loss(self, tokens: Tensor, image_tokens: Tensor, prompt: int = 0) -> Tensor:
        """Next-token cross-entropy with label smoothing, mean over tokens. Scalar."""
        return language_loss(*self.caption_targets(tokens, image_tokens, prompt), self.config.label_smoothing)

    def decoding(self, image_tokens: Tensor) -> BertDecoding:
        """(B, S, D) -> what nn/generation.py drives; prompts begin with [DEC]."""
        return self.text_decoder.decoding(image_tokens)


def copied(source: nn.Module, target: M) -> M:
    """Every tensor of `target` taken from the same path in `source`, borrowed modules followed, positions for another
    picture size interpolated as the official code does (models/vit.py); target, changed.

    A captioner of a whole model: copied(model, Blip(config, encoder=False)).
    """
    tensors = {}
    for key, tensor in target.state_dict().items():
        place: Any = source
        for name in key.split("."):
            place = getattr(place, name)
        if key.endswith("positions.position"):
            place = resample_square(place, tensor, antialias=False)
        if place.shape != tensor.shape:
            raise ValueError(f"{key}: {tuple(place.shape)} for {tuple(tensor.shape)}")
        tensors[key] = place.detach()
    target.load_state_dict(tensors, strict=True)
    return target


# ---- pre-training


class Momentum(nn.Module):
    """The teacher of ITC: copies of the image encoder, the text encoder and the projections, as slow followers."""

    def __init__(self, blip: Blip):
        super().__init__()
        config = blip.config
        self.vision_encoder = vision_encoder(config)
        self.text_encoder = TextEncoder(config, config.vision_width)
        self.vision_proj = nn.Linear(config.vision_width, config.embed_width)
        self.text_proj = nn.Linear(config.text_width, config.embed_width)
        copied(blip, self).requires_grad_(False)

    def follow(self, blip: Blip, momentum: float) -> None:
        """One step of every copy towards its original."""
        for name, teacher in self.named_children():
            follow(teacher, getattr(blip, name), momentum)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E), L2-normalised."""
        return F.normalize(self.vision_proj(picture_tokens(self.vision_encoder, images)[:, 0]).float(), dim=-1)

    def text_features(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """tokens (B, T) that begin with [CLS], attention_mask (B, T) -> (B, E), L2-normalised."""
        return F.normalize(self.text_proj(self.text_encoder(tokens, attention_mask)[:, 0]).float(), dim=-1)


class Objectives(NamedTuple):
    """Which of the three losses are computed. ITM draws its negatives by ITC's similarities, so it needs that."""

    itc: bool = True
    itm: bool = True
    lm: bool = True


class PretrainingOutput(NamedTuple):
    """What the losses are made of; None where an objective is off."""

    student: Similarities | None  # (B, M) each, over temperature
    targets: Similarities | None  # (B, M) each, rows sum to one
    matches: Tensor | None  # (B, 2) ITM logits of true pairs
    mismatches: Tensor | None  # (2B, 2) of false ones
    logits: Tensor | None  # (P, V)
    next_tokens: Tensor | None  # (P,)
    temperature: Tensor


class BlipPretraining(nn.Module):
    """Blip with what ITC trains it by: momentum copies, queue and temperature (Sec. 3.2, as ALBEF)."""

    def __init__(self, config: BlipConfig, *, decoder: bool = True):
        super().__init__()
        self.config = config
        self.blip = Blip(config, decoder=decoder)
        self.momentum = Momentum(self.blip)
        self.queue = FeatureQueue(config.queue, config.embed_width)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        ids: Tensor | None = None,
        alpha: float = 0.0,
        objectives: Objectives = Objectives(),  # noqa: B008 (immutable)
        prompt: int = 0,
    ) -> PretrainingOutput:
        """images (B, 3, H, W), tokens (B, T) of their texts.

        ids (B,): whose picture each is. Without, a pair's partners are each other alone and hard negatives come by the
        teacher's features with a floor (pre-training); with, all texts of a picture are its partners and negatives come
        by the student's own features (retrieval fine-tuning). Both draw within the rank; the official code draws over
        all ranks where it fine-tunes on MSCOCO. alpha: the teacher's share in ITC's targets. In training the momentum
        copies take a step and the queue a batch, at every call.
        """
        blip = self.blip
        image_tokens = blip.encode_image(images)  # (B, 1 + N, D)
        student = targets = matches = mismatches = logits = next_tokens = seen = None
        if objectives.itc:
            student, targets, batch = self.contrast(images, image_tokens, tokens, ids, alpha)
        if objectives.itm:
            same = None if ids is None else ids[:, None] == ids[None]
            negatives = hard_negatives(batch, same, NEGATIVE_FLOOR if ids is None else 0.0)
            matches, mismatches, seen = self.matching(tokens, image_tokens, negatives)
        if objectives.lm:
            filled = again(seen, None) if seen and self.config.sharing in ("all", "all_but_sa") else None
            logits, next_tokens = blip.caption_targets(tokens, image_tokens, prompt, filled)
        return PretrainingOutput(student, targets, matches, mismatches, logits, next_tokens, self.temperature)

    def contrast(
        self, images: Tensor, image_tokens: Tensor, tokens: Tensor, ids: Tensor | None, alpha: float
    ) -> tuple[Similarities, Similarities, Similarities]:
        """ITC's similarities (B, M) and targets (B, M), and the batch's own similarities (B, B) for hard negatives."""
        blip, config = self.blip, self.config
        image_features = blip.features_of(image_tokens)  # (B, E)
        text_features = blip.text_features(tokens)  # (B, E)
        with torch.no_grad():
            if self.training:
                self.momentum.follow(blip, config.momentum)
            slow_images = self.momentum.image_features(images)
            slow_texts = self.momentum.text_features(
                starting_with(config.start_token, tokens), blip.attention_mask(tokens)
            )
            image_keys = torch.cat([slow_images, self.queue.images])  # (M, E)
            text_keys = torch.cat([slow_texts, self.queue.texts])
            teacher = similarities(slow_images, slow_texts, image_keys, text_keys, self.temperature)
            if ids is None:
                hard = own_pair_targets(len(images), len(image_keys), images.device)
            else:
                hard = same_picture_targets(ids, torch.cat([ids, self.queue.ids]))
            targets = distilled_targets(hard, teacher, alpha)
        student = similarities(image_features, text_features, image_keys, text_keys, self.temperature)
        with torch.no_grad():
            batch = Similarities(*(side[:, : len(images)] for side in student))
            if ids is not None:
                batch = similarities(image_features, text_features, image_features, text_features, self.temperature)
            if self.training:
                self.queue.push(slow_images, slow_texts, ids)
        return student, targets, batch

    def matching(
        self, tokens: Tensor, image_tokens: Tensor, negatives: Negatives
    ) -> tuple[Tensor, Tensor, list[LayerCache] | None]:
        """ITM logits of the true pairs (B, 2), of each text with a false picture and each picture with a false text
        (2B, 2), and what the layers saw of the pictures."""
        own = torch.arange(len(tokens), device=tokens.device)
        texts = torch.cat([own, own, negatives.texts])
        pictures = torch.cat([own, negatives.images, own])
        layers = self.blip.text_encoder.layers
        if layers.recompute:  # it keeps nothing but what enters a layer
            logits, seen = self.blip.match(tokens[texts], image_tokens[pictures]), None
        else:
            seen = cross_attention_kv(layers, image_tokens, pictures)
            logits = self.blip.match(tokens[texts], image_tokens, seen)
        return logits[: len(own)], logits[len(own) :], seen

    def trained_by(self, objectives: Objectives) -> set[nn.Parameter]:
        """The parameters that these losses give a gradient to."""
        blip, trained = self.blip, set(self.blip.vision_encoder.parameters())
        if objectives.itc or objectives.itm:
            trained |= set(blip.text_encoder.parameters())
        if objectives.itc:
            trained |= {*blip.vision_proj.parameters(), *blip.text_proj.parameters(), self.temperature}
        if objectives.itm:
            trained |= set(blip.itm_head.parameters())
        elif objectives.itc:
            for layer in blip.text_encoder.layers:
                trained -= {*layer.cross_attention.parameters(), *layer.cross_norm.parameters()}
        if objectives.lm:
            trained |= set(blip.text_decoder.whole())
        return trained
