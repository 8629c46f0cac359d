"""Reported against reproduced: the rows of one reproduction, written as JSON, Markdown and one offline HTML page.
A row stands on one rung of the evidence ladder, and no table here ever mixes two. Nothing not run is ever filled in.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import tempfile
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from shared.errors import UserError

# rung -> (its question, what a good row proves, what it leaves open)
RUNGS = {
    "structure": (
        "Is it the same network?",
        "A match proves that the full-size model has the parameters, token counts and FLOPs that the paper prints",
        "it does not prove that the parts are wired as in the paper.",
    ),
    "parity": (
        "Does it compute the same function?",
        "A match proves that outputs, loss and gradients equal an independent implementation's on random weights",
        "it says nothing of training, of data or of released weights.",
    ),
    "claims": (
        "Does the paper's argument hold?",
        "A verdict tests the direction of the paper's own ablation, re-run small with equal budgets and paired seeds",
        "it does not reproduce the paper's numbers, which took far more data and compute.",
    ),
    "metrics": (
        "Do the released weights score what was printed?",
        "A match proves that the released weights reach the printed number under the paper's protocol, in this code",
        "it does not prove that training them again would lead there.",
    ),
}
VERDICTS = {
    "structure": ("match", "mismatch", "not run"),
    "parity": ("match", "mismatch", "not run"),
    "claims": ("reproduced", "inconclusive", "contradicted", "not run"),
    "metrics": ("match", "mismatch", "not run"),
}
LONGEST = 4000  # characters of one text that are shown
_ANSI = {
    "match": "32",
    "reproduced": "32",
    "inconclusive": "33",
    "mismatch": "31",
    "contradicted": "31",
    "not run": "2",
}


@dataclass(frozen=True)
class Row:
    """One line of evidence. None means: does not apply. `need` is the exact command and files a `not run` row asks for.

    `reproduced` of a claim is the effect, with its interval `low`, `high`; `tolerance` is the bound, or the rule in
    words; `seeds` is how many, or which.
    """

    rung: str
    id: str
    what: str
    reported: float | str | None = None
    reproduced: float | str | None = None
    low: float | None = None
    high: float | None = None
    tolerance: float | str | None = None
    seeds: int | list[int] | None = None
    verdict: str = "not run"
    source: str = ""
    need: str = ""

    def __post_init__(self) -> None:
        if self.rung not in RUNGS:
            raise ValueError(f"row {self.id!r}: unknown rung {self.rung!r}, use one of {', '.join(RUNGS)}")
        if self.verdict not in VERDICTS[self.rung]:
            allowed = ", ".join(VERDICTS[self.rung])
            raise ValueError(f"row {self.id!r}: verdict {self.verdict!r} on rung {self.rung}, use one of {allowed}")
        if self.verdict == "not run":
            if not self.need:
                raise ValueError(f"row {self.id!r} was not run, but does not say what it needs")
            if any(value is not None for value in (self.reproduced, self.low, self.high)):
                raise ValueError(f"row {self.id!r} was not run, but carries a reproduced value")
        elif self.reproduced is None:
            raise ValueError(f"row {self.id!r}: verdict {self.verdict!r} without a reproduced value")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"row {self.id!r}: an interval needs both low and high")


@dataclass(frozen=True)
class Figure:
    """`image` is a PNG, as bytes or as the path of one."""

    name: str
    caption: str
    image: bytes | Path


@dataclass(frozen=True)
class Ranked:
    text: str
    score: float
    correct: bool


@dataclass(frozen=True)
class Sample:
    """A retrieval example: a PNG, what was asked, and the texts best first."""

    image: bytes
    query: str
    ranked: list[Ranked]


@dataclass
class Report:
    """`data` holds name, digest, coverage, artifacts (of other papers), credits, note, run (how it went); `started` is
    ISO 8601; `seconds` the whole run's duration."""

    paper: str
    title: str
    scale: str
    commit: str | None
    dirty: bool | None
    data: dict[str, Any]
    machine: dict[str, Any]
    seconds: float
    started: str
    rows: list[Row]
    figures: list[Figure] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    command: str = ""
    recipe: str = ""
    environment: str = ""

    def __post_init__(self) -> None:
        if self.scale == "smoke":
            for row in self.rows:
                if row.rung in ("claims", "metrics") and row.verdict != "not run":
                    raise ValueError(f"row {row.id!r}: scale smoke proves that the pipeline runs and yields no verdict")

    def of(self, rung: str) -> list[Row]:
        return [row for row in self.rows if row.rung == rung]

    def counts(self, rung: str) -> dict[str, int]:
        """{verdict: how many}, in the rung's order, only those that occur."""
        seen = Counter(row.verdict for row in self.of(rung))
        return {verdict: seen[verdict] for verdict in VERDICTS[rung] if seen[verdict]}


