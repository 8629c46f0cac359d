"""Archives from strangers, tar (plain or gzip) and zip: their regular files are read into memory, and nothing is ever
unpacked to disk. Every reader of an archive in this tree goes through here."""

from __future__ import annotations

import gzip
import io
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from shared.core.errors import UserError
from shared.core.text import shown

LARGEST_HEADER = 1 << 20  # bytes that one header of a tar may take (long names, extended attributes)


class ArchiveError(ValueError):
    """One file of an archive that cannot be had, and why."""


@dataclass(frozen=True)
class Limits:
    """What an archive may hold: so many members, one file of `member` bytes at most, and all together at most
    `total` bytes, and `floor` plus `ratio` times the archive's own size."""

    members: int = 2_000_000
    member: int = 512_000_000
    total: int = 1 << 40
    ratio: float = 100.0
    floor: int = 1 << 26


class SafeArchive:
    """The regular files of one archive by name: 'a/b.jpg', without './'.

    `refused` holds what is never read, name -> why: a link, a device, a name that leads out of the archive, ... A
    broken archive, two members of one name, and more than `limits` allow are a UserError. Not for several threads.
    """

    def __init__(self, path: str | Path, limits: Limits | None = None):
        self.path, self.limits = Path(path), limits or Limits()
        self.refused: dict[str, str] = {}
        self._files: dict[str, _Member] = {}
        try:
            self._stream = open(self.path, "rb")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}): name an archive that can") from None
        self._allowed = self.limits.floor + self.limits.ratio * self.path.stat().st_size
        self._allowed = int(min(self.limits.total, self._allowed))
        try:
            head = self._stream.read(4)
            self._stream.seek(0)
            self._archive = (_Zip if head[:2] == b"PK" else _Tar)(self._stream, head, self._allowed)
        except Exception as error:
            self.close()
            raise self._broken(error) from None

    def members(self) -> Iterator[str]:
        """Once: the names of the files that may be read, in the archive's order. Each is read as it comes, or later."""
        total = 0
        try:
            for count, member in enumerate(self._archive.members(), 1):
                total += member.size
                if count > self.limits.members:
                    raise UserError(f"{self.path}: more than {self.limits.members:,} members: not read")
                if member.size < 0:
                    raise ArchiveError(f"a size of {member.size:,} bytes")
                if total > self._allowed:
                    raise _TooMuch
                name, problem = _plain(member.name), member.problem or self._problem(member)
                if name in self._files or (name in self.refused and not member.folder):
                    raise UserError(f"{self.path}: two members are called {shown(name)}: not read, one may hide")
                if problem:
                    self.refused[name] = problem
                elif not member.folder:
                    self._files[name] = member
                    yield name
        except UserError:
            raise
        except Exception as error:  # parsers of hostile or cut files fail in many ways
            raise self._broken(error) from None

    def read(self, name: str) -> bytes:
        """The content of a file that `members` has come past. ArchiveError says why it cannot be had."""
        name = _plain(name)
        if name in self.refused:
            raise ArchiveError(f"the archive holds it as {self.refused[name]}")
        if name not in self._files:
            raise ArchiveError("the archive has no such file")
        member = self._files[name]
        try:
            content = self._archive.read(member)
        except Exception as error:
            raise ArchiveError(f"the archive is damaged ({shown(error)})") from None
        if len(content) < member.size:
            raise ArchiveError("the archive is cut short")
        return content

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> SafeArchive:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _problem(self, member: _Member) -> str | None:
        if leads_out(member.name):
            return "a name that leads out of it"
        return f"{member.size:,} bytes" if member.size > self.limits.member else None

    def _broken(self, error: Exception) -> UserError:
        if isinstance(error, _TooMuch):
            return UserError(f"{self.path}: unpacks to more than the {self._allowed:,} bytes that its size allows")
        return UserError(f"{self.path}: no readable tar or zip archive ({shown(error)}): get the file again")


class _Member(NamedTuple):
    name: str
    size: int
    folder: bool
    problem: str | None
    info: Any  # the archive's own record of it


class _Tar:
    def __init__(self, stream: BinaryIO, head: bytes, allowed: int):
        self.packed = head[:2] == b"\x1f\x8b"
        self.meter = _Meter(gzip.GzipFile(fileobj=stream) if self.packed else stream, allowed)
        self.tar = tarfile.open(fileobj=self.meter, mode="r:")  # noqa: SIM115 (reads on demand)

    def members(self) -> Iterator[_Member]:
        for info in self.tar:
            problem = "a link" if info.issym() or info.islnk() else None
            if not (info.isreg() or info.isdir() or problem):
                problem = "a device"
            yield _Member(info.name, info.size, info.isdir(), problem, info)
        self.meter.seek(self.tar.offset)
        if self.meter.read(512) != bytes(512):  # tarfile takes a header that is cut or broken for the end
            raise tarfile.ReadError("no end mark")
        while self.packed and self.meter.read(LARGEST_HEADER):  # to the end, where gzip keeps its checksum
            pass

    def read(self, member: _Member) -> bytes:
        self.meter.most = max(LARGEST_HEADER, member.size)
        try:
            stream = self.tar.extractfile(member.info)
            assert stream is not None, "a regular file has a content"
            return stream.read()
        finally:
            self.meter.most = LARGEST_HEADER


class _Zip:
    def __init__(self, stream: BinaryIO, _head: bytes, _allowed: int):
        self.zip = zipfile.ZipFile(stream)

    def members(self) -> Iterator[_Member]:
        for info in self.zip.infolist():
            kind, problem = stat.S_IFMT(info.external_attr >> 16), None
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                problem = "a link" if kind == stat.S_IFLNK else "a device"
            elif info.flag_bits & 1:
                problem = "an encrypted file"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                problem = f"a file packed by method {info.compress_type}"
            yield _Member(info.orig_filename, info.file_size, info.is_dir(), problem, info)

    def read(self, member: _Member) -> bytes:
        with self.zip.open(member.info) as stream:
            # A number bounds what is unpacked; one more than the size, so that a size of 0 is held to its checksum too.
            return stream.read(member.size + 1)


class _TooMuch(OSError):
    """More than the archive may unpack to; of a kind that tarfile lets through."""


class _Meter(io.RawIOBase):
    """A stream that refuses to go beyond `allowed` bytes, or to give more than `most` at once: tarfile reads a header
    of any length into memory, and gzip makes a thousand bytes out of one."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile, allowed: int):
        self.stream, self.allowed, self.most = stream, allowed, LARGEST_HEADER

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= self.most:
            raise _TooMuch
        content = self.stream.read(count)
        if self.stream.tell() > self.allowed:
            raise _TooMuch
        return content

    def seek(self, position: int, whence: int = 0) -> int:
        return self.stream.seek(position, whence)

    def tell(self) -> int:
        return self.stream.tell()


def leads_out(name: str) -> bool:
    """Whether a path from a stranger is absolute, of another drive, climbs by '..', or is none at all."""
    parts = re.split(r"[/\\]", name)
    return parts[0] == "" or ".." in parts or "\0" in name or re.match("[A-Za-z]:", name) is not None


def _plain(name: str) -> str:
    return str(PurePosixPath(name))
