"""The JSON files of published sets, row by row. Whatever a file lacks is a UserError that names file, row and key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.core.archives import leads_out
from shared.core.errors import UserError
from shared.core.text import shown
from shared.data.readers import Record


@dataclass(frozen=True)
class Row:
    """A row that names itself when it lacks something. `place`: its number, from 1."""

    values: Any
    path: Path
    place: int

    def __call__(self, name: str, kind: type) -> Any:
        """The value under `name`; a UserError where it is of another kind than `kind`, or empty."""
        value = self.values.get(name) if isinstance(self.values, dict) else None
        fine = isinstance(value, kind) and not isinstance(value, bool) and (kind is int or bool(value))
        if not fine or (kind is str and not str(value).strip()):
            raise self.wrong(f"no {name} ({kind.__name__} expected)")
        return value

    def picture(self, folder: Path, file: str) -> Record:
        """The picture folder/file that this row speaks of, read when it is asked for."""
        if leads_out(file):
            raise self.wrong(f"picture '{shown(file, 60)}' leads out of its folder")
        return Record(file, (folder / file).read_bytes)

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.path}: row {self.place}: {what}; put the published file there")


def json_rows(path: Path, section: str | None = None) -> list[Row]:
    """The rows of a JSON list, of the list `section` of a JSON mapping, or of JSON lines; at least one."""
    if section is None and (path.suffix == ".jsonl" or not _text(path).lstrip().startswith("[")):
        lines = enumerate(_text(path).split("\n"), 1)
        rows = [_parsed(line, f"{path}: line {number}") for number, line in lines if line.strip()]
        return rows_of(rows, path)
    content = read_json(path)
    return rows_of(content.get(section) if section and isinstance(content, dict) else content, path, section)


def rows_of(values: Any, path: Path, section: str | None = None) -> list[Row]:
    """The elements of a list that `path` holds, under the name `section` or as its whole; a UserError if it is none."""
    if not isinstance(values, list) or not values:
        named = f"list of {section}" if section else "rows"
        raise UserError(f"{path}: no {named} in it; put the published file there")
    return [Row(row, path, place) for place, row in enumerate(values, 1)]


def read_json(path: Path) -> Any:
    return _parsed(_text(path), str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as wrong:
        reason = getattr(wrong, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{path}: cannot be read ({reason}); put the published file there") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as wrong:
        raise UserError(f"{where}: not JSON ({getattr(wrong, 'msg', 'nested too deep')}); get the file again") from None
