"""Published benchmarks of several papers in their own layouts: NoCaps, VisDial, MSR-VTT and MSRVTT-QA.

A picture or frame is read when it is asked for. Whatever a file lacks is a UserError that names the file and the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.core.archives import leads_out
from shared.core.errors import UserError
from shared.core.text import shown
from shared.data.images import SUFFIXES
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
    for row, image in enumerate(_rows(_json(path), "images", path)):
        file = _field(image, "file_name", str, path, row)
        base = root / split if (root / split / file).is_file() else root
        found.append((Record(str(image.get("id", file)), _reader(base, file, path)), str(image.get("domain", ""))))
    return found


def visdial_talks(root: Path, split: str = "val") -> list[Talk]:
    """visdial_1.0_<split>.json (v1.0), pictures in root/VisualDialog_<split>2018/."""
    path = root / f"visdial_1.0_{split}.json"
    data = _json(path).get("data", {})
    questions, answers = (_rows(data, name, path) for name in ("questions", "answers"))
    talks = []
    for row, dialog in enumerate(_rows(data, "dialogs", path)):
        try:
            number = int(dialog["image_id"])
            rounds = tuple(
                Round(
                    questions[one["question"]],
                    tuple(answers[place] for place in one["answer_options"]),
                    int(one["gt_index"]),
                )
                for one in dialog["dialog"]
            )
            caption = str(dialog["caption"])
        except (KeyError, IndexError, TypeError, ValueError) as wrong:
            raise UserError(
                f"{path}: dialog {row}: {type(wrong).__name__} {shown(wrong, 60)}; it is not VisDial v1.0 with answers"
            ) from None
        name = f"VisualDialog_{split}2018_{number:012d}.jpg"
        picture = Record(str(number), _reader(root / f"VisualDialog_{split}2018", name, path))
        talks.append(Talk(picture, caption, rounds))
    return talks


def msrvtt_clips(root: Path) -> list[Clip]:
    """The 1,000 test clips of msrvtt_test.jsonl (clip_name, caption), their frames in root/frames/<clip_name>/."""
    path = root / "msrvtt_test.jsonl"
    clips = []
    for row, line in enumerate(_text(path).split("\n")):
        if line.strip():
            values = _parsed(line, f"{path}: line {row + 1}")
            name = _field(values, "clip_name", str, path, row)
            clips.append(Clip(name, _frames(root, name), _field(values, "caption", str, path, row)))
    if not clips:
        raise UserError(f"{path}: no clips in it; it needs lines with clip_name and caption")
    return clips


def msrvtt_questions(root: Path) -> list[AskedClip]:
    """test_qa.json of MSRVTT-QA (question, answer, video_id), frames in root/frames/video<video_id>/."""
    path = root / "test_qa.json"
    asked = []
    for row, values in enumerate(_rows({"questions": _json(path)}, "questions", path)):
        name = f"video{values.get('video_id') if isinstance(values, dict) else None}"
        question, answer = (_field(values, key, str, path, row) for key in ("question", "answer"))
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


def _reader(folder: Path, file: str, source: Path) -> Callable[[], bytes]:
    if leads_out(file):
        raise UserError(f"{source}: picture '{shown(file)}' leads out of the folder; mend the file")
    return (folder / file).read_bytes


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as wrong:
        reason = getattr(wrong, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{path}: cannot be read ({reason}); put the benchmark's own file there") from None


def _json(path: Path) -> Any:
    return _parsed(_text(path), str(path))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as wrong:
        raise UserError(f"{where}: not JSON ({getattr(wrong, 'msg', 'nested too deep')}); get the file again") from None


def _rows(values: Any, name: str, path: Path) -> list:
    rows = values.get(name) if isinstance(values, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: no list of {name} in it; put the benchmark's own file there")
    return rows


def _field(values: Any, name: str, kind: type, path: Path, row: int) -> Any:
    value = values.get(name) if isinstance(values, dict) else None
    if not isinstance(value, kind) or not value:
        raise UserError(f"{path}: row {row + 1} has no {name}; put the benchmark's own file there")
    return value
