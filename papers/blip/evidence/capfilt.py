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
import torch.nn.functional as F

from papers.blip.data import ExperimentData, Text, data_of
from papers.blip.encode import GenerationConfig, match_probability, tokens_of, write
from papers.blip.evidence.capfilt_page import Decision, read_lines, write_lines
from papers.blip.model import Blip, BlipPretraining, Objectives, picture_tokens, vision_encoder
from papers.blip.module import CAPTIONER, FILTER, PRETRAINING, BlipModule
from papers.blip.recipe import BlipRecipe
from shared.core.device import device_for
from shared.core.files import write_whole
from shared.core.paper_package import Context
from shared.core.recipe import digest, training_fields
from shared.data.dataset import DatasetBundle
from shared.data.loader import Batches
from shared.experiments.stage_cache import StageCache
from shared.training.callbacks import MetricRecorder
from shared.training.trainer import fit
from shared.weights.load import load_weights, save_weights
from shared.weights.safe_load import read_tensors

TUNED = {  # from the pre-trained model, on the clean pairs
    "captioner": CAPTIONER,
    "captioner-bare": CAPTIONER,  # without the prompt
    "filter": FILTER,
    "coupled": PRETRAINING,  # one model for both tasks (Table 4)
}
How = Literal["nucleus", "beam"]


@dataclass(frozen=True)
class CapFilt:
    """The stages of one seed, for whichever arm asks first."""

    context: Context
    data: ExperimentData
    stages: StageCache

    @classmethod
    def of(cls, context: Context) -> CapFilt:
        data = data_of(context)
        key = f"{context.seed}-{digest(training_fields(context.recipe))}-{data.dataset.digest[:12]}"
        return cls(context, data, StageCache(context.folder.parent / "stages" / key, context.seed))

    # models

    def new_model(self, sharing: str = "all_but_sa") -> BlipPretraining:
        """As every arm of a seed begins: the same numbers, whatever was drawn before."""
        torch.manual_seed(self.context.seed)
        model = BlipPretraining(replace(self.data.config, sharing=sharing))
        if self.context.recipe.vision_steps and self.data.labelled:
            start_from(model, read_tensors(self.vision() / "vision.safetensors"))
        return model

    def vision(self) -> Path:
        def make(folder: Path) -> None:
            encoder = classifying_encoder(self.data, self.context.recipe, self.context.seed)
            save_weights(encoder, folder / "vision.safetensors")

        return self.stages.get_or_build("vision", make)

    def pretrained(self) -> tuple[BlipPretraining, dict]:
        """The model that saw all web and clean pairs, and how its training went."""

        def make(folder: Path) -> None:
            model = self.new_model()
            told = self.train(model, [*self.data.web, *self.data.clean], folder, "pretrained")
            keep(model, folder, told)

        return self.loaded(self.stages.get_or_build("pretrained", make))

    def tuned(self, name: str) -> tuple[BlipPretraining, dict]:
        """Captioner, filter, or both in one, fine-tuned on the clean pairs."""

        def make(folder: Path) -> None:
            model, _ = self.pretrained()
            recipe = self.context.recipe
            told = self.train(
                model, self.data.clean, folder, name, TUNED[name], recipe.finetune_steps, recipe.finetune_rate,
                "" if name == "captioner-bare" else recipe.prompt,
            )  # fmt: skip
            keep(model, folder, told)

        return self.loaded(self.stages.get_or_build(name, make))

    def loaded(self, folder: Path) -> tuple[BlipPretraining, dict]:
        model = BlipPretraining(self.data.config)
        load_weights(model, folder / "weights.safetensors")
        return model.eval(), json.loads((folder / "training.json").read_text())

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
        recipe = recipe_for(self.context.recipe, len(texts), steps, rate)
        # the filter is tuned as for retrieval, where all texts of a picture are its partners (official code)
        recipe = replace(recipe, by_picture=recipe.by_picture or objectives == FILTER)
        prompt = prompt if objectives.lm and not objectives.itc else ""
        learned = len(GenerationConfig(prompt).prompt_tokens(self.data.tokenizer)) if prompt else 0
        module = BlipModule(model, recipe, objectives, learned).train()
        batches = Batches(self.data.tensors(texts, prompt), recipe.batch, recipe.steps, self.context.seed)
        curves = MetricRecorder(recipe.batch, self.context.progress)
        identity = {"arm": name, "seed": self.context.seed, "data": self.data.dataset.digest, "texts": digest_of(texts)}
        waited = fit(module, batches, recipe, folder, [curves], identity)
        return {"curves": curves.values, "waited": round(waited, 5)}

    # texts

    def writing(self, how: How, prompt: str | None = None) -> GenerationConfig:
        recipe = self.context.recipe
        return GenerationConfig(
            recipe.prompt if prompt is None else prompt,
            recipe.beams,
            recipe.top_p if how == "nucleus" else None,
            recipe.longest,
            recipe.shortest,
            self.context.seed,
        )

    def written(self, by: str, how: How) -> list[Text]:
        """One caption of each web picture."""

        def make(folder: Path) -> None:
            model, _ = self.tuned(by)
            rows = self.data.web_pictures
            prompt = "" if TUNED[by].itc else None  # the coupled model learned none
            said = write(
                model.blip, self.data.tokenizer, self.data.dataset.train.images[rows], self.writing(how, prompt)
            )
            texts = [[row, text, named(self.data.dataset, row, text)] for row, text in zip(rows, said, strict=True)]
            write_whole(folder / "texts.json", json.dumps(texts))

        path = self.stages.get_or_build(f"written-by-{by}-{how}", make) / "texts.json"
        return [Text(*one) for one in json.loads(path.read_text())]

    def decisions(self, judge: str, origin: Literal["web", "written"], by: str = "", how: How = "nucleus"):
        """What the filter says of the web's texts, or of those that `by` wrote. -> list[Decision]"""

        def make(folder: Path) -> None:
            model, _ = self.tuned(judge)
            texts = self.data.web if origin == "web" else self.written(by, how)
            write_lines(
                folder / "decisions.jsonl", judged(model.blip, self.data, texts, origin, self.context.recipe.threshold)
            )

        source = "web" if origin == "web" else f"{by}-{how}"
        return read_lines(self.stages.get_or_build(f"{source}-judged-by-{judge}", make) / "decisions.jsonl")

    def bootstrapped(self, by: str = "captioner", judge: str = "filter", how: How = "nucleus") -> list[Decision]:
        """Captioner and filter together: all texts of the web pictures, each with the filter's decision."""
        return [*self.decisions(judge, "web"), *self.decisions(judge, "written", by, how)]


