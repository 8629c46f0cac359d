"""The metrics rung of every paper: each row of a card can be measured by something, and says what it lacks."""

from dataclasses import replace

import pytest
from benchmark_rows import forget_scores
from tests_common import CATALOG

from shared.core.errors import UserError
from shared.experiments import benchmarks
from shared.experiments.benchmarks import FOLDERS
from shared.weights.manifest import load_manifest

ENTRIES = load_manifest(CATALOG.root / "checkpoints_manifest.yaml")
pytestmark = pytest.mark.parametrize("name", CATALOG.names())


def test_every_row_has_its_task_and_its_folder(name):
    tasks = set(CATALOG.package(name).benchmarks.BENCHMARKS)
    rows = CATALOG.card(name).metrics
    assert {row.metric.partition("/")[0] for row in rows} == tasks
    assert {row.dataset for row in rows} <= set(FOLDERS)


@pytest.mark.parametrize(("scale", "root"), [("paper", "nowhere"), ("paper", ""), ("mini", "nowhere")])
def test_every_row_that_cannot_run_names_what_it_needs(name, scale, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmarks, "load_manifest", lambda path: ENTRIES)
    forget_scores()
    recipe = replace(CATALOG.recipe(name, "paper", []), scale=scale, data_root=root)
    for row in CATALOG.card(name).metrics:
        with pytest.raises(UserError) as error:
            CATALOG.package(name).benchmarks.measure(row, recipe)
        message = str(error.value)
        assert "\n" not in message
        if "spice" in row.metric:
            assert "Java" in message
        elif "generate-official" not in row.metric:  # BLIP-2's, for which no weights were released
            command = f'make reproduce PAPER={name} SCALE=paper ARGS="data_root={root or "FOLDER"}"'
            place = f"data {root or 'FOLDER'}/{FOLDERS[row.dataset]} ({row.need.data}): missing"
            assert message.startswith(f"{command} with {place}; weights "), row.id
            assert "to fetch" in message or f"weights {root or 'FOLDER'}/weights/" in message, row.id
