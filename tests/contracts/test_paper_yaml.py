"""Every folder of papers/: its figures parse, its citation agrees with them, its card can take the generated table."""

import re
from pathlib import Path

import pytest
import yaml

from shared.core.paper_card import bibtex, load_paper

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path for path in (ROOT / "papers").iterdir() if path.is_dir() and path.name[0] not in "_.")

pytestmark = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def parsed(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def full_names(people):
    return tuple(f"{person['given-names']} {person['family-names']}" for person in people)


def test_paper_yaml_parses_and_is_filed_under_its_own_key(folder):
    card = load_paper(folder / "paper.yaml")
    assert card.paper.key == folder.name


def test_row_ids_are_unique_and_start_with_the_papers_key(folder):
    card = load_paper(folder / "paper.yaml")
    ids = [row.id for row in (*card.structure, *card.claims, *card.metrics)]
    assert ids and len(ids) == len(set(ids))
    assert [i for i in ids if not i.startswith(f"{folder.name}.")] == []


def test_every_rung_that_needs_figures_has_some(folder):
    card = load_paper(folder / "paper.yaml")
    assert card.structure and card.claims and card.pitfalls


def test_every_metrics_row_names_weights_of_the_manifest(folder):
    manifest = parsed(ROOT / "checkpoints_manifest.yaml")
    rows = load_paper(folder / "paper.yaml").metrics
    assert [row.id for row in rows if row.need.weights not in manifest] == []


def test_prompt_lists_hold_as_many_entries_as_they_declare(folder):
    path = folder / "prompts.yaml"
    if not path.exists():
        pytest.skip("this paper asks with no published prompts")
    prompts = parsed(path)
    for group, entries in (("template_sets", "templates"), ("class_sets", "names")):
        for name, entry in prompts[group].items():
            assert len(entry[entries]) == len(set(entry[entries])) == entry["count"], name
    for entry in prompts["template_sets"].values():
        assert all(template.count("{}") == 1 for template in entry["templates"])
    assert {entry["template_set"] for entry in prompts["class_sets"].values()} <= set(prompts["template_sets"])


def test_the_papers_citation_file_agrees_with_paper_yaml(folder):
    paper = load_paper(folder / "paper.yaml").paper
    cff = parsed(folder / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    (entry,) = [reference for reference in cff["references"] if reference["title"] == paper.title]
    assert full_names(entry["authors"]) == paper.authors
    assert entry["year"] == paper.year
    assert {"type": "other", "value": f"arXiv:{paper.arxiv}"}.items() <= entry["identifiers"][0].items()


def test_the_repositorys_citation_file_refers_to_the_paper(folder):
    paper = load_paper(folder / "paper.yaml").paper
    (entry,) = [ref for ref in parsed(ROOT / "CITATION.cff")["references"] if ref["title"] == paper.title]
    assert (full_names(entry["authors"]), entry["year"]) == (paper.authors, paper.year)


def test_the_bibtex_names_every_author_and_the_title(folder):
    paper = load_paper(folder / "paper.yaml").paper
    assert paper.title in paper.bibtex and f"{paper.year}" in paper.bibtex
    assert [name for name in paper.authors if name.split()[-1] not in paper.bibtex] == []
    assert bibtex(load_paper(folder / "paper.yaml")).startswith(paper.bibtex.strip())


def test_every_file_that_the_card_lists_is_there(folder):
    """And the table lists every file of the paper but __init__.py."""
    rows = [line for line in (folder / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row.split("|")[1])}
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*.py") if p.name != "__init__.py"}
    assert listed == there


def test_the_card_has_room_for_the_generated_table_and_is_short(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- table:begin -->", "<!-- table:end -->"
    assert text.count(begin) == 1 and text.count(end) == 1 and text.index(begin) < text.index(end)
    assert len(text[: text.index(begin)].splitlines()) + len(text[text.index(end) :].splitlines()) <= 120
