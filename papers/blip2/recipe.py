"""The keys of BLIP-2's recipes (recipes/blip2/*.yaml)."""

from __future__ import annotations

from dataclasses import dataclass, field

from papers.blip2.config import LANGUAGES
from shared.core.errors import UserError
from shared.data.recipe import EasySceneRecipe
from shared.data.synthetic.captions import KINDS

LAYERS = ("second-last", "last")
OPEN = ("what", "colour")  # kinds whose answers are words of the world, not a choice of two


@dataclass
class Blip2Recipe(EasySceneRecipe):
    """What BLIP-2's recipes have beside every paper's. `steps`, `batch` and `learning_rate` are those of stage 1."""

    weight_decay: float = 0.05
    beta2: float = 0.98
    eps: float = 1e-8
    min_learning_rate: float = 0.0  # where the cosine ends (5e-5 in stage 2)
    stage: int = 1  # what `python -m papers train blip2` trains
    bert_weights: str = ""  # what its stage 1 starts from: a file of bert-base-uncased; empty: fresh numbers
    stage1_weights: str = ""  # what its stage 2 starts from
    text_tokens: int = 32  # the most of a text in stage 2, prompt included (LAVIS, max_txt_len)
    by_picture: bool = False  # all texts of a picture are its partners (retrieval fine-tuning)

    encoder: str = "clip:vision"  # frozen; an artifact of another paper, or an encoder by name
    weak_encoder: str = "clip:vision steps=20"  # a weaker one of the same kind
    other_encoder: str = "efficientnet-lite0"  # and one of another kind, from its package
    layer: str = "second-last"  # whose output is taken, one of LAYERS
    cached: bool = True  # features computed once, before training; off: the encoder runs each step

    language_model: str = "small"  # of the ablations: trained here on texts of scenes, or by name
    headline_model: str = "smollm2-135m"  # of the headline; empty: the small one again
    small_width: int = 64  # of the small one
    small_layers: int = 2
    larger_width: int = 128  # of the larger of the two small ones
    larger_layers: int = 4
    lm_context: int = 288  # positions: of all patches of the paper's pictures, and a text
    lm_texts: int = 4_000  # each: a caption, and a question with its answer
    lm_steps: int = 300
    lm_batch: int = 32
    lm_rate: float = 2e-3
    asked_pictures: int = 100  # held-out ones, each with a question of every open kind
    kinds: list[str] = field(default_factory=lambda: ["what", "colour", "yes/no"])  # of questions, some of KINDS
    asked: float = 0.5  # share of stage 2's texts that are questions with answers; the others are captions

    queries: int = 0  # 0: as the model's variant has it
    dropout: float = -1.0  # below 0: likewise
    more: int = 4  # times so many in the arm of many queries
    stage2_steps: int = 100
    stage2_batch: int = 32
    stage2_rate: float = 1e-3
    stage2_min_rate: float = 0.0
    headline_seeds: int = 3  # of the seeds, the first: a real language model is dear
    headline_steps: int = 40  # steps, batch and rate of the headline's stage 2
    headline_batch: int = 16
    headline_rate: float = 1e-3
    headline_word_steps: int = 0  # of fitting its visual words to answers' embeddings first; 0: none, as in the paper
    headline_asked: float = 1.0  # share of its texts that are questions, of the open kinds alone
    headline_questions: int = 120  # held-out ones that the headline answers
    compared_steps: int = 20  # of the arm that runs encoder and cache side by side
    timed_passes: int = 3  # through the headline's language model, of each number of visual tokens
    timed_rows: int = 1  # pictures in a pass: as many as keep the device busy
    shots: int = 2  # answered questions before the one that is asked, in context
    beams: int = 5
    length_penalty: float = -1.0  # of answers (Sec. 4.1)
    longest: int = 10  # new tokens of an answer
    candidates: int = 8  # the best by contrast, which matching ranks anew

    def __post_init__(self) -> None:
        if self.stage not in (1, 2):
            raise UserError(f"recipe: stage is {self.stage}, but there are 1 and 2")
        for name in ("language_model", "headline_model"):
            if (named := getattr(self, name)) not in LANGUAGES and (named or name == "language_model"):
                raise UserError(f"recipe: {name} is one of {', '.join(LANGUAGES)}, not '{named}'")
        if self.layer not in LAYERS:
            raise UserError(f"recipe: layer is one of {', '.join(LAYERS)}, not '{self.layer}'")
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise UserError(f"recipe: kinds of questions are {', '.join(KINDS)}, not {', '.join(unknown)}")
        if not self.kinds or not 0 <= self.asked <= 1 or not 0 <= self.headline_asked <= 1:
            raise UserError("recipe: kinds must name one or more, and asked and headline_asked lie in 0..1")
        counts = (
            "headline_seeds", "stage2_steps", "stage2_batch", "headline_steps", "headline_batch",
            "headline_questions", "lm_steps", "compared_steps", "timed_passes", "timed_rows", "shots", "beams",
            "longest", "candidates", "more", "text_tokens", "asked_pictures", "small_width", "small_layers",
            "larger_width", "larger_layers", "lm_texts", "lm_batch", "lm_context",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"recipe: {name} is {getattr(self, name)}, but must be at least 1")
        if self.headline_word_steps < 0:
            raise UserError("recipe: headline_word_steps must not be negative")
        if self.headline_word_steps and not set(self.kinds) & set(OPEN):
            raise UserError(f"recipe: headline_word_steps needs kinds of questions with answers: {', '.join(OPEN)}")
        if self.dropout >= 1:
            raise UserError(f"recipe: dropout is {self.dropout}, but must lie below 1 (below 0: the model's own)")
        if self.queries < 0:
            raise UserError("recipe: queries must not be negative")
