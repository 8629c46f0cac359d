"""What ALBEF is fine-tuned for (Sec. 5): retrieval, visual entailment, NLVR2, question answering, grounding.

Axes: B samples, N patches, T text tokens, A answers of a batch, L tokens of an answer, C classes or candidate answers,
K kept candidates, D width, V vocabulary, H heads. Each task keeps a momentum copy that teaches it (alpha), as in
pre-training.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from papers.albef.config import AlbefConfig
from papers.albef.model import Albef, AlbefPretraining, match_with_negatives, of_the_batch, without
from shared.losses.image_text import (
    IGNORED,
    contrastive_to_targets,
    distilled_targets,
    distilled_token_loss,
    hard_negatives,
    matching_loss,
    next_token_targets,
    same_picture_targets,
)
from shared.nn.attention import Attention
from shared.nn.bert import BertEmbeddings, BertLayers, TokenHead, initialise_bert, key_mask
from shared.nn.momentum import follow, momentum_copy

# ---- retrieval


class RetrievalLosses(NamedTuple):
    """Scalars, each with weight 1."""

    itc: Tensor
    itm: Tensor

    @property
    def total(self) -> Tensor:
        return self.itc + self.itm


class AlbefRetrieval(AlbefPretraining):
    """ITC and ITM where several texts belong to a picture: targets are spread over all keys of the same picture, and
    those are no negatives. No MLM, no clamp of the temperature (models/model_retrieval.py)."""

    def __init__(self, student: Albef):
        super().__init__(student)
        without(self.student, "mlm_head")
        without(self.teacher, "mlm_head")

    @classmethod
    def started_from(cls, pretrained: AlbefPretraining) -> AlbefRetrieval:
        """Goes on from pre-training's student, momentum copy and queue, which it takes over (Retrieval.py).

        Whose pictures lie in that queue is not known: they are partners of nobody.
        """
        model = cls(pretrained.student)
        model.teacher, model.queue = without(pretrained.teacher, "mlm_head"), pretrained.queue
        model.queue.ids.fill_(-1)
        return model

    def forward(  # type: ignore[override]  # pre-training's takes an objective
        self, images: Tensor, tokens: Tensor, ids: Tensor, alpha: float = 0.0
    ) -> RetrievalLosses:
        """images uint8 (B, 3, H, W), tokens (B, T), ids (B,) of the pictures. Moves momentum copy and queue on."""
        student = self.student
        image_tokens, text_states = student.encode_image(images), student.encode_text(tokens)
        features = student.image_features(image_tokens), student.text_features(text_states)
        taught = self.teach(images, tokens)
        similar, teacher = self.contrast(*features, taught)
        spread = same_picture_targets(ids, torch.cat([ids, self.queue.ids]))
        itc = contrastive_to_targets(similar, distilled_targets(spread, teacher, alpha))
        self.queue.push(taught.image_features, taught.text_features, ids)

        negatives = hard_negatives(of_the_batch(similar, len(images)), same=ids[:, None] == ids[None])
        attention_mask = student.attention_mask(tokens)
        itm = matching_loss(*match_with_negatives(student, text_states, attention_mask, image_tokens, negatives))
        return RetrievalLosses(itc, itm)

    def loss(self, images: Tensor, tokens: Tensor, ids: Tensor, alpha: float = 0.0) -> Tensor:
        """As forward: both losses in one. Scalar."""
        return self(images, tokens, ids, alpha).total


# ---- classification of a picture, or of two, with a text


class TaughtByMomentum(nn.Module):
    """What is fine-tuned, and the momentum copy that teaches it; without `distil` nobody does."""

    def __init__(self, student: nn.Module, momentum: float = 0.995, distil: bool = True):
        super().__init__()
        self.student, self.momentum = student, momentum
        self.teacher = momentum_copy(student) if distil else None


class Distilled(TaughtByMomentum):
    """A classifier with its momentum copy: logits (B, C) of whatever it is given."""

    @classmethod
    def entailment_from(cls, pretrained: AlbefPretraining) -> Distilled:
        """SNLI-VE, going on from pre-training's student and momentum copy, which it takes over (VE.py)."""
        model = cls(Entailment(pretrained.student), pretrained.config.momentum)
        assert isinstance(model.teacher, Entailment)
        model.teacher.encoder = headless(pretrained.teacher)
        return model

    def loss(self, images: Tensor, tokens: Tensor, labels: Tensor, alpha: float = 0.0) -> Tensor:
        """Cross-entropy to labels (B,) and, for the share alpha, to the teacher's softmax. Scalar."""
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                follow(self.teacher, self.student, self.momentum)
                taught = self.teacher(images, tokens)
        return distilled_token_loss(self.student(images, tokens), labels, taught, alpha)

    @torch.no_grad()
    def predict(self, images: Tensor, tokens: Tensor) -> Tensor:
        """The likeliest class of each, (B,)."""
        return self.student(images, tokens).argmax(1)


