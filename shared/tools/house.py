"""What `check` looks at and runs nothing for: recipes and cards parse, generated tables are fresh, files are short."""

from __future__ import annotations

from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.tools.readme_tables import stale_tables

LONGEST = 450  # lines of a source file outside tests


def problems(catalog: Catalog) -> list[str]:
    """One line each of what a reader would stumble over; none where all is well."""
    found = []
    for name in catalog.names():
        for path in sorted((catalog.root / "recipes" / name).glob("*.yaml")):
            try:
                catalog.recipe(name, path.stem, [])
            except UserError as error:
                found.append(str(error))
    found += [f"{path}: generated table is stale; python -m papers report --tables" for path in stale_tables(catalog)]
    for file, lines in _lines(catalog, "shared", "papers").items():
        if lines > LONGEST:
            found.append(f"{file}: {lines} lines, at most {LONGEST}; split it where its parts part")
    return found


def sizes(catalog: Catalog) -> str:
    """`lines of Python: shared 18,000, papers/clip 1,500, ..., tests 21,000`."""
    folders = ["shared", *(f"papers/{name}" for name in catalog.names()), "tests"]
    counts = (f"{folder} {sum(_lines(catalog, folder).values()):,}" for folder in folders)
    return f"lines of Python: {', '.join(counts)}"


def _lines(catalog: Catalog, *folders: str) -> dict[str, int]:
    """{file under these folders of the repository: its number of lines}"""
    paths = [path for folder in folders for path in sorted((catalog.root / folder).rglob("*.py"))]
    return {path.relative_to(catalog.root).as_posix(): len(path.read_text().splitlines()) for path in paths}
