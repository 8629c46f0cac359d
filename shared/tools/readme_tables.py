"""Generated parts of README.md and of each card, between markers, from cards and results/: papers, evidence, speed, the
rate of false verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.core.recipe import SCALES
from shared.report.evidence_table import default_result, evidence_table, tally

HEADLINES = (
    "clip-inference-cpu-fp32", "clip-step-cpu-fp32", "clip-step-cuda-bf16",
    "blip-step-cpu-fp32", "blip-caption-cpu-fp32", "blip2-generate-cpu-fp32",
)  # fmt: skip


def papers_table(catalog: Catalog) -> str:
    """One line a paper: what it is, its scales, rows a rung, and how the newest committed mini run ended."""
    lines = [
        "| paper | title | scales | structure | parity | claims | metrics |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in catalog.names():
        card = catalog.card(name)
        scales = [s for s in SCALES if (catalog.root / "recipes" / name / f"{s}.yaml").is_file()]
        rows = default_result(catalog, name)
        cells = [f"[{name}](papers/{name})", f"{card.paper.title} ({card.paper.year})", ", ".join(scales)]
        declared = {"structure": len(card.structure), "claims": len(card.claims), "metrics": len(card.metrics)}
        for rung in ("structure", "parity", "claims", "metrics"):
            found = [row for row in rows if row["rung"] == rung]
            cells.append(tally(found) if found else f"{declared.get(rung, '')} declared, none run".strip())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_table(catalog: Catalog, files: Sequence[str] = ()) -> str:
    """Committed races of ours against other libraries: one line a setting, with the spread of its ratios.

    files: of these races of results/bench/ alone, and of each its last, largest setting; none: everything.
    """
    from shared.core.provenance import machine_line
    from shared.tools.bench_output import by_setting, ratio_text

    folder = catalog.root / "results" / "bench"
    paths = [folder / f"{name}.json" for name in files] if files else sorted(folder.glob("*.json"))
    found = [json.loads(path.read_text()) for path in paths if path.is_file()]
    races = [race for race in found if race["rows"][0].get("name") == "ours" and "median_s" in race["rows"][0]]
    if not races:
        return "No committed race yet."
    groups = [list(by_setting(race["rows"]).items())[-1 if files else 0 :] for race in races]
    shown = {row for race in groups for _, group in race for row in group}
    others = [name for name in dict.fromkeys(row["name"] for race in races for row in race["rows"]) if name in shown]
    others.remove("ours")
    lines = ["| what | setting | ours | " + " | ".join(f"{name} takes" for name in others) + " |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(others))
    for race, settings in zip(races, groups, strict=True):
        gpus = race["machine"]["gpus"] if race["settings"]["device"] == "cuda" else []
        what = ", ".join([race["title"].lower(), *gpus])
        for setting, group in settings:
            ours = f"{group['ours']['value']:,g} {group['ours']['unit']}"
            cells = [ratio_text(group[name]) if name in group else "-" for name in others]
            lines.append(f"| {what} | {setting} | {ours} | " + " | ".join(cells) + " |")
    machines = dict.fromkeys(
        f"{machine_line(race['machine'])}, {race['date']}{', sources not committed yet' if race.get('dirty') else ''}"
        for race in races
    )
    how = "Ratios are medians over the rounds of one run, quartiles in brackets; above 1, ours is ahead."
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}.", how])


def speed_headlines(catalog: Catalog) -> str:
    """README's six lines: what a reader of each paper asks first, at the largest setting that was raced."""
    return speed_table(catalog, HEADLINES)


def trust_lines(catalog: Catalog) -> str:
    """What A/A runs and planted effects said of the verdicts, a paragraph a paper."""
    from shared.experiments.calibration import line

    paths = sorted((catalog.root / "results" / "calibration").glob("*.json"))
    return "\n\n".join(line(path) for path in paths) or "No committed calibration yet."


def generated(catalog: Catalog) -> dict[Path, str]:
    """{file: its text with every generated part fresh}."""
    parts: dict[str, dict[str, Callable[[Catalog], str]]] = {
        "README.md": {"table": papers_table, "speed": speed_headlines, "trust": trust_lines},
        "results/bench/README.md": {"speed": speed_table},
    }
    wanted = {}
    for file, tables in parts.items():
        path = catalog.root / file
        wanted[path] = path.read_text(encoding="utf-8")
        for name, make in tables.items():
            wanted[path] = between_markers(path, wanted[path], name, make(catalog))
    for name in catalog.names():
        card = catalog.folder / name / "README.md"
        wanted[card] = between_markers(card, card.read_text(encoding="utf-8"), "table", evidence_table(catalog, name))
    return wanted


def between_markers(path: Path, text: str, name: str, part: str) -> str:
    """`text`, of `path`, with `part` between the markers of that name."""
    begin, end = (f"<!-- {name}:{which} -->" for which in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{path}: needs the markers {begin} and {end} once each")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{part}\n{end}{after}"


def stale_tables(catalog: Catalog) -> dict[Path, str]:
    """{file: its fresh text}, only those that differ from what is written."""
    return {path: text for path, text in generated(catalog).items() if path.read_text(encoding="utf-8") != text}


def write_tables(catalog: Catalog) -> list[Path]:
    stale = stale_tables(catalog)
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
    return list(stale)