def classifier(config: AlbefConfig, classes: int) -> nn.Sequential:
    """The two layers on top of the fused [CLS]."""
    width = config.text_width
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


def headless(albef: Albef) -> Albef:
    """The three encoders alone, of the model itself and not of a copy."""
    return without(albef, "vision_proj", "text_proj", "temperature", "itm_head", "mlm_head")


class Entailment(nn.Module):
    """SNLI-VE: does the picture entail the text, leave it open, or contradict it? Takes over the model's encoders."""

    def __init__(self, albef: Albef, classes: int = 3):
        super().__init__()
        self.encoder = headless(albef)
        self.head = classifier(albef.config, classes)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """images (B, 3, H, W), tokens (B, T) -> logits (B, C)."""
        encoder = self.encoder
        text_states, mask = encoder.encode_text(tokens), key_mask(encoder.attention_mask(tokens))
        fused = encoder.multimodal_encoder.first(text_states, mask=mask, context=encoder.encode_image(images))
        return self.head(fused)


class PairEncoder(nn.Module):
    """Two pictures and a text: each multimodal layer becomes two, one for each picture, with the same keys and values
    (Sec. 5, NLVR2). Takes over the model's encoders."""

    def __init__(self, albef: Albef, share: bool = True):
        super().__init__()
        layers = albef.multimodal_encoder
        self.encoder = without(albef, "itm_head", "mlm_head")
        albef.multimodal_encoder = BertLayers(copy.deepcopy(layer) for layer in layers for _ in range(2))
        if share:
            share_keys_and_values(albef.multimodal_encoder)

    def forward(self, tokens: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """tokens (B, T), pictures' tokens (B, 1 + N, D) each -> fused (B, T, D)."""
        mask = key_mask(self.encoder.attention_mask(tokens))
        x = self.encoder.encode_text(tokens)
        for index, layer in enumerate(self.encoder.multimodal_encoder):
            x = layer(x, mask=mask, context=second if index % 2 else first)
        return x


def share_keys_and_values(layers: BertLayers) -> None:
    """In place: the two layers of each pair look at their pictures by the second one's keys and values, as there."""
    for first, second in zip(layers[::2], layers[1::2], strict=True):
        first.cross_attention.kv = second.cross_attention.kv


class TextAssignment(nn.Module):
    """NLVR2's further pre-training: which of two pictures does the text belong to, or to neither? (Sec. 5)

    The other pictures are drawn by how alike they are; the projection that says so is not trained.
    """

    TEMPERATURE = 0.07

    def __init__(self, pair: PairEncoder):
        super().__init__()
        self.pair = pair
        self.head = nn.Linear(pair.encoder.config.text_width, 3)
        for frozen in (pair.encoder.vision_proj, pair.encoder.text_proj):
            frozen.requires_grad_(False)
        pair.encoder.temperature.requires_grad_(False)

    def loss(self, images: Tensor, tokens: Tensor, alpha: float = 0.0) -> Tensor:
        """images (B, 3, H, W), tokens (B, T), B at least 3. Scalar. Nobody teaches it: alpha is not looked at."""
        image_tokens = self.pair.encoder.encode_image(images)
        rows, labels = self.assign(self.pair.encoder.image_features(image_tokens))
        fused = self.pair(tokens, image_tokens[rows[:, 0]], image_tokens[rows[:, 1]])
        return F.cross_entropy(self.head(fused[:, 0]).float(), labels)

    @torch.no_grad()
    def assign(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Picture features (B, E) -> which two pictures each text sees (B, 2), and the class (B,).

        Two thirds see their own, first (class 0) or second (class 1); the others see two wrong ones (class 2).
        """
        device, size = features.device, len(features)
        if size < 3:
            raise ValueError(f"text assignment: a batch of {size} has no two other pictures for a text; take 3 or more")
        alike = (features @ features.T / self.TEMPERATURE).fill_diagonal_(-torch.inf)
        # Two draws without replacement; the floor is for a softmax that leaves all weight to one picture.
        weights = (alike.softmax(1) + 1e-9).fill_diagonal_(0)
        others = weights.multinomial(2)  # (B, 2)
        own = torch.arange(size, device=device)
        one, two = torch.stack([own, others[:, 0]], 1), torch.stack([others[:, 0], own], 1)
        labels = torch.randint(3, (size,), device=device)
        return torch.stack([one, two, others])[labels, own], labels


class Nlvr2(nn.Module):
    """Is the sentence true of the two pictures?"""

    def __init__(self, pair: PairEncoder, classes: int = 2):
        super().__init__()
        self.pair = pair
        self.pair.encoder = headless(pair.encoder)
        self.head = classifier(pair.encoder.config, classes)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """images (B, 2, 3, H, W), tokens (B, T) -> logits (B, 2); class 1 is true."""
        first, second = (self.pair.encoder.encode_image(side) for side in images.unbind(1))
        return self.head(self.pair(tokens, first, second)[:, 0])


# ---- visual question answering


class AnswerDecoder(nn.Module):
    """Writes an answer word by word, looking at the fused question (Sec. 5, VQA)."""

    def __init__(self, config: AlbefConfig):
        super().__init__()
        width = config.text_width
        self.embeddings = BertEmbeddings(
            config.vocabulary, width, config.positions, token_types=2, dropout=config.dropout
        )
        self.layers = BertLayers.make(
            config.fusion_layers,
            width,
            config.text_heads,
            config.mlp_width,
            context_width=width,
            dropout=config.dropout,
        )
        self.head = TokenHead(width, config.vocabulary)
        initialise_bert(self, config.init_std)

    def forward(self, answers: Tensor, attention_mask: Tensor, states: Tensor, states_mask: Tensor) -> Tensor:
        """answers (A, L), states (A, T, D) -> logits of the next token (A, L, V)."""
        x = self.layers(
            self.embeddings(answers),
            mask=key_mask(attention_mask),
            causal=True,
            context=states,
            context_mask=key_mask(states_mask),
        )
        return self.head(x, self.embeddings.word.weight)


class QuestionAnswering(nn.Module):
    """Encoders and the answer decoder, which starts from the multimodal encoder and the text's embeddings.

    Keys and values of its cross-attention start there too where pictures and texts are of one width, as in the paper.
    """

    def __init__(self, albef: Albef):
        super().__init__()
        self.text_decoder = AnswerDecoder(albef.config)
        self.take_over(albef)

    def take_over(self, albef: Albef) -> None:
        """The encoders themselves, and the decoder's start."""
        start = {f"embeddings.{key}": value for key, value in albef.text_encoder.embeddings.state_dict().items()}
        start |= {f"head.{key}": value for key, value in albef.mlm_head.state_dict().items()}
        start |= {f"layers.{key}": value for key, value in albef.multimodal_encoder.state_dict().items()}
        own = self.text_decoder.state_dict()
        if albef.config.vision_width != albef.config.text_width:
            start |= {key: value for key, value in own.items() if ".cross_attention.kv." in key}
        self.text_decoder.load_state_dict(start, strict=True)
        self.encoder = headless(albef)

    def ask(self, images: Tensor, questions: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W), questions (B, T) -> fused states (B, T, D), and which are no padding (B, T)."""
        encoder = self.encoder
        attention_mask = encoder.attention_mask(questions)
        return encoder.fuse(
            encoder.encode_text(questions), attention_mask, encoder.encode_image(images)
        ), attention_mask

    def write(self, answers: Tensor, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Answers (A, L) to the questions of the same row -> logits (A, L, V)."""
        return self.text_decoder(answers, self.encoder.attention_mask(answers), states, attention_mask)


class Ranked(NamedTuple):
    """Candidates of each question, best first."""

    answers: Tensor  # (B, K): rows of the candidate list
    probabilities: Tensor  # (B, K), among the K


class AlbefVqa(TaughtByMomentum):
    """Question answering with its momentum copy."""

    AT_ONCE = 512  # answers ranked at once: each keeps logits over the whole vocabulary at every place
    student: QuestionAnswering
    teacher: QuestionAnswering | None

    @classmethod
    def started_from(cls, pretrained: AlbefPretraining) -> AlbefVqa:
        """Goes on from pre-training's student and momentum copy, which it takes over (VQA.py)."""
        model = cls(QuestionAnswering(pretrained.student), pretrained.config.momentum)
        assert model.teacher is not None
        model.teacher.take_over(pretrained.teacher)
        return model

    def loss(
        self, images: Tensor, questions: Tensor, answers: Tensor, weights: Tensor, owner: Tensor, alpha: float = 0.0
    ) -> Tensor:
        """Distinct human answers (A, L), [CLS] first and [SEP] last, their weights (A,), and the question of each (A,).

        The weighted losses are summed and divided by the number of questions, not of answers. Scalar.
        """
        student = self.student
        states, attention_mask = student.ask(images, questions)
        logits = student.write(answers, states[owner], attention_mask[owner])
        targets = next_token_targets(answers, student.encoder.attention_mask(answers))
        losses = answer_losses(logits, targets)  # (A,)
        if self.teacher is not None:
            with torch.no_grad():
                follow(self.teacher, student, self.momentum)
                states, attention_mask = self.teacher.ask(images, questions)
                taught = self.teacher.write(answers, states[owner], attention_mask[owner]).float().softmax(-1)
            soft = -(taught * logits.float().log_softmax(-1)).sum(-1)  # (A, L)
            losses = (1 - alpha) * losses + alpha * soft.masked_fill(targets == IGNORED, 0).sum(1)
        return (weights * losses).sum() / len(images)

    @torch.no_grad()
    def rank(self, images: Tensor, questions: Tensor, candidates: Tensor, keep: int = 128) -> Ranked:
        """Candidate answers (C, L), [CLS] first: the `keep` whose first word is likeliest, ranked by their likelihood.

        As in the official rank_answer, a kept answer's score is the log-likelihood of all its words plus that of its
        first word once more.
        """
        student = self.student
        keep = min(keep, len(candidates))
        states, attention_mask = student.ask(images, questions)
        begin = candidates[:1, :1].expand(len(images), 1)
        first = student.write(begin, states, attention_mask)[:, 0].float().log_softmax(-1)  # (B, V)
        first, chosen = first[:, candidates[:, 1]].topk(keep, dim=1)  # (B, K)

        answers = rearrange(candidates[chosen], "b k l -> (b k) l")
        row = torch.arange(len(images), device=images.device).repeat_interleave(keep)
        losses = []
        for some, its in zip(answers.split(self.AT_ONCE), row.split(self.AT_ONCE), strict=True):
            logits = student.write(some, states[its], attention_mask[its])
            losses.append(answer_losses(logits, next_token_targets(some, student.encoder.attention_mask(some))))
        scores = first - rearrange(torch.cat(losses), "(b k) -> b k", k=keep)
        probabilities, order = scores.softmax(1).sort(dim=1, descending=True, stable=True)
        return Ranked(chosen.gather(1, order), probabilities)

    def predict(self, images: Tensor, questions: Tensor, candidates: Tensor, keep: int = 128) -> Tensor:
        """The best candidate of each question, (B,)."""
        return self.rank(images, questions, candidates, keep).answers[:, 0]


def answer_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (A, L, V), targets (A, L) or IGNORED -> the cross-entropy of each answer, summed over its words (A,)."""
    losses = F.cross_entropy(
        rearrange(logits, "a l v -> a v l").float(), targets, ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(1)


# ---- grounding


def word_maps(model: Albef, images: Tensor, tokens: Tensor, layer: int = 2) -> Tensor:
    """Grad-CAM on the cross-attention of one multimodal layer (Sec. 6.4; Grounding.py): where each word looks.

    images (B, 3, H, W), tokens (B, T); layer counts from 0, the third of six in the paper. Attention to each patch,
    times how much it raises the matching logit (where it does), mean over heads: (B, T, rows, columns), 0 at padding.
    Call it in eval mode; no parameter is given a gradient.
    """
    with torch.enable_grad():
        attention_mask = model.attention_mask(tokens)
        mask = key_mask(attention_mask)
        pictures, x = model.encode_image(images), model.encode_text(tokens)
        weights = None
        for index, block in enumerate(model.multimodal_encoder):
            if index != layer:
                x = block(x, mask=mask, context=pictures)
                continue
            x = block.attention_norm(x + block.attention(x, mask=mask))
            looked, weights = looked_and_weights(block.cross_attention, x, pictures)
            x = block.cross_norm(x + looked)
            x = block.mlp_norm(x + block.mlp(x))
        if weights is None:
            raise ValueError(f"word_maps: layer {layer} of {len(model.multimodal_encoder)}, counted from 0")
        match = model.itm_head(x[:, 0])[:, 1].sum()
        (gradient,) = torch.autograd.grad(match, weights)
    raised = (weights * gradient.clamp_min(0)).detach()[..., 1:]  # (B, H, T, N), without the class token
    patch = model.config.patch
    maps = reduce(
        raised, "b h t (row column) -> b t row column", "mean", row=images.shape[-2] // patch
    )  # fmt: skip
    return maps * rearrange(attention_mask, "b t -> b t 1 1")


def heat_map(model: Albef, images: Tensor, tokens: Tensor, layer: int = 2) -> Tensor:
    """`word_maps`, mean over the words of each text, padding not counted. (B, rows, columns)."""
    maps = word_maps(model, images, tokens, layer)
    return maps.sum(1) / rearrange(model.attention_mask(tokens).sum(1), "b -> b 1 1")


def looked_and_weights(attention: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-attention written out: its output (B, T, D), and the weights (B, H, T, S) that it is computed from."""
    q = rearrange(attention.q(x), "b t (h k) -> b h t k", k=attention.head_width)
    k, v = rearrange(attention.kv(context), "b s (two h k) -> two b h s k", two=2, k=attention.head_width)
    weights = (q @ k.mT * attention.head_width**-0.5).softmax(-1)
    return attention.out(rearrange(weights @ v, "b h t k -> b t (h k)")), weights
