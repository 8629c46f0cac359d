"""Published benchmarks of several papers in their own layouts: NoCaps, VisDial, MSR-VTT and MSRVTT-QA.

A picture or frame is read when it is asked for. Whatever a file lacks is a UserError that names the file and the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.core.archives import leads_out
from shared.core.errors import UserError
from shared.core.text import shown
from shared.data.images import SUFFIXES
from shared.data.json_rows import json_rows, read_json, rows_of
from shared.data.readers import Record


@dataclass(frozen=True)
class Round:
    """One question of a dialogue: candidate answers, and which of them a human gave."""

    question: str
    candidates: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Talk:
    """A dialogue about a picture (Das et al. 2017): its caption, then rounds in their order."""

    picture: Record
    caption: str
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Clip:
    """A video as the files of its frames, in order, and its sentence."""

    id: str
    frames: tuple[Path, ...]
    caption: str


@dataclass(frozen=True)
class AskedClip:
    clip: Clip
    question: str
    answer: str


def nocaps_records(root: Path, split: str = "val") -> list[tuple[Record, str]]:
    """(picture, its domain: in-domain, near-domain or out-domain) of nocaps_<split>.json, the official images with
    file_name, id and domain; pictures in root/<split>/ or root/."""
    path = root / f"nocaps_{split}.json"
    found = []
    for row in json_rows(path, "images"):
        file = row("file_name", str)
        base = root / split if (root / split / file).is_file() else root
        read = row.picture(base, file).read
        found.append((Record(str(row.values.get("id", file)), read), str(row.values.get("domain", ""))))
    return found


def visdial_talks(root: Path, split: str = "val") -> list[Talk]:
    """visdial_1.0_<split>.json (v1.0), pictures in root/VisualDialog_<split>2018/."""
    path = root / f"visdial_1.0_{split}.json"
    content = read_json(path)
    data = content.get("data") if isinstance(content, dict) else None
    questions, answers, dialogs = (
        rows_of(data.get(name) if isinstance(data, dict) else None, path, name)
        for name in ("questions", "answers", "dialogs")
    )
    talks = []
    for row in dialogs:
        dialog = row.values
        try:
            number = int(dialog["image_id"])
            rounds = tuple(
                Round(
                    questions[turn["question"]].values,
                    tuple(answers[place].values for place in turn["answer_options"]),
                    int(turn["gt_index"]),
                )
                for turn in dialog["dialog"]
            )
            caption = str(dialog["caption"])
        except (KeyError, IndexError, TypeError, ValueError) as wrong:
            raise row.wrong(f"{type(wrong).__name__} {shown(wrong, 60)}, not VisDial v1.0 with answers") from None
        name = f"VisualDialog_{split}2018_{number:012d}.jpg"
        picture = Record(str(number), (root / f"VisualDialog_{split}2018" / name).read_bytes)
        talks.append(Talk(picture, caption, rounds))
    return talks


def msrvtt_clips(root: Path) -> list[Clip]:
    """The 1,000 test clips of msrvtt_test.jsonl (clip_name, caption), their frames in root/frames/<clip_name>/."""
    path = root / "msrvtt_test.jsonl"
    return [
        Clip(row("clip_name", str), _frames(root, row("clip_name", str)), row("caption", str))
        for row in json_rows(path)
    ]


def msrvtt_questions(root: Path) -> list[AskedClip]:
    """test_qa.json of MSRVTT-QA (question, answer, video_id), frames in root/frames/video<video_id>/."""
    path = root / "test_qa.json"
    asked = []
    for row in rows_of(read_json(path), path, "questions"):
        question, answer = row("question", str), row("answer", str)
        name = f"video{row.values.get('video_id')}"
        asked.append(AskedClip(Clip(name, _frames(root, name), ""), question, answer))
    return asked


def _frames(root: Path, name: str) -> tuple[Path, ...]:
    if leads_out(name):
        raise UserError(f"MSR-VTT: clip name '{shown(name)}' leads out of the folder; mend the file")
    folder = root / "frames" / name
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not found:
        raise UserError(
            f"{folder}: no frames of this clip; write them there: ffmpeg -i {name}.mp4 -q:v 2 {folder}/%05d.jpg"
        )
    return tuple(found)
