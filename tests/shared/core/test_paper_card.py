"""paper.yaml's reader: a good file is read whole; every kind of fault is refused by file, row and key."""

import re
import subprocess
import sys
import textwrap

import pytest

from shared.core.errors import UserError
from shared.core.paper_card import UNITS, bibtex, load_paper

GOOD = """
paper:
  key: toy
  title: A Toy Paper
  authors: [Ada Lovelace, Alan Turing]
  year: 1950
  venue: Mind
  arxiv: "1950.00001"
  code: https://example.org/toy
  bibtex: "@article{toy1950, title = {A Toy Paper}}"
  hurdle: Nothing was known of toys.
  datasets:
    - {name: Blocks, bibtex: "@misc{blocks, title = {Blocks}}"}
  base_weights: []
structure:
  - {id: toy.size, variant: toy-s, part: total, reported: 12, unit: M parameters, tolerance: 0.5,
     reason: printed to whole millions, source: Table 1}
claims:
  - id: toy.bigger
    statement: Bigger is better.
    reported: 2
    reported_as: 4x
    unit: log2 ratio
    direction: greater
    margin: null
    metric: toy/top1@plain
    treatment: big
    baseline: small
    protocol_small: Two sizes, same data.
    scale_caveat: Small sizes only.
    source: Fig. 2
  - id: toy.same
    statement: Colour does not matter.
    reported: null
    reported_as: null
    unit: points
    direction: equal
    margin: 3
    margin_reason: within sampling error
    metric: toy/top1@plain
    treatment: red
    baseline: blue
    protocol_small: Two colours, same data.
    scale_caveat: Two colours only.
    source: Sec. 4
metrics:
  - id: toy.blocks
    variant: toy-s
    dataset: Blocks
    split: test
    metric: toy/top1@plain
    reported: 90.5
    remeasured: {value: 90.1, by: somebody, source: toybox docs/results.csv}
    tolerance: 1.0
    source: Table 2
    need: {weights: toy-s, data: "imagefolder: test/"}
pitfalls:
  - {what: Toys break., where: Sec. 9, handling: We glue them.}
"""


def read(tmp_path, text):
    path = tmp_path / "paper.yaml"
    path.write_text(text, encoding="utf-8")
    return load_paper(path)


def with_change(old, new):
    assert GOOD.count(old) == 1, f"{old!r} must stand once in the good file"
    return GOOD.replace(old, new)


def test_a_good_file_is_read_into_typed_rows(tmp_path):
    card = read(tmp_path, GOOD)
    assert card.paper.authors == ("Ada Lovelace", "Alan Turing") and card.paper.base_weights == ()
    (size,) = card.structure
    assert size.reported == 12.0 and isinstance(size.reported, float) and UNITS[size.unit] == 1e6
    bigger, same = card.claims
    assert (bigger.direction, bigger.margin, bigger.margin_reason) == ("greater", None, None)
    assert (same.direction, same.margin, same.reported) == ("equal", 3.0, None)
    assert card.metrics[0].remeasured.value == 90.1 and card.metrics[0].need.weights == "toy-s"
    with pytest.raises(AttributeError):
        card.structure[0].tolerance = 100.0


def test_bibtex_lists_the_paper_first_and_then_its_datasets(tmp_path):
    assert re.findall(r"@\w+\{(\w+)", bibtex(read(tmp_path, GOOD))) == ["toy1950", "blocks"]


