"""The generated parts of README and cards come from results/ alone, and a stale or missing one is told."""

import json
import shutil

import pytest
from tests_common import CATALOG, ROOT

from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.tools.readme_tables import between_markers, speed_table, stale_tables, trust_lines, write_tables

MACHINE = {"cpu": "a CPU", "cores": 2, "gpus": [], "torch": "9"}


def row(name, ratio):
    spread = {"ratio_low": ratio - 0.1, "ratio_high": ratio + 0.1}
    return {
        "setting": "batch 4",
        "name": name,
        "value": 7.5,
        "unit": "pictures/s",
        "median_s": 1.0,
        "ratio": ratio,
        **spread,
    }


@pytest.fixture
def catalog(tmp_path):
    shutil.copytree(CATALOG.folder, tmp_path / "papers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    made = Catalog(tmp_path / "papers", "papers")
    write_tables(made)
    return made


def test_a_race_is_one_line_a_setting_with_its_spread_and_memory_is_no_race(tmp_path):
    folder = tmp_path / "results" / "bench"
    folder.mkdir(parents=True)
    race = {
        "title": "STEP", "settings": {"device": "cpu"}, "machine": MACHINE, "date": "2026-01-02",
        "rows": [row("ours", 1.0), row("theirs", 1.5)],
    }  # fmt: skip
    (folder / "a.json").write_text(json.dumps(race))
    memory = [{"setting": "x", "name": "ours", "value": 3, "unit": "MiB", "ratio": 1.0}]
    (folder / "b.json").write_text(json.dumps(race | {"rows": memory}))
    there = {"settings": {"device": "cuda"}, "machine": MACHINE | {"gpus": ["a GPU, 80 GiB"]}}
    (folder / "c.json").write_text(json.dumps(race | there))
    lines = speed_table(Catalog(tmp_path / "papers", "papers")).splitlines()
    assert lines[2] == "| step | batch 4 | 7.5 pictures/s | 1.50 x [1.40, 1.60] |" and lines[4] == ""
    assert lines[3] == "| step, a GPU, 80 GiB | batch 4 | 7.5 pictures/s | 1.50 x [1.40, 1.60] |"
    assert "a CPU" in lines[5] and "2026-01-02" in lines[5]


def test_without_results_the_parts_say_so(tmp_path):
    nothing = Catalog(tmp_path / "papers", "papers")
    assert speed_table(nothing) == "No committed race yet."
    assert trust_lines(nothing) == "No committed calibration yet."


def test_an_edited_part_is_stale_and_written_anew(catalog):
    assert stale_tables(catalog) == {}
    readme = catalog.root / "README.md"
    readme.write_text(readme.read_text().replace("<!-- speed:end -->", "faster than all\n<!-- speed:end -->"))
    assert list(stale_tables(catalog)) == [readme]
    assert write_tables(catalog) == [readme] and stale_tables(catalog) == {}
    assert "faster than all" not in readme.read_text()


def test_a_missing_marker_is_told(tmp_path):
    with pytest.raises(UserError, match=r"needs the markers <!-- speed:begin --> and <!-- speed:end --> once each"):
        between_markers(tmp_path / "README.md", "<!-- speed:begin -->", "speed", "")
