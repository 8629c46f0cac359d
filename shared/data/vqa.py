"""Published sets of questions and statements about pictures, in their own files: VQAv2, OK-VQA, GQA, NLVR2, SNLI-VE,
RefCOCO+.

A picture is read when it is asked for. What a file lacks is a UserError that names the file and the row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.core.errors import UserError
from shared.core.text import shown
from shared.data.json_rows import Row, json_rows, read_json
from shared.data.readers import Record

Box = tuple[float, float, float, float]  # left, top, width, height in pixels

VQA_PARTS = {"train": "train2014", "val": "val2014", "test-dev": "test-dev2015", "test-std": "test2015"}
NLVR2_FILES = {"train": "train", "dev": "dev", "test-P": "test1"}
ENTAILMENT_FILES = {"train": "train", "val": "dev", "test": "test"}
VERDICTS = ("contradiction", "neutral", "entailment")  # in the order of ALBEF's classes (dataset/ve_dataset.py)


@dataclass(frozen=True)
class AskedPicture:
    """A question of VQAv2 (Goyal et al. 2017) or OK-VQA (Marino et al. 2019), with the ten answers of the annotators, a
    test question with none; or of GQA (Hudson and Manning 2019), with one."""

    id: int
    picture: Record
    question: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class JudgedPair:
    """A sentence that is true or false of two pictures (NLVR2, Suhr et al. 2019)."""

    id: str
    pictures: tuple[Record, Record]  # left, right
    sentence: str
    label: bool


@dataclass(frozen=True)
class JudgedPicture:
    """A hypothesis about a picture (SNLI-VE, Xie et al. 2019); label: one of VERDICTS."""

    id: str
    picture: Record
    hypothesis: str
    label: str


@dataclass(frozen=True)
class Referred:
    """An expression for one thing of a picture (RefCOCO+, Yu et al. 2016), its box, and what a detector proposes."""

    id: int
    picture: Record
    size: tuple[int, int]  # width, height
    expression: str
    box: Box
    proposals: tuple[Box, ...]


# --- VQAv2


def vqa_questions(root: str | Path, split: str) -> list[AskedPicture]:
    """`train`, `val`, `test-dev` or `test-std`: v2_OpenEnded_mscoco_<part>_questions.json and, but for the test parts,
    v2_mscoco_<part>_annotations.json in root; pictures in root/train2014, root/val2014 and root/test2015."""
    root, part = Path(root), _known(split, VQA_PARTS, "VQAv2")
    test = part.startswith("test")
    marked = None if test else root / f"v2_mscoco_{part}_annotations.json"
    return _asked(root, f"v2_OpenEnded_mscoco_{part}_questions.json", marked, "test2015" if test else part)


def okvqa_questions(root: str | Path, split: str) -> list[AskedPicture]:
    """`train` or `test`, on MSCOCO's train2014 and val2014: OpenEnded_mscoco_<part>_questions.json and
    mscoco_<part>_annotations.json (v1.1) in root; pictures in root/<part>."""
    root, part = Path(root), _known(split, {"train": "train2014", "test": "val2014"}, "OK-VQA")
    return _asked(root, f"OpenEnded_mscoco_{part}_questions.json", root / f"mscoco_{part}_annotations.json", part)


def _asked(root: Path, questions: str, marked: Path | None, images: str) -> list[AskedPicture]:
    """Questions and, where `marked` names them, their answers, in the files of the VQA challenge."""
    rows = json_rows(root / questions, "questions")
    answers: dict[int, tuple[str, ...]] = {}
    if marked is not None:
        for row in json_rows(marked, "annotations"):
            answers[row("question_id", int)] = tuple(_answer(answer, row) for answer in row("answers", list))
    found = []
    for row in rows:
        number, image = row("question_id", int), row("image_id", int)
        if marked is not None and number not in answers:
            raise row.wrong(f"question {number} has no answers in {marked.name}")
        picture = row.picture(root / images, f"COCO_{images}_{image:012d}.jpg")
        found.append(AskedPicture(number, picture, row("question", str), answers.get(number, ())))
    return found


GQA_FILES = {"val": "val_balanced", "test-dev": "testdev_balanced"}


def gqa_questions(root: str | Path, split: str) -> list[AskedPicture]:
    """`val` or `test-dev`, balanced: <part>_questions.json, {number: {question, imageId, answer}}, in root or
    root/questions; pictures in root/images."""
    root, part = Path(root), _known(split, GQA_FILES, "GQA")
    path = _first(root / f"{part}_questions.json", root / "questions" / f"{part}_questions.json")
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: no mapping of questions in it; put the published file there")
    found = []
    for place, (number, values) in enumerate(content.items(), 1):
        row = Row(values, path, place)
        if not number.isdigit():
            raise row.wrong(f"question number '{shown(number, 40)}'")
        picture = row.picture(root / "images", f"{row('imageId', str)}.jpg")
        found.append(AskedPicture(int(number), picture, row("question", str), (row("answer", str),)))
    return found


def answer_list(path: str | Path) -> list[str]:
    """The answers that VQA is ranked over: a JSON list of different texts, such as ALBEF's answer_list.json."""
    path = Path(path)
    answers = read_json(path)
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{path}: no list of answers; it needs a JSON list of texts, as ALBEF's answer_list.json")
    for place, answer in enumerate(answers, 1):
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(f"{path}: answer {place} is {shown(answer, 60)}; it needs a text")
    if len(set(answers)) < len(answers):
        twice = next(answer for answer in answers if answers.count(answer) > 1)
        raise UserError(f"{path}: '{shown(twice, 60)}' stands there twice; each answer once")
    return answers


