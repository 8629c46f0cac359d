"""Sweeps to files, tables and figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.core.files import ROOT


@dataclass(frozen=True)
class Job:
    """One line of a sweep's table: `run() -> rows`, one row a contestant."""

    setting: str
    run: Callable[[], list[dict]]


@dataclass(frozen=True)
class Sweep:
    """Jobs that share a table, a JSON file and a figure, all called `name`.

    verb: how a contestant's ratio reads, "takes" (times as long) or "needs" (times as much). x: the key of the rows
    that a line figure has on its axis; without one the figure shows ratios as bars.
    """

    name: str
    title: str
    jobs: Sequence[Job]
    verb: str = "takes"
    x: str = ""
    x_label: str = ""


def save(sweep: Sweep, rows: list[dict], settings: Mapping[str, Any], folder: Path, peaks: Sequence[dict]) -> Path:
    """Settings, machine, commit, date, peaks and rows as JSON; beside it, in figures/, the picture."""
    from shared.core.files import write_whole
    from shared.core.provenance import commit_and_dirty, machine_description

    commit, dirty = commit_and_dirty(ROOT)
    result: dict[str, Any] = {
        "name": sweep.name,
        "title": sweep.title,
        "settings": dict(settings),
        "machine": machine_description(),
        "commit": commit,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%d"),
        "peaks": list(peaks),
        "rows": rows,
    }
    path = folder / f"{sweep.name}-{settings['device']}-{settings['precision']}.json"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=1) + "\n")
    (folder / "figures" / f"{path.stem}.png").write_bytes(figure(sweep, rows, result["machine"]))
    return path


def table(sweep: Sweep, rows: Sequence[dict]) -> str:
    """One line a setting: the first contestant's own value, then how many times as long (as much) the others take."""
    lines = [sweep.title]
    names = list(dict.fromkeys(row["name"] for row in rows))
    head = ["", names[0], "of peak", *(f"{name} {sweep.verb}" for name in names[1:])]
    cells = []
    for setting, group in by_setting(rows).items():
        first = group[names[0]]
        share = f"{100 * first['share_of_peak']:.0f} %" if "share_of_peak" in first else ""
        others = [ratio_text(group[name]) if name in group else "-" for name in names[1:]]
        cells.append([setting, f"{first['value']:,g} {first['unit']}", share, *others])
    if not any(line[2] for line in cells):
        head, *cells = ([*line[:2], *line[3:]] for line in (head, *cells))
    widths = [max(len(line[column]) for line in (head, *cells)) for column in range(len(head))]
    for line in (head, ["-" * width for width in widths], *cells):
        padded = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        lines.append("  ".join(padded).rstrip())
    what = "as much" if sweep.verb == "needs" else "as long; in brackets the quartiles over rounds"
    return "\n".join([*lines, f"x: times {what}. Above 1, {names[0]} is ahead."])


def ratio_text(row: dict) -> str:
    spread = f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if "ratio_low" in row else ""
    return f"{row['ratio']:.2f} x{spread}"


def by_setting(rows: Iterable[dict]) -> dict[str, dict[str, dict]]:
    settings: dict[str, dict[str, dict]] = {}
    for row in rows:
        settings.setdefault(row["setting"], {})[row["name"]] = row
    return settings


def figure(sweep: Sweep, rows: Sequence[dict], machine: Mapping[str, Any]) -> bytes:
    """A PNG: values over `sweep.x` as lines, or every setting's ratios as bars with their quartiles."""
    import io

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from shared.report.plots import _STYLE

    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        height = 4.0 if sweep.x else 1.6 + 0.24 * len(rows)
        canvas = Figure(figsize=(7.5, height), dpi=110, layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots()
        (_lines if sweep.x else _bars)(axes, sweep, rows)
        where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
        canvas.suptitle(f"{sweep.title[:1]}{sweep.title[1:].lower()}", x=0.01, ha="left", fontsize=11, weight="bold")
        axes.set_title(f"{where}, torch {machine['torch']}", fontsize=8, weight="normal")
        canvas.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _lines(axes, sweep: Sweep, rows: Sequence[dict]) -> None:
    from shared.report.plots import _COLOURS, _MARKS

    for place, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        own = sorted((row[sweep.x], row["value"]) for row in rows if row["name"] == name)
        axes.plot(*zip(*own, strict=True), color=_COLOURS[place], marker=_MARKS[place], label=name)
    axes.set(xlabel=sweep.x_label, ylabel=rows[0]["unit"], xticks=sorted({row[sweep.x] for row in rows}))
    axes.set_ylim(bottom=0)
    axes.legend()


def _bars(axes, sweep: Sweep, rows: Sequence[dict]) -> None:
    from shared.report.plots import _COLOURS

    names = list(dict.fromkeys(row["name"] for row in rows))
    settings = by_setting(rows)
    thick = 0.8 / max(1, len(names) - 1)
    for place, name in enumerate(names[1:]):
        for line, group in enumerate(settings.values()):
            if name not in group:
                continue
            row, y = group[name], line + (place - (len(names) - 2) / 2) * thick
            label = name if line == next(i for i, g in enumerate(settings.values()) if name in g) else None
            axes.barh(y, row["ratio"], height=0.9 * thick, color=_COLOURS[place + 1], alpha=0.8, label=label)
            end = row["ratio"]
            if "ratio_low" in row:
                axes.plot([row["ratio_low"], row["ratio_high"]], [y, y], color="#111827", linewidth=1.2)
                end = row["ratio_high"]
            axes.annotate(f"{row['ratio']:.2f}", (end, y), xytext=(4, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="#374151", linewidth=1)
    firsts = [group[names[0]] for group in settings.values()]
    values = [f"{first['name']}: {first['value']:,g} {first['unit']}" for first in firsts]
    labels = [f"{setting}\n{value}" for setting, value in zip(settings, values, strict=True)]
    axes.set_yticks(range(len(settings)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel(f"{'memory' if sweep.verb == 'needs' else 'time'}, {names[0]} = 1; above 1, {names[0]} is ahead")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1 if len(rows) > 12 else -0.22), ncols=len(names))
