"""What `python -m papers caption`, `ask` and `chat` need of BLIP-2: a frozen language model that is shown pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from papers.blip2.bundle import InferenceModel, load_inference_model
from papers.blip2.encode import ANSWERING, CAPTION, CAPTIONING, PROMPTS, GenerationConfig, device_of, tidy
from shared.core.errors import UserError
from shared.data.padding import pad_rows
from shared.inference.predict import Reply, Talk, Task
from shared.nn.generation import GenerationSettings, generate
from shared.weights.manifest import MANIFEST

TURN = "Question: {} Answer: {}."  # an answered question, before the next one (LAVIS, blip2_instructed_generation)
TALKING = GenerationConfig(longest=30)  # as LAVIS generates where nothing else is said
ASKED = re.compile(r"\s*question:.*answer:\s*", re.IGNORECASE | re.DOTALL)


def captioner(
    variant: str,
    weights: Path | None = None,
    tokenizer: Path | None = None,
    *,
    beams: int = CAPTIONING.beams,
    nucleus: float | None = None,
    seed: int = 0,
    prompt: str | None = None,
    manifest: Path = MANIFEST,
) -> Task:
    """Captions behind the prompt, by beam search or sampled from the nucleus. Weights trained here learned captions
    behind no prompt, and shorter ones."""
    talker = load_inference_model(variant, weights, tokenizer, manifest, "caption")
    how = replace(CAPTIONING, beams=beams, shortest=1 if talker.trained_here else CAPTIONING.shortest)
    prompt = prompt if prompt is not None else "" if talker.trained_here else CAPTION
    settings = how.settings(talker.words.stop, talker.model.language_model.kind)
    if nucleus is not None:
        settings = replace(settings, beams=1, sample=True, top_p=nucleus)
    asked = begun(talker, prompt)
    check_room(talker, asked, settings)
    generator = torch.Generator().manual_seed(seed)

    def answer(images: Tensor) -> list[str]:
        return [tidy(one) for one in written(talker, prefix_of(talker, images), asked, settings, generator)]

    return Task(answer, talker.model.config.vision.image_size, whole=True)


def answerer(
    variant: str,
    question: str,
    weights: Path | None = None,
    tokenizer: Path | None = None,
    *,
    answers: Sequence[str] | None = None,
    beams: int = ANSWERING.beams,
    manifest: Path = MANIFEST,
) -> Task:
    """Answers to one question about every picture: in the language model's own words, or the likeliest of `answers`.
    The question stands in the paper's prompt, unless it is written out as one: "Question: ... Answer:"."""
    if not question.strip():
        raise UserError("the question is empty; ask something, in quotes")
    talker = load_inference_model(variant, weights, tokenizer, manifest)
    asked = begun(talker, prompt_of(talker, question))
    settings = replace(ANSWERING, beams=beams).settings(talker.words.stop, talker.model.language_model.kind)
    check_room(talker, asked, settings)

    def answer(images: Tensor) -> list[str]:
        prefix = prefix_of(talker, images)
        if answers is None:
            return [tidy(one) for one in written(talker, prefix, asked, settings)]
        return [answers[place] for place in likelihoods(talker, prefix, asked, answers).argmax(1).tolist()]

    return Task(answer, talker.model.config.vision.image_size, whole=True)


def chatter(
    variant: str,
    weights: Path | None = None,
    tokenizer: Path | None = None,
    *,
    beams: int = TALKING.beams,
    manifest: Path = MANIFEST,
) -> Talk:
    """A dialogue about one picture. What was said stands before each question, by the language model's own template
    where the weights are released ones and it has one, else as the paper asks; its oldest turns go where the context is
    full."""
    talker = load_inference_model(variant, weights, tokenizer, manifest)
    how = ANSWERING if talker.trained_here else TALKING  # what was trained here learned short answers
    settings = replace(how, beams=beams).settings(talker.words.stop, talker.model.language_model.kind)

    def begin(image: Tensor) -> Callable[[str], Reply]:
        prefix = prefix_of(talker, image)  # (1, Q, W)
        said: list[tuple[str, str]] = []

        def reply(question: str) -> Reply:
            question = bare(question)
            turns = list(said)
            while len(asked := dialogue(talker, turns, question)) > room(talker, settings) and turns:
                turns.pop(0)
            check_room(talker, asked, settings)  # a question that is too long by itself ends nothing
            [text] = written(talker, prefix, asked, settings)
            if talker.trained_here:  # it never saw an answer behind another, as TURN writes them: the first is its own
                text = text.split(". ")[0]
            dropped = len(said) - len(turns)
            said[:] = [*turns, (question, tidy(text))]
            return Reply(said[-1][1], dropped)

        return reply

    return Talk(begin, talker.model.config.vision.image_size, whole=True)


