"""Downloads from servers, disks and processes that fail: the right file or one clear line, never a wrong file, and
nothing left that would spoil the next try."""

import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from wayward import DATA, OTHER, Answer, serving

from shared.core import files
from shared.core.errors import UserError
from shared.weights import download
from shared.weights.fetch import cached, fetch
from shared.weights.manifest import Entry

DIGEST = hashlib.sha256(DATA).hexdigest()
SIZE = len(DATA)
HALF = SIZE // 2
REST = f"bytes={HALF}-"
GOOD = Answer()
TWO = ("ETag", '"two"')
DATED = ("Last-Modified", "Tue, 01 Jul 2025 10:00:00 GMT")
KEPT = [".thing.bin.partial", ".thing.bin.partial.json"]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("PAPERS_OFFLINE", "HF_HUB_OFFLINE", "PAPERS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(download, "CHUNK", 1 << 16)


@pytest.fixture
def server():
    with serving() as running:
        running.answers["/a"] = [GOOD]
        yield running


@pytest.fixture
def gate():
    """What a silent server waits for; opened at the end of the test at the latest."""
    event = threading.Event()
    yield event
    event.set()


def entry_of(server, *paths, **changes):
    urls = [f"http://127.0.0.1:{server.server_port}{path}" for path in paths or ("/a",)]
    return replace(Entry("thing", "", "data", {"type": "url", "urls": urls}, "thing.bin", DIGEST, SIZE), **changes)


def files_in(cache) -> list[str]:
    """What lies in the cache, but for the lock and the stamp."""
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and not p.name.endswith((".lock", ".verified")))


def asked(server) -> list[tuple[int, str | None]]:
    return [(status, range) for _, status, range in server.asked]


def failure(entry, cache) -> str:
    """The one line that a failing fetch says; nothing stands under the final name."""
    with pytest.raises(UserError) as caught:
        fetch(entry, cache=cache)
    line = str(caught.value)
    assert line.isprintable() and line.startswith("thing: ") and not (cache / "thing" / "thing.bin").is_file()
    return line


def comes_right(server, cache, **changes) -> None:
    """Whatever happened before, a good server now gives the right file, and nothing else is left."""
    server.answers = {path: [GOOD] for path in server.answers}
    assert fetch(entry_of(server, **changes), cache=cache).read_bytes() == DATA
    assert files_in(cache) == ["thing.bin"]


def cut_off(server, cache, monkeypatch, **answer) -> None:
    """A first call that ended half-way and was not tried again."""
    with monkeypatch.context() as once:
        once.setattr(download, "PAUSES", ())
        server.answers["/a"] = [Answer(cut=HALF, **answer)]
        failure(entry_of(server), cache)
    server.asked.clear()


# the first call

NOT_ITS_BYTES = {
    "other bytes": ([Answer(OTHER)], {}, "sha256 differs: expected", 1),
    "other bytes of another length": (
        [Answer(OTHER[:99])],
        {},
        "size differs: expected 640,000 bytes, announced 99",
        1,
    ),
    "too long, no length": ([Answer(DATA * 2, announce=None)], {}, "longer than the expected 640,000 bytes", 1),
    "length too large": ([Answer(announce=7)], {}, "expected 640,000 bytes, announced 640,007", 1),
    "length too small": ([Answer(announce=-7)], {}, "expected 640,000 bytes, announced 639,993", 1),
    "length too large, size unknown": (
        [Answer(announce=7, ranges="ignored")],
        {"size": None},
        "ended after 640,000",
        4,
    ),
    "length too small, size unknown": ([Answer(announce=-7)], {"size": None}, "sha256 differs", 1),
    "always cut off": ([Answer(cut=HALF, ranges="ignored")], {}, "ended after 320,000 of 640,000 bytes", 4),
    "cut off, no length": ([Answer(cut=HALF, announce=None, version=None)], {}, "ended after 320,000", 4),
    "cut off, nothing to know it by": ([Answer(cut=HALF, announce=None)], {"size": None}, "sha256 differs", 1),
    "a chunk cut off": ([Answer(chunked=True, cut=HALF, version=None)], {}, "IncompleteRead", 4),
    "zipped": ([Answer(OTHER, headers={"Content-Encoding": "gzip"})], {}, "sha256 differs", 1),
    "no answer": ([Answer(raw=b"")], {}, "closed connection", 4),
    "no HTTP": ([Answer(raw=b"\x1b[31mhello\r\n\r\n")], {}, "hello", 4),
    "signs for the terminal": ([Answer(raw=b"HTTP/1.0 404 \x1b[31mred\x07\r\n\r\n")], {}, r"answered 404 \[31mred;", 1),
    "404": ([Answer(status=404)], {}, "/a: answered 404 Not Found; nothing was kept, try again later or add", 1),
    "403": ([Answer(status=403)], {}, "answered 403 Forbidden", 1),
    "500": ([Answer(status=500)], {}, "answered 500 Internal Server Error", 4),
    "204": ([Answer(status=204)], {}, "answered 204 No Content", 1),
    "206, not asked for": ([Answer(status=206)], {}, "answered 206", 1),
    "416, not asked for": ([Answer(status=416)], {}, "answered 416", 1),
    "redirects without end": ([Answer(to="/a")], {}, "answered 302 .*infinite loop", 5),
    "redirect to http": ([Answer(to="http://example.invalid/x")], {}, "redirected to http://.*, which is not https", 1),
    "redirect to a file": ([Answer(to="file:///etc/hostname")], {}, "not allowed", 1),
    "redirect to no address": ([Answer(to="http://[bad/")], {}, "Invalid IPv6 URL", 1),
    "redirect to no port": ([Answer(to="https://localhost:99999/")], {}, "which is not https", 1),
}


