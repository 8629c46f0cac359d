"""The HTML page of a report, and any page like it: one file, no script, nothing loaded from anywhere; every text is
escaped on its way in. Light and dark by the reader's preference, a table becomes cards on a narrow screen, it prints.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from shared.core.provenance import machine_line
from shared.report.rows import RUNGS, Report, Row, _clean, _png
from shared.report.text import data_lines, duration, show, show_interval, show_reproduced, show_seeds

TEMPLATES = Path(__file__).parent / "templates"
# verdict: (class, a mark that tells verdicts apart where colour does not)
CHIPS = {
    "match": ("good", "✓"),
    "reproduced": ("good", "✓"),
    "inconclusive": ("open", "~"),
    "mismatch": ("bad", "✕"),
    "contradicted": ("bad", "✕"),
    "not run": ("none", "○"),
}
COLUMNS: list[tuple[str, str, Callable[[Row], str]]] = [  # heading, class, text of a row's cell
    ("Reported", "n", lambda row: show(row.reported)),
    ("Reproduced", "n", show_reproduced),
    ("95 % interval", "n", show_interval),
    ("Tolerance", "n t", lambda row: show(row.tolerance)),
    ("Seeds", "n", show_seeds),
    ("Verdict", "v", lambda row: row.verdict),
]
DATA_LABELS = {
    "name": "Name",
    "digest": "Digest",
    "coverage": "Really read",
    "artifact": "Of another paper",
    "note": "Note",
    "run": "The run",
    "credit": "Credit, licence",
}


def render(template: Path, **values: Any) -> str:
    """A template, which may extend page.html.j2, filled in: what is put in is cleaned and escaped, whatever it is."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else _clean(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)


def page(report: Report) -> str:
    """The whole page as text."""
    return render(
        TEMPLATES / "report.html.j2",
        report=report,
        rungs=RUNGS,
        chips=CHIPS,
        columns=columns,
        bar=bar,
        show=show,
        show_interval=show_interval,
        duration=duration,
        machine_line=machine_line,
        data_lines=data_lines,
        data_labels=DATA_LABELS,
        data_uri=data_uri,
        png_of=_png,
    )


def columns(rows: Sequence[Row]) -> list[tuple[str, str, Callable[[Row], str]]]:
    """A column stands only where a row fills it."""
    return [
        (heading, kind, text)
        for heading, kind, text in COLUMNS
        if heading == "Reproduced" or any(text(row) != "-" for row in rows)
    ]


def bar(row: Row) -> dict[str, str]:
    """Where zero, interval and effect lie on a bar of 160, drawn over the row's own range (which always holds zero)."""
    assert row.low is not None and row.high is not None and isinstance(row.reproduced, float | int)
    low, high = min(0.0, row.low), max(0.0, row.high)
    scale = 152 / (high - low) if high > low else 0.0
    places = {"zero": 0.0, "low": row.low, "high": row.high, "effect": row.reproduced}
    return {name: f"{4 + (value - low) * scale:.1f}" for name, value in places.items()}


def data_uri(content: bytes, form: str = "png") -> Markup:
    """A picture's file as what stands behind `src`."""
    return Markup(f"data:image/{form};base64,{base64.b64encode(content).decode('ascii')}")
