"""One way to write a file whole, to lock it, to hash it, and where the cache lies."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
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


CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as stream:
        return digest(stream)


def digest(stream: BinaryIO) -> str:
    """The sha256 of the rest of a stream, in hex."""
    found = hashlib.sha256()
    while chunk := stream.read(CHUNK):
        found.update(chunk)
    return found.hexdigest()


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a fresh path in the same folder; what was written there is synced and renamed to `path` if the block
    ends well, and removed if it does not. Whoever wrote it, the file may be read by all whom the umask lets."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; it cannot be asked without being changed
        temporary.unlink()
        yield temporary
        flush(temporary)
        os.chmod(temporary, mode)  # safetensors and tempfile put a private file in its place
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Under its name stands the old file or the new one, also after a power cut. UserError where it cannot be."""
    try:
        with atomic(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); mend that, then give the same command"
        ) from None


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a fresh folder beside `path`, which takes its name if the block ends well, and is removed if it does not.
    There may be an empty folder already. UserError where it cannot be written."""
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another place") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def made(folder: Path) -> None:
    """Make the folder where it is not there. UserError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); free space, or mend what is above it") from None


def flush(path: Path) -> None:
    """To the disk itself: a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# files that one process has to itself: `filelock` locks a path, here it is the open file that is locked, written and
# renamed, so that neither a lock removed by hand nor a folder made anew lets a second writer in


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """One process at a time on this machine. While a living one has the lock this one waits, and calls `waiting` over
    and over. Yields False where there are no locks (no flock, or a network file system without)."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock, alone = claim(path)
            break
        except BlockingIOError:
            waiting()
            time.sleep(0.1)
    try:
        yield alone
    finally:
        release(lock)


def claim(path: Path) -> tuple[io.FileIO, bool]:
    """A file opened for writing (made where absent) that is this process's own until `release`, and True; or False
    where this system or file system has no flock. BlockingIOError: a living process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        file = io.FileIO(descriptor, "r+")
        try:
            alone = _flock(file)
            if same(path, file):
                return file, alone
        except BaseException:
            file.close()
            raise
        file.close()  # between opening and locking it was removed, or became the finished file: not ours to write


def release(file: io.FileIO) -> None:
    """Give up a claim. Closing alone would not: a process forked meanwhile holds the same open file."""
    _flock(file, give_up=True)
    file.close()


def same(path: Path, file: io.FileIO) -> bool:
    """Whether the path still names the open file."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


def _flock(file: io.FileIO, give_up: bool = False) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN if give_up else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        return False
    return True
