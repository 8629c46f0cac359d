"""A report to disk and back: report.json, report.md, report.html and its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from shared.core.errors import UserError
from shared.core.files import atomic
from shared.report.rows import RUNGS, Figure, Report, Row, _clean, _figure_file, _png
from shared.report.text import _columns, _pad, _plain, duration, markdown

WRITTEN = ("paper", "title", "scale", "commit", "dirty", "started", "seconds", "command", "data", "machine")


def write(report: Report, folder: str | Path) -> Path:
    """Write report.md, report.html, report.json, recipe.yaml, environment.txt and figures/*.png; -> report.json's path.

    Every file is replaced atomically, report.json last: where it stands, the rest is complete.
    """
    from shared.report.html import page

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
    figures = [
        {"name": figure.name, "caption": figure.caption, "file": f"figures/{_figure_file(figure, place)}"}
        for place, figure in enumerate(report.figures)
    ]
    content = {name: getattr(report, name) for name in WRITTEN}
    return _plain(content | {"rows": [asdict(row) for row in report.rows], "figures": figures})


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


def _replace(path: Path, content: str | bytes) -> None:
    """A reader sees the old file or the new one, never half of one."""
    with atomic(path) as temporary:
        temporary.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)


def _beside(path: Path, name: str) -> str:
    file = path.parent / name
    return file.read_text(encoding="utf-8") if file.exists() else ""
