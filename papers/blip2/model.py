"""BLIP-2 (Li et al. 2023): a Q-Former between a frozen image encoder and a frozen language model. Reads beside Fig. 2
and 3, Sec. 3.1 to 3.3. Features are what the frozen encoder gives, perhaps kept from an earlier pass. Axes: B batch,
Q queries, T text tokens, S picture tokens, C their width, D width, E joint space, W width of the language model,
V vocabulary, R texts, P positions with a target, M partners of ITC on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.blip2.config import Blip2Config, VisionConfig
from shared.core.errors import UserError
from shared.losses.image_text import (
    IGNORED,
    Negatives,
    Similarities,
    hard_negatives,
    next_token_targets,
    same_picture_targets,
)
from shared.nn.bert import TokenHead, init_std, initialise_bert
from shared.nn.distributed import all_gather, world
from shared.nn.frozen import Frozen
from shared.nn.qformer import CrossAttentionKV, QFormer, QFormerDecoding, QueryCache
from shared.nn.vit import VisionTransformer


class VisionNorm(nn.LayerNorm):
    """The trained norm over frozen features, in place of the encoder's own. (B, S, C) -> (B, S, C).

    In fp32 inside. It gives what its weights are in: fp32 under autocast, 16 bit where ZeRO keeps them so.
    """

    def forward(self, features: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        with torch.autocast(features.device.type, enabled=False):
            normed = F.layer_norm(features.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


def vision_encoder(config: VisionConfig) -> VisionTransformer:
    """The ViT as it stands before the Q-Former, the last block and the norm absent: read it through `tokens`."""
    if config.kind == "efficientnet":
        raise ValueError("an EfficientNet is no ViT: shared/backbones/vision.py builds it")
    return VisionTransformer(
        config.image_size,
        config.patch,
        config.width,
        config.layers,
        config.heads,
        activation=config.activation,
        eps=config.eps,
        mlp_ratio=config.mlp_ratio,
        input_norm=config.input_norm,
        output_norm=False,
        patch_bias=config.patch_bias,
        key_bias=config.kind != "eva",
        mean=config.mean,
        std=config.std,
    )


def query_transformer(config: Blip2Config, *, text: bool) -> QFormer:
    """The Q-Former with its text branch (stage 1) or without (stage 2)."""
    qformer = QFormer(
        config.queries,
        config.width,
        config.layers,
        config.heads,
        config.mlp_width,
        config.vision.width,
        vocabulary=config.vocabulary if text else None,
        positions=config.positions,
        cross_every=config.cross_every,
        dropout=config.dropout,
    )
    qformer.initialise(init_std(config.width))
    return qformer


def gathered(x: Tensor) -> Tensor:
    """(B, ...) of every rank (R·B, ...), as constants."""
    with torch.no_grad():
        return all_gather(x.detach())


def identities(ids: Tensor | None, features: Tensor) -> tuple[Tensor, Tensor]:
    """Whose picture each of this rank's pairs is (B,), and each of all ranks' (M,); a number of its own where None."""
    if ids is None:
        ids = torch.arange(len(features), device=features.device) + world()[0] * len(features)
    return ids, gathered(ids)


# ---- stage 1: representation learning


class Objectives(NamedTuple):
    """Which of the three losses are computed. ITM draws its negatives by ITC's similarities, so it needs that."""

    itc: bool = True
    itm: bool = True
    itg: bool = True


class Stage1Output(NamedTuple):
    """What the losses are made of; None where an objective is off."""

    similarities: Similarities | None  # (B, M) each, over temperature
    targets: Tensor | None  # (B, M), in either direction, rows sum to one; not smoothed
    matches: Tensor | None  # (B, 2) ITM logits of true pairs
    mismatches: Tensor | None  # (2B, 2) of false ones
    logits: Tensor | None  # (P, V)
    next_tokens: Tensor | None  # (P,)
    temperature: Tensor


