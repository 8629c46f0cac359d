"""README.md of an exported folder: front matter as model hubs read it, use, origin, licence, evidence, citation."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from shared.core.catalog import Catalog
from shared.core.files import sha256
from shared.core.paper_card import bibtex
from shared.core.provenance import commit_and_dirty
from shared.report.evidence_table import evidence_table, results
from shared.weights.export import HfSpec
from shared.weights.manifest import Entry, load_manifest

LICENCES = {"mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0"}  # as model hubs spell them


def model_card(catalog: Catalog, name: str, source: Path, variant: str, spec: HfSpec) -> str:
    """The card of the paper's weights in `source`, a file or a folder, exported by `spec`."""
    seal = sha256(source) if source.is_file() else None
    entries = load_manifest(catalog.root / "checkpoints_manifest.yaml").values()
    entry = next((entry for entry in entries if seal and entry.sha256 == seal), None)
    card = catalog.card(name)
    paper = card.paper
    licence = identifier(entry) if spec.licensed else "other"
    front = {
        "license": licence,
        **({"license_name": "not-stated"} if licence == "other" else {}),
        "library_name": spec.library,
        "pipeline_tag": spec.task,
        "tags": [spec.tag, "vision-language", *([] if entry else ["not-a-release"])],
    }
    commit, dirty = commit_and_dirty(catalog.root)
    by = f"commit {commit}{', with changes that are not committed' if dirty else ''}" if commit else "an unknown commit"
    by += ". Names and layout change, half precision may become single; no value changes."
    notes = "".join(f"\n- {note}" for note in spec.notes)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {variant}",
        f"{paper.authors[0]} et al., *{paper.title}* ({paper.venue}, [arXiv:{paper.arxiv}]"
        f"(https://arxiv.org/abs/{paper.arxiv})), as {spec.loaded_by}.",
        spec.usage.strip(),
        "## Where the weights come from",
        f"{origin(source, seal, entry)}{notes}\n- Converted by {by}",
        "## Evidence for the implementation",
        "These rows are about the code that trained or converted the weights. *Structure* and *parity* hold for this "
        "architecture; *claims* were measured on small models, trained for that purpose, and say nothing of other "
        "weights; *metrics* are of the released weights.",
        evidence_table(catalog, name),
        "\n".join(run_line(path) for path in results(catalog, name)),
        "An effect is followed by its 95 % interval; its unit and the rule of its verdict stand in the paper's "
        "`paper.yaml`.",
        "## How to cite",
        f"```bibtex\n{bibtex(card).strip()}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def run_line(path: Path) -> str:
    """A committed run in one line."""
    run = json.loads(path.read_text(encoding="utf-8"))
    seeds = max((row["seeds"] or 0 for row in run["rows"]), default=0)
    return (
        f"- `{path.stem}`: `{run['command']}`, commit {run['commit'][:12]}, {seeds} paired seeds, "
        f"{run['seconds'] / 60:.0f} minutes"
    )


def origin(source: Path, seal: str | None, entry: Entry | None) -> str:
    file = f"- `{source.name}`, {f'sha256 `{seal}`' if seal else 'a folder of several files'}."
    if entry is None:
        return (
            f"{file} This is none of the released files that the manifest lists: who publishes this folder has to say "
            "what the weights were trained on, and under which licence they are."
        )
    return f"{file} It is {entry.what}, from {entry.origin}.\n- Licence: {entry.licence}."


def identifier(entry: Entry | None) -> str:
    """The licence as model hubs spell it: what the manifest's text begins with, where that is one they know."""
    first = entry.licence.split()[0].strip(",;").lower() if entry else ""
    return first if first in LICENCES else "other"