FAULTS = {
    "an unknown key, with the nearest": (
        ("tolerance: 0.5,", "tolerence: 0.5,"),
        r"structure: 'toy\.size': unknown key 'tolerence' \(did you mean 'tolerance'\?\)",
    ),
    "an unknown section": (("pitfalls:", "pitfall:"), r"unknown key 'pitfall' \(did you mean 'pitfalls'\?\)"),
    "a missing key": (("part: total, ", ""), r"structure: 'toy\.size': missing key 'part'"),
    "a missing tolerance": ((" tolerance: 0.5,", ""), r"structure: 'toy\.size': missing key 'tolerance'"),
    "a missing source": ((", source: Table 1}", "}"), r"structure: 'toy\.size': missing key 'source'"),
    "an empty source": (("source: Fig. 2", "source: ''"), r"claims: 'toy\.bigger': source: is empty"),
    "a null where a text belongs": (("source: Fig. 2", "source:"), r"claims: 'toy\.bigger': source: is empty"),
    "a missing id": (("id: toy.size, ", ""), r"structure: row 1: missing key 'id'"),
    "an internal source": (
        ("source: Fig. 2", "source: 'idx:123'"),
        r"'toy\.bigger': source: 'idx:123' is not something",
    ),
    "a path as source": (
        ("toybox docs/results.csv", "/data/x.csv"),
        r"'toy\.blocks': remeasured: source: '/data/x\.csv'",
    ),
    "a text for a number": (
        ("reported: 12", "reported: 12M"),
        r"'toy\.size': reported: needs a finite number, not '12M'",
    ),
    "a truth value for a number": (("reported: 12", "reported: yes"), r"reported: needs a finite number, not True"),
    "not a number": (("reported: 12", "reported: .nan"), r"'toy\.size': reported: needs a finite number"),
    "a number for a text": (('"1950.00001"', "1950.00001"), r"paper: arxiv: needs a text, not 1950\.00001.*quote"),
    "a broken year": (("year: 1950", "year: 1950.5"), r"paper: year: needs a whole number"),
    "a text for a list": (("[Ada Lovelace, Alan Turing]", "Ada"), r"paper: authors: needs a list"),
    "a text for a mapping": (
        ("{what: Toys break., where: Sec. 9, handling: We glue them.}", "glue"),
        r"pitfalls: row 1: needs",
    ),
    "a repeated id": (
        ("id: toy.blocks", "id: toy.size"),
        r"metrics: 'toy\.size': the id is taken by a row of structure",
    ),
    "another paper's id": (("id: toy.blocks", "id: clip.blocks"), r"'clip\.blocks': the id must start with .*'toy\.'"),
    "an unknown unit": (
        ("unit: M parameters", "unit: Mparameters"),
        r"unit 'Mparameters' \(did you mean 'M parameters'\?\)",
    ),
    "a negative tolerance": (("tolerance: 0.5", "tolerance: -0.5"), r"'toy\.size': tolerance: needs zero or more"),
    "no tolerance for a score": (
        ("tolerance: 1.0", "tolerance: 0"),
        r"'toy\.blocks': tolerance: needs a number of points",
    ),
    "a score without number": (
        (
            "reported: 90.5\n    remeasured: {value: 90.1, by: somebody, source: toybox docs/results.csv}",
            "reported: null\n    remeasured: null",
        ),
        r"'toy\.blocks': reported: is empty, and so is 'remeasured'",
    ),
    "a bare metric name": (
        ("metric: toy/top1@plain\n    reported: 90.5", "metric: top1\n    reported: 90.5"),
        r"metric: 'top1' does not name its protocol",
    ),
    "an unknown direction": (
        ("direction: greater", "direction: up"),
        r"'toy\.bigger': direction: needs one of greater, equal",
    ),
    "a margin on greater": (
        ("margin: null", "margin: 1"),
        r"'toy\.bigger': margin: of direction 'greater' is null, or",
    ),
    "no worse without reason": (("margin: null", "margin: -1"), r"'toy\.bigger': margin_reason: is empty"),
    "no margin on equal": (("margin: 3\n", "margin: null\n"), r"'toy\.same': margin: direction 'equal' needs a margin"),
    "a margin of zero": (("margin: 3\n", "margin: 0\n"), r"'toy\.same': margin: direction 'equal' needs a margin"),
    "a margin without reason": (
        ("    margin_reason: within sampling error\n", ""),
        r"'toy\.same': margin_reason: is empty",
    ),
    "a number without its print": (("reported_as: 4x", "reported_as: null"), r"'toy\.bigger': reported_as: is empty"),
    "a key given twice": (
        ("  year: 1950", "  year: 1950\n  year: 1951"),
        r"line 7: not valid YAML: key 'year' is given twice",
    ),
    "broken YAML": (("authors: [Ada", "authors: ]Ada"), r"line \d+: not valid YAML"),
    "an unbalanced citation": (("{Blocks}}", "{Blocks}"), r"datasets: 'Blocks': bibtex: needs one BibTeX entry"),
    "a plain http address": (("https://", "http://"), r"paper: code: needs an https:// address"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused_by_name(tmp_path, fault):
    (old, new), message = FAULTS[fault]
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, with_change(old, new))
    assert str(caught.value).startswith(str(tmp_path / "paper.yaml")) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*paper\.yaml: cannot be read"):
        load_paper(tmp_path / "nowhere" / "paper.yaml")


def test_an_empty_file_says_which_sections_it_needs(tmp_path):
    with pytest.raises(UserError, match="needs a mapping with the keys paper, structure, claims, metrics, pitfalls"):
        read(tmp_path, "")


def test_reading_evidence_imports_none_of_the_heavy_packages():
    code = """
        import sys
        import shared.core.paper_card
        print(sorted({"torch", "numpy", "lightning", "transformers", "omegaconf"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