class Blip2Qformer(nn.Module):
    """Stage 1: the Q-Former with what its three objectives need. The image encoder is not in it: it reads features.

    Tokens (R, T) are what the tokenizer gives, [CLS] text [SEP] padding on the right; generation puts [DEC] first.
    """

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.config = config
        self.vision_norm = VisionNorm(config.vision.width)
        self.qformer = query_transformer(config, text=True)
        self.vision_proj = nn.Linear(config.width, config.embed_width)
        self.text_proj = nn.Linear(config.width, config.embed_width)
        self.itm_head = nn.Linear(config.width, 2)
        self.head = TokenHead(config.width, config.vocabulary)
        initialise_bert(self.head, init_std(config.width))
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def attention_mask(self, tokens: Tensor) -> Tensor:
        """(R, T) -> bool (R, T), False at padding."""
        return tokens != self.config.pad_token

    # unimodal

    def image_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, C) -> the queries' states (B, Q, D) and unit vectors (B, Q, E)."""
        states = self.qformer.encode_queries(self.vision_norm(features))
        return states, self.image_vectors(states)

    def image_vectors(self, states: Tensor) -> Tensor:
        """(B, Q, D) -> unit vectors (B, Q, E), one a query."""
        return F.normalize(self.vision_proj(states).float(), dim=-1)

    def text_features(self, tokens: Tensor) -> Tensor:
        """(R, T) that begin with [CLS] -> unit vectors (R, E)."""
        states = self.qformer.encode_text(tokens, self.attention_mask(tokens))
        return F.normalize(self.text_proj(states[:, 0]).float(), dim=-1)

    # grounded in a picture

    def match(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Pictures (B, S, C), texts (R, T), R a multiple of B: texts in succession share one -> ITM logits (R, 2).

        Class 1 is a match. Each query votes; the logits are their mean (Sec. 3.2).
        """
        return self._match(self.vision_norm(features), tokens)

    def _match(self, context: Tensor | list[CrossAttentionKV | None], tokens: Tensor) -> Tensor:
        states = self.qformer.match(tokens, self.attention_mask(tokens), context)  # (R, Q + T, D)
        return self.itm_head(states[:, : self.config.queries]).float().mean(1)

    def caption_logits(self, features: Tensor, tokens: Tensor) -> Tensor:
        """(B, S, C), (B, T) -> logits of each next token (B, T, V)."""
        caches = self.qformer.caches()
        self.qformer.encode_queries(self.vision_norm(features), caches=caches)
        tokens = self.with_start(tokens)
        return self._logits(self.qformer.decode_text(tokens, self.attention_mask(tokens), caches))

    def decoding(self, features: Tensor) -> QFormerDecoding:
        """(B, S, C) -> what shared/nn/generation.py drives; prompts begin with [DEC]."""
        return self.qformer.decoding(self.head, self.vision_norm(features))

    def with_start(self, tokens: Tensor) -> Tensor:
        """A copy of (R, T) that begins with [DEC] in place of [CLS]."""
        tokens = tokens.clone()
        tokens[:, 0] = self.config.decode_token
        return tokens

    def _logits(self, states: Tensor) -> Tensor:
        return self.head(states, self.qformer.embeddings.word.weight)

    # pre-training

    def forward(
        self,
        features: Tensor,
        tokens: Tensor,
        ids: Tensor | None = None,
        objectives: Objectives = Objectives(),  # noqa: B008 (immutable)
    ) -> Stage1Output:
        """features (B, S, C), tokens (B, T) of their texts, the same B on every rank.

        ids (B,): whose picture each is. With them all texts of a picture are its partners in ITC and no negatives of it
        in ITM; without, each pair is on its own. Negatives of both are drawn from all ranks (Sec. 3.2).
        """
        if objectives.itm and not objectives.itc:
            raise ValueError("ITM draws its hard negatives by ITC's similarities: train both, or neither")
        similar = targets = matches = mismatches = logits = next_tokens = caches = None
        context = self.vision_norm(features)  # (B, S, C)
        seen = self.qformer.look_at(context)
        if objectives.itg:
            caches = self.qformer.caches()
        states = self.qformer.encode_queries(seen, caches=caches)  # (B, Q, D)
        if objectives.itc:
            ids, all_ids = identities(ids, features)
            targets = same_picture_targets(ids, all_ids)
            similar = self.contrast(self.image_vectors(states), self.text_features(tokens))
            if objectives.itm:
                negatives = hard_negatives(similar, ids[:, None] == all_ids[None])
                matches, mismatches = self.matching(context, seen, tokens, negatives)
        if caches is not None:
            logits, next_tokens = self.caption_targets(tokens, caches)
        return Stage1Output(similar, targets, matches, mismatches, logits, next_tokens, self.temperature)

    def contrast(self, images: Tensor, texts: Tensor) -> Similarities:
        """Unit vectors (B, Q, E) and (B, E) against all ranks', over temperature, in fp32. (B, M) each.

        Of a picture the query that is most like the text counts (Sec. 3.2). What is compared with is constant, on one
        rank too (official code): a gradient comes to images and texts as those who ask alone.
        """
        with torch.autocast(images.device.type, enabled=False):
            image_to_text = torch.einsum("bqe,me->bmq", images, gathered(texts)).amax(-1)
            text_to_image = torch.einsum("be,mqe->bmq", texts, gathered(images)).amax(-1)
            return Similarities(image_to_text / self.temperature, text_to_image / self.temperature)

    def matching(
        self, context: Tensor, seen: list[CrossAttentionKV | None], tokens: Tensor, negatives: Negatives
    ) -> tuple[Tensor, Tensor]:
        """ITM logits of the true pairs (B, 2), and of each text with a false picture and each picture with a false text
        (2B, 2). context (B, S, C), and what the layers see of it."""
        own = torch.arange(len(tokens), device=tokens.device)
        pictures, all_tokens = torch.cat([own, negatives.images, own]), tokens
        if world()[1] > 1:  # the false pictures and texts may be another rank's; gradients go back to it
            false = self.qformer.look_at(all_gather(context)[negatives.images])
            seen = [here and there and there.behind(here) for here, there in zip(seen, false, strict=True)]
            pictures = torch.cat([own, len(own) + own, own])
            tokens = self._of_full_length(tokens)
            all_tokens = gathered(tokens)
        texts = torch.cat([tokens, tokens, all_tokens[negatives.texts]])
        logits = self._match([kv and kv.of(pictures) for kv in seen], texts)
        return logits[: len(own)], logits[len(own) :]

    def _of_full_length(self, tokens: Tensor) -> Tensor:
        """(B, T) padded to the configured context, as ranks have to agree. (B, config.context)"""
        short = self.config.context - tokens.shape[1]
        if short < 0:
            raise ValueError(f"texts of {tokens.shape[1]} tokens, the configured context has {self.config.context}")
        return F.pad(tokens, (0, short), value=self.config.pad_token)

    def caption_targets(self, tokens: Tensor, caches: list[QueryCache]) -> tuple[Tensor, Tensor]:
        """ITG's logits (P, V) and targets (P,), at the positions alone that have something to predict.

        tokens (B, T); caches: what the queries' own pass left, which is not run again.
        """
        tokens = self.with_start(tokens)
        attention_mask = self.attention_mask(tokens)
        states = self.qformer.decode_text(tokens, attention_mask, caches)
        targets = next_token_targets(tokens, attention_mask)
        learned = targets != IGNORED
        return self._logits(states[learned]), targets[learned]

    def trained_by(self, objectives: Objectives) -> set[nn.Parameter]:
        """The parameters that these losses give a gradient to."""
        trained = set(self.parameters())
        if not objectives.itg:
            trained -= set(self.head.parameters())
        if not objectives.itm:
            trained -= set(self.itm_head.parameters())
        if not objectives.itc:  # text reads what the queries are up to the last layer, not what comes of them there
            trained -= {*self.vision_proj.parameters(), *self.text_proj.parameters(), self.temperature}
            last = self.qformer.layers[-1]
            for part in (last.query_mlp, last.query_mlp_norm, last.cross_attention, last.cross_norm):
                trained -= set() if part is None else set(part.parameters())
        return trained


# ---- stage 2: generative learning


class Prompt(NamedTuple):
    """What the encoder of a seq2seq model reads behind the prefix, or a Q-Former beside its queries."""

    tokens: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) bool, False at padding on either side


class Stage2Output(NamedTuple):
    """At the positions alone that have something to predict."""

    logits: Tensor  # (P, V)
    next_tokens: Tensor  # (P,)


class Blip2(nn.Module):
    """Stage 2: the queries' states, projected, are the first words that a frozen language model reads."""

    def __init__(self, config: Blip2Config, language_model: nn.Module, *, question: bool = False):
        """language_model: answers LanguageModel (shared/nn/causal_lm.py); held beside the tree of modules
        (shared/nn/frozen.py), so neither trained nor saved with it.

        question: the Q-Former keeps its text branch, in which the queries meet a question about the picture
        (fine-tuning for VQA, Sec. 4.3).
        """
        super().__init__()
        self.config = config
        self.vision_norm = VisionNorm(config.vision.width)
        self.qformer = query_transformer(config, text=question)
        if question:  # nobody reads the text's own states after the last layer
            for part in (self.qformer.layers[-1].mlp, self.qformer.layers[-1].mlp_norm):
                part.requires_grad_(False)
        if not isinstance(language_model, Frozen):
            language_model = Frozen(language_model, through=True)
        self.projector = nn.Linear(config.width, language_model.width)
        self.language_model: Frozen = language_model

    @classmethod
    def started_from(
        cls,
        stage1: Blip2Qformer | Mapping[str, Tensor],
        config: Blip2Config,
        language_model: nn.Module,
        *,
        question: bool = False,
    ) -> Blip2:
        """A new projector on the Q-Former of stage 1 (the model or its state dict), whose heads and, unless `question`,
        text branch stay behind. UserError where a weight is missing, of another shape, or of no stage-1 model."""
        state = stage1 if isinstance(stage1, Mapping) else stage1.state_dict()
        model = cls(config, language_model, question=question)
        wanted = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("projector.")}
        with torch.device("meta"):
            known = Blip2Qformer(config).state_dict()
        faults = {
            "missing": sorted(set(wanted) - set(state)),
            "unknown": sorted(set(state) - set(known)),
            "of another shape": [k for k in wanted if k in state and state[k].shape != wanted[k].shape],
        }
        listed = "; ".join(f"{what}: {', '.join(keys[:4])}" for what, keys in faults.items() if keys)
        if listed:
            raise UserError(f"stage 2 cannot start from these weights, which are not of its stage 1: {listed}")
        model.load_state_dict({key: state[key] for key in wanted}, strict=False)  # the projector is new
        return model

    def prefix(self, features: Tensor, question: Prompt | None = None) -> Tensor:
        """(B, S, C) -> the visual words (B, Q, W). question: in the Q-Former's own tokens, [CLS] first (B, T)."""
        context = self.vision_norm(features)
        if question is None:
            return self.projector(self.qformer.encode_queries(context))
        if self.qformer.layers[0].mlp is None:
            raise ValueError("this Q-Former has no text branch to read a question: make it with question=True")
        return self.projector(self.qformer.match(*question, context)[:, : self.config.queries])

    def forward(
        self,
        features: Tensor,
        tokens: Tensor,
        attention_mask: Tensor,
        prompt: int | Tensor | Prompt = 0,
        question: Prompt | None = None,
    ) -> Stage2Output:
        """features (B, S, C), tokens (B, T) to be said, attention_mask (B, T), False at padding on the right.

        prompt, causal: how many leading tokens are given and not learned, of all or of each (B,); the first token is
        learned from the prefix alone where 0. seq2seq: what the encoder reads behind the prefix, nothing where 0.
        question: as `prefix` takes it.
        """
        prefix = self.prefix(features, question)
        if self.language_model.kind == "causal":
            states, learned = self._continued(prefix, tokens, attention_mask, prompt)
        else:
            states, learned = self._answered(prefix, tokens, attention_mask, prompt)
        return Stage2Output(self.language_model.logits(states[learned]), tokens[learned])

    def _continued(
        self, prefix: Tensor, tokens: Tensor, attention_mask: Tensor, prompt: int | Tensor | Prompt
    ) -> tuple[Tensor, Tensor]:
        """The states that each token follows (B, T, W), and which tokens are learned (B, T)."""
        read = tokens[:, :-1]  # nothing follows the last
        states = self._read(prefix, read, attention_mask[:, :-1])[:, prefix.shape[1] - 1 :]
        given = torch.as_tensor(prompt, device=tokens.device).view(-1, 1)  # (B or 1, 1)
        return states, attention_mask & (torch.arange(tokens.shape[1], device=tokens.device) >= given)

    def _answered(
        self, prefix: Tensor, tokens: Tensor, attention_mask: Tensor, prompt: int | Tensor | Prompt
    ) -> tuple[Tensor, Tensor]:
        """The decoder's states before each token (B, T, W), and which are learned (B, T)."""
        if not isinstance(prompt, Prompt):
            if prompt != 0:
                raise ValueError(f"a seq2seq language model reads a Prompt, or 0 for none, not {prompt!r}")
            nothing = tokens[:, :0]
            prompt = Prompt(nothing, nothing.bool())
        return self._read(prefix, *prompt, targets=tokens), attention_mask

    def _read(self, prefix: Tensor, tokens: Tensor, attention_mask: Tensor, **given: Tensor) -> Tensor:
        """Prefix (B, Q, W) and then tokens (B, T) through the language model."""
        words = self.language_model.embed(tokens)  # (B, T, W)
        embeddings = torch.cat([prefix.to(words.dtype), words], dim=1)
        return self.language_model.states(embeddings, F.pad(attention_mask, (prefix.shape[1], 0), value=True), **given)

    def decoding(self, features: Tensor, question: Prompt | None = None):
        """(B, S, C) -> what shared/nn/generation.py drives; prompts follow the prefix (seq2seq: in the encoder)."""
        return self.language_model.decoding(self.prefix(features, question))