# ---- prompts as tokens


def prompt_of(talker: InferenceModel, question: str) -> str:
    if ASKED.fullmatch(question):
        return question.strip()
    return PROMPTS[talker.model.language_model.kind].format(question.strip())


def bare(question: str) -> str:
    """A question without the paper's prompt around it."""
    found = re.fullmatch(r"\s*question:(.*?)(?:short )?answer:\s*", question, re.IGNORECASE | re.DOTALL)
    return (found[1] if found else question).strip()


def begun(talker: InferenceModel, prompt: str) -> list[int]:
    [tokens], _ = talker.words.prompts([prompt])
    return tokens.tolist()


def dialogue(talker: InferenceModel, turns: Sequence[tuple[str, str]], question: str) -> list[int]:
    """Answered questions and the one that is asked, as tokens."""
    if talker.chat is None:
        before = [TURN.format(asked, told) for asked, told in turns]
        return begun(talker, " ".join([*before, PROMPTS["causal"].format(question)]))
    messages = []
    for asked, told in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    return talker.words.encode(talker.chat([*messages, {"role": "user", "content": question}]))


def room(talker: InferenceModel, settings: GenerationSettings) -> int:
    """Tokens that a prompt may have: of a causal model's context, what the queries and the answer leave."""
    language = talker.model.language_model
    answer = settings.max_new_tokens if language.kind == "causal" else 0
    return language.context - talker.model.config.queries - answer


def check_room(talker: InferenceModel, asked: Sequence[int], settings: GenerationSettings) -> None:
    if len(asked) > (most := room(talker, settings)):
        raise UserError(
            f"a prompt of {len(asked)} tokens: beside the picture and an answer the language model's context has room "
            f"for {most}: shorten it"
        )


# ---- what the model says


@torch.inference_mode()
def prefix_of(talker: InferenceModel, images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) uint8 -> the visual words (B, Q, W)."""
    features = talker.encoder(images.to(talker.encoder.device))
    return talker.model.prefix(features.to(device_of(talker.model)))


@torch.inference_mode()
def written(
    talker: InferenceModel,
    prefix: Tensor,
    asked: Sequence[int],
    settings: GenerationSettings,
    generator: torch.Generator | None = None,
) -> list[str]:
    """What follows the same prompt behind each prefix (B, Q, W)."""
    tokens = torch.tensor([list(asked)] * len(prefix), dtype=torch.long, device=prefix.device)
    found = generate(talker.model.language_model.decoding(prefix), tokens, settings, generator=generator)
    return [talker.words.decode(one) for one in found.tokens]


@torch.inference_mode()
def likelihoods(talker: InferenceModel, prefix: Tensor, asked: Sequence[int], answers: Sequence[str]) -> Tensor:
    """The log-probability of each answer behind the prompt, its end token included. prefix (B, Q, W) -> (B, A)."""
    language, words, device = talker.model.language_model, talker.words, prefix.device
    causal = language.kind == "causal"
    rows = [[*words.encode(f" {one}" if causal else one), words.stop[0]] for one in answers]
    targets, said = (part.to(device) for part in pad_rows(rows, words.stop[0]))  # (A, U)
    prompt = torch.tensor([list(asked)] * len(rows), dtype=torch.long, device=device)  # (A, T)
    seen = torch.ones(len(rows), prefix.shape[1] + len(asked), dtype=torch.bool, device=device)
    found = []
    for one in prefix:
        x = torch.cat([one.expand(len(rows), -1, -1), language.embed(prompt).to(one.dtype)], dim=1)
        if causal:  # the slot before says each token of the answer
            longer = torch.cat([x, language.embed(targets[:, :-1]).to(one.dtype)], dim=1)
            states = language.states(longer, torch.cat([seen, said[:, :-1]], dim=1))[:, x.shape[1] - 1 :]
        else:
            states = language.states(x, seen, targets)
        logits = language.logits(states[said])  # (P, V)
        gained = logits.gather(1, targets[said][:, None])[:, 0] - logits.logsumexp(1)
        found.append(torch.zeros(targets.shape, device=device).masked_scatter(said, gained).sum(1))
    return torch.stack(found)
