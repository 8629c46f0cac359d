"""Ours against transformers: equal weights and equal bytes, in turns, in one run. `python -m papers bench blip`.

Both get texts padded to the longest of their batch. Dropout is off: with it no two implementations have equal losses.
What transformers lacks of pre-training (a momentum teacher, a queue, hard negatives, the losses of ITC and ITM) its
networks borrow from ours, so that the networks alone differ. Axes: B pictures, R texts, S picture tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.blip.config import VARIANTS, BlipConfig, caption, retrieval
from papers.blip.losses import blip_losses
from papers.blip.model import Blip, BlipPretraining, copied, starting_with
from papers.blip.module import trim_padding
from papers.blip.weights import FORMATS, hf_config
from shared.losses.image_text import Negatives, next_token_targets
from shared.nn.momentum import FeatureQueue, follow, momentum_copy
from shared.tools.bench import pick
from shared.tools.bench_output import Job, Sweep
from shared.tools.bench_setup import Setup, beam_writers, longest, normaliser, pictures_and_texts, stepper

KINDS = {"captioning": "BlipForConditionalGeneration", "retrieval": "BlipForImageTextRetrieval"}
A_PICTURE_OF = (1037, 3861, 1997)  # in BERT's vocabulary; in a smaller one some other words
BEAMS, NEW_TOKENS = 3, 20
RANKED = 16  # texts of one picture, when re-ranking
ALPHA = 0.4  # the teacher's share in ITC's targets


def config_of(variant: str, task: Callable[[BlipConfig], BlipConfig] = lambda config: config) -> BlipConfig:
    """The variant, without dropout; a published one at the sizes that a task fine-tunes it with."""
    config = pick(variant, VARIANTS)
    config = task(config) if config.tokenizer == "bert-wordpiece" else config
    return replace(config, dropout=0.0, drop_path=0.0)


# ---- the contestants


def pair(kind: str, config: BlipConfig, device: str) -> tuple[Blip, nn.Module]:
    """Ours and transformers' of KINDS with equal weights: ours, since their image encoder starts with denormal ones."""
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws weights in no time
        ours = FORMATS[f"transformers-{kind}"].build(config)
        return ours, theirs_of(ours, kind)


def theirs_of(blip: Blip, kind: str) -> nn.Module:
    """transformers' model of KINDS with the weights of ours."""
    import transformers

    sizes = transformers.BlipConfig.from_dict(hf_config(blip.config))
    theirs = getattr(transformers, KINDS[kind])(sizes)
    theirs.load_state_dict(FORMATS[f"transformers-{kind}"].to_published(blip.state_dict()))
    return theirs


