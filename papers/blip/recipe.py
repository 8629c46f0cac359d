"""The keys of BLIP's recipes (recipes/blip/*.yaml)."""

from __future__ import annotations

from dataclasses import dataclass

from shared.core.errors import UserError
from shared.data.recipe import EasySceneRecipe


@dataclass
class BlipRecipe(EasySceneRecipe):
    """What BLIP's recipes have beside every paper's."""

    weight_decay: float = 0.05  # of every parameter, as in the official code
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0  # what the learning rate is multiplied by after each epoch (0.85 in Sec. 4.1); 0: cosine
    min_learning_rate: float = 0.0  # where it ends (1e-6 in pre-training)
    alpha: float = 0.4  # the momentum model's share in the targets of ITC
    alpha_ramp: int = 0  # steps over which it rises from 0
    by_picture: bool = False  # all texts of a picture are its partners (retrieval fine-tuning)
    queue: int = 0  # features of each kind that ITC contrasts with; 0: as the model's variant has it
    momentum: float = 0.0  # of the momentum copies; 0: as the model's variant has it
    temperature: float = 0.0  # where ITC's begins; 0: as the model's variant has it

    clean: int = 200  # of the pairs, those whose captions are right, as COCO's are; the others are the web
    clean_by: str = "first"  # of a published set: the first pictures, those with plain "titles", or a file of their ids
    caption_noise: float = 0.25  # share of the web's captions that belong to another picture (scenes)

    vision_steps: int = (
        0  # of a classifier whose image encoder all models start from, as the paper's from DeiT; 0: none
    )
    vision_rate: float = 2e-3  # its learning rate
    finetune_steps: int = 50  # of captioner and filter, each
    finetune_rate: float = 5e-4  # their learning rate
    threshold: float = 0.5  # of the filter: a text is kept whose match is at least so probable
    prompt: str = "a picture of"  # before every caption that the captioner learns or writes
    beams: int = 3
    top_p: float = 0.9  # of nucleus sampling
    longest: int = 20  # tokens of a written caption at most, [DEC] and the prompt among them
    shortest: int = 5  # and at least
    longer: float = 1.6  # times the steps of the arm that trains longer (24.7M over 15.3M texts, Table 12)
    candidates: int = 8  # the best by contrast, which matching ranks anew

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.alpha_ramp < 0:
            raise UserError("recipe: alpha must lie in 0..1, and alpha_ramp must not be negative")
        if not 0 <= self.decay <= 1 or not 0 <= self.momentum < 1 or self.queue < 0:
            raise UserError("recipe: decay lies in 0..1, momentum below 1, and queue must not be negative")
        if not 0 < self.threshold < 1:
            raise UserError("recipe: threshold must lie between 0 and 1")
        if not 0 < self.top_p <= 1 or self.beams < 1 or not 0 <= self.shortest <= self.longest:
            raise UserError("recipe: top_p lies in 0..1, beams is at least 1, shortest no more than longest")
        if min(self.finetune_steps, self.candidates, self.clean) < 1 or self.longer < 1:
            raise UserError("recipe: finetune_steps, candidates, clean and longer must be at least 1")
