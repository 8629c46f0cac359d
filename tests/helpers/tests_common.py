"""Where the repository lies, for tests that are parametrised before fixtures exist."""

from pathlib import Path

from shared.core.catalog import Catalogue

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = Catalogue(ROOT / "papers", "papers")
