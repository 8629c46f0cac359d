"""Records that could not be sent yet: in order, in memory and in a JSONL file, and how many of them have arrived."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.core.files import claim, release


class Kept:
    """A queue of records in a file that is there only while it is needed, and belongs to one process at a time.

    The first line says where the records belong, {"delivered": n} that of all records so far the first n have arrived.
    A file that was left by an earlier process is taken up. BlockingIOError: a living process has it.
    """

    def __init__(self, path: Path, belong: Mapping[str, str] | None = None) -> None:
        self.path, self.belong = path, dict(belong or {})
        self.waiting: deque[dict[str, Any]] = deque()
        self.sent = self._marked = 0
        self._file = None
        self._lost = False  # not all that waits is in the file
        if path.is_file():
            self._open()

    def add(self, record: Mapping[str, Any]) -> None:
        """Behind those that wait. Where the disk fails there is one warning, and the record waits in memory alone."""
        try:
            if self._file is None:
                self._open()
            self._write(record)
        except OSError as error:
            self._cannot(self.path, error)
        self.waiting.append(dict(record))

    def done(self) -> None:
        """The first of those that wait has arrived."""
        self.waiting.popleft()
        self.sent += 1

    def mark(self) -> None:
        """Write down how many have arrived."""
        if self._file is None or self._lost or self.sent == self._marked:
            return
        try:
            self._write({"delivered": self.sent})
            self._marked = self.sent
        except OSError as error:  # then some will be sent again, which changes nothing
            self._cannot(self.path, error)

    def refuse(self, record: Mapping[str, Any]) -> Path:
        """Set aside, so that it does not stop what waits behind it. -> where."""
        place = self.path.with_name(f"{self.path.name}.refused")
        try:
            with place.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            self._cannot(place, error)
        return place

    def close(self) -> None:
        """Give the file up: renamed to `<name>.delivered` where all of it has arrived, with its mark where not."""
        if self._file is None:
            return
        self.mark()
        try:
            if not self.waiting:
                self.path.replace(self.path.with_name(f"{self.path.name}.delivered"))
        except OSError as error:
            self._cannot(self.path, error)
        release(self._file)
        self._file = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file, _ = claim(self.path)
        whole, _, cut = self._file.readall().rpartition(b"\n")
        records, self.sent = [], 0
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off by a full disk
                continue
            if not isinstance(record, dict):  # a stranger's line
                continue
            if "delivered" in record:
                self.sent = record["delivered"]
            elif "run" in record:
                records.append(record)
            else:
                self.belong = record | self.belong
        self._marked = self.sent
        if not self._lost:
            self.waiting = deque(records[self.sent :])
        if cut:
            self._file.write(b"\n")
        if not whole:
            self._write(self.belong)

    def _write(self, line: Mapping[str, Any]) -> None:
        # where a write failed half way, its line must not run into the next one
        data = b"\n" * self._lost + json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if self._file.write(data) != len(data):
            raise OSError("it was cut off: is the disk full?")

    def _cannot(self, path: Path, error: OSError) -> None:
        if not self._lost:
            self._lost = True
            reason = error.strerror or str(error)
            print(f"{path}: cannot be written ({reason}); records wait in memory alone", file=sys.stderr, flush=True)