def write_vqa_results(path: str | Path, answers: Mapping[int, str]) -> None:
    """What the official server scores: [{"question_id": ..., "answer": ...}, ...], by question."""
    from shared.core.files import write_whole

    rows = [{"question_id": number, "answer": answers[number]} for number in sorted(answers)]
    write_whole(Path(path), json.dumps(rows, ensure_ascii=False))


# --- NLVR2


def nlvr2_pairs(root: str | Path, split: str) -> list[JudgedPair]:
    """`train`, `dev` or `test-P`: train.json, dev.json, test1.json (JSON lines) in root or root/data; pictures in
    root/dev, root/test1, root/train/<directory>, or those under root/images."""
    root, name = Path(root), _known(split, NLVR2_FILES, "NLVR2")
    path = _first(root / f"{name}.json", root / "data" / f"{name}.json")
    folder = _first(root / name, root / "images" / name)
    found = []
    for row in json_rows(path):
        identifier, label = row("identifier", str), row("label", str)
        if label not in ("True", "False"):
            raise row.wrong(f"label is '{shown(label, 40)}', True or False expected")
        stem = identifier.rpartition("-")[0]  # the last number counts the sentences of a pair
        where = folder / str(row("directory", int)) if name == "train" else folder
        left, right = (row.picture(where, f"{stem}-img{side}.png") for side in (0, 1))
        found.append(JudgedPair(identifier, (left, right), row("sentence", str), label == "True"))
    return found


# --- SNLI-VE


def entailment_rows(root: str | Path, split: str) -> list[JudgedPicture]:
    """`train`, `val` or `test`: snli_ve_train.jsonl, _dev, _test in root; Flickr30k's pictures in root/flickr30k_images
    or root/flickr30k-images."""
    root, name = Path(root), _known(split, ENTAILMENT_FILES, "SNLI-VE")
    folder = _first(root / "flickr30k_images", root / "flickr30k-images")
    found = []
    for row in json_rows(root / f"snli_ve_{name}.jsonl"):
        label = row("gold_label", str)
        if label not in VERDICTS:
            raise row.wrong(f"gold_label is '{shown(label, 40)}', one of {', '.join(VERDICTS)} expected")
        picture = row.picture(folder, f"{row('Flickr30K_ID', str).removesuffix('.jpg')}.jpg")
        found.append(JudgedPicture(row("pairID", str), picture, row("sentence2", str), label))
    return found


# --- RefCOCO+


def referred_things(root: str | Path, split: str) -> list[Referred]:
    """`val`, `testA` or `testB`, one row a sentence: refs.json (the published list refs(unc).p, written as JSON),
    instances.json and dets.json ({image: boxes}) in root; pictures in root/train2014."""
    root = Path(root)
    _known(split, {"val": "", "testA": "", "testB": ""}, "RefCOCO+")
    if not (root / "refs.json").is_file() and (root / "refs(unc).p").is_file():
        raise UserError(
            f"{root / 'refs(unc).p'}: a pickle may run code, so none is read here; write its list to refs.json beside "
            "it, with json.dump, where you trust it"
        )
    instances = root / "instances.json"
    boxes = {row("id", int): _box(row("bbox", list), row) for row in json_rows(instances, "annotations")}
    images = {row("id", int): row for row in json_rows(instances, "images")}
    detected = read_json(root / "dets.json")
    if not isinstance(detected, dict):
        raise UserError(f"{root / 'dets.json'}: not a mapping of image to boxes; put the published file there")
    found = []
    for row in json_rows(root / "refs.json"):
        if row("split", str) != split:
            continue
        image, thing = row("image_id", int), row("ann_id", int)
        if image not in images or thing not in boxes:
            raise row.wrong(f"image {image} or annotation {thing} is not in {instances.name}")
        image_row = images[image]
        picture = image_row.picture(root / "train2014", image_row("file_name", str))
        proposals = tuple(_box(box, row) for box in detected.get(str(image), ()))
        if not proposals:
            raise row.wrong(f"image {image} has no boxes in dets.json")
        size = image_row("width", int), image_row("height", int)
        for sentence in row("sentences", list):
            if not isinstance(sentence, dict) or not str(sentence.get("sent", "")).strip():
                raise row.wrong("a sentence without text")
            found.append(Referred(row("ref_id", int), picture, size, sentence["sent"], boxes[thing], proposals))
    if not found:
        raise UserError(f"{root / 'refs.json'}: no row of split {split}; put the published list there")
    return found


# --- reading


def _answer(answer: Any, row: Row) -> str:
    if not isinstance(answer, dict) or not isinstance(answer.get("answer"), str):
        raise row.wrong("an answer without text")
    return answer["answer"]


def _box(values: Any, row: Row) -> Box:
    numbers = values[:4] if isinstance(values, list) else ()
    if len(numbers) < 4 or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        raise row.wrong("a box that is not left, top, width, height")
    left, top, width, height = map(float, numbers)
    return left, top, width, height


def _known(split: str, names: Mapping[str, str], what: str) -> str:
    if split not in names:
        raise UserError(f"{what} has no split {split!r}: choose {', '.join(names)}")
    return names[split]


def _first(*places: Path) -> Path:
    """The first that is there, or the first of all."""
    return next((place for place in places if place.exists()), places[0])
