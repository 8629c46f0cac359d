"""The HTML page of a report: one file, no script, nothing loaded from anywhere; every text is escaped on its way in.
Light and dark by the reader's preference, a table becomes cards on a narrow screen, and it prints.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from shared.core.provenance import machine_line
from shared.report.rows import RUNGS, Figure, Report, Row, Sample, _clean, _png
from shared.report.text import data_lines, duration, show, show_interval, show_reproduced, show_seeds

# the mark tells verdicts apart where colour does not
_CHIPS = {
    "match": ("good", "✓"),
    "reproduced": ("good", "✓"),
    "inconclusive": ("open", "~"),
    "mismatch": ("bad", "✕"),
    "contradicted": ("bad", "✕"),
    "not run": ("none", "○"),
}

_STYLE = """
:root{color-scheme:light;--paper:#fbfaf7;--card:#fff;--ink:#22262b;--soft:#5b636d;--line:#e3dfd6;--accent:#2d5b88;
--good:#17663f;--good-bg:#e2f1e8;--open:#7d5200;--open-bg:#faeed4;--bad:#9d2a25;--bad-bg:#fae5e3;--plot:#fff}
@media screen and (prefers-color-scheme:dark){:root{color-scheme:dark;--paper:#16181b;--card:#1d2024;--ink:#e4e2dd;
--soft:#a0a7b0;--line:#31363d;--accent:#93bce4;--good:#86d3a9;--good-bg:#1b3427;--open:#ebc276;--open-bg:#3a2e15;
--bad:#f2a29b;--bad-bg:#421f1d;--plot:#e9e8e4}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
.page{max-width:68rem;margin:0 auto;padding:0 1.5rem}
h1,h2,h3{font-family:"Iowan Old Style","Palatino Linotype",Palatino,"Book Antiqua",Georgia,"DejaVu Serif",serif;
font-weight:600;line-height:1.2;text-wrap:balance}
h1{font-size:clamp(1.7rem,4.5vw,2.6rem);margin:.3rem 0 .8rem}
h2{font-size:1.55rem;margin:0 0 .4rem}
h3{font-size:1.1rem;margin:0}
p{margin:0 0 .8rem}
a{color:var(--accent)}
a:focus-visible,summary:focus-visible,pre:focus-visible{outline:3px solid var(--accent);outline-offset:3px}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:1rem;background:var(--card);padding:.5rem 1rem}
header{padding-top:3rem}
.eyebrow{color:var(--soft);font-size:.8rem;letter-spacing:.09em;text-transform:uppercase;margin:0}
.facts{display:flex;flex-wrap:wrap;gap:.3rem 1.8rem;margin:0 0 1.2rem;font-size:.9rem}
.facts div{display:flex;gap:.5em}
.facts dt{color:var(--soft)}
.facts dd{margin:0;overflow-wrap:anywhere}
code,pre{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{overflow-wrap:anywhere}
pre{margin:0;padding:1rem;overflow:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}
.notice{border-left:4px solid var(--open);background:var(--open-bg);padding:.7rem 1rem;border-radius:0 8px 8px 0}
.rungs{display:grid;grid-template-columns:repeat(4,1fr);gap:.9rem;list-style:none;margin:1.6rem 0 0;padding:0}
.rungs a{display:block;height:100%;padding:1rem 1.1rem 1.1rem;background:var(--card);border:1px solid var(--line);
border-radius:12px;color:inherit;text-decoration:none}
.rungs a:hover{border-color:var(--accent)}
.rungs span.q{display:block;color:var(--soft);font-size:.85rem;line-height:1.4;margin:.25rem 0 .8rem;min-height:2.8em}
.counts{display:flex;flex-wrap:wrap;gap:.4rem}
.chip{display:inline-block;white-space:nowrap;border-radius:99px;padding:.1rem .7rem;font-size:.82rem;font-weight:600;
border:1px solid transparent}
.good{color:var(--good);background:var(--good-bg)}
.open{color:var(--open);background:var(--open-bg)}
.bad{color:var(--bad);background:var(--bad-bg)}
.none{color:var(--soft);border:1px dashed var(--soft);font-weight:500}
section{margin:3.4rem 0 0}
.means{color:var(--soft);max-width:46rem}
table{width:100%;border-collapse:collapse;font-size:.93rem}
th{text-align:left;font-weight:500;color:var(--soft);font-size:.8rem;padding:.5rem .9rem .5rem 0;
border-bottom:1px solid var(--soft);vertical-align:bottom}
td,tbody th{padding:.8rem .9rem .8rem 0;border-bottom:1px solid var(--line);vertical-align:top}
tbody th{color:var(--ink);font-size:inherit;width:40%;min-width:13rem}
.n,thead th.n{text-align:right}
.n.t{min-width:6rem}
td.v,thead th.v{text-align:right;padding-right:0}
.id,.src{display:block;font-size:.8rem;font-weight:400;color:var(--soft);overflow-wrap:anywhere}
.need{display:block;margin-top:.5rem;font-weight:400;font-size:.86rem;color:var(--soft)}
.need code{color:var(--ink)}
.bar{display:block;width:10.5rem;height:1.5rem;margin-left:auto;overflow:visible}
.bar .zero{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 2}
.bar .span{stroke:currentColor;stroke-width:3;stroke-linecap:round}
.bar .dot{fill:currentColor;stroke:var(--paper);stroke-width:2}
.bar.good,.bar.open,.bar.bad{background:none}
.range{font-size:.82rem;color:var(--soft);white-space:nowrap}
figure{margin:1.6rem 0 0;break-inside:avoid}
figure img{display:block;max-width:100%;height:auto;border-radius:8px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 1.6rem;align-items:start}
.plots figure{max-width:46rem}
.plots img{width:100%;background:var(--plot);border:1px solid var(--line);padding:.5rem}
figcaption{font-size:.9rem;color:var(--soft);margin-top:.5rem;max-width:46rem}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem}
.sample{display:flex;gap:1rem;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1rem;
margin:0;align-items:flex-start}
.sample img{width:6.5rem;height:6.5rem;object-fit:contain;flex:none;background:#fff}
.sample .body{flex:1;min-width:0;font-size:.88rem}
.sample p{margin:0 0 .4rem;color:var(--soft)}
.sample ol{margin:0;padding-left:1.25rem}
.sample li{overflow-wrap:anywhere}
.sample li.right{color:var(--good);font-weight:600}
.score{color:var(--soft);font-weight:400;font-size:.92em}
details{margin:1rem 0 0;border:1px solid var(--line);border-radius:12px;background:var(--card)}
summary{cursor:pointer;padding:.8rem 1.1rem;font-weight:600}
details pre{border:0;border-top:1px solid var(--line);border-radius:0 0 12px 12px;max-height:30rem}
.data{display:grid;grid-template-columns:max-content 1fr;gap:.4rem 1.5rem;margin:0;font-size:.92rem}
.data dt{color:var(--soft)}
.data dd{grid-column:2;margin:0;overflow-wrap:anywhere}
footer{margin-top:4rem;padding:1.6rem 0 3rem;border-top:1px solid var(--line);color:var(--soft);font-size:.85rem}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
@media (max-width:62rem){.bar{width:7rem;height:1rem}td,tbody th,thead th{padding-right:.6rem}}
@media screen and (max-width:60rem){.rungs{grid-template-columns:1fr 1fr}.rungs span.q{min-height:0}}
@media screen and (max-width:56rem){.page{padding:0 1rem}header{padding-top:1.8rem}
.rungs{gap:.6rem}.rungs a{padding:.8rem}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
table,tbody,tr,td,tbody th{display:block;width:auto}
tr{padding:.9rem 0;border-bottom:1px solid var(--line)}
tbody th{border:0;padding:0 0 .5rem}
td,td.v{display:flex;justify-content:space-between;align-items:center;gap:1rem;border:0;padding:.15rem 0;
text-align:right;overflow-wrap:anywhere}
td::before{content:attr(data-label);color:var(--soft);font-size:.85rem;flex:none}
td.blank{display:none}
.data{grid-template-columns:1fr}.data dd{grid-column:1;margin-bottom:.5rem}}
@media screen and (max-width:26rem){.rungs{grid-template-columns:1fr}.sample{flex-direction:column}}
@media print{:root{--paper:#fff}body{font-size:9.5pt}.page{max-width:none;padding:0}header{padding-top:0}
.bar{width:5.5rem;height:.8rem}.chip{padding:0 .4rem}.n.t{min-width:4.5rem}tbody th{width:auto}
.plots{grid-template-columns:1fr 1fr;gap:0 1rem}figure{margin-top:1rem}.sample{padding:.6rem}
.skip{display:none}section{margin-top:1.6rem}
tr,.sample,.rungs a{break-inside:avoid}h2{break-after:avoid}details pre{max-height:none;overflow:visible;
white-space:pre-wrap}.rungs{grid-template-columns:repeat(4,1fr);gap:.5rem}.rungs a{padding:.6rem}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
""".strip()


FOLDED = 20  # more rows than this are folded away


def page(report: Report) -> str:
    """The whole page as text. A policy in its head forbids scripts and every load, should an escape ever be missed."""
    title = f"{report.title}: reported vs reproduced"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>",
        '<a class="skip" href="#evidence">Skip to the evidence</a>',
        f'<div class="page">\n{_header(report)}\n<main id="evidence">',
        *(_rung(report, rung) for rung in RUNGS),
        _figures(report.figures),
        _samples(report.samples),
        _how(report),
        "</main>",
        _footer(report),
        "</div>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _header(report: Report) -> str:
    commit = (report.commit or "unknown")[:12]
    facts = [
        ("Scale", report.scale),
        ("Commit", commit + (", sources changed" if report.dirty else "")),
        ("Started", report.started or "unknown"),
        ("Took", duration(report.seconds)),
        ("Machine", machine_line(report.machine)),
    ]
    cards = "".join(
        f'<li><a href="#{rung}"><h3>{rung.capitalize()}</h3><span class="q">{escape(question)}</span>'
        f'<span class="counts">{_counts(report, rung)}</span></a></li>'
        for rung, (question, _, _) in RUNGS.items()
    )
    notices = []
    if report.scale == "smoke":
        notices.append("A smoke run shows that the pipeline runs. It yields no verdict on claims or metrics.")
    if report.dirty:
        notices.append("The sources differed from the named commit, so this page does not count as evidence.")
    return (
        f'<header>\n<p class="eyebrow">Reported vs reproduced</p>\n<h1>{_text(report.title)}</h1>\n<dl class="facts">'
        + "".join(f"<div><dt>{label}</dt><dd>{_text(value)}</dd></div>" for label, value in facts)
        + "</dl>\n"
        + "".join(f'<p class="notice">{notice}</p>\n' for notice in notices)
        + f'<nav aria-label="The four kinds of evidence"><ul class="rungs">{cards}</ul></nav>\n</header>'
    )


def _counts(report: Report, rung: str) -> str:
    counts = report.counts(rung)
    if not counts:
        return '<span class="chip none">no rows</span>'
    return "".join(_chip(verdict, f"{number} {verdict}") for verdict, number in counts.items())


def _chip(verdict: str, label: str) -> str:
    kind, mark = _CHIPS[verdict]
    return f'<span class="chip {kind}"><span aria-hidden="true">{mark} </span>{escape(label)}</span>'


def _rung(report: Report, rung: str) -> str:
    question, proves, leaves = RUNGS[rung]
    rows = report.of(rung)
    body = _table(rung, rows) if rows else "<p>Nothing is declared on this rung.</p>"
    if len(rows) > FOLDED and rung != "claims":  # what is argued about should not be far below what merely agrees
        opened = " open" if any(row.verdict == "mismatch" for row in rows) else ""
        body = f"<details{opened}><summary>All {len(rows)} rows</summary>\n{body}</details>"
    return (
        f'<section id="{rung}" aria-labelledby="{rung}-title">\n<h2 id="{rung}-title">{rung.capitalize()}: '
        f'{escape(question[0].lower() + question[1:])}</h2>\n<p class="means">{escape(proves)}; {escape(leaves)}</p>\n'
        f"{body}\n</section>"
    )


def _table(rung: str, rows: Sequence[Row]) -> str:
    """A column stands only where a row fills it. Roles are spelled out, as the cards on a phone would lose them."""
    columns = [
        ("Reported", "n", lambda row: _text(show(row.reported)), lambda row: row.reported is not None),
        ("Reproduced", "n", lambda row: _text(show_reproduced(row)), lambda row: True),
        ("95 % interval", "n", _interval, lambda row: row.low is not None),
        ("Tolerance", "n t", lambda row: _text(show(row.tolerance)), lambda row: row.tolerance is not None),
        ("Seeds", "n", _seeds, lambda row: row.seeds is not None),
        ("Verdict", "v", lambda row: _chip(row.verdict, row.verdict), lambda row: True),
    ]
    columns = [column for column in columns if any(column[3](row) for row in rows)]
    head = '<th role="columnheader" scope="col">Row</th>' + "".join(
        f'<th role="columnheader" scope="col" class="{kind}">{label}</th>' for label, kind, _, _ in columns
    )
    lines = []
    for row in rows:
        cells = []
        for label, kind, cell, _ in columns:
            content = cell(row)
            blank = " blank" if content == "-" else ""
            shown = "&ndash;" if content == "-" else content
            cells.append(f'<td role="cell" class="{kind}{blank}" data-label="{label}">{shown}</td>')
        lines.append(f'<tr role="row">{_row_head(row)}{"".join(cells)}</tr>')
    note = ""
    if any(row.low is not None for row in rows if rung == "claims"):
        note = '<p class="means range">Each bar has its own scale; the dashed line is no effect.</p>'
    return (
        f'<table role="table" aria-labelledby="{rung}-title">\n'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
        f'<tbody role="rowgroup">\n' + "\n".join(lines) + f"\n</tbody>\n</table>\n{note}"
    )


def _row_head(row: Row) -> str:
    source = f'<span class="src">Reported in {_text(row.source)}</span>' if row.source else ""
    need = f'<span class="need">Needs: <code>{_text(row.need)}</code></span>' if row.verdict == "not run" else ""
    return (
        f'<th role="rowheader" scope="row">{_text(row.what)}<code class="id">{_text(row.id)}</code>{source}{need}</th>'
    )


def _interval(row: Row) -> str:
    if row.low is None or row.high is None:
        return "-"
    text = f'<span class="range">{_text(show_interval(row))}</span>'
    return _bar(row) + text if row.rung == "claims" and isinstance(row.reproduced, (int, float)) else text


def _seeds(row: Row) -> str:
    """How many in sight, which ones for who asks: five numbers would take a column of their own."""
    if not isinstance(row.seeds, (list, tuple)):
        return _text(show_seeds(row))
    return f'<span title="{_text(show_seeds(row))}">{len(row.seeds)}</span>'


def _bar(row: Row) -> str:
    """Zero line, interval and point, drawn over the row's own range (which always holds zero)."""
    low, high = min(0.0, row.low), max(0.0, row.high)
    scale = 152 / (high - low) if high > low else 0.0

    def x(value: float) -> str:
        return f"{4 + (value - low) * scale:.1f}"

    label = f"effect {show(row.reproduced)}, 95 % interval {show(row.low)} to {show(row.high)}"
    return (
        f'<svg class="bar {_CHIPS[row.verdict][0]}" viewBox="0 0 160 24" role="img" aria-label="{escape(label)}">'
        f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="1" y2="23"/>'
        f'<line class="span" x1="{x(row.low)}" x2="{x(row.high)}" y1="12" y2="12"/>'
        f'<circle class="dot" cx="{x(row.reproduced)}" cy="12" r="5"/></svg>'
    )


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    plots = "".join(
        f'<figure><img src="{_data_uri(_png(figure))}" alt="{_text(figure.name)}">'
        f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
        for figure in figures
    )
    return (
        f'<section aria-labelledby="figures"><h2 id="figures">Figures</h2>\n<div class="plots">{plots}</div></section>'
    )


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    cards = []
    for place, sample in enumerate(samples, 1):
        texts = "".join(
            f'<li class="{"right" if ranked.correct else "wrong"}">{_text(ranked.text)} '
            f'<span class="score">{ranked.score:.3f}</span>'
            + (
                '<span aria-hidden="true"> ✓</span><span class="hidden">, the right one</span>'
                if ranked.correct
                else ""
            )
            + "</li>"
            for ranked in sample.ranked
        )
        cards.append(
            f'<article class="sample"><img src="{_data_uri(sample.image)}" alt="Picture of example {place}">'
            f'<div class="body"><p>{_text(sample.query)}</p><ol>{texts}</ol></div></article>'
        )
    return (
        '<section aria-labelledby="samples"><h2 id="samples">What the model answers</h2>\n'
        '<p class="means">Pictures of the test split with the model\'s ranking, best first, its score behind each '
        f'text. The right text carries a tick.</p>\n<div class="samples">{"".join(cards)}</div></section>'
    )


def _how(report: Report) -> str:
    parts = []
    if report.command:
        parts.append(f'<pre tabindex="0">{_text(report.command)}</pre>')
    for name, text in (("Recipe, fully resolved", report.recipe), ("Environment", report.environment)):
        if text:
            parts.append(f'<details><summary>{name}</summary><pre tabindex="0">{escape(text)}</pre></details>')
    if not parts:
        return ""
    return f'<section aria-labelledby="how"><h2 id="how">How to run it again</h2>\n{"".join(parts)}</section>'


def _footer(report: Report) -> str:
    labels = {
        "name": "Name",
        "digest": "Digest",
        "coverage": "Really read",
        "artifact": "Of another paper",
        "note": "Note",
        "run": "The run",
        "credit": "Credit, licence",
    }
    lines, last = "", None
    for label, text in data_lines(report.data):  # one term for a run of equal ones
        lines += (f"<dt>{labels[label]}</dt>" if label != last else "") + f"<dd>{_text(text)}</dd>"
        last = label
    commit = f"Commit {_text(report.commit)}" if report.commit else "Commit unknown"
    return (
        f'<section aria-labelledby="data"><h2 id="data">Data, credits and licences</h2><dl class="data">'
        f"{lines or '<dt>Data</dt><dd>none was read</dd>'}</dl></section>\n"
        f"<footer>{commit}{' with changed sources' if report.dirty else ''}. "
        "The same rows for programs: report.json.</footer>"
    )


def _text(value: object) -> str:
    return escape(_clean(str(value)))


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
