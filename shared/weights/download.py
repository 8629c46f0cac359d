"""One file over http or https: whole and right, or not at all.

What has arrived lies in a part file; a note beside it says from which address, and of which version (strong ETag, else
Last-Modified), the bytes are. A later try goes on from there only where a 206 confirms that version and that offset
(If-Range, RFC 9110, 13.1.5 and 15.3.7); any other answer starts over. Whatever the server said, the sha256 of the whole
file decides in the end."""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shared.core.files import CHUNK, claim, digest, release, same

TIMEOUT = 30.0  # seconds without a byte before a try is given up
SLOWEST = 1024  # bytes per second over TIMEOUT: less is a stall too
PAUSES = (1.0, 2.0, 4.0)  # seconds before each further try of one address; a try that brought CHUNK more counts afresh
LARGEST = 1 << 36  # 64 GiB: where no size is known, a longer stream is refused

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers that another try may better
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class TransferError(Exception):
    """Why an address, or each of them, gave no right file: one line. `again`: another try may fare better."""

    def __init__(self, reason: str, again: bool = True):
        super().__init__(one_line(reason))
        self.again = again


def one_line(text: object) -> str:
    """Words of others, fit for an error of one line on a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def allowed(url: object) -> bool:
    """Whether an address may be asked: https, or http on this machine's loopback."""
    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is none raises here
    except ValueError:
        return False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and host in _LOOPBACK))


def differs(stream: BinaryIO, sha256: str | None, size: int | None) -> str | None:
    """What is wrong with a file, read from its beginning: expected and found. None if nothing is."""
    found = stream.seek(0, os.SEEK_END)
    if size is not None and found != size:
        return f"size differs: expected {size:,} bytes, found {found:,}"
    stream.seek(0)
    if (digest_found := digest(stream)) != sha256:
        return f"sha256 differs: expected {sha256}, found {digest_found}"
    return None


@dataclass(frozen=True)
class _Note:
    """Whose bytes a part file holds: the address, the sha256 that they are to have, and the version that was served."""

    url: str
    sha256: str
    header: str  # ETag | Last-Modified
    version: str


