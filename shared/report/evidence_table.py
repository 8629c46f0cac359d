"""Committed evidence: kept, judged anew, and a card's table of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.core.files import write_whole

# What may differ from the committed recipe in a run that is kept: seeds, rungs, where its data lies, how it was spread.
OPEN_TO_CHOICE = {"PAPER", "SCALE", "SEEDS", "ARGS", "data", "data_root", "jobs", "rungs"}


def tally(rows: list[dict]) -> str:
    """'12 match', '8 reproduced, 2 inconclusive', ... in a fixed order."""
    order = ("match", "reproduced", "inconclusive", "contradicted", "mismatch", "not run")
    counts = {word: sum(row["verdict"] == word for row in rows) for word in order}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def results(catalog: Catalog, name: str) -> list[Path]:
    return sorted((catalog.root / "results" / name).glob("*.json"))


def default_result(catalog: Catalog, name: str) -> list[dict]:
    """Rows of the committed mini run on the default data; none where there is no such run."""
    path = catalog.root / "results" / name / "mini-emoji.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def evidence_table(catalog: Catalog, name: str) -> str:
    """The claims of a card, one column a committed run, and the tally of the other rungs."""
    runs = {path.stem: json.loads(path.read_text())["rows"] for path in results(catalog, name)}
    if not runs:
        return "No committed run yet."
    lines = ["| claim | reported | " + " | ".join(runs) + " |", "| --- | --- |" + " --- |" * len(runs)]
    for claim in catalog.card(name).claims:
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


JUDGED = "verdicts taken anew from the stored intervals, by the rule of today (shared/metrics/stats.py)"


def judge_results(catalog: Catalog, name: str) -> list[Path]:
    """Take the verdicts of a paper's kept evidence anew where the rule has changed since. -> the files that changed"""
    from shared.metrics.stats import Rule, verdict_of_interval

    rules = {row.id: Rule(row.direction, row.margin or 0.0) for row in catalog.card(name).claims}
    written = []
    for path in results(catalog, name):
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


def keep_result(catalog: Catalog, report: Path) -> Path:
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
    target = catalog.root / "results" / found["paper"] / f"{found['scale']}-{found['data']['name']}.json"
    if target.is_file():
        lost = {row["rung"] for row in json.loads(target.read_text())["rows"]} - {row["rung"] for row in found["rows"]}
        if lost:
            have = ", ".join(sorted(lost))
            raise UserError(f"{report}: not kept as evidence: {target} also has {have}; climb these too")
    target.parent.mkdir(parents=True, exist_ok=True)
    place = re.search(r'data_root=(/[^\s"]+)', found["command"])
    write_whole(target, text.replace(json.dumps(place[1].rstrip("/"))[1:-1], "PATH") if place else text)
    return target
