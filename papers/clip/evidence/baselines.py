"""What CLIP is compared with in Sec. 2.3 and 3.3, on CLIP's own image encoder: bag-of-words prediction (Joulin et al.
2016), caption prediction (Desai and Johnson 2021), and a supervised classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papers.clip.config import ClipConfig
from papers.clip.model import Clip
from papers.clip.module import PretrainingModule
from shared.tokenizers.base import trim


class BagOfWords(nn.Module):
    """Picture -> log-probabilities of the vocabulary (B, V); trained towards the words of the caption, unordered."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.vision_encoder = Clip(config).vision_encoder
        self.head = nn.Linear(self.vision_encoder.width, config.vocabulary)

    def forward(self, images: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.vision_encoder(images)).float(), dim=-1)  # (B, V)

    def score(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Mean log-probability of every text's words under every picture. (B, T) token ids -> (pictures, texts)."""
        words = word_counts(tokens, self.config)  # (texts, V)
        return self(images) @ (words / words.sum(1, keepdim=True).clamp(min=1)).T


def word_counts(tokens: Tensor, config: ClipConfig) -> Tensor:
    """(B, T) token ids -> how often each word occurs in each text (B, V), special tokens left out."""
    counts = torch.zeros(len(tokens), config.vocabulary, device=tokens.device)
    counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=counts.dtype))
    counts[:, 0] = 0  # padding
    counts[:, config.end_token - 1 : config.end_token + 1] = 0  # start and end
    return counts


class BagOfWordsModule(PretrainingModule):
    def loss(self, images: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        words = word_counts(tokens, self.model.config)
        return -(self.model(images) * words / words.sum(1, keepdim=True)).sum(1).mean()


class BagOfWordsClip(Clip):
    """CLIP with a text encoder that sees no order: the mean of its words' embeddings (Fig. 2)."""

    def __init__(self, config: ClipConfig):
        super().__init__(config)
        self.word_embedding = nn.Embedding(config.vocabulary, config.text_width)
        nn.init.normal_(self.word_embedding.weight, std=config.text_width**-0.5)
        del self.text_encoder

    def encode_text(self, tokens: Tensor) -> Tensor:
        words = word_counts(tokens, self.config)  # (B, V)
        mean = words @ self.word_embedding.weight / words.sum(1, keepdim=True).clamp(min=1)  # (B, D)
        return self.text_proj(mean)


class CaptionPredictor(nn.Module):
    """Picture -> its caption, word by word: CLIP's text transformer with the picture as the first position."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        clip = Clip(config)
        self.vision_encoder, self.text_decoder = clip.vision_encoder, clip.text_encoder
        self.bridge = nn.Linear(self.vision_encoder.width, config.text_width)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Picture features (B, D), token ids (B, T) -> log-probability of every token after the first (B, T - 1)."""
        decoder = self.text_decoder
        words = decoder.token_embedding(tokens[:, :-1]) + decoder.position[: tokens.shape[1] - 1]
        x = torch.cat([self.bridge(features)[:, None], words], dim=1)  # (B, T, D)
        x = decoder.output_norm(decoder.blocks(x, causal=True))[:, 1:]  # (B, T - 1, D)
        logits = x @ decoder.token_embedding.weight.T  # (B, T - 1, V)
        return -F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")

    def log_likelihood(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Sum over each text up to its end token. (B,)"""
        return (self(features, tokens) * until_end(tokens, self.config)).sum(1)

    def score(self, images: Tensor, tokens: Tensor) -> Tensor:
        """log p(text | picture) for every pair. -> (pictures, texts)."""
        tokens = trim(tokens, self.config.end_token)
        features = self.vision_encoder(images)  # (pictures, D)
        columns = [self.log_likelihood(features, text.expand(len(features), -1)) for text in tokens]
        return torch.stack(columns, dim=1)


def until_end(tokens: Tensor, config: ClipConfig) -> Tensor:
    """1 where the predicted token (B, T - 1) still belongs to the text, its end token included."""
    ended = (tokens == config.end_token).int().cumsum(1)[:, :-1]
    return (ended == 0).float()


class CaptionModule(PretrainingModule):
    def loss(self, images: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        tokens = trim(tokens, self.model.config.end_token)
        kept = until_end(tokens, self.model.config)
        return -(self.model(self.model.vision_encoder(images), tokens) * kept).sum() / kept.sum()


class Supervised(nn.Module):
    """The same image encoder with a linear classifier over a fixed set of classes. Picture -> logits (B, classes)."""

    def __init__(self, config: ClipConfig, classes: int):
        super().__init__()
        self.config = config
        self.vision_encoder = Clip(config).vision_encoder
        self.head = nn.Linear(self.vision_encoder.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.vision_encoder(images))


class SupervisedModule(PretrainingModule):
    def loss(self, images: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images).float(), labels)
