"""One way to write a file whole, to lock it, to hash it, and where the cache lies."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shared.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # of the repository


def cache_root(cache: str | Path | None = None) -> Path:
    """The folder of verified files: the argument, else PAPERS_CACHE, else ~/.cache/papers."""
    return _home(cache or os.environ.get("PAPERS_CACHE") or "~/.cache/papers")


def _home(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # a container's user without a home, or ~ of nobody
        raise UserError(
            f"{path}: there is no such home folder; give a whole path (the cache's: PAPERS_CACHE)"
        ) from None


def is_offline() -> bool:
    """True where PAPERS_OFFLINE or HF_HUB_OFFLINE forbids the network."""
    names = ("PAPERS_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on") for name in names)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as stream:
        return digest(stream)


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
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a fresh folder beside `path`, which takes its name if the block ends well, and is removed if it does not.
    There may be an empty folder already. UserError where it cannot be written."""
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        yield beside
        beside.chmod(0o755)  # a temporary folder is its maker's alone
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another place") from None
    finally:
        if beside:
            shutil.rmtree(beside, ignore_errors=True)


CHUNK = 1 << 20


def digest(stream: BinaryIO) -> str:
    """The sha256 of the rest of a stream, in hex."""
    found = hashlib.sha256()
    while chunk := stream.read(CHUNK):
        found.update(chunk)
    return found.hexdigest()


# files that one process has to itself


def claim(path: Path) -> tuple[io.FileIO, bool]:
    """A file opened for writing (made where absent) that is this process's own until `release`, and True; or False
    where this system or file system has no flock. BlockingIOError: a living process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        file = io.FileIO(descriptor, "r+")
        try:
            locked = _flock(file)
            if same(path, file):
                return file, locked
        except BaseException:
            file.close()
            raise
        file.close()  # between opening and locking it was removed, or became the finished file: not ours to write


def release(file: io.FileIO) -> None:
    """Give up a claim. Closing alone would not: a process forked meanwhile holds the same open file."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def same(path: Path, file: io.FileIO) -> bool:
    """Whether the path still names the open file."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


def _flock(file: io.FileIO) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        return False
    return True


def made(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); free space, or mend what is above it") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the file's lock. A process that dies gives it up."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, text: str) -> None:
    """Under its name stands the old file or the new one, also after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); mend that, then give the same command"
        ) from None