@pytest.mark.parametrize("case", NOT_ITS_BYTES)
def test_a_bad_answer_is_one_clear_line_and_spoils_nothing(server, tmp_path, case):
    answers, changes, fault, requests = NOT_ITS_BYTES[case]
    server.answers["/a"] = list(answers)
    line = failure(entry_of(server, **changes), tmp_path)
    assert re.search(fault, line), line
    assert len(server.asked) == requests and set(files_in(tmp_path)) <= set(KEPT)
    comes_right(server, tmp_path, **changes)


MENDED = {
    "cut off once": ([Answer(cut=HALF), GOOD], {}, [(200, None), (206, REST)]),
    "cut off once, dated": ([Answer(cut=HALF, version=DATED), Answer(version=DATED)], {}, [(200, None), (206, REST)]),
    "cut off, size unknown": ([Answer(cut=HALF), GOOD], {"size": None}, [(200, None), (206, REST)]),
    "cut off, weak ETag": ([Answer(cut=HALF, version=("ETag", 'W/"one"')), GOOD], {}, [(200, None), (200, None)]),
    "cut off, no version": ([Answer(cut=HALF, version=None), GOOD], {}, [(200, None), (200, None)]),
    "a chunk cut off": ([Answer(cut=HALF, chunked=True), GOOD], {}, [(200, None), (206, REST)]),
    "no length, size unknown": ([Answer(announce=None)], {"size": None}, [(200, None)]),
    "in chunks": ([Answer(chunked=True)], {}, [(200, None)]),
    "in chunks, under a length too": ([Answer(chunked=True, headers={"Content-Length": "99"})], {}, [(200, None)]),
    "500 once": ([Answer(status=500), GOOD], {}, [(500, None), (200, None)]),
    "429 once": ([Answer(status=429), GOOD], {}, [(429, None), (200, None)]),
    "500 when cut off": ([Answer(cut=HALF), Answer(status=500), GOOD], {}, [(200, None), (500, REST), (206, REST)]),
    "no answer once": ([Answer(raw=b""), GOOD], {}, [(0, None), (200, None)]),
}


@pytest.mark.parametrize("case", MENDED)
def test_what_a_retry_mends_needs_no_second_call(server, tmp_path, case):
    answers, changes, requests = MENDED[case]
    server.answers["/a"] = list(answers)
    assert fetch(entry_of(server, **changes), cache=tmp_path).read_bytes() == DATA
    assert asked(server) == requests and files_in(tmp_path) == ["thing.bin"]


def test_tries_that_bring_the_file_forward_are_not_counted(server, tmp_path):
    server.answers["/a"] = [Answer(cut=100_000)]
    assert fetch(entry_of(server), cache=tmp_path).read_bytes() == DATA
    assert [range for _, range in asked(server)] == [None, *(f"bytes={n}00000-" for n in range(1, 7))]


def test_tries_that_bring_almost_nothing_come_to_an_end(server, tmp_path):
    server.answers["/a"] = [Answer(cut=10)]
    assert "ended after 40 of 640,000 bytes; 40 bytes are kept to go on from" in failure(entry_of(server), tmp_path)
    assert len(server.asked) == 4
    comes_right(server, tmp_path)


