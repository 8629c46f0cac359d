"""Ours against transformers: equal weights and equal bytes, in turns, in one run. `python -m papers bench blip`.

Both get texts padded to the longest of their batch. Dropout is off: with it no two implementations have equal losses.
What transformers lacks of pre-training (a momentum teacher, a queue, hard negatives, the losses of ITC and ITM) its
networks borrow from ours, so that the networks alone differ. Axes: B pictures, R texts, S picture tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from papers.blip.config import VARIANTS, BlipConfig, caption, retrieval
from papers.blip.losses import blip_losses
from papers.blip.model import Blip, BlipPretraining, again, copied, cross_attention_kv, starting_with
from papers.blip.module import trim_padding
from papers.blip.weights import FORMATS, published_of
from shared.losses.image_text import Negatives, next_token_targets
from shared.nn.generation import GenerationSettings, generate
from shared.nn.momentum import FeatureQueue, follow, momentum_copy
from shared.tools.bench import (
    Plan,
    longest,
    normaliser,
    one_of,
    pictures_and_texts,
    run_plan,
    stepper,
    without_gradients,
)
from shared.tools.bench_timing import DTYPES, NATURAL, Job, Sweep

SWEEPS = ("caption", "step", "inference")
KINDS = {"captioning": "BlipForConditionalGeneration", "retrieval": "BlipForImageTextRetrieval"}
A_PICTURE_OF = (1037, 3861, 1997)  # in BERT's vocabulary; in a smaller one some other words
BEAMS, NEW_TOKENS = 3, 20
RANKED = 16  # texts of one picture, when re-ranking
ALPHA = 0.4  # the teacher's share in ITC's targets


def run(root: Path, overrides: list[str]) -> None:
    """Print a table a sweep; write it, with its figure, into results/bench/."""
    run_plan(root, overrides, BlipPlan, SWEEPS, lambda variant: one_of(variant, VARIANTS))


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

    config = blip.config
    text = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.text_width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.positions,
        "pad_token_id": config.pad_token,
        "bos_token_id": config.decode_token,
        "eos_token_id": config.end_token,
        "sep_token_id": config.end_token,
        "label_smoothing": config.label_smoothing,
    }
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch,
        "layer_norm_eps": 1e-6,
    }
    sizes = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=config.embed_width)
    theirs = getattr(transformers, KINDS[kind])(sizes)
    theirs.load_state_dict(published_of(blip.state_dict(), f"transformers-{kind}"))
    return theirs


class TheirBlip(nn.Module):
    """transformers' networks, shared among encoder and decoder as the paper shares them, with the methods of Blip that
    BlipPretraining calls."""

    def __init__(self, blip: Blip):
        super().__init__()
        self.config = blip.config
        self.retrieval = theirs_of(copied(blip, Blip(blip.config, decoder=False)), "retrieval")
        self.decoder = theirs_of(copied(blip, Blip(blip.config, encoder=False)), "captioning").text_decoder
        encoder = self.retrieval.text_encoder
        self.decoder.set_input_embeddings(encoder.embeddings.word_embeddings)
        self.decoder.bert.embeddings = encoder.embeddings
        self.decoder.cls.predictions.decoder.weight = encoder.embeddings.word_embeddings.weight
        for own, shared in zip(self.decoder.bert.encoder.layer, encoder.encoder.layer, strict=True):
            own.crossattention, own.intermediate, own.output = shared.crossattention, shared.intermediate, shared.output
        self.normalised = normaliser(self, self.config.mean, self.config.std)

    def attention_mask(self, tokens: Tensor) -> Tensor:
        return tokens != self.config.pad_token

    def encode_image(self, images: Tensor) -> Tensor:
        return self.retrieval.vision_model(pixel_values=self.normalised(images)).last_hidden_state

    def features_of(self, image_tokens: Tensor) -> Tensor:
        return F.normalize(self.retrieval.vision_proj(image_tokens[:, 0]).float(), dim=-1)

    def text_features(self, tokens: Tensor) -> Tensor:
        tokens = starting_with(self.config.start_token, tokens)
        states = self.retrieval.text_encoder(
            tokens, attention_mask=self.attention_mask(tokens).long()
        ).last_hidden_state
        return F.normalize(self.retrieval.text_proj(states[:, 0]).float(), dim=-1)

    def match(self, tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Texts (R, T) and a picture for each (R, S, D) -> ITM logits (R, 2)."""
        tokens = starting_with(self.config.encode_token, tokens)
        states = self.retrieval.text_encoder(
            tokens, attention_mask=self.attention_mask(tokens).long(), encoder_hidden_states=image_tokens
        ).last_hidden_state
        return self.retrieval.itm_head(states[:, 0])

    def caption_targets(self, tokens: Tensor, image_tokens: Tensor, prompt: int, seen: None) -> tuple[Tensor, Tensor]:
        """Logits (R * T, V) and targets (R * T,): transformers has no way to leave padding out."""
        tokens = starting_with(self.config.decode_token, tokens)
        attention_mask = self.attention_mask(tokens)
        logits = self.decoder(tokens, attention_mask=attention_mask.long(), encoder_hidden_states=image_tokens).logits
        return logits.flatten(0, 1), next_token_targets(tokens, attention_mask, prompt).flatten()


