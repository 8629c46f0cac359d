"""Generated parts of README.md and of each card, between markers, from cards and results/: papers, evidence, speed, the
rate of false verdicts."""

from __future__ import annotations

import json
import re
from pathlib import Path

from shared.catalogue import Catalogue
from shared.errors import UserError
from shared.recipes import SCALES
from shared.runs import write_whole

# What may differ from the committed recipe in a run that is kept: seeds, rungs, where its data lies, how it was spread.
OPEN_TO_CHOICE = {"PAPER", "SCALE", "SEEDS", "ARGS", "data", "data_root", "jobs", "rungs"}


def papers_table(catalogue: Catalogue) -> str:
    """One line a paper: what it is, its scales, rows a rung, and how the newest committed mini run ended."""
    lines = [
        "| paper | title | scales | structure | parity | claims | metrics |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in catalogue.names():
        card = catalogue.card(name)
        scales = [s for s in SCALES if (catalogue.root / "recipes" / name / f"{s}.yaml").is_file()]
        rows = default_result(catalogue, name)
        cells = [f"[{name}](papers/{name})", f"{card.paper.title} ({card.paper.year})", ", ".join(scales)]
        declared = {"structure": len(card.structure), "claims": len(card.claims), "metrics": len(card.metrics)}
        for rung in ("structure", "parity", "claims", "metrics"):
            found = [row for row in rows if row["rung"] == rung]
            cells.append(tally(found) if found else f"{declared.get(rung, '')} declared, none run".strip())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tally(rows: list[dict]) -> str:
    """'12 match', '8 reproduced, 2 inconclusive', ... in a fixed order."""
    order = ("match", "reproduced", "inconclusive", "contradicted", "mismatch", "not run")
    counts = {word: sum(row["verdict"] == word for row in rows) for word in order}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def results(catalogue: Catalogue, name: str) -> list[Path]:
    return sorted((catalogue.root / "results" / name).glob("*.json"))


def default_result(catalogue: Catalogue, name: str) -> list[dict]:
    """Rows of the committed mini run on the default data; none where there is no such run."""
    path = catalogue.root / "results" / name / "mini-emoji.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def evidence_table(catalogue: Catalogue, name: str) -> str:
    """The claims of a card, one column a committed run, and the tally of the other rungs."""
    runs = {path.stem: json.loads(path.read_text())["rows"] for path in results(catalogue, name)}
    if not runs:
        return "No committed run yet."
    lines = ["| claim | reported | " + " | ".join(runs) + " |", "| --- | --- |" + " --- |" * len(runs)]
    for claim in catalogue.card(name).claims:
        cells = [f"`{claim.id}`", claim.reported_as or "-"]
        for rows in runs.values():
            found = next((row for row in rows if row["id"] == claim.id), None)
            cells.append(claim_cell(found))
        lines.append("| " + " | ".join(cells) + " |")
    for rung in ("structure", "parity", "metrics"):
        cells = [tally([row for row in rows if row["rung"] == rung]) or "-" for rows in runs.values()]
        lines.append(f"| {rung}, all rows | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claim_cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["verdict"] == "not run":
        return "not run"
    interval = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"**{row['verdict']}** {row['reproduced']:.2f}{interval}"


def speed_table(catalogue: Catalogue) -> str:
    """Every committed race of ours against other libraries: one line a setting, with the spread of its ratios."""
    from shared.bench import by_setting, ratio_text
    from shared.report import machine_line

    found = [json.loads(path.read_text()) for path in sorted((catalogue.root / "results" / "bench").glob("*.json"))]
    races = [race for race in found if race["rows"][0].get("name") == "ours" and "median_s" in race["rows"][0]]
    if not races:
        return "No committed race yet."
    others = list(dict.fromkeys(row["name"] for race in races for row in race["rows"] if row["name"] != "ours"))
    lines = ["| what | setting | ours | " + " | ".join(f"{name} takes" for name in others) + " |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(others))
    for race in races:
        gpus = race["machine"]["gpus"] if race["settings"]["device"] == "cuda" else []
        what = ", ".join([race["title"].lower(), *gpus])
        for setting, group in by_setting(race["rows"]).items():
            ours = f"{group['ours']['value']:,g} {group['ours']['unit']}"
            cells = [ratio_text(group[name]) if name in group else "-" for name in others]
            lines.append(f"| {what} | {setting} | {ours} | " + " | ".join(cells) + " |")
    machines = dict.fromkeys(
        f"{machine_line(race['machine'])}, {race['date']}{', sources not committed yet' if race.get('dirty') else ''}"
        for race in races
    )
    how = "Ratios are medians over the rounds of one run, quartiles in brackets; above 1, ours is ahead."
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}.", how])


def trust_lines(catalogue: Catalogue) -> str:
    """What A/A runs and planted effects said of the verdicts, a paragraph a paper."""
    from shared.calibration import line

    paths = sorted((catalogue.root / "results" / "calibration").glob("*.json"))
    return "\n\n".join(line(path) for path in paths) or "No committed calibration yet."


def generated(catalogue: Catalogue) -> dict[Path, str]:
    """{file: its text with every generated part fresh}."""
    parts = {"table": papers_table, "speed": speed_table, "trust": trust_lines}
    readme = catalogue.root / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, make in parts.items():
        text = between_markers(readme, text, name, make(catalogue))
    wanted = {readme: text}
    for name in catalogue.names():
        card = catalogue.folder / name / "README.md"
        wanted[card] = between_markers(card, card.read_text(encoding="utf-8"), "table", evidence_table(catalogue, name))
    return wanted


def between_markers(path: Path, text: str, name: str, part: str) -> str:
    """`text`, of `path`, with `part` between the markers of that name."""
    begin, end = (f"<!-- {name}:{which} -->" for which in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{path}: needs the markers {begin} and {end} once each")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{part}\n{end}{after}"


def stale_tables(catalogue: Catalogue) -> dict[Path, str]:
    """{file: its fresh text}, only those that differ from what is written."""
    return {path: text for path, text in generated(catalogue).items() if path.read_text(encoding="utf-8") != text}


def write_tables(catalogue: Catalogue) -> list[Path]:
    stale = stale_tables(catalogue)
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
    return list(stale)


JUDGED = "verdicts taken anew from the stored intervals, by the rule of today (shared/stats.py)"


def judge_results(catalogue: Catalogue, name: str) -> list[Path]:
    """Take the verdicts of a paper's kept evidence anew where the rule has changed since. -> the files that changed"""
    from shared.stats import Rule, verdict_of_interval

    rules = {row.id: Rule(row.direction, row.margin or 0.0) for row in catalogue.card(name).claims}
    written = []
    for path in results(catalogue, name):
        found, changed = json.loads(path.read_text()), False
        for row in found["rows"]:
            if row["rung"] != "claims" or row["low"] is None or row["id"] not in rules:
                continue
            word = verdict_of_interval(row["reproduced"], row["low"], row["high"], row["seeds"], rules[row["id"]])
            if word != row["verdict"]:
                row["what"] += f" [{row['verdict']} by the rule of its day]"
                row["verdict"], changed = word, True
        if changed:
            found["data"]["run"] = [*found["data"].get("run", []), JUDGED]
            write_whole(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            written.append(path)
    return written


def keep_result(catalogue: Catalogue, report: Path) -> Path:
    """Put a report.json at results/<paper>/<scale>-<data>.json: what was measured becomes committed evidence.

    Where the data lay is a matter of one machine: PATH stands for it.
    """
    text = report.read_text()
    found = json.loads(text)
    if found["dirty"] or not found["commit"]:
        raise UserError(f"{report}: was run on uncommitted changes, so nobody could repeat it; commit and run again")
    changed = set(re.findall(r"(\w+)=", found["command"])) - OPEN_TO_CHOICE
    if changed or found["scale"] == "smoke":
        why = f"a changed recipe ({', '.join(sorted(changed))})" if changed else "smoke proves only that it runs"
        raise UserError(f"{report}: not kept as evidence: {why}; run the recipe as it is committed")
    target = catalogue.root / "results" / found["paper"] / f"{found['scale']}-{found['data']['name']}.json"
    if target.is_file():
        lost = {row["rung"] for row in json.loads(target.read_text())["rows"]} - {row["rung"] for row in found["rows"]}
        if lost:
            have = ", ".join(sorted(lost))
            raise UserError(f"{report}: not kept as evidence: {target} also has {have}; climb these too")
    target.parent.mkdir(parents=True, exist_ok=True)
    place = re.search(r'data_root=(/[^\s"]+)', found["command"])
    write_whole(target, text.replace(json.dumps(place[1].rstrip("/"))[1:-1], "PATH") if place else text)
    return target