class _Part:
    """What has arrived. This process alone writes the file, and holds it open until it has been moved: whatever happens
    to the folder meanwhile, what was hashed is what is moved."""

    def __init__(self, path: Path, urls: Sequence[str], sha256: str):
        self.path, self.note_path, self.sha256 = path, path.with_name(f"{path.name}.json"), sha256
        try:
            self.file, _ = claim(path)
        except BlockingIOError:
            raise TransferError(f"another process is writing {path}: wait for its end and run this again") from None
        self.note = self._read_note(urls)

    def _read_note(self, urls: Sequence[str]) -> _Note | None:
        with suppress(OSError, ValueError, TypeError):
            note = _Note(**json.loads(self.note_path.read_text()))
            sound = note.header in ("ETag", "Last-Modified") and _version({note.header: note.version}) is not None
            if sound and note.url in urls and note.sha256 == self.sha256:
                return note
        return None

    @property
    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def have(self, url: str) -> int:
        """Bytes that this address can be asked to go on from."""
        return self.size if self.note and self.note.url == url else 0

    def restart(self, note: _Note | None = None) -> None:
        """Forget what there is; what is written next is of `note`, or will be of no use to a later try."""
        self.note_path.unlink(missing_ok=True)
        self.file.truncate(0)
        self.note = note
        if note:
            self.note_path.write_text(json.dumps(asdict(note)))

    def write(self, chunk: bytes) -> None:
        left = memoryview(chunk)
        while left:
            left = left[self.file.write(left) :]

    def move(self, finished: Path) -> None:
        """To the name `finished`, which no other process knows."""
        os.fsync(self.file.fileno())
        if same(self.path, self.file):
            os.replace(self.path, finished)
        if not same(finished, self.file):
            raise FileNotFoundError(errno.ENOENT, "removed while it was written", str(self.path))
        self.note_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave a later try what it can go on from, and nothing else."""
        with suppress(OSError):
            if not (self.note and self.size) and same(self.path, self.file):
                self.path.unlink()
                self.note_path.unlink(missing_ok=True)
        release(self.file)


# the transfer


def download(
    urls: Sequence[str],
    finished: Path,
    *,
    part: Path,
    keep: bool,
    sha256: str,
    size: int | None = None,
    report: Callable[[int, int | None], None] = lambda _done, _total: None,
) -> None:
    """Bring the file of that sha256 (64 hex digits) and size (bytes, where known) to the path `finished`, synced.

    The addresses are tried in order, the one that an earlier try was cut off from first. `part` is where the bytes
    gather and stay after a failure, for a later try if the caller is to `keep` them. `report(done, total)` hears of
    bytes. TransferError names each address and its fault; OSError is of the disk alone.
    """
    arrived = _Part(part, urls, sha256)
    try:
        started = arrived.note.url if arrived.note else None
        failures = []
        for url in sorted(urls, key=lambda url: url != started):
            try:
                _from(url, arrived, size, report)
                break
            except TransferError as error:
                failures.append(f"{url}: {error}")
        else:
            left = arrived.size if keep and arrived.note else 0
            kept = f"{left:,} bytes are kept to go on from" if left else "nothing was kept"
            raise TransferError(f"{'; '.join(failures)}; {kept}")
        arrived.move(finished)
    except OSError as error:
        if error.errno in FULL:  # what is of no use on a full disk goes
            arrived.restart()
        raise
    finally:
        arrived.close()


def _from(url: str, part: _Part, size: int | None, report: Callable[[int, int | None], None]) -> None:
    """The whole file from one address, in as many tries as bring it forward."""
    if not allowed(url):  # an Entry need not come from load_manifest
        raise TransferError("https only (http for the loopback)")
    tries, most, mended = 0, part.have(url), False
    while True:
        try:
            resumed = _one_try(url, part, size, report)
        except TransferError as error:
            tries = 1 if part.have(url) >= most + CHUNK else tries + 1
            most = max(most, part.have(url))
            if not error.again or tries > len(PAUSES):
                raise
            time.sleep(PAUSES[tries - 1])
            continue
        fault = differs(part.file, part.sha256, size)
        if fault is None:
            return
        part.restart()
        if not resumed or mended:  # the address itself serves other bytes
            raise TransferError(fault, again=False)
        mended = True


def _one_try(url: str, part: _Part, size: int | None, report: Callable[[int, int | None], None]) -> bool:
    """Ask once for what is missing and write it. True where it was put behind bytes of an earlier answer."""
    have, note = part.have(url), part.note
    if have and have == size:  # cut off between the last byte and the check
        return True
    headers = {"User-Agent": "papers", "Accept-Encoding": "identity"}
    if have and note:
        headers |= {"Range": f"bytes={have}-", "If-Range": note.version}
    with _open(url, headers) as answer:
        length: int | None
        if answer.status == 206 and have and note:
            total = _continues(answer.headers, have, note, size)
            if total is None:
                part.restart()
                raise TransferError("answered with another part or version than was asked for")
            length = total - have
        elif answer.status == 200:
            have, length = 0, _length(answer.headers)
            if size and length is not None and length != size:
                raise TransferError(f"size differs: expected {size:,} bytes, announced {length:,}", again=False)
            version = _version(answer.headers)
            part.restart(_Note(url, part.sha256, *version) if version else None)
        else:
            beyond = answer.status == 416 and have > 0  # there is no such rest: start over
            if beyond:
                part.restart()
            again = beyond or answer.status in _PASSING
            raise TransferError(f"answered {answer.status} {str(answer.reason)[:100]}", again=again)

        part.file.seek(have)
        done, total = have, size or (None if length is None else have + length)
        report(done, total)
        for chunk in _chunks(answer, length):
            done += len(chunk)
            if done > (size or LARGEST):
                part.restart()
                raise TransferError(f"longer than the expected {size or LARGEST:,} bytes", again=False)
            part.write(chunk)
            report(done, total)
    if total is not None and done < total:
        raise TransferError(f"ended after {done:,} of {total:,} bytes")
    return have > 0


class _SafeRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not allowed(newurl):
            raise TransferError(f"redirected to {newurl[:200]}, which is not https", again=False)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str]) -> Any:
    """The answer, whatever its status; TransferError where none came."""
    request = urllib.request.Request(url, headers=headers)
    try:
        return urllib.request.build_opener(_SafeRedirect).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as answer:
        return answer
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _broken(error) from error


def _chunks(answer: Any, length: int | None) -> Iterator[bytes]:
    """The body as it comes, `length` bytes or until its end. May end early; TransferError where it breaks or crawls."""
    got, since, then = 0, time.monotonic(), 0
    while length is None or got < length:
        try:
            chunk = answer.read1(CHUNK if length is None else min(CHUNK, length - got))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _broken(error) from error
        if not chunk:
            return
        got, now = got + len(chunk), time.monotonic()
        if now - since >= TIMEOUT:
            if got - then < SLOWEST * TIMEOUT:
                raise TransferError(f"only {got - then:,} bytes in {now - since:.0f} s")
            since, then = now, got
        yield chunk


def _broken(error: Exception) -> TransferError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return TransferError(f"nothing heard for {TIMEOUT:g} s")
    final = isinstance(reason, (ValueError, http.client.InvalidURL))  # an address that is none, a certificate refused
    return TransferError(str(reason) or type(reason).__name__, again=not final)


def _length(headers: Any) -> int | None:
    """Content-Length in bytes, where it counts."""
    length = headers.get("Content-Length", "").strip()
    return int(length) if re.fullmatch(r"[0-9]{1,18}", length) and "Transfer-Encoding" not in headers else None


def _version(headers: Any) -> tuple[str, str] | None:
    """The header that tells two versions apart, and its value. A weak ETag does not; a date is good to the second,
    which is why the hash has the last word."""
    etag, date = str(headers.get("ETag", "")), str(headers.get("Last-Modified", ""))
    if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag):
        return "ETag", etag
    return ("Last-Modified", date) if re.fullmatch(r"[A-Za-z0-9 ,:+-]+", date) else None


def _continues(headers: Any, have: int, note: _Note, size: int | None) -> int | None:
    """The length of the whole file in bytes, if a 206 is the rest of it in the noted version; else None."""
    span = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", headers.get("Content-Range", "").strip())
    if span is None or headers.get(note.header) != note.version:
        return None
    first, last, total = map(int, span.groups())
    return total if (first, last) == (have, total - 1) and total == (size or total) else None
