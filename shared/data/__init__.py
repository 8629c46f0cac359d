"""Data: scenes with an exact graph, adapters for published formats, and worlds made of either.

`make_dataset` serves a claim with all it needs; `tasks` makes questions, statements, dialogues, episodes and puzzles.
"""

from shared.data.dataset import Composition, DatasetBundle, Split, make_dataset
from shared.data.images import PictureError, decode_image
from shared.data.readers import Coverage
from shared.data.seeded import SeededRandom, choose_by_hash, split_of
from shared.data.synthetic import tasks
from shared.data.synthetic.captions import caption, class_prompt, with_article
from shared.data.synthetic.samples import Dialogue, Episode, Pair, Puzzle, Question, Statement
from shared.data.synthetic.scenes import (
    COLOURS,
    Scene,
    SceneOptions,
    Thing,
    held_out_colours,
    render,
    render_many,
    sample_scene,
)
from shared.data.synthetic.sprites import Sprite, SpritePack, load_pack

__all__ = [
    "COLOURS",
    "Composition",
    "Coverage",
    "DatasetBundle",
    "Dialogue",
    "Episode",
    "Pair",
    "PictureError",
    "Puzzle",
    "Question",
    "Scene",
    "SceneOptions",
    "SeededRandom",
    "Split",
    "Sprite",
    "SpritePack",
    "Statement",
    "Thing",
    "caption",
    "choose_by_hash",
    "class_prompt",
    "decode_image",
    "held_out_colours",
    "load_pack",
    "make_dataset",
    "render",
    "render_many",
    "sample_scene",
    "split_of",
    "tasks",
    "with_article",
]
