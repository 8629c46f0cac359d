"""CapFilt (Sec. 3.3, Fig. 3) as stages: pre-train on web and clean pairs, fine-tune captioner and filter from that
model, each on its own, write a caption for every web picture, let the filter judge the web's texts and the written
ones, and train a new model on what is left and the clean pairs. Each stage is made once a seed, beside the arms."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from papers.blip.data import ExperimentData, Text, data_of
from papers.blip.encode import GenerationConfig, match_probability, tokens_of, write
from papers.blip.evidence.capfilt_page import Decision, read_lines, write_lines
from papers.blip.model import Blip, BlipPretraining, Objectives
from papers.blip.module import CAPTIONER, FILTER, PRETRAINING, BlipModule
from papers.blip.train import classifying_encoder, start_from
from shared.core.files import write_whole
from shared.core.paper_package import Context
from shared.core.recipe import digest
from shared.data.dataset import DatasetBundle
from shared.data.loader import Batches
from shared.experiments.effects import of_stage, stages_of, train_arm
from shared.experiments.stage_cache import StageCache
from shared.weights.load import save_weights
from shared.weights.safe_load import read_tensors

TUNED = {  # from the pre-trained model, on the clean pairs
    "captioner": CAPTIONER,
    "captioner-bare": CAPTIONER,  # without the prompt
    "filter": FILTER,
    "coupled": PRETRAINING,  # one model for both tasks (Table 4)
}
Search = Literal["nucleus", "beam"]


@dataclass(frozen=True)
class CapFilt:
    """The stages of one seed, for whichever arm asks first."""

    context: Context
    data: ExperimentData
    stages: StageCache

    @classmethod
    def of(cls, context: Context) -> CapFilt:
        data = data_of(context)
        return cls(context, data, stages_of(context, data.dataset.digest))

    # models

    def new_model(self, sharing: str = "all_but_sa") -> BlipPretraining:
        """As every arm of a seed begins: the same numbers, whatever was drawn before."""
        torch.manual_seed(self.context.seed)
        model = BlipPretraining(replace(self.data.config, sharing=sharing))
        if self.context.recipe.vision_steps and self.data.dataset.class_train is not None:
            start_from(model, read_tensors(self.stages.get_or_build("vision", self.make_vision) / "vision.safetensors"))
        return model

    def make_vision(self, folder: Path) -> None:
        encoder = classifying_encoder(self.data, self.context.recipe, self.context.seed)
        save_weights(encoder, folder / "vision.safetensors")

    def pretrained(self) -> tuple[BlipPretraining, dict]:
        """The model that saw all web and clean pairs, and how its training went."""

        def train(folder: Path) -> tuple[BlipPretraining, dict]:
            model = self.new_model()
            return model, self.train(model, [*self.data.web, *self.data.clean], folder, "pretrained")

        return self.stages.model("pretrained", lambda: BlipPretraining(self.data.config), train)

    def tuned(self, name: str) -> tuple[BlipPretraining, dict]:
        """Captioner, filter, or both in one, fine-tuned on the clean pairs."""

        def train(folder: Path) -> tuple[BlipPretraining, dict]:
            model, _ = self.pretrained()
            recipe = self.context.recipe
            prompt = "" if name == "captioner-bare" else recipe.prompt
            return model, self.train(
                model, self.data.clean, folder, name, TUNED[name], recipe.finetune_steps, recipe.finetune_rate, prompt
            )

        return self.stages.model(name, lambda: BlipPretraining(self.data.config), train)

    def train(
        self,
        model: BlipPretraining,
        texts: Sequence[Text],
        folder: Path,
        name: str,
        objectives: Objectives = PRETRAINING,
        steps: int | None = None,
        rate: float | None = None,
        prompt: str = "",
    ) -> dict:
        """-> `curves` by samples seen, and `waited`. The prompt belongs to the captioner's texts alone."""
        recipe = self.context.recipe
        # the filter is tuned as for retrieval, where all texts of a picture are its partners (official code)
        by_picture, rate = recipe.by_picture or objectives == FILTER, rate or recipe.learning_rate
        recipe = of_stage(recipe, steps or recipe.steps, pairs=len(texts), learning_rate=rate, by_picture=by_picture)
        prompt = prompt if objectives.lm and not objectives.itc else ""
        learned = len(GenerationConfig(prompt).prompt_tokens(self.data.tokenizer)) if prompt else 0
        module = BlipModule(model, recipe, objectives, learned).train()
        batches = Batches(self.data.tensors(texts, prompt), recipe.batch, recipe.steps, self.context.seed)
        of_texts = digest({"texts": [list(text) for text in texts]})
        identity = {"arm": name, "data": self.data.dataset.digest, "texts": of_texts}
        return train_arm(self.context, module, batches, identity, recipe, folder)

    # texts

    def generation(self, search: Search, prompt: str | None = None) -> GenerationConfig:
        recipe = self.context.recipe
        return GenerationConfig(
            recipe.prompt if prompt is None else prompt,
            recipe.beams,
            recipe.top_p if search == "nucleus" else None,
            recipe.longest,
            recipe.shortest,
            self.context.seed,
        )

    def written(self, by: str, search: Search) -> list[Text]:
        """One caption of each web picture."""

        def make(folder: Path) -> None:
            model, _ = self.tuned(by)
            rows = self.data.web_pictures
            prompt = "" if TUNED[by].itc else None  # the coupled model learned none
            dataset, generation = self.data.dataset, self.generation(search, prompt)
            captions = write(model.blip, self.data.tokenizer, dataset.train.images[rows], generation)
            texts = [[row, text, named(dataset, row, text)] for row, text in zip(rows, captions, strict=True)]
            write_whole(folder / "texts.json", json.dumps(texts))

        path = self.stages.get_or_build(f"written-by-{by}-{search}", make) / "texts.json"
        return [Text(*text) for text in json.loads(path.read_text())]

    def decisions(self, judge: str, origin: Literal["web", "written"], by: str = "", search: Search = "nucleus"):
        """What the filter says of the web's texts, or of those that `by` wrote. -> list[Decision]"""

        def make(folder: Path) -> None:
            model, _ = self.tuned(judge)
            texts = self.data.web if origin == "web" else self.written(by, search)
            write_lines(
                folder / "decisions.jsonl", judged(model.blip, self.data, texts, origin, self.context.recipe.threshold)
            )

        source = "web" if origin == "web" else f"{by}-{search}"
        return read_lines(self.stages.get_or_build(f"{source}-judged-by-{judge}", make) / "decisions.jsonl")

    def bootstrapped(self, by: str = "captioner", judge: str = "filter", search: Search = "nucleus") -> list[Decision]:
        """Captioner and filter together: all texts of the web pictures, each with the filter's decision."""
        return [*self.decisions(judge, "web"), *self.decisions(judge, "written", by, search)]


def judged(
    model: Blip, data: ExperimentData, texts: Sequence[Text], origin: str, threshold: float = 0.5
) -> list[Decision]:
    """A text of no words matches nothing."""
    rows = torch.tensor([text.picture for text in texts])
    tokens = tokens_of(data.tokenizer, [text.text for text in texts], data.config)
    match = match_probability(model, tokens, data.dataset.train.images[rows]).tolist()
    ids = data.dataset.train.ids
    match = [round(p, 4) if text.text.strip() else 0.0 for text, p in zip(texts, match, strict=True)]
    return [
        Decision(text.picture, ids[text.picture], origin, text.text, p, text.true, threshold)
        for text, p in zip(texts, match, strict=True)
    ]


def kept_of(decisions: Sequence[Decision]) -> list[Text]:
    return [Text(decision.picture, decision.text, decision.true) for decision in decisions if decision.kept]


def named(dataset: DatasetBundle, row: int, text: str) -> bool | None:
    """Of a scene of one thing: whether the text names it. Nobody knows of other pictures."""
    if dataset.train.noisy is None or not dataset.classes or int(dataset.train.labels[row]) < 0:
        return None
    name = dataset.classes[int(dataset.train.labels[row])]
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
