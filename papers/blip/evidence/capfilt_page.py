"""What CapFilt did, to page through: one HTML file without script or network, pictures beside what the web said and
what the captioner wrote, each with the filter's decision; the same as JSON lines."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from torch import Tensor

from shared.core.files import write_whole
from shared.core.text import one_line

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
    lines = [json.dumps(asdict(one) | {"kept": one.kept, "right": one.right}, ensure_ascii=False) for one in decisions]
    write_whole(path, "\n".join(lines) + "\n")


def read_lines(path: Path) -> list[Decision]:
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            values = json.loads(line)
            found.append(Decision(**{key: values[key] for key in Decision.__dataclass_fields__}))
    return found


def counts(decisions: Sequence[Decision]) -> dict[str, dict[str, int]]:
    """{origin: {texts, kept, dropped, and where the truth is known right, wrong, 'right kept' ...}}"""
    found: dict[str, Counter] = {}
    for one in decisions:
        of = found.setdefault(one.origin, Counter())
        of["texts"] += 1
        of["kept" if one.kept else "dropped"] += 1
        if one.true is not None:
            of["known"] += 1
            of[f"{'true' if one.true else 'false'} {'kept' if one.kept else 'dropped'}"] += 1
    return {origin: dict(of) for origin, of in found.items()}


def write_page(path: Path, decisions: Sequence[Decision], images: Tensor, title: str, note: str) -> None:
    """images: (N, 3, H, W) uint8, the training pictures that `Decision.picture` counts."""
    by_picture = {
        picture: list(several)
        for picture, several in groupby(sorted(decisions, key=lambda one: one.picture), lambda one: one.picture)
    }
    groups: dict[tuple[bool, bool], list[int]] = {outcome: [] for outcome in OUTCOMES}
    for picture, several in by_picture.items():
        kept = tuple(any(one.kept for one in several if one.origin == origin) for origin in ("web", "written"))
        groups[kept].append(picture)
    parts = [_head(title, note), _table(counts(decisions))]
    for outcome, pictures in groups.items():
        parts.append(f"<h2>{escape(OUTCOMES[outcome])}: {len(pictures)} pictures</h2>")
        for start in range(0, len(pictures), PAGE):
            shown = pictures[start : start + PAGE]
            cards = "".join(_card(images[picture], by_picture[picture]) for picture in shown)
            opened = " open" if start == 0 and outcome == (False, True) else ""
            parts.append(
                f'<details{opened}><summary>{start + 1} to {start + len(shown)}</summary><div class="cards">{cards}'
                "</div></details>"
            )
    write_whole(path, "".join([*parts, "</main></body></html>\n"]))


def _head(title: str, note: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1>"
        f"<p>{escape(note)}</p>"
    )


def _table(found: dict[str, dict[str, int]]) -> str:
    known = any("known" in of for of in found.values())
    names = ["texts", "kept", "dropped"] + ["true kept", "false dropped", "true dropped", "false kept"] * known
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = ""
    for origin, of in found.items():
        cells = "".join(
            f"<td>{of.get(name, 0) if ' ' not in name or of.get('known') else 'unknown'}</td>" for name in names
        )
        rows += f'<tr><th scope="row">{escape(origin)}</th>{cells}</tr>'
    legend = "<p>True kept and false dropped are right decisions, the other two are wrong.</p>" if known else ""
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="wide">{table}</div>{legend}'


def _card(image: Tensor, several: Sequence[Decision]) -> str:
    lines = ""
    for one in sorted(several, key=lambda one: one.origin != "web"):
        word = "kept" if one.kept else "dropped"
        verdict = {None: "", True: ", rightly", False: ", wrongly"}[one.right]
        wrong = " wrong" if one.right is False else ""
        lines += (
            f'<p><span class="from">{escape(one.origin)}</span> <q>{escape(one_line(one.text))}</q> '
            f'<span class="{word}{wrong}">{word}{verdict}, match {one.match:.2f}</span></p>'
        )
    form, data = picture_bytes(image)
    source = f"data:image/{form};base64,{base64.b64encode(data).decode()}"
    name = escape(several[0].id)
    picture = f'<img loading="lazy" alt="{name}" src="{source}">'
    return f'<article>{picture}<div>{lines}<p class="id">{name}</p></div></article>'


def picture_bytes(image: Tensor) -> tuple[str, bytes]:
    """uint8 (3, H, W) -> ("png" or "jpeg", the file)."""
    from PIL import Image

    form = "png" if min(image.shape[1:]) < CAREFUL else "jpeg"
    content = io.BytesIO()
    options = {"quality": 80} if form == "jpeg" else {}
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(content, form.upper(), **options)
    return form, content.getvalue()


_STYLE = """
:root{color-scheme:light dark;--line:#d9d5cb;--soft:#5b636d;--good:#17663f;--bad:#9d2a25}
@media (prefers-color-scheme:dark){:root{--line:#353a41;--soft:#a0a7b0;--good:#86d3a9;--bad:#f2a29b}}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;margin:0}
main{max-width:76rem;margin:0 auto;padding:1.5rem}
h1{font-size:1.7rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .9rem .3rem 0;text-align:right;border-bottom:1px solid var(--line)}
th{font-weight:500;color:var(--soft);white-space:nowrap}
details{border:1px solid var(--line);border-radius:8px;margin:.5rem 0}
summary{cursor:pointer;padding:.5rem .9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:.8rem;padding:.8rem}
article{display:flex;gap:.8rem;border-top:1px solid var(--line);padding-top:.8rem;overflow-wrap:anywhere}
img{width:96px;height:96px;object-fit:contain;image-rendering:pixelated;flex:none;background:#fff}
article p{margin:0 0 .4rem;font-size:.9rem}
.from,.id{color:var(--soft);font-size:.8rem}
.kept{color:var(--good)}.dropped{color:var(--bad)}
.wrong{text-decoration:underline wavy}
"""
