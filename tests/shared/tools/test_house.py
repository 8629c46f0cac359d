"""`check` finds what a reader would stumble over, and says how large the house is."""

import shutil

import pytest
from tests_common import CATALOG, ROOT

from shared.core.catalog import Catalog
from shared.tools.house import LONGEST, problems, sizes


@pytest.fixture
def catalog(tmp_path):
    for folder in ("papers", "recipes", "results", "shared"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return Catalog(tmp_path / "papers", "papers")


def test_the_house_as_it_is_has_no_problems():
    assert problems(CATALOG) == []


def test_a_wrong_recipe_a_stale_table_and_a_long_file_are_named(catalog):
    recipe = catalog.root / "recipes" / "clip" / "mini.yaml"
    recipe.write_text(recipe.read_text() + "lerning_rate: 1\n")
    readme = catalog.root / "README.md"
    readme.write_text(readme.read_text().replace("<!-- speed:end -->", "faster than all\n<!-- speed:end -->"))
    (catalog.root / "shared" / "long.py").write_text("\n" * (LONGEST + 1))
    wrong, stale, long = problems(catalog)
    assert "unknown key 'lerning_rate'" in wrong and "README.md: generated table is stale" in stale
    assert long == f"shared/long.py: {LONGEST + 1} lines, at most {LONGEST}; split it where its parts part"


def test_sizes_are_counted_by_folder(catalog):
    before = sizes(catalog)
    (catalog.root / "papers" / "blip" / "more.py").write_text("a = 1\nb = 2\n")
    count = int(before.split("papers/blip ")[1].split(", papers")[0].replace(",", ""))
    assert sizes(catalog) == before.replace(f"papers/blip {count:,}", f"papers/blip {count + 2:,}")