def test_the_pauses_between_tries_grow_and_none_follows_the_last(server, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(download, "PAUSES", (1, 2, 4))
    monkeypatch.setattr(download.time, "sleep", slept.append)
    server.answers["/a"] = [Answer(status=503)]
    failure(entry_of(server), tmp_path)
    assert slept == [1, 2, 4]


def test_a_silent_server_is_asked_again_for_the_rest(server, tmp_path, monkeypatch, gate):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.answers["/a"] = [Answer(cut=HALF, hold=gate), Answer(raw=b"", hold=gate), GOOD]
    assert fetch(entry_of(server), cache=tmp_path).read_bytes() == DATA
    assert asked(server) == [(200, None), (0, REST), (206, REST)]


def test_a_server_that_does_not_hang_up_is_not_waited_for(server, tmp_path, monkeypatch, gate):
    monkeypatch.setattr(download, "TIMEOUT", 5.0)
    server.answers["/a"] = [Answer(hold=gate)]
    begun = time.monotonic()
    assert fetch(entry_of(server), cache=tmp_path).read_bytes() == DATA
    assert time.monotonic() - begun < 5 and asked(server) == [(200, None)]


def test_a_server_that_stays_silent_is_named(server, tmp_path, monkeypatch, gate):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.answers["/a"] = [Answer(raw=b"", hold=gate)]
    assert "/a: nothing heard for 0.2 s; nothing was kept" in failure(entry_of(server), tmp_path)
    comes_right(server, tmp_path)


def test_a_server_that_crawls_is_a_stalled_one(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download, "SLOWEST", 100_000)
    server.answers["/a"] = [Answer(drip=0.02)]
    assert re.search(r"/a: only [\d,]+ bytes in 0 s; [\d,]+ bytes are kept", failure(entry_of(server), tmp_path))
    comes_right(server, tmp_path)


# the next call, after one that ended half-way

NEXT = {
    "honest": ([GOOD], [(206, REST)]),
    "ignores ranges": ([Answer(ranges="ignored")], [(200, REST)]),
    "has another version": ([Answer(version=TWO)], [(200, REST)]),
    "another version, deaf to If-Range": ([Answer(version=TWO, ranges="blind"), GOOD], [(206, REST), (200, None)]),
    "no version, deaf to If-Range": ([Answer(version=None, ranges="blind"), GOOD], [(206, REST), (200, None)]),
    "another place": ([Answer(ranges="shifted"), GOOD], [(206, REST), (200, None)]),
    "another length": ([Answer(ranges="short"), GOOD], [(206, REST), (200, None)]),
    "no Content-Range": ([Answer(ranges="unnamed"), GOOD], [(206, REST), (200, None)]),
    "an endless Content-Range": (
        [Answer(headers={"Content-Range": f"bytes {HALF}-{'9' * 5000}/*"}, ranges="unnamed"), GOOD],
        [(206, REST), (200, None)],
    ),
    "cut off again": ([Answer(cut=HALF // 2), GOOD], [(206, REST), (206, f"bytes={HALF + HALF // 2}-")]),
    "416": ([Answer(ranges="refused"), GOOD], [(416, REST), (200, None)]),
    "500 once": ([Answer(status=500), GOOD], [(500, REST), (206, REST)]),
    "other bytes under the same version": ([Answer(OTHER, ranges="blind"), GOOD], [(206, REST), (200, None)]),
}


@pytest.mark.parametrize("case", NEXT)
def test_the_next_call_goes_on_only_from_confirmed_bytes(server, tmp_path, monkeypatch, case):
    cut_off(server, tmp_path, monkeypatch)
    assert files_in(tmp_path) == KEPT
    answers, requests = NEXT[case]
    server.answers["/a"] = list(answers)
    assert fetch(entry_of(server), cache=tmp_path).read_bytes() == DATA
    assert asked(server) == requests and files_in(tmp_path) == ["thing.bin"]


@pytest.mark.parametrize("version", [TWO, ("ETag", '"one"'), DATED], ids=["told", "not told", "now dated"])
def test_content_that_changed_between_two_calls_never_mixes(server, tmp_path, monkeypatch, version):
    cut_off(server, tmp_path, monkeypatch, body=OTHER)
    server.answers["/a"] = [Answer(version=version)]
    assert fetch(entry_of(server), cache=tmp_path).read_bytes() == DATA
    assert files_in(tmp_path) == ["thing.bin"]


def test_a_wrong_sum_is_fetched_once_more_from_nothing_and_then_named(server, tmp_path, monkeypatch):
    cut_off(server, tmp_path, monkeypatch)
    server.answers["/a"] = [Answer(OTHER)]  # under the version of the bytes that are here
    assert f"sha256 differs: expected {DIGEST}, found" in failure(entry_of(server), tmp_path)
    assert asked(server) == [(206, REST), (200, None)] and files_in(tmp_path) == []
    comes_right(server, tmp_path)


def test_the_third_wrong_sum_does_not_start_a_third_download(server, tmp_path, monkeypatch):
    cut_off(server, tmp_path, monkeypatch)
    server.answers["/a"] = [Answer(OTHER), Answer(OTHER, cut=HALF), Answer(OTHER)]
    assert "sha256 differs" in failure(entry_of(server), tmp_path)
    assert asked(server) == [(206, REST), (200, None), (206, REST)] and files_in(tmp_path) == []


@pytest.mark.parametrize("status", [404, 500])
def test_a_refusal_does_not_cost_what_had_arrived(server, tmp_path, monkeypatch, status):
    cut_off(server, tmp_path, monkeypatch)
    server.answers["/a"] = [Answer(status=status)]
    line = failure(entry_of(server), tmp_path)
    assert f"answered {status}" in line and "320,000 bytes are kept to go on from" in line
    assert files_in(tmp_path) == KEPT
    server.asked.clear()
    comes_right(server, tmp_path)
    assert asked(server) == [(206, REST)]


def test_a_redirect_is_asked_for_the_rest_too(server, tmp_path, monkeypatch):
    cut_off(server, tmp_path, monkeypatch)
    server.answers |= {"/a": [Answer(to="/b")], "/b": [GOOD]}
    assert fetch(entry_of(server), cache=tmp_path).read_bytes() == DATA
    assert server.asked == [("/a", 302, REST), ("/b", 206, REST)]


def test_an_interruption_from_the_keyboard_keeps_what_had_arrived(server, tmp_path):
    def stop(_id, done, _total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(entry_of(server), cache=tmp_path, report=stop)
    assert files_in(tmp_path) == KEPT
    got = (tmp_path / "thing" / KEPT[0]).stat().st_size
    server.asked.clear()
    comes_right(server, tmp_path)
    assert asked(server) == [(206, f"bytes={got}-")]


def note(**changes):
    return lambda text: json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[:20],
        lambda text: "[1, 2]",
        lambda text: '{"url": "x"}',
        note(sha256="0" * 64),
        note(url="http://127.0.0.1/elsewhere"),
        note(version='"one"\r\nEvil: yes'),
        note(version='W/"one"'),
        note(version=7),
        note(header="Date"),
        note(header=["ETag"]),
        note(more=1),
    ],
)
def test_a_note_that_says_something_else_is_no_note(server, tmp_path, monkeypatch, change):
    cut_off(server, tmp_path, monkeypatch)
    path = tmp_path / "thing" / KEPT[1]
    path.write_text(change(path.read_text()))
    comes_right(server, tmp_path)
    assert asked(server) == [(200, None)]


@pytest.mark.parametrize(
    ("bytes_here", "requests"),
    [
        (DATA, []),  # cut off between the last byte and the check
        (OTHER, [(200, None)]),
        (b"", [(200, None)]),
        (DATA + b"more", [(416, f"bytes={SIZE + 4}-"), (200, None)]),
        (OTHER[:HALF], [(206, REST), (200, None)]),  # holes after a power cut
    ],
    ids=["whole", "whole but wrong", "empty", "too long", "wrong"],
)
def test_whatever_bytes_a_dead_process_left_the_file_comes_right(server, tmp_path, monkeypatch, bytes_here, requests):
    cut_off(server, tmp_path, monkeypatch)
    (tmp_path / "thing" / KEPT[0]).write_bytes(bytes_here)
    comes_right(server, tmp_path)
    assert asked(server) == requests


# several addresses


def test_the_next_address_is_asked_where_one_fails(server, tmp_path, monkeypatch, gate):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.answers |= {
        "/absent": [Answer(status=404)],
        "/broken": [Answer(status=500)],
        "/silent": [Answer(raw=b"", hold=gate)],
        "/cut": [Answer(cut=HALF), Answer(status=410)],
        "/other": [Answer(OTHER)],
    }
    entry = entry_of(server, "/absent", "/broken", "/silent", "/cut", "/other", "/a", "/never")
    assert fetch(entry, cache=tmp_path).read_bytes() == DATA
    paths = list(dict.fromkeys(path for path, _, _ in server.asked))
    assert paths == ["/absent", "/broken", "/silent", "/cut", "/other", "/a"] and files_in(tmp_path) == ["thing.bin"]
    assert server.asked[-1] == ("/a", 200, None)  # bytes of one address are never put behind another's


def test_bytes_of_an_address_that_is_named_no_longer_go(server, tmp_path, monkeypatch):
    cut_off(server, tmp_path, monkeypatch)
    server.answers["/b"] = [Answer(status=404)]
    assert "nothing was kept" in failure(entry_of(server, "/b"), tmp_path) and files_in(tmp_path) == []


def test_each_address_is_named_with_its_own_fault(server, tmp_path):
    server.answers |= {"/a": [Answer(status=404)], "/b": [Answer(OTHER)]}
    line = failure(entry_of(server, "/a", "/b"), tmp_path)
    assert re.search(r"/a: answered 404 Not Found; http://\S+/b: sha256 differs: .*; nothing was kept", line)


def test_the_address_that_was_cut_off_is_asked_first_by_the_next_call(server, tmp_path):
    server.answers |= {"/a": [Answer(status=404)], "/b": [Answer(cut=HALF), Answer(status=410)]}
    failure(entry_of(server, "/a", "/b"), tmp_path)
    server.asked.clear()
    server.answers = {"/a": [GOOD], "/b": [GOOD]}
    assert fetch(entry_of(server, "/a", "/b"), cache=tmp_path).read_bytes() == DATA
    assert server.asked == [("/b", 206, REST)]


def test_what_one_address_brought_is_kept_while_the_others_fail(server, tmp_path):
    server.answers |= {
        "/a": [Answer(cut=HALF), Answer(status=410)],
        "/b": [Answer(status=416)],
        "/c": [Answer(OTHER[:9])],
    }
    assert "320,000 bytes are kept" in failure(entry_of(server, "/a", "/b", "/c"), tmp_path)
    server.asked.clear()
    comes_right(server, tmp_path)
    assert asked(server) == [(206, REST)]


# processes

CHILD = """
import json, sys, time
from shared.weights import download, fetch, manifest
url, cache, sha256, size, hang = sys.argv[1:]
if hang:
    download.differs = lambda *_: time.sleep(60)
entry = manifest.Entry("thing", "", "data", {"type": "url", "urls": [url]}, "thing.bin", sha256, int(size))
heard = lambda _id, done, _total: print(done, flush=True)
fetch.fetch(entry, cache=cache, offline=False, report=heard)
print("right", flush=True)
"""


@contextmanager
def child(server, cache, hang=""):
    """A process that fetches /a and says how many bytes it heard of, then 'right'."""
    (url,) = entry_of(server).source["urls"]
    command = [sys.executable, "-c", CHILD, url, str(cache), DIGEST, str(SIZE), hang]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def hear(process, word) -> None:
    for line in process.stdout:
        if line.strip() == str(word):
            return
    pytest.fail(f"ended without saying {word}: {process.stderr.read()}")


@pytest.mark.parametrize("arrived", [0, 1, HALF, SIZE - 1])
def test_after_a_kill_the_next_call_goes_on_and_ends_right(server, tmp_path, gate, arrived):
    server.answers["/a"] = [Answer(cut=arrived, hold=gate), GOOD]
    with child(server, tmp_path) as process:
        hear(process, arrived)
        process.kill()
    gate.set()
    assert files_in(tmp_path) == KEPT
    comes_right(server, tmp_path)
    assert (206, f"bytes={arrived}-") in asked(server) if arrived else asked(server)[-1] == (200, None)


def test_after_a_kill_before_the_check_nothing_is_fetched_again(server, tmp_path):
    with child(server, tmp_path, hang="yes") as process:
        hear(process, SIZE)
        process.kill()
    server.asked.clear()
    comes_right(server, tmp_path)
    assert server.asked == []


def test_what_killed_processes_left_behind_is_swept_away(server, tmp_path):
    (tmp_path / "thing" / ".thing.bin.abc.part").mkdir(parents=True)
    (tmp_path / "thing" / ".thing.bin.abc.part" / "half.tgz").write_bytes(OTHER)
    (tmp_path / "thing" / ".thing.bin.77-0a0b0c0d.part").write_bytes(OTHER)
    comes_right(server, tmp_path)


def test_of_two_processes_one_downloads_and_the_other_waits(server, tmp_path, gate):
    server.answers["/a"] = [Answer(cut=HALF, hold=gate), GOOD]
    with child(server, tmp_path) as first:
        hear(first, HALF)
        with child(server, tmp_path) as second:
            hear(second, HALF)  # of the first one's bytes
            gate.set()
            hear(first, "right")
            hear(second, "right")
    assert asked(server) == [(200, None), (206, REST)]
    comes_right(server, tmp_path)


def test_who_waits_takes_over_from_one_that_was_killed(server, tmp_path, gate):
    server.answers["/a"] = [Answer(cut=HALF, hold=gate), GOOD]
    with child(server, tmp_path) as first:
        hear(first, HALF)
        with child(server, tmp_path) as second:
            hear(second, HALF)
            first.kill()
            hear(second, "right")
    assert asked(server) == [(200, None), (206, REST)]
    comes_right(server, tmp_path)


def test_a_process_forked_meanwhile_does_not_keep_the_lock(server, tmp_path):
    forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)

    def fork_once(*_):
        if forked.pid is None:
            forked.start()

    fetch(entry_of(server), cache=tmp_path, report=fork_once)
    try:
        lock, alone = files.claim(tmp_path / "thing" / ".thing.bin.lock")
        files.release(lock)
        assert alone and forked.is_alive()
    finally:
        forked.kill()
        forked.join()


@pytest.mark.parametrize("where", [".", "thing"], ids=["the cache", "its folder"])
def test_a_cache_that_is_removed_under_a_download_is_a_clear_line(server, tmp_path, where):
    cache = tmp_path / "cache"

    def remove(_id, done, _total):
        if done:
            shutil.rmtree(cache / where, ignore_errors=True)

    with pytest.raises(UserError, match=r"thing: cannot use .*thing.bin: the folder was removed .*: run it again"):
        fetch(entry_of(server), cache=cache, report=remove)
    assert not (cache / "thing" / "thing.bin").exists()
    comes_right(server, cache)


@pytest.mark.parametrize("version", [GOOD.version, None], ids=["to be kept", "of no further use"])
def test_a_removed_cache_that_another_process_fills_again_is_left_to_it(server, tmp_path, gate, version):
    server.answers["/a"] = [Answer(version=version), Answer(cut=HALF, hold=gate), GOOD]
    with ExitStack() as stack:
        others = []

        def remove_and_start_another(_id, done, _total):
            if done and not others:
                shutil.rmtree(tmp_path / "thing")
                others.append(stack.enter_context(child(server, tmp_path)))
                hear(others[0], HALF)

        with pytest.raises(UserError, match="the folder was removed"):
            fetch(entry_of(server), cache=tmp_path, report=remove_and_start_another)
        assert files_in(tmp_path) == KEPT  # the other's half, not moved to the final name and not taken away
        gate.set()
        hear(others[0], "right")
    comes_right(server, tmp_path)


def test_a_lock_that_is_removed_by_hand_lets_no_second_writer_in(server, tmp_path):
    said = []

    def remove_and_try(_id, done, _total):
        if done and not said:
            (tmp_path / "thing" / ".thing.bin.lock").unlink()
            said.append(failure(entry_of(server), tmp_path))

    assert fetch(entry_of(server), cache=tmp_path, report=remove_and_try).read_bytes() == DATA
    assert re.search(r"another process is writing .*\.partial: wait for its end", said[0]) and len(server.asked) == 1
    comes_right(server, tmp_path)


def test_a_file_that_became_the_finished_one_is_not_claimed_for_writing(tmp_path, monkeypatch):
    real, path = files._flock, tmp_path / "part"
    path.write_bytes(DATA)

    def finish_first(file, give_up=False):  # another process moves it between our opening and our locking
        monkeypatch.setattr(files, "_flock", real)
        os.replace(path, tmp_path / "finished")
        return real(file)

    monkeypatch.setattr(files, "_flock", finish_first)
    file, _ = files.claim(path)
    file.truncate(0)
    files.release(file)
    assert (tmp_path / "finished").read_bytes() == DATA


def test_without_locks_nothing_is_shared_and_nothing_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    server.answers["/a"] = [Answer(cut=HALF), GOOD]
    assert fetch(entry_of(server), cache=tmp_path).read_bytes() == DATA  # in one call it goes on all the same
    assert asked(server) == [(200, None), (206, REST)] and files_in(tmp_path) == ["thing.bin"]
    shutil.rmtree(tmp_path / "thing")
    server.answers["/a"] = [Answer(cut=HALF), Answer(status=410)]
    assert "nothing was kept" in failure(entry_of(server), tmp_path) and files_in(tmp_path) == []


# disks

AWAY = r"set PAPERS_CACHE to another folder"


@pytest.fixture
def tiny(tmp_path):
    """A real file system of 256 KiB, remounted with other options on demand; skipped where that needs more rights."""
    place = tmp_path / "tiny"
    place.mkdir()
    tool = shutil.which("mount")
    if (
        not tool
        or subprocess.run([tool, "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("mounting needs a privileged user")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def as_nobody():
    """A world-readable folder, and an unprivileged user to work as."""
    folder = Path(tempfile.mkdtemp(prefix="papers-"))
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        yield folder, (lambda: os.seteuid(65534)) if root else (lambda: None)
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("when", [1, HALF])
def test_a_disk_that_fills_up_is_named_and_gets_its_room_back(server, tmp_path, monkeypatch, when):
    real = download._Part.write

    def write(part, chunk):
        if part.size + len(chunk) > when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(part, chunk)

    with monkeypatch.context() as full:
        full.setattr(download._Part, "write", write)
        line = failure(entry_of(server), tmp_path)
    assert re.search(
        rf"cannot use {tmp_path}/thing/thing.bin: No space left on device, the file takes 640,000 .*{AWAY}", line
    )
    assert files_in(tmp_path) == []
    comes_right(server, tmp_path)


def test_a_note_that_finds_no_room_is_a_full_disk_too(server, tmp_path, monkeypatch):
    def write_text(path, *_):
        path.write_bytes(b"{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", write_text)
        assert "No space left" in failure(entry_of(server), tmp_path)
    assert files_in(tmp_path) == []
    comes_right(server, tmp_path)


def test_a_full_disk_in_truth(server, tiny):
    entry = entry_of(server, size=None)
    assert re.search(rf"No space left on device, of unknown size: .*{AWAY}", failure(entry, tiny))
    assert files_in(tiny) == [] and len(server.asked) == 1


def test_a_disk_that_is_too_small_is_known_before_a_byte_is_asked_for(server, tiny):
    assert re.search(rf"No space left on device, the file takes 640,000 bytes.*{AWAY}", failure(entry_of(server), tiny))
    assert server.asked == []


def test_what_has_arrived_needs_no_second_room(server, tmp_path, monkeypatch):
    cut_off(server, tmp_path, monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=HALF))
    comes_right(server, tmp_path)


def test_a_read_only_disk_serves_what_it_has_and_takes_nothing(server, tiny):
    small = entry_of(server, sha256=hashlib.sha256(DATA[:9]).hexdigest(), size=9)
    (tiny / "thing").mkdir()
    (tiny / "thing" / "thing.bin").write_bytes(DATA[:9])
    subprocess.run(["mount", "-o", "remount,ro", tiny], check=True)
    assert fetch(small, cache=tiny).read_bytes() == DATA[:9]
    other = replace(small, id="other")
    with pytest.raises(UserError, match=rf"other: cannot use {tiny}/other/thing.bin: Read-only file system: {AWAY}"):
        fetch(other, cache=tiny)
    assert server.asked == []


def test_a_folder_of_someone_else_is_named(server):
    with as_nobody() as (folder, drop):
        folder.chmod(0o555)
        drop()
        line = failure(entry_of(server), folder / "cache")
        assert re.search(rf"Permission denied: {folder} must be yours to read and write; change .*{AWAY}", line)
    assert server.asked == []


def test_a_file_that_may_not_be_read_is_named_and_left_alone(server):
    with as_nobody() as (folder, drop):
        (folder / "thing").mkdir()
        path = folder / "thing" / "thing.bin"
        path.write_bytes(DATA)
        path.chmod(0)
        drop()
        with pytest.raises(UserError, match=rf"thing: cannot use .*Permission denied: {path} must be yours"):
            cached(entry_of(server), cache=folder)
        with pytest.raises(UserError, match=rf"thing: cannot use .*Permission denied: {path} must be yours"):
            fetch(entry_of(server), cache=folder)
        assert path.exists()
    assert server.asked == []


@pytest.mark.parametrize("blocked", ["cache", "cache/thing"])
@pytest.mark.parametrize("by", ["a file", "a link to nowhere"])
def test_a_file_where_a_folder_is_expected_is_named(server, tmp_path, blocked, by):
    path = tmp_path / blocked
    path.parent.mkdir(exist_ok=True)
    path.write_text("in the way") if by == "a file" else path.symlink_to(tmp_path / "cache" / "absent")
    line = failure(entry_of(server), tmp_path / "cache")
    assert f"{path} is no folder, where one is expected: move it away or set PAPERS_CACHE" in line
    assert server.asked == []


@pytest.mark.parametrize("name", ["thing.bin", ".thing.bin.lock", ".thing.bin.partial", ".thing.bin.partial.json"])
def test_a_folder_where_a_file_is_expected_is_named(server, tmp_path, name):
    path = tmp_path / "thing" / name
    path.mkdir(parents=True)
    line = failure(entry_of(server), tmp_path)
    assert f"{path} is a folder where a file is expected: move it away or set PAPERS_CACHE" in line and path.is_dir()


def test_a_pipe_where_a_file_is_expected_is_not_read(server, tmp_path):
    (tmp_path / "thing").mkdir()
    os.mkfifo(tmp_path / "thing" / "thing.bin")
    pipe = os.open(tmp_path / "thing" / "thing.bin", os.O_RDWR)  # so that who opens it does not wait for a writer
    try:
        comes_right(server, tmp_path)
    finally:
        os.close(pipe)


def test_a_disk_that_fails_to_sync_gives_no_file(server, tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fsync)
        assert "Input/output error: free space, mend the disk" in failure(entry_of(server), tmp_path)
    comes_right(server, tmp_path)


def test_the_bytes_are_synced_while_a_later_call_could_still_go_on_from_them(server, tmp_path, monkeypatch):
    real, there = os.fsync, []

    def fsync(descriptor):
        there.append(files_in(tmp_path))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    comes_right(server, tmp_path)
    assert there[0] == KEPT


def test_a_user_without_a_home_is_told_to_name_a_cache(server, monkeypatch):
    def expanduser(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    with pytest.raises(UserError, match=r"~/.cache/papers: there is no such home folder; .*PAPERS_CACHE"):
        fetch(entry_of(server))


# nothing outside the cache


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ".."},
        {"id": "../thing"},
        {"id": "/tmp/thing"},
        {"id": "C:"},
        {"id": ""},
        {"id": "thing\n"},
        {"file": ".."},
        {"file": "a/.."},
        {"file": "../thing.bin"},
        {"file": "a/../../thing.bin"},
        {"file": "/etc/thing.bin"},
        {"file": "a//thing.bin"},
        {"file": "thing/"},
        {"file": ""},
        {"file": "C:thing.bin"},
        {"file": "C:/thing.bin"},
        {"file": "a\\..\\thing.bin"},
        {"file": "thing.bin\0"},
        {"file": "thing\n.bin"},
        {"file": "\ud800.bin"},
        {"file": ".thing.bin.verified"},
    ],
    ids=repr,
)
def test_an_entry_that_leads_out_of_the_cache_is_refused_by_name(server, tmp_path, changes):
    entry = entry_of(server, **changes)
    for bring in (fetch, cached):
        with pytest.raises(UserError, match="leads out of the cache") as caught:
            bring(entry, cache=tmp_path / "cache")
        assert str(caught.value).isprintable()
    assert server.asked == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["thing", "thing/thing.bin"])
def test_a_link_out_of_the_cache_is_refused_by_name(server, tmp_path, name):
    outside, link = tmp_path / "outside", tmp_path / "cache" / name
    outside.mkdir()
    (outside / "thing.bin").write_bytes(DATA)
    link.parent.mkdir(parents=True)
    link.symlink_to(outside if name == "thing" else outside / "thing.bin")
    with pytest.raises(
        UserError, match=rf"thing: {link} is a link to {outside}.*, out of the cache: put the file itself"
    ):
        fetch(entry_of(server), cache=tmp_path / "cache")
    assert server.asked == [] and (outside / "thing.bin").read_bytes() == DATA


@pytest.mark.parametrize("name", [".thing.bin.lock", ".thing.bin.verified", *KEPT])
def test_a_link_in_place_of_the_caches_own_files_is_refused_by_name(server, tmp_path, name):
    (tmp_path / "precious").write_bytes(OTHER)
    link = tmp_path / "cache" / "thing" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=rf"thing: {link} is a link, where only a file can be: remove it"):
        fetch(entry_of(server), cache=tmp_path / "cache")
    assert server.asked == [] and (tmp_path / "precious").read_bytes() == OTHER


def test_a_cache_that_is_itself_a_link_is_taken(server, tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "large")
    assert fetch(entry_of(server), cache=tmp_path / "cache").read_bytes() == DATA
    assert (tmp_path / "large" / "thing" / "thing.bin").read_bytes() == DATA