class TheirMatcher(nn.Module):
    """transformers' networks for retrieval, with the methods of Blip."""

    def __init__(self, retrieval: nn.Module, config: BlipConfig):
        super().__init__()
        self.config, self.retrieval = config, retrieval
        self.normalised = normaliser(retrieval, config.mean, config.std)

    def attention_mask(self, tokens: Tensor) -> Tensor:
        return tokens != self.config.pad_token

    def encode_image(self, images: Tensor) -> Tensor:
        return self.retrieval.vision_model(pixel_values=self.normalised(images)).last_hidden_state

    def features_of(self, image_tokens: Tensor) -> Tensor:
        return F.normalize(self.retrieval.vision_proj(image_tokens[:, 0]).float(), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        return self.features_of(self.encode_image(images))

    def text_features(self, tokens: Tensor, *given: Tensor) -> Tensor:
        """given: the attention mask, which the teacher is told."""
        states = self._states(starting_with(self.config.start_token, tokens))
        return F.normalize(self.retrieval.text_proj(states[:, 0]).float(), dim=-1)

    def match(self, tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Texts (R, T) and a picture for each (R, S, D) -> ITM logits (R, 2)."""
        tokens = starting_with(self.config.encode_token, tokens)
        return self.retrieval.itm_head(self._states(tokens, encoder_hidden_states=image_tokens)[:, 0])

    def _states(self, tokens: Tensor, **picture: Tensor) -> Tensor:
        mask = self.attention_mask(tokens).long()
        return self.retrieval.text_encoder(tokens, attention_mask=mask, **picture).last_hidden_state


class TheirBlip(TheirMatcher):
    """The same with a decoder, shared as the paper shares it, and what BlipPretraining calls beside."""

    def __init__(self, blip: Blip):
        super().__init__(theirs_of(copied(blip, Blip(blip.config, decoder=False)), "retrieval"), blip.config)
        self.decoder = theirs_of(copied(blip, Blip(blip.config, encoder=False)), "captioning").text_decoder
        encoder = self.retrieval.text_encoder
        self.decoder.set_input_embeddings(encoder.embeddings.word_embeddings)
        self.decoder.bert.embeddings = encoder.embeddings
        self.decoder.cls.predictions.decoder.weight = encoder.embeddings.word_embeddings.weight
        for own, shared in zip(self.decoder.bert.encoder.layer, encoder.encoder.layer, strict=True):
            own.crossattention, own.intermediate, own.output = shared.crossattention, shared.intermediate, shared.output

    def caption_targets(self, tokens: Tensor, image_tokens: Tensor, prompt: int, seen: None) -> tuple[Tensor, Tensor]:
        """Logits (R * T, V) and targets (R * T,): transformers has no way to leave padding out."""
        tokens = starting_with(self.config.decode_token, tokens)
        attention_mask = self.attention_mask(tokens)
        logits = self.decoder(tokens, attention_mask=attention_mask.long(), encoder_hidden_states=image_tokens).logits
        return logits.flatten(0, 1), next_token_targets(tokens, attention_mask, prompt).flatten()


class TheirMomentum(TheirMatcher):
    """The teacher, of transformers' networks, with the methods of Momentum."""

    def __init__(self, blip: TheirBlip):
        super().__init__(momentum_copy(blip.retrieval), blip.config)

    def follow(self, blip: TheirBlip, momentum: float) -> None:
        follow(self.retrieval, blip.retrieval, momentum)


class TheirPretraining(BlipPretraining):
    """Our wiring of the three objectives around transformers' networks."""

    def __init__(self, ours: BlipPretraining):
        nn.Module.__init__(self)
        self.config = ours.config
        self.blip = TheirBlip(ours.blip)
        self.momentum = TheirMomentum(self.blip)
        self.queue = FeatureQueue(self.config.queue, self.config.embed_width)
        self.temperature = nn.Parameter(ours.temperature.detach().clone())

    def matching(self, tokens: Tensor, image_tokens: Tensor, negatives: Negatives) -> tuple[Tensor, Tensor, None]:
        own = torch.arange(len(tokens), device=tokens.device)
        texts, pictures = torch.cat([own, own, negatives.texts]), torch.cat([own, negatives.images, own])
        logits = self.blip.match(tokens[texts], image_tokens[pictures])
        return logits[: len(own)], logits[len(own) :], None


# ---- what they do


def writers(config: BlipConfig, device: str, dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Functions of pictures and a prompt (B, P) that give new tokens (B, NEW_TOKENS), by beam search."""
    ours, theirs = (model.to(dtype).eval() for model in pair("captioning", config, device))
    return beam_writers(
        lambda pixels: ours.decoding(ours.encode_image(pixels)),
        theirs,
        normaliser(theirs, config.mean, config.std),
        lambda prompts: F.pad(prompts, (0, 1), value=config.end_token),  # as its processor gives it; it drops the end
        config.end_token,
        BEAMS,
        NEW_TOKENS,
    )


def caption_steps(config: BlipConfig, device: str, precision: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """A captioner's step: functions of pictures and texts (B, T) that give the loss before it."""
    ours, theirs = pair("captioning", config, device)
    normalised = normaliser(theirs, config.mean, config.std)

    def our_loss(pixels: Tensor, tokens: Tensor) -> Tensor:
        return ours.caption_loss(tokens, ours.encode_image(pixels))

    def their_loss(pixels: Tensor, tokens: Tensor) -> Tensor:
        tokens = starting_with(config.decode_token, tokens)
        attention_mask = tokens != config.pad_token
        return theirs(
            pixel_values=normalised(pixels),
            input_ids=tokens,
            attention_mask=attention_mask.long(),
            labels=tokens.masked_fill(~attention_mask, -100),
        ).loss

    return {"ours": stepper(ours, our_loss, precision), "transformers": stepper(theirs, their_loss, precision)}


def pretraining_steps(
    config: BlipConfig, device: str, precision: str
) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """A step of ITC, ITM and LM together: functions of pictures and texts (B, T) that give the three losses before it.
    Both draw their hard negatives by equal seeds."""
    torch.manual_seed(0)
    with torch.device(device):
        ours = BlipPretraining(config)
        models = {"ours": ours, "transformers": TheirPretraining(ours)}

    def losses(model: BlipPretraining, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(blip_losses(model(pixels, tokens, alpha=ALPHA), config.label_smoothing))

    return {name: stepper(model.to(device), partial(losses, model), precision) for name, model in models.items()}


def matchers(config: BlipConfig, device: str, dtype: torch.dtype) -> dict[str, dict[str, Callable]]:
    """{what: {"ours", "transformers": function}} of three uses in retrieval.

    features: pictures -> (B, E). match: pictures, a text for each (B, T) -> ITM logits (B, 2). rank: one picture, texts
    (R, T) -> (R, 2).
    """
    ours, retrieval = (model.to(dtype).eval() for model in pair("retrieval", config, device))
    theirs = TheirMatcher(retrieval, config)

    def our_match(pixels: Tensor, tokens: Tensor) -> Tensor:
        return ours.match(tokens, ours.encode_image(pixels))

    def their_match(pixels: Tensor, tokens: Tensor) -> Tensor:
        return theirs.match(tokens, theirs.encode_image(pixels).expand(len(tokens), -1, -1))

    matched = {"ours": our_match, "transformers": their_match}
    features = {"ours": ours.image_features, "transformers": theirs.image_features}
    return {"features": features, "match": matched, "rank": matched}


# ---- what they are given


def inputs(config: BlipConfig, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Pictures of noise (B, 3, H, W) uint8, and texts (B, T) of natural lengths, padded to the longest."""
    start, end = config.start_token, config.end_token
    pixels, tokens = pictures_and_texts(
        batch, config.image_size, config.context, start=start, end=end, words=(1, start)
    )
    return pixels.to(device), trim_padding(tokens, config.pad_token).to(device)


def prompts(config: BlipConfig, batch: int, device: str) -> Tensor:
    """[DEC] and "a picture of" (B, 4)."""
    words = [word % config.vocabulary for word in A_PICTURE_OF]
    return torch.tensor([[config.decode_token, *words]] * batch, device=device)


def pictures_and_prompts(config: BlipConfig, batch: int, device: str) -> tuple[Tensor, Tensor]:
    return inputs(config, batch, device)[0], prompts(config, batch, device)


# ---- the sweeps


def variant_of(setup: Setup) -> str:
    return setup.variant or "blip-base"


def title(what: str, setup: Setup, config: BlipConfig) -> str:
    return f"{what}: {variant_of(setup)}, {config.image_size} px, {setup.precision}"


def caption_sweep(setup: Setup) -> list[Sweep]:
    config = config_of(variant_of(setup), caption)
    models = functools.cache(partial(writers, config, setup.device, setup.dtype))
    jobs = [
        setup.writing_race(
            f"batch {batch}",
            models,
            partial(pictures_and_prompts, config, batch, setup.device),
            items=batch, unit="captions/s", batch=batch, new_tokens=NEW_TOKENS,
        )
        for batch in setup.sizes((1, 8), (1, 64))
    ]  # fmt: skip
    return [Sweep("blip-caption", title(f"CAPTIONING, beam {BEAMS}, {NEW_TOKENS} new tokens", setup, config), jobs)]


def step_sweep(setup: Setup) -> list[Sweep]:
    config = config_of(variant_of(setup))
    kinds = {"LM": caption_steps, "ITC, ITM and LM": pretraining_steps}
    jobs = [
        setup.race(
            f"{kind}, batch {batch}, captions of up to {longest(batch, config.context)} tokens",
            partial(steps, config, setup.device, setup.precision),
            partial(inputs, config, batch, setup.device),
            items=batch, unit="pictures/s", training=True, batch=batch, tokens=longest(batch, config.context),
        )
        for kind, steps in kinds.items()
        for batch in setup.sizes((4, 8), (32, 64))
    ]  # fmt: skip
    return [Sweep("blip-step", title("TRAINING STEP", setup, config), jobs)]


def inference_sweep(setup: Setup) -> list[Sweep]:
    config = config_of(variant_of(setup), retrieval)
    models = functools.cache(partial(matchers, config, setup.device, setup.dtype))

    def job(setting: str, what: str, batch: int, texts: int) -> Job:
        def given() -> tuple[Tensor, ...]:
            pixels, tokens = inputs(config, batch, setup.device)[0], inputs(config, texts, setup.device)[1]
            return (pixels,) if what == "features" else (pixels, tokens)

        return setup.race(
            setting, lambda: models()[what], given, items=texts,
            unit="pictures/s" if what == "features" else "texts/s", at_least=setup.on(0.2, 0.1),
            what=what, batch=batch, texts=texts,
        )  # fmt: skip

    sizes = setup.sizes((1, 8), (1, 64))
    jobs = [job(f"pictures to features, batch {batch}", "features", batch, batch) for batch in sizes]
    jobs.append(job(f"matching {sizes[-1]} pictures with a text each", "match", sizes[-1], sizes[-1]))
    jobs.append(job(f"ranking {RANKED} texts of one picture", "rank", 1, RANKED))
    return [Sweep("blip-inference", title("RETRIEVAL", setup, config), jobs)]


SWEEPS = {"caption": caption_sweep, "step": step_sweep, "inference": inference_sweep}
