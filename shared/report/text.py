"""A report as text: terminal table, Markdown, comparison of runs.

The terminal table is not one of rich: what a row needs is a command, to be copied, and none of its cells can be as wide
as the table.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any

from shared.core.provenance import machine_line
from shared.report.rows import RUNGS, Report, Row, _clean, _figure_file

_ANSI = {
    "match": "32",
    "reproduced": "32",
    "inconclusive": "33",
    "mismatch": "31",
    "contradicted": "31",
    "not run": "2",
}


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


def _md(text: str) -> str:
    return re.sub(r"([\\`*_\[\]|<>#])", r"\\\1", _clean(text))


def _columns(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int) -> str:
    return text + " " * max(0, width - _columns(text))


def _wrap(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for line in textwrap.wrap(_clean(text), width, break_on_hyphens=False):
        while _columns(line) > width:  # textwrap counts a wide character as one
            cut = next(i for i in range(width, 0, -1) if _columns(line[:i]) <= width)
            lines, line = [*lines, line[:cut]], line[cut:]
        lines.append(line)
    return lines or [""]


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and text else text
