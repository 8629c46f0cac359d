"""Where the repository lies, for tests that are parametrised before fixtures exist."""

from pathlib import Path

from shared.core.catalog import Catalog

ROOT = Path(__file__).resolve().parents[2]
CATALOG = Catalog(ROOT / "papers", "papers")
