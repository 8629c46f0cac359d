"""A place where verbs run: the repository's data files, and nothing of this checkout's runs."""

import shutil

import pytest
from tests_common import ROOT


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The repository's data files in a folder with a space in its name; runs/ and mlflow.db land there."""
    target = tmp_path_factory.mktemp("a place") / "with space"
    for name in ("papers", "recipes", "tests/parity"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "checkpoints_manifest.yaml", target)
    shutil.copy(ROOT / "README.md", target)
    return target
