"""Where the two packs of a kind of scenes lie: made here, in the cache of downloads, or in a folder of the user's."""

from __future__ import annotations

from pathlib import Path

from shared.core.errors import UserError
from shared.data.synthetic.sprites import VENDORS, SpritePack, load_pack


def packs(name: str, root: str | Path | None = None) -> tuple[SpritePack, SpritePack]:
    """Of `emoji` or `shapes`: the artist that a world is learned from, and the other one. root: as for make_dataset."""
    ours, other = VENDORS[name]
    if name == "shapes":
        return load_pack(name, ours), load_pack(name, other)
    return load_pack(name, ours, source=_package(ours, root)), load_pack(name, other, source=_package(other, root))


def _package(vendor: str, root: str | Path | None) -> Path:
    if root is not None:
        folder = Path(root)
        candidates = [*sorted(folder.glob(f"*emoji*{vendor}*.tgz")), *sorted(folder.glob(f"*{vendor}*")), folder]
        found = [path for path in candidates if _is_package(path, vendor)]
        if not found:
            raise UserError(
                f"emoji: no package emoji-datasource-{vendor} in {root} (looked for *emoji*{vendor}*.tgz and for "
                "folders with emoji.json): put it there, or leave data_root empty to have it fetched"
            )
        return found[0]
    from shared.weights.fetch import fetch
    from shared.weights.manifest import load_manifest

    return fetch(load_manifest()[f"emoji-{vendor}"])


def _is_package(path: Path, vendor: str) -> bool:
    if path.is_file():
        return path.suffix == ".tgz"
    return any(
        (folder / "emoji.json").is_file() and (folder / "img" / vendor).is_dir() for folder in (path, path / "package")
    )
