"""What CapFilt did, to page through: one HTML file without script or network, pictures beside what the web said and
what the captioner wrote, each with the filter's decision; the same as JSON lines."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from markupsafe import Markup
from torch import Tensor

from shared.core.files import write_whole
from shared.core.text import one_line
from shared.report.html import data_uri, render

PAGE = 50  # pictures a section
CAREFUL = 48  # pixels: smaller pictures stay free of JPEG's marks
OUTCOMES = {
    (False, True): "The web's text dropped, the written one kept",
    (True, True): "Both texts kept",
    (True, False): "The web's text kept, the written one dropped",
    (False, False): "Both texts dropped",
}


@dataclass(frozen=True)
class Decision:
    """One text of one picture before the filter. match: its probability that they match, kept from the threshold on;
    true: whether they do, None where nobody knows."""

    picture: int  # row of the training pictures
    id: str
    origin: str  # web | written
    text: str
    match: float
    true: bool | None = None
    threshold: float = 0.5  # the larger of two logits

    @property
    def kept(self) -> bool:
        return self.match >= self.threshold

    @property
    def right(self) -> bool | None:
        return None if self.true is None else self.kept == self.true


def write_lines(path: Path, decisions: Sequence[Decision]) -> None:
    """One JSON object a line, what follows from the others (kept, right) written out too."""
    lines = [
        json.dumps(asdict(decision) | {"kept": decision.kept, "right": decision.right}, ensure_ascii=False)
        for decision in decisions
    ]
    write_whole(path, "\n".join(lines) + "\n")


def read_lines(path: Path) -> list[Decision]:
    decisions = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            values = json.loads(line)
            decisions.append(Decision(**{key: values[key] for key in Decision.__dataclass_fields__}))
    return decisions


def counts(decisions: Sequence[Decision]) -> dict[str, dict[str, int]]:
    """{origin: {texts, kept, dropped, and where the truth is known right, wrong, 'right kept' ...}}"""
    by_origin: dict[str, Counter] = {}
    for decision in decisions:
        number = by_origin.setdefault(decision.origin, Counter())
        fate = "kept" if decision.kept else "dropped"
        number["texts"] += 1
        number[fate] += 1
        if decision.true is not None:
            number["known"] += 1
            number[f"{'true' if decision.true else 'false'} {fate}"] += 1
    return {origin: dict(number) for origin, number in by_origin.items()}


def write_page(path: Path, decisions: Sequence[Decision], images: Tensor, title: str, note: str) -> None:
    """images: (N, 3, H, W) uint8, the training pictures that `Decision.picture` counts."""
    by_picture: dict[int, list[Decision]] = {}
    for decision in sorted(decisions, key=lambda decision: (decision.picture, decision.origin != "web")):
        by_picture.setdefault(decision.picture, []).append(decision)
    groups: dict[tuple[bool, bool], list[int]] = {outcome: [] for outcome in OUTCOMES}
    for picture, texts in by_picture.items():
        kept = tuple(any(text.kept for text in texts if text.origin == origin) for origin in ("web", "written"))
        groups[kept].append(picture)
    by_origin = counts(decisions)
    known = any("known" in number for number in by_origin.values())
    content = render(
        Path(__file__).with_name("capfilt.html.j2"),
        title=title,
        note=note,
        counts=by_origin,
        known=known,
        columns=["texts", "kept", "dropped"] + ["true kept", "false dropped", "true dropped", "false kept"] * known,
        groups=[(OUTCOMES[outcome], pictures) for outcome, pictures in groups.items()],
        texts_of=by_picture,
        page_size=PAGE,
        picture_uri=lambda picture: picture_uri(images[picture]),
        one_line=one_line,
    )
    write_whole(path, content)


def picture_uri(image: Tensor) -> Markup:
    """uint8 (3, H, W) as what stands behind `src`: PNG, or JPEG where it is large."""
    from PIL import Image

    form = "png" if min(image.shape[1:]) < CAREFUL else "jpeg"
    content = io.BytesIO()
    options = {"quality": 80} if form == "jpeg" else {}
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(content, form.upper(), **options)
    return data_uri(content.getvalue(), form)