def write(report: Report, folder: str | Path) -> Path:
    """Write report.md, report.html, report.json, recipe.yaml, environment.txt and figures/*.png; -> report.json's path.

    Every file is replaced atomically, report.json last: where it stands, the rest is complete.
    """
    from shared.report_page import page

    folder = Path(folder)
    pictures = {_figure_file(f, i): _png(f) for i, f in enumerate(report.figures)}
    for name, content in pictures.items():
        _replace(folder / "figures" / name, content)
    _replace(folder / "recipe.yaml", report.recipe)
    _replace(folder / "environment.txt", report.environment)
    _replace(folder / "report.md", markdown(report))
    _replace(folder / "report.html", page(report))
    _replace(folder / "report.json", json.dumps(as_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return folder / "report.json"


def as_json(report: Report) -> dict[str, Any]:
    """The committed evidence, as plain types; a number that is not finite becomes the text `nan`, `inf` or `-inf`."""
    return _plain(
        {
            "paper": report.paper,
            "title": report.title,
            "scale": report.scale,
            "commit": report.commit,
            "dirty": report.dirty,
            "started": report.started,
            "seconds": report.seconds,
            "command": report.command,
            "data": report.data,
            "machine": report.machine,
            "rows": [asdict(row) for row in report.rows],
            "figures": [
                {"name": f.name, "caption": f.caption, "file": f"figures/{_figure_file(f, i)}"}
                for i, f in enumerate(report.figures)
            ],
        }
    )


def read_report(path: str | Path) -> Report:
    """A report.json back as a Report (without samples; figures as paths, recipe and environment from beside it)."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(Row)}
        rows = [Row(**{key: value for key, value in row.items() if key in known}) for row in content["rows"]]
        figures = [Figure(f["name"], f["caption"], path.parent / f["file"]) for f in content.get("figures", [])]
        return Report(
            paper=content["paper"],
            title=content.get("title", content["paper"]),
            scale=content["scale"],
            commit=content["commit"],
            dirty=content.get("dirty"),
            data=content["data"],
            machine=content["machine"],
            seconds=content["seconds"],
            started=content.get("started", ""),
            rows=rows,
            figures=figures,
            command=content.get("command", ""),
            recipe=_beside(path, "recipe.yaml"),
            environment=_beside(path, "environment.txt"),
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); `make reproduce` writes one") from None
    except KeyError as error:
        raise UserError(f"{path}: no report, the key {error} is missing; write it anew with `make reproduce`") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no report ({error}); write it anew with `make reproduce`") from None


def terminal_table(rows: Sequence[Row], width: int | None = None, colour: bool | None = None) -> str:
    """`row | reported | reproduced | interval | verdict` as plain text, rung by rung; colour only on a terminal."""
    width = max(60, width or shutil.get_terminal_size((100, 24)).columns)
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    cells = {id(row): [show(row.reported), show_reproduced(row), show_interval(row), row.verdict] for row in rows}
    titles = ["reported", "reproduced", "interval", "verdict"]
    widths = [max([len(t), *(min(_columns(c[i]), 20) for c in cells.values())]) for i, t in enumerate(titles)]
    first = max(16, width - sum(widths) - 3 * len(widths))
    lines = []
    for rung, (question, _, _) in RUNGS.items():
        group = [row for row in rows if row.rung == rung]
        if not group:
            continue
        lines += ["", _paint(f"{rung.upper()}  {question}", "1", colour)]
        head = " | ".join([_pad("row", first), *(_pad(t, w) for t, w in zip(titles, widths, strict=True))])
        lines += [head.rstrip(), "-+-".join("-" * w for w in [first, *widths])]
        for row in group:
            columns = [_wrap(row.what, first), *(_wrap(c, w) for c, w in zip(cells[id(row)], widths, strict=True))]
            for level in range(max(map(len, columns))):
                parts = [column[level] if level < len(column) else "" for column in columns]
                padded = [_pad(part, w) for part, w in zip(parts, [first, *widths], strict=True)]
                padded[-1] = _paint(padded[-1].rstrip(), _ANSI[row.verdict], colour)
                lines.append(" | ".join(padded).rstrip())
            if row.verdict == "not run":
                lines += ["  " + _paint(line, "2", colour) for line in _wrap(f"needs: {row.need}", width - 2)]
    return "\n".join(lines[1:]) + "\n" if lines else "no rows\n"


def brief(report: Report) -> list[Row]:
    """The rows a terminal has room for: claims one by one, elsewhere what is wrong, and one line for all that agrees.

    `what` becomes the row's id; the full rows stand in the report.
    """

    def short(row: Row) -> Row:
        return replace(row, what=row.id.removeprefix(f"{report.paper}.").removeprefix(f"{row.rung}."))

    rows: list[Row] = []
    for rung in RUNGS:
        agreed: dict[tuple[str, str], list[Row]] = {}
        for row in report.of(rung):
            if row.verdict in ("match", "not run"):
                agreed.setdefault((row.verdict, row.need if rung == "claims" else ""), []).append(row)
            else:
                rows.append(short(row))
        for (verdict, _), group in agreed.items():
            if len(group) == 1:
                rows.append(short(group[0]))
                continue
            what = f"{len(group)} rows, see the report"
            ran = len(group) if verdict == "match" else None
            rows.append(Row(rung, f"{report.paper}.{rung}", what, len(group), ran, verdict=verdict, need=group[0].need))
    return rows


def compare(paths: Sequence[str | Path]) -> str:
    """One line a paper and scale from several report.json: the verdicts of each rung, never summed across rungs."""
    reports = sorted((read_report(path) for path in paths), key=lambda r: (r.paper, r.scale, r.started))
    if not reports:
        return "no results yet: `make reproduce PAPER=clip` writes the first\n"
    table = [["paper", "scale", "data", *RUNGS, "commit", "time"]]
    for report in reports:
        counts = [", ".join(f"{n} {verdict}" for verdict, n in report.counts(rung).items()) or "-" for rung in RUNGS]
        commit = (report.commit or "unknown")[:10] + ("+" if report.dirty else "")
        named = [_clean(str(name)) for name in (report.paper, report.scale, report.data.get("name", "-"))]
        table.append([*named, *counts, _clean(commit), duration(report.seconds)])
    widths = [max(_columns(line[i]) for line in table) for i in range(len(table[0]))]
    table.insert(1, ["-" * w for w in widths])
    lines = ["  ".join(_pad(cell, w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
    if any(report.dirty for report in reports):
        lines.append("+ the sources differed from that commit")
    return "\n".join(lines) + "\n"


def markdown(report: Report) -> str:
    """The report as Markdown: a table a rung, free text escaped."""
    commit = (report.commit or "unknown commit") + (" (sources changed)" if report.dirty else "")
    lines = [
        f"# {_md(report.title)}: reported vs reproduced",
        "",
        f"Scale {_md(report.scale)}, commit {_md(commit)}, {duration(report.seconds)}, started {_md(report.started)}.",
        f"Machine: {_md(machine_line(report.machine))}.",
        "",
    ]
    if report.command:
        lines += ["```", _clean(report.command).replace("```", "'''"), "```", ""]
    for rung, (question, proves, leaves) in RUNGS.items():
        lines += [f"## {rung.capitalize()}: {question[0].lower()}{question[1:]}", "", f"{proves}; {leaves}", ""]
        group = report.of(rung)
        if not group:
            lines += ["Nothing is declared on this rung.", ""]
            continue
        lines += ["| row | reported | reproduced | interval | tolerance | seeds | verdict | source |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for row in group:
            cells = [row.what, show(row.reported), show_reproduced(row), show_interval(row)]
            cells += [show(row.tolerance), show_seeds(row), f"**{row.verdict}**", row.source]
            lines.append("| " + " | ".join(c if c.startswith("**") else _md(c) for c in cells) + " |")
        waiting = [row for row in group if row.verdict == "not run"]
        lines += ["", *(f"- Not run: {_md(row.what)}. Needs: {_md(row.need)}" for row in waiting), ""]
    for place, figure in enumerate(report.figures):
        lines += [f"![{_md(figure.name)}](figures/{_figure_file(figure, place)})", "", _md(figure.caption), ""]
    lines += ["## Data", "", *(f"- {label}: {_md(text)}" for label, text in data_lines(report.data)), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def show(value: float | str | None) -> str:
    """A number for people: thousands parted, four significant digits, small ones in powers of ten."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.1f}"
    text = f"{value:.4g}"
    return text + ".0" if value and text.lstrip("-").isdigit() else text  # 88.0 beside 87.6


def show_reproduced(row: Row) -> str:
    return _signed(row, row.reproduced)


def show_interval(row: Row) -> str:
    return "-" if row.low is None or row.high is None else f"[{_signed(row, row.low)}, {_signed(row, row.high)}]"


def _signed(row: Row, value: float | str | None) -> str:
    """A claim's number is a difference, and shows its sign."""
    plus = row.rung == "claims" and isinstance(value, (int, float)) and value > 0
    return ("+" if plus else "") + show(value)


def show_seeds(row: Row) -> str:
    if isinstance(row.seeds, (list, tuple)):
        return f"{len(row.seeds)} ({', '.join(str(seed) for seed in row.seeds)})"
    return "-" if row.seeds is None else str(row.seeds)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def machine_line(machine: Mapping[str, Any]) -> str:
    """One line from tracking.machine_description's keys, those that are there."""
    gpus = machine.get("gpus") or []
    parts = [
        *gpus,
        machine.get("cpu"),
        f"{machine['cores']} cores" if machine.get("cores") else None,
        f"{machine['memory_gib']} GiB memory" if machine.get("memory_gib") else None,
        "no GPU" if "gpus" in machine and not gpus else None,
        machine.get("system"),
        f"Python {machine['python']}" if machine.get("python") else None,
        f"torch {machine['torch']}" if machine.get("torch") else None,
    ]
    return ", ".join(str(part) for part in parts if part) or "not recorded"


def data_lines(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) for name, digest, coverage, artifacts, note, run, credits; lists give a line an item."""
    lines = []
    for key in ("name", "digest", "coverage", "artifacts", "note", "run", "credits"):
        value = data.get(key)
        items = value if isinstance(value, (list, tuple)) else [value] if value else []
        lines += [(key.rstrip("s") if key in ("artifacts", "credits") else key, _item(item)) for item in items]
    return lines


def _item(item: Any) -> str:
    plain = _plain(item)
    if isinstance(plain, dict):
        return ", ".join(f"{key} {_value(value)}" for key, value in plain.items() if value not in (None, "", [], {}))
    return str(plain)


def _value(value: Any) -> str:
    """A list or a mapping, such as what was dropped and why, beside plain numbers and texts."""
    if isinstance(value, Mapping):
        value = [f"{key}: {one}" for key, one in value.items()]
    if isinstance(value, (list, tuple)):
        return "; ".join(_clean(str(one)) for one in value)
    return show(value)


def _plain(value: Any) -> Any:
    """Dataclasses, paths, tuples and array scalars as what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "item"):  # numpy and torch scalars
        return _plain(value.item())
    return str(value)


def _figure_file(figure: Figure, place: int) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", figure.name.lower()).strip("-") or "figure"
    return f"{place + 1:02d}-{slug[:60]}.png"


def _png(figure: Figure) -> bytes:
    return figure.image if isinstance(figure.image, bytes) else Path(figure.image).read_bytes()


def _replace(path: Path, content: str | bytes) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would keep a web server or a colleague out
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _beside(path: Path, name: str) -> str:
    file = path.parent / name
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _clean(text: str) -> str:
    """One line without control characters, and not endless: a caption may carry terminal escapes, or be a megabyte."""
    text = str(text)
    more = f" ... ({len(text):,} characters)" if len(text) > LONGEST else ""
    return "".join(c if c.isprintable() else " " for c in text[:LONGEST]) + more


def _md(text: str) -> str:
    return re.sub(r"([\\`*_\[\]|<>#])", r"\\\1", _clean(text))


def _columns(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int) -> str:
    return text + " " * max(0, width - _columns(text))


def _wrap(text: str, width: int) -> list[str]:
    lines = []
    for line in textwrap.wrap(_clean(text), width, break_on_hyphens=False):
        while _columns(line) > width:  # textwrap counts a wide character as one
            cut = next(i for i in range(width, 0, -1) if _columns(line[:i]) <= width)
            lines, line = [*lines, line[:cut]], line[cut:]
        lines.append(line)
    return lines or [""]


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and text else text