def recipe_for(recipe: BlipRecipe, texts: int, steps: int | None, rate: float | None) -> BlipRecipe:
    """The recipe of one training of a seed's: so many texts and steps, the warm-up no longer than a fifth of them."""
    steps = steps or recipe.steps
    return replace(
        recipe,
        pairs=texts,
        steps=steps,
        learning_rate=rate or recipe.learning_rate,
        warmup_steps=min(recipe.warmup_steps, max(1, steps // 5)),
    )


def classifying_encoder(data: ExperimentData, recipe: BlipRecipe, seed: int) -> torch.nn.Module:
    """An image encoder that learned to tell labelled pictures apart, one linear head a kind of label."""
    images, labels = data.labelled
    device = device_for(recipe)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    encoder = vision_encoder(data.config).to(device)
    heads = torch.nn.ModuleList(torch.nn.Linear(encoder.width, int(kind.max()) + 1) for kind in labels.T).to(device)
    steps, rate = recipe.vision_steps, recipe.vision_rate
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *heads.parameters()], lr=rate, betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(len(images), (2 * recipe.batch,), generator=generator)
        seen = picture_tokens(encoder, images[rows].to(device))[:, 0]
        wanted = labels[rows].to(device).T
        loss = sum(F.cross_entropy(head(seen), kind, ignore_index=-1) for head, kind in zip(heads, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder.cpu()


def start_from(model: BlipPretraining, vision: dict[str, torch.Tensor]) -> None:
    """Put a trained image encoder into a new model, and into its momentum copy."""
    model.blip.vision_encoder.load_state_dict(vision, strict=True)
    model.momentum.vision_encoder.load_state_dict(vision, strict=True)


def judged(
    model: Blip, data: ExperimentData, texts: Sequence[Text], origin: str, threshold: float = 0.5
) -> list[Decision]:
    """A text of no words matches nothing."""
    rows = torch.tensor([text.picture for text in texts])
    tokens = tokens_of(data.tokenizer, [text.text for text in texts], data.config)
    match = match_probability(model, tokens, data.dataset.train.images[rows]).tolist()
    ids = data.dataset.train.ids
    return [
        Decision(
            one.picture,
            ids[one.picture],
            origin,
            one.text,
            round(p, 4) if one.text.strip() else 0.0,
            one.true,
            threshold,
        )
        for one, p in zip(texts, match, strict=True)
    ]


def kept_of(decisions: Sequence[Decision]) -> list[Text]:
    return [Text(one.picture, one.text, one.true) for one in decisions if one.kept]


def named(dataset: DatasetBundle, row: int, text: str) -> bool | None:
    """Of a scene of one thing: whether the text names it. Nobody knows of other pictures."""
    if dataset.train.noisy is None or not dataset.classes or int(dataset.train.labels[row]) < 0:
        return None
    name = dataset.classes[int(dataset.train.labels[row])]
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def keep(model: BlipPretraining, folder: Path, told: dict) -> None:
    save_weights(model, folder / "weights.safetensors")
    write_whole(folder / "training.json", json.dumps(told))


def digest_of(texts: Sequence[Text]) -> str:
    return digest({"texts": [list(text) for text in texts]})