class TheirMomentum(nn.Module):
    """The teacher, of transformers' networks, with the methods of Momentum."""

    def __init__(self, blip: TheirBlip):
        super().__init__()
        self.config, self.normalised = blip.config, blip.normalised
        self.retrieval = momentum_copy(blip.retrieval)

    def follow(self, blip: TheirBlip, momentum: float) -> None:
        follow(self.retrieval, blip.retrieval, momentum)

    def image_features(self, images: Tensor) -> Tensor:
        return TheirBlip.features_of(self, TheirBlip.encode_image(self, images))

    def text_features(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return TheirBlip.text_features(self, tokens)

    def attention_mask(self, tokens: Tensor) -> Tensor:
        return tokens != self.config.pad_token


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


def captioners(config: BlipConfig, device: str, dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Functions of pictures and a prompt (B, P) that give new tokens (B, NEW_TOKENS), by beam search."""
    ours, theirs = (model.to(dtype).eval() for model in pair("captioning", config, device))
    normalised = normaliser(theirs, config.mean, config.std)
    settings = GenerationSettings(
        stop=(config.end_token,), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, beams=BEAMS
    )

    def our_captions(pixels: Tensor, prompts: Tensor) -> Tensor:
        written = generate(ours.decoding(ours.encode_image(pixels)), prompts, settings)
        return torch.tensor(written.tokens)

    def their_captions(pixels: Tensor, prompts: Tensor) -> Tensor:
        closed = F.pad(prompts, (0, 1), value=config.end_token)  # as its processor gives it; it drops the end again
        tokens = theirs.generate(
            pixel_values=normalised(pixels),
            input_ids=closed,
            attention_mask=torch.ones_like(closed),
            num_beams=BEAMS,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )
        return tokens[:, prompts.shape[1] :].cpu()

    return {"ours": our_captions, "transformers": their_captions}


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

    return {
        "ours": stepper(ours, our_loss, ours.parameters(), precision),
        "transformers": stepper(theirs, their_loss, theirs.parameters(), precision),
    }


def pretraining_steps(
    config: BlipConfig, device: str, precision: str
) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """A step of ITC, ITM and LM together: functions of pictures and texts (B, T) that give the three losses before it.

    Both draw their hard negatives by equal seeds.
    """
    torch.manual_seed(0)
    with torch.device(device):
        ours = BlipPretraining(config)
        models = {"ours": ours, "transformers": TheirPretraining(ours)}

    def step(model: BlipPretraining) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        seeds = itertools.count()

        def losses(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            torch.manual_seed(next(seeds))
            return tuple(blip_losses(model(pixels, tokens, alpha=ALPHA), config.label_smoothing))

        return stepper(model, losses, [p for p in model.parameters() if p.requires_grad], precision)

    return {name: step(model.to(device)) for name, model in models.items()}


def matchers(config: BlipConfig, device: str, dtype: torch.dtype) -> dict[str, dict[str, Callable]]:
    """{"ours", "transformers": {what: function}} of three uses in retrieval.

    features: pictures -> (B, E). match: pictures, a text for each (B, T) -> ITM logits (B, 2). rank: one picture, texts
    (R, T) -> (R, 2).
    """
    ours, theirs = (model.to(dtype).eval() for model in pair("retrieval", config, device))
    normalised = normaliser(theirs, config.mean, config.std)

    def our_rank(pixels: Tensor, tokens: Tensor) -> Tensor:
        return ours.match(tokens, ours.encode_image(pixels))

    def their_features(pixels: Tensor) -> Tensor:
        states = theirs.vision_model(pixel_values=normalised(pixels)).last_hidden_state
        return F.normalize(theirs.vision_proj(states[:, 0]), dim=-1)

    def grounded(tokens: Tensor) -> dict[str, Tensor]:
        tokens = starting_with(config.encode_token, tokens)
        return {"input_ids": tokens, "attention_mask": (tokens != config.pad_token).long()}

    def their_match(pixels: Tensor, tokens: Tensor) -> Tensor:
        return theirs(pixel_values=normalised(pixels), **grounded(tokens)).itm_score

    def their_rank(pixels: Tensor, tokens: Tensor) -> Tensor:
        states = theirs.vision_model(pixel_values=normalised(pixels)).last_hidden_state.expand(len(tokens), -1, -1)
        found = theirs.text_encoder(**grounded(tokens), encoder_hidden_states=states).last_hidden_state
        return theirs.itm_head(found[:, 0])

    return {
        "ours": {"features": ours.image_features, "match": our_rank, "rank": our_rank},
        "transformers": {"features": their_features, "match": their_match, "rank": their_rank},
    }


# ---- what they are given


def bytes_and_tokens(config: BlipConfig, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Pictures of noise (B, 3, H, W) uint8, and texts (B, T) of natural lengths, padded to the longest."""
    pixels, tokens = pictures_and_texts(
        batch,
        config.image_size,
        config.context,
        start=config.start_token,
        end=config.end_token,
        words=(1, config.start_token),
        lengths=NATURAL,
    )
    return pixels.to(device), trim_padding(tokens, config.pad_token).to(device)


def prompts_of(config: BlipConfig, batch: int, device: str) -> Tensor:
    """[DEC] and "a picture of" (B, 4)."""
    words = [word % config.vocabulary for word in A_PICTURE_OF]
    return torch.tensor([[config.decode_token, *words]] * batch, device=device)


@functools.cache
def work(config: BlipConfig, tokens: int, parts: tuple[str, ...] = (), texts: int = 1) -> int:
    """FLOPs of one picture's forward pass and of `parts` of what comes with it: "alone" (one text of so many tokens
    by itself), "match" (`texts` that look at the picture), "write" (one that is predicted). It is what ours computes,
    with the picture's keys and values once, so that nobody's waste counts as work."""
    with torch.device("meta"):
        model = Blip(config)
        pixels = torch.empty(1, 3, config.image_size, config.image_size, dtype=torch.uint8)
        ids = torch.empty(texts, tokens, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            image_tokens = model.encode_image(pixels)
            if "alone" in parts:
                model.text_features(ids[:1])
            if "match" in parts or "write" in parts:
                seen = cross_attention_kv(model.text_encoder.layers, image_tokens, torch.zeros(texts, dtype=torch.long))
            if "match" in parts:
                model.match(ids, image_tokens, seen)
            if "write" in parts:
                states = model.text_decoder.states(ids[:1], None, seen=again(seen, None))
                model.text_decoder.logits(states)
    return counter.get_total_flops()


# ---- the sweeps


class BlipPlan(Plan):
    """BLIP's sweeps."""

    def _config(self, task: Callable[[BlipConfig], BlipConfig] = lambda config: config) -> BlipConfig:
        """The variant, without dropout; a published one at the sizes that a task fine-tunes it with."""
        config = VARIANTS[self._variant()]()
        config = task(config) if config.tokenizer == "bert-wordpiece" else config
        return replace(config, dropout=0.0, drop_path=0.0)

    def _variant(self) -> str:
        return self.variant or "blip-base"

    def _head(self, what: str, config: BlipConfig) -> str:
        return f"{what}: {self._variant()}, {config.image_size} px, {self.precision}"

    def _caption(self) -> Sweep:
        config = self._config(caption)
        models = functools.cache(lambda: captioners(config, self.device, DTYPES[self.precision]))

        def job(batch: int) -> Job:
            def run() -> list[dict]:
                pixels, _ = bytes_and_tokens(config, batch, self.device)
                prompts = prompts_of(config, batch, self.device)
                written: dict[str, Tensor] = {}

                def call(name: str) -> Tensor:
                    written[name] = without_gradients(models()[name], pixels, prompts)()
                    # rounding to bf16 makes ties among words, which two implementations break differently
                    return written[name] if self.precision == "fp32" else torch.tensor(written[name].shape)

                calls = {name: functools.partial(call, name) for name in models()}
                rows = self.race(calls, items=batch, unit="captions/s", at_least=self.on(0.2, 0.1))
                same = float((written["ours"] == written["transformers"]).double().mean())
                return [{"batch": batch, "new_tokens": NEW_TOKENS, "equal_tokens": same, **row} for row in rows]

            reading = NEW_TOKENS * self.on(0.05, 0.02)  # a token reads all weights from memory
            writing = 1.5 * (self.repeats + 1) * reading
            return Job(f"batch {batch}", 5 + self.expected(3 * batch * work(config, 1)) + writing, run)

        what = f"CAPTIONING, beam {BEAMS}, {NEW_TOKENS} new tokens"
        return Sweep("blip-caption", self._head(what, config), [job(batch) for batch in self._batches((1, 8), (1, 64))])

    def _step(self) -> Sweep:
        config = self._config()
        kinds = {  # what: (its steps, FLOPs a picture of the forward pass)
            "LM": (caption_steps, lambda tokens: work(config, tokens, ("write",))),
            "ITC, ITM and LM": (pretraining_steps, lambda tokens: self._three(config, tokens)),
        }

        def job(name: str, batch: int) -> Job:
            steps, forward = kinds[name]
            tokens = longest(batch, config.context)
            total = 3 * batch * forward(tokens)  # twice the forward's products again, for gradients

            def run() -> list[dict]:
                data = bytes_and_tokens(config, batch, self.device)
                calls = {
                    name: functools.partial(step, *data)
                    for name, step in steps(config, self.device, self.precision).items()
                }
                rows = self.race(calls, items=batch, unit="pictures/s", flops=total, training=True)
                return [{"batch": batch, "tokens": tokens, **row} for row in rows]

            setting = f"{name}, batch {batch}, captions of up to {tokens} tokens"
            return Job(setting, 15 + self.expected(3 * total), run)

        jobs = [job(name, batch) for name in kinds for batch in self._batches((4, 8), (32, 64))]
        return Sweep("blip-step", self._head("TRAINING STEP", config), jobs)

    @staticmethod
    def _three(config: BlipConfig, tokens: int) -> int:
        """One true and two false pairs to match; a third of the teacher's work, which is done once and not thrice."""
        return work(config, tokens, ("alone", "match", "write"), texts=3) + work(config, tokens, ("alone",)) // 3

    def _inference(self) -> Sweep:
        config = self._config(retrieval)
        models = functools.cache(lambda: matchers(config, self.device, DTYPES[self.precision]))

        def job(setting: str, what: str, batch: int, texts: int, total: int) -> Job:
            def run() -> list[dict]:
                pixels, _ = bytes_and_tokens(config, batch, self.device)
                _, tokens = bytes_and_tokens(config, texts, self.device)
                data = (pixels,) if what == "features" else (pixels, tokens)
                calls = {name: without_gradients(one[what], *data) for name, one in models().items()}
                items, unit = (batch, "pictures/s") if what == "features" else (texts, "texts/s")
                rows = self.race(calls, items=items, unit=unit, flops=total, at_least=self.on(0.2, 0.1))
                return [{"what": what, "batch": batch, "texts": texts, **row} for row in rows]

            return Job(setting, 4 + self.expected(3 * total), run)

        jobs = []
        for batch in self._batches((1, 8), (1, 64)):
            jobs.append(job(f"pictures to features, batch {batch}", "features", batch, batch, batch * work(config, 1)))
        tokens = longest(batch, config.context)
        total = batch * work(config, tokens, ("match",))
        jobs.append(job(f"matching {batch} pictures with a text each", "match", batch, batch, total))
        total = work(config, longest(RANKED, config.context), ("match",), RANKED)
        jobs.append(job(f"ranking {RANKED} texts of one picture", "rank", 1, RANKED, total))
        return Sweep("blip-inference", self._head("RETRIEVAL", config), jobs)

    def _batches(self, cpu: tuple[int, ...], cuda: tuple[int, ...]) -> tuple[int, ...]:
        return self.batches or self.on(cpu, cuda)
